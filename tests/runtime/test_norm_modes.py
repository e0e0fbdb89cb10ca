"""Normalisation layers whose own mode is not the net's: frozen, thawed, and without running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import snnfx
from snnfx import neuron
from snnfx.errors import SnnfxWarning
from snnfx.functional import reset_net
from support.stepping import Run, assert_same_run, finish_run, fresh_copy, run_net, run_stepped, step_model

pytestmark = pytest.mark.filterwarnings("ignore:SNNFX315", "ignore:SNNFX504")

NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "BatchNorm, mean of all": lambda: nn.BatchNorm1d(4, momentum=None),
    "BatchNorm, no running statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "InstanceNorm": lambda: nn.InstanceNorm1d(4),
    "InstanceNorm, running statistics": lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
}
X_SEQ = torch.randn(5, 6, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Model(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv1d(3, 4, 1), norm, nn.Conv1d(4, 2, 1)
        self.lif = neuron.LIFNode(v_threshold=0.3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lif(self.norm(self.conv(x))))


def model_of(name: str) -> Model:
    torch.manual_seed(0)
    return Model(NORMS[name]())


def set_modes(model: Model, training: bool, norm_in_training: bool) -> None:
    model.train(training)
    model.norm.train(norm_in_training)


@pytest.mark.parametrize("then", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("at_first", [(True, True), (True, False), (False, False)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_per_step_is_the_stepped_model_whatever_the_layers_own_mode(
    name: str, at_first: tuple[bool, bool], then: tuple[bool, bool]
) -> None:
    model = model_of(name)
    set_modes(model, *at_first)
    net = snnfx.convert(model, batch_norm="per_step", example_inputs=(X_SEQ[0],))
    net.train(then[0])
    set_modes(model, *then)
    stepped = fresh_copy(model)
    assert_same_run(run_net(net, X_SEQ), run_stepped(stepped, X_SEQ))


@pytest.mark.parametrize("name", NORMS)
def test_a_frozen_layer_is_the_stepped_one_with_folded_statistics_too(name: str) -> None:
    model = model_of(name)
    set_modes(model, True, False)
    net = snnfx.convert(model, example_inputs=(X_SEQ[0],))
    assert_same_run(run_net(net, X_SEQ), run_stepped(fresh_copy(model), X_SEQ))


def kinds(net: snnfx.Net) -> list[str]:
    return [region.kind for region in net.regions]


def test_a_frozen_batch_norm_is_folded_and_a_thawed_one_is_not() -> None:
    model = model_of("BatchNorm")
    set_modes(model, True, False)
    net = snnfx.convert(model, batch_norm="per_step")
    assert kinds(net) == ["fold", "loop", "fold"]
    model.norm.train()
    net(X_SEQ)
    assert kinds(net) == ["fold", "map", "loop", "fold"]


def test_freezing_again_after_each_evaluation_captures_nothing_again() -> None:
    model = model_of("BatchNorm")
    set_modes(model, True, False)
    net = snnfx.convert(model, batch_norm="per_step")
    program = net.program
    with warnings.catch_warnings():
        warnings.simplefilter("error", SnnfxWarning)
        for _ in range(2):
            net.eval()
            net(X_SEQ)
            net.train()
            model.norm.eval()
            net(X_SEQ)
    assert net.program is program


def test_one_program_for_both_modes_when_the_layer_makes_no_difference() -> None:
    net = snnfx.convert(model_of("BatchNorm"), lower=None)
    assert net.programs[True] is net.programs[False]
    net = snnfx.convert(model_of("BatchNorm, no running statistics"), lower=None)
    assert net.programs[True] is not net.programs[False]


class Unread(Model):
    """A layer whose result nothing reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.norm(y)
        return self.out(self.lif(y))


class ReadByState(snnfx.MemoryModule):
    """A layer whose result only the state after the last step contains."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 1), norm
        self.register_memory("latest", 0.0)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.latest = self.norm(y)
        return y


class OfConstant(Model):
    """A layer of an input that is the same at every step."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.ones_like(self.conv.bias).view(1, 4, 1).expand(2, 4, 3))
        return self.out(self.lif(self.conv(x))) + y.mean()


class Twice(Model):
    """A layer that is called twice in a step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lif(self.norm(self.norm(self.conv(x)) * 2 + 1)))


class TwiceOnCycle(snnfx.MemoryModule):
    """A layer that is called twice in a step, on a cycle with a neuron whose initial value needs the second call."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.lif = nn.Conv1d(3, 4, 1), norm, neuron.LIFNode(v_threshold=0.3)
        self.register_memory("h", 0.3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.h
        first = self.norm(y)
        self.h = self.h * 0.8 + 0.2 * self.lif(self.norm(y * 0.5) + first)
        return self.h


UPDATING: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm": NORMS["BatchNorm"],
    "InstanceNorm": NORMS["InstanceNorm, running statistics"],
    "layers": lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv1d(4, 4, 1)),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Conv1d(4, 4, 1)),
}


def of_seed(kind: Callable[[nn.Module], nn.Module], name: str) -> nn.Module:
    """A model in evaluation mode; copy.deepcopy refuses the hook of spectral normalisation."""
    torch.manual_seed(0)
    return kind(UPDATING[name]()).eval()


def run_in_place(model: nn.Module) -> Run:
    """Step a model itself from its reset state."""
    reset_net(model)
    model.zero_grad()
    given = X_SEQ.clone().requires_grad_()
    return finish_run(model, [given], step_model(model, given))


@pytest.mark.parametrize("thawed", ["before conversion", "after it", "after a call"])
@pytest.mark.parametrize("name", UPDATING)
@pytest.mark.parametrize("kind", [Unread, ReadByState, OfConstant, Twice, TwiceOnCycle, Model])
def test_a_layer_in_training_mode_updates_its_buffers_in_evaluation(
    kind: Callable[[nn.Module], nn.Module], name: str, thawed: str
) -> None:
    model, twin = (of_seed(kind, name) for _ in range(2))
    if thawed == "before conversion":
        model.norm.train()
    net = snnfx.convert(model, batch_norm="per_step", example_inputs=(X_SEQ[0],))
    if thawed == "after a call":
        assert_same_run(run_net(net, X_SEQ), run_in_place(twin))
    for training in (True, True, True, False):
        model.norm.train(training)
        twin.norm.train(training)
        assert_same_run(run_net(net, X_SEQ), run_in_place(twin))


@pytest.mark.parametrize("name", ["InstanceNorm", "spectral norm", "spectral norm by a hook"])
def test_folded_statistics_leave_other_updates_of_an_evaluated_model_per_step(name: str) -> None:
    model, twin = (of_seed(Unread, name) for _ in range(2))
    net = snnfx.convert(model, example_inputs=(X_SEQ[0],))
    model.norm.train()
    twin.norm.train()
    assert_same_run(run_net(net, X_SEQ), run_in_place(twin))


def test_an_unread_batch_norm_of_an_evaluated_model_takes_one_update_with_folded_statistics() -> None:
    model = Unread(NORMS["BatchNorm"]()).eval()
    net = snnfx.convert(model, example_inputs=(X_SEQ[0],))
    model.norm.train()
    expected = fresh_copy(model)
    expected.norm(expected.conv(X_SEQ.flatten(0, 1)))
    net(X_SEQ)
    torch.testing.assert_close(model.norm.state_dict(), expected.norm.state_dict())


def test_a_layer_in_evaluation_mode_that_nothing_reads_is_removed() -> None:
    net = snnfx.convert(Unread(NORMS["BatchNorm"]()).eval(), example_inputs=(X_SEQ[0],))
    assert all(node.target != "norm" for node in net.program.graph.nodes)
