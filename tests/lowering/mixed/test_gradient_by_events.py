"""The product `x^T grad` that visits the elements of `x` that are not zero, against the product in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.mixed import gradient_by_events
from snnfx.lowering.mixed.gradient_by_events import build_product_by_events, product_by_events

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True, params=[1, 2])
def every_product_is_by_events(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gradient_by_events, "_LEAST_WORK", 0)
    monkeypatch.setattr(gradient_by_events, "_MOST_DENSE", 1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(threads)


def assert_product(x: Tensor, grad: Tensor) -> None:
    build_product_by_events(x.dtype)
    found = product_by_events(x, grad)
    assert found is not None
    wanted = torch.einsum("tnm,tnk->mk", grad.double(), x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4 if x.dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("T", "N", "K", "M"), [(1, 1, 1, 1), (7, 3, 65, 70), (129, 1, 64, 16), (20, 16, 256, 256), (3, 5, 2100, 17)]
)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
def test_spikes_and_numbers_of_any_size(dtype: torch.dtype, T: int, N: int, K: int, M: int, density: float) -> None:
    torch.manual_seed(0)
    x, grad = torch.rand(T, N, K, dtype=dtype) < density, torch.randn(T, N, M, dtype=dtype)
    assert_product(x.to(dtype), grad)
    assert_product(x * torch.randn(T, N, K, dtype=dtype), grad)


def test_strided_operands() -> None:
    x = (torch.rand(10, 4, 60) < 0.2).float()
    assert_product(x[::2, :, ::2], torch.randn(5, 33, 4).mT)
    assert_product(x[:1].expand(5, 4, 60), torch.randn(5, 1, 33).expand(5, 4, 33))


def test_a_negative_zero_is_a_zero() -> None:
    x = torch.full((3, 2, 40), -0.0)
    x[1, 1, 7] = -1.0
    assert_product(x, torch.randn(3, 2, 20))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("outputs", [16, 37, 200])
def test_a_gradient_that_is_not_finite_is_left_to_the_dense_product(value: float, outputs: int) -> None:
    x = (torch.rand(9, 4, 50) < 0.2).float()
    for place in (0, outputs // 2, outputs - 1):
        grad = torch.randn(9, 4, outputs)
        grad[5, 2, place] = value
        build_product_by_events(x.dtype)
        assert product_by_events(x, grad) is None


def test_an_input_that_is_not_finite_reaches_its_row() -> None:
    x = torch.zeros(4, 2, 30)
    x[2, 1, 3] = float("nan")
    build_product_by_events(x.dtype)
    found = product_by_events(x, torch.randn(4, 2, 18))
    assert found is not None
    assert found[:, 3].isnan().all()
    assert not found[:, 4].isnan().any()
