"""What torch and onnxscript do for each graph and need not: it is done once, known already, or thrown away.

These are private names of theirs; where they stand elsewhere this module cannot be imported, and exports take longer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from onnxscript.rewriter import RewriteRule
from torch import fx
from torch._dynamo import config as dynamo
from torch.fx import config
from torch.onnx._internal.exporter import _decomp
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion
from torch.onnx._internal.fx.passes.type_promotion import _TypePromotionInterpreter, get_type_promotion_rule

_registry = cache(ONNXRegistry.from_torchlib)
"""The translations of 500 operators, for which the sources of each are read; an export changes none."""
_decompositions = cache(_decomp.create_onnx_friendly_decomposition_table)
_rewrite = RewriteRule.try_rewrite
_ = dynamo.fake_tensor_cache_enabled  # to fail here, not in a trace


def _decomposed(registered: set[Any]) -> dict[Any, Any]:
    """How the operators are taken apart that have no translation."""
    return dict(_decompositions(frozenset(registered)))


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


def _try_rewrite(rule: RewriteRule, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
    """A rule's own, where its pattern ends with such an operator; most end with another."""
    try:
        may_match = rule._target_pattern.output_nodes[0].op.matches(node.op_type)
    except AttributeError:  # of an onnxscript that has it elsewhere
        may_match = True
    return _rewrite(rule, model, graph, node, **options) if may_match else None


@contextmanager
def shortcuts() -> Iterator[None]:
    """While it lasts, torch.export, torch.onnx and onnxscript's optimizer take them."""
    with (
        torch.no_grad(),
        # Where it is entered again, the trace would be split, joined, and compiled at each step.
        patch.multiple(torch.no_grad, __enter__=_nothing, __exit__=_nothing),
        # Where in Python each of its nodes was made: the graph has it no more. Older versions do not have the switch.
        patch.object(config, "do_not_emit_stack_traces", True, create=True),
        # What an operator gives for some shapes: to keep it costs more than to compute it again where it is asked for.
        dynamo.patch(fake_tensor_cache_enabled=False),
        patch.object(_decomp, "create_onnx_friendly_decomposition_table", _decomposed),
        patch.object(ONNXRegistry, "from_torchlib", staticmethod(_registry)),
        patch.object(RewriteRule, "try_rewrite", _try_rewrite),
        patch.object(type_promotion, "_TypePromotionInterpreter", _Promoter),
    ):
        yield


def _nothing(context: torch.no_grad, *error: object) -> None:
    """Enter or leave a block without gradients, where there are none."""
