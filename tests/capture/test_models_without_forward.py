"""Modules with methods of their own, but without a forward: their attributes are state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.stepping import assert_converts

X_SEQ = torch.rand(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.hc = nn.LSTMCell(3, 3), None

    def encode(self, x: Tensor) -> Tensor:
        self.hc: Any = self.cell(x, self.hc)
        return self.hc[0]


class Accumulator(nn.Module):
    v: Any = None

    def encode(self, x: Tensor) -> Tensor:
        self.v = x if self.v is None else 0.5 * self.v + x
        return self.v


class Parent(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.encoder.encode(x)


def test_the_model_is_such_a_module() -> None:
    for make in (Encoder, Accumulator):
        net = assert_converts(make().double(), X_SEQ, entry="encode")
        assert net.program.slots


def test_a_part_of_the_model_is_such_a_module() -> None:
    for make in (Encoder, Accumulator):
        net = assert_converts(Parent(make()).double(), X_SEQ)
        assert net.program.slots
