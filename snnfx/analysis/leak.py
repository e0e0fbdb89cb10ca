"""Measure the leak of a neuron: the fraction of a state that remains after one step without a spike.

The measurement needs no knowledge of neuron classes. One step of the graph is evaluated on numbers in float64, with all
inputs and states 0 except one state, which takes several values below the threshold: the slope of its next value is the
leak. Below the threshold spikes are constant, so no surrogate gradient interferes, and the value of a weight op changes
the states of the neuron that the weight feeds, but not of later neurons. Operations that are not element-wise do not
belong to a neuron: they propagate a change from a weight to the states that it feeds, but a state that depends on
itself through one of them has no scalar leak.
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

_SUBTHRESHOLD = (-8.0, -1.0, -0.5, 0.0, 2.0**-10)
"""Potentials at which no neuron with a threshold above 2**-10 fires."""

_ZERO_INDEX = 3
"""The index of the value 0 in both sets of points."""

_WIDE_RANGE = (-1024.0, -8.0, -0.5, 0.0, 0.5, 8.0, 1024.0)

_MIN_LEAK = 1e-12

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
    "call_method", or "mixing" (not element-wise).
    """

    name: str
    kind: str
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class StepOnNumbers:
    """A step graph evaluated on numbers: every value is `[points, 1, 1, 1, 1]` in float64.

    Args:
        program: at stage "normalized" or later.
        path: `(slot placeholder, next value)`: evaluate only the dependence of the second on the first (default: the
            whole graph). Calls that are not element-wise and do not depend on the slot are then 0, like inputs.
    """

    def __init__(self, program: StepProgram, path: tuple[Node, Node] | None = None) -> None:
        needed = set(program.graph.nodes) if path is None else _nodes_between(program, *path)
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
            return Instruction(node.name, "slot" if "slot" in node.meta else "zero")
        if node.op == "get_attr":
            return Instruction(node.name, "constant", self._constant(str(node.target)))

        def packed(argument: Any) -> Any:
            return NodeReference(argument.name) if isinstance(argument, Node) else argument

        args: Any = map_aggregate(node.args, packed)
        kwargs: Any = map_aggregate(dict(node.kwargs), packed)
        if is_size(node) or not is_elementwise(program, node):
            return Instruction(node.name, "mixing", None, args, kwargs)
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
            constants: the objects named by `targets`.
            swept: node name -> its value at each point; all other slots and inputs are 0.

        Returns:
            The value of each node, and the names of nodes that a change reached through a mixing operation.
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
                changed = [values[name] for name in operands if _varies(values[name], points)]
                if any(name in mixed for name in operands):
                    mixed.add(i.name)
                values[i.name] = self._call(i, load, constants)
                if values[i.name] is None:
                    total = sum(
                        (_first(value) - _first(value)[_ZERO_INDEX : _ZERO_INDEX + 1] for value in changed), zero
                    )
                    values[i.name] = _MIXING_GAIN * total
                    if changed:
                        mixed.add(i.name)
        return values, mixed

    def _call(self, i: Instruction, load: Callable[[Any], Any], constants: Sequence[Any]) -> Any:
        """The value of a call; None if it is not element-wise or does not accept these numbers."""
        if i.kind == "mixing":
            return None
        args, kwargs = _loaded(i.args, load), _loaded(i.kwargs, load)
        try:
            if i.kind == "call_method":
                return getattr(args[0], i.function)(*args[1:], **kwargs)
            if i.kind == "module":
                return constants[i.function](*args, **kwargs)
            return i.function(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, InputError, IndexError, AttributeError):
            return None  # needs another shape: counts as a mixing operation


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


def _varies(value: Any, points: int) -> bool:
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


def _nodes_between(program: StepProgram, slot: Node, following: Node) -> set[Node]:
    """The nodes that the next value of a slot depends on, up to mixing operations that do not depend on the slot."""
    dependent: set[Node] = {slot}
    stack = [slot]
    while stack:
        for user in stack.pop().users:
            if user not in dependent:
                dependent.add(user)
                stack.append(user)
    found: set[Node] = set()
    stack = [following]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if node in dependent or not node.op.startswith("call") or is_elementwise(program, node):
            stack.extend(node.all_input_nodes)
    return found


def _has_all_operands_in(node: Node, nodes: set[Node]) -> bool:
    return all(operand in nodes for operand in node.all_input_nodes)


def fed_slots(
    step: StepOnNumbers, program: StepProgram, node: Node, weights: Iterable[tuple[Node, Node]] = ()
) -> list[str]:
    """The slots whose next value depends on a node in the same step, below the threshold.

    Args:
        step: the whole step.
        program: of the step.
        node: a weight op.
        weights: all weight ops with their operands. A weight whose operand is the output of a fed neuron (which never
            fires, so it propagates the change) is set to 0: its users are fed by that neuron.
    """
    constants = [program.resolve(target) for target in step.targets]
    swept: dict[str, Sequence[float]] = {node.name: _SUBTHRESHOLD}
    readers = dict(zip((slot.name for slot in program.slots), program.slot_nodes(), strict=True))
    while True:
        values, _ = step.run(constants, swept)
        fed = [
            slot.name
            for slot, following in zip(program.slots, program.next_states, strict=True)
            if isinstance(following, Node) and _varies(values[following.name], len(_SUBTHRESHOLD))
        ]
        states = {readers[slot] for slot in fed}
        downstream = [
            weight.name
            for weight, operand in weights
            if weight.name not in swept
            and _varies(values[operand.name], len(_SUBTHRESHOLD))
            and _slots_read_by(operand) & states
        ]
        if not downstream:
            return fed
        swept |= dict.fromkeys(downstream, (0.0,) * len(_SUBTHRESHOLD))


def _slots_read_by(value: Node) -> set[Node]:
    """The slots that a value depends on in one step."""
    found: set[Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return {node for node in found if node.op == "placeholder" and "slot" in node.meta}


def fires(step: StepOnNumbers, program: StepProgram, slot: str) -> bool:
    """Whether the neuron of a slot spikes: some value in the step is a step function of the slot."""
    placeholder = next(s.placeholder for s in program.slots if s.name == slot)
    constants = [program.resolve(target) for target in step.targets]
    values, _ = step.run(constants, {placeholder: _WIDE_RANGE})
    for value in values.values():
        for leaf in pytree.tree_leaves(value):
            if (
                isinstance(leaf, Tensor)
                and _varies(leaf, len(_WIDE_RANGE))
                and len(torch.unique(leaf[:, 0, 0, 0, 0])) == 2
            ):
                return True
    return False


class LeakProbe(nn.Module):
    """The current leak of one slot, a function of the modules and parameters that its step reads.

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
        # A constant next value does not depend on the slot: nothing to evaluate.
        self.step = StepOnNumbers(program, (placeholder, following if isinstance(following, Node) else placeholder))
        self._measured: tuple[Any, float] | None = None
        self._cached_in: object = None

    @property
    def targets(self) -> list[str]:
        """The targets of the objects to call it with."""
        return self.step.targets

    @property
    def learnable(self) -> bool:
        """Whether the leak depends on parameters; set by the first measurement."""
        return bool(self.__dict__.get("_learnable"))

    def forward(self, *constants: Any) -> float:
        """The current leak.

        Raises:
            InputError: SNNFX615, the leak is not one number.
        """
        if self._measured is not None and self._cached_in is not None and self._cached_in is _active_cache:
            return self._measured[1]
        fingerprint = tuple(_fingerprint(constant) for constant in constants)
        if self._measured is None or self._measured[0] != fingerprint:
            self._measured = (fingerprint, self._measure(constants))
        self._cached_in = None if self.learnable else _active_cache
        return self._measured[1]

    def _measure(self, constants: Sequence[Any]) -> float:
        if self.following is None:
            return 0.0
        self.__dict__["_learnable"] = any(
            isinstance(c, nn.Parameter) or (isinstance(c, nn.Module) and any(True for _ in c.parameters()))
            for c in constants
        )
        values, mixed = self.step.run(constants, {self.placeholder: _SUBTHRESHOLD})
        following = values[self.following]
        points = torch.tensor(_SUBTHRESHOLD, dtype=torch.float64)
        if not isinstance(following, Tensor) or following.dim() < 5 or following.shape[0] != len(_SUBTHRESHOLD):
            return 0.0  # the next value does not depend on the slot
        flat = following.reshape(len(_SUBTHRESHOLD), -1)
        if self.following in mixed and bool((flat != flat[:1]).any()):
            raise several_leaks_error(self.slot, "the state depends on itself through an operation that mixes elements")
        slopes = flat.diff(dim=0) / points.diff().unsqueeze(1)
        leak = slopes[1, 0]
        if not torch.allclose(slopes[1], leak.expand_as(slopes[1]), rtol=1e-9, atol=_MIN_LEAK):
            raise several_leaks_error(self.slot, "it differs between the neurons of the layer")
        if not torch.allclose(slopes, leak.expand_as(slopes), rtol=1e-6, atol=1e-9):
            raise several_leaks_error(self.slot, "it depends on the potential")
        return 0.0 if abs(float(leak)) < _MIN_LEAK else float(leak)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_measured": None, "_cached_in": None}


_active_cache: object = None
"""Identifies the innermost active `cached_constant_leaks` block."""


@contextlib.contextmanager
def cached_constant_leaks() -> Iterator[None]:
    """Cache leaks without parameters within a block: each is measured at its first use only."""
    global _active_cache
    before, _active_cache = _active_cache, object()
    try:
        yield
    finally:
        _active_cache = before


def several_leaks_error(slot: str, why: str) -> InputError:
    """The error for a leak that is not one number."""
    return InputError(
        "SNNFX615",
        f"the leak of `{slot}` is not one number",
        why=f"{why}.",
        hint="Pass the leak of the traces as a number, e.g. trace_leak=0.9.",
    )


def _fingerprint(value: Any) -> Any:
    """A value that changes with a module or tensor: versions of tensors and plain attributes."""
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
