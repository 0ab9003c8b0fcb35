"""InternVL, SmolVLM and Idefics3 bundles, run by the runtime, answer as Hugging Face does, at any image size."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from resprune.exporter.families.smolvlm import _places
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS, check, with_positions
from tests.exporter.portable import PORTABLE, domains
from tests.runtime.images import blocks
from tests.runtime.pipelines import OTHER, QUESTION

# Of each variant: how it is exported, and how many tokens its questions keep.
EXPORTED: dict[str, dict[str, Any]] = {
    "internvl-qwen2": {"share": 1.0, "split": True},
    "internvl-qwen3": {"share": 1.0, "split": True},
    "internvl-layer": {"share": 1.0, "optimize": "ort"},
    "smolvlm": {"share": 1.0, "split": True},
    "idefics3": {"share": 1.0, "optimize": "ort", "split": True},
    "smolvlm-whole": {"share": 1.0},
}
SIZES = [(60, 50), (32, 32), (20, 110), (180, 30), (3, 40), (300, 200), (64, 63)]


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("variant", EXPORTED)
def test_same_picks_and_tokens(variant, positions, tiny_bundle, hugging_face, tmp_path):
    bundle = with_positions(tiny_bundle(variant, **EXPORTED[variant]), tmp_path / "bundle", positions)
    answers = []
    with Pipeline.load(bundle) as vlm:
        for seed, size in enumerate(SIZES):
            shown = blocks(seed, size)
            answers.append(vlm.ask(shown, QUESTION, tokens=3, max_new_tokens=STEPS, stream=False))
            check(hugging_face(variant), answers[-1], [shown], 3, positions)
    assert len({tuple(answer.token_ids) for answer in answers}) > 1
    assert len(set(answers[0].token_ids)) > 5, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("variant", EXPORTED)
def test_everything_kept_is_the_plain_model(variant, tiny_bundle, hugging_face):
    """K = N: plain `generate`, from the ids and pixels of transformers' own processors."""
    with Pipeline.load(tiny_bundle(variant, **EXPORTED[variant])) as vlm:
        for shown in [[blocks(seed, size)] for seed, size in enumerate(SIZES)] + [
            [blocks(8, (180, 30)), blocks(9, (32, 32))]
        ]:
            answer = vlm.ask(shown, QUESTION, max_new_tokens=STEPS, stream=False)
            assert answer.token_ids == hugging_face(variant).unpruned(shown, answer.prompt.ids, steps=STEPS)
            assert all(len(picks.kept_indices) == picks.kept_indices[-1] + 1 for picks in answer.images)


@pytest.mark.parametrize("variant", EXPORTED)
def test_pixels_and_prompt_are_the_processors(variant, tiny_bundle, tiny_checkpoint):
    root = tiny_checkpoint(variant)
    processor = AutoImageProcessor.from_pretrained(root, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(root)
    side_by_side = "num_patches" in processor(images=[blocks(0, (32, 32))])
    with Pipeline.load(tiny_bundle(variant, **EXPORTED[variant])) as vlm:
        token = vlm._prompter.variables["image_token"]
        for seed, size in enumerate(SIZES):
            shown = blocks(seed, size)
            ours = vlm._walk.preprocessor(shown)
            answer = vlm.ask(shown, QUESTION, tokens=1, max_new_tokens=1)
            if side_by_side:
                theirs = processor(images=[shown], return_tensors="np")["pixel_values"]
                text = f"<img>{token * ours.num_tokens}</img>"
            else:
                whole = processor(images=[[shown]], return_row_col_info=True)
                theirs = np.asarray(whole["pixel_values"][0])
                rows, columns = whole["rows"][0][0], whole["cols"][0][0]
                text = get_image_prompt_string(
                    rows, columns, ours.spans[0], "<fake_token_around_image>", token, "<global-img>"
                )
            np.testing.assert_array_equal(ours.arrays["pixel_values"], theirs)
            messages = answer.prompt.messages
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(rendered.replace(token, text), add_special_tokens=False)["input_ids"]
            spans = iter(ours.spans)
            expanded = [
                id_
                for one in answer.prompt.ids
                for id_ in [one] * (next(spans) if one == vlm.manifest.image_token_id else 1)
            ]
            assert expanded == ids


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("variant", ["internvl-qwen2", "smolvlm"])
def test_views_batches_and_several_images(variant, positions, tiny_bundle, hugging_face, tmp_path):
    bundle = with_positions(tiny_bundle(variant, **EXPORTED[variant]), tmp_path / "bundle", positions)
    shown = [[blocks(2, (180, 30))], [blocks(3, (32, 32)), blocks(4, (60, 50))], [blocks(5, (20, 110))]]
    questions = [QUESTION, OTHER, OTHER]
    with Pipeline.load(bundle) as vlm:
        answers = vlm.ask_batch(shown, questions, tokens=5, max_new_tokens=STEPS)
        view = vlm.look(shown[1])
        chat = view.chat()
        answers += [
            view.ask(QUESTION, tokens=5, max_new_tokens=STEPS),
            chat.ask(OTHER, tokens=5, max_new_tokens=STEPS),
        ]
        answers.append(chat.ask(QUESTION, tokens=5, max_new_tokens=STEPS))
        for answer, images in zip(answers, [*shown, shown[1], shown[1], shown[1]], strict=True):
            check(hugging_face(variant), answer, images, 5, positions)


@pytest.mark.parametrize("variant", ["internvl-qwen2", "smolvlm"])
def test_proportional_attention(variant, tiny_bundle, hugging_face):
    shown = [[blocks(2, (180, 30))], [blocks(3, (32, 32)), blocks(4, (60, 50))]]
    with Pipeline.load(tiny_bundle(variant, k=9, attention="proportional")) as vlm:
        for answer, images in zip(
            vlm.ask_batch(shown, [QUESTION, OTHER], tokens=4, max_new_tokens=STEPS), shown, strict=True
        ):
            check(hugging_face(variant), answer, images, 4, "contiguous", proportional=True)


@pytest.mark.parametrize("variant", ["internvl-qwen3", "idefics3"])
def test_half_precision(variant, tiny_bundle, hugging_face):
    with Pipeline.load(tiny_bundle(variant, share=1.0, dtype="fp16")) as vlm:
        shown = blocks(2, (60, 50))
        answer = vlm.ask(shown, QUESTION, tokens=3, max_new_tokens=STEPS, stream=False)
    ids, text = answer.prompt.ids, answer.prompt.text_token_ids
    expected = hugging_face(variant).pruned([shown], ids, text, k=3, positions="contiguous", steps=STEPS)
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert answer.token_ids[:8] == expected.token_ids[:8]


@pytest.mark.parametrize("variant", ["internvl-qwen2", "smolvlm"])
def test_kept_tokens_are_drawn_where_they_lie(variant, tiny_bundle, tmp_path):
    """Every patch of the tiles is as large as its share of the image; those of the whole view are larger."""
    bundle = tiny_bundle(variant, **EXPORTED[variant])
    blocks(1, (180, 60)).save(tmp_path / "wide.png")
    shown = tmp_path / "kept.png"
    words = ["ask", str(bundle), str(tmp_path / "wide.png"), QUESTION, "--show", str(shown), "--tokens", "6"]
    assert main([*words, "--max-new-tokens", "1"]) == 0
    assert Image.open(shown).width >= 180
    with Pipeline.load(bundle) as vlm:
        boxes = vlm.boxes((180, 60))
        assert len(boxes) == vlm.look(blocks(1, (180, 60))).num_tokens[0]
    areas = np.array([(right - left) * (bottom - top) for left, top, right, bottom in boxes])
    tokens_of_view = 4
    assert areas[:-tokens_of_view].sum() == pytest.approx(180 * 60)
    assert areas[-tokens_of_view:].sum() == pytest.approx(180 * 60)


@pytest.mark.parametrize("variant", ["internvl-qwen2", "smolvlm"])
def test_the_graphs_are_portable(variant, tiny_bundle):
    for used in domains(read_bundle(tiny_bundle(variant, **EXPORTED[variant]))).values():
        assert used <= PORTABLE


def test_the_tower_sees_places_as_transformers_does(hugging_face):
    """By their place from 0 to 1, with the rounding of transformers."""
    embeddings = hugging_face("smolvlm").model.model.vision_model.embeddings
    for side in (4, 14, 26, 27, 32):
        table = torch.nn.Embedding(side * side, 32)
        places = copy.deepcopy(embeddings)
        places.num_patches_per_side, places.position_embedding = side, table
        mask = torch.ones(1, side, side, dtype=torch.bool)
        with torch.no_grad():
            blank = torch.zeros(1, 3, side * 8, side * 8)
            seen = places(blank, mask) - places.patch_embedding(blank).flatten(2).transpose(1, 2)
        torch.testing.assert_close(seen[0], table(_places(side)))
