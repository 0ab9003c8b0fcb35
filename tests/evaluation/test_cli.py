"""`resprune eval`: what it prints and writes, and one sentence for what the user can put right."""

import json

import pytest
import torch

from resprune.runtime.cli import main


def fails(capsys, *words):
    assert main(["eval", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("resprune: ")
    assert err.count("\n") == 1
    return err


def few(questions, selectors):
    return ["--data", str(questions), "-k", "4,all", "--selectors", selectors, "--max-new-tokens", "6"]


def test_a_report_of_a_bundle_and_of_its_checkpoint(bundle, tiny_checkpoint, questions, tmp_path, capsys):
    words = few(questions, "resprune,divprune")
    printed = []
    for name, model in (("bundle", bundle), ("checkpoint", tiny_checkpoint("clip-llama"))):
        assert main(["eval", str(model), *words, "--out", str(tmp_path / name)]) == 0
        printed.append(capsys.readouterr().out)
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            *("answers-mine.jsonl", "report.json", "REPORT.md", "accuracy.png")
        }
    assert printed[0] == printed[1]
    assert "| all | all tokens |" in printed[0]
    ran = {}
    for name in ("bundle", "checkpoint"):
        settings = json.loads((tmp_path / name / "report.json").read_text())["settings"]
        ran[name] = settings["device"], settings["threads"], settings["versions"].keys()
    assert ran["bundle"] == ("cpu", 0, {"resprune", "numpy", "onnxruntime"})
    assert ran["checkpoint"] == (
        "cpu",
        torch.get_num_threads(),
        {"resprune", "numpy", "torch", "transformers"},
    )
    assert settings["name"] == "clip-llama"
    assert settings["positions"] == "contiguous"
    assert settings["attention"] == "plain"


def test_a_report_of_proportional_attention(tiny_bundle, tiny_checkpoint, questions, tmp_path, capsys):
    bundle = tiny_bundle("clip-llama", k=7, split=True, attention="proportional")
    capsys.readouterr()  # what the export has said
    words = few(questions, "resprune,stride")
    printed = []
    for attention in ("proportional", "plain"):
        for name, model in (("bundle", bundle), ("checkpoint", tiny_checkpoint("clip-llama"))):
            out = tmp_path / attention / name
            rest = [*words, "--attention", attention, "--out", str(out)]
            assert main(["eval", str(model), *rest]) == 0
            printed.append(capsys.readouterr().out)
            assert f"{attention} attention" in (out / "REPORT.md").read_text()
    assert printed[0] == printed[1]
    assert printed[2] == printed[3]
    rest = [*words, "--out", str(tmp_path / "plain" / "bundle")]
    assert "answers of another attention" in fails(capsys, bundle, *rest)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-k", "0"], "'0' is no number of tokens to keep"),
        (["-k", "4", "--selectors", "best"], "there is no selector best"),
        (["-k", "4", "--attention", "proportional"], "export it with --attention proportional"),
        (["-k", "4", "--limit", "0"], "--limit should be 1 or more"),
        (["-k", "4", "--max-new-tokens", "0"], "--max-new-tokens should be 1 or more"),
        (["-k", "4", "--selectors", "random", "--seed", "-1"], "--seed should be 0 or more, not -1"),
        (["-k", "4", "--device", "cuda"], "runs bundles on the CPU; leave out --device cuda"),
        (["-k", "4", "--threads", "-1"], "threads (0 for one per physical core) should be 0 to"),
        (["-k", "4", "--threads", "9" * 11], "not 99999999999"),
        (["-k", "17"], "more than the 16 visual tokens"),
        (["-k", ","], "-k names no budget"),
        (["-k", "4", "--selectors", ","], "--selectors names none"),
    ],
)
def test_wrong_words(bundle, questions, tmp_path, capsys, words, named):
    assert named in fails(capsys, bundle, "--data", questions, "--out", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_wrong_data_and_model(bundle, questions, tmp_path, capsys):
    rest = ["-k", "4", "--out", tmp_path / "out"]
    assert "coco is none of easyvqa, scenes, crowd" in fails(capsys, bundle, "--data", "coco", *rest)
    assert "--data names none" in fails(capsys, bundle, "--data", ",", *rest)
    assert "is not a directory" in fails(capsys, "nothing here", "--data", questions, *rest)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    assert "line 1" in fails(capsys, bundle, "--data", bad, *rest)


def test_packages_that_are_missing(bundle, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("resprune.evaluation.cli.NEEDED", ("no_such_package",))
    err = fails(capsys, bundle, "--data", questions, "-k", "4", "--out", tmp_path)
    assert 'pip install "resprune[eval]"' in err


def test_all_tokens_alone(bundle, questions, tmp_path, capsys):
    """A plot without a curve is one line."""
    words = ["--data", str(questions), "-k", "all", "--out", str(tmp_path), "--max-new-tokens", "2"]
    assert main(["eval", str(bundle), *words]) == 0
    assert (tmp_path / "accuracy.png").stat().st_size > 0
