"""Loops that detach their state every k steps, and ring buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from support.looped_models import Cell, assert_converts_sequence, spike


def sequence(*shape: int) -> Tensor:
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Looped(nn.Module):
    """A recurrent layer; `kind` selects how it detaches or delays."""

    def __init__(self, kind: str, k: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.k, self.fc, self.rec, self.cell = kind, k, nn.Linear(6, 4), nn.Linear(4, 4), Cell()

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(x)

    def in_front(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            if t % self.k == 0:
                v = v.detach()
            v = 0.8 * v + self.fc(x[t])
            s = spike(v - 1)
            v = v - s
            out.append(s)
        return torch.stack(out)

    def behind(self, x: Tensor) -> Tensor:
        s = v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = []
        for t in range(x.shape[0]):
            v = 0.8 * v + self.fc(x[t]) + self.rec(s)
            s = spike(v - 1)
            v = v - s
            out.append(v)
            if (t + 1) % self.k == 0:
                v, s = v.detach(), s.detach()
        return torch.stack(out)

    def before_the_list(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            v = 0.8 * v + self.fc(x[t])
            v = v - spike(v - 1)
            if t % self.k == self.k - 1:
                v = v.detach()
            out.append(v)
        return torch.stack(out)

    def cells(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            if v is not None and t % self.k == 0:
                v = v.detach()
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
        return torch.stack(out)

    def once(self, x: Tensor) -> Tensor:
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            v = 0.8 * v + self.fc(x[t])
            v = v - spike(v - 1)
            out.append(v)
            if t == 2:
                v = v.detach()
        return torch.stack(out)

    def ring_of_list(self, x: Tensor) -> Tensor:
        buffer = [torch.zeros(x.shape[1], 4, dtype=x.dtype) for _ in range(self.k)]
        v, out = buffer[0], []
        for t in range(x.shape[0]):
            v = 0.8 * v + self.fc(x[t]) + self.rec(buffer[t % self.k])
            s = spike(v - 1)
            v = v - s
            buffer[t % self.k] = s
            out.append(s)
        return torch.stack(out)

    def ring_of_tensor(self, x: Tensor) -> Tensor:
        buffer = torch.zeros(self.k, x.shape[1], 4, dtype=x.dtype)
        v, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            v = 0.8 * v + self.fc(x[t]) + self.rec(buffer[t % self.k].clone())
            s = spike(v - 1)
            v = v - s
            buffer[t % self.k] = s
            out.append(s)
        return torch.stack(out)

    def delayed_input(self, x: Tensor) -> Tensor:
        buffer = [torch.zeros(x.shape[1], 4, dtype=x.dtype) for _ in range(self.k)]
        v, out = buffer[0], []
        for t in range(x.shape[0]):
            buffer[t % self.k] = self.fc(x[t])
            v = 0.8 * v + buffer[(t + 1) % self.k]
            s = spike(v - 1)
            v = v - s
            out.append(s)
        return torch.stack(out)


DETACHING = "in_front behind before_the_list cells once".split()
DELAYING = "ring_of_list ring_of_tensor delayed_input".split()


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("kind", [*DETACHING, *DELAYING])
def test_outputs_and_gradients_are_those_of_the_own_call(kind: str, k: int) -> None:
    net = assert_converts_sequence(Looped(kind, k), (sequence(8, 3, 6),), [(sequence(8, 2, 6),)])
    assert any(region.kind == "loop" for loop in net.loops for region in loop.regions)
    with pytest.raises(InputError, match="SNNFX312"):
        net(sequence(9, 3, 6))


def test_the_detached_state_passes_no_gradient() -> None:
    model, x = Looped("in_front", 4).double(), sequence(8, 3, 6).requires_grad_()
    net = snnfx.convert(model, takes="sequence", example_inputs=(x.detach(),))
    net(x)[4:].sum().backward()
    assert not x.grad[:4].any() and x.grad[4:].any()  # type: ignore[index]
