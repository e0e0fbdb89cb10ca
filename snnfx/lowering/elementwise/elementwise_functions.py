"""Prove that a call of an autograd.Function is element-wise, so that it may be folded.

One forward and one backward pass are recorded as ATen calls and translated to expressions of one element. If that
succeeds, each element of the results and gradients depends on the elements at its position only. The gradient of a
parameter must be a sum over these elements, see `snnfx.lowering.linear_calls`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import ELEMENTWISE_RESULTS, VALUE
from snnfx.ir.program import StepProgram
from snnfx.lowering.aten_recording import LoweringRefused, record_step
from snnfx.lowering.elementwise.aten_table import decomposition
from snnfx.lowering.elementwise.translation import translate
from snnfx.ops.step_functions import FunctionHolder, apply_autograd_function
from snnfx.sandbox.internal_faults import is_internal_fault, surface

__all__ = ["prove_elementwise_functions"]

_SHAPES = ((3, 4), (3, 2, 4, 5))
"""Shapes of one step to try where the shape is unknown."""


def prove_elementwise_functions(program: StepProgram) -> None:
    """Set the fact `ELEMENTWISE_RESULTS` of the calls of autograd functions that are element-wise."""
    proofs: dict[Any, int | None] = {}
    for node in program.graph.nodes:
        if node.target is not apply_autograd_function or node.kwargs:
            continue
        operands = _operands(program, node)
        if operands is None:
            continue
        holder, arguments = operands
        key = (holder.function, *map(_key, arguments))
        try:
            hash(key)
        except TypeError:
            continue
        if key not in proofs:
            proofs[key] = _number_of_results(holder, arguments)
        if proofs[key] is not None:
            ELEMENTWISE_RESULTS.set(node, proofs[key])


class _Operand:
    """A tensor of one step: its shape, or None, and its dtype."""

    def __init__(self, value: Any) -> None:
        is_known = isinstance(value, Tensor)
        self.shape = tuple(value.shape) if is_known else None
        self.dtype = value.dtype if is_known else torch.get_default_dtype()
        if self.shape and self.shape[0] == 1:
            self.shape = (3, *self.shape[1:])  # with one sample, an operation along the batch may change nothing


def _key(argument: Any) -> Any:
    if isinstance(argument, _Operand):
        return argument.shape, argument.dtype
    return id(argument) if isinstance(argument, Tensor) else (type(argument), argument)


def _operands(program: StepProgram, node: Node) -> tuple[FunctionHolder, list[Any]] | None:
    """The function and its arguments; None if an argument is neither a tensor nor a plain value."""
    holder: Any = None
    arguments: list[Any] = []
    for index, argument in enumerate(node.args):
        if not isinstance(argument, Node):
            arguments.append(argument)
            continue
        is_attribute = argument.op == "get_attr"
        value = program.resolve(str(argument.target)) if is_attribute else _Operand(VALUE.of(argument))
        if index == 0:
            holder = value
        elif isinstance(value, Tensor | _Operand):
            arguments.append(value)
        else:
            return None
    return (holder, arguments) if isinstance(holder, FunctionHolder) else None


def _number_of_results(holder: FunctionHolder, arguments: Sequence[Any]) -> int | None:
    """The number of results of an element-wise function, 0 for a result that is no tuple; None if it is not."""
    unknown = any(isinstance(a, _Operand) and a.shape is None for a in arguments)
    counts = {_proof(holder, arguments, shape) for shape in (_SHAPES if unknown else _SHAPES[:1])}
    return counts.pop() if len(counts) == 1 else None


def _proof(holder: FunctionHolder, arguments: Sequence[Any], shape: tuple[int, ...]) -> int | None:
    given = [a for a in arguments if isinstance(a, _Operand)]
    # Values on both sides of thresholds; the proof does not depend on them.
    with torch.inference_mode(False):
        inputs = [_example(a.shape if a.shape is not None else shape, a.dtype) for a in given]
    count = 0

    def step(*values: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        nonlocal count
        remaining = iter(values)
        results = apply_autograd_function(
            holder, *[next(remaining) if isinstance(a, _Operand) else a for a in arguments]
        )
        count = len(results) if isinstance(results, tuple) else 0
        return (results if isinstance(results, tuple) else (results,)), ()

    if not inputs:
        return None
    try:
        with torch.inference_mode(False):
            recording = record_step(step, inputs, None, True, decomposition)
            translated = translate(recording)
    except LoweringRefused:
        return None
    except Exception as error:
        if is_internal_fault(error):
            surface(error, "an autograd.Function is mapped over time")
        return None  # the function raises an error, as it will in a call of the net
    full = torch.broadcast_shapes(*[x.shape for x in inputs])
    is_whole = translated.shape == full and not translated.has_fixed_sizes and not recording.reads_sizes
    return count if is_whole else None


def _example(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.linspace(-1.0, 1.0, max(1, torch.Size(shape).numel())).reshape(shape)
    return values.to(dtype)
