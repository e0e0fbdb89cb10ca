"""Models that refer to objects that cannot be copied: figures, loggers, streams of a notebook."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.inspect.verify.observed_contents import changed_names, observe


class Callbacks:
    """Like a figure of matplotlib: weak references are the keys of a dict, and no copy of them is possible."""

    def __init__(self) -> None:
        self.cids = {weakref.WeakMethod(self.draw): 1}
        self.context = threading.local()

    def draw(self) -> None: ...


SETTINGS: dict[str, Any] = {"gain": 2.0, "figure": Callbacks()}


class Named(nn.Module):
    """Reads attributes by name, so that every attribute within reach counts as read."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.lif = nn.Linear(3, 4), snnfx.neuron.LIFNode(v_threshold=0.2)

    def forward(self, x: Tensor) -> Tensor:
        gain = SETTINGS["gain"] if hasattr(self, "linear") else 1.0
        return self.lif(self.linear(gain * x))


class Stream(io.TextIOBase):
    """Like the standard output of a notebook, which refers to everything in the process."""

    def __init__(self) -> None:
        self.written = 0
        self.namespace = {"isinstance": isinstance}

    def write(self, text: str) -> int:
        self.written += 1
        return len(text)


class Printing(Named):
    def __init__(self) -> None:
        super().__init__()
        self.out = Stream()

    def forward(self, x: Tensor) -> Tensor:
        self.out.namespace["last"] = object()
        self.out.write("step")
        return super().forward(x)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("model_class", [Named, Printing])
def test_a_model_near_objects_that_cannot_be_copied_is_verified(model_class: type[nn.Module], double: bool) -> None:
    torch.manual_seed(0)
    model = model_class()
    report = snnfx.verify(model, snnfx.convert(model), 2 * torch.rand(5, 2, 3), double=double)
    assert report.dtype == ("float64" if double else "float32")


def test_a_copy_of_a_net_near_such_objects_still_sees_a_changed_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    net = copy.deepcopy(snnfx.convert(Named()))
    x_seq = torch.rand(5, 2, 3)
    before = net(x_seq)
    monkeypatch.setitem(SETTINGS, "gain", 30.0)
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX315"):
        after = net(x_seq)
    assert not torch.equal(before, after)


class Registry:
    """Weak references as keys and as elements of sets, like the callbacks of a figure."""

    def __init__(self) -> None:
        self.owner = Named()
        self.keys = {weakref.WeakMethod(self.owner.forward): 1}
        self.cids = [{weakref.ref(self.owner)} for _ in range(50)]


class Drawing:
    """Its text validates a cache, as the text of a figure does; it refers to itself in many ways."""

    def __init__(self) -> None:
        self.invalid, self.registry = 2, Registry()
        self.parts: list[Any] = [self, {"drawing": self}]

    def __repr__(self) -> str:
        self.invalid = 0
        return "Drawing()"


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.config = {"drawing": Drawing(), "gain": 2.0}
        self.v: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        gain: Any = self.config["gain"]
        self.v = 0.5 * self.v + self.linear(gain * x)
        return self.v if hasattr(self, "linear") else x


@pytest.mark.parametrize("double", [False, True])
def test_a_drawing_in_a_configuration_is_not_read_and_not_changed(double: bool) -> None:
    model = Configured()
    drawing: Any = model.config["drawing"]
    net = snnfx.convert(model)
    assert drawing.invalid == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.invalid = 1
        net(torch.rand(5, 2, 3))
        snnfx.verify(model, net, torch.rand(5, 2, 3), double=double)


def test_a_net_near_a_registry_of_weak_references_is_pickled() -> None:
    net = snnfx.convert(Named())
    x_seq = torch.rand(5, 2, 3)
    again = pickle.loads(pickle.dumps(net))
    assert torch.equal(again(x_seq), net(x_seq))


def test_two_observations_of_many_sets_are_the_same() -> None:
    model = Configured()
    first, second = observe(model), observe(model)
    assert first.keys() == second.keys() and len([n for n in first if ".cids." in n]) == 51
    assert not changed_names(first, second)
