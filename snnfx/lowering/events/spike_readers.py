"""`SpikeReader`: a layer that reads spikes as bits, behind max-poolings and a flattening.

A bound graph (`snnfx.emit.bound_graph`) lets a neuron's kernel write bits instead of numbers while all its readers run
by events. A reader that has to run densely returns None; the caller then gives it numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.lowering.events.event_kernel import product, product_of_bits
from snnfx.lowering.events.geometry import Geometry
from snnfx.lowering.events.layer_decisions import (
    LAYERS,
    LEAST_WORK,
    crossover_of,
    decision_for,
    geometry_of_layer,
    has_kernel,
    is_plain_call,
    is_plain_mode,
    is_supported,
    latest_decision,
    positions_of,
    remember,
)
from snnfx.lowering.events.packed_weights import packed_weight
from snnfx.lowering.events.spike_bits import SpikeBits

__all__ = ["SpikeReader"]


class SpikeReader:
    """Calls a layer on spikes `[T, N, *]` that are given as bits, in inference.

    Args:
        layer: the layer.
        pools: poolings in front of it, `nn.MaxPool2d`.
        flattens: whether all dimensions but the batch are flattened behind the poolings.
    """

    def __init__(self, layer: nn.Module, pools: Sequence[nn.Module], flattens: bool) -> None:
        self.layer, self.pools, self.flattens = layer, tuple(pools), flattens
        self.runs_by_events = False
        self._refuses = False

    def observe(self) -> None:
        """Note how the latest call of the layer on numbers ran."""
        decision = latest_decision(self.layer.weight)  # type: ignore[arg-type]
        self.runs_by_events = decision is not None and decision.by_events and not self._refuses

    def __call__(self, spikes: SpikeBits) -> Tensor | None:
        """`[T * N, *]`, the output of the layer; None if it has to run densely."""
        y = self._product(spikes)
        self.runs_by_events = y is not None
        return y

    def _product(self, spikes: SpikeBits) -> Tensor | None:
        layer: Any = self.layer
        if torch.is_grad_enabled() or not is_plain_mode() or type(layer) not in LAYERS or not is_plain_call(layer):
            return None
        weight, bias = layer.weight, layer.bias
        geometry, read = geometry_of_layer(layer, weight), self._operand(spikes)
        if geometry is None or read is None or not _fits(read, geometry, self.flattens):
            self._refuses = True
            return None
        image = read.shape[2:] if self.flattens and read.is_channels_last else None
        if self.flattens:
            rank = (0, 1)
            read = replace(read, shape=(*read.shape[:2], math.prod(read.shape[2:])), order=rank)
        shape = (read.shape[0] * read.shape[1], *read.shape[2:])
        work = positions_of(shape, geometry) * weight.numel()
        if not is_supported(shape, read.dtype, weight, bias, geometry) or work < LEAST_WORK:
            return None
        if not has_kernel(read.dtype.itemsize):
            return None
        bias = None if bias is None else bias.detach().contiguous()
        limit = self._crossover(shape, read.dtype, weight, bias, geometry, work)
        packed = packed_weight(weight, geometry.groups, image) if read.density < limit else None
        remember(weight, decision_for(packed, read.density, limit))
        if packed is None or not packed.is_finite:
            return None
        return product_of_bits(read, geometry, weight.shape[0], packed.tiles, bias)

    def _operand(self, spikes: SpikeBits) -> SpikeBits | None:
        """The spikes behind the poolings; None if these have no form for bits."""
        for pool in self.pools:
            settings = _settings_of(pool)
            is_image = spikes.is_channels_last and len(spikes.shape) == 5 and spikes.shape[2] % 64 == 0
            if settings is None or not is_image:
                return None
            spikes = spikes.max_pool(*settings)
        return spikes

    def _crossover(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        work: int,
    ) -> float:
        """The crossover; bits and numbers share one."""
        x = torch.empty(shape, dtype=dtype, device="cpu")
        if geometry.dims:
            x = x.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

        def events(x: Tensor) -> Tensor:
            return product(x, geometry, weight.shape[0], packed_weight(weight, geometry.groups).tiles, bias)

        return crossover_of(x, weight, geometry, work, self.layer.forward, events)


def _fits(spikes: SpikeBits, geometry: Geometry, flattens: bool) -> bool:
    """Whether the words of the spikes are words of channels."""
    if geometry.dims:
        is_image = spikes.is_channels_last and len(spikes.shape) == geometry.dims + 3
        return not flattens and is_image and spikes.shape[2] % (64 * geometry.groups) == 0
    if spikes.is_row_major:
        return (math.prod(spikes.shape[2:]) if flattens else spikes.shape[-1]) % 64 == 0
    return flattens and spikes.is_channels_last and spikes.shape[2] % 64 == 0


def _settings_of(pool: Any) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """Kernel, stride and padding of a max-pooling; None if it is of another kind."""
    kernel, stride = _pair(pool.kernel_size), _pair(pool.stride)
    padding, dilation = _pair(pool.padding), _pair(pool.dilation)
    if pool.ceil_mode or pool.return_indices or dilation != (1, 1):
        return None
    # torch refuses more padding; the dense call raises its error
    return (kernel, stride, padding) if all(2 * p <= k for p, k in zip(padding, kernel, strict=True)) else None


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)
