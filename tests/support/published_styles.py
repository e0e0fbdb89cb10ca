"""Models with a time axis in further styles of published code, in own words: attention, norms over time, containers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from support.looped_models import spike


class LoopNeuron(nn.Module):
    """A neuron class with its own loop over dimension `dim`; the first iteration starts from the number 0."""

    def __init__(self, dim: int = 0, tau: float = 0.5) -> None:
        super().__init__()
        self.dim, self.tau = dim, tau

    def forward(self, x: Tensor) -> Tensor:
        mem: Any = 0
        spikes = []
        for t in range(x.shape[self.dim]):
            mem = mem * self.tau + (x[t] if self.dim == 0 else x[:, t, ...])
            out = spike(mem - 1.0)
            mem = (1 - out) * mem
            spikes.append(out)
        return torch.stack(spikes, dim=self.dim)


class Folded(nn.Module):
    """Runs a layer with the first two dimensions merged."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x.flatten(0, 1))
        return y.reshape(x.shape[0], x.shape[1], *y.shape[1:])


class TokenAttention(nn.Module):
    """Query-key attention of QKFormer: the query's spikes, summed over channels, gate the keys."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.q, self.q_bn, self.q_sn = nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim), LoopNeuron()
        self.k, self.k_bn, self.k_sn = nn.Conv1d(dim, dim, 1, bias=False), nn.BatchNorm1d(dim), LoopNeuron()
        self.gate, self.proj = LoopNeuron(), nn.Conv1d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        T, B, C, N = x.shape
        flat = 3 * x.flatten(0, 1)
        q = self.q_sn(self.q_bn(self.q(flat)).reshape(T, B, C, N))
        k = self.k_sn(self.k_bn(self.k(flat)).reshape(T, B, C, N))
        q = q.view(T, B, 2, C // 2, N)
        k = k.view(T, B, 2, C // 2, N)
        gate = self.gate(q.sum(dim=3, keepdim=True))
        y = gate.mul(k).flatten(2, 3)
        return self.proj(y.flatten(0, 1)).reshape(T, B, C, N)


class MultiScale(nn.Module):
    """A stage of SpikingResformer: attention of pooled tokens, then a grouped convolution, on reshape(T, B, ...)."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(dim, dim, 2, stride=2, bias=False), nn.BatchNorm2d(dim)
        self.sn_in, self.sn_attn, self.sn_up = LoopNeuron(), LoopNeuron(), LoopNeuron()
        self.group = nn.Conv2d(dim, dim, 3, padding=1, groups=2)
        self.down = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        T, B, C, H, W = x.shape
        s = self.sn_in(3 * x)
        y = self.bn(self.conv(s.flatten(0, 1))).reshape(T, B, C, -1)
        scores = self.sn_attn((y.transpose(-1, -2) @ s.flatten(3)) * (1.0 / C**0.5))
        out = self.sn_up((y @ scores).reshape(T, B, C, H, W)) + x
        out = self.group(out.reshape(T * B, C, H, W)) + out.reshape(T * B, C, H, W)
        return self.down(out).reshape(T, B, 2 * C, H // 2, W // 2)


class ThresholdNorm(nn.Module):
    """A norm over time and samples jointly, as a layer with time folded into the batch (tdBN)."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.bn, self.sn = nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm3d(channels), LoopNeuron()

    def forward(self, x: Tensor) -> Tensor:
        T, B = x.shape[:2]
        y = self.conv(x.flatten(0, 1))
        y = y.reshape(T, B, *y.shape[1:])
        return self.sn(self.bn(3 * y.transpose(1, 2).transpose(0, 2)).transpose(0, 2).transpose(1, 2))


class HandNorm(nn.Module):
    """A norm over time and samples jointly, written by hand."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv, self.sn = Folded(nn.Conv2d(2, channels, 3, padding=1)), LoopNeuron()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 1), nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        mean, var = y.mean((0, 1, 3, 4), keepdim=True), y.var((0, 1, 3, 4), keepdim=True, unbiased=False)
        y = (y - mean) / torch.sqrt(var + 1e-5)
        return self.sn(y * self.weight[:, None, None] + self.bias[:, None, None])


class ChunkAttention(nn.Module):
    """Attention over space and blocks of two time steps (STAtten)."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = (Folded(nn.Linear(dim, dim)) for _ in range(3))
        self.sn, self.attn_sn = LoopNeuron(), LoopNeuron()

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        s = self.sn(3 * x)
        q, k, v = (f(s).reshape(T // 2, 2, B, N, C).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k, v = (z.reshape(T // 2, B, 2 * N, C) for z in (q, k, v))
        y = (q @ k.transpose(-1, -2)) @ v
        y = y.reshape(T // 2, B, 2, N, C).transpose(1, 2).reshape(T, B, N, C)
        return self.attn_sn(y)


class TemporalConv(nn.Module):
    """A convolution over time between neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.sn = nn.Linear(6, 4), LoopNeuron()
        self.conv, self.out = nn.Conv1d(4, 3, 3, padding=1), LoopNeuron()

    def forward(self, x: Tensor) -> Tensor:
        s = self.sn(self.fc(3 * x))
        return self.out(self.conv(s.permute(1, 2, 0)).permute(2, 0, 1))


class Containers(nn.Module):
    """Layers with the first two dimensions merged, and neurons that loop over `dim`: TET, SNN-RAT (1), MS-ResNet (0).

    Residual additions of membrane inputs stand in front of the neurons.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.stem = Folded(nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
        self.sn1, self.sn2 = LoopNeuron(dim), LoopNeuron(dim)
        self.conv = Folded(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
        self.pool, self.fc = Folded(nn.AvgPool2d(2)), Folded(nn.Sequential(nn.Flatten(), nn.Linear(4 * 4, 3)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(2 * x)
        y = y + self.conv(self.sn1(y))
        return self.fc(self.pool(self.sn2(y)))


class Detector(nn.Module):
    """Features of several scales in a list, as a detection head takes them (EMS-YOLO)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.sn1 = Folded(nn.Conv2d(2, 4, 3, padding=1)), LoopNeuron()
        self.down, self.sn2 = Folded(nn.Conv2d(4, 4, 3, stride=2, padding=1)), LoopNeuron()
        self.heads = nn.ModuleList(Folded(nn.Conv2d(4, 3, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.sn1(self.stem(3 * x))
        b = self.sn2(self.down(a))
        return [self.heads[0](a), self.heads[1](b)]


class ReducedHead(nn.Module):
    """Folded layers, a neuron, then a reduction over time: in front of the last linear layer, or behind it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc, self.sn, self.head = how, Folded(nn.Linear(6, 8)), LoopNeuron(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = self.sn(self.fc(3 * x))
        if self.how == "front":
            return self.head(s.mean(0))
        y = self.head(s)
        return {"mean": lambda: y.mean(0), "sum": lambda: y.sum(dim=0), "last": lambda: y[-1]}[self.how]()
