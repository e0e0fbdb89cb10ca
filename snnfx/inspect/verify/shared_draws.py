"""Give a net and its model the same random numbers, step by step.

A net draws the numbers of all time steps of a dropout layer at once, and those of the next layer afterwards; the
stepped model alternates between the layers. Seeding both alike therefore gives them different numbers. Here, each place
that draws in a step (a layer, a distribution, a shape, the number of the draw) has a stream of its own, from which both
sides take the numbers of each step.
"""

from __future__ import annotations

import functools
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import VerificationError
from snnfx.sandbox.torch_internals import FakeTensor, TorchDispatchMode

__all__ = ["SharedDraws"]


def _value_of_draw(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], base: Tensor) -> Any:
    """The result of a random operator, computed from uniform numbers in [0, 1) or from normal numbers."""
    rest = [*args[1:], *(v for k, v in kwargs.items() if k in ("p", "mean", "std", "to", "lambd"))]
    if name in ("bernoulli_", "bernoulli"):
        p = rest[0] if rest else (args[0] if name == "bernoulli" else 0.5)
        return base < p
    if name in ("rand", "rand_like", "randn", "randn_like"):
        return base
    if name == "uniform_":
        low, high = (*rest, *(0.0, 1.0)[len(rest) :])[:2]
        return low + (high - low) * base
    if name == "normal_":
        mean, std = (*rest, *(0.0, 1.0)[len(rest) :])[:2]
        return mean + std * base
    if name == "normal":
        mean, std = args[0], (args[1] if len(args) > 1 else kwargs.get("std", 1.0))
        return mean + std * base
    if name == "exponential_":
        return -torch.log1p(-base) / (rest[0] if rest else 1.0)
    if name == "randperm":
        return base.argsort()
    raise _Unshareable(f"its numbers come from `torch.{name}`, which verify cannot reproduce")


_FAMILIES = {
    "bernoulli_": "bernoulli",
    **dict.fromkeys(("rand_like", "uniform_", "exponential_"), "rand"),
    **dict.fromkeys(("randn_like", "normal_", "normal"), "randn"),
}
"""Operators with the same numbers: `vmap` replaces an operator in place by the one that returns a new tensor."""
_DROPOUT = "native_dropout"


class _Unshareable(Exception):
    """The random numbers of net and model cannot be the same; the argument is the reason."""


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except _Unshareable as error:
        raise VerificationError(
            "SNNFX411",
            "net and model cannot draw the same random numbers",
            why=f"{error}.",
            hint="Verify in evaluation mode, or draw the random numbers outside the model and pass them as input.",
        ) from error


@dataclass
class _Site:
    """A place that draws random numbers, at most once per step."""

    layer: str
    name: str
    shape: tuple[int, ...]
    occurrence: int
    steps: list[int] = field(default_factory=list)
    taken: int = 0

    @property
    def key(self) -> tuple[Any, ...]:
        return self.layer, self.name, self.shape, self.occurrence

    def base(self, t: int) -> Tensor:
        """The numbers of step t."""
        generator = torch.Generator().manual_seed(zlib.crc32(repr(self.key).encode()) * 1000 + t)
        if self.name == "randn":
            return torch.randn(self.shape, generator=generator, dtype=torch.float64)
        # Numbers that float32 represents, so that they are below 1 there as well.
        uniform = torch.rand(self.shape, generator=generator, dtype=torch.float64)
        return (uniform * 2**24).floor() / 2**24

    def steps_in(self, shape: tuple[int, ...]) -> int:
        """The number of steps that a draw of this shape takes from the site; 0 if it does not fit."""
        left = len(self.steps) - self.taken
        if left and shape == self.shape:
            return 1
        if left and shape[1:] == self.shape:
            return shape[0] if shape[0] <= left else 0
        if left and shape[1:] == self.shape[1:] and self.shape and self.shape[0] and shape[0] % self.shape[0] == 0:
            steps = shape[0] // self.shape[0]
            return steps if steps <= left else 0
        return 0


class SharedDraws:
    """The random numbers of a model's steps, for the model and for its net.

    Args:
        model: the model; draws inside a dropout layer of torch.nn belong to that layer.
        steps: the number of time steps T.
        finish_sites: how draws of one step each are assigned where two places draw numbers of the same shape. True: all
            steps of one place first; False: all places of one step first.
        order: the order in which the net takes the draws of places that are alike (same layer, distribution, shape). A
            net may compute the calls of a step in another order; the numbers of such places are interchangeable.
        whole: True for a model that runs over time itself: the draws of a place in one call belong to steps 0, 1, ...
    """

    def __init__(
        self, model: nn.Module, steps: int, finish_sites: bool = True, order: Sequence[int] = (), whole: bool = False
    ) -> None:
        self._layers = {name: m for name, m in model.named_modules() if type(m).__module__ == nn.Dropout.__module__}
        self.T, self._finish_sites, self._order = steps, finish_sites, tuple(order)
        self.whole = whole
        self.is_ambiguous = False
        """Whether a draw of the net fitted several places."""
        self.sites: dict[tuple[Any, ...], _Site] = {}

    @property
    def most_alike(self) -> int:
        """The largest number of places that the numbers of a draw do not tell apart."""
        return max(Counter((s.layer, s.name, s.shape) for s in self.sites.values()).values(), default=0)

    def rank(self, site: _Site) -> int:
        """The position of a place among those like it, in the order in which the net takes their draws."""
        return self._order.index(site.occurrence) if site.occurrence in self._order else site.occurrence

    @contextmanager
    def in_steps(self, model: nn.Module, entry: str) -> Iterator[None]:
        """Let every call of the model's step draw its numbers; the calls belong to steps 0 to T - 1 in turn."""
        function: Callable[..., Any] = getattr(model, entry)
        own, calls = model.__dict__.get(entry), 0
        self.sites.clear()

        @functools.wraps(function)
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            # Entered here, because the reference runs steps in threads of their own.
            with self._layers_followed() as layers, _Draws(_DrawsOfStep(self, (calls - 1) % self.T, layers)):
                return function(*args, **kwargs)

        model.__dict__[entry] = step
        try:
            with _refusing():
                yield
        finally:
            model.__dict__.pop(entry)
            if own is not None:
                model.__dict__[entry] = own

    @contextmanager
    def in_net(self) -> Iterator[None]:
        """Let a run of the net draw the numbers of the model's steps.

        Raises:
            VerificationError: SNNFX411, the draws of the net do not correspond to draws of the model.
        """
        for site in self.sites.values():
            site.taken = 0
        with _refusing():
            with self._layers_followed() as layers, _Draws(_DrawsOfNet(self, layers)):
                yield
            # A net leaves out draws without an effect; the compared values show whether it had one.
            left = next((site for site in self.sites.values() if 0 < site.taken < len(site.steps)), None)
            if left is not None:
                raise _Unshareable(
                    f"the net draws only {left.taken} of {len(left.steps)} times the numbers of {_describe(left)}"
                )

    def description(self) -> str:
        """The places that draw, in words, and those whose draws the net leaves out."""
        drawn = _listed([_describe(site) for site in self.sites.values() if site.taken])
        left_out = _listed([_describe(site) for site in self.sites.values() if not site.taken])
        return (drawn or "none") + (f"; the net leaves out the draws of {left_out}" if left_out else "")

    @contextmanager
    def _layers_followed(self) -> Iterator[list[str]]:
        """Follow which dropout layer is running in this thread: the names of the running layers, innermost last."""
        stack: list[str] = []
        thread = threading.get_ident()  # the reference runs other steps in other threads

        def follow(name: str, layer: nn.Module) -> Iterator[Any]:
            def enter(module: nn.Module, args: Any) -> None:
                if threading.get_ident() == thread:
                    stack.append(name)

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                if threading.get_ident() == thread:
                    stack.pop()

            yield layer.register_forward_pre_hook(enter)
            yield layer.register_forward_hook(leave, always_call=True)

        handles = [handle for name, layer in self._layers.items() for handle in follow(name, layer)]
        try:
            yield stack
        finally:
            for handle in handles:
                handle.remove()


class _DrawsOfStep:
    """Numbers for one step of the model."""

    def __init__(self, draws: SharedDraws, step: int, layers: list[str]) -> None:
        self.draws, self.step, self.layers = draws, step, layers
        self.counts: Counter[tuple[Any, ...]] = Counter()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        place = (self.layers[-1] if self.layers else "", name, shape)
        count, step = self.counts[place], self.step
        if self.draws.whole:
            count, step = 0, count
        site = self.draws.sites.setdefault((*place, count), _Site(*place, count))
        self.counts[place] += 1
        if step not in site.steps:
            site.steps.append(step)
        return site.base(step)


class _DrawsOfNet:
    """Numbers for a run of the net, which draws for one or several steps at once."""

    def __init__(self, draws: SharedDraws, layers: list[str]) -> None:
        self.draws, self.layers = draws, layers
        self.repeated: dict[tuple[Any, ...], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        # Recomputation in the backward pass restores the generator and draws again.
        moment = (bytes(torch.get_rng_state().numpy()), name, shape)
        if moment not in self.repeated:
            self.repeated[moment] = self._next(name, shape)
        return self.repeated[moment]

    def _next(self, name: str, shape: tuple[int, ...]) -> Tensor:
        layer = self.layers[-1] if self.layers else ""
        sites = [s for s in self.draws.sites.values() if s.name == name and s.layer == layer and s.steps_in(shape)]
        if not sites:
            where = f" in `{layer}`" if layer else ""
            raise _Unshareable(f"the net draws numbers of shape {list(shape)} ({name}{where}), which no step draws")
        # The draw of whole sequences is unambiguous; among places that draw step by step, one is chosen.
        draws = self.draws
        sites.sort(
            key=lambda s: (s.steps_in(shape) < len(s.steps), 0 if draws._finish_sites else s.taken, draws.rank(s))
        )
        site = sites[0]
        self.draws.is_ambiguous |= any(s.steps_in(shape) < len(s.steps) for s in sites[1:])
        count = site.steps_in(shape)
        steps = site.steps[site.taken : site.taken + count]
        site.taken += count
        return torch.stack([site.base(t) for t in steps]).reshape(shape)


class _Draws(TorchDispatchMode):
    """Replaces the results of random operators."""

    def __init__(self, source: _DrawsOfStep | _DrawsOfNet) -> None:
        super().__init__()
        self.source = source

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A generator of its own is no source of random numbers that both sides share.
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == _DROPOUT and not args[2]:
            return func(*args, **kwargs)
        leaves = [x for x in args if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) or x.is_meta for x in leaves):
            return func(*args, **kwargs)
        if name == _DROPOUT:
            x, p = args[0], args[1]
            mask = self.source.take(name, tuple(x.shape)).to(x.device) >= p
            func(*args, **kwargs)
            return (x * mask / (1 - p) if p < 1 else torch.zeros_like(x)), mask
        family = _FAMILIES.get(name, name)
        shape = tuple(args[0].shape) if name.endswith("_") else None
        if shape is None:
            state = torch.get_rng_state()
            result = func(*args, **kwargs)
            after = torch.get_rng_state()
            if not isinstance(result, Tensor):
                if all(x.device.type == "cpu" for x in leaves) and torch.equal(state, after):
                    return result  # attention without dropout
                raise _Unshareable(f"its numbers come from `torch.{name}`, which verify cannot reproduce")
            torch.set_rng_state(state)
            base = self.source.take(family, tuple(result.shape))
            torch.set_rng_state(after)
        else:
            base = self.source.take(family, shape)
            result = func(*args, **kwargs)
        base = base.to(result.device)
        value = _value_of_draw(name, args, kwargs, base)
        return result.copy_(value)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more places" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _describe(site: _Site) -> str:
    return f"`{site.layer}`" if site.layer else f"`{site.name}` of shape {list(site.shape)}"
