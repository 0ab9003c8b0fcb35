// From a question to a prompt: chat template, token ids, the places of the keywords; and from token ids to text.
// The tokenizer and the template engine are those of transformers.js, from node_modules beside this file.

import { Template } from "./node_modules/@huggingface/jinja/dist/index.js";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

import { optionalJson, UserError } from "./bundle.mjs";

// For checkpoints that carry no template: LLaVA-1.5 was trained with this one.
const DEFAULT_TEMPLATE =
  "{% for message in messages %}" +
  "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}" +
  "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ image_token + '\\n' }}{% endfor %}" +
  "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}" +
  "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";

// Unicode noncharacters: no text carries them, so they show where a template puts the question.
const [QUESTION_START, QUESTION_END] = ["\ufdd0", "\ufdd1"];

/** Writes prompts with a bundle's tokenizer and template. */
export async function openPrompter(bundle) {
  const config = await optionalJson(bundle, "tokenizer_config.json");
  let tokenizer;
  try {
    tokenizer = new Tokenizer(await bundle.json("tokenizer.json"), config);
  } catch (error) {
    if (error instanceof UserError) throw error;
    throw new UserError(`tokenizer.json cannot be used here (${error.message})`);
  }
  const { image_token_id } = bundle.manifest;
  const image_token = tokenizer.id_to_token(image_token_id);
  if (image_token === undefined) throw new UserError(`the tokenizer has no token ${image_token_id}, the image token`);
  const variables = { ...specialTokens(await optionalJson(bundle, "special_tokens_map.json")), ...specialTokens(config), image_token };
  const template = new Template(await findTemplate(bundle));
  const render = (question) => renderPrompt(template, variables, question);

  /** Ids, text and keyword places of a question about one image; `about` names the keywords that guide. */
  const prompt = (question, about) => {
    if (!question.trim()) throw new UserError("the question is empty; ask something about the image");
    const text = render(question);
    const bos = variables.bos_token;
    const { ids } = tokenizer.encode(text, { add_special_tokens: !(bos && text.startsWith(bos)) });
    if (ids.filter((id) => id === image_token_id).length !== 1) {
      throw new UserError(`the question contains ${image_token}, which stands for an image; leave it out`);
    }
    const terms = merged(question, about.flatMap((word) => occurrences(question, word)));
    const spans = locate(terms, question, text, render);
    const tokens = tokenSpans(tokenizer, ids, text);
    const overlaps = ([start, end]) => spans.some(([first, last]) => start < last && first < end);
    return {
      ids,
      text,
      keywords: terms.map(([first, last]) => question.slice(first, last)),
      keywordPlaces: tokens.flatMap((span, place) => (overlaps(span) ? [place] : [])),
    };
  };
  return { prompt, textStream: () => textStream(tokenizer) };
}

async function findTemplate(bundle) {
  for (const name of ["processor_config.json", "chat_template.json"]) {
    const found = defaultTemplate(await optionalJson(bundle, name));
    if (found !== null) return found;
  }
  if (bundle.has("chat_template.jinja")) return new TextDecoder().decode(await bundle.bytes("chat_template.jinja"));
  return defaultTemplate(await optionalJson(bundle, "tokenizer_config.json")) ?? DEFAULT_TEMPLATE;
}

/** A config's template, or the one named default if it has several. */
function defaultTemplate({ chat_template: found }) {
  if (Array.isArray(found)) found = found.filter((entry) => entry.name === "default").at(-1)?.template;
  if (found && typeof found === "object") found = found.default;
  return typeof found === "string" ? found : null;
}

function specialTokens(config) {
  return Object.fromEntries(
    Object.entries(config)
      .map(([name, value]) => [name, value?.content ?? value])
      .filter(([name, value]) => name.endsWith("_token") && typeof value === "string"),
  );
}

/** The prompt's text. A template for plain text is given the image token and the question as one string. */
function renderPrompt(template, variables, question) {
  const { image_token } = variables;
  const count = (text) => text.split(image_token).length - 1;
  const forms = [[{ type: "image" }, { type: "text", text: question }], `${image_token}\n${question}`];
  let fault = `it gave no ${image_token} for an image`;
  for (const content of forms) {
    try {
      const messages = [{ role: "user", content }];
      const text = template.render({ messages, tools: null, documents: null, add_generation_prompt: true, ...variables });
      if (count(text) === 1 + count(question)) return text;
    } catch (error) {
      fault = error.message;
    }
  }
  throw new UserError(`the checkpoint's chat template cannot make this prompt (${fault})`);
}

/** Where a word stands in the question as a whole word, whatever its case. */
function occurrences(question, word) {
  const escaped = word.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
  const found = [...question.matchAll(new RegExp(`(?<![\\p{L}\\p{N}_])${escaped}(?![\\p{L}\\p{N}_])`, "giu"))];
  if (!found.length) throw new UserError(`"${word}" is not in the question; name words as they stand in it`);
  return found.map((match) => [match.index, match.index + match[0].length]);
}

/** Spans in order, those made one that overlap or have only spaces between them. */
function merged(question, spans) {
  const all = [];
  for (const [start, end] of spans.sort((a, b) => a[0] - b[0] || a[1] - b[1])) {
    const last = all.at(-1);
    if (last && !question.slice(last[1], start).trim()) last[1] = Math.max(last[1], end);
    else all.push([start, end]);
  }
  return all;
}

/** Spans of the question's terms in the prompt's text, never in the template's own words. */
function locate(terms, question, text, render) {
  const marked = render(`${QUESTION_START}${question}${QUESTION_END}`);
  const before = marked.indexOf(QUESTION_START);
  const after = marked.length - marked.lastIndexOf(QUESTION_END) - 1;
  const region = text.slice(before, text.length - after);
  const found = region.indexOf(question.trim());
  if (found >= 0) {
    const shift = before + found - (question.length - question.trimStart().length);
    return terms.map(([first, last]) => [first + shift, last + shift]);
  }
  let cursor = 0;
  return terms.flatMap(([first, last]) => {
    const place = region.indexOf(question.slice(first, last), cursor);
    if (place < 0) return [];
    cursor = place + last - first;
    return [[before + place, before + cursor]];
  });
}

/** Where each token stands in the text: the tokenizer tells names only, so their bytes are followed through it. */
function tokenSpans(tokenizer, ids, text) {
  const encoder = new TextEncoder();
  const content = encoder.encode(text);
  const characters = new Uint32Array(content.length + 1); // of each byte, the place in the text
  let byte = 0;
  let place = 0;
  for (const character of text) {
    const length = encoder.encode(character).length;
    characters.fill(place, byte, byte + length);
    byte += length;
    place += character.length;
  }
  characters[byte] = place;
  const added = tokenizer.get_added_tokens_decoder();
  const startsAt = (bytes, at) => bytes.every((value, index) => content[at + index] === value);
  let cursor = 0;
  return ids.map((id) => {
    const name = tokenizer.id_to_token(id);
    let bytes = added.has(id) ? encoder.encode(name) : nameBytes(name, tokenizer);
    // SentencePiece puts a space before the first word, which the text does not have.
    if (!startsAt(bytes, cursor) && bytes[0] === 0x20) bytes = bytes.slice(1);
    if (!startsAt(bytes, cursor)) {
      if (added.has(id)) return [characters[cursor], characters[cursor]]; // BOS, which is not in the text
      throw new UserError("the tokenizer changes this question's letters, so its keywords cannot be found");
    }
    const start = cursor;
    cursor += bytes.length;
    // A character that is spread over several tokens belongs to each of them.
    const end = cursor === start || characters[cursor] > characters[cursor - 1] ? characters[cursor] : characters[cursor] + 1;
    return [characters[start], end];
  });
}

/** The bytes of a token's name: byte-level BPE has a letter for every byte, SentencePiece ▁ for a space. */
function nameBytes(name, tokenizer) {
  if (tokenizer.decoder?.config?.type === "ByteLevel") {
    return Uint8Array.from(name, (letter) => BYTES.get(letter));
  }
  const byte = /^<0x([0-9A-F]{2})>$/i.exec(name);
  return byte ? Uint8Array.of(parseInt(byte[1], 16)) : new TextEncoder().encode(name.replaceAll("\u2581", " "));
}

/** GPT-2's letters for bytes: printable Latin-1 stands for itself, the rest for U+0100 on, in order. */
const BYTES = (() => {
  const printable = (byte) => (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  let others = 0;
  return new Map(
    Array.from({ length: 256 }, (_, byte) => [String.fromCharCode(printable(byte) ? byte : 256 + others++), byte]),
  );
})();

/** Text of a growing answer in whole characters, without special tokens and without white space at its start. */
function textStream(tokenizer) {
  const special = new Set([...tokenizer.get_added_tokens_decoder()].filter(([, token]) => token.special).map(([id]) => id));
  const ids = [];
  let shown = 0;
  const advance = (final) => {
    const text = tokenizer.decode(ids, { skip_special_tokens: false, clean_up_tokenization_spaces: false }).trimStart();
    const certain = final ? text.length : text.replace(/\ufffd+$/, "").length;
    const piece = text.slice(shown, certain);
    shown = Math.max(shown, certain);
    return piece;
  };
  return {
    push(id) {
      if (special.has(id)) return "";
      ids.push(id);
      return advance(false);
    },
    finish: () => (ids.length ? advance(true) : ""),
  };
}
