"""The command `resprune`: finds its subcommands through entry points, and turns faults into one sentence."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from io import TextIOWrapper
from typing import NoReturn

from resprune.runtime.console import complain, noted_interrupts, quiet_libraries
from resprune.runtime.errors import ResPruneError, one_line, printable
from resprune.runtime.options import (
    ImagePath,
    add_bundle,
    add_load_options,
    add_sampling_options,
    add_tokens,
    listed,
    load_pipeline,
    require_paths,
    sampling_options,
)

COMMANDS = "resprune.commands"
# What a shell reports of a program ended by these signals: 128 + their number.
INTERRUPTED, BROKEN_PIPE = 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for what the user can put right, told in one sentence."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character gets "?" for it
    with noted_interrupts() as interrupts:
        try:
            return _run(words)
        except KeyboardInterrupt:
            return INTERRUPTED
        except BaseException:
            if interrupts:
                return INTERRUPTED
            raise


def _run(words: Sequence[str]) -> int:
    try:
        status = _dispatch(words)
        print(end="", flush=True)  # here, where a reader that has gone and a full disk are still caught
    except ResPruneError as error:
        complain(error)
        return 2
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except OSError as error:
        if _takes_output():
            raise
        _drop_stdout()
        complain(f"the output cannot be written ({error.strerror}); make room for it")
        return 2
    return status


def _takes_output() -> bool:
    """Whether stdout takes what is waiting for it."""
    try:
        print(end="", flush=True)
    except OSError:
        return False
    return True


def _drop_stdout() -> None:
    """The interpreter flushes stdout once more on its way out; that must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """A parser whose faults are one line, as all others are; its subcommands' parsers are of this class too."""

    def error(self, message: str) -> NoReturn:
        """Raise `ResPruneError` in place of printing the usage."""
        raise ResPruneError(f"{one_line(message)}; see {self.prog} --help")


def _dispatch(words: Sequence[str]) -> int:
    commands = {command.name: command for command in entry_points(group=COMMANDS)}
    parser = Parser(
        prog="resprune", description="Vision-language models with a fraction of their visual tokens."
    )
    parser.add_argument("--version", action="version", version=f"resprune {version('resprune')}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    named: list[EntryPoint] = [commands[words[0]]] if words and words[0] in commands else [*commands.values()]
    for command in named:
        command.load()(subparsers)
    arguments = parser.parse_args(words)
    require_paths(arguments)
    with quiet_libraries():
        status: int = arguments.run(arguments)
    return status


def register_ask(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `resprune ask`."""
    parser = subparsers.add_parser(
        "ask",
        help="ask a question about an image",
        description="Ask a question about an image, or about several.",
    )
    add_bundle(parser)
    parser.add_argument(
        "images", type=ImagePath, metavar="IMAGE", nargs="+", help="image file; several stand in one prompt"
    )
    parser.add_argument("question", metavar="QUESTION", help="what is asked, in one argument")
    add_tokens(parser)
    parser.add_argument(
        "--about",
        metavar="WORDS",
        help='keywords that guide the selection: "square,table" (default: the question\'s nouns)',
    )
    parser.add_argument(
        "--show",
        metavar="FILE",
        help="draw the image beside its kept tokens: kept.png; of several images the second is kept-2.png "
        "(default: none)",
    )
    parser.add_argument(
        "--plain-text", action="store_true", help="take special tokens such as </s> in the question as text"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the text")
    add_sampling_options(parser)
    add_load_options(parser)
    parser.set_defaults(run=_ask)


def register_inspect(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `resprune inspect`."""
    parser = subparsers.add_parser(
        "inspect", help="say what is in a bundle", description="Say what is in a bundle, and check its files."
    )
    add_bundle(parser)
    parser.add_argument(
        "--all", action="store_true", help="also inputs and outputs, every difference, every version"
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as one JSON object")
    parser.add_argument("--skip-hashes", action="store_true", help="do not check the SHA-256 of the files")
    parser.set_defaults(run=_inspect)


def _ask(arguments: argparse.Namespace) -> int:
    from resprune.runtime.show import draw_answer, drawing_paths

    paths = [] if arguments.show is None else drawing_paths(arguments.show, arguments.images)
    with load_pipeline(arguments.bundle, arguments) as pipeline:
        answer = pipeline.ask(
            arguments.images,
            arguments.question,
            about=None if arguments.about is None else listed(arguments.about),
            tokens=arguments.tokens,
            plain_text=arguments.plain_text,
            **sampling_options(arguments),
        )
        if arguments.json:
            report = answer.describe()
            report["timings"] = {"load_ms": pipeline.load_ms, **report["timings"]}
            print(printable(json.dumps(report, ensure_ascii=False)))
        else:
            for piece in answer:
                print(printable(piece), end="", flush=True)
            print()
        if paths:
            draw_answer(pipeline, arguments.images, arguments.question, answer, paths, arguments.max_pixels)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from resprune.runtime.bundle.files import read_bundle
    from resprune.runtime.bundle.inspection import describe, summary

    bundle = read_bundle(arguments.bundle, check_hashes=not arguments.skip_hashes)
    shown = describe if arguments.all else summary
    print(printable(bundle.manifest.to_json() if arguments.json else shown(bundle)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
