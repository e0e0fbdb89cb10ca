"""Compare and restore the values of tensors of any layout: dense, sparse or on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["meta_like", "restore_value", "same_values", "value_restorer"]

_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
"""The methods that return the dense parts of a sparse tensor."""


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal shapes and values, as `torch.equal`; meta tensors have no values to differ."""
    if a.layout != b.layout or a.is_meta != b.is_meta:
        return False
    if a.is_meta:
        return a.shape == b.shape
    if a.layout not in _PARTS:
        return torch.equal(a, b)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in zip(_parts(a), _parts(b), strict=True))


def meta_like(x: Tensor) -> Tensor:
    """A dense meta tensor with the shape and dtype of a tensor, and the strides that only a dense tensor has."""
    if x.layout != torch.strided:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    return torch.empty_strided(tuple(x.shape), x.stride(), dtype=x.dtype, device="meta")


def restore_value(tensor: Tensor, value: Tensor) -> None:
    """Copy a value back into a tensor that may have changed.

    Through `.data`, which keeps the version: an autograd graph may have saved the tensor for backward.
    """
    if not same_values(tensor, value):
        tensor.data.copy_(value)


def value_restorer(tensor: Tensor) -> Callable[[], None]:
    """A function that restores the present value, as `restore_value` but without a comparison: a GPU need not wait."""
    value = tensor.detach().clone()

    def restore() -> None:
        tensor.data.copy_(value)

    return restore


def _parts(tensor: Tensor) -> list[Tensor]:
    return [getattr(tensor.detach(), name)() for name in _PARTS[tensor.layout]]
