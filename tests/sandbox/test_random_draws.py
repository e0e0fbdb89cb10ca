"""The random draws of a thread are undone without rewinding the numbers of other threads."""

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import snnfx
from snnfx.sandbox.random_draws import draws_undone, refusing_draws


def _states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(3),
    "in place": lambda: torch.zeros(3).bernoulli_(0.5),
    "dropout": lambda: nn.functional.dropout(torch.ones(8), 0.5),
    "permutation": lambda: torch.randperm(5),
    "python": lambda: random.gauss(0.0, 1.0),
    "numpy": lambda: np.random.rand(2),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_draw_inside_the_context_is_undone(draw: Callable[[], Any]) -> None:
    before = _states()
    with draws_undone():
        draw()
        draw()
    assert _states() == before


def test_a_draw_is_undone_when_the_context_raises() -> None:
    before = _states()
    with pytest.raises(ValueError, match="here"), draws_undone():
        torch.rand(3)
        raise ValueError("here")
    assert _states() == before


def test_draws_of_another_thread_are_not_rewound() -> None:
    before = _states()
    with draws_undone():
        other = threading.Thread(target=lambda: [draw() for draw in DRAWS.values()])
        other.start()
        other.join()
    after = _states()
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_refused_draws_leave_the_generators_unchanged() -> None:
    before = _states()
    for name in ("torch", "in place", "dropout", "permutation", "python"):
        with pytest.raises(RuntimeError, match="draws a random number"), refusing_draws():
            DRAWS[name]()
    assert _states() == before


def test_conversion_and_calls_rewind_no_numbers_of_another_thread() -> None:
    model = nn.Sequential(nn.Linear(8, 8), snnfx.neuron.LIFNode(), nn.Linear(8, 4), snnfx.neuron.IFNode())
    drawn: list[bytes] = []
    done = threading.Event()

    def draw() -> None:
        while not done.is_set():
            drawn.append(torch.rand(4).numpy().tobytes() + np.random.rand(2).tobytes())

    other = threading.Thread(target=draw, daemon=True)
    other.start()
    try:
        net = snnfx.convert(model, example_inputs=(torch.zeros(2, 8),), memory_budget=2**24)
        x_seq = torch.ones(3, 2, 8)
        _, state = net.run(x_seq)
        net.run(x_seq, state=state)
        net(x_seq).sum().backward()
        str(snnfx.explain(net))
    finally:
        done.set()
        other.join()
    assert len(drawn) == len(set(drawn))
