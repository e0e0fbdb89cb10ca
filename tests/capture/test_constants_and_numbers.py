"""Constants and NumPy numbers in a step: a graph contains them, whatever their type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, InputError
from support.stepping import assert_converts, assert_same, run_net, run_stepped, step_model

X_SEQ = torch.rand(6, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


class Decays(nn.Module):
    """A state that starts as a constant and changes without the input."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.gain: Any = None
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        if self.gain is None:
            self.gain = self.make()
        y = x * self.gain
        self.gain = self.gain * 0.5
        return y


STARTS: dict[str, Callable[[], Any]] = {
    "float": lambda: torch.tensor(1.0),
    "integer": lambda: torch.tensor(3),
    "zeros": lambda: torch.zeros(()),
    "half": lambda: torch.tensor(1.0, dtype=torch.float16),
    "bfloat16": lambda: torch.ones((), dtype=torch.bfloat16),
    "of NumPy": lambda: torch.from_numpy(np.arange(12.0)),
    "vector": lambda: torch.arange(12.0),
    "float64 of NumPy": lambda: np.float64(1.5),
    "int64 of NumPy": lambda: np.int64(3),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("with_examples", [False, True])
def test_a_state_starts_as_a_constant_of_any_type(start: str, with_examples: bool) -> None:
    model = Decays(STARTS[start])
    expected = step_model(Decays(STARTS[start]), X_SEQ)
    net = snnfx.convert(model, example_inputs=X_SEQ[0] if with_examples else None)
    for _ in range(2):
        assert_same(net(X_SEQ), expected)


def test_a_state_with_the_rounding_of_numpy_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"SNNFX218 .*float32 of NumPy") as refusal:
        snnfx.convert(Decays(lambda: np.float32(0.1)))
    assert "float(value)" in refusal.value.hint
    assert_converts(Decays(lambda: float(np.float32(0.1))), X_SEQ)


class NumpyDecay(nn.Module):
    """`decay = np.exp(-dt / tau)`, on either side of an operator."""

    def __init__(self, scalar: Callable[[float], Any]) -> None:
        super().__init__()
        self.decay = scalar(0.75)
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.v = x if self.v is None else self.decay * self.v + x / self.decay - self.decay
        spikes = (self.decay < self.v).to(x)
        self.v = self.v - spikes
        return spikes * self.v


@pytest.mark.parametrize("scalar", [np.float64, np.float32, np.float16], ids=lambda t: t.__name__)
def test_a_numpy_scalar_is_a_number(scalar: Any) -> None:
    assert_converts(NumpyDecay(scalar), X_SEQ)


def test_a_numpy_scalar_is_a_keyword_argument() -> None:
    class Clamps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.rand(12, dtype=torch.float64))
            self.limits = [np.exp(-1 / 5), np.exp(-1 / 25)]
            self.v: Any = None

        def forward(self, x: Tensor) -> Tensor:
            decay = torch.clamp(self.w, min=self.limits[0], max=self.limits[1])
            self.v = x if self.v is None else decay * self.v + x
            return self.v

    assert_converts(Clamps(), X_SEQ)


def test_numpy_computes_with_a_shape() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.rand(4, 12, dtype=torch.float64))
            self.lif = neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            w = self.w / np.prod(self.w.shape[1:]) ** 0.5
            return self.lif(F.linear(x, w) + np.sqrt(x.shape[1]) + np.log(self.w.shape[0]))

    net = assert_converts(Scales(), X_SEQ, examples=True)
    assert any(region.kind == "fold" for region in net.regions)
    with pytest.raises(CaptureError, match="SNNFX202"):
        snnfx.convert(Scales())


class Unchanged(nn.Module):
    """Hands parts of its state through."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.changes = changes

    def forward(self, x: Tensor, state: Any = None) -> Any:
        if state is None:
            state = {"a": {"v": torch.zeros_like(x)}, "b": [torch.zeros_like(x) + 0.5, (torch.ones_like(x) * 2,)]}
        v = 0.5 * state["a"]["v"] + x * state["b"][0]
        return v, {"a": {"v": v if self.changes else state["a"]["v"]}, "b": state["b"]}


@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize("examples", [None, (X_SEQ[0], None)], ids=["without examples", "with examples"])
@pytest.mark.parametrize("carry", [None, {"state": 1}], ids=["inferred", "given"])
def test_a_step_hands_parts_of_a_carried_state_through(changes: bool, examples: Any, carry: Any) -> None:
    model, state, expected = Unchanged(changes), None, []
    for x in X_SEQ:
        y, state = model(x, state)
        expected.append(y)
    y_seq, final = snnfx.convert(Unchanged(changes), example_inputs=examples, carry=carry)(X_SEQ)
    assert_same(y_seq, torch.stack(expected))
    assert_same(final, state)


class ReadsConstants(nn.Module):
    """A step on a state that starts as a Python number; `read` sees the number first, then a tensor."""

    def __init__(self, read: Callable[[Any, Tensor], Tensor], start: Any = 0.0) -> None:
        super().__init__()
        self.read, self.v = read, start

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.read(self.v, x) + x
        return self.v


TENSORS_OF_VALUES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "as_tensor of a state": lambda v, x: torch.as_tensor(v),
    "as_tensor of a state with a dtype": lambda v, x: torch.as_tensor(v, dtype=x.dtype, device=x.device),
    "asarray of a state": lambda v, x: torch.asarray(v),
    "as_tensor of the input": lambda v, x: v + torch.as_tensor(x),
    "tensor of a size": lambda v, x: v / torch.sqrt(torch.tensor(x.shape[-1])),
    "tensor of a list with a size": lambda v, x: v * torch.tensor([1.0, x.shape[-1]]).sum(),
    "as_tensor of a size": lambda v, x: v / torch.as_tensor(x.shape[-1], dtype=x.dtype),
    "scalar_tensor of a size": lambda v, x: v / torch.scalar_tensor(x.shape[-1]),
    "tensor of the batch size": lambda v, x: v / torch.tensor(x.shape[0]),
}


@pytest.mark.parametrize("examples", [False, True])
@pytest.mark.parametrize("name", TENSORS_OF_VALUES)
def test_tensor_of_a_recorded_value(name: str, examples: bool) -> None:
    model = ReadsConstants(TENSORS_OF_VALUES[name])
    net = snnfx.convert(model, example_inputs=torch.rand(3, 4, dtype=torch.float64) if examples else None)
    for batch in (3, 2):
        x_seq = torch.rand(3, batch, 4, dtype=torch.float64)
        assert_same(vars(run_net(net, x_seq)), vars(run_stepped(model, x_seq)))


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_tensor_of_a_recorded_tensor_is_a_copy_without_gradient() -> None:
    model = ReadsConstants(lambda v, x: v + torch.tensor(x))
    net, x_seq = snnfx.convert(model), torch.rand(3, 2, 4, dtype=torch.float64)
    assert_same(vars(run_net(net, x_seq)), vars(run_stepped(model, x_seq)))


def test_text_of_a_size_selects_a_layer() -> None:
    class Selects(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({"4": nn.Linear(4, 4), "5": nn.Linear(5, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[str(x.shape[1])](x) if f"{x.shape[1]}" != "6" else x[:, :4]

    model = Selects().double()
    for size in (4, 5, 6):
        x_seq = torch.rand(3, 2, size, dtype=torch.float64)
        net = snnfx.convert(model, example_inputs=x_seq[0])
        assert_same(vars(run_net(net, x_seq)), vars(run_stepped(model, x_seq)))
        with pytest.raises(InputError, match="SNNFX312"):
            net(torch.rand(3, 2, 7, dtype=torch.float64))
    with pytest.raises(CaptureError, match="SNNFX202"):
        snnfx.convert(model)
