"""The model plugin, as lmms-eval finds and calls it; how its command behaves is in `test_lmms_cli.py`.

It runs where lmms-eval is installed (`make setup` does), which no extra can do: see pyproject.toml.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from resprune.runtime.budget import Budget
from resprune.runtime.errors import ResPruneError

pytest.importorskip("lmms_eval", reason="needs lmms-eval: make setup")

from lmms_eval.models import get_model

from resprune.evaluation.lmms import INSTRUCTION

ASKED = "\nAnswer the question using a single word or phrase."
QUESTION = "What color is the large square?"


def picture():
    return Image.open("demo/pictures/shapes.png")


def request(visuals, text=QUESTION, number=0, **options):
    """One about a document whose pictures are `visuals`."""
    return SimpleNamespace(args=(text, options, lambda document: visuals, number, "task", "test"))


@pytest.fixture(scope="module")
def plugin(demo_bundle):
    model = get_model("resprune")(model=str(demo_bundle), k="16")
    model.task_dict = {"task": {"test": [None]}}
    return model


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("postions=original", "there is no argument postions; choose from model, k, positions"),
        ("positions=orignal", "positions should be contiguous or original, not orignal"),
        ("attention=proportinal", "attention should be plain or proportional, not proportinal"),
        ("k=0", "'0' is no number of tokens to keep"),
    ],
)
def test_wrong_model_args(words, named, demo_bundle):
    with pytest.raises(ResPruneError, match=named):
        by_lmms_eval(f"model={demo_bundle},{words}")


def by_lmms_eval(model_args):
    """The model as lmms-eval's own command opens it, with all that it gives beside `--model_args`."""
    config = {"batch_size": 1, "max_batch_size": 8, "device": "cpu"}
    return get_model("resprune").create_from_arg_string(model_args, config)


def test_lmms_eval_opens_it_as_well(demo_bundle):
    model = by_lmms_eval(f"model={demo_bundle},k=11%,positions=original")
    assert model.budget == Budget(share=0.11)
    assert model._model.manifest.positions == "original"


def test_it_answers(plugin):
    assert plugin.generate_until([request([picture()])]) == ["black"]


def test_a_log_says_how_far_it_has_come(plugin, capsys, monkeypatch):
    monkeypatch.setattr("resprune.evaluation.progress.TENTH_SECONDS", 0.0)
    plugin.generate_until([request([picture()])] * 2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("lmms: 2 of 2 answers in ")


def test_an_answer_ends_where_the_task_says(plugin):
    assert plugin.generate_until([request([picture()], until=["a"])]) == ["bl"]
    assert plugin.generate_until([request([picture()], until="ck", max_new_tokens=8)]) == ["bla"]


def test_an_interrupted_run_goes_on(demo_bundle, tmp_path, monkeypatch):
    def made(k="16"):
        model = get_model("resprune")(model=str(demo_bundle), k=k, answers=str(tmp_path))
        model.task_dict = {"task": {"test": [None] * 3}}
        return model

    def three(last=QUESTION):
        return [request([picture()], text, number) for number, text in enumerate((QUESTION, QUESTION, last))]

    model, count = made(), 0
    answer = type(model)._answer

    def stopped(self, *arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return answer(self, *arguments)

    monkeypatch.setattr(type(model), "_answer", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(three())
    assert made().generate_until(three()) == ["black"] * 3
    assert count == 4, "one question was left"
    made("4").generate_until(three())
    assert count == 7, "another K is another answer"
    with pytest.raises(ResPruneError, match="holds answers of another data"):
        made().generate_until(three("Is there a circle?"))


def test_answers_of_another_attention_are_not_mixed(tiny_bundle, tmp_path):
    bundle = tiny_bundle("clip-llama", k=7, split=True, attention="proportional")
    for attention in (None, "proportional"):
        model = get_model("resprune")(model=str(bundle), k="4", attention=attention, answers=str(tmp_path))
        model.task_dict = {"task": {"test": [None]}}
        model.generate_until([request([picture()])])
    model = get_model("resprune")(model=str(bundle), k="4", attention="plain", answers=str(tmp_path))
    model.task_dict = {"task": {"test": [None]}}
    with pytest.raises(ResPruneError, match="holds answers of another attention"):
        model.generate_until([request([picture()])])


@pytest.mark.parametrize(
    ("visuals", "named"), [([], "has no image"), ([np.zeros(9)], "has more than images")]
)
def test_what_is_no_picture(plugin, visuals, named):
    with pytest.raises(ResPruneError, match=named):
        plugin.generate_until([request(visuals)])


def test_a_video_is_refused(plugin, tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"\0\0\0\x18ftypmp42")
    with pytest.raises(ResPruneError, match="video"):
        plugin.generate_until([request([str(path)])])


def test_kinds_of_tasks_that_are_not_offered(plugin):
    for kind in (plugin.loglikelihood, plugin.generate_until_multi_round):
        with pytest.raises(ResPruneError, match="not supported; choose"):
            kind([])


def test_a_tasks_instruction_does_not_steer(plugin, monkeypatch):
    assert INSTRUCTION.sub("", QUESTION + ASKED) == QUESTION
    read, asked = plugin._model.read, []
    monkeypatch.setattr(
        plugin._model, "read", lambda *words, **how: asked.append(read(*words, **how)) or asked[-1]
    )
    plugin.generate_until([request([picture()], QUESTION + ASKED)])
    (prompt,) = (one.prompt for one in asked)
    assert prompt.nouns == ["color", "square"] == read(QUESTION).prompt.nouns
    assert ASKED in prompt.text
