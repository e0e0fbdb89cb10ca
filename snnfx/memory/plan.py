"""Plans from the memory model: how many steps to run at once, and what backward is to compute again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.errors import InputError
from snnfx.memory.budget import CACHE_FRIENDLY, bytes_as_text, inference_budget
from snnfx.memory.model import CallCost, MemoryModel, NotPredictable, model_memory
from snnfx.memory.packing import packed_bytes
from snnfx.memory.timeline import (
    Moment,
    inference_peak,
    inference_timeline,
    state_bytes,
    training_peak,
    training_timeline,
    widest_of,
)
from snnfx.memory.training import grouped
from snnfx.passes.checkpoint import RecomputePlan, can_be_chunked, region_calls
from snnfx.passes.chunk import ChunkPlan
from snnfx.passes.whole_numbers import prove_whole_numbers
from snnfx.program import keeps_statistics

if TYPE_CHECKING:
    from snnfx.net import Net

__all__ = [
    "example_steps",
    "packed_parts",
    "plan_inference",
    "plan_training",
    "refuse_impossible_budget",
    "with_borders",
]

_BYTES_PER_SECOND = 3e9
_OPERATIONS_PER_SECOND = 3e10
"""One core; only their ratio matters, for what is cheaper to compute again."""


def plan_inference(net: Net, leaves: Sequence[Tensor], state: Mapping[str, Any] | None) -> ChunkPlan:
    """How many time steps to run at once in inference.

    As many as the budget allows, and on a CPU no more than what caches and malloc are good at (`CACHE_FRIENDLY`).

    Args:
        net: in evaluation mode.
        leaves: the inputs, time first; only shapes are looked at.
        state: the state before the first step.

    Raises:
        InputError: SNNFX318, one time step does not fit.
    """
    device = leaves[0].device if leaves else torch.device("cpu")
    try:
        model = model_memory(net, leaves, state, training=False)
    except NotPredictable as why:
        return ChunkPlan(None, 0, 0, f"all time steps at once: the bytes of a step are not known ({why})")
    budget = inference_budget(net.options.memory_budget, device)
    widest = inference_peak(model, 1)
    needed, where = widest.bytes, widest.name
    if needed > budget and net.options.memory_budget is not None:
        model = model_memory(net, leaves, state, training=False, describe=1)
        raise cannot_be_met(budget, widest_of(inference_timeline(model, 1, detailed=True)), model, "for one time step")
    per_step = max(1.0, inference_peak(model, 3).bytes - inference_peak(model, 2).bytes)
    fixed = max(0.0, needed - per_step)
    fitting = max(1, int((budget - fixed) // per_step))
    fast = max(1, int(CACHE_FRIENDLY // per_step)) if device.type == "cpu" else fitting
    length = min(fitting, fast)
    limit = (
        f"budget {bytes_as_text(budget)}" if fitting <= fast else f"{bytes_as_text(CACHE_FRIENDLY)} are fast on a CPU"
    )
    reason = f"{bytes_as_text(per_step)} alive per time step, widest at {where}, {limit}: {length} steps at once"
    return ChunkPlan(length, int(per_step), budget, reason)


def example_steps(net: Net) -> list[Tensor] | None:
    """Tensors without memory like one step of the inputs that a net was converted with, None where it was without."""
    device = next((p.device for p in net.source.parameters()), torch.device("cpu"))
    inputs = [node.meta.get("val") for node in net.program.input_nodes()]
    steps = [torch.empty((), dtype=x.dtype, device=device).expand(x.shape) for x in inputs if isinstance(x, Tensor)]
    return steps if len(steps) == len(inputs) else None


def refuse_impossible_budget(net: Net) -> None:
    """Raise where not even one time step fits, as far as shapes are known.

    Raises:
        InputError: SNNFX318.
    """
    known = example_steps(net)
    unknown = net.options.memory_budget is None or net.options.step_mode == "s" or not known
    if unknown or any(argument.required for argument in net.program.carried):
        return
    sequences = [x.unsqueeze(0) if v else x for x, v in zip(known or (), net.varying_inputs, strict=True)]
    if net.training:
        plan_training(net, 1, sequences, None)
    else:
        plan_inference(net, sequences, None)


def cannot_be_met(budget: float, widest: Moment, model: MemoryModel, how: str) -> InputError:
    """The error for a budget that is too small; `widest` is detailed, and `model` knows who made what."""
    from snnfx.memory.report import largest_holders

    at = f"{widest.name}, {widest.phase}" if model.training else widest.name
    return InputError(
        "SNNFX318",
        f"memory_budget is {bytes_as_text(budget)}, but {bytes_as_text(widest.bytes)} are needed {how}",
        where=at,
        why=f"most is held by {largest_holders(model, widest)}.",
        hint=f"Give memory_budget={int(widest.bytes * 1.05)} or more, or a smaller batch.",
    )


def packed_parts(net: Net, model: MemoryModel) -> dict[int, float]:
    """For values that can be kept packed, the part of their bytes that this takes."""
    (graph, _), program = net._recomputation.form("main"), net.program
    largest = {node.name: bound for node, bound in prove_whole_numbers(program).largest.items()}
    calls = {call.name: call for call in model.calls}
    parts: dict[int, float] = {}
    node: Any
    for name, node in region_calls(graph).items():
        outputs: Any = node if node.target.__name__ != "multi_step_forward" else _element(node, 0)
        for user in outputs.users if outputs is not None else ():
            bound = largest.get(user.meta.get("step_node", ""))
            if bound is not None and name in calls and user.args[1] < len(calls[name].makes):
                parts[calls[name].makes[user.args[1]]] = packed_bytes((1, 64), bound) / (64 * 4)
    return parts


def _element(node: Any, index: int) -> Any:
    return next((user for user in node.users if user.args[1:] == (index,)), None)


def plan_training(net: Net, T: int, leaves: Sequence[Tensor], state: Mapping[str, Any] | None) -> RecomputePlan:
    """What backward computes again so that a training step fits the budget, as little as the model can tell.

    First regions, those first that free most bytes for the time of computing them again (a greedy knapsack); where that
    is not enough, the net as a whole in chunks of time steps.

    Raises:
        InputError: SNNFX318, nothing fits.
    """
    device = leaves[0].device if leaves else torch.device("cpu")
    budget = inference_budget(net.options.memory_budget, device)
    try:
        model = model_memory(net, leaves, state, training=True)
    except NotPredictable as reason:
        return RecomputePlan(reason=f"nothing is computed again: the bytes of a step are not known ({reason})")
    packed = packed_parts(net, model)
    chunks: dict[str, int | None] = {}
    peak = training_peak(model, T, chunks, packed)
    regions = net._recomputation.form("main")[1]
    chunked = {region.name for region in regions if can_be_chunked(net.program, region)}
    lengths = region_chunks(chunked, model, T)
    calls = [call for call in model.calls if call.is_region]
    tried: set[Any] = set()
    by_name = {call.name: call for call in calls}
    groups = [
        group
        for group in grouped(list(by_name))
        if len(group) > 1
        or kept_by_history(model, by_name[group[0]], T) > kept_instead(model, by_name[group[0]], T, packed)
    ]

    def gain(group: tuple[str, ...]) -> float:
        """Bytes freed for a second of computing them again."""
        members = [by_name[name] for name in group]
        return sum(c.bytes["saved"](T) for c in members) / (sum(recompute_seconds(c, T) for c in members) + 1e-6)

    while peak.bytes > budget and len(tried) < len(groups):
        best = max((group for group in groups if group not in tried), key=gain)
        tried.add(best)
        with_it = {**chunks, **{name: lengths[name] for name in best}}
        widest = training_peak(model, T, with_it, packed)
        if widest.bytes <= peak.bytes * 1.02:
            chunks, peak = with_it, widest
    if peak.bytes > budget:
        everything = {name: lengths[name] for group in groups for name in group}
        widest = training_peak(model, T, everything, packed)
        if widest.bytes < peak.bytes:
            chunks, peak = everything, widest
    at = f"{bytes_as_text(peak.bytes)} at {peak.name} ({peak.phase}), budget {bytes_as_text(budget)}"
    if peak.bytes <= budget:
        names = [group for group in groups if group[0] in chunks]
        told = f"computed again: {', '.join(group[0] for group in names) or 'nothing'}; {at}"
        return RecomputePlan(tuple(names), {n: c for n, c in chunks.items() if c is not None and c < T}, None, told)
    if not _has_statistics_over_time(net):
        least, length = peak, None
        for steps in _halved(T):
            here = with_borders(model, training_peak(model, steps, {}, packed), T, steps)
            if here.bytes < least.bytes:
                least, length = here, steps
            if here.bytes <= budget:
                break
        if least.bytes <= budget and length is not None:
            at = f"{bytes_as_text(least.bytes)} at {least.name}, budget {bytes_as_text(budget)}"
            return RecomputePlan((), {}, length, f"the state is kept every {length} steps; {at}")
        if length is not None:
            model = model_memory(net, leaves, state, training=True, describe=length)
            moments = training_timeline(model, length, {}, packed, detailed=True)
            at_peak = with_borders(model, widest_of(moments), T, length)
            raise cannot_be_met(budget, at_peak, model, f"with the state kept every {length} steps")
    model = model_memory(net, leaves, state, training=True, describe=T)
    at_peak = widest_of(training_timeline(model, T, chunks, packed, detailed=True))
    raise cannot_be_met(budget, at_peak, model, "with everything computed again")


def recompute_seconds(call: CallCost, steps: int) -> float:
    """About how long a call takes, for comparing calls."""
    return call.bytes["written"](steps) / _BYTES_PER_SECOND + call.bytes["operations"](steps) / _OPERATIONS_PER_SECOND


def with_borders(model: MemoryModel, moment: Moment, T: int, steps: int) -> Moment:
    """A moment of one chunk of a net that keeps its state every so many steps: the other chunks hold that alone."""
    borders = -(-T // steps) * model.state(1)
    held = {**moment.held, ("state", 0): borders} if moment.held else {}
    return replace(moment, bytes=moment.bytes + borders, held=held)


def kept_by_history(model: MemoryModel, call: CallCost, T: int) -> float:
    """The bytes that a call's history holds, inputs included."""
    return call.bytes["saved"](T) + sum(model.values[value](T) for value in call.saves)


def kept_instead(model: MemoryModel, call: CallCost, T: int, packed: Mapping[int, float]) -> float:
    """The bytes that are kept for a call when it is computed again: its inputs."""
    return sum(model.values[value](T) * packed.get(value, 1.0) for value in call.reads)


def region_chunks(chunked: set[str], model: MemoryModel, T: int) -> dict[str, int | None]:
    """Time steps at once in each region that is computed again, None for all of them.

    With c steps, a loop keeps its state at T / c borders and has c steps of its insides alive: least at the square root
    of their ratio (Chen et al. 2016). Below `CACHE_FRIENDLY / 8` there is nothing to be gained.
    """
    lengths: dict[str, int | None] = {}
    for call in model.calls:
        if not call.is_region:
            continue
        per_step = max(1.0, call.bytes["saved"].per_step + call.bytes["backward"].per_step)
        length = max(math.sqrt(T * state_bytes(model, call) / per_step), CACHE_FRIENDLY / 8 / per_step, 1.0)
        lengths[call.name] = round(length) if call.name in chunked and round(length) < T else None
    return lengths


def _has_statistics_over_time(net: Net) -> bool:
    program = net.program
    return net.training and any(
        region.kind == "fold" and keeps_statistics(program, node) for region in program.regions for node in region.nodes
    )


def _halved(T: int) -> list[int]:
    lengths = []
    while T > 1:
        T = -(-T // 2)
        lengths.append(T)
    return lengths or [1]
