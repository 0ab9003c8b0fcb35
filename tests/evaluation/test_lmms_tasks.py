"""lmms-eval's own tasks, those of the paper, on made-up rows in their format: prompts, scores and files for a judge."""

import json
from pathlib import Path

import pytest
from PIL import Image

from resprune.runtime.cli import main

lmms_eval = pytest.importorskip("lmms_eval", reason="needs lmms-eval: make setup")
datasets = pytest.importorskip("datasets", reason="needs lmms-eval: make setup")

TASKS = Path(lmms_eval.__file__).parent / "tasks"
SPLITS = ("dev", "test", "testdev", "val", "validation")
# Without a task's instruction, which the demo model has not learned to follow.
OVERRIDE = """
include: {include}
task: {name}
dataset_path: {data}
dataset_name: null
dataset_kwargs:
  load_from_disk: true
process_docs: null
lmms_eval_specific_kwargs:
  default:
    format: default
    pre_prompt: ""
    post_prompt: ""
"""
COLOR, YES_NO = "What color is the large square?", "Is there a square?"
"""The demo model answers "black" and "yes"."""
WORDS = ("black", "red", "yes", "no")


def people(answer):
    """Ten answers to one question."""
    return {"answers": [answer] * 10}


CASES = {
    # file → rows, of which the model gets the first right and the second wrong; metric, its value
    "gqa/gqa.yaml": ([{"answer": "black"}, {"answer": "blue"}], COLOR, "exact_match", 0.5),
    "pope/pope.yaml": ([{"answer": "yes"}, {"answer": "no"}], YES_NO, "pope_accuracy", 0.5),
    "vizwiz_vqa/vizwiz_vqa_val.yaml": ([people("black"), people("blue")], COLOR, "exact_match", 0.5),
    "textvqa/textvqa_val.yaml": ([people("black"), people("blue")], COLOR, "exact_match", 0.5),
    "mme/mme.yaml": (
        [{"answer": answer, "category": "existence", "question_id": "a pair"} for answer in ("Yes", "No")],
        YES_NO,
        "mme_perception_score",
        50,
    ),
}


@pytest.fixture
def run(demo_bundle, tmp_path, capsys):
    """Runs one of lmms-eval's task files on rows; what it found, and the answers."""

    def on(file, question, rows):
        name, picture = Path(file).stem, Image.open("demo/pictures/shapes.png")
        rows = [
            {"image": picture, "question": question, "question_id": n} | row for n, row in enumerate(rows)
        ]
        made = datasets.Dataset.from_list(rows)
        datasets.DatasetDict(dict.fromkeys(SPLITS, made)).save_to_disk(tmp_path / "data")
        task = tmp_path / "mine.yaml"
        task.write_text(OVERRIDE.format(include=TASKS / file, name=name, data=tmp_path / "data"))
        words = ["lmms", str(demo_bundle), "--tasks", str(task), "-k", "16", "--out", str(tmp_path / "out")]
        assert main(words) == 0, capsys.readouterr().err
        found = json.loads((tmp_path / "out" / "results.json").read_text())["k"]["16"]["results"][name]
        lines = (tmp_path / "out" / "k16" / f"samples-{name}.jsonl").read_text().splitlines()
        return found, [json.loads(line)["answer"] for line in lines]

    return on


@pytest.mark.parametrize("file", CASES)
def test_open_answers(file, run):
    rows, question, metric, wanted = CASES[file]
    found, _ = run(file, question, rows)
    assert found[f"{metric},none"] == pytest.approx(wanted)


def test_scienceqa_asks_for_a_letter(run):
    """The demo model says what it sees, which is none."""
    rows = [{"answer": number, "hint": "Look.", "choices": ["black", "red"]} for number in (0, 1)]
    found, answers = run("scienceqa/scienceqa_img.yaml", COLOR, rows)
    assert found["exact_match,none"] == 0
    assert answers[0] == answers[1]
    assert answers[0] in WORDS


def test_mmbench_finds_the_option_that_was_said(run, tmp_path):
    """Four rows that differ in the right option alone: one of them is what the model says to all."""
    options = dict(zip("ABCD", WORDS, strict=True))
    more = {"category": "x", "L2-category": "y", "hint": "nan", "source": "z", "split": "dev"}
    rows = [{"index": index, "answer": letter} | options | more for index, letter in enumerate(options)]
    found, answers = run("mmbench/mmbench_en_dev_static.yaml", COLOR, rows)
    assert set(answers) <= set(WORDS)
    assert found["gpt_eval_score,none"] == 25
    assert (tmp_path / "out" / "k16" / "submissions" / "mmbench_en_dev_results.xlsx").stat().st_size > 0


def test_vqav2_leaves_a_file_for_its_server(run, tmp_path):
    _, answers = run("vqav2/vqav2_test.yaml", COLOR, [{}, {}])
    assert answers == ["black", "black"]
    (file,) = (tmp_path / "out" / "k16" / "submissions").iterdir()
    assert [row["answer"] for row in json.loads(file.read_text())] == answers


def test_a_group_runs_all_of_its_tasks(demo_bundle, tmp_path, capsys, monkeypatch):
    """By its name, as the paper's tables name them; the rows come from where lmms-eval would download them."""
    picture = Image.open("demo/pictures/shapes.png")
    rows = [
        {"image": picture, "question": COLOR, "question_id": n} | people(answer)
        for n, answer in enumerate(("black", "blue"))
    ]
    made = datasets.DatasetDict(dict.fromkeys(SPLITS, datasets.Dataset.from_list(rows)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: made)
    words = ["lmms", str(demo_bundle), "--tasks", "textvqa", "-k", "16", "--out", str(tmp_path / "out")]
    assert main(words) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["k"]["16"]["results"]
    assert {"textvqa_val", "textvqa_test"} <= set(results)
    assert "| textvqa_val | 2 | exact_match |" in capsys.readouterr().out
    assert (tmp_path / "out" / "k16" / "samples-textvqa_val.jsonl").read_text().count("\n") == len(rows)
