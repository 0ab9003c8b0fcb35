"""A bundle whose vision tower selects first answers as Hugging Face's tower does with the reference's selection."""

import numpy as np
import pytest
from PIL import Image

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.bundle.manifest import Early
from resprune.runtime.bundle.precisions import PRESETS
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline

STEPS = 40
QUESTION = "what colour is the square on the table?"
OTHER = "how many red circles are there?"
# Of each variant: --early, what it comes to, K, and attention.
ASKED = {
    "clip-llama": ("1:9", Early(1, 9, 16), 7, "plain"),
    "siglip-mistral": ("67%:50%", Early(2, 18, 36), 9, "proportional"),
    "next-llama": ("33%:7", Early(1, 7, 16), 12, "plain"),
    "onevision": ("1:60%", Early(1, 10, 16), 12, "plain"),
}
SIZES = [(60, 50), (20, 110), (180, 30)]


def image(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


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
    expected = model.pruned(*prompt, k=k, positions="contiguous", steps=STEPS, **how)
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert [picks.candidates.tolist() for picks in answer.images] == expected.candidates
    assert [picks.kept_counts.tolist() for picks in answer.images] == expected.kept_counts
    assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize("variant", ASKED)
def test_same_picks_of_both_stages_and_same_tokens(variant, early_bundle, hugging_face):
    _, early, k, attention = ASKED[variant]
    model, shown = hugging_face(variant), [image(seed, size) for seed, size in enumerate(SIZES)]
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
        both = vlm.look(shown[:2]).ask(OTHER, tokens=4, max_new_tokens=STEPS)
        check(model, both, shown[:2], variant, 4)
        batch = vlm.ask_batch([shown[:2], shown[2]], [QUESTION, OTHER], max_new_tokens=STEPS)
        check(model, batch[0], shown[:2], variant, k)
        check(model, batch[1], shown[2:], variant, k)
        # All that the tower left, and no more.
        whole = vlm.look(shown[0]).ask(QUESTION, tokens="all", max_new_tokens=1)
    assert whole.images[0].kept_indices.tolist() == whole.images[0].candidates.tolist()


def test_the_whole_tower_answers_otherwise(early_bundle, hugging_face):
    """Else the selection inside it could have been left out."""
    with Pipeline.load(early_bundle("clip-llama")) as vlm:
        answer = vlm.ask(image(1), QUESTION, max_new_tokens=STEPS, stream=False)
    prompt = ([np.asarray(image(1))], answer.prompt.ids, answer.prompt.text_token_ids)
    plain = hugging_face("clip-llama").pruned(*prompt, k=7, positions="contiguous", steps=STEPS)
    assert plain.token_ids != answer.token_ids


def test_quantised_for_a_processor(tiny_bundle):
    """`--dtype cpu`: the tower's weights are of 8 bits, and its own picks are what the later stages are judged by."""
    with Pipeline.load(tiny_bundle("clip-llama", k=7, early="1:9", dtype=PRESETS["cpu"].dtype)) as vlm:
        answer = vlm.ask(image(1), QUESTION, max_new_tokens=8, stream=False)
    assert len(answer.images[0].candidates) == 9
    assert set(answer.images[0].kept_indices) <= set(answer.images[0].candidates)
    assert len(answer.token_ids) == 8


def test_half_precision(tiny_bundle):
    """Verified by the graph's own picks: rounding moves a few, and every row has to be what those come to."""
    bundle = tiny_bundle("dinov2-qwen2", k=6, early="1:12", dtype="fp16")
    with Pipeline.load(bundle) as vlm:
        equal, total = map(int, vlm.manifest.parity["early_picks"].split("/"))
        assert total == 3 * 12
        assert equal > 0.8 * total


@pytest.mark.parametrize(
    ("variant", "early", "says"),
    [
        ("clip-llama", "8", "LAYER:TOKENS"),
        ("clip-llama", "0:9", "give 1 to 1"),
        ("clip-llama", "2:9", "takes hidden states 2"),
        ("clip-llama", "1:16", "give 1 to 15"),
        ("clip-llama", "1:0", "give 1 to 15"),
        ("clip-llama", "1:5", "-k 7 is more than the 5 visual tokens that --early leaves"),
        ("clip-list", "1:9", "the projector takes hidden state 1 of the tower's 3 blocks"),
        ("qwen25", "1:9", "--early is not built for the vision tower of Qwen2.5-VL"),
    ],
)
def test_what_cannot_be_is_refused(variant, early, says, tiny_checkpoint, tmp_path):
    with pytest.raises(ResPruneError) as refused:
        export(str(tiny_checkpoint(variant)), tmp_path / "bundle", Options(k=7, early=early))
    assert says in str(refused.value)
    assert not (tmp_path / "bundle").exists()
