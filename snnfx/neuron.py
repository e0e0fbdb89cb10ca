"""Single-step spiking neurons: charge, fire, reset.

At each time step, a neuron takes its input current `x[t]` and membrane potential `v[t-1]`, both `[N, *]`, and computes

    h[t] = charge(v[t-1], x[t])                                   charge: the potential before firing
    s[t] = H(h[t] - v_threshold)                                  fire: 1 or 0, with a surrogate gradient
    v[t] = (1 - s[t]) * h[t] + s[t] * v_reset                     hard reset
    v[t] = h[t] - s[t] * v_threshold                              soft reset, with v_reset=None

| class               | charge                                                                       | states  |
|---------------------|------------------------------------------------------------------------------|---------|
| `IFNode`            | `v + x`                                                                      | v       |
| `LIFNode`           | `v + (x - (v - v_rest)) / tau`, or `v - (v - v_rest) / tau + x`              | v       |
| `ParametricLIFNode` | as `LIFNode`, with a learnable `1 / tau = sigmoid(w)`                        | v       |
| `AdaptiveLIFNode`   | as `LIFNode`; each spike raises the threshold, which decays                  | v, b    |
| `CUBALIFNode`       | `v_decay * v + c` with the synaptic current `c[t] = c_decay * c[t-1] + x[t]` | v, c    |
| `LeakyIntegrator`   | as `LIFNode` with rest at 0; never fires, the output is the potential        | v       |

`v_rest` is `v_reset`, or 0 with the soft reset. All quantities are dimensionless; time constants are in time steps.
Equations, argument names, defaults and the order of operations match SpikingJelly 2.0.0 where it has the neuron.

There are two ways to use a neuron. A call, `spike = lif(x)`, keeps the states in attributes (`lif.v`) until `reset()`.
The pure form, `spike, (v,) = lif.step((v,), x)`, has no side effects and computes the same. Use the pure form inside
`torch.func` transforms: a call under `vmap` would store a state that is invalid outside of the transform.

States have the shape, dtype and device of the input, or the default dtype for integer and boolean inputs. Under
autocast, after a layer with bfloat16 outputs, the potential is bfloat16; for a float32 potential, call the neuron with
`x.float()`. A state of another dtype or device is converted; a state of another shape is refused (SNNFX308).

Hyperparameters (`tau`, `v_threshold`, ...) can be changed at any time; the next call uses the new value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.memory_module import MemoryModule
from snnfx.state.stateful import State
from snnfx.surrogate import Rectangle, Sigmoid, checked_number

__all__ = [
    "AdaptiveLIFNode",
    "BaseNode",
    "CUBALIFNode",
    "ElementwiseNode",
    "IFNode",
    "LIFNode",
    "LeakyIntegrator",
    "ParametricLIFNode",
]

SpikeCallable = Callable[[Tensor], Tensor]
"""Spike function: maps `v - v_threshold` to spikes element-wise, with a surrogate gradient; a module or a function."""

Check = Callable[[str, str, Any], Any]
"""`check(owner, name, value)` returns the value to store, or raises SNNFX309."""


def _number(*, above: float | None = None, between: tuple[float, float] | None = None, optional: bool = False) -> Check:
    def check(owner: str, name: str, value: Any) -> float | None:
        return None if optional and value is None else checked_number(owner, name, value, above=above, between=between)

    return check


def _boolean(owner: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError("SNNFX309", f"`{name}` of {owner} cannot be {value!r}", why="it must be True or False.")
    return value


def _spike_callable(owner: str, name: str, value: Any) -> SpikeCallable:
    if isinstance(value, type) or not callable(value):
        shown = value.__name__ if isinstance(value, type) else repr(value)
        raise InputError(
            "SNNFX309",
            f"`{name}` of {owner} cannot be {shown}",
            why="it must be a module or function that maps v - v_threshold to spikes.",
            hint=f"Pass an instance: {shown}()."
            if isinstance(value, type)
            else "Pass a spike function, e.g. snnfx.surrogate.ATan().",
        )
    return cast(SpikeCallable, value)


class ElementwiseNode(MemoryModule):
    """Base class of neurons whose step is element-wise, spiking or not.

    A subclass lists its `hyperparameters`, registers its states with numbers as initial values, and defines
    `advance(x, *states) -> (output, next states)`. Spiking neurons derive from `BaseNode`.
    """

    elementwise: ClassVar[bool] = True
    hyperparameters: ClassVar[dict[str, Check]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        check = self.hyperparameters.get(name)
        super().__setattr__(name, value if check is None else check(type(self).__name__, name, value))

    def state_names(self) -> tuple[str, ...]:
        """The names of the states, in the order used by `step`."""
        return self.memory_names()

    def initial_state(self, x: Tensor) -> State:
        """The initial states, tensors `[N, *]` like the input `x` of the first step."""
        x = self._checked_input(x)
        return tuple(self._like_input(name, initial, x) for name, initial in self._initial_memories.items())

    def step(self, state: State, x: Tensor) -> tuple[Tensor, State]:
        """Compute one time step without side effects.

        Args:
            state: one value for each of `state_names()`: a tensor `[N, *]` like `x`, or a number that stands for a
                tensor filled with it.
            x: input current of this time step, `[N, *]`.

        Returns:
            The output `[N, *]`, and the states for the next step.

        Raises:
            InputError: SNNFX308, wrong number or shape of states; SNNFX305, `x` is not a tensor.
        """
        x = self._checked_input(x)
        names = self.memory_names()
        if len(state) != len(names):
            what = f"{type(self).__name__}.step got {len(state)} states"
            hint = "Pass a tuple with one value for each state."
            raise InputError("SNNFX308", what, why=f"it has {len(names)}: {', '.join(names)}.", hint=hint)
        return self.advance(x, *[self._like_input(name, value, x) for name, value in zip(names, state, strict=True)])

    def advance(self, x: Tensor, *states: Tensor) -> tuple[Tensor, State]:
        """Compute `(output, next states)` for tensors of the same shape and dtype; subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define advance(x, *states)")

    def forward(self, x: Tensor) -> Tensor:
        """Compute one time step, with the states stored in attributes.

        Args:
            x: input current of this time step, `[N, *]`.

        Returns:
            The output, `[N, *]`.
        """
        output, state = self.step(tuple(self._memories.values()), x)
        for name, value in zip(self.memory_names(), state, strict=True):
            self._memories[name] = value
        return output

    def _checked_input(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise InputError(
                "SNNFX305",
                f"{type(self).__name__} was called with a {type(x).__name__}",
                why="it takes one tensor, the input current of one time step.",
                hint="To trace a model, use snnfx.convert, or treat neurons as leaf modules.",
            )
        return x if x.is_floating_point() else x.to(torch.get_default_dtype())

    def _like_input(self, name: str, value: Any, x: Tensor) -> Tensor:
        """Convert a state to a tensor with the shape, dtype and device of the input."""
        if not isinstance(value, Tensor):
            return torch.full_like(x, value)
        if value.shape != x.shape:
            raise InputError(
                "SNNFX308",
                f"state `{name}` of {type(self).__name__} has shape {list(value.shape)}, its input {list(x.shape)}",
                why="a neuron has one state for each element of its input.",
                hint="Call snnfx.functional.reset_net(model) before inputs of another shape, e.g. another batch size.",
            )
        if value.dtype != x.dtype or value.device != x.device:
            return value.to(device=x.device, dtype=x.dtype)
        return value

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in self.hyperparameters}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if not callable(value))


class BaseNode(ElementwiseNode):
    """Base class of spiking neurons; a subclass defines `charge(v, x)`.

    Args:
        v_threshold: threshold; the neuron fires at potentials `>= v_threshold`. Finite. Default: 1.
        v_reset: resting potential, and potential after a spike (hard reset). None for the soft reset, which subtracts
            `v_threshold` and has its resting potential at 0. Finite. Default: 0.
        surrogate_function: maps `h - v_threshold` to spikes element-wise, and defines their gradient. Default: None, a
            new `snnfx.surrogate.Sigmoid()`.
        detach_reset: True to detach the spike in the reset from the autograd graph. Default: False.

    Shape:
        Input current `[N, *]`, spikes `[N, *]`, state `v: [N, *]`.

    Raises:
        InputError: SNNFX309, a hyperparameter has an illegal value, at construction or when it is set later.

    Example:
        >>> import torch
        >>> class SquareIF(BaseNode):
        ...     def charge(self, v, x):
        ...         return v + x * x
        >>> neuron = SquareIF(v_threshold=4.0)
        >>> [float(neuron(torch.full((1,), 1.5))) for _ in range(3)]
        [0.0, 1.0, 0.0]

    Source: for `detach_reset`, Zenke & Vogels (2021), "The remarkable robustness of surrogate gradient learning for
    instilling complex function in spiking neural networks", Neural Computation 33(4).
    """

    hyperparameters: ClassVar[dict[str, Check]] = {
        "v_threshold": _number(),
        "v_reset": _number(optional=True),
        "detach_reset": _boolean,
        "surrogate_function": _spike_callable,
    }

    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate_function: SpikeCallable

    def __init__(
        self,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SpikeCallable | None = None,
        detach_reset: bool = False,
    ) -> None:
        super().__init__()
        self.v_threshold = v_threshold
        self.v_reset = v_reset
        self.detach_reset = detach_reset
        self.surrogate_function = Sigmoid() if surrogate_function is None else surrogate_function
        self.register_memory("v", self.v_reset or 0.0)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        initial = self.__dict__.get("_initial_memories", {})
        if name == "v_reset" and "v" in initial:
            now = self._memories["v"]
            not_started = isinstance(now, float) and now == initial["v"]
            initial["v"] = self.v_reset or 0.0
            if not_started:
                self._memories["v"] = initial["v"]

    def charge(self, v: Tensor, x: Tensor) -> Tensor:
        """Compute the potential before firing, `h[t]`, from `v[t-1]` and `x[t]`, all `[N, *]`; subclasses define it."""
        raise NotImplementedError(f"{type(self).__name__} must define charge(v, x)")

    def discharge(self, h: Tensor, spike: Tensor, threshold: float | Tensor) -> Tensor:
        """Compute the potential after firing: hard reset to `v_reset`, or soft reset by `threshold`."""
        if self.detach_reset:
            spike = spike.detach()
        if self.v_reset is None:
            return h - spike * threshold
        silent = (1.0 - spike) * h
        return spike * self.v_reset + silent if self.v_reset else silent

    def advance(self, x: Tensor, v: Tensor) -> tuple[Tensor, State]:  # type: ignore[override]
        h = self.charge(v, x)
        spike = self.surrogate_function(h - self.v_threshold)
        return spike, (self.discharge(h, spike, self.v_threshold),)


class IFNode(BaseNode):
    """Integrate-and-fire: `h[t] = v[t-1] + x[t]`.

    Args, Shape, Raises:
        See `BaseNode`.

    Example:
        >>> import torch
        >>> neuron = IFNode()
        >>> [float(neuron(torch.full((1,), 0.5))) for _ in range(4)]
        [0.0, 1.0, 0.0, 1.0]

    Source: SpikingJelly 2.0.0, `neuron.IFNode`.
    """

    def charge(self, v: Tensor, x: Tensor) -> Tensor:
        return v + x


class LIFNode(BaseNode):
    """Leaky integrate-and-fire.

    `h[t] = v[t-1] + (x[t] - (v[t-1] - v_rest)) / tau` with `decay_input`, else
    `h[t] = v[t-1] - (v[t-1] - v_rest) / tau + x[t]`; `v_rest` is `v_reset`, or 0 with the soft reset.

    Args:
        tau: membrane time constant in time steps, above 1: the potential decays by the factor `1 - 1 / tau` per step.
            Default: 2.
        decay_input: True to divide the input by `tau`, as in the exact equation; False to add the input undivided.
            Default: True.
        v_threshold: see `BaseNode`.
        v_reset: see `BaseNode`.
        surrogate_function: see `BaseNode`.
        detach_reset: see `BaseNode`.

    Shape, Raises:
        See `BaseNode`.

    Example:
        >>> import torch
        >>> neuron = LIFNode(tau=2.0)
        >>> [float(neuron(torch.full((1,), 1.5))) for _ in range(4)]
        [0.0, 1.0, 0.0, 1.0]
        >>> neuron
        LIFNode(
          v_threshold=1.0, v_reset=0.0, detach_reset=False, tau=2.0, decay_input=True
          (surrogate_function): Sigmoid(alpha=4.0)
        )

    Source: SpikingJelly 2.0.0, `neuron.LIFNode`; Gerstner, Kistler, Naud & Paninski (2014), "Neuronal Dynamics",
    section 1.3, discretised with forward Euler and a step of 1.
    """

    hyperparameters: ClassVar[dict[str, Check]] = {
        **BaseNode.hyperparameters,
        "tau": _number(above=1.0),
        "decay_input": _boolean,
    }

    tau: float
    decay_input: bool

    def __init__(
        self,
        tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SpikeCallable | None = None,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau = tau
        self.decay_input = decay_input

    def charge(self, v: Tensor, x: Tensor) -> Tensor:
        above_rest = v - self.v_reset if self.v_reset else v
        if self.decay_input:
            return v + (x - above_rest) / self.tau
        return v - above_rest / self.tau + x


class ParametricLIFNode(BaseNode):
    """Leaky integrate-and-fire with a learnable time constant (PLIF), `1 / tau = sigmoid(w)`.

    See `LIFNode` for the equations. The parameter `w` is a scalar, initialised to `-log(init_tau - 1)`; `sigmoid`
    keeps tau above 1.

    Args:
        init_tau: initial membrane time constant in time steps, above 1. Default: 2.
        decay_input: see `LIFNode`.
        v_threshold: see `BaseNode`.
        v_reset: see `BaseNode`.
        surrogate_function: see `BaseNode`.
        detach_reset: see `BaseNode`.

    Shape, Raises:
        See `BaseNode`.

    Example:
        >>> import torch
        >>> neuron = ParametricLIFNode(init_tau=4.0)
        >>> round(neuron.tau, 6)
        4.0
        >>> neuron(torch.full((1,), 4.0)).sum().backward(); neuron.w.grad is not None
        True

    Source: Fang et al. (2021), "Incorporating learnable membrane time constant to enhance learning of spiking neural
    networks", ICCV; SpikingJelly 2.0.0, `neuron.ParametricLIFNode`.
    """

    hyperparameters: ClassVar[dict[str, Check]] = {**BaseNode.hyperparameters, "decay_input": _boolean}

    decay_input: bool
    w: nn.Parameter

    def __init__(
        self,
        init_tau: float = 2.0,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = 0.0,
        surrogate_function: SpikeCallable | None = None,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(v_threshold, v_reset, surrogate_function, detach_reset)
        init_tau = checked_number(type(self).__name__, "init_tau", init_tau, above=1.0)
        self.decay_input = decay_input
        self.w = nn.Parameter(torch.tensor(-math.log(init_tau - 1.0)))

    @property
    def tau(self) -> float:
        """The current time constant `1 / sigmoid(w)`, in time steps."""
        return 1.0 / float(self.w.detach().sigmoid())

    def charge(self, v: Tensor, x: Tensor) -> Tensor:
        rate = self.w.sigmoid()
        above_rest = v - self.v_reset if self.v_reset else v
        if self.decay_input:
            return v + (x - above_rest) * rate
        return v - above_rest * rate + x

    def extra_repr(self) -> str:
        # Fake and meta parameters have no value to print.
        known = type(self.w) is nn.Parameter and not self.w.is_meta
        return f"{super().extra_repr()}, tau={self.tau:g}" if known else super().extra_repr()


class AdaptiveLIFNode(LIFNode):
    """Leaky integrate-and-fire with an adaptive threshold (ALIF): each spike raises it, then it decays.

    `LIFNode` defines the charge. The neuron fires where `h[t] >= B[t]`, the soft reset subtracts `B[t]`, and

        B[t] = v_threshold + beta * b[t-1]
        b[t] = b[t-1] + (s[t] - b[t-1]) / tau_b

    so `b` is the mean firing rate over about `tau_b` steps. `detach_reset` affects only the reset: gradients still flow
    through `b`. Bellec et al. write the decay `1 - 1 / tau_b` as `exp(-dt / tau_a)` and pass `(v - B) / B` to the
    surrogate; this neuron passes `h - B`.

    Args:
        tau: membrane time constant in time steps, above 1. Default: 2.
        tau_b: time constant of the adaptation in time steps, above 1. Default: 20.
        beta: increase of the threshold per unit of `b`, in units of the potential. Default: 1.8.
        decay_input: see `LIFNode`.
        v_threshold: threshold of a neuron without recent spikes. Default: 1.
        v_reset: see `BaseNode`. Default: None, the soft reset, as in the paper.
        surrogate_function: see `BaseNode`.
        detach_reset: see `BaseNode`.

    Shape:
        Input current `[N, *]`, spikes `[N, *]`, states `v: [N, *]` and `b: [N, *]`.

    Raises:
        InputError: see `BaseNode`.

    Example:
        >>> import torch
        >>> neuron = AdaptiveLIFNode(tau_b=2.0, beta=1.0)
        >>> [float(neuron(torch.full((1,), 2.0))) for _ in range(5)]
        [1.0, 0.0, 1.0, 0.0, 1.0]

    Source: Bellec et al. (2018), "Long short-term memory and learning-to-learn in networks of spiking neurons",
    NeurIPS, also for beta = 1.8.
    """

    hyperparameters: ClassVar[dict[str, Check]] = {
        **LIFNode.hyperparameters,
        "tau_b": _number(above=1.0),
        "beta": _number(),
    }

    tau_b: float
    beta: float

    def __init__(
        self,
        tau: float = 2.0,
        tau_b: float = 20.0,
        beta: float = 1.8,
        decay_input: bool = True,
        v_threshold: float = 1.0,
        v_reset: float | None = None,
        surrogate_function: SpikeCallable | None = None,
        detach_reset: bool = False,
    ) -> None:
        super().__init__(tau, decay_input, v_threshold, v_reset, surrogate_function, detach_reset)
        self.tau_b = tau_b
        self.beta = beta
        self.register_memory("b", 0.0)

    def advance(self, x: Tensor, v: Tensor, b: Tensor) -> tuple[Tensor, State]:  # type: ignore[override]
        h = self.charge(v, x)
        threshold = self.v_threshold + self.beta * b
        spike = self.surrogate_function(h - threshold)
        return spike, (self.discharge(h, spike, threshold), b + (spike - b) / self.tau_b)


class CUBALIFNode(BaseNode):
    """Leaky integrate-and-fire with a synaptic current (current-based LIF).

    `c[t] = c_decay * c[t-1] + x[t]`, then `h[t] = v_decay * v[t-1] + c[t]`.

    Args:
        c_decay: decay factor of the current per time step, from 0 to 1. Default: 0.5.
        v_decay: decay factor of the potential per time step, from 0 to 1. Default: 0.75.
        v_threshold: see `BaseNode`. Default: 0.5.
        v_reset: see `BaseNode`; the potential decays to 0 for every `v_reset`.
        surrogate_function: see `BaseNode`. Default: None, a new `snnfx.surrogate.Rectangle()`.
        detach_reset: see `BaseNode`.

    Shape:
        Input current `[N, *]`, spikes `[N, *]`, states `v: [N, *]` and `c: [N, *]`.

    Raises:
        InputError: see `BaseNode`.

    Source: SpikingJelly 2.0.0, `neuron.CUBALIFNode`; Davies et al. (2018), "Loihi: a neuromorphic manycore processor
    with on-chip learning", IEEE Micro 38(1).
    """

    hyperparameters: ClassVar[dict[str, Check]] = {
        **BaseNode.hyperparameters,
        "c_decay": _number(between=(0.0, 1.0)),
        "v_decay": _number(between=(0.0, 1.0)),
    }

    c_decay: float
    v_decay: float

    def __init__(
        self,
        c_decay: float = 0.5,
        v_decay: float = 0.75,
        v_threshold: float = 0.5,
        v_reset: float | None = 0.0,
        surrogate_function: SpikeCallable | None = None,
        detach_reset: bool = False,
    ) -> None:
        spike = Rectangle() if surrogate_function is None else surrogate_function
        super().__init__(v_threshold, v_reset, spike, detach_reset)
        self.c_decay = c_decay
        self.v_decay = v_decay
        self.register_memory("c", 0.0)

    def charge(self, v: Tensor, x: Tensor) -> Tensor:
        """Compute `h[t]` from `v[t-1]` and the synaptic current `c[t]`."""
        return v * self.v_decay + x

    def advance(self, x: Tensor, v: Tensor, c: Tensor) -> tuple[Tensor, State]:  # type: ignore[override]
        c = c * self.c_decay + x
        spike, (v,) = super().advance(c, v)
        return spike, (v, c)


class LeakyIntegrator(ElementwiseNode):
    """Leaky integrator for read-outs: never fires, its output is the membrane potential.

    `v[t] = v[t-1] + (x[t] - v[t-1]) / tau` with `decay_input`, else `v[t] = v[t-1] - v[t-1] / tau + x[t]`.

    Args:
        tau: membrane time constant in time steps, above 1. Default: 2.
        decay_input: True to divide the input by `tau`; False to add the input undivided. Default: True.

    Shape:
        Input current `[N, *]`, potential `[N, *]`, state `v: [N, *]`, the same tensor as the output.

    Raises:
        InputError: SNNFX309, a hyperparameter has an illegal value, at construction or when it is set later.

    Example:
        >>> import torch
        >>> readout = LeakyIntegrator(tau=2.0)
        >>> [float(readout(torch.ones(1))) for _ in range(3)]
        [0.5, 0.75, 0.875]

    Source: SpikingJelly 2.0.0, `neuron.NonSpikingLIFNode`, in single-step mode.
    """

    hyperparameters: ClassVar[dict[str, Check]] = {"tau": _number(above=1.0), "decay_input": _boolean}

    tau: float
    decay_input: bool

    def __init__(self, tau: float = 2.0, decay_input: bool = True) -> None:
        super().__init__()
        self.tau = tau
        self.decay_input = decay_input
        self.register_memory("v", 0.0)

    def advance(self, x: Tensor, v: Tensor) -> tuple[Tensor, State]:  # type: ignore[override]
        v = v + (x - v) / self.tau if self.decay_input else v - v / self.tau + x
        return v, (v,)
