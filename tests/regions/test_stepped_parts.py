"""Modules that cannot be traced run step by step: their buffers, and the structures that they return."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx.errors import CaptureError, InputError


class Untraced(nn.Module):
    def decide(self, x: Tensor) -> bool:
        """Whether x is finite: a decision that capture cannot record."""
        return math.isfinite(float(x.detach().sum()))


class Rate(Untraced):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.decide(x):
            self.rate = self.rate * 0.5 + x.detach().mean()
        return x


class ReadsOther(Untraced):
    def __init__(self, other: Rate) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        return x * self.other.rate + 1 if self.decide(x) else x


class Norm(Untraced):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.decide(x) else x


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Rate()

    def forward(self, x: Tensor) -> Tensor:
        self.part(x)
        return x * 2


class ReadAround(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Rate()

    def forward(self, x: Tensor) -> Tensor:
        before = x * self.part.rate
        return self.part(x) * self.part.rate + before


class ReadByAnotherPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Rate()
        self.reader = ReadsOther(self.part)

    def forward(self, x: Tensor) -> Tensor:
        before = self.reader(x)
        changed = self.part(torch.tanh(x))
        return self.reader(changed) + before


class StatisticsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Norm()

    def forward(self, x: Tensor) -> Tensor:
        before = x * self.part.norm.running_mean
        return self.part(x) * self.part.norm.running_mean + before


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("examples", [True, False], ids=["examples", "none"])
@pytest.mark.parametrize("kind", [Unused, ReadAround, ReadByAnotherPart, StatisticsInside], ids=lambda k: k.__name__)
def test_buffers_of_a_stepped_part_change_and_are_read_in_order(
    kind: type[nn.Module], examples: bool, training: bool
) -> None:
    model, x_seq = kind().double().train(training), torch.rand(4, 2, 3, dtype=torch.float64)
    stepped = copy.deepcopy(model)
    expected = torch.stack([stepped(x) for x in x_seq])
    net = snnfx.convert(model, example_inputs=(x_seq[0],) if examples else None, batch_norm="per_step")
    torch.testing.assert_close(net(x_seq), expected, atol=1e-12, rtol=0)
    for (name, found), value in zip(model.named_buffers(), stepped.buffers(), strict=True):
        torch.testing.assert_close(found, value, atol=1e-12, rtol=0, msg=name)


class WritesForReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Rate()
        self.reader = ReadsOther(self.part)

    def forward(self, x: Tensor) -> Tensor:
        self.part.rate = self.part.rate * 0.5 + x.mean()
        return self.reader(x)


def test_a_buffer_that_traced_code_changes_and_a_stepped_part_has_is_refused() -> None:
    with pytest.raises(CaptureError, match="SNNFX214.*`part.rate`, and `reader` has this buffer too"):
        snnfx.convert(WritesForReader())


class Structured(Untraced):
    def forward(self, x: Tensor) -> Any:
        y = x.sigmoid() if self.decide(x) else x
        return y, {"double": y * 2, "number": 3.5, "nothing": None}


class AroundStructure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Structured()


class ReturnsIt(AroundStructure):
    def forward(self, x: Tensor) -> Any:
        y = self.part(x)
        return y[0], y[1]["double"], y[1]["number"]


class PassesOn(AroundStructure):
    def forward(self, x: Tensor) -> Any:
        y = self.part(x)
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "none"])
def test_a_structure_whose_type_the_code_may_have_checked_is_an_error(examples: bool) -> None:
    x_seq = torch.rand(4, 2, 3, dtype=torch.float64)
    net = snnfx.convert(PassesOn(), example_inputs=(x_seq[0],) if examples else None)
    with pytest.raises(InputError, match="SNNFX313.*returns a tuple"):
        net(x_seq)


class ReadsFirst(AroundStructure):
    def forward(self, x: Tensor) -> Any:
        return self.part(x * 2)[0] + 1


class ReadsNested(AroundStructure):
    def forward(self, x: Tensor) -> Any:
        return self.part(x * 2)[1]["double"] + 1, x


class Unpacks(AroundStructure):
    def forward(self, x: Tensor) -> Any:
        first, rest = self.part(x * 2)
        return first + rest["double"]


class Chains(AroundStructure):
    def forward(self, x: Tensor) -> Any:
        return self.part(self.part(x)[0])[1]["double"]


@pytest.mark.parametrize("examples", [True, False], ids=["examples", "none"])
@pytest.mark.parametrize(
    "kind", [Structured, ReturnsIt, ReadsFirst, ReadsNested, Unpacks, Chains], ids=lambda k: k.__name__
)
def test_a_stepped_part_may_return_tuples_and_dicts(kind: type[nn.Module], examples: bool) -> None:
    model, x_seq = kind(), torch.rand(4, 2, 3, dtype=torch.float64, requires_grad=True)
    steps = [pytree.tree_flatten(model(x)) for x in x_seq]
    net = snnfx.convert(model, example_inputs=(x_seq[0].detach(),) if examples else None)
    leaves, spec = pytree.tree_flatten(net(x_seq))
    assert spec == steps[0][1]
    for index, leaf in enumerate(leaves):
        values = [values[index] for values, _ in steps]
        if values[0] is None:
            assert leaf is None
            continue
        expected = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
        torch.testing.assert_close(leaf, expected, atol=1e-12, rtol=0)
        if leaf.requires_grad:
            found, right = (torch.autograd.grad(y.sum(), x_seq, retain_graph=True)[0] for y in (leaf, expected))
            torch.testing.assert_close(found, right, atol=1e-12, rtol=0)


class ReturnsOther(Untraced):
    def forward(self, x: Tensor) -> Any:
        return (x, x) if self.decide(x) and float(x.detach().sum()) > 0 else (x,)


def test_a_structure_that_differs_between_steps_is_an_error() -> None:
    net = snnfx.convert(ReturnsOther())
    with pytest.raises(InputError, match="SNNFX313.*at step 1 than at step 2"):
        net(torch.tensor([[1.0], [-1.0], [1.0]]))


@pytest.mark.parametrize("kind", [Structured, ReturnsIt, ReadsNested], ids=lambda k: k.__name__)
def test_structures_are_joined_over_chunks_moved_and_reduced(kind: type[nn.Module]) -> None:
    model, x_seq = kind(), torch.rand(5, 2, 3, dtype=torch.float64)
    whole = pytree.tree_leaves(snnfx.convert(model)(x_seq))

    def assert_leaves(outputs: Any, expected: list[Any]) -> None:
        for found, value in zip(pytree.tree_leaves(outputs), expected, strict=True):
            if value is None:
                assert found is None
            else:
                torch.testing.assert_close(torch.as_tensor(found, dtype=value.dtype), value, atol=1e-12, rtol=0)

    with torch.no_grad():
        assert_leaves(snnfx.convert(model.eval(), chunk=2)(x_seq), whole)
        assert_leaves(snnfx.convert(model, step_mode="s", example_inputs=(x_seq[0],))(x_seq[0]), _at_step(whole, 0))
        for how in ("mean", "sum", "last"):
            reduced = [None if y is None else y[-1] if how == "last" else getattr(y, how)(0) for y in whole]
            assert_leaves(snnfx.convert(model, reduce=how)(x_seq), reduced)
            assert_leaves(snnfx.convert(model, reduce=how, chunk=2)(x_seq), reduced)


def test_time_moves_in_a_structure() -> None:
    model, x_seq = Splits(), torch.rand(5, 2, 3, dtype=torch.float64)
    expected = pytree.tree_map(lambda y: y.movedim(0, 1), snnfx.convert(model)(x_seq))
    for x, net in ((x_seq.movedim(0, 1), snnfx.convert(model, time_dim=1)),):
        found = net(x)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-12, rtol=0)


class Splits(Untraced):
    def forward(self, x: Tensor) -> Any:
        return {"a": x * 2, "b": -x} if self.decide(x) else {"a": x, "b": x}


def _at_step(values: list[Any], step: int) -> list[Any]:
    return [None if y is None else y[step] for y in values]
