"""The acceptance nets: single-step models of the kinds people have, each with an example of ONE step's input."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import neuron, surrogate


def conv_block(channels_in: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), neuron.LIFNode(tau=2.0)
    )


class CSNN(nn.Module):
    """Two conv-BN-LIF-pool blocks and two fully connected spiking layers (Fang et al. 2021)."""

    def __init__(self, channels: int = 4, size: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_block(1, channels), nn.MaxPool2d(2), conv_block(channels, channels), nn.MaxPool2d(2)
        )
        self.fc1 = nn.Linear(channels * (size // 4) ** 2, 12)
        self.lif1 = neuron.LIFNode(tau=2.0, detach_reset=True)
        self.drop = nn.Dropout(0.3)
        self.fc2 = nn.Linear(12, 5)
        self.lif2 = neuron.IFNode(surrogate_function=surrogate.ATan())

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        return self.lif2(self.fc2(self.drop(self.lif1(self.fc1(x)))))


class SEWBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_block(channels, channels), conv_block(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class Residual(nn.Module):
    """Spike-element-wise residual blocks (Fang et al. 2021) and a leaky read-out."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = conv_block(2, channels)
        self.blocks = nn.Sequential(SEWBlock(channels), SEWBlock(channels))
        self.head = nn.Linear(channels, 3)
        self.readout = neuron.LeakyIntegrator(tau=3.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.readout(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class UNet(nn.Module):
    """One level down and up, with the skip connection concatenated."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.down = conv_block(1, channels)
        self.pool = nn.AvgPool2d(2)
        self.bottom = conv_block(channels, 2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.merge = conv_block(2 * channels, channels)
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        x = self.up(self.bottom(self.pool(skip)))
        return self.out(self.merge(torch.cat([skip, x], dim=1)))


class RecurrentLayer(snnfx.MemoryModule):
    """h = LIF(W x + U h): the projection W x is not on the cycle."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(features, hidden)
        self.recurrent = nn.Linear(hidden, hidden)
        self.lif = neuron.LIFNode(tau=2.0)
        self.register_memory("spike", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.spike is None:
            self.spike = torch.zeros_like(x)
        self.spike = self.lif(x + self.recurrent(self.spike))
        return self.spike


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = RecurrentLayer(6, 8)
        self.readout = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.layer(x))


class NeuronTwice(nn.Module):
    """One neuron, called twice in a step: its state goes through both calls."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 6)
        self.lif = neuron.LIFNode(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc2(self.lif(self.fc1(x))))


class UnusedNeuron(nn.Module):
    """A neuron whose output nobody uses (it is watched from outside), and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(2, 2)
        self.fc = nn.Linear(5, 4)
        self.watched = neuron.IFNode()
        self.lif = neuron.ParametricLIFNode(init_tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        self.watched(x)
        return self.lif(x)


class BatchCoupled(nn.Module):
    """Subtracts the mean over the batch: may not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 6), nn.Linear(6, 3)
        self.lif = neuron.LIFNode(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x - x.mean(0)
        return self.fc2(self.lif(x))


class TokensFirstAttention(nn.Module):
    """Attention over tokens in dim 0, the batch in dim 1, as torch has it by default."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.lif = neuron.LIFNode(tau=2.0)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(x).transpose(0, 1)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.fc(x.mean(0))


class TwoInputs(nn.Module):
    """Two inputs, a parameter used directly, functional calls, a dict of outputs with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)
        self.gain = nn.Parameter(torch.rand(6))
        self.lif = neuron.AdaptiveLIFNode()
        self.out = nn.Linear(12, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Any]:
        left, right = F.relu(self.left(a)) * self.gain.sigmoid(), self.right(b)
        spikes = self.lif(left + right)
        both = torch.cat((spikes, left), -1)
        return {"spikes": spikes, "parts": (self.out(both), left.view(left.shape[0], 2, -1))}


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def sew_resnet18() -> nn.Module:
    from spikingjelly.activation_based import neuron as sj_neuron
    from spikingjelly.activation_based import surrogate as sj_surrogate
    from spikingjelly.activation_based.model import sew_resnet

    return sew_resnet.sew_resnet18(
        cnf="ADD",
        num_classes=4,
        spiking_neuron=sj_neuron.IFNode,
        surrogate_function=sj_surrogate.ATan(),
        detach_reset=True,
    )


def spiking_vgg11_bn() -> nn.Module:
    from spikingjelly.activation_based import neuron as sj_neuron
    from spikingjelly.activation_based import surrogate as sj_surrogate
    from spikingjelly.activation_based.model import spiking_vgg

    model = spiking_vgg.spiking_vgg11_bn(
        num_classes=4, spiking_neuron=sj_neuron.LIFNode, tau=2.0, surrogate_function=sj_surrogate.ATan()
    )
    # The classifier of ImageNet size has 400 MB; a smaller one of the same kind does here.
    model.avgpool.output_size = (1, 1)
    model.classifier = nn.Sequential(
        type(model.classifier[0])(512, 16), *list(model.classifier)[1:3], type(model.classifier[0])(16, 4)
    )
    return model


@dataclass(frozen=True)
class AcceptanceNet:
    """A model factory, the shapes of one step's inputs, and what the plan has to look like.

    Args:
        make: makes the model.
        shapes: shapes of the inputs of one step.
        kinds: the kinds of its regions in training and evaluation mode, in order; None: not pinned.
        package: a package that has to be installed.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...] | None = None
    package: str = "torch"

    def example(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(torch.rand(shape, dtype=dtype) for shape in self.shapes)

    def sequences(self, T: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return tuple(torch.rand((T, *shape), dtype=dtype) * 2 for shape in self.shapes)


ACCEPTANCE: dict[str, AcceptanceNet] = {
    "csnn": AcceptanceNet(CSNN, ((2, 1, 8, 8),), ("fold", "loop") * 4),
    "residual": AcceptanceNet(Residual, ((2, 2, 4, 4),), ("fold", "loop") * 6),
    "unet": AcceptanceNet(UNet, ((2, 1, 8, 8),), ("fold", "loop") * 3 + ("fold",)),
    "recurrent": AcceptanceNet(Recurrent, ((3, 6),), ("fold", "loop", "fold")),
    "neuron_twice": AcceptanceNet(NeuronTwice, ((3, 5),), ("fold", "loop")),
    "unused_neuron": AcceptanceNet(UnusedNeuron, ((3, 5),), ("fold", "loop", "loop")),
    "batch_coupled": AcceptanceNet(BatchCoupled, ((3, 5),), ("fold", "map", "loop", "fold")),
    "tokens_first": AcceptanceNet(TokensFirstAttention, ((2, 5, 8),), ("loop", "fold")),
    "two_inputs": AcceptanceNet(TwoInputs, ((3, 4), (3, 3)), None),
    "sew_resnet18": AcceptanceNet(sew_resnet18, ((2, 3, 32, 32),), None, "spikingjelly"),
    "spiking_vgg11_bn": AcceptanceNet(spiking_vgg11_bn, ((2, 3, 32, 32),), None, "spikingjelly"),
}
