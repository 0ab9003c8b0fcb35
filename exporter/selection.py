"""From what was asked of the selection to the selection that the graphs of one model make."""

from __future__ import annotations

from resprune.exporter.components import Components
from resprune.graphs import choose_form
from resprune.method import Selection, Settings, share_of
from resprune.runtime.bundle.manifest import Early
from resprune.runtime.errors import ResPruneError, shown
from resprune.runtime.families.table import Family


def selection_of(
    settings: Settings, family: Family, components: Components, *, counts: bool, early: Early | None = None
) -> Selection:
    """The selection that `settings` come to; `counts` is whether it counts what each token stands for.

    Raises:
        ResPruneError: more tokens than an image has, or than `early` leaves.
        SettingError: another setting that no selection has.

    """
    n = components.num_tokens or components.max_tokens
    assert n is not None
    k = settings.k or share_of(settings.share or 0.0, n)  # the other one is None
    if k > n:
        most = "the" if components.num_tokens else "the at most"
        raise ResPruneError(f"-k {shown(k)} is more than {most} {n} visual tokens of an image; give 1 to {n}")
    selection = settings.settle(
        k=k,
        num_tokens=components.num_tokens,
        max_tokens=components.max_tokens,
        alpha=family.defaults.alpha,
        form=choose_form(k, n, int(components.vision.outputs[0].shape[2])),
        counts=counts,
    )
    if early is not None and components.num_tokens:
        left = n - early.of + early.tokens
        if k > left:
            raise ResPruneError(
                f"-k {k} is more than the {left} visual tokens that --early leaves of an image; give 1 to {left}"
            )
    return selection
