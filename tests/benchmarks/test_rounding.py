"""The rivals of rounding: each makes a decoder that runs, with the head as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import losses, rounding
from benchmarks.precision import Opened, decoder_feeds, text_logits
from resprune.exporter.verify.text import every_position
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.precisions import BLOCK_SIZES


@pytest.mark.parametrize("method", rounding.METHODS)
def test_a_method_packs_the_layers_and_leaves_the_head(
    method: str, tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    own = shutil.copytree(tiny_bundle("clip-llama-wide", k=7), tmp_path / "bundle")
    opened = Opened(read_bundle(own, check_hashes=False))
    ids = np.arange(3, 40)
    prompt = opened.text_alone(ids)
    plain = text_logits(opened.bundle, [prompt], [ids])
    wide = every_position(opened.bundle.graph_path("decoder_model_merged"))
    feeds = decoder_feeds(opened.bundle, prompt)
    graph = rounding.quantized(wide, method, 32, feeds, tmp_path / "decoder.onnx")
    operators = [node.op_type for node in onnx.load(graph, load_external_data=False).graph.node]
    assert operators.count("MatMulNBits") == 2 * 7
    found = text_logits(opened.bundle, [prompt], [ids], graph)
    lost = losses.lost(found["logits"], plain["logits"], plain["wanted"])
    whole = losses.lost(plain["logits"], plain["logits"], plain["wanted"])
    assert whole["agreement"] == 1
    assert 0.3 < lost["agreement"] < 1
    assert lost["perplexity"] == pytest.approx(whole["perplexity"], rel=0.6)


def test_both_tables_say_how_much_of_fp32_is_left() -> None:
    row = {"perplexity": 44.0, "agreement": 0.9}
    plain = {"perplexity": 40.0, "agreement": 1.0}
    by_size = {str(size): row for size in BLOCK_SIZES}
    text = rounding.table({"positions": 5, "found": {"fp32": {"": plain}, "HQQ": by_size}})
    assert "| HQQ | 1.1000, 90.0 % | 1.1000, 90.0 % | 1.1000, 90.0 % |" in text
    text = losses.table(
        {"positions": 5, "found": {"resprune, fp32": plain, "resprune, q8": row}, "skipped": "no"}
    )
    assert "| resprune, q8 | 44.00 | 1.1000 | 90.0 % |" in text
    assert text.endswith("\nno")
