"""What an export will need, as it is told before it begins."""

from __future__ import annotations

from typing import Any

from torch import nn

from resprune.exporter.components import Components
from resprune.runtime.bundle.precisions import Choice
from resprune.runtime.console import bytes_text

GB = 1e9
# Fitted to benchmarks/results/export_size.json and families.json, checkpoints of 2 B to 7 B parameters in fp16 and q4,
# and to the demo, which has next to no weights: 11 s of processor time, 4 to 6 s on two cores.
BASE_BYTES = 0.8 * GB
BASE_SECONDS, SECONDS_PER_GB, SECONDS_PER_PACKED_GB = 5, 6, 7
FLOAT = 4  # bytes of a number, as graphs are compared


def estimate(components: Components, choice: Choice, disk: int, stored: int, whole: int | None) -> str:
    """Disk, memory and time of an export in words.

    `disk` is an upper bound, `stored` are the checkpoint's bytes, `whole` what `bytes_whole` says.
    """
    packed = choice.of(components.decoder.name).bits is not None
    config: Any = components.model.config
    seconds, memory = needs(
        stored,
        packed,
        _numbers(components.model),
        _numbers(components.vision.module),
        _numbers(components.embed.module),
        config.text_config.num_hidden_layers,
    )
    if whole is not None:
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
    """Rounded to 5 s and 10 s, then to tens of seconds, then to minutes."""
    if seconds >= 180:
        return f"{seconds / 60:.0f} min"
    step = 10 if seconds > 10 else 5
    return f"{max(step, step * round(seconds / step))} s"
