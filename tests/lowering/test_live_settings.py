"""What the kernels of a region depend on in its modules is looked at in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from snnfx.lowering.live_settings import SettingsOfRegion


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha = 2.0


class Neuron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tau, self.steps, self.detach, self.mode = 2.0, 1, False, "hard"
        self.levels, self.rests = [1, 2], [3]
        self.nested = ({"low": [0.5]},)
        self.options = {"reset": 0.0}
        self.scale = torch.ones(3)
        self.weight = nn.Parameter(torch.ones(3))
        self.surrogate = Part()


def change_class(neuron: Neuron) -> None:
    neuron.surrogate.__class__ = type("Other", (Part,), {})


def move_a_level(neuron: Neuron) -> None:
    neuron.levels[:], neuron.rests[:] = [1], [2, 3]


def rename_an_option(neuron: Neuron) -> None:
    neuron.options["v_reset"] = neuron.options.pop("reset")


CHANGES: dict[str, Callable[[Neuron], Any]] = {
    "a number": lambda n: setattr(n, "tau", 3.0),
    "the type of a number": lambda n: setattr(n, "tau", 2),
    "a number to a bool": lambda n: setattr(n, "steps", True),
    "a flag": lambda n: setattr(n, "detach", True),
    "a string": lambda n: setattr(n, "mode", "soft"),
    "a string to None": lambda n: setattr(n, "mode", None),
    "a number to NaN": lambda n: setattr(n, "tau", float("nan")),
    "an attribute more": lambda n: setattr(n, "more", 1),
    "an attribute less": lambda n: delattr(n, "mode"),
    "training": lambda n: n.eval(),
    "an element of a list": lambda n: n.levels.__setitem__(0, 5),
    "the border between two lists": move_a_level,
    "a list deep inside": lambda n: n.nested[0]["low"].append(1.0),
    "a value of a dict": lambda n: n.options.update(reset=1.0),
    "a key of a dict": rename_an_option,
    "a tensor": lambda n: setattr(n, "scale", torch.ones(3)),
    "the shape of a tensor": lambda n: n.scale.resize_(2),
    "requires_grad of a parameter": lambda n: n.weight.requires_grad_(False),
    "the dtype of a parameter": lambda n: n.double(),
    "a part's number": lambda n: setattr(n.surrogate, "alpha", 4.0),
    "a part": lambda n: setattr(n, "surrogate", nn.Sigmoid()),
    "the class of a part": change_class,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_gives_another_key(change: str) -> None:
    neuron, settings = Neuron(), SettingsOfRegion()
    before = settings.of((neuron,))
    CHANGES[change](neuron)
    after = settings.of((neuron,))
    assert before != after
    assert after == SettingsOfRegion().of((neuron,)) == settings.of((neuron,))


def test_what_stays_the_same_is_described_once() -> None:
    neuron, settings = Neuron(), SettingsOfRegion()
    first, second = settings.of((neuron, 0.5)), settings.of((neuron, 0.5))
    assert first is not None and second is not None and first[0] is second[0]


def test_a_change_that_is_taken_back_gives_the_same_key() -> None:
    neuron, settings = Neuron(), SettingsOfRegion()
    before = settings.of((neuron,))
    neuron.tau = 3.0
    assert settings.of((neuron,)) != before
    neuron.tau = 2.0
    after = settings.of((neuron,))
    assert after == before and hash(after) == hash(before)


def test_numbers_and_tensors_are_told_apart_by_what_a_step_depends_on() -> None:
    settings = SettingsOfRegion()
    assert settings.of((1, True)) != settings.of((1.0, True)) != settings.of((1.0, 1))
    assert settings.of((torch.ones(2),)) == settings.of((torch.zeros(2),)) != settings.of((torch.ones(3),))


def test_hooks_are_seen_at_any_time() -> None:
    neuron, settings = Neuron(), SettingsOfRegion()
    before = settings.of((neuron,))
    handle = neuron.surrogate.register_forward_hook(lambda *_: None)
    assert settings.of((neuron,)) is None
    assert settings.of((neuron,)) is None
    handle.remove()
    assert settings.of((neuron,)) == before
