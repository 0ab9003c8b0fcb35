"""The commands and the Python of README and docs do what they say, on a copy of the demo in an empty directory."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.options import commands
from resprune.runtime.families.table import FAMILIES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
# The pages whose `sh` and `python` blocks run, in an order in which each finds what an earlier one made.
RUN = [
    README,
    *(ROOT / "docs" / f"{name}.md" for name in ("ask", "python", "chat", "bench", "tensorrt", "evaluate")),
]


ACTIVATE = ". .venv/bin/activate"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A working directory in which relative paths lead to the demo, and `.venv` to the environment of the tests."""
    work = tmp_path_factory.mktemp("readme")
    (work / "demo").symlink_to(ROOT / "demo")
    (work / ".venv").symlink_to(sys.prefix)
    return work


def run(command, directory):
    """In a newcomer's shell, which does not find the environment's commands before it is activated."""
    ours = Path(sys.executable).parent
    path = os.pathsep.join(one for one in os.environ["PATH"].split(os.pathsep) if Path(one) != ours)
    return subprocess.run(
        command, cwd=directory, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


def shell(command, directory, *arguments):
    """A command in the shell that has activated the environment."""
    return run(["bash", "-c", f"{ACTIVATE} && {command}", "bash", *arguments], directory)


def make_demo():
    """What `make demo`, the README's first command, runs once its environment is there."""
    settings = [f"BIN={Path(sys.executable).parent}", "--old-file=.venv/with-export"]
    done = run(["make", "--dry-run", "--directory", ROOT, *settings, "demo"], ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("make")]


def test_commands_then_python(directory):
    first = make_demo()
    assert first
    printed = [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert printed[0] == ACTIVATE, "the README activates the environment before it uses it"
    for command in first:
        done = run(["bash", "-c", command], directory)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    for page in RUN:
        commands = [line for block in blocks(page, "sh") for line in block.splitlines()]
        assert page == README or "#three-commands" in page.read_text(), f"{page.name}: whose bundle is it?"
        assert commands or blocks(page, "python"), f"{page.name} shows no command"
        for command in commands:
            done = shell(command, directory)
            assert done.returncode == 0, f"{page.name}: {command}: {done.stderr}"
        for program in blocks(page, "python"):
            done = shell('python -c "$1"', directory, program)
            assert done.returncode == 0, f"{page.name}: {done.stderr}"
            assert done.stdout.strip()


def test_the_comparison_on_a_gpu_is_a_command_that_polygraphy_takes(directory):
    """It needs a GPU to run; here polygraphy reads it, and writes the script that it would run."""
    text = (ROOT / "docs" / "tensorrt.md").read_text()
    (command,) = re.findall(r"^(POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run .*)$", text, flags=re.MULTILINE)
    done = shell(f"{command} --gen-script comparison.py", directory)
    assert done.returncode == 0, done.stderr
    script = (directory / "comparison.py").read_text()
    assert "TrtRunner" in script
    for path in re.findall(r"build/[\w./-]+", command):
        assert path in script
        assert "sm_86" not in path or (directory / path).exists(), "resprune build above makes it"


def test_the_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_targets_and_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links {link}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{page.name} links {link}"
    named = re.findall(r"`((?:demo|benchmarks|exporter|graphs|runtime|serving|tests)/[\w./-]+)`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= made


def test_the_families_are_those_of_the_table():
    """Each in one row, with its aliases, or the first and the last of many, and its positions."""
    _, table = README.read_text().split("| family | aliases for `export` | positions |\n|---|---|---|\n")
    lines = table.partition("\n\n")[0].splitlines()
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = []
    for names, aliases, positions in told:
        families = [row for row in FAMILIES.values() if row.title in names]
        found += families
        known = [f"`{alias}`" for row in families for alias in row.aliases]
        assert aliases in (", ".join(known), f"{known[0]} … {known[-1]}")
        assert {positions} == {", ".join(row.defaults.positions) for row in families}
    assert sorted(row.name for row in found) == sorted(FAMILIES)


def test_every_command_of_a_page_has_words_that_resprune_takes():
    """Also of those that need a checkpoint, a device or a server, which no test runs."""
    parsers, read = commands(), []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(\w+=\S+ )*(\S+/)?resprune \w+ ", line):
                    words = [
                        one for one in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", one)
                    ]
                    parsers[words[1]].parse_args(words[2:])
                    read.append(words[1])
    assert {"ask", "bench", "build", "chat", "eval", "export", "inspect", "prompt", "serve"} <= set(read)


def test_every_page_is_in_the_table_of_contents():
    contents = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in DOCS if page.name != "README.md" and f"({page.name})" not in contents] == []
