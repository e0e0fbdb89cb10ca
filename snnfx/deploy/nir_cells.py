"""Modules for the nodes of NIR that neither torch.nn nor snnfx.neuron has, one time step a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.memory_module import MemoryModule
from snnfx.neuron import ElementwiseNode
from snnfx.state.stateful import State
from snnfx.surrogate import Sigmoid

__all__ = ["CurrentIntegrator", "Delay", "Firing", "Integrator", "Scaling", "above"]


def above(threshold: Tensor) -> Tensor:
    """The next larger number: `v > threshold` is `v >= above(threshold)`, and spike functions fire at 0."""
    return torch.nextafter(threshold, torch.full_like(threshold, torch.inf))


class Scaling(nn.Module):
    """`y = scale * x`, with `scale: [*]` for inputs `[N, *]`."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Firing(nn.Module):
    """`1` where `x > threshold`, else 0, with a surrogate gradient; `threshold: [*]` for inputs `[N, *]`."""

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", above(threshold))
        self.surrogate_function = Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        spike: Tensor = self.surrogate_function(x - self.threshold)
        return spike


class Delay(MemoryModule):
    """The input of `steps` time steps before; zeros before the first."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        for i in range(steps):
            self.register_memory(f"before_{i}", None)

    def forward(self, x: Tensor) -> Tensor:
        names = self.memory_names()
        kept = [getattr(self, name) for name in names]
        kept = [torch.zeros_like(x) if value is None else value for value in kept]
        for name, value in zip(names, [x, *kept], strict=False):
            setattr(self, name, value)
        oldest: Tensor = kept[-1]
        return oldest


class Integrator(ElementwiseNode):
    """`v[t] = leak * v[t-1] + gain * x[t] + offset`, and a reset to `v_reset` where `v[t] > v_threshold`.

    Args:
        leak, gain, offset: numbers for each element, `[*]` for inputs `[N, *]`.
        initial: the potential before the first step.
        v_threshold: None for an integrator that does not fire; its output is the potential.
        v_reset: the potential after a spike.
    """

    def __init__(
        self,
        leak: Tensor,
        gain: Tensor,
        offset: Tensor,
        initial: Tensor,
        v_threshold: Tensor | None = None,
        v_reset: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("leak", leak)
        self.register_buffer("gain", gain)
        self.register_buffer("offset", offset)
        self.register_buffer("v_threshold", None if v_threshold is None else above(v_threshold))
        self.register_buffer("v_reset", v_reset)
        self.surrogate_function = Sigmoid()
        is_uniform = bool((initial == initial.flatten()[0]).all())
        self.register_memory("v", float(initial.flatten()[0]) if is_uniform else initial)

    def advance(self, x: Tensor, v: Tensor) -> tuple[Tensor, State]:  # type: ignore[override]
        v = self.leak * v + self.gain * x + self.offset
        if self.v_threshold is None:
            return v, (v,)
        spike = self.surrogate_function(v - self.v_threshold)
        return spike, ((1.0 - spike) * v + spike * self.v_reset,)

    def _like_input(self, name: str, value: Any, x: Tensor) -> Tensor:
        if isinstance(value, Tensor) and value.shape == x.shape[1:]:
            value = value.to(x).expand_as(x)
        return super()._like_input(name, value, x)


class CurrentIntegrator(Integrator):
    """An `Integrator` of a synaptic current `i[t] = i_leak * i[t-1] + i_gain * x[t]`.

    Args:
        i_leak, i_gain: numbers for each element.
        **membrane: see `Integrator`.
    """

    def __init__(self, i_leak: Tensor, i_gain: Tensor, **membrane: Any) -> None:
        super().__init__(**membrane)
        self.register_buffer("i_leak", i_leak)
        self.register_buffer("i_gain", i_gain)
        self.register_memory("i", 0.0)

    def advance(self, x: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, State]:  # type: ignore[override]
        i = self.i_leak * i + self.i_gain * x
        output, (v,) = super().advance(i, v)
        return output, (v, i)
