"""Changes of Python objects in a step: a slot or a refusal, but never a wrong result."""

from __future__ import annotations

import collections
import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError
from snnfx.functional import reset_net
from support.stepping import assert_converts, assert_same, fresh_copy, step_model

T, N, C = 6, 2, 3


def sequence() -> Tensor:
    return torch.rand(T, N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Layer(nn.Module):
    """A linear layer; subclasses add attributes in `prepare` and define the step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.prepare()
        self.double()

    def prepare(self) -> None:
        """Add attributes."""


class DelayInADeque(Layer):
    def prepare(self) -> None:
        self.buf: Any = collections.deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc(x)
        if len(self.buf) == 0:
            for _ in range(self.buf.maxlen):
                self.buf.append(torch.zeros_like(s))
        late = self.buf[0]
        self.buf.append(s)
        return s + late


class DelayInAList(Layer):
    def prepare(self) -> None:
        self.buf: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        s = self.fc(x)
        if not self.buf:
            self.buf = [torch.zeros_like(s)] * 2
        late = self.buf[0]
        self.buf = self.buf[1:] + [s]
        return s + late


class StackOfAList(DelayInAList):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.stack(self.buf).sum(0)


class CounterInADict(Layer):
    def prepare(self) -> None:
        self.log = {"t": 1, "name": "x"}

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.log["t"]
        self.log["t"] += 1  # type: ignore[operator]
        return y


class Annealed(Layer):
    def prepare(self) -> None:
        self.temperature = torch.ones(1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) / self.temperature
        self.temperature = self.temperature * 0.9
        return y


class RoundRobin(Layer):
    def prepare(self) -> None:
        self.gains = collections.deque([1.0, 2.0, 3.0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.gains[0]
        self.gains.rotate(1)
        return y


class NumbersBesideNone(Layer):
    def prepare(self) -> None:
        self.v: Any = 0.0
        self.best: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.fc(x)
        self.v = self.v + (q - self.v) / 2.0
        self.best = self.v if self.best is None else torch.max(self.best, self.v)
        return self.best


class CounterOfTheClass(Layer):
    t = 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.t
        self.t = self.t + 1
        return y


STATES: list[type[Layer]] = [
    CounterOfTheClass,
    DelayInADeque, DelayInAList, StackOfAList, CounterInADict, Annealed, RoundRobin, NumbersBesideNone,
]  # fmt: skip


@pytest.mark.parametrize("model", STATES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["root", "submodule"])
def test_state_in_python_attributes_becomes_slots(
    model: Callable[[], nn.Module], wrap: Callable[..., nn.Module]
) -> None:
    net = assert_converts(wrap(model()), sequence())
    assert net.program.slots


@pytest.mark.parametrize("model", STATES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("double", [True, False])
def test_verify_starts_from_the_state_of_the_model(model: Callable[[], nn.Module], double: bool) -> None:
    made = model()
    net = snnfx.convert(made, example_inputs=sequence()[0])
    step_model(made, sequence())  # somebody uses the model in between
    report = snnfx.verify(made, net, sequence(), double=double)
    assert "not compared" not in str(report)


@pytest.mark.parametrize("model", STATES, ids=lambda cls: cls.__name__)
def test_the_attributes_of_the_model_are_unchanged(model: Callable[[], nn.Module]) -> None:
    made = model()
    before, held = dict(vars(made)), copy.deepcopy({k: v for k, v in vars(made).items() if not k.startswith("_")})
    snnfx.convert(made, example_inputs=sequence()[0])
    for key, value in held.items():
        assert vars(made)[key] is before[key]
        assert_same(vars(made)[key], value)


class OnlyWrites(Layer):
    def prepare(self) -> None:
        self.mode, self.last, self.notes = "", None, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.mode, self.last = "used", {"y": y}
        self.notes.append(y)
        self.sizes = [1, 2]
        return y * len(self.mode)


def test_an_attribute_set_before_it_is_read_is_not_state() -> None:
    assert assert_converts(OnlyWrites(), sequence()).program.slots == []


class CountsItsNotes(Layer):
    def prepare(self) -> None:
        self.notes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.notes.append(x)
        return self.fc(x) * len(self.notes)


def test_the_length_of_a_list_that_grows_is_state() -> None:
    with pytest.raises(CaptureError, match="SNNFX201 `notes` .*changes its structure.*test_python_state.py"):
        snnfx.convert(CountsItsNotes())


class Phases(Layer):
    def prepare(self) -> None:
        self.phase = "on"

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * (self.phase == "on")
        self.phase = "off" if self.phase == "on" else "on"
        return y


class Holder:
    v: Any = None


class PhasesOfTheClass(Phases):
    phase = "on"

    def prepare(self) -> None:
        """The class has the attribute."""


class ListOfTheClass(Layer):
    shared: list[Tensor] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        self.shared.append(x)
        return self.fc(x)


class InAnObject(Layer):
    def prepare(self) -> None:
        self.state = Holder()

    def forward(self, x: Tensor) -> Tensor:
        i = self.fc(x)
        self.state.v = i if self.state.v is None else 0.5 * self.state.v + i
        return self.state.v


class InASet(Layer):
    def prepare(self) -> None:
        self.seen: set[int] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add(len(self.seen))
        return self.fc(x) * len(self.seen)


class InAnArray(Layer):
    def prepare(self) -> None:
        self.counts = np.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0] += 1
        return self.fc(x) * float(self.counts[0])


class SettingOfANeuron(Layer):
    def prepare(self) -> None:
        self.lif = neuron.LIFNode(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        self.lif.v_threshold = self.lif.v_threshold * 1.1
        return self.lif(self.fc(x))


class BackToNone(Layer):
    def prepare(self) -> None:
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) if self.v is None else self.fc(x) + self.v
        self.v = x if self.v is None else None
        return y


class OwnGenerator(Layer):
    def prepare(self) -> None:
        self.rng = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.rng.random()


class TakesTheNext(Layer):
    def prepare(self) -> None:
        self.gains: Any = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * next(self.gains)


REFUSED = {
    TakesTheNext: ("SNNFX218", "gains"),
    Phases: ("SNNFX218", "phase"),
    PhasesOfTheClass: ("SNNFX218", "phase"),
    InAnObject: ("SNNFX218", "state.v"),
    InASet: ("SNNFX218", "seen"),
    InAnArray: ("SNNFX218", "counts"),
    SettingOfANeuron: ("SNNFX218", "lif.v_threshold"),
    BackToNone: ("SNNFX218", "v"),
    OwnGenerator: ("SNNFX215", "rng"),
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("inside", [False, True], ids=["root", "submodule"])
@pytest.mark.parametrize("examples", [False, True], ids=["no-examples", "examples"])
def test_an_unsupported_change_is_refused_by_name(model: Callable[[], nn.Module], inside: bool, examples: bool) -> None:
    code, name = REFUSED[model]
    made = nn.Sequential(model()) if inside else model()
    with pytest.raises(CaptureError) as raised:
        snnfx.convert(made, example_inputs=sequence()[0] if examples else None)
    error = raised.value
    prefix = "0." if inside and model is not TakesTheNext else ""
    assert error.code == code and f"`{prefix}{name}`" in error.what
    assert error.why and error.hint
    if model is not SettingOfANeuron:
        assert "test_python_state.py:" in error.where


@pytest.mark.parametrize("model", REFUSED, ids=lambda cls: cls.__name__)
def test_a_refusal_does_not_change_the_model(model: Callable[[], nn.Module]) -> None:
    made, meta_copy = model(), model()
    meta_copy.load_state_dict(made.state_dict())
    with pytest.raises(CaptureError):
        snnfx.convert(made)
    assert_same(step_model(made, sequence()), step_model(meta_copy, sequence()))


def test_changes_of_class_attributes_are_refused_and_restored() -> None:
    with pytest.raises(CaptureError, match=r"SNNFX218 a step changes `ListOfTheClass\.shared\.0`"):
        snnfx.convert(ListOfTheClass())
    assert ListOfTheClass.shared == []


class DropPath(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else x + self.fc(x)


class DropPathOfNumPy(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x if np.random.rand() < 0.5 else x + self.fc(x)


@pytest.mark.parametrize("model", [DropPath, DropPathOfNumPy])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.ReLU(), m)], ids=["root", "submodule"])
@pytest.mark.parametrize("examples", [False, True], ids=["no-examples", "examples"])
def test_random_numbers_of_python_are_drawn_at_each_step(model: Any, wrap: Any, examples: bool) -> None:
    made, x_seq = wrap(model()), sequence()
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    net = snnfx.convert(made, example_inputs=x_seq[0] if examples else None)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    for seed in (1, 2, 3):
        random.seed(seed)
        np.random.seed(seed)
        expected = step_model(made, x_seq)
        random.seed(seed)
        np.random.seed(seed)
        assert_same(net(x_seq), expected)


class CountsSpikes(Layer):
    def prepare(self) -> None:
        self.lif = neuron.LIFNode(tau=2.0)
        self.register_buffer("count", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        s = self.lif(self.fc(x))
        if self.training:
            with torch.no_grad():
                self.count += s.sum(0)
        return s


class Homeostasis(Layer):
    def prepare(self) -> None:
        self.register_buffer("theta", torch.full((C,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        s = torch.sigmoid(self.fc(x) - self.theta)
        if self.training:
            self.theta = 0.9 * self.theta + 0.1 * s.detach().mean(0)
        return s


class WritesAnothersBuffer(Layer):
    def prepare(self) -> None:
        self.other = nn.Module()
        self.other.register_buffer("mean", torch.zeros(C))

    def forward(self, x: Tensor) -> Tensor:
        self.other.mean = x.mean(0)
        return self.fc(x)


@pytest.mark.parametrize("model", [CountsSpikes, Homeostasis, WritesAnothersBuffer])
@pytest.mark.parametrize("inside", [False, True], ids=["root", "submodule"])
def test_a_buffer_that_a_step_changes_follows_stepping(model: Any, inside: bool) -> None:
    made = nn.Sequential(model()) if inside else model()
    stepped, x_seq = fresh_copy(made), sequence()
    net = snnfx.convert(made)
    for _ in range(2):
        expected = step_model(stepped, x_seq)
        reset_net(stepped)
        assert_same(net(x_seq), expected)
    for (name, buffer), (_, other) in zip(made.named_buffers(), stepped.named_buffers(), strict=True):
        assert_same(buffer, other), name


class OneNormPerStep(Layer):
    def prepare(self) -> None:
        self.bns, self.t = nn.ModuleList(nn.BatchNorm1d(C) for _ in range(T)), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.bns[self.t](self.fc(x))
        self.t += 1
        return y


class OneNormPerStepInAMemory(snnfx.MemoryModule):
    """Follows the hint of the error for `OneNormPerStep`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bns = nn.Linear(C, C), nn.ModuleList(nn.BatchNorm1d(C) for _ in range(T))
        self.register_memory("t", 0)
        self.double()

    forward = OneNormPerStep.forward


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["root", "submodule"])
def test_the_hint_registers_a_state_that_must_be_a_number(wrap: Callable[..., nn.Module]) -> None:
    for examples in (None, sequence()[0]):
        with pytest.raises(CaptureError, match=r'SNNFX213(.|\n)*self.register_memory\("t", 0\)'):
            snnfx.convert(wrap(OneNormPerStep()), example_inputs=examples)
    net = assert_converts(wrap(OneNormPerStepInAMemory()), sequence())
    snnfx.verify(net.source, net, sequence())


class BranchesOnValues(Layer):
    def prepare(self) -> None:
        self.lif = neuron.LIFNode(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.lif(2 * y) if y.sum() > 0 else self.lif(5 * y)


def test_an_untraceable_model_is_stepped_and_explain_reports_it() -> None:
    model = BranchesOnValues()
    net = assert_converts(model, sequence())
    assert [region.kind for region in net.regions] == ["loop"]
    assert [slot.name for slot in net.program.slots] == ["lif.v"]
    assert list(net.state_dict()) == list(model.state_dict())
    report = str(snnfx.explain(model))
    assert "SNNFX108" in report and "the model could not be traced" in report
    first, state = net.run(sequence()[:2])
    assert_same(torch.cat([first, net.run(sequence()[2:], state=state)[0]]), net(sequence()))


def test_an_untraceable_entry_other_than_forward_is_refused() -> None:
    class Entry(BranchesOnValues):
        def step(self, x: Tensor) -> Tensor:
            return BranchesOnValues.forward(self, x)

    with pytest.raises(CaptureError, match="SNNFX201.*tensor values"):
        snnfx.convert(Entry(), entry="step")
