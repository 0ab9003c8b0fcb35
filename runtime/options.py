"""The options that commands share: where the graphs of a bundle run, what writes the answers, and how."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from resprune.runtime.backends.formats import SERVER_FORMATS, VLLM
from resprune.runtime.budget import Budget
from resprune.runtime.bundle.files import require_bundle
from resprune.runtime.bundle.manifest import FLAVOURS
from resprune.runtime.console import progress_line
from resprune.runtime.defaults import DEADLINE_SECONDS, GPU_LAYERS, MAX_PIXELS, TIMEOUT_SECONDS
from resprune.runtime.errors import ResPruneError, one_line, shown
from resprune.runtime.sampling import Sampling

if TYPE_CHECKING:
    from resprune.runtime.backends.backend import BackendFactory
    from resprune.runtime.pipeline import Pipeline
    from resprune.runtime.sampling import SamplingOptions

BUNDLE_HELP = "directory that resprune export wrote"


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """Add the argument `bundle`, the path of one."""
    parser.add_argument("bundle", type=BundlePath, metavar="BUNDLE", help=BUNDLE_HELP)


class BundlePath(str):
    """The type of an argument that names a bundle."""


class ImagePath(str):
    """The type of an argument that names an image file."""


def require_paths(arguments: argparse.Namespace) -> None:
    """`ResPruneError` for a bundle or an image that is not there, before anything large is imported or read."""
    for value in vars(arguments).values():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, BundlePath):
                require_bundle(path)
            # Path.exists raises for a name that is too long.
            elif isinstance(path, ImagePath) and not os.path.exists(path):  # noqa: PTH110
                raise ResPruneError(f"there is no file {one_line(path)}; check the path of the image")


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """Add `--tokens`, as `Pipeline.ask` takes it."""
    parser.add_argument(
        "--tokens",
        type=tokens,
        metavar="K",
        help="visual tokens to keep of each image: 16, 11%%, all (default: the bundle's K)",
    )


def tokens(text: str) -> str:
    """How many tokens to keep, as it stands, if `Budget` takes it."""
    try:
        Budget.parse(text)
    except ResPruneError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_options` reads."""
    parser.add_argument(
        "--server",
        metavar="URL",
        help="let a language model there answer: http://host:8000 (default: the bundle's own)",
    )
    parser.add_argument(
        "--server-format", choices=SERVER_FORMATS, help=f"what kind of server it is (default: {VLLM})"
    )
    parser.add_argument(
        "--server-model", metavar="NAME", help="the model to ask (default: the only one it has)"
    )
    parser.add_argument(
        "--server-timeout",
        type=float,
        metavar="SECONDS",
        help=f"longest silence (default: {TIMEOUT_SECONDS:g})",
    )
    parser.add_argument(
        "--server-deadline",
        type=float,
        metavar="SECONDS",
        help=f"longest whole answer (default: {DEADLINE_SECONDS:g})",
    )
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        help="let llama.cpp answer with the language model in this file (default: the bundle's own)",
    )
    parser.add_argument(
        "--gpu-layers",
        type=int,
        metavar="N",
        help=f"layers of the GGUF file on the GPU, -1: all (default: {GPU_LAYERS})",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--provider",
        type=listed,
        default=["cpu"],
        metavar="NAMES",
        help="what ONNX Runtime runs on, best first: cuda,cpu (default: cpu)",
    )
    where.add_argument(
        "--engines",
        choices=FLAVOURS,
        help="answer from the engines that resprune build made with this TensorRT (default: none)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="of ONNX Runtime (default: OMP_NUM_THREADS, or one a physical core)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="largest image taken (default: %(default)s)",
    )
    hashes = parser.add_mutually_exclusive_group()
    hashes.add_argument("--skip-hashes", action="store_true", help="do not check the SHA-256 of the files")
    hashes.add_argument(
        "--check",
        action="store_true",
        help="check the SHA-256 of all files, unchanged ones too (default: of those that have changed)",
    )


def load_pipeline(bundle: str | Path, arguments: argparse.Namespace) -> "Pipeline":
    """Check a bundle and open it; on a terminal a line shows how far that is."""
    from resprune.runtime.pipeline import Pipeline

    with progress_line(f"opening {bundle}") as progress:
        return Pipeline.load(bundle, progress=progress, **load_options(arguments))


def load_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `Pipeline.load` takes by keyword."""
    return {
        "check_hashes": not arguments.skip_hashes,
        "check_again": arguments.check,
        "providers": arguments.provider,
        "threads": arguments.threads,
        "max_pixels": arguments.max_pixels,
        "generator": _backend(arguments),
        "engines": arguments.engines,
    }


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the settings of `Sampling`, which `sampling_options` reads; one left out is as the checkpoint says."""
    group = parser.add_argument_group(
        "how tokens are chosen",
        "What is left out is as the checkpoint's generation_config.json says;\nwhere that says nothing, as given here.",
    )
    for name, kind, value, text in (
        ("--max-new-tokens", int, "N", "longest answer"),
        ("--temperature", float, "T", "0 is greedy; above it tokens are drawn"),
        ("--top-k", int, "N", "draw from the N most likely; 0: from all"),
        ("--top-p", float, "P", "draw from the fewest that are together as likely as P"),
        ("--min-p", float, "P", "draw from what is at least P times as likely as the most likely"),
        ("--repetition-penalty", float, "X", "above 1: what was there before comes less often"),
        ("--no-repeat-ngram-size", int, "N", "no N tokens follow each other twice; 0: they may"),
        ("--min-new-tokens", int, "N", "shortest answer"),
        ("--suppress-tokens", _ids, "IDS", "token ids that never come: 5,17"),
        ("--begin-suppress-tokens", _ids, "IDS", "token ids that do not come first"),
        ("--forced-eos-token-id", _ids, "IDS", "the last token of an answer that reaches its longest"),
        ("--seed", int, "N", "repeat a draw"),
    ):
        default = getattr(Sampling, name.removeprefix("--").replace("-", "_"))
        said = {None: "a new one each time", (): "none"}.get(default) or f"{default:g}"
        group.add_argument(
            name, type=kind, default=argparse.SUPPRESS, metavar=value, help=f"{text} (default: {said})"
        )


def sampling_options(arguments: argparse.Namespace) -> "SamplingOptions":
    """What the command line says of `Sampling`."""
    from resprune.runtime.sampling import SamplingOptions

    given = {
        name: value for name, value in vars(arguments).items() if name in SamplingOptions.__annotations__
    }
    return cast(SamplingOptions, given)


def listed(text: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _ids(text: str) -> tuple[int, ...]:
    """Numbers between commas; none for an empty text."""
    try:
        return tuple(int(word) for word in listed(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no list of token ids such as 5,17") from None


def _backend(arguments: argparse.Namespace) -> "BackendFactory | None":
    """What the options ask to answer: a server, llama.cpp, or None for the bundle's own decoder."""
    from resprune.runtime.backends.llama_cpp import llamacpp
    from resprune.runtime.backends.servers import server

    named = {
        "api": "server_format",
        "model": "server_model",
        "timeout": "server_timeout",
        "deadline": "server_deadline",
    }
    given = {
        option: getattr(arguments, name)
        for option, name in named.items()
        if getattr(arguments, name) is not None
    }
    if arguments.server is not None and arguments.gguf is not None:
        raise ResPruneError("--server and --gguf both say who answers; leave one of them out")
    if arguments.server is not None:
        return server(arguments.server, **given)
    if given:
        option = "--" + named[next(iter(given))].replace("_", "-")
        raise ResPruneError(f"{option} is for --server; give its address as well, or leave the option out")
    if arguments.gguf is not None:
        return llamacpp(arguments.gguf, gpu_layers=arguments.gpu_layers or GPU_LAYERS)
    if arguments.gpu_layers is not None:
        raise ResPruneError("--gpu-layers is for --gguf; give its file as well, or leave the option out")
    return None
