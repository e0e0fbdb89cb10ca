"""Products that visit only non-zero inputs equal PyTorch's, for random settings, densities and values."""

from __future__ import annotations

import math
import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from snnfx.lowering.events.event_gradients import gradient_by_events
from snnfx.lowering.events.event_kernel import checksum, estimate_density, fits_lists, product, weight_gradient
from snnfx.lowering.events.geometry import LINEAR, convolution
from snnfx.lowering.events.packed_weights import pack, packed_weight, unpack

CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def sparse(shape: tuple[int, ...], density: float, values: str, dtype: torch.dtype) -> Tensor:
    active = torch.rand(shape) < density
    x = torch.ones(shape, dtype=dtype) if values == "ones" else torch.randn(shape, dtype=dtype)
    if values == "mixed":
        x = torch.where(torch.rand(shape) < 0.5, torch.ones((), dtype=dtype), x)
    return torch.where(active, x, torch.zeros((), dtype=dtype))


def assert_near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("seed", range(120))
def test_a_convolution_of_events_equals_the_dense_one(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dims, groups = draw.choice((1, 2, 2, 2, 3)), draw.choice((1, 1, 2, 3))
    channels, outputs = groups * draw.choice((1, 3, 17, 64, 70, 130)), groups * draw.choice((1, 5, 16, 40, 64, 67, 140))
    kernel = tuple(draw.randint(1, 3 if dims == 3 else 5) for _ in range(dims))
    dilation = tuple(draw.randint(1, 2) for _ in range(dims))
    size = tuple(d * (k - 1) + draw.randint(1, 7) for k, d in zip(kernel, dilation, strict=True))
    stride = tuple(draw.randint(1, 3) for _ in range(dims))
    padding = tuple(draw.randint(0, 3) for _ in range(dims))
    dtype = draw.choice((torch.float32, torch.float64))
    density, values = draw.choice((0.0, 0.05, 0.3, 1.0)), draw.choice(("ones", "any", "mixed"))
    x = sparse((draw.randint(1, 5), channels, *size), density, values, dtype)
    weight = torch.randn(outputs, channels // groups, *kernel, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype) if draw.random() < 0.5 else None
    expected = CONVOLUTIONS[dims](x, weight, bias, stride, padding, dilation, groups)
    if draw.random() < 0.5:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    geometry = convolution(weight, stride, padding, dilation, groups)
    assert geometry is not None
    actual = product(x, geometry, outputs, pack(weight, groups), bias)
    assert_near(actual, expected)
    assert torch.equal(unpack(pack(weight, groups), weight.shape, groups), weight)
    grad = torch.randn_like(expected)
    weight.requires_grad_()
    (expected_gradient,) = torch.autograd.grad(
        CONVOLUTIONS[dims](x, weight, bias, stride, padding, dilation, groups), weight, grad
    )
    tiles = weight_gradient(x, geometry, outputs, grad)
    assert tiles is not None
    assert_near(unpack(tiles, weight.shape, groups), expected_gradient)


@pytest.mark.parametrize("seed", range(40))
def test_a_linear_layer_of_events_equals_the_dense_one(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    shape = tuple(draw.randint(1, 12) for _ in range(draw.randint(0, 3)))
    inputs, outputs = draw.choice((1, 63, 64, 65, 1024, 1100, 3000)), draw.choice((1, 16, 33, 64, 65, 200))
    dtype = draw.choice((torch.float32, torch.float64))
    x = sparse((*shape, inputs), draw.choice((0.0, 0.07, 0.5, 1.0)), draw.choice(("ones", "any", "mixed")), dtype)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    bias = torch.randn(outputs, dtype=dtype) if draw.random() < 0.5 else None
    assert_near(product(x, LINEAR, outputs, pack(weight, 1), bias), functional.linear(x, weight, bias))
    grad = torch.randn(*shape, outputs, dtype=dtype)
    expected_gradient = grad.reshape(-1, outputs).T @ x.reshape(-1, inputs)
    tiles = weight_gradient(x, LINEAR, outputs, grad)
    assert tiles is not None
    assert_near(unpack(tiles, weight.shape, 1), expected_gradient)


@pytest.mark.parametrize(
    ("channels", "width", "kernel", "stride", "dilation"),
    [(64, 900, 3, 1, 1), (5, 40000, 2, 3, 1), (300, 300, 31, 2, 1), (64, 700, 2, 1, 300), (64, 700, 3, 4, 7)],
)
def test_long_lines(channels: int, width: int, kernel: int, stride: int, dilation: int) -> None:
    """Lines whose columns have more rows than 16 bits can number, and kernels wider than a block."""
    x, weight = sparse((2, channels, width), 0.1, "mixed", torch.float64), torch.randn(9, channels, kernel).double()
    geometry = convolution(weight, (stride,), (kernel // 2,), (dilation,), 1)
    assert geometry is not None and fits_lists(geometry, channels)
    expected = functional.conv1d(x, weight, None, stride, kernel // 2, dilation)
    assert_near(product(x, geometry, 9, pack(weight, 1), None), expected)


def test_a_kernel_wider_than_the_numbers_of_a_list_is_refused() -> None:
    geometry = convolution(torch.randn(9, 64, 2000), (1,), (0,), (1,), 1)
    assert geometry is not None and not fits_lists(geometry, 64)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_paddings_by_name(padding: str) -> None:
    x, weight = sparse((2, 8, 9, 9), 0.2, "ones", torch.float64), torch.randn(5, 8, 3, 5, dtype=torch.float64)
    geometry = convolution(weight, (1, 1), padding, (1, 2), 1)
    assert geometry is not None
    expected = functional.conv2d(x, weight, None, 1, padding, (1, 2))
    assert_near(product(x, geometry, 5, pack(weight, 1), None), expected)


def test_uneven_padding_is_refused() -> None:
    assert convolution(torch.randn(5, 8, 2, 2), (1, 1), "same", (1, 1), 1) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_reach_the_outputs(value: float) -> None:
    x = sparse((2, 8, 6, 6), 0.2, "ones", torch.float64)
    x[1, 3, 2, 2] = value
    weight = torch.randn(5, 8, 3, 3, dtype=torch.float64)
    geometry = convolution(weight, (1, 1), (1, 1), (1, 1), 1)
    assert geometry is not None
    actual, expected = product(x, geometry, 5, pack(weight, 1), None), functional.conv2d(x, weight, None, 1, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dims", [0, 2])
def test_gradients_that_are_not_finite_reach_the_weight(dims: int, value: float) -> None:
    shape = (40, 16) if dims == 0 else (2, 16, 6, 6)
    x = sparse(shape, 0.2, "ones", torch.float64)
    weight = torch.randn(8, 16, *(3,) * dims, dtype=torch.float64, requires_grad=True)
    geometry = convolution(weight, (1, 1), (1, 1), (1, 1), 1) if dims else LINEAR
    assert geometry is not None
    y = functional.conv2d(x, weight, None, 1, 1) if dims else functional.linear(x, weight)
    grad = torch.randn_like(y)
    grad.view(-1)[7] = value
    (expected,) = torch.autograd.grad(y, weight, grad)
    assert not expected.isfinite().all()
    actual = gradient_by_events(grad, x, weight.detach(), geometry)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_does_not_change_the_result(threads: int) -> None:
    x, weight = sparse((3, 40, 12, 12), 0.2, "any", torch.float32), torch.randn(70, 40, 3, 3)
    geometry = convolution(weight, (1, 1), (1, 1), (1, 1), 1)
    assert geometry is not None
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = product(x, geometry, 70, pack(weight, 1), None)
        torch.set_num_threads(threads)
        assert torch.equal(product(x, geometry, 70, pack(weight, 1), None), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(3, 5), (40, 64), (100, 999), (64, 32, 32, 8)])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_the_density_is_estimated(shape: tuple[int, ...], density: float) -> None:
    x = sparse(shape, density, "ones", torch.float32)
    exact = (x != 0).double().mean().item()
    assert estimate_density(x) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("elements", [1, 63, 64, 1000, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_checksum_sees_every_change(elements: int, dtype: torch.dtype) -> None:
    weight = torch.randn(elements, dtype=dtype)
    before = checksum(weight)
    assert checksum(weight.clone()) == before
    for k in {0, elements // 2, elements - 1}:
        changed = weight.clone()
        changed[k] = -changed[k]
        assert checksum(changed) != before
    if elements > 64:
        weight[[0, 64]] = -weight[[0, 64]]  # in one lane
        assert checksum(weight) != before


def test_a_weight_is_packed_once_until_it_changes() -> None:
    weight = torch.randn(8, 16)
    first = packed_weight(weight, 1)
    assert packed_weight(weight, 1) is first
    weight.mul_(2)
    second = packed_weight(weight, 1)
    assert second is not first
    weight.data[3, 3] += 1  # the version counter misses it
    third = packed_weight(weight, 1)
    assert third is not second
    assert torch.equal(third.tiles, pack(weight, 1))


def test_packed_weights_are_released_with_the_weight() -> None:
    from snnfx.lowering.events import packed_weights

    weight = torch.randn(8, 16)
    tiles = weakref.ref(packed_weight(weight, 1).tiles)
    assert tiles() is not None and weight in packed_weights._packed
    del weight
    assert tiles() is None
