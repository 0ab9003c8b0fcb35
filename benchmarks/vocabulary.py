"""A tokenizer as large as a real model's: real special tokens at their real ids, and merges learnt from the documents.

A published tokenizer cannot be had without its hub. What timing needs of one is its size and the length of a prompt, so
words are learnt from them and every id that is left has a token that no text contains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

DOCUMENTS = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
LEARNT = 4096


@dataclass(frozen=True)
class Vocabulary:
    """`size` ids; `special` tokens by name; the `template` a chat is written with."""

    size: int
    special: Mapping[str, int]
    image: str
    bos: str | None
    eos: str
    pad: str
    template: str


LLAMA = Vocabulary(
    size=32064,
    special={"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001},
    image="<image>",
    bos="<s>",
    eos="</s>",
    pad="<pad>",
    template=(
        "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() + ': ' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    ),
)

QWEN = Vocabulary(
    size=151936,
    special={
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
        "<|vision_end|>": 151653,
        "<|vision_pad|>": 151654,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
    },
    image="<|image_pad|>",
    bos=None,
    eos="<|im_end|>",
    pad="<|endoftext|>",
    template=(
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
        "{% for content in message['content'] %}"
        "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
)


def write_tokenizer(folder: Path, vocabulary: Vocabulary, tokenizer_class: str) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json into `folder`."""
    learnt = Tokenizer(models.BPE())
    learnt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learnt.train_from_iterator(
        [page.read_text() for page in DOCUMENTS],
        trainers.BpeTrainer(vocab_size=LEARNT, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(learnt.to_str())["model"]
    by_id = {index: token for token, index in vocabulary.special.items()}
    words = iter(sorted(model["vocab"], key=model["vocab"].__getitem__))
    vocab = {
        by_id[index] if index in by_id else next(words, f"<unused{index}>"): index
        for index in range(vocabulary.size)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in vocabulary.special]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": vocabulary.bos, "eos_token": vocabulary.eos, "pad_token": vocabulary.pad}
    config = {"tokenizer_class": tokenizer_class, "model_max_length": 32768, "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | names, indent=2))
    (folder / "chat_template.jinja").write_text(vocabulary.template)
    ids = {
        "bos_token_id": vocabulary.special.get(vocabulary.bos or ""),
        "eos_token_id": vocabulary.special[vocabulary.eos],
        "pad_token_id": vocabulary.special[vocabulary.pad],
    }
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2))
