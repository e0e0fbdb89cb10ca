"""`SpikeReader`: a layer that reads spikes as bits, behind max-poolings and a flattening.

A bound graph (`snnfx.emit.bound_graph`) lets a neuron's kernel write bits instead of numbers while all its readers run
by events. A reader that has to run densely returns None; the caller then gives it numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.lowering.choices.linear_layers import linear
from snnfx.lowering.choices.permission import pinned_by
from snnfx.lowering.events.event_kernel import ProductOfBits, Refusal, product
from snnfx.lowering.events.few_rows import FewRowsOfBits, has_few_rows, product_of_few_rows
from snnfx.lowering.events.geometry import Geometry
from snnfx.lowering.events.layer_decisions import (
    LAYERS,
    LEAST_WORK,
    crossover_of,
    decision_of,
    geometry_of_layer,
    has_kernel,
    is_plain_call,
    is_supported,
    latest_decision,
    positions_of,
)
from snnfx.lowering.events.packed_weights import packed_weight, state_of
from snnfx.lowering.events.spike_bits import Flattening, MaxPooling, Operation, SpikeBits
from snnfx.lowering.window_settings import integers

__all__ = ["SpikeReader"]


class SpikeReader:
    """Calls a layer on spikes `[T, N, *]` that are given as bits, in inference.

    Its caller checks that the layer has no hooks, and that nothing intercepts the operations of this thread.

    Args:
        layer: the layer.
        pools: poolings in front of it, `nn.MaxPool2d`.
        flattens: whether all dimensions but the batch are flattened behind the poolings.
    """

    def __init__(self, layer: nn.Module, pools: Sequence[nn.Module], flattens: bool) -> None:
        self.layer, self.pools, self.flattens = layer, tuple(pools), flattens
        self.runs_by_events = False
        self.is_idle = False
        """Whether the layer always runs densely: its calls are too small, or the bits have no form that it reads."""
        self._reading: _Reading | None = None

    def observe(self) -> None:
        """Note how the latest call of the layer on numbers ran."""
        if not self.is_idle:
            decision = latest_decision(self.layer.weight)  # type: ignore[arg-type]
            self.runs_by_events = decision is not None and decision.by_events
            self.is_idle = decision is None

    def __call__(self, spikes: SpikeBits) -> Tensor | None:
        """`[T * N, *]`, the output of the layer; None if it has to run densely."""
        y = self._product(spikes)
        self.runs_by_events = y is not None and not self.is_idle
        return y

    def _product(self, spikes: SpikeBits) -> Tensor | None:
        if torch.is_grad_enabled():
            return None
        state, weight = self._state(spikes), self.layer.weight
        for _ in range(2):
            reading = self._reading
            if reading is None or reading.state != state or reading.weight is not weight:
                reading = self._reading = self._bind(spikes, state)
            if reading is None:
                return None
            refusal, y = reading(spikes.words, self.layer.bias)  # type: ignore[arg-type]
            if refusal != Refusal.WEIGHT:
                return y
            self._reading = None  # the content of the weight changed, but not its version; or it is not finite
        return None

    def _state(self, spikes: SpikeBits) -> tuple[object, ...]:
        """What a reading depends on, except for the bits, the identity and the content of the weight."""
        layer = self.layer
        settings, bias = vars(layer), layer.bias
        return (
            spikes.shape,
            spikes.order,
            spikes.dtype,
            [settings.get(name) for name in _SETTINGS],
            [[vars(pool).get(name) for name in _POOL_SETTINGS] for pool in self.pools],
            state_of(layer.weight),  # type: ignore[arg-type]
            None if bias is None else (type(bias), bias.shape, bias.dtype, bias.device),
            torch.get_num_threads(),
            pinned_by(),
        )

    def _bind(self, spikes: SpikeBits, state: tuple[object, ...]) -> _Reading | None:
        """A reading of spikes of this form; None if the layer has to run densely."""
        layer: Any = self.layer
        if type(layer) not in LAYERS or not is_plain_call(layer):
            return None
        weight, bias = layer.weight, layer.bias
        geometry, operations = geometry_of_layer(layer, weight), []
        for make in self._operations():
            operation = make(spikes)
            if operation is None:
                break
            operations.append(operation)
            spikes = operation(spikes)
        is_read = len(operations) == len(self.pools) + self.flattens
        if geometry is None or not is_read or not _fits(spikes, geometry):
            self.is_idle = True
            return None
        shape = (spikes.shape[0] * spikes.shape[1], *spikes.shape[2:])
        positions = positions_of(shape, geometry)
        work = positions * weight.numel()
        if work < LEAST_WORK:  # another call with the weight was larger
            self.is_idle = True
            return None
        if not is_supported(shape, spikes.dtype, weight, bias, geometry):
            return None
        if not has_kernel(spikes.dtype.itemsize):
            return None
        packed_bias = None if bias is None else bias.detach().contiguous()
        in_place = geometry.dims == 0 and has_few_rows(positions, weight)
        limit = self._crossover(shape, spikes.dtype, weight, packed_bias, geometry, work, in_place)
        if in_place:
            return _Reading(state, weight, operations, FewRowsOfBits(spikes.shape, weight), limit)
        packed = packed_weight(weight, geometry.groups)
        if not packed.is_finite:
            decision_of(weight).update(False, 0.0, limit, False)
            return None
        compute = ProductOfBits(spikes, geometry, weight, packed.tiles, packed.content)
        return _Reading(state, weight, operations, compute, limit)

    def _operations(self) -> Iterator[Callable[[SpikeBits], Operation | None]]:
        """Constructors of the operations in front of the layer, from spikes that these take."""
        for pool in self.pools:
            yield partial(_max_pooling, pool)
        if self.flattens:
            yield _flattening

    def _dense(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        return linear(x, layer.weight, layer.bias) if type(layer) is nn.Linear else layer.forward(x)

    def _crossover(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        work: int,
        in_place: bool,
    ) -> float:
        """The crossover; bits and numbers share one."""
        x = torch.empty(shape, dtype=dtype, device="cpu")
        if geometry.dims:
            x = x.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

        def events(x: Tensor) -> Tensor | None:
            if in_place:
                return product_of_few_rows(x, weight, bias)
            return product(x, geometry, weight.shape[0], packed_weight(weight, geometry.groups).tiles, bias)

        return crossover_of(x, weight, geometry, work, in_place, self._dense, events)


class _Reading:
    """Reads spikes of one form.

    Args:
        state: what it depends on, see `SpikeReader`.
        weight: the weight of the layer.
        operations: the operations in front of the layer.
        compute: the product of bits.
        limit: the crossover.
    """

    def __init__(
        self,
        state: tuple[object, ...],
        weight: Tensor,
        operations: Sequence[Operation],
        compute: ProductOfBits | FewRowsOfBits,
        limit: float,
    ) -> None:
        self.state = copy.deepcopy(state)  # settings may be lists, which change in place
        self.weight, self.limit = weight, limit
        self.operations, self.compute = [operation.of_words for operation in operations], compute
        self.decision = decision_of(weight)

    def __call__(self, words: Tensor, bias: Tensor | None) -> tuple[int, Tensor | None]:
        """Why the call was refused, and the product; None if it was refused."""
        for operation in self.operations:
            words = operation(words)
        packed_bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
        refusal, density, y = self.compute(words, packed_bias, self.limit)
        self.decision.update(refusal == Refusal.NONE, density, self.limit, refusal != Refusal.WEIGHT)
        return refusal, y if refusal == Refusal.NONE else None


_SETTINGS = ("stride", "padding", "dilation", "groups", "padding_mode")
_POOL_SETTINGS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def _fits(spikes: SpikeBits, geometry: Geometry) -> bool:
    """Whether the words of the spikes are words of channels."""
    if geometry.dims:
        is_image = spikes.is_channels_last and len(spikes.shape) == geometry.dims + 3
        return is_image and spikes.shape[2] % (64 * geometry.groups) == 0
    return spikes.is_row_major and spikes.shape[-1] % 64 == 0


def _flattening(spikes: SpikeBits) -> Flattening | None:
    is_image = spikes.is_channels_last and spikes.shape[2] % 64 == 0
    is_rows = spikes.is_row_major and math.prod(spikes.shape[2:]) % 64 == 0
    return Flattening(spikes) if is_image or is_rows else None


def _max_pooling(pool: Any, spikes: SpikeBits) -> MaxPooling | None:
    """A max-pooling of bits; None if it is of another kind, or torch refuses it."""
    is_image = spikes.is_channels_last and len(spikes.shape) == 5 and spikes.shape[2] % 64 == 0
    kernel, padding = integers(pool.kernel_size, 2, 1), integers(pool.padding, 2, 0)
    stride = kernel if pool.stride in (None, (), []) else integers(pool.stride, 2, 1)
    if not is_image or pool.ceil_mode or pool.return_indices or integers(pool.dilation, 2, 1) != (1, 1):
        return None
    if kernel is None or stride is None or padding is None:
        return None
    for size, k, p in zip(spikes.shape[3:], kernel, padding, strict=True):
        if 2 * p > k or size + 2 * p < k:
            return None
    return MaxPooling(spikes, kernel, stride, padding)
