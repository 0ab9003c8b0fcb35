"""A LLaVA-NeXT bundle, run by the runtime, answers as Hugging Face does, whatever the size of the picture."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from resprune.exporter.export import export
from resprune.exporter.options import Options
from resprune.runtime.bundle.files import read_bundle, write_manifest
from resprune.runtime.caption import pick_color
from resprune.runtime.cli import main
from resprune.runtime.drawing import GAP, MARGIN, panel_size
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS, HuggingFace, changed, with_positions
from tests.exporter.portable import PORTABLE, domains
from tests.runtime.pipelines import OTHER, QUESTION

# K of each variant: of up to 88 visual tokens. The smallest picture has fewer than the largest of these.
KEPT = {"next-llama": 20, "next-mistral": 30, "next-qwen2": 15}
# What each is exported for: all of next-llama's, which by the nesting of the picks serves every smaller K.
EXPORTED = KEPT | {"next-llama": 88}
SIZES = [(60, 50), (32, 32), (20, 110), (180, 30), (1, 40), (300, 1), (64, 63)]


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST)


def check(answer, expected) -> None:
    assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
    assert [picks.kept_indices.tolist() for picks in answer.images] == [
        sorted(order) for order in expected.pick_orders
    ]
    assert [picks.kept_counts.tolist() for picks in answer.images] == expected.kept_counts
    assert answer.token_ids == expected.token_ids
    assert len(answer.token_ids) == STEPS or answer.token_ids[-1] == 2


def expect(hugging_face: HuggingFace, answer, pictures, k: int, positions: str = "contiguous", **how):
    ids, text = answer.prompt.ids, answer.prompt.text_token_ids
    return hugging_face.pruned(pictures, ids, text, k=k, positions=positions, steps=STEPS, **how)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
@pytest.mark.parametrize("variant", KEPT)
def test_same_picks_and_tokens(variant, positions, tiny_bundle, hugging_face, tmp_path):
    k = KEPT[variant]
    made = tiny_bundle(variant, k=EXPORTED[variant], split=variant == "next-llama")
    answers = []
    with Pipeline.load(with_positions(made, tmp_path / "bundle", positions)) as vlm:
        assert vlm.manifest.selection.num_tokens is None
        assert vlm.manifest.selection.max_tokens == 88
        for seed, size in enumerate(SIZES):
            shown = picture(seed, size)
            answers.append(vlm.ask(shown, QUESTION, tokens=k, max_new_tokens=STEPS, stream=False))
            check(answers[-1], expect(hugging_face(variant), answers[-1], [shown], k, positions))
    assert len(set(answers[0].token_ids)) > 5, "a model that repeats itself shows nothing"
    assert len({tuple(answer.token_ids) for answer in answers}) == len(SIZES)


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_proportional_attention(positions, tiny_bundle, hugging_face, tmp_path):
    """Of pictures with fewer tokens than K and with more, in one batch; newline rows count, padding does not."""
    made = tiny_bundle("next-mistral", k=60, attention="proportional", split=True)
    shown = [[picture(seed, size)] for seed, size in enumerate(SIZES)]
    shown.append([picture(8, (1, 40)), picture(9, (60, 50))])
    unlike_plain = 0
    with Pipeline.load(with_positions(made, tmp_path / "bundle", positions)) as vlm:
        for tokens in (9, 60):
            answers = vlm.ask_batch(shown, [QUESTION] * len(shown), tokens=tokens, max_new_tokens=STEPS)
            answers.append(vlm.look(shown[-1]).ask(OTHER, tokens=tokens, max_new_tokens=STEPS))
            for answer, pictures in zip(answers, [*shown, shown[-1]], strict=True):
                rest = (answer, pictures, tokens, positions)
                check(answer, expect(hugging_face("next-mistral"), *rest, proportional=True))
                unlike_plain += expect(hugging_face("next-mistral"), *rest).token_ids != answer.token_ids
        counts = [len(vlm._walk.preprocessor(of_one).offsets) for of_one in shown[-1]]
    assert [sum(picks.kept_counts) for picks in answers[-1].images] == counts
    assert counts[0] < 60 < counts[1]
    assert unlike_plain, "else plain attention would have passed as well"


def test_newline_rows_are_candidates(tiny_bundle):
    """Of a picture that all tokens are kept of, the rows' ends too."""
    with Pipeline.load(tiny_bundle("next-llama", k=88, split=True)) as vlm:
        picks = vlm.ask(picture(1, (60, 50)), QUESTION, max_new_tokens=1).images[0]
        nowhere = [index for index, box in enumerate(vlm._walk.preprocessor.boxes((60, 50))) if box is None]
    assert nowhere
    assert set(nowhere) <= set(picks.kept_indices.tolist())


def test_ask_draws_the_kept_tokens_of_tiles_and_of_the_whole_view(tiny_bundle, tmp_path):
    picture(1, (180, 60)).save(tmp_path / "wide.png")
    bundle, shown = tiny_bundle("next-llama", k=88, split=True), tmp_path / "kept.png"
    arguments = ["ask", str(bundle), str(tmp_path / "wide.png"), QUESTION, "--show", str(shown)]
    assert main([*arguments, "--tokens", "12", "--max-new-tokens", "1"]) == 0
    with Pipeline.load(bundle) as vlm:
        picks = vlm.ask(tmp_path / "wide.png", QUESTION, tokens=12, max_new_tokens=1).images[0]
        boxes = vlm.boxes((180, 60))
    assert min(picks.kept_indices) < 16 <= max(picks.kept_indices), "of the whole view and of the tiles"
    drawn, (width, height) = Image.open(shown), panel_size((180, 60), boxes)
    assert drawn.width == width + 2 * MARGIN, "a thin image has its panels one above the other"
    for place, index in reversed([*enumerate(picks.pick_order.tolist())]):
        if boxes[index] is not None:
            left, _, _, bottom = boxes[index]
            corner = (
                MARGIN + round(left * width / 180),
                MARGIN + height + GAP + round(bottom * height / 60) - 1,
            )
            if place == 0:
                assert drawn.getpixel(corner) == pick_color(0, 12), "no later pick hides the first"
            assert drawn.getpixel(corner) in {pick_color(earlier, 12) for earlier in range(place + 1)}


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_two_pictures_of_different_size_in_one_prompt(positions, tiny_bundle, hugging_face, tmp_path):
    pictures = [picture(2, (180, 30)), picture(3, (32, 32))]
    made = tiny_bundle("next-llama", k=88, split=True)
    with Pipeline.load(with_positions(made, tmp_path / "bundle", positions)) as vlm:
        for answer in (
            vlm.ask(pictures, QUESTION, tokens=20, max_new_tokens=STEPS, stream=False),
            vlm.look(pictures).ask(QUESTION, tokens=20, max_new_tokens=STEPS, stream=False),
        ):
            check(answer, expect(hugging_face("next-llama"), answer, pictures, 20, positions))


def test_batch(tiny_bundle, hugging_face):
    """Questions of different length about pictures with different numbers of tiles and tokens, one of them two."""
    questions = [QUESTION, OTHER, OTHER]
    pictures = [[picture(4, (20, 110))], [picture(5, (60, 50)), picture(6, (1, 40))], [picture(7, (32, 32))]]
    with Pipeline.load(tiny_bundle("next-mistral", k=30)) as vlm:
        answers = vlm.ask_batch(pictures, questions, max_new_tokens=STEPS)
    for answer, shown in zip(answers, pictures, strict=True):
        check(answer, expect(hugging_face("next-mistral"), answer, shown, 30))


@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_everything_kept_is_plain_llava_next(positions, tiny_checkpoint, tiny_bundle, hugging_face, tmp_path):
    """K = N for every size: the largest N is exported, and a picture with fewer tokens keeps what it has."""
    bundle = with_positions(tiny_bundle("next-llama", k=88, split=True), tmp_path / "bundle", positions)
    processor = AutoProcessor.from_pretrained(tiny_checkpoint("next-llama"))
    image_token_id = hugging_face("next-llama").model.config.image_token_id
    with Pipeline.load(bundle) as vlm:
        for shown in [[picture(8, size)] for size in SIZES] + [[picture(1, (32, 32)), picture(2, (200, 99))]]:
            answer = vlm.ask(shown, QUESTION, max_new_tokens=STEPS, stream=False)
            counts = [len(picks.kept_indices) for picks in answer.images]
            for picks, count in zip(answer.images, counts, strict=True):
                assert picks.kept_indices.tolist() == list(range(count))
            expected = hugging_face("next-llama").unpruned(shown, answer.prompt.ids, steps=STEPS)
            assert answer.token_ids == expected[: len(answer.token_ids)]
            theirs = processor(text=answer.prompt.text, images=shown, add_special_tokens=False)["input_ids"][
                0
            ]
            assert theirs.count(image_token_id) == sum(counts)
            assert [i for i in theirs if i != image_token_id] == [
                i for i in answer.prompt.ids if i != image_token_id
            ]


def test_split_bundle_answers_as_the_fused_one(tiny_bundle, hugging_face):
    with Pipeline.load(tiny_bundle("next-llama", k=88, split=True)) as vlm:
        for seed, size in enumerate(SIZES):
            shown = picture(seed, size)
            view = vlm.look(shown)
            for question in (QUESTION, OTHER):
                apart = view.ask(question, tokens=20, max_new_tokens=STEPS, stream=False)
                fused = vlm.ask(shown, question, tokens=20, max_new_tokens=STEPS, stream=False)
                assert apart.images[0].pick_order.tolist() == fused.images[0].pick_order.tolist()
                assert apart.token_ids == fused.token_ids
            check(apart, expect(hugging_face("next-llama"), apart, [shown], 20))


def test_a_share_is_of_the_tokens_the_picture_has(tiny_bundle, hugging_face, tmp_path):
    copy = Path(shutil.copytree(tiny_bundle("next-llama", k=88, split=True), tmp_path / "bundle"))
    manifest = read_bundle(copy).manifest
    selection = dataclasses.replace(manifest.selection, share=0.25)
    write_manifest(copy, dataclasses.replace(manifest, selection=selection))
    with Pipeline.load(copy) as vlm:
        pictures = [picture(seed, size) for seed, size in enumerate(SIZES)]
        answers = vlm.ask_batch(pictures, [QUESTION] * len(pictures), max_new_tokens=STEPS)
        counts = {len(vlm._walk.preprocessor(shown).offsets) for shown in pictures}
        assert len(counts) > 3
        for shown, answer in zip(pictures, answers, strict=True):
            k = -(-len(vlm._walk.preprocessor(shown).offsets) // 4)
            check(answer, expect(hugging_face("next-llama"), answer, [shown], k))


def test_half_precision_and_its_loss(tiny_bundle, hugging_face):
    bundle = tiny_bundle("next-qwen2", k=15, dtype="fp16")
    outputs = read_bundle(bundle).manifest.parity["outputs"]["vision_select_fp16"]
    assert 0 < outputs["image_features"]["max_diff"] < 0.05 * outputs["image_features"]["scale"]
    with Pipeline.load(bundle) as vlm:
        for seed, size in enumerate(SIZES):
            shown = picture(seed, size)
            answer = vlm.ask(shown, QUESTION, max_new_tokens=STEPS, stream=False)
            expected = expect(hugging_face("next-qwen2"), answer, [shown], 15)
            assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
            assert answer.token_ids[:16] == expected.token_ids[:16]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("next-llama", {"k": 88, "split": True}),
        ("next-mistral", {"k": 60, "attention": "proportional", "split": True}),
        ("next-qwen2", {"k": 15, "dtype": "fp16"}),
    ],
)
def test_every_graph_is_of_standard_operators(variant, options, tiny_bundle):
    for used in domains(read_bundle(tiny_bundle(variant, **options))).values():
        assert used <= PORTABLE


@pytest.mark.parametrize(
    ("files", "k", "said"),
    [
        ({}, 89, "-k 89 is more than the at most 88 visual tokens"),
        ({}, 0, "k should be a whole number from 1, not 0"),
        ({"config": {"image_grid_pinpoints": [[32, 64]]}}, 4, "image_grid_pinpoints differ"),
        ({"preprocessor_config": {"image_grid_pinpoints": [[32, 65]]}}, 4, "multiples of the tile's 32"),
        (
            {"preprocessor_config": {"image_processor_type": "CLIPImageProcessor"}},
            4,
            "LlavaNextImageProcessor",
        ),
        ({"preprocessor_config": {"crop_size": {"height": 16, "width": 16}}}, 4, "tiles of 16"),
        ({"config": {"vision_feature_select_strategy": "full"}}, 4, "17 rows a tile"),
        ({"config": {"vision_feature_layer": 9}}, 4, "does not fit its vision tower"),
        ({"config": {"text_config.model_type": "gemma"}}, 4, "supported are llama, mistral, qwen2"),
        ({"config": {"model_type": "llava_next_video"}}, 4, "LLaVA-NeXT"),
    ],
)
def test_wrong_checkpoints_are_refused(files, k, said, tiny_checkpoint, tmp_path):
    model = changed(tiny_checkpoint("next-llama"), tmp_path / "checkpoint", **files)
    with pytest.raises(ResPruneError, match=said) as caught:
        export(model, tmp_path / "bundle", Options(k=k))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_newline_weight_is_named(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    root = Path(changed(tiny_checkpoint("next-llama"), tmp_path / "checkpoint"))
    weights = load_file(root / "model.safetensors")
    newline = next(name for name in weights if "image_newline" in name)
    del weights[newline]
    save_file(weights, root / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResPruneError, match=r"missing \(model.image_newline\)"):
        export(str(root), tmp_path / "bundle", Options(k=4))
