"""Fold the time steps of a sequence into its batch, and unfold them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fold_time", "unfold_time"]


def fold_time(x_seq: Tensor, batch_dim: int = 0) -> Tensor:
    """Fold time into the batch: `[T, N, *]` to `[T * N, *]`, or with the batch in another dimension of a step."""
    y = (x_seq.movedim(0, batch_dim) if batch_dim else x_seq).flatten(batch_dim, batch_dim + 1)
    # Contiguous steps stay contiguous, so that a view that works for one step works for all.
    return y if y.is_contiguous() or not x_seq[0].is_contiguous() else y.contiguous()


def unfold_time(y: Tensor, T: int, batch_dim: int = 0) -> Tensor:
    """Unfold T steps from the batch: `[T * N, *]` to `[T, N, *]`."""
    if batch_dim == 0 and not y.is_contiguous() and y.shape[0] == T:
        # One sample: `unflatten` makes up a stride of the batch, with which the BatchNorm of torch takes a step that is
        # channels-last for a row-major one and returns wrong gradients. These views keep it larger than all others.
        return y.unsqueeze(0) if T == 1 else torch.unflatten(y, 0, (1, T)).transpose(0, 1)
    y = torch.unflatten(y, batch_dim, (T, -1))
    return y.movedim(batch_dim, 0) if batch_dim else y
