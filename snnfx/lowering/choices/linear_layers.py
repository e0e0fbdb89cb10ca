"""The faster library for the products of a dense linear layer: torch's BLAS, or oneDNN.

On processors for which the BLAS has no good kernels, oneDNN takes half the time. The forward product and both gradients
are timed once for each shape, apart from each other. The libraries add in another order, so that results differ by
rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from snnfx.lowering.choices.fastest import Choice, Fastest
from snnfx.ops.batched_gradients import is_plain_gradient
from snnfx.sandbox.torch_internals import has_one_dnn_linear, linear_by_one_dnn

__all__ = [
    "LIBRARIES",
    "forget_linear_choices",
    "gradients_by_one_dnn",
    "gradients_of_linear",
    "latest_linear_choice",
    "linear",
]

LIBRARIES = Fastest("linear_layers", ("torch", "oneDNN"))

_LEAST_WORK = 1 << 22
"""Multiplications from which on the faster library saves much more time than the decision takes."""

_MOST_MEASURED = 1 << 30
"""Multiplications of a measured product, at most; more rows take as many times as long."""

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

_decided: dict[tuple[object, ...], Choice] = {}
"""Choices by all that they depend on: looking one up takes less time than deciding again."""

_MOST_DECIDED = 4096

_latest: dict[tuple[int, ...], Choice] = {}
"""Choices of the latest forward products, by the shape of the weight."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` by the faster library.

    The caller makes sure that nothing intercepts the operations of this thread, such as autocast, a transform or a
    dispatch mode.
    """
    if x.numel() * weight.shape[0] < _LEAST_WORK or not _is_supported(x, weight, bias):
        return functional.linear(x, weight, bias)
    inputs, outputs = weight.shape[1], weight.shape[0]
    rows = x.numel() // inputs
    choice = _choose("product", rows, inputs, outputs)
    _latest[outputs, inputs] = choice
    differentiates = torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    if not differentiates:
        return _product(x, weight, bias) if choice.name == "oneDNN" else functional.linear(x, weight, bias)
    by_one_dnn = choice.name == "oneDNN", *_choose_gradients(x, weight)
    if not any(by_one_dnn):
        return functional.linear(x, weight, bias)
    # A view is saved, as by torch: another `weight.data` before the backward pass changes nothing.
    y: Tensor = _Linear.apply(x, weight.view_as(weight), bias, by_one_dnn)
    return y


def gradients_by_one_dnn(x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether oneDNN is faster for the gradient of the input of a linear layer, and for the gradient of its weight."""
    if x.numel() * weight.shape[0] < _LEAST_WORK or not _is_supported(x, weight, None):
        return False, False
    return _choose_gradients(x, weight)


def gradients_of_linear(
    grad: Tensor, x: Tensor, weight: Tensor, by_one_dnn: tuple[bool, bool], needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias.

    Args:
        grad: the gradient of the output, `[*, M]`.
        x, weight: the operands, `[*, K]` and `[M, K]`; only those that the wanted gradients need are read.
        by_one_dnn: whether oneDNN computes the gradient of the input, and of the weight.
        needs: the gradients that are wanted.
    """
    rows = grad.reshape(-1, grad.shape[-1])
    rows = rows if rows.is_contiguous() else rows.contiguous()
    of_input = of_weight = of_bias = None
    if needs[0]:
        of_input = linear_by_one_dnn(rows, weight.t(), None) if by_one_dnn[0] else rows @ weight
        of_input = of_input.view(*grad.shape[:-1], weight.shape[1])
    if needs[1]:
        operand = x.reshape(-1, x.shape[-1])
        of_weight = linear_by_one_dnn(rows.t(), operand.t(), None) if by_one_dnn[1] else rows.t() @ operand
    if needs[2]:
        of_bias = rows.sum(0)
    return of_input, of_weight, of_bias


def latest_linear_choice(shape: tuple[int, ...]) -> Choice | None:
    """The choice of the latest call of a layer whose weight has this shape; None if there was none."""
    return _latest.get(shape)


def forget_linear_choices() -> None:
    """Forget the choices of this process; the measurements on disk stay."""
    LIBRARIES.remembered.forget()
    _decided.clear()
    _latest.clear()


def _is_supported(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if bias is not None and not (_is_plain(bias) and bias.shape == weight.shape[:1]):
        return False
    return (
        _is_plain(x)
        and _is_plain(weight)
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and torch.get_float32_matmul_precision() == "highest"
        and has_one_dnn_linear()
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in _PLAIN and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() and not x.is_neg()


def _choose_gradients(x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    return (
        x.requires_grad and _choose("input", rows, inputs, outputs).name == "oneDNN",
        weight.requires_grad and _choose("weight", rows, inputs, outputs).name == "oneDNN",
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = linear_by_one_dnn(x.reshape(-1, weight.shape[1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _choose(product: str, rows: int, inputs: int, outputs: int) -> Choice:
    settings = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    key = product, rows, inputs, outputs, settings
    found = _decided.get(key)
    if found is None:
        found = LIBRARIES.choose(
            (product, rows.bit_length(), inputs, outputs), "torch", lambda: _calls(product, rows, inputs, outputs)
        )
        if len(_decided) >= _MOST_DECIDED:
            _decided.clear()
        if found.is_final:
            _decided[key] = found
    return found


def _calls(product: str, rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], object]]:
    """A product by each library, on tensors of ones."""
    rows = max(1, min(rows, _MOST_MEASURED // (inputs * outputs)))
    x, grad, weight = (
        torch.ones(shape, device="cpu", dtype=torch.float32)
        for shape in ((rows, inputs), (rows, outputs), (outputs, inputs))
    )
    bias = torch.ones(outputs, device="cpu", dtype=torch.float32)
    if product == "product":
        return {"torch": lambda: functional.linear(x, weight, bias), "oneDNN": lambda: _product(x, weight, bias)}
    needs = (product == "input", product == "weight", False)

    def gradient(by_one_dnn: bool) -> object:
        return gradients_of_linear(grad, x, weight, (by_one_dnn, by_one_dnn), needs)

    return {"torch": lambda: gradient(False), "oneDNN": lambda: gradient(True)}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by_one_dnn: tuple[bool, bool, bool]
    ) -> Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        ctx.by_one_dnn, ctx.has_bias = by_one_dnn, bias is not None
        return _product(x, weight, bias) if by_one_dnn[0] else functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[2] and ctx.has_bias)
        by_one_dnn = ctx.by_one_dnn[1:] if is_plain_gradient(grad) else (False, False)
        return (*gradients_of_linear(grad, x, weight, by_one_dnn, needs), None)
