"""How 4-bit numbers are chosen: rounding, and what ONNX Runtime's quantizer has beside it, on trained weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    WeightOnlyQuantConfig,
)

from benchmarks.losses import lost
from benchmarks.measure import exported
from benchmarks.precision import Opened, decoder_feeds, text_ids, text_logits
from benchmarks.pretrained import write_pretrained
from resprune.exporter.verify.text import ENGLISH, every_position
from resprune.names import DECODER
from resprune.runtime.bundle.files import read_bundle
from resprune.runtime.bundle.precisions import BLOCK_SIZES
from resprune.runtime.prompt.prompter import load_tokenizer

SENSITIVE = "mlp.down_proj"
"""Weights that one row keeps in 8 bits."""
Config = Callable[[int, onnx.ModelProto, "Calibration"], WeightOnlyQuantConfig]
METHODS: dict[str, Config] = {
    "rounded": lambda size, model, text: DefaultWeightOnlyQuantConfig(block_size=size, is_symmetric=False),
    "k-quant": lambda size, model, text: KQuantWeightOnlyQuantConfig(),
    "k-quant, down projections in 8 bits": lambda size, model, text: KQuantWeightOnlyQuantConfig(
        customized_weight_config={
            node.name: {"bits": 8}
            for node in model.graph.node
            if any(SENSITIVE in name for name in node.input)
        }
    ),
    "HQQ": lambda size, model, text: HQQWeightOnlyQuantConfig(block_size=size),
    "GPTQ": lambda size, model, text: GPTQWeightOnlyQuantConfig(calibration_data_reader=text),
}
"""Settings of onnxruntime's quantizer, by what the table calls them. Each block has a whole zero, HQQ's any number."""


class Calibration(CalibrationDataReader):
    """Running text, other than what is measured, for the methods that look at activations."""

    def __init__(self, feeds: list[dict[str, NDArray[Any]]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The decoder's inputs of the next text."""
        return self.feeds.pop(0) if self.feeds else None


def run(work: Path) -> dict[str, Any]:
    """Perplexity and agreement of the decoder, its head aside, by method and size of block, against fp32."""
    checkpoint = write_pretrained(work / "pretrained")
    options = ("-k", "64", "--verify", "layers")
    opened = Opened(read_bundle(exported(checkpoint, work / "rounding-fp32", *options), check_hashes=False))
    texts = text_ids(opened.bundle)
    prompts = [opened.text_alone(ids) for ids in texts]
    plain = text_logits(opened.bundle, prompts, texts)
    found = {"fp32": {"": lost(plain["logits"], plain["logits"], plain["wanted"])}}
    for size in BLOCK_SIZES:
        own = exported(checkpoint, work / "rounding-q4", *options, "--dtype", "q4", "--block", str(size))
        logits = text_logits(read_bundle(own, check_hashes=False), prompts, texts)["logits"]
        found.setdefault("resprune", {})[str(size)] = lost(logits, plain["logits"], plain["wanted"])
    ids = np.array(load_tokenizer(opened.bundle).encode(ENGLISH, add_special_tokens=False).ids)
    feeds = decoder_feeds(opened.bundle, opened.text_alone(ids))
    wide = every_position(opened.bundle.graph_path(DECODER))
    try:
        for name in METHODS:
            for size in BLOCK_SIZES:
                with TemporaryDirectory(dir=work) as folder:
                    try:
                        graph = quantized(wide, name, size, feeds, Path(folder) / "decoder.onnx")
                    except (
                        ValueError
                    ):  # it packs zeros by pairs of blocks, and a row has an odd number of these
                        continue
                    logits = text_logits(opened.bundle, prompts, texts, graph)["logits"]
                found.setdefault(name, {})[str(size)] = lost(logits, plain["logits"], plain["wanted"])
                print(name, size, found[name][str(size)], flush=True)
    finally:
        wide.unlink()
    return {"positions": len(plain["wanted"]), "found": found}


def quantized(graph: Path, method: str, size: int, feeds: dict[str, NDArray[Any]], out: Path) -> Path:
    """Write `graph` with the layers' weights in 4 bits by one of METHODS; `feeds` are its inputs of running text."""
    model = _layers_alone(graph)
    config = METHODS[method](size, model, Calibration([feeds]))
    quantizer = MatMulNBitsQuantizer(model, block_size=size, algo_config=config)
    logging.disable()
    with redirect_stdout(StringIO()):
        quantizer.process()
    logging.disable(logging.NOTSET)
    quantizer.model.save_model_to_file(str(out), use_external_data_format=True)
    return out


def _layers_alone(graph: Path) -> onnx.ModelProto:
    """The decoder with its head hidden behind an Identity, for GPTQ cannot be told to leave it; nodes with names."""
    model = onnx.load(graph)
    for number, node in enumerate(model.graph.node):
        node.name = f"node_{number}"
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    vocabulary = model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value
    (head,) = (
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and sizes.get(node.input[1], ())[-1:] == (vocabulary,)
    )
    hidden = f"{head.input[1]}.hidden"
    place = next(place for place, node in enumerate(model.graph.node) if node.name == head.name)
    model.graph.node.insert(
        place, onnx.helper.make_node("Identity", [head.input[1]], [hidden], name="hidden_head")
    )
    model.graph.node[place + 1].input[1] = hidden
    return model


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    plain = result["found"]["fp32"][""]["perplexity"]
    lines = [
        "Layers of SmolLM2-135M-Instruct in 4 bits, its head in 8 bits in ours and in fp32 in the others; perplexity "
        f"of fp32's, and most likely token as fp32's, at {result['positions']} positions of English.\n",
        "| | " + " | ".join(f"blocks of {size}" for size in BLOCK_SIZES) + " |",
        "|---" * (1 + len(BLOCK_SIZES)) + "|",
    ]
    for name, by_size in result["found"].items():
        if name != "fp32":
            cells = [
                f"{by_size[size]['perplexity'] / plain:.4f}, {100 * by_size[size]['agreement']:.1f} %"
                if size in by_size
                else "–"
                for size in map(str, BLOCK_SIZES)
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "–: onnxruntime's quantizer cannot pack rows of an odd number of blocks by this method."]
    return "\n".join(lines)
