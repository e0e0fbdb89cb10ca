"""Neurons that loop over time, and containers that fold time into the batch by hand."""

from __future__ import annotations

from typing import Any

import torch
from gallery_entry import Entry, rates, sequence_of
from torch import Tensor, nn

__all__ = ["ENTRIES"]


class ZIF(torch.autograd.Function):
    """A triangular surrogate whose width is an argument."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, gama: float) -> Tensor:
        out = (input > 0).to(input)
        L = torch.tensor([gama])
        ctx.save_for_backward(input, out, L)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (input, _, others) = ctx.saved_tensors
        gama = others[0].item()
        grad_input = grad_output
        tmp = (1 / gama) * (1 / gama) * ((gama - input.abs()).clamp(min=0))
        return grad_input * tmp, None


class SeqToANNContainer(nn.Module):
    def __init__(self, *args: nn.Module) -> None:
        super().__init__()
        self.module = args[0] if len(args) == 1 else nn.Sequential(*args)

    def forward(self, x_seq: Tensor) -> Tensor:
        y_shape = [x_seq.shape[0], x_seq.shape[1]]
        y_seq = self.module(x_seq.flatten(0, 1).contiguous())
        y_shape.extend(y_seq.shape[1:])
        return y_seq.view(y_shape)


class LIFSpike(nn.Module):
    """A leaky neuron over dimension 1."""

    def __init__(self, thresh: float = 1.0, tau: float = 0.5, gama: float = 1.0) -> None:
        super().__init__()
        self.act, self.thresh, self.tau, self.gama = ZIF.apply, thresh, tau, gama

    def forward(self, x: Tensor) -> Tensor:
        mem: Any = 0
        spike_pot = []
        T = x.shape[1]
        for t in range(T):
            mem = mem * self.tau + x[:, t, ...]
            spike = self.act(mem - self.thresh, self.gama)
            mem = (1 - spike) * mem
            spike_pot.append(spike)
        return torch.stack(spike_pot, dim=1)


class Layer(nn.Module):
    """Convolution and norm in a container, then neurons."""

    def __init__(self, in_plane: int, out_plane: int, act: nn.Module) -> None:
        super().__init__()
        self.fwd = SeqToANNContainer(nn.Conv2d(in_plane, out_plane, 3, 1, 1), nn.BatchNorm2d(out_plane))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fwd(x))


class VGGSNN(nn.Module):
    """Layers and pools in containers; an output for each step, as the loss of each step needs."""

    def __init__(self, act: Any = LIFSpike) -> None:
        super().__init__()
        pool = SeqToANNContainer(nn.AvgPool2d(2))
        self.features = nn.Sequential(
            Layer(2, 8, act()), Layer(8, 16, act()), pool, Layer(16, 16, act()), Layer(16, 16, act()), pool
        )
        self.classifier = nn.Sequential(SeqToANNContainer(nn.Linear(16 * 16, 10)))

    def forward(self, input: Tensor) -> Tensor:
        x = self.features(2 * input)
        return self.classifier(torch.flatten(x, 2))


def add_dimension(x: Tensor, T: int) -> Tensor:
    x = x.unsqueeze(1)
    return x.repeat(1, T, 1, 1, 1)


class BasicBlock(nn.Module):
    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1_s = SeqToANNContainer(nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes))
        self.conv2_s = SeqToANNContainer(nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes))
        self.downsample = None
        if stride != 1:
            self.downsample = SeqToANNContainer(
                nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes)
            )
        self.spike1, self.spike2 = LIFSpike(), LIFSpike()

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.conv2_s(self.spike1(self.conv1_s(x)))
        return self.spike2(out + identity)


class ResNetTet(nn.Module):
    """A static image, repeated along dimension 1."""

    def __init__(self, T: int = 6) -> None:
        super().__init__()
        self.T = T
        self.conv1_s = SeqToANNContainer(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.spike, self.layers = LIFSpike(), nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 16, 2))
        self.avgpool, self.fc = SeqToANNContainer(nn.AdaptiveAvgPool2d(1)), SeqToANNContainer(nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.spike(self.conv1_s(add_dimension(2 * x, self.T)))
        x = torch.flatten(self.avgpool(self.layers(x)), 2)
        return self.fc(x)


class MergeTemporalDim(nn.Module):
    def forward(self, x_seq: Tensor) -> Tensor:
        return x_seq.flatten(0, 1).contiguous()


class ExpandTemporalDim(nn.Module):
    def __init__(self, T: int) -> None:
        super().__init__()
        self.T = T

    def forward(self, x_seq: Tensor) -> Tensor:
        y_shape = [self.T, int(x_seq.shape[0] / self.T)]
        y_shape.extend(x_seq.shape[1:])
        return x_seq.view(y_shape)


class MergedLIF(nn.Module):
    """A neuron between merged and expanded time; a static input becomes a sequence in front of the first one."""

    def __init__(self, T: int, thresh: float = 1.0, tau: float = 0.9) -> None:
        super().__init__()
        self.act, self.thresh, self.tau, self.T = ZIF.apply, thresh, tau, T
        self.expand, self.merge = ExpandTemporalDim(T), MergeTemporalDim()

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        mem: Any = 0
        spike_pot = []
        for t in range(self.T):
            mem = mem * self.tau + x[t, ...]
            spike = self.act(mem - self.thresh, 1.0) * self.thresh
            mem = mem - spike
            spike_pot.append(spike)
        x = torch.stack(spike_pot, dim=0)
        return self.merge(x)


class RobustVGG(nn.Module):
    """Time merged with the batch through the whole net."""

    def __init__(self, T: int = 6) -> None:
        super().__init__()
        self.T, self.merge, self.expand = T, MergeTemporalDim(), ExpandTemporalDim(T)
        layers: list[nn.Module] = []
        for a, b in ((3, 8), (8, 16), (16, 16)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), MergedLIF(T), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(16 * 4, 32), MergedLIF(T, 0.5), nn.Linear(32, 10))

    def forward(self, input: Tensor) -> Tensor:
        input = (3 * input).unsqueeze(0).repeat(self.T, 1, 1, 1, 1)
        out = self.classifier(self.features(self.merge(input)))
        return self.expand(out).mean(0)


class GatedLIF(nn.Module):
    """A neuron whose leak, integration and reset are mixtures, with parameters for each step and channel."""

    def __init__(self, plane: int, T: int) -> None:
        super().__init__()
        self.T, self.act = T, ZIF.apply
        self.alpha, self.beta, self.gamma = (nn.Parameter(0.5 * torch.randn(plane, 1, 1)) for _ in range(3))
        self.tau, self.Vth, self.leak = (nn.Parameter(torch.full((plane, 1, 1), c)) for c in (1.5, 0.2, -2.0))
        self.conduct, self.reVth = nn.Parameter(torch.randn(T, plane, 1, 1)), nn.Parameter(torch.zeros(plane, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        u = torch.zeros(x.shape[1:], device=x.device)
        out = torch.zeros(x.shape, device=x.device)
        spike = torch.zeros_like(u)
        al, be, ga = self.alpha.sigmoid(), self.beta.sigmoid(), self.gamma.sigmoid()
        for step in range(self.T):
            I = x[step] * (1 - be * (1 - self.conduct[step].sigmoid()))  # noqa: E741
            exponential = (1 - al * (1 - self.tau.sigmoid())) * u
            linear = (1 - al) * self.leak.sigmoid()
            soft = (1 - ga) * self.reVth.sigmoid() * spike.detach()
            u = exponential * (1 - ga * spike.detach()) - linear - soft + I
            spike = self.act(u - self.Vth.sigmoid(), 1.0)
            out[step] = spike
        return out


class GatedNet(nn.Module):
    """Gated neurons between containers, and the statistics of the norm scaled for each step."""

    def __init__(self, T: int = 6) -> None:
        super().__init__()
        self.conv1 = SeqToANNContainer(nn.Conv2d(2, 8, 3, padding=1, bias=False))
        self.conv2 = SeqToANNContainer(nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False))
        self.bn1, self.bn2 = TemporalNorm(8, T), TemporalNorm(8, T)
        self.act1, self.act2, self.fc = GatedLIF(8, T), GatedLIF(8, T), nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(3 * x)))
        x = self.act2(self.bn2(self.conv2(x)))
        return self.fc(x.flatten(2)).mean(0)


class TemporalNorm(nn.Module):
    """A norm over all steps, and a learned factor for each step."""

    def __init__(self, plane: int, T: int) -> None:
        super().__init__()
        self.bn, self.p = nn.BatchNorm3d(plane), nn.Parameter(1 + 0.1 * torch.randn(T, 1, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        y = input.transpose(0, 1).contiguous().transpose(1, 2).contiguous()
        y = self.bn(y)
        y = y.contiguous().transpose(1, 2).transpose(0, 1).contiguous()
        return y * self.p


class Twin(nn.Module):
    """A neuron with two compartments over dimension 1; the dendrite feeds the soma."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor([-0.4, 0.6]))

    def forward(self, x: Tensor) -> Tensor:
        v1 = torch.zeros_like(x[:, 0])
        v2 = torch.zeros_like(x[:, 0])
        b1, b2 = torch.sigmoid(self.beta)
        spikes = []
        for xt in x.unbind(1):
            v1 = v1 - b1 * v2 + xt
            v2 = v2 + b2 * v1
            s = ZIF.apply(v2 - 1.0, 1.0)
            v2 = v2 - s
            v1 = v1 - 0.5 * s
            spikes.append(s)
        return torch.stack(spikes, 1)


class TwinNet(nn.Module):
    """Linear layers on `[N, T, C]`, neurons of two compartments, and the last step as output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), Twin(), nn.Linear(64, 64), Twin(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, -1]


class ParallelNeuron(nn.Module):
    """A spiking neuron without reset: one product over time."""

    def __init__(self, T: int) -> None:
        super().__init__()
        self.T, self.weight = T, nn.Parameter(torch.tril(torch.randn(T, T) / T**0.5))
        self.bias = nn.Parameter(-0.2 * torch.ones(T, 1))

    def forward(self, x_seq: Tensor) -> Tensor:
        h_seq = torch.addmm(self.bias, self.weight, x_seq.flatten(1))
        return ZIF.apply(h_seq, 1.0).view(x_seq.shape)


class ParallelNet(nn.Module):
    """Neurons that mix time, neurons that loop over it, and a readout over all steps."""

    def __init__(self, T: int = 8) -> None:
        super().__init__()
        self.fc1, self.psn, self.fc2, self.fc3 = (
            nn.Linear(32, 64),
            ParallelNeuron(T),
            nn.Linear(64, 64),
            nn.Linear(64, 5),
        )
        self.lif = LIFSpike(thresh=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.psn(self.fc1(x))
        x = self.lif(self.fc2(x).transpose(0, 1))
        return self.fc3(x).mean(1)


def image(T: int) -> tuple[Tensor, ...]:
    return (torch.rand(4, 3, 16, 16),)


ENTRIES = (
    Entry("VGG in containers, time at dim 1", "TET", VGGSNN, rates(4, 2, 16, 16, rate=0.4, time_dim=1), 8, other_T=3),
    Entry("ResNet, repeated image", "TET", ResNetTet, image, 6),
    Entry("merged time, neurons loop", "SNN-RAT", RobustVGG, lambda T: (torch.rand(4, 3, 16, 16),), 6),
    Entry("gated neurons, norm for each step", "GLIF and TEBN", GatedNet, rates(6, 2, 16, 16, rate=0.4), 6),
    Entry("two compartments, last step", "TC-LIF", TwinNet, sequence_of(16, 32, time_dim=1), 40, other_T=9),
    Entry("parallel spiking neurons", "PSN", ParallelNet, sequence_of(16, 32, scale=2), 8),
)
