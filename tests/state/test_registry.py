"""State: MemoryModule, adapters, reset and detach."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, InputError
from snnfx.functional import detach_net, reset_net
from snnfx.state.composite_adapter import composite_adapter, is_stateful_tree
from snnfx.state.registry import adapter_of, named_stateful, register_adapter
from snnfx.state.step_calls import call_opaque, call_stateful, initial_value, opaque_initial_value
from support.stepping import assert_same


class Leaky(snnfx.MemoryModule):
    def __init__(self, initial: Any = 0.0) -> None:
        super().__init__()
        self.register_memory("v", initial)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        return self.v


def test_a_memory_is_an_attribute_and_not_a_buffer() -> None:
    cell = Leaky()
    assert cell.v == 0.0 and cell.memory_names() == ("v",)
    y = cell(torch.ones(2))
    assert cell.v is y
    assert list(cell.state_dict()) == [] and list(cell.buffers()) == []
    cell.reset()
    assert cell.v == 0.0


def test_a_tensor_as_initial_value_is_never_changed_by_the_steps() -> None:
    start = torch.ones(2)
    cell = Leaky(start)
    cell.v.mul_(7)
    assert torch.equal(start, torch.ones(2))
    cell.reset()
    assert torch.equal(cell.v, start) and cell.v is not start


@pytest.mark.parametrize("name", ["not an identifier", "training", "forward", "v"])
def test_used_or_invalid_memory_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        Leaky().register_memory(name, 0.0)


def test_an_attribute_that_is_not_a_memory_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = Leaky().nothing


def test_copies_and_pickles_have_independent_state() -> None:
    cell = Leaky()
    cell(torch.ones(2, requires_grad=True))
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(nn.Sequential(Leaky()))[:])[0]):
        other(torch.ones(2))
        other.reset()
        assert other.v == 0.0
    assert torch.equal(cell.v.detach(), torch.ones(2))


def test_a_copy_after_a_training_step_has_the_value_without_the_autograd_graph() -> None:
    cell = Leaky()
    cell(torch.ones(2, requires_grad=True))
    other = copy.deepcopy(nn.Sequential(cell, nn.Linear(2, 2)))
    assert not other[0].v.requires_grad and torch.equal(other[0].v, cell.v)


def test_a_pure_step_does_not_change_the_stored_state() -> None:
    for cell in (Leaky(), neuron.LIFNode()):
        cell(torch.ones(2))
        before = cell.v
        y, (v,) = call_stateful(cell, (torch.zeros(2),), torch.full((2,), 0.5))
        assert cell.v is before
        assert v.shape == y.shape == (2,)


def test_a_failed_step_restores_the_state() -> None:
    class Fails(Leaky):
        def forward(self, x: Tensor) -> Tensor:
            self.v = x
            raise ValueError("on purpose")

    cell = Fails()
    with pytest.raises(ValueError, match="on purpose"):
        call_stateful(cell, (1.0,), torch.ones(2))
    assert cell.v == 0.0


def test_initial_values_are_those_of_the_reset_state_for_the_inputs() -> None:
    x = torch.rand(2, 3, dtype=torch.float64)
    assert initial_value(Leaky(0.25), 0, x) == 0.25
    assert_same(initial_value(neuron.LIFNode(v_reset=0.1), 0, x), torch.full_like(x, 0.1))


def test_an_opaque_module_has_the_states_of_all_its_submodules() -> None:
    model = nn.Sequential(Leaky(), nn.Sequential(neuron.AdaptiveLIFNode()), nn.Linear(2, 2))
    adapter = composite_adapter(model)
    assert adapter.names(model) == ("0.v", "1.0.v", "1.0.b")
    x = torch.rand(3, 2)
    state = tuple(opaque_initial_value(model, i, x) for i in range(3))
    steps = []
    for _ in range(3):
        y, state = call_opaque(model, state, x)
        steps.append(y)
    assert_same([model[0].v, model[1][0].v], [0.0, 0.0])
    assert_same(steps, [model(x) for _ in range(3)])
    assert_same(state, adapter.read(model))


def test_an_undeclared_state_of_an_opaque_module_is_refused_and_removed() -> None:
    class Hidden(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return x

    model = Hidden()
    with pytest.raises(CaptureError, match="SNNFX213.*last"):
        call_opaque(model, (), torch.rand(2))
    assert not hasattr(model, "last")


def test_adapters_are_found_by_the_nearest_base_class() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = 0.0

    class Derived(Foreign):
        pass

    class ForeignAdapter(type(adapter_of(Leaky()))):  # type: ignore[misc]
        def names(self, module: nn.Module) -> tuple[str, ...]:
            return ("v",)

    assert adapter_of(Foreign()) is None
    adapter = ForeignAdapter()
    register_adapter(Foreign, adapter)
    assert adapter_of(Derived()) is adapter
    assert adapter_of(nn.Linear(2, 2)) is None


def test_a_leaf_with_states_inside_is_a_tree() -> None:
    class Holds(neuron.LIFNode):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Leaky()

    for module, expected in ((Holds(), True), (neuron.LIFNode(), False), (nn.Sequential(Leaky()), False)):
        assert is_stateful_tree(module, adapter_of(module)) is expected


def test_each_stateful_module_is_named_once() -> None:
    lif = neuron.LIFNode()
    assert [name for name, _, _ in named_stateful(nn.ModuleDict({"a": lif, "b": lif, "c": Leaky()}))] == ["a", "c"]


def test_reset_net_resets_models_and_carried_states() -> None:
    model = nn.Sequential(nn.Linear(2, 2), neuron.LeakyIntegrator())
    model(torch.rand(3, 2))
    reset_net(model)
    assert model[1].v == 0.0
    net = snnfx.convert(model, carry_state=True)
    x_seq = 2 * torch.rand(4, 3, 2)
    first = net(x_seq)
    assert not torch.equal(net(x_seq), first)
    reset_net(net)
    assert torch.equal(net(x_seq), first)


def test_detach_net_detaches_models_and_carried_states() -> None:
    model = nn.Sequential(nn.Linear(2, 2), neuron.LIFNode())
    model(torch.rand(3, 2))
    value = model[1].v
    assert value.requires_grad
    detach_net(model)
    assert not model[1].v.requires_grad and torch.equal(model[1].v, value)
    net = snnfx.convert(model, step_mode="s")
    x = torch.rand(3, 2)
    net(x)
    detach_net(net)
    net(x).sum().backward()
