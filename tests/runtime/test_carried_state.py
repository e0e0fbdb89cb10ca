"""The state that a net with carry_state=True carries across calls: copies, resets and inference mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.functional import reset_net
from support.stepping import fresh_copy, step_model


def simple() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(tau=2.0, v_threshold=0.4)).double()


def sequence(T: int = 5, seed: int = 0) -> Tensor:
    return torch.rand((T, 3, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounds(net: Any) -> Any:
    return pickle.loads(pickle.dumps(net))


@pytest.mark.parametrize("copied", [copy.deepcopy, rounds], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_copy_carries_the_state_of_the_net(copied: Callable[[Any], Any], step_mode: str) -> None:
    model, x = simple(), sequence(10)
    expected = step_model(fresh_copy(model), x)
    net = snnfx.convert(model, step_mode, carry_state=step_mode == "m")
    for part in [x[:5]] if step_mode == "m" else x[:5]:
        net(part)
    clone = copied(net)
    torch.testing.assert_close(
        clone(x[5:]) if step_mode == "m" else clone(x[5]), expected[5:] if step_mode == "m" else expected[5]
    )
    torch.testing.assert_close(
        net(x[5:]) if step_mode == "m" else net(x[5]), expected[5:] if step_mode == "m" else expected[5]
    )
    reset_net(clone)
    first = x[:5] if step_mode == "m" else x[0]
    torch.testing.assert_close(clone(first), expected[:5] if step_mode == "m" else expected[0])
    assert net.carried_state is not None


def test_a_copy_in_its_reset_state_starts_there() -> None:
    net, x = snnfx.convert(simple(), carry_state=True), sequence()
    assert copy.deepcopy(net).carried_state is None and rounds(net).carried_state is None
    torch.testing.assert_close(copy.deepcopy(net)(x), net(x))


def reset_by_spikingjelly(net: nn.Module) -> None:
    pytest.importorskip("spikingjelly.activation_based.functional").reset_net(net)


def reset_by_children(net: nn.Module) -> None:
    for module in net.modules():
        if hasattr(module, "reset"):
            module.reset()  # type: ignore[operator]


RESETS: dict[str, Callable[[Any], None]] = {
    "snnfx": reset_net,
    "the method": lambda net: net.reset(),
    "SpikingJelly": reset_by_spikingjelly,
    "each module with a method": reset_by_children,
}


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("reset", RESETS)
def test_a_reset_reaches_the_carried_state(reset: str, step_mode: str) -> None:
    net = snnfx.convert(simple(), step_mode, carry_state=True)
    x = sequence() if step_mode == "m" else sequence()[0]
    first = net(x)
    RESETS[reset](net)
    torch.testing.assert_close(net(x), first)


def test_the_reset_of_snntorch_reaches_the_carried_state(monkeypatch: pytest.MonkeyPatch) -> None:
    snntorch = pytest.importorskip("snntorch")
    from snntorch import utils

    monkeypatch.setattr(snntorch.SpikingNeuron, "instances", [])  # it resets the neurons of other tests as well

    model = nn.Sequential(nn.Linear(4, 4), snntorch.Leaky(beta=0.9, init_hidden=True, threshold=0.4)).double()
    x, y = sequence(), sequence(seed=1)
    expected = step_model(model, torch.cat([x, y]))
    utils.reset(model)
    net = snnfx.convert(model, carry_state=True)
    for _ in range(2):
        torch.testing.assert_close(net(x), expected[:5])
        net.double()  # no reset
        torch.testing.assert_close(net(y), expected[5:])
        utils.reset(net)
    utils.reset(net)
    net(x)
    torch.testing.assert_close(net(y), expected[5:])


def test_to_is_no_reset_of_snntorch_neurons() -> None:
    snntorch = pytest.importorskip("snntorch")
    model = nn.Sequential(nn.Linear(4, 4), snntorch.Leaky(beta=0.9, init_hidden=True)).double()
    net = snnfx.convert(model, carry_state=True)
    net(sequence())
    net.float()
    assert net.carried_state is not None


class NamedReset(nn.Module):
    """A model with a child, or with a method or a number, named `reset`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lif = neuron.LIFNode(tau=2.0, v_threshold=0.4)
        if kind == "child":
            self.reset: Any = nn.Linear(4, 4)
        elif kind == "buffer":
            self.register_buffer("reset", torch.full((4,), 0.5))
        elif kind == "parameter":
            self.reset = nn.Parameter(torch.full((4,), 0.5))
        else:
            self.reset = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.reset(x) if self.kind == "child" else x * self.reset)


@pytest.mark.parametrize("kind", ["child", "buffer", "parameter", "number"])
def test_a_model_may_use_the_name_reset(kind: str) -> None:
    model, x = NamedReset(kind).double(), sequence()
    expected = step_model(fresh_copy(model), x)
    net = snnfx.convert(model, carry_state=True)
    for other in (net, copy.deepcopy(net), rounds(net)):
        torch.testing.assert_close(other(x), expected)
        reset_net(other)
        torch.testing.assert_close(other(x), expected)
        other.reset()
        torch.testing.assert_close(other(x), expected)


@pytest.mark.parametrize("carry_state", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_training_after_inference_mode(carry_state: bool, norm: bool, mode: str) -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), *([nn.BatchNorm1d(4)] if norm else []), neuron.LIFNode(tau=2.0, v_threshold=0.4)
    ).double()
    x = sequence(10)
    net = snnfx.convert(model, carry_state=carry_state)
    net.train(mode == "training")
    with torch.inference_mode():
        net(x[:5])
        net(x[:5])
    net.train()
    y = net(x[5:])
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    net(x[5:]).sum().backward()


def test_the_state_carried_from_inference_mode_is_the_state_of_the_last_step() -> None:
    model, x = simple(), sequence(10)
    expected = step_model(fresh_copy(model), x)
    net = snnfx.convert(model, carry_state=True)
    with torch.inference_mode():
        first = net(x[:5])
    second = net(x[5:])
    torch.testing.assert_close(torch.cat([first, second]), expected)


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_a_net_converted_in_inference_mode_trains(step_mode: str) -> None:
    model, x = simple(), sequence()
    with torch.inference_mode():
        net = snnfx.convert(model, step_mode, carry_state=True)
        net(x if step_mode == "m" else x[0])
    net.reset()
    y = net(x if step_mode == "m" else x[0])
    y.sum().backward()
    assert model[0].weight.grad is not None
    expected = step_model(fresh_copy(model), x)
    torch.testing.assert_close(y, expected if step_mode == "m" else expected[0])


def test_a_model_with_a_learned_initial_state_converted_in_inference_mode_trains() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.full((4,), 0.3, dtype=torch.float64))
            self.decay = torch.tensor(0.9, dtype=torch.float64)
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.v = (self.start if self.v is None else self.v * self.decay) + x * torch.tensor(2.0)
            return self.v

    model, x = Learned(), sequence()
    expected = step_model(copy.deepcopy(model), x)
    with torch.inference_mode():
        net = snnfx.convert(model, example_inputs=x[0])
        net(x)
    y = net(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert model.start.grad is not None
