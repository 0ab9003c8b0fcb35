"""A bundle whose vision tower selects first answers as Hugging Face's tower does with the reference's selection."""

import numpy as np
import pytest

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.manifest import Early
from resprune.runtime.bundle.precisions import PRESETS
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS
from tests.exporter.hugging_face_qwen import HuggingFaceQwen
from tests.runtime.images import blocks
from tests.runtime.pipelines import OTHER, QUESTION

# Of each variant: --early, what it comes to, K, and attention.
ASKED = {
    "clip-llama": ("1:9", Early(1, 9, 16), 7, "plain"),
    "siglip-mistral": ("67%:50%", Early(2, 18, 36), 9, "proportional"),
    "next-llama": ("33%:7", Early(1, 7, 16), 12, "plain"),
    "onevision": ("1:60%", Early(1, 10, 16), 12, "plain"),
    # Whole squares of patches: those that are merged, a tile at a time, and those that are averaged.
    "internvl-qwen2": ("33%:75%", Early(1, 3, 4), 3, "plain"),
    "smolvlm": ("2:2", Early(2, 2, 4), 3, "proportional"),
    "gemma3": ("1:50%", Early(1, 8, 16), 5, "plain"),
    # Of images of any size: a number and shares, with a window and without behind it, between two planes.
    "qwen2": ("1:9", Early(1, 9, 109), 3, "plain"),
    "qwen25": ("50%:50%", Early(2, 55, 109, 0.5), 3, "proportional"),
    "qwen3": ("2:60%", Early(2, 66, 109, 0.6), 3, "plain"),
}
SIZES = [(60, 50), (20, 110), (180, 30)]


@pytest.fixture
def early_bundle(tiny_bundle):
    def bundle(variant):
        early, _, k, attention = ASKED[variant]
        more = {} if attention == "plain" else {"attention": attention}
        return tiny_bundle(variant, k=k, early=early, split=True, **more)

    return bundle


def check(model, answer, images, variant, k):
    _, early, _, attention = ASKED[variant]
    shown = [np.asarray(one) for one in images]
    prompt = shown, answer.prompt.ids, answer.prompt.text_token_ids
    how = {"early": early, "proportional": attention == "proportional"}
    if isinstance(model, HuggingFaceQwen):
        how["budgets"] = [k] * len(shown)
    else:
        how |= {"k": k, "positions": "contiguous"}
    expected = model.pruned(*prompt, steps=STEPS, **how)
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert [picks.candidates.tolist() for picks in answer.images] == expected.candidates
    assert [picks.kept_counts.tolist() for picks in answer.images] == expected.kept_counts
    assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize("variant", ASKED)
def test_same_picks_of_both_stages_and_same_tokens(variant, early_bundle, hugging_face):
    _, early, k, attention = ASKED[variant]
    model, shown = hugging_face(variant), [blocks(seed, size) for seed, size in enumerate(SIZES)]
    with Pipeline.load(early_bundle(variant)) as vlm:
        assert vlm.manifest.early == early
        assert vlm.manifest.format_version == 3
        answers = [vlm.ask(one, QUESTION, max_new_tokens=STEPS, stream=False) for one in shown]
        for answer, one in zip(answers, shown, strict=True):
            check(model, answer, [one], variant, k)
            (picks,) = answer.images
            assert set(picks.kept_indices) < set(picks.candidates), "the second stage drops some as well"
            if attention == "proportional":
                assert picks.kept_counts.sum() == len(picks.candidates), "not of those that the tower dropped"
        assert len(set(answers[0].token_ids)) > 5, "a model that repeats itself shows nothing"
        # Encoded apart, several to a prompt, in a batch, and with fewer tokens.
        both = vlm.look(shown[:2]).ask(OTHER, tokens=k // 2, max_new_tokens=STEPS)
        check(model, both, shown[:2], variant, k // 2)
        batch = vlm.ask_batch([shown[:2], shown[2]], [QUESTION, OTHER], max_new_tokens=STEPS)
        check(model, batch[0], shown[:2], variant, k)
        check(model, batch[1], shown[2:], variant, k)
        # All that the tower left, and no more.
        whole = vlm.look(shown[0]).ask(QUESTION, tokens="all", max_new_tokens=1)
    assert whole.images[0].kept_indices.tolist() == whole.images[0].candidates.tolist()


def test_the_whole_tower_answers_otherwise(early_bundle, hugging_face):
    """Else the selection inside it could have been left out."""
    with Pipeline.load(early_bundle("clip-llama")) as vlm:
        answer = vlm.ask(blocks(1), QUESTION, max_new_tokens=STEPS, stream=False)
    prompt = ([np.asarray(blocks(1))], answer.prompt.ids, answer.prompt.text_token_ids)
    plain = hugging_face("clip-llama").pruned(*prompt, k=7, positions="contiguous", steps=STEPS)
    assert plain.token_ids != answer.token_ids


@pytest.mark.parametrize(
    ("variant", "early", "dtype"),
    [
        ("dinov2-qwen2", "1:12", "fp16"),
        ("idefics3", "1:75%", "fp16"),
        ("qwen25", "2:50%", "fp16"),
        ("clip-llama", "1:9", PRESETS["cpu"].dtype),
        ("qwen3", "2:50%", PRESETS["cpu"].dtype),
    ],
)
def test_other_precisions(variant, early, dtype, tiny_bundle):
    """Verified by the graph's own picks: rounding moves a few, and every row has to be what those come to."""
    bundle = tiny_bundle(variant, k=3, early=early, dtype=dtype, decoder=False)
    equal, total = map(int, read_bundle(bundle).manifest.parity["early_picks"].split("/"))
    assert equal > 0.8 * total


@pytest.mark.parametrize(
    ("variant", "early", "says"),
    [
        ("clip-llama", "0:9", "'0:9' is not LAYER:TOKENS; give numbers from 1"),
        ("clip-llama", "50%:all", "'50%:all' is not LAYER:TOKENS"),
        ("clip-llama", "2:9", "takes hidden states 2"),
        ("clip-llama", "1:16", "give 1 to 15"),
        ("clip-llama", "3:9", "give 1 to 1"),
        ("clip-llama", "1:5", "-k 7 is more than the 5 visual tokens that --early leaves"),
        ("clip-list", "1:9", "the projector takes hidden state 1 of the tower's 3 blocks"),
        ("qwen25", "1:109", "give 1 to 108"),
    ],
)
def test_what_cannot_be_is_refused(variant, early, says, tiny_checkpoint, tmp_path):
    with pytest.raises(ResPruneError) as refused:
        export(str(tiny_checkpoint(variant)), tmp_path / "bundle", Options(k=7, early=early))
    assert says in str(refused.value)
    assert not (tmp_path / "bundle").exists()
