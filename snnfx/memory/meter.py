"""What one call of an emitted graph allocates, from shapes alone: it is run on meta tensors, which have no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.flop_counter import flop_registry

from snnfx.recompute.attach_to_graph import attach_to_graph
from snnfx.sandbox.torch_internals import OpOverloadPacket, TorchDispatchMode, pytree

__all__ = ["ZERO", "CallBytes", "Count", "Meter", "NamedBytes", "Shape", "dtype_name", "measure_call", "meta_like"]


@dataclass(frozen=True)
class NamedBytes:
    """Bytes of one tensor, or of the workspace of an operation (then without a shape): who made it, what it is."""

    what: str
    shape: tuple[int, ...]
    bytes: float
    dtype: str = ""


def dtype_name(dtype: torch.dtype) -> str:
    """For people, e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


class Named(Protocol):
    """What says who makes a tensor, see `snnfx.memory.tensor_names`."""

    current: str


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _sum(args: Sequence[Any]) -> Tensor | None:
    """Elementwise operations on two tensors of one shape: without this, their shape is worked out in Python."""
    x, y = args[0], args[1]
    plain = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype
    if not plain or x.shape != y.shape or x.stride() != y.stride() or 0 in x.stride():
        return None
    return _like(x)


def _normalized(args: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Results of batch normalization: without this, torch runs dozens of small operations to find their shapes."""
    x = args[0]
    count = x.shape[1] if x.dim() > 1 else 0
    return _like(x), x.new_empty(count), x.new_empty(count)


def _normalized_backward(args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    x, wanted = args[1], args[-1]
    count = x.shape[1]
    made = (_like(x), x.new_empty(count), x.new_empty(count))
    return tuple(y if want else None for y, want in zip(made, wanted, strict=True))


_RULES: dict[Any, Callable[[Sequence[Any]], Any]] = {
    torch.ops.aten.add.Tensor: _sum,
    torch.ops.aten.mul.Tensor: _sum,
    torch.ops.aten.native_batch_norm.default: _normalized,
    torch.ops.aten.native_batch_norm_backward.default: _normalized_backward,
}


_FLOPS = {
    packet.default: count
    for packet, count in flop_registry.items()
    if isinstance(packet, OpOverloadPacket) and "default" in packet.overloads()
}


@dataclass(frozen=True, slots=True)
class Count:
    """A number of bytes: those of tensors that do not depend on the number of steps, and those that grow with it."""

    constant: int = 0
    over_time: int = 0

    @property
    def total(self) -> int:
        """All of them, for the steps that were run."""
        return self.constant + self.over_time

    def __add__(self, other: Count) -> Count:
        return Count(self.constant + other.constant, self.over_time + other.over_time)

    def __sub__(self, other: Count) -> Count:
        return Count(self.constant - other.constant, self.over_time - other.over_time)


ZERO = Count()


def total_of(counts: Iterable[Count]) -> Count:
    """Their sum."""
    found = list(counts)
    return Count(sum(c.constant for c in found), sum(c.over_time for c in found))


class Meter(TorchDispatchMode):
    """Bytes alive of the storages that are made under it.

    Args:
        workspace: what an operation takes while it runs, in pieces.
        given: views of these are not counted.
        naming: if given, it is noted who made what.
        marker: the number of steps, a prime that divides no other size: what it divides grows with the steps. None: all
            counts are constant.
    """

    def __init__(
        self,
        workspace: Callable[[Any, Sequence[Any], Any], Sequence[int]],
        given: Sequence[Any],
        naming: Named | None = None,
        marker: int | None = None,
    ) -> None:
        super().__init__()
        self.naming, self.marker = naming, marker
        self.parts: dict[int, NamedBytes] = {}
        self.at_peak: tuple[NamedBytes, ...] = ()
        self.given: set[int] = set()
        for value in given:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.given.add(storage._cdata)
                weakref.finalize(storage, self.given.discard, storage._cdata)
        self.workspace = workspace
        self.alive: dict[int, Count] = {}
        self.set_aside: dict[int, Count] = {}
        self.live = self.peak = self.peak_without_set_aside = self.written = ZERO
        self.operations = 0

    def count(self, number: int) -> Count:
        """A number of bytes of one tensor."""
        return Count(0, number) if self.marker is not None and number % self.marker == 0 else Count(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        result = rule(args) if rule is not None else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._see(value)
        count = _FLOPS.get(func)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        now = self.live
        for extra in self.workspace(func, args, result):
            now += self.count(extra)
        if self.naming is not None and now.total > self.peak.total:
            more = now.total - self.live.total
            taken = (NamedBytes(f"workspace of {self.naming.current}", (), more),) if more else ()
            self.at_peak = (*self.parts.values(), *taken)
        self.peak = _larger(self.peak, now)
        if self.set_aside:
            now -= total_of(self.set_aside.values())
        self.peak_without_set_aside = _larger(self.peak_without_set_aside, now)
        return result

    def _see(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.alive and key not in self.given:
            made = self.alive[key] = self.count(storage.nbytes())
            self.live += made
            self.written += made
            if self.naming is not None:
                self.parts[key] = NamedBytes(
                    self.naming.current, tuple(value.shape), made.total, dtype_name(value.dtype)
                )
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.alive.pop(key, ZERO)
        self.set_aside.pop(key, None)
        self.parts.pop(key, None)

    def put_aside(self, value: Tensor) -> None:
        """Count this storage as one that the caller would hold."""
        key = value.untyped_storage()._cdata
        self.set_aside[key] = self.alive.get(key, ZERO)


def _larger(a: Count, b: Count) -> Count:
    return a if a.total >= b.total else b


@dataclass
class CallBytes:
    """Bytes of one call, besides its inputs.

    Args:
        outputs: of each output, none for one that shares the memory of an input.
        aliases: for each output, the number of the input whose memory it is, -1 for its own.
        peak: at the widest point of the call without a history, outputs included. In training it is measured only if
            names are asked for; else it is `peak_with_history`, the least that backward takes anyway.
        peak_with_history: the same while a history is kept.
        saved: what the history holds besides inputs and outputs.
        saved_inputs, saved_outputs: the numbers of those that it holds.
        backward: at the widest point of backward, gradients of the outputs and inputs included, without `saved`.
        backward_held: the same if somebody holds the gradients of the outputs until the end.
        grads: what is left afterwards: gradients of the inputs.
        of_parameters: the same, of the parameters.
        written: bytes that the forward pass writes.
        operations: in forward, floating-point operations of its products and convolutions.
        parts, parts_with_history: what is alive at `peak` and at `peak_with_history`, if that was noted.
        saved_parts: the same of what is `saved`.
    """

    outputs: list[Count]
    aliases: list[int]
    peak: Count = ZERO
    peak_with_history: Count = ZERO
    saved: Count = ZERO
    saved_inputs: tuple[int, ...] = ()
    saved_outputs: tuple[int, ...] = ()
    backward: Count = ZERO
    backward_held: Count = ZERO
    grads: Count = ZERO
    of_parameters: Count = ZERO
    written: Count = ZERO
    operations: Count = ZERO
    parts: tuple[NamedBytes, ...] = ()
    parts_with_history: tuple[NamedBytes, ...] = ()
    saved_parts: tuple[NamedBytes, ...] = ()


@dataclass(frozen=True)
class Shape:
    """What `meta_like` needs of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> Shape:
        return Shape(x.shape, x.stride(), x.dtype)

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def meta_like(x: Tensor) -> Tensor:
    """A tensor of this shape, strides and dtype without data."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def measure_call(
    run: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
    parameters: Sequence[Tensor],
    training: bool,
    workspace: Callable[[Any, Sequence[Any], Any], Sequence[int]],
    naming: Named | None = None,
    marker: int | None = None,
) -> CallBytes:
    """Measure a call.

    Args:
        run: from its arguments, flat, to its result.
        leaves: meta tensors (with `requires_grad` as at the call) and other arguments.
        parameters: meta parameters and buffers that it may read.
        training: whether a history is kept.
        workspace, naming, marker: see `Meter`.
    """

    def meter_for(given: Sequence[Any]) -> Meter:
        return Meter(workspace, [*given, *parameters], naming, marker)

    if training:
        found = _measure_history(run, leaves, parameters, meter_for)
        if naming is None:
            return found
    given = [meta_like(x) if isinstance(x, Tensor) else x for x in leaves]
    with torch.no_grad(), meter_for(given) as meter:
        outputs = [y for y in pytree.tree_leaves(run(given)) if isinstance(y, Tensor)]
        if not training:
            found = _bytes_of_outputs(given, outputs, meter)
        found.peak, found.parts = meter.peak, meter.at_peak
    return found


def _bytes_of_outputs(given: Sequence[Any], outputs: Sequence[Tensor], meter: Meter) -> CallBytes:
    own = {x.untyped_storage()._cdata: i for i, x in enumerate(given) if isinstance(x, Tensor)}
    aliases = [own.get(y.untyped_storage()._cdata, -1) for y in outputs]
    sizes = [meter.count(_bytes(y)) if a < 0 else ZERO for y, a in zip(outputs, aliases, strict=True)]
    operations = Count(0, meter.operations) if meter.marker is not None else Count(meter.operations)
    return CallBytes(sizes, aliases, written=meter.written, operations=operations)


def _bytes(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


def _measure_history(
    run: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
    parameters: Sequence[Tensor],
    meter_for: Callable[[Sequence[Any]], Meter],
) -> CallBytes:
    tokens: list[Tensor] = []
    given: list[Any] = []
    for x in leaves:
        value = meta_like(x) if isinstance(x, Tensor) else x
        if isinstance(x, Tensor) and x.requires_grad:
            token, value = attach_to_graph(value)
            tokens.append(token)
        given.append(value)
    inputs = {i: weakref.ref(x.untyped_storage()) for i, x in enumerate(given) if isinstance(x, Tensor)}
    with torch.enable_grad(), meter_for([*given, *tokens]) as meter:
        outputs = [y for y in pytree.tree_leaves(run(given)) if isinstance(y, Tensor)]
        found = _bytes_of_outputs(given, outputs, meter)
        del given
        found.peak = found.peak_with_history = meter.peak
        found.parts_with_history = meter.at_peak
        ends = {i: weakref.ref(y.untyped_storage()) for i, y in enumerate(outputs)}
        roots = [y for y in outputs if y.requires_grad]
        root = _Seed.apply(meter, *roots) if roots else None
        edge = get_gradient_edge(root) if root is not None else None
        value = None
        del outputs, roots, root, value, x
        found.saved_inputs = tuple(i for i, ref in inputs.items() if ref() is not None)
        found.saved_outputs = tuple(i for i, ref in ends.items() if ref() is not None and found.aliases[i] < 0)
        found.saved = meter.live - total_of(found.outputs[i] for i in found.saved_outputs)
        kept = {ref()._cdata for ref in ends.values() if ref() is not None}  # type: ignore[union-attr]
        found.saved_parts = tuple(part for key, part in meter.parts.items() if key not in kept)
        if edge is None or not (tokens or parameters):
            return found
        before = meter.peak = meter.peak_without_set_aside = meter.live
        wanted = [*tokens, *(p for p in parameters if p.requires_grad)]
        grads = torch.autograd.grad([edge], wanted, [torch.empty((), device="meta")], allow_unused=True)
        found.backward = meter.peak - before
        found.backward_held = meter.peak_without_set_aside - before + total_of(found.outputs)
        sizes = [ZERO if g is None else meter.count(_bytes(g)) for g in grads]
        found.grads, found.of_parameters = total_of(sizes[: len(tokens)]), total_of(sizes[len(tokens) :])
    return found


class _Seed(torch.autograd.Function):
    """A number whose backward makes the gradients of the outputs, so that the engine lets go of each after its use."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, *outputs: Tensor) -> Tensor:
        ctx.meter = meter
        ctx.shapes = [(y.shape, y.dtype) for y in outputs]
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.shapes]
        for g in grads:
            ctx.meter.put_aside(g)
        return None, *grads
