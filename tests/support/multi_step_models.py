"""Models with an explicit time axis, in the style of published code: mode "m", flatten(0, 1), attention."""

from __future__ import annotations

from typing import Any

import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Layers and neurons of SpikingJelly in mode "m", set by one call."""

    def __init__(self, make: Any = neuron.LIFNode) -> None:
        super().__init__()
        self.body = nn.Sequential(
            layer.Conv2d(2, 4, 3, padding=1, bias=False),
            layer.BatchNorm2d(4),
            make(),
            layer.MaxPool2d(2),
            layer.Conv2d(4, 4, 3, padding=1, bias=False),
            layer.BatchNorm2d(4),
            make(),
            layer.Flatten(),
            layer.Linear(4 * 16, 3),
            make(),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(2 * x)


class SewBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = layer.Conv2d(channels, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels)
        self.sn1 = neuron.IFNode(detach_reset=True)
        self.conv2, self.bn2 = layer.Conv2d(channels, channels, 3, padding=1, bias=False), layer.BatchNorm2d(channels)
        self.sn2 = neuron.IFNode(detach_reset=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.sn1(self.bn1(self.conv1(x)))
        return x + self.sn2(self.bn2(self.conv2(out)))


class SewNet(nn.Module):
    """A static image, repeated in front of the first neuron; the mean over time at the end."""

    def __init__(self, steps: int = 4) -> None:
        super().__init__()
        self.steps = steps
        self.stem, self.bn = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.sn = neuron.IFNode(detach_reset=True)
        self.blocks = nn.Sequential(SewBlock(4), SewBlock(4))
        self.pool, self.fc = layer.AdaptiveAvgPool2d(1), nn.Linear(4, 3)
        functional.set_step_mode(self, "m")

    def forward(self, image: Tensor) -> Tensor:
        x = self.bn(self.stem(2 * image))
        x = x.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)
        x = self.blocks(self.sn(x))
        return self.fc(torch.flatten(self.pool(x), 2)).mean(0)


class Attention(nn.Module):
    """Self-attention of spikes: products over tokens, neurons over time."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.scale = heads, 0.25
        self.q, self.q_bn, self.q_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()
        self.k, self.k_bn, self.k_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()
        self.v, self.v_bn, self.v_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()
        self.attn_lif = lif(v_threshold=0.5)
        self.proj, self.proj_bn, self.proj_lif = nn.Linear(dim, dim), nn.BatchNorm1d(dim), lif()

    def branch(self, x: Tensor, fc: nn.Module, bn: nn.Module, neurons: nn.Module) -> Tensor:
        T, B, N, C = x.shape
        y = fc(x.flatten(0, 1))
        y = bn(y.transpose(-1, -2)).transpose(-1, -2).reshape(T, B, N, C).contiguous()
        return neurons(y)

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape

        def split(y: Tensor) -> Tensor:
            return y.reshape(T, B, N, self.heads, C // self.heads).permute(0, 1, 3, 2, 4).contiguous()

        q = split(self.branch(x, self.q, self.q_bn, self.q_lif))
        k = split(self.branch(x, self.k, self.k_bn, self.k_lif))
        v = split(self.branch(x, self.v, self.v_bn, self.v_lif))
        y = (q @ k.transpose(-2, -1)) @ v * self.scale
        y = self.attn_lif(y.transpose(2, 3).reshape(T, B, N, C).contiguous())
        return self.branch(y, self.proj, self.proj_bn, self.proj_lif)


def lif(**options: Any) -> nn.Module:
    return neuron.LIFNode(tau=2.0, detach_reset=True, step_mode="m", **options)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.bn1, self.lif1 = nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), lif()
        self.fc2, self.bn2, self.lif2 = nn.Linear(hidden, dim), nn.BatchNorm1d(dim), lif()
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        T, B, N, C = x.shape
        y = self.bn1(self.fc1(x.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        y = self.lif1(y.reshape(T, B, N, self.hidden).contiguous())
        y = self.bn2(self.fc2(y.flatten(0, 1)).transpose(-1, -2)).transpose(-1, -2)
        return self.lif2(y.reshape(T, B, N, C).contiguous())


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(dim), Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


class Patches(nn.Module):
    """Patch embedding: convolutions on `[T * B, C, H, W]`, neurons on `[T, B, C, H, W]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv, self.bn, self.lif = nn.Conv2d(2, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim), lif()
        self.pool = nn.MaxPool2d(2)
        self.rpe, self.rpe_bn, self.rpe_lif = nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim), lif()

    def forward(self, x: Tensor) -> Tensor:
        T, B, _, H, W = x.shape
        x = self.bn(self.conv(x.flatten(0, 1))).reshape(T, B, -1, H, W).contiguous()
        x = self.pool(self.lif(x).flatten(0, 1))
        y = self.rpe_bn(self.rpe(x)).reshape(T, B, -1, H // 2, W // 2).contiguous()
        y = self.rpe_lif(y).flatten(0, 1) + x
        return y.reshape(T, B, -1, (H // 2) * (W // 2)).transpose(-1, -2)


class Spikformer(nn.Module):
    """Patch embedding, blocks of attention and MLP, a linear head.

    Args:
        reduces: whether the call returns the mean over time.
    """

    def __init__(self, dim: int = 8, depth: int = 2, reduces: bool = True) -> None:
        super().__init__()
        self.reduces = reduces
        self.patches, self.blocks = Patches(dim), nn.ModuleList(Block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(2 * x)
        for block in self.blocks:
            x = block(x)
        y = self.head(x.mean(2))
        return y.mean(0) if self.reduces else y


class TemporalAttention(nn.Module):
    """Attention over time between two layers of neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.lif1 = layer.Linear(6, 8, step_mode="m"), lif()
        self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 4)
        self.fc2, self.lif2 = layer.Linear(8, 3, step_mode="m"), lif()

    def forward(self, x: Tensor) -> Tensor:
        s = self.lif1(self.fc1(4 * x))
        z = s.transpose(0, 1)
        weights = (self.q(z) @ self.k(z).transpose(-1, -2)).softmax(-1)
        return self.lif2(self.fc2((weights @ z).transpose(0, 1) + s))


class SequenceToAnn(nn.Module):
    """A container that folds time into the batch by hand, around stateless layers."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.module = parts[0] if len(parts) == 1 else nn.Sequential(*parts)

    def forward(self, x_seq: Tensor) -> Tensor:
        shape = [x_seq.shape[0], x_seq.shape[1]]
        y = self.module(x_seq.flatten(0, 1).contiguous())
        shape.extend(y.shape[1:])
        return y.view(shape)


class ContainerNet(nn.Module):
    """Containers around layers, and neurons that loop over time: dimension 1 of the input."""

    def __init__(self, neurons: nn.Module, own: bool = True) -> None:
        super().__init__()
        container = SequenceToAnn if own else layer.SeqToANNContainer
        self.front = container(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.act, self.pool = neurons, container(nn.AvgPool2d(2))
        self.head = container(nn.Flatten(), nn.Linear(4 * 16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.act(self.front(2 * x))))
