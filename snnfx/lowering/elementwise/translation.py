"""From the recording of a step to its expressions, and to what is left to PyTorch before and after the kernel.

Calls that depend on constants alone (`w.sigmoid()`, views of per-channel parameters) are the prologue: PyTorch runs
them once, their results are the operands of the kernel. What depends on inputs, states or gradients has to be
elementwise. Gradients of constants leave the kernel as sums over the time steps, and what autograd does with them from
there on (sums over the batch, the derivative of `sigmoid`) is the epilogue, again run once by PyTorch: legal because a
derivative is linear in what comes from above.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import AtenCall, LoweringRefused, Recording, ValueReference, call_as_recorded
from snnfx.lowering.elementwise.aten_table import ELEMENTWISE, SAME_VALUE, ElementSite, compute_dtype
from snnfx.lowering.elementwise.expressions import Builder, Expression, StepExpressions
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Replay", "TranslatedStep", "Translator", "memory_dtype", "translate"]

_MEMORY = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bool: "bool",
}


def memory_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype that kernels read and write."""
    if dtype not in _MEMORY:
        raise LoweringRefused(f"it reads or writes {str(dtype).removeprefix('torch.')}")
    return _MEMORY[dtype]


@dataclass
class Replay:
    """Calls to run again, with the numbers of what they start from and end in."""

    calls: list[AtenCall]

    def run(self, known: dict[int, Tensor], wanted: Sequence[int]) -> list[Tensor]:
        """The values `wanted`, from those known (which is filled up)."""
        for call in self.calls:
            if call.name == "view":  # most of them: as a method it takes half the time
                (source, shape), result = call.args, call.results[0]
                known[result] = known[source.number].view(shape)
                continue
            args, kwargs = [_known(a, known) for a in call.args], _known(call.kwargs, known)
            if len(call.results) == 1:
                results = call.target(*args, **kwargs)
            else:
                results = call_as_recorded(call.target, args, kwargs)
            flat = [results] if isinstance(results, Tensor) else pytree.tree_leaves(results)
            known.update((number, flat[place]) for number, place in zip(call.results, call.places, strict=True))
        return [known[number] for number in wanted]

    def part_for(self, wanted: Sequence[int]) -> Replay:
        """The calls that some values need."""
        needed = set(wanted)
        calls: list[AtenCall] = []
        for call in reversed(self.calls):
            if needed.intersection(call.results):
                needed.update(call.references())
                calls.insert(0, call)
        return Replay(calls)


def _known(argument: Any, known: dict[int, Tensor]) -> Any:
    """An argument with tensors in place of references."""
    if isinstance(argument, ValueReference):
        return known[argument.number]
    if isinstance(argument, list | tuple):
        return [_known(a, known) for a in argument]
    if isinstance(argument, dict):
        return {key: _known(a, known) for key, a in argument.items()}
    return argument


@dataclass
class TranslatedStep:
    """A step as expressions, with what surrounds the kernel.

    Args:
        expressions: the step.
        shape: of one step when it was recorded.
        sequence_values: the inputs that the step reads, by their position.
        constants: the constants that prologue and epilogue start from, as `(number of value, index of constant)`.
        operands: values that are the operands of the kernel.
        operand_shapes: their shapes when they were recorded.
        prologue: computes them.
        sums: values of the epilogue that are sums over time, with the shape that they have there; None: that of a step.
        epilogue: computes the gradients of constants.
        gradients: index of a constant -> value of the epilogue that is its gradient.
        differentiable: outputs, then states after the step, that require a gradient.
        holds_sizes: a recorded call has sizes among its arguments that may be those of the batch.
    """

    expressions: StepExpressions
    shape: tuple[int, ...]
    sequence_values: tuple[int, ...]
    constants: tuple[tuple[int, int], ...]
    operands: tuple[int, ...]
    operand_shapes: tuple[tuple[int, ...], ...]
    prologue: Replay
    sums: tuple[tuple[int, tuple[int, ...]], ...]
    epilogue: Replay
    gradients: dict[int, int]
    differentiable: tuple[bool, ...]
    holds_sizes: bool


def translate(recording: Recording, to_compare: bool = False) -> TranslatedStep:
    """The expressions of a recorded step.

    Args:
        recording: the step.
        to_compare: leave every operation in its place, those on constants alone as well.

    Raises:
        LoweringRefused: something in it is not elementwise.
    """
    return Translator(recording, to_compare).translate()


class Translator:
    """Makes the expressions of a recording."""

    def __init__(self, recording: Recording, to_compare: bool) -> None:
        self.to_compare = to_compare
        self.recording, self.values = recording, recording.values
        self.builder = Builder(simplify=not to_compare)
        self.expressions: dict[int, Expression | LoweringRefused] = {}
        self.operands: dict[int, int] = {}
        self.sums: dict[int, tuple[Expression, bool]] = {}
        shapes = [self.values[n].shape for n in (*recording.outputs, *recording.next_states)]
        self.shape: tuple[int, ...] = max(shapes, key=len) if shapes else ()
        if any(shape != self.shape for shape in shapes):
            raise LoweringRefused(f"its outputs and states have different shapes, {_listed(shapes)}")

    def translate(self) -> TranslatedStep:
        recording = self.recording
        outputs = [self.expression(n) for n in recording.outputs]
        following = [self.expression(n) for n in recording.next_states]
        for number, value in enumerate(self.values):
            if value.origin == "state" and value.dtype != self.values[recording.next_states[value.index]].dtype:
                raise LoweringRefused("a state has another dtype after each step")
            del number
        grad_sequences = [self._gradient(n, "sequence", i) for i, n in enumerate(recording.grad_sequences)]
        grad_states = [self._gradient(n, "state", i) for i, n in enumerate(recording.grad_states)]
        epilogue: dict[int, None] = {}
        gradients = {}
        for index, number in recording.grad_constants.items():
            if self.values[number].varying:
                self._into_epilogue(number, epilogue)
                gradients[index] = number
        prologue = self._calls_behind([*self.operands, *self._invariant_operands(epilogue)])
        calls = [c for c in self._in_order() if any(r in epilogue for r in c.results)]
        inputs = [v for v in self.values if v.origin == "sequence"]
        grad_leaves = {(v.origin, v.index) for v in self.values if v.tangential and v.origin.startswith("grad")}
        differentiable = [("grad_output", i) in grad_leaves for i in range(len(outputs))]
        differentiable += [("grad_state", i) in grad_leaves for i in range(len(following))]
        read = {r for call in (*prologue, *calls) for r in call.references()} | set(self.operands)
        constants = tuple((n, v.index) for n, v in enumerate(self.values) if v.origin == "constant" and n in read)
        expressions = StepExpressions(
            sequences=tuple(memory_dtype(v.dtype) if v.dtype in _MEMORY else "unused" for v in inputs),
            operands=tuple(_MEMORY.get(self.values[n].dtype, "float64") for n in self.operands),
            scalars=tuple(_is_scalar(self.values[n].shape) for n in self.operands),
            state_dtypes=tuple(memory_dtype(self.values[n].dtype) for n in recording.next_states),
            output_dtypes=tuple(memory_dtype(self.values[n].dtype) for n in recording.outputs),
            outputs=tuple(outputs),
            next_states=tuple(following),
            grad_sequences=tuple(grad_sequences),
            grad_states=tuple(grad_states),
            sums=tuple(e for e, _ in self.sums.values()),
            total=tuple(t for _, t in self.sums.values()),
        )
        return TranslatedStep(
            expressions,
            self.shape,
            tuple(n for n, v in enumerate(self.values) if v.origin == "sequence"),
            constants,
            tuple(self.operands),
            tuple(self.values[n].shape for n in self.operands),
            Replay(prologue),
            tuple((n, self.values[n].shape) for n in self.sums),
            Replay(calls),
            gradients,
            tuple(differentiable),
            any(self._holds_sizes(call) for call in (*prologue, *calls)),
        )

    # -- expressions ----------------------------------------------------------------------------------------------

    def expression(self, number: int) -> Expression:
        """The expression of a value.

        Raises:
            LoweringRefused: it is not elementwise.
        """
        found = self.expressions.get(number)
        if found is None:
            try:
                found = self._expression(number)
            except LoweringRefused as error:
                found = error
            self.expressions[number] = found
        if isinstance(found, LoweringRefused):
            raise found
        return found

    def _expression(self, number: int) -> Expression:
        value = self.values[number]
        if value.origin in ("sequence", "state", "grad_output", "grad_state"):
            if not _broadcasts(value.shape, self.shape):
                raise LoweringRefused(
                    f"an input of shape {list(value.shape)} does not fit the step's {list(self.shape)}"
                )
            return self.builder.leaf(value.origin, value.index, compute_dtype(value.dtype))
        if not value.varying:
            return self._operand(number)
        assert value.call is not None
        call = value.call
        if call.name in SAME_VALUE or call.name == "getitem":
            return self.builder.cast(self._moved(number, call), compute_dtype(value.dtype))
        rule = ELEMENTWISE.get(call.name) or ELEMENTWISE.get(call.name.removesuffix("_"))
        if rule is None:
            raise LoweringRefused(f"`{call.name}` is not known to be elementwise")
        self._check_places(number, call)
        return rule(ElementSite(call, value, self.values, self.builder, self.expression))

    def _operand(self, number: int) -> Expression:
        """What does not depend on the data: a number, or an operand of the kernel."""
        value = self.values[number]
        call = value.call
        if call is not None and call.name in ("expand", "alias", "detach", "lift_fresh"):
            source = call.references()[0]
            if _broadcasts(self.values[source].shape, self.shape):
                return self._operand(source)
        fills = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
        if call is not None and call.name in (*fills, "scalar_tensor"):
            rule = ELEMENTWISE[call.name]
            site = ElementSite(call, value, self.values, self.builder, self.expression)
            if not any(isinstance(a, ValueReference) for a in call.args[1:]):
                return rule(site)
        if call is not None and self.to_compare and call.name in (*ELEMENTWISE, "clone"):
            if call.name == "clone":
                return self._operand(call.references()[0])
            return ELEMENTWISE[call.name](ElementSite(call, value, self.values, self.builder, self.expression))
        if call is not None and call.name in _EXACT and value.dtype in (torch.float32, torch.float64):
            with contextlib.suppress(LoweringRefused):
                self._check_places(number, call)
                return ELEMENTWISE[call.name](ElementSite(call, value, self.values, self.builder, self.expression))
        if not _broadcasts(value.shape, self.shape):
            raise LoweringRefused(f"an operand of shape {list(value.shape)} does not fit the step's {list(self.shape)}")
        index = self.operands.setdefault(number, len(self.operands))
        kind = "scalar" if _is_scalar(value.shape) else "invariant"
        # Integers among the constants are exact in float64; `LoweredStep` converts them.
        return self.builder.leaf(kind, index, compute_dtype(value.dtype if value.dtype in _MEMORY else torch.float64))

    def _moved(self, number: int, call: AtenCall) -> Expression:
        """The result of an operator that moves values: they have to stay in their places."""
        varying = [r for r in dict.fromkeys(call.references()) if self.values[r].varying]
        source, result = self.values[varying[0]], self.values[number]
        if call.name == "view" and source.dtype != result.dtype:
            raise LoweringRefused("`view` looks at the bits of values")
        repeats = call.name in ("expand", "expand_copy")
        same_count = math.prod(source.shape) == math.prod(result.shape)
        if len(varying) != 1 or not (same_count or repeats) or not _same_places(source.shape, result.shape, self.shape):
            raise LoweringRefused(
                f"`{call.name}` moves values, from shape {list(source.shape)} to {list(result.shape)}"
            )
        if call.name in ("permute", "t", "transpose") and [s for s in source.shape if s != 1] != [
            s for s in self.shape if s != 1
        ]:
            raise LoweringRefused(f"`{call.name}` moves values")
        if call.name in ("permute", "t", "transpose"):
            raise LoweringRefused(f"`{call.name}` moves values")
        return self.expression(varying[0])

    def _check_places(self, number: int, call: AtenCall) -> None:
        """Operands that are smaller than a step are read at the right places."""
        shape = self.values[number].shape
        for reference in call.references():
            operand = self.values[reference].shape
            if _is_scalar(operand) or operand == shape:
                continue
            leading = shape[: max(0, len(shape) - len(self.shape))]
            aligned = all(s == 1 for s in leading) and _broadcasts(shape[len(leading) :], self.shape)
            if not aligned or not _broadcasts(_without_leading_ones(operand, len(self.shape)), self.shape):
                raise LoweringRefused(f"`{call.name}` combines shapes {list(operand)} and {list(shape)}")

    # -- gradients ------------------------------------------------------------------------------------------------

    def _gradient(self, number: int | None, kind: str, index: int) -> Expression | None:
        """The gradient of an input, before it is summed to the shape of an input that is smaller than a step."""
        if number is None or not self.values[number].varying:
            return None if number is None else self.expression(number)
        source = number
        while True:
            try:
                return self.expression(source)
            except LoweringRefused:
                call = self.values[source].call
                movers = ("sum", "view", "squeeze", "unsqueeze", "reshape", "_unsafe_view", "_to_copy", "expand")
                if call is None or call.name not in movers:
                    raise
                source = call.references()[0]

    def _into_epilogue(self, number: int, epilogue: dict[int, None]) -> None:
        """Have the epilogue compute a gradient of a constant, from sums over time of what the kernel computes."""
        value = self.values[number]
        if number in epilogue or number in self.sums or not value.varying:
            return
        try:
            self.sums[number] = (self.expression(number), False)
        except LoweringRefused:
            pass
        else:
            return
        call = value.call
        assert call is not None
        sources = [r for r in dict.fromkeys(call.references()) if self.values[r].varying]
        if any(not self.values[r].tangential for r in sources):
            raise LoweringRefused(f"the gradient of a parameter needs `{call.name}` at every step")
        if len(sources) > 1 and call.name not in ("add", "sub", "cat", "stack"):
            raise LoweringRefused(f"the gradient of a parameter needs `{call.name}` at every step")
        if call.name == "sum" and _is_scalar(value.shape):
            try:
                self.sums[number] = (self.expression(sources[0]), True)
            except LoweringRefused:
                pass
            else:
                return
        for source in sources:
            self._into_epilogue(source, epilogue)
        for result in call.results:
            epilogue[result] = None

    # -- what is left to PyTorch ------------------------------------------------------------------------------------

    def _in_order(self) -> list[AtenCall]:
        return list({id(v.call): v.call for v in self.values if v.call is not None}.values())

    def _invariant_operands(self, epilogue: dict[int, None]) -> list[int]:
        calls = {id(self.values[n].call): self.values[n].call for n in epilogue}
        found = (r for call in calls.values() if call is not None for r in call.references())
        return [r for r in found if not self.values[r].varying]

    def _calls_behind(self, wanted: Sequence[int]) -> list[AtenCall]:
        needed: dict[int, None] = {}
        stack = list(wanted)
        while stack:
            number = stack.pop()
            if number in needed:
                continue
            needed[number] = None
            call = self.values[number].call
            if call is not None:
                stack.extend(call.references())
                stack.extend(call.results)
        return [c for c in self._in_order() if any(r in needed for r in c.results)]

    def _holds_sizes(self, call: AtenCall) -> bool:
        """Whether a call makes something larger than what it is given: then a size is among its arguments."""
        given = max((_numel(self.values[r].shape) for r in call.references()), default=1)
        return any(_numel(self.values[r].shape) > given for r in call.results)


_EXACT = frozenset("add sub rsub mul div neg sqrt rsqrt reciprocal".split())
"""Operators on constants that a kernel does itself: rounded as everywhere, and cheaper than a call of PyTorch's."""


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _is_scalar(shape: Sequence[int]) -> bool:
    """One number whatever the size of the batch: no dimension, since one of size 1 may be the batch."""
    return len(shape) == 0


def _without_leading_ones(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    return all(s in (1, t) for s, t in zip(reversed(shape), reversed(to), strict=False))


def _same_places(source: tuple[int, ...], result: tuple[int, ...], step: tuple[int, ...]) -> bool:
    """Whether values of a step stay in their places: only dimensions of size 1 in front of the step come and go."""
    if source == result:
        return True
    a, b = _without_leading_ones(source, len(step)), _without_leading_ones(result, len(step))
    if a == b:
        return True
    # `expand`: the same values in more places, as broadcasting does.
    return _broadcasts(a, b) and _broadcasts(b, step) and _numel(a) != _numel(b)


def _listed(shapes: Sequence[Any]) -> str:
    return " and ".join(str(list(s)) for s in dict.fromkeys(shapes))
