// The page: what the user does goes to the worker, and what the worker tells is shown.

import { drawKept, rampGradient } from "./draw.mjs";
import { contentWords } from "./keywords.mjs";

const at = (id) => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
const DEFAULT_SHARE = 1 / 9; // of an image's visual tokens

const state = { bundle: null, image: null, picks: null, aboutTyped: false, asked: 0 };

const worker = new Worker(new URL("worker.mjs", import.meta.url), { type: "module" });
const waiting = new Map();
let requests = 0;

/** Send a request to the worker; `events` are called by name as it tells, and the promise is its last word. */
function request(type, details, events = {}) {
  const id = ++requests;
  worker.postMessage({ id, type, ...details });
  return new Promise((resolve, reject) => waiting.set(id, { resolve, reject, events }));
}

worker.onmessage = ({ data: { id, event, ...details } }) => {
  const { resolve, reject, events } = waiting.get(id);
  if (event === "done" || event === "fault") {
    waiting.delete(id);
    if (event === "done") resolve(details);
    else reject(new Error(details.message));
  } else events[event]?.(details);
};
worker.onerror = (event) => {
  event.preventDefault();
  showFault(event.message || "worker.mjs cannot be loaded; run npm ci beside it");
};

function showFault(message = "") {
  at("fault").textContent = message;
  at("fault").hidden = !message;
}

/** Run what may fail, and show a fault as one line. */
async function attempt(action) {
  showFault();
  try {
    await action();
  } catch (error) {
    showFault(error.message);
    return false;
  }
  return true;
}

async function openBundle(address) {
  const url = new URL(address, location.href).href;
  state.bundle = state.picks = null;
  enable();
  at("status").textContent = "Loading the bundle …";
  at("progress").hidden = false;
  const progress = ({ read, total, compiling }) => {
    at("progress").value = total ? read / total : 0;
    if (compiling) at("status").textContent = "Preparing the graphs …";
  };
  const whole = await attempt(async () => {
    const bundle = await request("open", { url, provider: parameters.get("provider") }, { progress });
    state.bundle = bundle;
    const tokens = at("tokens");
    tokens.max = bundle.k;
    tokens.value = Math.min(bundle.k, Number(parameters.get("tokens")) || Math.ceil(bundle.numTokens * DEFAULT_SHARE));
    showCount();
    at("status").textContent = `${bundle.name} · ${bundle.runs}`;
    at("about-bundle").textContent =
      `Keeps up to ${bundle.k} of ${bundle.numTokens} visual tokens; ${bundle.positions} positions.`;
    if (state.image) state.image = { ...state.image, ...(await request("look", { blob: state.image.blob })) };
  });
  at("progress").hidden = true;
  if (!whole) at("status").textContent = "No bundle is open";
  enable();
  draw();
}

/** Encode an image, show it, and ask the question about it. */
async function useImage(blob) {
  showAnswer();
  const whole = await attempt(async () => {
    stopCamera();
    const looked = await request("look", { blob });
    // The same decoding as the worker's, only for the eye.
    const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
    state.image = { ...looked, blob, bitmap };
    state.picks = null;
    at("hint").hidden = true;
    at("view").hidden = false;
    enable();
    draw();
  });
  if (whole) await ask();
}

async function ask() {
  if (!state.bundle || !state.image || !at("question").value.trim()) return;
  const number = ++state.asked;
  const answer = at("answer");
  showAnswer();
  answer.classList.add("busy");
  await attempt(async () => {
    const about = at("about").value.split(",").map((word) => word.trim()).filter(Boolean);
    const tokens = Number(at("tokens").value);
    const done = await request(
      "ask",
      { question: at("question").value, about, tokens },
      {
        selected: ({ pickOrder, keptIndices }) => {
          state.picks = pickOrder;
          at("stage").dataset.kept = JSON.stringify(keptIndices);
          draw();
        },
        piece: ({ piece }) => {
          if (number === state.asked) answer.textContent += piece;
        },
      },
    );
    if (done.superseded || number !== state.asked) return;
    answer.dataset.ids = JSON.stringify(done.ids);
    const ms = (value) => `${Math.round(value)} ms`;
    at("figures").textContent =
      `${tokens} of ${state.bundle.numTokens} visual tokens · prompt of ${done.promptTokens} tokens · ` +
      `image ${ms(state.image.ms)} · first token ${ms(done.first)} · answer ${ms(done.ms)}`;
  });
  if (number === state.asked) answer.classList.remove("busy");
}

function showAnswer() {
  at("answer").textContent = at("figures").textContent = "";
  delete at("answer").dataset.ids;
}

function enable() {
  at("ask").disabled = !(state.bundle && state.image);
  at("tokens").disabled = !state.bundle;
}

function showCount() {
  at("count").textContent = `${at("tokens").value} of ${state.bundle.numTokens}`;
  at("tokens").setAttribute("aria-valuetext", at("count").textContent);
}

/** Draw the image and the first picks that the slider asks for: picks are nested, so no graph has to run. */
function draw() {
  if (!state.image) return;
  const picks = state.picks?.slice(0, Number(at("tokens").value)).filter((index) => index >= 0);
  const { bitmap, boxes } = state.image;
  const size = [bitmap.width, bitmap.height];
  drawKept(at("view"), bitmap, size, picks?.map((index) => boxes[index]), at("stage").getBoundingClientRect());
  at("stage").dataset.picks = JSON.stringify(picks ?? []);
  at("view").setAttribute(
    "aria-label",
    picks ? `The image with its ${picks.length} kept visual tokens of ${state.bundle?.numTokens}` : "The image",
  );
}

let camera = null;

async function toggleCamera() {
  if (camera) return stopCamera();
  return attempt(async () => {
    try {
      camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    } catch (error) {
      throw new Error(`the camera cannot be used (${error.message}); allow it for this page, or choose a file`);
    }
    at("video").srcObject = camera;
    await at("video").play();
    showCamera(true);
  });
}

function stopCamera() {
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  showCamera(false);
}

function showCamera(on) {
  at("video").hidden = at("shoot").hidden = !on;
  at("view").hidden = on || !state.image;
  at("hint").hidden = on || Boolean(state.image);
  at("camera").textContent = on ? "Stop camera" : "Camera";
}

async function takePhoto() {
  const video = at("video");
  const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0);
  markSample(null);
  await useImage(await canvas.convertToBlob({ type: "image/png" }));
}

/** The images that the server has beside the page, with a question each; a server without them is fine. */
async function loadSamples() {
  const response = await fetch("samples/questions.json").catch(() => null);
  if (!response?.ok) return;
  const samples = await response.json();
  for (const { image, question } of samples) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = question;
    button.dataset.image = image;
    button.setAttribute("aria-pressed", "false");
    const picture = document.createElement("img");
    picture.src = `samples/${image}`;
    picture.alt = image.replace(/\.\w+$/, "");
    button.append(picture);
    button.onclick = () => useSample(button, image, question);
    at("samples").append(button);
  }
}

async function useSample(button, image, question) {
  markSample(button);
  setQuestion(question);
  showAnswer();
  await useImage(await (await fetch(`samples/${image}`)).blob());
}

function markSample(button) {
  for (const other of at("samples").children) other.setAttribute("aria-pressed", String(other === button));
}

function setQuestion(question) {
  at("question").value = question;
  state.aboutTyped = false;
  suggestKeywords();
}

function suggestKeywords() {
  if (!state.aboutTyped) at("about").value = contentWords(at("question").value).join(", ");
}

at("ramp").style.background = rampGradient;
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
at("question").addEventListener("input", () => {
  state.aboutTyped = false;
  suggestKeywords();
});
at("about").addEventListener("input", () => (state.aboutTyped = at("about").value.trim() !== ""));
at("tokens").addEventListener("input", () => {
  showCount();
  draw();
});
at("tokens").addEventListener("change", () => state.picks && ask());
at("file").addEventListener("change", async () => {
  const [file] = at("file").files;
  if (!file) return;
  at("file").value = "";
  markSample(null);
  await useImage(file);
});
at("camera").addEventListener("click", toggleCamera);
at("shoot").addEventListener("click", takePhoto);
at("open").addEventListener("submit", (event) => {
  event.preventDefault();
  openBundle(at("url").value).then(ask);
});
const stage = at("stage");
stage.addEventListener("dragover", (event) => {
  event.preventDefault();
  stage.classList.add("over");
});
stage.addEventListener("dragleave", () => stage.classList.remove("over"));
stage.addEventListener("drop", async (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  const [file] = event.dataTransfer.files;
  if (file) {
    markSample(null);
    await useImage(file);
  }
});
new ResizeObserver(draw).observe(stage);

at("url").value = parameters.get("bundle") ?? "bundle/";
setQuestion(parameters.get("question") ?? "");
loadSamples();
openBundle(at("url").value);
