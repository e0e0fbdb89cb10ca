"""Max pooling by a kernel equals torch's, in values, gradients, layout and treatment of NaN."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from snnfx.lowering.pooling.max_pool import max_pool

SHAPES = [(2, 3, 8, 8), (3, 65, 7, 9), (1, 1, 5, 6), (2, 300, 4, 5), (1, 2, 3, 601), (4, 5, 2, 2)]
WINDOWS: list[tuple[Any, Any]] = [(2, 2), (1, 1), ((2, 3), (3, 3)), ((1, 2), (2, 5)), (2, None), (3, 4)]
CASES = [(shape, window) for shape, window in itertools.product(SHAPES, WINDOWS) if shape[2] > 2 or window[0] in (1, 2)]


def images(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Images with equal elements, and with NaN and infinities in the first sample."""
    torch.manual_seed(0)
    x = torch.randint(0, 3, shape).to(dtype)
    x[0, 0, 0, 1], x[0, -1, 1, 0], x[0, 0, 1, 1] = float("nan"), float("inf"), -float("inf")
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "window"), CASES)
def test_values_gradients_and_layout_are_those_of_torch(
    shape: tuple[int, ...], window: tuple[Any, Any], channels_last: bool
) -> None:
    for dtype in (torch.float32, torch.float64):
        x, expected_x = (images(shape, dtype, channels_last).requires_grad_() for _ in range(2))
        y, expected = max_pool(x, *window), functional.max_pool2d(expected_x, *window)
        assert type(y.grad_fn).__name__ == "_MaxPoolBackward"
        assert torch.equal(y.nan_to_num(7.5), expected.nan_to_num(7.5))
        last = torch.channels_last if channels_last else torch.contiguous_format
        assert y.is_contiguous(memory_format=last)
        grad = torch.randn(expected.shape, dtype=dtype)
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], torch.autograd.grad(expected, expected_x, grad)[0])
        assert torch.equal(max_pool(x.detach(), *window).nan_to_num(7.5), expected.nan_to_num(7.5))


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [((3, 2), (1, 2, 7, 7)), ((2, 2, 1), (1, 2, 7, 7)), ((2, 1, 0, 2), (1, 2, 7, 7)), ((2, 2), (2, 7, 7))],
)
def test_other_windows_run_in_torch(arguments: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = max_pool(x, *arguments)
    assert type(y.grad_fn).__name__ != "_MaxPoolBackward"
    assert torch.equal(y, functional.max_pool2d(x, *arguments))


def test_rounding_up_of_the_size_runs_in_torch() -> None:
    x = torch.randn(1, 2, 5, 5)
    assert torch.equal(max_pool(x, 2, ceil_mode=True), functional.max_pool2d(x, 2, ceil_mode=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_first_batched_and_second_derivatives(channels_last: bool) -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    x = (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: max_pool(x, 2), x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: max_pool(x, 2), x)


def test_a_gradient_in_another_layout() -> None:
    x = torch.randn(2, 3, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 3, 3, 2).transpose(2, 3)
    expected = torch.autograd.grad(functional.max_pool2d(x, 2), x, grad)[0]
    assert torch.equal(torch.autograd.grad(max_pool(x, 2), x, grad)[0], expected)


def test_one_and_several_threads_agree() -> None:
    x = torch.randn(16, 8, 32, 32, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = max_pool(x, 2)
            results.append((y, torch.autograd.grad(y.square().sum(), x)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for found in results[1:] for a, b in zip(found, results[0], strict=True))
