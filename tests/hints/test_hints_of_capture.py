"""Hints of refusals at capture (2xx): each leads to a model that runs as stepped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import snnfx
from snnfx import neuron
from support.hints import refused, silent, warned
from support.stepping import assert_converts, assert_same, run_stepped, step_model

T, N, C = 5, 2, 3


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape or (T, N, C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Step(nn.Module):
    """A layer and a neuron; `step` computes one time step."""

    def __init__(self, step: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), neuron.LIFNode(tau=2.0, v_threshold=0.2)
        self.user_step = step
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.user_step(self, x)

    def body(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))


class MemoryStep(snnfx.MemoryModule):
    """The same with registered states."""

    def __init__(self, step: Callable[[Any, Tensor], Any], memories: dict[str, Any], **attributes: Any) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), neuron.LIFNode(tau=2.0, v_threshold=0.2)
        self.user_step = step
        for name, value in attributes.items():
            setattr(self, name, value)
        for name, value in memories.items():
            self.register_memory(name, value)

    forward = Step.forward
    body = Step.body


def converts(model: nn.Module, *sequences: Tensor, **options: Any) -> Any:
    with silent():
        return assert_converts(model, *(sequences or (sequence(),)), **options)


# -- in place ----------------------------------------------------------------------------------------------------------


def test_an_in_place_change_of_a_view() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        y[:, 0].mul_(2)
        return m.lif(y)

    def followed(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        y = torch.where(torch.arange(C) == 0, 2 * y, y)
        return m.lif(y)

    def filled(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        y = y.index_fill(1, torch.tensor([0]), 0.5)
        return m.lif(y)

    refused(
        "SNNFX214",
        "passes/normalize.py:_functionalize",
        "Use an out-of-place operation, e.g. x = torch.where(...) or x = x.index_fill(...).",
        lambda: snnfx.convert(Step(step)),
        names="`mul_` changes a view",
        at="y[:, 0].mul_(2)",
    )
    converts(Step(followed))
    converts(Step(filled))


def test_an_in_place_change_of_a_constant() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros(C)
        y[0] = x.sum()
        return m.body(x + y)

    def followed(m: Any, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], C)
        y[:, 0] = x.sum(1)
        return m.body(x + y)

    def like(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0] = x.sum(1)
        return m.body(x + y)

    refused(
        "SNNFX214",
        "passes/normalize.py:_functionalize",
        "Create it from an input",
        lambda: snnfx.convert(Step(step)),
        at="y[0] = x.sum()",
    )
    converts(Step(followed))
    converts(Step(like))


def test_an_in_place_change_of_the_input() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        x.add_(1)
        return m.body(x)

    def followed(m: Any, x: Tensor) -> Tensor:
        x = x.add(1)
        return m.body(x)

    refused(
        "SNNFX209",
        "passes/normalize.py:_functionalize",
        "Use an out-of-place operation, e.g. x = x.add(1).",
        lambda: snnfx.convert(Step(step)),
        names="`x`",
        at="x.add_(1)",
    )
    converts(Step(followed))


def test_an_in_place_operation_without_an_out_of_place_form() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        y.fill_diagonal_(0.5)
        return m.lif(y)

    def followed(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        y = torch.where(torch.arange(N)[:, None] == torch.arange(C), 0.5, y)
        return m.lif(y)

    refused(
        "SNNFX214",
        "passes/normalize.py:_functionalize",
        "Assign a new tensor instead.",
        lambda: snnfx.convert(Step(step)),
        at="y.fill_diagonal_(0.5)",
    )
    converts(Step(followed), examples=True)


def test_an_in_place_change_of_a_tensor_with_an_alias() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        z = y.view(-1, C)
        y.mul_(2)
        return m.lif(y + z)

    def copied(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        z = y.view(-1, C)
        y = y.clone()
        y.mul_(2)
        return m.lif(y + z)

    def followed(m: Any, x: Tensor) -> Tensor:
        y = m.fc(x)
        z = y.view(-1, C)
        y = y.mul(2)
        return m.lif(y + z)

    refused(
        "SNNFX214",
        "passes/normalize.py:_refuse_aliases",
        "Use an out-of-place operation, or change a copy: x = x.clone().",
        lambda: snnfx.convert(Step(step)),
        names="`mul_`",
        at="y.mul_(2)",
    )
    converts(Step(copied))
    converts(Step(followed))


def test_a_random_filling_without_an_out_of_place_form() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        noise = torch.empty_like(x)
        noise.random_(0, 2)
        return m.body(x + noise)

    def followed(m: Any, x: Tensor) -> Tensor:
        noise = torch.bernoulli(torch.full_like(x, 0.5))
        return m.body(x + noise)

    refused(
        "SNNFX214",
        "passes/normalize.py:_replace_filling",
        "Use torch.rand_like, torch.randn_like or torch.bernoulli.",
        lambda: snnfx.convert(Step(step)),
        at="noise.random_(0, 2)",
    )
    with silent():
        net = snnfx.convert(Step(followed))
    assert not torch.equal(*net(torch.zeros(2, 8, C)).unbind())


def test_an_in_place_change_of_a_potential_state() -> None:
    class Readout(nn.Module):
        """Returns its state, or a part of it."""

        def __init__(self) -> None:
            super().__init__()
            self.register_module("cell", neuron.LeakyIntegrator(tau=2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x) if float(x.sum()) > -1e9 else x

    def step(m: Any, x: Tensor) -> Tensor:
        y = m.readout(m.fc(x))
        y.mul_(2)
        return y

    def copied(m: Any, x: Tensor) -> Tensor:
        y = m.readout(m.fc(x))
        y = y.clone()
        y.mul_(2)
        return y

    def followed(m: Any, x: Tensor) -> Tensor:
        y = m.readout(m.fc(x))
        y = y.mul(2)
        return y

    refused(
        "SNNFX214",
        "analysis/state_aliases.py:unite_output_with_state",
        "Use the out-of-place form (inplace=False), or change a copy: x = x.clone().",
        lambda: snnfx.convert(Step(step, readout=Readout())),
        at="y.mul_(2)",
    )
    converts(Step(copied, readout=Readout()))
    converts(Step(followed, readout=Readout()))


def test_a_state_with_the_memory_of_a_statistic() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x) if m.h is None else m.bn(x) - m.h
        m.h = m.bn.running_mean
        return y

    def followed(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x) if m.h is None else m.bn(x) - m.h
        m.h = m.bn.running_mean.clone()
        return y

    refused(
        "SNNFX214",
        "analysis/statistic_reads.py:_Reads._refuse_shared_state",
        "Store a copy: `",
        lambda: snnfx.convert(Step(step, bn=nn.BatchNorm1d(C), h=None), example_inputs=sequence()[0]),
        names="`bn.running_mean.clone()`",
        at="m.bn.running_mean",
    )
    converts(Step(followed, bn=nn.BatchNorm1d(C), h=None))


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        gain = self.gain if gain is None else gain
        return x * gain if float(x.sum()) > -1e9 else x


class Amplifies(nn.Module):
    def __init__(self, gain: Gain) -> None:
        super().__init__()
        self.owner = gain

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        gain = self.owner.gain if gain is None else gain
        return x * gain if float(x.sum()) > -1e9 else x


class Written(nn.Module):
    def __init__(self, step: Any) -> None:
        super().__init__()
        self.owner, self.step = Gain(), step
        self.part = Amplifies(self.owner)

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)  # type: ignore[no-any-return]


def test_a_buffer_that_an_opaque_part_has_too() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.owner.gain = m.owner.gain * 0.5
        return m.part(x)

    def followed(m: Any, x: Tensor) -> Tensor:
        m.gain = m.gain * 0.5
        return m.part(x, m.gain)

    refused(
        "SNNFX214",
        "analysis/statistic_reads.py:_Reads._refuse_shared_state",
        "instead, or pass its value to ",
        lambda: snnfx.convert(Written(step)),
        names="`owner.gain`",
    )
    model = Written(followed)
    model.register_buffer("gain", torch.ones(()))
    y_seq = snnfx.convert(model)(torch.ones(3, 2, 3))
    assert_same(y_seq, torch.tensor([0.5, 0.25, 0.125])[:, None, None].expand(3, 2, 3))


class Gains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.gain = self.gain * 0.5
        return x * self.gain if float(x.sum()) > -1e9 else x


def test_a_buffer_that_only_an_opaque_part_changes() -> None:
    y_seq = snnfx.convert(nn.Sequential(Gains()))(torch.ones(3, 2, 3))
    assert_same(y_seq, torch.tensor([0.5, 0.25, 0.125])[:, None, None].expand(3, 2, 3))


def test_an_out_argument() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        torch.add(x, 1, out=y)
        return m.body(y)

    def followed(m: Any, x: Tensor) -> Tensor:
        y = torch.add(x, 1)
        return m.body(y)

    refused(
        "SNNFX214",
        "capture/tracer.py:StepTracer.create_proxy",
        "Use the return value instead: y = torch.add(a, b).",
        lambda: snnfx.convert(Step(step)),
        names="`add`",
        at="torch.add(x, 1, out=y)",
    )
    converts(Step(followed))


# -- state -------------------------------------------------------------------------------------------------------------


def test_an_initial_value_that_depends_on_itself() -> None:
    def later(m: Any, x: Tensor) -> Tensor:
        """The initial value of u comes from v, which the loop of u and the neuron reaches first."""
        s = m.lif(x)
        m.v = 0.5 * m.v + s
        if m.u is None:
            m.u = m.v * 1.0
        y = m.u + s
        m.u = 0.5 * y
        m.lif.v = m.lif.v + y
        return y

    def from_input(m: Any, x: Tensor) -> Tensor:
        s = m.lif(x)
        m.v = 0.5 * m.v + s
        if m.u is None:
            m.u = x * 1.0
        y = m.u + s
        m.u = 0.5 * y
        m.lif.v = m.lif.v + y
        return y

    refused(
        "SNNFX210",
        "analysis/convex_regions.py:_Groups._refuse_circular_initial_value",
        "Pass a number or a tensor to register_memory, or make the initial value depend on the inputs only.",
        lambda: snnfx.convert(MemoryStep(later, {"v": 0.0, "u": None})),
        names="u",
        at="m.v = 0.5 * m.v + s",
    )
    converts(MemoryStep(later, {"v": 0.0, "u": 0.0}))
    converts(MemoryStep(later, {"v": 0.0, "u": torch.zeros(N, C)}))
    converts(MemoryStep(from_input, {"v": 0.0, "u": None}))


def test_state_in_a_container_that_changes_its_structure() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = m.body(x) + sum(m.past)
        m.past = [*m.past, x]
        return y

    def fixed(m: Any, x: Tensor) -> Tensor:
        y = m.body(x) + sum(m.past)
        m.past = [*m.past[1:], x]
        return y

    def registered(m: Any, x: Tensor) -> Tensor:
        y = m.body(x) + m.total
        m.total = m.total + x
        return y

    refused(
        "SNNFX201",
        "capture/attribute_slots.py:AttributeSlot.refusal",
        "Keep a fixed number of tensors in it, or register them with snnfx.MemoryModule.register_memory.",
        lambda: snnfx.convert(Step(step, past=[])),
        names="`past` of Step",
        at="def forward",
    )
    converts(Step(fixed, past=[torch.zeros(N, C), torch.zeros(N, C)]))
    converts(MemoryStep(registered, {"total": 0.0}))


def test_a_state_that_grows() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        m.h = torch.cat([m.h, y])
        return y + m.h.mean(0)

    def last(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        m.h = torch.cat([m.h, y])[-4:]
        return y + m.h.mean(0)

    refused(
        "SNNFX201",
        "capture/cold_trace.py:refuse_growth",
        "Keep the last k values, self.h = torch.cat([self.h, x])[-k:], starting from k values; or return the ",
        lambda: snnfx.convert(Step(step, h=torch.zeros(4, C))),
        names="`h`",
        at="torch.cat([m.h, y])",
    )
    converts(Step(last, h=torch.zeros(4, C)))
    converts(Step(lambda m, x: m.body(x)))


def test_unregistered_state_of_a_model_that_cannot_be_traced() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.total = m.total + x
        return m.body(m.total) if m.total.sum() > 3 else m.fc(x)

    error = refused(
        "SNNFX213",
        "capture/capture.py:_refuse_undeclared_state",
        "from snnfx.MemoryModule, with ",
        lambda: snnfx.convert(Step(step, total=torch.zeros(N, C)), example_inputs=sequence()[0]),
        names="`total`",
        at="m.total.sum() > 3",
    )
    assert 'self.register_memory("total", ' in error.hint
    converts(MemoryStep(step, {"total": torch.zeros(N, C)}))


def test_an_undeclared_state_in_a_module_stepped_without_tracing() -> None:
    class Hidden(nn.Module):
        """Changes its state only after three steps, when it is no longer traced."""

        def __init__(self) -> None:
            super().__init__()
            self.last, self.limit = torch.zeros(N, C), 3.0

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > self.limit:
                self.last = x
            return x + self.last

    class Registered(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.limit = 3.0
            self.register_memory("last", torch.zeros(N, C))

        forward = Hidden.forward

    x_seq = torch.stack([sequence()[0] * scale for scale in (0.1, 0.1, 10.0, 0.1, 10.0)])
    model = Step(lambda m, x: m.body(m.inner(x)), inner=Hidden())

    def call() -> Any:
        return snnfx.convert(model)(x_seq)

    refused(
        "SNNFX213",
        "state/composite_adapter.py:_refusing_unregistered_state",
        "Derive it from snnfx.MemoryModule and call self.register_memory(",
        call,
        names="`Hidden` changes its attribute `last`",
        at="def forward",
    )
    converts(Step(lambda m, x: m.body(m.inner(x)), inner=Registered()), x_seq)


def test_a_branch_on_the_number_of_the_step() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.t = m.t + 1
        return m.body(x) if m.t % 2 == 0 else x

    def followed(m: Any, x: Tensor) -> Tensor:
        m.t = (torch.zeros_like(x) if m.t is None else m.t) + 1
        return torch.where(m.t % 2 == 0, m.body(x), x)

    refused(
        "SNNFX250",
        "capture/step_counts.py:StepCounts.check",
        "in a tensor, such as torch.zeros_like(x), and choose with torch.where.",
        lambda: snnfx.convert(Step(step, t=0), example_inputs=sequence()[0]),
        names="`t` counts the steps",
        at="m.t % 2 == 0",
    )
    converts(Step(followed, t=None))


def test_a_state_set_to_none() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        s = m.body(x)
        m.lif.v = None
        return s

    def followed(m: Any, x: Tensor) -> Tensor:
        s = m.body(x)
        m.lif.v = torch.zeros_like(s)
        return s

    refused(
        "SNNFX217",
        "capture/leaf_module_states.py:LeafModuleStates._as_tensor",
        "Assign a tensor, e.g. torch.zeros_like(...). A reset is not needed: each call of a net starts from the reset",
        lambda: snnfx.convert(Step(step)),
        names="`lif.v` to None",
        at="def forward",
    )
    converts(Step(followed))
    net = converts(Step(lambda m, x: m.body(x)))
    assert_same(net(sequence()), net(sequence()))


def test_the_data_of_a_tensor_is_assigned() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.w.data = m.w.data.clamp(0, 0.9)
        return m.body(x) * m.w

    def followed(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.w.copy_(m.w.clamp(0, 0.9) * 0.5)
        return m.body(x) + m.w

    refused(
        "SNNFX206",
        "capture/proxy.py:data_refusal",
        "Copy the value instead: with torch.no_grad(): self.w.copy_(value).",
        lambda: snnfx.convert(Step(step, w=nn.Parameter(torch.ones(C)))),
        names="`w`",
    )
    model = Step(followed, w=nn.Parameter(torch.ones(C)))
    converts(model)


def test_an_iterator_in_the_model() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return m.body(x) * next(m.count)

    def followed(m: Any, x: Tensor) -> Tensor:
        m.count += 1
        return m.body(x) * m.count

    error = refused(
        "SNNFX218",
        "capture/setting_reads.py:_refuse_iterator",
        "Count the steps instead: call self.register_memory(",
        lambda: snnfx.convert(Step(step, count=itertools.count(1))),
        names="the iterator `count`",
        at="def forward",
    )
    assert 'self.register_memory("count", 0)' in error.hint and "self.count += 1" in error.hint
    converts(MemoryStep(followed, {"count": 0}))


def test_a_text_that_changes() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.phase = "off" if m.phase == "on" else "on"
        return m.body(x) * len(m.phase)

    def followed(m: Any, x: Tensor) -> Tensor:
        m.phase = 3 - m.phase
        return m.body(x) * (1.0 + m.phase)

    error = refused(
        "SNNFX218",
        "capture/attribute_changes.py:refuse_change",
        "for a tensor, a number or None, and read and write self.",
        lambda: snnfx.convert(Step(step, phase="on")),
        names="`phase`",
        at="def forward",
    )
    assert 'Derive Step from snnfx.MemoryModule, with self.register_memory("phase", initial)' in error.hint
    converts(MemoryStep(followed, {"phase": 1}))


def test_a_variable_of_the_closure_that_changes() -> None:
    class Closure:
        def __init__(self) -> None:
            count = 0

            def step(m: Any, x: Tensor) -> Tensor:
                nonlocal count
                count += 1
                return m.body(x) * count

            self.step = step

    def followed(m: Any, x: Tensor) -> Tensor:
        m.value = m.value + 1
        return m.body(x) * m.value

    refused(
        "SNNFX218",
        "capture/variable_changes.py:_refusal",
        'Store the value in the module: call self.register_memory("value", initial) in a ',
        lambda: snnfx.convert(Step(Closure().step)),
        names="the variable `count`",
        at="def step",
    )
    converts(MemoryStep(followed, {"value": 0}))


def test_a_tensor_in_a_global_variable_for_other_code() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        global LAST
        LAST = m.body(x)
        return x * 2

    def followed(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, m.body(x)

    refused(
        "SNNFX226",
        "capture/variable_changes.py:_refusal_of_result",
        "Return the tensor with the outputs of the step.",
        lambda: snnfx.convert(Step(step)),
        names="`LAST`",
        at="def step",
    )
    converts(Step(followed))


# -- buffers and parameters --------------------------------------------------------------------------------------------


def with_buffer(step: Callable[[Any, Tensor], Any], name: str, value: Any, **attributes: Any) -> Step:
    model = Step(step, **attributes)
    model.register_buffer(name, value)
    return model


def test_a_buffer_that_is_set_to_a_number() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.gain = m.gain + 1
        y = m.body(x) * m.gain
        m._buffers["gain"] = 3.0
        return y

    def followed(m: Any, x: Tensor) -> Tensor:
        m.gain = m.gain + 1
        y = m.body(x) * m.gain
        m.gain = torch.full_like(m.gain, 3.0)
        return y

    refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges.finish",
        "Assign a tensor.",
        lambda: snnfx.convert(with_buffer(step, "gain", torch.ones(C))),
        names="`gain` to float",
        at="def forward",
    )
    converts(with_buffer(followed, "gain", torch.ones(C)))


def test_a_parameter_that_is_replaced() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.w = nn.Parameter(torch.full((C,), 0.5))
        return m.body(x) + m.w

    def followed(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.w.copy_(torch.full((C,), 0.5))
        return m.body(x) + m.w

    refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges._check",
        "Change its value: with torch.no_grad(): self.w.copy_(value).",
        lambda: snnfx.convert(Step(step, w=nn.Parameter(torch.ones(C)))),
        names="the parameter `w`",
        at="def forward",
    )
    converts(Step(followed, w=nn.Parameter(torch.ones(C))))


def test_a_buffer_that_a_step_creates() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.v = m.body(x) if m.v is None else m.v + m.body(x)
        return m.v

    error = refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges._add_buffer",
        "Register it with its initial tensor: self.register_buffer(",
        lambda: snnfx.convert(with_buffer(step, "v", None)),
        names="the buffer `v`",
        at="def forward",
    )
    assert "self.v = None" in error.hint
    converts(with_buffer(step, "v", torch.zeros(N, C)))
    converts(Step(step, v=None))


def test_a_changed_tensor_that_shares_memory() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.row.add_(1)
        return m.body(x) + m.row + m.table.sum(0)

    table = torch.zeros(2, C)
    model = with_buffer(step, "table", table)
    model.register_buffer("row", table[0])
    refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges._add_in_place",
        "Make one of them a copy: self.a = self.b.clone().",
        lambda: snnfx.convert(model),
        names="`row` in place, which shares memory with `table`",
        at="m.row.add_(1)",
    )
    model.row = model.table[0].clone()
    converts(model)


def test_statistics_of_a_layer_that_a_step_changes() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.bn.running_mean.mul_(0.5)
        return m.bn(m.body(x))

    def followed(m: Any, x: Tensor) -> Tensor:
        m.mean.mul_(0.5)
        m.mean.add_(0.5 * x.mean(0).detach())
        return torch.nn.functional.batch_norm(m.body(x) - m.mean, None, None, training=True)

    refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges._refuse_holder",
        "Register a buffer of your own, and normalise with torch.nn.functional.batch_norm(x, None, None",
        lambda: snnfx.convert(Step(step, bn=nn.BatchNorm1d(C))),
        names="`bn.running_mean` of `bn`",
        at="m.bn.running_mean.mul_(0.5)",
    )
    converts(with_buffer(followed, "mean", torch.zeros(C)))


class Gated(nn.Module):
    """A module that cannot be traced, with a buffer that it or its parent changes."""

    def __init__(self, changes: bool = False) -> None:
        super().__init__()
        self.changes = changes
        self.register_buffer("gain", torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        if self.changes:
            self.gain = self.gain * 0.5
        return x * self.gain if float(x.sum()) > 0 else x


def test_a_tensor_of_a_module_that_is_called_as_a_whole() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.gate.gain.mul_(0.5)
        return m.body(m.gate(x))

    refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges._refuse_holder",
        "Change the tensor in the forward of this module.",
        lambda: snnfx.convert(Step(step, gate=Gated())),
        names="`gate.gain` of `gate`",
        at="m.gate.gain.mul_(0.5)",
    )
    converts(Step(lambda m, x: m.body(m.gate(x)), gate=Gated(changes=True)))


def test_statistics_that_batch_norm_updates_as_well() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.mean.mul_(0.5)
        return F.batch_norm(m.body(x), m.mean, m.var, training=True)

    def followed(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        m.mean.mul_(0.5)
        with torch.no_grad():
            m.mean.lerp_(y.mean(0), 0.1)
            m.var.lerp_(y.var(0), 0.1)
        return F.batch_norm(y, None, None, training=True)

    def model(step: Callable[[Any, Tensor], Any]) -> nn.Module:
        made = with_buffer(step, "mean", torch.zeros(C))
        made.register_buffer("var", torch.ones(C))
        return made

    refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges._refuse_statistics",
        "Pass None for running_mean and running_var in training, and update the statistics in the step.",
        lambda: snnfx.convert(model(step)),
        names="`mean`",
        at="F.batch_norm(",
    )
    converts(model(followed))


def test_a_tensor_in_a_list_changed_in_place() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.counts[0].add_(1)
        return m.body(x) + m.counts[0]

    def attribute(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.body(x) + m.count

    def assigned(m: Any, x: Tensor) -> Tensor:
        m.counts[0] = m.counts[0] + 1
        return m.body(x) + m.counts[0]

    refused(
        "SNNFX206",
        "capture/step_changes.py:StepChanges.add_written",
        "Store the tensor in an attribute of a module, or assign a new tensor to the element.",
        lambda: snnfx.convert(Step(step, counts=[torch.zeros(C)])),
        names="a tensor in `counts`",
        at="m.counts[0].add_(1)",
    )
    converts(Step(attribute, count=torch.zeros(C)))
    converts(Step(assigned, counts=[torch.zeros(C)]))


# -- control flow ------------------------------------------------------------------------------------------------------


class Loops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), neuron.LIFNode(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.lif(self.fc(x[t])) for t in range(T)])

    def step(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))


def test_a_loop_over_time() -> None:
    refused(
        "SNNFX203",
        "capture/time_loops.py:TimeLoop.error",
        'Convert the whole call with takes="sequence" and example_inputs=(x_seq,), or move the loop body to a method, ',
        lambda: snnfx.convert(Loops()),
        at="self.lif(self.fc(x[t]))",
    )
    net = converts(Loops(), entry="step")
    assert_same(net(sequence()), Loops.forward(net.source, sequence()))
    model = Loops().double()
    net = snnfx.convert(model, takes="sequence", example_inputs=(sequence(),))
    actual = net(sequence())
    snnfx.functional.reset_net(model)
    assert_same(actual, model(sequence()))


class OverFeatures(nn.Module):
    """A leaky recurrence over the columns of its input, which may be time or a part of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 4)
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        current, v = self.fc(x.unsqueeze(-1)), torch.zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            v = 0.9 * v + current[:, t]
        return v

    def step(self, x: Tensor) -> Tensor:
        self.v = 0.9 * (torch.zeros(x.shape[0], 4) if self.v is None else self.v) + self.fc(x.unsqueeze(-1))
        return self.v


def test_a_loop_that_may_be_over_time() -> None:
    net = warned(
        "SNNFX115",
        "capture/capture.py:_capture_once",
        "",
        lambda: snnfx.convert(OverFeatures(), example_inputs=sequence()[0]),
        names='convert with entry="step", or pass example_inputs of ONE step.',
    )
    assert_same(net(sequence()), step_model(net.source, sequence()))
    converts(OverFeatures(), sequence(T, N), entry="step")
    with silent():
        net = snnfx.convert(OverFeatures(), example_inputs=sequence()[0, :, :1])
    assert_same(net(sequence()[..., :1]), step_model(net.source, sequence()[..., :1]))


def test_a_shape_that_is_unknown() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return m.body(x) if x.shape[1] == C else m.lif(x)

    refused(
        "SNNFX202",
        "capture/proxy.py:needs_examples",
        "Pass example_inputs=(x,) with the inputs of ONE step, including the batch dimension.",
        lambda: snnfx.convert(Step(step)),
        at="x.shape[1] == C",
    )
    converts(Step(step), examples=True)


def test_a_model_that_cannot_be_traced() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return m.body(x) * len(f"{x.mean():.2f}")

    class Format(nn.Module):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return y * len(f"{x.mean():.2f}")

    refused(
        "SNNFX201",
        "capture/tracer.py:StepTracer._call_root",
        "Put the code that cannot be traced into a submodule, which the net then steps without tracing. With example",
        lambda: snnfx.convert(Step(step)),
        at="x.mean():.2f",
    )
    converts(Step(lambda m, x: m.format(m.body(x), x), format=Format()))
    converts(Step(step), examples=True)


def test_control_flow_on_values() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        return 2 * y if x.sum() > 3 else y

    def selected(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        return torch.where(x.sum() > 3, 2 * y, y)

    class Branch(nn.Module):
        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            return 2 * y if x.sum() > 3 else y

    class Entry(Step):
        def step(self, x: Tensor) -> Tensor:
            return self.user_step(self, x)

    refused(
        "SNNFX201",
        "capture/tracer.py:StepTracer.concrete",
        "Use torch.where, or put the code into a submodule, which the net then steps without tracing.",
        lambda: snnfx.convert(Entry(step), entry="step"),
        at="x.sum() > 3",
    )
    converts(Entry(selected), entry="step")
    converts(Entry(lambda m, x: m.branch(m.body(x), x), branch=Branch()), entry="step")


def test_autocast_inside_a_step() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = m.fc(x)
        return m.lif(y.float())

    class Cast(nn.Module):
        def __init__(self, fc: nn.Module) -> None:
            super().__init__()
            self.fc = fc

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.fc(x)

    class Entry(Step):
        def step(self, x: Tensor) -> Tensor:
            return self.user_step(self, x)

    x_seq = sequence().float()
    refused(
        "SNNFX201",
        "capture/tracer.py:StepTracer.create_node",
        "Use autocast around the call of the net, or put the code into a submodule, which is stepped.",
        lambda: snnfx.convert(Entry(step).float(), entry="step"),
        at="m.fc(x)",
    )
    model = Step(lambda m, x: m.lif(m.cast(x).float()), cast=Cast(nn.Linear(C, C))).float()
    assert_same(snnfx.convert(model)(x_seq).detach(), run_stepped(model, x_seq).outputs)
    plain = Step(lambda m, x: m.lif(m.fc(x).float())).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(snnfx.convert(plain)(x_seq).detach(), run_stepped(plain, x_seq).outputs)


def test_a_step_that_fails_on_its_example() -> None:
    error = refused(
        "SNNFX201",
        "capture/example_values.py:ExampleValues._record_value",
        "Pass example_inputs with the inputs of ONE call of the model, including the batch dimension.",
        lambda: snnfx.convert(Step(lambda m, x: m.body(x)), example_inputs=torch.rand(N, C + 1)),
        names="`fc`",
        at="self.lif(self.fc(x))",
    )
    assert "RuntimeError" in error.why
    converts(Step(lambda m, x: m.body(x)), examples=True)


# -- random numbers ----------------------------------------------------------------------------------------------------


def test_random_numbers_that_the_graph_does_not_record() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return m.body(x + torch.empty(C).normal_())

    def followed(m: Any, x: Tensor) -> Tensor:
        return m.body(x + torch.rand(C) + torch.randn(C) + torch.rand_like(x) + torch.bernoulli(x))

    refused(
        "SNNFX215",
        "capture/unrecorded_draws.py:UnrecordedDraws.refuse_torch",
        "Draw them with torch.rand, torch.randn, torch.rand_like or torch.bernoulli of a recorded value.",
        lambda: snnfx.convert(Step(step)),
        at="torch.empty(C).normal_()",
    )
    net = snnfx.convert(Step(followed, lif=nn.Identity()))
    y_seq = net(sequence()[:1].expand(2, N, C))
    assert not torch.equal(y_seq[0], y_seq[1])


def test_random_numbers_of_an_attribute() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return m.body(x) + m.noise.standard_normal()

    import numpy

    refused(
        "SNNFX215",
        "capture/attribute_changes.py:refuse_change",
        "Draw them with torch.rand, torch.randn, torch.rand_like or torch.bernoulli of a recorded value.",
        lambda: snnfx.convert(Step(step, noise=numpy.random.default_rng(0))),
        names="`noise`",
        at="def forward",
    )
    net = snnfx.convert(Step(lambda m, x: m.body(x) + torch.randn(())))
    y_seq = net(sequence()[:1].expand(2, N, C))
    assert not torch.equal(y_seq[0], y_seq[1])


def test_random_numbers_of_python() -> None:
    import random

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + random.random()

    def step(m: Any, x: Tensor) -> Tensor:
        return m.last(m, m.body(x) + random.random())

    def keep(m: Any, y: Tensor) -> Tensor:
        return y

    class Entry(Step):
        def step(self, x: Tensor) -> Tensor:
            return self.user_step(self, x)

    refused(
        "SNNFX215",
        "capture/tracer.py:StepTracer._call_root",
        "Draw them with torch.rand or torch.randn, or in a submodule, which the net then steps untraced.",
        lambda: snnfx.convert(Entry(step, last=keep), entry="step"),
        at="def step",
    )
    random.seed(0)
    model = Step(lambda m, x: m.noise(m.body(x)), noise=Noise())
    net = snnfx.convert(model)
    random.seed(3)
    y_seq = net(sequence())
    random.seed(3)
    assert_same(y_seq.detach(), run_stepped(model, sequence()).outputs)


def test_a_generator_in_the_step() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return m.body(x) + torch.randn(C, generator=m.noise)

    def followed(m: Any, x: Tensor) -> Tensor:
        return m.body(x) + torch.randn(C)

    refused(
        "SNNFX215",
        "capture/tracer.py:StepTracer.create_arg",
        "Draw from the generator of torch instead, without generator=, and call torch.manual_seed.",
        lambda: snnfx.convert(Step(step, noise=torch.Generator())),
        names="`noise`",
        at="generator=m.noise",
    )
    model = Step(followed)
    net = snnfx.convert(model, lower=None)
    torch.manual_seed(4)
    y_seq = net(sequence())
    torch.manual_seed(4)
    assert_same(y_seq, net(sequence()))


# -- modules, inputs and outputs ---------------------------------------------------------------------------------------


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(C), neuron.LIFNode())
    refused(
        "SNNFX207",
        "capture/capture.py:_check_model",
        "Call the model once with the inputs of one step, then convert it.",
        lambda: snnfx.convert(model),
        names="`0.weight`",
    )
    model(sequence()[0])
    converts(model)


def test_hooks_of_a_container() -> None:
    shapes: list[torch.Size] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shapes.append(output.shape)

    model = Step(lambda m, x: m.body(x))
    handle = model.register_forward_hook(hook)
    refused(
        "SNNFX208",
        "capture/tracer.py:_refuse_hooks",
        "Register the hook on a leaf module inside it, or remove it before the conversion.",
        lambda: snnfx.convert(model),
        names="`the model`",
        at="def forward",
    )
    handle.remove()
    converts(model)
    model.lif.register_forward_hook(hook)
    with silent():
        snnfx.convert(model)(sequence())
    assert sum(shape.numel() for shape in shapes) == T * N * C


def test_an_unregistered_module() -> None:
    refused(
        "SNNFX211",
        "capture/unrecorded_draws.py:refuse_unregistered_module",
        "Assign it as an attribute of a module, or use nn.ModuleList or nn.ModuleDict.",
        lambda: snnfx.convert(Step(lambda m, x: m.body(m.hidden[0](x)), hidden=[nn.Linear(C, C)])),
        names="Linear",
        at="m.hidden[0](x)",
    )
    converts(Step(lambda m, x: m.body(m.hidden(x)), hidden=nn.Linear(C, C)))
    converts(Step(lambda m, x: m.body(m.hidden[0](x)), hidden=nn.ModuleList([nn.Linear(C, C)])))
    converts(Step(lambda m, x: m.body(m.hidden["a"](x)), hidden=nn.ModuleDict({"a": nn.Linear(C, C)})))


class AnyNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode()

    def forward(self, *xs: Tensor) -> Tensor:
        return self.lif(sum(xs))


def test_a_step_without_required_arguments() -> None:
    refused(
        "SNNFX211",
        "capture/step_arguments.py:step_arguments",
        "Pass example_inputs=(x, ...) with the inputs of one step.",
        lambda: snnfx.convert(AnyNumber()),
        names="AnyNumber.forward",
        at="def forward",
    )
    converts(AnyNumber(), sequence(), 2 * sequence(), examples=True)


class Results:
    def __init__(self, spikes: Tensor) -> None:
        self.spikes = spikes


class Pair(NamedTuple):
    spikes: Tensor
    double: Tensor


def test_an_output_of_an_unregistered_class() -> None:
    refused(
        "SNNFX216",
        "capture/input_output_checks.py:refuse_outputs",
        "Use tuples, lists, dicts, named tuples, or a class registered with torch.utils._pytree.",
        lambda: snnfx.convert(Step(lambda m, x: Results(m.body(x)))),
        names="Results",
        at="def forward",
    )
    converts(Step(lambda m, x: Pair(m.body(x), 2 * x)))
    converts(Step(lambda m, x: {"spikes": m.body(x)}))
    converts(Step(lambda m, x: [m.body(x), (x,)]))


class Registered:
    def __init__(self, a: Tensor) -> None:
        self.a = a


pytree.register_pytree_node(Registered, lambda r: ([r.a], None), lambda leaves, _: Registered(*leaves))


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), neuron.LIFNode()

    def forward(self, x: Tensor, more: Any) -> Tensor:
        other = more.a if isinstance(more, Registered) else more[0] if isinstance(more, tuple) else more["a"]
        return self.lif(self.fc(x) + other)


def test_an_input_of_an_unregistered_class() -> None:
    x = sequence()[0]
    refused(
        "SNNFX216",
        "capture/input_output_checks.py:refuse_inputs",
        "Use tuples, lists, dicts, named tuples, or a class registered with torch.utils._pytree.",
        lambda: snnfx.convert(TakesTwo(), example_inputs=(x, Results(x))),
        names="`more`",
        at="def forward",
    )
    for make in (lambda v: (v,), lambda v: {"a": v}, Registered):
        net = snnfx.convert(TakesTwo(), example_inputs=(x, make(x)))
        expected = torch.stack([net.source(v, make(v)) for v in sequence()])
        assert_same(net(sequence(), make(sequence())), expected)


def test_a_nested_tensor_in_the_step() -> None:
    ragged = torch.nested.nested_tensor([torch.ones(1), torch.ones(C)])

    refused(
        "SNNFX216",
        "capture/input_output_checks.py:refusal_of_nested_tensor",
        "Pad it: torch.nested.to_padded_tensor(x, 0.0).",
        lambda: snnfx.convert(Step(lambda m, x: m.body(x) + torch.add(m.ragged, x), ragged=ragged)),
        names="`ragged`",
        at="m.ragged",
    )
    padded = torch.nested.to_padded_tensor(ragged, 0.0)
    converts(Step(lambda m, x: m.body(x) + torch.add(m.ragged, x), ragged=padded), examples=True)


# -- carried states ----------------------------------------------------------------------------------------------------


class Ambiguous(nn.Module):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mem = x if mem is None else 0.5 * mem + x
        return mem.relu(), mem.sum(1), mem


def test_state_arguments_that_are_ambiguous() -> None:
    error = refused(
        "SNNFX314",
        "capture/carry_inference.py:_unclear",
        "Map each state argument to its output: carry={",
        lambda: snnfx.convert(Ambiguous()),
        names="Ambiguous.forward",
    )
    assert "pass carry={} if none is state" in error.hint
    net = snnfx.convert(Ambiguous(), carry={"mem": 2})
    mem: Any = None
    for t, x in enumerate(sequence()):
        spikes, total, mem = net.source(x, mem)
        assert_same([y[t] for y in net(sequence())[:2]], [spikes, total])
    assert_same(snnfx.convert(Ambiguous(), carry={})(sequence()), step_model(Ambiguous(), sequence()))


class Growing(nn.Module):
    def forward(self, x: Tensor, history: Any = None) -> tuple[Tensor, Any]:
        history = [] if history is None else history
        return sum(history, x), [*history, x]


class KeepsTwo(nn.Module):
    def forward(self, x: Tensor, history: Any = None) -> tuple[Tensor, Any]:
        history = [x, x] if history is None else history
        return sum(history, x), [history[1], x]


def test_a_carried_state_that_changes_its_structure() -> None:
    refused(
        "SNNFX201",
        "capture/capture.py:_capture_once",
        "Return the state with the same nesting and keys as the state argument.",
        lambda: snnfx.convert(Growing(), carry={"history": 1}),
        names="history",
        at="def forward",
    )
    net, history = snnfx.convert(KeepsTwo(), carry={"history": 1}), None
    y_seq = net(sequence())[0]
    for t, x in enumerate(sequence()):
        y, history = net.source(x, history)
        assert_same(y_seq[t], y)


def test_each_step_adds_state() -> None:
    def grows(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        k = next(k for k in range(100) if not hasattr(m, f"s{k}"))
        setattr(m, f"s{k}", y)
        return y + sum(getattr(m, f"s{j}") for j in range(k + 1))

    def registered(m: Any, x: Tensor) -> Tensor:
        y = m.body(x)
        m.total = m.total + y
        return y + m.total

    refused(
        "SNNFX201",
        "capture/capture.py:_capture_once",
        "Register the states with snnfx.MemoryModule.register_memory.",
        lambda: snnfx.convert(Step(grows)),
        at="def forward",
    )
    converts(MemoryStep(registered, {"total": 0.0}))


class SummingLinear(nn.Linear):
    """A torch layer with a state, in a class attribute before the first step, and a method of its own."""

    v: Any = None

    def sum_up(self, x: Tensor) -> Tensor:
        self.v = x if self.v is None else self.v + x
        return self(self.v)  # type: ignore[no-any-return]


class MemoryFirst(snnfx.MemoryModule, nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_memory("v", None)

    sum_up = SummingLinear.sum_up


class LayerFirst(nn.Linear, snnfx.MemoryModule):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_memory("v", None)

    sum_up = SummingLinear.sum_up


@pytest.mark.parametrize("right", [MemoryFirst, LayerFirst])
def test_a_state_of_a_torch_layer(right: Any) -> None:
    class Model(nn.Module):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = layer(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.sum_up(x)  # type: ignore[no-any-return]

    refused(
        "SNNFX218",
        "capture/attribute_changes.py:refuse_change",
        "in the step.",
        lambda: snnfx.convert(Model(SummingLinear)),
        names='self.register_memory("v", initial) in place of the class attribute',
    )
    x_seq, model = torch.rand(5, 2, 3), Model(SummingLinear)
    expected = torch.stack([model(x) for x in x_seq])
    with silent():
        net = snnfx.convert(Model(right))
    torch.testing.assert_close(net(x_seq), expected)


# -- logs --------------------------------------------------------------------------------------------------------------


def test_a_log_of_python_numbers() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.v = 0.5 * m.v + m.fc(x)
        m.log.append(float(m.v.mean()))
        return m.v

    def followed(m: Any, x: Tensor) -> Tensor:
        m.v = 0.5 * m.v + m.fc(x)
        m.log.append(m.v.mean().item())
        m.stats = {"rate": m.v.mean().item()}
        return m.v

    error = refused(
        "SNNFX213",
        "capture/capture.py:_refuse_undeclared_state",
        "from snnfx.MemoryModule, with ",
        lambda: snnfx.convert(Step(step, v=0.0, log=[]), example_inputs=sequence()[0]),
        names="`mean` is used as a Python bool or number",
        at="float(m.v.mean())",
    )
    assert error.hint.startswith("For a log, write `x.item()` instead of `float(x)`")
    assert 'self.register_memory("v", 0.0)' in error.hint
    converts(Step(followed, v=0.0, log=[]))


def test_a_python_number_in_a_model_that_takes_a_sequence() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        return m.fc(x) * float(x.mean())

    refused(
        "SNNFX201",
        "capture/tracer.py:StepTracer.concrete",
        "For a log, write `x.item()` instead of `float(x)` or `int(x)`, which the net records. In a computation, keep ",
        lambda: snnfx.convert(Step(step), takes="sequence", example_inputs=(sequence(),)),
        names="`mean`",
        at="float(x.mean())",
    )
    converts(Step(lambda m, x: m.fc(x) * x.mean()))


def test_a_log_in_a_module_that_cannot_be_traced() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.log.append(float(x.mean()))
        return m.body(x)

    def returns(m: Any, x: Tensor) -> Any:
        return m.body(x), x.mean()

    def records(m: Any, x: Tensor) -> Any:
        m.log.append(x.mean().item())
        return m.body(x)

    refused(
        "SNNFX213",
        "state/composite_adapter.py:_refusing_unregistered_state",
        "Return the value and store it after the call of the net. For a log of a number, write `x.item()` ",
        lambda: snnfx.convert(MemoryStep(step, {"t": 0.0}, log=[]), example_inputs=sequence()[0])(sequence()),
        names="`log.0`",
        at="def forward",
    )
    converts(MemoryStep(returns, {"t": 0.0}))
    converts(MemoryStep(records, {"t": 0.0}, log=[]))


def test_an_object_of_another_library_that_changes() -> None:
    class Axes:
        def __init__(self) -> None:
            self.texts: dict[str, Any] = {"": object()}

    class Figure:
        def __init__(self) -> None:
            self.axes = [Axes()]

    def step(m: Any, x: Tensor) -> Tensor:
        m.figure.axes[0].texts["of step"] = object()
        return m.body(x)

    refused(
        "SNNFX218",
        "capture/attribute_changes.py:refuse_change",
        "Change it outside the step: return the values that it needs and update it after the call of the net.",
        lambda: snnfx.convert(Step(step, figure=Figure())),
        names="`figure`, a Figure",
        at="def forward",
    )
    figure = Figure()
    converts(Step(lambda m, x: m.body(x), figure=figure))
    figure.axes[0].texts["after the call"] = object()


def test_a_nested_log() -> None:
    def step(m: Any, x: Tensor) -> Tensor:
        m.history["x"].append(x.mean())
        return m.body(x)

    def followed(m: Any, x: Tensor) -> Tensor:
        m.history.append(x.mean())
        return m.body(x)

    refused(
        "SNNFX201",
        "capture/attribute_slots.py:AttributeSlot.refusal",
        "For a log, return the value, or append it to a list that is an attribute of the module.",
        lambda: snnfx.convert(Step(step, history={"x": []})),
        names="`history`",
        at="def forward",
    )
    converts(Step(followed, history=[]))
    converts(Step(lambda m, x: (m.body(x), x.mean())))
