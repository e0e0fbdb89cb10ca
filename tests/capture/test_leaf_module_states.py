"""State of a neuron that the model reads or writes from outside: `self.lif.v` has the value of stepping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError
from support.stepping import assert_converts, assert_same, stack_steps

T, N, C = 6, 3, 4


def sequence() -> Tensor:
    return 3 * torch.rand(T, N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make_spikingjelly() -> nn.Module:
    neurons = pytest.importorskip("spikingjelly.activation_based.neuron")
    return neurons.LIFNode(tau=2.0)


def make_snntorch() -> nn.Module:
    return pytest.importorskip("snntorch").Leaky(beta=0.9, init_hidden=True)


class DataDependent(nn.Module):
    """A module that cannot be traced, so it is opaque."""

    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode()

    @property
    def v(self) -> Any:
        return self.lif.v

    @v.setter
    def v(self, value: Any) -> None:
        self.lif.v = value

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(2 * x) if x.sum() > 0 else self.lif(5 * x)


NEURONS = {
    "zoo": (lambda: neuron.LIFNode(tau=2.0), "v"),
    "SpikingJelly": (make_spikingjelly, "v"),
    "snnTorch": (make_snntorch, "mem"),
    "opaque": (DataDependent, "v"),
}


@pytest.fixture(params=NEURONS)
def lif(request: pytest.FixtureRequest) -> tuple[nn.Module, str]:
    torch.manual_seed(0)
    make, attribute = NEURONS[request.param]
    return make(), attribute


class Model(nn.Module):
    """A layer and a neuron; subclasses access the state of the neuron."""

    def __init__(self, lif: nn.Module, attribute: str) -> None:
        super().__init__()
        self.fc, self.lif, self.attribute = nn.Linear(C, C), lif, attribute
        self.out = nn.Linear(C, C)
        self.double()

    @property
    def v(self) -> Any:
        return getattr(self.lif, self.attribute)

    @v.setter
    def v(self, value: Any) -> None:
        setattr(self.lif, self.attribute, value)


class ReadAfter(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.lif(self.fc(x))
        return self.v


class ReadAfterAndCompute(Model):
    def forward(self, x: Tensor) -> Any:
        s = self.lif(self.fc(x))
        return s, self.out(self.v), s + self.v


class InhibitsLaterally(Model):
    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(self.fc(x))
        self.v = self.v - 0.5 * s.sum(1, keepdim=True)
        return s


class WritesElementwise(Model):
    def forward(self, x: Tensor) -> Any:
        s = self.lif(self.fc(x))
        self.v = 0.5 * self.v
        return s, self.v


class WritesAndReads(Model):
    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(self.fc(x))
        self.v = self.v * 0.5 + 0.1
        return self.out(self.v) + s


class CalledTwice(Model):
    def forward(self, x: Tensor) -> Any:
        first = self.lif(self.fc(x))
        between = self.v
        self.v = self.v - 0.2
        second = self.lif(self.out(first.to(x)))
        return first + second, between, self.v


class ChangesInPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(self.fc(x))
        self.v = self.v * 1
        self.v -= 0.1 * s
        return s


class Detaches(Model):
    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(self.fc(x))
        self.v = self.v.detach()
        return s + self.v


class ReadBefore(Model):
    """Checks the type, because the state is not a tensor before the first step."""

    def forward(self, x: Tensor) -> Tensor:
        x, v = self.fc(x), self.v
        if not isinstance(v, torch.Tensor) or (self.attribute == "mem" and v.numel() == 0):
            v = torch.full_like(x, 0.7)
        return self.lif(x + 0.3 * v)


class ReadBeforeAfterAndWrite(ReadBefore):
    def forward(self, x: Tensor) -> Any:
        s = super().forward(x)
        self.v = self.v - 0.1 * s
        return s, self.v


class PreparesTheState(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if not isinstance(self.v, torch.Tensor) or (self.attribute == "mem" and self.v.numel() == 0):
            self.v = torch.full_like(x, 0.4)
        return self.lif(x)


class ResetsEachStep(Model):
    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        self.v = torch.full_like(x, 0.25)
        return self.lif(x)


MODELS: list[type[Model]] = [
    ReadAfter, ReadAfterAndCompute, InhibitsLaterally, WritesElementwise, WritesAndReads, CalledTwice, ChangesInPlace,
    Detaches, ResetsEachStep,
]  # fmt: skip
EARLY: list[type[Model]] = [ReadBefore, ReadBeforeAfterAndWrite, PreparesTheState]


@pytest.mark.parametrize("model", MODELS, ids=lambda cls: cls.__name__)
def test_state_that_the_model_reads_or_writes_matches_stepping(model: Any, lif: tuple[nn.Module, str]) -> None:
    made = model(*lif)
    net = assert_converts(made, sequence())
    snnfx.verify(made, net, sequence())


@pytest.mark.parametrize("model", EARLY, ids=lambda cls: cls.__name__)
def test_state_that_is_read_before_the_call(model: Any, lif: tuple[nn.Module, str]) -> None:
    made = model(*lif)
    net = assert_converts(made, sequence(), examples=True)
    snnfx.verify(made, net, sequence())


def test_without_reads_before_the_call_nothing_is_peeled_or_traced_twice() -> None:
    net = snnfx.convert(ReadAfterAndCompute(neuron.LIFNode(), "v"))
    assert net.program.first_step is None
    assert [region.kind for region in net.regions].count("loop") == 1


def test_a_neuron_that_is_read_and_written_elementwise_is_one_loop() -> None:
    net = snnfx.convert(WritesElementwise(neuron.LIFNode(), "v"), example_inputs=sequence()[0].float())
    assert [region.kind for region in net.regions].count("loop") == 1


def test_final_state_and_recording_contain_the_written_value() -> None:
    model, x_seq = WritesElementwise(neuron.LIFNode(tau=2.0), "v"), sequence()
    net = snnfx.convert(model)
    _, state, record = net.run(x_seq, record="lif.v")
    for x in x_seq:
        model(x)
    assert_same(state["lif.v"].detach(), model.lif.v.detach())
    assert_same(record["lif.v"][-1].detach(), model.lif.v.detach())


def test_a_carried_state_continues() -> None:
    model, x_seq = InhibitsLaterally(neuron.LIFNode(tau=2.0), "v"), sequence()
    net = snnfx.convert(model)
    whole, final = net.run(x_seq)
    first, state = net.run(x_seq[:2])
    rest, last = net.run(x_seq[2:], state=state)
    assert_same(torch.cat([first, rest]), whole)
    assert_same(last, final)


class Resets(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.lif.reset()
        return self.lif(self.fc(x))


@pytest.mark.parametrize("make", [neuron.LIFNode, make_spikingjelly])
def test_a_reset_inside_the_step_is_a_write(make: Callable[[], nn.Module]) -> None:
    assert_converts(Resets(make(), "v"), sequence())


class SetsANumber(Model):
    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(self.fc(x))
        self.v = 0.3
        return s


@pytest.mark.parametrize("make", [neuron.LIFNode, make_spikingjelly, DataDependent])
def test_a_number_becomes_a_tensor(make: Callable[[], nn.Module]) -> None:
    assert_converts(SetsANumber(make(), "v"), sequence())


class SetsNone(Model):
    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(self.fc(x))
        self.v = None
        return s


def test_a_state_that_is_not_a_tensor_is_refused(lif: tuple[nn.Module, str]) -> None:
    model = SetsNone(*lif)
    before = model.v
    message = r"SNNFX217 a step sets the state `lif\..*` to None.*test_leaf_module_states.py"
    with pytest.raises(CaptureError, match=message):
        snnfx.convert(model)
    assert model.v is before


@pytest.mark.parametrize("model", MODELS + EARLY, ids=lambda cls: cls.__name__)
def test_no_proxy_remains_in_the_neuron(model: Any, lif: tuple[nn.Module, str]) -> None:
    made = model(*lif)
    made(sequence()[0])
    before = made.v
    snnfx.convert(made, example_inputs=sequence()[0])
    assert made.v is before


class PassesItsState(nn.Module):
    """snnTorch's other convention: the state is an argument, and the neuron stores a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), pytest.importorskip("snntorch").Leaky(beta=0.9)
        self.mem: Any = None
        self.double()

    def forward(self, x: Tensor) -> Any:
        x = self.fc(x)
        if self.mem is None:
            self.mem = torch.zeros_like(x)
        s, self.mem = self.lif(x, self.mem)
        return s, self.lif.mem


def test_the_stored_copy_of_a_passed_state_can_be_read() -> None:
    model, x_seq = PassesItsState(), sequence()
    net = snnfx.convert(model)
    assert_same(net(x_seq), stack_steps([model(x) for x in x_seq]))
