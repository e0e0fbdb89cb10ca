"""Steps that compute Python numbers with `.item()`: a net computes them at every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.v: Any = 0.0
        self.total: Any = 0.0

    def forward(self, x: Tensor) -> Any:
        self.v = 0.5 * self.v + self.linear(x)
        return self.counted(self.v)

    def counted(self, v: Tensor) -> Any:
        self.total += (v > 0).sum().item()
        return v


class Reads(Counts):
    def counted(self, v: Tensor) -> Any:
        self.total = self.total + v.sum().item()
        return v * self.total


class Returns(Counts):
    def counted(self, v: Tensor) -> Any:
        return v, (v > 0.1).sum().item()


class ReturnsTheSame(Counts):
    def counted(self, v: Tensor) -> Any:
        return v, (v > 1e6).sum().item()


def outputs_and_total(model: Counts, x_seq: Tensor) -> tuple[Tensor, Any, list[Any]]:
    steps = [model(x) for x in x_seq]
    numbers = [y[1] for y in steps if isinstance(y, tuple)]
    return torch.stack([y[0] if isinstance(y, tuple) else y for y in steps]), model.total, numbers


@pytest.mark.filterwarnings("ignore:SNNFX504")  # vmap has no rule for `.item()`
@pytest.mark.parametrize("with_examples", [False, True])
@pytest.mark.parametrize("model_class", [Counts, Reads, Returns, ReturnsTheSame])
def test_numbers_of_steps_are_computed_at_every_step(model_class: type[Counts], with_examples: bool) -> None:
    torch.manual_seed(0)
    model, x_seq = model_class().double(), torch.randn(6, 2, 3, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=(x_seq[0],) if with_examples else None)
    y, state = net.run(x_seq)
    expected, total, numbers = outputs_and_total(model, x_seq)
    torch.testing.assert_close(y[0] if numbers else y, expected)
    if numbers:
        assert y[1].tolist() == numbers
    else:
        assert float(state["total"]) == pytest.approx(total)


@pytest.mark.filterwarnings("ignore:SNNFX504")
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("model_class", [Counts, Reads, Returns, ReturnsTheSame])
def test_verify_has_no_false_alarm_for_numbers_of_float32_values(model_class: type[Counts], seed: int) -> None:
    torch.manual_seed(seed)
    model = model_class()
    snnfx.verify(model, snnfx.convert(model), torch.randn(6, 2, 3))
