// Ask a fixed question about PNG images: node ask.mjs BUNDLE PROMPT.json IMAGE.png … [--tokens K] [--json]
// No tokenizer and no template: prompt.json (`resprune prompt`) has ids, keywords, stop ids and the text of tokens.

import { readFile } from "node:fs/promises";
import path from "node:path";
import { parseArgs } from "node:util";

import * as ort from "onnxruntime-node";
import { PNG } from "pngjs";

import { imageProcessorConfig, readBundle, UserError } from "../web/bundle.mjs";
import { imageProcessor, MAX_PIXELS, onWhite, pixelValues } from "../web/image.mjs";
import { cut, embed, encode, generate, graphNames, select, splice } from "../web/walk.mjs";

const USAGE = "node ask.mjs BUNDLE PROMPT.json IMAGE.png … [--tokens K] [--max-new-tokens N] [--json]";

async function main() {
  const { root, promptFile, images, tokens, maxNewTokens, asJson } = await readArguments();
  const bundle = await readBundle((name) => read(path.join(root, name)));
  const { manifest } = bundle;
  const k = manifest.selection.k;
  if (tokens > k) throw new UserError(`this bundle keeps ${k} tokens of an image, so --tokens should be 1 to ${k}`);
  const prompt = await readPrompt(promptFile, manifest, images.length);

  // 1. A session for each graph. ONNX Runtime maps the weights beside the graph by itself.
  const sessions = {};
  for (const graph of graphNames(manifest)) {
    sessions[graph] = await open(path.join(root, manifest.graphs[graph].file));
  }
  const model = { ort, manifest, sessions };

  // 2. The prompt's ids become rows [S, D]; those of the keywords guide the selection.
  const embedded = await embed(model, prompt.ids);

  // 3. Each image: pixels, all visual tokens, the K that are kept.
  const processor = imageProcessor(await imageProcessorConfig(bundle));
  const kept = [];
  for (const file of images) {
    const encoded = await encode(model, pixelValues(await readPng(file), processor));
    const selection = await select(model, encoded, embedded, prompt.keyword_places, tokens);
    kept.push(cut(selection, embedded.width, tokens ?? k));
  }

  // 4. Kept rows in place of image tokens, prefill, and one token a step.
  const spliced = splice(model, prompt.ids, embedded, kept);
  const ids = [];
  const text = textWriter(prompt.pieces);
  for await (const token of generate(model, spliced, prompt.stop_ids, maxNewTokens)) {
    ids.push(token);
    const piece = text.push(token);
    if (!asJson) process.stdout.write(piece);
  }
  const rest = text.finish();
  if (!asJson) process.stdout.write(`${rest}\n`);
  else {
    const picks = kept.map(({ keptIndices, pickOrder }) => ({ kept_indices: keptIndices, pick_order: pickOrder }));
    console.log(JSON.stringify({ text: text.all, token_ids: ids, images: picks }));
  }
}

/** What `attempt` gives; if it fails, `tell` makes one line of the error. */
async function orTell(attempt, tell) {
  try {
    return await attempt();
  } catch (error) {
    throw new UserError(tell(error));
  }
}

async function readArguments() {
  const options = {
    tokens: { type: "string" },
    "max-new-tokens": { type: "string", default: "64" },
    json: { type: "boolean", default: false },
  };
  const parse = () => parseArgs({ allowPositionals: true, options });
  const parsed = await orTell(parse, ({ message }) => `${message}; usage: ${USAGE}`);
  const [root, promptFile, ...images] = parsed.positionals;
  if (!images.length) throw new UserError(`usage: ${USAGE}`);
  const { tokens, json, "max-new-tokens": most } = parsed.values;
  const whole = (name, text) => {
    if (!/^[1-9]\d{0,8}$/.test(text)) throw new UserError(`--${name} should be a number from 1, not ${text}`);
    return Number(text);
  };
  return {
    root, promptFile, images, asJson: json,
    tokens: tokens === undefined ? undefined : whole("tokens", tokens),
    maxNewTokens: whole("max-new-tokens", most),
  };
}

function open(file) {
  return orTell(
    () => ort.InferenceSession.create(file, { logSeverityLevel: 3 }),
    ({ message }) => `${file} cannot be opened (${message.split("\n")[0]}); export the bundle again`,
  );
}

function read(file) {
  return orTell(() => readFile(file), ({ code }) => `${file} cannot be read (${code}); check the path`);
}

async function readPrompt(file, manifest, images) {
  const text = await read(file);
  const invalid = ({ message }) => `${file} is not valid JSON (${message}); write it again with resprune prompt`;
  const prompt = await orTell(() => JSON.parse(text), invalid);
  if (prompt?.format_version !== 1) throw new UserError(`${file} is not a prompt of format 1; write it again`);
  if (prompt.tokenizer_sha256 !== manifest.files["tokenizer.json"]?.sha256) {
    throw new UserError(`${file} was written for another bundle; write it again with resprune prompt`);
  }
  if (prompt.image_places.length !== images) {
    throw new UserError(`${file} asks about ${prompt.image_places.length} images, and ${images} are given`);
  }
  return prompt;
}

async function readPng(file) {
  const content = await read(file);
  const invalid = ({ message }) => `${file} cannot be read as PNG (${message}); give a PNG file`;
  const png = await orTell(() => PNG.sync.read(content), invalid);
  if (png.width * png.height > MAX_PIXELS) throw new UserError(`${file} has more than ${MAX_PIXELS} pixels`);
  return { data: onWhite(png.data), width: png.width, height: png.height };
}

/** Joins the pieces of tokens to whole characters; white space at the start is left out. */
function textWriter(pieces) {
  const decoder = new TextDecoder();
  const encoder = new TextEncoder();
  const writer = {
    all: "",
    push(token) {
      const piece = pieces[token] ?? "";
      const bytes = typeof piece === "string" ? encoder.encode(piece) : Uint8Array.from(piece);
      return writer.add(decoder.decode(bytes, { stream: true }));
    },
    finish: () => writer.add(decoder.decode()),
    add(text) {
      const shown = writer.all ? text : text.trimStart();
      writer.all += shown;
      return shown;
    },
  };
  return writer;
}

main().catch((error) => {
  if (!(error instanceof UserError)) throw error;
  console.error(`ask.mjs: ${error.message}`);
  process.exitCode = 2;
});
