// node pixels.mjs RGBA WIDTH HEIGHT SETTINGS OUT: what examples/web/image.mjs makes of raw pixels.
import { readFileSync, writeFileSync } from "node:fs";
import { imageProcessor, onWhite, pixelValues } from "../../examples/web/image.mjs";

const [file, width, height, settings, out] = process.argv.slice(2);
const image = { data: onWhite(readFileSync(file)), width: Number(width), height: Number(height) };
writeFileSync(out, new Uint8Array(pixelValues(image, imageProcessor(JSON.parse(settings))).values.buffer));
