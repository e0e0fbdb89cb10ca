"""Norse: cells with explicit state and containers with lists of states; modules over whole sequences are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

pytest.importorskip("norse")

import norse.torch as norse

import snnfx
from snnfx.errors import CaptureError

CELLS: dict[str, Callable[[], nn.Module]] = {
    "LIFCell": norse.LIFCell,
    "LIFCell, parameters": lambda: norse.LIFCell(
        norse.LIFParameters(v_leak=torch.tensor(0.1), method="tanh", alpha=5.0)
    ),
    "LIFAdExCell": norse.LIFAdExCell,
    "LIFBoxCell": norse.LIFBoxCell,
    "LIFExCell": norse.LIFExCell,
    "LIFRefracCell": norse.LIFRefracCell,
    "LICell": norse.LICell,
    "LIBoxCell": norse.LIBoxCell,
    "IAFCell": norse.IAFCell,
    "LSNNCell": norse.LSNNCell,
    "LIFRecurrentCell": lambda: norse.LIFRecurrentCell(6, 6),
    "LIFAdExRecurrentCell": lambda: norse.LIFAdExRecurrentCell(6, 6),
    "LIFRefracRecurrentCell": lambda: norse.LIFRefracRecurrentCell(6, 6),
    "LSNNRecurrentCell": lambda: norse.LSNNRecurrentCell(6, 6),
    "LILinearCell": lambda: norse.LILinearCell(6, 6),
}


class Around(nn.Module):
    """A cell between two layers; the model takes and returns its state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.fc, self.cell, self.out = nn.Linear(4, 6), cell, nn.Linear(6, 3)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.cell(self.fc(x), state)
        return self.out(z.to(x.dtype)), state


def sequence(*shape: int, T: int = 6) -> Tensor:
    return torch.rand(T, *shape, dtype=torch.float64) * 20


def stepped(model: nn.Module, x_seq: Tensor) -> Any:
    state, ys = None, []
    for x in x_seq:
        y, state = model(x, state)
        ys.append(y)
    return torch.stack(ys), state


def assert_same(a: Any, b: Any) -> None:
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    assert spec_a == spec_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
@pytest.mark.parametrize("name", CELLS)
def test_cell_between_layers_is_one_loop(name: str, with_examples: bool) -> None:
    model, x_seq = Around(CELLS[name]()).double(), sequence(2, 4)
    net = snnfx.convert(model, example_inputs=(x_seq[0],) if with_examples else None)
    expected = stepped(model, x_seq)
    assert_same(net(x_seq), expected)
    assert type(net(x_seq)[1]) is type(expected[1])
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold"]
    snnfx.verify(model, net, x_seq)


def make_container() -> nn.Module:
    return norse.SequentialState(
        nn.Conv2d(1, 3, 3),
        norse.LIFCell(),
        nn.Flatten(),
        nn.Linear(108, 5),
        norse.LIFRecurrentCell(5, 4),
        nn.Linear(4, 3),
        norse.LICell(),
    ).double()


@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sequential_state_carries_a_list_of_states(training: bool, with_examples: bool) -> None:
    model, x_seq = make_container().train(training), sequence(2, 1, 8, 8)
    net = snnfx.convert(model, example_inputs=(x_seq[0],) if with_examples else None)
    assert_same(net(x_seq), stepped(model, x_seq))
    assert [region.kind for region in net.regions] == ["fold", "loop"] * 3
    assert "1.v" in {slot.name.removeprefix("state.") for slot in net.program.slots}
    snnfx.verify(model, net, x_seq)


def test_chunks_with_carried_state_equal_the_whole_sequence() -> None:
    net, x_seq = snnfx.convert(make_container()), sequence(2, 1, 8, 8)
    whole, final = net(x_seq)
    first, state = net(x_seq[:2])
    second, state = net(x_seq[2:], state)
    assert_same((torch.cat([first, second]), state), (whole, final))


def test_a_single_cell_is_a_model() -> None:
    model, x_seq = norse.LIFCell(), sequence(2, 4)
    net = snnfx.convert(model)
    y_seq, state = net(x_seq)
    assert type(state) is norse.LIFFeedForwardState
    assert_same((y_seq, state), stepped(model, x_seq))


def test_a_cell_without_passed_state_is_reset_at_every_step() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.cell = nn.Linear(4, 6), norse.LICell()

        def forward(self, x: Tensor) -> Tensor:
            v, _ = self.cell(self.fc(x))
            return v

    model, x_seq = Forgetful().double(), sequence(2, 4)
    net = snnfx.convert(model)
    assert not net.program.slots
    assert_same(net(x_seq), torch.stack([model(x) for x in x_seq]))


def test_learnt_parameters_of_a_cell_get_their_gradients() -> None:
    tau = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    model, x_seq = Around(norse.LICell(norse.LIParameters(tau_mem_inv=tau))).double(), sequence(2, 4)
    net = snnfx.convert(model)
    expected = torch.autograd.grad(stepped(model, x_seq)[0].sum(), tau)
    assert_same(torch.autograd.grad(net(x_seq)[0].sum(), tau), expected)


def test_learnt_parameters_that_no_module_registers_get_their_gradients() -> None:
    class Functional(nn.Module):
        def __init__(self, tau: Tensor) -> None:
            super().__init__()
            self.fc, self.p = nn.Linear(4, 6), norse.LIParameters(tau_mem_inv=tau)

        def forward(self, x: Tensor, state: Any = None) -> Any:
            x = self.fc(x)
            state = norse.LIState(torch.zeros_like(x), torch.zeros_like(x)) if state is None else state
            return norse.li_feed_forward_step(x, state, self.p)

    tau = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    model, x_seq = Functional(tau).double(), sequence(2, 4)
    net = snnfx.convert(model)
    assert_same(net(x_seq), stepped(model, x_seq))
    expected = torch.autograd.grad(stepped(model, x_seq)[0].sum(), tau)
    assert_same(torch.autograd.grad(net(x_seq)[0].sum(), tau), expected)


@pytest.mark.parametrize(
    "make",
    [
        norse.LIF,
        norse.LI,
        lambda: norse.LIFRecurrent(4, 4),
        lambda: norse.Lift(nn.Linear(4, 4)),
        lambda: norse.ConstantCurrentLIFEncoder(5),
    ],
    ids=["LIF", "LI", "LIFRecurrent", "Lift", "encoder"],
)
def test_modules_with_their_own_time_loop_are_refused(make: Callable[[], nn.Module]) -> None:
    for model in (make(), norse.SequentialState(nn.Linear(4, 4), make())):
        with pytest.raises(CaptureError, match="SNNFX205"):
            snnfx.convert(model)


RECURRENT = [name for name in CELLS if "Recurrent" in name or "Linear" in name]


@pytest.mark.parametrize("name", RECURRENT)
def test_the_input_projection_of_a_cell_leaves_the_loop(name: str) -> None:
    net = snnfx.convert(Around(CELLS[name]()).double())
    (loop,) = [region for region in net.regions if region.kind == "loop"]
    assert "linear" not in {node.name.rstrip("_0123456789") for node in loop.nodes}
    folded = [node for region in net.regions if region.kind == "fold" for node in region.nodes]
    assert any(node.target is nn.functional.linear and node.meta["module"] == "cell" for node in folded)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_cell_with_hooks_receives_its_own_input(name: str) -> None:
    model, x_seq, shapes = Around(CELLS[name]()).double(), sequence(2, 4), []
    model.cell.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    net = snnfx.convert(model)
    assert_same(net(x_seq), stepped(model, x_seq))
    assert shapes[: len(x_seq)] == [(2, 6)] * len(x_seq)


@pytest.mark.parametrize("name", RECURRENT)
def test_a_hook_registered_after_conversion_runs(name: str) -> None:
    model, x_seq, calls = Around(CELLS[name]()).double(), sequence(2, 4), []
    net, keys = snnfx.convert(model), list(model.state_dict())
    model.cell.register_forward_hook(lambda module, args, output: calls.append(1))
    actual = net(x_seq)
    assert len(calls) == len(x_seq)
    assert_same(actual, stepped(model, x_seq))
    assert list(model.state_dict()) == keys


def test_a_cell_with_other_weights_than_parameters_stays_whole() -> None:
    cell = norse.LIFRecurrentCell(6, 6, input_weights=torch.rand(6, 6, dtype=torch.float64))
    model, x_seq = Around(cell).double(), sequence(2, 4)
    net = snnfx.convert(model)
    assert_same(net(x_seq), stepped(model, x_seq))
