"""Networks for spoken digits and other event streams, with membranes as local variables or loops in layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gallery_entry import Entry, rates, sequence_of
from torch import Tensor, nn

__all__ = ["ENTRIES"]


class SurrGradSpike(torch.autograd.Function):
    """Zeros, ones where the potential is positive, and the derivative of a fast sigmoid."""

    scale = 100.0

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        out = torch.zeros_like(input)
        out[input > 0] = 1.0
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        grad_input = grad_output.clone()
        return grad_input / (SurrGradSpike.scale * torch.abs(input) + 1.0) ** 2


spike_fn = SurrGradSpike.apply


class SpyTorch(nn.Module):
    """Products over the sequence by einsum, a loop over currents and membranes, and a readout loop."""

    def __init__(self, nb_inputs: int = 70, nb_hidden: int = 100, nb_outputs: int = 10) -> None:
        super().__init__()
        tau_mem, tau_syn, time_step = 10e-3, 5e-3, 1e-3
        self.alpha, self.beta = float(np.exp(-time_step / tau_syn)), float(np.exp(-time_step / tau_mem))
        self.nb_hidden, self.nb_outputs = nb_hidden, nb_outputs
        self.w1 = nn.Parameter(torch.empty(nb_inputs, nb_hidden).normal_(std=3.0 / np.sqrt(nb_inputs)))
        self.w2 = nn.Parameter(torch.empty(nb_hidden, nb_outputs).normal_(std=1.0 / np.sqrt(nb_hidden)))

    def hidden_layer(self, h1: Tensor, batch_size: int, nb_steps: int) -> tuple[Tensor, Tensor]:
        syn = torch.zeros((batch_size, self.nb_hidden))
        mem = torch.zeros((batch_size, self.nb_hidden))
        mem_rec, spk_rec = [], []
        for t in range(nb_steps):
            mthr = mem - 1.0
            out = spike_fn(mthr)
            rst = out.detach()
            new_syn = self.alpha * syn + h1[:, t]
            new_mem = (self.beta * mem + syn) * (1.0 - rst)
            mem_rec.append(mem)
            spk_rec.append(out)
            mem, syn = new_mem, new_syn
        return torch.stack(mem_rec, dim=1), torch.stack(spk_rec, dim=1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        batch_size, nb_steps = inputs.shape[0], inputs.shape[1]
        h1 = torch.einsum("abc,cd->abd", (inputs, self.w1))
        _, spk_rec = self.hidden_layer(h1, batch_size, nb_steps)
        h2 = torch.einsum("abc,cd->abd", (spk_rec, self.w2))
        flt = torch.zeros((batch_size, self.nb_outputs))
        out = torch.zeros((batch_size, self.nb_outputs))
        out_rec = [out]
        for t in range(nb_steps):
            new_flt = self.alpha * flt + h2[:, t]
            new_out = self.beta * out + flt
            flt, out = new_flt, new_out
            out_rec.append(out)
        m, _ = torch.max(torch.stack(out_rec, dim=1), 1)
        return m, spk_rec


class RecurrentSpyTorch(SpyTorch):
    """The same with recurrent weights in the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.v1 = nn.Parameter(torch.empty(self.nb_hidden, self.nb_hidden).normal_(std=0.5 / np.sqrt(self.nb_hidden)))

    def hidden_layer(self, h1: Tensor, batch_size: int, nb_steps: int) -> tuple[Tensor, Tensor]:
        syn = torch.zeros((batch_size, self.nb_hidden))
        mem = torch.zeros((batch_size, self.nb_hidden))
        out = torch.zeros((batch_size, self.nb_hidden))
        mem_rec, spk_rec = [], []
        for t in range(nb_steps):
            h = h1[:, t] + torch.einsum("ab,bc->ac", (out, self.v1))
            mthr = mem - 1.0
            out = spike_fn(mthr)
            rst = out.detach()
            new_syn = self.alpha * syn + h
            new_mem = (self.beta * mem + syn) * (1.0 - rst)
            mem_rec.append(mem)
            spk_rec.append(out)
            mem, syn = new_mem, new_syn
        return torch.stack(mem_rec, dim=1), torch.stack(spk_rec, dim=1)


class MultiGaussian(torch.autograd.Function):
    """A sum of Gaussians as derivative."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        return input.gt(0).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (input,) = ctx.saved_tensors
        scale, height, lens = 6.0, 0.15, 0.5
        temp = (
            gaussian(input, mu=0.0, sigma=lens) * (1.0 + height)
            - gaussian(input, mu=lens, sigma=scale * lens) * height
            - gaussian(input, mu=-lens, sigma=scale * lens) * height
        )
        return grad_output * temp * 0.5


def gaussian(x: Tensor, mu: float = 0.0, sigma: float = 0.5) -> Tensor:
    return torch.exp(-((x - mu) ** 2) / (2 * sigma**2)) / np.sqrt(2 * np.pi) / sigma


act_fun_adp = MultiGaussian.apply


def mem_update_adp(
    inputs: Tensor, mem: Tensor, spike: Tensor, tau_adp: Tensor, b: Tensor, tau_m: Tensor, dt: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of an adaptive neuron with learned time constants."""
    alpha = torch.exp(-1.0 * dt / tau_m)
    ro = torch.exp(-1.0 * dt / tau_adp)
    b = ro * b + (1 - ro) * spike
    B = 0.1 + 1.8 * b
    mem = mem * alpha + (1 - alpha) * 3.0 * inputs - B * spike * dt
    spike = act_fun_adp(mem - B)
    return mem, spike, B, b


class AdaptiveRecurrent(nn.Module):
    """Adaptive recurrent neurons, a leaky readout, and the sum of its softmax."""

    def __init__(self, input_size: int = 40, hidden: int = 64, output_size: int = 10) -> None:
        super().__init__()
        self.i_2_h1, self.h1_2_h1 = nn.Linear(input_size, hidden), nn.Linear(hidden, hidden)
        self.h1_2_o, self.hidden = nn.Linear(hidden, output_size), hidden
        self.tau_adp_h1 = nn.Parameter(torch.empty(hidden).normal_(150, 10))
        self.tau_m_h1 = nn.Parameter(torch.empty(hidden).normal_(20, 5))
        self.tau_m_o = nn.Parameter(torch.empty(output_size).normal_(20, 5))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        batch_size, seq_num, _ = input.shape
        h1_mem = h1_spike = torch.rand(batch_size, self.hidden) * 0
        o_mem = torch.zeros(batch_size, 10)
        b_h1: Any = 0.1
        output_sum: Any = 0
        hidden_spike_: list[Tensor] = []
        for i in range(seq_num):
            h_input = self.i_2_h1(input[:, i, :]) + self.h1_2_h1(h1_spike)
            h1_mem, h1_spike, _, b_h1 = mem_update_adp(
                h_input,
                h1_mem,
                h1_spike,
                self.tau_adp_h1,
                b_h1,
                self.tau_m_h1,
            )
            alpha = torch.exp(-1.0 / self.tau_m_o)
            o_mem = o_mem * alpha + (1 - alpha) * self.h1_2_o(h1_spike)
            output_sum = output_sum + torch.softmax(o_mem, dim=1)
            hidden_spike_.append(h1_spike)
        return output_sum, torch.stack(hidden_spike_).mean(0)


class RecurrentLayer(nn.Module):
    """Adaptive neurons behind a linear layer and a norm of all samples and steps; the loop is a method of the layer."""

    def __init__(self, input_size: int, hidden_size: int, recurrent: bool = True) -> None:
        super().__init__()
        self.hidden_size, self.alpha_lim = hidden_size, (float(np.exp(-1 / 5)), float(np.exp(-1 / 25)))
        self.W = nn.Linear(input_size, hidden_size, bias=False)
        self.norm = nn.BatchNorm1d(hidden_size, momentum=0.05)
        self.V = nn.Linear(hidden_size, hidden_size, bias=False) if recurrent else None
        self.alpha = nn.Parameter(torch.empty(hidden_size).uniform_(*self.alpha_lim))
        self.beta = nn.Parameter(torch.empty(hidden_size).uniform_(0.9, 0.99))
        self.a = nn.Parameter(torch.empty(hidden_size).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        Wx = self.W(x)
        _Wx = self.norm(Wx.reshape(Wx.shape[0] * Wx.shape[1], Wx.shape[2]))
        return self._cell(_Wx.reshape(Wx.shape[0], Wx.shape[1], Wx.shape[2]))

    def _cell(self, Wx: Tensor) -> Tensor:
        ut = torch.zeros(Wx.shape[0], Wx.shape[2]).to(Wx.device)
        wt = torch.zeros(Wx.shape[0], Wx.shape[2]).to(Wx.device)
        st = torch.zeros(Wx.shape[0], Wx.shape[2]).to(Wx.device)
        alpha = torch.clamp(self.alpha, min=self.alpha_lim[0], max=self.alpha_lim[1])
        beta = torch.clamp(self.beta, min=0.9, max=0.99)
        s = []
        for t in range(Wx.shape[1]):
            wt = beta * wt + self.a * ut + 0.5 * st
            current = Wx[:, t, :] if self.V is None else Wx[:, t, :] + torch.matmul(st, self.V.weight)
            ut = alpha * (ut - st) + (1 - alpha) * 5 * (current - wt)
            st = spike_fn(ut - 1.0)
            s.append(st)
        return torch.stack(s, dim=1)


class Readout(nn.Module):
    """A leaky integrator; the softmax of each step, summed."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.W, self.alpha = (
            nn.Linear(input_size, hidden_size),
            nn.Parameter(torch.empty(hidden_size).uniform_(0.8, 0.96)),
        )

    def forward(self, x: Tensor) -> Tensor:
        Wx = self.W(x)
        ut = torch.zeros(Wx.shape[0], Wx.shape[2])
        out = torch.zeros(Wx.shape[0], Wx.shape[2])
        alpha = torch.clamp(self.alpha, min=0.8, max=0.96)
        for t in range(Wx.shape[1]):
            ut = alpha * ut + (1 - alpha) * Wx[:, t, :]
            out = out + nn.functional.softmax(ut, dim=1)
        return out


class LayerStack(nn.Module):
    """Layers with loops of their own, and the mean firing rate, which a regulariser uses."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.snn = nn.ModuleList(
            [RecurrentLayer(40, 64, recurrent), RecurrentLayer(64, 64, recurrent), Readout(64, 10)]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        all_spikes = []
        for i, snn_lay in enumerate(self.snn):
            x = snn_lay(x)
            if i != len(self.snn) - 1:
                all_spikes.append(x)
        return x, torch.cat(all_spikes, dim=2).mean(dim=(0, 1))


class Resonate(nn.Module):
    """Damped oscillators with a refractory variable that spike, and a leaky readout."""

    def __init__(self, input_size: int = 20, layer_size: int = 48, dt: float = 0.01) -> None:
        super().__init__()
        self.linear, self.layer_size, self.dt = (
            nn.Linear(input_size + layer_size, layer_size, bias=False),
            layer_size,
            dt,
        )
        self.omega = nn.Parameter(torch.empty(layer_size).uniform_(5, 10))
        self.b_offset = nn.Parameter(torch.empty(layer_size).uniform_(0.1, 1))
        self.out, self.tau_mem = nn.Linear(layer_size, 6, bias=False), nn.Parameter(torch.empty(6).normal_(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        sequence_length, batch_size = x.shape[0], x.shape[1]
        z = torch.zeros((batch_size, self.layer_size))
        u, v, q = torch.zeros_like(z), torch.zeros_like(z), torch.zeros_like(z)
        out_u = torch.zeros((batch_size, 6))
        outputs = []
        for t in range(sequence_length):
            in_sum = 100 * self.linear(torch.cat((x[t], z), dim=1))
            omega = torch.abs(self.omega)
            p_omega = (-1 + torch.sqrt(1 - torch.square(self.dt * omega))) / self.dt
            b = p_omega - torch.abs(self.b_offset) - q
            u_ = u + b * u * self.dt - omega * v * self.dt + in_sum * self.dt
            v = v + omega * u * self.dt + b * v * self.dt
            u = u_
            z = act_fun_adp(u - 1.0 - q)
            q = q.mul(0.9) + z
            alpha = torch.exp(-1 / self.tau_mem)
            out_u = out_u.mul(alpha) + self.out(z).mul(1 - alpha)
            outputs.append(out_u)
        return torch.stack(outputs, dim=0)


class Dendrites(nn.Module):
    """Several dendritic branches for each neuron, with time constants of their own."""

    def __init__(self, input_dim: int = 40, output_dim: int = 32, branch: int = 4) -> None:
        super().__init__()
        self.input_dim, self.output_dim, self.branch = input_dim, output_dim, branch
        self.dense = nn.Linear(input_dim, output_dim * branch)
        self.tau_m = nn.Parameter(torch.empty(output_dim).uniform_(0, 4))
        self.tau_n = nn.Parameter(torch.empty(output_dim, branch).uniform_(2, 6))
        self.readout = nn.Linear(output_dim, 10)

    def set_neuron_state(self, batch_size: int) -> None:
        self.mem = torch.zeros(batch_size, self.output_dim)
        self.spike = torch.zeros(batch_size, self.output_dim)
        self.d_input = torch.zeros(batch_size, self.output_dim, self.branch)

    def step(self, input_spike: Tensor) -> Tensor:
        beta = torch.sigmoid(self.tau_n)
        current = self.dense(input_spike).reshape(-1, self.output_dim, self.branch)
        self.d_input = beta * self.d_input + (1 - beta) * 8 * current
        alpha = torch.sigmoid(self.tau_m)
        self.mem = self.mem * alpha + (1 - alpha) * self.d_input.sum(dim=2, keepdim=False) - 0.5 * self.spike
        self.spike = act_fun_adp(self.mem - 0.5)
        return self.spike

    def forward(self, input: Tensor) -> Tensor:
        b, seq_length, _ = input.shape
        self.set_neuron_state(b)
        output: Any = 0
        for i in range(seq_length):
            output = output + self.readout(self.step(input[:, i, :]))
        return output / seq_length


class Delays(nn.Module):
    """Convolutions over time as learned delays, a norm, and neurons that loop."""

    def __init__(self, n_in: int = 40, n_hidden: int = 64, taps: int = 7) -> None:
        super().__init__()
        self.taps = taps
        self.delay1, self.delay2 = (
            nn.Conv1d(n_in, n_hidden, taps, bias=False),
            nn.Conv1d(n_hidden, 10, taps, bias=False),
        )
        self.bn = nn.BatchNorm1d(n_hidden)

    def neurons(self, x: Tensor, spiking: bool = True) -> Tensor:
        v = torch.zeros_like(x[0])
        out = torch.zeros_like(x)
        for t in range(x.shape[0]):
            v = 0.9 * v + x[t]
            s = spike_fn(v - 1.0) if spiking else v
            out[t] = s
            v = v - s.detach() if spiking else v
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x.permute(1, 2, 0), (self.taps - 1, 0))
        x = self.bn(self.delay1(x)).permute(2, 0, 1)
        s = self.neurons(x)
        y = self.delay2(nn.functional.pad(s.permute(1, 2, 0), (self.taps - 1, 0))).permute(2, 0, 1)
        return torch.softmax(self.neurons(y, spiking=False), -1).sum(0)


ENTRIES = (
    Entry("einsum, explicit membranes", "SpyTorch", SpyTorch, rates(16, 70, time_dim=1), 50, other_T=20),
    Entry(
        "recurrent hidden layer, einsum", "SpyTorch (SHD)", RecurrentSpyTorch, rates(16, 70, time_dim=1), 50, other_T=20
    ),
    Entry(
        "adaptive recurrent, sum of softmax",
        "SRNN repositories",
        AdaptiveRecurrent,
        sequence_of(16, 40, time_dim=1, scale=6),
        40,
        other_T=13,
    ),
    Entry("RadLIF layers, readout loop", "sparch", lambda: LayerStack(True), rates(16, 40, time_dim=1), 40, other_T=13),
    Entry("adLIF layers, readout loop", "sparch", lambda: LayerStack(False), rates(16, 40, time_dim=1), 40, other_T=13),
    Entry(
        "balanced resonate-and-fire", "resonate-and-fire repositories", Resonate, rates(8, 20, rate=0.4), 60, other_T=21
    ),
    Entry("dendritic branches", "DH-LIF repositories", Dendrites, rates(16, 40, time_dim=1), 40, other_T=13),
    Entry("delays by Conv1d", "SNN-delays", Delays, rates(16, 40), 40, other_T=13),
)
