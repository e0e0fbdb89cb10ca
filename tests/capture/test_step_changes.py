"""Buffers, parameters and tensors in plain attributes that a step changes: slots that compute the same as stepping."""

from __future__ import annotations

import argparse
import array
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, InputError
from support.stepping import assert_converts, assert_same, step_model

T, N, C = 5, 3, 4


def sequence(*shape: int) -> Tensor:
    return torch.rand(T, *(shape or (N, C)), dtype=torch.float64) * 2


class Model(nn.Module):
    """One linear layer, and whatever `prepare` and `forward` of a subclass add."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(C, C)
        self.register_buffer("mean", torch.full((C,), 0.1))
        self.prepare()
        self.double()

    def prepare(self) -> None: ...


class Assigns(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y / (self.mean + 2)


class AssignsWithGraph(Model):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.sigmoid(self.fc(x) - self.mean)
        self.mean = self.mean + 0.1 * (z.mean(0) - 0.2)
        return z


class InPlace(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        z = torch.tanh(y * self.mean.clone())
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return z


class AugmentedAssignment(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.mean += self.fc(x).detach().mean(0)
        return x + self.mean.clone()


class InPlaceThroughData(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.data.mul_(0.9)
        self.mean.data += 0.1
        return self.fc(x) * self.mean.clone()


class CopiesIntoIt(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.mean.copy_(torch.roll(self.mean, 1) + x.mean(0))
        return self.fc(x) + self.mean.clone()


class AssignsAPart(Model):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) * self.mean.clone()
        self.mean[0] = self.mean[0] * 0.5
        return y


class Ring(Model):
    def prepare(self) -> None:
        self.register_buffer("last", torch.zeros(3, C))

    def forward(self, x: Tensor) -> Tensor:
        self.last = torch.cat([self.last[1:], self.fc(x).mean(0, keepdim=True)])
        return x + self.last.sum(0)


class ThroughAllBuffers(Model):
    def forward(self, x: Tensor) -> Tensor:
        for buffer in self.buffers():
            buffer.mul_(0.9)
        return self.fc(x) * self.mean.clone()


class Alias(Model):
    def prepare(self) -> None:
        self.other = self.mean

    def forward(self, x: Tensor) -> Tensor:
        self.mean.add_(x.mean(0))
        return self.fc(x) + self.other.clone()


class Counter(Model):
    def prepare(self) -> None:
        self.register_buffer("t", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.t += 1
        return self.fc(x) / self.t.clone()


class OnlyInTheFirstStep(Model):
    def prepare(self) -> None:
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v, self.mean = x, self.mean + x.mean(0)
        else:
            self.v = 0.5 * self.v + x
        return self.fc(self.v) * self.mean


class StateInABuffer(Model):
    def prepare(self) -> None:
        self.register_buffer("v", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + self.fc(x)
        return torch.tanh(self.v)


class FunctionalBatchNorm(Model):
    def prepare(self) -> None:
        self.bn = nn.BatchNorm1d(C)
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return F.batch_norm(self.fc(x), None, None, self.bn.weight, self.bn.bias, True)


BUFFERS = [
    Assigns, AssignsWithGraph, InPlace, AugmentedAssignment, InPlaceThroughData, CopiesIntoIt, AssignsAPart, Ring,
    ThroughAllBuffers, Alias, Counter, OnlyInTheFirstStep, StateInABuffer, FunctionalBatchNorm,
]  # fmt: skip


@pytest.mark.parametrize("model", BUFFERS)
def test_a_changed_buffer_follows_stepping(model: type[Model]) -> None:
    net = assert_converts(model(), sequence())
    assert any(slot.persistent for slot in net.program.slots)


@pytest.mark.parametrize("model", [Assigns, InPlace, AssignsWithGraph, OnlyInTheFirstStep])
@pytest.mark.parametrize("checkpoint", [2, "selective", "regions"])
def test_recomputation_starts_from_the_values_before_the_call(model: type[Model], checkpoint: Any) -> None:
    assert_converts(model(), sequence(), checkpoint=checkpoint, examples=False)


class TdBatchNorm(nn.BatchNorm2d):
    """A hand-written batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean([0, 2, 3]), x.var([0, 2, 3], unbiased=False)
            with torch.no_grad():
                self.num_batches_tracked = self.num_batches_tracked + 1
                self.running_mean = 0.1 * mean + 0.9 * self.running_mean
                self.running_var = 0.1 * var + 0.9 * self.running_var
        shape = (1, -1, 1, 1)
        y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + self.eps)
        return y * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize("training", [True, False])
def test_a_hand_written_batch_norm_follows_stepping(training: bool) -> None:
    assert_converts(TdBatchNorm(3).double().train(training), sequence(2, 3, 5, 5))


def test_a_model_converted_in_evaluation_mode_updates_its_statistics_in_training() -> None:
    model, x_seq = TdBatchNorm(3).double().eval(), sequence(2, 3, 5, 5)
    stepped = copy.deepcopy(model).train()
    net = snnfx.convert(model).train()
    assert_same(net(x_seq).detach(), step_model(stepped, x_seq).detach())
    assert_same(model.running_mean, stepped.running_mean)


def test_an_instance_norm_updates_its_statistics_at_each_step() -> None:
    model, x_seq = nn.InstanceNorm2d(3, track_running_stats=True, affine=True).double(), sequence(2, 3, 5, 5)
    assert_converts(nn.Sequential(model, nn.Flatten(1), neuron.LIFNode()), x_seq, batch_norm="fold")


# -- parameters -------------------------------------------------------------------------------------------------------


class Hebbian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(C, C).double()
        self.w = nn.Parameter(torch.rand(C, C, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.fc(x) @ self.w.t().clone())
        with torch.no_grad():
            self.w.add_(0.01 * h.t() @ x)
        return h


def expected_of_hebbian(model: Hebbian, x_seq: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(outputs, gradient of the sum with respect to w, last w)`, with an own copy of w for each step."""
    w, outputs, gradient = model.w.detach().clone(), [], torch.zeros(C, C, dtype=torch.float64)
    for x in x_seq:
        own = w.clone().requires_grad_()
        h = torch.tanh(model.fc(x) @ own.t())
        gradient += torch.autograd.grad(h.sum(), own)[0]
        w = w + 0.01 * h.detach().t() @ x
        outputs.append(h.detach())
    return torch.stack(outputs), gradient, w


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint": "selective"}, {"checkpoint": "regions"}, {"lower": None}, {"step_mode": "s"}],
    ids=str,
)
def test_the_gradients_of_all_steps_reach_a_parameter_that_the_steps_change(options: dict[str, Any]) -> None:
    model, x_seq = Hebbian(), sequence()
    outputs, gradient, last = expected_of_hebbian(model, x_seq)
    net = snnfx.convert(model, **options)
    parameter = model.w
    y_seq = torch.stack([net(x) for x in x_seq]) if options.get("step_mode") == "s" else net(x_seq)
    y_seq.sum().backward()
    assert model.w is parameter
    assert_same([y_seq.detach(), model.w.grad, model.w.detach()], [outputs, gradient, last])


def test_chunks_that_change_a_parameter_cannot_be_recomputed() -> None:
    with pytest.raises(InputError, match="SNNFX317"):
        snnfx.convert(Hebbian(), checkpoint=2)


class Stdp(nn.Module):
    """Changes the weight of a layer, by name or through `.data`."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc, self.lif, self.change = nn.Linear(C, C, bias=False), neuron.LIFNode(tau=2.0, v_threshold=0.4), change
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.lif(self.fc(x))
        self.change(self, 0.01 * z.t() @ x)
        return z


def by_name(self: Any, update: Tensor) -> None:
    with torch.no_grad():
        self.fc.weight.add_(update).clamp_(0, 1)


def through_data(self: Any, update: Tensor) -> None:
    self.fc.weight.data.add_(update)
    self.fc.weight.data.clamp_(0, 1)


def through_a_name_of_data(self: Any, update: Tensor) -> None:
    w = self.fc.weight.data
    w.add_(update)
    w.clamp_(0, 1)


def through_all_parameters(self: Any, update: Tensor) -> None:
    for p in self.parameters():
        p.data.clamp_(0.1, 0.3)


def by_copying(self: Any, update: Tensor) -> None:
    with torch.no_grad():
        self.fc.weight.copy_((self.fc.weight + update).clamp(0, 1))


@pytest.mark.parametrize("change", [by_name, through_data, through_a_name_of_data, through_all_parameters, by_copying])
@pytest.mark.parametrize("examples", [False, True])
def test_a_layer_whose_weight_the_steps_change_follows_stepping(change: Any, examples: bool) -> None:
    model, x_seq = Stdp(change), sequence()
    stepped = copy.deepcopy(model)
    net = snnfx.convert(model, example_inputs=x_seq[0] if examples else None)
    with torch.no_grad():
        assert_same(net(x_seq), step_model(stepped, x_seq))
    assert_same(model.fc.weight.detach(), stepped.fc.weight.detach())


# -- plain attributes, containers and objects -----------------------------------------------------------------------


class PlainTensor(Model):
    def prepare(self) -> None:
        self.total = torch.zeros(C, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        self.total.add_(self.fc(x).detach().mean(0))
        return x * self.total.clone()


def test_a_plain_tensor_changed_in_place_starts_each_call_from_its_value_at_capture() -> None:
    model, x_seq = PlainTensor(), sequence()
    expected = step_model(copy.deepcopy(model), x_seq)
    net = snnfx.convert(model)
    assert_same([net(x_seq), net(x_seq)], [expected, expected])
    assert not model.total.any()


def test_a_total_that_nothing_reads_is_state() -> None:
    class Total(Model):
        def prepare(self) -> None:
            self.total = torch.zeros(())

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            self.total = self.total + y.sum()
            return y

    net, x_seq = snnfx.convert(Total()), sequence()
    y_seq, state = net.run(x_seq)
    torch.testing.assert_close(state["total"], y_seq.sum())


class VendoredMemoryModule(nn.Module):
    """A copy of the base class of another library, as many repositories have one."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["_memories"], self.__dict__["_memories_rv"] = {"v": 0.0}, {"v": 0.0}
        self.fc = nn.Linear(C, C).double()

    def __getattr__(self, name: str) -> Any:
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        memories = self.__dict__.get("_memories", {})
        if name in memories:
            memories[name] = value
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v * 0.5 + self.fc(x)
        return torch.tanh(self.v)


def test_state_in_a_dict_called_memories_is_state() -> None:
    assert_converts(VendoredMemoryModule(), sequence())


def in_a_namespace(self: Any) -> None:
    self.o = argparse.Namespace(v=0.0)


def in_a_bytearray(self: Any) -> None:
    self.o = bytearray(1)


def in_an_array(self: Any) -> None:
    self.o = array.array("d", [0.0])


def in_a_closure(self: Any) -> None:
    v: Any = 0.0

    def change(x: Tensor) -> Tensor:
        nonlocal v
        v = 0.5 * v + x
        return v

    self.o = change


def change_object(o: Any, x: Tensor) -> Tensor:
    if isinstance(o, bytearray | array.array):
        o[0] += 1
        return x * o[0]
    if callable(o):
        return o(x)
    o.v = 0.5 * o.v + x
    return o.v


@pytest.mark.parametrize("prepare", [in_a_namespace, in_a_bytearray, in_an_array, in_a_closure])
def test_state_in_an_object_is_refused_by_name(prepare: Any) -> None:
    class Holds(Model):
        def forward(self, x: Tensor) -> Tensor:
            return change_object(self.o, self.fc(x))

    Holds.prepare = prepare
    with pytest.raises(CaptureError, match="SNNFX218 a step changes (`o|the variable `v`)"):
        snnfx.convert(Holds())


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (torch.nested.nested_tensor([torch.rand(2, C), torch.rand(3, C)]), "nested tensor"),
        (nn.utils.rnn.pack_sequence([torch.rand(3, C), torch.rand(2, C)]), "PackedSequence"),
    ],
)
def test_sequences_of_several_lengths_are_refused(value: Any, name: str) -> None:
    model = nn.Sequential(nn.Linear(C, C), neuron.LIFNode())
    net = snnfx.convert(model)
    for call in (net, net.run, lambda x: snnfx.convert(model, example_inputs=x)):
        with pytest.raises(InputError, match=f"SNNFX305.*{name}.*\n.*Pad it"):
            call(value)


def test_a_nested_tensor_in_an_attribute_is_refused() -> None:
    class UsesANestedTensor(Model):
        def prepare(self) -> None:
            self.bias = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.bias

    with pytest.raises(CaptureError, match="SNNFX216 the step uses the nested tensor `bias`"):
        snnfx.convert(UsesANestedTensor())


def test_a_state_that_grows_unnoticed_at_capture_is_refused_when_it_runs() -> None:
    class Grows(Model):
        def prepare(self) -> None:
            self.seen = torch.zeros(1, C, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            self.seen = F.pad(self.seen, (0, 0, 0, 1)) + 1
            return self.fc(x) + self.seen.sum(0)

    for example in (None, sequence()[0]):
        net = snnfx.convert(Grows(), example_inputs=example)
        with pytest.raises(InputError, match="SNNFX313"):
            net(sequence())
