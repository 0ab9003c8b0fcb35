"""The runtime beside OpenVINO GenAI and its pruner, and its decoder beside onnxruntime-genai, on the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import environments
from benchmarks.environments import UnavailableError
from benchmarks.measure import Timing, bfloat16_in_hardware, processes_take_turns, timing
from benchmarks.plots import stacked
from benchmarks.shapes import LLAVA, QUESTION, QWEN25VL, Shape, write_language_model
from benchmarks.speed import RESULTS, ROUNDS, Subject, by_budget, figures, ours, prepare, ratio, worker
from resprune.runtime.bundle import read_bundle
from resprune.runtime.prompt import Prompter

# What a bundle can be exported to, as far as this resprune has the option.
BUNDLES = {
    "fp32": [],
    "fp32, --optimize ort": ["--optimize", "ort"],
    "int8": ["--dtype", "int8"],
    "int8, --optimize ort": ["--dtype", "int8", "--optimize", "ort"],
    "q4": ["--dtype", "q4"],
    "q4, --optimize ort": ["--dtype", "q4", "--optimize", "ort"],
}
GENAI = {"fp32": ("fp32", "fp32, --optimize ort"), "int4": ("q4, --optimize ort",)}
"""Their precisions, and ours that are the same."""
DECODED = 32
"""Tokens a turn, where it is they that are compared."""
UNPRUNED = "all"


def run_openvino(work: Path, shape: Shape = QWEN25VL, rounds: int = ROUNDS) -> dict[str, Any]:
    """First token and tokens/s at the same budgets; ours from every bundle there is, and on OpenVINO's own kernels."""
    with TemporaryDirectory(dir=work) as bundles:
        try:
            commands = _openvino_commands(shape, work, Path(bundles))
        except UnavailableError as error:
            return {"skipped": f"OpenVINO GenAI is not compared: {error}"}
        replies = processes_take_turns(commands, rounds)
    engines = {name: figures(reply) for name, reply in replies.items()}
    stacked(
        {f"K {case}": _bars(engines, case) for case in (UNPRUNED, *map(str, reversed(shape.budgets)))},
        ("pixels", "prepare", "encode", "prompt", "select", "prefill"),
        RESULTS / "openvino.png",
        "milliseconds to the first token; OpenVINO GenAI's prepare is tokenizing, encoding and pruning",
    )
    return {"words": shape.words, "num_tokens": shape.num_tokens, "engines": engines, **_versions(replies)}


def _openvino_commands(shape: Shape, work: Path, bundles: Path) -> dict[str, list[str]]:
    python = environments.environment("openvino", work, runtime=True)
    # OpenVINO's provider cannot take a Loop (runtime/providers.py). The selection is a graph of its own here, with one.
    names = ("fp32", "fp32, --optimize ort", "int8", "int8, --optimize ort")
    subjects = _subjects(shape, work, bundles, names, "--body", "unrolled")
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


def table_openvino(result: dict[str, Any]) -> str:
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
                f"| {found['resident megabytes']:,.0f} MB |"
            )
    note = (
        "OpenVINO GenAI's pruner is what its preparation takes more than unpruned, turn by turn: where the machine's "
        "noise is larger than that, the figure is noise."
    )
    return "\n".join([*rows, "", note, "", _said(result)])


def run_genai(work: Path, shape: Shape = LLAVA, rounds: int = ROUNDS) -> dict[str, Any]:
    """Tokens/s after a prompt of N/9 visual tokens and of all, in the same precisions."""
    with TemporaryDirectory(dir=work) as bundles:
        try:
            commands = _genai_commands(shape, work, Path(bundles))
        except UnavailableError as error:
            return {"skipped": f"onnxruntime-genai is not compared: {error}"}
        replies = processes_take_turns(commands, rounds)
    engines = {name: figures(reply) for name, reply in replies.items()}
    cases = (str(shape.budgets[0]), UNPRUNED)
    return {"words": shape.words, "cases": cases, "engines": engines, **_versions(replies)}


def _genai_commands(shape: Shape, work: Path, bundles: Path) -> dict[str, list[str]]:
    python = environments.environment("genai", work)
    names = [name for own in GENAI.values() for name in own]
    k = shape.budgets[0]
    subjects = {
        name: replace(subject, selectors={k: subject.selectors[k]})
        for name, subject in _subjects(shape, work, bundles, names).items()
    }
    plain = subjects["fp32"]
    write_language_model(plain.checkpoint, bundles / "language-model")
    text = len(Prompter(read_bundle(plain.bundle, check_hashes=False)).prompt(QUESTION, 1).ids) - 1
    lengths = {str(k): text + k, UNPRUNED: text + shape.num_tokens}
    commands = {f"resprune, {name}": ours(subject, steps=DECODED) for name, subject in subjects.items()}
    for precision, own in GENAI.items():
        if own[0] in subjects:
            folder = bundles / f"genai-{precision}"
            model = environments.genai_model(python, bundles / "language-model", folder, precision)
            spec = {"model": str(model), "lengths": lengths, "steps": DECODED}
            commands[f"onnxruntime-genai, {precision}"] = worker(
                "peer_genai", plain, python=str(python), **spec
            )
    return commands


def table_genai(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    if "skipped" in result:
        return str(result["skipped"])
    engines = result["engines"]
    theirs = {name.rsplit(", ")[-1]: name for name in engines if name.startswith("onnxruntime-genai")}
    head = " | ".join(f"times that of genai {precision}" for precision in theirs)
    rows = [
        f"The language model of **{result['words']}**.",
        "",
        f"| | prompt | tokens/s | {head} | resident |",
        "|---|---|---|" + "---|" * len(theirs) + "---|",
    ]
    for name, cases in engines.items():
        if "fault" in cases:
            rows.append(f"| {name} | {cases['fault']} |" + " |" * (2 + len(theirs)))
            continue
        for case in result["cases"]:
            found = cases[case]
            rate = found["tokens per second, samples"]
            against = " | ".join(
                str(ratio(rate, engines[other][case]["tokens per second, samples"]))
                if "fault" not in engines[other] and other != name
                else "–"
                for other in theirs.values()
            )
            rows.append(
                f"| {name} | {found['prompt tokens']} | {found['tokens per second']} | {against} "
                f"| {found['resident megabytes']:,.0f} MB |"
            )
    return "\n".join([*rows, "", _said(result)])


def _subjects(
    shape: Shape, work: Path, bundles: Path, names: Iterable[str], *options: str
) -> dict[str, Subject]:
    """The bundles of `names` that this resprune can export; fp32 is always among them, or `UnavailableError`."""
    subjects = {"fp32": prepare(shape, work, bundles, *options)}
    for name in names:
        try:
            subjects[name] = prepare(shape, work, bundles, *options, *BUNDLES[name])
        except UnavailableError as error:
            print(f"{name} is left out: {error}", flush=True)
    return subjects


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
        name: {stage: value.median for stage, value in cases[case]["stages"].items()}
        for name, cases in engines.items()
        if "fault" not in cases
    }


def _versions(replies: Mapping[str, Any]) -> dict[str, Any]:
    return {"versions": {name: reply.get("versions", {}) for name, reply in replies.items()}}


def _said(result: Mapping[str, Any]) -> str:
    parts = [
        f"{engine}: " + ", ".join(f"{name} {number}" for name, number in versions.items())
        for engine, versions in result["versions"].items()
        if versions
    ]
    return "; ".join(parts) + "."
