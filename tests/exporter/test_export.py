"""The export as a whole: what it writes, what it refuses, and what it leaves when it fails or is killed."""

import errno
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest

from resprune.exporter import export as export_module
from resprune.exporter import language
from resprune.exporter.estimate import _time, needs
from resprune.exporter.export import export
from resprune.exporter.language import _Decoder as Decoder
from resprune.exporter.options import Options
from resprune.exporter.trace import writer as writer_module
from resprune.exporter.verify.difference import Difference, ParityError
from resprune.graphs import functions, selection
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.inspection import summary
from resprune.runtime.bundle.manifest import TensorSpec
from resprune.runtime.bundle.precisions import TABLE
from resprune.runtime.console import bytes_text
from resprune.runtime.errors import ResPruneError

Checkpoint = Callable[[str], Path]

ROOT = Path(__file__).parents[2]


def changed(root: Path, copy: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint with one of its JSON files changed."""
    shutil.copytree(root, copy)
    content = json.loads((copy / name).read_text())
    change(content)
    (copy / name).write_text(json.dumps(content))
    return copy


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".")]


def test_the_bundle_is_complete(tiny_bundle):
    bundle = read_bundle(tiny_bundle("clip-llama", k=7, split=True))
    manifest = bundle.manifest
    assert (manifest.family, manifest.model, manifest.positions) == ("llava", "clip-llama", "contiguous")
    assert (manifest.selection.k, manifest.selection.num_tokens) == (7, 16)
    assert (manifest.image_token_id, manifest.context_length) == (4, 512)
    graphs = {"vision_select", "vision_encoder", "token_select", "embed_tokens", "decoder_model_merged"}
    assert set(manifest.graphs) == graphs
    owners = {name: name for name in graphs - {"token_select"}} | {"vision_select": "vision_encoder"}
    assert {name: graph.weights for name, graph in manifest.graphs.items()} == {
        name: f"onnx/{owners[name]}.onnx_data" if name in owners else None for name in graphs
    }
    data = {f"onnx/{name}.onnx_data" for name in owners.values()}
    assert {name for name in manifest.files if name.startswith("onnx/")} == data | {
        f"onnx/{name}.onnx" for name in graphs
    }
    assert manifest.parity["level"] == "end to end"
    assert manifest.parity["greedy_tokens"] == "32/32"
    assert manifest.parity["picks"] == "21/21"
    for outputs in manifest.parity["outputs"].values():
        for figures in outputs.values():
            assert figures["max_diff"] <= 1e-4 * max(1, figures["scale"])
            assert figures["atol"] == 1e-4
    inputs = {tensor.name: tensor.shape for tensor in manifest.graphs["vision_select"].inputs}
    assert inputs == {
        "pixel_values": ("batch_size", 3, 32, 32),
        "text_embeds": ("batch_size", "text_tokens", 48),
        "text_mask": ("batch_size", "text_tokens"),
    }


def test_a_bundle_of_proportional_attention_says_so(tiny_bundle):
    plain, weighing = (
        read_bundle(tiny_bundle("clip-llama", k=7, split=True, attention=attention)).manifest
        for attention in ("plain", "proportional")
    )
    assert (plain.format_version, weighing.format_version) == (1, 2)
    assert (plain.attention, weighing.attention) == ("plain", "proportional")
    assert weighing.parity["kept_counts"] == weighing.parity["split_counts"] == "21/21"
    assert weighing.parity["greedy_tokens"] == "32/32"
    for graph in ("vision_select", "token_select"):
        ours, theirs = weighing.graphs[graph], plain.graphs[graph]
        assert ours.inputs == (*theirs.inputs, TensorSpec("num_kept", "int64", ("batch_size",)))
        assert ours.outputs == (*theirs.outputs, TensorSpec("kept_counts", "int64", ("batch_size", 7)))
    for graph in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        assert weighing.graphs[graph] == plain.graphs[graph]


def every_one_for_itself(*, opset: int) -> ir.Function:
    def counts(op: Any, visual: Any, token_mask: Any, kept_indices: Any) -> Any:
        return op.Where(op.GreaterOrEqual(kept_indices, 0), 1, 0)

    return functions._function(
        "KeptCounts", counts, ("visual", "token_mask", "kept_indices"), "counts", opset
    )


MISTAKES = {
    "counts": (selection, "kept_counts_function", every_one_for_itself, r"kept counts +\d+ of 21 equal"),
    "mask": (
        language,
        "_Decoder",
        lambda model, head, rows, **proportional: Decoder(model, head, rows),
        r"decoder_model_merged +logits .* <-",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_weights_are_found(mistake, tiny_checkpoint, tmp_path, monkeypatch):
    """A selection that counts each kept token as one, and a decoder that takes every mask for zeros and ones."""
    module, name, wrong, says = MISTAKES[mistake]
    monkeypatch.setattr(module, name, wrong)
    options = Options(k=7, attention="proportional")
    with pytest.raises(ParityError, match=says):
        export(str(tiny_checkpoint("clip-llama")), tmp_path / "out", options, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_has_its_suffix_and_its_loss(tiny_bundle):
    manifest = read_bundle(tiny_bundle("clip-llama", k=7, dtype="fp16")).manifest
    assert manifest.graphs["embed_tokens"].file == "onnx/embed_tokens_fp16.onnx"
    types = {
        (tensor.name.split(".")[0], tensor.dtype)
        for graph in manifest.graphs.values()
        for tensor in (*graph.inputs, *graph.outputs)
        if tensor.dtype.startswith("float")
    }
    assert {name for name, dtype in types if dtype == "float16"} == {"past_key_values", "present"}
    loss = manifest.parity["outputs"]["decoder_model_merged_fp16"]["logits"]
    assert 0 < loss["max_diff"] < 0.05 * loss["scale"]


def test_another_package_of_onnx_runtime_may_be_installed(monkeypatch):
    """onnxruntime-gpu is imported as onnxruntime, and no package of that name is there."""
    version = importlib.metadata.version

    def of_others(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", of_others)
    versions = export_module._versions()
    assert versions["onnxruntime"] == onnxruntime.__version__
    assert versions["torch"] == version("torch")


def test_stage_lines(tiny_checkpoint, tmp_path, monkeypatch):
    """And of a decoder that cannot be held in memory it is said which layers were compared."""
    monkeypatch.setattr("resprune.exporter.memory.available_memory", lambda: 0)
    lines: list[str] = []
    options = Options(k=5, body="unrolled", form="linear", positions="original")
    export(str(tiny_checkpoint("clip-llama")), tmp_path / "out", options, lines.append)
    needs, *lines = lines
    assert re.fullmatch(
        r"needs up to [\d.]+ MB of disk; on two cores about \d+ MB of memory and \d+ s", needs
    )
    assert [line[:5] for line in lines] == [f"[{stage}/7]" for stage in range(1, 8)]
    assert max(len(row) for line in lines[:-1] for row in line.splitlines()) <= 80
    lines = [" ".join(line.split()) for line in lines]
    stage = r"\[3/7\] vision_select\.onnx +[\d.]+ s +[\d.]+ [kM]B +max diff \S+ \(atol \S+\) +picks 5/5"
    assert re.fullmatch(stage, lines[2])
    assert "layers 0 and 1, the others like them" in lines[3]
    assert re.fullmatch(r"\[5/7\] weights +[\d.]+ s +[\d.]+ [kM]B +equal (\d+)/\1", lines[4])
    bundle = read_bundle(tmp_path / "out")
    size = f" {bytes_text(sum(file.stat().st_size for file in bundle.root.rglob('*') if file.is_file()))}"
    assert f"{size} K 5 of " in lines[-1]
    assert f"{size}\n" in summary(bundle)
    manifest = bundle.manifest
    made = manifest.selection
    assert (manifest.positions, made.body, made.form) == ("original", "unrolled", "linear")
    assert manifest.parity["level"] == "layers"
    assert "greedy_tokens" not in manifest.parity


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_what_a_lower_precision_loses_is_printed_output_by_output(dtype, tmp_path):
    lines: list[str] = []
    under_way = export_module._Export("tiny", tmp_path / "out", Options(dtype=dtype), lines.append, tmp_path)
    path = tmp_path / "decoder_model_merged.onnx"
    path.touch()
    differences = [
        Difference(path.stem, output, max_diff, scale, 0.05, 90, TABLE[dtype].snr)
        for output, max_diff, scale in (
            ("logits", 0.25, 20.0),
            ("present.0.key", 0.002, 0.5),
            ("present.0.value", 0.004, 1.0),
            ("present.1.key", 0.01, 10.0),  # the largest, and less of its scale than the one before
            ("present.1.value", 0.001, 1.0),
        )
    ]
    under_way._compared(path, differences, "32/32")
    line, *losses = (" ".join(line.split()) for line in lines)
    assert line.endswith("max diff 2.5e-01 (atol 1e+00), SNR 90 dB 32/32")
    assert losses == (
        []
        if dtype == "fp32"
        else [
            "logits max diff 2.5e-01 (atol 1e+00), SNR 90 dB",
            "present.0.value max diff 4.0e-03 (atol 5e-02), SNR 90 dB the worst of present.*",
        ]
    )
    assert all(line.startswith("      ") for line in lines[1:])


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "language model": (
        "config.json",
        lambda config: config["text_config"].update(model_type="gpt2"),
        "the language model is of type gpt2; supported are llama, mistral, qwen2",
    ),
    "vision tower": (
        "config.json",
        lambda config: config["vision_config"].update(model_type="vit"),
        "the vision tower is of type vit; supported are clip_vision_model, siglip_vision_model, dinov2",
    ),
    "rotary embeddings": (
        "config.json",
        lambda config: config["text_config"].update(
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "rotary embeddings of type dynamic",
    ),
    "feature layer": (
        "config.json",
        lambda config: config.update(vision_feature_layer=9),
        "does not fit its vision tower",
    ),
    "picture size": (
        "preprocessor_config.json",
        lambda config: config.update(crop_size={"height": 48, "width": 48}),
        "does not fit its vision tower",
    ),
    "pictures of any shape": (
        "preprocessor_config.json",
        lambda config: config.update(do_center_crop=False),
        "leaves images of different sizes",
    ),
    "picture size left out": (  # which is 224
        "preprocessor_config.json",
        lambda config: [config.pop(key) for key in ("size", "crop_size")],
        "does not fit its vision tower, which gets 224 x 224 pixels",
    ),
    "image processor": (
        "preprocessor_config.json",
        lambda config: config.update(image_processor_type="ViTImageProcessor"),
        "the image processor ViTImageProcessor is not supported",
    ),
    "no size": (
        "preprocessor_config.json",
        lambda config: config.update(size="96"),
        r"size in preprocessor_config\.json cannot be '96'",
    ),
    "no height": (
        "preprocessor_config.json",
        lambda config: config.update(crop_size={"height": None, "width": 32}),
        r"crop_size in preprocessor_config\.json cannot be None",
    ),
}
# All of these are config.json's fault, which the tokenizer's class reads before its own.
REFUSED |= {
    name: ("config.json", change, r"/config\.json is not a valid llava config \(.+\); correct it")
    for name, change in {
        "text config": lambda config: config.update(text_config=7),
        "positions": lambda config: config["text_config"].update(max_position_embeddings=None),
        "hidden size": lambda config: config["text_config"].update(hidden_size=49),
        "no heads": lambda config: config["text_config"].update(num_attention_heads=0),
        "activation": lambda config: config["text_config"].update(hidden_act="foo"),
        "projector's activation": lambda config: config.update(projector_hidden_act="foo"),
        "no patches": lambda config: config["vision_config"].update(patch_size=0),
        "padding token": lambda config: config["text_config"].update(pad_token_id=10**6),
        "negative width": lambda config: config["vision_config"].update(intermediate_size=-1),
    }.items()
}


@pytest.mark.parametrize(("name", "change", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_a_config_that_no_graph_can_carry(name, change, sentence, tiny_checkpoint, tmp_path):
    root = changed(tiny_checkpoint("clip-llama"), tmp_path / "copy", name, change)
    with pytest.raises(ResPruneError, match=sentence) as told:
        export(str(root), tmp_path / "out", Options(k=3))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("factor", [2, 0.5])
def test_pictures_of_another_size_than_the_tower_takes(factor, tiny_checkpoint, tmp_path):
    """CLIP's tower looks at the size; SigLIP's does not, and has no positions for them."""

    def resize(config: dict[str, Any]) -> None:
        side = int(42 * factor)
        config["image_processor"]["size"] = {"height": side, "width": side}

    root = changed(tiny_checkpoint("siglip-mistral"), tmp_path / "copy", "processor_config.json", resize)
    with pytest.raises(ResPruneError, match=r"does not fit its vision tower, which gets .* pixels: ") as told:
        export(str(root), tmp_path / "out", Options(k=3))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["vision_config"].update(patch_size=0),
        lambda config: config.update(image_grid_pinpoints=[1, 2]),
        lambda config: config.update(image_grid_pinpoints=[[32, 32]]),
    ],
)
def test_tiles_that_a_config_cannot_mean(change, tiny_checkpoint, tmp_path):
    root = changed(tiny_checkpoint("next-llama"), tmp_path / "copy", "config.json", change)
    with pytest.raises(ResPruneError, match=r"patch_size is not one number|image_grid_pinpoints differ"):
        export(str(root), tmp_path / "out", Options(k=3))


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_missing_side_file_is_named(name, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint("clip-llama"), tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    with pytest.raises(ResPruneError, match=f"has no {re.escape(name)}"):
        export(str(tmp_path / "copy"), tmp_path / "out", Options(k=3))


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "processor_config.json", "model.safetensors"]
)
def test_a_file_that_may_not_be_read_is_named(name, tiny_checkpoint, tmp_path, monkeypatch):
    """The tests may be run by root, who may read anything."""
    usual = Path.open

    def refuse(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if self.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return usual(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResPruneError, match=rf"/{name} cannot be used \(Permission denied\); give"):
        export(str(tiny_checkpoint("clip-llama")), tmp_path / "out", Options(k=3))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_known_beforehand(tiny_checkpoint, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(export_module, "traced_ahead", lambda *arguments: pytest.fail("it began to trace"))
    with pytest.raises(ResPruneError, match=r"needs [\d,]+ bytes and the disk .* has 1,000 free"):
        export(str(tiny_checkpoint("clip-llama")), tmp_path / "out", Options(k=3))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_the_old_bundle(tiny_checkpoint, tiny_bundle, tmp_path, monkeypatch):
    shutil.copytree(tiny_bundle("clip-llama", k=7), tmp_path / "out")

    def full(traced: object, path: Path, stored: object, progress: object) -> None:
        path.with_name(f"{path.name}_data").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module, "write_weights", full)
    with pytest.raises(ResPruneError, match="is full; nothing was left behind"):
        export(str(tiny_checkpoint("clip-llama")), tmp_path / "out", Options(k=3, force=True))
    assert leftovers(tmp_path) == []
    assert read_bundle(tmp_path / "out").manifest.selection.k == 7


def test_a_killed_export_leaves_the_old_bundle_and_the_next_cleans_up(tiny_checkpoint, tiny_bundle, tmp_path):
    shutil.copytree(tiny_bundle("clip-llama", k=7), tmp_path / "out")
    checkpoint = str(tiny_checkpoint("clip-llama"))
    command = [sys.executable, "-c", "from resprune.runtime.cli import main; main()", "export"]
    process = subprocess.Popen(
        [*command, checkpoint, str(tmp_path / "out"), "-k", "3", "--force"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("[2/7]"):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = leftovers(tmp_path)
    assert (tmp_path / left / "onnx" / "embed_tokens.onnx").is_file()
    assert read_bundle(tmp_path / "out").manifest.selection.k == 7
    with pytest.raises(ResPruneError, match="-k 99 is more than"):
        export(checkpoint, tmp_path / "out", Options(k=99, force=True))
    assert leftovers(tmp_path) == []
    assert read_bundle(tmp_path / "out").manifest.selection.k == 7


def test_what_an_export_needs_is_near_what_was_measured():
    """Of the whole models in benchmarks/results: within a third for the time and the memory."""
    older, newer = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["figures"]
        for name in ("export_size", "families")
    )
    measured = {**older, **newer["models"]}
    numbers = {
        "llava15-7b": (7063e6, 312e6, 131e6, 32),
        "qwen25vl-3b": (3755e6, 669e6, 311e6, 36),
        "qwen3vl-2b": (2128e6, 407e6, 311e6, 28),
        "internvl3-2b": (2089e6, 312e6, 233e6, 28),
    }
    for name, (total, vision, table, layers) in numbers.items():
        for run, packed in (("export", False), ("quantized", True)):
            seconds, memory = needs(measured[name]["bytes"], packed, total, vision, table, layers)
            assert seconds == pytest.approx(measured[name][run]["seconds"], rel=1 / 3)
            assert memory == pytest.approx(measured[name][run]["peak_bytes"], rel=1 / 3)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "5 s"), (5.1, "5 s"), (9, "10 s"), (14, "10 s"), (88, "90 s"), (179, "180 s"), (200, "3 min")],
)
def test_a_time_is_rounded_as_it_is_known(seconds, words):
    assert _time(seconds) == words
