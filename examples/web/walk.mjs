// The graphs of a bundle in order: encode, select, splice, prefill, step. A consumer in C++ does the same calls.
// A model is { ort, manifest, sessions }: ONNX Runtime (web or node), and a session for each graph by its name.

import { UserError } from "./bundle.mjs";

/** The graphs to open: the encoder and the selector apart where the bundle has both, else the two in one. */
export function graphNames(manifest) {
  const split = "vision_encoder" in manifest.graphs && "token_select" in manifest.graphs;
  const vision = split ? ["vision_encoder", "token_select"] : ["vision_select"];
  return ["embed_tokens", ...vision, "decoder_model_merged"];
}

/** Input embeddings of token ids: float32 rows [S, D] in one array, and D. An image token gets those of token 0. */
export async function embed(model, ids) {
  const known = ids.map((id) => BigInt(id === model.manifest.image_token_id ? 0 : id));
  const input_ids = new model.ort.Tensor("int64", BigInt64Array.from(known), [1, ids.length]);
  const { inputs_embeds } = await model.sessions.embed_tokens.run({ input_ids });
  return { rows: inputs_embeds.data, width: inputs_embeds.dims[2] };
}

/** Encode an image (`pixelValues` of image.mjs) once for any number of questions. */
export async function encode(model, pixels) {
  const pixel_values = new model.ort.Tensor("float32", pixels.values, [1, 3, pixels.height, pixels.width]);
  if (!model.sessions.vision_encoder) return { pixel_values };
  const { image_features } = await model.sessions.vision_encoder.run({ pixel_values });
  const token_mask = mask(model, image_features.dims[1], true);
  return { image_features, token_mask };
}

/**
 * Select an image's tokens for a question whose keywords are at `places` of its `embedded` ids, which may be none.
 * The selection has the K rows that the graph keeps; `cut` takes the first `tokens` picks of it.
 */
export async function select(model, encoded, { rows, width }, places, tokens = model.manifest.selection.k) {
  const count = Math.max(places.length, 1); // no keyword is one row that is masked
  const text = new Float32Array(count * width);
  places.forEach((place, row) => text.set(rows.subarray(place * width, (place + 1) * width), row * width));
  const feeds = {
    ...encoded,
    text_embeds: new model.ort.Tensor("float32", text, [1, count, width]),
    text_mask: mask(model, count, places.length > 0),
  };
  if (model.manifest.attention === "proportional") {
    // The counts are of one budget, so another budget needs another run.
    feeds.num_kept = new model.ort.Tensor("int64", BigInt64Array.of(BigInt(tokens)), [1]);
  }
  const session = model.sessions.token_select ?? model.sessions.vision_select;
  const outputs = await session.run(feeds);
  return {
    rows: (outputs.kept_features ?? outputs.image_features).data, // [K, D], ascending in index
    keptIndices: Array.from(outputs.kept_indices.data, Number), // [K], -1 last
    pickOrder: Array.from(outputs.pick_order.data, Number), // [K], -1 last
    keptCounts: outputs.kept_counts ? Array.from(outputs.kept_counts.data, Number) : null,
  };
}

/** The first `tokens` picks of a selection: a selection of so many would pick the same. */
export function cut(selection, width, tokens) {
  const pickOrder = selection.pickOrder.slice(0, tokens).filter((index) => index >= 0);
  const keptIndices = [...pickOrder].sort((a, b) => a - b);
  const rows = new Float32Array(keptIndices.length * width);
  const places = keptIndices.map((index) => selection.keptIndices.indexOf(index));
  places.forEach((place, row) =>
    rows.set(selection.rows.subarray(place * width, (place + 1) * width), row * width),
  );
  const keptCounts = places.map((place) => selection.keptCounts?.[place] ?? 1);
  return { rows, keptIndices, pickOrder, keptCounts };
}

/**
 * Put the kept rows of each image in place of its token, and number the result.
 * `contiguous` numbers 0, 1, 2 …; `original` gives every token the number it has in the unpruned prompt.
 */
export function splice(model, ids, embedded, kept) {
  const { image_token_id, positions, selection } = model.manifest;
  const { rows, width } = embedded;
  const length = ids.length + kept.reduce((sum, image) => sum + image.keptIndices.length - 1, 0);
  const spliced = { embeds: new Float32Array(length * width), positions: [], counts: [], width };
  const images = [...kept];
  let unpruned = 0;
  const put = (row, number, count) => {
    spliced.embeds.set(row, spliced.positions.length * width);
    spliced.positions.push(positions === "original" ? number : spliced.positions.length);
    spliced.counts.push(count);
  };
  ids.forEach((id, place) => {
    if (id !== image_token_id) {
      put(rows.subarray(place * width, (place + 1) * width), unpruned++, 1);
      return;
    }
    const image = images.shift();
    image.keptIndices.forEach((index, row) =>
      put(image.rows.subarray(row * width, (row + 1) * width), unpruned + index, image.keptCounts[row]),
    );
    unpruned += selection.num_tokens;
  });
  return spliced;
}

/** Greedy tokens of an answer as they come, the one that ends it included. */
export async function* generate(model, spliced, stops, maxNewTokens) {
  const room = model.manifest.context_length - (spliced.positions.at(-1) + 1);
  if (room < 1) throw new UserError("the question is past the context; ask a shorter one or keep fewer tokens");
  const decoder = model.sessions.decoder_model_merged;
  const { Tensor } = model.ort;
  let past = emptyCache(model);
  let inputs_embeds = new Tensor("float32", spliced.embeds, [1, spliced.positions.length, spliced.width]);
  let positions = spliced.positions;
  const counts = [...spliced.counts];
  for (let count = 1; count <= Math.min(maxNewTokens, room); count++) {
    const { logits, ...present } = await decoder.run({
      inputs_embeds,
      attention_mask: int64(Tensor, counts),
      position_ids: int64(Tensor, positions),
      ...past,
    });
    Object.values(past).forEach((tensor) => tensor.dispose());
    past = renamed(present);
    const token = argmax(logits.data.subarray(-logits.dims[2]));
    yield token;
    if (stops.includes(token)) break;
    const embedded = await embed(model, [token]);
    inputs_embeds = new Tensor("float32", embedded.rows, [1, 1, spliced.width]);
    positions = [positions.at(-1) + 1];
    counts.push(1);
  }
  Object.values(past).forEach((tensor) => tensor.dispose());
}

const PAST = /^past_key_values\./;

function emptyCache(model) {
  const cache = {};
  for (const input of model.manifest.graphs.decoder_model_merged.inputs) {
    if (!PAST.test(input.name)) continue;
    const [, heads, , width] = input.shape;
    const data = input.dtype === "float32" ? new Float32Array(0) : new Uint16Array(0);
    cache[input.name] = new model.ort.Tensor(input.dtype, data, [1, heads, 0, width]);
  }
  return cache;
}

/** What one run gives as present is the next one's past. */
function renamed(present) {
  return Object.fromEntries(
    Object.entries(present).map(([name, value]) => [name.replace("present", "past_key_values"), value]),
  );
}

function mask(model, length, value) {
  return new model.ort.Tensor("bool", new Uint8Array(length).fill(value ? 1 : 0), [1, length]);
}

function int64(Tensor, values) {
  return new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

/** The lowest index of the largest value. */
function argmax(values) {
  let best = 0;
  for (let index = 1; index < values.length; index++) if (values[index] > values[best]) best = index;
  return best;
}
