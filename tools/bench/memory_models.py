"""Single-step models for `bench_memory.py`, with the input shape of one step; two have a SpikingJelly version."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import bench_csnn
import torch
from torch import Tensor, nn

import snnfx


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(tau=2.0, surrogate_function=snnfx.surrogate.ATan(), detach_reset=True)


def block(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), lif())


class UNet(nn.Module):
    """Two down- and upsampling levels with concatenated skip connections."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.first, self.second = block(2, channels), block(channels, 2 * channels)
        self.bottom = block(2 * channels, 2 * channels)
        self.up2 = block(4 * channels, channels)
        self.up1 = block(2 * channels, channels)
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(self.pool(a))
        c = self.up(self.bottom(self.pool(b)))
        d = self.up(self.up2(torch.cat((b, c), 1)))
        return self.head(self.up1(torch.cat((a, d), 1)))


class Attention(nn.Module):
    """Spiking self-attention without a softmax (Zhou et al. 2023)."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, 0.125
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_lif, self.k_lif, self.v_lif, self.attn_lif, self.out_lif = (lif() for _ in range(5))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            self.split(self.q_lif(self.q(x))),
            self.split(self.k_lif(self.k(x))),
            self.split(self.v_lif(self.v(x))),
        )
        y = (q @ k.transpose(-2, -1)) @ v * self.scale
        return self.out_lif(self.out(self.attn_lif(y.transpose(1, 2).flatten(2))))


class Spikformer(nn.Module):
    """Patch embedding, encoder blocks, and the mean over the tokens."""

    def __init__(self, width: int = 128, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Sequential(block(3, width // 2), nn.MaxPool2d(2), block(width // 2, width), nn.MaxPool2d(2))
        self.attention = nn.ModuleList(Attention(width) for _ in range(blocks))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), lif(), nn.Linear(4 * width, width), lif()) for _ in range(blocks)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return self.head(x.mean(1))


def sew_resnet18(multi_step: bool = False) -> nn.Module:
    """SpikingJelly's SEW-ResNet-18."""
    _let_torchvision_import()
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet

    torch.manual_seed(0)
    model = sew_resnet.sew_resnet18(
        cnf="ADD",
        spiking_neuron=neuron.LIFNode,
        tau=2.0,
        surrogate_function=surrogate.ATan(),
        detach_reset=True,
        num_classes=10,
    )
    functional.set_step_mode(model, "m" if multi_step else "s")
    return model


@functools.cache
def _let_torchvision_import() -> None:
    """Declare the operators that a CUDA build of torchvision needs to import with a CPU build of torch."""
    found = importlib.util.find_spec("torchvision") is not None and not torch.version.cuda
    if found and "+cpu" not in importlib.metadata.version("torchvision"):
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "CSNN": (bench_csnn.single_step_model, (1, 28, 28)),
    "SEW-ResNet-18": (sew_resnet18, (3, 64, 64)),
    "U-Net": (UNet, (2, 32, 32)),
    "Spikformer": (Spikformer, (3, 32, 32)),
}


def peer_of(name: str) -> Any:
    """SpikingJelly's multi-step form of a model."""
    if name == "CSNN":
        torch.manual_seed(0)
        return bench_csnn.spikingjelly_model(bench_csnn.single_step_model())
    return sew_resnet18(multi_step=True)
