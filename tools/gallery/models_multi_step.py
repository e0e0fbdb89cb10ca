"""Models with an explicit T axis: layers and neurons of SpikingJelly in mode "m"."""

from __future__ import annotations

from typing import Any

import torch
from gallery_entry import Entry, rates
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

__all__ = ["ENTRIES"]


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        layer.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False), layer.BatchNorm2d(out_channels)
    )


def amplify(model: nn.Module, gain: float) -> nn.Module:
    """Scale the weights of linear layers, so that untrained neurons spike."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            m.weight.data *= gain
    return model


class SewBlock(nn.Module):
    """Spikes of the block added to its input."""

    def __init__(self, in_channels: int, mid_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(conv3x3(in_channels, mid_channels), neuron.IFNode(detach_reset=True)),
            *(conv3x3(mid_channels, in_channels), neuron.IFNode(detach_reset=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        out += x
        return out


class SewResNet(nn.Module):
    """A stem on the image, then the image's current at every step."""

    def __init__(self, T: int = 6) -> None:
        super().__init__()
        self.T = T
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.sn1 = neuron.ParametricLIFNode(detach_reset=True, surrogate_function=surrogate.ATan())
        self.layers = nn.Sequential(SewBlock(16, 16), layer.MaxPool2d(2, 2), SewBlock(16, 16))
        self.avgpool, self.fc = layer.AdaptiveAvgPool2d((1, 1)), nn.Linear(16, 10)
        functional.set_step_mode(self, "m")
        self.conv1.step_mode = self.bn1.step_mode = "s"  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(2 * x))
        x = self.sn1(x.unsqueeze(0).repeat(self.T, 1, 1, 1, 1))
        x = torch.flatten(self.avgpool(self.layers(x)), 2)
        return self.fc(x.mean(dim=0))


class VotingNet(nn.Module):
    """Convolutions and pools for event frames, then groups of neurons that vote."""

    def __init__(self, channels: int = 12, gain: float = 20.0) -> None:
        super().__init__()
        conv: list[nn.Module] = []
        for i in range(3):
            conv += [
                *(
                    layer.Conv2d(2 if i == 0 else channels, channels, 3, padding=1, bias=False),
                    layer.BatchNorm2d(channels),
                ),
                *(
                    neuron.LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True),
                    layer.MaxPool2d(2, 2),
                ),
            ]
        self.conv_fc = nn.Sequential(
            *conv,
            *(layer.Flatten(), layer.Linear(channels * 16, 64), neuron.LIFNode(surrogate_function=surrogate.ATan())),
            *(layer.Linear(64, 50), layer.VotingLayer(10)),
        )
        functional.set_step_mode(self, "m")
        amplify(self, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_fc(12 * x).mean(0)


class TemporalChannelAttention(nn.Module):
    """Convolutions over time and over channels of the mean of each map, multiplied."""

    def __init__(self, T: int, channels: int) -> None:
        super().__init__()
        self.conv, self.conv_c = (
            nn.Conv1d(T, T, 3, padding="same", bias=False),
            nn.Conv1d(channels, channels, 3, padding="same", bias=False),
        )

    def forward(self, x_seq: Tensor) -> Tensor:
        x = torch.mean(x_seq.permute(1, 0, 2, 3, 4), dim=[3, 4])
        conv_t = self.conv(x)
        conv_c = self.conv_c(x.permute(0, 2, 1)).permute(0, 2, 1)
        out = torch.sigmoid(conv_t * conv_c).permute(1, 0, 2)
        return x_seq * out[:, :, :, None, None]


class AttentionNet(nn.Module):
    """Attention over time and channels between layers of neurons."""

    def __init__(self, T: int = 8) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(conv3x3(2, 8), neuron.LIFNode(tau=2.0, detach_reset=True), TemporalChannelAttention(T, 8)),
            *(layer.AvgPool2d(2), conv3x3(8, 16), neuron.LIFNode(tau=2.0, detach_reset=True)),
            *(TemporalChannelAttention(T, 16), layer.AvgPool2d(2), layer.Flatten()),
        )
        self.fc = nn.Sequential(layer.Dropout(0.0), layer.Linear(16 * 16, 10))
        functional.set_step_mode(self, "m")
        amplify(self.fc, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(12 * x)).mean(0)


class RecurrentNet(nn.Module):
    """A recurrent container, a stateful synapse, and neurons in mode "m"."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            layer.Linear(40, 64),
            layer.LinearRecurrentContainer(neuron.LIFNode(detach_reset=True), 64, 64, True),
            layer.SynapseFilter(tau=10.0),
            layer.Linear(64, 10),
            neuron.LIFNode(tau=2.0),
        )
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(20 * x)


def image(T: int) -> tuple[Tensor, ...]:
    return (torch.rand(4, 3, 16, 16),)


def spiking_csnn() -> Any:
    """One time step of a convolutional net, which the author calls in a loop."""
    return amplify(
        nn.Sequential(
            *(
                layer.Conv2d(1, 16, 3, padding=1, bias=False),
                layer.BatchNorm2d(16),
                neuron.IFNode(),
                layer.MaxPool2d(2),
            ),
            *(
                layer.Conv2d(16, 16, 3, padding=1, bias=False),
                layer.BatchNorm2d(16),
                neuron.IFNode(),
                layer.MaxPool2d(2),
            ),
            *(layer.Flatten(), layer.Linear(16 * 49, 64, bias=False), neuron.IFNode()),
            *(layer.Linear(64, 10, bias=False), neuron.IFNode()),
        ),
        6,
    )


ENTRIES = (
    Entry("SEW-ResNet, mode m", "SEW-ResNet", SewResNet, image, 6),
    Entry(
        "event frames, voting layer", "SpikingJelly PLIF net", VotingNet, rates(4, 2, 32, 32, rate=0.4), 8, other_T=3
    ),
    Entry("attention over time and channels", "TCJA-SNN", AttentionNet, rates(4, 2, 16, 16, rate=0.4), 8),
    Entry("recurrent container, synapse", "SpikingJelly", RecurrentNet, rates(8, 40), 20, other_T=7),
    Entry(
        "CSNN, stepped",
        "SpikingJelly tutorials",
        spiking_csnn,
        lambda T: (2 * torch.rand(T, 4, 1, 28, 28),),
        6,
        "step",
        other_T=3,
    ),
)
