"""Models that loop over time around cells of Norse, with explicit states."""

from __future__ import annotations

from typing import Any

import norse.torch as norse
import torch
from gallery_entry import Entry, rates, sequence_of
from torch import Tensor, nn

__all__ = ["ENTRIES"]


class ConvNet(nn.Module):
    """Convolutions and cells; the voltages of the readout are written to a tensor."""

    def __init__(self, num_channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(num_channels, 8, 5), nn.Conv2d(8, 16, 5)
        self.fc1 = nn.Linear(16 * 16, 50)
        self.lif0, self.lif1, self.lif2 = norse.LIFCell(), norse.LIFCell(), norse.LIFCell()
        self.out = norse.LILinearCell(50, 10)

    def forward(self, x: Tensor) -> Tensor:
        seq_length, batch_size = x.shape[0], x.shape[1]
        s0 = s1 = s2 = so = None
        voltages = torch.zeros(seq_length, batch_size, 10, device=x.device, dtype=x.dtype)
        for ts in range(seq_length):
            z = self.conv1(x[ts, :])
            z, s0 = self.lif0(z, s0)
            z = torch.nn.functional.max_pool2d(torch.relu(z), 2, 2)
            z = 10 * self.conv2(z)
            z, s1 = self.lif1(z, s1)
            z = torch.nn.functional.max_pool2d(torch.relu(z), 2, 2)
            z = z.view(-1, 16 * 16)
            z, s2 = self.lif2(self.fc1(z), s2)
            v, so = self.out(torch.relu(z), so)
            voltages[ts, :, :] = v
        return voltages


class Classifier(nn.Module):
    """A model and a decoder: the logarithm of the softmax of the largest voltages."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ConvNet()

    def forward(self, x: Tensor) -> Tensor:
        voltages, _ = torch.max(self.model(x), 0)
        return torch.nn.functional.log_softmax(voltages, dim=1)


class Memory(nn.Module):
    """Adaptive recurrent neurons and a leaky readout, as in the task of storing and recalling."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = norse.LSNNRecurrentCell(20, 40)
        self.dropout = nn.Identity()
        self.readout = norse.LILinearCell(40, 2)

    def forward(self, spikes: Tensor) -> tuple[Tensor, Any]:
        seq_length = spikes.shape[0]
        state, out_state = None, None
        outputs = []
        for step in range(seq_length):
            out_spikes, state = self.layer(spikes[step], state)
            out, out_state = self.readout(self.dropout(out_spikes), out_state)
            outputs.append(out)
        return torch.stack(outputs), state


class Amplify(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 20 * x


class Policy(nn.Module):
    """One step of a policy that takes and returns its states."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = norse.SequentialState(
            norse.LIFRecurrentCell(16, 64), nn.Linear(64, 32), Amplify(), norse.LIFCell()
        )
        self.readout = norse.LILinearCell(32, 4)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        hidden, out = (None, None) if state is None else state
        x, hidden = self.layers(x, hidden)
        x, out = self.readout(10 * x, out)
        return torch.softmax(x, 1), (hidden, out)


ENTRIES = (
    Entry(
        "ConvNet, largest voltages", "Norse examples", Classifier, sequence_of(4, 1, 28, 28, scale=20), 12, other_T=5
    ),
    Entry("LSNN, store and recall", "Norse examples", Memory, rates(8, 20, rate=0.5), 30, other_T=7),
    Entry(
        "policy, states in a tuple",
        "Norse examples",
        Policy,
        sequence_of(2, 16, scale=40),
        20,
        "step",
        carries=True,
        other_T=6,
    ),
)
