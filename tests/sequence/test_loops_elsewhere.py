"""Loops over a static input, over other dimensions, in neuron classes, and around neurons of libraries."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import VerificationError
from support.looped_models import Cell, TwoLayers, assert_converts_sequence, spike
from support.stepping import assert_same


def sequence(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64)


class StaticInput(nn.Module):
    """The same image in each of a fixed number of iterations."""

    def __init__(self, steps: int = 6) -> None:
        super().__init__()
        self.steps = steps
        self.fc1, self.cell1, self.fc2, self.cell2 = nn.Linear(6, 8), Cell(), nn.Linear(8, 3), Cell()

    def forward(self, x: Tensor) -> Tensor:
        v1 = v2 = None
        total = 0.0
        for _ in range(self.steps):
            s, v1 = self.cell1(self.fc1(x), v1)
            s, v2 = self.cell2(self.fc2(s), v2)
            total += s
        return total / self.steps


def test_static_input_with_a_fixed_number_of_steps() -> None:
    net = assert_converts_sequence(StaticInput(), (sequence(5, 6),), [(sequence(3, 6),)])
    assert net.loops[0].regions[0].kind == "once"


class Spytorch(nn.Module):
    """Explicit tensors, time in dimension 1, the product in front of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, steps = x.shape[0], x.shape[1]
        h1 = torch.einsum("abc,cd->abd", (x, self.w1))
        syn = torch.zeros((batch, 8), device=x.device, dtype=x.dtype)
        mem = torch.zeros((batch, 8), device=x.device, dtype=x.dtype)
        spikes = []
        for t in range(steps):
            out = spike(mem - 1.0)
            rst = out.detach()
            syn = 0.7 * syn + h1[:, t]
            mem = (0.8 * mem + syn) * (1.0 - rst)
            spikes.append(out)
        s1 = torch.stack(spikes, dim=1)
        h2 = torch.einsum("abc,cd->abd", (s1, self.w2))
        flt = torch.zeros((batch, 3), device=x.device, dtype=x.dtype)
        out = torch.zeros((batch, 3), device=x.device, dtype=x.dtype)
        rec = [out]
        for t in range(steps):
            flt = 0.7 * flt + h2[:, t]
            out = 0.8 * out + flt
            rec.append(out)
        return torch.stack(rec, dim=1), s1


def test_explicit_tensors_with_time_in_dimension_1() -> None:
    net = assert_converts_sequence(Spytorch(), (sequence(5, 7, 6),), [(sequence(3, 12, 6),), (sequence(3, 2, 6),)])
    assert len(net.loops) == 2


class LoopingNeuron(nn.Module):
    """A neuron whose forward loops over time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        mem, out = 0, []
        for t in range(x.shape[self.dim]):
            mem = mem * 0.5 + x.select(self.dim, t)
            s = spike(mem - 1.0)
            mem = (1 - s) * mem
            out.append(s)
        return torch.stack(out, dim=self.dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_loops_inside_neurons_layer_by_layer(dim: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), LoopingNeuron(dim), nn.Linear(8, 4), LoopingNeuron(dim), nn.Linear(4, 3))
    shapes = [(7, 5, 6), (3, 2, 6)] if dim == 0 else [(5, 7, 6), (2, 3, 6)]
    net = assert_converts_sequence(model, (sequence(*shapes[0]),), [(sequence(*shapes[1]),)])
    assert sum(region.kind == "loop" for region in net.regions) == 2


class WithNormsInLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn, self.cell = nn.Linear(6, 4), nn.BatchNorm1d(4), Cell()

    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for x_t in x:
            s, v = self.cell(self.bn(self.fc(x_t)), v)
            out.append(s)
        return torch.stack(out)


def test_batch_norm_inside_the_loop_takes_statistics_of_each_step() -> None:
    assert_converts_sequence(WithNormsInLoop(), (sequence(7, 5, 6),), [(sequence(3, 4, 6),)])


class WithMemoryModules(nn.Module):
    """Neurons that keep their state; `resets` before the loop or not at all."""

    def __init__(self, resets: bool) -> None:
        super().__init__()
        self.resets = resets
        self.fc1, self.lif1 = nn.Linear(6, 8), snnfx.neuron.LIFNode(tau=2.0)
        self.fc2, self.lif2 = nn.Linear(8, 3), snnfx.neuron.LIFNode(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.resets:
            snnfx.functional.reset_net(self)
        out = []
        for t in range(x.shape[0]):
            out.append(self.lif2(self.fc2(self.lif1(self.fc1(3 * x[t])))))
        return torch.stack(out)


@pytest.mark.parametrize("resets", [False, True])
def test_neurons_that_keep_their_state(resets: bool) -> None:
    assert_converts_sequence(WithMemoryModules(resets), (sequence(7, 5, 6),), [(sequence(3, 2, 6),)])


def test_each_call_starts_from_the_reset_state_unless_it_is_carried() -> None:
    model, x = WithMemoryModules(False).double(), sequence(8, 5, 6)
    whole = copy.deepcopy(model)(x)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    assert_same(net(x), whole)
    assert_same(net(x), whole)
    carrying = snnfx.convert(model, takes="sequence", example_inputs=(x,), carry_state=True)
    assert_same(torch.cat([carrying(x[:3]), carrying(x[3:])]), whole.detach())
    snnfx.functional.reset_net(carrying)
    assert_same(carrying(x), whole)


@pytest.mark.parametrize("model", [TwoLayers(), WithMemoryModules(True), StaticInput()], ids=lambda m: type(m).__name__)
def test_copies_and_pickles_run_alike(model: nn.Module) -> None:
    x = sequence(7, 5, 6)
    net = snnfx.convert(model.double(), takes="sequence", example_inputs=(x,))
    expected = net(x)
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same(clone(x), expected)
        assert clone.state_dict().keys() == net.state_dict().keys()
    assert net.state_dict().keys() == model.state_dict().keys()


def test_capture_does_not_grow_with_the_length() -> None:
    x = sequence(2000, 2, 6)
    net = snnfx.convert(TwoLayers().double(), takes="sequence", example_inputs=(x,))
    assert len(net.program.graph.nodes) < 60


class PerStep(nn.Module):
    """A parameter and a number of its own for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.cell, self.scale = nn.Linear(6, 4), Cell(), nn.Parameter(torch.rand(9, 4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.scale[t] * self.fc(x[t]), v)
            out.append(s)
        return torch.stack(out)


def test_a_parameter_for_each_step() -> None:
    assert_converts_sequence(PerStep(), (sequence(9, 5, 6),), [(sequence(9, 2, 6),)])


@pytest.mark.parametrize(
    "model",
    [TwoLayers(), WithNormsInLoop(), LoopingNeuron(0), WithMemoryModules(False)],
    ids=lambda m: type(m).__name__,
)
def test_verify_compares_with_the_own_call_of_the_model(model: nn.Module) -> None:
    x = sequence(7, 5, 6)
    net = snnfx.convert(model.double(), takes="sequence", example_inputs=(x,))
    assert "own call" in str(snnfx.verify(model, net, x))
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.add_(0.5)
    if list(model.parameters()):
        with pytest.raises(VerificationError, match="SNNFX40"):
            snnfx.verify(other, net, x)


class WithBias(nn.Module):
    """A value from outside the loop whose size happens to be the batch size of the example."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.cell, self.bias = nn.Linear(6, 4), Cell(), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias + x.mean()
        v, out = None, []
        for x_t in x:
            s, v = self.cell(self.fc(x_t) + bias, v)
            out.append(s)
        return torch.stack(out)


@pytest.mark.filterwarnings("ignore:SNNFX102")
def test_a_feature_size_equal_to_the_batch_of_the_example() -> None:
    assert_converts_sequence(WithBias(), (sequence(7, 4, 6),), [(sequence(3, 2, 6),)])
