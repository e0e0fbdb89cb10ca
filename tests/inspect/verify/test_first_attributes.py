"""`snnfx.verify` knows the first values of plain attributes without asking the net."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import VerificationError

torch.set_num_threads(1)


class PlainState(nn.Module):
    """State in plain attributes: a number, a tensor, an element of a dict, and one that the first step creates."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.leak = 0.5
        self.v, self.adaptation, self.log = 0.25, torch.full((3,), 0.5), {"mean": torch.zeros(())}

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "trace"):
            self.trace = torch.ones_like(x)
        self.trace = 0.5 * self.trace + x
        self.v = self.leak * self.v + self.linear(x)
        self.adaptation = 0.5 * self.adaptation + self.v.mean(0)
        self.log["mean"] = 0.5 * self.log["mean"] + self.adaptation.mean()
        return self.v + self.adaptation + self.log["mean"] + self.trace


class Flagged(nn.Module):
    """A flag says whether the state exists."""

    def __init__(self) -> None:
        super().__init__()
        self.is_first, self.v = True, None

    def forward(self, x: Tensor) -> Tensor:
        if self.is_first:
            self.v, self.is_first = torch.full_like(x, 0.3), False
        self.v = 0.5 * self.v + x
        return self.v.clone()


def stepped(model: nn.Module, x_seq: Tensor) -> nn.Module:
    with torch.no_grad():
        for x in x_seq:
            model(x)
    return model


@pytest.fixture
def x_seq() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(5, 2, 3)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("model_class", [PlainState, Flagged])
def test_steps_after_conversion_do_not_matter(model_class: type[nn.Module], double: bool, x_seq: Tensor) -> None:
    model = model_class()
    net = snnfx.convert(model)
    snnfx.verify(model, net, x_seq, double=double)
    stepped(model, x_seq)
    snnfx.verify(model, net, x_seq, double=double)


def test_steps_before_conversion_set_the_first_state(x_seq: Tensor) -> None:
    model = stepped(PlainState(), x_seq)
    net = snnfx.convert(model)
    snnfx.verify(model, net, x_seq)
    stepped(model, x_seq)
    snnfx.verify(model, net, x_seq)


@pytest.mark.parametrize("attribute", ["v", "adaptation", "log"])
@pytest.mark.parametrize("was_stepped", [False, True])
def test_a_wrong_first_value_is_found(attribute: str, was_stepped: bool, x_seq: Tensor) -> None:
    model = PlainState()
    right = copy.deepcopy(getattr(model, attribute))
    wrong = {"v": 0.5, "adaptation": torch.ones(3), "log": {"mean": torch.ones(())}}[attribute]
    setattr(model, attribute, wrong)
    net = snnfx.convert(model)
    setattr(model, attribute, right)
    # The capture took another value for the first one than the model had.
    net.__dict__["first_attributes"] = snnfx.convert(model).first_attributes
    if was_stepped:
        stepped(model, x_seq)
    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(model, net, x_seq)


def test_the_record_of_first_values_in_the_program_is_not_used(x_seq: Tensor) -> None:
    model = PlainState()
    net = snnfx.convert(model)
    for program in net.programs.values():
        program.initial_attributes = [
            dataclasses.replace(a, value=7.0) if a.attribute == "v" else a for a in program.initial_attributes
        ]
    snnfx.verify(stepped(model, x_seq), net, x_seq)


def test_settings_keep_the_value_that_the_user_gave_them(x_seq: Tensor) -> None:
    model = PlainState()
    net = snnfx.convert(model)
    stepped(model, x_seq).leak = 0.75
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX315"):
        snnfx.verify(model, net, x_seq)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_net_know_the_first_values(copied: Any, x_seq: Tensor) -> None:
    model = PlainState()
    net = snnfx.convert(model)
    stepped(model, x_seq)
    again = copied(net)
    snnfx.verify(again.source, again, x_seq)


def test_another_model_has_first_values_of_its_own(x_seq: Tensor) -> None:
    model = PlainState()
    net, other = snnfx.convert(model), copy.deepcopy(model)
    snnfx.verify(other, net, x_seq)
    other.v = 0.5
    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(other, net, x_seq)


def test_another_model_that_was_stepped_starts_without_the_attributes_that_a_step_creates(x_seq: Tensor) -> None:
    class Lazy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "v"):
                self.v = torch.ones_like(x)
            self.v = 0.5 * self.v + x
            return self.v.clone()

    snnfx.verify(stepped(Lazy(), x_seq), snnfx.convert(Lazy()), x_seq)


def test_a_flag_that_the_net_needs_no_copy_of_is_a_note(x_seq: Tensor) -> None:
    model = Flagged()
    report = snnfx.verify(model, snnfx.convert(model), x_seq)
    assert "the net does not write `is_first`, but continues from its final state like the model" in report.notes


def test_verify_leaves_the_attributes_of_a_stepped_model_as_they_are(x_seq: Tensor) -> None:
    model = PlainState()
    net = snnfx.convert(model)
    stepped(model, x_seq)
    before = {name: getattr(model, name) for name in ("v", "adaptation", "log", "trace")}
    values = copy.deepcopy(before)
    snnfx.verify(model, net, x_seq)
    assert all(getattr(model, name) is value for name, value in before.items())
    assert torch.equal(model.v, values["v"]) and torch.equal(model.log["mean"], values["log"]["mean"])


def test_a_model_with_layers_of_another_class_is_compared() -> None:
    x_seq = torch.rand(4, 2, 3)
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)))
    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(nn.Sequential(nn.Softmax(-1), nn.Linear(3, 3)), net, x_seq)


def test_a_layer_that_was_replaced_after_conversion_keeps_its_attributes() -> None:
    x_seq, model = torch.rand(4, 2, 3), nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1))
    net = snnfx.convert(model)
    model[1] = nn.LayerNorm(3)
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX315"):
        snnfx.verify(model, net, x_seq)
