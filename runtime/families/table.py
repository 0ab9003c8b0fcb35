"""The families this runtime can run, one row each: how pictures reach the vision graph, and how positions count.

A family with pictures of its own is one file with a `Preprocessor` (picture.py) and one row here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from resprune.runtime.bundle.files import Bundle
from resprune.runtime.errors import ResPruneError
from resprune.runtime.families.llava_next import AnyResolution
from resprune.runtime.families.picture import FixedGrid, Preprocessor
from resprune.runtime.families.qwen2_vl import DynamicResolution


@dataclass(frozen=True)
class Family:
    """One row: the manifest's `family`, and what reads its pictures.

    `position_axes`: 1 for `position_ids` [B, S], 3 for M-RoPE's [3, B, S]. `plain_prompt`: whether the family was
    trained with the prompt that stands in for a missing chat template, and with pictures as a token in plain text.
    """

    name: str
    title: str
    preprocessor: Callable[[Bundle], Preprocessor]
    position_axes: int = 1
    plain_prompt: bool = False


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", "LLaVA-1.5", FixedGrid.from_bundle, plain_prompt=True),
        Family("llava_next", "LLaVA-NeXT", AnyResolution.from_bundle),
        Family("qwen2_5_vl", "Qwen2.5-VL", DynamicResolution.from_bundle, position_axes=3),
        Family("qwen2_vl", "Qwen2-VL", DynamicResolution.from_bundle, position_axes=3),
    )
}


def family_of(bundle: Bundle) -> Family:
    """The row for a bundle; `ResPruneError`, listing the families, if there is none."""
    name = bundle.manifest.family
    if name not in FAMILIES:
        known = ", ".join(f"{family.title} ({family.name})" for family in FAMILIES.values())
        raise ResPruneError(
            f"the bundle is of the family {name} and this resprune runs {known}; upgrade resprune"
        )
    return FAMILIES[name]
