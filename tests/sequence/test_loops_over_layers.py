"""Python loops over layers, heads and scales, inside and around loops over time, are no loops over time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.looped_models import Cell, assert_converts_sequence


def sequence(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Norm(nn.BatchNorm1d):
    """A subclass that calls its base class on merged dimensions."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2)).view_as(input)


class FunctionalNorm(nn.BatchNorm1d):
    """A subclass that calls the function."""

    def forward(self, input: Tensor) -> Tensor:
        settings = self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        return nn.functional.batch_norm(input.flatten(0, -2), *settings).view_as(input)


class AveragingNorm(nn.BatchNorm1d):
    """A subclass that assigns its running mean."""

    def forward(self, input: Tensor) -> Tensor:
        mean = input.flatten(0, -2).mean(0)
        if self.training:
            self.running_mean = 0.9 * self.running_mean + 0.1 * mean.detach()  # type: ignore[operator]
        return input - (mean if self.training else self.running_mean)  # type: ignore[operator]


class Plain(nn.BatchNorm1d):
    pass


NORMS = (Norm, FunctionalNorm, AveragingNorm)


class Neuron(nn.Module):
    """Loops over the time steps of its input, or over a fixed number of them."""

    def __init__(self, T: int | None = None) -> None:
        super().__init__()
        self.T, self.cell = T, Cell()

    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(self.T or x.shape[0]):
            s, v = self.cell(x[t], v)
            out.append(s)
        return torch.stack(out)


class Layers(nn.Module):
    def __init__(self, norm: type[nn.Module], T: int | None = None) -> None:
        super().__init__()
        self.norms, self.fc = nn.ModuleList(norm(8) for _ in range(4)), nn.Linear(8, 8)
        self.neuron = Neuron(T)


class NormsAlone(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x)
        return self.fc(x)


class NormsBeforeNeurons(Layers):
    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = norm(x)
        return self.neuron(x)


class Blocks(nn.Module):
    """Equal blocks with neurons that run over time themselves."""

    def __init__(self, norm: type[nn.Module], T: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), norm(8), Neuron(T)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class BlocksWithoutNeurons(nn.Module):
    def __init__(self, norm: type[nn.Module], T: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 8), norm(8)]) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for fc, norm in self.blocks:  # type: ignore[misc]
            x = x + torch.tanh(norm(fc(x)))  # type: ignore[has-type]
        return x


class Heads(Layers):
    """Attention inside each step, head by head, and a neuron for each head."""

    def forward(self, x: Tensor) -> Tensor:
        q, out = self.fc(x), []
        for head in range(4):
            part = q[..., 2 * head : 2 * head + 2]
            out.append(self.neuron(torch.softmax(part @ part.transpose(-1, -2), -1) @ part * 3))
        return self.norms[0](torch.cat(out, -1))


class Scales(Layers):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for scale, norm in enumerate(self.norms):
            total = total + norm(self.fc(x * 0.5**scale))
        return self.neuron(total)


class ScalesAroundTime(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.neuron(norm(x * (scale + 1))) for scale, norm in enumerate(self.norms)]).sum(0)


class LayersInsideTime(Layers):
    """All layers at each step, with a list of potentials."""

    def forward(self, x: Tensor) -> Tensor:
        cell, states, out = self.neuron.cell, [None] * len(self.norms), []
        for t in range(self.neuron.T or x.shape[0]):
            h = x[t]
            for i, norm in enumerate(self.norms):
                h, states[i] = cell(norm(2 * h), states[i])
            out.append(h)
        return torch.stack(out)


STYLES = (NormsAlone, NormsBeforeNeurons, Blocks, BlocksWithoutNeurons, Heads, Scales, ScalesAroundTime)


@pytest.mark.parametrize(("norm", "T"), [(Norm, None), (FunctionalNorm, 5)], ids=["any T", "fixed T"])
@pytest.mark.parametrize("style", STYLES, ids=lambda c: c.__name__)
def test_outputs_gradients_and_buffers(style: type[nn.Module], norm: type[nn.Module], T: int | None) -> None:
    torch.manual_seed(0)
    others = [(sequence(3, 6, 8),)] if T is None and style not in (NormsAlone, BlocksWithoutNeurons) else []
    assert_converts_sequence(style(norm, T), (sequence(5, 7, 8),), others)


@pytest.mark.parametrize("norm", [*NORMS, Plain], ids=lambda c: c.__name__)
def test_layers_inside_a_loop_over_time(norm: type[nn.Module]) -> None:
    net = assert_converts_sequence(LayersInsideTime(norm, 5), (sequence(5, 7, 8),))
    (loop,) = net.loops
    assert sum(not slot.persistent for slot in loop.program.slots) == 4


@pytest.mark.parametrize("norm", [*NORMS, nn.BatchNorm1d, Plain], ids=lambda c: c.__name__)
def test_only_loops_over_time_are_rolled(norm: type[nn.Module]) -> None:
    for style in (NormsAlone, BlocksWithoutNeurons):
        net = assert_converts_sequence(style(norm), (sequence(7, 8),))
        assert not net.loops


def test_the_neurons_of_each_head_and_block_are_rolled() -> None:
    for style in (Heads, Blocks):
        net = snnfx.convert(style(Norm, 5).double(), takes="sequence", example_inputs=(sequence(5, 7, 8),))
        assert len(net.loops) == 4


class NormOfEachStep(Layers):
    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(4):
            s, v = self.neuron.cell(self.norms[t](x[t]), v)
            out.append(s)
        return torch.stack(out)


@pytest.mark.parametrize("norm", [*NORMS, Plain, nn.BatchNorm1d], ids=lambda c: c.__name__)
def test_a_norm_of_each_step_keeps_its_statistics(norm: type[nn.Module]) -> None:
    net = assert_converts_sequence(NormOfEachStep(norm), (sequence(4, 7, 8),))
    assert any(loop.program.slots for loop in net.loops)
