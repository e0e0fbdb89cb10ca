"""`LoweredStep`: an element-wise step as kernels and the PyTorch calls around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.elementwise.back_end import BackEnd, KernelOperand, WantedGradients
from snnfx.lowering.elementwise.expressions import Expression
from snnfx.lowering.elementwise.operand_layout import (
    broadcast,
    dense_strides,
    describe_operand,
    memory_order,
    plan_layout,
)
from snnfx.lowering.elementwise.saved_values import SavePlan, plan_saving
from snnfx.lowering.elementwise.translation import Replay, TranslatedStep

__all__ = ["DTYPES", "LoweredStep", "Needs", "SavedContext"]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


@dataclass(frozen=True)
class Needs:
    """The inputs, initial states and constants (by position) that need a gradient."""

    sequences: tuple[bool, ...]
    states: tuple[bool, ...]
    constants: tuple[bool, ...]


@dataclass
class SavedContext:
    """Data other than tensors that the forward pass saves for backward."""

    needs: Needs
    T: int
    shape: tuple[int, ...]
    order: tuple[int, ...]
    states: tuple[float | None, ...]


@dataclass
class _Training:
    """The kernels of a training step, for one choice of gradients."""

    plan: SavePlan
    wanted: WantedGradients
    forward: Any
    backward: Any


@dataclass
class LoweredStep:
    """A step of an element-wise loop that runs over sequences.

    Args:
        step: the translated step.
        back_end: the back end that writes and runs its kernels.
        device: the device of its tensors.
    """

    step: TranslatedStep
    back_end: BackEnd
    device: torch.device
    _inference: Any = None
    _inference_in_bits: Any = None
    _training: dict[Needs, _Training] = field(default_factory=dict)
    _prologues: dict[tuple[int, ...], Replay] = field(default_factory=dict)

    def forward(
        self,
        x_seq: Sequence[Tensor],
        states: Sequence[Tensor | float],
        constants: Sequence[Tensor],
        needs: Needs | None,
        keep_layout: bool = True,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], SavedContext | None]:
        """Run a sequence: outputs `[T, N, *]`, final states `[N, *]`, saved tensors, other data for backward.

        Args:
            x_seq: the inputs, `[T, *]` each.
            states: the states before the first step, numbers or tensors that can be expanded to `[N, *]`.
            constants: the tensors of `step.constants`.
            needs: the gradients that are needed; None: save nothing.
            keep_layout: whether results have the memory layout of the inputs; otherwise they are contiguous.
        """
        expressions = self.step.expressions
        source = self.inference() if needs is None else self.training(needs).forward
        T = x_seq[0].shape[0]
        operands = self.operands_of(source, constants)
        shape = self.shape_of_step(x_seq, states)
        order = self.order_of(x_seq, shape) if keep_layout else tuple(range(len(shape)))
        strides = dense_strides(shape, order)
        count = max(1, _product(shape))
        empty, device = self.back_end.empty, self.device
        outputs = [empty((T, *shape), (count, *strides), DTYPES[d], device) for d in expressions.output_dtypes]
        finals = [empty(shape, strides, DTYPES[d], device) for d in expressions.state_dtypes]
        plan = self.training(needs).plan if needs is not None else None
        dtypes = [DTYPES[e.dtype] for e in plan.saved] if plan is not None else []
        saved = [empty((T, *shape), (count, *strides), d, device) for d in dtypes]
        self._run(
            source,
            shape,
            order,
            T,
            {
                "sequence": x_seq,
                "operand": operands,
                "initial": states,
                "output": outputs,
                "final": finals,
                "saved": saved,
            },
        )
        if needs is None:
            return outputs, finals, saved, None
        numbers = tuple(None if isinstance(s, Tensor) else float(s) for s in states)
        return outputs, finals, saved, SavedContext(needs, T, shape, order, numbers)

    def build(self, needs: Needs | None, elements: int) -> None:
        """Build the kernels of a call.

        Args:
            needs: the gradients that are needed; None for inference.
            elements: the approximate number of elements of a step.

        Raises:
            LoweringRefused: a kernel cannot be built.
        """
        if needs is None:
            self.back_end.build(self.inference(), elements)
        else:
            self.back_end.build(self.training(needs).forward, elements)
            self.back_end.build(self.training(needs).backward, elements)

    def inference(self) -> Any:
        """The kernel of inference, which saves nothing."""
        if self._inference is None:
            self._inference = self.back_end.write_forward(self.step.expressions)
        return self._inference

    def inference_in_bits(self) -> Any:
        """The kernel of inference that writes its output as bits; None unless that is one sequence of 0 and 1."""
        outputs = self.step.expressions.outputs
        if self._inference_in_bits is None and len(outputs) == 1 and _is_binary(outputs[0]):
            self._inference_in_bits = self.back_end.write_forward_in_bits(self.step.expressions)
        return self._inference_in_bits

    def training(self, needs: Needs) -> _Training:
        """The kernels of both passes for these gradients."""
        kernels = self._training.get(needs)
        if kernels is None:
            step = self.step.expressions
            sums = sorted(
                {
                    s
                    for i, n in enumerate(needs.constants)
                    if n
                    for s in self._sums_needed_for(self.step.constants[i][1])
                }
            )
            wanted = WantedGradients(
                tuple(i for i, n in enumerate(needs.sequences) if n and step.grad_sequences[i] is not None),
                tuple(i for i, n in enumerate(needs.states) if n),
                tuple(sums),
            )
            plan = plan_saving(step, wanted.expressions(step))
            forward = self.back_end.write_forward(step, plan)
            kernels = _Training(plan, wanted, forward, self.back_end.write_backward(step, plan, wanted))
            self._training[needs] = kernels
        return kernels

    def operands_of(self, source: Any, constants: Sequence[Tensor]) -> dict[int, Tensor]:
        """The operands of a kernel that do not change with time, by number."""
        read = [slot.index for slot in source.slots if slot.kind == "operand"]
        if not read:
            return {}
        wanted = tuple(self.step.operands[i] for i in read)
        if wanted not in self._prologues:
            self._prologues[wanted] = self.step.prologue.part_for(wanted)
        known = {number: tensor for (number, _), tensor in zip(self.step.constants, constants, strict=True)}
        with torch.no_grad():
            computed = self._prologues[wanted].run(known, wanted)
        kinds = (self.step.expressions.operands[i] for i in read)
        values = (v.to(DTYPES[k]) if not v.is_floating_point() else v for v, k in zip(computed, kinds, strict=True))
        return dict(zip(read, values, strict=True))

    def shape_of_step(self, x_seq: Sequence[Tensor], states: Sequence[Tensor | float]) -> tuple[int, ...]:
        """The shape of one step of a call."""
        shape = tuple(x_seq[0].shape[1:])
        given = [tuple(s.shape) for s in states if isinstance(s, Tensor)]
        constant = self.step.operand_shapes
        kinds = self.step.expressions.sequences
        if len(x_seq) > 1 or "unused" in kinds or len(shape) != len(self.step.shape) or constant or given:
            read = [tuple(x.shape[1:]) for x, kind in zip(x_seq, kinds, strict=True) if kind != "unused"]
            shape = broadcast(*read, *given, *constant)
        return shape

    def order_of(self, x_seq: Sequence[Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
        """The memory order of a step's dimensions, slowest first, taken from the first input of full size."""
        for x in x_seq:
            if x.shape[1:] == shape:
                return memory_order(shape, x.stride()[1:])
        return tuple(range(len(shape)))

    @property
    def saves(self) -> str:
        """A clause about the tensors that training saves for backward; "" before the first training step."""
        if not self._training:
            return ""
        plan = list(self._training.values())[-1].plan
        tensors = f"{len(plan.saved)} tensor{'s' if len(plan.saved) != 1 else ''} of the size of the sequence"
        inputs = ", and its input" if plan.inputs else ""
        return f"; training saves {tensors}{inputs}"

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the outputs in memory."""
        return [DTYPES[d] for d in self.step.expressions.output_dtypes]

    @property
    def state_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the states in memory."""
        return [DTYPES[d] for d in self.step.expressions.state_dtypes]

    def saved_dtypes(self, needs: Needs) -> list[torch.dtype]:
        """Dtypes of the tensors that the forward pass saves."""
        return [DTYPES[e.dtype] for e in self.training(needs).plan.saved]

    def backward(
        self,
        context: SavedContext,
        x_seq: Sequence[Tensor | None],
        states: Sequence[Tensor | None],
        constants: Sequence[Tensor],
        saved: Sequence[Tensor],
        grad_outputs: Sequence[Tensor | None],
        grad_finals: Sequence[Tensor | None],
        shapes: tuple[Sequence[tuple[int, ...]], Sequence[tuple[int, ...]]],
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Gradients of the inputs, initial states and constants that need one.

        Args:
            context: the data saved by the forward pass.
            x_seq, states, constants, saved: as in the forward pass; None for inputs and states that are not read.
            grad_outputs, grad_finals: the gradients of the outputs and final states; None: zero.
            shapes: the shapes of the inputs, `[T, *]`, and of the initial states.
        """
        training, step = self.training(context.needs), self.step.expressions
        T, shape, order = context.T, context.shape, context.order
        strides, count = dense_strides(shape, order), max(1, _product(shape))
        wanted = training.wanted
        empty, device = self.back_end.empty, self.device
        grad_sequences: dict[int, Tensor] = {
            i: empty((T, *shape), (count, *strides), DTYPES[step.sequences[i]], device) for i in wanted.sequences
        }
        grad_initials = {k: empty(shape, strides, DTYPES[step.state_dtypes[k]], device) for k in wanted.initials}
        parts = self.back_end.parts(training.backward, _product(shape), T)
        sums = {
            i: torch.empty(parts, dtype=torch.float64, device=device)
            if step.total[i]
            else empty(shape, strides, DTYPES[step.sums[i].dtype], device)
            for i in wanted.sums
        }
        initial = [number if s is None else s for s, number in zip(states, context.states, strict=True)]
        self._run(
            training.backward,
            shape,
            order,
            T,
            {
                "sequence": x_seq,
                "operand": self.operands_of(training.backward, constants),
                "initial": initial,
                "saved": [_with_strides(s, (count, *strides)) for s in saved],
                "grad_output": grad_outputs,
                "grad_final": grad_finals,
                "grad_sequence": grad_sequences,
                "grad_initial": grad_initials,
                "sum": sums,
            },
        )
        grad_x: list[Tensor | None] = [None] * len(step.sequences)
        for i, grad in grad_sequences.items():
            grad_x[i] = grad if grad.shape == shapes[0][i] else _summed_in_steps(grad, shapes[0][i])
        grad_states: list[Tensor | None] = [None] * len(step.state_dtypes)
        for k, grad in grad_initials.items():
            grad_states[k] = grad if grad.shape == shapes[1][k] else grad.sum_to_size(shapes[1][k])
        return grad_x, grad_states, self.epilogue(context.needs, T, constants, sums)

    def epilogue(
        self, needs: Needs, T: int, constants: Sequence[Tensor], sums: dict[int, Tensor]
    ) -> list[Tensor | None]:
        """Compute the gradients of constants from their sums over time."""
        if not any(needs.constants):
            return [None] * len(constants)
        known = {number: tensor for (number, _), tensor in zip(self.step.constants, constants, strict=True)}
        with torch.no_grad():
            self.step.prologue.run(known, ())
            for index, value in sums.items():
                number, shape = self.step.sums[index]
                if self.step.expressions.total[index]:
                    known[number] = value.sum().to(DTYPES[self.step.expressions.sums[index].dtype]).view(shape)
                else:
                    known[number] = value.view((1,) * (len(shape) - value.dim()) + tuple(value.shape))
            grads: list[Tensor | None] = []
            for (_, index), constant, need in zip(self.step.constants, constants, needs.constants, strict=True):
                gradient = self.step.gradients.get(index) if need else None
                if gradient is None:
                    grads.append(None)
                    continue
                self._epilogue_for(gradient, known)
                total = known[gradient] * T if gradient in self.step.repeated else known[gradient]
                grads.append(total.to(constant.dtype).sum_to_size(constant.shape))
            return grads

    def _epilogue_for(self, number: int, known: dict[int, Tensor]) -> None:
        """Run the calls of the epilogue that one value needs."""
        if number in known:
            return
        call = next(c for c in self.step.epilogue.calls if number in c.results)
        for reference in call.references():
            self._epilogue_for(reference, known)
        type(self.step.epilogue)([call]).run(known, ())

    def _sums_needed_for(self, constant: int) -> set[int]:
        """The sums over time that the gradient of a constant needs."""
        positions = {number: position for position, (number, _) in enumerate(self.step.sums)}
        sums: set[int] = set()
        stack = [self.step.gradients[constant]] if constant in self.step.gradients else []
        while stack:
            number = stack.pop()
            if number in positions:
                sums.add(positions[number])
                continue
            stack.extend(r for c in self.step.epilogue.calls if number in c.results for r in c.references())
        return sums

    def _run(self, source: Any, shape: tuple[int, ...], order: tuple[int, ...], T: int, given: dict[str, Any]) -> None:
        operands: list[Tensor | float] = []
        described: list[Any] = []
        for slot in source.slots:
            value = given[slot.kind][slot.index]
            if isinstance(value, Tensor):
                value = self._materialized(slot, value)
                operands.append(value)
                if slot.kind == "sum" and value.dim() == 1 and self.step.expressions.total[slot.index]:
                    described.append(None)
                else:
                    described.append(describe_operand(value, slot.has_time))
            else:
                operands.append(0.0 if value is None else float(value))
                described.append(None)
        self.back_end.run(source, plan_layout(shape, order, tuple(described)), T, operands)

    def _materialized(self, slot: KernelOperand, value: Tensor) -> Tensor:
        """A tensor in the dtype that a kernel expects, its lazy negation resolved."""
        expected = DTYPES[slot.dtype]
        if value.dtype != expected:
            value = value.to(expected)
        if value.is_neg():
            value = value.resolve_neg()
        return value


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A saved tensor in the order in which the kernel wrote it; `saved_tensors_hooks` may return it in another one."""
    pairs = zip(tensor.shape, tensor.stride(), strides, strict=True)
    if all(size <= 1 or stride == own for size, stride, own in pairs):
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _summed_in_steps(grad: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum the gradient `[T, N, *]` of an input `[T, *]` over the dimensions in which its steps were expanded."""
    aligned = (shape[0], *(1,) * (grad.dim() - len(shape)), *shape[1:])
    return grad.sum_to_size(aligned).reshape(shape)


def _product(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _is_binary(expression: Expression) -> bool:
    """Whether a value is 0 or 1."""
    return expression.op == "cast" and expression.operands[0].dtype == "bool"
