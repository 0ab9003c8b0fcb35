"""Tokens per second of the decoder, beside onnxruntime-genai on the same weights."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import environments
from benchmarks.bursts import Engine, take_bursts
from benchmarks.environments import UnavailableError
from benchmarks.measure import exported, timing
from benchmarks.peers import versions_said
from benchmarks.shapes import LLAVA, QUESTION, Shape, write_language_model
from benchmarks.speed import checkpoint_of, command, ratio
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.prompt.prompter import Prompter

BUNDLES = {
    "fp32": {"fp32": [], "fp32, --optimize ort": ["--optimize", "ort"]},
    "int4": {"q4, --optimize ort": ["--dtype", "q4", "--optimize", "ort"]},
}
"""How ours are exported, by the precision of theirs that is the same: all of one precision are in memory together."""
PROCESSES = 5
PROMPTS = 2
"""Of each length in a process."""
BURSTS = 4
TOKENS = 8
"""In a burst."""


def run(work: Path, shape: Shape = LLAVA, processes: int = PROCESSES) -> dict[str, Any]:
    """Tokens/s after a prompt of N/9 visual tokens and of all."""
    engines: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    with TemporaryDirectory(dir=work) as folder:
        bundles = Path(folder)
        try:
            python = environments.environment("genai", work)
            checkpoint, language_model = checkpoint_of(shape, work), bundles / "language-model"
            write_language_model(checkpoint, language_model)
            models = {
                precision: environments.genai_model(python, language_model, bundles / precision, precision)
                for precision in BUNDLES
            }
        except UnavailableError as error:
            return {"skipped": f"onnxruntime-genai is not compared: {error}"}
        for precision, ours in BUNDLES.items():
            spec = {"model": str(models[precision]), "tokens": BURSTS * TOKENS}
            theirs = Engine(command("peer_genai", spec, python=str(python)))
            group = {f"onnxruntime-genai, {precision}": theirs}
            for name, options in ours.items():
                how = ("-k", str(shape.budgets[0]), "--verify", "layers", *options)
                bundle = exported(checkpoint, bundles / f"bundle-{len(group)}", *how)
                own = {"bundle": str(bundle), "question": QUESTION, "tokens": BURSTS * TOKENS}
                group[f"resprune, {name}"] = Engine(command("decoder", own))
            lengths = prompt_tokens(bundle, shape.budgets[0])
            take_bursts(
                [*group.values()], lengths, processes=processes, prompts=PROMPTS, bursts=BURSTS, tokens=TOKENS
            )
            engines |= {name: figures(engine, theirs) for name, engine in group.items()}
            versions |= {name: engine.versions for name, engine in group.items()}
    return {
        "words": shape.words,
        "processes": processes,
        "prompt tokens": lengths,
        "engines": engines,
        "versions": versions,
    }


def prompt_tokens(bundle: Path, k: int) -> dict[str, int]:
    """The length of the question's prompt by case: with k of the visual tokens, and with all."""
    opened = read_bundle(bundle, check_hashes=False)
    text = len(Prompter(opened).prompt(QUESTION, 1).ids) - 1
    return {str(k): text + k, "all": text + opened.manifest.selection.num_tokens}


def figures(engine: Engine, theirs: Engine) -> dict[str, Any]:
    """What an engine sampled, by case: tokens/s of prefill and decoding, and what part of `theirs` that is."""
    if engine.fault:
        return {"fault": engine.fault}
    cases: dict[str, Any] = {}
    for case, rates in engine.rates.items():
        cases[case] = {
            "tokens per second": timing(rates),
            "prefill": timing(engine.prefills[case]),
            "of each prompt": rates,
            "resident megabytes": engine.megabytes[case],
        }
        if engine is not theirs and not theirs.fault:
            cases[case]["of theirs"] = ratio(rates, theirs.rates[case])
            cases[case]["prefill, of theirs"] = ratio(engine.prefills[case], theirs.prefills[case])
    return cases


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    if "skipped" in result:
        return str(result["skipped"])
    rows = [
        f"The language model of **{result['words']}**; {BURSTS} bursts of {TOKENS} tokens after each of {PROMPTS} "
        f"prompts of each length in each of {result['processes']} processes; all of one precision are in memory "
        "together and take turns burst by burst. Medians (quartiles) over the prompts.",
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
                f"| {found['resident megabytes']:,.0f} MiB |"
            )
    return "\n".join([*rows, "", versions_said(result["versions"])])
