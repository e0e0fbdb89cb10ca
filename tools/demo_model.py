"""The model and the data of the demonstration: a spiking ResNet for handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import snnfx
from snnfx import neuron, surrogate

__all__ = ["DigitNet", "Digits", "load_data", "loss_of", "spike_trains", "step_through_time", "test_spikes"]


def lif() -> nn.Module:
    return neuron.LIFNode(tau=2.0, detach_reset=True, surrogate_function=surrogate.ATan())


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut; the sum is the input of the second neuron."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.lif1 = lif()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.lif2 = lif()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.lif2(y + x)


class DigitNet(nn.Module):
    """ONE time step: spikes `[N, 1, 8, 8]` in, membrane potentials of ten readout neurons `[N, 10]` out."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        self.stem_lif = lif()
        self.block = ResidualBlock(channels)
        self.down = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.down_bn = nn.BatchNorm2d(2 * channels)
        self.down_lif = lif()
        self.head = nn.Linear(2 * channels * 2 * 2, 10)
        self.readout = neuron.LeakyIntegrator(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_lif(self.stem_bn(self.stem(x)))
        x = F.max_pool2d(self.block(x), 2)
        x = F.max_pool2d(self.down_lif(self.down_bn(self.down(x))), 2)
        return self.readout(self.head(x.flatten(1)))


def step_through_time(model: nn.Module, x_seq: Tensor) -> Tensor:
    """The usual way to run a single-step model: reset it, then call it once per time step."""
    snnfx.functional.reset_net(model)
    return torch.stack([model(x) for x in x_seq])


def loss_of(potentials: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the readout potentials `[T, N, 10]`, averaged over time."""
    return F.cross_entropy(potentials.mean(0), labels, label_smoothing=0.05)


@dataclass(frozen=True)
class Digits:
    """Images `[n, 1, 8, 8]` in [0, 1] and their labels `[n]`, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_data(device: torch.device) -> Digits:
    """scikit-learn's handwritten digits, 8 x 8 pixels."""
    bunch = load_digits()
    split = train_test_split(bunch.images / 16.0, bunch.target, test_size=360, stratify=bunch.target, random_state=0)
    train_x, test_x, train_y, test_y = (torch.as_tensor(array, device=device) for array in split)
    return Digits(train_x.float().unsqueeze(1), train_y.long(), test_x.float().unsqueeze(1), test_y.long())


def spike_trains(images: Tensor, T: int, generator: torch.Generator | None = None) -> Tensor:
    """Rate coding: at each step, a pixel spikes with its brightness as probability. `[N, ...]` -> `[T, N, ...]`."""
    return torch.bernoulli(images.expand(T, *images.shape), generator=generator)


def test_spikes(digits: Digits, T: int) -> Tensor:
    """Spike trains of the test images, the same for every evaluation, so that accuracies are comparable."""
    generator = torch.Generator(digits.test_images.device).manual_seed(1234)
    return spike_trains(digits.test_images, T, generator)
