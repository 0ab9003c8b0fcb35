"""A Qwen3-VL bundle answers as Hugging Face does, its DeepStack planes and interleaved M-RoPE included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from resprune.exporter.families.qwen3_vl import recomposed
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.families.qwen2_vl import Grid
from resprune.runtime.families.qwen3_vl import position_taps
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS
from tests.exporter.hugging_face_qwen import check, picture
from tests.exporter.portable import PORTABLE, domains
from tests.runtime.pipelines import OTHER, QUESTION

# Heights and widths in blocks of 10 pixels: enlarged, shrunk, long and thin.
SIZES = [(5, 7), (12, 3), (2, 17), (8, 10), (1, 9), (30, 30)]
VARIANTS = ("qwen3", "qwen3-tied")


def whole(tiny_bundle: Callable[..., Path], variant: str) -> Path:
    return tiny_bundle(variant, share=1.0, split=True)


@pytest.mark.parametrize(
    ("sections", "width"), [([24, 20, 20], 128), ([2, 3, 3], 16), ([8, 4, 4], 40), ([0, 9, 2], 16)]
)
def test_axes_are_mixed_as_theirs_are(sections, width):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    rotary = Qwen3VLTextRotaryEmbedding(Qwen3VLTextConfig(head_dim=width, rope_parameters=rope))
    values = torch.randn(3, 2, 7, width // 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(recomposed(sections, values), rotary.recomposition_frequencies(values.clone()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_picks_and_tokens(variant, tiny_bundle, hugging_face):
    with Pipeline.load(whole(tiny_bundle, variant)) as vlm:
        for size in SIZES:
            answer = vlm.ask(picture(*size), QUESTION, tokens=5, max_new_tokens=STEPS, stream=False)
            check(answer, hugging_face(variant), [picture(*size)], [5])


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_kept_is_the_plain_model(variant, tiny_bundle, hugging_face):
    model = hugging_face(variant)
    with Pipeline.load(whole(tiny_bundle, variant)) as vlm:
        for shown in [[picture(*size)] for size in SIZES] + [[picture(12, 3), picture(2, 17)]]:
            answer = vlm.ask(shown, QUESTION, max_new_tokens=STEPS, stream=False)
            assert [len(picks.kept_indices) for picks in answer.images] == model.num_tokens(shown)
            assert answer.token_ids == model.unpruned(shown, answer.prompt.ids, steps=STEPS)


def test_without_its_planes_the_answer_is_another(tiny_bundle, hugging_face):
    """What an exporter that drops DeepStack loses."""
    unlike = 0
    with Pipeline.load(whole(tiny_bundle, "qwen3")) as vlm:
        for size in SIZES:
            answer = vlm.ask(picture(*size), QUESTION, tokens=5, max_new_tokens=STEPS, stream=False)
            ids, text = answer.prompt.ids, answer.prompt.text_token_ids
            flat = hugging_face("qwen3").pruned(
                [picture(*size)], ids, text, budgets=[5], steps=STEPS, with_planes=False
            )
            assert [picks.pick_order.tolist() for picks in answer.images] == flat.pick_orders
            unlike += answer.token_ids != flat.token_ids
    assert unlike == len(SIZES)


def test_views_batches_and_several_images(tiny_bundle, hugging_face):
    shown = [[picture(5, 7)], [picture(2, 17), picture(6, 6)]]
    with Pipeline.load(whole(tiny_bundle, "qwen3-tied")) as vlm:
        answers = vlm.ask_batch(shown, [QUESTION, OTHER], tokens=6, max_new_tokens=STEPS)
        view = vlm.look(shown[1])
        chat = view.chat()
        answers += [view.ask(QUESTION, tokens=6, max_new_tokens=STEPS, stream=False)]
        for question in (OTHER, QUESTION):
            answers.append(chat.ask(question, tokens=6, max_new_tokens=STEPS, stream=False))
    for answer, images in zip(answers, [*shown, *[shown[1]] * 3], strict=True):
        check(answer, hugging_face("qwen3-tied"), images, [6] * len(images))


@pytest.mark.parametrize(
    "options",
    [{"k": 9, "optimize": "ort"}, {"k": 9, "attention": "proportional"}],
    ids=["ort", "proportional"],
)
def test_other_decoders(options, tiny_bundle, hugging_face):
    proportional = options.get("attention") == "proportional"
    with Pipeline.load(tiny_bundle("qwen3", **options)) as vlm:
        for size in SIZES:
            answer = vlm.ask(picture(*size), QUESTION, tokens=6, max_new_tokens=STEPS, stream=False)
            check(answer, hugging_face("qwen3"), [picture(*size)], [6], proportional=proportional)


def test_half_precision(tiny_bundle, hugging_face):
    with Pipeline.load(tiny_bundle("qwen3", k=6, dtype="fp16")) as vlm:
        for size in SIZES[:3]:
            answer = vlm.ask(picture(*size), QUESTION, max_new_tokens=STEPS, stream=False)
            ids, text = answer.prompt.ids, answer.prompt.text_token_ids
            expected = hugging_face("qwen3").pruned([picture(*size)], ids, text, budgets=[6], steps=STEPS)
            assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
            assert answer.token_ids[:8] == expected.token_ids[:8]


def test_planes_are_in_the_manifest_and_the_graphs_are_portable(tiny_bundle, tmp_path):
    bundle = read_bundle(whole(tiny_bundle, "qwen3"))
    graphs = bundle.manifest.graphs
    for graph, outputs in (
        ("vision_encoder", ["image_features", "plane_features.0", "plane_features.1"]),
        (
            "vision_select",
            ["image_features", "kept_indices", "pick_order", "plane_features.0", "plane_features.1"],
        ),
        ("token_select", ["kept_features", "kept_indices", "kept_planes.0", "kept_planes.1", "pick_order"]),
    ):
        assert sorted(tensor.name for tensor in graphs[graph].outputs) == outputs
    names = [tensor.name for tensor in graphs["decoder_model_merged"].inputs]
    assert {"plane_embeds.0", "plane_embeds.1"} <= set(names)
    for used in domains(bundle).values():
        assert used <= PORTABLE
    shown, drawn = tmp_path / "image.png", tmp_path / "kept.png"
    Image.fromarray(picture(8, 10)).save(shown)
    words = ["ask", str(bundle.root), str(shown), QUESTION, "--tokens", "5", "--show", str(drawn)]
    assert main([*words, "--max-new-tokens", "1"]) == 0
    assert drawn.stat().st_size


@pytest.mark.parametrize("grid", [(2, 2), (2, 14), (30, 4), (48, 48), (62, 100)])
@pytest.mark.parametrize("side", [1, 6, 48])
def test_learned_positions_are_interpolated_as_transformers_does(grid, side):
    ours: tuple[Any, Any] = position_taps(Grid(*grid, 2), side)
    theirs = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]), side, align_corners=True, spatial_merge_size=2
    )
    for our, their in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(our, their.numpy())
