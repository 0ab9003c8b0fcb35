// A pruned LLaVA bundle in transformers.js: node ask.mjs BUNDLE IMAGE "question" [word,word …]
// The bundle needs onnx/vision_encoder.onnx to be its vision_select.onnx: docs/node.md, "transformers.js".

import { readFile } from "node:fs/promises";
import path from "node:path";

import {
  AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, env, RawImage, Tensor,
} from "@huggingface/transformers";

const [folder, file, question, about = ""] = process.argv.slice(2);
if (!question) {
  console.error('usage: node ask.mjs BUNDLE IMAGE "question" [word,word …]');
  process.exit(2);
}
const root = path.resolve(folder);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(root);
const name = path.basename(root);
const { selection, positions } = JSON.parse(await readFile(path.join(root, "resprune.json"), "utf8"));
if (positions !== "contiguous") {
  console.error("ask.mjs: transformers.js numbers 0, 1, 2 …; export the bundle with --positions contiguous");
  process.exit(2);
}

const tokenizer = await AutoTokenizer.from_pretrained(name);
tokenizer.chat_template ??= await readFile(path.join(root, "chat_template.jinja"), "utf8");
const imageProcessor = await AutoImageProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype: "fp32" });
model.forward_params.push("text_embeds", "text_mask"); // 1. the vision graph takes the keywords as well

const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: question }] }];
const text = tokenizer
  .apply_chat_template(messages, { tokenize: false, add_generation_prompt: true })
  .replace("<image>", "<image>".repeat(selection.k)); // 2. an image token for each row that is kept

// Each word with the space before it, as it stands in the question.
const words = about.split(",").map((word) => word.trim()).filter(Boolean);
const ids = words.flatMap((word) => tokenizer.encode(` ${word}`, { add_special_tokens: false }));
const count = Math.max(ids.length, 1);
const input_ids = new Tensor("int64", BigInt64Array.from(ids.length ? ids : [0], BigInt), [1, count]);

const prompt = tokenizer(text);
const output = await model.generate({
  ...prompt,
  ...(await imageProcessor(await RawImage.read(file))),
  text_embeds: await model.encode_text({ input_ids }),
  text_mask: new Tensor("bool", new Uint8Array(count).fill(ids.length ? 1 : 0), [1, count]),
  max_new_tokens: 64,
});
const answer = output.slice(null, [prompt.input_ids.dims[1], null]);
console.log(tokenizer.batch_decode(answer, { skip_special_tokens: true })[0].trim());
