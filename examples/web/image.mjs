// From an image to pixel values, to the bit what Pillow and the Hugging Face processors make of it.
// An image here is { data, width, height }, `data` RGB, 8 bits a channel, row by row.

import { UserError } from "./bundle.mjs";

export const MAX_PIXELS = 64_000_000;

const OPENAI_CLIP = {
  image_mean: [0.48145466, 0.4578275, 0.40821073],
  image_std: [0.26862954, 0.26130258, 0.27577711],
};
const COMMON = {
  do_resize: true, do_rescale: true, do_normalize: true, rescale_factor: 1 / 255, resample: 3,
};
const CROPPED = { ...COMMON, ...OPENAI_CLIP, do_center_crop: true, size: { shortest_edge: 224 }, crop_size: 224 };
// What each processor takes for a setting that its file leaves out.
const DEFAULTS = {
  CLIPImageProcessor: CROPPED,
  BitImageProcessor: CROPPED,
  LlavaImageProcessor: CROPPED,
  SiglipImageProcessor: {
    ...COMMON, image_mean: [0.5, 0.5, 0.5], image_std: [0.5, 0.5, 0.5], size: { height: 224, width: 224 },
  },
};

/** The steps for images of one image processor's settings (preprocessor_config.json). */
export function imageProcessor(config) {
  const kind = (config.image_processor_type ?? config.feature_extractor_type ?? "none")
    .replace("FeatureExtractor", "ImageProcessor")
    .replace(/Fast$|Pil$/g, "");
  if (!(kind in DEFAULTS)) throw new UserError(`the image processor ${kind} is not supported here`);
  const settings = { ...DEFAULTS[kind], ...config };
  const channels = (value) => (Array.isArray(value) ? value : [value, value, value]);
  const pad = settings.do_pad && kind === "LlavaImageProcessor";
  const filter = FILTERS[settings.resample];
  if (settings.do_resize && !filter) {
    throw new UserError(`the image processor's resample ${settings.resample} is not supported here`);
  }
  return {
    padColor: pad ? channels(settings.image_mean).map((mean) => Math.trunc(255 * mean)) : null,
    resize: settings.do_resize ? edges(settings.size, settings.default_to_square ?? false) : null,
    crop: settings.do_center_crop ? edges(settings.crop_size, true) : null,
    filter,
    values: valueTables(settings, channels),
  };
}

/** `pixel_values` [3, H, W] float32 of an image, with H and W. */
export function pixelValues(image, processor) {
  const steps = geometry(processor, image.width, image.height);
  let pixels = processor.padColor ? padded(image, steps, processor.padColor) : image;
  if (pixels.width !== steps.resized[0] || pixels.height !== steps.resized[1]) {
    pixels = resize(pixels, ...steps.resized, processor.filter);
  }
  const [width, height] = steps.size;
  const values = new Float32Array(3 * height * width);
  for (let y = 0; y < height; y++) {
    const row = y + steps.cropOffset[1];
    for (let x = 0; x < width; x++) {
      const column = x + steps.cropOffset[0];
      const inside = row >= 0 && row < pixels.height && column >= 0 && column < pixels.width;
      for (let channel = 0; channel < 3; channel++) {
        const value = inside ? pixels.data[3 * (row * pixels.width + column) + channel] : 0;
        values[(channel * height + y) * width + x] = processor.values[channel][value];
      }
    }
  }
  return { values, width, height };
}

/** Where each patch lies in an image of width × height: [left, top, right, bottom] in its pixels, row by row. */
export function patchBoxes(processor, width, height, patchSize) {
  const steps = geometry(processor, width, height);
  const places = (axis, most) => {
    const scale = steps.padded[axis] / steps.resized[axis];
    const count = Math.floor(steps.size[axis] / patchSize);
    return Array.from({ length: count + 1 }, (_, index) => {
      const place = (index * patchSize + steps.cropOffset[axis]) * scale - steps.padOffset[axis];
      return Math.min(Math.max(place, 0), most);
    });
  };
  const [x, y] = [places(0, width), places(1, height)];
  return y.slice(1).flatMap((bottom, row) => x.slice(1).map((right, column) => [x[column], y[row], right, bottom]));
}

/** RGBA → RGB, blended onto white as Pillow's alpha_composite rounds it. */
export function onWhite(rgba) {
  const rgb = new Uint8Array((rgba.length / 4) * 3);
  for (let from = 0, to = 0; from < rgba.length; from += 4) {
    const alpha = rgba[from + 3];
    for (let channel = 0; channel < 3; channel++) {
      const sum = (rgba[from + channel] * alpha + 255 * (255 - alpha) + 128) * 128;
      rgb[to++] = ((sum >> 8) + sum) >> 15;
    }
  }
  return rgb;
}

// Pillow's resampling filters by their numbers there: half-width, and weight at a distance.
const FILTERS = {
  2: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) }, // bilinear
  3: { support: 2, weight: bicubic },
};

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

/** Resize as Pillow does: a pass along each axis, weights in fixed point, 8 bits between the two passes. */
export function resize(image, width, height, filter) {
  // Pillow 13 begins with the columns where the height shrinks by more than twice what the width does.
  const lost = image.height - height;
  const verticalFirst = lost > 0 && lost > 2 * (image.width - width);
  const across = (from) => (from.width === width ? from : horizontal(from, width, filter));
  const down = (from) => (from.height === height ? from : vertical(from, height, filter));
  return verticalFirst ? across(down(image)) : down(across(image));
}

function horizontal({ data, width, height }, to, filter) {
  return { data: pass(data, width, to, 3, height, 3 * width, 3 * to, filter), width: to, height };
}

function vertical({ data, width, height }, to, filter) {
  return { data: pass(data, height, to, 3 * width, width, 3, 3, filter), width, height: to };
}

const PRECISION = 22; // bits behind the point: 32 less 8 of the pixel less 2 for the filter's overshoot

/**
 * Resample every line of `from` pixels, `step` bytes apart, to `to` pixels.
 * There are `lines` lines; they begin `lineStep` bytes apart, and `newLineStep` in what is returned.
 */
function pass(data, from, to, step, lines, lineStep, newLineStep, filter) {
  const resampled = new Uint8Array(3 * lines * to);
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  for (let target = 0; target < to; target++) {
    const center = (target + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support + 0.5), 0);
    const last = Math.min(Math.trunc(center + support + 0.5), from);
    const weights = fixedPoint(
      Array.from({ length: last - first }, (_, index) =>
        filter.weight((first + index - center + 0.5) * (1 / stretch)),
      ),
    );
    for (let line = 0; line < lines; line++) {
      for (let channel = 0; channel < 3; channel++) {
        let place = line * lineStep + first * step + channel;
        let total = 1 << (PRECISION - 1);
        for (let index = 0; index < weights.length; index++, place += step) total += data[place] * weights[index];
        const value = Math.min(Math.max(total >> PRECISION, 0), 255);
        resampled[line * newLineStep + target * step + channel] = value;
      }
    }
  }
  return resampled;
}

/** Weights that sum to 1, as whole numbers of 2^-PRECISION. */
function fixedPoint(weights) {
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return Int32Array.from(weights, (weight) => {
    const scaled = (weight / sum) * (1 << PRECISION);
    return Math.trunc(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
  });
}

function padded(image, steps, color) {
  const [side] = steps.padded;
  const data = new Uint8Array(3 * side * side);
  for (let place = 0; place < data.length; place++) data[place] = color[place % 3];
  const [left, top] = steps.padOffset;
  for (let y = 0; y < image.height; y++) {
    data.set(image.data.subarray(3 * y * image.width, 3 * (y + 1) * image.width), 3 * ((y + top) * side + left));
  }
  return { data, width: side, height: side };
}

function geometry(processor, width, height) {
  const side = Math.max(width, height);
  const square = processor.padColor !== null;
  const frame = square ? [side, side] : [width, height];
  const padOffset = square ? [Math.floor((side - width) / 2), Math.floor((side - height) / 2)] : [0, 0];
  let resized = frame;
  if (processor.resize?.size) {
    resized = processor.resize.size;
  } else if (processor.resize) {
    const edge = processor.resize.shortestEdge;
    const longer = Math.trunc((edge * Math.max(...frame)) / Math.min(...frame));
    resized = frame[0] <= frame[1] ? [edge, longer] : [longer, edge];
  }
  if (Math.max(frame[0] * frame[1], resized[0] * resized[1]) > 4 * MAX_PIXELS) {
    throw new UserError(`the image is too long and thin (${width} x ${height} pixels); cut a part out of it`);
  }
  const size = processor.crop?.size ?? resized;
  const cropOffset = [0, 1].map((axis) => Math.floor((resized[axis] - size[axis]) / 2));
  return { padded: frame, padOffset, resized, size, cropOffset };
}

/** `{ size: [width, height] }` or `{ shortestEdge }` of a number, a pair or an object. */
function edges(value, square) {
  if (typeof value === "number") return square ? { size: [value, value] } : { shortestEdge: value };
  if (Array.isArray(value)) return { size: [value[1], value[0]] };
  if (value?.shortest_edge) return { shortestEdge: value.shortest_edge };
  if (value?.height && value?.width) return { size: [value.width, value.height] };
  throw new UserError(`the image processor's size ${JSON.stringify(value)} is not supported here`);
}

/** What each 8-bit value of each channel becomes, rounded to float32 at each step. */
function valueTables(settings, channels) {
  return [0, 1, 2].map((channel) =>
    Float32Array.from({ length: 256 }, (_, value) => {
      const scaled = Math.fround(settings.do_rescale ? value * settings.rescale_factor : value);
      if (!settings.do_normalize) return scaled;
      const mean = Math.fround(channels(settings.image_mean)[channel]);
      const std = Math.fround(channels(settings.image_std)[channel]);
      return Math.fround(scaled - mean) / std;
    }),
  );
}
