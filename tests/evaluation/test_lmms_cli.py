"""`resprune lmms`: figures equal to those of `resprune eval`, and one sentence for what the user can put right."""

import json
import re
import shutil
from dataclasses import asdict

import pytest

from resprune.runtime.bundle.files import describe_files
from resprune.runtime.cli import main

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make setup")
datasets = pytest.importorskip("datasets", reason="needs lmms-eval: make setup")

QUESTIONS = 24


def fails(capsys, *words):
    assert main(["lmms", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    sentence = err.splitlines()[-1]  # lmms-eval and datasets draw their bars above it
    assert sentence.startswith("resprune: ")
    return sentence


@pytest.mark.parametrize(("name", "k"), [("bundle", "8,all"), ("demo", "8")])
def test_its_figures_are_those_of_resprune_eval(name, k, request, tmp_path, capsys):
    """Of a bundle, and of a checkpoint by its alias, in PyTorch; with one budget after the other."""
    model = str(request.getfixturevalue("demo_bundle")) if name == "bundle" else name
    rest = ["-k", k, "--limit", str(QUESTIONS), "--out"]
    assert main(["lmms", model, "--tasks", "resprune_scenes", *rest, str(tmp_path / "lmms")]) == 0
    rows = re.findall(
        r"\| (\S+) \| resprune_scenes \| 24 \| exact_match \| (\S+) \|", capsys.readouterr().out
    )
    assert main(["eval", model, "--data", "scenes", *rest, str(tmp_path / "eval")]) == 0
    report = json.loads((tmp_path / "eval" / "report.json").read_text())
    wanted = {row["k"]: row["exact_match"] for row in report["data"][0]["scores"]}
    assert [k for k, _ in rows] == list(wanted) == k.split(",")
    assert min(wanted.values()) > 0.5
    found = json.loads((tmp_path / "lmms" / "results.json").read_text())
    for k, value in rows:
        assert found["k"][k]["results"]["resprune_scenes"]["exact_match,none"] == pytest.approx(wanted[k])
        assert float(value) == pytest.approx(wanted[k], abs=1e-4)
        said = asked(tmp_path / "eval", k)
        assert answers(tmp_path / "lmms" / f"k{k}", "resprune_scenes") == said
    for key in ("device", "threads"):
        assert found["settings"][key] == report["settings"][key]
    versions = found["settings"]["versions"]
    assert versions == report["settings"]["versions"] | {"lmms-eval": versions["lmms-eval"]}


def test_tasks_and_budgets_that_are_asked_one_by_one_fill_one_table(demo_bundle, tmp_path, capsys):
    """With the same model and settings; of others nothing is mixed in."""
    bundle = shutil.copytree(demo_bundle, tmp_path / "bundle")

    def ask(task, k="8"):
        words = ["--tasks", task, "-k", k, "--limit", "2", "--out", str(tmp_path)]
        assert main(["lmms", str(bundle), *words]) == 0
        row = r"\| (\S+) \| (resprune_\w+) \| 2 \| exact_match \| (\S+) \|"
        printed = re.findall(row, capsys.readouterr().out)
        shown = {}
        for k, found in json.loads((tmp_path / "results.json").read_text())["k"].items():
            assert found["configs"].keys() == found["n-samples"].keys() == found["results"].keys()
            for task, values in found["results"].items():
                shown[k, task] = f"{values['exact_match,none']:.4f}"
        assert {(k, task): value for k, task, value in printed} == shown
        return shown

    first = ask("resprune_easyvqa")
    both = ask("resprune_scenes")
    assert both.keys() == {("8", "resprune_easyvqa"), ("8", "resprune_scenes")}
    assert first.items() <= both.items()
    assert ask("resprune_scenes") == both
    three = ask("resprune_scenes", k="4")
    assert three.keys() == {*both, ("4", "resprune_scenes")}
    assert both.items() <= three.items()
    (tmp_path / "results.json").write_text("{")
    assert ask("resprune_easyvqa") == first
    manifest = json.loads((bundle / "resprune.json").read_text())
    (bundle / "chat_template.jinja").write_text((bundle / "chat_template.jinja").read_text() + "\n")
    manifest["files"] |= {"chat_template.jinja": asdict(describe_files(bundle)["chat_template.jinja"])}
    (bundle / "resprune.json").write_text(json.dumps(manifest))
    assert ask("resprune_crowd").keys() == {("8", "resprune_crowd")}, "the bundle is another one"


def answers(folder, task):
    return [
        json.loads(line)["answer"] for line in (folder / f"samples-{task}.jsonl").read_text().splitlines()
    ]


def asked(folder, k):
    """Answers of `resprune eval` in the order of the questions."""
    said = {}
    for line in (folder / "answers-scenes.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)
        if row["k"] == k:
            said |= {int(number): text for number, text in row["answers"].items()}
    return [said[number] for number in sorted(said)]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--tasks", "resprune_scenes,gqaa"], "there is no task gqaa; did you mean gqa or "),
        (["--tasks", ","], "--tasks names none"),
        (["--tasks", "mine.yaml"], "there is no file mine.yaml"),
        (["--tasks", "gqa", "-k", "0"], "'0' is no number of tokens to keep"),
        (["--tasks", "gqa", "--limit", "0"], "--limit should be 1 or more"),
        (["--tasks", "resprune_crowd", "--limit", "1", "-k", "4,145"], "more than the 144 visual tokens"),
    ],
)
def test_wrong_words(demo_bundle, tmp_path, capsys, words, named):
    assert named in fails(capsys, demo_bundle, "-k", "4", "--out", tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_none(tmp_path, capsys):
    words = ["--tasks", "resprune_scenes", "--limit", 1, "-k", 4, "--out", tmp_path / "out"]
    assert "is not a directory" in fails(capsys, "nothing here", *words)


def test_data_that_cannot_be_had(demo_bundle, tmp_path, capsys, monkeypatch):
    """Without a token lmms-eval's download fails five times before it says so."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    sentence = fails(capsys, demo_bundle, "--tasks", "gqa", "-k", 4, "--out", tmp_path / "out")
    assert "data cannot be loaded (" in sentence  # for want of a token, or offline if that is set
    assert "resprune_scenes needs no network" in sentence


def test_packages_that_are_missing(demo_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("resprune.evaluation.lmms_cli.NEEDED", ("no_such_package",))
    sentence = fails(capsys, demo_bundle, "--tasks", "gqa", "-k", 4, "--out", tmp_path / "out")
    assert "needs no_such_package" in sentence
    assert "--no-deps lmms-eval" in sentence


TASK = {
    "task": "mine",
    "dataset_kwargs": {"load_from_disk": True},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_visual": "image",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dataset_path": None}, "it has no dataset_path"),
        ({"test_split": None}, "it has no test_split"),
        ({"doc_to_text": None}, "it has no doc_to_text"),
        ({"doc_to_target": None}, "it has no doc_to_target"),
        ({"test_split": "dev"}, "KeyError: 'dev'"),
        ({"doc_to_text": "{{ question"}, "TemplateSyntaxError: "),
        ({"metric_list": [{"metric": "best"}]}, "KeyError: 'best'"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
        ({"output_type": "loglikelihood"}, "the output_type loglikelihood, and only generate_until"),
    ],
)
def test_a_file_that_is_no_whole_task(change, named, demo_bundle, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "tenacity.nap.time.sleep", lambda seconds: None
    )  # between five tries to load what is not there
    rows = datasets.Dataset.from_list([{"question": "Is there a circle?", "answer": "yes"}])
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "data")
    task = TASK | {"dataset_path": str(tmp_path / "data")} | change
    (tmp_path / "mine.yaml").write_text(json.dumps(task))  # YAML as well
    words = [demo_bundle, "--tasks", tmp_path / "mine.yaml", "-k", 4, "--out", tmp_path / "out"]
    assert main(["lmms", *map(str, words)]) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"resprune: {tmp_path / 'mine.yaml'} ")
    assert named in sentence


def test_a_package_that_one_task_needs(demo_bundle, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: !function utils.text\n")
    (tmp_path / "utils.py").write_text("import no_such_package\n")
    words = ["--tasks", tmp_path / "mine.yaml", "-k", 4, "--out", tmp_path / "out"]
    assert "needs the package no_such_package" in fails(capsys, demo_bundle, *words)
