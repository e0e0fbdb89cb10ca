"""The leak of a neuron, measured: how much of a state is left after one step in which the neuron does not fire.

Nothing is known about the classes of neurons. One step of the graph is evaluated on numbers, in float64, with all
inputs and states 0 but one, which takes several values below the threshold: the slope of its next value is the leak.
Spikes do not change below the threshold, so no gradient of a surrogate is in the way, and what the value of a weight op
changes in the same step are the states of the neuron that the weight feeds, not those of neurons behind it.
Operations that are not elementwise are no part of a neuron: for the question of who is fed, they hand a change on; a
state that reaches itself through one has no leak that is a number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_aggregate

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.batch.rule_table import ELEMENTWISE_RULES
from snnfx.errors import InputError
from snnfx.ir.nodes import is_module_call, is_size, takes_from_tuple
from snnfx.ir.program import StepProgram
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_stateful

__all__ = ["LeakProbe", "StepOnNumbers", "cached_constant_leaks", "is_elementwise", "several_leaks_error"]

_BELOW = (-8.0, -1.0, -0.5, 0.0, 2.0**-10)
"""Values of a potential that no neuron fires at whose threshold is above 2**-10."""

_ZERO = 3
"""Where the value 0 is in both."""

_ALL = (-1024.0, -8.0, -0.5, 0.0, 0.5, 8.0, 1024.0)

_LEAST_LEAK = 1e-12

_WEIGHT = 0.7310585786300049
"""What an operation that is not elementwise multiplies a change with: no number that a model would cancel out."""


@dataclass(frozen=True)
class NodeReference:
    """Stands for the value of a node in the arguments of another."""

    name: str


@dataclass(frozen=True)
class Instruction:
    """One node: `kind` is "slot", "zero", "constant" (of a position), "call", or "other" (not elementwise)."""

    name: str
    kind: str
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class StepOnNumbers:
    """A step graph that is evaluated on numbers: every value is `[points, 1, 1, 1, 1]`, in float64.

    Args:
        program: at stage "normalized" or later.
        path: `(slot placeholder, next value)`: evaluate only how one depends on the other (default: everything). What
            is not elementwise and does not depend on the slot is 0 then, like an input.
    """

    def __init__(self, program: StepProgram, path: tuple[Node, Node] | None = None) -> None:
        needed = set(program.graph.nodes) if path is None else _between(program, *path)
        zeros = (
            set() if path is None else {n for n in needed if n.op.startswith("call") and not _operands_in(n, needed)}
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
            return Instruction(node.name, "slot" if "slot" in node.meta else "zero")
        if node.op == "get_attr":
            return Instruction(node.name, "constant", self._constant(str(node.target)))

        def packed(argument: Any) -> Any:
            return NodeReference(argument.name) if isinstance(argument, Node) else argument

        args: Any = map_aggregate(node.args, packed)
        kwargs: Any = map_aggregate(dict(node.kwargs), packed)
        if is_size(node) or not is_elementwise(program, node):
            return Instruction(node.name, "other", None, args, kwargs)
        if node.op == "call_module":
            position = self._constant(str(node.target))
            return Instruction(node.name, "module", position, args, kwargs)
        return Instruction(node.name, node.op, node.target, args, kwargs)

    def _constant(self, target: str) -> int:
        if target not in self.targets:
            self.targets.append(target)
        return self.targets.index(target)

    def run(self, constants: Sequence[Any], swept: Mapping[str, Sequence[float]]) -> tuple[dict[str, Any], set[str]]:
        """Evaluate the step.

        Args:
            constants: what `targets` name.
            swept: the values that some nodes take, one for each point; the other slots and the inputs are 0.

        Returns:
            The value of each node, and the names of those that a change reached through what is not elementwise.
        """
        points = len(next(iter(swept.values())))
        zero = torch.zeros(points, 1, 1, 1, 1, dtype=torch.float64)
        values: dict[str, Any] = {}
        mixed: set[str] = set()

        def load(argument: Any) -> Any:
            return values[argument.name] if isinstance(argument, NodeReference) else argument

        with torch.no_grad():
            for i in self.instructions:
                if i.name in swept:
                    values[i.name] = torch.tensor(swept[i.name], dtype=torch.float64).view_as(zero)
                    continue
                if i.kind in ("slot", "zero"):
                    values[i.name] = zero
                    continue
                if i.kind == "constant":
                    values[i.name] = constants[i.function]
                    continue
                operands = _operands(i)
                changed = [values[name] for name in operands if _changes(values[name], points)]
                if any(name in mixed for name in operands):
                    mixed.add(i.name)
                values[i.name] = self._call(i, load, constants)
                if values[i.name] is None:
                    total = sum((_first(value) - _first(value)[_ZERO : _ZERO + 1] for value in changed), zero)
                    values[i.name] = _WEIGHT * total
                    if changed:
                        mixed.add(i.name)
        return values, mixed

    def _call(self, i: Instruction, load: Callable[[Any], Any], constants: Sequence[Any]) -> Any:
        """The value of a call; None when it is not elementwise, or does not take numbers."""
        if i.kind == "other":
            return None
        args, kwargs = _loaded(i.args, load), _loaded(i.kwargs, load)
        try:
            if i.kind == "call_method":
                return getattr(args[0], i.function)(*args[1:], **kwargs)
            if i.kind == "module":
                return constants[i.function](*args, **kwargs)
            return i.function(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, InputError, IndexError, AttributeError):
            return None  # needs a shape that numbers do not have: treated as an operation that is no part of a neuron


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


def _changes(value: Any, points: int) -> bool:
    value = _first(value) if isinstance(value, tuple | list) and value else value
    if not isinstance(value, Tensor) or value.dim() < 5 or value.shape[0] != points:
        return False
    return bool((value != value[:1]).any())


def is_elementwise(program: StepProgram, node: Node) -> bool:
    """Whether every element of what a node computes comes from elements of its operands in the same place."""
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


def _between(program: StepProgram, slot: Node, following: Node) -> set[Node]:
    """What the next value of a slot is computed from, down to what is neither elementwise nor depends on the slot."""
    behind: set[Node] = {slot}
    stack = [slot]
    while stack:
        for user in stack.pop().users:
            if user not in behind:
                behind.add(user)
                stack.append(user)
    found: set[Node] = set()
    stack = [following]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node in behind or not node.op.startswith("call") or is_elementwise(program, node):
            stack.extend(node.all_input_nodes)
    return found


def _operands_in(node: Node, nodes: set[Node]) -> bool:
    return all(operand in nodes for operand in node.all_input_nodes)


def fed_slots(
    step: StepOnNumbers, program: StepProgram, node: Node, weights: Iterable[tuple[Node, Node]] = ()
) -> list[str]:
    """The slots whose next value changes in the same step with the value of a node, while nothing fires.

    Args:
        step: the whole step.
        program: of the step.
        node: a weight op.
        weights: all weight ops with their operands. Where the operand is what a fed neuron gives (it never fires,
            so it hands the change on), what comes behind the weight is fed by that neuron.
    """
    constants = [program.resolve(target) for target in step.targets]
    swept: dict[str, Sequence[float]] = {node.name: _BELOW}
    readers = dict(zip((slot.name for slot in program.slots), program.slot_nodes(), strict=True))
    while True:
        values, _ = step.run(constants, swept)
        fed = [
            slot.name
            for slot, following in zip(program.slots, program.next_states, strict=True)
            if isinstance(following, Node) and _changes(values[following.name], len(_BELOW))
        ]
        states = {readers[slot] for slot in fed}
        behind = [
            weight.name
            for weight, operand in weights
            if weight.name not in swept and _changes(values[operand.name], len(_BELOW)) and _read_by(operand) & states
        ]
        if not behind:
            return fed
        swept |= dict.fromkeys(behind, (0.0,) * len(_BELOW))


def _read_by(value: Node) -> set[Node]:
    """The slots that a value is computed from in one step."""
    found: set[Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return {node for node in found if node.op == "placeholder" and "slot" in node.meta}


def fires(step: StepOnNumbers, program: StepProgram, slot: str) -> bool:
    """Whether something in the step is a step function of a slot's value: a neuron that spikes."""
    placeholder = next(s.placeholder for s in program.slots if s.name == slot)
    constants = [program.resolve(target) for target in step.targets]
    values, _ = step.run(constants, {placeholder: _ALL})
    for value in values.values():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and _changes(leaf, len(_ALL)) and len(torch.unique(leaf[:, 0, 0, 0, 0])) == 2:
                return True
    return False


class LeakProbe(nn.Module):
    """The leak of one slot, as a function of the modules and parameters that its step reads: always up to date.

    Args:
        program: at stage "normalized".
        slot: name of the slot.
    """

    def __init__(self, program: StepProgram, slot: str) -> None:
        super().__init__()
        index = [s.name for s in program.slots].index(slot)
        following = program.next_states[index]
        self.slot, self.placeholder = slot, program.slots[index].placeholder
        self.following = following.name if isinstance(following, Node) else None
        placeholder = program.nodes_by_name[self.placeholder]
        # A value that is always the same does not depend on the slot: there is nothing to evaluate.
        self.step = StepOnNumbers(program, (placeholder, following if isinstance(following, Node) else placeholder))
        self._seen: tuple[Any, float] | None = None
        self._held_in: object = None

    @property
    def targets(self) -> list[str]:
        """What to call it with: the objects that these targets name."""
        return self.step.targets

    @property
    def learnable(self) -> bool:
        """Set by `measure`: whether the leak depends on parameters."""
        return bool(self.__dict__.get("_learnable"))

    def forward(self, *constants: Any) -> float:
        """The leak now.

        Raises:
            InputError: SNNFX615, it is not one number.
        """
        if self._seen is not None and self._held_in is not None and self._held_in is _holding:
            return self._seen[1]
        print_of_now = tuple(_fingerprint(constant) for constant in constants)
        if self._seen is None or self._seen[0] != print_of_now:
            self._seen = (print_of_now, self._measure(constants))
        self._held_in = None if self.learnable else _holding
        return self._seen[1]

    def _measure(self, constants: Sequence[Any]) -> float:
        if self.following is None:
            return 0.0
        self.__dict__["_learnable"] = any(
            isinstance(c, nn.Parameter) or (isinstance(c, nn.Module) and any(True for _ in c.parameters()))
            for c in constants
        )
        values, mixed = self.step.run(constants, {self.placeholder: _BELOW})
        following = values[self.following]
        points = torch.tensor(_BELOW, dtype=torch.float64)
        if not isinstance(following, Tensor) or following.dim() < 5 or following.shape[0] != len(_BELOW):
            return 0.0  # it does not depend on the slot
        flat = following.reshape(len(_BELOW), -1)
        if self.following in mixed and bool((flat != flat[:1]).any()):
            raise several_leaks_error(self.slot, "it depends on itself through an operation that mixes elements")
        slopes = flat.diff(dim=0) / points.diff().unsqueeze(1)
        leak = slopes[1, 0]
        if not torch.allclose(slopes[1], leak.expand_as(slopes[1]), rtol=1e-9, atol=_LEAST_LEAK):
            raise several_leaks_error(self.slot, "it is not the same for all neurons of the layer")
        if not torch.allclose(slopes, leak.expand_as(slopes), rtol=1e-6, atol=1e-9):
            raise several_leaks_error(self.slot, "it depends on the potential")
        return 0.0 if abs(float(leak)) < _LEAST_LEAK else float(leak)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None, "_held_in": None}


_holding: object = None
"""Stands for the block in which leaks are held."""


@contextlib.contextmanager
def cached_constant_leaks() -> Iterator[None]:
    """A leak that is not learned stays what it is at its first use, which saves looking at the neuron every time."""
    global _holding
    before, _holding = _holding, object()
    try:
        yield
    finally:
        _holding = before


def several_leaks_error(slot: str, why: str) -> InputError:
    """The error for a neuron whose leak is not one number."""
    return InputError(
        "SNNFX615",
        f"the leak of `{slot}` is not one number",
        why=f"{why}.",
        hint="Give the leak of the traces: trace_leak=0.9, for instance.",
    )


def _fingerprint(value: Any) -> Any:
    """Something that changes when a module or tensor does: versions of tensors and plain attributes."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, nn.Module):
        found: list[Any] = []
        for module in value.modules():
            for store in (module._parameters, module._buffers):
                found += [(id(p), p._version) for p in store.values() if p is not None]
            found += [v for v in vars(module).values() if isinstance(v, int | float | str)]
        return tuple(found)
    return id(value)
