"""Time folds into the batch and back without a change of the memory format."""

from __future__ import annotations

import pytest
import torch

import snnfx
from snnfx.ops.time_folding import fold_time, unfold_time


@pytest.mark.parametrize(("T", "N"), [(3, 2), (3, 1), (1, 2), (1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_unfolded_steps_keep_the_memory_format(T: int, N: int, memory_format: torch.memory_format) -> None:
    y = torch.randn(T * N, 2, 3, 4).contiguous(memory_format=memory_format)
    y_seq = unfold_time(y, T)
    assert y_seq.shape == (T, N, 2, 3, 4)
    assert torch.equal(fold_time(y_seq), y)
    for t, step in enumerate(y_seq):
        assert torch.equal(step, y[t * N : (t + 1) * N])
        assert step.is_contiguous(memory_format=memory_format)
        assert step.stride(0) >= max(step.stride()[1:])  # torch's BatchNorm compares it


def test_a_norm_that_runs_step_by_step_on_one_channels_last_sample_has_the_gradient_of_the_model() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.lif = torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), snnfx.neuron.LIFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lif(self.norm(self.conv(x)))  # type: ignore[no-any-return]

    model = Model().double().eval()
    model.norm.register_forward_hook(lambda module, args, y: y * 1.5)
    torch.nn.init.normal_(model.norm.weight, 1.0, 0.3)
    x_seq = torch.randn(3, 1, 2, 6, 6, dtype=torch.float64)
    weights = torch.randn(3, 1, 4, 4, 4, dtype=torch.float64)
    given = x_seq.clone().requires_grad_()
    (torch.stack([model(x) for x in given]) * weights).sum().backward()
    net = snnfx.convert(model, example_inputs=x_seq[0], step_mode="m").eval()
    images = x_seq.flatten(0, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    for _ in range(3):
        images.grad = None
        (net(unfold_time(images, 3)) * weights).sum().backward()
        assert images.grad is not None
        torch.testing.assert_close(images.grad.unflatten(0, (3, 1)), given.grad)
