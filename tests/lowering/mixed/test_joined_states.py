"""States that are one tensor of several stacked values: kernels write the values to their places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.lowering.aten_recording import AtenCall, RecordedValue, ValueReference
from snnfx.lowering.mixed.parts import parts_of
from snnfx.neuron import LIFNode


class Joined(snnfx.MemoryModule):
    """A potential and spikes in one state, joined along a dimension; the spikes run through a layer.

    Args:
        dim: the dimension of the join.
        by: "stack" or "cat".
        returns: which values are outputs: "spikes", "both" or "state".
    """

    def __init__(self, dim: int, by: str, returns: str) -> None:
        super().__init__()
        self.dim, self.by, self.returns = dim, by, returns
        self.inner = nn.Linear(4, 4)
        self.register_memory("state", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.state is None:
            self.state = self._joined(torch.zeros_like(x), torch.zeros_like(x))
        parts = self.state.unbind(self.dim) if self.by == "stack" else self.state.chunk(2, self.dim)
        v, z = parts[0], parts[1]
        v = 0.7 * v * (1 - z) + x + self.inner(z)
        z = torch.sigmoid(4 * v - 2)
        old, self.state = self.state, self._joined(v, z)
        return {"spikes": z, "both": v + 2 * z, "state": old.sum() + z}[self.returns]

    def _joined(self, *parts: Tensor) -> Tensor:
        return torch.stack(parts, self.dim) if self.by == "stack" else torch.cat(parts, self.dim)


def stepped(model: nn.Module, x: Tensor) -> Tensor:
    snnfx.functional.reset_net(model)
    return torch.stack([model(step) for step in x])


@pytest.mark.parametrize(("T", "N"), [(1, 3), (2, 3), (7, 3), (5, 1)])
@pytest.mark.parametrize("returns", ["spikes", "both", "state"])
@pytest.mark.parametrize(("dim", "by"), [(0, "stack"), (1, "stack"), (-1, "stack"), (0, "cat"), (1, "cat")])
def test_outputs_final_states_and_gradients(dim: int, by: str, returns: str, T: int, N: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Joined(dim, by, returns)).double()
    net = snnfx.convert(model, example_inputs=torch.rand(N, 4).double())
    results = []
    for run in (lambda x: stepped(model, x), net):
        x = torch.linspace(-1, 2, T * N * 4, dtype=torch.float64).view(T, N, 4).requires_grad_()
        y = run(x)
        (y * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum().backward()
        results.append((y.detach(), x.grad, *[p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    torch.testing.assert_close(results[1], results[0])
    with torch.no_grad():
        y, state = net.run(x)
        torch.testing.assert_close(y, stepped(model, x))
        torch.testing.assert_close(state["1.state"], model[1].state)
        again, _ = net.run(x, state=state)
        torch.testing.assert_close(again, torch.stack([model(step) for step in x]))


def test_the_sizes_of_stacked_states_need_no_check() -> None:
    class Unpacked(Joined):
        def forward(self, x: Tensor) -> Tensor:
            if self.state is None:
                self.state = self._joined(torch.zeros_like(x), torch.zeros_like(x))
            v, z = self.state
            v = 0.7 * v * (1 - z) + x
            self.state = self._joined(v, torch.sigmoid(v))
            return v

    net = snnfx.convert(nn.Sequential(Unpacked(0, "stack", "spikes"), LIFNode()), example_inputs=torch.rand(3, 4))
    assert "expect_size" not in net.program.graph.python_code("self").src


def test_parts_of_other_dtypes_are_not_placed() -> None:
    def value(dtype: torch.dtype) -> RecordedValue:
        example = torch.empty(3, dtype=dtype)
        recorded = RecordedValue.__new__(RecordedValue)
        recorded.__dict__.update({"shape": example.shape, "dtype": dtype})
        return recorded

    references = [ValueReference(0), ValueReference(1)]
    call = AtenCall(torch.ops.aten.cat.default, (references, 0), {}, [2])
    same, mixed = torch.float32, torch.float64
    values = [value(same), value(mixed), value(mixed)]
    assert parts_of(call, values) == []
    assert [part.number for part in parts_of(call, [value(mixed)] * 3)] == [0, 1]
