"""Integer range analysis: prove which values of a step are small non-negative integers, such as spikes.

An interval analysis of the step graph (Cousot & Cousot 1977) with lower bound 0: spikes, and their pooling, reshaping,
sums and products. Unproven nodes are omitted. A proven value can be saved for backward in a bit or a byte, exactly.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.ir.program import StepProgram
from snnfx.neuron import BaseNode
from snnfx.ops.operator_lookup import traits_of, traits_of_module
from snnfx.sandbox.torch_internals import has_global_forward_hooks
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.leaf_modules import has_torch_forward
from snnfx.state.step_calls import call_stateful
from snnfx.surrogate import Surrogate

__all__ = ["IntegerRanges", "infer_integer_ranges"]

_MAX_BOUND = 255


class IntegerRanges:
    """The result of `infer_integer_ranges`.

    Args:
        largest: proven node -> upper bound of its elements.
        modules: the modules whose settings the proof depends on.
    """

    def __init__(self, largest: dict[Node, int], modules: list[nn.Module]) -> None:
        self.largest, self.modules = largest, modules

    def holds(self) -> bool:
        """Whether the proof is still valid: settings and hooks of the modules may have changed."""
        return all(fires_spikes(module) or preserves_integers(module) for module in self.modules)


def infer_integer_ranges(program: StepProgram) -> IntegerRanges:
    """Find the values whose elements are integers from 0 to at most 255."""
    largest: dict[Node, int] = {}
    modules: list[nn.Module] = []
    for node in program.graph.nodes:
        bound = _bound(program, node, largest, modules)
        if bound is not None and bound <= _MAX_BOUND:
            largest[node] = bound
    return IntegerRanges(largest, list(dict.fromkeys(modules)))


def fires_spikes(module: nn.Module) -> bool:
    """Whether the output of a neuron or spike function is 0 or 1 for any input."""
    if _is_hooked(module):
        return False
    if isinstance(module, Surrogate):
        return module.spiking and type(module).forward.__module__ == Surrogate.__module__
    surrogate = getattr(module, "surrogate_function", None)
    if isinstance(module, BaseNode):
        return (
            type(module).advance in _SPIKING_ADVANCES and isinstance(surrogate, Surrogate) and fires_spikes(surrogate)
        )
    if type(module).__module__.startswith("spikingjelly.activation_based.neuron"):
        package = "spikingjelly.activation_based.surrogate"
        known = type(module).__name__ in _SPIKINGJELLY_NEURONS and type(surrogate).__module__.startswith(package)
        return known and bool(getattr(surrogate, "spiking", False)) and not _is_hooked(surrogate)
    return False


def preserves_integers(module: nn.Module) -> bool:
    """Whether a layer maps non-negative integers to non-negative integers that are not larger."""
    if _is_hooked(module):
        return False
    has_own_forward = has_torch_forward(module)
    if isinstance(module, nn.Dropout):
        return has_own_forward and not module.training
    return (
        has_own_forward
        and traits_of_module(module).integers == "keeps"
        and not getattr(module, "return_indices", False)
    )


def _is_hooked(module: Any) -> bool:
    hooked = has_global_forward_hooks()
    return hooked or (isinstance(module, nn.Module) and has_forward_hooks(module))


_SPIKINGJELLY_NEURONS = frozenset(
    "IFNode LIFNode ParametricLIFNode QIFNode EIFNode IzhikevichNode KLIFNode CLIFNode SimpleIFNode "
    "SimpleLIFNode".split()
)
"""Neurons that return the output of their surrogate function; others are analog, ternary or multi-spike."""


_NEURONS: list[type[BaseNode]] = [BaseNode, *BaseNode.__subclasses__()]
_SPIKING_ADVANCES = {cls.advance for cls in _NEURONS}


def _bound(program: StepProgram, node: Node, largest: dict[Node, int], modules: list[nn.Module]) -> int | None:
    operands = [largest.get(n) for n in node.all_input_nodes]
    if node.op == "call_module":
        module = program.resolve(str(node.target))
        if fires_spikes(module):
            modules.append(module)
            return 1
        if len(operands) == 1 and operands[0] is not None and preserves_integers(module):
            modules.append(module)
            return operands[0]
        return None
    if node.target is operator.getitem:
        return _element(program, node, largest, modules)
    integers = traits_of(node).integers
    if integers == "keeps" and len(operands) == 1:
        gives_indices = node.kwargs.get("return_indices", False) or len(node.args) > 6
        return None if gives_indices else operands[0]
    if any(bound is None for bound in operands) or not operands:
        return None
    known = [bound for bound in operands if bound is not None]
    two = len(node.args) == 2 and all(isinstance(a, Node) for a in node.args) and not node.kwargs
    if two and integers == "sum":
        return known[0] + known[-1]
    if two and integers == "product":
        return known[0] * known[-1]
    if integers == "largest":
        return max(known)
    return None


def _element(program: StepProgram, node: Node, largest: dict[Node, int], modules: list[nn.Module]) -> int | None:
    """The bound of `getitem`: the output of a stateful call, or a part of a proven tensor."""
    source: Any = node.args[0]
    if source in largest:
        return largest[source]
    if source.op == "call_function" and source.target is call_stateful and node.args[1] == 0:
        module = program.module_of(source)
        if module is not None and fires_spikes(module):
            modules.append(module)
            return 1
    return None
