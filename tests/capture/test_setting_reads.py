"""Settings: plain Python values of the model (`self.tau`, `if self.flag`) that change after conversion."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError, SnnfxWarning
from support.stepping import fresh_copy, step_model

X_SEQ = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@dataclass
class Settings:
    threshold: float = 0.5
    sizes: list[int] = field(default_factory=lambda: [2, 3])


class Neuron(snnfx.MemoryModule):
    """A leaky integrator written by a user; its forward is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.tau = 2.0
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v + (x - self.v) / self.tau
        return self.v


class Model(nn.Module):
    scale = 1.0  # of the class

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4, dtype=torch.float64)
        self.neuron = Neuron()
        self.lif = neuron.LIFNode(tau=2.0)
        self.flag = False
        self.mode = "plain"
        self.settings = Settings()
        self.more = SimpleNamespace(gain=1.0)
        self.weights = {"skip": 0.0}
        self.unread = 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.neuron(self.fc(x)) * self.scale
        if self.flag:
            y = y + 1
        if self.mode == "squared":
            y = y * y
        y = y - self.settings.threshold * self.settings.sizes[0]
        return y * self.more.gain + self.weights["skip"] + self.lif(y + 2)


CHANGES = {
    "a number of a submodule": lambda m: setattr(m.neuron, "tau", 3.0),
    "a flag": lambda m: setattr(m, "flag", True),
    "a string": lambda m: setattr(m, "mode", "squared"),
    "an attribute of the class, hidden by one of the instance": lambda m: setattr(m, "scale", 2.0),
    "a field of a dataclass": lambda m: setattr(m.settings, "threshold", 0.1),
    "a list in a dataclass": lambda m: m.settings.sizes.__setitem__(0, 5),
    "a namespace": lambda m: setattr(m.more, "gain", 0.5),
    "a dict": lambda m: m.weights.update(skip=1.5),
    "a type": lambda m: setattr(m, "scale", torch.tensor(0.5)),
    "a setting of a neuron that is one call": lambda m: setattr(m.lif, "v_threshold", 0.2),
}


@pytest.fixture(autouse=True)
def warnings_of_changes() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SNNFX315", SnnfxWarning)
        yield


def assert_follows(net: Any, model: nn.Module) -> None:
    torch.testing.assert_close(net(X_SEQ), step_model(fresh_copy(model), X_SEQ), atol=1e-12, rtol=0)


@pytest.mark.parametrize("examples", [None, (X_SEQ[0],)], ids=["without examples", "with examples"])
@pytest.mark.parametrize("what", CHANGES)
def test_the_net_follows_a_change_of(what: str, examples: Any) -> None:
    model = Model()
    net = snnfx.convert(model, example_inputs=examples)
    before = net(X_SEQ)
    CHANGES[what](model)
    assert_follows(net, model)
    assert not torch.equal(net(X_SEQ), before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_net_follows_changes_of_its_own_model_only(clone: Any) -> None:
    model = Model()
    net = snnfx.convert(model)
    before = net(X_SEQ)
    other = clone(net)
    other.source.neuron.tau = 4.0
    assert_follows(other, other.source)
    assert torch.equal(net(X_SEQ), before)


def test_a_change_warns_once_with_both_values() -> None:
    model = Model()
    net = snnfx.convert(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tau in (3.0, 4.0, 5.0):
            model.neuron.tau = tau
            net(X_SEQ)
    messages = [str(w.message) for w in caught if "SNNFX315" in str(w.message)]
    assert len(messages) == 1
    assert "`neuron.tau` is 3.0" in messages[0] and "captured with 2.0" in messages[0]


def test_the_graph_shows_the_new_value() -> None:
    model = Model()
    net = snnfx.convert(model)
    model.neuron.tau = 7.25
    net(X_SEQ)
    assert "7.25" in str(net.program)


def test_attributes_that_no_step_reads_may_change() -> None:
    model = Model()
    net = snnfx.convert(model)
    program = net.program
    model.unread = 4
    net(X_SEQ)
    assert net.program is program


def test_state_is_not_a_setting() -> None:
    model = Model()
    net = snnfx.convert(model)
    program = net.program
    model(X_SEQ[0])  # leaves a potential in the user's neuron
    net(X_SEQ)
    assert net.program is program
    assert {r.qualified_name for r in program.setting_reads} == {
        "neuron.tau",
        "scale",
        "flag",
        "mode",
        "settings",
        "more",
        "weights",
    }


def test_a_run_in_single_steps_follows() -> None:
    model = Model()
    net = snnfx.convert(model, step_mode="s")
    net(X_SEQ[0])
    net.reset_carried_state()
    model.neuron.tau = 3.0
    torch.testing.assert_close(torch.stack([net(x) for x in X_SEQ]), step_model(fresh_copy(model), X_SEQ))


def test_carried_state_survives_a_change() -> None:
    model = Model()
    net = snnfx.convert(model)
    stepped = fresh_copy(model)
    first, state = net.run(X_SEQ[:2])
    expected = [stepped(x) for x in X_SEQ[:2]]
    model.neuron.tau = stepped.neuron.tau = 3.0
    second, _ = net.run(X_SEQ[2:], state=state)
    expected += [stepped(x) for x in X_SEQ[2:]]
    torch.testing.assert_close(torch.cat([first, second]), torch.stack(expected))


def test_the_other_mode_follows_too() -> None:
    model = Model()
    net = snnfx.convert(model)
    net(X_SEQ)
    model.neuron.tau = 3.0
    net.eval()
    assert_follows(net, model)
    net.train()
    assert_follows(net, model)


def test_a_replaced_graph_is_preserved() -> None:
    model = Model()
    net = snnfx.convert(model)
    net.graph = net.graph
    model.neuron.tau = 3.0
    with pytest.raises(InputError, match="replaced by hand") as raised:
        net(X_SEQ)
    assert raised.value.code == "SNNFX315"


def test_a_compiled_net_uses_the_new_value() -> None:
    model = Model()
    net = snnfx.convert(model)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X_SEQ), net(X_SEQ))
    model.neuron.tau = 3.0
    assert_follows(compiled, model)  # captures the model again
    assert_follows(net, model)
    model.neuron.tau = 2.0
    assert_follows(compiled, model)


def test_a_compiled_net_that_is_not_one_operator_refuses_a_new_value_once() -> None:
    model = Model()
    model.fc.register_forward_hook(lambda module, given, result: None)
    net = snnfx.convert(model)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X_SEQ), net(X_SEQ))
    model.neuron.tau = 3.0
    with pytest.raises(torch._dynamo.exc.Unsupported, match="SNNFX315"):
        compiled(X_SEQ)
    assert_follows(net, model)  # captures the model again
    assert_follows(compiled, model)
    model.neuron.tau = 2.0
    assert_follows(net, model)
    assert_follows(compiled, model)


def test_partially_compiled_code_follows_automatically() -> None:
    model = Model()
    net = snnfx.convert(model)
    compiled = torch.compile(net, backend="eager")
    compiled(X_SEQ)
    model.neuron.tau = 3.0
    assert_follows(compiled, model)


def test_a_compiled_net_reads_the_settings_of_neurons() -> None:
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), neuron.LIFNode(tau=2.0, v_threshold=0.3))
    net = snnfx.convert(model)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    compiled(X_SEQ)
    model[1].tau = 1.5
    assert_follows(compiled, model)
