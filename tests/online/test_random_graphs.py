"""Every rule on random graphs: sums, products, concatenations, dropout and dead ends between neurons and weights."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.online import BPTT, OSTL, OTTT_A, OTTT_O, SLTT, SLTT_K
from support.online_models import sgd
from support.online_oracles import GivenDropout, PlainLIF, PlainReadout, bptt, mse, ostl, ottt, sltt
from support.online_training import Trained, same

T, N, WIDTH = 6, 3, 5


class RandomGraph(nn.Module):
    """A list of operations, each on values that earlier ones gave; all values are `[N, WIDTH]`.

    Weights whose operand comes from the network's input alone are not in `leaks`; the other ones are, with the leak of
    the neuron that they feed.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        self.layers = nn.ModuleDict()
        self.leaks: dict[str, float] = {}
        self.plan: list[tuple[str, list[int], str]] = []
        spiking = [False]
        for i in range(choose.randint(4, 8)):
            inner = [k for k, s in enumerate(spiking) if s]
            kinds = ["neuron"] if not inner else ["neuron", "neuron", "two weights", "sum", "product", "pair", "drop"]
            kind = choose.choice(kinds)
            pool = inner if kind not in ("neuron",) and inner else list(range(len(spiking)))
            given = [choose.choice(pool) for _ in range(2)]
            self.add_layers(f"l{i}", kind, choose, spiking[given[0]])
            self.plan.append((kind, given, f"l{i}"))
            spiking.append(True)
        self.add_layers("out", "neuron", choose, True)
        self.plan.append(("neuron", [len(spiking) - 1, 0], "out"))

    def add_layers(self, name: str, kind: str, choose: random.Random, traced: bool) -> None:
        leak = choose.choice([0.4, 0.6, 0.9])
        weights = {"neuron": ["w"], "two weights": ["w", "u"], "pair": ["w"]}.get(kind, [])
        for weight in weights:
            features = 2 * WIDTH if kind == "pair" else WIDTH
            layer = nn.Linear(features, WIDTH, bias=choose.random() < 0.5)
            nn.init.normal_(layer.weight, 0.25, 0.5)
            self.layers[f"{name}_{weight}"] = layer
            if traced:
                self.leaks[f"layers.{name}_{weight}"] = leak
        if weights:
            neuron = choose.choice([
                lambda: PlainLIF(leak),
                lambda: snnfx.neuron.LIFNode(1 / (1 - leak), decay_input=False, v_reset=None, detach_reset=True),
                lambda: snnfx.neuron.LIFNode(1 / (1 - leak), v_threshold=0.4),
                lambda: PlainReadout(leak),
            ])  # fmt: skip
            self.layers[f"{name}_n"] = neuron()
        if kind == "drop":
            self.layers[f"{name}_d"] = GivenDropout((torch.rand(N, WIDTH) < 0.7) / 0.7)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for kind, (i, j), name in self.plan:
            a, b = values[i], values[j]
            if kind == "neuron":
                y = self.layers[f"{name}_n"](self.layers[f"{name}_w"](a))
            elif kind == "two weights":
                y = self.layers[f"{name}_n"](self.layers[f"{name}_w"](a) + self.layers[f"{name}_u"](b * 0.5))
            elif kind == "pair":
                y = self.layers[f"{name}_n"](self.layers[f"{name}_w"](torch.cat([a, b.relu()], dim=1)))
            elif kind == "drop":
                y = self.layers[f"{name}_d"](a)
            else:
                y = a + b if kind == "sum" else a * b
            values.append(y)
        return values[-1]


@pytest.mark.parametrize("seed", range(12))
def test_rules_on_a_random_graph(seed: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    model = RandomGraph(seed)
    x_seq, target = (torch.rand(T, N, WIDTH) < 0.6).double(), torch.rand(T, N, WIDTH)
    leaks, scale = model.leaks, 1 / T
    through_time = bptt(model, x_seq, target, mse, scale).gradients
    for chunk in (4, None):
        same(Trained(model, BPTT, x_seq, target, chunk=chunk).gradients, through_time)
    spatial = sltt(model, x_seq, target, mse, scale).gradients
    for rule in (SLTT, SLTT_K(T)):
        same(Trained(model, rule, x_seq, target).gradients, spatial)
    same(Trained(model, OTTT_A, x_seq, target).gradients, ottt(model, x_seq, target, mse, leaks, scale).gradients)
    updated = ottt(copy.deepcopy(model), x_seq, target, mse, leaks, scale, make_optimizer=sgd)
    same(Trained(model, OTTT_O, x_seq, target).parameters, updated.parameters)


@pytest.mark.parametrize("seed", [1, 2, 6])
def test_layers_of_a_random_graph(seed: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    model = RandomGraph(seed)
    x_seq, target = (torch.rand(3, N, WIDTH) < 0.6).double(), torch.rand(3, N, WIDTH)
    neurons = [f"layers.{name}" for name in model.layers if name.endswith("_n")]
    same(Trained(model, OSTL, x_seq, target, chunk=2).gradients, ostl(model, neurons, x_seq, target, mse, 1 / 3))
