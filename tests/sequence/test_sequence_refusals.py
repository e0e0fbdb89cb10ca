"""Models that `takes="sequence"` refuses, or converts for one length only, with the reason."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError, InputError
from support.looped_models import Cell, TwoLayers, assert_converts_sequence


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other, self.square, self.cell = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 4), Cell()


def x_seq(*shape: int) -> Tensor:
    return torch.rand(shape or (7, 5, 6), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def refusal(model: nn.Module, *inputs: Tensor) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        snnfx.convert(model.double(), takes="sequence", example_inputs=inputs or (x_seq(),))
    return caught.value


def test_iterations_with_another_module_are_refused_by_line() -> None:
    class Alternating(Looped):
        def forward(self, x: Tensor) -> Tensor:
            v, out = self.fc(x[0]), []
            for t in range(x.shape[0]):
                current = self.fc(x[t])
                v = torch.tanh(self.square(v)) + current if t % 2 == 0 else torch.relu(self.other(x[t]) + v)
                out.append(v)
            return torch.stack(out)

    error = refusal(Alternating())
    assert error.code == "SNNFX230" and "test_sequence_refusals.py" in error.where
    assert "other" in error.why or "square" in error.why


def test_a_value_from_two_iterations_before_keeps_the_length_of_the_example() -> None:
    class Skipping(Looped):
        def forward(self, x: Tensor) -> Tensor:
            out = [self.fc(x[0]), self.fc(x[1])]
            for t in range(2, x.shape[0]):
                out.append(out[-1] + 0.5 * out[-2] + self.fc(x[t]))
            return torch.stack(out)

    net = assert_converts_sequence(Skipping(), (x_seq(),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(x_seq(9, 5, 6))


def test_a_number_of_iterations_that_depends_on_values_is_refused() -> None:
    class Stopping(Looped):
        def forward(self, x: Tensor) -> Tensor:
            v = torch.zeros(5, 4, dtype=x.dtype)
            for t in range(x.shape[0]):
                s, v = self.cell(self.fc(x[t]), v)
                if s.sum() > 10:
                    break
            return v

    error = refusal(Stopping())
    assert error.code in ("SNNFX201", "SNNFX230") and "test_sequence_refusals.py" in error.where


def test_code_behind_the_loop_with_one_operation_for_each_step_keeps_the_length() -> None:
    class Products(Looped):
        def forward(self, x: Tensor) -> Tensor:
            out = []
            for t in range(x.shape[0]):
                out.append(self.fc(x[t]))
            return math.prod(out)  # type: ignore[arg-type, return-value]

    net = assert_converts_sequence(Products(), (x_seq(),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(x_seq(9, 5, 6))


def test_sequences_need_example_inputs() -> None:
    with pytest.raises(InputError, match="SNNFX233"):
        snnfx.convert(TwoLayers(), takes="sequence")


def test_a_loop_that_branches_on_the_iteration_keeps_its_length() -> None:
    class Late(Looped):
        def forward(self, x: Tensor) -> Tensor:
            v, out = None, []
            for t in range(x.shape[0]):
                gain = 2.0 if t > 100 else 1.0
                s, v = self.cell(gain * self.fc(x[t]), v)
                out.append(s)
            return torch.stack(out)

    net = assert_converts_sequence(Late(), (x_seq(),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(x_seq(120, 5, 6))


def test_an_input_shorter_than_its_loop_is_refused() -> None:
    class Fixed(Looped):
        def forward(self, x: Tensor) -> Tensor:
            v, out = None, []
            for t in range(6):
                s, v = self.cell(self.fc(x[t]), v)
                out.append(s)
            return torch.stack(out)

    net = assert_converts_sequence(Fixed(), (x_seq(),), [(x_seq(9, 5, 6),)])
    with pytest.raises(InputError, match="SNNFX231"):
        net(x_seq(3, 5, 6))


def test_convert_without_takes_names_it() -> None:
    with pytest.raises(CaptureError, match='takes="sequence"') as caught:
        snnfx.convert(TwoLayers(), example_inputs=(torch.rand(7, 5, 6),))
    assert caught.value.code == "SNNFX203"
