"""Nets with passes of the user: `load(path, model, passes=...)` gives the saved net, or refuses and changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snnfx
from snnfx import neuron
from snnfx.errors import SaveError, SnnfxWarning
from snnfx.passes import Pass, StepProgram

X_SEQ = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(1)) * 3


@dataclass(frozen=True)
class ClampReLU(Pass):
    """Replace every ReLU by a clamp to [0, upper]."""

    requires: str = "normalized"
    upper: float = 0.3
    name = "relu_to_clamp"

    def apply(self, program: StepProgram) -> str:
        for node in list(program.graph.nodes):
            if isinstance(program.module_of(node), nn.ReLU) or node.target in (torch.relu, nn.functional.relu):
                with program.graph.inserting_before(node):
                    clamp = program.graph.call_function(torch.clamp, (node.args[0], 0.0, self.upper))
                node.replace_all_uses_with(clamp)
                program.graph.erase_node(node)
        return "clamped"


@dataclass(frozen=True)
class Gain(Pass):
    """Multiply the output by a parameter."""

    name = "gain"
    requires = "normalized"
    may_change = ("graph", "modules")

    def apply(self, program: StepProgram) -> str:
        program.attach("gain", nn.Parameter(torch.full((4,), 2.0)))
        [last] = program.outputs
        with program.graph.inserting_before(program.output):
            product = program.graph.call_function(torch.mul, (last, program.graph.get_attr("gain")))
        program.set_output([product], program.next_states, program.initial_values)
        return "multiplied"


@dataclass(frozen=True)
class HalveWeights(Pass):
    name = "halve"
    requires = "captured"
    may_change = ("graph", "parameters")

    def apply(self, program: StepProgram) -> str:
        with torch.no_grad():
            for parameter in program.source.parameters():
                parameter.mul_(0.5)
        return "halved"


def model(features: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 4), nn.ReLU(), neuron.LIFNode(v_threshold=0.1), nn.Linear(4, 4))


def saved(net: Any, folder: Path) -> Path:
    return snnfx.save(net, folder / "net.safetensors")


def load_again(path: Path, given: nn.Module, *passes: Pass) -> Any:
    with pytest.warns(SnnfxWarning, match="SNNFX822 .* because passes of the user made it"):
        return snnfx.load(path, given, passes=passes)


@pytest.mark.parametrize("stage", ["captured", "normalized", "partitioned", "planned"])
def test_the_pass_runs_again_at_its_stage(stage: str, tmp_path: Path) -> None:
    net = snnfx.convert(model(), passes=[ClampReLU(stage)], carry_state=True)
    net(X_SEQ)
    loaded = load_again(saved(net, tmp_path), model(), ClampReLU(stage))
    assert loaded.options == net.options and [r.kind for r in loaded.regions] == [r.kind for r in net.regions]
    assert torch.equal(loaded(X_SEQ), net(X_SEQ))


def test_a_trained_parameter_of_a_pass_keeps_its_value(tmp_path: Path) -> None:
    net = snnfx.convert(model(), passes=[Gain()])
    with torch.no_grad():
        net.source.gain.copy_(torch.tensor([1.0, -2.0, 3.0, 0.5]))
    loaded = load_again(saved(net, tmp_path), model(), Gain())
    assert torch.equal(loaded.source.gain, net.source.gain) and torch.equal(loaded(X_SEQ), net(X_SEQ))
    again = load_again(saved(loaded, tmp_path), model(), Gain())
    assert torch.equal(again(X_SEQ), net(X_SEQ))


def test_a_change_of_weights_happens_once(tmp_path: Path) -> None:
    net = snnfx.convert(model(), passes=[HalveWeights()])
    loaded = load_again(saved(net, tmp_path), model(), HalveWeights())
    assert torch.equal(loaded.source[0].weight, net.source[0].weight) and torch.equal(loaded(X_SEQ), net(X_SEQ))


@pytest.mark.parametrize(
    "passes",
    [[], [Gain()], [ClampReLU(upper=0.4), Gain()], [Gain(), ClampReLU()]],
    ids=["none", "one", "field", "order"],
)
def test_other_passes_are_refused(passes: list[Pass], tmp_path: Path) -> None:
    path = saved(snnfx.convert(model(), passes=[ClampReLU(), Gain()]), tmp_path)
    with pytest.raises(SaveError, match="SNNFX823"):
        snnfx.load(path, model(), passes=passes)


def another_width() -> nn.Module:
    return model(features=6)


def another_layer() -> nn.Module:
    return model().append(nn.BatchNorm1d(4))


def in_float64() -> nn.Module:
    return model().double()


@pytest.mark.parametrize("make", [another_width, another_layer, in_float64])
def test_another_model_is_refused_unchanged(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    path = saved(snnfx.convert(model(), passes=[Gain()]).eval(), tmp_path)
    given = make()
    before, modules = copy.deepcopy(given.state_dict()), [*given.modules()]
    with pytest.raises(SaveError, match="SNNFX821"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snnfx.load(path, given, passes=[Gain()])
    after = given.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())
    assert [*given.modules()] == modules and all(m.training for m in modules)


def test_a_failing_pass_leaves_the_model_unchanged(tmp_path: Path) -> None:
    path = saved(snnfx.convert(model(), passes=[ClampReLU()]).eval(), tmp_path)

    class Failing(ClampReLU):
        def apply(self, program: StepProgram) -> str:
            raise ValueError("not today")

    given = model()
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(snnfx.errors.PassError, match="SNNFX703"), pytest.warns(SnnfxWarning, match="SNNFX822"):
        snnfx.load(path, given, passes=[Failing()])
    assert all(torch.equal(v, before[k]) for k, v in given.state_dict().items()) and given.training
