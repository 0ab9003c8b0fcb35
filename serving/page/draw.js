// Draws an image beside its kept visual tokens, as runtime/drawing.py does. The page in examples/web uses it too.

// The colour of a pick, from the first to the last; runtime/caption.py has the same.
const RAMP = [[255, 214, 64], [247, 139, 59], [232, 80, 127], [164, 63, 192], [90, 85, 224]];
const VEIL = "rgb(112 118 128 / 0.7)";
const NUMBERED = 10; // picks that get a number; colour tells the order of the others
const THIN = 2.2; // an image this many times as long as it is short is stretched until its patches are PATCH pixels
const PATCH = 8;
const GAP = 12;
const WORTH = 0.6; // of its size alone, that an image keeps where the original stands beside it

/** The colour of the pick at `place` (0 is the first) of `count`, as [red, green, blue]. */
export function pickColor(place, count) {
  const position = (place / Math.max(count - 1, 1)) * (RAMP.length - 1);
  const low = Math.min(Math.floor(position), RAMP.length - 2);
  return RAMP[low].map((value, channel) => Math.round(value + (RAMP[low + 1][channel] - value) * (position - low)));
}

/** A CSS gradient of the colours, for the scale. */
export const rampGradient = `linear-gradient(to right, ${RAMP.map((color) => `rgb(${color})`).join(", ")})`;

/**
 * Draw on `canvas`, which gets the size it needs inside `room` {width, height} in CSS pixels. `image` is what a canvas
 * can draw, `size` its [width, height], `boxes` the places [left, top, right, bottom] of the kept tokens in its pixels,
 * in pick order; null for one that has no place, and null in place of all for the image alone. `count` is how many picks
 * the scale of colours is for.
 */
export function drawKept(canvas, image, size, boxes, room, count = boxes?.length) {
  const places = boxes?.map((box) => (box && box[2] > box[0] && box[3] > box[1] ? box : null)) ?? [];
  const [wide, high] = shape(size, places, room);
  const fit = (width, height) => Math.min(width / wide, height / high);
  const alone = fit(room.width, room.height);
  const across = fit((room.width - GAP) / 2, room.height);
  const along = fit(room.width, (room.height - GAP) / 2);
  const pair = boxes && Math.max(across, along) >= WORTH * alone;
  const scale = pair ? Math.max(across, along) : alone;
  const [width, height] = [wide, high].map((side) => Math.max(1, Math.round(side * scale)));
  const [left, top] = !pair ? [0, 0] : across >= along ? [width + GAP, 0] : [0, height + GAP];
  const context = sized(canvas, left + width, top + height);
  if (pair) context.drawImage(image, 0, 0, width, height);
  context.translate(left, top);
  context.drawImage(image, 0, 0, width, height);
  if (!boxes) return;
  const drawn = places.map((box) => box?.map((edge, axis) => (edge / size[axis % 2]) * (axis % 2 ? height : width)));
  veil(context, drawn, width, height);
  const picks = [...drawn.entries()].filter(([, box]) => box).reverse(); // so that no earlier pick is hidden
  for (const [place, box] of picks) outline(context, box, pickColor(place, count));
  for (const [place, box] of picks) if (place < NUMBERED) number(context, place + 1, box, pickColor(place, count), width);
}

/** Width and height of any unit in which an image is shown: its own, unless it is too thin for its patches. */
function shape([wide, high], places, room) {
  const seen = places.filter((box) => box);
  if (!seen.length || Math.max(wide, high) <= THIN * Math.min(wide, high)) return [wide, high];
  const scale = Math.min(room.width / wide, room.height / high);
  const middle = (sides) => sides.sort((a, b) => a - b)[sides.length >> 1] * scale;
  const patch = [middle(seen.map((box) => box[2] - box[0])), middle(seen.map((box) => box[3] - box[1]))];
  const thin = wide < high ? 0 : 1;
  const stretch = Math.max(1, Math.min(PATCH, patch[1 - thin]) / patch[thin]);
  return thin ? [wide, high * stretch] : [wide * stretch, high];
}

function sized(canvas, width, height) {
  const dense = devicePixelRatio || 1;
  canvas.width = width * dense;
  canvas.height = height * dense;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(dense, dense);
  context.imageSmoothingQuality = "high";
  return context;
}

/** Dim all but the boxes, which may lie upon each other: on a layer of its own, from which they are cut. */
function veil(context, boxes, width, height) {
  const layer = document.createElement("canvas");
  [layer.width, layer.height] = [context.canvas.width, context.canvas.height];
  const over = layer.getContext("2d");
  over.setTransform(context.getTransform());
  over.fillStyle = VEIL;
  over.fillRect(0, 0, width, height);
  for (const box of boxes) if (box) over.clearRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  context.save();
  context.resetTransform();
  context.drawImage(layer, 0, 0);
  context.restore();
}

function outline(context, [left, top, right, bottom], color) {
  const line = Math.min(Math.max(1, Math.min(right - left, bottom - top) / 10), 3);
  context.strokeStyle = `rgb(${color})`;
  context.lineWidth = line;
  context.strokeRect(left + line / 2, top + line / 2, right - left - line, bottom - top - line);
}

/** The number of a pick in the corner of its patch, or above a patch that it would hide. */
function number(context, pick, [left, top, right, bottom], color, width) {
  const font = Math.min(Math.max(11, 0.3 * Math.min(right - left, bottom - top)), 20);
  context.font = `600 ${font}px system-ui, sans-serif`;
  const [wide, high] = [context.measureText(pick).width + 6, font * 1.25];
  const hides = 3 * wide * high > 2 * (right - left) * (bottom - top);
  const x = Math.max(0, Math.min(left, width - wide));
  const y = Math.max(0, hides ? top - high : top);
  context.fillStyle = `rgb(${color})`;
  context.fillRect(x, y, wide, high);
  const bright = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] >= 120;
  context.fillStyle = bright ? "#1b2130" : "#fff";
  context.textBaseline = "middle";
  context.fillText(pick, x + 3, y + high * 0.54);
}
