"""What torch does for each graph and need not: it is done once, known from the trace, or thrown away.

These are private names of torch; one that has them elsewhere cannot import this module, and its exports take longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch.fx import config
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule

_registry = cache(ONNXRegistry.from_torchlib)
"""The translations of 500 operators, for which the sources of each are read; an export changes none."""


class _Promoter(_TypePromotionInterpreter):
    """Writes out the casts that operators do to their arguments, without running the program for it.

    A cast changes neither shape nor type of what the operator gives, so the values of the trace hold.
    """

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node, after its arguments are cast."""
        if n.op != "call_function" or "val" not in n.meta:
            return super().run_node(n)
        with self._set_current_node(n):
            if (rule := get_type_promotion_rule(n, self.type_promotion_table)) is not None:
                self._maybe_promote_node(n, rule)
        return n.meta["val"]


@contextmanager
def shortcuts() -> Iterator[None]:
    """While it lasts, torch.export and torch.onnx take them."""
    with (
        torch.no_grad(),
        # Where it is entered again, the trace would be split, joined, and compiled at each step.
        patch.multiple(torch.no_grad, __enter__=_nothing, __exit__=_nothing),
        # Where in Python each of its nodes was made: the graph has it no more. Older versions do not have the switch.
        patch.object(config, "do_not_emit_stack_traces", True, create=True),
        patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry)),
        patch.object(type_promotion, "_TypePromotionInterpreter", _Promoter),
    ):
        yield


def _nothing(context: torch.no_grad, *error: object) -> None:
    """Enter or leave a block without gradients, where there are none."""
