"""Measure the memory of one call of an emitted graph by running it on meta tensors, which have no data."""

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
from snnfx.sandbox.tensor_values import meta_like
from snnfx.sandbox.torch_internals import OpOverloadPacket, TorchDispatchMode, pytree

__all__ = ["ZERO", "CallBytes", "Count", "Meter", "NamedBytes", "Shape", "dtype_name", "measure_call"]


@dataclass(frozen=True)
class NamedBytes:
    """A tensor, or the workspace of an operation (shape `()`), with its name and size."""

    what: str
    shape: tuple[int, ...]
    bytes: float
    dtype: str = ""


def dtype_name(dtype: torch.dtype) -> str:
    """Format a dtype, e.g. "float32"."""
    return str(dtype).removeprefix("torch.")


class Named(Protocol):
    """Provides the name of the tensors made now, see `snnfx.memory.tensor_names`."""

    current: str


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _sum(args: Sequence[Any]) -> Tensor | None:
    """Fast path for element-wise operations on two tensors of one shape: torch infers their shape in Python."""
    x, y = args[0], args[1]
    plain = isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype
    if not plain or x.shape != y.shape or x.stride() != y.stride() or 0 in x.stride():
        return None
    return _like(x)


def _normalized(args: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Fast path for batch normalisation: torch runs dozens of small operations to infer its shapes."""
    x = args[0]
    count = x.shape[1] if x.dim() > 1 else 0
    return _like(x), x.new_empty(count), x.new_empty(count)


def _normalized_backward(args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    x, mask = args[1], args[-1]
    count = x.shape[1]
    grads = (_like(x), x.new_empty(count), x.new_empty(count))
    return tuple(g if needed else None for g, needed in zip(grads, mask, strict=True))


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
    """A number of bytes in two parts: independent of the number of time steps, and growing with it."""

    constant: int = 0
    over_time: int = 0

    @property
    def total(self) -> int:
        """The sum of both parts, for the number of steps of the run."""
        return self.constant + self.over_time

    def __add__(self, other: Count) -> Count:
        return Count(self.constant + other.constant, self.over_time + other.over_time)

    def __sub__(self, other: Count) -> Count:
        return Count(self.constant - other.constant, self.over_time - other.over_time)


ZERO = Count()


def total_of(counts: Iterable[Count]) -> Count:
    """The sum of counts."""
    terms = list(counts)
    return Count(sum(c.constant for c in terms), sum(c.over_time for c in terms))


class Meter(TorchDispatchMode):
    """Tracks the bytes of the storages that are allocated within a block, and their peak.

    Args:
        workspace: the workspace of an operation, as block sizes.
        inputs: views of these tensors do not count.
        naming: records the names of tensors; None: no names.
        marker: the number of steps, a prime that divides no other size: sizes that it divides grow with the steps.
            None: all counts are constant.
    """

    def __init__(
        self,
        workspace: Callable[[Any, Sequence[Any], Any], Sequence[int]],
        inputs: Sequence[Any],
        naming: Named | None = None,
        marker: int | None = None,
    ) -> None:
        super().__init__()
        self.naming, self.marker = naming, marker
        self.parts: dict[int, NamedBytes] = {}
        self.at_peak: tuple[NamedBytes, ...] = ()
        self.inputs: set[int] = set()
        for value in inputs:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.inputs.add(storage._cdata)
                weakref.finalize(storage, self.inputs.discard, storage._cdata)
        self.workspace = workspace
        self.alive: dict[int, Count] = {}
        self.excluded: dict[int, Count] = {}
        self.live = self.peak = self.peak_without_excluded = self.written = ZERO
        self.operations = 0

    def count(self, number: int) -> Count:
        """The size of one tensor as a `Count`."""
        return Count(0, number) if self.marker is not None and number % self.marker == 0 else Count(number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func)
        result = rule(args) if rule is not None else None
        if result is None:
            result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._track(value)
        count = _FLOPS.get(func)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        now = self.live
        for extra in self.workspace(func, args, result):
            now += self.count(extra)
        if self.naming is not None and now.total > self.peak.total:
            more = now.total - self.live.total
            workspace = (NamedBytes(f"workspace of {self.naming.current}", (), more),) if more else ()
            self.at_peak = (*self.parts.values(), *workspace)
        self.peak = _larger(self.peak, now)
        if self.excluded:
            now -= total_of(self.excluded.values())
        self.peak_without_excluded = _larger(self.peak_without_excluded, now)
        return result

    def _track(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in self.alive and key not in self.inputs:
            size = self.alive[key] = self.count(storage.nbytes())
            self.live += size
            self.written += size
            if self.naming is not None:
                self.parts[key] = NamedBytes(
                    self.naming.current, tuple(value.shape), size.total, dtype_name(value.dtype)
                )
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self.alive.pop(key, ZERO)
        self.excluded.pop(key, None)
        self.parts.pop(key, None)

    def exclude(self, value: Tensor) -> None:
        """Exclude a storage from `peak_without_excluded`: in a real run it belongs to the caller."""
        key = value.untyped_storage()._cdata
        self.excluded[key] = self.alive.get(key, ZERO)


def _larger(a: Count, b: Count) -> Count:
    return a if a.total >= b.total else b


@dataclass
class CallBytes:
    """The memory of one call, without its inputs.

    Args:
        outputs: bytes of each output, zero if the output shares the memory of an input.
        aliases: for each output, the index of the input whose memory it shares, or -1.
        peak: the peak of the forward pass without autograd, outputs included. In training it is measured only with
            names; otherwise it equals `peak_with_history`, a lower bound on the need of the backward pass.
        peak_with_history: the peak of the forward pass with autograd.
        saved: bytes saved for backward, without inputs and outputs.
        saved_inputs, saved_outputs: the indices of the inputs and outputs that are saved for backward.
        backward: the peak of the backward pass, gradients of outputs and inputs included, without `saved`.
        backward_held: the same if the caller keeps the gradients of the outputs until the end.
        grads: bytes of the gradients of the inputs.
        of_parameters: bytes of the gradients of the parameters.
        written: bytes that the forward pass writes.
        operations: floating-point operations of the matrix products and convolutions in forward.
        parts, parts_with_history: the tensors at `peak` and at `peak_with_history`, with names.
        saved_parts: the tensors in `saved`, with names.
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
    """Shape, strides and dtype of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> Shape:
        return Shape(x.shape, x.stride(), x.dtype)

    def tensor(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


def measure_call(
    run: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
    parameters: Sequence[Tensor],
    training: bool,
    workspace: Callable[[Any, Sequence[Any], Any], Sequence[int]],
    naming: Named | None = None,
    marker: int | None = None,
) -> CallBytes:
    """Measure the memory of a call.

    Args:
        run: takes the flat arguments, returns the result.
        leaves: the flat arguments: meta tensors (with the `requires_grad` of the real run) and other values.
        parameters: meta parameters and buffers that the call may read.
        training: whether to run with autograd, and backward.
        workspace, naming, marker: see `Meter`.
    """

    def meter_for(inputs: Sequence[Any]) -> Meter:
        return Meter(workspace, [*inputs, *parameters], naming, marker)

    if training:
        result = _measure_with_autograd(run, leaves, parameters, meter_for)
        if naming is None:
            return result
    inputs = [meta_like(x) if isinstance(x, Tensor) else x for x in leaves]
    with torch.no_grad(), meter_for(inputs) as meter:
        outputs = [y for y in pytree.tree_leaves(run(inputs)) if isinstance(y, Tensor)]
        if not training:
            result = _bytes_of_outputs(inputs, outputs, meter)
        result.peak, result.parts = meter.peak, meter.at_peak
    return result


def _bytes_of_outputs(inputs: Sequence[Any], outputs: Sequence[Tensor], meter: Meter) -> CallBytes:
    index_of = {x.untyped_storage()._cdata: i for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    aliases = [index_of.get(y.untyped_storage()._cdata, -1) for y in outputs]
    sizes = [meter.count(_bytes(y)) if a < 0 else ZERO for y, a in zip(outputs, aliases, strict=True)]
    operations = Count(0, meter.operations) if meter.marker is not None else Count(meter.operations)
    return CallBytes(sizes, aliases, written=meter.written, operations=operations)


def _bytes(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


def _measure_with_autograd(
    run: Callable[[Sequence[Any]], Any],
    leaves: Sequence[Any],
    parameters: Sequence[Tensor],
    meter_for: Callable[[Sequence[Any]], Meter],
) -> CallBytes:
    tokens: list[Tensor] = []
    inputs: list[Any] = []
    for x in leaves:
        value = meta_like(x) if isinstance(x, Tensor) else x
        if isinstance(x, Tensor) and x.requires_grad:
            token, value = attach_to_graph(value)
            tokens.append(token)
        inputs.append(value)
    input_storages = {i: weakref.ref(x.untyped_storage()) for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    with torch.enable_grad(), meter_for([*inputs, *tokens]) as meter:
        outputs = [y for y in pytree.tree_leaves(run(inputs)) if isinstance(y, Tensor)]
        result = _bytes_of_outputs(inputs, outputs, meter)
        del inputs
        result.peak = result.peak_with_history = meter.peak
        result.parts_with_history = meter.at_peak
        output_storages = {i: weakref.ref(y.untyped_storage()) for i, y in enumerate(outputs)}
        roots = [y for y in outputs if y.requires_grad]
        root = _Seed.apply(meter, *roots) if roots else None
        edge = get_gradient_edge(root) if root is not None else None
        value = None
        del outputs, roots, root, value, x
        result.saved_inputs = tuple(i for i, ref in input_storages.items() if ref() is not None)
        result.saved_outputs = tuple(
            i for i, ref in output_storages.items() if ref() is not None and result.aliases[i] < 0
        )
        result.saved = meter.live - total_of(result.outputs[i] for i in result.saved_outputs)
        storages = {ref()._cdata for ref in output_storages.values() if ref() is not None}  # type: ignore[union-attr]
        result.saved_parts = tuple(part for key, part in meter.parts.items() if key not in storages)
        if edge is None or not (tokens or parameters):
            return result
        before = meter.peak = meter.peak_without_excluded = meter.live
        leaves_of_graph = [*tokens, *(p for p in parameters if p.requires_grad)]
        grads = torch.autograd.grad([edge], leaves_of_graph, [torch.empty((), device="meta")], allow_unused=True)
        result.backward = meter.peak - before
        result.backward_held = meter.peak_without_excluded - before + total_of(result.outputs)
        sizes = [ZERO if g is None else meter.count(_bytes(g)) for g in grads]
        result.grads, result.of_parameters = total_of(sizes[: len(tokens)]), total_of(sizes[len(tokens) :])
    return result


class _Seed(torch.autograd.Function):
    """A scalar whose backward creates the gradients of the outputs, so that the engine frees each after its use."""

    @staticmethod
    def forward(ctx: Any, meter: Meter, *outputs: Tensor) -> Tensor:
        ctx.meter = meter
        ctx.shapes = [(y.shape, y.dtype) for y in outputs]
        return torch.empty((), device="meta")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grads = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in ctx.shapes]
        for g in grads:
            ctx.meter.exclude(g)
        return None, *grads
