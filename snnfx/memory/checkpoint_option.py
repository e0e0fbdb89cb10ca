"""The `checkpoint=` option: its check, whether it acts on a call, and the plans that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from snnfx.analysis.statistics_over_time import takes_batch_statistics
from snnfx.emit.executable import Executable
from snnfx.emit.recompute_segments import RecomputePlan, segments_of
from snnfx.errors import InputError, warn_once
from snnfx.ir.options import ConvertOptions
from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.memory.budget import bytes_as_text
from snnfx.memory.memory_model import NotPredictable
from snnfx.memory.training_planner import TrainingPlanner
from snnfx.recompute.tile import Slices
from snnfx.sandbox.torch_internals import are_transforms_active

__all__ = [
    "asks_for_recomputation",
    "check_checkpoint_option",
    "plan_checkpoint",
    "recomputation_applies",
    "refuse_changed_parameters",
    "refuse_statistics_over_time",
]


def check_checkpoint_option(checkpoint: Any) -> None:
    """Raise InputError for an invalid value of the option `checkpoint`."""
    if checkpoint is None or checkpoint in ("auto", "selective", "regions"):
        return
    if isinstance(checkpoint, bool) or not isinstance(checkpoint, int) or checkpoint < 1:
        hint = 'Use a number of time steps above 0, "selective", "regions", "auto" or None.'
        raise InputError("SNNFX309", f"checkpoint={checkpoint!r} is not a valid value", hint=hint)


def refuse_statistics_over_time(program: StepProgram, training: bool, what: str) -> None:
    """Raise if time steps depend on each other through batch statistics over time.

    Raises:
        InputError: SNNFX317, a BatchNorm in training computes its statistics over T*N.
    """
    for region in program.regions:
        for node in region.nodes:
            if training and region.kind == "fold" and takes_batch_statistics(program, node):
                raise InputError(
                    "SNNFX317",
                    f"{what} would change the result of `{describe_node(node)}`",
                    why='with batch_norm="fold", it computes its statistics in training over all time steps.',
                    hint='Use checkpoint="regions" (it does not cut time), batch_norm="per_step", or net.eval().',
                )


def refuse_changed_parameters(program: StepProgram, what: str) -> None:
    """Raise if chunks of time steps cannot be recomputed, because the steps change a parameter in place.

    Raises:
        InputError: SNNFX317.
    """
    for name in program.changed_parameters:
        raise InputError(
            "SNNFX317",
            f"{what} cannot recompute the steps that change the parameter `{name}`",
            why="each chunk saves the parameters of the model for the backward pass, and the call changes this one.",
            hint='Use checkpoint="regions", which saves the value of each step, or checkpoint=None.',
        )


def asks_for_recomputation(options: ConvertOptions) -> bool:
    """Whether the options ask for recomputation in training."""
    return options.checkpoint is not None and (options.checkpoint != "auto" or options.memory_budget is not None)


def recomputation_applies(executable: Executable) -> bool:
    """Whether a plan can reduce the tensors that this call saves for backward."""
    options = executable.options
    if not asks_for_recomputation(options) or not torch.is_grad_enabled() or options.step_mode == "s":
        return False
    if executable.graphs.is_replaced or are_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return not _warn_compiled_net_ignores_checkpoint()
    return True


def plan_checkpoint(
    executable: Executable, checkpoint: str, T: int, leaves: Sequence[Tensor], state: Mapping[str, Any] | None
) -> RecomputePlan:
    """The plan of `checkpoint="selective"` or `"regions"`."""
    try:
        planner = TrainingPlanner(executable, T, leaves, state)
    except NotPredictable as unknown:
        return _plan_without_bytes(executable, checkpoint, T, str(unknown))
    plan = planner.selective() if checkpoint == "selective" else planner.least()
    budget, peak = executable.options.memory_budget, planner.peak(plan)
    if isinstance(budget, int) and peak.bytes > budget:
        needed = f'checkpoint="{checkpoint}" needs {bytes_as_text(peak.bytes)} at {peak.name}'
        instead = 'Use checkpoint="auto", which respects the budget.'
        warn_once("SNNFX508", f"memory_budget is {bytes_as_text(budget)}, but {needed}. {instead}")
    what = "everything except matrix products" if checkpoint == "selective" else "everything"
    return replace(plan, reason=f"{what} is recomputed in the backward pass")


def _plan_without_bytes(executable: Executable, checkpoint: str, T: int, why: str) -> RecomputePlan:
    """The same plan without predicted sizes."""
    form = executable.recompute_form("main")
    groups = [
        (*(products if checkpoint == "regions" else ()), *statistics, name)
        for name, (products, statistics) in segments_of(form.graph, form.tiles).items()
    ]
    slices = {group[-1]: Slices(steps=max(1, T // 4)) for group in groups}
    return RecomputePlan(tuple(groups), slices, packs=True, reason=f"recomputed region by region ({why})")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_compiled_net_ignores_checkpoint() -> bool:
    warn_once(
        "SNNFX506",
        "checkpoint= and memory_budget= ignored: torch.compile does not run this net as one operator, so the "
        "partitioner of the compiler chooses which tensors to save for backward. Both options work if the net is not "
        "compiled.",
    )
    return True
