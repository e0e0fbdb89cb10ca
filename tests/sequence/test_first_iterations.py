"""A first iteration without the terms of earlier steps is the step with states of zero; others stay in front."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from support.looped_models import assert_converts_sequence, spike


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Whole(nn.Module):
    """A loop in front of an operation over time, so that the call stays whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.recurrent, self.decay = nn.Linear(6, 4), nn.Linear(4, 4), nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.over_time(self.fc(x)).softmax(0)

    def over_time(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Updated(Whole):
    """Writes its spikes; the first potential is the input."""

    def over_time(self, x: Tensor) -> Tensor:
        mem, spikes, out, old = torch.zeros_like(x[0]), torch.zeros_like(x[0]), torch.zeros_like(x), 0
        for i in range(x.shape[0]):
            mem = old * 0.25 * (1 - spikes.detach()) + x[i] if i >= 1 else x[i]
            spikes = spike(mem - 0.5)
            old = mem.clone()
            out[i] = spikes + mem
        return out


class StartsAsNone(Whole):
    """Subtracts the spike of the step before."""

    def over_time(self, x: Tensor) -> Tensor:
        v, s, out = None, None, []
        for xt in x:
            v = xt if v is None else 0.5 * v + xt - 0.8 * s.detach()
            s = spike(v - 0.5)
            out.append(s + v)
        return torch.stack(out)


class Enumerated(Whole):
    def over_time(self, x: Tensor) -> Tensor:
        v, out = x[0], []
        for t, xt in enumerate(x.unbind()):
            v = xt if t == 0 else xt + v * 0.5
            v = v - spike(v - 0.5)
            out.append(v)
        return torch.stack(out)


class Recurrent(Whole):
    """The recurrent layer of a state of zero returns its bias, which the first step does not add."""

    def over_time(self, x: Tensor) -> Tensor:
        s, out = None, []
        for t in range(x.shape[0]):
            v = x[t] if s is None else x[t] + self.recurrent(s)
            s = spike(v - 0.5)
            out.append(s + v)
        return torch.stack(out)


class Scaled(Whole):
    """The first step scales its input."""

    def over_time(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            v = 0.3 * x[t] if v is None else 0.5 * v + x[t]
            v = v - spike(v - 0.5)
            out.append(v)
        return torch.stack(out)


class Learned(Whole):
    """Multiplies its state by a parameter."""

    def over_time(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            v = x[t] if v is None else self.decay * v + x[t]
            v = v - spike(v - 0.5)
            out.append(v)
        return torch.stack(out)


class Shifted(Whole):
    """The first potential is one, the later ones leak to zero."""

    def over_time(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            v = x[t] + 1 if v is None else 0.5 * v + x[t]
            v = v - spike(v - 0.5)
            out.append(v)
        return torch.stack(out)


@pytest.mark.parametrize("style", [Updated, StartsAsNone, Enumerated])
def test_the_first_iteration_belongs_to_the_kernel(style: type[nn.Module]) -> None:
    net = assert_converts_sequence(style(), (sequence(6, 3, 6),), [(sequence(6, 2, 6),)])
    (loop,) = net.loops
    x = sequence(7, 3, 4)
    outputs, _ = loop.run_iterations(7, [x], {})
    assert outputs[0].shape[0] == 7
    kernels = [getattr(m, "kernels", None) for m in loop.region_modules().values()]
    assert all(k is None or k.in_use is not None for k in kernels)
    assert len(loop.program.input_nodes()) == 1  # no value of the first iteration


@pytest.mark.parametrize("style", [Recurrent, Scaled, Learned, Shifted])
def test_other_first_iterations_equal_the_own_call(style: type[nn.Module]) -> None:
    assert_converts_sequence(style(), (sequence(6, 3, 6),), [(sequence(9, 2, 6),)])


@pytest.mark.parametrize("style", [StartsAsNone, Recurrent, Scaled, Learned, Shifted])
def test_a_single_step(style: type[nn.Module]) -> None:
    model = style().double()
    net = assert_converts_sequence(model, (sequence(6, 3, 6),))
    x = sequence(1, 3, 6)
    torch.testing.assert_close(net(x), model(x))
