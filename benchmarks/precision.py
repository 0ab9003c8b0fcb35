"""What a precision costs and brings on trained weights: loss, size, first token, prefill, tokens a second.

The loss is of benchmarks/pretrained.py's model on English text after a real picture, against the fp32 bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.measure import THREADS, exported, take_turns
from benchmarks.pretrained import write_pretrained
from resprune import Pipeline
from resprune.exporter.verify.text import every_position
from resprune.names import DECODER
from resprune.runtime.backends.backend import Embedding
from resprune.runtime.backends.onnxruntime import OrtSequence, onnxruntime_decoder
from resprune.runtime.backends.providers import CPU, new_session
from resprune.runtime.backends.session import OrtGraphs, SessionOptions, session_settings
from resprune.runtime.bench.measure import Timing
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.bundle.precisions import PRESETS
from resprune.runtime.families.image import load_image
from resprune.runtime.prompt.prompter import Prompter, load_tokenizer
from resprune.runtime.prompt.splice import Spliced
from resprune.runtime.walk import Encoded, Walk

PRESET = "--preset {}"
KINDS = {
    "fp32": ("--dtype", "fp32"),
    "fp16": ("--dtype", "fp16"),
    "int8": ("--dtype", "int8"),
    "q8": ("--dtype", "q8"),
    "q4": ("--dtype", "q4"),
} | {PRESET.format(name): ("--preset", name) for name in PRESETS if name != "gpu"}
"""The preset for GPUs is fp16."""
K = 64
PICTURES = ("shapes", "easy-vqa")
HALF = 531
"""Tokens of the text after each picture."""
QUESTION = "What is in the picture? Write a page."
PROMPTS = (
    "What is the capital of France?",
    "Name three colours.",
    "Why is the sky blue?",
    "Write a sentence about a dog.",
    "How many days has a week?",
    "What do bees make?",
    "Who wrote Hamlet?",
    "What is two plus three?",
    "Tell me about the ocean.",
    "What is a bridge for?",
    "How do I boil an egg?",
    "Describe a winter morning.",
    "What is the largest planet?",
    "Give me a word that means happy.",
    "What is water made of?",
    "Why do leaves fall?",
    "What does a baker do?",
    "Explain what a map is.",
    "What comes after Monday?",
    "Say something about trains.",
)
ANSWER_TOKENS = 16
STEPS = 8
REPEATS = 7
ENGLISH = Path(__file__).with_name("texts") / "english.txt"
DEMO_PICTURES = Path(__file__).parents[1] / "demo" / "pictures"


class Opened:
    """A bundle on the CPU, with a prompt in its cache to be stepped on."""

    def __init__(self, bundle: Bundle) -> None:
        options = SessionOptions(threads=THREADS)
        self.bundle = bundle
        self.prompter = Prompter(bundle)
        graphs = OrtGraphs(bundle, options)
        self.walk = Walk(bundle, graphs, Embedding(graphs))
        self.decoder = onnxruntime_decoder(bundle, self.walk.embed_tokens, options)
        self.sequence: OrtSequence | None = None

    def spliced(self, picture: str) -> Spliced:
        """The prompt of QUESTION about a picture, of which K tokens are kept."""
        prompt = self.prompter.prompt(QUESTION, 1)
        embeds = self.walk.embed([prompt])[0]
        pixels = self.walk.preprocessor(load_image(DEMO_PICTURES / f"{picture}.png"))
        words = self.walk.keywords(prompt, embeds)
        (kept,) = self.walk.select([Encoded(pixels)], [words], [K])
        return self.walk.splice([embeds], [prompt], [[kept]]).spliced

    def with_text(self, picture: str, ids: NDArray[np.int64]) -> Spliced:
        """The same, and text after it."""
        prompt = self.spliced(picture)
        length = prompt.inputs_embeds.shape[1] + len(ids)
        embeds = np.concatenate([prompt.inputs_embeds, self.walk.embed_tokens(ids[None])], axis=1)
        following = prompt.following + np.arange(len(ids))
        return Spliced(
            embeds, np.concatenate([prompt.position_ids, following], axis=1), np.ones((1, length), np.int64)
        )

    def text_alone(self, ids: NDArray[np.int64]) -> Spliced:
        """A prompt of these tokens and nothing else."""
        return Spliced(
            self.walk.embed_tokens(ids[None]), np.arange(len(ids))[None], np.ones((1, len(ids)), np.int64)
        )

    def first_token(self) -> None:
        self.prefill(self.spliced(PICTURES[0]))

    def prefill(self, spliced: Spliced) -> None:
        self.sequence = None  # the cache before goes before the new one is made
        self.sequence = self.decoder.start(spliced)

    def steps(self) -> None:
        assert self.sequence is not None
        for token in range(STEPS):
            self.sequence.step(np.array([token]))


def run(work: Path) -> dict[str, Any]:
    """The trained model in every precision, in turn."""
    checkpoint = write_pretrained(work / "pretrained")
    figures: dict[str, Any] = {"trained": {}}
    reference: dict[str, Any] = {}
    opened: dict[str, Opened] = {}
    for name, options in KINDS.items():
        path = exported(checkpoint, work / f"pretrained-{file_name(name)}", "-k", str(K), *options)
        bundle = read_bundle(path, check_hashes=False)
        opened[name] = one = Opened(bundle)
        found = _answers(path) | _text_after_images(one)
        reference = reference or found
        figures["trained"][name] = _sizes(bundle) | _losses(bundle, found, reference)
        print(name, figures["trained"][name], flush=True)  # the parts of it are long
    ids = text_ids(next(iter(opened.values())).bundle)[0]
    prompts = {name: one.with_text(PICTURES[0], ids) for name, one in opened.items()}
    figures["first token"] = take_turns({name: one.first_token for name, one in opened.items()}, REPEATS)
    figures["prefill"] = take_turns(
        {name: lambda one=one, name=name: one.prefill(prompts[name]) for name, one in opened.items()},  # type: ignore[misc]
        REPEATS,
    )
    figures["steps"] = take_turns({name: one.steps for name, one in opened.items()}, REPEATS)
    figures["prompt"] = prompts["fp32"].inputs_embeds.shape[1]
    return figures


def file_name(kind: str) -> str:
    return kind.replace("--preset ", "").replace(", ", "-").replace(" ", "-")


def text_ids(bundle: Bundle) -> list[NDArray[np.int64]]:
    """Token ids of the text after each picture, HALF each."""
    ids = load_tokenizer(bundle).encode(ENGLISH.read_text(), add_special_tokens=False).ids
    return [np.array(ids[start : start + HALF]) for start in range(0, HALF * len(PICTURES), HALF)]


def _answers(path: Path) -> dict[str, Any]:
    """What it writes, greedily, and which tokens of a picture it keeps."""
    with Pipeline.load(path) as vlm:
        answers = [
            vlm.ask(
                DEMO_PICTURES / f"{PICTURES[number % len(PICTURES)]}.png",
                question,
                max_new_tokens=ANSWER_TOKENS,
                stream=False,
            )
            for number, question in enumerate(PROMPTS)
        ]
    return {
        "tokens": [answer.token_ids for answer in answers],
        "picks": [set(answer.images[0].kept_indices.tolist()) for answer in answers],
    }


def _text_after_images(opened: Opened) -> dict[str, Any]:
    """Logits [S, vocabulary] of the text after each picture, and the tokens that followed in truth."""
    texts = text_ids(opened.bundle)
    prompts = [opened.with_text(picture, ids) for picture, ids in zip(PICTURES, texts, strict=True)]
    return text_logits(opened.bundle, prompts, texts)


def text_logits(
    bundle: Bundle,
    prompts: Sequence[Spliced],
    texts: Sequence[NDArray[np.int64]],
    decoder: Path | None = None,
) -> dict[str, Tensor]:
    """Logits [S, vocabulary] of the texts with which prompts end, and the tokens that followed in truth.

    `decoder` is another graph that takes the place of the bundle's, and has logits at every position.
    """
    wide = decoder or every_position(bundle.graph_path(DECODER))
    try:
        session: Any = new_session(str(wide), session_settings(THREADS), [CPU])
    finally:
        if decoder is None:
            wide.unlink()
    logits, wanted = [], []
    for prompt, ids in zip(prompts, texts, strict=True):
        (rows,) = session.run(["logits"], decoder_feeds(bundle, prompt))
        logits.append(torch.from_numpy(rows[0, -len(ids) : -1]).float())
        wanted.append(torch.from_numpy(ids[1:]))
    return {"logits": torch.cat(logits), "wanted": torch.cat(wanted)}


def decoder_feeds(bundle: Bundle, prompt: Spliced) -> dict[str, NDArray[Any]]:
    """What a decoder takes of a prompt that nothing came before."""
    feeds = {tensor.name: _empty(tensor) for tensor in bundle.graph(DECODER).inputs}
    return feeds | {
        "inputs_embeds": prompt.inputs_embeds,
        "attention_mask": prompt.attention_mask,
        "position_ids": prompt.position_ids,
    }


def _empty(tensor: TensorSpec) -> NDArray[Any]:
    """An input of a batch of one without a past."""
    shape = [size if isinstance(size, int) else int(size == "batch_size") for size in tensor.shape]
    return np.zeros(shape, dtype=tensor.dtype)


def _sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of all graphs, and of the decoder."""
    graph = bundle.graph(DECODER).file
    files = {name: spec.size for name, spec in bundle.manifest.files.items() if name.startswith("onnx/")}
    return {
        "graphs": sum(files.values()),
        "decoder": sum(size for name, size in files.items() if name.startswith(graph)),
    }


def _losses(bundle: Bundle, found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    logits, wanted = found["logits"], reference["logits"]
    noise = float((logits - wanted).double().square().sum())
    tokens = [
        sum(np.cumprod(np.equal(one[: len(other)], other[: len(one)])))
        for one, other in zip(found["tokens"], reference["tokens"], strict=True)
    ]
    kept = [len(one & other) for one, other in zip(found["picks"], reference["picks"], strict=True)]
    vision = Path(bundle.graph("vision_select").file).stem
    outputs = bundle.manifest.parity["outputs"]
    return {
        "perplexity": perplexity(logits, found["wanted"]),
        "agreement": float((logits.argmax(1) == wanted.argmax(1)).double().mean()),
        "snr": None if noise == 0 else 10 * math.log10(float(wanted.double().square().sum()) / noise),
        "image snr": outputs[vision]["image_features"].get("snr"),
        "positions": len(logits),
        "equal tokens": int(sum(tokens)),
        "tokens": sum(map(len, reference["tokens"])),
        "whole answers": sum(
            one == other for one, other in zip(found["tokens"], reference["tokens"], strict=True)
        ),
        "picks": sum(kept) / sum(map(len, reference["picks"])),
    }


def perplexity(logits: Tensor, wanted: Tensor) -> float:
    """Of the tokens that followed, `wanted` [S], by logits [S, vocabulary]."""
    return math.exp(torch.nn.functional.cross_entropy(logits, wanted))


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    trained = result["trained"]
    plain = trained["fp32"]
    lines = [
        f"SmolLM2-135M behind DINOv2-small with {K} of 256 tokens; {plain['positions']} positions of English after an "
        f"image, {len(PROMPTS)} answers of up to {ANSWER_TOKENS} tokens, a prefill of {result['prompt']} rows.\n",
        "| | graphs, MB | decoder, MB | perplexity | of fp32's | most likely token as fp32's | SNR of logits "
        "| SNR of image tokens | picks as fp32's | greedy tokens as fp32's | first token | prefill | tokens/s |",
        "|---" * 13 + "|",
    ]
    for name, row in trained.items():
        steps: Timing = result["steps"][name]
        cells = [
            f"{row['graphs'] / 1e6:.0f}",
            f"{row['decoder'] / 1e6:.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / plain['perplexity']:.4f}",
            f"{100 * row['agreement']:.1f} %",
            "" if row["snr"] is None else f"{row['snr']:.0f} dB",
            "" if row["image snr"] is None else f"{row['image snr']:.0f} dB",
            f"{100 * row['picks']:.1f} %",
            f"{row['equal tokens']} of {row['tokens']}",
            f"{result['first token'][name]} ms",
            f"{result['prefill'][name]} ms",
            f"{1e3 * STEPS / steps.median:.0f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
