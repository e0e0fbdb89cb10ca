"""An operator of the user's own has a row in the table: all mechanisms treat it by its traits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.online import OTTT_A
from snnfx.ops.operator_lookup import register_operator, traits_of_function
from snnfx.ops.traits import OperatorTraits
from snnfx.regions.region_modules import LoopRegion
from support.online_training import Trained, same
from support.stepping import assert_converts


def gated(x: Tensor, gate: Tensor) -> Tensor:
    return x * torch.sigmoid(gate)


def _define(name: str, **options: Any) -> Any:
    operator = torch.library.custom_op(f"snnfx_tests::{name}", gated, mutates_args=(), **options)
    operator.register_fake(lambda x, gate: torch.empty_like(x))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        s = torch.sigmoid(gate)
        return grad * s, grad * x * s * (1 - s)

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    operator.register_autograd(backward, setup_context=save)
    return getattr(torch.ops.snnfx_tests, name)


added, tagged, unknown = _define("added"), _define("tagged", tags=(torch.Tag.pointwise,)), _define("unknown")
register_operator(added, OperatorTraits("added", elementwise=True, decomposition=gated))


class Between(nn.Module):
    """The operator between a weight and a neuron."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(3, 4), snnfx.neuron.LIFNode(v_threshold=0.2), nn.Linear(4, 2)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        out: Tensor = self.out(self.lif(self.operation(h, h + 1)))
        return out


class Inside(snnfx.MemoryModule):
    """The operator in the recurrence of a neuron."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.7))
        self.register_memory("v", 0.0)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.operation(self.v * self.w + x, x)
        return self.v


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def kinds_of(net: Any) -> dict[str, str]:
    return {node.name: region.kind for region in net.program.regions for node in region.nodes}


@pytest.mark.parametrize("operation", [added, added.default, tagged], ids=["row", "row of its packet", "tag"])
def test_an_element_wise_operator_is_folded(operation: Any) -> None:
    net = assert_converts(Between(operation), torch.randn(5, 2, 3))
    (kind,) = {kind for name, kind in kinds_of(net).items() if name.startswith(("added", "tagged"))}
    assert kind == "fold"


def test_an_operator_without_traits_is_not_folded() -> None:
    net = assert_converts(Between(unknown), torch.randn(5, 2, 3))
    assert kinds_of(net)["unknown"] == "map"


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("operation", [added, unknown], ids=["row", "no row"])
def test_a_row_with_a_decomposition_is_part_of_the_kernel(operation: Any) -> None:
    net = assert_converts(Inside(operation), torch.randn(5, 2, 3))
    (loop,) = [m for m in net.snnfx_regions.modules() if isinstance(m, LoopRegion)]
    assert loop.kernels is not None
    assert isinstance(loop.kernels.in_use, LoweredStep) == (operation is added)


@pytest.mark.parametrize("operation", [added, tagged], ids=["row", "tag"])
def test_an_online_rule_trains_through_it_like_through_its_formula(operation: Any) -> None:
    model = Between(operation)
    plain = Between(gated)
    plain.load_state_dict(model.state_dict())
    x_seq, target = torch.rand(6, 3, 3), torch.rand(6, 3, 2)
    found, expected = (Trained(m, OTTT_A, x_seq, target) for m in (model, plain))
    same(found.gradients, expected.gradients)


def test_a_second_row_for_an_operator_is_refused() -> None:
    register_operator(added, traits_of_function(added))
    with pytest.raises(ValueError, match="has a row"):
        register_operator(added, OperatorTraits("added", mixes=True))
    with pytest.raises(ValueError, match="has a row"):
        register_operator(torch.relu, OperatorTraits("relu", mixes=True))
