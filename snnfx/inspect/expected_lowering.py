"""Lower the loops of a net before its first call, on zeros of the shapes of the example inputs.

No kernel is built. The result is cached like that of a call, so the first call does not record the step again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import NUMBER, VALUE
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.region_modules import LoopRegion
from snnfx.runtime.net import Net
from snnfx.sandbox.internal_faults import surface
from snnfx.sandbox.isolation import isolated

__all__ = ["expected_lowering"]


def expected_lowering(net: Net, region: LoopRegion, slots: Sequence[str]) -> LoweredStep | MixedStep | str | None:
    """The lowered step of a loop with these slots, or the reason against it; None without example inputs."""
    if region.kernels is None:
        return None
    arguments = _example_arguments(net, region)
    is_peeled = net.program.first_step is not None and slots
    state = _example_state(net, slots) if is_peeled else None
    if arguments is None or (state is not None and None in state):
        return None
    inputs, constants = arguments
    try:
        with isolated(net.source, rng=False):
            prepared = region.kernels.prepare(inputs, state, constants)
    except Exception as error:
        surface(error, "explain cannot lower a loop before the first call")
        return None
    return prepared.lowered if prepared is not None else region.kernels.refusal


def _example_state(net: Net, slots: Sequence[str]) -> tuple[Any, ...]:
    """Zeros for the states of a region, which a peeled first step gives to it; None where the shape is unknown."""
    following = dict(zip((s.name for s in net.program.slots), net.program.next_states, strict=True))
    values = [VALUE.of(node) if isinstance(node := following[slot], Node) else node for slot in slots]
    device = _device_of(net)
    return tuple([torch.zeros(v.shape, dtype=v.dtype, device=device) if isinstance(v, Tensor) else v for v in values])


def _device_of(net: Net) -> torch.device:
    return next((p.device for p in net.parameters()), torch.device("cpu"))


def _is_number(node: Node) -> bool:
    """Whether a value is a Python number, computed from the numbers among the states."""
    if node.op == "placeholder":
        return NUMBER.of(node)
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(_is_number, node.all_input_nodes))


def _example_arguments(net: Net, region: LoopRegion) -> tuple[list[Tensor], list[Any]] | None:
    """The inputs of one step, `[1, *]` each, and the constants of a region; None if a shape is unknown."""
    program = net.program
    names = [node.name for node in region.step.graph.nodes if node.op == "placeholder"]
    names = names[:-1]  # the state
    device = _device_of(net)
    values: list[Any] = []
    for index, name in enumerate(names):
        is_constant = index < len(region.constant_targets)
        target = region.constant_targets[index] if is_constant else None
        if target is not None:
            assert region.resolve is not None
            values.append(region.resolve(target))
            continue
        node = program.nodes_by_name.get(name)
        if node is not None and node.op == "get_attr":
            values.append(program.resolve(str(node.target)))
            continue
        value = VALUE.of(node) if node is not None else None
        if (name == "time" and node is None) or (node is not None and value is None and _is_number(node)):
            values.append(torch.zeros(1, device=device))
        elif isinstance(value, Tensor):
            zeros = torch.zeros(value.shape if is_constant else (1, *value.shape), dtype=value.dtype, device=device)
            values.append(zeros)
        else:
            return None
    count = len(region.constant_targets)
    return values[count:], values[:count]
