"""Models that loop over time in `forward` around neurons of snnTorch, as its tutorials do."""

from __future__ import annotations

from typing import Any

import snntorch
import torch
import torch.nn.functional as F
from gallery_entry import Entry, rates, sequence_of
from torch import Tensor, nn

__all__ = ["ENTRIES"]


class FastSigmoid(torch.autograd.Function):
    """A fast sigmoid whose spikes keep the dtype of the potential (those of snnTorch are float32)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad_output / (25 * torch.abs(x) + 1.0) ** 2


spike_grad = FastSigmoid.apply


class Net(nn.Module):
    """Two layers; spikes and potentials of the last one in lists."""

    def __init__(self, num_inputs: int = 64, num_hidden: int = 128, num_outputs: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(num_inputs, num_hidden)
        self.lif1 = snntorch.Leaky(beta=0.95, spike_grad=spike_grad)
        self.fc2 = nn.Linear(num_hidden, num_outputs)
        self.lif2 = snntorch.Leaky(beta=0.95, spike_grad=spike_grad)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec = []
        mem2_rec = []
        for step in range(x.size(0)):
            cur1 = self.fc1(x[step])
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class StaticImage(nn.Module):
    """A convolutional net that sees the same image at every step; the firing rate is the output."""

    def __init__(self, num_steps: int = 10) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 5), nn.Conv2d(8, 16, 5)
        self.fc1 = nn.Linear(16 * 4 * 4, 10)
        self.lif1, self.lif2, self.lif3 = (
            snntorch.Leaky(beta=0.5, threshold=0.2, spike_grad=spike_grad, learn_beta=True) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        mem1, mem2, mem3 = self.lif1.init_leaky(), self.lif2.init_leaky(), self.lif3.init_leaky()
        spk_out = []
        for _ in range(self.num_steps):
            cur1 = F.max_pool2d(self.conv1(x), 2)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = F.max_pool2d(self.conv2(spk1), 2)
            spk2, mem2 = self.lif2(cur2, mem2)
            cur3 = self.fc1(spk2.flatten(1))
            spk3, mem3 = self.lif3(cur3, mem3)
            spk_out.append(spk3)
        return torch.stack(spk_out).mean(0)


class Regression(nn.Module):
    """Synaptic neurons in the middle, a membrane that never spikes as readout; the input has time at dimension 1."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.fc_in, self.fc_hidden, self.fc_out = nn.Linear(1, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        beta_in, beta_hidden = torch.rand(hidden), torch.rand(hidden)
        self.lif_in = snntorch.Leaky(beta=beta_in, learn_beta=True, spike_grad=spike_grad, threshold=0.3)
        self.lif_hidden = snntorch.Synaptic(alpha=0.8, beta=beta_hidden, spike_grad=spike_grad, threshold=0.3)
        self.li_out = snntorch.Leaky(beta=0.9, learn_beta=True, reset_mechanism="none", spike_grad=spike_grad)

    def forward(self, x: Tensor) -> Tensor:
        mem_1 = self.lif_in.init_leaky()
        syn_2, mem_2 = self.lif_hidden.init_synaptic()
        mem_3 = self.li_out.init_leaky()
        mem_rec = []
        for t in range(x.shape[1]):
            spk_1, mem_1 = self.lif_in(self.fc_in(x[:, t]), mem_1)
            spk_2, syn_2, mem_2 = self.lif_hidden(self.fc_hidden(spk_1), syn_2, mem_2)
            _, mem_3 = self.li_out(self.fc_out(spk_2), mem_3)
            mem_rec.append(mem_3)
        return torch.stack(mem_rec, 1)


class RecurrentNet(nn.Module):
    """A recurrent layer with one weight for each neuron, and a leaky readout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(40, 64), nn.Linear(64, 10)
        self.rlif = snntorch.RLeaky(beta=0.9, all_to_all=False, spike_grad=spike_grad)
        self.lif2 = snntorch.Leaky(beta=0.9, spike_grad=spike_grad)

    def forward(self, x: Tensor) -> Tensor:
        spk1, mem1 = self.rlif.init_rleaky()
        mem2 = self.lif2.init_leaky()
        out = []
        for step in x:
            spk1, mem1 = self.rlif(self.fc1(step), spk1, mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            out.append(spk2)
        return torch.stack(out).sum(0)


def image(T: int) -> tuple[Tensor, ...]:
    return (5 * torch.rand(4, 1, 28, 28),)


ENTRIES = (
    Entry("two layers, lists of spikes", "snnTorch tutorials", Net, sequence_of(16, 64, scale=2), 25, other_T=9),
    Entry("static image, firing rate", "snnTorch tutorials", StaticImage, image, 10),
    Entry(
        "regression, membrane readout", "snnTorch tutorials", Regression, sequence_of(8, 1, time_dim=1), 50, other_T=7
    ),
    Entry("RLeaky, sum of spikes", "snnTorch tutorials", RecurrentNet, rates(8, 40), 30, other_T=11),
)
