"""Surrogate gradients: spike functions with a step in the forward pass and a smooth derivative in the backward pass.

A neuron fires when its potential reaches the threshold: `spike = H(x)` with `x = v - v_threshold`, and `H(x) = 1` for
`x >= 0`, else 0. The derivative of H is zero almost everywhere, so training uses a surrogate, `d spike / dx := g(x)`:

| class                | `g(x)`                                                  | default         |
|----------------------|---------------------------------------------------------|-----------------|
| `Sigmoid`            | `alpha * s * (1 - s)`, `s = sigmoid(alpha * x)`         | alpha = 4       |
| `ATan`               | `alpha / 2 / (1 + (pi/2 * alpha * x)**2)`               | alpha = 2       |
| `SoftSign`           | `alpha / 2 / (1 + alpha * abs(x))**2`                   | alpha = 2       |
| `SuperSpike`         | `alpha / (1 + abs(x))**2`                               | alpha = 1       |
| `FastSigmoid`        | `1 / (1 + alpha * abs(x))**2`                           | alpha = 25      |
| `Erf`                | `alpha / sqrt(pi) * exp(-(alpha * x)**2)`               | alpha = 2       |
| `PiecewiseExp`       | `alpha / 2 * exp(-alpha * abs(x))`                      | alpha = 1       |
| `MultiGaussian`      | a Gaussian with negative flanks                         | see the class   |
| `PiecewiseQuadratic` | `alpha * max(0, 1 - alpha * abs(x))`                    | alpha = 1       |
| `Triangle`           | `gamma * max(0, 1 - abs(x) / width)`                    | 0.3, 1          |
| `Rectangle`          | `1 / width` for `abs(x) < width / 2`, else 0            | width = 1       |
| `PiecewiseLeakyReLU` | `1 / (2 * w)` for `abs(x) < w`, else `c`                | w = 1, c = 0.01 |
| `LeakyKReLU`         | `k` for `x >= 0`, else `leak`                           | leak = 0, k = 1 |

Names, formulas and defaults match SpikingJelly 2.0.0 where it has a surrogate of the same name. For a surrogate of your
own, pass a function to `CustomSurrogate` or subclass `Surrogate`.

Spikes and gradients have the dtype of `x`, including float16 and bfloat16. `-0.0` gives a spike, NaN does not. The
gradient at NaN is NaN if `g` is continuous, and the outer value of `g` if `g` is piecewise constant.

All surrogates support `torch.func` (grad, vjp, jvp, vmap, jacrev, jacfwd), second derivatives (the derivative of `g`),
forward-mode differentiation, and `torch.compile(fullgraph=True)`, also around a `torch.func` transform.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from types import FunctionType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.sandbox.torch_internals import are_transforms_active, forward_mode_level

__all__ = [
    "ATan",
    "CustomSurrogate",
    "Erf",
    "FastSigmoid",
    "LeakyKReLU",
    "MultiGaussian",
    "PiecewiseExp",
    "PiecewiseLeakyReLU",
    "PiecewiseQuadratic",
    "Rectangle",
    "Sigmoid",
    "SoftSign",
    "SpikeFunction",
    "SuperSpike",
    "Surrogate",
    "Triangle",
    "heaviside",
]


def heaviside(x: Tensor) -> Tensor:
    """Heaviside step function: 1 where `x >= 0`, else 0 (also for NaN), with the shape and dtype of `x`."""
    return (x >= 0).to(x.dtype)


def _nothing_is_differentiated() -> bool:
    """Whether no differentiation is active, so that a call can skip the autograd.Function (about 20 us)."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return not are_transforms_active() and forward_mode_level() < 0


class SpikeFunction(torch.autograd.Function):
    """The autograd.Function of all surrogates.

    Forward: `heaviside(x)`. Backward: `grad * derivative(x, *hyperparameters)`, with the hyperparameters of the forward
    call, even if the module has changed since.
    """

    snnfx_elementwise = True
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, derivative: Callable[..., Tensor], hyperparameters: tuple[float, ...]) -> Tensor:
        return heaviside(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.derivative, ctx.hyperparameters = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad_spike: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad_spike * ctx.derivative(x, *ctx.hyperparameters), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (x,) = ctx.saved_tensors
        return cast(Tensor, (tangent * ctx.derivative(x, *ctx.hyperparameters)).to(x.dtype))


def _spike_with(derivative: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The spike function with a given derivative, as a function of tensors and numbers only."""

    def spike(x: Tensor, *hyperparameters: float) -> Tensor:
        if type(x) is Tensor and not torch.compiler.is_compiling() and not are_transforms_active():
            # Skips `apply`, which inspects the signature of `forward`: that takes longer than a small step.
            return cast(Tensor, super(torch.autograd.Function, SpikeFunction).apply(x, derivative, hyperparameters))
        return cast(Tensor, SpikeFunction.apply(x, derivative, hyperparameters))

    return spike


class Surrogate(nn.Module):
    """Base class of surrogate gradients.

    A subclass passes its hyperparameters to `super().__init__` by name. They become attributes (Python floats) that can
    be changed at any time; the next call uses the new value. The static method `derivative(x, **hyperparameters)`
    computes the surrogate gradient element-wise. The optional static method `primitive` is its integral, which replaces
    the step function if `spiking` is False.

    Args:
        spiking: True for spikes with the surrogate gradient; False for the smooth primitive with its own gradient.
            Default: True.
        hyperparameters: numbers by name. Those listed in the class attribute `positive` must be above 0.

    Shape:
        Input `[*]`, output `[*]` with the same dtype; element-wise.

    Raises:
        InputError: SNNFX309, a hyperparameter is not a finite number or has the wrong sign; SNNFX305, the input of a
            call is not a tensor.

    Example:
        >>> import torch
        >>> class Cauchy(Surrogate):
        ...     def __init__(self, alpha=1.0, spiking=True):
        ...         super().__init__(spiking, alpha=alpha)
        ...     @staticmethod
        ...     def derivative(x, alpha):
        ...         return alpha / (1 + (alpha * x) ** 2)
        >>> x = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
        >>> Cauchy(alpha=2.0)(x).sum().backward(); x.grad
        tensor([1., 2., 1.])
    """

    snnfx_elementwise: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("alpha",)
    primitive: Any = None

    spiking: bool
    derivative: Callable[..., Tensor]
    _spike: Callable[..., Tensor]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("derivative", "primitive"):
            if isinstance(cls.__dict__.get(name), FunctionType):
                raise InputError(
                    "SNNFX309",
                    f"`{name}` of {cls.__name__} is not a static method",
                    why="it is called with the input and the hyperparameters, but without self.",
                    hint=f"Put @staticmethod above `def {name}(x, ...)`.",
                )
        if "derivative" in cls.__dict__:
            cls._spike = staticmethod(_spike_with(cls.__dict__["derivative"].__func__))

    def __init__(self, spiking: bool = True, **hyperparameters: float) -> None:
        super().__init__()
        self._hyperparameters = tuple(hyperparameters)
        for name, value in hyperparameters.items():
            setattr(self, name, value)
        self.spiking = spiking
        self._keep_whole_in_compiled_graphs()

    def _keep_whole_in_compiled_graphs(self) -> None:
        # Dynamo refuses Functions with a jvp, and under torch.func.grad silently drops every custom backward
        # (pytorch#193279, #192985). As a single call in the graph, the Function is left to AOTAutograd, which handles
        # both. At the first use, not at import, because this imports torch._dynamo, which takes a second.
        if getattr(self, "_spike", None) is None:
            raise InputError(
                "SNNFX309",
                f"{type(self).__name__} has no static method `derivative`",
                why="it defines the surrogate gradient.",
                hint="Define a static method `derivative(x, ...)`.",
            )
        torch.compiler.allow_in_graph(self._spike)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep_whole_in_compiled_graphs()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_hyperparameters", ()):
            value = checked_number(type(self).__name__, name, value, above=0.0 if name in self.positive else None)
        elif name == "spiking" and not value and self.primitive is None:
            raise InputError(
                "SNNFX309",
                f"{type(self).__name__} cannot be set to spiking=False",
                why="it has no primitive, the integral of its derivative.",
                hint="Define a static method `primitive(x, ...)`, or pass primitive= to CustomSurrogate.",
            )
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Compute spikes of `x = v - v_threshold`, or the primitive if `spiking` is False; `[*]` to `[*]`."""
        if not isinstance(x, Tensor):
            raise InputError(
                "SNNFX305",
                f"{type(self).__name__} was called with a {type(x).__name__}",
                why="it takes one tensor, and torch.fx would drop the surrogate gradient if it traced through here.",
                hint="To trace a model, use snnfx.convert, or treat snnfx.surrogate.Surrogate as a leaf module.",
            )
        if self.spiking and _nothing_is_differentiated():
            return heaviside(x)
        hyperparameters = [getattr(self, name) for name in self._hyperparameters]
        if self.spiking:
            return self._spike(x, *hyperparameters)
        return cast(Tensor, self.primitive(x, *hyperparameters))

    def extra_repr(self) -> str:
        shown = [f"{name}={getattr(self, name)}" for name in self._hyperparameters]
        return ", ".join(shown if self.spiking else [*shown, "spiking=False"])


class CustomSurrogate(Surrogate):
    """Surrogate gradient defined by a function.

    Args:
        derivative: `derivative(x, **hyperparameters) -> Tensor`, element-wise, made of torch functions.
        primitive: the integral of `derivative`, required for `spiking=False`. Default: None.
        spiking: see `Surrogate`.
        hyperparameters: numbers that become attributes; both functions take them in this order.

    Raises:
        InputError: SNNFX309, `derivative` or `primitive` is not a function. Modules are refused: their parameters
            would get no gradient.

    Example:
        >>> import torch
        >>> spike = CustomSurrogate(lambda x, alpha: torch.exp(-alpha * x.abs()), alpha=2.0)
        >>> x = torch.tensor([-0.5, 0.0], requires_grad=True)
        >>> spike(x).sum().backward(); x.grad
        tensor([0.3679, 1.0000])
        >>> spike.alpha = 4.0   # used by the next call
    """

    positive: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        derivative: Callable[..., Tensor],
        primitive: Callable[..., Tensor] | None = None,
        spiking: bool = True,
        **hyperparameters: float,
    ) -> None:
        functions = (
            {"derivative": derivative} if primitive is None else {"derivative": derivative, "primitive": primitive}
        )
        for name, function in functions.items():
            if isinstance(function, nn.Module) or not callable(function):
                what = f"`{name}` of a CustomSurrogate is a {type(function).__name__}"
                raise InputError("SNNFX309", what, why="it must be a function.", hint="Pass a function of x.")
        for name in hyperparameters:
            if hasattr(type(self), name) or name == "training":
                what = f"a hyperparameter cannot be called `{name}`"
                raise InputError("SNNFX309", what, why="modules use that name.", hint="Choose another name.")
        # In __dict__, because nn.Module is not initialised yet; instance attributes hide those of the class.
        self.__dict__.update(derivative=derivative, primitive=primitive, _spike=_spike_with(derivative))
        super().__init__(spiking, **hyperparameters)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_spike"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__["_spike"] = _spike_with(state["derivative"])
        super().__setstate__(state)


class Sigmoid(Surrogate):
    """`g(x) = alpha * s * (1 - s)` with `s = sigmoid(alpha * x)`, the derivative of `sigmoid(alpha * x)`.

    Source: SpikingJelly 2.0.0, `surrogate.Sigmoid`; compared with others by Zenke & Vogels (2021), "The remarkable
    robustness of surrogate gradient learning", Neural Computation 33(4).
    """

    alpha: float

    def __init__(self, alpha: float = 4.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        s = torch.sigmoid(alpha * x)
        return alpha * s * (1 - s)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return torch.sigmoid(alpha * x)


class ATan(Surrogate):
    """`g(x) = alpha / 2 / (1 + (pi/2 * alpha * x)**2)`, the derivative of `atan(pi/2 * alpha * x) / pi + 1/2`.

    Source: Fang et al. (2021), "Incorporating learnable membrane time constant to enhance learning of spiking neural
    networks", ICCV; SpikingJelly 2.0.0, `surrogate.ATan`.
    """

    alpha: float

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        z = (math.pi / 2 * alpha) * x
        return (alpha / 2) / (1 + z * z)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return torch.atan((math.pi / 2 * alpha) * x) / math.pi + 0.5


class SoftSign(Surrogate):
    """`g(x) = alpha / 2 / (1 + alpha * abs(x))**2`, the derivative of `(softsign(alpha * x) + 1) / 2`.

    Source: SpikingJelly 2.0.0, `surrogate.SoftSign`.
    """

    alpha: float

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        z = 1 + alpha * x.abs()
        return (alpha / 2) / (z * z)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return (nn.functional.softsign(alpha * x) + 1) / 2


class SuperSpike(Surrogate):
    """`g(x) = alpha / (1 + abs(x))**2`: alpha is the height; for the slope, see `FastSigmoid`.

    Its primitive is `alpha * x / (1 + abs(x)) + 1/2`, between `1/2 - alpha` and `1/2 + alpha`.

    Source: Zenke & Ganguli (2018), "SuperSpike: supervised learning in multilayer spiking neural networks", Neural
    Computation 30(6), as in SpikingJelly 2.0.0, `surrogate.SuperSpike`, and with alpha = 1 in Norse's `superspike`.
    """

    alpha: float

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        z = 1 + x.abs()
        return alpha / (z * z)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return alpha * nn.functional.softsign(x) + 0.5


class FastSigmoid(Surrogate):
    """`g(x) = 1 / (1 + alpha * abs(x))**2`: height 1 at the threshold, alpha is the slope.

    Its primitive is `x / (1 + alpha * abs(x)) + 1/2`, between `1/2 - 1/alpha` and `1/2 + 1/alpha`.

    Source: Zenke & Ganguli (2018), "SuperSpike: supervised learning in multilayer spiking neural networks", Neural
    Computation 30(6), with the name beta for alpha; snnTorch's `fast_sigmoid(slope=25)`.
    """

    alpha: float

    def __init__(self, alpha: float = 25.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        z = 1 + alpha * x.abs()
        return 1 / (z * z)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return x / (1 + alpha * x.abs()) + 0.5


class Erf(Surrogate):
    """`g(x) = alpha / sqrt(pi) * exp(-(alpha * x)**2)`, a Gaussian, the derivative of `erfc(-alpha * x) / 2`.

    Source: SpikingJelly 2.0.0, `surrogate.Erf`; with `alpha = 1 / (sqrt(2) * sigma)` the fourth curve of Wu et al.
    (2018), "Spatio-temporal backpropagation for training high-performance spiking neural networks", Frontiers in
    Neuroscience 12.
    """

    alpha: float

    def __init__(self, alpha: float = 2.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        z = alpha * x
        return (alpha / math.sqrt(math.pi)) * torch.exp(-z * z)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        return torch.erfc(-alpha * x) / 2


class PiecewiseExp(Surrogate):
    """`g(x) = alpha / 2 * exp(-alpha * abs(x))`, a two-sided exponential; its primitive is the Laplace distribution.

    Source: Shrestha & Orchard (2018), "SLAYER: spike layer error reassignment in time", NeurIPS; SpikingJelly 2.0.0,
    `surrogate.PiecewiseExp`.
    """

    alpha: float

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        return (alpha / 2) * torch.exp(-alpha * x.abs())

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        side = 2 * heaviside(x) - 1  # not sign(x) and abs(x): their derivatives at 0 are 0
        return 0.5 + 0.5 * side * (1 - torch.exp(-alpha * side * x))


class MultiGaussian(Surrogate):
    """A Gaussian with a wide, shallow negative flank on each side, which recovers silent and saturated neurons.

    `g(x) = gamma * ((1 + height) * N(x; 0, sigma) - height * N(x; sigma, spread * sigma)
    - height * N(x; -sigma, spread * sigma))`, where `N(x; m, s)` is the density of the normal distribution.

    Args:
        sigma: standard deviation of the central Gaussian, in units of the potential. Default: 0.5.
        height: weight of the flanks. Default: 0.15.
        spread: standard deviation of the flanks in multiples of `sigma`. Default: 6.
        gamma: factor of the whole function. Default: 0.5.
        spiking: see `Surrogate`.

    Source: Yin, Corradi & Bohte (2021), "Accurate and efficient time-domain classification with adaptive spiking
    recurrent neural networks", Nature Machine Intelligence 3; gamma = 0.5 is in their published code.
    """

    positive: ClassVar[tuple[str, ...]] = ("sigma", "spread")
    sigma: float
    height: float
    spread: float
    gamma: float

    def __init__(
        self, sigma: float = 0.5, height: float = 0.15, spread: float = 6.0, gamma: float = 0.5, spiking: bool = True
    ) -> None:
        super().__init__(spiking, sigma=sigma, height=height, spread=spread, gamma=gamma)

    @staticmethod
    def derivative(x: Tensor, sigma: float, height: float, spread: float, gamma: float) -> Tensor:
        middle = _normal_density(x, sigma)
        flanks = _normal_density(x - sigma, spread * sigma) + _normal_density(x + sigma, spread * sigma)
        return gamma * ((1 + height) * middle - height * flanks)

    @staticmethod
    def primitive(x: Tensor, sigma: float, height: float, spread: float, gamma: float) -> Tensor:
        middle: Tensor = torch.special.ndtr(x / sigma)
        wide = spread * sigma
        flanks: Tensor = torch.special.ndtr((x - sigma) / wide) + torch.special.ndtr((x + sigma) / wide)
        return gamma * ((1 + height) * middle - height * flanks)


def _normal_density(x: Tensor, sigma: float) -> Tensor:
    z = x / sigma
    return torch.exp(-0.5 * z * z) / (sigma * math.sqrt(2 * math.pi))


class PiecewiseQuadratic(Surrogate):
    """`g(x) = alpha * max(0, 1 - alpha * abs(x))`, a triangle of area 1, zero for `abs(x) >= 1 / alpha`.

    Source: Esser et al. (2016), "Convolutional networks for fast, energy-efficient neuromorphic computing", PNAS
    113(41); SpikingJelly 2.0.0, `surrogate.PiecewiseQuadratic`.
    """

    alpha: float

    def __init__(self, alpha: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)

    @staticmethod
    def derivative(x: Tensor, alpha: float) -> Tensor:
        return alpha * torch.clamp(1 - alpha * x.abs(), min=0)

    @staticmethod
    def primitive(x: Tensor, alpha: float) -> Tensor:
        z = torch.clamp(alpha * x, -1, 1)
        return 0.5 + z - 0.5 * z * z.abs()


class Triangle(Surrogate):
    """`g(x) = gamma * max(0, 1 - abs(x) / width)`, a triangle of height gamma, zero for `abs(x) >= width`.

    Bellec et al. divide the distance to the threshold by the threshold: `width = v_threshold`. Its primitive lies
    between `1/2 - gamma * width / 2` and `1/2 + gamma * width / 2`.

    Source: Bellec et al. (2018), "Long short-term memory and learning-to-learn in networks of spiking neurons",
    NeurIPS (gamma = 0.3 there dampens the gradient over many time steps); Norse's `triangle`.
    """

    positive: ClassVar[tuple[str, ...]] = ("gamma", "width")
    gamma: float
    width: float

    def __init__(self, gamma: float = 0.3, width: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, gamma=gamma, width=width)

    @staticmethod
    def derivative(x: Tensor, gamma: float, width: float) -> Tensor:
        return gamma * torch.clamp(1 - x.abs() / width, min=0)

    @staticmethod
    def primitive(x: Tensor, gamma: float, width: float) -> Tensor:
        z = torch.clamp(x / width, -1, 1)
        return 0.5 + (gamma * width) * (z - 0.5 * z * z.abs())


class Rectangle(Surrogate):
    """`g(x) = 1 / width` for `abs(x) < width / 2`, else 0: a boxcar of area 1.

    Source: Wu et al. (2018), "Spatio-temporal backpropagation for training high-performance spiking neural networks",
    Frontiers in Neuroscience 12, first curve; SpikingJelly 2.0.0's `surrogate.Rect(alpha)` has `width = 1 / alpha`.
    """

    positive: ClassVar[tuple[str, ...]] = ("width",)
    width: float

    def __init__(self, width: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, width=width)

    @staticmethod
    def derivative(x: Tensor, width: float) -> Tensor:
        return (x.abs() < width / 2).to(x.dtype) / width

    @staticmethod
    def primitive(x: Tensor, width: float) -> Tensor:
        return torch.clamp(x / width + 0.5, 0, 1)


class PiecewiseLeakyReLU(Surrogate):
    """`g(x) = 1 / (2 * w)` for `abs(x) < w`, else `c`: a boxcar with a small gradient `c` outside.

    Source: SpikingJelly 2.0.0, `surrogate.PiecewiseLeakyReLU`.
    """

    positive: ClassVar[tuple[str, ...]] = ("w",)
    w: float
    c: float

    def __init__(self, w: float = 1.0, c: float = 0.01, spiking: bool = True) -> None:
        super().__init__(spiking, w=w, c=c)

    @staticmethod
    def derivative(x: Tensor, w: float, c: float) -> Tensor:
        inside = (x.abs() < w).to(x.dtype)
        return inside * (1 / (2 * w)) + (1 - inside) * c

    @staticmethod
    def primitive(x: Tensor, w: float, c: float) -> Tensor:
        inside = torch.clamp(x, -w, w)
        return inside / (2 * w) + 0.5 + c * (x - inside)


class LeakyKReLU(Surrogate):
    """`g(x) = k` for `x >= 0`, else `leak`. `LeakyKReLU(leak=1, k=1)` is the straight-through estimator.

    Source: SpikingJelly 2.0.0, `surrogate.LeakyKReLU`; Bengio, Leonard & Courville (2013), "Estimating or propagating
    gradients through stochastic neurons for conditional computation" (straight-through).
    """

    positive: ClassVar[tuple[str, ...]] = ()
    leak: float
    k: float

    def __init__(self, leak: float = 0.0, k: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, leak=leak, k=k)

    @staticmethod
    def derivative(x: Tensor, leak: float, k: float) -> Tensor:
        above = heaviside(x)
        return above * k + (1 - above) * leak

    @staticmethod
    def primitive(x: Tensor, leak: float, k: float) -> Tensor:
        return k * torch.clamp(x, min=0) + leak * torch.clamp(x, max=0)


def checked_number(
    owner: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    between: tuple[float, float] | None = None,
) -> float:
    """Check a hyperparameter and convert it to a Python float.

    Args:
        owner: class of the neuron or surrogate, for the message.
        name: name of the hyperparameter.
        value: an int, a float, or a NumPy number.
        above: exclusive lower bound; None for none.
        between: inclusive lower and upper bound; None for none.

    Raises:
        InputError: SNNFX309, the value is not a finite number in that range.
    """
    requirement = "a finite number"
    if above is not None:
        requirement += f" above {above:g}"
    if between is not None:
        requirement += f" from {between[0]:g} to {between[1]:g}"
    refusal = InputError(
        "SNNFX309",
        f"`{name}` of {owner} cannot be {_shown(value)}",
        why=f"it must be {requirement}.",
        hint="Pass a float, e.g. value.item(); it cannot be learned." if isinstance(value, Tensor) else "",
    )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise refusal
    number = float(value)
    too_low = (above is not None and number <= above) or (between is not None and number < between[0])
    if not math.isfinite(number) or too_low or (between is not None and number > between[1]):
        raise refusal
    return number


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor | nn.Module) else repr(value)
