"""`resprune export` on the command line: exit status and the one sentence."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from resprune.exporter.trace import writer as writer_module
from resprune.runtime.cli import main


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit status and standard error of the command line."""
    status = main(["export", *map(str, words)])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("k", "sentence"),
    [
        (0, "argument -k: '0' is no number of tokens to keep"),
        (-3, "argument -k: '-3' is no number of tokens to keep"),
        (17, "-k 17 is more than the 16 visual tokens"),
    ],
)
def test_k_out_of_range(k, sentence, tiny_checkpoint, tmp_path, capsys):
    status, told = run(capsys, tiny_checkpoint("clip-llama"), tmp_path / "out", "-k", k)
    assert status == 2
    assert told.startswith("resprune: ")
    assert sentence in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--alpha", "-1", "alpha should be a number from 0 to 3.40e+38, not -1.0"),
        ("--alpha", "nan", "alpha should be a number from 0 to 3.40e+38, not nan"),
        ("--alpha", "1e300", "alpha should be a number from 0 to 3.40e+38, not 1e+300"),
        ("--alpha", "abc", "invalid float value: 'abc'"),
        ("--max-pixels", "0", f"max_pixels should be 1 to {sys.maxsize}, not 0"),
        ("--max-pixels", "1.5", "invalid int value: '1.5'"),
        (
            "--early",
            "8",
            "early '8' is not LAYER:TOKENS; give numbers from 1, as in 8:288, or shares, as in 33%:50%",
        ),
        ("--dtype", "fp12", "'fp12' is no precision; dtype takes fp32, fp16, bf16, int8, q8, q4, q4f16"),
    ],
)
def test_a_value_that_is_none_names_the_option(option, value, says, tmp_path, capsys):
    status, told = run(capsys, "no such model", tmp_path / "out", "-k", 5, f"{option}={value}")
    assert (status, told) == (2, f"resprune: argument {option}: {says}; see resprune export --help\n")


def test_an_output_that_exists_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    status, told = run(capsys, "no such model", tmp_path / "out", "-k", 5)
    assert (status, told.count("\n")) == (2, 1)
    assert "exists; choose another name, or say --force" in told


def test_without_the_extra_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, told = run(capsys, "demo", tmp_path / "out", "-k", 5)
    assert status == 2
    assert 'pip install "resprune[export]"' in told


@pytest.mark.parametrize("words", [["export", "demo", "out", "-k", "5"], ["build", "bundle"]])
def test_where_python_has_no_posix_locks_it_says_so(words, tmp_path, capsys, monkeypatch):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "resprune.json").touch()
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fcntl" else find(name))
    assert main(words) == 2
    assert "needs fcntl; it is part of Python on Linux and macOS" in capsys.readouterr().err


def test_a_parity_miss_is_status_1_with_a_table_and_no_bundle(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """A weight that is written wrong: the projector's two biases change places."""
    write_weights = writer_module.write_weights
    first, second = (f"model.multi_modal_projector.linear_{layer}.bias" for layer in (1, 2))

    def wrong(traced: Any, path: Path, stored: dict[str, Any], progress: Any) -> Any:
        return write_weights(traced, path, stored | {first: stored[second], second: stored[first]}, progress)

    monkeypatch.setattr(writer_module, "write_weights", wrong)
    status, told = run(capsys, tiny_checkpoint("clip-llama"), tmp_path / "out", "-k", 16, "--alpha", 0)
    assert status == 1
    assert re.search(r"vision_select +image_features .*<-|picks +\d+ of 48 equal", told)
    assert list(tmp_path.iterdir()) == []
