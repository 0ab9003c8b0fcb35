"""`resprune::ResidualSelect` as a TensorRT plugin: the engine carries the kernel, the device needs no Python.

The quickly deployable form of plugin: functions that are registered in the process that builds an engine. What its
ahead-of-time implementation returns, PTX and how to launch it, goes into the engine. It has no workspace, and an
engine has no other way to give a kernel memory than an output: so the plugin has two, the picks and a scratch, and
TensorRT's parser takes a node for a plugin only if it has as many. `for_plugin` makes such nodes.

    register(capability=90, processors=132)       # of the GPU the engine is for
    network = … parser.parse(for_plugin(model).SerializeToString())

Kernel and launch were never run by TensorRT: docs/kernel.md says what was tested, and how far.
"""

# No `from __future__ import annotations` here: TensorRT reads the annotations of the functions, and wants the types.

import onnx

from resprune.elements import FLOATS
from resprune.graphs.functions import DOMAIN, RESIDUAL_SELECT
from resprune.graphs.kernels.compiled import compile_residual_select
from resprune.graphs.kernels.selection import MAX_PROGRAMS, scratch_words

PLUGIN = f"{DOMAIN}::{RESIDUAL_SELECT}"


def register(*, capability: int, processors: int) -> None:
    """Register the plugin in this process, for engines of a GPU with this compute capability (87 is 8.7).

    The programs of an image wait for each other, so all must be on the GPU at once: `processors`, its number of
    multiprocessors, is how many the images of a batch share. Two programs fit on one, so that two engines may run
    beside each other; who runs more of them at the same time gives a part of that number.

    Raises:
        ImportError: TensorRT with `tensorrt.plugin` (10.7 or later) is not installed.
        ValueError: the plugin is registered already (from TensorRT).

    """
    try:
        import tensorrt as trt  # pyright: ignore[reportMissingImports]
        import tensorrt.plugin as trtp  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the plugin needs TensorRT with tensorrt.plugin, 10.7 or later: install it from NVIDIA's package index"
        ) from error
    dtypes = {getattr(trt, name): name for name in FLOATS}

    @trtp.register(PLUGIN)
    def describe(
        visual: trtp.TensorDesc, gain: trtp.TensorDesc, token_mask: trtp.TensorDesc, k: int
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
        images, num_tokens, _ = visual.shape_expr
        picks = trtp.from_shape_expr((images, k), dtype=trt.int64)
        scratch = trtp.from_shape_expr((images, scratch_words(num_tokens, k)), dtype=trt.float32)
        return picks, scratch

    @trtp.aot_impl(PLUGIN)
    def implement(
        visual: trtp.TensorDesc,
        gain: trtp.TensorDesc,
        token_mask: trtp.TensorDesc,
        k: int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        images, num_tokens, hidden_size = visual.shape_expr
        compiled = compile_residual_select(
            capability, hidden_size=hidden_size.constant_value(), k=k, dtype=dtypes[visual.dtype]
        )
        launch = trtp.KernelLaunchParams()
        share = trtp.min(trtp.ShapeExpr(processors) // images, MAX_PROGRAMS)
        launch.grid_x = trtp.max(share, 1)
        launch.grid_y = images
        launch.block_x = compiled.threads
        launch.shared_mem = compiled.shared_memory
        # After the inputs and before the outputs, as the kernel has them: num_tokens, first_step, last_step.
        scalars = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in (num_tokens, 0, k + 2)])
        return compiled.name, compiled.ptx, launch, scalars


def for_plugin(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose `ResidualSelect` nodes have the scratch as second output, and no function for it any more.

    It is for TensorRT's parser in a process where `register` was called, and for nothing else. Tensors in external
    files stay there.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        if node.domain == DOMAIN and node.op_type == RESIDUAL_SELECT:
            node.output.append(f"{node.output[0]}_scratch")
    others = [function for function in changed.functions if function.name != RESIDUAL_SELECT]
    del changed.functions[:]
    changed.functions.extend(others)
    return changed
