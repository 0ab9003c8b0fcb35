"""A whole run: every selection asked once, each picture encoded once, resumed where it ended, and its report."""

import json

import numpy as np
import pytest
from PIL import Image

from resprune.evaluation import report
from resprune.evaluation.answers import Answers, Run
from resprune.evaluation.checkpoint import open_checkpoint
from resprune.evaluation.data import read_jsonl
from resprune.evaluation.evaluate import DRAWS, Plan, evaluate
from resprune.evaluation.model import open_bundle
from resprune.evaluation.plot import Line, Panel
from resprune.evaluation.plot import draw as plot
from resprune.runtime.budget import Budget
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline

BUDGETS = [Budget(3), Budget(share=0.5), Budget()]


def plan(questions, **options):
    fields = {
        "selectors": ("resprune", "random", "stride"),
        "budgets": BUDGETS,
        "batch": 4,
        "max_new_tokens": 6,
    }
    return Plan([read_jsonl(questions)], **(fields | options))


@pytest.fixture
def model(bundle):
    opened = open_bundle(bundle)
    yield opened
    opened.close()


def test_answers_are_the_pipelines(questions, bundle, model, tmp_path):
    asked = plan(questions, selectors=("resprune",))
    answers = Answers(tmp_path, asked.settings(model))
    evaluate(model, asked, answers)
    with Pipeline.load(bundle) as vlm:
        for k, tokens in (("3", 3), ("50%", 8), ("all", 16)):
            run = Run("mine", "" if k == "all" else "resprune", k, 0)
            for question in asked.data[0].questions:
                whole = vlm.ask(question.load(), question.text, tokens=tokens, max_new_tokens=6)
                assert answers.of(run, [question.number]) == [whole.text]


def test_a_picture_is_encoded_once_and_a_question_asked_once(questions, model, tmp_path, monkeypatch):
    looked, asked = [], []
    look, answer = model.look, model.answer
    monkeypatch.setattr(model, "look", lambda sources: looked.append(sources) or look(sources))
    monkeypatch.setattr(
        model,
        "answer",
        lambda some, *rest: asked.extend(one.prompt.text for one in some) or answer(some, *rest),
    )
    wanted = plan(questions)
    answers = Answers(tmp_path, wanted.settings(model))
    evaluate(model, wanted, answers)
    assert len(looked) == 3
    assert len(asked) == 9 * (2 * (2 + DRAWS) + 1)
    evaluate(model, wanted, answers)
    assert len(looked) == 3


def test_an_interrupted_run_goes_on(questions, model, tmp_path, monkeypatch):
    wanted = plan(questions)
    answer, calls, last = model.answer, [], [None]

    def counted(*arguments):
        if len(calls) == last[0]:
            raise KeyboardInterrupt
        calls.append(None)
        return answer(*arguments)

    monkeypatch.setattr(model, "answer", counted)
    whole = Answers(tmp_path / "whole", wanted.settings(model))
    evaluate(model, wanted, whole)
    total = len(calls)

    last[0] = total + 20
    cut = Answers(tmp_path / "cut", wanted.settings(model))
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, wanted, cut)
    cut.close()
    again = Answers(tmp_path / "cut", wanted.settings(model))
    last[0] = None
    evaluate(model, wanted, again)
    assert len(calls) == 2 * total
    assert report.score(wanted, again) == report.score(wanted, whole)


def test_answers_of_another_resprune_are_not_mixed(questions, model, tmp_path, monkeypatch):
    """Its selectors may be others."""
    wanted = plan(questions)
    evaluate(model, wanted, Answers(tmp_path, wanted.settings(model)))
    monkeypatch.setattr("resprune.evaluation.model.code", lambda: "edited")
    with pytest.raises(ResPruneError, match="answers of another resprune"):
        Answers(tmp_path, wanted.settings(model))


def test_the_report(questions, model, tmp_path):
    wanted = plan(questions, limit=6)
    answers = Answers(tmp_path, wanted.settings(model))
    evaluate(model, wanted, answers)
    sheets = report.score(wanted, answers)
    report.write(tmp_path, sheets, wanted, model)
    (data,) = json.loads((tmp_path / "report.json").read_text())["data"]
    assert data["types"] == {"color": 3, "count": 3}
    assert [(row["k"], row["selector"]) for row in data["scores"]] == [
        *(("3", name) for name in ("resprune", "random", "stride")),
        *(("50%", name) for name in ("resprune", "random", "stride")),
        ("all", ""),
    ]
    assert len(data["scores"][1]["draws"]) == DRAWS
    text = (tmp_path / "REPORT.md").read_text()
    assert text.count("\n| ") == 1 + 7
    assert Image.open(tmp_path / "accuracy.png").size[0] > 500


def test_panels_share_their_y_axis_and_one_budget_draws_bars():
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k)))
        for x in ([16.0], [8.0, 16.0]):
            lines = [
                Panel(
                    name, {"resprune": Line(x, [high] * len(x), [high - 2] * len(x), [high + 2] * len(x))}, 99
                )
                for name, high in (("easy", 95), ("hard", 40))
            ]
            assert plot(lines, "exact match, %").startswith(b"\x89PNG")
    bars, curves = drawn
    for figure in drawn:
        one, other = figure.axes
        assert one.get_ylim() == other.get_ylim()
    assert [len(axes.patches) for axes in bars.axes] == [1, 1]
    assert [len(axes.patches) for axes in curves.axes] == [0, 0]


@pytest.mark.parametrize(
    ("budgets", "num_tokens", "xlabel", "places"),
    [
        ([Budget(3), Budget(share=0.5), Budget()], 16, "K, visual tokens kept", [3, 8]),
        ([Budget(3), Budget(7), Budget()], None, "K, visual tokens kept", [3, 7]),
        ([Budget(share=0.11), Budget(share=0.5), Budget()], None, "% of the tokens", [11, 50]),
    ],
)
def test_where_budgets_stand_in_the_plot(budgets, num_tokens, xlabel, places, questions):
    wanted = plan(questions, selectors=("resprune",), budgets=budgets)
    answers = {run[1:]: ["red"] * 9 for run in wanted.runs(wanted.data[0])}
    (sheet,) = report.score(wanted, Fixed(answers))
    shown = report.panel(sheet, wanted, num_tokens)
    assert shown.xlabel == xlabel
    assert shown.lines["resprune"].x == pytest.approx(places)


def test_numbers_and_shares_do_not_mix_where_pictures_differ(questions, tiny_checkpoint, tmp_path):
    model = open_checkpoint(str(tiny_checkpoint("next-llama")))
    assert model.num_tokens is None
    wanted = plan(questions, budgets=[Budget(3), Budget(share=0.5)])
    with pytest.raises(ResPruneError, match="give -k either numbers or shares"):
        evaluate(model, wanted, Answers(tmp_path, wanted.settings(model)))


class Fixed:
    """Answers that are given, where a run would have made them."""

    def __init__(self, answers):
        self._answers = answers

    def of(self, run, numbers):
        return [self._answers[run.selector, run.k, run.seed][number - 1] for number in numbers]


def test_scores_by_hand(questions):
    """Right are red, two, yes, in that order for each of the three pictures."""
    right = ["red"] * 3 + ["two"] * 3 + ["yes"] * 3
    answers = {("", "all", 0): right, ("resprune", "4", 0): ["Red", "blue", *right[2:7], "no", "no"]}
    for draw in range(DRAWS):
        answers["random", "4", draw] = right[:draw] + ["none"] * (9 - draw)
    wanted = plan(questions, selectors=("resprune", "random"), budgets=[Budget(4), Budget()])
    (sheet,) = report.score(wanted, Fixed(answers))
    own, drawn, whole = sheet.scores
    assert whole.exact_match == 1
    assert own.exact_match == pytest.approx(6 / 9)
    assert own.types == {"color": pytest.approx(2 / 3), "count": 1}
    assert (own.unpruned[0].lost, own.unpruned[0].gained, own.unpruned[0].p) == (3, 0, 0.25)
    assert own.unpruned[0].agreement == pytest.approx(5 / 9)  # "Red" is right and yet not the same answer
    assert drawn.draws == pytest.approx([draw / 9 for draw in range(DRAWS)])
    assert drawn.exact_match == pytest.approx(2 / 9)
    assert len(drawn.unpruned) == len(drawn.first) == DRAWS
    assert own.first == []
    assert whole.unpruned == []


def test_random_is_seeded(questions):
    seeds = [run.seed for run in plan(questions, selectors=("random",), seed=7).runs(read_jsonl(questions))]
    assert seeds == [7, 8, 9, 10, 11] * 2 + [0]


def test_what_a_plan_refuses(questions):
    with pytest.raises(ResPruneError, match="there is no selector best; choose from resprune, no-text"):
        plan(questions, selectors=("best",))
    with pytest.raises(ResPruneError, match="two data sets are named mine"):
        Plan([read_jsonl(questions)] * 2, (), ())


@pytest.mark.parametrize("text", ["16", "11%", "all", "33.3%"])
def test_budgets_are_written_as_they_are_read(text):
    assert str(Budget.parse(f" {text} ")) == text


@pytest.mark.parametrize("text", ["0", "-1", "0%", "101%", "nan%", "x", "%", "", "1.5"])
def test_what_is_no_budget(text):
    with pytest.raises(ResPruneError, match="is no number of tokens to keep"):
        Budget.parse(text)


def test_budgets_of_a_picture():
    counts = np.array([[Budget(8).of(n), Budget(share=0.11).of(n), Budget().of(n)] for n in (4, 100)])
    np.testing.assert_array_equal(counts, [[4, 1, 4], [8, 11, 100]])


def test_a_log_says_how_far_a_run_has_come(questions, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("resprune.evaluation.progress.TENTH_SECONDS", 0.0)
    wanted = plan(questions, selectors=("stride",))
    evaluate(model, wanted, Answers(tmp_path, wanted.settings(model)))
    assert "mine: 27 of 27 answers in " in capsys.readouterr().err
