"""ONNX Runtime's execution providers by short names: where each comes from, and what it cannot do."""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resprune.runtime.bundle.manifest import Manifest
from resprune.runtime.errors import ResPruneError, one_line

if TYPE_CHECKING:
    import onnxruntime

CPU = "cpu"


@dataclass(frozen=True)
class Provider:
    """One row: ONNX Runtime's own name, how to get it, and the options that keep a graph's own precision.

    `plugin` is the module of the package that brings the provider to an onnxruntime that was built without it.
    """

    name: str
    install: str
    plugin: str | None = None
    options: dict[str, str] = field(default_factory=dict)
    on_cuda: bool = False
    loops: bool = True
    """Whether it takes a graph with a Loop."""


def _in_its_place(package: str) -> str:
    return f"pip uninstall onnxruntime, then pip install {package}, which takes its place"


PROVIDERS = {
    CPU: Provider("CPUExecutionProvider", "pip install onnxruntime"),
    "cuda": Provider(
        "CUDAExecutionProvider",
        _in_its_place("onnxruntime-gpu"),
        options={"use_tf32": "0"},  # the Gram product decides between tokens
        on_cuda=True,
    ),
    "tensorrt": Provider("TensorrtExecutionProvider", _in_its_place("onnxruntime-gpu"), on_cuda=True),
    "tensorrt-rtx": Provider(
        "NvTensorRTRTXExecutionProvider",
        "pip install onnxruntime-ep-nv-tensorrt-rtx",
        plugin="onnxruntime_ep_nv_tensorrt_rtx",
        on_cuda=True,
    ),
    # onnxruntime-openvino 1.24.1 ends in a segmentation fault when it compiles the selection's Loop. ACCURACY keeps
    # float32 where OpenVINO would take bfloat16 of its own accord. The plug-in takes Intel's devices only.
    "openvino": Provider(
        "OpenVINOExecutionProvider",
        'pip install "resprune[openvino]" for Intel\'s devices; for any other CPU '
        + _in_its_place("onnxruntime-openvino"),
        plugin="onnxruntime_ep_openvino",
        options={"precision": "ACCURACY"},
        loops=False,
    ),
    "directml": Provider("DmlExecutionProvider", _in_its_place("onnxruntime-directml")),
    "coreml": Provider("CoreMLExecutionProvider", "pip install onnxruntime on a Mac"),
}


def check_providers(names: Sequence[str], manifest: Manifest) -> None:
    """`ResPruneError` for a name that is none, a provider not installed, or one that this bundle would crash."""
    import onnxruntime as ort

    for name in names:
        if name not in PROVIDERS:
            raise ResPruneError(f"there is no provider {name}; choose from {', '.join(PROVIDERS)}")
        provider = PROVIDERS[name]
        if provider.name not in ort.get_available_providers() and not _has_plugin(provider):
            raise ResPruneError(f"the provider {name} is not installed here; get it with {provider.install}")
        if not provider.loops and manifest.selection.body == "loop":
            raise ResPruneError(
                f"the provider {name} cannot take the bundle's Loop; export it again with --body unrolled"
            )


def new_session(
    path: str, settings: "onnxruntime.SessionOptions", names: Sequence[str]
) -> "onnxruntime.InferenceSession":
    """A session on the named providers, best first; what none of them takes runs on the CPU."""
    import onnxruntime as ort

    built_in = ort.get_available_providers()
    plugins = [name for name in names if PROVIDERS[name].name not in built_in]
    if not plugins:
        chosen: list[Any] = [(PROVIDERS[name].name, PROVIDERS[name].options) for name in names if name != CPU]
        return ort.InferenceSession(path, settings, providers=[*chosen, PROVIDERS[CPU].name])
    if len([name for name in names if name != CPU]) > 1:
        raise ResPruneError(
            f"the provider {plugins[0]} is a plug-in of onnxruntime and goes with the CPU alone; leave the others out"
        )
    settings.add_provider_for_devices(_devices(plugins[0]), PROVIDERS[plugins[0]].options)
    return ort.InferenceSession(path, settings)


def cache_device(session: "onnxruntime.InferenceSession") -> str:
    """Where a session's KV cache should stay: "cuda" with a CUDA provider that onnxruntime was built with."""
    import onnxruntime as ort

    on_cuda = {provider.name for provider in PROVIDERS.values() if provider.on_cuda}
    built_in = on_cuda & set(ort.get_available_providers())
    return "cuda" if built_in & set(session.get_providers()) else "cpu"


def _has_plugin(provider: Provider) -> bool:
    return provider.plugin is not None and importlib.util.find_spec(provider.plugin) is not None


def _devices(name: str) -> list[Any]:
    """The devices of a plug-in, whose library is registered with onnxruntime the first time."""
    import onnxruntime as ort

    provider = PROVIDERS[name]

    def found() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == provider.name]

    devices = found()
    if not devices:
        assert provider.plugin is not None
        plugin: Any = importlib.import_module(provider.plugin)
        try:
            ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
        except Exception as error:  # already registered, or a library it needs is missing
            if "already" not in str(error):
                raise ResPruneError(f"the provider {name} cannot be loaded ({one_line(error)})") from None
        devices = found()
    if not devices:
        raise ResPruneError(f"the provider {name} finds no device here that it can use; {provider.install}")
    return devices
