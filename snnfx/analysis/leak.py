"""Measure the leak of a neuron: the fraction of a state that remains after one step without a spike.

The measurement needs no knowledge of neuron classes. One step of the graph is evaluated on numbers in float64, with all
inputs and states 0 except one state, which takes several values below the threshold: the slope of its next value is the
leak, a number or one for each neuron. Below the threshold spikes are constant, so no surrogate gradient interferes, and
the value of a weight op changes the states of the neuron that the weight feeds, but not of later neurons. A leak that
depends on the potential or on the input is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.analysis.step_on_numbers import StepOnNumbers, changes_over
from snnfx.errors import InputError
from snnfx.ir.facts import SLOT
from snnfx.ir.program import StepProgram
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Leak", "LeakProbe", "cached_constant_leaks", "fed_slots", "fires", "is_one_number", "several_leaks_error"]

Leak = float | Tensor
"""A number, or a float64 tensor with one leak for each neuron, whose dimensions are the last ones of the state."""

_SUBTHRESHOLD = (-8.0, -1.0, -0.5, 0.0, 2.0**-10)
"""Potentials at which no neuron with a threshold above 2**-10 fires."""

_WIDE_RANGE = (-1024.0, -8.0, -0.5, 0.0, 0.5, 8.0, 1024.0)

_MIN_LEAK = 1e-12

_NEGATIVE_INPUT = -0.25
"""An input that brings no neuron closer to its threshold."""


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
            if isinstance(following, Node) and changes_over(values[following.name], len(_SUBTHRESHOLD))
        ]
        states = {readers[slot] for slot in fed}
        downstream = [
            weight.name
            for weight, operand in weights
            if weight.name not in swept
            and changes_over(values[operand.name], len(_SUBTHRESHOLD))
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
    return {node for node in found if node.op == "placeholder" and SLOT.is_known(node)}


def fires(step: StepOnNumbers, program: StepProgram, slot: str) -> bool:
    """Whether the neuron of a slot spikes: some value in the step is a step function of the slot."""
    placeholder = next(s.placeholder for s in program.slots if s.name == slot)
    constants = [program.resolve(target) for target in step.targets]
    values, _ = step.run(constants, {placeholder: _WIDE_RANGE})
    for value in values.values():
        for leaf in pytree.tree_leaves(value):
            if (
                isinstance(leaf, Tensor)
                and changes_over(leaf, len(_WIDE_RANGE))
                and len(torch.unique(leaf[:, 0, 0, 0, 0])) == 2
            ):
                return True
    return False


def is_one_number(leak: Leak) -> bool:
    """Whether all neurons have the same leak."""
    if not isinstance(leak, Tensor) or leak.numel() == 1:
        return True
    first = leak.flatten()[0]
    return torch.allclose(leak, first.expand_as(leak), rtol=1e-9, atol=_MIN_LEAK)


def _as_number(leak: Leak) -> float:
    value = float(leak.flatten()[0] if isinstance(leak, Tensor) else leak)
    return 0.0 if abs(value) < _MIN_LEAK else value


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
        self.per_neuron = False
        """Whether the result is a tensor with the leaks of all neurons; else it must be one number."""
        self._measured: tuple[Any, Leak] | None = None
        self._cached_in: object = None

    @property
    def targets(self) -> list[str]:
        """The targets of the objects to call it with."""
        return self.step.targets

    @property
    def learnable(self) -> bool:
        """Whether the leak depends on parameters; set by the first measurement."""
        return bool(self.__dict__.get("_learnable"))

    def forward(self, *constants: Any) -> Leak:
        """The current leak: a number, or a tensor if `per_neuron`.

        Raises:
            InputError: SNNFX615, the leak depends on the potential or the input, or differs between neurons.
        """
        if self._measured is not None and self._cached_in is not None and self._cached_in is _active_cache:
            return self._measured[1]
        fingerprint = (self.per_neuron, *(_fingerprint(constant) for constant in constants))
        if self._measured is None or self._measured[0] != fingerprint:
            leak: Leak = self.measure(constants)
            if not self.per_neuron:
                if not is_one_number(leak):
                    raise several_leaks_error(self.slot, "it differs between the neurons of the layer")
                leak = _as_number(leak)
            self._measured = (fingerprint, leak)
        self._cached_in = None if self.learnable else _active_cache
        return self._measured[1]

    def measure(self, constants: Sequence[Any]) -> Tensor:
        """The leaks of all neurons in float64, without leading dimensions of size 1; one element if all share one.

        Raises:
            InputError: SNNFX615, the leak depends on the potential or the input.
        """
        if self.following is None:
            return torch.zeros((), dtype=torch.float64)
        self.__dict__["_learnable"] = any(
            isinstance(c, nn.Parameter) or (isinstance(c, nn.Module) and any(True for _ in c.parameters()))
            for c in constants
        )
        slopes = self._slopes(constants, 0.0)
        leak = slopes[1]
        if not torch.allclose(slopes, leak.expand_as(slopes), rtol=1e-6, atol=1e-9):
            raise several_leaks_error(self.slot, "it depends on the potential")
        if "_input_checked" not in self.__dict__:
            other = self._slopes(constants, _NEGATIVE_INPUT)
            if bool(other.isfinite().all()) and not torch.allclose(other, slopes, rtol=1e-6, atol=1e-9):
                raise several_leaks_error(self.slot, "it depends on the input")
            self.__dict__["_input_checked"] = True
        while leak.dim() and leak.shape[0] == 1:
            leak = leak[0]
        return leak

    def _slopes(self, constants: Sequence[Any], inputs: float) -> Tensor:
        """The slopes between the points, `[points - 1, *neurons]`."""
        values, mixed = self.step.run(constants, {self.placeholder: _SUBTHRESHOLD}, inputs)
        following = values[str(self.following)]
        if not isinstance(following, Tensor) or following.dim() < 5 or following.shape[0] != len(_SUBTHRESHOLD):
            # The next value does not depend on the slot.
            return torch.zeros(len(_SUBTHRESHOLD) - 1, 1, dtype=torch.float64)
        if self.following in mixed and bool((following != following[:1]).any()):
            raise several_leaks_error(self.slot, "the state depends on itself through an operation that mixes elements")
        points = following.new_tensor(_SUBTHRESHOLD).diff()
        return following.diff(dim=0) / points.view(-1, *(1,) * (following.dim() - 1))

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
    """The error for a leak that no trace can follow."""
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
