"""Every script of examples/ runs as its first lines say, on the demo bundle, and says what the demo model answers."""

import runpy
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "ask": "black\nkeywords: ",
    "batch": "demo/pictures/shapes.png: ",
    "chat": "> What color is the large square?\nblack\n",
    "keywords": "16 of 144 visual tokens: black\n",
    "openai_client": "black\n",
}


@pytest.fixture(scope="session")
def bundle(demo_bundle):
    """What `serve` serves here."""
    return demo_bundle


def arguments(script, bundle, url, directory):
    """Those of the command in the script's docstring, with the bundle and the server of the tests."""
    (line,) = [line for line in script.read_text().splitlines() if line.startswith("python examples/")]
    places = {
        "build/demo-k16": [str(bundle)],
        "http://127.0.0.1:8080": [url],
        "http://127.0.0.1:8080/v1": [f"{url}/v1"],
        "kept.png": [str(directory / "kept.png")],
        "demo/pictures/*.png": [
            f"demo/pictures/{path.name}" for path in (ROOT / "demo/pictures").glob("*.png")
        ],
    }
    return [filled for word in shlex.split(line)[2:] for filled in places.get(word, [word])]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(script, bundle, request, tmp_path, monkeypatch, capsys):
    url = request.getfixturevalue("serving").url if "OpenAI" in script.read_text() else ""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [str(script), *arguments(script, bundle, url, tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    assert SAYS[script.stem] in capsys.readouterr().out
    assert (tmp_path / "kept.png").exists() == ("kept.png" in script.read_text())


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_listed(script):
    assert len(script.read_text().splitlines()) <= 40
    assert f"(../examples/{script.name})" in (ROOT / "docs" / "python.md").read_text()


def test_a_mistake_is_one_line(bundle, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ask.py", str(bundle), "none.png", "What color is it?"])
    with pytest.raises(SystemExit, match=r"^error: .*none\.png"):
        runpy.run_path(str(ROOT / "examples" / "ask.py"), run_name="__main__")
