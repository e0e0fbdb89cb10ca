"""Models with a time axis in the styles of published code: equal to their own call, for another T and N."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError, InputError
from support.looped_models import Cell, assert_converts_sequence
from support.published_styles import (
    ChunkAttention,
    Containers,
    Detector,
    HandNorm,
    MultiScale,
    TemporalConv,
    ThresholdNorm,
    TokenAttention,
)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


WITH_STEP = {
    "tokens": (TokenAttention, [(6, 3, 6, 5), (3, 2, 6, 5)]),
    "scales": (MultiScale, [(6, 3, 4, 4, 4), (4, 2, 4, 4, 4)]),
    "containers": (lambda: Containers(0), [(6, 3, 2, 4, 4), (3, 2, 2, 4, 4)]),
    "detector": (Detector, [(6, 3, 2, 8, 8), (4, 2, 2, 8, 8)]),
}
WHOLE = {
    "containers of time at dim 1": (lambda: Containers(1), [(3, 6, 2, 4, 4), (2, 3, 2, 4, 4)]),
    "norm over time": (ThresholdNorm, [(6, 3, 2, 4, 4), (3, 2, 2, 4, 4)]),
    "norm by hand": (HandNorm, [(6, 3, 2, 4, 4), (3, 2, 2, 4, 4)]),
    "chunks": (ChunkAttention, [(6, 3, 5, 4), (4, 2, 5, 4)]),
    "temporal convolution": (TemporalConv, [(6, 3, 6), (4, 2, 6)]),
}


@pytest.mark.parametrize("name", [*WITH_STEP, *WHOLE])
def test_equal_to_the_own_call(name: str) -> None:
    torch.manual_seed(0)
    make, shapes = {**WITH_STEP, **WHOLE}[name]
    first, *others = [(sequence(*shape),) for shape in shapes]
    net = assert_converts_sequence(make(), first, others)
    assert (net.program.whole_sequences is None) is (name in WITH_STEP)


def train_online(net: snnfx.Net, x: Tensor) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    snnfx.online.Trainer(net, snnfx.online.SLTT, optimizer, lambda y, _: (y**2).sum(), target_dim=None).step(x, x)


@pytest.mark.parametrize("name", WHOLE)
def test_models_that_mix_time_refuse_steps_by_line(name: str) -> None:
    make, shapes = WHOLE[name]
    model, x = make().double().eval(), sequence(*shapes[0])
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    attempts = {
        "stream": lambda: net.stream([x]),
        "state": lambda: net.run(x, state={}),
        "record": lambda: net.run(x, record=("sn",)),
        "step": lambda: snnfx.convert(net, step_mode="s"),
        "chunk": lambda: snnfx.convert(model, takes="sequence", example_inputs=(x,), chunk=2),
        "budget": lambda: snnfx.convert(model, takes="sequence", example_inputs=(x,), memory_budget="1G"),
        "online": lambda: train_online(net, x),
    }
    for attempt in attempts.values():
        with pytest.raises(InputError, match="SNNFX235") as caught:
            attempt()
        assert "published_styles.py" in caught.value.where and caught.value.why


class ModulePerStep(nn.Module):
    """A norm of its own for each time step."""

    def __init__(self, steps: int = 5) -> None:
        super().__init__()
        self.fc, self.cell = nn.Linear(6, 4), Cell()
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(steps))

    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.norms[t](self.fc(x[t])), v)
            out.append(s)
        return torch.stack(out)


def refusal(model: nn.Module, x: Tensor) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        snnfx.convert(model.double(), takes="sequence", example_inputs=(x,))
    return caught.value


def test_a_module_for_each_step_runs_between_loops() -> None:
    net = assert_converts_sequence(ModulePerStep(), (sequence(5, 3, 6),))
    assert net.loops


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.cell = nn.Linear(6, 4), Cell()


class Breaking(Looped):
    """Stops after some steps."""

    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            if t == 100:
                break
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
        return torch.stack(out)


def test_a_break_at_a_later_step_keeps_the_length_of_the_example() -> None:
    net = assert_converts_sequence(Breaking(), (sequence(6, 3, 6),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(120, 3, 6))


class Waiting(Looped):
    """Iterates until the potential is high."""

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros(3, 4, dtype=x.dtype)
        while v.max() < 1.0:
            _, v = self.cell(self.fc(x), v)
        return v


def test_a_number_of_iterations_that_depends_on_data_is_refused_by_line() -> None:
    error = refusal(Waiting(), sequence(3, 6))
    assert error.code in ("SNNFX201", "SNNFX230") and "test_published_styles.py" in error.where


class Peeled(Looped):
    """Another first step."""

    def forward(self, x: Tensor) -> Tensor:
        s, v = self.cell(0.5 * self.fc(x[0]))
        out = [s]
        for t in range(1, x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
        return torch.stack(out)


class PeeledInside(Looped):
    """Another first step inside the loop."""

    def forward(self, x: Tensor) -> Tensor:
        out: list[Tensor] = []
        v = None
        for t in range(x.shape[0]):
            current = self.fc(x[t])
            if t > 0:
                current = current + out[-1]
            s, v = self.cell(current, v)
            out.append(s)
        return torch.stack(out)


@pytest.mark.parametrize("model_class", [Peeled, PeeledInside])
def test_a_first_iteration_that_differs_at_any_length(model_class: type[nn.Module]) -> None:
    lengths = [(sequence(t, 2, 6),) for t in (1, 2, 9)] if model_class is Peeled else []
    assert_converts_sequence(model_class(), (sequence(6, 3, 6),), lengths)


class Reduced(Looped):
    """A loop written as a fold."""

    def forward(self, x: Tensor) -> Tensor:
        def advance(state: tuple[Tensor | None, list[Tensor]], x_t: Tensor) -> tuple[Tensor, list[Tensor]]:
            s, v = self.cell(self.fc(x_t), state[0])
            return v, [*state[1], s]

        _, out = functools.reduce(advance, x.unbind(0), (None, []))
        return torch.stack(out)


def test_a_loop_by_reduce_is_refused_or_equal() -> None:
    try:
        assert_converts_sequence(Reduced(), (sequence(6, 3, 6),))
    except CaptureError as error:
        assert "test_published_styles.py" in error.where


class Listed(Looped):
    """Returns the list of its steps."""

    def forward(self, x: Tensor) -> list[Tensor]:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
        return out


class ListedAndReduced(Looped):
    """Returns the list of its spikes beside a mean."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        v, out = None, []
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
            out.append(s)
        return {"rate": torch.stack(out).mean(0), "spikes": out}


@pytest.mark.parametrize("make", [Listed, ListedAndReduced])
def test_a_list_with_one_output_for_each_step_fixes_their_number(make: type[nn.Module]) -> None:
    net = assert_converts_sequence(make(), (sequence(6, 3, 6),), [(sequence(6, 2, 6),)])
    assert "the code around the loops depends on it" in str(snnfx.explain(net))
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(7, 3, 6))
