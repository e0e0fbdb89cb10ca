"""Decisions of a whole call by sizes and dtypes: the net checks those that other inputs may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError

torch.set_num_threads(1)


class Decides(nn.Module):
    """A loop over time with a leaky state; `gain` decides in front of it, or in each iteration."""

    def __init__(self, gain: Callable[[Tensor, Tensor], Any], in_loop: bool) -> None:
        super().__init__()
        self.linear, self.gain, self.in_loop = nn.Linear(4, 4), gain, in_loop

    def forward(self, x: Tensor) -> Tensor:
        v, outputs = torch.zeros_like(x[0]), []
        gain = self.gain(x, x[0]) if not self.in_loop else 1.0
        for step in x:
            v = 0.5 * v + self.linear(step) * (self.gain(x, step) if self.in_loop else gain)
            outputs.append(v)
        return torch.stack(outputs)


DECISIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "batch of a step": lambda x, step: 3.0 if step.shape[0] > 1 else 1.0,
    "batch": lambda x, step: 3.0 if x.shape[1] == 2 else 1.0,
    "dtype": lambda x, step: 3.0 if step.dtype == torch.float32 else 1.0,
}


@pytest.mark.parametrize("in_loop", [False, True])
@pytest.mark.parametrize("name", DECISIONS)
def test_another_decision_is_refused(name: str, in_loop: bool) -> None:
    torch.manual_seed(0)
    model = Decides(DECISIONS[name], in_loop)
    net = snnfx.convert(model, takes="sequence", example_inputs=torch.rand(5, 1, 4))
    for steps in (5, 3):
        x_seq = torch.rand(steps, 1, 4)
        torch.testing.assert_close(net(x_seq), model(x_seq))
    other = torch.rand(5, 2, 4) if name != "dtype" else torch.rand(5, 1, 4, dtype=torch.float64)
    if name == "dtype":
        net.double()
    with pytest.raises(InputError, match="SNNFX312 a (condition on sizes or dtypes|size) .*test_decisions_by_sizes"):
        net(other)


@pytest.mark.parametrize("in_loop", [False, True])
def test_decision_by_the_number_of_steps_is_checked(in_loop: bool) -> None:
    torch.manual_seed(0)
    model = Decides(lambda x, step: 3.0 if x.shape[0] > 3 else 1.0, in_loop)
    net = snnfx.convert(model, takes="sequence", example_inputs=torch.rand(5, 2, 4))
    for steps in (5, 8, 2):
        x_seq = torch.rand(steps, 2, 4)
        try:
            result = net(x_seq)
        except InputError as error:
            assert error.code == "SNNFX312" and steps != 5
        else:
            torch.testing.assert_close(result, model(x_seq))


def test_decision_that_holds_for_any_number_of_steps_keeps_the_step_form() -> None:
    def gain(x: Tensor, step: Tensor) -> float:
        assert x.flatten(0, 1).shape[0] % x.shape[0] == 0
        return 2.0

    torch.manual_seed(0)
    model = Decides(gain, False)
    net = snnfx.convert(model, takes="sequence", example_inputs=torch.rand(5, 2, 4))
    assert net.program.whole_sequences is None
    for shape in ((5, 2, 4), (3, 1, 4), (1, 3, 4)):
        x_seq = torch.rand(shape)
        torch.testing.assert_close(net(x_seq), model(x_seq))
