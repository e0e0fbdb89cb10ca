"""The struct of arguments of a convolution in a compiled time loop."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.mixed.convolution_calls import Sizes
from snnfx.lowering.mixed.convolution_tables import convolution_tables
from snnfx.lowering.mixed.operations import Convolution
from snnfx.lowering.nonzero_lists import VECTOR_BYTES

__all__ = ["convolution_struct"]

_CHANNELS = 8
"""The largest number of channels of the result that are computed together."""


class _Convolution(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("groups", "in_channels", "out_channels", "channel_step", "column_step", "plane", "offsets", "taps"),
            *("tap_count", "row_count", "row_from", "row_to", "column_count", "columns"),
            *("vector_count", "vector_from", "vector_to", "result_row_count", "result_width", "result_plane"),
            *("result_rows", "weight_group", "weight_out", "weight_in"),
            *("extended", "extended_bytes", "buffer_start", "buffer_step"),
        )
    ]


def convolution_struct(operation: Convolution, weight: Tensor, parts: int) -> tuple[ctypes.Structure, list[Any]]:
    """The struct `Convolution` of `snnfx.lowering.mixed.convolution_source`, and the tensors whose addresses it has.

    Args:
        operation: the operation.
        weight: its weight, without a lazy negation.
        parts: parts of the samples that run at the same time.
    """
    settings, x, out = operation.settings, operation.input.tensor, operation.out.tensor
    lanes, groups = VECTOR_BYTES // out.element_size(), settings.groups
    in_channels, out_channels = x.shape[2] // groups, out.shape[2] // groups
    tables = convolution_tables(
        settings,
        _three(x.shape[3:], 1),
        _three(x.stride()[3:], 0),
        _three(out.shape[3:], 1),
        in_channels,
        _three(weight.stride()[2:], 0),
        lanes,
    )
    # A vector may read beyond the last element of the image; padding stays zero during all steps.
    image = (x.shape[2] * tables.plane + 2 * lanes - 1) // lanes * lanes
    extended = torch.zeros(parts, image + _CHANNELS * tables.buffer, dtype=out.dtype, device="cpu")
    is_swapped = settings.is_swapped
    struct = _Convolution(
        groups=groups,
        in_channels=in_channels,
        out_channels=out_channels,
        channel_step=x.stride(2),
        column_step=x.stride(-1),
        plane=tables.plane,
        offsets=tables.offsets.data_ptr(),
        taps=tables.taps.data_ptr(),
        tap_count=len(tables.taps),
        row_count=len(tables.row_from),
        row_from=tables.row_from.data_ptr(),
        row_to=tables.row_to.data_ptr(),
        column_count=len(tables.columns),
        columns=0 if tables.columns_follow else tables.columns.data_ptr(),
        vector_count=len(tables.vector_from),
        vector_from=tables.vector_from.data_ptr(),
        vector_to=tables.vector_to.data_ptr(),
        result_row_count=len(tables.result_rows),
        result_width=tables.result_width,
        result_plane=out.stride(2),
        result_rows=tables.result_rows.data_ptr(),
        weight_group=(in_channels if is_swapped else out_channels) * weight.stride(0),
        weight_out=weight.stride(1 if is_swapped else 0),
        weight_in=weight.stride(0 if is_swapped else 1),
        extended=extended.data_ptr(),
        extended_bytes=extended.stride(0) * extended.element_size(),
        buffer_start=image,
        buffer_step=tables.buffer,
    )
    return struct, [tables, extended]


def _three(sizes: Any, filler: int) -> Sizes:
    d, h, w = (filler,) * (3 - len(sizes)) + tuple(sizes)
    return d, h, w
