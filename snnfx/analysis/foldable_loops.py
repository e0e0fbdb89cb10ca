"""Loops whose states carry no gradient, so that their steps may be folded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from snnfx.analysis.dependence import is_random
from snnfx.ir.facts import BATCH_DIM, STEP_REFUSAL, VARYING
from snnfx.ir.module_effects import keeps_statistics
from snnfx.ir.nodes import is_size
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.online_functions import cut_history, update_trace
from snnfx.state.step_calls import call_opaque

__all__ = ["folds_when_cut", "is_trace_loop"]


def is_trace_loop(region: Region) -> bool:
    """Whether a loop computes one trace only, `leak * trace + operand`, which has a specialised form."""
    computing = [n for n in region.nodes if n.op.startswith("call")]
    return len(computing) == 1 and computing[0].target is update_trace and len(region.slots) == 1


def folds_when_cut(program: StepProgram, region: Region, inputs: Iterable[Node] = ()) -> bool:
    """Whether the steps of a loop may be folded once its states are known.

    All states must be cut and all nodes foldable. The states are computed by a first run, so nodes that update buffers
    or draw random numbers, which must run once at each step, are excluded.

    Args:
        program: at stage "partitioned".
        region: of the program.
        inputs: operands from outside the region; those that vary need a batch.
    """
    if region.kind != "loop" or not region.slots:
        return False
    for node in region.nodes:
        if node.op == "placeholder":
            if not all(user.target in (cut_history, update_trace) for user in node.users if user.op != "output"):
                return False
        elif (
            STEP_REFUSAL.is_known(node)
            or is_random(program, node)
            or node.target is call_opaque
            or keeps_statistics(program, node)
        ):
            return False
    values = [n for n in (*region.nodes, *inputs) if not is_size(n) and VARYING.of(n)]
    return all(_has_batch(BATCH_DIM.of(n)) for n in values)


def _has_batch(dim: Any) -> bool:
    return all(map(_has_batch, dim)) if isinstance(dim, tuple) else dim is not None
