"""Writes into tensors of a step, by masks and in place: kernels equal the stepped model, or the step is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.stepping import assert_converts

T, N, C = 6, 3, 5


def x_seq() -> Tensor:
    return torch.randn(T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def masked_number(v: Tensor, w: Tensor) -> Tensor:
    y = v * w
    y[v > 0] = 0.25
    return y


def two_masks(v: Tensor, w: Tensor) -> Tensor:
    y = torch.zeros_like(v)
    y[v > 0] = (v * w)[v > 0]
    y[(v > -1) & (v <= 0)] = 0.5
    return y


def arithmetic_on_selected(v: Tensor, w: Tensor) -> Tensor:
    y, mask = v * 1.0, v > 0.2
    part = v[mask]
    y[mask] = part * 2 - torch.tanh(part) + y[mask] / 3
    return y


def added_in_place(v: Tensor, w: Tensor) -> Tensor:
    y = v.clone()
    y[v < 0] += 0.5
    y[v < 0] *= 0.1
    return y * w


def selected_by_method(v: Tensor, w: Tensor) -> Tensor:
    mask = v > 0
    return torch.zeros_like(v).masked_scatter(mask, v.masked_select(mask) * 2)


STEPS = [masked_number, two_masks, arithmetic_on_selected, added_in_place, selected_by_method]


@pytest.mark.parametrize("step", STEPS)
def test_a_masked_write_is_a_choice_of_each_element(step: Any) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(0.5, 1.5, C))
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            v = x if self.v is None else 0.8 * self.v + x
            self.v = step(v, self.w)
            return self.v

    net = assert_converts(Plain().double(), x_seq(), examples=True)
    assert snnfx.explain(net).kernels[0].startswith("One kernel"), snnfx.explain(net).kernels


def view_is_written(v: Tensor) -> Tensor:
    y = v * 1.0
    y.view(-1)[0] = 7.0
    return y


def view_is_read_after_a_write(v: Tensor) -> Tensor:
    y = v * 1.0
    rows = y[:, :1]
    y[v > 0] = 0.0
    return y + rows


def other_mask(v: Tensor) -> Tensor:
    y = v * 1.0
    y[v > 0] = v[v.flip(0) > 0][: int((v > 0).sum())].mean()
    return y


def size_of_selected(v: Tensor) -> Tensor:
    return v * v[v > 0].shape[0]


def sum_of_selected(v: Tensor) -> Tensor:
    return v + v[v > 0].sum()


def writing_neuron(write: Callable[[Tensor], Tensor]) -> nn.Module:
    """A neuron whose autograd.Function writes in its forward, where capture does not see it."""

    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            return write(v)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.v = Surrogate.apply(x if self.v is None else 0.8 * self.v + x)
            return self.v

    return Writes()


def alias_of_the_whole(v: Tensor) -> Tensor:
    y = v * 2.0
    other = y.detach()
    y[v > 0] = 0.0
    y += 1.0
    return y + other


def test_an_alias_of_the_whole_tensor_changes_with_it() -> None:
    net = assert_converts(writing_neuron(alias_of_the_whole), x_seq(), examples=True)
    assert snnfx.explain(net).kernels[0].startswith("One kernel"), snnfx.explain(net).kernels


@pytest.mark.parametrize(
    "write", [view_is_written, view_is_read_after_a_write, size_of_selected, sum_of_selected, other_mask]
)
def test_another_use_of_memory_or_size_is_stepped(write: Any) -> None:
    net = assert_converts(writing_neuron(write), x_seq(), examples=True)
    assert not snnfx.explain(net).kernels[0].startswith("One kernel")


INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda k: k + 3,
    "wraps": lambda k: k * 6364136223846793005 + 1442695040888963407 if k.dtype == torch.int64 else k * 65539 + 7,
    "linear congruence": lambda k: (k * 1103515245 + 12345) % 2147483647,
    "floor": lambda k: (k - 7) // 3 + 2,
    "truncated": lambda k: torch.div(k - 7, 3, rounding_mode="trunc"),
    "remainder": lambda k: torch.remainder(-k - 5, 4),
    "clamp": lambda k: (k - 1).clamp(min=0) + torch.where(k == 0, 4, 0),
    "sign": lambda k: k.abs() - k.sign() + 2,
    "compare with a fraction": lambda k: k + (k > 2.5).to(k),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_exact(name: str, dtype: torch.dtype) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k: Any = None

        def forward(self, x: Tensor) -> Tensor:
            k = torch.ones_like(x, dtype=dtype) if self.k is None else self.k
            self.k = INTEGERS[name](k)
            return self.k + (x > 0).to(dtype)

    net = assert_converts(Counter(), x_seq(), examples=True)
    kernels = snnfx.explain(net).kernels
    assert name == "wraps" or all(line.startswith("One kernel") for line in kernels), kernels
