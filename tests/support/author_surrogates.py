"""Surrogate gradients in the manner of published repositories; `SURROGATES` has them by name.

Each takes the potential minus the threshold, `[N, C]`, and gives spikes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["SURROGATES", "LearnedWidth"]

lens = 0.5


class RectangleOfWidth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.gt(0.0).double()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        temp = abs(input) < lens
        return grad_output.clone() * temp.double() / (2 * lens)


class Triangle(torch.autograd.Function):
    """`ctx.gamma`, and a derivative through `torch.tensor([gamma])`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(input)
        ctx.gamma = torch.tensor([gamma])
        return (input > 0).to(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (input,) = ctx.saved_tensors
        gamma = ctx.gamma.item()
        tmp = (1 / gamma) * (1 / gamma) * ((gamma - input.abs()).clamp(min=0))
        return grad_output * tmp, None


class SigmoidDerivative(torch.autograd.Function):
    alpha = 4.0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.requires_grad:
            ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grad_x = None
        if ctx.needs_input_grad[0]:
            s = torch.sigmoid(SigmoidDerivative.alpha * ctx.saved_tensors[0])
            grad_x = grad_output * (1.0 - s) * s * SigmoidDerivative.alpha
        return grad_x


class ArcTangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float = 2.0) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return torch.heaviside(x, torch.zeros(1, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.alpha / 2 / (1 + (math.pi / 2 * ctx.alpha * x).pow_(2)) * grad_output, None


class PiecewiseExponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.ge(0).type(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_output * 0.5 * torch.exp(-np.float64(1.5) * x.abs())


def gaussian(x: Tensor, mu: float = 0.0, sigma: float = 0.5) -> Tensor:
    return torch.exp(-((x - mu) ** 2) / (2 * sigma**2)) / torch.sqrt(2 * torch.tensor(math.pi)) / sigma


class MultiGaussian(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.gt(0).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        scale, hight = 6.0, 0.15
        temp = (
            gaussian(input, mu=0.0, sigma=lens) * (1.0 + hight)
            - gaussian(input, mu=lens, sigma=scale * lens) * hight
            - gaussian(input, mu=-lens, sigma=scale * lens) * hight
        )
        return grad_input * temp.to(input) * 0.5


class SuperSpike(torch.autograd.Function):
    scale = 10.0

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        out = torch.zeros_like(input)
        out[input > 0] = 1.0
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        return grad_output.clone() / (SuperSpike.scale * torch.abs(input) + 1.0) ** 2


class SlayerLike(torch.autograd.Function):
    """Scale and time constant arrive as tensors, are saved with the threshold and read back."""

    @staticmethod
    def forward(ctx: Any, membrane: Tensor, scale: Tensor, tau: Tensor) -> Tensor:
        ctx.save_for_backward(membrane, scale, tau)
        return torch.where(membrane >= 0, 1.0, 0.0).to(membrane.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        membrane, scale, tau = ctx.saved_tensors
        pdf = scale / tau * torch.exp(-torch.abs(membrane) / tau)
        return grad_output * pdf.to(membrane), None, None


class TwoOutputs(torch.autograd.Function):
    """Gives spikes and the rest of the potential; both have gradients."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Any:
        spike = (v > 0).to(v)
        ctx.save_for_backward(v, spike)
        return spike, v * (1 - spike)

    @staticmethod
    def backward(ctx: Any, grad_spike: Tensor, grad_rest: Tensor) -> Tensor:
        v, spike = ctx.saved_tensors
        return grad_spike * (v.abs() < 1).to(v) + grad_rest * (1 - spike)


class ScaledBySaved(torch.autograd.Function):
    """With `setup_context`, a non-differentiable second output and `once_differentiable`."""

    @staticmethod
    def forward(v: Tensor, width: float) -> Any:
        return (v > 0).to(v), v.abs() < width

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])
        ctx.width = inputs[1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        return grad * ctx.saved_tensors[0] / ctx.width, None


class WidthFunction(torch.autograd.Function):
    """The width of the window is learned."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, width: Tensor) -> Tensor:
        ctx.save_for_backward(v, width)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        v, width = ctx.saved_tensors
        window = (v.abs() < width / 2).to(v)
        return grad_output * window / width, (grad_output * window * v).sum() / width


class LearnedWidth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(1.5))

    def forward(self, v: Tensor) -> Tensor:
        return WidthFunction.apply(v, self.width)


class Polynomial(torch.autograd.Function):
    """A window in two halves, each written with a mask into zeros."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return torch.where(v < 0, torch.zeros_like(v), torch.ones_like(v))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        window = torch.zeros_like(v)
        window[(v > -1) & (v <= 0)] = 2.0
        upper = (v > 0) & (v < 1)
        window[upper] = 2 - 2 * v[upper]
        return grad_output * window


def straight_through(v: Tensor) -> Tensor:
    """No autograd Function: the hard value, the gradient of the soft one."""
    soft = torch.sigmoid(5 * v)
    return (v > 0).to(v).detach() + soft - soft.detach()


@torch.jit.script
def scripted_derivative(v: Tensor, width: float) -> Tensor:
    return torch.clamp(1.0 - v.abs() / width, min=0.0)


class WithScriptedDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(v)
        ctx.width = width
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        return grad_output * scripted_derivative(ctx.saved_tensors[0], ctx.width), None


class Sharpened(nn.Module):
    """Spikes through a module that calls its Function with keyword-like extras, as in library forks."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = 2.0

    @staticmethod
    def spiking(v: Tensor, alpha: float) -> Tensor:
        return ArcTangent.apply(v, alpha)

    def forward(self, v: Tensor) -> Tensor:
        return self.spiking(v, self.alpha) if self.alpha > 0 else v


SURROGATES: dict[str, Callable[[], Any]] = {
    "rectangle": lambda: RectangleOfWidth.apply,
    "triangle": lambda: lambda v: Triangle.apply(v, 1.0),
    "sigmoid": lambda: SigmoidDerivative.apply,
    "arc_tangent": lambda: ArcTangent.apply,
    "piecewise_exponential": lambda: PiecewiseExponential.apply,
    "multi_gaussian": lambda: MultiGaussian.apply,
    "super_spike": lambda: SuperSpike.apply,
    "slayer_like": lambda: lambda v: SlayerLike.apply(v, torch.tensor(1.0), torch.tensor(0.5)),
    "two_outputs": lambda: lambda v: TwoOutputs.apply(v)[0],
    "setup_context": lambda: lambda v: ScaledBySaved.apply(v, 0.75)[0],
    "learned_width": LearnedWidth,
    "polynomial": lambda: Polynomial.apply,
    "straight_through": lambda: straight_through,
    "scripted_derivative": lambda: lambda v: WithScriptedDerivative.apply(v, 1.0),
    "module": Sharpened,
}
