"""Snapshots restore everything that a run of a model can change."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.sandbox.snapshot import StateSnapshot
from support.stepping import assert_same


class Leaky(snnfx.MemoryModule):
    def __init__(self, initial: Any = 0.0) -> None:
        super().__init__()
        self.register_memory("v", initial)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        return self.v


class Busy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.lif, self.cell = nn.BatchNorm1d(2), neuron.LIFNode(), Leaky()
        self.count, self.notes, self.nested, self.plain = 0, [1], {"a": [torch.zeros(2)]}, torch.zeros(2)
        self.register_buffer("mem", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.notes.append(x)
        self.nested["a"][0] = x
        self.nested["b"] = x
        self.new = x
        self.plain.add_(1)
        self.mem = self.mem + 1
        return self.cell(self.lif(self.bn(x))) + torch.rand_like(x)


def test_a_snapshot_restores_everything_that_a_run_can_change() -> None:
    model = Busy()
    objects = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    rng, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    with StateSnapshot.of(model):
        model(torch.rand(3, 2))
        model.eval()
        model.bn.running_mean.fill_(3)
    assert {key: value for key, value in vars(model).items() if not key.startswith("_")}.keys() == objects.keys()
    assert all(vars(model)[key] is value for key, value in objects.items())
    assert model.count == 0 and model.notes == [1] and list(model.nested) == ["a"]
    assert_same([model.nested["a"][0], model.plain], [torch.zeros(2), torch.zeros(2)])
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1])
    assert (model.lif.v, model.cell.v) == (0.0, 0.0)
    assert torch.equal(torch.get_rng_state(), rng) and [m.training for m in model.modules()] == modes


def test_a_snapshot_restores_after_an_exception_and_in_reverse_when_nested() -> None:
    model = Busy()
    with pytest.raises(ValueError, match="on purpose"), StateSnapshot.of(model):
        model.count = 5
        with StateSnapshot.of(model):
            model.count = random.randint(10, 20)
        assert model.count == 5
        raise ValueError("on purpose")
    assert model.count == 0
