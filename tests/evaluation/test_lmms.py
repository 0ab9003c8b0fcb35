"""lmms-eval, with a local task over the demo's questions: its figures are those of `resprune eval`.

It runs where lmms-eval is installed (`pip install "resprune[lmms]"`); that brings some hundred packages, so `make test`
goes without.
"""

import json

import numpy as np
import pytest
from PIL import Image

from resprune.evaluation.answers import Answers
from resprune.evaluation.budget import Budget
from resprune.evaluation.data import load_data, read_jsonl
from resprune.evaluation.evaluate import Plan, evaluate
from resprune.evaluation.model import open_bundle
from resprune.evaluation.report import score

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install 'resprune[lmms]'")

QUESTIONS = 24
INSTRUCTION = "\\nAnswer the question using a single word or phrase."
TASK = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
task: demo_scenes
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""
UTILS = """
from PIL import Image


def doc_to_visual(doc):
    return [Image.open(doc["image"])]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the task, its pictures, and its questions as JSON Lines."""
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for question in load_data("scenes").spread(QUESTIONS):
        path = folder / f"{question.number}.png"
        Image.fromarray(np.asarray(question.load())).save(path)
        rows.append({"image": str(path), "question": question.text, "answer": question.answers[0]})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "demo_scenes.yaml").write_text(TASK.format(data=folder / "questions.jsonl"))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.mark.parametrize("k", ["8", "all"])
def test_lmms_eval_finds_the_same_exact_match(k, task, demo_bundle, tmp_path):
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    found = simple_evaluate(
        model="resprune",
        model_args=f"model={demo_bundle},k={k}",
        tasks=["demo_scenes"],
        batch_size=1,
        task_manager=TaskManager(include_path=str(task), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    model = open_bundle(demo_bundle)
    plan = Plan([read_jsonl(task / "questions.jsonl")], ("resprune",), [Budget.parse(k)])
    answers = Answers(tmp_path, plan.settings(model))
    evaluate(model, plan, answers)
    (sheet,) = score(plan, answers)
    (run,) = plan.runs(plan.data[0])
    said = [sample["filtered_resps"][0] for sample in found["samples"]["demo_scenes"]]
    assert said == answers.of(run, [question.number for question in plan.data[0].questions])
    assert found["results"]["demo_scenes"]["exact_match,none"] == pytest.approx(sheet.scores[0].exact_match)
    assert sheet.scores[0].exact_match > 0.5


def test_a_tasks_instruction_does_not_steer(demo_bundle):
    from resprune.evaluation.lmms import INSTRUCTION as PATTERN

    text = "What color is the large square?" + INSTRUCTION.encode().decode("unicode_escape")
    assert PATTERN.sub("", text) == "What color is the large square?"
    model = open_bundle(demo_bundle)
    steered = model.read(text, about=["square"]).prompt
    assert steered.nouns == ["square"]
