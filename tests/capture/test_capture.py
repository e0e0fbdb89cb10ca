"""Capture: step graphs compute the same as stepping the model, and capture does not change the model."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, InputError
from support.stepping import assert_converts, assert_same, fresh_copy, run_net, run_stepped, step_model

T, N, C = 5, 3, 4


def sequence(*shape: int) -> Tensor:
    return torch.randn(shape or (T, N, C), dtype=torch.float64)


class Layer(nn.Module):
    """A linear layer; subclasses add attributes in `prepare` and define the step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.prepare()
        self.double()

    def prepare(self) -> None:
        """Add attributes."""


class Memory(snnfx.MemoryModule):
    initial: Any = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.register_memory("v", self.initial)
        self.double()


class StartsFromNone(Layer):
    def prepare(self) -> None:
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = torch.full_like(x, 0.3)
        self.v = 0.5 * self.v + x
        return self.v


class StartsFromFloat(Layer):
    def prepare(self) -> None:
        self.v: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if isinstance(self.v, float):
            self.v = torch.zeros_like(x)
        self.v = 0.5 * self.v + x
        return self.v


class FloatStandsForTensor(Layer):
    def prepare(self) -> None:
        self.v: Any = 0.25

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + self.fc(x)
        return self.v


class FloatIsChosenByWhere(Layer):
    """The C++ code of torch.where once treated a proxy as a tensor."""

    def prepare(self) -> None:
        self.v: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = torch.where(self.fc(x) > 0, x, self.v)
        return self.v


class AddedInPlace(Layer):
    def prepare(self) -> None:
        self.v: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v += self.fc(x)
        return self.v * 2


class TensorAttribute(Layer):
    def prepare(self) -> None:
        self.v = torch.ones(C, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.9 * self.v + self.fc(x)
        return self.v * 2


class TensorMemory(Memory):
    initial = torch.full((C,), 0.5, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + self.fc(x)
        return self.v


class NoneMemory(Memory):
    initial = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = torch.full_like(x, 0.3)
        self.v = 0.5 * self.v + x
        return self.v


class StartsFromProjection(Layer):
    def prepare(self) -> None:
        self.v: Any = None
        self.project = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = self.project(x).tanh()
        self.v = 0.5 * self.v + self.fc(x)
        return self.v


class StartsFromParameter(Layer):
    def prepare(self) -> None:
        self.v: Any = None
        self.v0 = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = self.v0.expand_as(x)
        self.v = 0.5 * self.v + x
        return self.v


class StartsFromZerosOfASize(Layer):
    def prepare(self) -> None:
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros(x.shape[0], C, dtype=x.dtype)
        self.v = 0.5 * self.v + self.fc(x)
        return self.v


class CreatedInTheStep(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "v"):
            self.v = torch.zeros_like(x)
        self.v = 0.5 * self.v + self.fc(x)
        return self.v


class ListOfStates(Layer):
    def prepare(self) -> None:
        self.v: list[Any] = [None, None]

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v[0] is None:
            self.v[0] = torch.zeros_like(x)
        self.v[0] = 0.5 * self.v[0] + x
        return self.v[0]


class DictOfStates(Layer):
    def prepare(self) -> None:
        self.v: dict[str, Any] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.v["mem"] = 0.5 * self.v.get("mem", 0.0) + self.fc(x)
        return self.v["mem"]


class TupleOfStates(Layer):
    def prepare(self) -> None:
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = (torch.zeros_like(x), torch.ones_like(x))
        fast, slow = self.v
        self.v = (0.5 * fast + x, 0.9 * slow + fast)
        return self.v[1]


class ChangedInPlaceByMethods(Layer):
    def prepare(self) -> None:
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = torch.zeros_like(x)
        self.v.mul_(0.5).add_(x)
        return self.v * 1


STATE_MODELS = [
    StartsFromNone, StartsFromFloat, FloatStandsForTensor, FloatIsChosenByWhere, AddedInPlace, TensorAttribute,
    TensorMemory, NoneMemory, StartsFromProjection, StartsFromParameter, StartsFromZerosOfASize, CreatedInTheStep,
    ListOfStates, DictOfStates, TupleOfStates, ChangedInPlaceByMethods,
]  # fmt: skip


@pytest.mark.parametrize("model", STATE_MODELS, ids=lambda cls: cls.__name__)
def test_state_in_attributes_becomes_slots(model: Callable[[], nn.Module]) -> None:
    net = assert_converts(model(), sequence())
    assert {slot.name.partition(".")[0] for slot in net.program.slots} == {"v"}
    assert "loop" in {region.kind for region in net.regions}


@pytest.mark.parametrize("model", sorted({*STATE_MODELS} - {DictOfStates}, key=str), ids=lambda cls: cls.__name__)
def test_initial_values_do_not_peel_the_first_step(model: Callable[[], nn.Module]) -> None:
    assert snnfx.convert(model()).program.first_step is None


def test_a_state_of_another_shape_is_reset_by_the_model() -> None:
    class Resets(Layer):
        def prepare(self) -> None:
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.v is None or self.v.shape != x.shape:
                self.v = torch.zeros_like(x)
            self.v = 0.5 * self.v + self.fc(x)
            return self.v

    assert_converts(Resets(), sequence(), examples=True)
    with pytest.raises(CaptureError, match="SNNFX202"):
        snnfx.convert(Resets())


class FirstStepDiffers(Memory):
    initial = None

    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(3 * self.fc(x))
        if self.v is None:
            self.v = x.sigmoid()
            return self.v * 2
        self.v = 0.5 * self.v + x
        return self.v


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_first_step_with_another_computation_is_peeled(steps: int) -> None:
    net = assert_converts(FirstStepDiffers(), sequence(steps, N, C))
    assert net.program.first_step is not None


def test_a_passed_state_skips_the_peeled_step() -> None:
    model, x_seq = FirstStepDiffers(), sequence()
    net = snnfx.convert(model)
    whole, final = net.run(x_seq)
    first, state = net.run(x_seq[:1])
    rest, last = net.run(x_seq[1:], state=state)
    assert_same(torch.cat([first, rest]), whole)
    assert_same(last, final)
    assert_same(whole.detach(), run_stepped(model, x_seq).outputs)


def test_record_with_a_peeled_step_needs_the_state_before_it() -> None:
    net, x_seq = snnfx.convert(FirstStepDiffers()), sequence()
    with pytest.raises(InputError, match="SNNFX311"):
        net.run(x_seq, record="v")
    _, state = net.run(x_seq[:1])
    assert net.run(x_seq[1:], state=state, record="v")[2]["v"].shape == (T - 1, N, C)


def test_a_peeled_step_with_time_last_an_invariant_input_and_one_step_at_a_time() -> None:
    model, x_seq = FirstStepDiffers(), sequence()
    expected = run_stepped(model, x_seq).outputs
    assert_same(snnfx.convert(model, time_dim=-1)(x_seq.movedim(0, -1)).detach(), expected.movedim(0, -1))
    single = snnfx.convert(model, step_mode="s")
    assert_same(torch.stack([single(x) for x in x_seq]).detach(), expected)
    constant = run_stepped(model, x_seq[:1].expand(T, N, C)).outputs
    assert_same(snnfx.convert(model, time_dim=None)(x_seq[0], T=T).detach(), constant)


def test_a_first_call_without_state_is_peeled() -> None:
    class Cell(Layer):
        def prepare(self) -> None:
            self.cell, self.h = nn.GRUCell(C, C), None

        def forward(self, x: Tensor) -> Tensor:
            self.h = self.cell(x) if self.h is None else self.cell(x, self.h)
            return self.h

    assert assert_converts(Cell(), sequence()).program.first_step is not None


def test_a_neuron_called_twice_threads_its_state() -> None:
    class Twice(Layer):
        def prepare(self) -> None:
            self.lif = neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.fc(self.lif(3 * x)))

    net = assert_converts(Twice(), sequence())
    assert [slot.name for slot in net.program.slots] == ["lif.v"]


def test_a_python_counter_counts_time_steps() -> None:
    class Counter(Layer):
        def prepare(self) -> None:
            self.t = 0

        def forward(self, x: Tensor) -> Tensor:
            before = self.t
            self.t += 1
            return self.fc(x) * before + self.t

    net = assert_converts(Counter(), sequence())
    assert net.run(sequence())[1] == {"t": T}


def test_an_attribute_that_is_only_written_is_not_state() -> None:
    class Notes(Layer):
        def prepare(self) -> None:
            self.last, self.history = None, []

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.fc(x)
            self.history.append(self.last)
            return self.last * 2

    net = assert_converts(Notes(), sequence())
    assert net.program.slots == []
    assert [region.kind for region in net.regions] == ["fold"]


def test_a_count_of_the_steps_is_state() -> None:
    class Counts(Layer):
        def prepare(self) -> None:
            self.count, self.counts = 0, {"steps": 0}

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.counts["steps"] += 2
            return self.fc(x)

    net = assert_converts(Counts(), sequence())
    _, state = net.run(sequence())
    assert state == {"count": len(sequence()), "counts.steps": 2 * len(sequence())}


def test_a_list_that_grows_and_is_read_is_refused() -> None:
    class Grows(Layer):
        def prepare(self) -> None:
            self.history: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.history.append(self.fc(x))
            return torch.stack(self.history).sum(0)

    with pytest.raises(CaptureError, match="SNNFX201.*changes its structure"):
        snnfx.convert(Grows())


def test_delays_need_no_loop() -> None:
    class Delays(Layer):
        def prepare(self) -> None:
            self.one, self.two = None, None

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if self.one is None:
                self.one, self.two = torch.zeros_like(x), torch.ones_like(x)
            y = self.two + x
            self.two = self.one
            self.one = x
            return y

    net = assert_converts(Delays(), sequence())
    assert {region.kind for region in net.regions} == {"fold"}
    assert len(net.program.slots) == 2
    x_seq = sequence()
    first, state = net.run(x_seq[:2])
    assert_same(torch.cat([first, net.run(x_seq[2:], state=state)[0]]), net(x_seq))


def test_a_delay_that_starts_as_a_number_feeds_a_neuron() -> None:
    class Delayed(Memory):
        initial = 0.5

        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            spike = self.lif(self.fc(self.v * 4 + x))
            self.v = x
            return spike

    assert_converts(Delayed(), sequence())


@pytest.mark.parametrize("following", ["unchanged", "constant", "unused"])
def test_a_slot_whose_next_value_is_not_computed_by_the_step(following: str) -> None:
    class Odd(Memory):
        initial = 0.5

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) if following == "unused" else self.fc(x) * self.v
            if following == "constant":
                self.v = 2.0
            return y

    assert_converts(Odd(), sequence())


@pytest.mark.parametrize("initial", [0.5, torch.ones(N, C, dtype=torch.float64)], ids=["number", "tensor"])
def test_the_state_before_the_step_is_an_output(initial: Any) -> None:
    class Old(Memory):
        def forward(self, x: Tensor) -> Any:
            old = self.v
            self.v = 0.5 * self.v + self.fc(x)
            return (old + self.v, self.v, self.v) if isinstance(initial, float) else (old, old + self.v, self.v)

    Old.initial = initial
    assert_converts(Old(), sequence())


def test_a_leaf_neuron_and_batch_norm_on_a_cycle_are_stepped() -> None:
    class Recurrent(Memory):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.lif = nn.BatchNorm1d(C), neuron.LIFNode()
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.lif(self.bn(self.fc(x + self.v)) + 1)
            return self.v

    net = assert_converts(Recurrent(), sequence())
    assert [region.kind for region in net.regions] == ["loop"]
    assert_converts(Recurrent().eval(), sequence())


@pytest.mark.parametrize(
    "following",
    [
        lambda self, x: 0.9 * self.v + x,
        lambda self, x: x + self.v * torch.sigmoid(self.leak),
        lambda self, x: x - self.v / 2,
        lambda self, x: torch.add(torch.mul(self.v, 0.5), x),
    ],
)
def test_a_state_that_starts_as_the_input_starts_from_zero_where_that_is_the_same(following: Any) -> None:
    class Leaky(Layer):
        def prepare(self) -> None:
            self.v: Any = None
            self.leak = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            self.v = x if self.v is None else following(self, x)
            spike = torch.sigmoid(self.v - 1.0)
            self.v = self.v - spike
            return spike

    net = assert_converts(Leaky(), sequence())
    assert net.program.first_step is None and net.program.initial_values == (0.0,)


@pytest.mark.parametrize(
    "following", [lambda v, x: v + (x - v) / 2, lambda v, x: v * x + x, lambda v, x: 0.9 * v + 0.1 * x]
)
def test_a_first_step_that_differs_from_a_zero_state_is_peeled(following: Any) -> None:
    class Leaky(Layer):
        def prepare(self) -> None:
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            self.v = x if self.v is None else following(self.v, x)
            return self.v

    assert assert_converts(Leaky(), sequence()).program.first_step is not None


class Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x > 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(ctx.slope * x), None


def test_a_users_autograd_function_keeps_its_gradient() -> None:
    class Spiking(Layer):
        def prepare(self) -> None:
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if self.v is None:
                self.v = torch.zeros_like(x)
            h = 0.5 * self.v + x
            spike = Surrogate.apply(h - 0.3, 4.0)
            self.v = h * (1 - spike)
            return spike

    assert_converts(Spiking(), sequence())


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.clamp_(max=0.3),
        lambda v: v.mul_(0.5),
        lambda v: v.masked_fill_(v > 0.3, 0.1),
        lambda v: v.__setitem__(v > 0.3, 0.0),
        lambda v: v.__setitem__((slice(None), 0), 0.0),
        lambda v: v.__imul__(2),
    ],
)
def test_an_in_place_change_without_gradient_does_not_affect_the_autograd_graph(change: Any) -> None:
    class Clipped(Layer):
        def prepare(self) -> None:
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            v = 1.0 * x if self.v is None else 0.5 * self.v + x
            with torch.no_grad():
                change(v)
            self.v = v
            return v.sin()

    assert_converts(Clipped(), sequence())


spike_function = Surrogate.apply  # bound before anything is traced, as most models have it


def test_a_stored_bound_apply_keeps_its_gradient() -> None:
    class Spiking(Layer):
        def prepare(self) -> None:
            self.v: Any = None
            self.spike = spike_function

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if self.v is None:
                self.v = torch.zeros_like(x)
            self.v = 0.5 * self.v + x
            spike = self.spike(self.v - 0.3, 4.0)
            self.v = self.v - 0.3 * spike
            return spike

    assert_converts(Spiking(), sequence())
    x = torch.ones(2, requires_grad=True)
    spike_function(x, 4.0).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((2,), 4.0).sigmoid())


def test_no_grad_and_detach_inside_a_step_cut_the_gradient() -> None:
    class Cuts(Layer):
        def prepare(self) -> None:
            self.lif, self.v = neuron.LIFNode(), None

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                gate = self.lif(self.fc(x).exp())
            y = self.fc(x)
            if self.v is None:
                self.v = torch.zeros_like(y)
            self.v = 0.5 * self.v.detach() + gate * y
            return self.v

    assert_converts(Cuts(), sequence())


def test_converting_under_no_grad_changes_neither_the_net_nor_the_mode() -> None:
    with torch.no_grad():
        net = snnfx.convert(StartsFromNone(), example_inputs=sequence()[0])
        assert not torch.is_grad_enabled()
    assert net(sequence()).requires_grad


def test_control_flow_on_shapes_needs_examples_and_fixes_the_size() -> None:
    class Shapes(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) if x.shape[0] == N else x
            for i in range(x.shape[1]):
                y = y.tanh() if i % 2 else 1.5 * y
            return y

    with pytest.raises(CaptureError, match="SNNFX202"):
        snnfx.convert(Shapes())
    net = assert_converts(Shapes(), sequence(), examples=True)
    with pytest.raises(InputError, match="SNNFX312.*test_capture.py"):
        net(sequence(T, N + 1, C))


def test_sizes_in_shapes_and_in_factories_stay_variable() -> None:
    class Sizes(Layer):
        def forward(self, x: Tensor) -> Tensor:
            n, c = x.shape
            left, right = self.fc(x).chunk(2, 1)
            offset = torch.zeros(x.shape[0], c // 2, dtype=x.dtype)
            return (left * right).view(n, c // 2) + offset

    net = assert_converts(Sizes(), sequence())
    x_seq = sequence(T, N + 2, C)
    assert_same(net(x_seq).detach(), run_stepped(net.source, x_seq).outputs)


def test_the_size_of_the_batch_as_a_number_is_not_folded() -> None:
    class Normalised(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y / x.shape[0] + y.sum() / y.numel()

    assert_converts(Normalised(), sequence())


def test_a_training_flag_is_read_at_the_call() -> None:
    class Modes(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            if self.training:
                y.mul_(2)
            constant = [1.0, 2.0, 3.0, 4.0] if self.training else [5.0, 6.0, 7.0, 8.0]
            return F.dropout(y, 1.0, self.training) + y * torch.tensor(constant, dtype=x.dtype)

    for mode in (True, False):
        model = Modes().train(not mode)
        net = snnfx.convert(model, example_inputs=sequence()[0])
        net.train(mode)
        x_seq = sequence()
        assert_same(net(x_seq).detach(), run_stepped(model, x_seq).outputs)


def test_dropout_draws_a_mask_for_each_step_in_training_only() -> None:
    net = snnfx.convert(nn.Sequential(nn.Dropout(0.5)))
    x_seq = torch.ones(20, 2, 8)
    masks = net(x_seq)
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:])
    assert torch.equal(net.eval()(x_seq), x_seq)


def test_autocast_inside_a_step_is_kept() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(C, C)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.fc(x)
            return y.float()

    x_seq = sequence().float()
    for model in (Cast(), nn.Sequential(Cast(), neuron.LIFNode())):
        net = snnfx.convert(model)
        assert net.regions[0].kind == "loop"
        assert_same(net(x_seq).detach(), run_stepped(model, x_seq).outputs)


IN_PLACE = {
    "method": "y.add_(1).mul_(2); return y",
    "operator with an alias": "z = y; y += 1; return z * y",
    "operator on a number of the step": "n = x.shape[1]; n += 1; return y * n",
    "logic": "return torch.where((y > 0) & (y < 1) | ~(y > -1) ^ (y > 2), y, 2 * y)",
    "logic with an alias": "m = y > 0; k = m; m &= y < 1; m |= y > 2; m ^= y > 3; return torch.where(k, y, 2 * y)",
    "arithmetic with an alias": "z = y * 2; k = z; z **= 2; z %= 0.7; z //= 0.1; return k + y",
    "functional": "z = F.relu(y, inplace=True); return y + z",
    "module, the value is read before and after": "w = y.exp(); z = self.relu(y); return w + y + z",
    "a buffer": "self.buffer.add_(1); return y * self.buffer",
    "a plain attribute": "self.plain.add_(1); self.plain += y.mean(0); return y * self.plain",
    "filling": "z = torch.empty_like(y); z.fill_(3.0); y = y * z; y.zero_(); return y + z",
}
REFUSED_IN_PLACE = {
    "x.mul_(2); return y": "SNNFX209",
    "x += 1; return y": "SNNFX209",
    "x **= 2; return y": "SNNFX209",
    "return F.relu(x, inplace=True)": "SNNFX209",
    "y[:, 0].mul_(2); return y": "SNNFX214",
    "y.view(-1).add_(1); return y": "SNNFX214",
    "self.buffer[0].add_(1); return y * self.buffer": "SNNFX214",
    "self.buffer.data = self.buffer + 1; return y * self.buffer": "SNNFX206",
    "self.plain.data = self.plain + 1; return y * self.plain": "SNNFX206",
}


def model_of(body: str) -> nn.Module:
    source = "def forward(self, x):\n    y = self.fc(x)\n    " + body.replace("; ", "\n    ")
    names: dict[str, Any] = {"F": F, "torch": torch, "__name__": __name__}
    exec(compile(source, "user_model.py", "exec"), names)

    def prepare(self: Any) -> None:
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("buffer", torch.zeros(C))
        self.plain = torch.zeros(C, dtype=torch.float64)

    return type("Model", (Layer,), {"forward": names["forward"], "prepare": prepare})()


@pytest.mark.parametrize("body", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_operations_in_place_become_values(body: str) -> None:
    x_seq = sequence()
    before = x_seq.clone()
    model = model_of(body)
    for example in (None, x_seq[0]):
        if example is None and "shape" in body:
            continue
        outputs = snnfx.convert(fresh_copy(model), example_inputs=example)(x_seq).detach()
        assert_same(outputs, step_model(fresh_copy(model), before.clone()).detach())
    assert torch.equal(x_seq, before)


@pytest.mark.parametrize("body", REFUSED_IN_PLACE)
def test_in_place_operations_on_aliased_tensors_are_refused(body: str) -> None:
    model = model_of(body)
    for example in (None, sequence()[0]):
        with pytest.raises(CaptureError, match=REFUSED_IN_PLACE[body]):
            snnfx.convert(model, example_inputs=example)
    assert not model.buffer.any() and not model.plain.any()


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(2 * x) if x.sum() > 0 else self.lif(5 * x)


@pytest.mark.parametrize("calls", [1, 2])
def test_a_submodule_that_cannot_be_traced_is_stepped_with_its_states(calls: int) -> None:
    class Model(Layer):
        def prepare(self) -> None:
            self.opaque = DataDependent()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(calls):
                x = self.opaque(self.fc(x))
            return x

    net = assert_converts(Model(), sequence())
    assert [slot.name for slot in net.program.slots] == ["opaque.lif.v"]
    assert any(refusal.code == "SNNFX108" for region in net.regions for _, refusal in region.refusals())


def test_unregistered_state_in_an_untraceable_submodule_is_refused() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.v = x if self.v is None else self.v + x
            return self.v if x.sum() > 0 else -self.v

    model = nn.Sequential(nn.Linear(C, C), Hidden()).double()
    with pytest.raises(CaptureError, match="SNNFX213"):
        snnfx.convert(model)(sequence())
    assert model[1].v is None


def test_a_model_that_cannot_be_traced_is_refused_and_no_proxy_is_left_in_it() -> None:
    class Fails(Layer):
        def prepare(self) -> None:
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.fc(x)
            return x if self.v.sum() > 0 else -x

    model, python_isinstance, zeros = Fails(), isinstance, torch.zeros
    for example in (None, sequence()[0]):
        with pytest.raises(CaptureError, match="SNNFX213.*test_capture.py"):
            snnfx.convert(model, example_inputs=example)
        assert model.v is None
        assert isinstance is python_isinstance and torch.zeros is zeros
        assert "apply" in vars(torch.autograd.Function)
    with pytest.raises(CaptureError, match="SNNFX201.*ZeroDivisionError"):
        snnfx.convert(model_of("return y * (1 / 0)"))


def test_a_forward_that_loops_over_time_is_refused() -> None:
    class Whole(Layer):
        def prepare(self) -> None:
            self.lif = neuron.LIFNode()

        def step(self, x: Tensor) -> Tensor:
            return self.lif(3 * self.fc(x))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                y = self.step(x)
            return y

    with pytest.raises(CaptureError, match="SNNFX203.*\n.*entry="):
        snnfx.convert(Whole())
    assert_converts(Whole(), sequence(), entry="step")


class OneNeuronInAChain(Layer):
    """The same neuron several times in one expression, in one container, and through one method: no loop over time."""

    def prepare(self) -> None:
        self.lif = neuron.LIFNode(tau=2.0, v_threshold=0.4)
        self.chain = nn.Sequential(self.fc, self.lif, self.fc, self.lif, self.fc, self.lif)

    def layer(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif(self.fc(self.lif(self.fc(self.lif(self.fc(x))))))
        return self.chain(y) + self.layer(self.layer(self.layer(x)))


def test_a_neuron_called_several_times_by_one_line_is_not_a_loop_over_time() -> None:
    assert_converts(OneNeuronInAChain(), sequence())


class LoopOverTimeThroughAContainer(Layer):
    def prepare(self) -> None:
        self.lif = neuron.LIFNode(tau=2.0)
        self.chain = nn.Sequential(self.fc, self.lif)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for _ in range(4):
            total = total + self.chain(x)
        return total


def test_a_loop_over_time_is_found_through_containers() -> None:
    with pytest.raises(CaptureError, match="SNNFX203.*test_capture.py"):
        snnfx.convert(LoopOverTimeThroughAContainer())


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(CaptureError, match="SNNFX207"):
        snnfx.convert(nn.Sequential(nn.LazyLinear(3)))


def test_hooks_on_traced_modules_are_refused() -> None:
    inner = nn.Sequential(nn.Sequential(nn.Linear(C, C)), neuron.LIFNode())
    for module in (inner, inner[0]):
        handle = module.register_forward_hook(lambda *args: None)
        with pytest.raises(CaptureError, match="SNNFX208"):
            snnfx.convert(inner)
        handle.remove()
    snnfx.convert(inner)


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything in the `__dict__` of every module; containers by content."""
    registries = ("_parameters", "_buffers", "_modules")
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = dict(value) if key in registries or type(value) is dict else value
            found[f"{name}.{key}"] = list(value) if type(value) is list else found[f"{name}.{key}"]
    return found


@pytest.mark.parametrize("model", [*STATE_MODELS, FirstStepDiffers], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
def test_convert_does_not_change_the_model(model: Callable[[], nn.Module], with_examples: bool) -> None:
    made = nn.Sequential(model(), nn.BatchNorm1d(C).eval(), nn.Dropout(0.5), nn.Linear(C, C)).double()
    made[1].eval()
    made[3].weight.requires_grad_(False)
    example = sequence()[0] if with_examples else None
    before, values = photograph(made), [v.clone() for v in made.state_dict().values()]
    flags, random = [m.training for m in made.modules()], torch.get_rng_state()
    snnfx.convert(made, example_inputs=example)
    after = photograph(made)
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] is value or (isinstance(value, dict | list) and after[key] == value), key
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), values, strict=True))
    assert flags == [m.training for m in made.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert not made[3].weight.requires_grad


def test_existing_state_does_not_affect_capture_and_is_preserved() -> None:
    model = nn.Sequential(nn.Linear(C, C), neuron.LIFNode()).double()
    model(sequence()[0]).sum().backward()
    state = model[1].v
    net = snnfx.convert(model)
    assert model[1].v is state
    assert net(sequence()).shape == (T, N, C)
    assert model[1].v is state


Pair = namedtuple("Pair", "spike potential")


def test_outputs_keep_their_nesting() -> None:
    class Outputs(Layer):
        def prepare(self) -> None:
            self.lif = neuron.LIFNode()

        def forward(self, x: Tensor) -> Any:
            y = self.fc(x)
            return {
                "nothing": None, "number": 3, "text": "hi", "invariant": self.fc.weight * 2, "parameter": self.fc.bias,
                "input": x, "twice": (y, [y]), "pair": Pair(self.lif(4 * y), None),
            }  # fmt: skip

    net = assert_converts(Outputs(), sequence())
    assert isinstance(net(sequence())["pair"], Pair)


def test_keyword_only_and_default_arguments() -> None:
    class Keywords(Layer):
        def forward(self, x: Tensor, *, scale: Tensor, shift: float = 1.0, extra: Any = None) -> Tensor:
            return self.fc(x) * scale + shift

    model, x, scale = Keywords(), sequence(), sequence()
    expected = torch.stack([model(a, scale=b) for a, b in zip(x, scale, strict=True)])
    assert_same(snnfx.convert(model)(x, scale=scale), expected)
    net = snnfx.convert(model, example_inputs={"x": x[0], "scale": scale[0], "shift": 1.0})
    assert_same(net(x=x, scale=scale, shift=1.0), expected)
    with pytest.raises(InputError, match="SNNFX307.*fixed at conversion"):
        net(x=x, scale=scale, shift=2.0)


def test_nested_inputs_with_time_in_different_places() -> None:
    class Nested(Layer):
        def forward(self, first: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> Tensor:
            return self.fc(first["a"]) + pair[0] * pair[1]

    model, x, y = Nested(), sequence(), sequence()
    example = ({"a": x[0]}, (x[0], y[0]))
    expected = torch.stack([model({"a": a}, (a, b)) for a, b in zip(x, y, strict=True)])
    assert_same(snnfx.convert(model, example_inputs=example)({"a": x}, (x, y)), expected)
    net = snnfx.convert(model, example_inputs=example, time_dim=({"a": 0}, (None, -1)))
    expected = torch.stack([model({"a": a}, (x[0], b)) for a, b in zip(x, y, strict=True)])
    assert_same(net({"a": x}, (x[0], y.movedim(0, -1))), expected)
    with pytest.raises(InputError, match="SNNFX307"):
        net({"b": x}, (x[0], y))


def test_a_model_without_required_arguments_needs_examples() -> None:
    class Optional(Layer):
        def forward(self, x: Tensor | None = None) -> Tensor:
            return self.fc(torch.ones(N, C, dtype=torch.float64) if x is None else x)

    with pytest.raises(CaptureError, match="SNNFX211"):
        snnfx.convert(Optional())
    assert_converts(Optional(), sequence(), examples=True)


SINGLE_MODULES = [
    neuron.LIFNode, neuron.ParametricLIFNode, lambda: nn.Linear(C, C), lambda: nn.BatchNorm1d(C), nn.Identity,
    nn.Sequential,
]  # fmt: skip


@pytest.mark.parametrize("make", SINGLE_MODULES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_model_that_is_one_module(make: Callable[[], nn.Module], training: bool) -> None:
    model = make().double().train(training)
    net = assert_converts(model, 2 * sequence())
    assert list(net.state_dict()) == list(model.state_dict())


def test_modules_in_lists_and_dicts_shared_modules_and_tied_parameters() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(C, C)
            self.b = self.a
            self.tied = nn.Linear(C, C, bias=False)
            self.tied.weight = self.a.weight
            self.lif1 = neuron.LIFNode()
            self.lif2 = self.lif1
            self.parts = nn.ModuleList([nn.Linear(C, C), neuron.LIFNode()])
            self.named = nn.ModuleDict({"out": nn.Linear(C, C)})
            self.gains = nn.ParameterList([torch.rand(C)])
            self.shifts = nn.ParameterDict({"w": torch.rand(C)})

        def forward(self, x: Tensor) -> Tensor:
            x = self.lif2(self.b(self.lif1(4 * self.a(x)))) + self.tied(x)
            for part in self.parts:
                x = part(x)
            return self.named["out"](x) * self.gains[0] + self.shifts["w"]

    model = Parts().double()
    net = assert_converts(model, sequence())
    assert list(net.state_dict()) == list(model.state_dict())
    assert [slot.name for slot in net.program.slots] == ["lif1.v", "parts.1.v"]


def test_examples_with_the_wrong_signature_are_refused() -> None:
    model = nn.Sequential(nn.Linear(C, C)).double()
    with pytest.raises(InputError, match="SNNFX307"):
        snnfx.convert(model, example_inputs=(sequence()[0], sequence()[0]))
    with pytest.raises(InputError, match="SNNFX305"):
        snnfx.convert(model, example_inputs=(3,))
    with pytest.raises(CaptureError, match="SNNFX201.*\n.*ONE call"):
        snnfx.convert(model, example_inputs=torch.rand(N, C + 1, dtype=torch.float64))


def test_gradients_flow_to_a_shared_parameter_once() -> None:
    model = nn.Sequential(nn.Linear(C, C), neuron.LIFNode(), nn.Linear(C, C)).double()
    model[2].weight = model[0].weight
    x_seq = sequence()
    expected = run_stepped(model, x_seq).parameter_grads["0.weight"]
    assert_same(run_net(snnfx.convert(model), x_seq).parameter_grads["0.weight"], expected)


class AddsNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(3)


class HoldsAMask(snnfx.MemoryModule):
    """One mask for a sequence, independent of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.rand(3)
        return x * self.mask


class FillsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.empty(3).normal_()


def test_noise_of_a_fixed_size_is_drawn_at_each_step_and_call() -> None:
    net = snnfx.convert(AddsNoise())
    x_seq = torch.zeros(4, 2, 3)
    first, second = net(x_seq), net(x_seq)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_random_initial_state_is_drawn_once_per_call() -> None:
    net = snnfx.convert(HoldsAMask())
    x_seq = torch.ones(4, 2, 3)
    first, second = net(x_seq), net(x_seq)
    assert not torch.equal(first, second)
    assert torch.equal(first[0], first[3])


def test_random_numbers_that_leave_no_node_are_refused() -> None:
    with pytest.raises(CaptureError, match="SNNFX215"):
        snnfx.convert(FillsInPlace())


def test_a_model_deeper_than_pythons_stack() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif, self.v = snnfx.neuron.LIFNode(), None

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1200):
                x = x * 1.0
            self.v = torch.zeros_like(x) if self.v is None else self.v * 0.5
            self.v = self.v + x
            return self.lif(x) + self.v

    model, x_seq = Deep(), torch.rand(3, 2, 4)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.testing.assert_close(net(x_seq), step_model(model, x_seq))
