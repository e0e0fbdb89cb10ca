"""BatchNorm of each step, in every memory format that a step may come in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnfx.ops.step_batch_norm import batch_norm_per_step, normalize_steps

LAYOUTS = {
    "row-major": lambda x: x,
    "a slice of a larger tensor": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
    "channels-last": lambda x: x.movedim(2, -1).contiguous().movedim(-1, 2),
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "time innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda x: x[:, :, :, :1].expand_as(x),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_call_after_the_other(layout: str, dims: int, affine: bool) -> None:
    torch.manual_seed(0)
    cls = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    module, reference = (cls(3, affine=affine).double() for _ in range(2))
    x_seq = LAYOUTS[layout](torch.rand(4, 5, 3, *range(4, 4 + dims), dtype=torch.float64))
    weight = LAYOUTS[layout](torch.rand(x_seq.shape, dtype=torch.float64))
    given, expected_given = (x_seq.detach().requires_grad_() for _ in range(2))

    got, expected = normalize_steps(given, module), torch.stack([reference(x) for x in expected_given])
    torch.testing.assert_close(got, expected)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(given.grad, expected_given.grad)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(module.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_statistics_of_a_slice_without_running_statistics() -> None:
    module = nn.BatchNorm1d(2, track_running_stats=False).eval()
    x_seq: Tensor = torch.rand(3, 4, 2, 6)[..., :3]
    torch.testing.assert_close(normalize_steps(x_seq, module), torch.stack([module(x) for x in x_seq]))


@pytest.mark.parametrize("affine", [True, False])
def test_the_gradient_has_a_gradient(affine: bool) -> None:
    norm = nn.BatchNorm2d(3, affine=affine).double()
    if affine:
        nn.init.uniform_(norm.weight)

    def penalty(normalized: Any) -> list[Tensor]:
        x_seq = torch.rand(4, 2, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x_seq = x_seq.transpose(3, 4).requires_grad_()
        weight = torch.rand(x_seq.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        (grad,) = torch.autograd.grad((normalized(x_seq) * weight).sum(), x_seq, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [x_seq, *list(norm.parameters())[:1]]))

    expected = penalty(lambda x_seq: torch.stack([norm(x) for x in x_seq]))
    for found, wanted in zip(penalty(lambda x_seq: batch_norm_per_step(x_seq, norm)), expected, strict=True):
        torch.testing.assert_close(found, wanted)
