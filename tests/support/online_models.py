"""Models and small oracles for the tests of online training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.online import Rule, Trainer
from support.online_equations import (
    Dense,
)
from support.online_oracles import (
    GivenDropout,
    PlainLIF,
    PlainReadout,
    RecurrentLIF,
    mse,
)


def leaky_net() -> nn.Sequential:
    model = nn.Sequential(RecurrentLIF(4, 5, 0.8), nn.Linear(5, 2, bias=False), PlainReadout(0.9))
    nn.init.normal_(model[0].inp.weight, 0.4, 0.5)
    return model


def peak_saved_bytes(model: nn.Module, rule: Rule, T: int, **options: Any) -> int:
    trainer = Trainer(model, rule, sgd(list(model.parameters())), mse, **options)
    x_seq = torch.rand(T, N, 4)
    target = torch.rand(T, *model(x_seq[0]).shape)
    snnfx.functional.reset_net(model)
    for m in model.modules():
        for name in ("v", "z"):
            if name in vars(m):
                setattr(m, name, None if name == "z" else 0.0)
    trainer.step(x_seq[:20], target[:20])
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda packed: packed.value):
        trainer.step(x_seq, target)
    return saved.peak


T, N = 7, 3


def dense_net(leaks: tuple[float, ...] = (0.5, 0.7), detach_reset: bool = True) -> nn.Sequential:
    sizes = [5, 6, 4, 3][: len(leaks) + 1]
    layers: list[nn.Module] = []
    for given, size, leak in zip(sizes[:-1], sizes[1:], leaks, strict=True):
        layers += [nn.Linear(given, size), PlainLIF(leak, detach_reset=detach_reset)]
        nn.init.normal_(layers[-2].weight, 0.3, 0.5)
    return nn.Sequential(*layers)


def equations_of(model: nn.Sequential) -> Dense:
    linear, neurons = list(model)[::2], list(model)[1::2]
    return Dense([m.weight.detach() for m in linear], [m.bias.detach() for m in linear], [m.leak for m in neurons])


def sequences(out: int, *shape: int) -> tuple[Tensor, Tensor]:
    return (torch.rand(T, N, *shape) < 0.5).double(), torch.rand(T, N, out)


class Graph(nn.Module):
    """Between its neurons and its last weight: a residual sum, a concatenation, both pools and a held dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(8, 3, 3)
        self.fc = nn.Linear(3, 4)
        self.lif1, self.lif2, self.lif3, self.lif4 = (PlainLIF(0.6) for _ in range(4))
        self.drop = GivenDropout((torch.rand(N, 8, 4, 4) < 0.7) / 0.7)
        for conv in (self.conv1, self.conv2, self.conv3):
            entries = conv.weight[0].numel()
            nn.init.normal_(conv.weight, 1.5 / entries, entries**-0.5)
        nn.init.normal_(self.fc.weight, 0.5, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        a = self.lif1(self.conv1(x))
        b = a + self.lif2(self.conv2(a))
        joined = torch.cat([F.max_pool2d(a, 2), F.avg_pool2d(b, 2)], dim=1)
        c = self.lif3(self.conv3(self.drop(joined)))
        return self.lif4(self.fc(F.max_pool2d(c, 2).flatten(1)))


LEAKS = {"conv2": 0.6, "conv3": 0.6, "fc": 0.6}


def differ(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-4


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def sgd(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(weights, lr=0.1)


class SavedBytes:
    """Count the bytes that autograd has saved for backward: currently, and at the peak."""

    def __init__(self) -> None:
        self.current = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        counter, size = self, tensor.numel() * tensor.element_size()
        counter.current += size
        counter.peak = max(counter.peak, counter.current)

        class Packed:
            value = tensor.detach()

            def __del__(self) -> None:
                counter.current -= size

        return Packed()
