"""A Gemma 3 bundle answers as Hugging Face does: an image's rows see each other, and windows cut what they see."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Gemma3Processor

from resprune.exporter.export import export
from resprune.exporter.families.gemma3 import _masks
from resprune.exporter.language import additive_masks
from resprune.exporter.options import Options
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS, HuggingFaceTwoWay, changed, check, with_positions
from tests.exporter.portable import PORTABLE, domains
from tests.runtime.images import blocks
from tests.runtime.pipelines import OTHER, QUESTION

VARIANTS = ("gemma3", "gemma3-outside")
SIZES = [(60, 50), (32, 32), (20, 110), (180, 30), (1, 40), (300, 200), (64, 63)]
K = 9  # more than the window of the first variant


def whole(tiny_bundle: Callable[..., Path], variant: str) -> Path:
    return tiny_bundle(variant, share=1.0, split=True)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_picks_and_tokens(variant, positions, tiny_bundle, hugging_face, tmp_path):
    answers = []
    with Pipeline.load(with_positions(whole(tiny_bundle, variant), tmp_path / "bundle", positions)) as vlm:
        for seed, size in enumerate(SIZES):
            shown = blocks(seed, size)
            answers.append(vlm.ask(shown, QUESTION, tokens=K, max_new_tokens=STEPS, stream=False))
            check(hugging_face(variant), answers[-1], [shown], K, positions)
    assert len({tuple(answer.token_ids) for answer in answers}) == len(SIZES)
    assert len(set(answers[0].token_ids)) > 5, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_kept_is_the_plain_model(variant, tiny_bundle, hugging_face):
    """K = N: plain `generate`, from the ids and pixels of transformers' own processors."""
    with Pipeline.load(whole(tiny_bundle, variant)) as vlm:
        for shown in [[blocks(seed, size)] for seed, size in enumerate(SIZES)] + [
            [blocks(8, (180, 30)), blocks(9, (32, 32))]
        ]:
            answer = vlm.ask(shown, QUESTION, max_new_tokens=STEPS, stream=False)
            assert answer.token_ids == hugging_face(variant).unpruned(shown, answer.prompt.ids, steps=STEPS)
            assert [len(picks.kept_indices) for picks in answer.images] == [16] * len(shown)


def test_a_causal_mask_would_answer_otherwise(tiny_bundle, hugging_face, monkeypatch):
    """What an exporter loses that takes the rows of an image for text."""
    monkeypatch.setattr(HuggingFaceTwoWay, "_told", lambda self, of_image: {})
    unlike = 0
    with Pipeline.load(whole(tiny_bundle, "gemma3")) as vlm:
        for seed, size in enumerate(SIZES):
            answer = vlm.ask(blocks(seed, size), QUESTION, tokens=K, max_new_tokens=STEPS, stream=False)
            ids, text = answer.prompt.ids, answer.prompt.text_token_ids
            causal = hugging_face("gemma3").pruned(
                [blocks(seed, size)], ids, text, k=K, positions="contiguous", steps=STEPS
            )
            unlike += answer.token_ids != causal.token_ids
    assert unlike == len(SIZES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pixels_and_prompt_are_the_processors(variant, tiny_bundle, tiny_checkpoint):
    root = tiny_checkpoint(variant)
    images = AutoImageProcessor.from_pretrained(root, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(root)
    template = (root / "chat_template.jinja").read_text()
    processor = Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=16)
    with Pipeline.load(whole(tiny_bundle, variant)) as vlm:
        for shown in [[blocks(seed, size)] for seed, size in enumerate(SIZES)] + [
            [blocks(1, (64, 63)), blocks(2, (20, 110))]
        ]:
            for one in shown:
                ours = vlm._walk.preprocessor(one).arrays["pixel_values"]
                np.testing.assert_array_equal(ours, images(images=[one])["pixel_values"][0])
            prompt = vlm.ask(shown, QUESTION, tokens=1, max_new_tokens=1).prompt
            text = processor.apply_chat_template(prompt.messages, add_generation_prompt=True)
            theirs = processor(text=text, images=[shown], add_special_tokens=False)["input_ids"][0]
            token = vlm.manifest.image_token_id
            assert [id_ for one in prompt.ids for id_ in [one] * (16 if one == token else 1)] == list(theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_batches_and_several_images(variant, tiny_bundle, hugging_face):
    shown = [[blocks(2, (180, 30))], [blocks(3, (32, 32)), blocks(4, (60, 50))], [blocks(5, (20, 110))]]
    with Pipeline.load(whole(tiny_bundle, variant)) as vlm:
        answers = vlm.ask_batch(shown, [QUESTION, OTHER, OTHER], tokens=K, max_new_tokens=STEPS)
        view = vlm.look(shown[1])
        chat = view.chat()
        answers.append(view.ask(QUESTION, tokens=K, max_new_tokens=STEPS, stream=False))
        for question in (OTHER, QUESTION):
            answers.append(chat.ask(question, tokens=K, max_new_tokens=STEPS, stream=False))
    for answer, images in zip(answers, [*shown, *[shown[1]] * 3], strict=True):
        check(hugging_face(variant), answer, images, K)


def test_proportional_attention(tiny_bundle, hugging_face):
    shown = [[blocks(2, (180, 30))], [blocks(3, (32, 32)), blocks(4, (60, 50))]]
    with Pipeline.load(tiny_bundle("gemma3", k=9, attention="proportional")) as vlm:
        answers = vlm.ask_batch(shown, [QUESTION, OTHER], tokens=4, max_new_tokens=STEPS)
    for answer, images in zip(answers, shown, strict=True):
        check(hugging_face("gemma3"), answer, images, 4, proportional=True)


def test_half_precision(tiny_bundle, hugging_face):
    """The tied table is one tensor in half, and its scale is applied in float32."""
    with Pipeline.load(tiny_bundle("gemma3", k=K, dtype="fp16")) as vlm:
        assert all(spec.precision == "fp16" for spec in vlm.manifest.graphs.values())
        table = vlm.manifest.files["onnx/embed_tokens_fp16.onnx_data"].size
        assert table < 3 * vlm._prompter.tokenizer.get_vocab_size() * 48
        for seed, size in list(enumerate(SIZES))[:3]:
            answer = vlm.ask(blocks(seed, size), QUESTION, max_new_tokens=STEPS, stream=False)
            ids, text = answer.prompt.ids, answer.prompt.text_token_ids
            expected = hugging_face("gemma3").pruned(
                [blocks(seed, size)], ids, text, k=K, positions="contiguous", steps=STEPS
            )
            assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
            assert answer.token_ids[:8] == expected.token_ids[:8]


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("window", [3, 7, 40])
def test_the_masks_are_those_of_transformers(window, past, hugging_face):
    """Of both kinds of layers, key by key, with padding on the left."""
    from transformers import DynamicCache

    config = hugging_face("gemma3").model.config.text_config
    numbers = torch.tensor([[0, 1, 1, 1, 1, 0, 2, 2, 2, 0, 0], [0, 0, 0, 1, 1, 0, 2, 2, 2, 2, 2]])
    mask = torch.ones(2, past + 11, dtype=torch.int64)
    mask[1, : past // 2 + 2] = 0
    embeds = torch.zeros(2, 11, 48)
    places = torch.arange(past, past + 11).repeat(2, 1)
    cache = DynamicCache()
    if past:
        for layer in range(3):
            cache.update(torch.zeros(2, 2, past, 16), torch.zeros(2, 2, past, 16), layer)
    before, config.sliding_window = config.sliding_window, window
    try:
        theirs = _masks(config, embeds, mask, places, numbers, cache)
        ours = additive_masks(config, 11, mask, numbers, proportional=False)
    finally:
        config.sliding_window = before
    for kind in ("full_attention", "sliding_attention"):
        seen = ours[kind] == 0
        rows = mask[:, past:].bool()[:, None, :, None]  # what a padded query sees is nobody's concern
        assert torch.equal(seen & rows, theirs[kind] & rows)
    assert not torch.equal(ours["full_attention"], ours["sliding_attention"]) or window == 40


def test_the_graphs_are_portable_and_show_draws_pooled_tokens(tiny_bundle, tmp_path):
    bundle = whole(tiny_bundle, "gemma3")
    for used in domains(read_bundle(bundle)).values():
        assert used <= PORTABLE
    blocks(1, (180, 60)).save(tmp_path / "wide.png")
    drawn = tmp_path / "kept.png"
    words = ["ask", str(bundle), str(tmp_path / "wide.png"), QUESTION, "--show", str(drawn), "--tokens", "6"]
    assert main([*words, "--max-new-tokens", "1"]) == 0
    assert Image.open(drawn).width >= 180
    with Pipeline.load(bundle) as vlm:
        boxes = vlm.boxes((180, 60))
    assert len(boxes) == 16
    assert boxes[0] == (0, 0, 45, 15)
    assert boxes[-1] == (135, 45, 180, 60)


def test_a_typed_mark_is_refused(tiny_bundle):
    with Pipeline.load(whole(tiny_bundle, "gemma3")) as vlm:
        for typed in ("<start_of_image>", "<image_soft_token>"):
            with pytest.raises(ResPruneError, match=f"contains {typed}, which stands for an image"):
                vlm.ask(blocks(1, (32, 32)), f"what is {typed}?", max_new_tokens=1)
            vlm.ask(blocks(1, (32, 32)), f"what is {typed}?", max_new_tokens=1, plain_text=True)


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        (
            {"preprocessor_config": {"do_pan_and_scan": True}},
            {},
            "do_pan_and_scan in preprocessor_config.json adds crops",
        ),
        ({"preprocessor_config": {"size": {"height": 32, "width": 16}}}, {}, "stretches every image to a"),
        ({"preprocessor_config": {"size": {"height": 16, "width": 16}}}, {}, "gets 16 x 16 pixels"),
        (
            {"config": {"text_config.use_bidirectional_attention": True}},
            {},
            "use_bidirectional_attention in text_config lets every token see",
        ),
        ({"config": {"vision_config.model_type": "clip_vision_model"}}, {}, "supported is siglip_vision"),
        (
            {
                "config": {
                    "text_config.rope_parameters.full_attention": {"rope_type": "dynamic", "factor": 2.0}
                }
            },
            {},
            "rotary embeddings of type dynamic",
        ),
        ({}, {"optimize": "ort"}, "--optimize ort takes causal masks alone, and the rows of this model's"),
    ],
)
def test_what_the_graphs_cannot_carry_is_refused(files, options, said, tiny_checkpoint, tmp_path):
    model = changed(tiny_checkpoint("gemma3"), tmp_path / "checkpoint", **files)
    with pytest.raises(ResPruneError, match=said) as caught:
        export(model, tmp_path / "bundle", Options(k=4, **options))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
