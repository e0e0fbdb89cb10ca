"""Unsupported models are refused without side effects, with a code, a location, a reason and a hint."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import snnfx
from snnfx import neuron
from snnfx.errors import CODES, CaptureError, InputError
from snnfx.state.registry import named_stateful
from support.stepping import assert_converts, assert_same

THIS_FILE = "test_refusals.py:"


class Layer(nn.Module):
    """Two layers and a neuron; subclasses write the step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.lif = neuron.LIFNode(tau=2.0)
        self.body = nn.Sequential(self.fc, self.lif)

    def forward(self, x: Tensor) -> Any:
        return self.body(x)


class ChangesItsInput(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.body(x)


class AddsToItsInput(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return self.body(x)


class RectifiesItsInput(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.relu(x, inplace=True))


class WritesIntoAnother(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        torch.add(x, 1, out=y)
        return self.body(y)


class AssignsToItsInput(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x[:, 0] = 0
        return self.body(x)


class LoopsOverTime(Layer):
    def forward(self, x: Tensor) -> Tensor:
        spikes = []
        for _ in range(10):
            spikes.append(self.lif(self.fc(x)))
        return torch.stack(spikes)


class KeepsTheLast(Layer):
    """A model with unregistered state; with registered state it would be stepped without tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    def forward(self, x: Tensor) -> Any:
        self.last = x if self.last is None else self.last + x
        return self.rest(self.body(x), x)

    def rest(self, y: Tensor, x: Tensor) -> Tensor:
        return y


class BranchesOnValues(KeepsTheLast):
    def rest(self, y: Tensor, x: Tensor) -> Tensor:
        return y * 2 if y.sum() > 0 else y


class CountsValues(KeepsTheLast):
    def rest(self, y: Tensor, x: Tensor) -> Tensor:
        for _ in range(int(y.max())):
            y = y + 1
        return y


class AsksForItem(KeepsTheLast):
    def rest(self, y: Tensor, x: Tensor) -> Tensor:
        return y * float(x.mean().item())


class FormatsValues(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * len(f"{x:.2f}")


class ReturnsAGenerator(Layer):
    def forward(self, x: Tensor) -> Any:
        return (self.body(part) for part in (x, x + 1))


@dataclass
class Results:
    spikes: Tensor
    rates: dict[str, Tensor] = field(default_factory=dict)


class ReturnsAnObject(Layer):
    def forward(self, x: Tensor) -> Any:
        return Results(self.body(x))


class ReturnsASet(Layer):
    def forward(self, x: Tensor) -> Any:
        return {self.body(x)}


class TakesTwo(Layer):
    def forward(self, x: Tensor, more: Any) -> Tensor:
        return self.body(x)


class TakesAnyNumber(Layer):
    def forward(self, *xs: Tensor) -> Tensor:
        return self.body(sum(xs))


class CreatesABuffer(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("v", None)

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.body(x) if self.v is None else self.v + self.body(x)
        return self.v


class AssignsData(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.gain.data = self.gain.data.clamp(0, 1)
        return self.body(x) * self.gain


class ChangesATensorInAList(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.counts = [torch.zeros(3)]

    def forward(self, x: Tensor) -> Tensor:
        self.counts[0] += 1
        return self.body(x) + self.counts[0]


class ChangesStatistics(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.bn.running_mean.mul_(0.5)
        return self.bn(self.body(x))


class ChangesAnAlias(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(2, 3))
        self.register_buffer("row", self.table[0])

    def forward(self, x: Tensor) -> Tensor:
        self.row.add_(1)
        return self.body(x) + self.table.sum(0)


class Grows(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.seen = torch.zeros(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.seen = torch.cat([self.seen, y])
        return y + self.seen.mean(0)


class DrawsFromAGenerator(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + torch.randn(x.shape[0], 3, generator=self.noise)


class ChangesAView(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y[:, 0].mul_(2)
        return y


class CallsAStranger(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(3, 3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.hidden[0](x))


class FillsNoise(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + torch.empty(3).normal_())


class SwitchesAutocast(KeepsTheLast):
    def rest(self, y: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.fc(y)


class BranchesOnTheStep(Layer):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.fc(x) if self.count % 2 == 0 else x


class KeepsAWord(Layer):
    phase = "on"

    def forward(self, x: Tensor) -> Tensor:
        self.phase = "off" if self.phase == "on" else "on"
        return self.body(x) * len(self.phase)


def hooked(register: Callable[[Layer], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Layer()
        register(model)
        return model

    return make


def note(*_: Any) -> None:
    """A hook that does nothing."""


def multi_step() -> nn.Module:
    neurons = pytest.importorskip("spikingjelly.activation_based.neuron")
    return nn.Sequential(nn.Linear(3, 3), neurons.LIFNode(step_mode="m"))


def only_multi_step() -> nn.Module:
    neurons = pytest.importorskip("spikingjelly.activation_based.neuron")
    return nn.Sequential(nn.Linear(3, 3), neurons.PSN(T=4))


X = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))


@dataclass
class Refusal:
    """A model (and inputs), its code, and whether the location is a line of this file."""

    make: Callable[[], nn.Module]
    code: str
    examples: Callable[[], Any] = lambda: None
    has_line: bool = True


REFUSALS = {
    "a forward hook on the model": Refusal(hooked(lambda m: m.register_forward_hook(note)), "SNNFX208"),
    "a pre-hook on the model": Refusal(hooked(lambda m: m.register_forward_pre_hook(note)), "SNNFX208"),
    "a backward hook on the model": Refusal(hooked(lambda m: m.register_full_backward_hook(note)), "SNNFX208"),
    "a hook on a container": Refusal(hooked(lambda m: m.body.register_forward_hook(note)), "SNNFX208", has_line=False),
    "mul_ on the input": Refusal(ChangesItsInput, "SNNFX209"),
    "+= on the input": Refusal(AddsToItsInput, "SNNFX209"),
    "relu in place on the input": Refusal(RectifiesItsInput, "SNNFX209"),
    "out=": Refusal(WritesIntoAnother, "SNNFX214"),
    "an assignment to a part of the input": Refusal(AssignsToItsInput, "SNNFX209"),
    "a lazy module": Refusal(
        lambda: nn.Sequential(nn.LazyLinear(3), neuron.LIFNode()), "SNNFX207", lambda: X, has_line=False
    ),
    "a multi-step module": Refusal(multi_step, "SNNFX204", has_line=False),
    "a module that has no single step": Refusal(only_multi_step, "SNNFX205", has_line=False),
    "a loop over time": Refusal(LoopsOverTime, "SNNFX203"),
    "a branch on values": Refusal(BranchesOnValues, "SNNFX213"),
    "a loop as long as a value": Refusal(CountsValues, "SNNFX213"),
    "a number out of a tensor": Refusal(AsksForItem, "SNNFX213"),
    "a value as text": Refusal(FormatsValues, "SNNFX201"),
    "a word that changes": Refusal(KeepsAWord, "SNNFX218"),
    "a branch on the number of the step": Refusal(BranchesOnTheStep, "SNNFX250"),
    "a generator as output": Refusal(ReturnsAGenerator, "SNNFX216"),
    "an object as output": Refusal(ReturnsAnObject, "SNNFX216"),
    "a set as output": Refusal(ReturnsASet, "SNNFX216"),
    "a generator as input": Refusal(TakesTwo, "SNNFX216", lambda: (X, (x for x in X))),
    "an object with tensors as input": Refusal(TakesTwo, "SNNFX216", lambda: (X, Results(X))),
    "an array of NumPy as input": Refusal(TakesTwo, "SNNFX216", lambda: (X, np.ones(3))),
    "any number of inputs": Refusal(TakesAnyNumber, "SNNFX211"),
    "a buffer that is None": Refusal(CreatesABuffer, "SNNFX206"),
    "data that is assigned": Refusal(AssignsData, "SNNFX206"),
    "a tensor in a list changed in place": Refusal(ChangesATensorInAList, "SNNFX206"),
    "statistics of a layer that are changed": Refusal(ChangesStatistics, "SNNFX206"),
    "a view that is a buffer, changed in place": Refusal(ChangesAnAlias, "SNNFX206"),
    "a state that grows": Refusal(Grows, "SNNFX201"),
    "a generator": Refusal(DrawsFromAGenerator, "SNNFX215"),
    "a view changed in place": Refusal(ChangesAView, "SNNFX214"),
    "a module that is not registered": Refusal(CallsAStranger, "SNNFX211"),
    "noise that leaves no node": Refusal(FillsNoise, "SNNFX215"),
    "autocast inside the step": Refusal(SwitchesAutocast, "SNNFX213"),
}


def everything_of(model: nn.Module) -> list[Any]:
    """Everything that a conversion could change: values, flags, hooks, attributes, state, RNG states."""
    kept: list[Any] = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        kept.append(
            (
                name,
                type(module),
                {k: copy.copy(v) if isinstance(v, dict | list | set) else v for k, v in attributes.items()},
            )
        )
        kept.append([(k, id(v)) for k, v in (*module._parameters.items(), *module._buffers.items())])
        kept.append([(k, id(v)) for k, v in module._modules.items()])
    kept += [(name, value.detach().clone()) for name, value in model.state_dict().items() if not is_lazy(value)]
    return kept


def is_lazy(value: Any) -> bool:
    return isinstance(value, nn.parameter.UninitializedTensorMixin)


def assert_unchanged(before: list[Any], after: list[Any]) -> None:
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) and not is_lazy(a) else a is b or a == b


@pytest.fixture(params=REFUSALS)
def refusal(request: pytest.FixtureRequest) -> Refusal:
    return REFUSALS[request.param]


def with_state_and_mode(model: nn.Module) -> nn.Module:
    """The model in evaluation mode with states that are not reset."""
    model.eval()
    for _, module, adapter in named_stateful(model):
        if isinstance(module, neuron.LIFNode):
            adapter.write(module, [torch.full((2, 3), 0.25)])
    return model


def test_a_refusal_has_code_location_reason_and_hint(refusal: Refusal) -> None:
    with pytest.raises(CaptureError) as raised:
        snnfx.convert(refusal.make(), example_inputs=refusal.examples())
    error = raised.value
    assert error.code == refusal.code
    assert error.what and error.why.endswith((".", ")")) and error.hint.endswith((".", ")"))
    assert THIS_FILE in error.where if refusal.has_line else error.where
    assert str(error).startswith(refusal.code) and error.hint in str(error)
    assert CODES[refusal.code].fails and CODES[refusal.code].works


def test_a_refusal_does_not_change_the_model(refusal: Refusal) -> None:
    model = with_state_and_mode(refusal.make())
    before = everything_of(model)
    with pytest.raises(CaptureError):
        snnfx.convert(model, example_inputs=refusal.examples())
    assert_unchanged(before, everything_of(model))


def test_explain_reports_the_refusal(refusal: Refusal) -> None:
    model = with_state_and_mode(refusal.make())
    before = everything_of(model)
    report = snnfx.explain(model, example_inputs=refusal.examples())
    assert report.error is not None and report.error.code == refusal.code
    assert refusal.code in str(report) and refusal.code in report.to_markdown()
    assert report.to_dict()["error"]["code"] == refusal.code
    assert_unchanged(before, everything_of(model))


def test_the_hint_for_a_loop_over_time_names_entry() -> None:
    with pytest.raises(CaptureError, match='entry="step"'):
        snnfx.convert(LoopsOverTime())


class LoopWithAStep(LoopsOverTime):
    def step(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))


def test_the_hint_for_a_loop_over_time_works() -> None:
    assert_converts(LoopWithAStep().double(), torch.rand(4, 2, 3, dtype=torch.float64), entry="step")


def test_a_hook_on_a_layer_runs() -> None:
    model = Layer()
    shapes: list[torch.Size] = []
    model.fc.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    snnfx.convert(model)(torch.rand(4, 2, 3))
    assert sum(shape.numel() for shape in shapes) == 4 * 2 * 3


@pytest.mark.parametrize(
    "module", [nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)], ids=lambda m: type(m).__name__
)
def test_an_in_place_layer_on_the_input_does_not_change_the_sequence(module: nn.Module) -> None:
    net = snnfx.convert(nn.Sequential(module, nn.Linear(3, 3)))
    x_seq = torch.randn(4, 2, 3)
    before = x_seq.clone()
    net(x_seq)
    assert torch.equal(x_seq, before)


class FunctionalDropout(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, self.training)


@pytest.mark.parametrize("converted_in_training", [True, False])
def test_the_flag_of_functional_dropout_stays_live(converted_in_training: bool) -> None:
    model = FunctionalDropout().train(converted_in_training)
    net = snnfx.convert(model)
    x_seq = torch.rand(20, 8, 3)
    net.eval()
    assert_same(net(x_seq), torch.stack([model(x) for x in x_seq]), 1e-6)
    net.train()
    assert (net(x_seq) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


class Pair(NamedTuple):
    spikes: Tensor
    more: dict[str, list[Tensor]]


class ReturnsANest(Layer):
    def forward(self, x: Tensor) -> Any:
        y = self.body(x)
        return Pair(y, {"parts": [y + 1, y * 2]})


def test_registered_pytrees_keep_their_structure() -> None:
    net = assert_converts(ReturnsANest().double(), torch.rand(4, 2, 3, dtype=torch.float64))
    assert isinstance(net(torch.rand(4, 2, 3).double()), Pair)


def generator_of_steps() -> Iterator[Tensor]:
    yield from torch.rand(4, 2, 3)


@pytest.mark.parametrize(
    "given", [generator_of_steps(), np.ones((4, 2, 3)), {1.0, 2.0}, "x", 3], ids=lambda v: type(v).__name__
)
def test_a_net_refuses_inputs_other_than_tensors(given: Any) -> None:
    net = snnfx.convert(Layer())
    with pytest.raises(InputError) as raised:
        net(given)
    assert raised.value.code == "SNNFX305"
    assert type(given).__name__ in str(raised.value)


@pytest.mark.parametrize("given", [generator_of_steps(), {1.0}, "x", 3.0], ids=lambda v: type(v).__name__)
def test_examples_are_a_tensor_a_tuple_or_a_dict(given: Any) -> None:
    with pytest.raises(InputError) as raised:
        snnfx.convert(Layer(), example_inputs=given)
    assert raised.value.code == "SNNFX305"


def test_a_generator_of_examples_is_not_used_up() -> None:
    given = generator_of_steps()
    with pytest.raises(InputError):
        snnfx.convert(Layer(), example_inputs=given)
    assert len(list(given)) == 4


def test_every_code_of_capture_has_a_test() -> None:
    elsewhere = {
        "SNNFX202": "test_capture.py",
        "SNNFX210": "test_capture.py",
        "SNNFX212": "test_capture.py",
        "SNNFX217": "test_leaf_module_states.py",
        "SNNFX224": "test_first_step_match.py",
        "SNNFX225": "test_hints_of_calls.py",
        "SNNFX226": "test_variables_of_one_call.py",
        **dict.fromkeys(("SNNFX230", "SNNFX231", "SNNFX233"), "test_sequence_refusals.py"),
        "SNNFX234": "test_multi_step_models.py",
        "SNNFX235": "test_published_styles.py",
        "SNNFX220": "test_foreign_parts.py",
        "SNNFX221": "test_foreign_parts.py",
        "SNNFX222": "test_foreign_parts.py",
        "SNNFX223": "test_older_spikingjelly.py",
    }
    codes = {code for code in CODES if code.startswith("SNNFX2")}
    assert codes == {r.code for r in REFUSALS.values()} | set(elsewhere)
