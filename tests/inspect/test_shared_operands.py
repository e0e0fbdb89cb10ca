"""Notes on sizes of values whose operands are shared many times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import snnfx


class Doubled(nn.Module):
    """A size behind many additions of a value to itself."""

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(64):
            y = y + y
        return x.sum(1, keepdim=True) * int(y.shape[1])


def test_a_size_behind_shared_operands_is_explained_in_short() -> None:
    text = str(snnfx.explain(snnfx.convert(Doubled(), example_inputs=torch.rand(2, 5))))
    assert "must be 5 in every call" in text
    assert len(text) < 4000


class Small(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True) * int((2 * x).shape[1])


def test_short_expressions_are_printed_in_full() -> None:
    text = str(snnfx.explain(snnfx.convert(Small(), example_inputs=torch.rand(2, 5))))
    assert "`2 * x.shape[1]` must be 5 in every call" in text
