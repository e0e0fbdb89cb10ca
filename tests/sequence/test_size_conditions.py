"""Calls whose code decides by sizes: the net computes what the model computes, or refuses the sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from snnfx.functional import reset_net
from support.stepping import assert_same

Condition = Callable[[Tensor], bool]

CONDITIONS: dict[str, Condition] = {
    "more than six steps": lambda x: x.shape[0] > 6,
    "other than seven steps": lambda x: x.shape[0] != 7,
    "as many steps as samples": lambda x: x.shape[0] == x.shape[1],
    "more than three samples": lambda x: x.shape[1] > 3,
    "as many samples as features": lambda x: x.shape[1] == x.shape[2],
    "elements": lambda x: x.numel() > 70,
    "one shape": lambda x: x.shape == (7, 3, 4),
    "half of the steps": lambda x: x.shape[0] // 2 > 2,
}

SHAPES = [(5, 3, 4), (7, 3, 4), (3, 3, 4), (12, 3, 4), (4, 4, 4), (2, 3, 4), (1, 3, 4)]


class _Conditional(nn.Module):
    def __init__(self, condition: Condition) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.neuron, self.condition = nn.Linear(4, 4), snnfx.neuron.LIFNode(), condition


class BeforeLoop(_Conditional):
    def forward(self, x: Tensor) -> Tensor:
        factor = 2.0 if self.condition(x) else 1.0
        return torch.stack([self.neuron(3 * factor * self.linear(step)) for step in x])


class InLoop(_Conditional):
    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for step in x:
            current = 3 * self.linear(step)
            if self.condition(x):
                current = current * 2
            outputs.append(self.neuron(current))
        return torch.stack(outputs)


class InWhileLoop(_Conditional):
    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        while len(outputs) < x.shape[0]:
            current = 3 * self.linear(x[len(outputs)])
            if self.condition(x):
                current = current * 2
            outputs.append(self.neuron(current))
        return torch.stack(outputs)


class InLoopTwice(_Conditional):
    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for step in x:
            if self.condition(x):
                step = step * 2
            current = 3 * self.linear(step)
            if not self.condition(x):
                current = current / 2
            outputs.append(self.neuron(current))
        return torch.stack(outputs)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("place", [BeforeLoop, InLoop, InLoopTwice, InWhileLoop])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_other_sizes_run_as_the_model_does_or_are_refused(condition: str, place: type[_Conditional]) -> None:
    model = place(CONDITIONS[condition]).double()
    net = snnfx.convert(model, takes="sequence", example_inputs=sequence(*SHAPES[0]))
    for shape in SHAPES:
        x = sequence(*shape)
        reset_net(model)
        expected = model(x)
        reset_net(model)
        try:
            y = net(x)
        except InputError as error:
            assert error.code == "SNNFX312"
            assert shape != SHAPES[0]
        else:
            assert_same(y, expected)


def test_a_condition_on_the_batch_size_keeps_the_form_of_a_step() -> None:
    model = BeforeLoop(lambda x: x.shape[1] > 3).double()
    net = snnfx.convert(model, takes="sequence", example_inputs=sequence(5, 3, 4))
    assert net.program.whole_sequences is None
    x = sequence(9, 2, 4)
    assert_same(net(x), model(x))
    with pytest.raises(InputError, match="a condition on sizes or dtypes is True, but"):
        net(sequence(5, 4, 4))


def test_a_condition_on_the_number_of_time_steps_is_checked_in_a_call_of_any_length() -> None:
    model = BeforeLoop(lambda x: x.shape[0] > 6).double()
    net = snnfx.convert(model, takes="sequence", example_inputs=sequence(5, 3, 4))
    x = sequence(6, 3, 4)
    assert_same(net(x), model(x))
    with pytest.raises(InputError, match="a condition on sizes or dtypes is True, but"):
        net(sequence(7, 3, 4))


def test_a_last_iteration_may_compute_more() -> None:
    class Louder(BeforeLoop):
        def forward(self, x: Tensor) -> Tensor:
            outputs = []
            for t in range(x.shape[0]):
                current = 3 * self.linear(x[t])
                if t == x.shape[0] - 1:
                    current = current * 2
                outputs.append(self.neuron(current))
            return torch.stack(outputs)

    model = Louder(bool).double()
    net = snnfx.convert(model, takes="sequence", example_inputs=sequence(5, 3, 4))
    for T in (5, 6, 2):
        x = sequence(T, 3, 4)
        reset_net(model)
        assert_same(net(x), model(x))
    with pytest.raises(InputError, match="a call of 1 time step is too short"):
        net(sequence(1, 3, 4))
