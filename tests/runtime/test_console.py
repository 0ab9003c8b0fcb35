"""The terminal is ours: libraries are quiet, a message is one line, Ctrl-C is no traceback."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resprune.runtime.console import bytes_text, complain
from resprune.runtime.errors import printable


def python(program: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)


def test_libraries_are_quiet_and_we_are_heard() -> None:
    done = python(
        "import os, sys, warnings\n"
        "from resprune.runtime.console import complain, quiet_libraries\n"
        "with quiet_libraries():\n"
        "    os.write(2, b'noise of C'); warnings.warn('noise of Python', stacklevel=1); complain('ours')\n"
        "os.write(2, b'after')\n"
    )
    assert (done.returncode, done.stderr) == (0, b"resprune: ours\nafter")


def test_a_closed_stderr_is_no_fault() -> None:
    program = (
        "from resprune.runtime.console import complain, quiet_libraries\n"
        "with quiet_libraries():\n    complain('x')\n"
    )
    words = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", program]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_message_is_one_line_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    complain("a\x1b[31m\nb\r\x07\u2028c\x9b2J é")
    assert capsys.readouterr().err == "resprune: a[31m b c2J é\n"
    assert printable("line\n\ttab\x7f") == "line\n\ttab"
    assert printable("red\u202egnp.\u202c \u2066x\u2069") == "redgnp. x"


CTRL_C_AT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["resprune", "ask", {bundle!r}, sys.executable, "why?"]
sys.meta_path.insert(0, Finder())
from resprune.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module", ["resprune.runtime.cli", "argparse", "resprune.runtime.pipeline", "numpy", "PIL", "tokenizers"]
)
def test_ctrl_c_while_modules_are_imported_is_no_traceback(
    module: str, tiny_bundle: Callable[..., Path]
) -> None:
    bundle = str(tiny_bundle("clip-llama", k=7, split=True))
    done = python(CTRL_C_AT.format(module=module, bundle=bundle))
    assert done.stderr == b""
    assert done.returncode in (130, -signal.SIGINT)


def test_an_import_that_turns_ctrl_c_into_its_own_fault_is_no_traceback() -> None:
    program = (
        "import os, signal\n"
        "from resprune.runtime import cli\n"
        "def load(words):\n"
        "    try:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n        raise ImportError('numpy failed') from None\n"
        "cli._dispatch = load\n"
        "raise SystemExit(cli.main(['ask']))\n"
    )
    done = python(program)
    assert (done.returncode, done.stderr) == (130, b"")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_250, "1.2 kB"),
        (9_876_543, "9.9 MB"),
        (819e6, "819 MB"),
        (14.1e9, "14.1 GB"),
    ],
)
def test_bytes_are_said_in_powers_of_a_thousand(count: float, text: str) -> None:
    assert bytes_text(count) == text
