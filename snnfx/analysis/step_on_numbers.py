"""Evaluate a step graph on a few numbers in float64, to measure how its states depend on one another.

Operations that are not element-wise do not belong to a neuron: they propagate a change from a weight to the states that
it feeds, but a state that depends on itself through one of them has no leak of its own. Nodes that depend on parameters
and constants only, such as `sigmoid(w).view(1, -1, 1, 1)`, have their own values, whatever their operation is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.batch.rule_table import ELEMENTWISE_RULES
from snnfx.analysis.dependence import is_random
from snnfx.errors import InputError
from snnfx.ir.facts import SLOT
from snnfx.ir.nodes import descendants, is_module_call, is_size, takes_from_tuple
from snnfx.ir.program import StepProgram
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_stateful

__all__ = ["StepOnNumbers", "changes_over", "is_elementwise"]

_ZERO_INDEX = 3
"""The index of the value 0 in all sets of points."""

_MIXING_GAIN = 0.7310585786300049
"""The factor of a change in an operation that is not element-wise; arbitrary, so that changes do not cancel."""


@dataclass(frozen=True)
class NodeReference:
    """A reference to the value of a node in the arguments of another."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """One node to evaluate.

    `kind` is "slot", "zero", "constant" or "module" (`function` is an index into `targets`), "call_function",
    "call_method", or "mixing" (not element-wise). `fixed`: it depends on parameters and constants only.
    """

    name: str
    kind: str
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    fixed: bool = False


class StepOnNumbers:
    """A step graph evaluated on numbers: every value is `[points, 1, 1, 1, 1]` in float64.

    Args:
        program: at stage "normalized" or later.
        path: `(slot placeholder, next value)`: evaluate only the dependence of the second on the first (default: the
            whole graph). Calls that are not element-wise and do not depend on the slot are then 0, like inputs.
    """

    def __init__(self, program: StepProgram, path: tuple[Node, Node] | None = None) -> None:
        self._fixed = _fixed_nodes(program)
        needed = set(program.graph.nodes) if path is None else _nodes_between(program, *path, self._fixed)
        zeros = (
            set()
            if path is None
            else {n for n in needed if n.op.startswith("call") and not _has_all_operands_in(n, needed)}
        )
        self.targets: list[str] = []
        self.instructions: list[Instruction] = []
        for node in program.graph.nodes:
            if node.op != "output" and node in needed:
                is_zero = node in zeros
                self.instructions.append(
                    Instruction(node.name, "zero") if is_zero else self._instruction(program, node)
                )

    def _instruction(self, program: StepProgram, node: Node) -> Instruction:
        if node.op == "placeholder":
            return Instruction(node.name, "slot" if SLOT.is_known(node) else "zero")
        if node.op == "get_attr":
            return Instruction(node.name, "constant", self._constant(str(node.target)))

        def packed(argument: Any) -> Any:
            return NodeReference(argument.name) if isinstance(argument, Node) else argument

        args: Any = map_aggregate(node.args, packed)
        kwargs: Any = map_aggregate(dict(node.kwargs), packed)
        fixed = node in self._fixed
        if not fixed and (is_size(node) or not is_elementwise(program, node)):
            return Instruction(node.name, "mixing", None, args, kwargs)
        if node.op == "call_module":
            position = self._constant(str(node.target))
            return Instruction(node.name, "module", position, args, kwargs, fixed)
        return Instruction(node.name, node.op, node.target, args, kwargs, fixed)

    def _constant(self, target: str) -> int:
        if target not in self.targets:
            self.targets.append(target)
        return self.targets.index(target)

    def run(
        self, constants: Sequence[Any], swept: Mapping[str, Sequence[float]], inputs: float = 0.0
    ) -> tuple[dict[str, Any], set[str]]:
        """Evaluate the step.

        Args:
            constants: the objects named by `targets`.
            swept: node name -> its value at each point; all other slots are 0.
            inputs: the value of all inputs, and of calls that are not element-wise and that no change reaches.

        Returns:
            The value of each node, and the names of nodes that a change reached through a mixing operation.
        """
        points = len(next(iter(swept.values())))
        zero = torch.zeros(points, 1, 1, 1, 1, dtype=torch.float64, device=_device_of(constants))
        given = torch.full_like(zero, inputs)
        values: dict[str, Any] = {}
        mixed: set[str] = set()

        def load(argument: Any) -> Any:
            return values[argument.name] if isinstance(argument, NodeReference) else argument

        with torch.no_grad():
            for i in self.instructions:
                if i.name in swept:
                    values[i.name] = zero.new_tensor(swept[i.name]).view_as(zero)
                    continue
                if i.kind in ("slot", "zero"):
                    values[i.name] = zero if i.kind == "slot" else given
                    continue
                if i.kind == "constant":
                    values[i.name] = constants[i.function]
                    continue
                if i.fixed:
                    values[i.name] = self._evaluated(i, load, constants)
                    continue
                operands = _operands(i)
                changed = [values[name] for name in operands if changes_over(values[name], points)]
                if any(name in mixed for name in operands):
                    mixed.add(i.name)
                values[i.name] = self._call(i, load, constants)
                if values[i.name] is None:
                    total = sum(
                        (_first(value) - _first(value)[_ZERO_INDEX : _ZERO_INDEX + 1] for value in changed), zero
                    )
                    values[i.name] = _MIXING_GAIN * total if changed else given
                    if changed:
                        mixed.add(i.name)
        return values, mixed

    def _call(self, i: Instruction, load: Callable[[Any], Any], constants: Sequence[Any]) -> Any:
        """The value of a call; None if it is not element-wise or does not accept these numbers."""
        if i.kind == "mixing":
            return None
        try:
            return self._evaluated(i, load, constants)
        except (RuntimeError, TypeError, ValueError, InputError, IndexError, AttributeError):
            return None  # needs another shape: counts as a mixing operation

    def _evaluated(self, i: Instruction, load: Callable[[Any], Any], constants: Sequence[Any]) -> Any:
        args, kwargs = _loaded(i.args, load), _loaded(i.kwargs, load)
        if i.kind == "call_method":
            return getattr(args[0], i.function)(*args[1:], **kwargs)
        function = constants[i.function] if i.kind == "module" else i.function
        return function(*args, **kwargs)


def _loaded(arguments: Any, load: Callable[[Any], Any]) -> Any:
    if isinstance(arguments, NodeReference):
        return load(arguments)
    if isinstance(arguments, tuple | list):
        return type(arguments)(_loaded(a, load) for a in arguments)
    if isinstance(arguments, dict):
        return {k: _loaded(v, load) for k, v in arguments.items()}
    return arguments


def _operands(i: Instruction) -> list[str]:
    found: list[str] = []

    def visit(value: Any) -> None:
        if isinstance(value, NodeReference):
            found.append(value.name)
        elif isinstance(value, tuple | list):
            for v in value:
                visit(v)
        elif isinstance(value, dict):
            visit(list(value.values()))

    visit((i.args, i.kwargs))
    return found


def _first(value: Any) -> Any:
    return _first(value[0]) if isinstance(value, tuple | list) else value


def _device_of(constants: Sequence[Any]) -> torch.device:
    """The device of the first tensor among the constants and the parameters and buffers of modules."""
    for constant in constants:
        tensors = [constant] if isinstance(constant, Tensor) else []
        if isinstance(constant, nn.Module):
            tensors = [*constant.parameters(), *constant.buffers()]
        if tensors:
            return tensors[0].device
    return torch.device("cpu")


def _fixed_nodes(program: StepProgram) -> set[Node]:
    """The calls that depend on parameters and constants only."""
    known: set[Node] = set()
    for node in program.graph.nodes:
        is_fixed_call = node.op.startswith("call") and bool(node.all_input_nodes) and not is_random(program, node)
        if node.op == "get_attr" or (is_fixed_call and all(operand in known for operand in node.all_input_nodes)):
            known.add(node)
    return {node for node in known if node.op != "get_attr"}


def changes_over(value: Any, points: int) -> bool:
    """Whether a value differs between the points."""
    value = _first(value) if isinstance(value, tuple | list) and value else value
    if not isinstance(value, Tensor) or value.dim() < 5 or value.shape[0] != points:
        return False
    return bool((value != value[:1]).any())


def is_elementwise(program: StepProgram, node: Node) -> bool:
    """Whether a node is element-wise: each output element depends on the operands at the same index only."""
    if takes_from_tuple(node):
        return True
    if is_module_call(node) and node.target is call_stateful:
        module = program.module_of(node)
        adapter = adapter_of(module) if module is not None else None
        return adapter is not None and adapter.elementwise(module)  # type: ignore[arg-type]
    found = find_rule(node, program.resolve)
    if found is None:
        return False
    return found.row.rule in ELEMENTWISE_RULES or found.name in (
        "cut_history",
        "clone",
        "detach",
        "contiguous",
        "float",
        "double",
    )


def _nodes_between(program: StepProgram, slot: Node, following: Node, fixed: set[Node]) -> set[Node]:
    """The nodes that the next value of a slot depends on, up to mixing operations that do not depend on the slot."""
    dependent = descendants([slot])
    found: set[Node] = set()
    stack = [following]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node in dependent or node in fixed or not node.op.startswith("call") or is_elementwise(program, node):
            stack.extend(node.all_input_nodes)
    return found


def _has_all_operands_in(node: Node, nodes: set[Node]) -> bool:
    return all(operand in nodes for operand in node.all_input_nodes)
