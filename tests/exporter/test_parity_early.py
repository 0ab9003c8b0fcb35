"""A bundle whose vision tower selects first answers as Hugging Face's tower does with the reference's selection."""

import numpy as np
import pytest
from PIL import Image

from resprune.exporter.export import Options, export
from resprune.runtime.bundle.manifest import Early
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline

STEPS = 40
QUESTION = "what colour is the square on the table?"
OTHER = "how many red circles are there?"
# Of each variant: --early, what it comes to, and K.
ASKED = {
    "clip-llama": ("1:9", Early(1, 9, 16), 7),
    "siglip-mistral": ("67%:50%", Early(2, 18, 36), 9),
    "next-llama": ("33%:7", Early(1, 7, 16), 12),
    "onevision": ("1:60%", Early(1, 10, 16), 12),
}
SIZES = [(60, 50), (20, 110), (180, 30)]


def image(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def early_bundle(tiny_bundle):
    return lambda variant: tiny_bundle(variant, k=ASKED[variant][2], early=ASKED[variant][0], split=True)


def check(model, answer, images, early, k):
    shown = [np.asarray(one) for one in images]
    ids, text = answer.prompt.ids, answer.prompt.text_token_ids
    expected = model.pruned(shown, ids, text, k=k, positions="contiguous", steps=STEPS, early=early)
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert [picks.candidates.tolist() for picks in answer.images] == expected.candidates
    assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize("variant", ASKED)
def test_same_picks_of_both_stages_and_same_tokens(variant, early_bundle, hugging_face):
    _, early, k = ASKED[variant]
    model, shown = hugging_face(variant), [image(seed, size) for seed, size in enumerate(SIZES)]
    with Pipeline.load(early_bundle(variant)) as vlm:
        assert vlm.manifest.early == early
        assert vlm.manifest.format_version == 3
        answers = [vlm.ask(one, QUESTION, max_new_tokens=STEPS, stream=False) for one in shown]
        for answer, one in zip(answers, shown, strict=True):
            check(model, answer, [one], early, k)
            (picks,) = answer.images
            assert set(picks.kept_indices) < set(picks.candidates), "the second stage drops some as well"
        assert len(set(answers[0].token_ids)) > 5, "a model that repeats itself shows nothing"
        # Encoded apart, several to a prompt, in a batch, and with fewer tokens.
        both = vlm.look(shown[:2]).ask(OTHER, tokens=4, max_new_tokens=STEPS)
        check(model, both, shown[:2], early, 4)
        batch = vlm.ask_batch([shown[:2], shown[2]], [QUESTION, OTHER], max_new_tokens=STEPS)
        check(model, batch[0], shown[:2], early, k)
        check(model, batch[1], shown[2:], early, k)
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
