// The page of `resprune serve`: OpenAI's API with the extension object `resprune`, and a canvas for the kept tokens.
import { drawKept, rampGradient } from "./draw.js";

const $ = (id) => document.getElementById(id);
const SENT_AS_THEY_ARE = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];
const LONGEST_TRIAL = 48; // tokens of an answer while budgets are compared
const EDGE = 8; // pixels around what is on the stage

const state = {
  models: [],
  images: [], // {url, image, name}: all images of the chat, in order
  turns: [], // {question, from, to, answer, facts}: images[from:to] were shown with the question
  shown: 0, // which image is on the stage
  picks: null, // of each image: {size, num_tokens, pick_order, boxes}, of the answer that is shown
  chosen: null, // the turn whose picks they are
  trials: new Map(), // K → {timings, usage, answer} of the last question
  running: null, // AbortController of the answer being written
  key: "",
};

// ---- the API

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(state.key && { Authorization: `Bearer ${state.key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const wait = response.headers.get("Retry-After");
  const message = said?.error?.message ?? `The server answered ${response.status}.`;
  throw new Refused(wait ? `${message} (in about ${wait} s)` : message, response.status);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("The answer was cut off.", 0);
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error.message, 500);
      yield event;
    }
  }
}

function messages(turns) {
  return turns.flatMap((turn, number) => {
    const images = state.images.slice(turn.from, turn.to).map((one) => ({ type: "image_url", image_url: { url: one.url } }));
    const asked = { role: "user", content: [...images, { type: "text", text: turn.question }] };
    return number < turns.length - 1 ? [asked, { role: "assistant", content: turn.answer }] : [asked];
  });
}

/** Stream an answer to the last of `turns`; `heard` gets the text so far, `seen` the picks. */
async function complete(turns, tokens, signal, { heard = () => {}, seen = () => {}, limit } = {}) {
  const body = {
    model: $("model").value,
    messages: messages(turns),
    stream: true,
    stream_options: { include_usage: true },
    resprune: { tokens, boxes: true },
    ...(limit && { max_completion_tokens: limit }),
  };
  const result = { text: "", images: [], timings: {}, usage: {} };
  for await (const event of events(await request("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal }))) {
    if (event.resprune?.images) {
      result.images = event.resprune.images;
      seen(result.images);
    }
    if (event.resprune?.timings) result.timings = event.resprune.timings;
    if (event.usage) result.usage = event.usage;
    const text = event.choices[0]?.delta?.content;
    if (text) heard((result.text += text));
  }
  return result;
}

// ---- what is going on

function busy(controller) {
  state.running = controller;
  refresh();
}

async function run(work) {
  hideAlert();
  const controller = new AbortController();
  busy(controller);
  try {
    await work(controller.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      if (error.status === 401) askForKey();
      else showAlert(error.message);
    }
  } finally {
    busy(null);
  }
}

function model() {
  return state.models.find((one) => one.id === $("model").value);
}

/** The largest K that the slider offers: what the model keeps at most of the image. */
function largest() {
  const k = model()?.resprune.k ?? 1;
  return Math.max(1, Math.min(k, state.picks?.[state.shown]?.num_tokens ?? k));
}

function wanted() {
  return Number($("tokens").value);
}

async function ask(question) {
  const from = state.turns.at(-1)?.to ?? 0;
  const turn = { question, from, to: state.images.length, answer: "", facts: null, picks: null };
  const tokens = wanted();
  state.trials.clear();
  const shown = drawTurn(turn);
  await run(async (signal) => {
    try {
      await answer([...state.turns, turn], turn, shown, tokens, signal);
      state.turns.push(turn);
    } catch (error) {
      if (turn.answer) {
        turn.stopped = true;
        state.turns.push(turn); // what was written stays in the chat
        shown.finish();
      } else {
        shown.remove();
        if (!$("question").value) $("question").value = question;
      }
      throw error;
    }
  });
}

/** Fill `turn` with the answer to the last of `turns`. */
async function answer(turns, turn, shown, tokens, signal) {
  const before = turns.slice(0, -1);
  const result = await complete([...before, { ...turn, answer: "" }], tokens, signal, {
    heard: (text) => {
      turn.answer = text;
      shown.say(text);
    },
    seen: (images) => {
      turn.picks = images;
      choose(turn);
    },
  });
  turn.facts = facts(result);
  turn.answer = result.text;
  shown.finish();
  state.trials.set(tokens, result);
}

function facts({ images, timings, usage }) {
  const every = images.reduce((sum, image) => sum + image.num_tokens, 0);
  const kept = images.reduce((sum, image) => sum + image.pick_order.length, 0);
  const decode = timings.total - timings.first_token;
  const rate = usage.completion_tokens > 1 && decode > 0 ? ((usage.completion_tokens - 1) / decode) * 1000 : null;
  return {
    kept: `${kept} of ${every} visual tokens`,
    saved: every > kept ? `prompt ${usage.prompt_tokens} in place of ${usage.prompt_tokens + every - kept} tokens` : `prompt ${usage.prompt_tokens} tokens`,
    first: `first token ${milliseconds(timings.first_token)}`,
    rate: rate && `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`,
  };
}

function milliseconds(ms) {
  return ms < 1000 ? `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

/** Ask the last question again with the slider's K, in place of its answer. */
async function repeat() {
  const turn = state.turns.at(-1);
  const shown = turn.shown;
  shown.say("");
  await run(async (signal) => {
    try {
      await answer(state.turns, turn, shown, wanted(), signal);
    } finally {
      shown.say(turn.answer);
    }
  });
  drawTimes();
}

/** Ask the last question with several budgets, and show what each takes. */
async function compare() {
  const turn = state.turns.at(-1);
  const k = largest();
  const budgets = [...new Set([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16].map((share) => Math.max(1, Math.round(k * share))))];
  await run(async (signal) => {
    for (const tokens of [...budgets, wanted()]) {
      if (state.trials.has(tokens)) continue;
      state.trials.set(tokens, await complete([...state.turns.slice(0, -1), { ...turn, answer: "" }], tokens, signal, { limit: LONGEST_TRIAL }));
      drawTimes();
    }
  });
}

// ---- images

async function add(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      showAlert(`${file.name} is not an image.`);
      continue;
    }
    try {
      const image = await load(URL.createObjectURL(file));
      const url = SENT_AS_THEY_ARE.includes(file.type) ? await dataUrl(file) : redrawn(image);
      state.images.push({ url, image, name: file.name || "pasted image" });
      state.shown = state.images.length - 1;
      hideAlert();
    } catch {
      showAlert(`${file.name} cannot be read as an image.`);
    }
  }
  drawImages();
  $("question").focus({ preventScroll: true });
}

function load(url) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = reject;
    image.src = url;
  });
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}

/** As PNG, for what only browsers read. */
function redrawn(image) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL("image/png");
}

function removeImage(index) {
  URL.revokeObjectURL(state.images[index].image.src);
  state.images.splice(index, 1);
  state.shown = Math.max(0, Math.min(state.shown, state.images.length - 1));
  drawImages();
}

/** Show which tokens an answer kept. */
function choose(turn) {
  state.chosen = turn;
  state.picks = turn?.picks ?? null;
  if (state.picks && state.shown >= state.picks.length) state.shown = state.picks.length - 1;
  for (const button of document.querySelectorAll("[data-picks]")) button.setAttribute("aria-pressed", String(button.turn === turn));
  drawImages();
}

// ---- drawing

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function drawImages() {
  const some = state.images.length > 0;
  const asked = state.turns.at(-1)?.to ?? 0;
  $("stage").classList.toggle("empty", !some);
  $("invite").hidden = some;
  $("canvas").hidden = !some;
  $("strip").hidden = !some;
  $("thumbs").replaceChildren(
    ...state.images.map((one, index) => {
      const face = element("img", { src: one.image.src, alt: "" });
      const button = element("button", { type: "button", className: "thumb", ariaLabel: `Image ${index + 1}: ${one.name}`, onclick: () => { state.shown = index; drawImages(); } }, face);
      button.setAttribute("aria-pressed", String(index === state.shown));
      const item = element("li", {}, button);
      if (index >= asked && !state.running)
        item.append(element("button", { type: "button", className: "drop", textContent: "×", ariaLabel: `Remove image ${index + 1}`, onclick: () => removeImage(index) }));
      return item;
    }),
  );
  refresh();
  drawStage();
}

function drawStage() {
  const canvas = $("canvas");
  const shown = state.images[state.shown];
  if (!shown) return;
  const { image, name } = shown;
  const picks = state.picks?.[state.shown];
  const overlay = Boolean(picks && $("overlay").checked);
  $("legend").hidden = !overlay;
  const count = picks ? Math.min(wanted(), picks.pick_order.length) : 0;
  canvas.setAttribute("aria-label", picks ? `${name}: ${count} of ${picks.num_tokens} visual tokens kept` : name);
  const { clientWidth, clientHeight } = $("stage");
  const size = [image.naturalWidth || 1, image.naturalHeight || 1];
  const room = { width: clientWidth - 2 * EDGE, height: clientHeight - 2 * EDGE };
  drawKept(canvas, image, size, overlay ? picks.boxes.slice(0, count) : null, room, picks?.pick_order.length);
}

/** A question and its answer in the log, which the caller fills. */
function drawTurn(turn) {
  const added = turn.to - turn.from;
  const asked = element("li", { className: "user", textContent: turn.question });
  if (added > 0 && turn.from > 0) asked.prepend(element("small", { textContent: added > 1 ? `with ${added} more images` : "with another image" }));
  const words = element("p");
  const told = element("div", { className: "facts" });
  const item = element("li", { className: "assistant" }, words, told);
  $("log").append(asked, item);
  const scroll = () => {
    const log = $("log");
    if (log.scrollHeight > log.clientHeight) log.scrollTop = log.scrollHeight;
    else item.scrollIntoView({ block: "nearest" });
  };
  scroll();
  turn.shown = {
    say: (text) => {
      words.textContent = text;
      scroll();
    },
    finish: () => {
      words.textContent = turn.answer || "(no words)";
      const button = element("button", { type: "button", textContent: turn.facts?.kept ?? "kept tokens", title: "Show them on the image", onclick: () => choose(turn) });
      button.dataset.picks = "";
      button.turn = turn;
      button.setAttribute("aria-pressed", String(state.chosen === turn));
      const rest = turn.facts ? [["saved", turn.facts.saved], ["", turn.facts.first], ["", turn.facts.rate]] : [["", "stopped"]];
      told.replaceChildren(...(turn.picks ? [button] : []), ...rest.filter(([, text]) => text).map(([className, textContent]) => element("span", { className, textContent })));
      scroll();
    },
    remove: () => {
      asked.remove();
      item.remove();
    },
  };
  return turn.shown;
}

function drawTimes() {
  $("times").hidden = state.trials.size === 0;
  const all = [...state.trials].sort(([a], [b]) => b - a);
  const stages = (timings) => [["encode", timings.encode ?? 0], ["vision", (timings.prompt ?? 0) + (timings.vision ?? 0)], ["prefill", timings.prefill ?? 0]];
  const longest = Math.max(1e-9, ...all.map(([, { timings }]) => timings.first_token));
  $("rows").replaceChildren(
    ...all.map(([tokens, { timings, usage, text }]) => {
      const bar = element("div", { ariaHidden: "true" }, ...stages(timings).map(([className, ms]) => {
        const part = element("i", { className });
        part.style.width = `${(100 * ms) / longest}%`;
        return part;
      }));
      const row = element("tr", {},
        element("td", { textContent: tokens }),
        element("td", {}, element("div", { className: "bar" }, bar, element("span", { textContent: milliseconds(timings.first_token) }))),
        element("td", { textContent: usage.prompt_tokens }),
        element("td", { textContent: text, title: text }));
      row.classList.toggle("now", tokens === wanted());
      return row;
    }),
  );
}

function refresh() {
  const running = state.running !== null;
  const idle = !running && state.models.length > 0;
  const slider = $("tokens");
  const full = Number(slider.max) === wanted();
  slider.max = largest();
  if (full) slider.value = slider.max;
  slider.disabled = !idle;
  const all = state.picks?.[state.shown]?.num_tokens ?? model()?.resprune.num_tokens;
  $("kept").textContent = state.models.length ? (all ? `${wanted()} of ${all}` : `${wanted()}`) : "–";
  $("send").textContent = running ? "Stop" : "Ask";
  $("send").classList.toggle("main", !running);
  $("send").disabled = !running && !(idle && state.images.length && $("question").value.trim());
  $("fresh").disabled = running || !(state.images.length || state.turns.length);
  $("model").disabled = running;
  $("again").hidden = state.turns.length === 0;
  $("nested").hidden = !$("again").hidden;
  for (const id of ["repeat", "compare"]) $(id).disabled = running;
  $("repeat").textContent = `Ask again with ${wanted()}`;
  drawTimes();
}

function showAlert(message) {
  $("alert").firstElementChild.textContent = message;
  $("alert").hidden = false;
}

function hideAlert() {
  $("alert").hidden = true;
}

function askForKey() {
  $("key").hidden = false;
  $("secret").focus();
}

// ---- events

function fresh() {
  for (const one of state.images) URL.revokeObjectURL(one.image.src);
  Object.assign(state, { images: [], turns: [], shown: 0, picks: null, chosen: null });
  state.trials.clear();
  $("log").replaceChildren();
  hideAlert();
  drawImages();
}

async function start() {
  try {
    state.models = (await (await request("v1/models")).json()).data;
  } catch (error) {
    if (error.status === 401) askForKey();
    else showAlert(error.message);
    return;
  }
  $("key").hidden = true;
  $("model").replaceChildren(...state.models.map((one) => element("option", { value: one.id, textContent: one.id })));
  changeModel();
}

function changeModel() {
  const slider = $("tokens");
  state.trials.clear();
  slider.max = largest();
  slider.value = slider.max;
  refresh();
}

function theme(name) {
  document.documentElement.dataset.theme = name;
}

for (const button of document.querySelectorAll("[data-opens]")) button.onclick = () => $(button.dataset.opens).click();
for (const id of ["file", "camera"])
  $(id).onchange = (event) => {
    add([...event.target.files]);
    event.target.value = "";
  };
for (const name of ["dragenter", "dragover"])
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
for (const name of ["dragleave", "drop"]) document.addEventListener(name, () => $("stage").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  add([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    add(files);
  }
});
$("ask").onsubmit = (event) => {
  event.preventDefault();
  if (state.running) {
    state.running.abort();
    return;
  }
  const question = $("question").value.trim();
  if (!question || !state.images.length) return;
  $("question").value = "";
  grow();
  ask(question);
};
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!state.running && !$("send").disabled) $("ask").requestSubmit();
  }
};
function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
  refresh();
}
$("question").oninput = grow;
$("tokens").oninput = () => {
  refresh();
  drawStage();
};
$("overlay").onchange = drawStage;
$("repeat").onclick = repeat;
$("compare").onclick = compare;
$("fresh").onclick = fresh;
$("model").onchange = changeModel;
$("alert").lastElementChild.onclick = hideAlert;
$("key").onsubmit = (event) => {
  event.preventDefault();
  state.key = $("secret").value.trim();
  start();
};
$("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
const darkness = window.matchMedia("(prefers-color-scheme: dark)");
theme(darkness.matches ? "dark" : "light");
darkness.onchange = () => theme(darkness.matches ? "dark" : "light");
$("ramp").style.background = rampGradient;
new ResizeObserver(drawStage).observe($("stage"));
start();
