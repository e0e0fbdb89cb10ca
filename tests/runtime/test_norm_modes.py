"""Normalisation layers whose own mode is not the net's: frozen, thawed, and without running statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import SnnfxWarning
from support.stepping import assert_same_run, fresh_copy, run_net, run_stepped

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
