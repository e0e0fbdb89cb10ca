"""Neurons in the manner of published repositories: how authors make states, write spikes, count steps, use numbers.

Each takes one step `[N, C]` and computes element by element. `NEURONS` has them by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NEURONS"]

NEURONS: dict[str, Callable[[], nn.Module]] = {}


def neuron(cls: type[nn.Module]) -> type[nn.Module]:
    NEURONS[cls.__name__] = cls
    return cls


class Rectangle(torch.autograd.Function):
    """The surrogate of most vision repositories."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return v.gt(0).to(v)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        grad_input[v.abs() > 0.5] = 0
        return grad_input


fire = Rectangle.apply


class Stateful(nn.Module):
    """The skeleton of the neurons below: a state that is None at first."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Any = None

    def first(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = self.first(x)
        v = self.v * 0.8 + x
        y = fire(v - 1)
        self.v = v - y
        return y


@neuron
class ZerosOfTheBatch(Stateful):
    def first(self, x: Tensor) -> Any:
        return torch.zeros(x.shape[0], x.shape[1], dtype=x.dtype)


@neuron
class ZerosOfBatchAndWidth(Stateful):
    """The width is an attribute, as in most spoken-digit networks."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 5

    def first(self, x: Tensor) -> Any:
        return torch.zeros(x.shape[0], self.hidden).to(x)


@neuron
class ZerosOfAnotherWidth(Stateful):
    """The input has another width than the state: two synapses for each neuron."""

    def forward(self, x: Tensor) -> Tensor:
        current = torch.cat([x, 0.5 * x], 1).view(x.shape[0], x.shape[1], 2).sum(2)
        doubled = torch.cat([current, current], 1)
        if self.v is None:
            self.v = torch.zeros(x.shape[0], 10, dtype=x.dtype)
        v = self.v * 0.8 + doubled
        y = fire(v - 1)
        self.v = v - y
        return y


@neuron
class ZerosOfTheSize(Stateful):
    def first(self, x: Tensor) -> Any:
        return torch.zeros(x.size(), device=x.device, dtype=x.dtype)


@neuron
class NewZeros(Stateful):
    def first(self, x: Tensor) -> Any:
        return x.new_zeros(x.shape)


@neuron
class ZerosLike(Stateful):
    def first(self, x: Tensor) -> Any:
        return torch.zeros_like(x, memory_format=torch.preserve_format)


@neuron
class RestingPotential(Stateful):
    def first(self, x: Tensor) -> Any:
        return -0.3 * torch.ones(x.size(0), 5, dtype=x.dtype, device=x.device)


@neuron
class FullOfTheBatch(Stateful):
    def first(self, x: Tensor) -> Any:
        return torch.full((x.shape[0], 5), np.float64(0.25), dtype=x.dtype)


@neuron
class EqualsNone(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v == None else 0.9 * self.v + x  # noqa: E711
        y = fire(v - 1)
        self.v = v * (1.0 - y)
        return y


class WrittenSpikes(torch.autograd.Function):
    """Zenke's: zeros, then ones where the potential is positive."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        out = torch.zeros_like(v)
        out[v > 0] = 1.0
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        return grad_input / (10.0 * torch.abs(v) + 1.0) ** 2


@neuron
class MaskedWrite(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else 0.9 * self.v + x
        y = WrittenSpikes.apply(v - 1.0)
        self.v = v * (1.0 - y.detach())
        return y


@neuron
class MaskedReset(Stateful):
    """Resets by a masked write into the potential itself."""

    def forward(self, x: Tensor) -> Tensor:
        v = x.clone() if self.v is None else 0.9 * self.v + x
        y = fire(v - 1.0)
        v = v.clone()
        v[y > 0] = 0.0
        self.v = v
        return y


@neuron
class MaskedReads(Stateful):
    """`a[mask] = b[mask]`: values move only where the mask is set."""

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x) if self.v is None else self.v
        h = 0.7 * v + x
        y = fire(h - 1.0)
        spiked = y.bool()
        reset = (h - 1.0) * 0.5
        h = h + 0.0
        h[spiked] = reset[spiked]
        self.v = h
        return y


@neuron
class MaskedFill(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else 0.9 * self.v + x
        y = fire(v - 1.0)
        self.v = v.masked_fill(y != 0, 0.1)
        return y


@neuron
class MaskedFillInPlace(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        v = x * 1.0 if self.v is None else 0.9 * self.v + x
        y = fire(v - 1.0)
        v = v.clone()
        v.masked_fill_(y > 0, 0.0)
        self.v = v
        return y


@neuron
class WhereReset(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else 0.9 * self.v + x
        y = fire(v - 1.0)
        self.v = torch.where(y > 0, torch.tensor(0.0, dtype=v.dtype), v)
        return y


@neuron
class TensorConstants(Stateful):
    """Constants as tensors that the step makes, and their `.item()`."""

    def forward(self, x: Tensor) -> Tensor:
        tau = torch.tensor(2.0)
        decay = torch.exp(-torch.tensor([1.0]) / tau).item()
        v = x if self.v is None else decay * self.v + x * torch.tensor(1.5).to(x.device)
        y = fire(v - torch.tensor([1.0], dtype=x.dtype))
        self.v = v - y * torch.tensor(1.0)
        return y


@neuron
class NumpyNumbers(Stateful):
    """`np.exp(-dt / tau)` as attribute and in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.tau, self.dt = 10.0, np.float32(1.0)
        self.alpha = np.exp(-1.0 / 10.0)
        self.threshold = np.array(1.0)

    def forward(self, x: Tensor) -> Tensor:
        beta = np.exp(-self.dt / self.tau)
        v = x * (1 - self.alpha) if self.v is None else self.alpha * self.v + float(1 - beta) * x
        y = fire(v / np.sqrt(np.prod(x.shape[1:])) - float(self.threshold) / 8)
        self.v = v * (1 - y) * np.float64(0.9)
        return y


@neuron
class MathNumbers(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.full((5,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        decay = torch.clamp(self.tau, min=math.exp(-1 / 5), max=np.exp(2.0)).reciprocal()
        v = x if self.v is None else decay * self.v + x / math.sqrt(math.prod(x.shape[1:]))
        y = fire(v - math.pi / 6)
        self.v = v - y * math.log(2.0)
        return y


@neuron
class StepCounter(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.t = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.t == 0:
            self.v = torch.zeros_like(x)
        self.t += 1
        v = 0.8 * self.v + x
        y = fire(v - 1.0)
        self.v = v - y
        return y


@neuron
class StepCounterAsNumber(Stateful):
    """The number of the step scales the threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.t = 0

    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else 0.8 * self.v + x
        self.t = self.t + 1
        y = fire(v - 1.0 / self.t)
        self.v = v - y
        return y


@neuron
class RefractoryCounter(Stateful):
    """Silent for two steps after a spike; the counter is a tensor of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros_like(x)
            self.count = torch.zeros(x.shape, dtype=torch.long)
        active = self.count == 0
        v = torch.where(active, 0.9 * self.v + x, self.v)
        y = fire(v - 1.0) * active.to(x)
        self.count = torch.where(y > 0, torch.full_like(self.count, 2), (self.count - 1).clamp(min=0))
        self.v = v * (1 - y)
        return y


@neuron
class PhaseCounter(Stateful):
    """Fires in every third step; the count is a tensor that wraps around."""

    def __init__(self) -> None:
        super().__init__()
        self.phase: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros_like(x)
            self.phase = torch.zeros_like(x, dtype=torch.int64)
        v = 0.9 * self.v + x
        self.phase = (self.phase + 1) % 3
        y = fire(v - 1.0) * (self.phase == 0).to(v.dtype)
        self.v = v - y
        return y


@neuron
class ParameterCompared(Stateful):
    """A Python branch on the value of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("gain", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        leak = self.leak if self.leak > 0 else self.leak * 0.1
        if self.gain != 1:
            x = x * self.gain
        v = x if self.v is None else leak * self.v + x
        y = fire(v - 1.0)
        self.v = v - y
        return y


@torch.jit.script
def scripted_charge(v: Tensor, x: Tensor, decay: float) -> Tensor:
    return v * decay + x


@torch.jit.script
def scripted_reset(v: Tensor, spike: Tensor) -> Tensor:
    return v * (1.0 - spike)


@neuron
class ScriptedHelpers(Stateful):
    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros_like(x)
        v = scripted_charge(self.v, x, 0.8)
        y = fire(v - 1.0)
        self.v = scripted_reset(v, y)
        return y


@neuron
class MadeInForward(Stateful):
    """Modules without parameters are made where they are used."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.ReLU()(x - 0.2)
        v = x if self.v is None else nn.Hardtanh(0.0, 2.0)(0.9 * self.v + x)
        y = fire(nn.Identity()(v) - 1.0)
        self.v = v - y
        return y


@neuron
class Casts(Stateful):
    """`.float()`, `.type_as`, `.to(dtype)`."""

    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else 0.9 * self.v + x
        gate = (v > -0.5).float()
        y = fire(v - 1.0).type_as(x)
        self.v = (v * gate.double() - y.type(v.dtype)).to(x.dtype)
        return y


@neuron
class ResonateAndFire(Stateful):
    """A complex state, rotated at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.b = nn.Parameter(torch.full((5,), -0.2))

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros_like(x, dtype=torch.complex128 if x.dtype == torch.float64 else torch.complex64)
        u = self.v * torch.exp(torch.complex(self.b, self.omega)) + x
        y = fire(u.real - 1.0)
        self.v = u - y
        return y


@neuron
class ResonateInPolarForm(Stateful):
    """A complex state made of parts; its imaginary part fires."""

    def __init__(self) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        turn = torch.polar(torch.full_like(self.omega, 0.9), self.omega)
        z = torch.complex(x, torch.zeros_like(x)) if self.v is None else turn * self.v + x
        y = fire(z.imag - 0.5)
        self.v = z * (1.0 - y)
        return y + 0.1 * z.abs()


@neuron
class ResonateInTwoTensors(Stateful):
    """The same rotation in real numbers, as balanced resonate-and-fire neurons write it."""

    def __init__(self) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.w: Any = None
        self.q: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v, self.w, self.q = (torch.zeros(x.shape[0], 5, dtype=x.dtype) for _ in range(3))
        dt = 0.1
        damping = -0.3 - self.q
        v = self.v + dt * (damping * self.v - self.omega * self.w + x * 10)
        w = self.w + dt * (self.omega * self.v + damping * self.w)
        y = fire(v - 1.0 - self.q)
        self.q = self.q * 0.9 + y
        self.v, self.w = v, w
        return y


@neuron
class AdaptiveThreshold(Stateful):
    """Long short-term spiking neuron with `F.softplus` and clamps of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tau_m, self.tau_adp = nn.Parameter(torch.full((5,), 1.5)), nn.Parameter(torch.full((5,), 2.5))
        self.b: Any = None
        self.spike: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros(x.shape[0], 5).to(x)
            self.spike = torch.zeros(x.shape[0], 5).to(x)
            self.b = torch.ones(x.shape[0], 5).to(x) * 0.01
        alpha, ro = torch.exp(-1.0 / F.softplus(self.tau_m)), torch.exp(-1.0 * 1.0 / self.tau_adp)
        self.b = ro * self.b + (1 - ro) * self.spike
        B = 0.1 + 1.8 * self.b
        v = self.v * alpha + (1 - alpha) * 2.0 * x - B * self.spike
        self.spike = fire(v - B)
        self.v = v
        return self.spike


@neuron
class StateInDictionary(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "mem" not in self.state:
            self.state["mem"] = x.new_zeros(x.size(0), x.size(1))
        v = self.state["mem"] * 0.5 + x
        y = fire(v - 1.0)
        self.state["mem"] = v * (1 - y)
        return y
