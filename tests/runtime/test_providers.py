"""Providers by short name: the CPU comes last, and one that is not here is one sentence with the way to get it."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from resprune import Pipeline, ResPruneError
from resprune.runtime.backends import providers
from resprune.runtime.backends.providers import PROVIDERS, cache_device, new_session
from resprune.runtime.backends.session import SessionOptions, open_session, session_settings
from resprune.runtime.bundle.files import Bundle, read_bundle
from resprune.runtime.cli import main
from tests.runtime.pipelines import QUESTION, picture


@pytest.fixture
def bundle(tiny_bundle: Callable[..., Path]) -> Bundle:
    return read_bundle(tiny_bundle("clip-llama", k=7, split=True))


def test_short_names_stand_for_onnxruntimes_own() -> None:
    known = set(ort.get_all_providers()) | {
        "NvTensorRTRTXExecutionProvider"
    }  # which comes as a plug-in alone
    assert {provider.name for provider in PROVIDERS.values()} <= known
    assert all(name == name.lower() for name in PROVIDERS)


def test_the_cpu_is_the_fallback(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **given: made.append(given["providers"]))
    everything = [provider.name for provider in PROVIDERS.values()]
    monkeypatch.setattr(ort, "get_available_providers", lambda: everything)
    for names in (["cuda"], ["tensorrt", "cuda"], ["cuda", "cpu"], ["cpu"], []):
        new_session("graph.onnx", ort.SessionOptions(), names)
    cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
    assert made == [
        [cuda, "CPUExecutionProvider"],
        [("TensorrtExecutionProvider", {}), cuda, "CPUExecutionProvider"],
        [cuda, "CPUExecutionProvider"],
        ["CPUExecutionProvider"],
        ["CPUExecutionProvider"],
    ]


@pytest.mark.parametrize(
    ("said", "asked", "found"),
    [
        ("1", 0, 1),
        ("1,4", 0, 1),
        ("1", 2, 2),
        ("", 0, 0),
        ("many", 0, 0),
        ("9999", 0, os.cpu_count()),
        ("0", 0, 0),
    ],
)
def test_the_environment_says_how_many_threads(
    said: str, asked: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert session_settings(asked).intra_op_num_threads == found


def test_the_cache_stays_on_the_device_of_a_cuda_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(*names: str) -> Any:
        return SimpleNamespace(get_providers=lambda: [*names, "CPUExecutionProvider"])

    assert cache_device(session()) == "cpu"
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    assert cache_device(session("CUDAExecutionProvider")) == "cuda"
    assert cache_device(session("NvTensorRTRTXExecutionProvider")) == "cpu", (
        "a plug-in's memory was never tried"
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "cuda",
            "not installed here; get it with pip uninstall onnxruntime, then pip install onnxruntime-gpu",
        ),
        ("tensorrt-rtx", "get it with pip install onnxruntime-ep-nv-tensorrt-rtx"),
        ("openvino", r'get it with pip install "resprune\[openvino\]"'),
        ("gpu", "there is no provider gpu; choose from cpu, cuda, tensorrt, tensorrt-rtx, openvino"),
    ],
)
def test_a_provider_that_is_not_here_is_one_sentence(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, sentence: str
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(providers, "_has_plugin", lambda provider: False)
    with pytest.raises(ResPruneError, match=sentence):
        open_session(bundle, "embed_tokens", SessionOptions([name]))


def test_openvino_is_not_given_a_loop(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: ["OpenVINOExecutionProvider", "CPUExecutionProvider"]
    )
    made: list[str] = []
    real = ort.InferenceSession

    def session(path: str, settings: ort.SessionOptions, **_: object) -> ort.InferenceSession:
        made.append(path)
        return real(path, settings, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(ort, "InferenceSession", session)
    with pytest.raises(
        ResPruneError, match="cannot take the bundle's Loop; export it again with --body unrolled"
    ):
        open_session(bundle, "vision_select", SessionOptions(["openvino"]))
    selection = replace(bundle.manifest.selection, body="unrolled")
    unrolled = Bundle(bundle.root, replace(bundle.manifest, selection=selection))
    open_session(unrolled, "vision_select", SessionOptions(["openvino"]))
    assert made == [str(bundle.root / "onnx" / "vision_select.onnx")]


class Plugin:
    """What the package of a plug-in offers."""

    @staticmethod
    def get_ep_name() -> str:
        return "NvTensorRTRTXExecutionProvider"

    @staticmethod
    def get_library_path() -> str:
        return "/lib/plugin.so"


@pytest.mark.parametrize("devices", [0, 1])
def test_a_plugin_is_registered_once_and_asked_for_its_devices(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    registered: list[tuple[str, str]] = []
    device = SimpleNamespace(ep_name="NvTensorRTRTXExecutionProvider")
    monkeypatch.setattr(providers, "_has_plugin", lambda provider: provider.plugin is not None)
    monkeypatch.setattr(providers.importlib, "import_module", lambda name: Plugin)
    monkeypatch.setattr(
        ort, "register_execution_provider_library", lambda *names: registered.append(names), raising=False
    )
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [device] * devices * len(registered), raising=False)
    given: list[tuple[list[Any], dict[str, str]]] = []

    class Settings(ort.SessionOptions):  # type: ignore[misc]
        def add_provider_for_devices(self, found: list[Any], options: dict[str, str]) -> None:
            given.append((found, options))

    monkeypatch.setattr(ort, "SessionOptions", Settings)
    options = SessionOptions(["tensorrt-rtx"])
    if not devices:
        with pytest.raises(ResPruneError, match="tensorrt-rtx finds no device here that it can use"):
            open_session(bundle, "embed_tokens", options)
        return
    for _ in range(2):
        open_session(bundle, "embed_tokens", options)
    assert registered == [("NvTensorRTRTXExecutionProvider", "/lib/plugin.so")]
    assert given == [([device], {})] * 2
    with pytest.raises(ResPruneError, match="plug-in of onnxruntime and goes with the CPU alone"):
        open_session(bundle, "embed_tokens", SessionOptions(["tensorrt-rtx", "tensorrt-rtx"]))


def test_ask_takes_providers(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    picture(1).save(photo)
    words = ["ask", str(bundle.root), str(photo), QUESTION, "--max-new-tokens", "8"]
    assert main([*words, "--provider", "cpu"]) == 0
    here = Pipeline.load(bundle.root, providers=["cpu"]).ask(photo, QUESTION, max_new_tokens=8).text
    assert capsys.readouterr().out == here + "\n"
    assert main([*words, "--provider", "warp,cpu"]) == 2
    assert "there is no provider warp" in capsys.readouterr().err
