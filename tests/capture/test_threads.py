"""Capture in one thread while others run: they see neither proxies nor changed modules; random numbers stay."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.capture.capture import capture_both_modes
from snnfx.errors import CaptureError


def small_model() -> nn.Module:
    neuron = snnfx.neuron.LIFNode
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), neuron(tau=2.0), nn.Linear(8, 4), neuron(tau=2.0))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


@contextmanager
def in_another_thread(work: Callable[[], None]) -> Iterator[None]:
    """Repeat `work` in a thread while the block runs, and raise its first error afterwards."""
    errors: list[BaseException] = []
    is_done = threading.Event()

    def repeat() -> None:
        try:
            while not is_done.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
    if errors:
        raise errors[0]


def test_another_thread_gets_tensors_from_torch() -> None:
    other = small_model()

    def load() -> None:
        made = (torch.rand(3), torch.zeros(2), torch.arange(4), Double.apply(torch.ones(2)), other(torch.ones(2, 8)))
        assert all(type(value) is Tensor for value in made)
        assert not isinstance(made[0], int)

    with in_another_thread(load):
        for _ in range(5):
            capture_both_modes(small_model(), torch.rand(2, 8))


def test_another_thread_may_call_the_model() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5)).eval(), torch.rand(2, 8)
    expected, parameters = model(x), list(model.parameters())

    def call() -> None:
        assert torch.equal(model(x), expected)
        assert not model.training and not model[0].training
        assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    with in_another_thread(call):
        for _ in range(5):
            capture_both_modes(model, x)


@pytest.mark.parametrize(
    "draw",
    [lambda: float(torch.rand(1, dtype=torch.float64)), random.random, np.random.rand],
    ids=["torch", "python", "numpy"],
)
def test_random_numbers_of_another_thread_come_once(draw: Callable[[], float]) -> None:
    drawn: list[float] = []
    with in_another_thread(lambda: drawn.append(draw())):
        for _ in range(5):
            capture_both_modes(small_model(), torch.zeros(2, 8))
    assert len(set(drawn)) == len(drawn)


def test_threads_may_convert_at_the_same_time() -> None:
    def convert() -> None:
        snnfx.convert(small_model(), example_inputs=torch.zeros(2, 8))

    with in_another_thread(convert), in_another_thread(convert):
        for _ in range(5):
            convert()
    assert type(torch.rand(2)) is Tensor
    assert isinstance.__module__ == "builtins"
    assert Double.apply(torch.ones(2)).tolist() == [2.0, 2.0]
    assert "__getattribute__" not in vars(nn.Module) and "training" not in vars(nn.Module)


class Registered(nn.Module):
    subclasses: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        Registered.subclasses += (cls.__name__,)


class AsksForItsClass(Registered):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert self.__class__ is AsksForItsClass and isinstance(self, Registered)
        assert self.__class__.__name__ == type(self).__name__
        return self.fc(x) if self.fc.__class__ is nn.Linear else x


def test_a_captured_module_has_its_class_and_registers_no_other() -> None:
    before, x_seq = Registered.subclasses, torch.rand(4, 2, 3)
    model = AsksForItsClass()
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.testing.assert_close(net(x_seq), model.fc(x_seq))
    assert Registered.subclasses == before


class CallsThroughAFunction(nn.Module):
    """Its functions and methods in attributes refer to the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(3, 3), snnfx.neuron.LIFNode(tau=2.0)
        self.closure = lambda x: self.lif(self.fc(x))
        self.bound = self.scaled
        self.scale = 0.5

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.bound(self.closure(x))


def test_functions_in_attributes_run_on_the_copy() -> None:
    model, x_seq = CallsThroughAFunction(), torch.rand(5, 2, 3) * 4
    net = snnfx.convert(model, example_inputs=x_seq[0])
    assert model.lif.v == 0.0
    torch.testing.assert_close(net(x_seq), torch.stack([model(x) for x in x_seq]))
    model.scale = 0.25
    model.lif.reset()
    torch.testing.assert_close(net(x_seq), torch.stack([model(x) for x in x_seq]))


class Draws(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        self.draw(torch.ones(3))
        return x + 1


@pytest.mark.parametrize(
    "draw",
    [
        lambda t: t.normal_(),
        torch.bernoulli,
        nn.functional.dropout,
        lambda t: torch.manual_seed(0),
        lambda t: nn.init.uniform_(t),
        lambda t: torch.normal(0.0, 1.0, (3,)),
    ],
    ids=["in place", "function", "dropout", "seed", "init", "normal"],
)
def test_a_draw_of_torch_without_a_node_is_refused_and_does_not_happen(draw: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match="SNNFX215"):
        snnfx.convert(Draws(draw), example_inputs=torch.rand(2, 3, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)
