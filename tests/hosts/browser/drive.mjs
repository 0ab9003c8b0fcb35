// node drive.mjs: reads {"arguments": […], "context": {…}, "steps": [{"do": …}]} from stdin, drives Debian's Chromium
// and prints {"read": [what each "read" found], "requests": [every address], "errors": [what the page threw]}.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { text } from "node:stream/consumers";

import { chromium } from "playwright-core";

const plan = JSON.parse(await text(process.stdin));
const profile = mkdtempSync(path.join(tmpdir(), "chromium-"));
const context = await chromium.launchPersistentContext(profile, {
  executablePath: "/usr/bin/chromium",
  args: [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream", ...plan.arguments,
  ],
  ...plan.context,
});
const found = { read: [], requests: [], errors: [] };
context.on("request", (request) => found.requests.push(request.url()));
const page = context.pages()[0];
page.setDefaultTimeout(60_000);
page.on("pageerror", (error) => found.errors.push(error.message));

const steps = {
  goto: ({ url }) => page.goto(url),
  fill: ({ at, value }) => page.fill(at, value),
  click: ({ at }) => page.click(at),
  file: ({ at, path: file }) => page.setInputFiles(at, file),
  press: ({ key }) => page.keyboard.press(key),
  focus: ({ at }) => page.focus(at),
  wait: ({ until }) => page.waitForFunction(until),
  see: ({ at }) => page.waitForSelector(at), // where the page's policy forbids what "wait" evaluates
  read: async ({ of }) => found.read.push(await page.evaluate(of)),
  screenshot: ({ path: file }) => page.screenshot({ path: file, fullPage: true }),
};
try {
  for (const step of plan.steps) await steps[step.do](step);
} finally {
  await context.close();
  rmSync(profile, { recursive: true, force: true });
}
console.log(JSON.stringify(found));
