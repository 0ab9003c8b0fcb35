"""`resprune build`: arguments in, exit status out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from resprune.exporter.cli import POSIX
from resprune.exporter.tensorrt.limits import MOST_CONTEXT, QUESTION, ROOM, Limits
from resprune.runtime.bundle.manifest import FLAVOURS, Range
from resprune.runtime.errors import require_packages
from resprune.runtime.options import add_bundle

NEEDED = (
    "filelock",
    "onnx",
    "onnxscript",
    "tqdm",
)  # beside TensorRT and polygraphy, which depend on the flavour


def register_build(subparsers: Any) -> None:
    """Add the subcommand `build`."""
    about = "Build TensorRT engines of a bundle's graphs, into the bundle."
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "build", help="build TensorRT engines of a bundle", description=about
    )
    add_bundle(parser)
    parser.add_argument(
        "--target",
        type=lambda text: [target for target in text.split(",") if target],
        default=[],
        metavar="SM,...",
        help="compute capabilities to build for, as in sm_86,sm_89 (default: the GPU at hand)",
    )
    parser.add_argument(
        "--flavour", choices=FLAVOURS, help="which TensorRT (default: the one that is installed)"
    )
    limits = parser.add_argument_group(
        "limits", "what the engines take: one number, or the least, the usual and the most"
    )
    for option, about in (
        ("batch", f"images, and questions, at once (default: {_words(Limits.batch)})"),
        ("nouns", f"tokens of the question's nouns (default: {_words(Limits.nouns)})"),
        (
            "tokens",
            "visual tokens of an image before the selection, where that varies (default: half of the most)",
        ),
        ("prompt", f"tokens of a pruned prompt (default: 1, K + {QUESTION}, 2 K + {ROOM})"),
    ):
        limits.add_argument(f"--{option}", type=_range, metavar="MIN,OPT,MAX", help=about)
    limits.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of a prompt and its answer (default: the model's limit, but "
        f"{MOST_CONTEXT} at most or 4 K)",
    )
    parser.set_defaults(run=run_build)


def run_build(arguments: argparse.Namespace) -> int:
    """Build; returns 0. Raises `ResPruneError`."""
    require_packages("build", NEEDED, 'install with: pip install "resprune[tensorrt-rtx]"')
    require_packages("build", *POSIX)
    from resprune.exporter.tensorrt.engines import build

    options = ("batch", "nouns", "tokens", "prompt", "context")
    given = {name: value for name in options if (value := getattr(arguments, name)) is not None}
    build(Path(arguments.bundle), arguments.flavour, arguments.target, Limits(**given), report=_print_line)
    return 0


def _print_line(line: str) -> None:
    print(line, flush=True)


def _words(sizes: Range) -> str:
    return ",".join(map(str, sizes))


def _range(text: str) -> Range:
    try:
        sizes = [int(word) for word in text.split(",")]
    except ValueError:
        sizes = []
    least, usual, most = sizes * 3 if len(sizes) == 1 else sizes if len(sizes) == 3 else (0, 0, 0)
    if not 1 <= least <= usual <= most:
        raise argparse.ArgumentTypeError(
            f"{text} is neither a number from 1 nor three ascending ones, as in 1,1,4"
        )
    return least, usual, most
