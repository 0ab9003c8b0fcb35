"""M-RoPE: which axis of a position, t, h or w, turns each angle of a head, by the `mrope_section` of a config.json."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from resprune.runtime.errors import shown

Ints = npt.NDArray[np.int64]
Rotary = Callable[[Sequence[int], int], Ints]
"""`mrope_section`, and how many angles a head has → the axis of each, [count]; `ValueError` if they do not fit."""


def blocks(sections: Sequence[int], count: int) -> Ints:
    """All of t, then all of h, then all of w."""
    sizes = _sizes(sections)
    if sum(sizes) != count:
        raise ValueError(f"mrope_section {shown(sections)} is not of the {count} angles of a head")
    return np.repeat(np.arange(3), sizes)


def interleaved(sections: Sequence[int], count: int) -> Ints:
    """t, h, w in turns, as long as h and w have some left; all others are t's, however many that are."""
    sizes, places = np.array(_sizes(sections)), np.arange(count)
    axes: Ints = np.where(places < 3 * sizes[places % 3], places % 3, 0)
    return axes


def _sizes(sections: object) -> list[int]:
    """`sections` if they are three whole numbers from 0; else `ValueError`."""
    if (
        not isinstance(sections, Sequence)
        or len(sections) != 3
        or not all(type(size) is int and size >= 0 for size in sections)
    ):
        raise ValueError(f"mrope_section {shown(sections)} is not three whole numbers")
    return [*sections]
