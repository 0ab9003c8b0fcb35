"""`resprune chat`: what it answers through a pipe, and how it behaves on a terminal."""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from resprune import Pipeline
from resprune.runtime.cli import main
from resprune.runtime.errors import printable
from tests.hostile.options import QUESTIONS, VALUES

QUESTION, SECOND = "what colour is the square?", "is there a cat?"
SHORT = ("--max-new-tokens", "6")


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> str:
    return str(tiny_bundle("clip-llama", k=7, split=True))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / "photo.png", folder / "Tom's photo.png"]
    for turns, path in enumerate(paths):
        Image.linear_gradient("L").rotate(90 * turns).resize((60, 50)).convert("RGB").save(path)
    return [str(path) for path in paths]


@pytest.fixture
def chat(
    bundle: str, photos: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, list[str]]]:
    """Lines → what a chat about the first photo prints, and its lines on stderr."""

    def run(*lines: str, raw: bytes | None = None, options: tuple[str, ...] = SHORT) -> tuple[str, list[str]]:
        content = "".join(f"{line}\n" for line in lines).encode() if raw is None else raw
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        assert main(["chat", bundle, photos[0], *options]) == 0
        out, err = capsys.readouterr()
        return out, err.splitlines()

    return run


def test_a_pipe_gets_the_answers_of_a_conversation(
    chat: Callable[..., tuple[str, list[str]]], bundle: str, photos: list[str]
) -> None:
    dialogue = Pipeline.load(bundle).look(photos[0]).chat()
    answers = [dialogue.ask(question, max_new_tokens=6).text for question in (QUESTION, SECOND)]
    assert chat(QUESTION, "", f"  {SECOND}  ") == ("".join(f"{answer}\n" for answer in answers), [])


def test_commands_change_what_the_next_question_gets(
    chat: Callable[..., tuple[str, list[str]]], bundle: str, photos: list[str]
) -> None:
    with Pipeline.load(bundle) as vlm:
        view, other = vlm.look(photos[0]), vlm.look(photos[1])
        expected = [
            view.ask(QUESTION, tokens=2, max_new_tokens=6).text,
            view.ask(QUESTION, tokens="all", max_new_tokens=6).text,
            view.ask(QUESTION, tokens="all", about=["cat"], max_new_tokens=6).text,
            other.ask(QUESTION, tokens="all", about=["cat"], max_new_tokens=6).text,
            other.ask(QUESTION, max_new_tokens=6).text,
        ]
    out, err = chat(
        *("/tokens 2", QUESTION, "/new", "/tokens all", QUESTION, "/new", "/about cat", QUESTION),
        *(f"/image {photos[1]}", QUESTION, "/new", "/tokens", "/about", QUESTION, "/quit", SECOND),
    )
    assert err == []
    assert out == "".join(f"{answer}\n" for answer in expected)
    assert len(set(expected)) > 1, "shows nothing"


def test_what_is_wrong_is_one_line_and_the_conversation_goes_on(
    chat: Callable[..., tuple[str, list[str]]], photos: list[str], tmp_path: Path
) -> None:
    plain, _ = chat(QUESTION, SECOND)
    kept, again = tmp_path / "kept.png", tmp_path / "again.png"
    out, err = chat(
        *("/fly", "/show early.png", "/image", "/image none.png", '/image "a', "/tokens 8", "/tokens x"),
        *(QUESTION, "/show", "/show kept.txt", f"/show {photos[0]}", f"/show {kept}", "what is <image>?"),
        *("square " * 600, f"/show {again}", "/new thing", "/tokens -1", SECOND),
    )
    assert out == plain
    sentences = (
        *(
            "/fly is no command",
            "no answer yet",
            "/image needs a path",
            "no file none.png",
            "cannot read its",
        ),
        *(
            "1 to 7, not 8",
            "'x' is no number of tokens",
            "/show needs a file",
            "ends as none of them",
            "would replace the image",
        ),
        *("contains <image>", "past the context", "/new takes nothing", "'-1' is no number of tokens"),
    )
    for line, sentence in zip(err, sentences, strict=True):
        assert line.startswith("resprune: ")
        assert sentence in line
    with Image.open(kept) as drawn:
        assert drawn.width >= 60
    assert again.read_bytes() == kept.read_bytes(), "a refused question is not the last answer's"


def test_whatever_a_line_says_the_conversation_goes_on(chat: Callable[..., tuple[str, list[str]]]) -> None:
    questions = [question for question in QUESTIONS if "\n" not in question]
    values = [value for value in VALUES if value not in ("1", "2", "1.5")]
    said = [
        f"{command} {value}" for command in ("/tokens", "/image", "/show", "/new", "/fly") for value in values
    ]
    lines = "\n".join([*questions, *said, "/tokens", "/new", QUESTION])
    plain, _ = chat(QUESTION)
    out, err = chat(raw=lines.encode("utf-8", "surrogatepass"))
    assert out.endswith(plain)
    assert len(err) >= len(said) - len(values)
    assert [line for line in err if not line.startswith("resprune: ") or printable(line) != line] == []
    assert max(map(len, err)) < 700


def test_a_chat_may_begin_without_an_image(
    bundle: str, photos: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = Pipeline.load(bundle)
    answers = [
        vlm.without_images().ask(QUESTION, max_new_tokens=6).text,
        vlm.look(photos[0]).ask(QUESTION, max_new_tokens=6, tokens=3).text,
    ]
    lines = (QUESTION, "/show kept.png", "/tokens 3", f"/image {photos[0]}", QUESTION)
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode()), encoding="utf-8")
    )
    assert main(["chat", bundle, *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert err == "resprune: there is no image whose tokens could be drawn; show one with /image\n"


def test_help_and_bytes_that_are_no_text(chat: Callable[..., tuple[str, list[str]]]) -> None:
    out, err = chat("/help")
    commands = set(re.findall(r"^/[a-z]+", out, flags=re.MULTILINE))
    assert commands == {"/image", "/new", "/tokens", "/about", "/show", "/help", "/quit"}
    assert err == []
    out, (sentence,) = chat(raw=b"caf\xe9?\n/quit\n")
    assert (out, "not valid UTF-8" in sentence) == ("", True)


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_output_is_no_traceback(bundle: str, photos: list[str], closed: str) -> None:
    words = [
        "sh",
        "-c",
        f'exec "$@" {closed}',
        "sh",
        sys.executable,
        "-m",
        "resprune",
        "chat",
        bundle,
        photos[0],
    ]
    done = subprocess.run(
        [*words, *SHORT], input=f"{QUESTION}\n", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert bool(done.stdout) == (closed == "2>&-")


def test_a_wrong_start_ends_it(bundle: str, photos: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["none.png"], "no file none.png"),
        ([photos[0], "--tokens", "8"], "1 to 7, not 8"),
        ([photos[0], "--tokens", "0"], "'0' is no number of tokens to keep"),
    ):
        assert main(["chat", bundle, *words]) == 2
        out, err = capsys.readouterr()
        assert (out, sentence in err, err.count("\n")) == ("", True, 1)


class Terminal:
    """A program on a terminal of its own, in which Ctrl-C is a key."""

    def __init__(self, command: list[str]) -> None:
        self.keyboard, slave = pty.openpty()

        def lead() -> None:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

        environment = os.environ | {"TERM": "dumb"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=lead, env=environment
        )
        os.close(slave)
        self.screen = ""

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """What the screen shows up to the end of `pattern`; the rest waits for the next call."""
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.screen, flags=re.DOTALL)) is None:
            assert time.monotonic() < end, f"no {pattern!r} in {self.screen!r}"
            if select.select([self.keyboard], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.keyboard, 4096).decode(errors="replace")
                except OSError:  # Linux says this way that the program has gone
                    pytest.fail(f"no {pattern!r} before the end: {self.screen!r}")
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until `pattern` is shown.

        Python's readline loses one that comes between the prompt, which it has shown, and its wait for a key.
        """
        for _ in range(11):
            self.press("\x03")
            with contextlib.suppress(AssertionError):
                self.wait_for(pattern, seconds=5)
                return
        self.wait_for(pattern, seconds=5)


@pytest.fixture
def terminal(bundle: str, photos: list[str]) -> Iterator[Terminal]:
    options = ["--max-new-tokens", "440", "--min-new-tokens", "440"]
    running = Terminal([sys.executable, "-m", "resprune", "chat", bundle, photos[0], *options])
    yield running
    running.process.kill()
    running.process.wait()
    os.close(running.keyboard)


def test_ctrl_c_stops_the_answer_and_ctrl_d_ends_it(terminal: Terminal) -> None:
    terminal.wait_for(r"7 of 16 visual tokens of .*Ctrl-D ends\)\s+> ")
    terminal.interrupt(r"\(/quit or Ctrl-D ends\)\s+> ")
    for _ in range(2):
        terminal.press(f"{QUESTION}\r")
        terminal.wait_for(r"square\?\r+\n.")
        terminal.press("\x03")
        terminal.wait_for(r"\(stopped\)\s+> ")
    terminal.press("/tokens 3\r")
    terminal.wait_for(r"\(3 of 16 visual tokens")
    terminal.press("\x1b[A")  # arrow up: the history
    terminal.wait_for(r"> .*/tokens 3")
    terminal.press("\r")
    terminal.wait_for(r"\(3 of 16 visual tokens.*> ")
    terminal.press("\x04")
    assert terminal.process.wait(60) == 0
