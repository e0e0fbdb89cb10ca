"""The values between the stages of a segment: sequences, packed or in chunks, and what stands for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from snnfx.recompute.bit_packing import PackedTensor, empty_steps, memory_order, unpack
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Key", "empty_like", "keys_of", "steps_of", "unpacked"]


class Key:
    """Stands for one tensor that goes into or comes out of a stage."""


def keys_of(value: Any) -> Any:
    """A key for each leaf."""
    return pytree.tree_map(lambda _: Key(), value)


def empty_like(x_seq: Tensor, T: int) -> Tensor:
    """T steps in the memory format of these."""
    return empty_steps((T, *x_seq.shape[1:]), memory_order(x_seq), x_seq.dtype, x_seq.device)


def unpacked(value: Any) -> Any:
    """The tensor itself."""
    return unpack(value) if isinstance(value, PackedTensor) else value


def steps_of(value: Any, start: int, stop: int) -> Any:
    """Some time steps of a sequence, packed if it is."""
    return value.steps(start, stop) if isinstance(value, PackedTensor) else value[start:stop]
