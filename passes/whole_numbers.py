"""Prove which values of a step are small whole numbers: spikes, and what pooling, reshaping and adding make of them.

An analysis of intervals over the step graph (Cousot & Cousot 1977) with the lower bound 0: a node is in it if all
its elements are whole numbers from 0 to the bound. What is not known is left out. Such a value can be kept for the
backward pass in a bit or a byte, exactly.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional as F

from snnfx.neuron import BaseNode
from snnfx.program import StepProgram
from snnfx.state import call_stateful
from snnfx.surrogate import Surrogate

__all__ = ["WholeNumbers", "prove_whole_numbers"]

_LARGEST = 255
_SAME = (
    "flatten reshape view permute transpose contiguous unsqueeze squeeze expand select unflatten movedim clone t detach"
)
_SAME_FUNCTIONS: tuple[Any, ...] = (
    torch.flatten,
    torch.reshape,
    torch.permute,
    torch.transpose,
    torch.unsqueeze,
    torch.squeeze,
)
_SAME_FUNCTIONS += (torch.movedim, torch.unflatten, torch.relu, F.relu, F.max_pool1d, F.max_pool2d, F.max_pool3d)
_SAME_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.ReLU)


class WholeNumbers:
    """What `prove_whole_numbers` found.

    Args:
        largest: the largest value of each proven node.
        holds: whether the settings that the proof rests on are still what they were.
    """

    def __init__(self, largest: dict[Node, int], neurons: list[nn.Module]) -> None:
        self.largest, self.neurons = largest, neurons

    def holds(self) -> bool:
        """Whether every module that the proof rests on still is as it was (settings are live)."""
        return all(map(fires_spikes, self.neurons))


def prove_whole_numbers(program: StepProgram) -> WholeNumbers:
    """Find the values that are whole numbers from 0 to at most 255."""
    largest: dict[Node, int] = {}
    neurons: list[nn.Module] = []
    for node in program.graph.nodes:
        bound = _bound(program, node, largest, neurons)
        if bound is not None and bound <= _LARGEST:
            largest[node] = bound
    return WholeNumbers(largest, neurons)


def fires_spikes(module: nn.Module) -> bool:
    """Whether the output of a neuron or spike function is 0 or 1, whatever its input; dropout: whether it is off."""
    if isinstance(module, nn.Dropout):
        return not module.training
    if isinstance(module, Surrogate):
        return module.spiking
    surrogate = getattr(module, "surrogate_function", None)
    if isinstance(module, BaseNode):
        return type(module).advance in _ADVANCES and isinstance(surrogate, Surrogate) and surrogate.spiking
    if type(module).__module__ == "spikingjelly.activation_based.neuron" or type(module).__module__.startswith(
        "spikingjelly.activation_based.neuron."
    ):
        from spikingjelly.activation_based import neuron
        from spikingjelly.activation_based import surrogate as surrogates

        known = isinstance(module, neuron.BaseNode) and isinstance(surrogate, surrogates.SurrogateFunctionBase)
        return known and bool(getattr(surrogate, "spiking", False))
    return False


_NEURONS: list[type[BaseNode]] = [BaseNode, *BaseNode.__subclasses__()]
_ADVANCES = {cls.advance for cls in _NEURONS}


def _bound(program: StepProgram, node: Node, largest: dict[Node, int], neurons: list[nn.Module]) -> int | None:
    operands = [largest.get(n) for n in node.all_input_nodes]
    if node.op == "call_module":
        module = program.resolve(str(node.target))
        if isinstance(module, Surrogate) and module.spiking:
            neurons.append(module)
            return 1
        if isinstance(module, nn.Dropout) and not module.training:
            neurons.append(module)
            return operands[0]
        return operands[0] if isinstance(module, _SAME_MODULES) and len(operands) == 1 else None
    if node.op == "call_method":
        return operands[0] if str(node.target) in _SAME.split() and len(operands) == 1 else None
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return _element(program, node, largest, neurons)
    if node.target in _SAME_FUNCTIONS and len(operands) == 1:
        return operands[0]
    if any(bound is None for bound in operands) or not operands:
        return None
    known = [bound for bound in operands if bound is not None]
    two = len(node.args) == 2 and all(isinstance(a, Node) for a in node.args) and not node.kwargs
    if two and node.target in (operator.add, torch.add):
        return known[0] + known[-1]
    if two and node.target in (operator.mul, torch.mul):
        return known[0] * known[-1]
    if node.target in (torch.cat, torch.concat):
        return max(known)
    return None


def _element(program: StepProgram, node: Node, largest: dict[Node, int], neurons: list[nn.Module]) -> int | None:
    """The output of a neuron, or a part of a proven tensor."""
    source: Any = node.args[0]
    if source in largest:
        return largest[source]
    if source.op == "call_function" and source.target is call_stateful and node.args[1] == 0:
        module = program.module_of(source)
        if module is not None and fires_spikes(module):
            neurons.append(module)
            return 1
    return None
