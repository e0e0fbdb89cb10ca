"""What one call of an emitted graph allocates, from shapes alone: it is run on meta tensors, which have no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from snnfx.memory.entering import enter

__all__ = ["CallBytes", "Meter", "Part", "Shape", "dtype_name", "measure_call", "meta_like"]


@dataclass(frozen=True)
class Part:
    """Bytes of one tensor, or of the workspace of an operation (then without a shape): who made it, what it is."""

    what: str
    shape: tuple[int, ...]
    bytes: float
    dtype: str = ""


def dtype_name(dtype: torch.dtype) -> str:
    """For people, e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


class Named(Protocol):
    """What says who makes a tensor, see `snnfx.memory.naming`."""

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
    if isinstance(packet, torch._ops.OpOverloadPacket) and "default" in packet.overloads()
}


class Meter(TorchDispatchMode):
    """Bytes alive of the storages that are made under it; `workspace` adds what an operation takes while it runs.

    Views of what is `given` are not counted. With `naming`, it notes who made what.
    """

    def __init__(
        self,
        workspace: Callable[[Any, Sequence[Any], Any], int],
        given: Sequence[Any],
        naming: Named | None = None,
    ) -> None:
        super().__init__()
        self.naming = naming
        self.parts: dict[int, Part] = {}
        self.at_peak: tuple[Part, ...] = ()
        self.given: set[int] = set()
        for value in given:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.given.add(storage._cdata)
                weakref.finalize(storage, self.given.discard, storage._cdata)
        self.workspace = workspace
        self.alive: dict[int, int] = {}
        self.set_aside: dict[int, int] = {}
        self.live = self.peak = self.peak_without_set_aside = 0
        self.written = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        result = rule(args) if rule is not None else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._see(value)
        count = None if torch.is_grad_enabled() else _FLOPS.get(func)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        extra = self.workspace(func, args, result)
        now = self.live + extra
        if self.naming is not None and now > self.peak:
            taken = (Part(f"workspace of {self.naming.current}", (), extra),) if extra else ()
            self.at_peak = (*self.parts.values(), *taken)
        self.peak = max(self.peak, now)
        self.peak_without_set_aside = max(self.peak_without_set_aside, now - sum(self.set_aside.values()))
        return result

    def _see(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.alive and key not in self.given:
            self.alive[key] = storage.nbytes()
            self.live += self.alive[key]
            self.written += self.alive[key]
            if self.naming is not None:
                self.parts[key] = Part(
                    self.naming.current, tuple(value.shape), self.alive[key], dtype_name(value.dtype)
                )
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self.alive.pop(key, 0)
        self.set_aside.pop(key, None)
        self.parts.pop(key, None)

    def put_aside(self, value: Tensor) -> None:
        """Count this storage as one that the caller would hold."""
        key = value.untyped_storage()._cdata
        self.set_aside[key] = self.alive.get(key, 0)


@dataclass
class CallBytes:
    """Bytes of one call, besides its inputs.

    Args:
        outputs: of each output, 0 for one that shares the memory of an input.
        aliases: for each output, the number of the input whose memory it is, -1 for its own.
        peak: at the widest point of the call without a history, outputs included.
        peak_with_history: the same while a history is kept.
        saved: what the history holds besides inputs and outputs.
        saved_inputs, saved_outputs: the numbers of those that it holds.
        backward: at the widest point of backward, gradients of the outputs and inputs included, without `saved`.
        backward_held: the same if somebody holds the gradients of the outputs until the end.
        grads: what is left afterwards: gradients of the inputs.
        of_parameters: the same, of the parameters.
        written: bytes that the forward pass writes.
        operations: floating-point operations of its products and convolutions.
        parts, parts_with_history: what is alive at `peak` and at `peak_with_history`, if that was noted.
        saved_parts: the same of what is `saved`.
    """

    outputs: list[int]
    aliases: list[int]
    peak: int = 0
    peak_with_history: int = 0
    saved: int = 0
    saved_inputs: tuple[int, ...] = ()
    saved_outputs: tuple[int, ...] = ()
    backward: int = 0
    backward_held: int = 0
    grads: int = 0
    of_parameters: int = 0
    written: int = 0
    operations: int = 0
    parts: tuple[Part, ...] = ()
    parts_with_history: tuple[Part, ...] = ()
    saved_parts: tuple[Part, ...] = ()


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
    workspace: Callable[[Any, Sequence[Any], Any], int],
    naming: Named | None = None,
) -> CallBytes:
    """Measure a call.

    Args:
        run: from its arguments, flat, to its result.
        leaves: meta tensors (with `requires_grad` as at the call) and other arguments.
        parameters: meta parameters and buffers that it may read.
        training: whether a history is kept.
        workspace, naming: see `Meter`.
    """
    given = [meta_like(x) if isinstance(x, Tensor) else x for x in leaves]
    with torch.no_grad(), Meter(workspace, [*given, *parameters], naming) as meter:
        outputs = [y for y in pytree.tree_leaves(run(given)) if isinstance(y, Tensor)]
        own = {x.untyped_storage()._cdata: i for i, x in enumerate(given) if isinstance(x, Tensor)}
        aliases = [own.get(y.untyped_storage()._cdata, -1) for y in outputs]
        sizes = [y.untyped_storage().nbytes() if a < 0 else 0 for y, a in zip(outputs, aliases, strict=True)]
        found = CallBytes(sizes, aliases, peak=meter.peak, written=meter.written, operations=meter.operations)
        found.parts = meter.at_peak
    del outputs, given
    if training:
        _measure_history(found, run, leaves, parameters, workspace, naming)
    return found


def _measure_history(
    found: CallBytes,
    run: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
    parameters: Sequence[Tensor],
    workspace: Callable[[Any, Sequence[Any], Any], int],
    naming: Named | None,
) -> None:
    tokens: list[Tensor] = []
    given: list[Any] = []
    for x in leaves:
        value = meta_like(x) if isinstance(x, Tensor) else x
        if isinstance(x, Tensor) and x.requires_grad:
            token, value = enter(value)
            tokens.append(token)
        given.append(value)
    inputs = {i: weakref.ref(x.untyped_storage()) for i, x in enumerate(given) if isinstance(x, Tensor)}
    with torch.enable_grad(), Meter(workspace, [*given, *tokens, *parameters], naming) as meter:
        outputs = [y for y in pytree.tree_leaves(run(given)) if isinstance(y, Tensor)]
        del given
        found.peak_with_history, found.parts_with_history = meter.peak, meter.at_peak
        ends = {i: weakref.ref(y.untyped_storage()) for i, y in enumerate(outputs)}
        roots = [y for y in outputs if y.requires_grad]
        root = _Seed.apply(meter, *roots) if roots else None
        edge = get_gradient_edge(root) if root is not None else None
        value = None
        del outputs, roots, root, value, x
        found.saved_inputs = tuple(i for i, ref in inputs.items() if ref() is not None)
        found.saved_outputs = tuple(i for i, ref in ends.items() if ref() is not None and found.aliases[i] < 0)
        held = sum(found.outputs[i] for i in found.saved_outputs)
        found.saved = meter.live - held
        kept = {ref()._cdata for ref in ends.values() if ref() is not None}  # type: ignore[union-attr]
        found.saved_parts = tuple(part for key, part in meter.parts.items() if key not in kept)
        if edge is None or not (tokens or parameters):
            return
        before = meter.peak = meter.peak_without_set_aside = meter.live
        wanted = [*tokens, *(p for p in parameters if p.requires_grad)]
        grads = torch.autograd.grad([edge], wanted, [torch.empty((), device="meta")], allow_unused=True)
        seeds = sum(found.outputs)
        found.backward = max(0, meter.peak - before)
        found.backward_held = max(0, meter.peak_without_set_aside - before) + seeds
        found.grads = sum(g.untyped_storage().nbytes() for g in grads[: len(tokens)] if g is not None)
        found.of_parameters = sum(g.untyped_storage().nbytes() for g in grads[len(tokens) :] if g is not None)


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
