"""Global variables that a call sets before it reads them carry nothing from call to call."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError

STEPS: Any = None
MEMBRANE: Any = None
CALLS = 0
LAST: Any = None
HAS_LAYER = False
X_SEQ = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(autouse=True)
def restored_variables() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    globals().update(STEPS=None, MEMBRANE=None, CALLS=0, LAST=None, HAS_LAYER=False)
    globals().pop("GAIN", None)


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4).double()

    def run(self, x: Tensor, steps: int) -> Tensor:
        v, spikes = torch.zeros_like(x[0]), []
        for t in range(steps):
            v = 0.5 * v + self.fc(x[t])
            spikes.append((v > 0.2).to(x))
        return torch.stack(spikes)


class SetsTheNumberOfSteps(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global STEPS
        STEPS = x.shape[0]
        return self.loop(x)

    def loop(self, x: Tensor) -> Tensor:
        return self.run(x, STEPS)


class SetsTheMembrane(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global MEMBRANE
        MEMBRANE = torch.zeros_like(x[0])
        return torch.stack([self.step(frame) for frame in x])

    def step(self, x: Tensor) -> Tensor:
        global MEMBRANE
        MEMBRANE = 0.5 * MEMBRANE + self.fc(x)
        return (MEMBRANE > 0.2).to(x)


class SetsAFlagThatAnotherFunctionReads(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global HAS_LAYER
        HAS_LAYER = False
        self.find()
        return self.run(x if HAS_LAYER else -x, x.shape[0])

    def find(self) -> None:
        global HAS_LAYER
        if any(isinstance(m, nn.Linear) for m in self.modules()):
            HAS_LAYER = True


SET_FIRST = [SetsTheNumberOfSteps, SetsTheMembrane, SetsAFlagThatAnotherFunctionReads]


@pytest.mark.parametrize("make", SET_FIRST)
def test_a_variable_that_is_set_before_it_is_read_is_no_state(make: type[nn.Module]) -> None:
    model = make()
    reference, before = copy.deepcopy(model), (STEPS, MEMBRANE, HAS_LAYER)
    net = snnfx.convert(model, takes="sequence", example_inputs=(X_SEQ,))
    assert before == (STEPS, MEMBRANE, HAS_LAYER)
    program = net.program
    for x in (X_SEQ, torch.cat([X_SEQ, X_SEQ]), X_SEQ):
        torch.testing.assert_close(net(x), reference(x), atol=1e-12, rtol=0)
    assert net.program is program  # the values that the reference call left are no guards


def test_a_step_may_set_a_variable_before_it_reads_it() -> None:
    class Step(Looped):
        def forward(self, x: Tensor) -> Tensor:
            global MEMBRANE
            MEMBRANE = self.fc(x)
            return MEMBRANE * (MEMBRANE > 0.2)

    model = Step()
    expected = torch.stack([model(x) for x in X_SEQ])
    torch.testing.assert_close(snnfx.convert(model)(X_SEQ), expected, atol=1e-12, rtol=0)


class ReadsBeforeItSets(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global MEMBRANE
        if MEMBRANE is None:
            MEMBRANE = torch.zeros_like(x[0])
        MEMBRANE = MEMBRANE * 0.5 + self.fc(x[-1])
        return self.run(x, x.shape[0]) * MEMBRANE


class Counts(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return self.run(x, x.shape[0]) * CALLS


class CatchesTheMissingVariable(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global GAIN
        try:
            GAIN = GAIN * 0.5
        except NameError:
            GAIN = 1.0
        return self.run(x, x.shape[0]) * GAIN


class ReadsByName(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global GAIN
        GAIN = globals().get("GAIN", 1.0) * 0.5
        return self.run(x, x.shape[0]) * GAIN


@pytest.mark.parametrize("make", [ReadsBeforeItSets, Counts, CatchesTheMissingVariable, ReadsByName])
def test_a_variable_that_is_read_before_it_is_set_is_refused(make: type[nn.Module]) -> None:
    with pytest.raises(CaptureError, match="SNNFX218"):
        snnfx.convert(make(), takes="sequence", example_inputs=(X_SEQ,))
    assert MEMBRANE is None
    assert CALLS == 0
    assert "GAIN" not in globals()


def test_a_variable_that_another_file_reads_first_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("variables_of_another_file")
    exec("v = 0.0\ndef leak(x):\n    global v\n    v = x\n    return x\n", vars(other))
    monkeypatch.setitem(sys.modules, other.__name__, other)

    class Model(Looped):
        def forward(self, x: Tensor) -> Tensor:
            import variables_of_another_file as other  # type: ignore[import-not-found]

            before = other.v
            return other.leak(self.run(x, x.shape[0])) + before  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="SNNFX218"):
        snnfx.convert(Model(), takes="sequence", example_inputs=(X_SEQ,))
    assert other.v == 0.0


class StoresForOthers(Looped):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        LAST = self.run(x, x.shape[0])
        return x


def test_a_tensor_that_only_other_code_can_read_is_refused() -> None:
    with pytest.raises(CaptureError, match="SNNFX226.*`LAST`"):
        snnfx.convert(StoresForOthers(), takes="sequence", example_inputs=(X_SEQ,))
    assert LAST is None


class Settings:
    """A class that user code writes to, as to a module-level variable."""

    steps: Any = None
    v: Any = 0.0


SPACE = types.SimpleNamespace(v=0.0, steps=None)
RECORDS: dict[str, Any] = {}
LOG: list[Any] = []


class Holder:
    def __init__(self) -> None:
        self.v: Any = 0.0
        self.calls = 0

    def step(self, x: Tensor) -> Any:
        self.calls += 1
        self.v = 0.5 * self.v + x
        return self.v

    def log(self, x: Tensor) -> None:
        self.calls += 1


HOLDER = Holder()


@pytest.fixture(autouse=True)
def restored_objects() -> Iterator[None]:
    yield
    Settings.steps, Settings.v = None, 0.0
    SPACE.__dict__.update(v=0.0, steps=None)
    HOLDER.__dict__.update(v=0.0, calls=0)
    RECORDS.clear()
    LOG.clear()


def contents() -> list[Any]:
    return [Settings.steps, Settings.v, {**vars(SPACE)}, {**vars(HOLDER)}, {**RECORDS}, [*LOG]]


class SetsAClassAttribute(Looped):
    def forward(self, x: Tensor) -> Tensor:
        Settings.steps = x.shape[0]
        return self.run(x, Settings.steps)


class SetsAttributesOfAnObject(Looped):
    def forward(self, x: Tensor) -> Tensor:
        SPACE.v, SPACE.steps = torch.zeros_like(x[0]), x.shape[0]
        out = []
        for t in range(SPACE.steps):
            SPACE.v = 0.5 * SPACE.v + self.fc(x[t])
            out.append((SPACE.v > 0.2).to(x))
        return torch.stack(out)


class LogsOutside(Looped):
    def forward(self, x: Tensor) -> Tensor:
        y = self.run(x, x.shape[0])
        LOG.append(y.detach())
        RECORDS.setdefault("rates", []).append(y.mean())
        HOLDER.log(y)
        return y


class CachesByLength(Looped):
    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[0]
        if T not in RECORDS:
            RECORDS[T] = torch.linspace(1, 0, T, dtype=x.dtype)  # type: ignore[index]
        return self.run(x * RECORDS[T][:, None, None], T)  # type: ignore[index]


@pytest.mark.parametrize("make", [SetsAClassAttribute, SetsAttributesOfAnObject, LogsOutside, CachesByLength])
def test_objects_outside_the_model_that_carry_nothing(make: type[nn.Module]) -> None:
    model = make()
    reference, before = copy.deepcopy(model), contents()
    net = snnfx.convert(model, takes="sequence", example_inputs=(X_SEQ,))
    assert contents() == before
    program = net.program
    for x in (X_SEQ, torch.cat([X_SEQ, X_SEQ]), X_SEQ):
        torch.testing.assert_close(net(x), reference(x), atol=1e-12, rtol=0)
    assert net.program is program


class KeepsStateInAClass(Looped):
    def forward(self, x: Tensor) -> Tensor:
        Settings.v = 0.5 * Settings.v + x[-1]
        return self.run(x, x.shape[0]) * Settings.v


class KeepsStateInAnObject(Looped):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([HOLDER.step(self.fc(x_t)) for x_t in x])


class KeepsStateInADict(Looped):
    def forward(self, x: Tensor) -> Tensor:
        if "scale" not in RECORDS:
            RECORDS["scale"] = x.mean()
        return self.run(x, x.shape[0]) * RECORDS["scale"]  # type: ignore[no-any-return]


class CountsInAnObject(Looped):
    def forward(self, x: Tensor) -> Tensor:
        HOLDER.calls += 1
        return self.run(x, x.shape[0]) * HOLDER.calls


STATEFUL = [KeepsStateInAClass, KeepsStateInAnObject, KeepsStateInADict, CountsInAnObject]


@pytest.mark.parametrize("make", STATEFUL)
def test_state_in_objects_outside_the_model_is_refused(make: type[nn.Module]) -> None:
    before = contents()
    with pytest.raises(CaptureError, match="SNNFX218"):
        snnfx.convert(make(), takes="sequence", example_inputs=(X_SEQ,))
    assert contents() == before


def test_state_in_a_python_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("state_of_another_file")
    other.__dict__["v"] = 0.0
    monkeypatch.setitem(sys.modules, other.__name__, other)

    class Model(Looped):
        def forward(self, x: Tensor) -> Tensor:
            import state_of_another_file as other  # type: ignore[import-not-found]

            other.v = 0.5 * other.v + x[-1]
            return self.run(x, x.shape[0]) * other.v  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="SNNFX218.*state_of_another_file.v"):
        snnfx.convert(Model(), takes="sequence", example_inputs=(X_SEQ,))
    assert other.v == 0.0
