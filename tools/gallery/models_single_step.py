"""Models that compute one time step; the author calls them in a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gallery_entry import Entry, rates, sequence_of
from torch import Tensor, nn

__all__ = ["ENTRIES"]


class Sigmoid(torch.autograd.Function):
    """The derivative of a sigmoid with a slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        sgax = (ctx.alpha * x).sigmoid()
        return grad_output * (1.0 - sgax) * sgax * ctx.alpha, None


class OnlineLIF(nn.Module):
    """A neuron whose potential is cut from the graph at each step; `init` starts a sequence."""

    def __init__(self, tau: float = 2.0) -> None:
        super().__init__()
        self.decay = 1 - 1.0 / tau
        self.reset_state()

    def reset_state(self) -> None:
        self.u: Any = None
        self.spike: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.u is None:
            self.u, self.spike = torch.zeros_like(x), torch.zeros_like(x)
        self.u = self.decay * (self.u - self.spike).detach() + x
        self.spike = Sigmoid.apply(self.u - 1.0, 4.0)
        return self.spike


class ScaledWSConv2d(nn.Conv2d):
    """A convolution whose weight is standardised at each call."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(out_channels, 1, 1, 1))

    def get_weight(self) -> Tensor:
        fan_in: Any = np.prod(self.weight.shape[1:])
        mean = torch.mean(self.weight, dim=[1, 2, 3], keepdim=True)
        var = torch.var(self.weight, dim=[1, 2, 3], keepdim=True)
        weight = (self.weight - mean) / ((var * fan_in + 1e-4) ** 0.5)
        return weight * self.gain

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.get_weight(), self.bias, self.stride, self.padding)


class OnlineVGG(nn.Module):
    """Standardised convolutions, scaled neurons, average pools; the output of each step."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 16), (16, 16), (16, 32)):
            layers += [ScaledWSConv2d(a, b), OnlineLIF(), Scale(2.74), nn.AvgPool2d(2)]
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(32 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(2 * x), 1))


class Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ForwardPropagation(nn.Module):
    """A recurrent net of adaptive neurons; one step takes and returns a tuple of states."""

    def __init__(self, input_size: int = 40, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.layer1_x, self.layer1_r = nn.Linear(input_size + hidden, hidden), nn.Linear(hidden, hidden)
        self.layer1_tauM, self.layer1_tauAdp = nn.Linear(2 * hidden, hidden), nn.Linear(2 * hidden, hidden)
        self.layer3_x, self.hidden, self.classes = nn.Linear(hidden, classes), hidden, classes
        self.tau_m_o = nn.Parameter(torch.zeros(classes))

    def forward(self, x_t: Tensor, h: Any = None) -> tuple[Tensor, Any]:
        if h is None:
            zeros = torch.zeros(x_t.shape[0], self.hidden).to(x_t)
            h = (zeros, zeros, torch.full_like(zeros, 0.1), torch.zeros(x_t.shape[0], self.classes).to(x_t))
        mem, spk, b, out = h
        dense_x = self.layer1_x(torch.cat((x_t, self.layer1_r(spk)), dim=-1))
        tau_m = torch.sigmoid(self.layer1_tauM(torch.cat((dense_x, mem), dim=-1)))
        tau_adp = torch.sigmoid(self.layer1_tauAdp(torch.cat((dense_x, b), dim=-1)))
        b = tau_adp * b + (1 - tau_adp) * spk
        B = 0.1 + 1.8 * b
        mem = mem + (-mem + 3 * dense_x) * tau_m - B * spk
        spk = Sigmoid.apply(mem - B, 5.0)
        out = out + (-out + self.layer3_x(spk)) * torch.sigmoid(self.tau_m_o)
        return F.log_softmax(out, dim=1), (mem, spk, b, out)


class CurrentBased(nn.Module):
    """A neuron of current and voltage on a grid of fixed-point numbers, with straight-through rounding."""

    def __init__(self, current_decay: float = 0.25, voltage_decay: float = 0.03, scale: int = 1 << 6) -> None:
        super().__init__()
        self.current_decay, self.voltage_decay, self.scale = current_decay, voltage_decay, scale
        self.reset_state()

    def reset_state(self) -> None:
        self.current: Any = None
        self.voltage: Any = None

    def quantize(self, x: Tensor) -> Tensor:
        return x + (torch.round(x * self.scale) / self.scale - x).detach()

    def forward(self, x: Tensor) -> Tensor:
        if self.current is None:
            self.current = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            self.voltage = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
        self.current = self.quantize(self.current * (1 - self.current_decay)) + x
        self.voltage = self.quantize(self.voltage * (1 - self.voltage_decay)) + self.current
        spike = Sigmoid.apply(self.voltage - 1.25, 3.0)
        self.voltage = self.voltage * (1 - spike.detach())
        return spike


def current_based() -> nn.Module:
    """Layers without bias and current-based neurons."""
    return nn.Sequential(
        *(nn.Linear(64, 64, bias=False), CurrentBased()),
        *(nn.Linear(64, 64, bias=False), CurrentBased()),
        *(nn.Linear(64, 10, bias=False), CurrentBased()),
    )


class EProp(nn.Module):
    """Adaptive and plain recurrent neurons in one layer, a leaky readout, states in attributes."""

    def __init__(self, n_in: int = 20, n_rec: int = 48, n_out: int = 2) -> None:
        super().__init__()
        self.w_in, self.w_rec, self.w_out = (
            nn.Linear(n_in, n_rec, bias=False),
            nn.Linear(n_rec, n_rec, bias=False),
            nn.Linear(n_rec, n_out),
        )
        self.register_buffer("mask", 1 - torch.eye(n_rec))
        self.register_buffer("beta", torch.cat([torch.zeros(n_rec // 2), torch.full((n_rec // 2,), 0.07)]))
        self.alpha, self.rho, self.kappa = float(np.exp(-1 / 20)), float(np.exp(-1 / 200)), float(np.exp(-1 / 20))
        self.mask: Tensor
        self.beta: Tensor
        self.reset_state()

    def reset_state(self) -> None:
        self.v: Any = None
        self.a: Any = None
        self.z: Any = None
        self.y: Any = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.v is None:
            self.v = self.a = self.z = torch.zeros(x.shape[0], self.w_rec.in_features).to(x)
            self.y = torch.zeros(x.shape[0], self.w_out.out_features).to(x)
        recurrent = F.linear(self.z, self.w_rec.weight * self.mask)
        self.a = self.rho * self.a + self.z
        self.v = self.alpha * self.v + 3 * self.w_in(x) + recurrent - 0.6 * self.z.detach()
        self.z = Sigmoid.apply((self.v - 0.6 - self.beta * self.a) / 0.6, 3.0)
        self.y = self.kappa * self.y + self.w_out(self.z)
        return self.y, self.z


ENTRIES = (
    Entry("standardised convolutions, online LIF", "OTTT", OnlineVGG, sequence_of(4, 3, 16, 16), 6, "step", other_T=3),
    Entry(
        "liquid time constants, tuple of states",
        "sFPTT",
        ForwardPropagation,
        sequence_of(16, 40),
        20,
        "step",
        carries=True,
        other_T=7,
    ),
    Entry("current-based, fixed-point grid", "SLAYER", current_based, rates(16, 64, rate=0.5), 30, "step", other_T=9),
    Entry("adaptive recurrent, leaky readout", "e-prop", EProp, rates(16, 20, rate=0.5), 30, "step", other_T=9),
)
