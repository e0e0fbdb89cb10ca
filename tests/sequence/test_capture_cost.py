"""The number of traces that the conversion of a whole call needs."""

from __future__ import annotations

import sys
from types import FrameType

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


class Leaky(nn.Module):
    """Neurons behind a layer, the same in both modes, for the sequence or a fixed number of steps."""

    def __init__(self, steps: int | None = None) -> None:
        super().__init__()
        self.steps, self.norm = steps, nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        v: Tensor | float = 0.0
        values = []
        for t in range(self.steps or x.shape[0]):
            v = 0.5 * v + self.norm(x if self.steps else x[t])
            values.append(v)
        y = torch.stack(values)
        return y.softmax(0) * y


def test_a_model_that_does_not_read_its_mode_is_traced_once_at_each_length(traces: list[bool]) -> None:
    snnfx.convert(Leaky(), takes="sequence", example_inputs=(torch.rand(7, 2, 3, 6, 6),))
    assert len(traces) == 2


def test_the_trace_of_the_example_inputs_becomes_the_capture(traces: list[bool]) -> None:
    snnfx.convert(Leaky(6), takes="sequence", example_inputs=(torch.rand(4, 3, 7, 9),))
    same_size = len(traces)
    traces.clear()
    snnfx.convert(Leaky(6), takes="sequence", example_inputs=(torch.rand(3, 3, 7, 9),))
    assert same_size == len(traces) - 1


def test_both_sides_of_a_square_image_need_one_trace(traces: list[bool]) -> None:
    snnfx.convert(Leaky(6), takes="sequence", example_inputs=(torch.rand(4, 3, 7, 9),))
    oblong = len(traces)
    traces.clear()
    snnfx.convert(Leaky(6), takes="sequence", example_inputs=(torch.rand(4, 3, 9, 9),))
    assert len(traces) == oblong - 1


def test_a_loop_over_one_side_of_a_square_image_takes_its_length_from_it() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            v, values = torch.zeros_like(x[..., 0, :]), []
            for t in range(x.shape[-2]):
                v = 0.5 * v + x[..., t, :]
                values.append(v)
            return torch.stack(values, -2)

    net = snnfx.convert(Rows(), takes="sequence", example_inputs=(torch.rand(2, 3, 6, 6, dtype=torch.float64),))
    x = torch.rand(2, 3, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(net(x), Rows()(x))


def test_a_capture_for_both_modes_records_the_flags_of_the_training_mode() -> None:
    model = nn.Sequential(Leaky(), nn.Dropout())
    model[1].eval()
    net = snnfx.convert(model, takes="sequence", example_inputs=(torch.rand(4, 2, 3, 6, 6),))
    flags = dict(net.program.guards.sources[0].flags)
    assert flags[""] and flags["0"] and flags["0.norm"] and not flags["1"]


def test_a_conversion_keeps_the_trace_function_of_the_thread() -> None:
    def trace(frame: FrameType, event: str, argument: object) -> None:
        return None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        snnfx.convert(Leaky(), takes="sequence", example_inputs=(torch.rand(4, 2, 3, 6, 6),))
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)


def test_buffers_that_a_step_changes_need_no_trace_from_their_next_values(traces: list[bool]) -> None:
    snnfx.convert(Repeated(), takes="sequence", example_inputs=(torch.rand(3, 6, 7, 9),))
    assert not any(traces)


def test_a_conversion_with_changed_buffers_runs_as_the_model() -> None:
    model = Repeated().double()
    x = torch.rand(3, 6, 7, 9, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    torch.testing.assert_close(net(x), model(x))
    assert model.norms[0].num_batches_tracked == 2
