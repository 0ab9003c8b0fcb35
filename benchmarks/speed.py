"""Time to the first token, and after it, at every budget, beside Hugging Face in PyTorch on the same weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measure import Timing, bfloat16_in_hardware, exported, processes_take_turns, timing
from benchmarks.plots import gains, stacked
from benchmarks.shapes import QUESTION, REAL, Shape, write_picture, write_shape
from resprune.graphs import choose_form, token_select_model
from resprune.method import Selection

ROUNDS = 3
STEPS = 8
SHARED = ("pixels", "encode", "prompt")
STAGES = (*SHARED, "select", "prefill")
OURS = "resprune, fp32"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Subject:
    """A shape on the disk: its checkpoint and its bundle, what it is asked about, and a selector for each budget."""

    checkpoint: Path
    bundle: Path
    picture: Path
    selectors: dict[int, Path]


def prepare(shape: Shape, work: Path, bundles: Path, *options: str) -> Subject:
    """Write the checkpoint into `work` if it is not there, and export it into `bundles` with `options`."""
    checkpoint = checkpoint_of(shape, work)
    picture = work / f"{shape.name}.png"
    write_picture(shape.picture, picture)
    bundle = bundles / "-".join([shape.name, *(option.lstrip("-") for option in options)])
    largest = str(shape.budgets[-1])
    exported(checkpoint, bundle, "-k", largest, "--split", "--verify", "layers", *options)
    selectors = {k: work / f"{shape.name}-select-{k}.onnx" for k in shape.budgets}
    for k, path in selectors.items():
        form = choose_form(k, shape.num_tokens, shape.text["hidden_size"])
        path.write_bytes(token_select_model(Selection(k=k, form=form)).SerializeToString())
    return Subject(checkpoint, bundle, picture, selectors)


def checkpoint_of(shape: Shape, work: Path) -> Path:
    """The checkpoint in `work`, written if it is not there."""
    checkpoint = work / shape.name
    if not checkpoint.exists():
        write_shape(shape, checkpoint)
    return checkpoint


def ours(subject: Subject, *, python: str = sys.executable, **more: Any) -> list[str]:
    """The command that times the runtime on `subject`."""
    spec = {
        "bundle": str(subject.bundle),
        "selectors": {k: str(path) for k, path in subject.selectors.items()},
    }
    return worker("stages", subject, python=python, **spec, **more)


def worker(name: str, subject: Subject, *, python: str = sys.executable, **spec: Any) -> list[str]:
    """The command of a worker; each process takes one sample, and the processes take turns."""
    asked = {"picture": str(subject.picture), "question": QUESTION, "repeats": 1, "steps": STEPS}
    return command(name, asked | spec, python=python)


def command(name: str, spec: Mapping[str, Any], *, python: str = sys.executable) -> list[str]:
    """The command of the worker `name`, which takes `spec` as JSON."""
    return [python, "-m", f"benchmarks.{name}", json.dumps(spec)]


def run(work: Path, shapes: Sequence[Shape] = REAL, rounds: int = ROUNDS) -> dict[str, Any]:
    """Every shape: the runtime at K = N/9, N/4.5, N/3 and all, PyTorch at N/9 and all."""
    return {shape.name: run_shape(shape, work, rounds) for shape in shapes}


def run_shape(shape: Shape, work: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """One shape, as in `run`; its bundle of several gigabytes is removed again."""
    with TemporaryDirectory(dir=work) as bundles:
        replies = _measure(shape, prepare(shape, work, Path(bundles)), rounds)
    versions = [reply["versions"] for reply in replies.values() if "versions" in reply]
    return {
        "words": shape.words,
        "num_tokens": shape.num_tokens,
        "engines": {name: figures(reply) for name, reply in replies.items()},
        "versions": {name: text for found in versions for name, text in found.items()},
    }


def draw(result: Mapping[str, Any]) -> None:
    """Both plots of what `run` measured, or of the same as JSON."""
    stacked(
        {shape["words"]: bars(shape["engines"]) for shape in result.values()},
        STAGES,
        RESULTS / "speed.png",
        "milliseconds to the first token",
    )
    panels = {
        shape["words"].split(":")[0]: curves(shape["engines"][OURS], shape["num_tokens"])
        for shape in result.values()
    }
    gains(panels, RESULTS.with_name("speed.png"))


def curves(cases: Mapping[str, Any], num_tokens: int) -> dict[str, dict[int, float]]:
    """Lines of the plot of gains, by tokens kept: the prefill's, what it would be at best, and the first token's."""
    kept = {num_tokens if case == "all" else int(case): found for case, found in cases.items()}
    whole = cases["all"]["first token, samples"]
    return {
        "prefill": {k: median(found["prefill gain"]) for k, found in kept.items()},
        "prefill, if proportional to its tokens": {k: found["ideal gain"] for k, found in kept.items()},
        "first token, image and all": {
            k: ratio(whole, found["first token, samples"]).median for k, found in kept.items()
        },
    }


def _measure(shape: Shape, subject: Subject, rounds: int) -> dict[str, dict[str, Any]]:
    variants = [("eager", "float32"), ("sdpa", "float32")]
    variants += [("sdpa", "bfloat16")] if bfloat16_in_hardware() else []
    commands = {OURS: ours(subject)}
    for attention, dtype in variants:
        commands[f"PyTorch, {attention}, {dtype}"] = worker(
            "hugging_face",
            subject,
            checkpoint=str(subject.checkpoint),
            bundle=str(subject.bundle),
            attention=attention,
            dtype=dtype,
            budgets=shape.budgets[:1],
        )
    return processes_take_turns(commands, rounds)


def figures(reply: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker sampled, by case: the stages, their sum turn by turn, tokens/s, and the gain of the prefill."""
    if "fault" in reply:
        return dict(reply)
    samples = reply["samples"]
    shared = samples.get("", {})
    cases: dict[str, Any] = {}
    for case, stages in samples.items():
        if not case:
            continue
        own = {name: values for name, values in (shared | stages).items() if name != "decode"}
        first = [sum(turn) for turn in zip(*own.values(), strict=True)]
        tokens, steps = reply["prompt tokens"], reply["steps"]
        cases[case] = {
            "prompt tokens": tokens[case],
            "stages": {name: timing(values) for name, values in own.items()},
            "first token": timing(first),
            "first token, samples": first,
            "tokens per second": timing([1e3 * steps / value for value in stages["decode"]]),
            "tokens per second, samples": [1e3 * steps / value for value in stages["decode"]],
            "resident megabytes": reply["memory"][case],
        }
        if "prepare" in own:
            cases[case]["prepare, samples"] = own["prepare"]
        if "cache bytes a token" in reply:
            cases[case]["cache bytes"] = reply["cache bytes a token"] * tokens[case]
        if "all" in samples:
            whole = samples["all"]["prefill"]
            gain = [a / b for a, b in zip(whole, stages["prefill"], strict=True)]
            cases[case]["prefill gain"] = timing(gain)
            cases[case]["ideal gain"] = ideal_gain(tokens["all"], tokens[case])
    return cases


def ideal_gain(unpruned: int, pruned: int) -> float:
    """How much sooner a prefill of `pruned` tokens ends if its time were proportional; text tokens are among them."""
    return unpruned / pruned


def ratio(one: Sequence[float], other: Sequence[float]) -> Timing:
    """`one` over `other`, turn by turn: a number, where `Timing` says milliseconds."""
    return timing([a / b for a, b in zip(one, other, strict=True)])


def bars(engines: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Rows of a plot: median milliseconds by stage."""
    return {
        f"{engine}, K {case}": {name: median(value) for name, value in cases[case]["stages"].items()}
        for engine, cases in engines.items()
        if "fault" not in cases
        for case in by_budget(cases)
    }


def median(value: Timing | Mapping[str, float]) -> float:
    """Of what was measured, or read from a file of results."""
    return value.median if isinstance(value, Timing) else value["median"]


def by_budget(cases: Mapping[str, Any]) -> list[str]:
    """All tokens first, then the budgets from the largest."""
    return sorted(cases, key=lambda case: -cases[case]["prompt tokens"])


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown: ours by stage, then ours beside PyTorch."""
    parts = ["![Milliseconds to the first token, by stage](results/speed.png)"]
    for shape in result.values():
        engines = shape["engines"]
        parts += [_stage_table(shape, engines[OURS]), _peer_table(engines)]
        parts.append(", ".join(f"{name} {number}" for name, number in shape["versions"].items()) + ".")
    return "\n\n".join(parts)


def _stage_table(shape: Mapping[str, Any], cases: Mapping[str, Any]) -> str:
    rows = [
        f"**{shape['words']}**, N {shape['num_tokens']}, fp32, {cases['all']['first token'].repeats} rounds.",
        "",
        "| K | prompt | pixels | encode | select | prefill | first token | gain of the prefill | of the ideal "
        "| tokens/s | KV cache | resident |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in by_budget(cases):
        found = cases[case]
        stages, gain, ideal = found["stages"], found["prefill gain"], found["ideal gain"]
        rows.append(
            f"| {case} | {found['prompt tokens']} | {stages['pixels'].median:.3g} ms "
            f"| {stages['encode'].median:,.0f} ms | {stages['select'].median:.3g} ms | {stages['prefill']} ms "
            f"| {found['first token']} ms | {gain.median:.2f} of {ideal:.2f} | {gain.median / ideal:.0%} "
            f"| {found['tokens per second'].median:.3g} | {found['cache bytes'] / 1e6:,.1f} MB "
            f"| {found['resident megabytes']:,.0f} MiB |"
        )
    return "\n".join(rows)


def _peer_table(engines: Mapping[str, Any]) -> str:
    rows = [
        "| | K | encode | select | prefill | first token | ours / theirs | tokens/s | ours / theirs | resident |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cases in engines.items():
        if "fault" in cases:
            rows.append(f"| {name} | – | {cases['fault']} |" + " |" * 7)
            continue
        for case in by_budget(cases) if name != OURS else []:
            found, own, stages = cases[case], engines[OURS][case], cases[case]["stages"]
            first = ratio(own["first token, samples"], found["first token, samples"])
            rate = ratio(own["tokens per second, samples"], found["tokens per second, samples"])
            rows.append(
                f"| {name} | {case} | {stages['encode'].median:,.0f} ms | {stages['select'].median:,.0f} ms "
                f"| {stages['prefill'].median:,.0f} ms | {found['first token']} ms | {first} "
                f"| {found['tokens per second'].median:.3g} | {rate} | {found['resident megabytes']:,.0f} MiB |"
            )
    return "\n".join(rows)
