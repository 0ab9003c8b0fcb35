"""`resprune chat`: a conversation about images, line by line, in a terminal or through a pipe."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from resprune.runtime.console import complain, noted_interrupts, own_interrupts
from resprune.runtime.errors import ResPruneError, one_line, printable
from resprune.runtime.options import (
    ImagePath,
    add_bundle,
    add_load_options,
    add_sampling_options,
    add_tokens,
    listed,
    load_pipeline,
    sampling_options,
)

if TYPE_CHECKING:
    from resprune.runtime.answer import Answer
    from resprune.runtime.pipeline import Pipeline
    from resprune.runtime.sampling import SamplingOptions

HELP = """\
/image PATH …  ask about another image, or several, in a new conversation
/new           begin a new conversation about the same images
/tokens K      keep K visual tokens of each image: 16, 11%, or all;
               alone: the bundle's K
/about WORDS   keywords that guide the selection: square,table;
               alone: the question's nouns
/show FILE     draw the tokens that the last answer was given: kept.png
/help          this list
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""


def register_chat(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `resprune chat`."""
    parser = subparsers.add_parser(
        "chat",
        help="talk about an image, line by line",
        description="A line is a question, and its answer streams. A line with / is a command.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_bundle(parser)
    parser.add_argument(
        "images",
        type=ImagePath,
        metavar="IMAGE",
        nargs="*",
        help="image file; several stand in one prompt (default: none, text alone)",
    )
    add_tokens(parser)
    parser.add_argument(
        "--about",
        default="",
        metavar="WORDS",
        help='keywords that guide the selection: "square" (default: the question\'s nouns)',
    )
    parser.add_argument(
        "--plain-text", action="store_true", help="take special tokens such as </s> in a question as text"
    )
    add_sampling_options(parser)
    add_load_options(parser)
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> int:

    with load_pipeline(arguments.bundle, arguments) as pipeline:
        conversation = Conversation(
            pipeline,
            arguments.max_pixels,
            plain_text=arguments.plain_text,
            sampling=sampling_options(arguments),
            talks=_is_terminal(),
        )
        conversation.set_images(arguments.images)
        conversation.set_tokens(arguments.tokens)
        conversation.set_about(arguments.about)
        conversation.note(f"{conversation.kept()}; /help lists the commands, Ctrl-D ends")
        with own_interrupts():
            _read_lines(conversation)
    return 0


class Conversation:
    """What the lines of one chat have set, and what has been said.

    `talks`: whether a person reads what it notes beside the answers; a pipe gets the answers alone.
    """

    def __init__(
        self,
        pipeline: "Pipeline",
        max_pixels: int,
        *,
        plain_text: bool,
        sampling: "SamplingOptions",
        talks: bool,
    ) -> None:
        self._pipeline = pipeline
        self._max_pixels = max_pixels
        self._plain_text = plain_text
        self._sampling = sampling
        self.talks = talks
        self._tokens: str | None = None
        self._about: list[str] = []
        self._question = ""
        self._answer: Answer | None = None
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/new": self._new,
            "/tokens": self._set_tokens,
            "/about": self._set_about,
            "/show": self._show,
            "/help": lambda _: print(HELP),
        }

    def take(self, line: str) -> bool:
        """Do what a line says; False for the one that ends the conversation. `ResPruneError` changes nothing."""
        name, _, rest = line.strip().partition(" ")
        if name == "/quit":
            return False
        if name.startswith("/"):
            if name not in self.commands:
                raise ResPruneError(f"{one_line(name)} is no command; /help lists them")
            self.commands[name](rest.strip())
        elif name:
            self._ask(line.strip())
        return True

    def note(self, text: str) -> None:
        """Tell a person something beside the answers."""
        if self.talks:
            print(f"({printable(text)})", flush=True)

    def kept(self) -> str:
        """How many tokens of which images the next answer is given."""
        budgets = zip(self._budgets(), self._view.num_tokens, self._sources, strict=True)
        kept = [f"{kept} of {all_} visual tokens of {source}" for kept, all_, source in budgets]
        return ", ".join(kept) or "no image; /image PATH shows one"

    def set_images(self, sources: Sequence[str]) -> None:
        """Encode images, of which there may be none, and begin anew; the budget stays if it fits these too."""
        view = self._pipeline.look(list(sources)) if sources else self._pipeline.without_images()
        view.budgets(self._tokens)
        self._view, self._sources = view, list(sources)
        self._begin()

    def set_tokens(self, text: str | None) -> None:
        """Keep so many tokens from now on; None for the bundle's K."""
        self._view.budgets(text)
        self._tokens = text

    def set_about(self, text: str) -> None:
        """Let these words guide the selection from now on; "" for the nouns of each question."""
        self._about = listed(text)

    def _budgets(self) -> list[int]:
        return self._view.budgets(self._tokens)

    def _begin(self) -> None:
        self._dialogue, self._answer = self._view.chat(), None

    def _ask(self, question: str) -> None:
        answer = self._dialogue.ask(
            question,
            about=self._about or None,
            tokens=self._tokens,
            plain_text=self._plain_text,
            **self._sampling,
        )
        self._question, self._answer = question, answer
        begun = False
        try:
            for piece in answer:
                begun = True
                print(printable(piece), end="", flush=True)
        except BaseException:
            answer.close()
            if begun:
                print(flush=True)
            raise
        print(flush=True)

    def _image(self, rest: str) -> None:
        self.set_images(_paths(rest))
        self.note(f"{self.kept()}; a new conversation")

    def _new(self, rest: str) -> None:
        if rest:
            raise ResPruneError("/new takes nothing after it; ask the question in the next line")
        self._begin()
        self.note("a new conversation")

    def _set_tokens(self, rest: str) -> None:
        self.set_tokens(rest or None)
        self.note(self.kept())

    def _set_about(self, rest: str) -> None:
        self.set_about(rest)
        self.note(f"guided by {', '.join(self._about)}" if self._about else "guided by the question's nouns")

    def _show(self, rest: str) -> None:
        from resprune.runtime.show import draw_answer, drawing_paths

        if self._answer is None:
            raise ResPruneError("there is no answer yet whose tokens could be drawn; ask something first")
        if not self._sources:
            raise ResPruneError("there is no image whose tokens could be drawn; show one with /image")
        if not rest:
            raise ResPruneError("/show needs a file to draw to, such as /show kept.png")
        paths = drawing_paths(rest, self._sources)
        draw_answer(self._pipeline, self._sources, self._question, self._answer, paths, self._max_pixels)
        self.note(f"drawn: {', '.join(map(str, paths))}")


def _read_lines(conversation: Conversation) -> None:
    """Take line after line to the end; what a user can put right is one line, and the conversation goes on."""
    if sys.stdin is None:  # closed
        return
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    if conversation.talks:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its history and editing
    while True:
        waiting = True
        with noted_interrupts() as interrupts:
            try:
                line = input("> ") if conversation.talks else _next_line(sys.stdin)
                waiting = False
                if not conversation.take(line):
                    return
            except EOFError:
                if conversation.talks:
                    print()
                return
            except ResPruneError as error:
                complain(error)
            except BaseException:
                # Of a compiled module that was at work the exception may be of another kind.
                if not interrupts or (waiting and not conversation.talks):
                    raise
                print(flush=True)
                conversation.note("/quit or Ctrl-D ends" if waiting else "stopped")


def _next_line(stream: TextIO) -> str:
    """A line of a pipe; `input` reads none where stdout or stderr is closed."""
    if not (line := stream.readline()):
        raise EOFError
    return line


def _paths(rest: str) -> list[str]:
    """The images that a line names: one path as it stands, or several words as a shell reads them."""
    if not rest:
        raise ResPruneError("/image needs a path, such as /image photo.jpg")
    with suppress(OSError, ValueError):  # too long for a path, a NUL
        if Path(rest).exists():
            return [rest]
    try:
        return shlex.split(rest)
    except ValueError as error:
        raise ResPruneError(
            f"/image cannot read its paths ({one_line(error)}); quote one that has spaces"
        ) from None


def _is_terminal() -> bool:
    streams = (sys.stdin, sys.stdout, sys.stderr)  # `input` needs all three
    return None not in streams and sys.stdin.isatty() and sys.stdout.isatty()
