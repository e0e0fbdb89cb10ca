"""Whether the steps of a model depend on a value, decided over all T steps."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.inspect.verify.runs import Runs
from snnfx.inspect.verify.sequence_inputs import SequenceInputs
from snnfx.inspect.verify.state_dependence import is_state

torch.set_num_threads(1)


class Marked(nn.Module):
    """Writes `mark` at one step of four, and reads it at another."""

    def __init__(self, read_at: int, write_at: int) -> None:
        super().__init__()
        self.read_at, self.write_at, self.calls, self.mark = read_at, write_at, 0, torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        step, self.calls = self.calls % 4, self.calls + 1
        y = x + self.mark if step == self.read_at else x * 1.0
        if step == self.write_at:
            self.mark = x.mean(0)
        return y


def depends(model: nn.Module, attribute: str) -> bool:
    x_seq = torch.rand(4, 2, 3)
    inputs = SequenceInputs.of((x_seq,), {}, 0, None)
    return is_state(Runs(model, snnfx.convert(nn.Identity()), inputs, {}, False), model, attribute)


def test_a_value_that_only_a_later_step_reads_is_state() -> None:
    assert depends(Marked(read_at=2, write_at=3), "mark")


def test_a_value_that_a_later_step_overwrites_before_it_is_read_is_no_state() -> None:
    assert not depends(Marked(read_at=4, write_at=3), "mark")
    assert not depends(Marked(read_at=3, write_at=2), "mark")


def test_a_flag_without_which_the_steps_fail_is_state() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_first, self.v = True, None

        def forward(self, x: Tensor) -> Tensor:
            if self.is_first:
                self.v, self.is_first = x, False
            self.v = 0.5 * self.v
            return self.v

    assert depends(Flagged(), "is_first")
    assert not depends(Flagged(), "v")


def test_a_counter_is_state_and_a_growing_log_is_not() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count, self.log = 0, torch.zeros(0)

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.log = torch.cat([self.log, x.detach().mean().reshape(1)])
            return x * 2

    assert depends(Logging(), "count")
    assert not depends(Logging(), "log")


class Logging(nn.Module):
    """Appends the mean of each step to a list, through NumPy as training scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.lif, self.rates = snnfx.neuron.LIFNode(v_threshold=0.2), []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lif(x)
        self.rates.append(y.detach().cpu().numpy().mean())
        return y


def test_a_growing_list_is_state_only_if_a_step_reads_it() -> None:
    class Reading(Logging):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return 2 * y if len(self.rates) > 4 else y

    assert not depends(Logging(), "rates")
    assert depends(Reading(), "rates")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("with_example", [False, True])
def test_a_log_that_the_net_does_not_write_is_a_note(with_example: bool, double: bool) -> None:
    x_seq = torch.rand(4, 2, 3)
    net = snnfx.convert(model := Logging(), example_inputs=(x_seq[0],) if with_example else None)
    report = snnfx.verify(model, net, x_seq, double=double)
    assert any(note.startswith("the net does not write `rates.0`") for note in report.notes)


class DelayedByTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.earlier = deque([torch.zeros(1, 3), torch.ones(1, 3)], maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.earlier[0]
        self.earlier.append(x)
        return y


@pytest.mark.parametrize("T", [1, 2, 3])
def test_a_first_state_that_has_not_left_a_queue_may_be_smaller_than_in_the_net(T: int) -> None:
    model = DelayedByTwo()
    snnfx.verify(model, snnfx.convert(model), torch.rand(T, 5, 3))
