"""Engines are built from every graph of every family, once; the bundle around them stays whole, whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from resprune.exporter.tensorrt import engines
from resprune.exporter.tensorrt.engines import build
from resprune.exporter.tensorrt.limits import Limits
from resprune.exporter.tensorrt.profiles import profiles
from resprune.graphs import token_select_model
from resprune.method import Selection
from resprune.names import DECODER
from resprune.runtime.bundle.files import Bundle, describe_file, read_bundle, write_manifest
from resprune.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from resprune.runtime.cli import main
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.qwen2_vl import Grid, windows
from resprune.runtime.families.table import family_of

pytest.importorskip("tensorrt_rtx")
SET = "tensorrt-rtx-sm_86"


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "bundle"))


@pytest.fixture
def tiny(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    return copied(tiny_bundle("clip-llama", k=7, split=True), tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT itself left out, where only what happens to its engines is at stake."""

    def engine(bundle: Bundle, graph: str, path: Path, *rest: Any) -> Any:
        _, capability, ranges, cache = rest
        cache.write_bytes(b"times")
        return memoryview(f"{graph} {capability} {ranges}".encode()), "Layer 0"

    monkeypatch.setattr(engines, "_engine_bytes", engine)


@pytest.fixture
def built(tiny: Path, quick: None) -> Path:
    build(tiny, "tensorrt-rtx", ["sm_86"], report=lambda line: None)
    return tiny


def describe_again(root: Path, file: str) -> None:
    """Let the manifest say what a file now is."""
    manifest = Manifest.from_json((root / MANIFEST_NAME).read_bytes())
    write_manifest(root, replace(manifest, files=manifest.files | {file: describe_file(root, file)}))


def check(root: Path, target: str = "sm_86") -> Bundle:
    """Build, and look at what the bundle then says of itself."""
    lines: list[str] = []
    build(root, "tensorrt-rtx", [target], report=lines.append)
    bundle = read_bundle(root)
    engine_set = bundle.manifest.engines[f"tensorrt-rtx-{target}"]
    assert engine_set.graphs.keys() == bundle.manifest.graphs.keys()
    assert len(lines) == len(engine_set.graphs)
    for graph, engine in engine_set.graphs.items():
        assert bundle.file_path(engine.file).stat().st_size > 1000
        layers = bundle.file_path(engine.file.replace(".engine", ".layers.txt")).read_text()
        assert layers.startswith("Layer 0 ")
        assert len(engine.profiles) == (2 if graph == "decoder_model_merged" else 1)
    return bundle


def test_the_demo_bundle(demo_bundle: Path, tmp_path: Path) -> None:
    """Encoder and selector together and apart; the selection as a Loop."""
    root = copied(demo_bundle, tmp_path)
    bundle = check(root)
    assert bundle.manifest.selection.body == "loop"
    assert bundle.manifest.graphs.keys() >= {"vision_select", "vision_encoder", "token_select"}
    layers = (root / f"engines/{SET}/token_select.layers.txt").read_text()
    assert "LOOP_OUTPUT" in layers or "TRIP_LIMIT" in layers, "the function was taken, and no plugin"


def test_the_unrolled_selection(tiny: Path) -> None:
    spec = read_bundle(tiny).manifest.graphs["token_select"]
    onnx.save(token_select_model(Selection(k=7, body="unrolled")), tiny / spec.file)
    describe_again(tiny, spec.file)
    check(tiny, "sm_120")
    layers = (tiny / "engines/tensorrt-rtx-sm_120/token_select.layers.txt").read_text()
    assert "TRIP_LIMIT" not in layers


@pytest.mark.parametrize(
    ("variant", "options"),
    # Each as its parity tests export it.
    [
        ("next-llama", {"k": 88, "split": True}),
        *(
            (variant, {"share": 1.0, "split": True})
            for variant in (
                "qwen25",
                "qwen3",
                "onevision",
                "internvl-qwen2",
                "internvl-qwen3",
                "smolvlm",
                "gemma3",
            )
        ),
        ("idefics3", {"share": 1.0, "dtype": "fp16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_other_families(
    tiny_bundle: Callable[..., Path], tmp_path: Path, variant: str, options: dict[str, Any]
) -> None:
    check(copied(tiny_bundle(variant, **options), tmp_path))


def test_proportional_attention(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Counts out of the selection, fused and apart, and counts into the decoder's mask."""
    bundle = check(copied(tiny_bundle("clip-llama", k=7, split=True, attention="proportional"), tmp_path))
    for graph in ("vision_select", "token_select"):
        assert bundle.manifest.graphs[graph].inputs[-1].name == "num_kept"
        assert bundle.manifest.graphs[graph].outputs[-1].name == "kept_counts"


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("next-llama", {"k": 12, "early": "33%:7"}),
        ("qwen25", {"k": 3, "early": "50%:50%", "attention": "proportional"}),
    ],
    ids=["next-llama", "qwen25"],
)
def test_a_selection_inside_the_tower(
    tiny_bundle: Callable[..., Path], tmp_path: Path, variant: str, options: dict[str, Any]
) -> None:
    """Of packed tiles, and of squares of patches in windows; as the parity tests export it."""
    bundle = check(copied(tiny_bundle(variant, split=True, **options), tmp_path))
    for graph in ("vision_select", "vision_encoder"):
        assert "early_indices" in {tensor.name for tensor in bundle.manifest.graphs[graph].outputs}


def test_half_precision_stays_as_the_graph_has_it(tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    root = copied(tiny_bundle("clip-llama", k=7, dtype="fp16"), tmp_path)
    check(root)
    layers = (root / f"engines/{SET}/vision_select.layers.txt").read_text()
    assert "dtype=float16" in layers
    products = [block for block in layers.split("\n\n") if "MATRIX_MULTIPLY" in block]
    ours = [block for block in products if "node_linear" not in block and "node_matmul" not in block]
    assert len(ours) >= 2, "relevance and the Gram product"
    assert not any("float16" in block for block in ours), "the selection is float32"


def test_tf32_is_off_and_the_network_strongly_typed(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = engines._polygraphy("tensorrt-rtx")
    seen: list[str] = []
    inner = backend.engine_bytes_from_network

    def look(network: Any, config: Any, **options: Any) -> Any:
        def configured(builder: Any, parsed: Any) -> Any:
            made = config(builder, parsed)
            seen.append(backend.util.str_from_config(made, parsed).splitlines()[0])
            return made

        return inner(network, config=configured, **options)

    monkeypatch.setattr(backend, "engine_bytes_from_network", look)
    build(tiny, "tensorrt-rtx", ["sm_86"], report=lambda line: None)
    assert len(seen) == 5
    for flags in seen:
        assert "STRONGLY_TYPED" in flags
        assert "TF32" not in flags


def test_only_what_changed_is_built_again(built: Path) -> None:
    def kept(limits: Limits | None = None) -> dict[str, bool]:
        lines: list[str] = []
        build(built, "tensorrt-rtx", ["sm_86"], limits, report=lines.append)
        return {line.split()[0].rsplit("/", 1)[1].removesuffix(".engine"): "reused" in line for line in lines}

    assert all(kept().values())
    # Another limit on the nouns is another profile of two graphs.
    wider = Limits(nouns=(1, 4, 65))
    assert [graph for graph, same in kept(wider).items() if not same] == ["vision_select", "token_select"]
    # Another graph: the engine was built from different bytes.
    file = read_bundle(built).manifest.graphs["embed_tokens"].file
    (built / file).write_bytes((built / file).read_bytes() + b"\x32\x01?")  # a doc_string
    describe_again(built, file)
    assert [graph for graph, same in kept(wider).items() if not same] == ["embed_tokens"]
    # Another version of TensorRT built one of them.
    manifest = read_bundle(built).manifest
    engine_set = manifest.engines[SET]
    older = replace(engine_set.graphs["vision_encoder"], versions={"tensorrt-rtx": "1.6"})
    graphs = engine_set.graphs | {"vision_encoder": older}
    write_manifest(built, replace(manifest, engines={SET: replace(engine_set, graphs=graphs)}))
    assert [graph for graph, same in kept(wider).items() if not same] == ["vision_encoder"]
    assert all(kept(wider).values())
    names = read_bundle(built).manifest.files.keys()
    assert {f"engines/{SET}/timing.cache", f"engines/{SET}/vision_select.layers.txt"} <= names


def test_what_a_bundle_without_a_decoder_has_is_built(tiny: Path, quick: None) -> None:
    manifest = read_bundle(tiny).manifest
    graphs = {name: spec for name, spec in manifest.graphs.items() if name != DECODER}
    write_manifest(tiny, replace(manifest, graphs=graphs))
    lines: list[str] = []
    build(tiny, "tensorrt-rtx", ["sm_86"], report=lines.append)
    assert read_bundle(tiny).manifest.engines[SET].graphs.keys() == graphs.keys()
    assert len(lines) == len(graphs)


@pytest.mark.parametrize("moment", range(10))
def test_a_build_that_breaks_leaves_a_whole_bundle(
    built: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Interrupted at each step that changes the bundle, while engines that it has are replaced."""
    graphs = read_bundle(built).manifest.graphs
    steps = 0

    def interrupt(function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == moment + 1:
                raise KeyboardInterrupt
            return function(*arguments)

        return step

    narrower = Limits(nouns=(1, 2, 9))
    with monkeypatch.context() as patched:
        patched.setattr(engines, "write_manifest", interrupt(write_manifest))
        patched.setattr(Path, "replace", interrupt(Path.replace))
        with pytest.raises(KeyboardInterrupt):
            build(built, "tensorrt-rtx", ["sm_86"], narrower, report=lambda line: None)
    assert read_bundle(built).manifest.graphs == graphs
    assert not list((built / "engines").glob(".new-*"))
    build(built, "tensorrt-rtx", ["sm_86"], narrower, report=lambda line: None)
    assert read_bundle(built).manifest.engines[SET].graphs.keys() == graphs.keys()


def test_a_build_that_is_killed_leaves_a_whole_bundle(tiny: Path) -> None:
    command = [sys.executable, "-m", "resprune.runtime.cli", "build", str(tiny), "--target", "sm_86,sm_89"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("engines/")  # in the middle: one is done, others are not
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    bundle = read_bundle(tiny)
    assert "embed_tokens" in bundle.manifest.engines[SET].graphs
    lines: list[str] = []
    build(tiny, "tensorrt-rtx", ["sm_86"], report=lines.append)
    assert "reused" in lines[0]
    assert not list((tiny / "engines").glob(".new-*"))


def test_two_builds_at_once_are_refused(tiny: Path) -> None:
    (tiny / "engines").mkdir()
    with (tiny / "engines/.lock").open("w") as held:
        assert engines.lock(held)
        with pytest.raises(ResPruneError, match="another resprune build is at work"):
            build(tiny, "tensorrt-rtx", ["sm_86"])


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["build", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_an_unknown_target_is_answered_with_the_list(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = fails(capsys, str(tiny), "--target", "sm_86,sm_42")
    assert "tensorrt-rtx builds for sm_75, sm_80, sm_86, sm_89, sm_120, sm_121, not for sm_42" in err
    assert "written like sm_86" in fails(capsys, str(tiny), "--target", "ampere")
    assert not (tiny / "engines").exists()


def test_no_target_and_no_gpu(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> None:
        raise ResPruneError("there is no GPU that CUDA can use here")

    monkeypatch.setattr(engines, "gpu_at_hand", none)
    assert "no GPU that CUDA can use here; name what to build for, as in --target sm_86" in fails(
        capsys, str(tiny)
    )


def test_no_tensorrt(tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "installed_flavours", list)
    err = fails(capsys, str(tiny), "--target", "sm_86")
    assert 'pip install "resprune[tensorrt-rtx]"' in err
    assert 'pip install "resprune[tensorrt]"' in err
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    err = fails(capsys, str(tiny), "--target", "sm_86", "--flavour", "tensorrt")
    assert "tensorrt cannot be imported" in err
    assert 'pip install "resprune[tensorrt]"' in err


@pytest.mark.parametrize("precision", ["q4", "int8"])
def test_quantised_graphs_are_refused(tiny: Path, capsys: pytest.CaptureFixture[str], precision: str) -> None:
    manifest = read_bundle(tiny).manifest
    graph = replace(manifest.graphs["decoder_model_merged"], precision=precision)
    write_manifest(tiny, replace(manifest, graphs=manifest.graphs | {"decoder_model_merged": graph}))
    err = fails(capsys, str(tiny), "--target", "sm_86")
    assert (
        f"is {precision}, whose operators TensorRT does not take; export it with --dtype fp32, fp16 or bf16"
        in err
    )


def test_a_decoder_for_onnxruntime_is_refused(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_manifest(tiny, replace(read_bundle(tiny).manifest, optimize="ort"))
    err = fails(capsys, str(tiny), "--target", "sm_86")
    assert "of ONNX Runtime's own operators; for TensorRT, export the bundle without --optimize" in err


def test_a_graph_that_tensorrt_refuses_is_named(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = read_bundle(tiny).manifest.graphs["embed_tokens"].file
    model = onnx.load(tiny / file, load_external_data=False)
    model.graph.node[0].op_type = "NonZeroOrNot"
    onnx.save(model, tiny / file)
    describe_again(tiny, file)
    err = fails(capsys, str(tiny), "--target", "sm_86")
    assert "tensorrt-rtx cannot build embed_tokens for sm_86" in err
    assert "NonZeroOrNot" in err
    assert read_bundle(tiny).manifest.engines == {}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context", "513"], "--context should be 2 to 512, this bundle's limit, not 513"),
        (["--context", "40", "--prompt", "1,8,40"], "--prompt should stay below the 40 tokens of --context"),
        (["--tokens", "1,8,900"], "--tokens should end at 16, this bundle's largest image, not 900"),
    ],
)
def test_limits_that_the_bundle_cannot_have(
    tiny: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert says in fails(capsys, str(tiny), "--target", "sm_86", *options)


@pytest.mark.parametrize("text", ["0", "4,1,1", "1,2", "1,2,3,4", "a", "1,,2", ""])
def test_a_limit_that_makes_no_sense(tiny: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert main(["build", str(tiny), "--batch", text]) == 2
    assert "neither a number from 1 nor three ascending ones" in capsys.readouterr().err


def test_limits_become_profiles(tiny: Path) -> None:
    made = profiles(
        read_bundle(tiny), Limits(batch=(1, 2, 3), nouns=(1, 5, 9), prompt=(4, 20, 90), context=128)
    )
    assert made["vision_select"] == ({"batch_size": (1, 2, 3), "text_tokens": (1, 5, 9)},)
    assert made["token_select"][0]["num_tokens"] == (16, 16, 16)
    assert made["token_select"][0]["hidden_size"] == (48, 48, 48)
    prefill, decode = made["decoder_model_merged"]
    assert prefill == {
        "batch_size": (1, 2, 3),
        "sequence_length": (4, 20, 90),
        "past_sequence_length": (0, 0, 0),
    }
    assert decode["past_sequence_length"] == (1, 20, 127)
    assert made["embed_tokens"][0]["sequence_length"] == (1, 20, 270)


def test_every_picture_fits_the_profiles_of_its_family(tiny_bundle: Callable[..., Path]) -> None:
    from PIL import Image

    options: dict[str, dict[str, Any]] = {"next-llama": {"k": 88}, "qwen25": {"share": 1.0}}
    for variant, sizes in (
        ("next-llama", [(10, 10), (64, 32), (300, 40), (40, 300), (1, 90)]),
        ("qwen25", [(20, 20), (300, 30), (30, 300), (400, 400), (14, 700)]),
    ):
        bundle = read_bundle(tiny_bundle(variant, split=True, **options[variant]))
        preprocessor = family_of(bundle).preprocessor(bundle)
        (ranges,) = profiles(bundle, Limits())["vision_select"]
        for size in sizes:
            picture = preprocessor(Image.new("RGB", size))
            arrays = preprocessor.batch([picture])
            for spec in bundle.manifest.graphs["vision_select"].inputs:
                for axis, length in zip(
                    spec.shape, getattr(arrays.get(spec.name), "shape", ()), strict=False
                ):
                    if isinstance(axis, str):
                        assert ranges[axis][0] <= length <= ranges[axis][2], (
                            f"{variant} {size}: {axis} {length}"
                        )


def test_a_thin_row_has_the_most_windows_of_its_tokens() -> None:
    for side in (1, 2, 3, 4):
        for rows in range(1, 12):
            for columns in range(1, 12):
                patches, _ = windows(Grid(2 * rows, 2 * columns, 2), (2 * side) ** 2)
                tokens = rows * columns
                assert -(-tokens // side**2) <= len(patches) <= -(-tokens // side)


def test_a_read_only_bundle_is_one_sentence(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(engines, "_engine_bytes", refuse)
    with pytest.raises(
        ResPruneError, match=r"cannot be written into .* \(No space left on device\); make room"
    ):
        build(tiny, "tensorrt-rtx", ["sm_86"])
    assert not list((tiny / "engines").glob(".new-*"))
