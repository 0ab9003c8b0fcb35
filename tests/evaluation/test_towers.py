"""Selectors that change what the vision tower does: a selection inside it, and a smaller image."""

import json

import numpy as np
import pytest

from resprune.evaluation.checkpoint import open_checkpoint
from resprune.evaluation.evaluate import Plan
from resprune.evaluation.model import open_bundle
from resprune.evaluation.towers import RESIZE, early_names, smaller_image
from resprune.runtime.budget import Budget
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from tests.runtime.images import blocks
from tests.runtime.pipelines import QUESTION

ASKED = "1:9"


@pytest.mark.parametrize(
    # The same as in the exporter's parity tests, so that a session exports them once.
    ("variant", "early", "k", "left"),
    [("clip-llama", ASKED, 7, 9), ("qwen3", "2:60%", 3, 10)],
)
def test_a_checkpoint_selects_inside_its_tower_as_a_bundle_does(
    variant, early, k, left, tiny_checkpoint, tiny_bundle
):
    bundle = open_bundle(tiny_bundle(variant, k=k, early=early, split=True))
    checkpoint = open_checkpoint(str(tiny_checkpoint(variant)))
    looked = bundle.look([blocks(3)]), checkpoint.look([blocks(3)], *early_names([early]))
    exported, selected = (one.tokens for (one,) in looked)
    assert exported.candidates.tolist() == selected.candidates.tolist()
    assert len(selected.candidates) == left
    np.testing.assert_allclose(exported.rows, selected.rows, atol=1e-4)
    for one, other in zip(exported.planes, selected.planes, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    picks = [
        model.select(one, model.read(QUESTION), k)
        for model, (one,) in zip((bundle, checkpoint), looked, strict=True)
    ]
    assert picks[0].tolist() == picks[1].tolist()


def test_what_a_tower_cannot_do_is_refused(tiny_checkpoint, tiny_bundle):
    bundle = open_bundle(tiny_bundle("clip-llama", k=7, early=ASKED, split=True))
    checkpoint = open_checkpoint(str(tiny_checkpoint("clip-llama")))
    with pytest.raises(ResPruneError, match="needs the vision tower itself"):
        bundle.look([blocks(3)], *early_names(["1:8"]))
    with pytest.raises(ResPruneError, match="needs the vision tower itself"):
        bundle.look([blocks(3)], RESIZE, 4)
    for selector in (RESIZE, *early_names(["1:8"])):
        with pytest.raises(ResPruneError, match="needs the vision tower itself"):
            bundle.check([Budget(4)], own=False, selectors=["random", selector])
        checkpoint.check([Budget(4)], own=False, selectors=["random", selector])
    with pytest.raises(ResPruneError, match="give 1 to 1"):
        checkpoint.look([blocks(3)], *early_names(["7:9"]))


@pytest.mark.parametrize(("variant", "k", "tokens"), [("clip-llama", 9, 9), ("dinov2-qwen2", 10, 9)])
def test_a_smaller_image_of_a_tower_of_one_size(variant, k, tokens, tiny_checkpoint):
    model = open_checkpoint(str(tiny_checkpoint(variant)))
    (small,) = model.look([blocks(3)], RESIZE, k)
    assert len(small.tokens.rows) == small.image.num_tokens == tokens
    assert model.answer([model.read(QUESTION)], [[small]], [[np.arange(tokens)]], 3)


def test_a_smaller_image_where_tokens_go_by_its_area(tiny_checkpoint):
    model = open_checkpoint(str(tiny_checkpoint("qwen25")))
    shown = blocks(3, (320, 240))
    (whole,), (small,) = model.look([shown]), model.look([shown], RESIZE, 20)
    assert 14 <= small.image.num_tokens <= 26 < 40 < whole.image.num_tokens
    assert smaller_image(shown, lambda _: 100, 400).size == shown.size, "never larger"


def test_a_report_has_them_as_selectors(tiny_checkpoint, tmp_path):
    blocks(3).save(tmp_path / "shown.png")
    question = {"image": "shown.png", "question": QUESTION, "answer": "red"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(question) + "\n")
    arguments = [
        "eval",
        str(tiny_checkpoint("clip-llama")),
        "--data",
        str(tmp_path / "asked.jsonl"),
        "-k",
        "4,all",
    ]
    arguments += ["--selectors", "resprune,resize", "--early", ASKED, "--out", str(tmp_path / "report")]
    assert main([*arguments, "--max-new-tokens", "2"]) == 0
    scores = json.loads((tmp_path / "report" / "report.json").read_text())["data"][0]["scores"]
    found = {(score["selector"], score["k"]) for score in scores}
    assert found == {("resprune", "4"), (RESIZE, "4"), (f"early {ASKED}", "4"), ("", "all")}


def test_an_unknown_selector_is_told_of_resize():
    with pytest.raises(ResPruneError, match=r"there is no selector late 1:9; choose from .*resize"):
        Plan([], ["late 1:9"], [Budget.parse("4")])
