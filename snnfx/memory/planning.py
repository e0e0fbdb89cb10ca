"""Choose the chunk length of inference and the recomputation of training from the memory model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from snnfx.analysis.statistics_over_time import takes_batch_statistics
from snnfx.emit.executable import Executable
from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.errors import InputError, warn_once
from snnfx.ir.facts import VALUE
from snnfx.memory.budget import CACHE_FRIENDLY, bytes_as_text, inference_budget, steps_as_text
from snnfx.memory.chunk_plan import ChunkPlan
from snnfx.memory.memory_model import MemoryModel, NotPredictable, model_memory
from snnfx.memory.peak_holders import largest_holders
from snnfx.memory.timeline import (
    Moment,
    inference_peak,
    inference_timeline,
    training_peak,
    training_timeline,
    widest_of,
)
from snnfx.memory.training_planner import TrainingPlanner

__all__ = [
    "example_steps",
    "plan_inference",
    "plan_training",
    "refuse_impossible_budget",
    "with_borders",
]


def plan_inference(executable: Executable, leaves: Sequence[Tensor], state: Mapping[str, Any] | None) -> ChunkPlan:
    """Choose how many time steps one chunk of inference runs.

    The largest chunk that the budget allows. On a CPU its working set also stays below `CACHE_FRIENDLY`; the length is
    then a power of two, which divides most sequence lengths, so that the last chunk rarely has another shape.

    Args:
        executable: in evaluation mode.
        leaves: the inputs, time first; only their shapes and dtypes matter.
        state: the state before the first step.

    Raises:
        InputError: SNNFX318, one time step does not fit.
    """
    device = leaves[0].device if leaves else torch.device("cpu")
    try:
        model = model_memory(executable, leaves, state, training=False)
    except NotPredictable as why:
        _warn_of_unknown_bytes(executable, why, "chunk=<number of time steps>")
        return ChunkPlan(None, 0, 0, f"chunk = all time steps: memory use cannot be predicted from shapes ({why})")
    budget = inference_budget(executable.options.memory_budget, device)
    widest = inference_peak(model, 1)
    needed, where = widest.bytes, widest.name
    if needed > budget and executable.options.memory_budget is not None:
        model = model_memory(executable, leaves, state, training=False, describe=1)
        raise cannot_be_met(
            budget, widest_of(inference_timeline(model, 1, detailed=True)), model, "for one time step", executable
        )
    per_step = max(1.0, inference_peak(model, 3).bytes - inference_peak(model, 2).bytes)
    fixed = max(0.0, needed - per_step)
    fitting = max(1, int((budget - fixed) // per_step))
    fast = _power_of_two(CACHE_FRIENDLY / per_step) if device.type == "cpu" else fitting
    length = min(fitting, fast)
    if fitting <= fast:
        limit = f"that fits the memory budget, {bytes_as_text(budget)}"
    else:
        limit = f"whose working set, {bytes_as_text(length * per_step)}, fits the cache"
    per_step_text = f"{bytes_as_text(per_step)} per time step, peak at {where}"
    reason = f"chunk = {steps_as_text(length)} (the largest {limit}; {per_step_text})"
    return ChunkPlan(length, int(per_step), budget, reason)


def _power_of_two(count: float) -> int:
    """The largest power of two up to `count`, at least 1."""
    return 1 << max(0, int(count).bit_length() - 1)


def example_steps(executable: Executable) -> list[Tensor] | None:
    """One step of `example_inputs` as tensors without memory; None if the net was converted without them."""
    device = next((p.device for p in executable.source.parameters()), torch.device("cpu"))
    inputs = [VALUE.of(node) for node in executable.program.input_nodes()]
    steps = [torch.empty((), dtype=x.dtype, device=device).expand(x.shape) for x in inputs if isinstance(x, Tensor)]
    return steps if len(steps) == len(inputs) else None


def refuse_impossible_budget(executable: Executable) -> None:
    """Raise if not even one time step of `example_inputs` fits the budget.

    Raises:
        InputError: SNNFX318.
    """
    known = example_steps(executable)
    unknown = executable.options.memory_budget is None or executable.options.step_mode == "s" or not known
    if unknown or any(argument.required for argument in executable.program.carried):
        return
    sequences = [x.unsqueeze(0) if v else x for x, v in zip(known or (), executable.varying_inputs, strict=True)]
    try:
        if executable.training and executable.options.checkpoint == "auto":
            plan_training(executable, 1, sequences, None)
        elif not executable.training:
            plan_inference(executable, sequences, None)
    except InputError as error:
        if not executable.training:
            raise
        more = "snnfx.explain(model, example_inputs=x, T=...) predicts the memory of a whole sequence."
        hint = f"{error.hint} This is the minimum for one time step of example_inputs; {more}"
        raise InputError(error.code, error.what, where=error.where, why=error.why, hint=hint) from None


def cannot_be_met(budget: float, widest: Moment, model: MemoryModel, how: str, executable: Executable) -> InputError:
    """The error for a budget that is too small; needs a detailed `widest` and a `model` with names."""
    at = f"{widest.name}, {widest.phase}" if model.training else widest.name
    hint = f"Set memory_budget={int(widest.bytes * 1.05)} or more, or use a smaller batch."
    if model.training and not executable.training:
        hint += " For inference, call the net under `with torch.no_grad():`, which saves nothing for backward."
    return InputError(
        "SNNFX318",
        f"memory_budget is {bytes_as_text(budget)}, but the net needs {bytes_as_text(widest.bytes)} {how}",
        where=at,
        why=f"the largest tensors are {largest_holders(model, widest)}.",
        hint=hint,
    )


_MARGIN = 0.97
"""The fraction of a budget that a plan may use: predictions are a few percent off."""


def plan_training(
    executable: Executable, T: int, leaves: Sequence[Tensor], state: Mapping[str, Any] | None
) -> RecomputePlan:
    """Choose the least recomputation with which a training step fits the budget.

    None if the step fits or no budget is set. Otherwise tiles are recomputed, then also the products before them, first
    the ones that free the most bytes per second of recomputation (a greedy knapsack). If that is not enough, the whole
    net is recomputed in chunks of time steps.

    Raises:
        InputError: SNNFX318, nothing fits.
    """
    try:
        return _plan_training(executable, T, leaves, state)
    except NotPredictable as why:
        _warn_of_unknown_bytes(executable, why, 'checkpoint="regions" or checkpoint=<number of time steps>')
        return RecomputePlan(reason=f"nothing is recomputed: memory use cannot be predicted from shapes ({why})")


def _warn_of_unknown_bytes(executable: Executable, why: NotPredictable, instead: str) -> None:
    if executable.options.memory_budget is not None:
        message = f"memory_budget ignored: memory use cannot be predicted from shapes ({why})."
        warn_once("SNNFX508", f"{message} Set {instead} instead.")


def _plan_training(
    executable: Executable, T: int, leaves: Sequence[Tensor], state: Mapping[str, Any] | None
) -> RecomputePlan:
    device = leaves[0].device if leaves else torch.device("cpu")
    budget = inference_budget(executable.options.memory_budget, device)
    planner = TrainingPlanner(executable, T, leaves, state)
    peak = planner.peak(RecomputePlan())
    is_limited = executable.options.memory_budget is not None
    if not is_limited or peak.bytes <= _MARGIN * budget:
        return RecomputePlan(reason=f"nothing is recomputed; {_peak_text(peak, budget if is_limited else None)}")
    plan = planner.within(_MARGIN * budget)
    least = planner.peak(plan)
    if least.bytes <= budget:
        return replace(plan, reason=f"{describe_plan(plan)}; {_peak_text(least, budget)}")
    if not _needs_all_steps(executable):
        found = _in_chunks(model_memory(executable, leaves, state, training=True), T, budget)
        if found is not None:
            return found
        length = 1
        model = model_memory(executable, leaves, state, training=True, describe=length)
        moments = training_timeline(model, length, RecomputePlan(), {}, detailed=True)
        at_peak = with_borders(model, widest_of(moments), T, length)
        if at_peak.bytes < least.bytes:
            raise cannot_be_met(
                budget, at_peak, model, f"even with the state saved every {steps_as_text(length)}", executable
            )
    model = model_memory(executable, leaves, state, training=True, describe=T, in_tiles=True)
    at_peak = widest_of(training_timeline(model, T, plan, planner.packed, detailed=True))
    raise cannot_be_met(budget, at_peak, model, "even with everything recomputed", executable)


def _peak_text(peak: Moment, budget: float | None) -> str:
    limit = "no memory_budget is set" if budget is None else f"memory_budget is {bytes_as_text(budget)}"
    return f"peak {bytes_as_text(peak.bytes)} in the {peak.phase} pass of {peak.name}; {limit}"


def describe_plan(plan: RecomputePlan) -> str:
    """List the tiles that a plan recomputes, in a clause."""
    with_products = [group[-1] for group in plan.segments if len(group) > 1 and not _is_statistic(group[0])]
    light = [group[-1] for group in plan.segments if group[-1] not in with_products]
    parts = []
    if with_products:
        parts.append(f"recomputed with the matrix products before them: {', '.join(with_products)}")
    if light:
        without = " without these products" if with_products else ""
        parts.append(f"recomputed{without}: {', '.join(light)}")
    return "; ".join(parts) or "nothing is recomputed"


def _is_statistic(name: str) -> bool:
    return name.endswith("_stats")


def _in_chunks(model: MemoryModel, T: int, budget: float) -> RecomputePlan | None:
    """Recompute the whole net in the longest chunks that fit the budget; None if no length fits."""
    for steps in _halved(T):
        here = with_borders(model, training_peak(model, steps, RecomputePlan(), {}), T, steps)
        if here.bytes <= budget:
            saved = f"the state is saved every {steps_as_text(steps)} and the steps between are recomputed"
            return RecomputePlan(steps=steps, reason=f"{saved}; {_peak_text(here, budget)}")
    return None


def with_borders(model: MemoryModel, moment: Moment, T: int, steps: int) -> Moment:
    """Add the states saved between chunks to a moment of one chunk; the other chunks save nothing else."""
    saved_states = -(-T // steps) * model.state(1)
    held = {**moment.held, ("state", 0): saved_states} if moment.held else {}
    return replace(moment, bytes=moment.bytes + saved_states, held=held)


def _needs_all_steps(executable: Executable) -> bool:
    """Whether chunks of time steps cannot be recomputed for the backward pass."""
    folded = [node for region in executable.program.regions if region.kind == "fold" for node in region.nodes]
    if executable.program.changed_parameters:
        return True
    return executable.training and any(takes_batch_statistics(executable.program, node) for node in folded)


def _halved(T: int) -> list[int]:
    lengths = []
    while T > 1:
        T = -(-T // 2)
        lengths.append(T)
    return lengths or [1]
