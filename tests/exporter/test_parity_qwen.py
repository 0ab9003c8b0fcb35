"""Qwen2.5-VL and Qwen2-VL: a bundle, run by the runtime, answers as Hugging Face does; positions are M-RoPE's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.export import export
from resprune.exporter.families import qwen2_vl as qwen2_5_vl
from resprune.exporter.options import Options
from resprune.exporter.trace import precision
from resprune.method import share_of
from resprune.runtime.backends.onnxruntime import OrtSequence
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.pipeline import Pipeline
from tests.exporter.hugging_face import STEPS
from tests.exporter.hugging_face_qwen import check, picture
from tests.exporter.portable import PORTABLE, domains
from tests.runtime.pipelines import OTHER, QUESTION
from tests.tiny_qwen import SPECIAL, TinyQwen, make_model

# Heights and widths in blocks of 10 pixels: more and fewer than a window, cut windows, long and thin, enlarged.
SIZES = [(5, 7), (12, 3), (2, 17), (8, 10), (1, 9)]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    return tiny_checkpoint


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[..., Path]) -> Callable[..., Path]:
    return tiny_bundle


def whole(bundle: Callable[..., Path]) -> Path:
    """The bundle that can keep everything, with the encoder and the selector apart as well."""
    return bundle("qwen25", share=1.0, split=True)


@pytest.mark.parametrize("size", SIZES)
def test_same_picks_and_tokens(size, bundle, hugging_face):
    with Pipeline.load(whole(bundle)) as vlm:
        answer = vlm.ask(picture(*size), QUESTION, tokens=5, max_new_tokens=STEPS, stream=False)
    check(answer, hugging_face("qwen25"), [picture(*size)], [5])


@pytest.mark.parametrize("size", SIZES)
def test_everything_kept_is_the_plain_model(size, bundle, hugging_face):
    with Pipeline.load(whole(bundle)) as vlm:
        answer = vlm.ask(picture(*size), QUESTION, max_new_tokens=STEPS, stream=False)
    model = hugging_face("qwen25")
    (count,) = model.num_tokens([picture(*size)])
    assert answer.images[0].kept_indices.tolist() == list(range(count))
    assert answer.token_ids == model.unpruned([picture(*size)], answer.prompt.ids, steps=STEPS)


def test_two_pictures_each_with_its_grid(bundle, hugging_face):
    pictures = [picture(12, 3), picture(2, 17)]
    with Pipeline.load(whole(bundle)) as vlm:
        everything = vlm.ask(pictures, QUESTION, max_new_tokens=STEPS, stream=False)
        pruned = vlm.ask(pictures, QUESTION, tokens=4, max_new_tokens=STEPS, stream=False)
    model = hugging_face("qwen25")
    assert len(set(model.num_tokens(pictures))) == 2
    check(pruned, model, pictures, [4, 4])
    assert everything.token_ids == model.unpruned(pictures, everything.prompt.ids, steps=STEPS)


def test_batch(bundle, hugging_face):
    """Questions of different length about different grids: the shorter prompt is padded on the left."""
    pictures = [[picture(5, 7)], [picture(2, 17), picture(6, 6)]]
    with Pipeline.load(whole(bundle)) as vlm:
        answers = vlm.ask_batch(pictures, [QUESTION, OTHER], tokens=6, max_new_tokens=STEPS)
    assert len(answers[0].prompt.ids) != len(answers[1].prompt.ids)
    for answer, shown in zip(answers, pictures, strict=True):
        check(answer, hugging_face("qwen25"), shown, [6] * len(shown))


def test_the_split_graphs_answer_as_the_fused_one(bundle, hugging_face):
    pictures = [picture(5, 7), picture(8, 10)]
    with Pipeline.load(whole(bundle)) as vlm:
        view = vlm.look(pictures)
        for question in (QUESTION, OTHER):
            answer = view.ask(question, tokens=5, max_new_tokens=STEPS, stream=False)
            check(answer, hugging_face("qwen25"), pictures, [5, 5])


def test_a_share_is_of_each_picture(bundle, hugging_face):
    """Other windows, one full block, tied embeddings, bfloat16 on disk; the graph's K is the share of the largest."""
    path = bundle("qwen25-wide", share=0.11)
    selection = read_bundle(path).manifest.selection
    assert selection.k == share_of(0.11, selection.max_tokens)
    pictures = [picture(5, 7), picture(2, 17), picture(3, 3)]
    with Pipeline.load(path) as vlm:
        answer = vlm.ask(pictures, QUESTION, max_new_tokens=STEPS, stream=False)
    model = hugging_face("qwen25-wide")
    counts = model.num_tokens(pictures)
    assert len(set(counts)) == 3
    check(answer, model, pictures, [share_of(0.11, count) for count in counts])


def test_proportional_attention(bundle, hugging_face):
    """A share of each picture, and fewer; one and two pictures at once; fused and apart."""
    path = bundle("qwen25", share=0.3, split=True, attention="proportional")
    shown = [[picture(5, 7)], [picture(2, 17), picture(6, 6)]]
    model = hugging_face("qwen25")
    unlike_plain = 0
    with Pipeline.load(path) as vlm:
        for tokens in (None, 3):
            answers = vlm.ask_batch(shown, [QUESTION, OTHER], tokens=tokens, max_new_tokens=STEPS)
            answers.append(vlm.look(shown[1]).ask(OTHER, tokens=tokens, max_new_tokens=STEPS))
            for answer, pictures in zip(answers, [*shown, shown[1]], strict=True):
                counts = model.num_tokens(pictures)
                budgets = [tokens or share_of(0.3, count) for count in counts]
                check(answer, model, pictures, budgets, proportional=True)
                assert [sum(picks.kept_counts) for picks in answer.images] == counts
                prompt = (pictures, answer.prompt.ids, answer.prompt.text_token_ids)
                plain = model.pruned(*prompt, budgets=budgets, steps=STEPS)
                unlike_plain += plain.token_ids != answer.token_ids
    assert unlike_plain, "else plain attention would have passed as well"


def test_qwen2_vl_is_the_same_without_windows(bundle, hugging_face):
    path = bundle("qwen2", k=9, max_pixels=40 * 14 * 14, split=True)
    manifest = read_bundle(path).manifest
    assert (manifest.family, manifest.selection.max_tokens) == (
        "qwen2_vl",
        89,
    )  # a thin image: 1 x √(40 · 200)
    names = [spec.name for spec in manifest.graphs["vision_select"].inputs]
    assert names == ["pixel_values", "patch_positions", "text_embeds", "text_mask"]
    with Pipeline.load(path) as vlm:
        one = vlm.ask(picture(5, 7), QUESTION, max_new_tokens=STEPS, stream=False)
        two = vlm.ask([picture(6, 6), picture(1, 9)], QUESTION, max_new_tokens=STEPS, stream=False)
        large = vlm.ask(picture(30, 30), QUESTION, max_new_tokens=1, stream=False)
    check(one, hugging_face("qwen2"), [picture(5, 7)], [9])
    check(two, hugging_face("qwen2"), [picture(6, 6), picture(1, 9)], [9, 9])
    assert large.images[0].kept_indices.max() < 40


def test_half_precision_and_its_loss(bundle, hugging_face):
    path = bundle("qwen25", k=6, dtype="fp16")
    figures = read_bundle(path).manifest.parity["outputs"]["vision_select_fp16"]["image_features"]
    assert 0 < figures["max_diff"] < 0.05 * figures["scale"]
    with Pipeline.load(path) as vlm:
        for size in SIZES:
            answer = vlm.ask(picture(*size), QUESTION, max_new_tokens=STEPS, stream=False)
            ids, text = answer.prompt.ids, answer.prompt.text_token_ids
            expected = hugging_face("qwen25").pruned([picture(*size)], ids, text, budgets=[6], steps=STEPS)
            assert [picks.pick_order.tolist() for picks in answer.images] == expected.pick_orders
            assert answer.token_ids[:16] == expected.token_ids[:16]


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("qwen25", {"share": 1.0, "split": True}),
        ("qwen25", {"share": 0.3, "split": True, "attention": "proportional"}),
        ("qwen25", {"k": 6, "dtype": "fp16"}),
        ("qwen2", {"k": 9, "max_pixels": 40 * 14 * 14, "split": True}),
    ],
)
def test_every_graph_is_of_standard_operators(variant, options, bundle):
    for used in domains(read_bundle(bundle(variant, **options))).values():
        assert used <= PORTABLE


def test_half_precision_stands_activations_past_its_range(bundle, hugging_face):
    """Products of 10⁵ inside the MLPs, as in the real towers, which a plain half product turns into infinities."""
    path = bundle("outliers", k=6, dtype="fp16", split=True)
    figures = read_bundle(path).manifest.parity["outputs"]["vision_encoder_fp16"]["image_features"]
    assert figures["max_diff"] < 0.02 * figures["scale"]
    with Pipeline.load(path) as vlm:
        ours = vlm.look(picture(8, 10))
        answer = ours.ask(QUESTION, max_new_tokens=4, stream=False)
    theirs = hugging_face("outliers").features([picture(8, 10)])[0]
    got = torch.from_numpy(ours._encoded[0].tokens.rows)
    cosine = nn.functional.cosine_similarity(got.flatten(), theirs.flatten(), dim=0)
    assert cosine > 0.999
    assert len(answer.images[0].kept_indices) == 6


def test_a_plain_half_product_overflows_and_a_scaled_one_does_not():
    mode = fake_mode()
    layer: Any = nn.Sequential(nn.Linear(8, 4))
    weight = torch.full((4, 8), 0.5)
    rows = torch.tensor([[3e5, 1.0], [7e4, 7e4], [1e-3, 0.0], [0.0, 0.0]]).repeat(1, 4)
    precision.lower(layer, torch.float16, mode)
    layer[0].weight, layer[0].bias = nn.Parameter(weight.half()), None
    assert not layer(rows).isfinite().all()
    precision.scale_outliers(layer)
    torch.testing.assert_close(layer(rows), rows @ weight.T, rtol=1e-3, atol=0)


def test_kept_tokens_keep_their_places(bundle, monkeypatch):
    """(t, h, w) of what is left, the text after the picture where it was, and decoding from there."""
    with Pipeline.load(whole(bundle)) as vlm:
        seen: list[Any] = []
        run = OrtSequence._run

        def recorded(self, *inputs):
            seen.append(self._place.position_ids)
            return run(self, *inputs)

        monkeypatch.setattr(OrtSequence, "_run", recorded)
        answer = vlm.ask(picture(2, 17), QUESTION, tokens=3, max_new_tokens=3, stream=False)
    rows, columns = vlm._walk.preprocessor.grid((170, 20)).merged
    first = answer.prompt.ids.index(vlm.manifest.image_token_id)
    kept = answer.images[0].kept_indices
    in_picture = seen[0][:, 0, first : first + 3]
    np.testing.assert_array_equal(in_picture, first + np.stack([0 * kept, kept // columns, kept % columns]))
    after = len(answer.prompt.ids) - first - 1
    text = first + max(rows, columns) + np.arange(after)
    np.testing.assert_array_equal(seen[0][:, 0, first + 3 :], np.stack([text] * 3))
    steps = [positions[:, 0].tolist() for positions in seen[1:]]
    assert steps == [[[text[-1] + 1]] * 3, [[text[-1] + 2]] * 3]


def test_contiguous_positions_are_refused(checkpoint, tmp_path):
    with pytest.raises(ResPruneError, match=r"Qwen2\.5-VL allows --positions original, not contiguous"):
        export(str(checkpoint("qwen25")), tmp_path / "out", Options(k=7, positions="contiguous"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("k", "words"),
    [
        ("0%", "'0%' is no number of tokens to keep"),
        ("-5%", "'-5%' is no number of tokens to keep"),
        ("101%", "'101%' is no number of tokens to keep"),
        ("110", "-k 110 is more than the at most 109 visual tokens"),
        ("0", "'0' is no number of tokens to keep"),
    ],
)
def test_a_budget_that_keeps_nothing_or_too_much_is_refused(k, words, checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint("qwen25")), str(tmp_path / "out"), f"-k={k}"]) == 2
    assert words in capsys.readouterr().err


def test_max_pixels_is_refused_where_it_means_nothing(checkpoint, tiny_checkpoint, tmp_path):
    with pytest.raises(ResPruneError, match="leave out --max-pixels"):
        export(str(tiny_checkpoint("clip-llama")), tmp_path / "out", Options(k=4, max_pixels=10_000))
    with pytest.raises(ResPruneError, match="max_pixels 100 is below min_pixels 784"):
        export(str(checkpoint("qwen25")), tmp_path / "out", Options(k=4, max_pixels=100))
    with pytest.raises(ResPruneError, match="max_pixels should be 1 to "):
        export(str(checkpoint("qwen25")), tmp_path / "out", Options(k=4, max_pixels=0))


def test_the_thinnest_picture_there_may_be_is_answered(bundle):
    """The limit is what the processor can really give, so no picture is past it."""
    with Pipeline.load(whole(bundle)) as vlm:
        answer = vlm.ask(np.zeros((10, 2000, 3), np.uint8), QUESTION, max_new_tokens=1)
        assert len(answer.images[0].kept_indices) <= vlm.manifest.selection.max_tokens
        with pytest.raises(ResPruneError, match="too long and thin"):
            vlm.ask(np.zeros((10, 2001, 3), np.uint8), QUESTION)


def test_a_processor_of_another_model_is_refused(checkpoint, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("qwen25"), other)
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(config | {"patch_size": 14}))
    with pytest.raises(ResPruneError, match="has patch_size 14 and its vision tower 7"):
        export(str(other), tmp_path / "out", Options(k=4))


def test_a_tower_without_blocks_is_refused(checkpoint, tmp_path):
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("qwen25"), other)
    config = json.loads((other / "config.json").read_text())
    config["vision_config"]["depth"] = 0
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ResPruneError, match="is not a valid qwen2_5_vl config"):
        export(str(other), tmp_path / "out", Options(k=4))


class LargestTensor(torch.overrides.TorchFunctionMode):
    """Watches how many numbers the largest result of any operation has."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize(("full_blocks", "least", "most"), [((), 1.0, 2.0), ((1,), 3.0, 4.0)])
def test_nothing_in_a_windowed_block_grows_with_the_square_of_the_patches(full_blocks, least, most):
    """15 and 27 rows of merged tokens: 1.8 times the patches, whose square a full block alone needs."""
    model = make_model(TinyQwen(full_blocks=full_blocks), 500, dict.fromkeys(SPECIAL, 1))
    component = qwen2_5_vl._vision_component(model, model.config, torch.float32)
    sizes = []
    for rows in (12, 24):
        inputs = component.samples({"batch_size": rows}, torch.Generator())
        with torch.no_grad(), LargestTensor() as watch:
            component.module(*inputs)
        sizes.append(watch.size)
    assert least < sizes[1] / sizes[0] < most
