"""snnTorch: neurons with stored and with passed state; conversion never writes the buffers of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("snntorch")

import snntorch

import snnfx
from snnfx import surrogate
from snnfx.errors import CaptureError, InputError

# The surrogates of snnTorch return float32 spikes for any input; this one keeps the dtype.
spike = {"spike_grad": surrogate.ATan()}

NEURONS: dict[str, Callable[..., nn.Module]] = {
    "Leaky": lambda **k: snntorch.Leaky(beta=0.9, **spike, **k),
    "Leaky, learnt": lambda **k: snntorch.Leaky(
        beta=torch.rand(6), learn_beta=True, learn_threshold=True, **spike, **k
    ),
    "Leaky, reset to zero": lambda **k: snntorch.Leaky(beta=0.9, reset_mechanism="zero", **spike, **k),
    "Leaky, no reset": lambda **k: snntorch.Leaky(beta=0.9, reset_mechanism="none", **spike, **k),
    "Leaky, reset at once": lambda **k: snntorch.Leaky(beta=0.9, reset_delay=False, **spike, **k),
    "Leaky, reset to zero at once": lambda **k: snntorch.Leaky(
        beta=0.9, reset_delay=False, reset_mechanism="zero", **spike, **k
    ),
    "Leaky, graded spikes": lambda **k: snntorch.Leaky(
        beta=0.9, graded_spikes_factor=0.5, learn_graded_spikes_factor=True, **spike, **k
    ),
    "Leaky, inhibition": lambda **k: snntorch.Leaky(beta=0.9, inhibition=True, **spike, **k),
    "Synaptic": lambda **k: snntorch.Synaptic(alpha=0.8, beta=0.9, learn_alpha=True, **spike, **k),
    "Synaptic, reset to zero": lambda **k: snntorch.Synaptic(alpha=0.8, beta=0.9, reset_mechanism="zero", **spike, **k),
    "Alpha": lambda **k: snntorch.Alpha(alpha=0.9, beta=0.8, **spike, **k),
    "Lapicque": lambda **k: snntorch.Lapicque(beta=0.9, **spike, **k),
    "RLeaky": lambda **k: snntorch.RLeaky(beta=0.9, linear_features=6, **spike, **k),
    "RLeaky, one to one": lambda **k: snntorch.RLeaky(beta=0.9, all_to_all=False, V=0.5, **spike, **k),
    "RSynaptic": lambda **k: snntorch.RSynaptic(alpha=0.8, beta=0.9, linear_features=6, **spike, **k),
}
STATES = {"Leaky": 1, "Lapicque": 1, "Synaptic": 2, "Alpha": 3, "RLeaky": 2, "RSynaptic": 3}


def states_of(name: str) -> int:
    return STATES[name.partition(",")[0]]


class Passing(nn.Module):
    """One step that takes and returns the state of its neuron, as in the tutorials."""

    def __init__(self, lif: nn.Module, name: str) -> None:
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(4, 6), lif, nn.Linear(6, 3)
        self.recurrent, self.count = name.startswith("R"), states_of(name)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        given = (None,) * self.count if state is None else state
        returned = self.lif(self.fc(x), *given)
        return self.out(returned[0]), tuple(returned) if self.recurrent else tuple(returned[1:])


def sequence(*shape: int, T: int = 6) -> Tensor:
    return torch.rand(T, *shape, dtype=torch.float64) * 3


def reset(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, snntorch.SpikingNeuron):
            module.reset_mem()


def stepped(model: nn.Module, x_seq: Tensor) -> Any:
    reset(model)
    steps = [model(x) for x in x_seq]
    reset(model)
    return torch.stack(steps) if isinstance(steps[0], Tensor) else tuple(map(torch.stack, zip(*steps, strict=True)))


def buffers(model: nn.Module) -> dict[str, Any]:
    return {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    for name, buffer in model.named_buffers():
        assert buffer is before[name][0] and torch.equal(buffer, before[name][1]), name


@pytest.mark.filterwarnings("ignore:Inhibition")
@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
@pytest.mark.parametrize("name", NEURONS)
def test_neuron_with_stored_state(name: str, with_examples: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), NEURONS[name](init_hidden=True), nn.Linear(6, 3)).double()
    x_seq = sequence(2, 4)
    expected = stepped(model, x_seq)
    before = buffers(model)
    net = snnfx.convert(model, example_inputs=(x_seq[0],) if with_examples else None)
    torch.testing.assert_close(net(x_seq), expected, atol=1e-12, rtol=1e-12)
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold"]
    snnfx.verify(model, net, x_seq)
    assert_unchanged(model, before)


@pytest.mark.filterwarnings("ignore:Inhibition")
@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
@pytest.mark.parametrize("name", NEURONS)
def test_neuron_with_passed_state(name: str, with_examples: bool) -> None:
    model, x_seq = Passing(NEURONS[name](), name).double(), sequence(2, 4)
    reset(model)
    state, ys = None, []
    for x in x_seq:
        y, state = model(x, state)
        ys.append(y)
    reset(model)
    before = buffers(model)
    net = snnfx.convert(model, example_inputs=(x_seq[0],) if with_examples else None)
    y_seq, final = net(x_seq)
    for actual, expected in zip((y_seq, *final), (torch.stack(ys), *state), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold"]
    assert [slot.name for slot in net.program.slots] == [f"state.{i}" for i in range(states_of(name))]
    snnfx.verify(model, net, x_seq)
    assert_unchanged(model, before)


def test_output_true_returns_the_states_over_time() -> None:
    lif = snntorch.Synaptic(alpha=0.8, beta=0.9, init_hidden=True, output=True)
    model = nn.Sequential(nn.Linear(4, 6), lif).double()
    net, x_seq = snnfx.convert(model), sequence(2, 4)
    outputs, expected = net(x_seq), stepped(model, x_seq)
    assert len(outputs) == 3
    for a, b in zip(outputs, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


class TwoLayers(nn.Module):
    """The network of the tutorials: two explicit states as arguments, spikes and potentials as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = nn.Linear(4, 6), snntorch.Leaky(beta=0.9, **spike)
        self.fc2, self.lif2 = nn.Linear(6, 3), snntorch.Leaky(beta=0.8, learn_beta=True, **spike)

    def forward(self, x: Tensor, mem1: Any, mem2: Any) -> Any:
        spk1, mem1 = self.lif1(self.fc1(x), mem1)
        spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
        return spk2, mem1, mem2


def test_tutorial_network_with_carry() -> None:
    model, x_seq = TwoLayers().double(), sequence(2, 4)
    net = snnfx.convert(model, carry={"mem1": 1, "mem2": 2})
    assert [region.kind for region in net.regions] == ["fold", "loop"] * 2
    spikes, mem1, mem2 = net(x_seq)
    assert spikes.shape == (6, 2, 3) and mem1.shape == (2, 6) and mem2.shape == (2, 3)
    snnfx.verify(model, net, x_seq)
    first = model.lif1.reset_mem(), model.lif2.reset_mem()
    torch.testing.assert_close(net(x_seq, *first), (spikes, mem1, mem2))


def test_neuron_without_passed_state_uses_its_stored_state() -> None:
    class Bare(nn.Module):
        def __init__(self, *none: None) -> None:
            super().__init__()
            self.fc, self.lif, self.none = nn.Linear(4, 6), snntorch.Leaky(beta=0.9, **spike), none

        def forward(self, x: Tensor) -> Tensor:
            spk, mem = self.lif(self.fc(x), *self.none)
            return spk + mem

    x_seq = sequence(2, 4)
    for model in (Bare().double(), Bare(None).double()):
        net = snnfx.convert(model)
        assert [slot.name for slot in net.program.slots] == ["lif.mem"]
        torch.testing.assert_close(net(x_seq), stepped(model, x_seq), atol=1e-12, rtol=1e-12)
        snnfx.verify(model, net, x_seq)


def test_stored_and_carried_neuron_state_in_one_model() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif1, self.lif2 = snntorch.Leaky(beta=0.9, **spike), snntorch.Leaky(beta=0.7, **spike)

        def forward(self, x: Tensor, mem: Any = None) -> Any:
            spk, mem = self.lif1(x, mem)
            spk2, _ = self.lif2(spk * 0.6, None)
            return spk2, mem

    model, x_seq = Both(), sequence(2, 4)
    reset(model)
    mem, ys = None, []
    for x in x_seq:
        y, mem = model(x, mem)
        ys.append(y)
    reset(model)
    net = snnfx.convert(model)
    y_seq, final = net(x_seq)
    torch.testing.assert_close((y_seq, final), (torch.stack(ys), mem), atol=1e-12, rtol=1e-12)
    snnfx.verify(model, net, x_seq)


def test_float32_with_the_default_surrogate() -> None:
    model = nn.Sequential(nn.Linear(4, 6), snntorch.Leaky(beta=0.5, init_hidden=True), nn.Linear(6, 3))
    x_seq = sequence(2, 4).float()
    net = snnfx.convert(model)
    torch.testing.assert_close(net(x_seq), stepped(model, x_seq))


def test_state_dict_and_instances_are_unchanged() -> None:
    model = nn.Sequential(nn.Linear(4, 6), snntorch.Leaky(beta=0.9, init_hidden=True))
    count = len(snntorch.SpikingNeuron.instances)
    net = snnfx.convert(model)
    net(torch.rand(3, 2, 4))
    assert len(snntorch.SpikingNeuron.instances) == count
    assert list(net.state_dict()) == list(model.state_dict())
    assert "reset" not in vars(model[1])


def test_another_batch_size_after_the_model_was_run() -> None:
    model = nn.Sequential(nn.Linear(4, 6), snntorch.Leaky(beta=0.9, init_hidden=True, **spike)).double()
    model(torch.rand(7, 4, dtype=torch.float64))
    net, x_seq = snnfx.convert(model), sequence(2, 4)
    torch.testing.assert_close(net(x_seq), stepped(model, x_seq))


def test_the_hint_for_a_forward_over_time_names_entry() -> None:
    class Tutorial(TwoLayers):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
            spikes = []
            for _ in range(5):
                spk1, mem1 = self.lif1(self.fc1(x), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                spikes.append(spk2)
            return torch.stack(spikes)

        def step(self, x: Tensor, mem1: Any = None, mem2: Any = None) -> Any:
            return TwoLayers.forward(self, x, mem1, mem2)

    with pytest.raises(CaptureError, match='(?s)SNNFX203.*entry="step"'):
        snnfx.convert(Tutorial())
    net = snnfx.convert(Tutorial(), entry="step")
    assert [argument.name for argument in net.program.carried] == ["mem1", "mem2"]


def test_some_states_without_the_others_are_refused() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snntorch.Synaptic(alpha=0.8, beta=0.9)

        def forward(self, x: Tensor, mem: Any = None) -> Any:
            spk, _, mem = self.lif(x, None, mem)
            return spk, mem

    with pytest.raises((CaptureError, InputError), match="SNNFX211|SNNFX201"):
        snnfx.convert(Half(), carry={"mem": 1})


@pytest.mark.parametrize("name", ["LeakyParallel", "LinearLeaky"])
def test_neuron_that_takes_whole_sequences_is_refused(name: str) -> None:
    make = {
        "LeakyParallel": lambda: snntorch.LeakyParallel(4, 6, beta=0.5),
        "LinearLeaky": lambda: snntorch.LinearLeaky(beta=0.9, in_features=4, out_features=6),
    }
    with pytest.raises(CaptureError, match="SNNFX205"):
        snnfx.convert(nn.Sequential(make[name](), nn.Linear(6, 2)))
