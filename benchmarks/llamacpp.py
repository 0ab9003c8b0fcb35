"""Tokens per second of prefill and decoding, beside llama.cpp on the same weights.

The language model of benchmarks/pretrained.py, published in Q4_1, whose weights `--dtype q4` packs without loss. For
llama.cpp also in Q4_0, made from that by llama.cpp itself, and in Q8_0.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.bursts import Engine, take_bursts
from benchmarks.decode import figures, prompt_tokens
from benchmarks.measure import exported
from benchmarks.measure import run as execute
from benchmarks.peers import versions_said
from benchmarks.pretrained import language_file, write_pretrained
from benchmarks.shapes import QUESTION
from benchmarks.speed import command
from tests.hosts import llamacpp_host

K = 64
BUNDLES = {
    "q4": ["--dtype", "q4"],
    "q8": ["--dtype", "q8", "--for", "gguf", "--gguf-type", "q8_0"],
    "int8": ["--dtype", "int8"],
}
"""What is exported, each with `--optimize ort`."""
BASE = "resprune, q4"
PROCESSES = 5
PROMPTS = 4
"""Of each length in a process."""
BURSTS = 4
TOKENS = 16
"""In a burst."""
QUANTIZE = """
import sys
sys.path.append(sys.argv[1])
from llama_cpp import llama_cpp
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
settings.allow_requantize = True
sys.exit(llama_cpp.llama_model_quantize(*(path.encode() for path in sys.argv[2:]), settings))
"""
"""Where `llama_cpp` is, a GGUF file, and where it is to be written in Q4_0."""
PREDICTED = {
    "llama.cpp, Q4_1": ("0.3 to 0.5", "0.65 to 0.85"),
    "llama.cpp, Q4_0": ("0.6 to 1.2", "0.75 to 1.1"),
    "llama.cpp, Q8_0": ("0.6 to 1.1", "0.55 to 0.8"),
    "resprune, q8": ("0.9 to 1.3", "0.7 to 0.95"),
    "resprune, int8": ("1.5 to 2.5", "0.7 to 0.95"),
}
"""Ratios of prefill and of decoding to BASE, written before the first run. A first try of one prompt, on another
version, had 0.33 and 0.72 with Q4_1. llama.cpp has faster products for Q4_0 and Q8_0 on this processor than for Q4_1.
Decoding reads every weight once a token: 8 bits are twice 4, but the output head has 8 bits in all of ours, and the
steps of a model this small also wait for small operators."""


def run(work: Path, processes: int = PROCESSES) -> dict[str, Any]:
    """The pretrained model in every form."""
    checkpoint = write_pretrained(work / "pretrained")
    with TemporaryDirectory(dir=work) as folder:
        specs = prepare(checkpoint, language_file(checkpoint), Path(folder))
        return compare(specs, processes)


def prepare(checkpoint: Path | str, published: Path, folder: Path) -> dict[str, dict[str, str]]:
    """What `compare` takes: the checkpoint in every bundle, and its language model in GGUF files, `published` first."""
    packages = str(llamacpp_host.packages())
    specs = {}
    for name, options in BUNDLES.items():
        how = ("-k", str(K), "--verify", "layers", "--optimize", "ort", *options)
        specs[f"resprune, {name}"] = {"bundle": str(exported(checkpoint, folder / name, *how))}
    smaller = folder / "q4_0.gguf"
    execute([sys.executable, "-c", QUANTIZE, packages, str(published), str(smaller)])
    files = {"Q4_1": published, "Q4_0": smaller, "Q8_0": folder / "q8" / "language_model.gguf"}
    return specs | {
        f"llama.cpp, {name}": specs[BASE] | {"gguf": str(file), "packages": packages}
        for name, file in files.items()
    }


def compare(specs: Mapping[str, Mapping[str, str]], processes: int = PROCESSES) -> dict[str, Any]:
    """Tokens/s of each after a prompt with K visual tokens and with all; ratios to BASE in the same turn."""
    asked = {"question": QUESTION, "tokens": BURSTS * TOKENS}
    engines = {name: Engine(command("decoder", spec | asked)) for name, spec in specs.items()}
    lengths = prompt_tokens(Path(specs[BASE]["bundle"]), K)
    take_bursts(
        [*engines.values()], lengths, processes=processes, prompts=PROMPTS, bursts=BURSTS, tokens=TOKENS
    )
    return {
        "processes": processes,
        "prompt tokens": lengths,
        "engines": {name: figures(engine, engines[BASE]) for name, engine in engines.items()},
        "versions": {name: engine.versions for name, engine in engines.items()},
    }


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [
        f"SmolLM2-135M behind an image of {K} or all visual tokens; bundles with `--optimize ort`. {BURSTS} bursts of "
        f"{TOKENS} tokens after each of {PROMPTS} prompts of each length in each of {result['processes']} processes; "
        "all are in memory together and take turns prompt by prompt and burst by burst. Medians (quartiles) over the "
        f"prompts; ratios to {BASE}, predicted before the first run.",
        "",
        "| | prompt | prefill, tokens/s | ratio | predicted | decoding, tokens/s | ratio | predicted | resident |",
        "|---" * 9 + "|",
    ]
    for name, cases in result["engines"].items():
        if "fault" in cases:
            rows.append(f"| {name} | – | {cases['fault']} |" + " |" * 6)
            continue
        prefill, decoding = PREDICTED.get(name, ("–", "–"))
        for case, length in result["prompt tokens"].items():
            found = cases[case]
            rows.append(
                f"| {name} | {length} | {found['prefill']} | {found.get('prefill, of theirs', '–')} | {prefill} "
                f"| {found['tokens per second']} | {found.get('of theirs', '–')} | {decoding} "
                f"| {found['resident megabytes']:,.0f} MiB |"
            )
    return "\n".join([*rows, "", versions_said(result["versions"])])
