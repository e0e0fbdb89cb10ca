"""Gradients of per-channel parameters, which the kernel of a bound call sums over samples, pixels and time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import surrogate
from snnfx.lowering.elementwise.bound_step import BoundStep

T = 3


class PerChannel(snnfx.MemoryModule):
    """A leak and a bias for each channel, and a threshold for each row of pixels."""

    def __init__(self, channels: int, height: int) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.rand(channels, 1, 1))
        self.bias = nn.Parameter(torch.randn(channels, 1, 1))
        self.threshold = nn.Parameter(torch.rand(height, 1))
        self.register_memory("v", 0.0)
        self.spike = surrogate.ATan()

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v * self.leak + x + self.bias
        spike = self.spike(self.v - self.threshold)
        self.v = self.v - spike
        return spike


def gradients(model: PerChannel, x_seq: Tensor) -> list[Tensor]:
    """Gradients by stepping the model."""
    model.zero_grad()
    model.reset()
    x_seq = x_seq.detach().requires_grad_()
    (torch.stack([model(x) for x in x_seq]) * weights(x_seq)).sum().backward()
    return [x_seq.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


def weights(x_seq: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.0, x_seq.numel(), dtype=x_seq.dtype).view(x_seq.shape)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (8, 16, 40, 42),  # more blocks than add to one array
        (2, 24, 9, 7),  # channels that do not divide a block
        (1, 64, 5, 6),
        (3, 1, 40, 41),  # one channel
        (1, 5, 1, 1),  # nothing to sum but time
        (2, 128, 1, 1),
    ],
)
def test_sums_equal_those_of_stepping(
    shape: tuple[int, ...], channels_last: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    backward = BoundStep.backward

    def counted(self: BoundStep, *arguments: object) -> list[Tensor | None]:
        ran.append(len(self.reduced))
        return backward(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(BoundStep, "backward", counted)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model = PerChannel(shape[1], shape[2]).double()
        x = torch.randn(T * shape[0], *shape[1:], dtype=torch.float64)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        x_seq = x.unflatten(0, (T, shape[0]))
        net = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0])
        for _ in range(4):
            net.zero_grad()
            given = x_seq.detach().requires_grad_()
            (net(given) * weights(x_seq)).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert ran
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    assert max(ran) == sum(size < elements for size in (shape[1], shape[1], shape[2]))
    found = [given.grad, *(p.grad for p in net.parameters())]
    for a, b in zip(found, gradients(model, x_seq), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
