// The model, off the page's thread: opens a bundle, encodes an image once, answers and streams.
// Messages in: open, look, ask. Each is answered under its id by any number of events and then "done" or "fault".

import { imageProcessorConfig, readBundle, stopIds, UserError } from "./bundle.mjs";
import { imageProcessor, MAX_PIXELS, onWhite, patchBoxes, pixelValues } from "./image.mjs";
import { openPrompter } from "./prompt.mjs";
import { cut, embed, encode, generate, graphNames, select, splice } from "./walk.mjs";

const DIST = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
const MAX_NEW_TOKENS = 64;
const ON_GPU = new Set(["vision_encoder", "decoder_model_merged"]); // the selection's loops are faster on the CPU

let opened; // the open bundle: model, prompter, processor …
let image; // the encoded image
let selection; // the last selection, and what it was for
let newest = 0; // the latest request: an older answer stops at its next token
let queue = Promise.resolve(); // one request at a time

const HANDLERS = { open, look, ask };

self.onmessage = ({ data: { id, type, ...request } }) => {
  newest = id;
  const tell = (event, details) => self.postMessage({ id, event, ...details });
  queue = queue.then(async () => {
    try {
      tell("done", await HANDLERS[type](request, tell, () => newest !== id));
    } catch (error) {
      if (!(error instanceof UserError)) console.error(error);
      const message = error instanceof UserError ? error.message : firstLine(error);
      tell("fault", { message });
    }
  });
};

async function open({ url, provider }, tell) {
  opened = image = selection = undefined;
  const root = url.endsWith("/") ? url : `${url}/`;
  const bundle = await readBundle((name) => download(new URL(name, root), name));
  const { manifest } = bundle;
  const names = graphNames(manifest);
  const total = names
    .flatMap((graph) => [manifest.graphs[graph].file, ...bundle.weights(graph)])
    .reduce((sum, name) => sum + manifest.files[name].size, 0);
  let read = 0;
  const graphs = [];
  for (const graph of names) {
    const files = {};
    for (const name of [manifest.graphs[graph].file, ...bundle.weights(graph)]) {
      files[name] = await bundle.bytes(name);
      read += files[name].byteLength;
      tell("progress", { read, total });
    }
    graphs.push([graph, files]);
  }
  const prompter = await openPrompter(bundle);
  const processor = imageProcessor(await imageProcessorConfig(bundle));
  const vision = (await bundle.json("config.json")).vision_config ?? {};
  tell("progress", { read: total, total, compiling: true });
  const { ort, sessions, runs } = await openSessions(manifest, graphs, provider);
  opened = {
    model: { ort, manifest, sessions }, prompter, processor,
    stops: await stopIds(bundle), patchSize: vision.patch_size ?? 14,
  };
  const { k, num_tokens } = manifest.selection;
  return { k, numTokens: num_tokens, name: manifest.model, positions: manifest.positions, runs };
}

/** ONNX Runtime and a session for each graph: on WebGPU where there is one and it takes the graphs, else WASM. */
async function openSessions(manifest, graphs, provider) {
  const gpu = provider !== "wasm" && (await self.navigator.gpu?.requestAdapter().catch(() => null));
  const ort = await import(`${DIST}${gpu ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"}`);
  ort.env.wasm.wasmPaths = DIST;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.logLevel = "error";
  const openAll = async (useGpu) => {
    const sessions = {};
    for (const [graph, files] of graphs) {
      const [[, content], ...weights] = Object.entries(files);
      const providers = useGpu && ON_GPU.has(graph) ? ["webgpu", "wasm"] : ["wasm"];
      try {
        sessions[graph] = await ort.InferenceSession.create(content, {
          executionProviders: providers,
          externalData: weights.map(([name, data]) => ({ path: name.split("/").at(-1), data })),
        });
      } catch (error) {
        throw new UserError(`${manifest.graphs[graph].file} cannot be opened (${firstLine(error)}); export it again`);
      }
    }
    return sessions;
  };
  const threads = `WASM, ${ort.env.wasm.numThreads} thread${ort.env.wasm.numThreads > 1 ? "s" : ""}`;
  if (gpu) {
    try {
      return { ort, sessions: await openAll(true), runs: "WebGPU" };
    } catch (error) {
      if (provider === "webgpu") throw error;
      console.warn(error.message);
    }
  }
  return { ort, sessions: await openAll(false), runs: threads };
}

async function look({ blob }) {
  need(opened, "open a bundle first");
  const start = performance.now();
  const { model, processor, patchSize } = opened;
  const decoded = await decode(blob);
  image = await encode(model, pixelValues(decoded, processor));
  selection = undefined;
  const { width, height } = decoded;
  const boxes = patchBoxes(processor, width, height, patchSize);
  // A class token, which some checkpoints keep in front, lies nowhere.
  const nowhere = Array.from({ length: model.manifest.selection.num_tokens - boxes.length }, () => null);
  return { width, height, boxes: [...nowhere, ...boxes], ms: performance.now() - start };
}

async function ask({ question, about, tokens }, tell, superseded) {
  need(opened, "open a bundle first");
  need(image, "choose an image first");
  if (superseded()) return { superseded: true };
  const { model, prompter, stops } = opened;
  const start = performance.now();
  const prompt = prompter.prompt(question, about);
  const embedded = await embed(model, prompt.ids);
  const key = JSON.stringify([question, about, model.manifest.attention === "proportional" ? tokens : 0]);
  if (selection?.key !== key) {
    selection = { key, ...(await select(model, image, embedded, prompt.keywordPlaces, tokens)) };
  }
  const kept = cut(selection, embedded.width, tokens);
  tell("selected", { pickOrder: selection.pickOrder, keptIndices: kept.keptIndices, keywords: prompt.keywords });
  const spliced = splice(model, prompt.ids, embedded, [kept]);
  const stream = prompter.textStream();
  const ids = [];
  let first;
  for await (const token of generate(model, spliced, stops, MAX_NEW_TOKENS)) {
    if (superseded()) return { superseded: true };
    first ??= performance.now() - start;
    ids.push(token);
    const piece = stream.push(token);
    if (piece) tell("piece", { piece });
  }
  const rest = stream.finish();
  if (rest) tell("piece", { piece: rest });
  return { ids, first, ms: performance.now() - start, promptTokens: spliced.positions.length };
}

async function download(url, name) {
  let response;
  try {
    response = await fetch(url);
  } catch {
    throw new UserError(`${url} cannot be reached; check the address, and that its server allows this page (CORS)`);
  }
  if (!response.ok) throw new UserError(`${name} is not there (${response.status} from ${url.host}); check the address`);
  return new Uint8Array(await response.arrayBuffer());
}

/** An image file as RGB: upright, without colour management, transparent pixels on white, as Python opens it. */
async function decode(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new UserError("this file is not an image that the browser can read; choose another");
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new UserError(`the image has more than ${MAX_PIXELS / 1e6} megapixels; make it smaller`);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: onWhite(context.getImageData(0, 0, width, height).data), width, height };
}

function need(value, message) {
  if (!value) throw new UserError(message);
}

function firstLine(error) {
  return String(error?.message ?? error).split("\n")[0];
}
