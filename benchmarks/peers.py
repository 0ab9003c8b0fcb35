"""The runtime beside OpenVINO GenAI and its pruner, on the same weights and with weights of the same size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import environments
from benchmarks.environments import UnavailableError
from benchmarks.measure import Timing, processes_take_turns, timing
from benchmarks.plots import stacked
from benchmarks.shapes import LLAVA, QWEN25VL, Shape
from benchmarks.speed import (
    RESULTS,
    ROUNDS,
    Subject,
    by_budget,
    checkpoint_of,
    figures,
    median,
    ours,
    prepare,
    ratio,
    worker,
)
from resprune.runtime.bundle.files import read_bundle

SHAPES = (QWEN25VL, LLAVA)
BUNDLES = {
    "fp32": (),
    "int8": ("--dtype", "int8"),
    "preset cpu": ("--preset", "cpu"),
}
"""What ours is called, and the options of its export."""
PEERS = {
    "fp32 weights, bf16": ("fp32", "bf16"),
    "int8 weights, bf16": ("int8", "bf16"),
    "int4 weights, bf16": ("int4", "bf16"),
}
"""What theirs is called, the weights that optimum-intel writes, and the arithmetic; int4's tower stays in 8 bits."""
PRUNES = ("qwen2_5_vl",)
"""Of the families here, those that OpenVINO GenAI's pruner takes."""
UNPRUNED = "all"


def run(work: Path, shapes: Sequence[Shape] = SHAPES, rounds: int = ROUNDS) -> dict[str, Any]:
    """First token, tokens/s and files of every shape at the same budgets; a family that they do not prune, unpruned."""
    try:
        python = environments.environment("openvino", work)
    except UnavailableError as error:
        return {"skipped": f"OpenVINO GenAI is not compared: {error}"}
    return {shape.name: run_shape(shape, work, python, rounds) for shape in shapes}


def run_shape(shape: Shape, work: Path, python: Path, rounds: int) -> dict[str, Any]:
    """One shape; its bundles and models, of several gigabytes, are removed again."""
    with TemporaryDirectory(dir=work) as folder:
        subjects = {name: prepare(shape, work, Path(folder), *options) for name, options in BUNDLES.items()}
        places = {name: subject.bundle for name, subject in subjects.items()}
        commands = {_ours(name): ours(subject) for name, subject in subjects.items()}
        faults = {}
        for name, (weights, arithmetic) in PEERS.items():
            model = Path(folder) / f"openvino-{weights}"
            try:
                places[name] = environments.openvino_model(python, checkpoint_of(shape, work), model, weights)
            except UnavailableError as error:
                faults[_theirs(name)] = {"fault": str(error)}
                continue
            commands[_theirs(name)] = _peer(shape, subjects["fp32"], python, model, arithmetic)
        lost = {name: _lost(subject) for name, subject in subjects.items()}
        files = {name: _bytes(place) for name, place in places.items()}
        replies = processes_take_turns(commands, rounds)
    return {
        "words": shape.words,
        "num_tokens": shape.num_tokens,
        "engines": {name: figures(reply) for name, reply in replies.items()} | faults,
        "bytes": {_ours(name) if name in BUNDLES else _theirs(name): size for name, size in files.items()},
        "lost": lost,
        "versions": versions_of(replies),
    }


def _ours(name: str) -> str:
    return f"resprune, {name}"


def _theirs(name: str) -> str:
    return f"OpenVINO GenAI, {name}"


def _peer(shape: Shape, subject: Subject, python: Path, model: Path, arithmetic: str) -> list[str]:
    # Whole percents are all it takes, and it rounds the count; the prompt's length in the table says to what.
    ratios = {str(k): round(100 * (1 - k / shape.num_tokens)) for k in shape.budgets}
    kept = ratios if shape.family in PRUNES else {}
    spec = {"model": str(model), "precision": arithmetic, "ratios": kept | {UNPRUNED: 0}}
    return worker("peer_openvino", subject, python=str(python), **spec)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def draw(result: Mapping[str, Any]) -> None:
    """The plot of what `run` measured, or of the same as JSON."""
    if "skipped" in result:
        return
    panels = {}
    for shape in result.values():
        engines = shape["engines"]
        budgets = by_budget(next(cases for cases in engines.values() if "fault" not in cases))
        panels |= {f"{shape['words'].split(':')[0]}, K {case}": _bars(engines, case) for case in budgets}
    stacked(
        panels,
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


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown, shape by shape."""
    if "skipped" in result:
        return str(result["skipped"])
    plot = "![Milliseconds to the first token, by stage](results/openvino.png)"
    return "\n\n".join([plot, *(_shape_table(shape) for shape in result.values())])


def _shape_table(shape: Mapping[str, Any]) -> str:
    engines = shape["engines"]
    theirs = [_theirs(name) for name in PEERS]
    rows = [
        f"**{shape['words']}**, N {shape['num_tokens']}. Ratios are against OpenVINO GenAI in the same turn, with the "
        "weights that the column names; where it does not prune the family, against its prompt of all tokens.",
        "",
        "| | K | prompt | its pruner | prefill | first token | "
        + " | ".join(f"of {weights}" for weights, _ in PEERS.values())
        + " | tokens/s | of int4 | resident | files |",
        "|---|---|---|---|---|---|" + "---|" * len(theirs) + "---|---|---|---|",
    ]
    for name, cases in engines.items():
        if "fault" in cases:
            rows.append(f"| {name} | – | {cases['fault']} |" + " |" * (len(theirs) + 7))
            continue
        for case in by_budget(cases):
            found = cases[case]
            pruner = _pruner(cases, case)
            against = " | ".join(
                _against(found, engines[other], case, "first token, samples") if other != name else "–"
                for other in theirs
            )
            rate = _against(found, engines[theirs[-1]], case, "tokens per second, samples")
            rows.append(
                f"| {name} | {case} | {found['prompt tokens']} | {pruner.median:,.3g} ms "
                f"| {found['stages']['prefill'].median:,.0f} ms | {found['first token']} ms | {against} "
                f"| {found['tokens per second'].median:.3g} | {rate if name != theirs[-1] else '–'} "
                f"| {found['resident megabytes']:,.0f} MiB | {shape['bytes'][name] / 1e9:.2f} GB |"
            )
    note = (
        "OpenVINO GenAI's pruner is what its preparation takes more than unpruned, turn by turn: where the machine's "
        "noise is larger than that, the figure is noise."
    )
    losses = [
        f"{name}: {output} by {found['max_diff']:.3g} of {found['scale']:.3g}"
        for name, outputs in shape["lost"].items()
        for output, found in outputs.items()
    ]
    lost = f"The largest difference from PyTorch in fp32, of the largest magnitude: {'; '.join(losses)}."
    return "\n".join([*rows, "", note, "", lost, "", versions_said(shape["versions"])])


def _against(found: Mapping[str, Any], other: Mapping[str, Any], case: str, samples: str) -> str:
    """A ratio to another engine at the same K, or to all tokens if it has no other."""
    if "fault" in other:
        return "–"
    return str(ratio(found[samples], other.get(case, other[UNPRUNED])[samples]))


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
        if case in cases
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
