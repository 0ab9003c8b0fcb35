"""The table of starts, on a model narrow and shallow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import cold
from benchmarks.starting import IMPORTS, PREFILL, TOKEN
from tests.runtime.pipelines import picture


def test_a_start_is_measured_stage_by_stage(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle, photo = tiny_bundle("clip-llama", k=7), tmp_path / "photo.png"
    picture(1).save(photo)
    found = cold.measure(bundle, photo, rounds=1)
    assert found["cases"].keys() == cold.CASES.keys()
    for case, one in found["cases"].items():
        stages = {name: value.median for name, value in one["stages"].items()}
        parts = (
            "manifest",
            "tokenizer",
            "session of vision_select",
            "session of decoder_model_merged",
            "pixels",
        )
        assert all(
            0 < stages[name] < stages[PREFILL] for name in (IMPORTS, *parts, "run of vision_select")
        ), case
        assert stages["run of embed_tokens"] < stages[PREFILL] < stages[TOKEN]
        assert stages["hashes"] > 0
        assert 20e6 < one["peak bytes"][PREFILL] <= one["peak bytes"][TOKEN]
    assert found["sessions without prepacking"].keys() == {
        f"session of {graph}" for graph in ("vision_select", "embed_tokens", "decoder_model_merged")
    }
    text = cold.table({"tiny": {"most seconds": 8.0, "most bytes": 4.0e9} | found})
    assert f"| {cold.WARM} |" in text
    assert "without prepacking)" in text
