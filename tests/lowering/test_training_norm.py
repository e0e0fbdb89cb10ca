"""BatchNorm as per-channel factors equals torch's BatchNorm over all steps and samples."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from snnfx.lowering.batch_norm.channel_kernel import channel_statistics
from snnfx.lowering.batch_norm.training_norm import GradientOwner, channel_factors, takes_channel_factors

SHAPES = [(3, 4, 5, 6, 7), (3, 2, 300, 9), (4, 33, 7), (1, 2, 3, 40, 50), (2, 1, 3, 33, 70), (2, 3, 1, 5, 4)]
NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm1d, 5: nn.BatchNorm2d, 6: nn.BatchNorm3d}


def sequence(shape: tuple[int, ...], channels_last: bool = False, mean: float = 10.0) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 3 + mean
    if channels_last and len(shape) == 5:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    return x


def normalized(x_seq: Tensor, norm: nn.Module, is_new: bool = False) -> Tensor:
    """The BatchNorm by its factors."""
    assert takes_channel_factors(x_seq, norm)  # type: ignore[arg-type]
    y, mean, scale, bias = channel_factors(x_seq, norm, GradientOwner(is_new))  # type: ignore[arg-type]
    return (y - mean) * scale + bias


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.5}]
)
def test_values_gradients_and_buffers_are_those_of_torch(
    shape: tuple[int, ...], channels_last: bool, settings: dict[str, object]
) -> None:
    torch.manual_seed(1)
    norm = NORMS[len(shape)](shape[2], **settings).double()  # type: ignore[arg-type]
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    expected_norm = copy.deepcopy(norm)
    for _ in range(2):
        x, expected_x = (sequence(shape, channels_last).requires_grad_() for _ in range(2))
        y = normalized(x, norm).tanh()
        expected = expected_norm(expected_x.flatten(0, 1)).unflatten(0, shape[:2]).tanh()
        grad = torch.randn_like(expected)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(x.grad, expected_x.grad, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(norm.parameters(), expected_norm.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-11)
    for found, wanted in zip(norm.buffers(), expected_norm.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_a_large_mean_does_not_cancel_the_variance(mean: float) -> None:
    x = sequence((4, 8, 6, 20, 20), mean=mean).float().flatten(0, 1)
    for batch in (x, x.contiguous(memory_format=torch.channels_last)):
        factors = channel_statistics(batch, None, None, None, 0.0, 0.0)
        variance, expected_mean = torch.var_mean(batch.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(factors[0].double(), expected_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(factors[3].double(), variance.rsqrt(), rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("frozen", ["weight", "bias", "input"])
def test_frozen_tensors_get_no_gradient(frozen: str) -> None:
    norm = nn.BatchNorm2d(5).double()
    x = sequence((3, 4, 5, 6, 7)).requires_grad_(frozen != "input")
    if frozen != "input":
        getattr(norm, frozen).requires_grad_(False)
    expected_norm, expected_x = copy.deepcopy(norm), x.detach().clone().requires_grad_(x.requires_grad)
    grad = torch.randn(x.shape, dtype=x.dtype)
    normalized(x, norm).backward(grad)
    expected_norm(expected_x.flatten(0, 1)).unflatten(0, (3, 4)).backward(grad)
    for found, wanted in ((x, expected_x), (norm.weight, expected_norm.weight), (norm.bias, expected_norm.bias)):
        assert (found.grad is None) == (wanted.grad is None)
        if found.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-11)


def test_a_gradient_that_others_read_is_not_changed() -> None:
    norm, x = nn.BatchNorm1d(7), torch.randn(4, 33, 7, requires_grad=True)
    y, _, scale, bias = channel_factors(x, norm, GradientOwner())
    grads = torch.randn_like(y), torch.randn(7), torch.randn(7)
    kept = [g.clone() for g in grads]
    torch.autograd.backward([y, scale, bias], list(grads))
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


def test_batched_gradients() -> None:
    norm = nn.BatchNorm1d(3).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w, b: normalized(x, norm), (x, norm.weight, norm.bias), check_batched_grad=True
    )


def test_one_value_per_channel_raises_the_error_of_torch() -> None:
    norm = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        channel_factors(torch.randn(1, 1, 3), norm, GradientOwner())
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x_seq", "norm"),
    [
        (torch.randn(2, 3, 4), nn.BatchNorm1d(4).eval()),
        (torch.randn(2, 3, 4).half(), nn.BatchNorm1d(4)),
        (torch.randn(2, 3, 4), nn.BatchNorm1d(4).double()),
        (torch.randn(3, 2, 4).transpose(0, 1), nn.BatchNorm1d(4)),
        (torch.randn(2, 3, 4, 5).transpose(2, 3), nn.BatchNorm1d(5)),
    ],
    ids=["eval", "half", "other dtype", "time not first", "strided"],
)
def test_other_sequences_are_left_to_torch(x_seq: Tensor, norm: nn.BatchNorm1d) -> None:
    assert not takes_channel_factors(x_seq, norm)
