"""The number of traces that the conversion of a whole call needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.capture.capture_session import CaptureSession


class Repeated(nn.Module):
    """The same image at each of a fixed number of steps, behind norms that count their batches."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(Counting(6), Counting(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms(x)
        v, values = torch.zeros_like(x), []
        for _ in range(6):
            v = 0.5 * v + x
            values.append(v)
        y = torch.stack(values)
        return y.softmax(0) * y


class Counting(nn.BatchNorm2d):
    """A norm whose forward is traced."""

    def forward(self, input: Tensor) -> Tensor:
        return 0.5 * super().forward(input)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    found: list[bool] = []
    original = CaptureSession._trace

    def trace(self: CaptureSession, tracer: object, discovered: object, warm: bool, shapes: object) -> object:
        found.append(warm)
        return original(self, tracer, discovered, warm, shapes)  # type: ignore[arg-type]

    monkeypatch.setattr(CaptureSession, "_trace", trace)
    return found


def test_dimensions_that_no_loop_takes_need_one_trace_each(traces: list[bool]) -> None:
    snnfx.convert(Repeated(), takes="sequence", example_inputs=(torch.rand(3, 6, 7, 9),))
    # Two for the first dimension, one for each other one, a few that fail, and three for both modes.
    assert len(traces) <= 10


def test_buffers_that_a_step_changes_need_no_trace_from_their_next_values(traces: list[bool]) -> None:
    snnfx.convert(Repeated(), takes="sequence", example_inputs=(torch.rand(3, 6, 7, 9),))
    assert not any(traces)


def test_a_conversion_with_changed_buffers_runs_as_the_model() -> None:
    model = Repeated().double()
    x = torch.rand(3, 6, 7, 9, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    torch.testing.assert_close(net(x), model(x))
    assert model.norms[0].num_batches_tracked == 2
