"""Count multiply-accumulates (MACs) and accumulates (ACs) of matrix products and convolutions, as they run.

A product with a spike operand, which contains only 0 and 1, needs no multiplication: each spike adds a weight. Its
cost is counted in accumulates; all other products are counted in MACs. Additions of biases are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from snnfx.sandbox.torch_internals import TorchDispatchMode

__all__ = ["ProductCounter", "is_binary"]

aten = torch.ops.aten


def is_binary(x: Tensor) -> bool:
    """Whether every element is 0 or 1."""
    return x.dtype == torch.bool or bool((x.eq(0) | x.eq(1)).all())


@dataclass(eq=False)
class ProductCounter(TorchDispatchMode):
    """Counts the products that run inside its context.

    Attributes:
        dense_macs: multiply-accumulates of all products, as if no operand were sparse.
        macs: multiply-accumulates of the products without a spike operand.
        acs: accumulates of the products with a spike operand.
        elements, nonzero: elements of the left operands (inputs of convolutions), and those that are not 0.
        products, spike_products: the number of products, and of those with a spike operand.
    """

    dense_macs: int = 0
    macs: int = 0
    acs: int = 0
    elements: int = 0
    nonzero: int = 0
    products: int = 0
    spike_products: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (aten.mm.default, aten.bmm.default):
            self._matrix_product(args[0], args[1])
        elif func in (aten.addmm.default, aten.baddbmm.default):
            self._matrix_product(args[1], args[2])
        elif func in (aten.mv.default, aten.dot.default):
            self._matrix_product(args[0].unsqueeze(0) if args[0].dim() == 1 else args[0], args[1].unsqueeze(-1))
        elif func is aten.addmv.default:
            self._matrix_product(args[1], args[2].unsqueeze(-1))
        elif func is aten.convolution.default:
            self._convolution(out, *args)
        elif getattr(func, "overloadpacket", None) in _ATTENTION:
            self._attention(*args[:3])
        return out

    def _add(self, left: Tensor, dense: int, accumulates: int | None) -> None:
        self.products += 1
        self.dense_macs += dense
        self.elements += left.numel()
        self.nonzero += int(left.count_nonzero())
        if accumulates is None:
            self.macs += dense
        else:
            self.spike_products += 1
            self.acs += accumulates

    def _matrix_product(self, x: Tensor, y: Tensor) -> None:
        """`x [*, m, k] @ y [*, k, n]`."""
        m, n = x.shape[-2], y.shape[-1]
        left, right = is_binary(x), is_binary(y)
        accumulates: int | None = None
        if left and right:
            accumulates = round(float((x.double().sum(-2) * y.double().sum(-1)).sum()))
        elif left:
            accumulates = int(x.count_nonzero()) * n
        elif right:
            accumulates = int(y.count_nonzero()) * m
        self._add(x, x.numel() * n, accumulates)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """`softmax(query key^T) value`; the second product has no spike operand on its left."""
        scores = query.shape[:-1].numel() * key.shape[-2]
        self._matrix_product(query, key.transpose(-2, -1))
        # The probabilities are between 0 and 1.
        dense = scores * value.shape[-1]
        spikes = is_binary(value)
        self.dense_macs += dense
        self.products += 1
        self.spike_products += spikes
        self.macs += 0 if spikes else dense
        self.acs += int(value.count_nonzero()) * query.shape[-2] if spikes else 0

    def _convolution(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> None:
        positions = x if transposed else out
        dense = weight.numel() * positions.shape[0] * prod(positions.shape[2:])
        left, right = is_binary(x), is_binary(weight)
        accumulates: int | None = None
        if left:
            # The number of (spike, weight) pairs that meet, without those that fall on the padding.
            if right:
                spikes, kernel, times = x, weight, 1
            else:
                # All weights count alike, so the channels of a group are summed first.
                spikes = x.unflatten(1, (groups, -1)).sum(2, dtype=torch.float64)
                kernel = torch.ones(groups, 1, *weight.shape[2:], device=x.device)
                times = weight.shape[1] if transposed else weight.shape[0] // groups
            pairs = aten.convolution.default(
                spikes.double(), kernel.double(), None, stride, padding, dilation, transposed, output_padding, groups
            )
            accumulates = round(float(pairs.sum())) * times
        elif right:
            accumulates = int(weight.count_nonzero()) * positions.shape[0] * prod(positions.shape[2:])
        self._add(x, dense, accumulates)


_ATTENTION = tuple(
    getattr(aten, name)
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(aten, name)
)
