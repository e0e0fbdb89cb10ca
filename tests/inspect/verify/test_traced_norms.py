"""BatchNorm layers with a forward of their own, such as those that count their batches and activate."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx


class NormAndActivation(nn.BatchNorm2d):
    """Counts its batches in its own forward, like layers of image models."""

    in_place: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.in_place:
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr, operator]
        elif self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
        mean, variance = self.running_mean, self.running_var
        y = F.batch_norm(x, mean, variance, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(y)


class Assigned(NormAndActivation):
    in_place = False


class Image(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.plain = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.second, self.norm = nn.Conv2d(4, 4, 3), norm(4)
        self.lif = snnfx.neuron.LIFNode(v_threshold=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.norm(self.second(self.plain(self.first(x)))))


@pytest.mark.filterwarnings("ignore:SNNFX112", "ignore:SNNFX504")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
@pytest.mark.parametrize("norm", [NormAndActivation, Assigned])
def test_a_norm_with_its_own_forward_has_statistics_of_each_step(
    norm: Any, batch_norm: Any, with_examples: bool, training: bool
) -> None:
    torch.manual_seed(0)
    model, x_seq = Image(norm).double().train(training), torch.rand(4, 2, 3, 8, 8, dtype=torch.float64)
    net = snnfx.convert(model, batch_norm=batch_norm, example_inputs=(x_seq[0],) if with_examples else None)
    snnfx.verify(model, net, x_seq)
    net(x_seq)
    assert int(model.norm.num_batches_tracked) == (4 if training else 0)
