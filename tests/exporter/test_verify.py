"""What counts as a miss."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from resprune.exporter.checkpoint.checkpoint import resolve
from resprune.exporter.checkpoint.weightless import fake_mode
from resprune.exporter.families import split_model
from resprune.exporter.language import proportional
from resprune.exporter.trace.weights import find_weights
from resprune.exporter.verify import ort_worker, question
from resprune.exporter.verify import verifier as verify
from resprune.exporter.verify.difference import (
    Difference,
    ParityError,
    difference,
    equal_tokens,
    nearest,
    require,
    text_difference,
    verdict,
)
from resprune.exporter.verify.reference import keep, kept_counts
from resprune.exporter.verify.verifier import SEEDS, Verifier
from resprune.method import Selection
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.precisions import TABLE, parse_dtype
from resprune.runtime.prompt.splice import Spliced

FP32, TEXT = parse_dtype("fp32"), torch.arange(30)


def test_nan_is_a_miss():
    nan = Difference("graph", "output", float("nan"), 1.0, 1e-4)
    with pytest.raises(ParityError, match="nan"):
        require([nan], {}, exact=[])
    with pytest.raises(ParityError, match="63 of 64 equal"):
        require([], {"picks": (63, 64)}, exact=["picks"])
    require([Difference("graph", "output", np.inf, 1.0, np.inf)], {"picks": (63, 64)}, exact=[])


def test_a_graph_that_loses_three_quarters_of_an_output_fails_in_every_precision():
    want = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    for row in TABLE.values():
        assert difference("graph", "logits", want.numpy(), want, row).within, row.word
        bad = difference("graph", "logits", (want + 0.75 * noise).numpy(), want, replace(row, atol=9))
        assert 2 < bad.snr < 3
        with pytest.raises(ParityError, match=r"dB  <-"):
            require([bad], {}, exact=[])
        with pytest.raises(ParityError, match=r"text positions +\d+ of 256 equal  <-"):
            require([], {"text positions": (20, 256)}, exact=[], least={"text positions": row.agreement})


def test_one_logit_of_a_text_that_is_off_fails_in_fp32_and_fp16():
    """Of 256 positions one is off by 10 times the atol: an SNR of the whole hardly shows it."""
    want = torch.randn(256, 300, generator=torch.Generator().manual_seed(0)) * 8
    for row in TABLE.values():
        off = want.clone()
        off[99, 7] += 10 * row.atol * float(want.abs().max())
        found = text_difference("decoder", off.numpy(), want, replace(row, snr=0))
        assert found.within == (row.word not in ("fp32", "fp16")), row.word
        assert ("(atol" in found.words) != found.within


def test_fp32_text_that_is_off_by_a_thousandth_fails():
    want = torch.randn(256, 300, generator=torch.Generator().manual_seed(0)) * 8
    off = (want + 1e-3 * want.abs().max()).numpy()
    with pytest.raises(ParityError, match=r"logits of text .*<-"):
        require([text_difference("decoder", off, want, TABLE["fp32"])], {}, exact=[])


def test_what_is_nearest_to_its_bound_is_named():
    by_noise = Difference("graph", "noisy", 0.1, 1.0, 1.0, snr=10, least_snr=8)
    by_size = Difference("graph", "far", 0.9, 1.0, 1.0, snr=30, least_snr=8)
    past = Difference("graph", "not a number", float("nan"), 1.0, 1.0)
    assert by_noise.words == "max diff 1.0e-01, SNR 10 dB (at least 8)"
    assert by_size.words == "max diff 9.0e-01 (atol 1e+00), SNR 30 dB"
    assert nearest([by_noise, by_size]) is by_size
    assert nearest([by_noise, by_size, past]) is past


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ([], "word for word"),
        ([7], "mostly the same words"),
        ([0], "mostly the same words"),
        (range(1), "mostly the same words"),
        (range(14, 32), "the first 14 alike, then other words"),
        ([1, *range(15, 32)], "the first 1 alike, then other words"),
        (range(18), "another answer"),
        (range(32), "another answer"),
    ],
)
def test_two_answers_have_a_verdict(other: Iterable[int], says: str):
    """`other` are the places of 32 where they differ."""
    wanted = list(range(32))
    got = [-1 if place in other else token for place, token in enumerate(wanted)]
    assert verdict(got, wanted) == says
    assert equal_tokens(got, wanted) == (32 - len(list(other)), 32)


def test_what_is_prepared_is_not_computed_again(
    tiny_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    """And what ONNX Runtime returns, here zeros, is compared with it all the same."""
    checkpoint, mode = resolve(str(tiny_checkpoint("clip-llama"))), fake_mode()
    components = split_model(checkpoint, torch.float32, mode)
    verifier = Verifier(components, find_weights(checkpoint, components.model), FP32, TEXT, whole=False)
    selection = Selection(k=5, num_tokens=16)
    verifier.prepare(selection)
    monkeypatch.delattr(question, "select")
    for name in ("reference_of", "blank"):
        monkeypatch.delattr(verify, name)
    zeros = dict.fromkeys(("pick_order", "kept_indices"), np.zeros((1, 5), np.int64))
    zeros["image_features"] = np.zeros((1, 5, components.vision.outputs[0].shape[2]), np.float32)
    monkeypatch.setattr(verify, "SEEDS", SEEDS[:1])
    worker = SimpleNamespace(run=lambda graph, inputs: zeros)
    (features,), counted = verifier.compare_selection(worker, Path("vision_select.onnx"), selection)
    assert not features.within
    assert counted["picks"][0] < 5
    assert verifier._wanted_layers[0] == [0, 1]


def test_the_runtime_splices_the_prompt_of_the_graphs(
    tiny_bundle: Callable[..., Path],
    tiny_checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
):
    """So that an export proves that too: what it puts together wrongly gets another answer than PyTorch's."""
    bundle = read_bundle(tiny_bundle("clip-llama", k=7, split=True))
    graphs = {name: bundle.graph_path(name) for name in bundle.manifest.graphs}
    checkpoint = resolve(str(tiny_checkpoint("clip-llama")))
    components = split_model(checkpoint, torch.float32, fake_mode())
    verifier = Verifier(components, find_weights(checkpoint, components.model), FP32, TEXT, whole=True)
    splice = verify.runtime_splice
    monkeypatch.setattr(verify, "SEEDS", SEEDS[:1])
    monkeypatch.setattr(verify, "GREEDY_TOKENS", 8)
    worker = SimpleNamespace(
        run=lambda graph, inputs: ort_worker._run(str(graph), inputs),
        greedy=lambda embed, decoder, *more: ort_worker._greedy(str(embed), str(decoder), *more),
    )

    def equal(change: Callable[[Spliced], Spliced]) -> bool:
        monkeypatch.setattr(verify, "runtime_splice", lambda *given, **how: change(splice(*given, **how)))
        got, wanted = verifier.compare_greedy(worker, graphs, bundle.manifest.selection, "original")
        assert len(got) == len(wanted) == 8
        return got == wanted

    assert equal(lambda made: made)
    assert not equal(lambda made: replace(made, position_ids=made.position_ids[:, ::-1].copy()))
    assert not equal(lambda made: replace(made, inputs_embeds=made.inputs_embeds[:, ::-1].copy()))


def test_attached_rows_are_judged_with_their_owner() -> None:
    """Rows 1 and 3 are as long as float32 can tell: either may be first, each with the rows that go with it."""
    lengths = torch.tensor([1.0, 3 * (1 + 1e-6), 1.0, 3.0, 5.0, 2.0])
    protected, to = torch.tensor([[True] + [False] * 5]), torch.tensor([[-1, -1, 1, -1, 0, 3]])
    components: Any = SimpleNamespace(protected=lambda _: protected, attached_to=lambda _: to, padding=None)
    asked = question.Question(components, (), torch.empty(1, 0, 6), torch.empty(1, 0, dtype=torch.bool))
    planes, gain = [lengths.diag()[None]], torch.ones(1, 6)
    of_reference = torch.tensor([[0, 4, 1, 2, 3, 5]])

    def right(order: list[int]) -> list[bool]:
        wanted = question.Selected(asked, planes, gain, of_reference[:, : len(order)])
        got = np.array([order])
        indices = np.sort(np.where(got < 0, 9, got))
        return wanted.equal_picks(
            {"pick_order": got, "kept_indices": np.where(indices == 9, -1, indices)}
        ).tolist()

    assert all(right([0, 4, 1, 2, 3, 5]))
    assert all(right([0, 4, 3, 5]))
    assert right([0, 4, 3, 1]) == [True, True, True, False], "without its row"
    assert right([0, 4, 3, -1]) == [True, True, True, False], "ended too early"
    assert right([4, 0, 1, 2]) == [False, False, True, True], "behind the row that is attached to it"
    assert right([0, 3, 5, 4])[1:] == [False] * 3, "one that is protected goes without its row"


@pytest.mark.parametrize("what", ["picks", "kept counts"])
@pytest.mark.parametrize("misses", range(len(SEEDS) + 1))
def test_another_picture_is_tried_before_picks_and_counts_count_as_wrong(
    misses: int, what: str, tiny_checkpoint: Callable[[str], Path]
):
    """The stand-in for ONNX Runtime reverses them in its first runs, as ties within rounding would."""
    checkpoint, mode = resolve(str(tiny_checkpoint("clip-llama"))), fake_mode()
    components = proportional(split_model(checkpoint, torch.float32, mode))
    verifier = Verifier(components, find_weights(checkpoint, components.model), FP32, TEXT, whole=True)
    selection = Selection(k=5, num_tokens=16)
    runs: list[Path] = []

    def run(graph: Path, inputs: dict[str, Any]) -> dict[str, Any]:
        images = (torch.from_numpy(inputs["pixel_values"]),)
        text, mask = torch.from_numpy(inputs["text_embeds"]), torch.from_numpy(inputs["text_mask"])
        asked = question.Question(components, images, text, mask)
        wanted = asked.select(verifier._holding(components.vision), selection)
        (features, *_), picks = wanted.planes, wanted.picks
        runs.append(graph)
        if what == "picks" and len(runs) <= misses:
            picks = picks.flip(1)
        rows, indices = keep(features, picks)
        late = torch.arange(selection.k) >= torch.from_numpy(inputs["num_kept"])[:, None]
        _, first = keep(features, picks.masked_fill(late, -1))
        counts = torch.zeros_like(indices)
        for picture, kept in enumerate(first):
            of_picture = kept_counts(features[picture][None], kept[None])[0]
            counts[picture, torch.isin(indices[picture], kept)] = of_picture[kept >= 0]
        if what == "kept counts" and len(runs) <= misses:
            counts = counts.flip(1)
        return {
            "image_features": rows.numpy(),
            "pick_order": picks.numpy(),
            "kept_indices": indices.numpy(),
            "kept_counts": counts.numpy(),
        }

    worker: Any = SimpleNamespace(run=run)
    differences, counted = verifier.compare_selection(worker, Path("vision_select.onnx"), selection)
    assert counted.keys() == {"picks", "kept counts"}
    for name, (equal, total) in counted.items():
        assert total == 15
        assert (equal == total) == (misses < len(SEEDS) or name != what)
    assert len(runs) == min(misses + 1, len(SEEDS))
    assert all(row.max_diff == 0 for row in differences), "rows are compared whatever the picks"
