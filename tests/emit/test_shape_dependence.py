"""States whose shape decides the result of a step are not expanded to their final shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError

Read = Callable[[Tensor], Tensor]

READS: dict[str, Read] = {
    "sum": lambda p: p.sum(),
    "sum over samples": lambda p: (0.5 * p).sum(0, keepdim=True),
    "softmax over samples": lambda p: p.softmax(0),
    "cumsum": lambda p: p.cumsum(-1),
    "norm": lambda p: p.norm(),
    "size": lambda p: p * p.shape[0],
    "numel": lambda p: p * p.numel(),
    "reshape": lambda p: p.reshape(-1).sum(),
    "layer_norm": lambda p: nn.functional.layer_norm(p, (4,)),
    "linear": lambda p: nn.functional.linear(p, torch.eye(4)),
    "relu": torch.relu,
    "mean": lambda p: p.mean(-1, keepdim=True),
}


class Reader(nn.Module):
    """Reads its state, and replaces it by one of the final shape, in a loop or without one."""

    def __init__(self, read: Read, first: Tensor, is_loop: bool) -> None:
        super().__init__()
        self.read, self.v, self.is_loop = read, first, is_loop

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.read(self.v)
        self.v = 0.5 * self.v + x if self.is_loop else 2 * x
        return y


@pytest.mark.parametrize("is_loop", [False, True])
@pytest.mark.parametrize("shape", [(), (4,), (1, 4), (1, 1), (5, 1), (5, 4)])
@pytest.mark.parametrize("name", READS)
def test_a_first_state_of_another_shape_is_right_or_refused(name: str, shape: tuple[int, ...], is_loop: bool) -> None:
    x_seq = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    first = 1 + torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    stepped = Reader(READS[name], first.clone(), is_loop)
    try:
        expected = torch.stack([stepped(x) for x in x_seq])
    except (RuntimeError, IndexError):
        pytest.skip("the model cannot run")
    net = snnfx.convert(Reader(READS[name], first.clone(), is_loop))
    try:
        actual = net(x_seq)
    except InputError as error:
        assert error.code == "SNNFX313" and shape != (5, 4)
    else:
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["relu", "linear", "layer_norm", "mean"])
def test_a_read_that_does_not_depend_on_the_batch_is_not_refused(name: str) -> None:
    x_seq, first = torch.rand(3, 5, 4), torch.rand(1, 4)
    stepped = Reader(READS[name], first, False)
    expected = torch.stack([stepped(x) for x in x_seq])
    torch.testing.assert_close(snnfx.convert(Reader(READS[name], first, False))(x_seq), expected)


def test_a_sum_over_a_first_state_of_zeros_is_not_refused() -> None:
    x_seq = torch.rand(3, 5, 4)
    stepped = Reader(READS["sum over samples"], torch.zeros(1, 4), False)
    expected = torch.stack([stepped(x) for x in x_seq])
    net = snnfx.convert(Reader(READS["sum over samples"], torch.zeros(1, 4), False))
    torch.testing.assert_close(net(x_seq), expected)


def test_the_hint_for_a_state_whose_shape_decides_the_result_works() -> None:
    x_seq = torch.rand(3, 5, 4)
    first = torch.ones(1, 4).expand(5, 4).clone()  # its final shape
    stepped = Reader(READS["sum"], first, False)
    expected = torch.stack([stepped(x) for x in x_seq])
    torch.testing.assert_close(snnfx.convert(Reader(READS["sum"], first, False))(x_seq), expected)
