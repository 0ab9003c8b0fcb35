"""What counts as a miss."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
from resprune.exporter.verify.text import trained
from resprune.exporter.verify.verifier import SEEDS, Verifier
from resprune.method import Selection
from resprune.runtime import walk
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.precisions import TABLE, Precision, parse_dtype
from resprune.runtime.prompt.splice import KeptTokens, Spliced, splice

TEXT = torch.arange(30)


def test_nan_is_a_miss():
    nan = Difference("graph", "output", float("nan"), 1.0, 1e-4)
    with pytest.raises(ParityError, match="nan"):
        require([nan], {}, exact=[])
    with pytest.raises(ParityError, match="63 of 64 equal"):
        require([], {"picks": (63, 64)}, exact=["picks"])
    require([Difference("graph", "output", np.inf, 1.0, np.inf)], {"picks": (63, 64)}, exact=[])


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_a_graph_that_loses_half_of_an_output_fails_in_every_precision(row: Precision):
    """Three quarters, if the weights are not trained."""
    want = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    for judge, lost in (
        (row, 0.5),
        (row.of_layers("present.0.key"), 0.5),
        (row.of_layers("logits"), 0.75),
        (row.of_untaught(), 0.75),
    ):
        judge = replace(judge, atol=9)
        assert difference("graph", "logits", want.numpy(), want, judge).within
        bad = difference("graph", "logits", (want + lost * noise).numpy(), want, judge)
        assert bad.snr == pytest.approx(-20 * math.log10(lost), abs=0.3)
        with pytest.raises(ParityError, match=r"dB  <-"):
            require([bad], {}, exact=[])
    with pytest.raises(ParityError, match=r"text positions +\d+ of 256 equal  <-"):
        require(
            [], {"text positions": (20, 256)}, exact=[], least={"text positions": row.of_untaught().agreement}
        )


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_a_precision_is_bounded_by_what_its_weights_let_it_reach(row: Precision):
    assert row.of_untaught().snr <= row.of_layers("logits").snr <= row.of_layers("present.0.key").snr
    assert row.of_untaught().snr <= row.snr <= row.of_layers("present.0.key").snr
    assert row.of_untaught().agreement <= row.agreement


def logits_of(ids: Tensor, height: float, spread: float) -> Tensor:
    """Random logits [T, 300] with that standard deviation, higher by `height` at the next of the ids [T]."""
    logits = torch.randn(len(ids), 300, generator=torch.Generator().manual_seed(3)) * spread
    logits[torch.arange(len(ids) - 1), ids[1:]] += height
    return logits


WORDS = torch.randint(300, (256,), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0, 7.0])
def test_random_weights_are_not_trained_however_sure_they_are(spread: float):
    """Those are which guess the next token now and then, or are sure of another as random ones are not."""
    assert not trained(logits_of(WORDS, 0, spread), WORDS)
    assert not trained(logits_of(WORDS, spread, spread), WORDS.flip(0))
    assert trained(logits_of(WORDS, 4 + spread**2, spread), WORDS)
    assert trained(logits_of(WORDS, 6 * spread, spread), WORDS.flip(0))


@pytest.mark.parametrize(("height", "lost"), [(0, 0.5), (0, 0.75), (6, 0.5), (6, 0.3)])
def test_what_is_trained_may_lose_less_of_its_logits(
    height: float,
    lost: float,
    proof: Callable[..., Verifier],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """A decoder in q4 that is off by so much of its logits' size; what it computes is not looked at."""
    verifier = proof(dtype="q4", text=WORDS)
    want = logits_of(WORDS, height, 1.0)
    noise = torch.randn(want.shape, generator=torch.Generator().manual_seed(4)) * want.std()
    got = {"logits": (want + lost * noise).numpy()[None]}
    monkeypatch.setattr(verify, "every_logit", lambda *_: want)
    monkeypatch.setattr(verify, "every_position", lambda graph: tmp_path / "wide.onnx")
    (tmp_path / "wide.onnx").touch()
    worker = SimpleNamespace(run=lambda graph, inputs: got)
    (row,), _ = verifier.compare_text(worker, Path("decoder_model_merged_q4.onnx"))
    assert row.within == ((height, lost) in ((0, 0.5), (6, 0.3)))
    row = verifier._row("vision_select")
    assert row.snr == (TABLE["fp32"].snr if height else TABLE["fp32"].untaught[0])
    assert verifier.least["text positions"] == (TABLE["q4"].agreement if height else TABLE["q4"].untaught[1])


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


@pytest.fixture
def proof(
    tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> Callable[..., Verifier]:
    """What verifies the exports of a variant, whose bundle is made with `options`; `selection` may be another."""

    def verifier(
        variant: str = "clip-llama",
        options: Mapping[str, Any] = {"k": 7, "split": True},
        selection: Selection | None = None,
        *,
        whole: bool = True,
        dtype: str = "fp32",
        text: Tensor = TEXT,
    ) -> Verifier:
        bundle = read_bundle(tiny_bundle(variant, **options))
        manifest = replace(bundle.manifest, selection=selection or bundle.manifest.selection)
        checkpoint = resolve(str(tiny_checkpoint(variant)))
        components = split_model(checkpoint, torch.float32, fake_mode())
        if manifest.selection.counts:
            components = proportional(components)
        weights = find_weights(checkpoint, components.model)
        choice = parse_dtype(dtype)
        return Verifier(replace(bundle, manifest=manifest), components, weights, choice, text, whole=whole)

    return verifier


def test_what_is_prepared_is_not_computed_again(
    proof: Callable[..., Verifier], monkeypatch: pytest.MonkeyPatch
):
    """And what ONNX Runtime returns, here zeros, is compared with it all the same."""
    verifier = proof(selection=Selection(k=5, num_tokens=16), whole=False)
    verifier.prepare()
    monkeypatch.delattr(question, "select")
    for name in ("reference_of", "blank"):
        monkeypatch.delattr(verify, name)
    zeros = dict.fromkeys(("pick_order", "kept_indices"), np.zeros((1, 5), np.int64))
    zeros["image_features"] = np.zeros((1, 5, verifier._components.vision.outputs[0].shape[2]), np.float32)
    monkeypatch.setattr(verify, "SEEDS", SEEDS[:1])
    (features,), counted = verifier.compare_selection(SimpleNamespace(run=lambda graph, inputs: zeros))
    assert not features.within
    assert counted["picks"][0] < 5
    assert verifier._wanted_layers[0] == [0, 1]


def one_row_on(kept: KeptTokens) -> KeptTokens:
    """With the last row of the first span in the one behind it."""
    first, second, *others = kept.spans
    return replace(kept, spans=(first - 1, second + 1, *others))


WRONG: list[tuple[Callable[[KeptTokens], KeptTokens], Callable[[Spliced], Spliced]]] = [
    (lambda kept: kept, lambda made: replace(made, position_ids=made.position_ids[:, ::-1].copy())),
    (lambda kept: kept, lambda made: replace(made, inputs_embeds=made.inputs_embeds[:, ::-1].copy())),
    (lambda kept: replace(kept, rows=kept.rows[::-1].copy()), lambda made: made),
]


@pytest.mark.parametrize(
    ("variant", "options", "wrong"),
    [
        ("clip-llama", {"k": 7, "split": True}, WRONG),
        ("smolvlm", {"share": 1.0, "split": True}, [*WRONG, (one_row_on, lambda made: made)]),
    ],
)
def test_an_export_proves_what_the_runtime_makes_of_the_graphs(
    proof: Callable[..., Verifier],
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    options: dict[str, Any],
    wrong: Sequence[tuple[Callable[[KeptTokens], KeptTokens], Callable[[Spliced], Spliced]]],
):
    """With one span and with several: what it puts together wrongly gets another answer than PyTorch's."""
    verifier = proof(variant, options)
    monkeypatch.setattr(verify, "SEEDS", SEEDS[:1])
    monkeypatch.setattr(verify, "GREEDY_TOKENS", 8)
    worker: Any = SimpleNamespace(
        run=lambda graph, inputs: ort_worker._run(str(graph), inputs),
        answer=lambda embed, decoder, *more: ort_worker._answer(str(embed), str(decoder), *more),
    )
    assert (len(next(iter(verifier._question(1, SEEDS[0]).prepared)).image.spans) > 1) == (
        variant == "smolvlm"
    )

    def equal() -> bool:
        got, wanted = verifier.compare_greedy(worker)
        assert len(got) == len(wanted) == 8
        return got == wanted

    assert equal()
    for change in wrong:
        monkeypatch.setattr(walk, "splice", partial(wrongly, *change))
        assert not equal()


def wrongly(
    of_kept: Callable[[KeptTokens], KeptTokens],
    of_spliced: Callable[[Spliced], Spliced],
    embeds: Any,
    ids: Any,
    kept: Sequence[Sequence[KeptTokens]],
    **how: Any,
) -> Spliced:
    """`splice` of something else, or something else of it."""
    return of_spliced(splice(embeds, ids, [[of_kept(one) for one in images] for images in kept], **how))


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
    misses: int, what: str, proof: Callable[..., Verifier]
):
    """The stand-in for ONNX Runtime reverses them in its first runs, as ties within rounding would."""
    selection = Selection(k=5, num_tokens=16, counts=True)
    verifier = proof(selection=selection)
    components = verifier._components
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
    differences, counted = verifier.compare_selection(worker)
    assert counted.keys() == {"picks", "kept counts"}
    for name, (equal, total) in counted.items():
        assert total == 15
        assert (equal == total) == (misses < len(SEEDS) or name != what)
    assert len(runs) == min(misses + 1, len(SEEDS))
    assert all(row.max_diff == 0 for row in differences), "rows are compared whatever the picks"
