"""Small nets with one or few samples: control, optical flow, keyword spotting."""

from __future__ import annotations

from typing import Any

import torch
from gallery_entry import Entry, rates, sequence_of
from torch import Tensor, nn

__all__ = ["ENTRIES"]

NEURON_VTH, NEURON_CDECAY, NEURON_VDECAY, SPIKE_PSEUDO_GRAD_WINDOW = 0.5, 0.5, 0.75, 0.5


class PseudoSpikeRect(torch.autograd.Function):
    """A rectangle, by masks."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.gt(NEURON_VTH).to(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        spike_pseudo_grad = abs(input - NEURON_VTH) < SPIKE_PSEUDO_GRAD_WINDOW
        return grad_input * spike_pseudo_grad.to(input)


class PopulationActor(nn.Module):
    """Observations as populations of spike trains, layers with currents and voltages, a population decoder."""

    def __init__(
        self, obs_dim: int = 8, act_dim: int = 2, pop_dim: int = 10, hidden: int = 64, spike_ts: int = 5
    ) -> None:
        super().__init__()
        self.spike_ts, self.pop_dim, self.act_dim = spike_ts, pop_dim, act_dim
        self.mean = nn.Parameter(torch.linspace(-2, 2, pop_dim).repeat(1, obs_dim, 1))
        self.std = nn.Parameter(torch.full((1, obs_dim, pop_dim), 0.4))
        self.hidden_layers = nn.ModuleList([nn.Linear(obs_dim * pop_dim, hidden), nn.Linear(hidden, hidden)])
        self.out_pop_layer, self.decoder = (
            nn.Linear(hidden, act_dim * pop_dim),
            nn.Conv1d(act_dim, act_dim, pop_dim, groups=act_dim),
        )
        self.pseudo_spike = PseudoSpikeRect.apply

    def encode(self, obs: Tensor) -> Tensor:
        batch_size = obs.shape[0]
        obs = obs.view(-1, obs.shape[1], 1)
        activity = torch.exp(-(1.0 / 2.0) * (obs - self.mean).pow(2) / self.std.pow(2)).view(batch_size, -1)
        voltage = torch.zeros_like(activity)
        spikes = torch.zeros(batch_size, activity.shape[1], self.spike_ts, device=obs.device)
        for step in range(self.spike_ts):
            voltage = voltage + activity
            spikes[:, :, step] = self.pseudo_spike(voltage - 0.499)
            voltage = voltage - spikes[:, :, step] * 0.999
        return spikes

    def neuron_model(self, syn_func: Any, pre: Tensor, current: Tensor, volt: Tensor, spike: Tensor) -> Any:
        current = current * NEURON_CDECAY + syn_func(pre)
        volt = volt * NEURON_VDECAY * (1.0 - spike) + current
        spike = self.pseudo_spike(volt)
        return current, volt, spike

    def forward(self, obs: Tensor) -> Tensor:
        batch_size = obs.shape[0]
        in_spikes = self.encode(obs)
        states: list[Any] = []
        fc: Any
        for fc in self.hidden_layers:
            states.append([torch.zeros(batch_size, fc.out_features) for _ in range(3)])
        states.append([torch.zeros(batch_size, self.out_pop_layer.out_features) for _ in range(3)])
        out_pop_act = torch.zeros(batch_size, self.out_pop_layer.out_features)
        for step in range(self.spike_ts):
            x = in_spikes[:, :, step]
            for i, fc in enumerate([*self.hidden_layers, self.out_pop_layer]):
                states[i] = self.neuron_model(fc, x, *states[i])
                x = states[i][2]
            out_pop_act = out_pop_act + x
        out = self.decoder((out_pop_act / self.spike_ts).view(batch_size, self.act_dim, self.pop_dim))
        return torch.tanh(out.view(batch_size, self.act_dim))


class ArcTan(torch.autograd.Function):
    """The derivative of an arc tangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.gt(0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_output * 1 / (1 + 10 * x * x)


class ConvLIF(nn.Module):
    """A convolution with learned leaks and thresholds of each channel; the state is one stacked tensor."""

    def __init__(self, input_size: int, hidden_size: int, recurrent: bool = False) -> None:
        super().__init__()
        self.ff = nn.Conv2d(input_size, hidden_size, 3, padding=1, bias=False)
        self.rec = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, bias=False) if recurrent else None
        self.leak = nn.Parameter(torch.randn(hidden_size, 1, 1) * 0.1 - 2.0)
        self.thresh = nn.Parameter(torch.randn(hidden_size, 1, 1) * 0.1 + 0.3)

    def forward(self, input_: Tensor, prev_state: Tensor | None) -> tuple[Tensor, Tensor]:
        ff = self.ff(input_)
        if prev_state is None:
            prev_state = torch.zeros(2, *ff.shape, dtype=ff.dtype, device=ff.device)
        v, z = prev_state
        rec = 0.0 if self.rec is None else self.rec(z)
        thresh = self.thresh.clamp_min(0.01)
        leak = torch.sigmoid(self.leak)
        v_out = v * leak * (1 - z.detach()) + (1 - leak) * (ff + rec)
        z_out = ArcTan.apply(v_out - thresh)
        return z_out, torch.stack([v_out, z_out])


class FireNet(nn.Module):
    """Eight channels, recurrent and plain layers; the states are a list in an attribute."""

    def __init__(self, base_num_channels: int = 8) -> None:
        super().__init__()
        c = base_num_channels
        self.head, self.G1, self.R1 = ConvLIF(2, c), ConvLIF(c, c, True), ConvLIF(c, c)
        self.G2, self.R2, self.pred = ConvLIF(c, c, True), ConvLIF(c, c), nn.Conv2d(c, 2, 1, bias=False)
        self.reset_state()

    def reset_state(self) -> None:
        self.states: list[Any] = [None] * 5

    def forward(self, event_cnt: Tensor) -> Tensor:
        x = 3 * event_cnt
        for i, layer in enumerate((self.head, self.G1, self.R1, self.G2, self.R2)):
            x, self.states[i] = layer(x, self.states[i])
            x = 2 * x
        return torch.tanh(self.pred(x))


class Keywords(nn.Module):
    """A loop over time blocks of a spectrogram, with a first step of its own; later spikes count more."""

    def __init__(self, bands: int = 20, hidden: int = 48) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(bands, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 12)
        self.decay = nn.Parameter(torch.rand(2, hidden))

    def forward(self, x: Tensor) -> Tensor:
        first, gates, second = self.fc1(x), torch.sigmoid(x.mean(-1, keepdim=True)), []
        d1, d2 = self.decay.sigmoid().unbind()
        v1: Any = None
        v2: Any = None
        for t, (current, gate) in enumerate(zip(first.unbind(0), gates, strict=True)):
            v1 = current if t == 0 else d1 * v1 + gate * current
            s1 = ArcTan.apply(v1 - 0.5)
            v1 = v1 - 0.5 * s1
            h = self.fc2(s1)
            v2 = h if v2 is None else d2 * v2 + h
            s2 = ArcTan.apply(v2 - 0.3)
            v2 = v2 * (1 - s2)
            second.append(s2)
        total = 0.0
        for t, s in enumerate(second):
            total = total + (t + 1) * s
        return self.out(total)


ENTRIES = (
    Entry("population actor, one sample", "PopSAN", PopulationActor, lambda T: (torch.randn(1, 8),), 5),
    Entry(
        "eight channels, optical flow", "spiking FireNet", FireNet, rates(1, 2, 32, 32, rate=0.3), 10, "step", other_T=4
    ),
    Entry("keywords, enumerate and zip", "keyword spotting", Keywords, sequence_of(8, 20, scale=2), 30),
)
