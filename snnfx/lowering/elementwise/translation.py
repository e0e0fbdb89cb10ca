"""Translate the recording of a step to expressions of one element.

PyTorch still runs some calls before and after the kernel. Calls that depend only on constants (`w.sigmoid()`, views of
per-channel parameters) form the prologue: PyTorch runs them once, and their results are operands of the kernel. Calls
that depend on inputs, states or gradients have to be element-wise. The kernel sums the gradients of constants over the
time steps. The rest of their backward pass (sums over the batch, the derivative of `sigmoid`) forms the epilogue, which
PyTorch runs once: legal because a derivative is linear in its incoming gradient. A custom backward need not be linear,
so its calls are in the epilogue only if the operator is known to be linear.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import (
    AtenCall,
    LoweringRefused,
    RecordedValue,
    Recording,
    ValueReference,
    call_as_recorded,
    resolve_references,
)
from snnfx.lowering.elementwise.aten_table import ELEMENTWISE, RuleContext, compute_dtype, moves_values
from snnfx.lowering.elementwise.expressions import Builder, Expression, StepExpressions, topological
from snnfx.lowering.elementwise.selected_values import SelectedValues
from snnfx.lowering.linear_calls import is_linear
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Replay", "TranslatedStep", "Translator", "memory_dtype", "translate"]

_MEMORY = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}


def memory_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype that kernels can read and write."""
    if dtype not in _MEMORY:
        raise LoweringRefused(f"it reads or writes {str(dtype).removeprefix('torch.')}")
    return _MEMORY[dtype]


@dataclass
class Replay:
    """Runs recorded calls on other values."""

    calls: list[AtenCall]

    def run(self, known: dict[int, Tensor], wanted: Sequence[int]) -> list[Tensor]:
        """Run the calls on the values `known`, add all results to it, return the values `wanted`."""
        for call in self.calls:
            if call.name == "view":  # the most frequent call; as a method it takes half the time
                (source, shape), result = call.args, call.results[0]
                known[result] = known[source.number].view(shape)
                continue
            args, kwargs = [resolve_references(a, known) for a in call.args], resolve_references(call.kwargs, known)
            if len(call.results) == 1:
                results = call.target(*args, **kwargs)
            else:
                results = call_as_recorded(call.target, args, kwargs)
            flat = [results] if isinstance(results, Tensor) else pytree.tree_leaves(results)
            known.update((number, flat[place]) for number, place in zip(call.results, call.positions, strict=True))
        return [known[number] for number in wanted]

    def part_for(self, wanted: Sequence[int]) -> Replay:
        """The calls that the values `wanted` need."""
        needed = set(wanted)
        calls: list[AtenCall] = []
        for call in reversed(self.calls):
            if needed.intersection(call.results):
                needed.update(call.references())
                calls.insert(0, call)
        return Replay(calls)


@dataclass
class TranslatedStep:
    """A step as expressions, with the calls before and after the kernel.

    Args:
        expressions: the step.
        shape: the shape of one recorded step.
        constants: the constants that prologue and epilogue read or that have a gradient, as
            `(number of value, index of constant)`.
        operands: the values that are operands of the kernel.
        operand_shapes: their recorded shapes.
        prologue: computes the operands.
        sums: the values of the epilogue that the kernel sums over time, with their shapes.
        epilogue: computes the gradients of constants.
        gradients: index of a constant -> value of the epilogue that is its gradient.
        repeated: the values of `gradients` that are the same at each step; the prologue computes them.
        differentiable: whether each output, then each state after the step, requires a gradient.
        has_fixed_sizes: whether a recorded call has sizes among its arguments, which may depend on the batch size.
    """

    expressions: StepExpressions
    shape: tuple[int, ...]
    constants: tuple[tuple[int, int], ...]
    operands: tuple[int, ...]
    operand_shapes: tuple[tuple[int, ...], ...]
    prologue: Replay
    sums: tuple[tuple[int, tuple[int, ...]], ...]
    epilogue: Replay
    gradients: dict[int, int]
    repeated: frozenset[int]
    differentiable: tuple[bool, ...]
    has_fixed_sizes: bool

    def reduced_sum(self, index: int, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of a sum over time that the epilogue only reduces over some dimensions, with 1 in these; else None.

        Args:
            index: of one of `sums`.
            shape: the shape of a step.
        """
        number, recorded = self.sums[index]
        calls = [call for call in self.epilogue.calls if number in call.references()]
        if len(calls) != 1 or calls[0].name != "sum" or number in self.gradients.values():
            return None
        if len(recorded) != len(shape) or len(calls[0].args) < 2 or not isinstance(calls[0].args[1], list | tuple):
            return None
        dims = {int(dim) % len(shape) for dim in calls[0].args[1]}
        reduced = tuple(1 if d in dims else size for d, size in enumerate(shape))
        return reduced if math.prod(reduced) < math.prod(shape) else None


def translate(recording: Recording, for_comparison: bool = False) -> TranslatedStep:
    """Translate a recorded step to expressions.

    Args:
        recording: the step.
        for_comparison: neither simplify nor move operations on constants to the prologue, so that two steps compare.

    Raises:
        LoweringRefused: an operation of the step is not element-wise.
    """
    return Translator(recording, for_comparison).translate()


class Translator:
    """Translates the values of one recording."""

    def __init__(self, recording: Recording, for_comparison: bool) -> None:
        self.for_comparison = for_comparison
        self.recording, self.values = recording, recording.values
        self.builder = Builder(simplify=not for_comparison)
        self.expressions: dict[int, Expression | LoweringRefused] = {}
        self.selected = SelectedValues(self.values, self.builder, self.expression)
        self.operands: dict[int, int] = {}
        self.sums: dict[int, tuple[Expression, bool]] = {}
        shapes = [self.values[n].shape for n in (*recording.outputs, *recording.next_states)]
        self.shape: tuple[int, ...] = max(shapes, key=len) if shapes else ()
        results = (*recording.outputs, *recording.next_states)
        if any(self.values[n].has_selected_size for n in results):
            raise LoweringRefused("the size of `x[mask]`, which depends on the data, is that of a result")
        if any(shape != self.shape for shape in shapes):
            raise LoweringRefused(f"its outputs and states have different shapes, {_join_shapes(shapes)}")

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
        gradients = recording.grad_constants
        for number in gradients.values():
            self._add_to_epilogue(number, epilogue)
        repeated = frozenset(number for number in gradients.values() if not self.values[number].varying)
        prologue = self._calls_needed_for([*self.operands, *repeated, *self._invariant_operands(epilogue)])
        calls = [c for c in self._calls_in_order() if any(r in epilogue for r in c.results)]
        inputs = [v for v in self.values if v.origin == "sequence"]
        grad_leaves = {(v.origin, v.index) for v in self.values if v.depends_on_grad and v.origin.startswith("grad")}
        differentiable = [("grad_output", i) in grad_leaves for i in range(len(outputs))]
        differentiable += [("grad_state", i) in grad_leaves for i in range(len(following))]
        read = {r for call in (*prologue, *calls) for r in call.references()} | {*self.operands, *repeated}
        # The backward of an autograd.Function may return a gradient for a constant that no call reads.
        constants = tuple(
            (n, v.index)
            for n, v in enumerate(self.values)
            if v.origin == "constant" and (n in read or v.index in gradients)
        )
        results = [*outputs, *following, *grad_sequences, *grad_states, *(e for e, _ in self.sums.values())]
        used = topological([e for e in results if e is not None])
        read_inputs = {e.index for e in used if e.op == "sequence"}
        read_inputs |= {i for i, gradient in enumerate(grad_sequences) if gradient is not None}
        expressions = StepExpressions(
            sequences=tuple(self._memory_of_input(v, i in read_inputs) for i, v in enumerate(inputs)),
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
            constants,
            tuple(self.operands),
            tuple(self.values[n].shape for n in self.operands),
            Replay(prologue),
            tuple((n, self.values[n].shape) for n in self.sums),
            Replay(calls),
            gradients,
            repeated,
            tuple(differentiable),
            any(self._has_fixed_sizes(call) for call in (*prologue, *calls)),
        )

    def _memory_of_input(self, value: RecordedValue, is_read: bool) -> str:
        """The dtype in memory of an input; "unused" if no result needs its values and its shape is not the step's."""
        is_known = value.dtype in _MEMORY
        return memory_dtype(value.dtype) if is_known and (is_read or _broadcasts(value.shape, self.shape)) else "unused"

    def expression(self, number: int) -> Expression:
        """The expression of a value.

        Raises:
            LoweringRefused: the value is not element-wise.
        """
        expression = self.expressions.get(number)
        if expression is None:
            try:
                expression = self._expression(number)
            except LoweringRefused as error:
                expression = error
            self.expressions[number] = expression
        if isinstance(expression, LoweringRefused):
            raise expression
        return expression

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
        by_mask = self.selected.translated(number, call)
        if by_mask is not None:
            return by_mask
        if moves_values(call.traits) or call.name == "getitem":
            if value.has_selected_size and self.selected.mark(number, call):
                return self.builder.cast(self.expression(call.references()[0]), compute_dtype(value.dtype))
            return self.builder.cast(self._view_expression(number, call), compute_dtype(value.dtype))
        rule = ELEMENTWISE.get(call.name) or ELEMENTWISE.get(call.name.removesuffix("_"))
        if rule is None:
            raise LoweringRefused(f"`{call.name}` is not known to be element-wise")
        if not self.selected.mark(number, call):
            self._check_alignment(number, call)
        return rule(RuleContext(call, value, self.values, self.builder, self.expression))

    def _operand(self, number: int) -> Expression:
        """The expression of a value that does not depend on the data: a number or an operand of the kernel."""
        value = self.values[number]
        call = value.call
        if call is not None and call.name in ("expand", "alias", "detach", "lift_fresh"):
            source = call.references()[0]
            if _broadcasts(self.values[source].shape, self.shape):
                return self._operand(source)
        fills = ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
        if call is not None and call.name in (*fills, "scalar_tensor"):
            rule = ELEMENTWISE[call.name]
            site = RuleContext(call, value, self.values, self.builder, self.expression)
            if not any(isinstance(a, ValueReference) for a in call.args[1:]):
                return rule(site)
        if call is not None and self.for_comparison and call.name in (*ELEMENTWISE, "clone"):
            if call.name == "clone":
                return self._operand(call.references()[0])
            return ELEMENTWISE[call.name](RuleContext(call, value, self.values, self.builder, self.expression))
        if call is not None and call.name in _CONSTANT_ARITHMETIC and value.dtype in (torch.float32, torch.float64):
            with contextlib.suppress(LoweringRefused):
                self._check_alignment(number, call)
                return ELEMENTWISE[call.name](RuleContext(call, value, self.values, self.builder, self.expression))
        if value.has_selected_size:
            raise LoweringRefused("the size of an operand depends on values that may change")
        if not self._fits(value.shape):
            raise LoweringRefused(f"an operand of shape {list(value.shape)} does not fit the step's {list(self.shape)}")
        index = self.operands.setdefault(number, len(self.operands))
        kind = "scalar" if _is_scalar(value.shape) else "invariant"
        # `LoweredStep` converts small integers to float64, which represents them exactly.
        return self.builder.leaf(kind, index, compute_dtype(value.dtype if value.dtype in _MEMORY else torch.float64))

    def _fits(self, shape: Sequence[int]) -> bool:
        """Whether a kernel reads an operand of a shape."""
        return _broadcasts(shape, self.shape)

    def _view_expression(self, number: int, call: AtenCall) -> Expression:
        """The expression of the result of an operator that moves values; refuse if values change position."""
        varying = [r for r in dict.fromkeys(call.references()) if self.values[r].varying]
        source, result = self.values[varying[0]], self.values[number]
        if call.name == "view" and source.dtype != result.dtype:
            raise LoweringRefused("`view` reinterprets the bits of values")
        repeats = call.name in ("expand", "expand_copy")
        same_count = math.prod(source.shape) == math.prod(result.shape)
        if (
            len(varying) != 1
            or not (same_count or repeats)
            or not _keeps_positions(source.shape, result.shape, self.shape)
        ):
            raise LoweringRefused(
                f"`{call.name}` moves values, from shape {list(source.shape)} to {list(result.shape)}"
            )
        if not call.traits.in_order:
            raise LoweringRefused(f"`{call.name}` moves values")
        return self.expression(varying[0])

    def _check_alignment(self, number: int, call: AtenCall) -> None:
        """Refuse a call whose smaller operands do not broadcast like the operands of a kernel."""
        shape = self.values[number].shape
        for reference in call.references():
            operand = self.values[reference].shape
            if _is_scalar(operand) or operand == shape:
                continue
            leading = shape[: max(0, len(shape) - len(self.shape))]
            aligned = all(s == 1 for s in leading) and _broadcasts(shape[len(leading) :], self.shape)
            if not aligned or not _broadcasts(_without_leading_ones(operand, len(self.shape)), self.shape):
                raise LoweringRefused(f"`{call.name}` combines shapes {list(operand)} and {list(shape)}")

    def _gradient(self, number: int | None, kind: str, index: int) -> Expression | None:
        """The gradient of an input or state, before the sum over dimensions in which it was broadcast."""
        if number is None:
            return None
        if not self.values[number].varying:
            return self._full_expression(number)
        source = number
        while True:
            try:
                return self._full_expression(source)
            except LoweringRefused:
                call = self.values[source].call
                movers = ("sum", "view", "squeeze", "unsqueeze", "reshape", "_unsafe_view", "_to_copy", "expand")
                if call is None or call.name not in movers:
                    raise
                source = call.references()[0]

    def _full_expression(self, number: int) -> Expression:
        """The expression of a gradient before any sum; refuse a smaller gradient, which would be summed as if repeated.

        Gradients that depend on the gradients of outputs and states are as large as these.
        """
        expression = self.expression(number)
        if self.values[number].has_selected_size or _element_count(self.values[number].shape) != _element_count(
            self.shape
        ):
            raise LoweringRefused("a gradient is smaller than a step before it is summed")
        return expression

    def _add_to_epilogue(self, number: int, epilogue: dict[int, None]) -> None:
        """Add the calls that compute the gradient of a constant, from sums over time, to the epilogue."""
        value = self.values[number]
        if number in epilogue or number in self.sums or not value.varying:
            return
        try:
            self.sums[number] = (self._full_expression(number), False)
        except LoweringRefused:
            pass
        else:
            return
        call = value.call
        assert call is not None
        sources = [r for r in dict.fromkeys(call.references()) if self.values[r].varying]
        if not is_linear(call, self.values):
            raise LoweringRefused(f"the gradient of a parameter needs `{call.name}` at every step")
        if call.name == "sum" and _is_scalar(value.shape):
            with contextlib.suppress(LoweringRefused):
                mask = self.selected.mask_of(sources[0])
                if mask is not None:
                    picked = self.expression(sources[0])
                    nothing = self.builder.constant(0.0, picked.dtype)
                    everywhere = self.builder.make("where", (mask, picked, nothing), picked.dtype)
                    self.sums[number] = (everywhere, True)
                    return
            try:
                self.sums[number] = (self._full_expression(sources[0]), True)
            except LoweringRefused:
                pass
            else:
                return
        for source in sources:
            self._add_to_epilogue(source, epilogue)
        for result in call.results:
            epilogue[result] = None

    def _calls_in_order(self) -> list[AtenCall]:
        return list({id(v.call): v.call for v in self.values if v.call is not None}.values())

    def _invariant_operands(self, epilogue: dict[int, None]) -> list[int]:
        calls = {id(self.values[n].call): self.values[n].call for n in epilogue}
        found = (r for call in calls.values() if call is not None for r in call.references())
        return [r for r in found if not self.values[r].varying]

    def _calls_needed_for(self, wanted: Sequence[int]) -> list[AtenCall]:
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
        return [c for c in self._calls_in_order() if any(r in needed for r in c.results)]

    def _has_fixed_sizes(self, call: AtenCall) -> bool:
        """Whether a call returns a tensor larger than its operands, so that its arguments contain a size."""
        given = max((_element_count(self.values[r].shape) for r in call.references()), default=1)
        return any(_element_count(self.values[r].shape) > given for r in call.results)


_CONSTANT_ARITHMETIC = frozenset("add sub rsub mul div neg sqrt rsqrt reciprocal".split())
"""Operators on constants that a kernel computes itself: rounded the same, and cheaper than a call of PyTorch."""


def _element_count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _is_scalar(shape: Sequence[int]) -> bool:
    """Whether a shape has no dimensions; a dimension of size 1 may be the batch."""
    return len(shape) == 0


def _without_leading_ones(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    if len(shape) > len(to):
        return False
    return all(s in (1, t) for s, t in zip(reversed(shape), reversed(to), strict=False))


def _keeps_positions(source: tuple[int, ...], result: tuple[int, ...], step: tuple[int, ...]) -> bool:
    """Whether values keep their position in a step: only leading dimensions of size 1 change, or values repeat."""
    if source == result:
        return True
    a, b = _without_leading_ones(source, len(step)), _without_leading_ones(result, len(step))
    if a == b:
        return True
    # `expand` repeats values like broadcasting.
    return _broadcasts(a, b) and _broadcasts(b, step) and _element_count(a) != _element_count(b)


def _join_shapes(shapes: Sequence[Any]) -> str:
    return " and ".join(str(list(s)) for s in dict.fromkeys(shapes))
