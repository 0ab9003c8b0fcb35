"""A family with planes, spans and protected rows goes the whole way, though no code outside of it knows its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from resprune.exporter.export import Options, export
from resprune.exporter.language import Rows
from resprune.exporter.verify.verifier import ParityError
from resprune.runtime.bundle.files import read_bundle
from tests import synthetic_family as synthetic

K = 9


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Fields of `Options` → the bundle exported with them, once a module."""
    root = synthetic.write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    bundles: dict[Options, Path] = {}

    def bundle(**options: Any) -> Path:
        key = Options(k=K, **options)
        if key not in bundles:
            bundles[key] = export(
                str(root), tmp_path_factory.mktemp("bundle") / "out", key, lambda line: None
            )
        return bundles[key]

    with synthetic.registered():
        yield bundle


@pytest.mark.parametrize(
    "options",
    [
        {"split": True},
        {"split": True, "optimize": "ort", "attention": "proportional"},
        {"dtype": "fp16", "optimize": "ort"},
        {"dtype": "bf16", "split": True},
        {"dtype": "int8", "attention": "proportional"},
        {"dtype": "q4", "verify": "layers"},
        {"verify": "layers", "attention": "proportional"},
    ],
    ids=str,
)
def test_every_kind_of_export_is_verified(made: Callable[..., Path], options: dict[str, Any]) -> None:
    bundle = read_bundle(made(**options))
    parity = bundle.manifest.parity
    exact = options.get("dtype", "fp32") == "fp32"
    compared = {Path(graph.file).stem: name for name, graph in bundle.manifest.graphs.items()}
    outputs = {compared[stem]: names for stem, names in parity["outputs"].items()}
    assert {"image_features", "plane_features.0", "plane_features.1"} <= outputs["vision_select"].keys()
    if options.get("split"):
        assert "plane_features.1" in outputs["vision_encoder"]
        assert {"kept_planes.0", "kept_planes.1"} <= outputs["token_select"].keys()
    if options.get("verify") == "layers":
        assert parity["layers"] == [0, 1, 3]
    elif exact:
        assert parity["greedy_tokens"] == "32/32"


@pytest.mark.parametrize("verify", ["full", "layers"])
def test_planes_in_each_other_s_place_are_found(
    made: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    added = Rows.added
    monkeypatch.setattr(Rows, "added", lambda rows, model, planes: added(rows, model, planes[::-1]))
    with pytest.raises(ParityError, match="decoder_model_merged"):
        made(verify=verify, alpha=0.5)


def test_the_graphs_say_what_they_take(made: Callable[..., Path]) -> None:
    graphs = read_bundle(made(split=True)).manifest.graphs
    decoder = {tensor.name: tensor for tensor in graphs["decoder_model_merged"].inputs}
    assert decoder["plane_embeds.1"].shape == ("batch_size", "sequence_length", 64)
    assert decoder["plane_embeds.1"].dtype == "float32"
    protected = [tensor for tensor in graphs["token_select"].inputs if tensor.name == "protected_mask"]
    assert [(tensor.dtype, tensor.shape) for tensor in protected] == [("bool", ("batch_size", "num_tokens"))]
    assert "protected_mask" in [tensor.name for tensor in graphs["vision_select"].inputs]
    assert "protected_mask" not in [tensor.name for tensor in graphs["vision_encoder"].inputs]
    selected = [tensor.name for tensor in graphs["token_select"].outputs]
    assert selected == ["kept_features", "kept_indices", "pick_order", "kept_planes.0", "kept_planes.1"]


def test_each_plane_counts_where_it_is_added(made: Callable[..., Path]) -> None:
    """The decoder's answer depends on both, and on which is which."""
    bundle = read_bundle(made(split=True))
    session = onnxruntime.InferenceSession(bundle.graph_path("decoder_model_merged"))
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        value.name: np.zeros([1, value.shape[1], 0, value.shape[3]], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    rows, planes = generator.standard_normal((1, 5, 64)), generator.standard_normal((2, 1, 5, 64))
    feeds["inputs_embeds"] = rows.astype(np.float32)
    feeds["attention_mask"], feeds["position_ids"] = np.ones((1, 5), np.int64), np.arange(5)[None]

    def logits(*planes: Any) -> Any:
        more = {f"plane_embeds.{index}": plane.astype(np.float32) for index, plane in enumerate(planes)}
        return session.run(["logits"], feeds | more)[0]

    zero = np.zeros_like(planes[0])
    answers = [logits(*planes), logits(zero, planes[1]), logits(planes[0], zero), logits(*planes[::-1])]
    for index, answer in enumerate(answers):
        assert all(abs(answer - other).max() > 1e-2 for other in answers[:index])
