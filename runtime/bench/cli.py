"""`resprune bench`: the options, the image, and the budgets that are compared."""

import argparse
import io
import json
import sys
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from resprune.runtime.defaults import BENCH_IMAGE, LEAST_REPEATS, REPEAT_SECONDS
from resprune.runtime.errors import ResPruneError, printable
from resprune.runtime.options import ImagePath, add_bundle, add_load_options, listed, load_options

if TYPE_CHECKING:
    from resprune.runtime.bench.measure import Timing
    from resprune.runtime.pipeline import Pipeline, View

LOADS, LOAD_SECONDS = 3, 3.0
"""How often a bundle is opened, unless that takes longer than these seconds."""


def register_bench(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `resprune bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure a bundle on this device",
        description="Time one question at several budgets on this device: stages, tokens/s, memory, load.",
    )
    add_bundle(parser)
    parser.add_argument(
        "-k", metavar="K,…", help="budgets: 16,11%%,all (default: a quarter of K, K, and all where it can)"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="about so many tokens of text (default: a short question)",
    )
    parser.add_argument(
        "--image",
        type=ImagePath,
        metavar="FILE",
        help="the image to ask about (default: a made one of {} × {})".format(*BENCH_IMAGE),
    )
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help=f"measurements of each budget (default: {LEAST_REPEATS} or more, for {REPEAT_SECONDS:g} seconds)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument(
        "--out", metavar="PLOT", help="also draw a plot: bench.png; needs resprune[eval] (default: none)"
    )
    add_load_options(parser)
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from resprune.runtime.bench.measure import measure, processor, question_of
    from resprune.runtime.bench.report import Report, check_plot, plot

    if arguments.repeats is not None and arguments.repeats < 1:
        raise ResPruneError(f"--repeats should be 1 or more, not {arguments.repeats}")
    out = None if arguments.out is None else Path(arguments.out)
    if out is not None:
        check_plot(out)
    pipeline, load = _load(arguments.bundle, load_options(arguments))
    with pipeline:
        image = arguments.image or made_image()
        budgets = chosen_budgets(pipeline.look(image), arguments.k)
        question = question_of(pipeline, image, arguments.prompt_tokens)
        try:
            cases = measure(pipeline, image, question, budgets, arguments.repeats, _say)
        finally:
            _say("")  # before an error's line as well
        manifest = pipeline.manifest
    backend = arguments.server or arguments.engines or ",".join(arguments.provider)
    if arguments.gguf is not None:
        backend += f"; {Path(arguments.gguf).name} in llama.cpp"
    report = Report(
        bundle=Path(arguments.bundle).resolve().name,
        family=manifest.family,
        device=processor(),
        threads=arguments.threads,
        backend=backend,
        image=arguments.image or "made, {} x {}".format(*BENCH_IMAGE),
        load=load,
        cases=cases,
    )
    text = json.dumps(report.values(), ensure_ascii=False) + "\n" if arguments.json else report.table()
    print(printable(text), end="")
    if out is not None:
        plot(report, out)
    return 0


def chosen_budgets(view: "View", text: str | None) -> list[int]:
    """The budgets that `-k` names, each once; `ResPruneError` for what the bundle cannot keep."""
    found: set[int] = set()
    if text is None:
        (usual,) = view.budgets()
        found |= {max(1, usual // 4), usual}
        with suppress(ResPruneError):
            found |= set(view.budgets("all"))
        return sorted(found)
    for word in listed(text):
        found |= set(view.budgets(word))
    if not found:
        raise ResPruneError("-k names no budget; give numbers, shares, or all")
    return sorted(found)


def made_image() -> bytes:
    """A JPEG of `BENCH_IMAGE` with large and small shapes, always the same."""
    from PIL import Image, ImageDraw

    image = Image.linear_gradient("L").resize(BENCH_IMAGE).convert("RGB")
    draw = ImageDraw.Draw(image)
    for number in range(40):
        left, top, side = 97 * number % 600, 61 * number % 440, 12 + 17 * number % 60
        colour = (53 * number % 256, 101 * number % 256, 211 * number % 256)
        (draw.ellipse if number % 2 else draw.rectangle)((left, top, left + side, top + side), fill=colour)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def _load(bundle: str, options: dict[str, Any]) -> "tuple[Pipeline, Timing]":
    """The bundle, opened, and how long that takes."""
    from resprune.runtime.bench.measure import timing
    from resprune.runtime.pipeline import Pipeline

    _say("opening")
    start = perf_counter()
    pipeline = Pipeline.load(bundle, **options)
    samples = [pipeline.load_ms]
    while len(samples) < LOADS and perf_counter() - start < LOAD_SECONDS:
        pipeline.close()
        pipeline = Pipeline.load(bundle, **options)
        samples.append(pipeline.load_ms)
    return pipeline, timing(samples)


def _say(text: str) -> None:
    """How far it has come, in one line of a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
