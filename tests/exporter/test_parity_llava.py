"""A LLaVA-1.5 bundle, run by the runtime, answers as Hugging Face does: same picks, same greedy tokens."""

import pytest

from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS, picture, with_positions
from tests.runtime.pipelines import OTHER, QUESTION

# K of each variant: of 16, 36, 25 and 49 visual tokens.
KEPT = {"clip-llama": 7, "siglip-mistral": 9, "dinov2-qwen2": 6, "clip-list": 11}


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("variant", KEPT)
def test_same_picks_and_tokens(variant, positions, tiny_bundle, hugging_face, tmp_path):
    k = KEPT[variant]
    bundle = with_positions(tiny_bundle(variant, k=k), tmp_path / "bundle", positions)
    with Pipeline.load(bundle) as vlm:
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
    text = [answer.prompt.ids[position] for position in answer.prompt.text_positions]
    expected = hugging_face(variant).pruned(
        [picture(1)], answer.prompt.ids, text, k=k, positions=positions, steps=STEPS
    )
    assert answer.images[0].pick_order.tolist() == expected.pick_orders[0]
    assert answer.token_ids == expected.token_ids
    assert len(set(answer.token_ids)) > 5, "a model that repeats itself shows nothing"


def test_positions_matter(hugging_face):
    """Else the two policies above would be one test."""
    ids, text = [1, 300, 4, 301, 302, 303], [301]
    answers = [
        hugging_face("clip-llama")
        .pruned([picture(1)], ids, text, k=7, positions=policy, steps=STEPS)
        .token_ids
        for policy in ("contiguous", "original")
    ]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_two_pictures_in_one_prompt(positions, tiny_bundle, hugging_face, tmp_path):
    pictures = [picture(2), picture(3, height=75)]
    bundle = with_positions(tiny_bundle("clip-llama", k=7), tmp_path / "bundle", positions)
    with Pipeline.load(bundle) as vlm:
        answer = vlm.ask(pictures, QUESTION, max_new_tokens=STEPS, stream=False)
    text = [answer.prompt.ids[position] for position in answer.prompt.text_positions]
    expected = hugging_face("clip-llama").pruned(
        pictures, answer.prompt.ids, text, k=7, positions=positions, steps=STEPS
    )
    assert [image.pick_order.tolist() for image in answer.images] == expected.pick_orders
    assert answer.token_ids == expected.token_ids


def test_batch(tiny_bundle, hugging_face):
    """Two questions of different length at once: the shorter is padded on the left."""
    questions, pictures = [QUESTION, OTHER], [picture(4), picture(5)]
    with Pipeline.load(tiny_bundle("siglip-mistral", k=9)) as vlm:
        answers = vlm.ask_batch(pictures, questions, max_new_tokens=STEPS)
    assert len(answers[0].prompt.ids) != len(answers[1].prompt.ids)
    for answer, shown in zip(answers, pictures, strict=True):
        text = [answer.prompt.ids[position] for position in answer.prompt.text_positions]
        expected = hugging_face("siglip-mistral").pruned(
            [shown], answer.prompt.ids, text, k=9, positions="contiguous", steps=STEPS
        )
        assert answer.images[0].pick_order.tolist() == expected.pick_orders[0]
        assert answer.token_ids == expected.token_ids


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("variant", ["clip-llama", "siglip-mistral", "dinov2-qwen2"])
def test_proportional_attention(variant, positions, tiny_bundle, hugging_face, tmp_path):
    """Counts and tokens at every K′, of two pictures, and of questions of different length at once, under a window."""
    k, split = KEPT[variant], variant == "clip-llama"
    made = tiny_bundle(variant, k=k, attention="proportional", split=split)
    asked = ([QUESTION, picture(1)], [OTHER, [picture(2), picture(3, height=75)]])
    unlike_plain = 0
    with Pipeline.load(with_positions(made, tmp_path / "bundle", positions)) as vlm:
        for tokens in (1, k // 2, k):
            questions, pictures = zip(*asked, strict=True)
            answers = vlm.ask_batch(pictures, questions, tokens=tokens, max_new_tokens=STEPS)
            if split:
                answers += [
                    vlm.look(shown).ask(question, tokens=tokens, max_new_tokens=STEPS)
                    for question, shown in asked
                ]
            for answer, shown in zip(answers, pictures * (1 + split), strict=True):
                shown = shown if isinstance(shown, list) else [shown]
                prompt = (shown, answer.prompt.ids, answer.prompt.text_token_ids)
                how = {"k": tokens, "positions": positions, "steps": STEPS}
                expected = hugging_face(variant).pruned(*prompt, **how, proportional=True)
                assert [image.kept_counts.tolist() for image in answer.images] == expected.kept_counts
                assert answer.token_ids == expected.token_ids
                plain = hugging_face(variant).pruned(*prompt, **how)
                unlike_plain += plain.token_ids != expected.token_ids
    assert unlike_plain, "else plain attention would have passed as well"


@pytest.mark.parametrize("variant", ["clip-llama", "dinov2-qwen2"])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_everything_kept_is_plain_llava(variant, positions, tiny_bundle, hugging_face, tmp_path):
    tokens = {"clip-llama": 16, "dinov2-qwen2": 25}[variant]
    bundle = with_positions(tiny_bundle(variant, k=tokens, alpha=0.0), tmp_path / "bundle", positions)
    with Pipeline.load(bundle) as vlm:
        answer = vlm.ask(picture(6), QUESTION, max_new_tokens=STEPS, stream=False)
    assert answer.images[0].kept_indices.tolist() == list(range(tokens))
    assert answer.token_ids == hugging_face(variant).unpruned([picture(6)], answer.prompt.ids, steps=STEPS)


def test_split_bundle_answers_as_the_fused_one(tiny_bundle):
    answers = []
    for split in (False, True):
        with Pipeline.load(tiny_bundle("clip-llama", k=7, split=split)) as vlm:
            answers.append(vlm.look(picture(7)).ask(OTHER, max_new_tokens=STEPS, stream=False))
    fused, split_answer = answers
    assert fused.images[0].pick_order.tolist() == split_answer.images[0].pick_order.tolist()
    assert fused.token_ids == split_answer.token_ids


def test_half_precision_keeps_the_picks(tiny_bundle, hugging_face):
    with Pipeline.load(tiny_bundle("clip-llama", k=7, dtype="fp16")) as vlm:
        answer = vlm.ask(picture(1), QUESTION, max_new_tokens=STEPS, stream=False)
    text = [answer.prompt.ids[position] for position in answer.prompt.text_positions]
    expected = hugging_face("clip-llama").pruned(
        [picture(1)], answer.prompt.ids, text, k=7, positions="contiguous", steps=STEPS
    )
    assert answer.images[0].pick_order.tolist() == expected.pick_orders[0]
    assert answer.token_ids[:8] == expected.token_ids[:8]
