"""`snnfx.verify` against nets written by hand: right ones, and ones that are wrong in one place."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx.errors import InputError, SnnfxError, VerificationError
from snnfx.inspect.verify.comparison import Tolerance, compare
from snnfx.inspect.verify.coroutines import Coroutine
from snnfx.inspect.verify.verify import VerificationReport, verify
from snnfx.sandbox.attribute_values import AttributeValues
from support.spikes import Spike

torch.set_num_threads(1)


class LIF(snnfx.MemoryModule):
    """v <- v/2 + x; spike at 1; soft reset."""

    def __init__(self) -> None:
        super().__init__()
        self.v_threshold = 1.0
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = 0.5 * self.v + x
        spike = Spike.apply(h - self.v_threshold)
        self.v = h - spike
        return spike


def lif_sequence(x_seq: Tensor) -> tuple[Tensor, Tensor]:
    """Spikes and potentials of a LIF, written out over time."""
    v: Any = 0.0
    spikes, potentials = [], []
    for x in x_seq:
        h = 0.5 * v + x
        spikes.append(Spike.apply(h - 1.0))
        v = h - spikes[-1]
        potentials.append(v)
    return torch.stack(spikes), torch.stack(potentials)


def folded(layer: Callable[[Tensor], Tensor], x_seq: Tensor) -> Tensor:
    return layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


@dataclass
class Options:
    time_dim: Any = 0
    entry: str = "forward"
    batch_norm: str = "fold"
    carry: dict[str, int] | None = None


@dataclass
class FakeRegion:
    name: str
    kind: str
    nodes: list[fx.Node] = field(default_factory=list)


class FakeNet(nn.Module):
    """What `verify` needs of a net: shares the model's submodules, has options, regions, `forward` and `run`.

    `function(net, *x_seq)` gives `(y_seq, states, record)`.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in model.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self.training = model.training
        self.function, self.options = function, Options(**options)
        self.regions: list[FakeRegion] = []

    def forward(self, *x_seq: Any, **kwargs: Any) -> Any:
        return self.run(*x_seq, **kwargs)[0]

    def run(self, *x_seq: Any, state: Any = None, record: Sequence[str] = (), **kwargs: Any) -> Any:
        y_seq, states, recorded = self.function(self, *x_seq, **kwargs)
        if not record:
            return y_seq, states
        if not set(record) <= recorded.keys():
            raise InputError("SNNFX311", "nothing of that name to record")
        return y_seq, states, {name: recorded[name] for name in record}


class Model(nn.Module):
    """Two layers of neurons with a BatchNorm between."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1, self.fc2, self.bn, self.lif2 = (
            nn.Linear(5, 6),
            LIF(),
            nn.Linear(6, 4),
            nn.BatchNorm1d(4),
            LIF(),
        )
        with torch.no_grad():
            self.fc1.weight.copy_(torch.linspace(-0.5, 1.0, 30).view(6, 5))
            self.bn.bias.fill_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif2(self.bn(self.fc2(self.lif1(self.fc1(x)))))


@dataclass
class Faults:
    """One wrong thing a net can do."""

    spike_at: int | None = None
    state: str = ""
    no_state: str = ""
    no_gradient_of_fc2: bool = False
    gradient_of_input_at: int | None = None
    norm: Callable[[nn.BatchNorm1d, Tensor], Tensor] = lambda bn, x_seq: folded(bn, x_seq)
    dtype: torch.dtype | None = None
    bias: float = 0.0


class Scale(torch.autograd.Function):
    """The identity with a gradient that is too large by a factor at one step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: int) -> Tensor:
        ctx.step = step
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        grad[ctx.step] *= 1.5
        return grad, None


def net_of(model: Model, faults: Faults | None = None, **options: Any) -> FakeNet:
    """The model by layers, with its faults."""
    wrong = faults or Faults()

    def function(net: Any, x_seq: Tensor) -> Any:
        if wrong.gradient_of_input_at is not None:
            x_seq = Scale.apply(x_seq, wrong.gradient_of_input_at)
        s1, v1 = lif_sequence(folded(net.fc1, x_seq) + wrong.bias)
        if wrong.spike_at is not None:
            flip = torch.zeros_like(s1)
            flip[wrong.spike_at, 1, 2] = 1 - 2 * s1[wrong.spike_at, 1, 2].detach()
            s1 = s1 + flip
        fc2 = net.fc2
        h = F.linear(s1, fc2.weight.detach(), fc2.bias) if wrong.no_gradient_of_fc2 else folded(fc2, s1)
        s2, v2 = lif_sequence(wrong.norm(net.bn, h))
        states = {"lif1.v": v1[-1], "lif2.v": v2[-1]}
        if wrong.state:
            states[wrong.state] = states[wrong.state] + 0.25
        states.pop(wrong.no_state, None)
        return s2.to(wrong.dtype or s2.dtype), states, {"lif1": s1, "lif1.v": v1, "lif2": s2, "lif2.v": v2}

    return FakeNet(model, function, **options)


def norm_per_step(bn: nn.BatchNorm1d, x_seq: Tensor) -> Tensor:
    return torch.stack([bn(x) for x in x_seq])


def message_of(model: nn.Module, net: FakeNet, *x_seq: Any, **kwargs: Any) -> str:
    with pytest.raises(VerificationError) as caught:
        verify(model, net, *x_seq, **kwargs)
    return str(caught.value)


@pytest.fixture
def x_seq() -> Tensor:
    return torch.rand(8, 3, 5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_a_right_net_passes_and_the_report_says_what_was_compared(x_seq: Tensor, training: bool, double: bool) -> None:
    model = Model().train(training)
    report = verify(model, net_of(model), x_seq, double=double)
    assert isinstance(report, VerificationReport)
    assert (report.T, report.training, report.dtype) == (8, training, "float64" if double else "float32")
    assert [report.count(kind) for kind in ("output", "state", "buffer", "gradient")] == [2, 2, 3, 7]
    assert report.largest("gradient") < (1e-9 if double else 1e-4)
    semantics = "BatchNorm statistics over T*N" if training else "the model run step by step"
    assert str(report).splitlines()[0] == (
        f"OK: the net matches the reference over T = 8 steps ({semantics}; "
        f"{'training' if training else 'eval'}, {report.dtype})"
    )
    assert "gradients    7   largest difference " in str(report)
    assert ("with T = 1, the net also matches one plain call of the model" in report.notes) is training


def test_without_gradients_none_are_compared(x_seq: Tensor) -> None:
    model = Model()
    assert verify(model, net_of(model, Faults(no_gradient_of_fc2=True)), x_seq, gradients=False).count("gradient") == 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_compared_whatever_the_callers_mode(x_seq: Tensor, context: Any) -> None:
    model = Model()
    with context():
        assert verify(model, net_of(model), torch.rand(8, 3, 5)).count("gradient") == 7


def test_per_step_statistics_are_compared_with_plain_stepping(x_seq: Tensor) -> None:
    model = Model()
    net = net_of(model, Faults(norm=norm_per_step), batch_norm="per_step")
    assert verify(model, net, x_seq).semantics == "the model run step by step"


def is_same(value: Any, other: Any) -> bool:
    values, spec = pytree.tree_flatten(value)
    others, other_spec = pytree.tree_flatten(other)
    pairs = zip(values, others, strict=True)
    return spec == other_spec and all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("double", [False, True])
def test_nothing_is_changed(x_seq: Tensor, double: bool) -> None:
    model = Model()
    model(x_seq[0]).sum().backward()
    model.fc1.register_forward_hook(lambda *args: None)
    model.fc2.bias.requires_grad_(False)
    x_seq.requires_grad_(True)
    net = net_of(model)
    pending = nn.Sequential(model.bn.eval())(x_seq.new_ones(2, 4)).sum()
    model.bn.train()

    def everything() -> list[Any]:
        return [
            {name: value.clone() for name, value in model.state_dict().items()},
            {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
            {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()},
            {name: id(b) for name, b in model.named_buffers()},
            [module.training for module in (*model.modules(), *net.modules())],
            [sorted(module.__dict__) for module in (*model.modules(), *net.modules())],
            [len(module._forward_hooks) for module in model.modules()],
            (model.lif1.v, model.lif2.v, x_seq.grad),
            (torch.get_rng_state(), random.getstate()),
        ]

    before = everything()
    verify(model, net, x_seq, double=double)
    with pytest.raises(VerificationError):
        verify(model, net_of(model, Faults(spike_at=3)), x_seq, double=double)
    assert is_same(everything(), before)
    assert model.lif1.v is before[7][0], "the state lost its history"
    pending.backward()


def test_state_of_before_does_not_matter(x_seq: Tensor) -> None:
    model = Model().eval()
    model(x_seq[0])
    verify(model, net_of(model), x_seq)


def test_a_wrong_spike_is_named_with_neuron_step_and_margin(x_seq: Tensor) -> None:
    model = Model().eval()
    text = message_of(model, net_of(model, Faults(spike_at=3)), x_seq)
    assert text.startswith("SNNFX401 `output` differs from the reference, the model run step by step: first at t = ")
    assert "The first neuron that differs is `lif1` at t = 3: 1 of 18 spikes, with |v - threshold| up to 0." in text
    assert "This is rounding" not in text


def test_a_wrong_spike_in_training_is_found_in_the_folded_reference(x_seq: Tensor) -> None:
    model = Model()
    text = message_of(model, net_of(model, Faults(spike_at=5)), x_seq)
    assert "differs from the reference with BatchNorm statistics over T*N" in text
    assert "`lif1` at t = 5: 1 of 18 spikes" in text


def test_the_output_says_step_count_and_size(x_seq: Tensor) -> None:
    model = nn.Sequential(nn.Linear(5, 2))

    def function(net: Any, x_seq: Tensor) -> Any:
        y_seq = folded(net.get_submodule("0"), x_seq)
        wrong = torch.zeros_like(y_seq)
        wrong[3, 0, 1], wrong[6] = 0.5, -2.0
        return y_seq + wrong, {}, {}

    text = message_of(model, FakeNet(model, function), x_seq)
    assert (
        "first at t = 3, where 1 of 6 elements differ; over all steps 7 of 48 differ, largest difference 2 (relative "
        in text
    )


def test_an_error_that_flips_spikes_near_the_threshold_is_no_rounding() -> None:
    model = Model().eval()
    with torch.no_grad():
        model.fc1.weight.zero_()
        model.fc1.bias.fill_(1.0 - 5e-8)
        model.fc2.weight.fill_(1.0)
    text = message_of(model, net_of(model, Faults(bias=1e-7)), torch.rand(3, 2, 5))
    assert "`lif1` at t = 0: 12 of 12 spikes" in text and "float64" in text


def test_spikes_that_rounding_flips_pass_and_are_counted() -> None:
    """1/3 + 2/3 is the threshold, or just below it, depending on how it is summed."""
    model = nn.Sequential(LIF())

    def function(net: Any, x_seq: Tensor) -> Any:
        error = 1e-7 if x_seq.dtype == torch.float32 else 0.0
        s, v = lif_sequence(x_seq + error)
        return s, {"0.v": v[-1]}, {"0": s, "0.v": v}

    net, x_seq = FakeNet(model, function), torch.full((4, 2, 3), 1 - 6e-8)
    report = verify(model, net, x_seq)
    assert (report.dtype, report.flipped_spikes) == ("float64", 6)
    assert "note: float32 rounding: 6 of 24 spikes flip, first in `0` at t = 0" in str(report)
    assert verify(model, net, x_seq, double=True).flipped_spikes == 0


def test_a_fault_in_float32_alone_is_found() -> None:
    """No potential is at the threshold, so rounding cannot explain the difference."""
    model = nn.Sequential(LIF())

    def function(net: Any, x_seq: Tensor) -> Any:
        s, v = lif_sequence(x_seq + (0.01 if x_seq.dtype == torch.float32 else 0.0))
        return s, {"0.v": v[-1]}, {"0": s, "0.v": v}

    text = message_of(model, FakeNet(model, function), torch.full((1, 2, 3), 0.3))
    assert text.startswith("SNNFX402 state `0.v`") and "rounding does not explain the difference" in text


@pytest.mark.parametrize("name", ["lif1.v", "lif2.v"])
def test_a_wrong_final_state_is_named(x_seq: Tensor, name: str) -> None:
    model = Model().eval()
    text = message_of(model, net_of(model, Faults(state=name)), x_seq)
    assert text.startswith(f"SNNFX402 state `{name}` differs from the reference, the model run step by step: ")
    assert "elements differ, largest difference 0.25" in text


def test_an_output_without_a_spike_is_noted(x_seq: Tensor) -> None:
    model = Model().eval()
    with torch.no_grad():
        model.bn.bias.fill_(-9.0)
    assert verify(model, net_of(model), x_seq).notes == (
        "warning: `lif2` never spikes, so this check is weak; use an input that makes neurons spike",
    )
    assert str(verify(model, net_of(model), x_seq)).startswith("warning: `lif2` never spikes")
    text = message_of(model, net_of(model, Faults(spike_at=3)), x_seq)
    assert text.startswith("SNNFX402 state `lif2.v`")
    assert "The first neuron that differs is `lif1` at t = 3: 1 of 18 spikes" in text


def test_a_missing_state_is_named(x_seq: Tensor) -> None:
    model = Model().eval()
    text = message_of(model, net_of(model, Faults(no_state="lif2.v")), x_seq)
    assert text.startswith("SNNFX402 state `lif2.v`")
    assert "the net does not return this state" in text


def test_states_of_modules_that_are_never_called_need_not_be_there(x_seq: Tensor) -> None:
    model = Model().eval()
    model.unused = LIF()
    verify(model, net_of(model), x_seq)


def test_a_number_stands_for_a_state_full_of_it(x_seq: Tensor) -> None:
    class Countdown(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("count", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1.0
            return x * self.count

    model = Countdown()

    def net(last: float) -> FakeNet:
        counts = torch.arange(1.0, 9.0).view(8, 1, 1)
        return FakeNet(model, lambda net, x: (x * counts, {"count": torch.full((3, 5), last)}, {}))

    verify(model, net(8.0), x_seq)
    assert "state `count`" in message_of(model, net(7.0), x_seq)


def test_a_missing_gradient_is_named(x_seq: Tensor) -> None:
    model = Model().eval()
    text = message_of(model, net_of(model, Faults(no_gradient_of_fc2=True)), x_seq)
    assert text.startswith(
        "SNNFX403 gradient of parameter `fc2.weight` differs from the reference, the model run step by step: "
    )
    assert "the net gives no gradient, the reference one of magnitude " in text


def test_a_wrong_gradient_of_an_input_is_named_with_its_step(x_seq: Tensor) -> None:
    model = Model().eval()
    text = message_of(model, net_of(model, Faults(gradient_of_input_at=4)), x_seq)
    assert text.startswith("SNNFX403 gradient of `input[0]`")
    assert "first at t = 4, where 15 of 15 elements differ" in text


def test_a_gradient_that_is_zero_but_for_rounding_passes() -> None:
    """The bias ahead of a BatchNorm in training: both sides give noise."""
    model = Model()
    with torch.no_grad():
        model.fc2.bias.fill_(100.0)
    verify(model, net_of(model), torch.rand(16, 32, 5))


def twice_updated(bn: nn.BatchNorm1d, x_seq: Tensor) -> Tensor:
    folded(bn, x_seq)
    return folded(bn, x_seq)


def uncounted(bn: nn.BatchNorm1d, x_seq: Tensor) -> Tensor:
    y_seq = folded(bn, x_seq)
    bn.num_batches_tracked -= 1
    return y_seq


@pytest.mark.parametrize(("norm", "name"), [(twice_updated, "bn.running_mean"), (uncounted, "bn.num_batches_tracked")])
def test_wrong_running_statistics_are_named(x_seq: Tensor, norm: Any, name: str) -> None:
    model = Model()
    text = message_of(model, net_of(model, Faults(norm=norm)), x_seq)
    assert text.startswith(f"SNNFX404 buffer `{name}` differs from the reference with BatchNorm statistics over T*N: ")


def test_the_declared_batch_norm_is_the_one_that_is_checked(x_seq: Tensor) -> None:
    model = Model()
    assert message_of(model, net_of(model, Faults(norm=norm_per_step)), x_seq).startswith("SNNFX40")
    assert message_of(model, net_of(model, batch_norm="per_step"), x_seq).startswith("SNNFX40")


def region(kind: str, *modules: str) -> FakeRegion:
    graph = fx.Graph()
    x = graph.placeholder("x")
    nodes = [graph.call_module(name, (x,)) for name in modules]
    for node in nodes:
        node.meta["where"] = ("models/net.py", 41)
    return FakeRegion(f"{kind}_0", kind, nodes)


@pytest.mark.parametrize("kind", ["loop", "map", "step"])
def test_norms_in_regions_that_run_per_step_have_statistics_per_step(x_seq: Tensor, kind: str) -> None:
    model = Model()
    net = net_of(model, Faults(norm=norm_per_step))
    net.regions = [region(kind, "lif2", "bn")]
    verify(model, net, x_seq)


def test_a_norm_of_what_does_not_change_with_time_is_called_once() -> None:
    model, x = nn.Sequential(nn.BatchNorm1d(5)), torch.rand(3, 5)
    net = FakeNet(model, lambda net, x, T: (net.get_submodule("0")(x).expand(T, 3, 5), {}, {}), time_dim=None)
    assert message_of(model, net, x, T=4).startswith("SNNFX404 buffer `0.running_var`")
    net.regions = [region("once", "0")]
    verify(model, net, x, T=4)


def test_the_region_and_the_line_are_named(x_seq: Tensor) -> None:
    model = Model().eval()
    for faults, place in (
        (Faults(spike_at=3), "region `loop_0` (loop), models/net.py:41"),
        (Faults(state="lif1.v"), "region `loop_0` (loop), models/net.py:41"),
        (Faults(no_gradient_of_fc2=True), "region `fold_0` (fold), models/net.py:41"),
    ):
        net = net_of(model, faults)
        net.regions = [region("fold", "fc1", "fc2"), region("loop", "lif1")]
        assert f"({place})" in message_of(model, net, x_seq)


def test_a_call_without_gradients_is_checked_as_well(x_seq: Tensor) -> None:
    model = Model().eval()
    right = net_of(model).function

    def function(net: Any, x_seq: Tensor) -> Any:
        y_seq, states, record = right(net, x_seq)
        return (y_seq if torch.is_grad_enabled() else y_seq + 1), states, record

    assert "`output` of a call without gradients differs" in message_of(model, FakeNet(model, function), x_seq)


# Arguments and outputs of many kinds


class Combine(nn.Module):
    """Two inputs and a keyword; a nested output; its step is not called forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(5, 5), LIF()

    def one_step(self, x: Tensor, image: dict[str, Tensor], *, gain: Tensor) -> dict[str, Any]:
        return {"spikes": self.lif(self.fc(x) + image["pixels"]), "rest": (x * gain, None)}


def test_inputs_that_stay_the_same_keywords_nested_outputs_and_entry() -> None:
    model, x_seq, gain = Combine(), torch.rand(6, 3, 5), torch.rand(6, 3, 1)
    image = {"pixels": torch.rand(3, 5)}

    def function(net: Any, x_seq: Tensor, image: dict[str, Tensor], *, gain: Tensor) -> Any:
        s, v = lif_sequence(folded(net.fc, x_seq) + image["pixels"])
        return {"spikes": s, "rest": (x_seq * gain, None)}, {"lif.v": v[-1]}, {"lif": s, "lif.v": v}

    net = FakeNet(model, function, time_dim=(0, None), entry="one_step")
    report = verify(model, net, x_seq, image, gain=gain, double=True)
    gradients = [c.name for c in report.comparisons if c.kind == "gradient"]
    assert gradients[2:] == [
        "gradient of `input[0]`",
        "gradient of `input[1]['pixels']`",
        "gradient of `input['gain']`",
    ]
    by_keyword = FakeNet(model, function, time_dim=(0, None, 0), entry="one_step")
    assert verify(model, by_keyword, x_seq, image, gain=gain).T == 6
    constant = FakeNet(model, function, time_dim=(0, None, None), entry="one_step")
    assert verify(model, constant, x_seq, image, gain=gain[0]).T == 6
    wrong = FakeNet(model, lambda net, *a, **k: (function(net, *a, **k)[0] | {"rest": (gain, None)}, {}, {}))
    wrong.options = net.options
    assert "SNNFX401 `output['rest'][0]` differs" in message_of(model, wrong, x_seq, image, gain=gain)


@pytest.mark.parametrize("time_dim", [-1, 1, 0])
def test_time_may_be_anywhere(time_dim: int) -> None:
    model = Model().eval()
    right = net_of(model).function

    def function(net: Any, x_seq: Tensor) -> Any:
        y_seq, states, record = right(net, x_seq.movedim(time_dim, 0))
        return y_seq.movedim(0, time_dim), states, record

    x_seq = torch.rand(8, 3, 5).movedim(0, time_dim)
    assert verify(model, FakeNet(model, function, time_dim=time_dim), x_seq).T == 8


def test_places_of_time_by_keyword() -> None:
    class ByName(nn.Module):
        def forward(self, *, x: Tensor, gain: Tensor) -> Tensor:
            return x * gain

    net = FakeNet(ByName(), lambda net, x, gain: (x * gain, {}, {}), time_dim={"gain": None, "x": 0})
    assert verify(ByName(), net, x=torch.rand(8, 2), gain=torch.rand(2)).T == 8


def test_attributes_start_with_their_values_at_conversion(x_seq: Tensor) -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.number, self.lazy, self.tensor = 0.0, None, torch.ones(5)

        def forward(self, x: Tensor) -> Tensor:
            if self.lazy is None:
                self.lazy = torch.full_like(x, 0.5)
            self.number, self.lazy, self.tensor = self.number + x, self.lazy - x, self.tensor * x
            return self.number + self.lazy + self.tensor

    model = nn.Sequential(Cell())

    def function(net: Any, x_seq: Tensor) -> Any:
        sums, product = x_seq.cumsum(0), x_seq.cumprod(0)
        states = {"0.number": sums[-1], "0.lazy": 0.5 - sums[-1], "0.tensor": product[-1]}
        return 0.5 + product, states, {}

    net = FakeNet(model, function)
    net.first_attributes = AttributeValues.of(model)
    model(x_seq[0])
    before = model[0].number
    assert verify(model, net, x_seq, atol=1e-4).count("state") == 3
    assert model[0].number is before


def test_a_number_of_steps_where_no_input_has_time() -> None:
    model = Model().eval()
    right = net_of(model).function
    net = FakeNet(model, lambda net, x, T: right(net, x.expand(T, 3, 5)), time_dim=None)
    assert verify(model, net, torch.rand(3, 5), T=4).T == 4


def test_state_in_arguments() -> None:
    class Carried(nn.Module):
        def forward(self, x: Tensor, memory: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
            memory = x if memory is None else 0.5 * memory + x
            return memory.relu(), memory, x

    def function(keep: bool, error: float) -> Callable[..., Any]:
        def run(net: Any, x_seq: Tensor) -> Any:
            memory = [x_seq[0]]
            for x in x_seq[1:]:
                memory.append(0.5 * memory[-1] + x)
            m = torch.stack(memory)
            states = {"memory": m[-1] + error, "extra": x_seq[-1]}
            return ((m.relu(), m, x_seq) if keep else m.relu()), states, {}

        return run

    model, x_seq, carry = Carried(), torch.randn(5, 2, 3), {"memory": 1, "extra": 2}
    for keep in (True, False):
        verify(model, FakeNet(model, function(keep, 0.0), carry=carry), x_seq)
        net = FakeNet(model, function(keep, 0.5), carry=carry)
        assert message_of(model, net, x_seq).startswith("SNNFX402 state `memory`")


def test_outputs_of_another_structure_shape_or_dtype(x_seq: Tensor) -> None:
    model = Model().eval()
    right = net_of(model).function

    def changed(change: Callable[[Tensor], Any]) -> FakeNet:
        def function(net: Any, x_seq: Tensor) -> Any:
            y_seq, *rest = right(net, x_seq)
            return change(y_seq), *rest

        return FakeNet(model, function)

    assert "the net returns output[0], the reference output" in message_of(model, changed(lambda y: (y,)), x_seq)
    assert "dimension 0 should be T = 8" in message_of(model, changed(lambda y: y[:4]), x_seq)
    assert "the net gives [8, 3, 2] float32, the reference [8, 3, 4] float32" in message_of(
        model, changed(lambda y: y[..., :2]), x_seq
    )
    assert "the net gives [8, 3, 4] float64, the reference" in message_of(model, changed(Tensor.double), x_seq)
    assert "the net gives None, the reference" in message_of(model, changed(lambda y: None), x_seq)


def test_arguments_are_checked_before_any_work(x_seq: Tensor) -> None:
    model = Model().eval()

    def fails(net: Any, *x_seq: Any, **kwargs: Any) -> Any:
        raise AssertionError("was run")

    net = FakeNet(model, fails)
    timeless = FakeNet(model, fails, time_dim=None)
    two, nested = FakeNet(model, fails, time_dim=(0, 0)), FakeNet(model, fails, time_dim=((0, 1),))
    for code, call in {
        "SNNFX304": lambda: verify(net, model, x_seq),
        "SNNFX310": lambda: verify(model, timeless, x_seq),
        "SNNFX301": lambda: verify(model, net, x_seq[:0]),
        "SNNFX303": lambda: verify(model, net, x_seq, T=7),
        "SNNFX306": lambda: verify(model, net, torch.tensor(1.0)),
        "SNNFX307": lambda: verify(model, two, x_seq),
        "SNNFX307 ": lambda: verify(model, nested, x_seq),
    }.items():
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == code.strip()


def test_the_mode_is_that_of_the_net(x_seq: Tensor) -> None:
    class Gain(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if self.training else 2 * x)

    model = Gain()
    net = net_of(model)
    right = net.function
    net.function = lambda net, x_seq: right(net, x_seq if net.training else 2 * x_seq)
    net.eval()
    assert model.training and not model.bn.training
    assert verify(model, net, x_seq).training is False
    assert model.training


# Random operations


class WithDropout(Model):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(self.dropout(x), 0.2, self.training))


def dropped_in_net(model: Model, drop: Callable[[Any, Tensor], Tensor]) -> FakeNet:
    net = net_of(model)
    right = net.function
    net.function = lambda net, x_seq: right(net, drop(net, x_seq))
    return net


@pytest.mark.parametrize("double", [False, True])
def test_dropout_drops_the_same_elements_on_both_sides(x_seq: Tensor, double: bool) -> None:
    model = WithDropout()
    mapped = dropped_in_net(
        model, lambda net, x: F.dropout(torch.vmap(net.dropout, randomness="different")(x), 0.2, net.training)
    )
    whole = dropped_in_net(model, lambda net, x: F.dropout(folded(net.dropout, x), 0.2, net.training))
    stepped = dropped_in_net(
        model, lambda net, x: torch.stack([F.dropout(y, 0.2) for y in [net.dropout(y) for y in x]])
    )
    for net in (mapped, whole, stepped):
        notes = verify(model, net, x_seq, double=double).notes
        assert "net and reference drew the same random numbers: `dropout`, `bernoulli` of shape [3, 5]" in notes
    assert model.dropout.p == 0.5


@pytest.mark.parametrize(
    "drop",
    [
        lambda net, x: folded(net.dropout, x),
        lambda net, x: F.dropout(folded(net.dropout, x), 0.3, net.training),
        lambda net, x: F.dropout(F.dropout(folded(net.dropout, x), 0.2), 0.2),
        lambda net, x: F.dropout(torch.stack([folded(net.dropout, x)[0]] * 8), 0.2),
    ],
)
def test_a_lost_changed_added_or_repeated_dropout_is_found(x_seq: Tensor, drop: Any) -> None:
    model = WithDropout()
    assert message_of(model, dropped_in_net(model, drop), x_seq)[:8] in ("SNNFX401", "SNNFX411", "SNNFX402")


def test_spikingjelly_dropout_keeps_its_mask(x_seq: Tensor) -> None:
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    model = nn.Sequential(layer.Dropout(0.5), nn.Linear(5, 4))

    def function(net: Any, x_seq: Tensor) -> Any:
        mask = F.dropout(torch.ones_like(x_seq[0]), 0.5)
        return folded(net.get_submodule("1"), x_seq * mask), {"0.mask": mask}, {}

    verify(model, FakeNet(model, function), x_seq)
    verify(model, snnfx.convert(model), x_seq)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.rand_like(x)


def test_random_operations_that_differ_are_called_incomparable(x_seq: Tensor) -> None:
    model = Noisy()
    alike = FakeNet(model, lambda net, x: (folded(net.fc, x) + torch.stack([torch.rand_like(y) for y in x]), {}, {}))
    assert "note: net and reference drew the same random numbers: `rand` of shape [3, 5]" in str(
        verify(model, alike, x_seq)
    )
    other = FakeNet(model, lambda net, x: (folded(net.fc, x) + torch.rand(9, *x.shape[1:])[1:], {}, {}))
    assert message_of(model, other, x_seq).startswith("SNNFX411 net and model cannot draw the same random numbers")


def test_numbers_of_python_are_random_alike_and_drawn_anew(x_seq: Tensor) -> None:
    class Shaken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + random.random()

    net = FakeNet(Shaken(), lambda net, x: (torch.stack([y + random.random() for y in x]), {}, {}))
    state = random.getstate()
    verify(Shaken(), net, x_seq)
    assert random.getstate() == state


# float64 copies


def test_copies_in_float64_share_modules_and_cast_what_is_no_buffer(x_seq: Tensor) -> None:
    class FirstState(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.eye(5)), torch.full((5,), 0.5)
            self.register_memory("v", torch.zeros(3, 5))

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.v @ self.weight * self.scale + x
            self.seen = [self.v]
            return self.v

    model = nn.Sequential(FirstState())
    model(x_seq[0])
    dtypes = []

    def function(net: Any, x_seq: Tensor) -> Any:
        cell = net.get_submodule("0")
        dtypes.append(x_seq.dtype)
        v, out = torch.zeros_like(x_seq[0]), []
        for x in x_seq:
            v = v @ cell.weight * cell.scale + x
            out.append(v)
        return torch.stack(out), {"0.v": v}, {}

    report = verify(model, FakeNet(model, function), x_seq, double=True)
    assert set(dtypes) == {torch.float64}
    assert report.largest("output") < 1e-12
    assert model[0].weight.dtype == model[0].scale.dtype == torch.float32
    assert model[0].v.requires_grad


# Converted nets


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1, self.lif1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), snnfx.neuron.LIFNode()
        self.drop, self.fc, self.bn2, self.lif2 = (
            nn.Dropout(),
            nn.Linear(64, 3),
            nn.BatchNorm1d(3),
            snnfx.neuron.LIFNode(),
        )
        nn.init.constant_(self.bn1.bias, 0.7)
        nn.init.constant_(self.bn2.bias, 0.7)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.lif1(3 * self.bn1(self.conv(x))), 2)
        return self.lif2(3 * self.bn2(self.fc(self.drop(x.flatten(1)))))


@pytest.mark.parametrize("time_dim", [0, -1, None])
@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
@pytest.mark.parametrize("training", [False, True])
def test_a_converted_net_does_what_the_model_does(training: bool, batch_norm: str, time_dim: int | None) -> None:
    model = Convolutional().train(training)
    net = snnfx.convert(model, batch_norm=batch_norm, time_dim=time_dim)
    x, T = (torch.rand(2, 1, 8, 8), 5) if time_dim is None else (torch.rand(5, 2, 1, 8, 8).movedim(0, time_dim), None)
    report = verify(model, net, x, T=T, double=True)
    folds = training and batch_norm == "fold"
    assert report.semantics == ("BatchNorm statistics over T*N" if folds else "the model run step by step")
    assert report.largest("output") == 0
    assert ("net and reference drew the same random numbers: `drop`" in report.notes) is training
    assert ("with T = 1, the net also matches one plain call of the model" in report.notes) is folds


def test_a_converted_net_of_another_model_is_found_out() -> None:
    model = Convolutional().eval()
    net = snnfx.convert(model)
    other = copy.deepcopy(model)
    other.lif1.v_threshold = 0.5
    text = message_of(other, net, torch.rand(5, 2, 1, 8, 8))
    assert "The first neuron that differs is `lif1` at t = 0: " in text
    assert "(region `loop" in text and "test_verify.py:" in text


# Single comparisons


@pytest.mark.parametrize(
    ("actual", "expected", "failed"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]), False),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), True),
        (torch.tensor([float("inf")]), torch.tensor([float("inf")]), False),
        (torch.tensor([float("inf")]), torch.tensor([-float("inf")]), True),
        (torch.tensor([1e6 + 50]), torch.tensor([1e6]), False),
        (torch.tensor([1e6 + 200]), torch.tensor([1e6]), True),
        (torch.tensor([1e6 + 50], dtype=torch.float64), torch.tensor([1e6], dtype=torch.float64), True),
        (torch.tensor([10**6 + 1]), torch.tensor([10**6]), True),
        (torch.tensor([True]), torch.tensor([False]), True),
        (torch.tensor([1 + 1j]), torch.tensor([1 - 1j]), True),
        (torch.tensor([]), torch.tensor([]), False),
        (0.0, torch.zeros(3), False),
        (torch.ones(3), 0.0, True),
        (None, None, False),
        (None, 0.0, True),
        ("a", "b", True),
    ],
)
def test_comparison_of(actual: Any, expected: Any, failed: bool) -> None:
    result = compare("state", "x", actual, expected, Tolerance())
    assert result.failed is failed
    assert bool(result.detail) is failed


def test_tolerances_can_be_said(x_seq: Tensor) -> None:
    model = Model().eval()
    net = net_of(model, Faults(state="lif1.v"))
    verify(model, net, x_seq, atol=0.3)
    with pytest.raises(SnnfxError):
        verify(model, net, x_seq, atol=0.2, rtol=0.0)


def test_the_docstring_names_every_code_that_is_raised() -> None:
    assert all(f"SNNFX{code}" in (verify.__doc__ or "") for code in (401, 402, 403, 404, 405, 410, 411, 412))
    assert copy.copy(Tolerance(1.0)) == Tolerance(1.0)


@pytest.fixture(autouse=True)
def _no_coroutine_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if isinstance(thread, Coroutine)]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
def test_sparse_buffers_are_compared(layout: str, double: bool) -> None:
    class Sparse(nn.Module):
        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.register_buffer("weight", getattr(weight, layout)())
            self.lif = snnfx.neuron.LIFNode(v_threshold=0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(torch.sparse.mm(self.weight, x.t()).t())

    model, x_seq = Sparse(torch.eye(4)), 3 * torch.rand(5, 3, 4)
    assert verify(model, snnfx.convert(model), x_seq, double=double).count("buffer") == 1
    with pytest.raises(VerificationError, match="SNNFX40"):
        verify(model, snnfx.convert(Sparse(2 * torch.eye(4))), x_seq, double=double)


def test_a_float32_net_that_casts_and_is_wrong_in_float64_is_named() -> None:
    class Casting(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_memory("v", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.v is None:
                self.v = torch.zeros(x.shape).float()
            self.v = self.fc(self.v) + x
            return self.v

    model, wrong = Casting(), Casting()
    with pytest.raises(VerificationError, match=r"SNNFX401.*Compared in float64 and in float32"):
        verify(model, snnfx.convert(wrong), torch.rand(5, 3, 4))
