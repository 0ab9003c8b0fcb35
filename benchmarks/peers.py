"""The runtime beside OpenVINO GenAI and its pruner, on the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import environments
from benchmarks.environments import UnavailableError
from benchmarks.measure import Timing, bfloat16_in_hardware, processes_take_turns, timing
from benchmarks.plots import stacked
from benchmarks.shapes import QWEN25VL, Shape
from benchmarks.speed import (
    RESULTS,
    ROUNDS,
    Subject,
    by_budget,
    figures,
    median,
    ours,
    prepare,
    ratio,
    worker,
)
from resprune.runtime.bundle.files import read_bundle

BUNDLES = {
    "fp32": [],
    "fp32, --optimize ort": ["--optimize", "ort"],
    "int8": ["--dtype", "int8"],
    "int8, --optimize ort": ["--dtype", "int8", "--optimize", "ort"],
}
UNPRUNED = "all"


def run(work: Path, shape: Shape = QWEN25VL, rounds: int = ROUNDS) -> dict[str, Any]:
    """First token and tokens/s at the same budgets; ours from every bundle there is, and on OpenVINO's own kernels."""
    with TemporaryDirectory(dir=work) as bundles:
        try:
            python = environments.environment("openvino", work, runtime=True)
            # OpenVINO cannot take a Loop (runtime/backends/providers.py), so the selection is a graph of its own here,
            # with one.
            subjects = {
                name: prepare(shape, work, Path(bundles), "--body", "unrolled", *options)
                for name, options in BUNDLES.items()
            }
            commands = _commands(shape, subjects, python, Path(bundles))
        except UnavailableError as error:
            return {"skipped": f"OpenVINO GenAI is not compared: {error}"}
        lost = {name: _lost(subject) for name, subject in subjects.items()}
        replies = processes_take_turns(commands, rounds)
    engines = {name: figures(reply) for name, reply in replies.items()}
    return {
        "words": shape.words,
        "num_tokens": shape.num_tokens,
        "engines": engines,
        "lost": lost,
        "versions": versions_of(replies),
    }


def draw(result: Mapping[str, Any]) -> None:
    """The plot of what `run` measured, or of the same as JSON."""
    if "skipped" in result:
        return
    engines = result["engines"]
    budgets = by_budget(next(cases for cases in engines.values() if "fault" not in cases))
    stacked(
        {f"K {case}": _bars(engines, case) for case in budgets},
        ("pixels", "prepare", "encode", "prompt", "select", "prefill"),
        RESULTS / "openvino.png",
        "milliseconds to the first token; OpenVINO GenAI's prepare is tokenizing, encoding and pruning",
    )


def _lost(subject: Subject) -> dict[str, Any]:
    """By output, what the export found it to differ by from PyTorch: `max_diff`, and `scale`, its largest magnitude."""
    manifest = read_bundle(subject.bundle, check_hashes=False).manifest
    compared = {"vision_select": "image_features", "decoder_model_merged": "logits"}
    return {
        output: manifest.parity["outputs"][Path(manifest.graphs[graph].file).stem][output]
        for graph, output in compared.items()
    }


def _commands(
    shape: Shape, subjects: Mapping[str, Subject], python: Path, bundles: Path
) -> dict[str, list[str]]:
    plain = subjects["fp32"]
    model = environments.openvino_model(python, plain.checkpoint, bundles / "openvino")
    # Whole percents are all it takes, and it rounds the count; the prompt's length in the table says to what.
    ratios = {str(k): round(100 * (1 - k / shape.num_tokens)) for k in shape.budgets} | {UNPRUNED: 0}
    commands = {f"resprune, {name}": ours(subject) for name, subject in subjects.items()}
    commands["resprune, fp32, on OpenVINO's provider"] = ours(
        plain, python=str(python), providers=["openvino", "cpu"]
    )
    for precision in ("f32", "bf16") if bfloat16_in_hardware() else ("f32",):
        commands[f"OpenVINO GenAI, {precision}"] = worker(
            "peer_openvino", plain, python=str(python), model=str(model), precision=precision, ratios=ratios
        )
    return commands


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    if "skipped" in result:
        return str(result["skipped"])
    engines = result["engines"]
    theirs = [name for name in engines if name.startswith("OpenVINO")]
    head = " | ".join(f"of {name}" for name in theirs)
    rows = [
        f"**{result['words']}**, N {result['num_tokens']}.",
        "",
        "![Milliseconds to the first token, by stage](results/openvino.png)",
        "",
        f"| | K | prompt | its pruner | of the first token | prefill | first token | {head} | tokens/s | resident |",
        "|---|---|---|---|---|---|---|" + "---|" * len(theirs) + "---|---|",
    ]
    for name, cases in engines.items():
        if "fault" in cases:
            rows.append(f"| {name} | – | {cases['fault']} |" + " |" * (6 + len(theirs)))
            continue
        for case in by_budget(cases):
            found = cases[case]
            pruner = _pruner(cases, case)
            first = found["first token, samples"]
            against = " | ".join(
                str(ratio(first, engines[other][case]["first token, samples"]))
                if "fault" not in engines[other] and other != name
                else "–"
                for other in theirs
            )
            rows.append(
                f"| {name} | {case} | {found['prompt tokens']} | {pruner.median:,.3g} ms "
                f"| {pruner.median / found['first token'].median:.1%} | {found['stages']['prefill'].median:,.0f} ms "
                f"| {found['first token']} ms | {against} | {found['tokens per second'].median:.3g} "
                f"| {found['resident megabytes']:,.0f} MiB |"
            )
    note = (
        "OpenVINO GenAI's pruner is what its preparation takes more than unpruned, turn by turn: where the machine's "
        "noise is larger than that, the figure is noise."
    )
    losses = [
        f"{name}: {output} by {found['max_diff']:.3g} of {found['scale']:.3g}"
        for name, outputs in result["lost"].items()
        for output, found in outputs.items()
    ]
    lost = f"The largest difference from PyTorch in fp32, of the largest magnitude: {'; '.join(losses)}."
    return "\n".join([*rows, "", note, "", lost, "", versions_said(result["versions"])])


def _pruner(cases: Mapping[str, Any], case: str) -> Timing:
    """Milliseconds of the selection; of OpenVINO GenAI, what preparing takes more than unpruned."""
    stages = cases[case]["stages"]
    if "select" in stages:
        own: Timing = stages["select"]
        return own
    prepare_all = cases[UNPRUNED]["prepare, samples"]
    return timing([a - b for a, b in zip(cases[case]["prepare, samples"], prepare_all, strict=True)])


def _bars(engines: Mapping[str, Any], case: str) -> dict[str, dict[str, float]]:
    return {
        name: {stage: median(value) for stage, value in cases[case]["stages"].items()}
        for name, cases in engines.items()
        if "fault" not in cases
    }


def versions_of(replies: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What each subject ran on."""
    return {name: reply.get("versions", {}) for name, reply in replies.items()}


def versions_said(versions: Mapping[str, Mapping[str, str]]) -> str:
    """The same as a sentence."""
    parts = [
        f"{engine}: " + ", ".join(f"{name} {number}" for name, number in found.items())
        for engine, found in versions.items()
        if found
    ]
    return "; ".join(parts) + "."
