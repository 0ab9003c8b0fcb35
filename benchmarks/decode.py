"""Tokens per second of the decoder, beside onnxruntime-genai on the same weights.

How fast a decoder reads its weights depends on where they happen to lie in memory: the same graph differs by several
per cent from one process to the next. So a sample is a process, and what is compared are medians of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks import environments
from benchmarks.environments import UnavailableError
from benchmarks.measure import exported, processes_take_turns, timing
from benchmarks.peers import versions_of, versions_said
from benchmarks.shapes import LLAVA, QUESTION, Shape, write_language_model
from benchmarks.speed import checkpoint_of, command, ratio
from resprune.runtime.bundle import read_bundle
from resprune.runtime.prompt import Prompter

BUNDLES = {
    "fp32": ("fp32", []),
    "fp32, --optimize ort": ("fp32", ["--optimize", "ort"]),
    "q4, --optimize ort": ("int4", ["--dtype", "q4", "--optimize", "ort"]),
}
"""Their precision that is the same as ours, and how ours is exported."""
PROCESSES = 5
PROMPTS = 2
"""Of each length in a process; its figure is their median."""
TOKENS = 32


def run(work: Path, shape: Shape = LLAVA, processes: int = PROCESSES) -> dict[str, Any]:
    """Tokens/s after a prompt of N/9 visual tokens and of all."""
    with TemporaryDirectory(dir=work) as bundles:
        try:
            commands, lengths = _commands(shape, work, Path(bundles))
        except UnavailableError as error:
            return {"skipped": f"onnxruntime-genai is not compared: {error}"}
        replies = processes_take_turns(commands, processes)
    engines = {name: figures(reply) for name, reply in replies.items()}
    for name, (precision, _) in BUNDLES.items():
        compare(engines[f"resprune, {name}"], engines[f"onnxruntime-genai, {precision}"])
    return {
        "words": shape.words,
        "processes": processes,
        "prompt tokens": lengths,
        "engines": engines,
        "versions": versions_of(replies),
    }


def _commands(shape: Shape, work: Path, bundles: Path) -> tuple[dict[str, list[str]], dict[str, int]]:
    """What is run, by subject, and the lengths of the prompts."""
    python = environments.environment("genai", work)
    checkpoint = checkpoint_of(shape, work)
    language_model, k = bundles / "language-model", shape.budgets[0]
    write_language_model(checkpoint, language_model)
    ours = {
        name: exported(checkpoint, bundles / f"bundle-{number}", "-k", str(k), "--verify", "layers", *options)
        for number, (name, (_, options)) in enumerate(BUNDLES.items())
    }
    text = len(Prompter(read_bundle(ours["fp32"], check_hashes=False)).prompt(QUESTION, 1).ids) - 1
    lengths = {str(k): text + k, "all": text + shape.num_tokens}
    asked = {"lengths": lengths, "prompts": PROMPTS, "tokens": TOKENS}
    commands = {
        f"resprune, {name}": command("decoder", {"bundle": str(bundle), **asked})
        for name, bundle in ours.items()
    }
    for precision in dict.fromkeys(precision for precision, _ in BUNDLES.values()):
        model = environments.genai_model(python, language_model, bundles / f"genai-{precision}", precision)
        spec = {"model": str(model), **asked}
        commands[f"onnxruntime-genai, {precision}"] = command("peer_genai", spec, python=str(python))
    return commands, lengths


def figures(reply: Mapping[str, Any]) -> dict[str, Any]:
    """What a subject's processes sampled, by case: tokens/s of every process, and their median and quartiles."""
    if "fault" in reply:
        return dict(reply)
    cases: dict[str, Any] = {}
    for case, stages in reply["samples"].items():
        prompts = 1e3 * reply["tokens"] / np.array(stages["decode"]).reshape(-1, reply["prompts"])
        rates = np.median(prompts, axis=1).tolist()
        cases[case] = {
            "tokens per second": timing(rates),
            "of each process": rates,
            "of each prompt": prompts.tolist(),
            "resident megabytes": reply["memory"][case],
        }
    return cases


def compare(ours: dict[str, Any], theirs: Mapping[str, Any]) -> None:
    """Note of each case of `ours` what part of theirs it is, round by round."""
    if "fault" in ours or "fault" in theirs:
        return
    for case, found in ours.items():
        found["of theirs"] = ratio(found["of each process"], theirs[case]["of each process"])


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    if "skipped" in result:
        return str(result["skipped"])
    rows = [
        f"The language model of **{result['words']}**; {result['processes']} processes of {PROMPTS} prompts of each "
        f"length and {TOKENS} tokens after each; a process counts as the median of its prompts.",
        "",
        "| | prompt | tokens/s | of onnxruntime-genai in the same precision | resident |",
        "|---|---|---|---|---|",
    ]
    for name, cases in result["engines"].items():
        if "fault" in cases:
            rows.append(f"| {name} | {cases['fault']} | | | |")
            continue
        for case, length in result["prompt tokens"].items():
            found = cases[case]
            rows.append(
                f"| {name} | {length} | {found['tokens per second']} | {found.get('of theirs', '–')} "
                f"| {found['resident megabytes']:,.0f} MB |"
            )
    return "\n".join([*rows, "", versions_said(result["versions"])])
