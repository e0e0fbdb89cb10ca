"""Bound kernels read parameters and buffers where they lie, and see each change of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.stepping import assert_same, fresh_copy, step_model


class Leaky(nn.Module):
    """A neuron with a factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.rand(8, dtype=torch.float64))
        self.factor: Tensor
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.factor * self.v + x
        spikes = (self.v > 2.0).to(x.dtype)
        self.v = self.v - 2.0 * spikes
        return spikes

    def reset(self) -> None:
        self.v = 0.0


def one_bits(factor: Tensor) -> Tensor:
    """The same memory as integers."""
    return factor.copy_(torch.ones(8, dtype=torch.int64).view(torch.float64)).view(torch.int64)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "values": lambda factor: factor.mul_(0.5),
    "memory": lambda factor: factor * 0.5,
    "strides": lambda factor: torch.rand(8, 3, dtype=torch.float64)[:, 1],
    "one element": lambda factor: factor[:1].expand(8),
    "dtype": one_bits,
    "shape": lambda factor: factor.view(1, 8),
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_is_replaced_or_changed_in_place_is_seen(change: str) -> None:
    torch.manual_seed(0)
    model, x_seq = Leaky(), torch.rand(6, 4, 8, dtype=torch.float64) * 2
    net = snnfx.convert(model, example_inputs=x_seq[0])

    def check() -> None:
        with torch.no_grad():
            for _ in range(4):
                assert_same(net(x_seq), step_model(fresh_copy(model), x_seq))

    check()
    model.factor.data = CHANGES[change](model.factor.data)
    check()
    model.factor.data = torch.rand(8, dtype=torch.float64)
    check()
