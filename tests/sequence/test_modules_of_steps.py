"""Norms, layers and parameters of each step: the modules run between loops, and the neurons keep their kernels."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.errors import InputError
from support.looped_models import Cell, assert_converts_sequence, spike

STEPS = 5


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class StepNorm(nn.Module):
    """Chooses one of its norms by the number of the step."""

    def __init__(self, features: int, **options: object) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({f"t{t}": nn.BatchNorm1d(features, **options) for t in range(STEPS)})  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: int) -> Tensor:
        return self.norms[f"t{t}"](x)


class Block(nn.Module):
    """A layer, a norm and a non-linearity of one step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.fc(x)))


class Looped(nn.Module):
    """Two layers over time; `kind` selects what a step owns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.fc, self.rec, self.out = kind, nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.cell, self.cell2 = Cell(), Cell()
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(STEPS))
        self.layers = nn.ModuleList(nn.ModuleList(nn.BatchNorm1d(4) for _ in range(STEPS)) for _ in range(2))
        self.step_norm, self.plain = StepNorm(4), StepNorm(4, affine=False, momentum=None)
        self.blocks = nn.ModuleList(Block() for _ in range(STEPS))
        self.linears = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(STEPS))
        self.thresholds = nn.ParameterList(nn.Parameter(torch.rand(4) + 0.5) for _ in range(STEPS))
        self.scale = nn.Parameter(torch.rand(STEPS, 4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(x)

    def norm_of_list(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.norms[t](self.fc(x[t])), v)
            out.append(s)
        return torch.stack(out)

    def zipped(self, x: Tensor) -> Tensor:
        v, out = None, []
        for x_t, norm in zip(x, self.norms, strict=False):
            s, v = self.cell(norm(self.fc(x_t)), v)
            out.append(s)
        return torch.stack(out)

    def two_layers(self, x: Tensor) -> Tensor:
        v = w = None
        total = 0
        for t in range(STEPS):
            s, v = self.cell(self.layers[0][t](self.fc(x[t])), v)  # type: ignore[index]
            s, w = self.cell2(self.layers[1][t](self.rec(s)), w)  # type: ignore[index]
            total = total + self.out(s)
        return total / STEPS

    def by_module(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = torch.zeros(STEPS, x.shape[1], 4, dtype=x.dtype)
        for t in range(STEPS):
            v = 0.8 * v + self.plain(self.step_norm(self.fc(x[t]), t), t)
            s = spike(v - 1)
            v = v * (1 - s)
            out[t] = s
        return out

    def blocks_of_steps(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(STEPS):
            s, v = self.cell(self.blocks[t](self.fc(x[t])), v)
            out.append(s)
        return torch.stack(out, 1)

    def shared_by_steps(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(STEPS):
            s, v = self.cell(self.norms[t % 2](self.fc(x[t])), v)
            out.append(s)
        return torch.stack(out)

    def layer_and_threshold(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = []
        for t in range(STEPS):
            v = 0.8 * v + self.linears[t](self.fc(x[t])) * self.scale[t]
            s = spike(v - self.thresholds[t])
            v = v - s * self.thresholds[t]
            out.append(s)
        return torch.stack(out)

    def static_input(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        total = 0
        for t in range(STEPS):
            v = 0.95 * v + self.norms[t](self.fc(x[0]))
            s = spike(v - 1)
            v = v - s
            total = total + self.out(s)
        return total / STEPS

    def in_recurrence(self, x: Tensor) -> Tensor:
        s = v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = []
        for t in range(STEPS):
            v = 0.8 * v + self.norms[t](self.fc(x[t]) + self.rec(s))
            s = spike(v - 1)
            v = v - s
            out.append(s)
        return torch.stack(out)

    def updated_in_turn(self, x: Tensor) -> Tensor:
        v = w = None
        out = []
        for t in range(STEPS):
            s, v = self.cell(self.norms[t](self.fc(x[t])), v)
            s, w = self.cell2(self.norms[(t + 1) % STEPS](self.rec(s)), w)
            out.append(s)
        return torch.stack(out)


BETWEEN_LOOPS = (
    "norm_of_list zipped two_layers by_module blocks_of_steps shared_by_steps layer_and_threshold static_input"
).split()
UNROLLED = "in_recurrence updated_in_turn".split()


@pytest.mark.parametrize("kind", [*BETWEEN_LOOPS, *UNROLLED])
def test_outputs_gradients_and_buffers_are_those_of_the_own_call(kind: str) -> None:
    assert_converts_sequence(Looped(kind), (sequence(STEPS, 3, 6),), [(sequence(STEPS, 2, 6),)])


@pytest.mark.parametrize("kind", BETWEEN_LOOPS)
def test_the_neurons_run_in_loops_over_time(kind: str) -> None:
    net = snnfx.convert(Looped(kind).double(), takes="sequence", example_inputs=(sequence(STEPS, 3, 6),))
    assert any(region.kind == "loop" for loop in net.loops for region in loop.regions)


@pytest.mark.parametrize("kind", ["norm_of_list", "zipped"])
def test_another_number_of_steps_is_refused(kind: str) -> None:
    net = snnfx.convert(Looped(kind).double(), takes="sequence", example_inputs=(sequence(STEPS, 3, 6),))
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(STEPS - 1, 3, 6))


@pytest.mark.parametrize(("kind", "reason"), [("in_recurrence", "through a state"), ("updated_in_turn", "buffers")])
def test_explain_says_why_a_loop_stays_unrolled(kind: str, reason: str) -> None:
    net = snnfx.convert(Looped(kind).double(), takes="sequence", example_inputs=(sequence(STEPS, 3, 6),))
    text = " ".join(str(snnfx.explain(net)).split())
    assert "stays unrolled" in text and reason in text and "test_modules_of_steps.py" in text


def test_hooks_of_a_norm_of_one_step_run() -> None:
    model, x = Looped("norm_of_list").double(), sequence(STEPS, 3, 6)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    seen: list[Tensor] = []
    model.norms[2].register_forward_hook(lambda module, args, y: seen.append(y))
    net(x)
    assert len(seen) == 1


def test_copies_verification_and_pictures_of_loops_with_modules_between() -> None:
    model, x = Looped("two_layers").double(), sequence(STEPS, 3, 6)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    assert net.state_dict().keys() == model.state_dict().keys()
    assert "own call" in str(snnfx.verify(model, net, x))
    assert str(snnfx.draw(net)).count("loop over time") >= 2
    net.eval()
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(clone(x), net(x))


class Convolutional(nn.Module):
    """Batch norm through time: norms without bias, an image at every step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm1 = nn.ModuleList(nn.BatchNorm2d(4, eps=1e-4) for _ in range(STEPS))
        self.norm2 = nn.ModuleList(nn.BatchNorm2d(4, eps=1e-4) for _ in range(STEPS))
        self.fc = nn.Linear(64, 3, bias=False)
        for norm in (*self.norm1, *self.norm2):
            norm.bias = None  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        v1 = v2 = torch.zeros(x.shape[0], 4, 8, 8, dtype=x.dtype)
        out = torch.zeros(x.shape[0], 3, dtype=x.dtype)
        for t in range(STEPS):
            v1 = 0.95 * v1 + self.norm1[t](self.conv1(x))
            s = spike(v1 - 1)
            v1 = v1 - s
            v2 = 0.95 * v2 + self.norm2[t](self.conv2(s))
            s = spike(v2 - 1)
            v2 = v2 - s
            out = out + self.fc(F.avg_pool2d(s, 2).flatten(1))
        return out / STEPS


def test_a_convolutional_network_with_norms_of_each_step() -> None:
    net = assert_converts_sequence(Convolutional(), (sequence(3, 2, 8, 8),), [(sequence(2, 2, 8, 8),)])
    assert "once" in {region.kind for region in net.loops[0].regions}
    assert sum(region.kind == "loop" for loop in net.loops for region in loop.regions) == 3


def test_iterations_without_a_common_operation_stay_as_they_are() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.even, self.odd = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y, out = self.even(x[0]), []
            for t in range(x.shape[0]):
                y = torch.relu(self.even(x[t]) + y) if t % 2 == 0 else torch.tanh(y) * self.odd(x[t])
                out.append(y)
            return torch.stack(out)

    model, x = Alternating().double(), torch.randn(5, 2, 3, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    assert torch.equal(net(x), model(x))
    with pytest.raises(snnfx.errors.InputError, match="SNNFX312"):
        net(torch.randn(7, 2, 3, dtype=torch.float64))
