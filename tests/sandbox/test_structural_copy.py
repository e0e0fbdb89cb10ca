"""Structural copies: what is copied, what is shared."""

from __future__ import annotations

import argparse
import functools
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from snnfx.sandbox.structural_copy import StructuralCopy

Pair = namedtuple("Pair", "a b")


class Slotted:
    __slots__ = ("rate", "unset")

    def __init__(self) -> None:
        self.rate = [1]


class Settings:
    def __init__(self) -> None:
        self.sizes = {"a": [1, 2]}
        self.me = self


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.again = self.fc
        self.v = self.fc.weight * 2  # with an autograd graph, which deepcopy refuses
        self.bound = self.forward
        self.closure = lambda x: self.fc(x)
        self.partial = functools.partial(self.forward)
        self.settings = Settings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


def copied(value: Any) -> Any:
    return StructuralCopy().of(value)


def test_modules_are_copied_and_tensors_are_shared() -> None:
    model = Model()
    copies = StructuralCopy()
    copy = copies.of(model)
    assert copy is not model and copy.fc is not model.fc and copy.again is copy.fc
    assert copy.fc.weight is model.fc.weight and copy.v is model.v
    copy.fc.scale = 2.0
    copy.fc.weight = nn.Parameter(torch.zeros(3, 3))
    assert not hasattr(model.fc, "scale") and model.fc.weight is not copy.fc.weight
    assert copies.original_of(copy.fc) is model.fc and copies.original_of(3) == 3


def test_methods_and_functions_refer_to_the_copy() -> None:
    model = Model()
    copy = copied(model)
    assert copy.bound.__self__ is copy
    assert copy.closure.__closure__[0].cell_contents is copy
    assert copy.partial.func.__self__ is copy
    assert model.closure.__closure__[0].cell_contents is model


def test_functions_without_a_closure_have_copies_as_defaults() -> None:
    model = Model()

    def function(x: torch.Tensor, fc: nn.Module = model.fc) -> Any:
        return fc(x)

    assert function.__closure__ is None
    model.function = function
    copy = copied(model)
    assert copy.function.__defaults__ == (copy.fc,) and function.__defaults__ == (model.fc,)


def test_objects_with_cycles_are_copied() -> None:
    copy = copied(Model()).settings
    assert copy.me is copy and copy.sizes == {"a": [1, 2]}


@pytest.mark.parametrize(
    "value",
    [
        [[1]], ([1], 2), {"a": [1]}, OrderedDict(a=[1]), defaultdict(list, a=[1]), deque([[1]], maxlen=3), {1, 2},
        Pair([1], 2), SimpleNamespace(a=[1]), argparse.Namespace(a=[1]),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_containers_are_copied(value: Any) -> None:
    copy = copied(value)
    assert copy is not value and type(copy) is type(value) and copy == value
    if isinstance(value, deque):
        assert copy.maxlen == 3


class Link:
    def __init__(self, following: Any) -> None:
        self.following = following
        self.rate = [1]


def link_of(kind: str, following: Any) -> Any:
    if kind == "object":
        return Link(following)
    if kind == "function":
        fc = nn.Linear(1, 1)
        return lambda x, fc=fc, following=following: fc(x)
    if kind == "partial":
        return functools.partial(len, [], following)
    return {"list": [following], "dict": {1: following}, "deque": deque([following]), "tuple": (following, [1])}[kind]


@pytest.mark.parametrize("kind", ["object", "list", "dict", "deque", "tuple", "partial", "function"])
def test_chains_longer_than_the_recursion_limit_are_copied(kind: str) -> None:
    first = value = nn.Linear(1, 1)
    for _ in range(3 * sys.getrecursionlimit()):
        value = link_of(kind, value)
    copies = StructuralCopy()
    copy = copies.of(value)
    assert copy is not value and copies.of(value) is copy
    assert copies.of(first) is not first and copies.original_of(copies.of(first)) is first
    assert [original for original, _ in copies.pairs()].count(first) == 1


def test_objects_are_complete_before_they_are_keys() -> None:
    @dataclass(frozen=True)
    class Key:
        name: str
        following: Key | None = None

    value = {Key("a", Key("b")): [1], "keys": {Key("a"), Key("c")}}
    copy = copied(value)
    assert copy == value and copy[Key("a", Key("b"))] is not value[Key("a", Key("b"))]
    assert all(key is not original for key, original in zip(copy, value, strict=True) if isinstance(key, Key))


def test_a_value_that_its_key_contains_is_copied_once() -> None:
    class Owner:
        pass

    owner = Owner()
    owner.rate = [1]
    copy = copied({owner: owner.rate})
    ((key, value),) = copy.items()
    assert key is not owner and value is key.rate and value is not owner.rate


def test_slots_are_copied_and_empty_ones_stay_empty() -> None:
    value = Slotted()
    copy = copied(value)
    assert copy.rate == [1] and copy.rate is not value.rate and not hasattr(copy, "unset")


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), (i for i in range(3)), sys, open(__file__), torch.Generator(), len, Model, 3, "a", torch.float],  # noqa: SIM115
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_shared(value: Any) -> None:
    assert copied([value])[0] is value


def test_random_generators_have_their_own_state() -> None:
    generator = random.Random(3)
    copy = copied(generator)
    assert copy is not generator and copy.random() == generator.random()


def test_tensors_can_be_replaced() -> None:
    model = Model()
    weight = torch.zeros(3, 3)
    copy = StructuralCopy(tensor=lambda t: weight if t is model.fc.weight else t).of(model)
    assert copy.fc._parameters["weight"] is weight and copy.fc.bias is model.fc.bias


def test_layers_of_torch_run_as_copies() -> None:
    x = torch.rand(2, 3)
    for layer in (nn.LSTM(3, 3), parametrizations.weight_norm(nn.Linear(3, 3)), nn.MultiheadAttention(3, 1)):
        arguments = (x, x, x) if isinstance(layer, nn.MultiheadAttention) else (x,)
        torch.testing.assert_close(copied(layer)(*arguments), layer(*arguments))


def test_finalizers_run_for_the_original_only() -> None:
    finalized = []

    class Connection:
        def __del__(self) -> None:
            finalized.append(self)

    model = Model()
    model.connection = Connection()
    assert copied(model).connection is model.connection
    assert finalized == []
