"""M-RoPE: which axis of a position, t, h or w, turns each angle of a head, by the `mrope_section` of a config.json."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Rotary = Callable[[Sequence[int], int], Ints]
"""`mrope_section`, and how many angles a head has → the axis of each, [count]; `ValueError` if they do not fit."""


def blocks(sections: Sequence[int], count: int) -> Ints:
    """All of t, then all of h, then all of w."""
    axes = np.repeat(np.arange(3), sections)
    if len(axes) != count:
        raise ValueError(f"mrope_section {sections} is not of the {count} angles of a head")
    return axes


def interleaved(sections: Sequence[int], count: int) -> Ints:
    """t, h, w in turns, as long as h and w have some left; all others are t's."""
    places = np.arange(count)
    axes: Ints = np.where(places < 3 * np.asarray(sections)[places % 3], places % 3, 0)
    return axes
