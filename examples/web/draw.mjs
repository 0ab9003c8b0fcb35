// Draws an image with its kept tokens: clear, outlined and numbered in the colour of their pick; the rest is veiled.

// From the first pick to the last, light to dark, so that the order is seen without colour vision too.
const RAMP = [[253, 231, 37], [122, 209, 81], [34, 168, 132], [49, 134, 180], [98, 104, 214], [168, 92, 214]];
const VEIL = "rgba(112, 118, 128, 0.66)";
const NUMBER_FROM = 22; // pixels of the screen that a patch needs for its number

/** The colour of pick `index` of `count`, as [red, green, blue]. */
export function pickColor(index, count) {
  const place = (index / Math.max(count - 1, 1)) * (RAMP.length - 1);
  const left = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[left].map((value, channel) => Math.round(value + (RAMP[left + 1][channel] - value) * (place - left)));
}

/** A CSS gradient of the colours, for the legend. */
export const rampGradient = `linear-gradient(to right, ${RAMP.map((color) => `rgb(${color})`).join(", ")})`;

/** Draw `bitmap` to fill `canvas` inside `room` (CSS pixels); `picks` are indices into `boxes`, in pick order. */
export function drawKept(canvas, bitmap, boxes, picks, room) {
  const scale = Math.min(room.width / bitmap.width, room.height / bitmap.height);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale].map((size) => Math.max(1, Math.round(size)));
  const dense = devicePixelRatio || 1;
  canvas.width = width * dense;
  canvas.height = height * dense;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(dense, dense);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  if (!picks) return;
  const places = picks.map((index) => boxes[index]?.map((edge) => edge * scale));
  context.save();
  context.beginPath();
  context.rect(0, 0, width, height);
  for (const box of places) if (box) context.rect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  context.clip("evenodd");
  context.fillStyle = VEIL;
  context.fillRect(0, 0, width, height);
  context.restore();
  places.forEach((box, pick) => {
    if (!box || box[2] - box[0] < 1 || box[3] - box[1] < 1) return; // a patch that saw nothing of the image
    const color = pickColor(pick, picks.length);
    const [left, top, right, bottom] = box;
    context.strokeStyle = `rgb(${color})`;
    context.lineWidth = 2;
    context.strokeRect(left + 1, top + 1, right - left - 2, bottom - top - 2);
    if (Math.min(right - left, bottom - top) < NUMBER_FROM) return;
    const text = String(pick + 1);
    context.font = "600 11px system-ui, sans-serif";
    context.textBaseline = "top";
    const tag = context.measureText(text).width + 6;
    context.fillStyle = `rgb(${color})`;
    context.fillRect(left, top, tag, 14);
    const bright = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2] > 120;
    context.fillStyle = bright ? "#000" : "#fff";
    context.fillText(text, left + 3, top + 2);
  });
}
