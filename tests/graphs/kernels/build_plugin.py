"""Ask of the registered plugin what TensorRT's builder asks, in the builder's order: `… build_plugin OUT`.

In a process of its own: the plugin compiles, and `tensorrt` is a stand-in.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from resprune.graphs.kernels.tensorrt_plugin import register
from tests.graphs.kernels import tensorrt_core

PROCESSORS = 3
K, HIDDEN = 4, 24
SIZES = [{"B": 1, "N": 40}, {"B": 2, "N": 40}, {"B": 5, "N": 576}]


def main(out: Path) -> None:
    trt: Any = tensorrt_core.install()
    register(capability=90, processors=PROCESSORS)
    (out / "plugin.json").write_text(json.dumps({dtype: ask(trt, dtype) for dtype in ("float32", "float16")}))


def ask(trt: Any, dtype: str) -> dict[str, Any]:
    """Types, shapes, launch and kernel for visual tokens of one dtype, evaluated at each of SIZES."""
    creator = trt.get_plugin_registry().get_creator("ResidualSelect", "1", "resprune")
    fields = [trt.PluginField("k", np.array([K]), trt.PluginFieldType.INT64)]
    plugin = creator.create_plugin(
        "ResidualSelect", "resprune", fields, trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.UNKNOWN
    )
    types = [getattr(trt, dtype), trt.float32, trt.bool]
    output_types = plugin.get_output_data_types(types, [3, 2, 2])

    builder = trt.IExprBuilder()
    pictures, tokens = builder.dimension("B"), builder.dimension("N")
    inputs = [[pictures, tokens, builder.constant(HIDDEN)], [pictures, tokens], [pictures, tokens]]
    shapes = plugin.get_output_shapes(inputs, [], builder)
    descriptions = [
        trt.DynamicPluginTensorDesc(
            trt.PluginTensorDesc(trt.Dims([-1] * len(shape)), kind, trt.TensorFormat.LINEAR)
        )
        for shape, kind in zip([*inputs, *shapes], [*types, *output_types], strict=True)
    ]
    supported = plugin.get_supported_format_combinations(descriptions, len(inputs))
    plugin.configure_plugin(descriptions[:3], descriptions[3:])
    plugin.set_tactic(0)
    launch, scalars = SimpleNamespace(), Scalars()
    plugin.get_launch_params(inputs, descriptions, len(inputs), launch, scalars, builder)
    kernel_name, ptx = plugin.get_kernel(
        [entry.desc for entry in descriptions[:3]], [entry.desc for entry in descriptions[3:]]
    )

    def evaluate(expression: Any) -> list[int]:
        return [expression.value(sizes) for sizes in SIZES]

    return {
        "output_types": [kind.name for kind in output_types],
        "output_shapes": [[evaluate(size) for size in shape] for shape in shapes],
        "supported": [[entry.type.name, entry.format.name] for entry in supported],
        "launch": {name: evaluate(value.expr) for name, value in vars(launch).items()},
        "scalars": [[value.dtype.name, evaluate(value.expr)] for value in scalars.values],
        "kernel_name": kernel_name,
        "ptx": ptx.decode(),
    }


class Scalars:
    """What the builder takes the kernel's extra arguments with."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "nbSymExprs":
            value, name = [None] * value, "values"
        super().__setattr__(name, value)

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
