"""Copies of the plain attributes of a model."""

from __future__ import annotations

import copy
import pickle
from collections import deque, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from snnfx.sandbox.attribute_values import AttributeValues

Pair = namedtuple("Pair", "a b")


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.number, self.nothing, self.text = 1.0, None, "a"
        self.tensor, self.array = torch.zeros(2), np.zeros(2)
        self.nested = {"list": [torch.zeros(1), 2], "deque": deque([1, 2], 2), "pair": Pair(torch.zeros(1), 3)}
        self.child = nn.Module()
        self.child.nan = float("nan")
        self.modules_in_a_list = [nn.Linear(1, 1)]


def test_nothing_has_changed_at_first() -> None:
    model = Holder()
    assert AttributeValues.of(model).changed_in(model) == []
    assert AttributeValues.of(model).changed_in(copy.deepcopy(model)) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda m: setattr(m, "number", 2.0), ("", "number")),
        (lambda m: setattr(m, "number", 1), ("", "number")),
        (lambda m: setattr(m, "nothing", 0), ("", "nothing")),
        (lambda m: m.tensor.add_(1), ("", "tensor")),
        (lambda m: setattr(m, "tensor", torch.zeros(1, 2)), ("", "tensor")),
        (lambda m: m.array.__setitem__(0, 1.0), ("", "array")),
        (lambda m: m.nested["list"][0].add_(1), ("", "nested")),
        (lambda m: m.nested["deque"].append(3), ("", "nested")),
        (lambda m: m.nested["pair"].a.add_(1), ("", "nested")),
        (lambda m: m.nested.pop("list"), ("", "nested")),
        (lambda m: setattr(m.child, "nan", 0.0), ("child", "nan")),
        (lambda m: setattr(m, "new", 1), ("", "new")),
        (lambda m: delattr(m, "text"), ("", "text")),
    ],
)
def test_a_change_is_found_and_undone(change, key) -> None:
    model = Holder()
    values = AttributeValues.of(model)
    change(model)
    assert values.changed_in(model) == [key]
    values.restore(model, *key)
    assert values.changed_in(model) == []
    change(model)
    values.restore(model, *key)
    assert values.changed_in(model) == [], "the copy itself was changed"


def test_an_object_without_a_copy_stays() -> None:
    model = Holder()
    values = AttributeValues.of(model)
    model.modules_in_a_list = other = [nn.Linear(1, 1)]
    assert values.changed_in(model) == []
    values.restore(model, "", "modules_in_a_list")
    assert model.modules_in_a_list is other


def test_a_value_takes_the_precision_of_the_current_one() -> None:
    model = Holder()
    values = AttributeValues.of(model)
    model.tensor = torch.ones(2, dtype=torch.float64)
    values.restore(model, "", "tensor")
    assert model.tensor.dtype == torch.float64


def test_values_can_be_pickled() -> None:
    model = Holder()
    assert pickle.loads(pickle.dumps(AttributeValues.of(model))).changed_in(model) == []


def test_a_list_that_contains_itself_has_no_copy() -> None:
    model = nn.Module()
    model.cycle = []
    model.cycle.append(model.cycle)
    assert AttributeValues.of(model).values == {}


def test_a_module_of_another_class_is_left_alone() -> None:
    model = Holder()
    values = AttributeValues.of(model)
    model.child = nn.Conv2d(1, 1, 1)
    assert values.changed_in(model) == []
