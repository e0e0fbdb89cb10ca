"""A net that is planned again after its model was stepped starts from the same state as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import snnfx

pytestmark = pytest.mark.filterwarnings("ignore::snnfx.errors.SnnfxWarning")


class PlainState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.log, self.leak = torch.full((3,), 0.25), {"mean": 0.5}, 0.5

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x = 2 * x
        self.v = self.leak * self.v + x
        self.log["mean"] = 0.5 * self.log["mean"] + self.v.mean()
        return self.v + self.log["mean"]


def stepped_reference(model: nn.Module, x_seq: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    return torch.stack([model(x) for x in x_seq])


@pytest.mark.parametrize("reason", ["rank", "setting", "mode"])
def test_the_first_state_is_that_of_the_conversion(reason: str) -> None:
    model, x_seq = PlainState(), torch.rand(4, 2, 3)
    net, fresh = snnfx.convert(model), copy.deepcopy(model)
    with torch.no_grad():
        model(torch.rand(2, 3))
    left = (model.v, dict(model.log))
    if reason == "rank":
        x_seq = x_seq[:, 0]
    elif reason == "setting":
        model.leak = fresh.leak = 0.75
    with torch.set_grad_enabled(reason != "mode"):
        torch.testing.assert_close(net(x_seq), stepped_reference(fresh, x_seq))
    assert model.v is left[0] and model.log == left[1]
