"""The selection without a tower: a graph that picks otherwise shows."""

from dataclasses import replace
from pathlib import Path

import pytest

from resprune.exporter.verify import pruning as verify_pruning
from resprune.exporter.verify.ort_worker import OrtWorker
from resprune.exporter.verify.pruning import pruned_picks
from resprune.graphs import token_select_model
from resprune.method import Selection


@pytest.mark.parametrize("form", ["linear", "quadratic"])
def test_it_drops_half_of_the_tokens_and_agrees_with_pytorch(form: str, tmp_path: Path):
    selection = Selection(k=70, max_tokens=200, share=0.35, form=form)
    with OrtWorker() as worker:
        assert pruned_picks(worker, tmp_path, selection, 48) == (70, 70)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_of_another_scale_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        verify_pruning,
        "token_select_model",
        lambda selection: token_select_model(replace(selection, scale="clamp")),
    )
    selection = Selection(k=70, max_tokens=200, share=0.35, form="linear")
    with OrtWorker() as worker:
        equal, total = pruned_picks(worker, tmp_path, selection, 48)
    assert equal < total == 70
