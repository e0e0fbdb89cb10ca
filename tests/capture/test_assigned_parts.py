"""Assignment to a part of a value, `x[:, 0] = y`: later reads return the new value, other values stay unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError
from support.stepping import assert_converts

X_SEQ = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.3
Y_SEQ = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model_of(forward: Callable[..., Tensor], **parts: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = type("Step", (nn.Module,), {"forward": forward})()
    model.fc = nn.Linear(5, 5)
    for name, part in parts.items():
        model.add_module(name, part)
    return model.double()


def a_column(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[:, 0] = 0
    return y * 2


def a_slice_of_another_value(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[:, 1:3] = x[:, 2:4]
    return y


def from_the_right(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[..., -1] = y[..., 0] * 2
    return y


def twice(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[:, 0] = 1.0
    z = y + 1
    y[:, 1] = z[:, 0]
    return y + z


def a_mask(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[y < 0] = 0.5
    return y


def a_mask_of_another_value(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[x > 0.1] = -1.0
    return y


def a_mask_and_a_tensor(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[x > 0.1] = x.mean()
    return y


def one_sample(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[0] = 0
    return y


def added_to_a_part(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y[:, :2] += x[:, 3:]
    y[:, 4] *= 3
    return y


def a_tensor_made_of_sizes(self: Any, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 7, dtype=x.dtype)
    y[:, 1:6] = self.fc(x)
    return y


def in_a_loop(self: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for i in range(5):
        y[:, i] = self.fc(x)[:, 4 - i]
    return y


FORWARDS = [
    a_column,
    a_slice_of_another_value,
    from_the_right,
    twice,
    a_mask,
    a_mask_of_another_value,
    a_mask_and_a_tensor,
    one_sample,
    added_to_a_part,
    a_tensor_made_of_sizes,
    in_a_loop,
]


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_assignment_to_a_part_matches_stepping(forward: Callable[..., Tensor]) -> None:
    assert_converts(model_of(forward), X_SEQ)


def test_assignment_to_all_samples_is_folded() -> None:
    net = snnfx.convert(model_of(a_slice_of_another_value), example_inputs=(X_SEQ[0],))
    assert [region.kind for region in net.regions] == ["fold"]


def test_assignment_to_one_sample_is_not_folded() -> None:
    net = snnfx.convert(model_of(one_sample), example_inputs=(X_SEQ[0],))
    assert [region.kind for region in net.regions] == ["fold", "map"]


class ResetByAssignment(snnfx.MemoryModule):
    """A neuron that resets its potential by assignment to a part."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = torch.zeros_like(x)
        self.v = 0.9 * self.v + x
        spike = (self.v > 0.5).to(x)
        self.v[self.v > 0.5] = 0.1
        self.v[:, 0] *= 0.5
        return spike + self.v * 0.25


def test_state_may_be_assigned_to_in_parts() -> None:
    assert_converts(nn.Sequential(nn.Linear(5, 5), ResetByAssignment(), nn.Linear(5, 2)).double(), X_SEQ)


def test_the_callers_sequence_is_not_touched() -> None:
    net = snnfx.convert(model_of(a_column))
    x_seq = X_SEQ.clone()
    net(x_seq)
    assert torch.equal(x_seq, X_SEQ)


def of_the_input(self: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    return self.fc(x)


def of_a_view_of_the_input(self: Any, x: Tensor) -> Tensor:
    x.view(-1)[0] = 0
    return self.fc(x)


def of_a_view(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    y.transpose(0, 1)[0] = 0
    return y


def with_a_view_read_afterwards(self: Any, x: Tensor) -> Tensor:
    y = self.fc(x)
    first = y[:, 0]
    y[:, 0] = 0
    return y + first[:, None]


def of_a_tensor_made_without_the_input(self: Any, x: Tensor) -> Tensor:
    y = torch.zeros(3, 5, dtype=torch.float64)
    y[:, 0] = x[:, 0]
    return self.fc(x) + y


@pytest.mark.parametrize(
    ("forward", "code"),
    [
        (of_the_input, "SNNFX209"),
        (of_a_view_of_the_input, "SNNFX214"),
        (of_a_view, "SNNFX214"),
        (with_a_view_read_afterwards, "SNNFX214"),
        (of_a_tensor_made_without_the_input, "SNNFX214"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
@pytest.mark.parametrize("examples", [None, (X_SEQ[0],)], ids=["without examples", "with examples"])
def test_assignment_to_a_tensor_of_another_owner_is_refused(forward: Any, code: str, examples: Any) -> None:
    with pytest.raises(CaptureError) as raised:
        snnfx.convert(model_of(forward), example_inputs=examples)
    assert raised.value.code == code
    assert "test_assigned_parts.py:" in raised.value.where
    assert raised.value.why and raised.value.hint


def test_neurons_may_follow_an_assignment() -> None:
    assert_converts(nn.Sequential(model_of(a_column), neuron.LIFNode(), model_of(added_to_a_part)).double(), X_SEQ)
