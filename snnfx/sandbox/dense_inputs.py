"""Refuse inputs that hold sequences of several lengths: nested tensors and packed sequences."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from snnfx.errors import InputError

__all__ = ["not_a_dense_tensor"]


def not_a_dense_tensor(name: str, value: Any) -> InputError:
    """The error (SNNFX305) for an input that is not a tensor, or a nested tensor."""
    if isinstance(value, PackedSequence):
        what, hint = "a PackedSequence", "Pad it: x, lengths = torch.nn.utils.rnn.pad_packed_sequence(x)."
    elif isinstance(value, Tensor):
        what, hint = "a nested tensor", "Pad it: x = torch.nested.to_padded_tensor(x, 0.0)."
    else:
        return InputError("SNNFX305", f"the input `{name}` is a {type(value).__name__}, not a tensor")
    why = "each step of a net takes samples of one shape."
    return InputError("SNNFX305", f"the input `{name}` is {what}", why=why, hint=hint)
