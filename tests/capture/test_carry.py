"""Models that take and return their state: it is carried across steps and keeps its nested structure."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx import neuron, surrogate
from snnfx.errors import CaptureError, InputError
from snnfx.state.carry import outputs_without, split_arguments, with_output_at


class Potential(NamedTuple):
    v: Tensor
    i: Tensor


class ByHand(nn.Module):
    """A neuron whose state is created at the first step, between a projection and a read-out."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.spike = nn.Linear(3, 4), nn.Linear(4, 2), surrogate.ATan()

    def forward(self, x: Tensor, state: Potential | None = None) -> tuple[Tensor, Potential]:
        current = self.fc(x)
        if state is None:
            state = Potential(torch.full_like(current, 0.1), torch.zeros_like(current))
        i = 0.8 * state.i + current
        v = 0.9 * state.v + i
        z = self.spike(v - 0.5)
        return self.out(z), Potential(v - 0.5 * z, i)


class TwoStates(nn.Module):
    """Two states as required arguments, returned after the output; None starts from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.spike = nn.Linear(3, 4), nn.Linear(4, 2), surrogate.ATan()

    def forward(self, x: Tensor, mem1: Any, gain: Tensor, mem2: Any) -> tuple[Tensor, Tensor, Tensor]:
        current = self.fc1(x)
        mem1 = current if mem1 is None else 0.9 * mem1 + current
        spikes = self.spike(mem1 - 0.5)
        current = self.fc2(spikes) * gain
        mem2 = current if mem2 is None else 0.7 * mem2 + current
        return self.spike(mem2), mem1 - 0.5 * spikes, mem2


class Mixed(nn.Module):
    """A neuron with stored state, and a passed state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(3, 4), neuron.LIFNode(tau=2.0), nn.Linear(4, 2)

    def forward(self, x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.out(self.lif(self.fc(x)))
        v = torch.zeros_like(y) if v is None else v
        return y, 0.5 * v + y


class Difference(nn.Module):
    """The carried value is on no cycle: the input of the previous step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, last_x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.fc(x if last_x is None else x - last_x), x


def stepped(model: nn.Module, carry: dict[str, int], *sequences: Tensor, first: dict[str, Any] | None = None) -> Any:
    """A plain loop: `(stacked outputs that are not carried, final carried values by name)`."""
    snnfx.functional.reset_net(model)
    state: dict[str, Any] = first or dict.fromkeys(carry)
    rest: list[list[Any]] = []
    names = list(dict(zip(["x", "gain"], sequences, strict=False)))
    for step in zip(*sequences, strict=True):
        outputs = model(**dict(zip(names, step, strict=True)), **state)
        state = {name: outputs[index] for name, index in carry.items()}
        rest.append([y for index, y in enumerate(outputs) if index not in carry.values()])
    snnfx.functional.reset_net(model)
    return [torch.stack(y) for y in zip(*rest, strict=True)], state


def assert_same(a: Any, b: Any) -> None:
    leaves_a, spec_a = pytree.tree_flatten(a)
    leaves_b, spec_b = pytree.tree_flatten(b)
    assert spec_a == spec_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=1e-12)


def sequence(T: int = 6, features: int = 3) -> Tensor:
    return torch.rand(T, 2, features, dtype=torch.float64) * 2


@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_state_in_a_named_tuple_is_inferred_and_comes_back_as_one(training: bool, with_examples: bool) -> None:
    model, x_seq = ByHand().double().train(training), sequence()
    net = snnfx.convert(model, example_inputs=(x_seq[0],) if with_examples else None)
    (expected,), final = stepped(model, {"state": 1}, x_seq)
    y_seq, state = net(x_seq)
    assert type(state) is Potential
    assert_same((y_seq, state), (expected, final["state"]))
    assert net.program.inferred_carry
    assert [slot.name for slot in net.program.slots] == ["state.v", "state.i"]
    snnfx.verify(model, net, x_seq)


def test_only_the_cycles_are_looped_each_on_its_own() -> None:
    net = snnfx.convert(ByHand())
    assert [(region.kind, region.slots) for region in net.regions] == [
        ("fold", []),
        ("loop", ["state.i"]),
        ("loop", ["state.v"]),
        ("fold", []),
    ]
    assert net.program.first_step is None


def test_carry_says_which_argument_is_carried_from_which_output() -> None:
    model, x_seq, gain = TwoStates().double(), sequence(), sequence(features=2)
    carry = {"mem1": 1, "mem2": 2}
    net = snnfx.convert(model, carry=carry)
    (expected,), final = stepped(model, carry, x_seq, gain)
    spikes, mem1, mem2 = net(x_seq, gain=gain)
    assert_same((spikes, mem1, mem2), (expected, final["mem1"], final["mem2"]))
    snnfx.verify(model, net, x_seq, gain=gain)


def test_the_initial_state_has_the_structure_of_the_model() -> None:
    model, x_seq, gain = TwoStates().double(), sequence(), sequence(features=2)
    carry = {"mem1": 1, "mem2": 2}
    first = {"mem1": torch.rand(2, 4, dtype=torch.float64), "mem2": torch.rand(2, 2, dtype=torch.float64)}
    net = snnfx.convert(model, carry=carry)
    (expected,), final = stepped(model, carry, x_seq, gain, first=first)
    assert_same(net(x_seq, first["mem1"], gain, first["mem2"]), (expected, final["mem1"], final["mem2"]))
    snnfx.verify(model, net, x_seq, first["mem1"], gain, first["mem2"])


def test_chunks_with_carried_state_equal_the_whole_sequence() -> None:
    model, x_seq = ByHand().double(), sequence(7)
    net = snnfx.convert(model)
    whole, final = net(x_seq)
    first, state = net(x_seq[:3])
    second, state = net(x_seq[3:], state)
    assert_same((torch.cat([first, second]), state), (whole, final))


def test_run_takes_and_returns_the_state_by_slot() -> None:
    net, x_seq = snnfx.convert(ByHand().double()), sequence()
    whole, final = net(x_seq)
    first, state = net.run(x_seq[:2])
    second, state, record = net.run(x_seq[2:], state=state, record="state.v")
    assert_same(torch.cat([first, second]), whole)
    assert_same(Potential(state["state.v"], state["state.i"]), final)
    assert_same(record["state.v"][-1], final.v)


def test_gradients_match_the_loop_including_the_initial_state() -> None:
    model, x_seq = ByHand().double(), sequence()
    net = snnfx.convert(model)
    gradients = []

    def loop(x_seq: Tensor, first: Potential) -> tuple[Tensor, Potential]:
        (y_seq,), final = stepped(model, {"state": 1}, x_seq, first={"state": first})
        return y_seq, final["state"]

    for run in (net, loop):
        first = Potential(*(torch.full((2, 4), value, dtype=torch.float64, requires_grad=True) for value in (0.3, 0.2)))
        y_seq, state = run(x_seq, first)
        gradients.append(torch.autograd.grad((y_seq**2).sum() + state.v.sum(), [*first, *model.parameters()]))
    assert_same(gradients[0], gradients[1])


@pytest.mark.parametrize("k", [1, 2, 4])
def test_inference_in_chunks_equals_the_whole_sequence(k: int) -> None:
    model, x_seq = ByHand().double().eval(), sequence(7)
    with torch.no_grad():
        assert_same(snnfx.convert(model, chunk=k)(x_seq), snnfx.convert(model, chunk=None)(x_seq))


def test_single_step_form_takes_and_returns_the_state_like_the_model() -> None:
    model, x_seq = ByHand().double(), sequence(4)
    net = snnfx.convert(model, step_mode="s")
    state, expected = None, None
    for x in x_seq:
        y, state = net(x, state)
        z, expected = model(x, expected)
        assert_same((y, state), (z, expected))
    assert_same(net(x_seq[0]), model(x_seq[0]))


def test_carry_state_continues_from_the_previous_call() -> None:
    model, x_seq = ByHand().double(), sequence(6)
    net = snnfx.convert(model, carry_state=True)
    first, _ = net(x_seq[:2])
    second, state = net(x_seq[2:])
    assert_same((torch.cat([first, second]), state), snnfx.convert(model)(x_seq))
    snnfx.functional.reset_net(net)
    assert_same(net(x_seq[:2])[0], first)


def test_stored_and_passed_state_in_one_model() -> None:
    model, x_seq = Mixed().double(), sequence()
    net = snnfx.convert(model)
    (expected,), final = stepped(model, {"v": 1}, x_seq)
    assert_same(net(x_seq), (expected, final["v"]))
    assert {slot.name for slot in net.program.slots} == {"lif.v", "v"}
    first = torch.rand(2, 2, dtype=torch.float64)
    (expected,), final = stepped(model, {"v": 1}, x_seq, first={"v": first})
    assert_same(net(x_seq, first), (expected, final["v"]))
    snnfx.verify(model, net, x_seq, first)


def test_a_state_on_no_cycle_needs_no_loop_after_the_first_step() -> None:
    model, x_seq = Difference().double(), sequence()
    net = snnfx.convert(model)
    (expected,), final = stepped(model, {"last_x": 1}, x_seq)
    assert_same(net(x_seq), (expected, final["last_x"]))
    assert "loop" not in {region.kind for region in net.regions}
    snnfx.verify(model, net, x_seq)


def test_a_state_nested_in_the_outputs_is_found_by_its_path() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor, h: Any = None) -> dict[str, Any]:
            h = [torch.zeros_like(x), None] if h is None else h
            h = [0.5 * h[0] + x, None]
            return {"y": h[0] * 2, "more": (x, h)}

    model, x_seq = Nested(), sequence()
    net = snnfx.convert(model, carry={"h": ("more", 1)})
    outputs = net(x_seq)
    h, ys = None, []
    for x in x_seq:
        step = model(x, h)
        h = step["more"][1]
        ys.append(step["y"])
    assert_same(outputs["y"], torch.stack(ys))
    assert_same(outputs["more"][0], x_seq)
    assert_same(outputs["more"][1][0], h[0])
    assert outputs["more"][1][1] is None
    y_seq, state = net.run(x_seq)
    assert set(y_seq) == {"y", "more"} and torch.equal(y_seq["more"], x_seq) and set(state) == {"h.0"}
    snnfx.verify(model, net, x_seq)


def test_a_state_with_an_example_and_no_default_is_required() -> None:
    class Required(nn.Module):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = 0.5 * h + x
            return h.relu(), h

    model, x_seq, first = Required(), sequence(), torch.rand(2, 3, dtype=torch.float64)
    net = snnfx.convert(model, carry={"h": 1}, example_inputs=(x_seq[0], first))
    (expected,), final = stepped(model, {"h": 1}, x_seq, first={"h": first})
    assert_same(net(x_seq, first), (expected, final["h"]))
    with pytest.raises(InputError, match="SNNFX308"):
        net(x_seq)
    longer = torch.rand(4, 5, 3, dtype=torch.float64)
    assert net(longer, torch.zeros(5, 3, dtype=torch.float64))[0].shape == longer.shape
    snnfx.verify(model, net, x_seq, first)


def test_a_counter_as_state_stays_a_number() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            v, t = (torch.zeros_like(x), 0) if state is None else state
            v = 0.5 * v + x * (t + 1)
            return v, (v, t + 1)

    model, x_seq = Counting(), sequence(5)
    net = snnfx.convert(model)
    (expected,), final = stepped(model, {"state": 1}, x_seq)
    y_seq, state = net(x_seq)
    assert_same((y_seq, state[0]), (expected, final["state"][0]))
    assert int(state[1]) == 5
    snnfx.verify(model, net, x_seq)


def test_copies_and_pickles_preserve_carried_arguments() -> None:
    net, x_seq = snnfx.convert(ByHand().double()), sequence()
    expected = net(x_seq)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same(other(x_seq), expected)
        assert other.program.carried == net.program.carried


def test_only_the_cell_of_a_torch_rnn_cell_model_is_looped() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rnn, self.gru = nn.Linear(3, 4), nn.RNNCell(4, 5), nn.GRUCell(5, 5)
            self.lstm, self.out = nn.LSTMCell(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, h: Any = None, g: Any = None, c: Any = None) -> Any:
            h = self.rnn(self.fc(x).relu(), h)
            g = self.gru(h, g)
            c = self.lstm(g, c)
            return self.out(c[0]), h, g, c

    model, x_seq = Cells().double(), sequence()
    carry = {"h": 1, "g": 2, "c": 3}
    for example in (None, (x_seq[0],)):
        net = snnfx.convert(model, example_inputs=example, carry=carry)
        (expected,), final = stepped(model, carry, x_seq)
        assert_same(net(x_seq), (expected, *final.values()))
        snnfx.verify(model, net, x_seq)
    assert [region.kind for region in net.regions] == ["fold", "loop", "loop", "loop", "fold"]


@pytest.mark.parametrize("kind", ["memory", "attribute"])
@pytest.mark.parametrize("cell_class", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_torch_cells_whose_state_the_module_stores(cell_class: type[nn.Module], kind: str) -> None:
    base = snnfx.MemoryModule if kind == "memory" else nn.Module

    class Keeping(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.cell, self.out = nn.Linear(3, 4), cell_class(4, 4), nn.Linear(4, 2)
            for name in ("h", "c"):
                if kind == "memory":
                    self.register_memory(name, None)
                else:
                    setattr(self, name, None)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if cell_class is nn.LSTMCell:
                if self.h is None:
                    self.h, self.c = torch.zeros_like(x), torch.zeros_like(x)
                self.h, self.c = self.cell(x, (self.h, self.c))
            else:
                self.h = self.cell(x, self.h)
            return self.out(self.h)

    model, x_seq = Keeping().double(), sequence()
    net = snnfx.convert(model, example_inputs=(x_seq[0],))
    expected = torch.stack([model(x) for x in x_seq])
    model.h = model.c = None
    assert_same(net(x_seq), expected)
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold"]
    snnfx.verify(model, net, x_seq)


class StateAndAux(nn.Module):
    def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        mem = x if mem is None else 0.5 * mem + x
        return mem.relu(), mem.sum(1), mem


class MaskLike(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights = x.softmax(-1) if mask is None else (x * mask).softmax(-1)
        return weights * x, weights


class Independent(nn.Module):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x if bias is None else x + bias), x.relu()


class NotReturned(nn.Module):
    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return x if state is None else x + state


@pytest.mark.parametrize("make", [StateAndAux, MaskLike])
def test_ambiguous_state_arguments_are_refused(make: type[nn.Module]) -> None:
    with pytest.raises(InputError, match="(?s)SNNFX314.*carry="):
        snnfx.convert(make())
    nothing = snnfx.convert(make(), carry={})
    assert not nothing.program.carried


def test_carry_resolves_the_ambiguity() -> None:
    model, x_seq = StateAndAux(), sequence()
    net = snnfx.convert(model, carry={"mem": 2})
    (spikes, total), final = stepped(model, {"mem": 2}, x_seq)
    assert_same(net(x_seq), (spikes, total, final["mem"]))
    assert not net.program.inferred_carry


@pytest.mark.parametrize("make", [Independent, NotReturned])
def test_an_optional_argument_that_is_not_state_keeps_its_default(make: type[nn.Module]) -> None:
    net, x_seq = snnfx.convert(make()), sequence()
    assert not net.program.carried
    snnfx.verify(make(), net, x_seq)


@pytest.mark.parametrize(
    ("carry", "text"),
    [
        ({"stat": 1}, "no argument"),
        ({"state": 5}, "have no element at"),
        ({"state": 1.5}, "gives no position"),
        (["state"], "is not a dict"),
    ],
)
def test_an_invalid_carry_is_refused(carry: Any, text: str) -> None:
    with pytest.raises(InputError, match=f"SNNFX309.*{text}"):
        snnfx.convert(ByHand(), carry=carry)


def test_a_state_of_another_structure_is_refused() -> None:
    net, x_seq = snnfx.convert(ByHand().double()), sequence()
    _, state = net(x_seq)
    for wrong in (state.v, tuple(state), Potential(state.v, None)):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="SNNFX308"):
            net(x_seq, wrong)


def test_a_state_that_grows_is_refused() -> None:
    class Growing(nn.Module):
        def forward(self, x: Tensor, history: Any = None) -> tuple[Tensor, Any]:
            history = [] if history is None else history
            return sum(history, x), [*history, x]

    with pytest.raises(CaptureError, match="SNNFX201.*structure of the carried state"):
        snnfx.convert(Growing(), carry={"history": 1})


def test_outputs_without_carried_arguments() -> None:
    assert outputs_without(("y", "s"), [(1,)]) == "y"
    assert outputs_without(["a", ("b", "c", "s")], [(1, 2)]) == ["a", ("b", "c")]
    assert outputs_without({"y": 1, "s": 2}, [("s",)]) == {"y": 1}
    assert with_output_at(Potential(1, 2), ("i",), 3) == Potential(1, 3)  # type: ignore[arg-type]
    assert with_output_at(("a", ["b", "c"]), (1, -1), "d") == ("a", ["b", "d"])


def test_arguments_after_a_carried_one_become_keyword_arguments() -> None:
    import inspect

    parameters = list(inspect.signature(TwoStates.forward).parameters.values())[1:]
    assert split_arguments(parameters, ["mem1", "mem2"], (1, 2, 3), {"mem2": 4}) == (
        (1,),
        {"gain": 3},
        {"mem1": 2, "mem2": 4},
    )
