"""A LLaVA-OneVision bundle answers as Hugging Face does, with as many tiles as the limit has and with more."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS, changed, check, with_positions
from tests.exporter.portable import PORTABLE, domains
from tests.runtime.images import blocks
from tests.runtime.pipelines import OTHER, QUESTION

VARIANTS = ("onevision", "onevision-tied")
# Enlarged, of one tile, tall, wide, one pixel high; past the limit of four tiles those from the sixth on.
SIZES = [(60, 50), (30, 30), (20, 110), (180, 30), (500, 1), (300, 200), (64, 63), (90, 400), (400, 300)]
PAST = [False] * 5 + [True, True, False, True]


def whole(tiny_bundle: Callable[..., Path], variant: str) -> Path:
    return tiny_bundle(variant, share=1.0, split=True)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_same_picks_and_tokens(variant, positions, tiny_bundle, hugging_face, tmp_path):
    answers = []
    with Pipeline.load(with_positions(whole(tiny_bundle, variant), tmp_path / "bundle", positions)) as vlm:
        if variant == "onevision":
            assert [vlm._walk.preprocessor.interpolates(size) for size in SIZES] == PAST
        for seed, size in enumerate(SIZES):
            shown = blocks(seed, size)
            answers.append(vlm.ask(shown, QUESTION, tokens=9, max_new_tokens=STEPS, stream=False))
            check(hugging_face(variant), answers[-1], [shown], 9, positions)
    assert len({tuple(answer.token_ids) for answer in answers}) == len(SIZES)
    assert len(set(answers[0].token_ids)) > 5, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_kept_is_the_plain_model(variant, tiny_bundle, hugging_face):
    """K = N: plain `generate`, from the ids and pixels of transformers' own processors."""
    pairs = [[blocks(8, (300, 200)), blocks(9, (30, 30))]]
    with Pipeline.load(whole(tiny_bundle, variant)) as vlm:
        for shown in [[blocks(seed, size)] for seed, size in enumerate(SIZES)] + pairs:
            answer = vlm.ask(shown, QUESTION, max_new_tokens=STEPS, stream=False)
            assert answer.token_ids == hugging_face(variant).unpruned(shown, answer.prompt.ids, steps=STEPS)
            assert all(len(picks.kept_indices) == picks.kept_indices[-1] + 1 for picks in answer.images)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prompt_is_the_processors(variant, tiny_bundle, tiny_checkpoint, monkeypatch):
    """Of one image and of several: a flat list of images is one that all are cut into tiles of."""
    root = tiny_checkpoint(variant)
    # The processor asks for one of videos as well, which needs torchvision.
    monkeypatch.setattr(
        LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda self, name, it: type(it)
    )
    with Pipeline.load(whole(tiny_bundle, variant)) as vlm:
        processor = LlavaOnevisionProcessor(
            AutoImageProcessor.from_pretrained(root, backend="pil"),
            AutoTokenizer.from_pretrained(root),
            num_image_tokens=vlm._walk.preprocessor.tiles.tokens,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=f"anyres_max_{vlm._walk.preprocessor.limit}",
        )
        for shown in [[blocks(seed, size)] for seed, size in enumerate(SIZES)] + [
            [blocks(1, (64, 63)), blocks(2, (20, 110)), blocks(3, (300, 200))]
        ]:
            answer = vlm.ask(shown, QUESTION, tokens=1, max_new_tokens=1)
            theirs = processor(text=answer.prompt.text, images=shown, add_special_tokens=False)
            spans = iter([vlm._walk.preprocessor(one).num_tokens for one in shown])
            expanded = [
                id_
                for one in answer.prompt.ids
                for id_ in [one] * (next(spans) if one == vlm.manifest.image_token_id else 1)
            ]
            assert expanded == theirs["input_ids"][0]


def test_views_batches_and_several_images(tiny_bundle, hugging_face):
    shown = [[blocks(2, (180, 30))], [blocks(3, (400, 300)), blocks(4, (30, 30))], [blocks(5, (20, 110))]]
    with Pipeline.load(whole(tiny_bundle, "onevision")) as vlm:
        answers = vlm.ask_batch(shown, [QUESTION, OTHER, OTHER], tokens=12, max_new_tokens=STEPS)
        view = vlm.look(shown[1])
        chat = view.chat()
        answers.append(view.ask(QUESTION, tokens=12, max_new_tokens=STEPS, stream=False))
        for question in (OTHER, QUESTION):
            answers.append(chat.ask(question, tokens=12, max_new_tokens=STEPS, stream=False))
    for answer, images in zip(answers, [*shown, *[shown[1]] * 3], strict=True):
        check(hugging_face("onevision"), answer, images, 12)


@pytest.mark.parametrize(
    "options",
    [{"optimize": "ort"}, {"attention": "proportional", "split": True}],
    ids=["ort", "proportional"],
)
def test_other_decoders(options, tiny_bundle, hugging_face):
    proportional = "attention" in options
    shown = [[blocks(seed, size)] for seed, size in enumerate(SIZES)]
    shown.append([blocks(2, (180, 30)), blocks(3, (400, 300))])
    with Pipeline.load(tiny_bundle("onevision-tied", share=1.0, **options)) as vlm:
        answers = vlm.ask_batch(shown, [OTHER] * len(shown), tokens=6, max_new_tokens=STEPS)
    for answer, images in zip(answers, shown, strict=True):
        check(hugging_face("onevision-tied"), answer, images, 6, proportional=proportional)


def test_half_precision(tiny_bundle, hugging_face):
    with Pipeline.load(tiny_bundle("onevision", k=7, dtype="fp16")) as vlm:
        for seed, size in [(0, (60, 50)), (5, (300, 200)), (8, (400, 300))]:
            shown = blocks(seed, size)
            answer = vlm.ask(shown, QUESTION, max_new_tokens=STEPS, stream=False)
            ids, text = answer.prompt.ids, answer.prompt.text_token_ids
            expected = hugging_face("onevision").pruned(
                [shown], ids, text, k=7, positions="contiguous", steps=STEPS
            )
            assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
            assert answer.token_ids[:8] == expected.token_ids[:8]


def test_the_graphs_are_portable_and_show_draws_interpolated_tokens(tiny_bundle, tmp_path):
    bundle = whole(tiny_bundle, "onevision")
    for used in domains(read_bundle(bundle)).values():
        assert used <= PORTABLE
    blocks(5, (300, 200)).save(tmp_path / "image.png")
    drawn = tmp_path / "kept.png"
    words = ["ask", str(bundle), str(tmp_path / "image.png"), QUESTION, "--show", str(drawn), "--tokens", "9"]
    assert main([*words, "--max-new-tokens", "1"]) == 0
    assert Image.open(drawn).width >= 300


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config": {"vision_aspect_ratio": "square"}}, "anyres_max_ and a number"),
        ({"config": {"image_grid_pinpoints": [[30, 60]]}}, "image_grid_pinpoints differ"),
        ({"config": {"vision_feature_select_strategy": "default"}}, "15 rows a tile where 16 patches"),
        (
            {"preprocessor_config": {"image_processor_type": "LlavaNextImageProcessor"}},
            "needs a LlavaOnevision",
        ),
        ({"preprocessor_config": {"size": {"height": 16, "width": 16}}}, "the vision tower takes 30 x 30"),
        ({"config": {"text_config.model_type": "gemma"}}, "supported are llama, mistral, qwen2"),
    ],
)
def test_wrong_checkpoints_are_refused(files, said, tiny_checkpoint, tmp_path):
    model = changed(tiny_checkpoint("onevision"), tmp_path / "checkpoint", **files)
    with pytest.raises(ResPruneError, match=said) as caught:
        export(model, tmp_path / "bundle", Options(k=4))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
