"""What an export will need, as it is told before it begins."""

from __future__ import annotations

from typing import Any

from torch import nn

from resprune.exporter.components import Components
from resprune.exporter.memory import available_memory
from resprune.runtime.bundle.precisions import Choice
from resprune.runtime.console import bytes_text

GB = 1e9
# Fitted to benchmarks/results/export_size.json: checkpoints of 7 B and 3 B parameters in fp16 and q4, on two cores.
BASE_BYTES = 0.8 * GB
BASE_SECONDS, SECONDS_PER_GB, SECONDS_PER_PACKED_GB = 20, 4, 7
FLOAT = 4  # bytes of a number, as graphs are compared


def estimate(components: Components, choice: Choice, disk: int, stored: int, level: str) -> str:
    """Disk, memory and time of an export in words; `stored` are the checkpoint's bytes, `disk` is an upper bound."""
    total = _numbers(components.model)
    packed = choice.of(components.decoder.name).bits is not None
    config: Any = components.model.config
    seconds, memory = needs(
        stored,
        packed,
        total,
        _numbers(components.vision.module),
        _numbers(components.embed.module),
        config.text_config.num_hidden_layers,
    )
    # As `Verifier` decides: the whole model twice, where there is room.
    whole = (8 if choice.element == "float32" else 10) * total
    if level == "full" or (level == "auto" and whole < available_memory()):
        memory = BASE_BYTES + whole
    needed = f"{bytes_text(memory)} of memory and {_time(seconds)}"
    return f"needs up to {bytes_text(disk)} of disk; on two cores about {needed}"


def needs(
    stored: float, packed: bool, total: float, vision: float, table: float, layers: int
) -> tuple[float, float]:
    """Seconds, and bytes of memory where the decoder is compared by layers.

    `stored` are the checkpoint's bytes, `packed` says whether the decoder gets 8 bits or fewer; `total`, `vision` and
    `table` are how many numbers the model, its tower and its embedding table have, `layers` the decoder's layers.
    """
    seconds = BASE_SECONDS + (SECONDS_PER_GB + SECONDS_PER_PACKED_GB * packed) * stored / GB
    layer = max(0.0, total - vision - 2 * table) / layers
    return seconds, BASE_BYTES + FLOAT * (vision + 2 * layer + table)


def _numbers(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


def _time(seconds: float) -> str:
    return f"{round(seconds, -1):.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"
