"""Sizes that the first step reads: its tensors follow the batch of each call, and its decisions are checked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError, InputError
from support.stepping import assert_same, run_net, run_stepped

torch.set_num_threads(1)

ROW = torch.linspace(0.1, 0.6, 4, dtype=torch.float64).view(1, 4)


class StartsFrom(nn.Module):
    """A leaky integrator whose first state is a function of the first input."""

    def __init__(self, start: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.start, self.v = start, None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = self.start(x)
        self.v = 0.5 * self.v + x  # type: ignore[operator]
        return self.v


FROM_SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: x.new_zeros(x.shape[0], 4),
    "a value that depends on the batch": lambda x: torch.full((x.shape[0], 4), 1 / x.shape[0], dtype=x.dtype),
    "a fill value by keyword": lambda x: x.new_full((x.shape[0], 4), fill_value=0.1 * x.shape[0]),
    "ones times a row": lambda x: ROW.new_ones(x.shape[0], 1) * ROW,
    "repeat": lambda x: ROW.repeat(x.shape[0], 1),
    "expand": lambda x: ROW.expand(x.shape[0], -1),
    "broadcast_to": lambda x: ROW.broadcast_to(x.shape),
    "tile": lambda x: torch.tile(ROW, (x.shape[0], 1)),
    "repeat_interleave": lambda x: torch.repeat_interleave(ROW, x.shape[0], 0),
    "reshape": lambda x: ROW.expand(x.shape[0], 4).reshape(x.shape[0], -1),
}


@pytest.mark.parametrize("name", FROM_SIZES)
@pytest.mark.parametrize("lower", [None, "auto"])
def test_first_state_follows_the_batch_of_each_call(name: str, lower: str | None) -> None:
    model = StartsFrom(FROM_SIZES[name])
    net = snnfx.convert(model, example_inputs=torch.rand(3, 4, dtype=torch.float64), lower=lower)
    for batch in (4, 2, 1, 3, 4):
        x_seq = torch.rand(3, batch, 4, dtype=torch.float64)
        for _ in range(3):  # the last call is bound
            assert_same(vars(run_net(net, x_seq)), vars(run_stepped(model, x_seq)))


@pytest.mark.parametrize(
    ("decide", "other"),
    [
        (lambda x: x.dtype == torch.float64, torch.rand(3, 3, 4)),
        (lambda x: x.shape[0] == 3, torch.rand(3, 2, 4, dtype=torch.float64)),
        (lambda x: x.shape[1] > 3, torch.rand(3, 3, 2, dtype=torch.float64)),
    ],
    ids=["dtype", "batch", "features"],
)
def test_decision_about_the_first_state_is_checked(decide: Callable[[Tensor], bool], other: Tensor) -> None:
    model = StartsFrom(lambda x: torch.zeros_like(x) if decide(x) else torch.ones_like(x))
    x_seq = torch.rand(3, 3, 4, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    assert_same(vars(run_net(net, x_seq)), vars(run_stepped(model, x_seq)))
    with pytest.raises(InputError, match="SNNFX312 a condition on sizes or dtypes is False.*test_sizes_of_initial"):
        net(other)


def test_hint_of_a_checked_decision_is_followed() -> None:
    model = StartsFrom(lambda x: torch.zeros_like(x) if x.dtype == torch.float64 else torch.ones_like(x))
    x_seq = torch.rand(3, 3, 4)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.testing.assert_close(net(x_seq), run_stepped(model, x_seq).outputs)


def test_decision_of_every_step_is_checked_once() -> None:
    """The cold and the warm trace both contain it."""

    class Decides(StartsFrom):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.shape[1] == 4 else -x)

    model = Decides(lambda x: torch.zeros_like(x))
    net = snnfx.convert(model, example_inputs=torch.rand(3, 4))
    checks = [n for n in net.program.graph.nodes if getattr(n.target, "__name__", "") == "expect_size"]
    assert len(checks) == 1


def test_refusal_of_an_untraced_step_names_the_cause() -> None:
    """A state that appears when the untraced step runs; example inputs, which the hint once asked for, are given."""

    class Selects(StartsFrom):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward({4: x}[x.shape[1]])

    with pytest.raises(
        CaptureError, match=r"SNNFX213(.|\n)*KeyError(.|\n)*register_memory\(\"v\", initial\)"
    ) as refusal:
        snnfx.convert(Selects(torch.zeros_like), example_inputs=torch.rand(3, 4))
    assert "example_inputs" not in str(refusal.value)
