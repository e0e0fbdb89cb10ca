"""`BoundStep`: the kernels of a step, bound to the layout of one kind of call.

The kernels of `LoweredStep` describe and pack their operands at each call. A bound step does so once, and later calls
only check that their tensors have the same layout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.cpp_bound_launch import BoundLaunch, Form, bind_launch
from snnfx.lowering.elementwise.cpp.cpp_launch import CppBackEnd, threads_for
from snnfx.lowering.elementwise.lowered_step import DTYPES, LoweredStep, Needs, SavedContext
from snnfx.lowering.elementwise.operand_layout import dense_strides
from snnfx.ops.batched_gradients import for_each_gradient
from snnfx.ops.first_derivatives import refuse_second_derivative

__all__ = ["BoundStep"]

Slot = tuple[str, int]
"""Kind and index of an operand of a kernel."""

_MOST_SHARED_BYTES = 1 << 16
_DTYPES_OF_BITS = (torch.float32, torch.float64)
"""Spikes of these dtypes may be written as bits, and are expanded where no reader takes them."""


class BoundStep:
    """A lowered step for calls of one layout that start from numbers as states.

    Args:
        lowered: a step whose kernels are built.
        x_seq: inputs with the layout of the calls.
        numbers: the states before the first step.
        needs: the gradients that the calls need; None for inference.
        constants: the constants of a call with the layout of the calls: modules, and tensors that the caller passes.
        fetch: returns the tensors that the step reads, from the constants of a call.
        with_finals: whether the calls read the final states.
        in_bits: whether the calls return their output as bits, `[T, elements of a step / 64]`, in the order of memory.
    """

    def __init__(
        self,
        lowered: LoweredStep,
        x_seq: Sequence[Tensor],
        numbers: Sequence[float],
        needs: Needs | None,
        constants: Sequence[Any],
        fetch: Callable[[Sequence[Any]], list[Tensor]],
        with_finals: bool = True,
        in_bits: bool = False,
    ) -> None:
        self.lowered, self.numbers, self.needs, self.fetch = lowered, list(map(float, numbers)), needs, fetch
        expressions, T = lowered.step.expressions, x_seq[0].shape[0]
        shape = lowered.shape_of_step(x_seq, numbers)
        order = lowered.order_of(x_seq, shape)
        self.step = shape, order, T
        self.context = None if needs is None else SavedContext(needs, T, shape, order, tuple(self.numbers))
        self.shapes = [x.shape for x in x_seq], [()] * len(self.numbers)
        self.inputs: dict[Slot, Form] = {("sequence", i): Form.of(x) for i, x in enumerate(x_seq)}
        saved = [] if needs is None else lowered.saved_dtypes(needs)
        finals: dict[Slot, Form] = {("final", i): self._state(d) for i, d in enumerate(lowered.state_dtypes)}
        # Memory that all calls share is kept as long as the binding, so it must be small.
        size = sum(_product(form.shape) * form.dtype.itemsize for form in finals.values())
        unread = finals if not with_finals and size <= _MOST_SHARED_BYTES else {}
        made: dict[Slot, Form] = {
            **{("output", i): self._output(d, in_bits) for i, d in enumerate(lowered.output_dtypes)},
            **({} if unread else finals),
            **{("saved", i): self._sequence(d) for i, d in enumerate(saved)},
        }
        self.outputs = len(expressions.outputs)
        self.output_dtypes = lowered.output_dtypes
        self.results = self.outputs + (0 if unread else len(finals))
        self.saved: dict[Slot, Form] = {slot: form for slot, form in made.items() if slot[0] == "saved"}
        self.not_differentiable = [i for i, d in enumerate(lowered.step.differentiable[: self.results]) if not d]
        self.training = None if needs is None else lowered.training(needs)
        if self.training is None:
            self.source = lowered.inference_in_bits() if in_bits else lowered.inference()
        else:
            self.source = self.training.forward
        read = fetch(constants)
        self.constants = len(read)
        operands = self._operands(self.source, read)
        self.reads = len(operands)
        self._operands_are_views = all(call.name == "view" for call in lowered.step.prologue.calls)
        self._kept_views: tuple[Sequence[Tensor], list[Any], list[Tensor]] | None = None
        """Constants, where they lie, and the operands that are views of them."""
        self.forward = self._bound(
            self.source, {**self.inputs, **self._operand_forms(self.source, operands)}, made, unread
        )
        self.inputs_saved = () if self.training is None else tuple(self.training.plan.inputs)
        wanted = () if self.training is None else self.training.wanted.sums
        self.reduced = {i: reduced for i in wanted if (reduced := lowered.step.reduced_sum(i, shape)) is not None}
        """The shapes of the sums that the kernel also reduces over dimensions of a step."""
        self.backwards: dict[Any, BoundLaunch | None] = {}
        self.requires_grad = [x.requires_grad for x in (*x_seq, *_tensors_among(constants))]
        self.with_grad = torch.is_grad_enabled()

    @staticmethod
    def of(
        lowered: LoweredStep,
        x_seq: Sequence[Tensor],
        numbers: Sequence[float],
        needs: Needs | None,
        constants: Sequence[Any],
        fetch: Callable[[Sequence[Any]], list[Tensor]],
        with_finals: bool = True,
        in_bits: bool = False,
    ) -> BoundStep | None:
        """Bind a step to the layout of these inputs; None if its kernels cannot be bound. Arguments: see the class."""
        if not isinstance(lowered.back_end, CppBackEnd):
            return None
        if in_bits and not _can_be_bits(lowered, x_seq, numbers, needs):
            return None
        bound = BoundStep(lowered, x_seq, numbers, needs, constants, fetch, with_finals, in_bits)
        return bound if bound.forward is not None else None

    def run(
        self, x_seq: Sequence[Tensor], constants: Sequence[Any], given: Sequence[Tensor] = ()
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Run a sequence: `(outputs, final states)`; None if the inputs have another layout.

        Args:
            x_seq: the inputs.
            constants: the constants of the call.
            given: the tensors among them that the caller passes.
        """
        bound = self.forward
        assert bound is not None
        if self.with_grad and [x.requires_grad for x in (*x_seq, *given)] != self.requires_grad:
            return None
        constants = self.fetch(constants) if self.constants else []
        if not bound.fits(*x_seq):
            return None
        operands = self._operands_that_fit(bound, constants) if self.reads else []
        if operands is None:
            return None
        if self.needs is None:
            made = bound.launch(*x_seq, *operands)
        else:
            made = _BoundFunction.apply(self, bound.launch, operands, len(x_seq), *x_seq, *constants)
        return made[: self.outputs], made[self.outputs : self.results]

    def backward(self, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the inputs and constants.

        Args:
            saved: the tensors saved for backward.
            grads: the gradients of the outputs and final states.
        """
        training = self.training
        assert training is not None
        plan, count = training.plan, len(self.saved)
        inputs, constants = saved[: len(plan.inputs)], saved[len(plan.inputs) : len(saved) - count]
        kept = saved[len(saved) - count :]
        operands = self._operands(training.backward, constants) if constants else []
        given = [*inputs, *kept, *[g for g in grads if g is not None]]
        key = tuple([None if g is None else (g.stride(), g.dtype) for g in grads])
        try:
            launch = self.backwards[key]
        except KeyError:
            launch = self.backwards[key] = self._bound_backward(grads, operands)
        if launch is None or not (launch.fits(*given) and launch.fits_operands(*operands)):
            return self._unbound_backward(inputs, constants, kept, grads)
        made = launch.launch(*given, *operands)
        grad_x: list[Tensor | None] = [None] * len(self.inputs)
        for index, gradient in zip(training.wanted.sequences, made, strict=False):
            grad_x[index] = gradient
        if not constants:
            return grad_x
        sums = dict(zip(training.wanted.sums, made[len(training.wanted.sequences) :], strict=True))
        for index in self.reduced:
            dtype = DTYPES[self.lowered.step.expressions.sums[index].dtype]
            sums[index] = sums[index].sum(0).to(dtype)
        assert self.needs is not None
        return [*grad_x, *self.lowered.epilogue(self.needs, self.step[2], constants, sums)]

    def _bound_backward(self, grads: Sequence[Tensor | None], operands: list[Tensor]) -> BoundLaunch | None:
        training, expressions = self.training, self.lowered.step.expressions
        assert training is not None
        if any(self.inputs["sequence", i].shape[1:] != self.step[0] for i in training.wanted.sequences):
            return None  # the gradient of an expanded input is summed
        names = [("grad_output", i) for i in range(self.outputs)]
        names += [("grad_final", i) for i in range(self.results - self.outputs)]
        parts = self.lowered.back_end.parts(training.backward, _product(self.step[0]), self.step[2])
        made: dict[Slot, Form] = {
            ("grad_sequence", i): self._sequence(DTYPES[expressions.sequences[i]]) for i in training.wanted.sequences
        }
        for i in training.wanted.sums:
            if expressions.total[i]:
                made["sum", i] = Form((parts,), (1,), torch.float64, in_step=False)
            elif i in self.reduced:
                shape = (threads_for(_product(self.step[0]), self.step[2]), *self.reduced[i])
                made["sum", i] = Form(shape, dense_strides(shape, range(len(shape))), torch.float64, by_part=True)
            else:
                made["sum", i] = self._state(DTYPES[expressions.sums[i].dtype])
        given = {
            **{("sequence", i): self.inputs["sequence", i] for i in training.plan.inputs},
            **self.saved,
            **{name: Form.of(g) for name, g in zip(names, grads, strict=True) if g is not None},
            **self._operand_forms(training.backward, operands),
        }
        return self._bound(training.backward, given, made, {})

    def _unbound_backward(
        self,
        inputs: Sequence[Tensor],
        constants: Sequence[Tensor],
        kept: Sequence[Tensor],
        grads: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The gradients, for gradients of results that the bound kernel does not take."""
        assert self.context is not None
        x_seq: list[Tensor | None] = [None] * len(self.inputs)
        for index, x in zip(self.inputs_saved, inputs, strict=True):
            x_seq[index] = x
        grad_x, _, grad_constants = self.lowered.backward(
            self.context,
            x_seq,
            [None] * len(self.numbers),
            constants,
            kept,
            grads[: self.outputs],
            [*grads[self.outputs :], *[None] * (len(self.numbers) + self.outputs - len(grads))],
            self.shapes,
        )
        return [*grad_x, *grad_constants]

    def _sequence(self, dtype: torch.dtype) -> Form:
        shape, order, T = self.step
        return Form((T, *shape), (max(1, _product(shape)), *dense_strides(shape, order)), dtype)

    def _output(self, dtype: torch.dtype, in_bits: bool) -> Form:
        if not in_bits:
            return self._sequence(dtype)
        shape, _, T = self.step
        words = _product(shape) // 64
        return Form((T, words), (words, 1), torch.int64, in_step=False)

    def _state(self, dtype: torch.dtype) -> Form:
        shape, order, _ = self.step
        return Form(shape, dense_strides(shape, order), dtype)

    def _operands_that_fit(self, bound: BoundLaunch, constants: Sequence[Tensor]) -> Sequence[Tensor] | None:
        """The operands of the forward kernel; None if they have another layout than it was bound to."""
        kept, places = self._kept_views, None
        if self._operands_are_views:
            places = [(c.data_ptr(), c.shape, c.stride(), c.dtype) for c in constants]
            if kept is not None and kept[1] == places and all(map(operator.is_, kept[0], constants)):
                return kept[2]
        operands = self._operands(self.source, constants)
        if not bound.fits_operands(*operands):
            return None
        if places is not None:
            self._kept_views = constants, places, operands
        return operands

    def _operands(self, source: Any, constants: Sequence[Tensor]) -> list[Tensor]:
        """The operands of a kernel that do not change with time, in the order of its slots."""
        return list(self.lowered.operands_of(source, constants).values())

    def _operand_forms(self, source: Any, operands: Sequence[Tensor]) -> dict[Slot, Form]:
        reads = [slot.index for slot in source.slots if slot.kind == "operand"]
        return {("operand", i): Form.of(o) for i, o in zip(reads, operands, strict=True)}

    def _bound(
        self, source: Any, given: dict[Slot, Form], made: dict[Slot, Form], unread: dict[Slot, Form]
    ) -> BoundLaunch | None:
        numbers = {("initial", k): number for k, number in enumerate(self.numbers)}
        return bind_launch(source, self.step, given, made, unread, numbers, {**DTYPES, "bits": torch.int64})


class _BoundFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, bound: BoundStep, launch: Callable[..., Any], operands: list[Tensor], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        made = launch(*tensors[:count], *operands)
        ctx.bound = bound
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[tensors[i] for i in bound.inputs_saved], *tensors[count:], *made[bound.results :])
        results = made[: bound.results]
        if bound.not_differentiable:
            ctx.mark_non_differentiable(*[results[i] for i in bound.not_differentiable])
        return results  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        hint = "Convert with lower=None: PyTorch then runs the loop and differentiates twice."
        refuse_second_derivative("a kernel", hint)
        return (None, None, None, None, *for_each_gradient(partial(ctx.bound.backward, ctx.saved_tensors), grads))


def _can_be_bits(lowered: LoweredStep, x_seq: Sequence[Tensor], numbers: Sequence[float], needs: Needs | None) -> bool:
    elements = _product(lowered.shape_of_step(x_seq, numbers))
    if needs is not None or elements == 0 or elements % 64 or lowered.output_dtypes[0] not in _DTYPES_OF_BITS:
        return False
    return lowered.inference_in_bits() is not None


def _tensors_among(constants: Sequence[Any]) -> list[Tensor]:
    return [c for c in constants if isinstance(c, Tensor)]


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
