"""The forward functions against plain Python loops in float64, and against SpikingJelly's where it is installed."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from snnfx import MemoryModule, functional
from snnfx.errors import CaptureError, InputError
from snnfx.functional import (
    chunk_multi_step_forward,
    map_forward,
    multi_step_forward,
    seq_to_ann_forward,
    t_last_multi_step_forward,
    t_last_seq_to_ann_forward,
)
from snnfx.state import registry
from snnfx.state.memory_adapter import MemoryAdapter

time_steps = st.integers(1, 6)
batch_sizes = st.integers(0, 3)


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64)


def same(actual: Any, expected: Any) -> None:
    """Nested in the same way, with the same dtypes and shapes; values equal up to the order of a sum."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


class Leaky(MemoryModule):
    """v = v / 2 + x, returned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        return self.v


class Synaptic(MemoryModule):
    """Two states: a current that leaks into a potential; the first is made by the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("i", None)
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.i = torch.zeros_like(x) if self.i is None else 0.9 * self.i
        self.i = self.i + x
        self.v = 0.5 * self.v + self.i
        return self.v


class PureCounter:
    """A `Stateful` that is neither a MemoryModule nor a module: counts steps from the size of its first input."""

    def state_names(self) -> tuple[str, ...]:
        return ("count",)

    def initial_state(self, x: Tensor) -> tuple[Tensor]:
        return (torch.full((), float(x.numel()), dtype=x.dtype),)

    def step(self, state: tuple[Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return x * state[0], (state[0] + 1,)

    def __call__(self, x: Tensor) -> Tensor:
        raise AssertionError("a Stateful is stepped, not called")


def norse_cell(x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """A leaky integrator in the convention of Norse."""
    v = x if state is None else 0.5 * state + x
    return v.tanh(), v


class Counting(nn.Module):
    """Counts its calls: nothing may be run before the arguments have been checked."""

    calls = 0

    def forward(self, *arguments: Any) -> Any:
        self.calls += 1
        return arguments[0]


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_docstring_examples_run() -> None:
    results = doctest.testmod(functional)
    assert results.attempted > 0
    assert results.failed == 0


def test_reset_and_detach_are_those_of_the_state_module() -> None:
    assert functional.reset_net is registry.reset_net
    assert functional.detach_net is registry.detach_net


# Stepping


@given(T=time_steps, N=batch_sizes)
def test_stepping_is_the_python_loop(T: int, N: int) -> None:
    x_seq, fc = random(T, N, 3), nn.Linear(3, 2).double()
    same(multi_step_forward(x_seq, fc), torch.stack([fc(x_seq[t]) for t in range(T)]))


@given(T=time_steps)
def test_modules_keep_their_state_from_step_to_step_and_from_call_to_call(T: int) -> None:
    x_seq, cell = random(2 * T, 2, 3), Leaky()
    expected, v = [], torch.zeros(2, 3, dtype=torch.float64)
    for x in x_seq:
        v = 0.5 * v + x
        expected.append(v)
    y_seq = torch.cat([multi_step_forward(x_seq[:T], cell), multi_step_forward(x_seq[T:], cell)])
    same(y_seq, torch.stack(expected))
    same(cell.v, v)
    functional.reset_net(cell)
    same(multi_step_forward(x_seq, cell), torch.stack(expected))


@pytest.mark.parametrize("container", [list, tuple, nn.ModuleList])
def test_several_modules_are_applied_in_order_at_each_step(container: Callable[..., Any]) -> None:
    x_seq, fc, cell = random(4, 2, 3), nn.Linear(3, 3).double(), Leaky()
    y_seq = multi_step_forward(x_seq, container([fc, cell]))
    functional.reset_net(cell)
    same(y_seq, torch.stack([cell(fc(x)) for x in x_seq]))


def test_sequential_is_one_module() -> None:
    x_seq, net = random(4, 2, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    same(multi_step_forward(x_seq, net), torch.stack([net(x) for x in x_seq]))
    assert len(calls) == 8


@pytest.mark.parametrize("container", [list, tuple])
def test_a_tuple_or_list_is_spread_over_the_arguments_of_the_first_module_only(container: Callable[..., Any]) -> None:
    x_seq, z_seq = random(4, 2, 3), random(4, 1)
    got: list[Any] = []

    def first(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return x + z, z

    def second(*arguments: Any) -> Tensor:
        got.append(arguments)
        return arguments[0][0]

    same(multi_step_forward(container([x_seq, z_seq]), [first, second]), x_seq + z_seq[:, None])
    assert all(len(arguments) == 1 and isinstance(arguments[0], tuple) for arguments in got)


def test_a_dict_and_what_is_nested_in_a_tuple_are_single_arguments() -> None:
    x_seq = {"image": random(4, 2, 3), "events": [random(4, 2), random(4, 5)]}
    seen: list[Any] = []
    multi_step_forward(x_seq, lambda x: seen.append(x) or x["image"])
    same(seen[2], {"image": x_seq["image"][2], "events": [x_seq["events"][0][2], x_seq["events"][1][2]]})

    seen.clear()
    multi_step_forward((x_seq, x_seq["image"], []), lambda *arguments: seen.append(arguments) or arguments[1])
    assert len(seen) == 4
    same(seen[3][0]["events"][0], x_seq["events"][0][3])
    same(seen[3][1], x_seq["image"][3])
    assert seen[3][2] == []


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.lists(inner, min_size=1, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
            | st.builds(Pair, inner, inner)
        ),
        max_leaves=5,
    )


@given(T=time_steps, tree=nested(st.integers(0, 3)), data=st.data())
def test_any_nesting_goes_in_and_comes_out(T: int, tree: Any, data: st.DataObject) -> None:
    x_seq = pytree.tree_map(lambda features: random(T, 2, features), {"tree": tree})
    steps = [pytree.tree_map(lambda x, t=t: x[t] * 2, x_seq) for t in range(T)]
    expected = pytree.tree_map(lambda *ys: torch.stack(ys), *steps)

    def double(x: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf * 2, x)

    split_size = data.draw(st.integers(1, T + 1))
    for y_seq in (
        multi_step_forward(x_seq, double),
        chunk_multi_step_forward(split_size, x_seq, double),
        seq_to_ann_forward(x_seq, double),
        map_forward(x_seq, double),
    ):
        assert pytree.tree_structure(y_seq) == pytree.tree_structure(x_seq)
        same(pytree.tree_leaves(y_seq), pytree.tree_leaves(expected))

    t_last = pytree.tree_map(lambda x: x.movedim(0, -1), x_seq)
    for y_seq in (t_last_multi_step_forward(t_last, double), t_last_seq_to_ann_forward(t_last, double)):
        assert pytree.tree_structure(y_seq) == pytree.tree_structure(x_seq)
        same([y.movedim(-1, 0) for y in pytree.tree_leaves(y_seq)], pytree.tree_leaves(expected))


def with_none(x: Tensor) -> dict[str, Any]:
    return {"y": x + 1, "nothing": None, "more": (None, x)}


@pytest.mark.parametrize(
    "run",
    [
        multi_step_forward,
        lambda x_seq, module: chunk_multi_step_forward(2, x_seq, module),
        lambda x_seq, module: chunk_multi_step_forward(9, x_seq, module),
        seq_to_ann_forward,
        map_forward,
    ],
)
def test_none_outputs_stay_none(run: Callable[..., Any]) -> None:
    x_seq = random(5, 2, 3)
    y_seq = run(x_seq, with_none)
    assert y_seq["nothing"] is None
    assert y_seq["more"][0] is None
    same(y_seq["y"], x_seq + 1)
    same(y_seq["more"][1], x_seq)
    assert run(x_seq, lambda x: None) is None


def test_constants_are_passed_unchanged_before_the_step_to_the_first_module() -> None:
    x_seq, fc, gain = random(4, 2, 3), nn.Linear(3, 2).double(), nn.Parameter(random(2))

    def weigh(module: nn.Module, gain: Tensor, x: Tensor) -> Tensor:
        assert module is fc
        assert gain is scale
        return gain * module(x)

    scale = gain
    expected = torch.stack([(gain * fc(x)).tanh() for x in x_seq])
    for run in (multi_step_forward, seq_to_ann_forward, map_forward):
        y_seq = run(x_seq, [weigh, torch.tanh], constants=(fc, gain))
        same(y_seq, expected)
        assert torch.autograd.grad(y_seq.sum(), gain)[0].abs().min() > 0
    t_last = t_last_multi_step_forward(x_seq.movedim(0, -1), [weigh, torch.tanh], constants=[fc, gain])
    same(t_last.movedim(-1, 0), expected)


def test_modules_that_change_their_mind_about_their_output_are_refused() -> None:
    calls: list[int] = []

    def sometimes(x: Tensor) -> Any:
        calls.append(1)
        return (x, None if len(calls) % 2 else x)

    with pytest.raises(InputError, match=r"SNNFX313.*NoneType, Tensor"):
        multi_step_forward(random(2, 3), sometimes)
    with pytest.raises(InputError, match="SNNFX313.*nesting"):
        multi_step_forward(random(2, 3), lambda x: x if calls.append(1) or len(calls) % 2 else (x,))


@pytest.mark.parametrize(
    "run",
    [
        multi_step_forward,
        seq_to_ann_forward,
        map_forward,
        t_last_seq_to_ann_forward,
        lambda *a: chunk_multi_step_forward(1, *a),
        lambda *a: chunk_multi_step_forward(9, *a),
    ],
)
def test_outputs_that_are_no_tensors_are_refused(run: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="SNNFX313.*float"):
        run(random(2, 3, 1), lambda x: (x, 1.0))


# Stepping with explicit state


@pytest.mark.parametrize("initial", [None, "reset"])
def test_explicit_run_of_a_stateful_module_leaves_the_module_alone(initial: Any) -> None:
    x_seq, cell, stepped = random(5, 2, 3), Synaptic(), Synaptic()
    cell.v = torch.full((2, 3), 7.0)
    before = dict(cell._memories)
    expected = torch.stack([stepped(x) for x in x_seq])
    y_seq, final = multi_step_forward(x_seq, cell, state=initial)
    same(y_seq, expected)
    same(final, (stepped.i, stepped.v))
    assert all(cell._memories[name] is value for name, value in before.items())


@given(T=st.integers(2, 6), data=st.data())
def test_state_handed_on_continues_the_run_exactly(T: int, data: st.DataObject) -> None:
    x_seq, cell = random(T, 2, 3), Synaptic()
    cut = data.draw(st.integers(1, T - 1))
    y_whole, final = multi_step_forward(x_seq, cell, state="reset")
    y_front, between = multi_step_forward(x_seq[:cut], cell, state="reset")
    y_back, end = multi_step_forward(x_seq[cut:], cell, state=between)
    assert torch.equal(torch.cat([y_front, y_back]), y_whole)
    assert torch.equal(end[0], final[0])
    assert torch.equal(end[1], final[1])


def test_state_comes_back_in_the_form_in_which_it_was_given() -> None:
    x_seq, cell = random(3, 2), Synaptic()
    i, v = random(2), random(2)
    given_v_first = {"v": v, "i": i}
    _, by_name = multi_step_forward(x_seq, cell, state=given_v_first)
    _, by_order = multi_step_forward(x_seq, cell, state=(i, v))
    assert isinstance(by_order, tuple)
    same(by_name, {"i": by_order[0], "v": by_order[1]})
    assert given_v_first == {"v": v, "i": i}


def test_none_may_be_the_value_of_a_slot() -> None:
    x_seq, cell = random(3, 2), Synaptic()
    same(multi_step_forward(x_seq, cell, state=(None, 0.0)), multi_step_forward(x_seq, cell, state="reset"))


def test_any_object_with_the_stateful_protocol_is_stepped_by_it() -> None:
    x_seq = random(3, 2)
    y_seq, (count,) = multi_step_forward(x_seq, PureCounter(), state="reset")
    same(y_seq, x_seq * torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)[:, None])
    same(count, torch.tensor(5.0, dtype=torch.float64))


def test_a_callable_that_takes_its_state_may_start_from_none() -> None:
    x_seq = random(4, 2)
    expected, v = [], None
    for x in x_seq:
        y, v = norse_cell(x, v)
        expected.append(y)
    for initial in (None, "reset"):
        y_seq, final = multi_step_forward(x_seq, norse_cell, state=initial)
        same(y_seq, torch.stack(expected))
        same(final, v)


def test_the_state_of_a_callable_may_be_any_object() -> None:
    def count(gain: float, x: Tensor, state: SimpleNamespace) -> tuple[Tensor, SimpleNamespace]:
        return gain * x, SimpleNamespace(steps=state.steps + 1)

    y_seq, final = multi_step_forward(random(4, 2), count, state=SimpleNamespace(steps=0), constants=(2.0,))
    assert y_seq.shape == (4, 2)
    assert final.steps == 4


def test_a_list_of_modules_takes_a_list_of_states() -> None:
    x_seq, fc = random(4, 2, 3), nn.Linear(3, 3).double()
    leaky, synaptic, modules = Leaky(), Synaptic(), [fc, Leaky(), norse_cell, Synaptic()]
    expected, v = [], None
    for x in x_seq:
        h, v = norse_cell(leaky(fc(x)), v)
        expected.append(synaptic(h))
    states = [None, None, "reset", {"v": 0.0, "i": None}]
    y_seq, final = multi_step_forward(x_seq, modules, state=states)
    same(y_seq, torch.stack(expected))
    same(final, [None, (leaky.v,), v, {"i": synaptic.i, "v": synaptic.v}])
    assert states == [None, None, "reset", {"v": 0.0, "i": None}]

    y_more, _ = multi_step_forward(x_seq, modules, state=final)
    h, _ = norse_cell(leaky(fc(x_seq[0])), v)
    same(y_more[0], synaptic(h))


@pytest.mark.parametrize("initial", [None, "reset"])
def test_a_list_of_modules_may_start_from_all_initial_states(initial: Any) -> None:
    x_seq, fc, cell = random(4, 2, 3), nn.Linear(3, 3).double(), Leaky()
    y_seq, final = multi_step_forward(x_seq, [fc, cell], state=initial)
    same(y_seq, multi_step_forward(x_seq, [fc, cell]))
    same(final, [None, (cell.v,)])


def test_gradients_flow_through_time_to_inputs_parameters_and_the_first_state() -> None:
    x_seq, v = random(3, 2).requires_grad_(), random(2).requires_grad_()
    y_seq, (final,) = multi_step_forward(x_seq, Leaky(), state=(v,))
    assert torch.equal(y_seq[-1], final)
    dx, dv = torch.autograd.grad(y_seq[-1].sum(), [x_seq, v])
    same(dx, torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)[:, None].expand(3, 2))
    same(dv, torch.full((2,), 0.125, dtype=torch.float64))


def test_a_module_with_multi_step_runs_the_sequence_itself_when_it_is_given_a_state() -> None:
    class Compiled(nn.Module):
        def multi_step(self, inputs: Any, state: Any, constants: Any) -> Any:
            x_seq, other = inputs
            return {"y": (constants[0] * x_seq + other).cumsum(0), "none": None}, (state, x_seq.shape)

        def forward(self, gain: float, x: Tensor, other: Tensor) -> Tensor:
            return gain * x - other

    x_seq, other = random(4, 2), random(4, 2)
    y_seq, final = multi_step_forward([x_seq, other], Compiled(), state="any", constants=[2.0])
    same(y_seq, {"y": (2 * x_seq + other).cumsum(0), "none": None})
    assert final == ("any", (4, 2))
    y_last, _ = t_last_multi_step_forward((x_seq.t(), other.t()), Compiled(), state=None, constants=(2.0,))
    same(y_last["y"], y_seq["y"].t())
    assert y_last["none"] is None
    same(multi_step_forward((x_seq, other), Compiled(), constants=(2.0,)), 2 * x_seq - other)


@pytest.mark.parametrize(
    ("modules", "initial", "why"),
    [
        (Synaptic(), (0.0,), "tuple"),
        (Synaptic(), {"v": 0.0}, r"\['v'\], and the slots of the module are \['i', 'v'\]"),
        (Synaptic(), {"v": 0.0, "i": None, "w": 1.0}, "'w'"),
        (Leaky(), torch.zeros(3), "Tensor"),
        (Leaky(), "zero", "str"),
        ([Leaky(), Leaky()], [None], "each of the 2 modules"),
        ([Leaky()], torch.zeros(1), "each of the 1 modules"),
    ],
)
def test_states_that_do_not_fit_are_refused_before_the_first_step(modules: Any, initial: Any, why: str) -> None:
    counting = Counting()
    if isinstance(modules, MemoryModule):
        modules.register_forward_pre_hook(lambda *_: counting())
    with pytest.raises(InputError, match=rf"SNNFX308.*{why}"):
        multi_step_forward(random(2, 3), modules, state=initial)
    assert counting.calls == 0


def test_a_module_that_its_adapter_refuses_is_refused_before_the_first_step() -> None:
    class MultiStepOnly(Leaky):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("not to be called")

    class Refusing(MemoryAdapter):
        def refuse(self, module: nn.Module, where: str) -> None:
            raise CaptureError("SNNFX205", "no single-step form", where=where)

    registry.register_adapter(MultiStepOnly, Refusing())
    with pytest.raises(CaptureError, match=r"SNNFX205.*\(MultiStepOnly\)"):
        multi_step_forward(random(2, 3), MultiStepOnly(), state="reset")


@pytest.mark.parametrize("returned", [torch.zeros(2), (1,), (1, 2, 3)])
def test_a_callable_that_does_not_return_its_state_is_refused(returned: Any) -> None:
    with pytest.raises(InputError, match=r"SNNFX313.*\(output, state\)"):
        multi_step_forward(random(2, 3), lambda x, state: returned, state=None)
    with pytest.raises(InputError, match=r"SNNFX313.*\(output, state\)"):
        chunk_multi_step_forward(1, random(2, 3), lambda x, state: returned, state=None)


# Time last


@given(T=time_steps, N=batch_sizes)
def test_time_last_stepping_is_stepping_with_time_moved(T: int, N: int) -> None:
    x_seq, fc = random(T, N, 3), nn.Linear(3, 2).double()
    y_seq = t_last_multi_step_forward(x_seq.movedim(0, -1), [fc, Leaky()])
    same(y_seq.movedim(-1, 0), multi_step_forward(x_seq, [fc, Leaky()]))
    y_seq, final = t_last_multi_step_forward(x_seq.movedim(0, -1), Leaky(), state=None)
    expected, expected_final = multi_step_forward(x_seq, Leaky(), state=None)
    same((y_seq.movedim(-1, 0), final), (expected, expected_final))


@given(T=time_steps, N=st.integers(1, 3))
def test_time_last_mapping_is_the_python_loop(T: int, N: int) -> None:
    x_seq, modules = random(N, 3, 5, T), [nn.Conv1d(3, 2, 3).double(), lambda x: x - x.mean(0)]
    expected = torch.stack([modules[1](modules[0](x_seq[..., t])) for t in range(T)], dim=-1)
    same(t_last_seq_to_ann_forward(x_seq, modules), expected)


# Chunks


@given(T=time_steps, split_size=st.integers(1, 8))
def test_chunks_are_of_split_size_but_the_last(T: int, split_size: int) -> None:
    x_seq, sizes = (random(T, 2), {"b": random(T)}), []

    def multi_step(x: Tensor, nested: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert x.shape[0] == nested["b"].shape[0]
        sizes.append(x.shape[0])
        return x, nested

    same(chunk_multi_step_forward(split_size, x_seq, multi_step), x_seq)
    assert sizes[:-1] == [split_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= split_size
    assert sum(sizes) == T


@given(T=time_steps, split_size=st.integers(1, 8))
def test_state_flows_from_chunk_to_chunk(T: int, split_size: int) -> None:
    x_seq, cell = random(T, 2, 3), Synaptic()
    expected, final = multi_step_forward(x_seq, cell, state="reset")

    def multi_step(x: Tensor, state: Any) -> Any:
        return multi_step_forward(x, cell, state=state)

    same(chunk_multi_step_forward(split_size, x_seq, multi_step, state=None), (expected, final))
    same(chunk_multi_step_forward(split_size, x_seq, lambda x: multi_step_forward(x, cell)), expected)
    same(cell.v, final[1])


def test_chunks_are_views_and_gradients_flow_through_them() -> None:
    x_seq = random(5, 2).requires_grad_()
    addresses = []
    y_seq = chunk_multi_step_forward(2, x_seq, lambda x: addresses.append(x.data_ptr()) or x**2)
    assert addresses == [x_seq[t].data_ptr() for t in (0, 2, 4)]
    y_seq.sum().backward()
    same(x_seq.grad, 2 * x_seq.detach())


def test_a_single_chunk_is_not_copied() -> None:
    x_seq = random(5, 2)
    assert chunk_multi_step_forward(5, x_seq, lambda x: x).data_ptr() == x_seq.data_ptr()


# Folding


@given(T=time_steps, N=batch_sizes)
def test_folding_an_equivariant_module_is_the_python_loop(T: int, N: int) -> None:
    x_seq, net = random(T, N, 2, 5), nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten()).double()
    same(seq_to_ann_forward(x_seq, net), torch.stack([net(x_seq[t]) for t in range(T)]))


def test_folding_calls_each_module_once_with_the_steps_in_order() -> None:
    x_seq = torch.arange(6.0).reshape(3, 2, 1)
    seen: list[Tensor] = []
    seq_to_ann_forward(x_seq, [lambda x: seen.append(x) or x, lambda x: seen.append(x) or x])
    assert [x.flatten().tolist() for x in seen] == [[0, 1, 2, 3, 4, 5]] * 2


@given(T=time_steps, N=batch_sizes)
def test_folded_modules_may_change_the_batch_size(T: int, N: int) -> None:
    x_seq = random(T, N, 3)
    y_seq = seq_to_ann_forward(x_seq, lambda x: x.repeat_interleave(2, dim=0))
    same(y_seq, torch.stack([x.repeat_interleave(2, dim=0) for x in x_seq]))


@given(T=time_steps, N=batch_sizes, rank=st.integers(1, 4), data=st.data(), negative=st.booleans(), moved=st.booleans())
def test_the_batch_may_be_any_dimension(
    T: int, N: int, rank: int, data: st.DataObject, negative: bool, moved: bool
) -> None:
    b = data.draw(st.integers(0, rank - 1))
    shape = [2, 3, 4, 5][: rank - 1]
    shape.insert(b, N)
    x_seq = random(T, *shape)

    def module(x: Tensor) -> Tensor:
        assert list(x.shape) == [T * N if i == b else size for i, size in enumerate(shape)]
        return (x.movedim(b, 0) if moved else x) + 1

    out = 0 if moved else b
    dims = (b - rank, out - rank) if negative else (b, out)
    y_seq = seq_to_ann_forward(x_seq, module, batch_dim=dims[0], out_batch_dim=dims[1])
    same(y_seq, torch.stack([x.movedim(b, 0) if moved else x for x in x_seq]) + 1)


def test_each_tensor_may_have_its_own_batch_dimension() -> None:
    x_seq, z_seq = random(4, 2, 3), random(4, 5, 2)

    def module(x: Tensor, z: Tensor) -> dict[str, Any]:
        return {"xz": x.sum(1) * z, "x": x, "none": None}

    y_seq = seq_to_ann_forward((x_seq, z_seq), module, batch_dim=(0, 1), out_batch_dim=(1, 0, 0))
    same(y_seq, {"xz": x_seq.sum(2)[:, None] * z_seq, "x": x_seq, "none": None})


@pytest.mark.parametrize(
    "module", [lambda x: x.mean(), lambda x: x.sum(0), lambda x: x[1:]], ids=["scalar", "reduced", "cut"]
)
def test_folding_a_module_that_is_visibly_not_batch_equivariant_is_refused(module: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match="SNNFX313.*not batch-equivariant"):
        seq_to_ann_forward(random(4, 2, 3), module)


def test_folding_a_contiguous_sequence_copies_nothing() -> None:
    x_seq = random(4, 2, 3)
    assert seq_to_ann_forward(x_seq, lambda x: x).data_ptr() == x_seq.data_ptr()


def test_channels_last_steps_stay_channels_last() -> None:
    x_seq = torch.stack([torch.rand(2, 4, 6, 6).to(memory_format=torch.channels_last) for _ in range(3)])
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    folded: list[Tensor] = []
    y_seq = seq_to_ann_forward(x_seq, [lambda x: folded.append(x) or x, conv])
    assert folded[0].is_contiguous(memory_format=torch.channels_last)
    assert folded[0].data_ptr() == x_seq.data_ptr()
    assert y_seq[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y_seq, torch.stack([conv(x) for x in x_seq]))
    stepped = multi_step_forward(x_seq, Leaky())
    assert stepped[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("run", [multi_step_forward, seq_to_ann_forward, map_forward])
def test_inputs_need_not_be_contiguous(run: Callable[..., Any]) -> None:
    x_seq, fc = random(3, 2, 8).permute(1, 0, 2)[..., ::2], nn.Linear(4, 2).double()
    assert not x_seq.is_contiguous()
    same(run(x_seq, fc), torch.stack([fc(x) for x in x_seq]))
    expanded = random(2, 4).expand(5, 2, 4)  # the same image at every step
    same(run(expanded, fc), torch.stack([fc(x) for x in expanded]))


@pytest.mark.parametrize("run", [multi_step_forward, seq_to_ann_forward, map_forward])
def test_gradients_are_those_of_the_loop(run: Callable[..., Any]) -> None:
    x_seq, conv = random(3, 2, 2, 6).requires_grad_(), nn.Conv1d(2, 3, 3).double()
    weights = random(3, 2, 3, 4)
    wanted = [x_seq, *conv.parameters()]
    expected = torch.autograd.grad((weights * torch.stack([conv(x) for x in x_seq])).sum(), wanted)
    same(torch.autograd.grad((weights * run(x_seq, conv)).sum(), wanted), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    x_seq = (torch.rand(4, 2, 3) > 0.5).to(dtype)
    for run in (multi_step_forward, seq_to_ann_forward, map_forward, lambda *a: chunk_multi_step_forward(3, *a)):
        y_seq = run(x_seq, lambda x: x)
        assert y_seq.dtype == dtype
        assert torch.equal(y_seq, x_seq)
    assert torch.equal(t_last_multi_step_forward(x_seq, lambda x: x), x_seq)
    assert torch.equal(t_last_seq_to_ann_forward(x_seq, lambda x: x), x_seq)


# Mapping


@given(T=time_steps, N=st.integers(1, 3))
def test_mapping_any_module_is_the_python_loop(T: int, N: int) -> None:
    def mixes_the_batch(x: Tensor) -> tuple[Tensor, Tensor]:
        return x - x.mean(0), x[0] / x.shape[0]

    x_seq = random(T, N, 3)
    steps = [mixes_the_batch(x) for x in x_seq]
    same(map_forward(x_seq, mixes_the_batch), tuple(torch.stack(ys) for ys in zip(*steps, strict=True)))


def test_a_step_without_batch_dimension_may_be_mapped() -> None:
    x_seq, fc = random(4, 3), nn.Linear(3, 2).double()
    same(map_forward(x_seq, fc), torch.stack([fc(x) for x in x_seq]))
    same(map_forward(x_seq[:, 0], torch.sin), x_seq[:, 0].sin())


def test_an_output_that_does_not_depend_on_the_step_is_repeated() -> None:
    # torch 2.13's own vmap(..., out_dims=-1) fails on such an output.
    fixed = random(2)
    same(map_forward(random(4, 3), lambda x: fixed), fixed.expand(4, 2))
    same(t_last_seq_to_ann_forward(random(3, 4), lambda x: fixed), fixed[:, None].expand(2, 4))


@pytest.mark.parametrize("run", [map_forward, t_last_seq_to_ann_forward])
def test_random_modules_draw_anew_for_each_step(run: Callable[..., Any]) -> None:
    y_seq = run(torch.ones(32, 32), nn.Dropout(0.5))
    time_dim = 0 if run is map_forward else 1
    assert len({tuple(y.tolist()) for y in y_seq.unbind(time_dim)}) == 32


def test_a_module_with_map_steps_maps_itself() -> None:
    class Mapped(nn.Module):
        def map_steps(self, inputs: Any, constants: Any) -> Any:
            return inputs, constants

    x_seq = random(3, 2)
    inputs, constants = map_forward(x_seq, Mapped(), constants=["gain"])
    assert len(inputs) == 1
    assert inputs[0] is x_seq
    assert constants == ("gain",)


# What is refused, before anything is run

EVERY_FUNCTION = {
    "multi_step_forward": multi_step_forward,
    "multi_step_forward with state": lambda x_seq, module: multi_step_forward(x_seq, module, state=None),
    "t_last_multi_step_forward": t_last_multi_step_forward,
    "chunk_multi_step_forward": lambda x_seq, module: chunk_multi_step_forward(2, x_seq, module),
    "chunk_multi_step_forward with state": lambda x_seq, module: chunk_multi_step_forward(2, x_seq, module, state=None),
    "seq_to_ann_forward": seq_to_ann_forward,
    "t_last_seq_to_ann_forward": t_last_seq_to_ann_forward,
    "map_forward": map_forward,
}


def refused(run: Callable[..., Any], x_seq: Any, code: str, match: str | None = None) -> None:
    module = Counting()
    with pytest.raises(InputError, match=match) as caught:
        run(x_seq, module)
    assert caught.value.code == code
    assert module.calls == 0


every_function = pytest.mark.parametrize("name", EVERY_FUNCTION)


@every_function
def test_no_time_steps(name: str) -> None:
    shape = (2, 3, 0) if name.startswith("t_last") else (0, 2, 3)
    refused(EVERY_FUNCTION[name], torch.zeros(shape), "SNNFX301", r"x_seq is \[")
    refused(EVERY_FUNCTION[name], (torch.zeros(shape), torch.zeros(shape)), "SNNFX301", r"x_seq\[1\] is \[")


@every_function
def test_different_numbers_of_time_steps(name: str) -> None:
    x_seq = (random(4, 2, 4), {"late": random(5, 2, 5)})
    refused(EVERY_FUNCTION[name], x_seq, "SNNFX303", r"x_seq\[0\] is \[4, 2, 4\], x_seq\[1\]\['late'\] is \[5, 2, 5\]")


@every_function
def test_neither_module_nor_callable(name: str) -> None:
    with pytest.raises(InputError, match="SNNFX304 a int"):
        EVERY_FUNCTION[name](random(4, 2, 3), 3)


@every_function
def test_a_list_with_something_else_than_modules(name: str) -> None:
    module = Counting()
    with pytest.raises(InputError, match="SNNFX304"):
        EVERY_FUNCTION[name](random(4, 2, 3), [module, None])
    assert module.calls == 0


@every_function
@pytest.mark.parametrize("empty", [[], (), nn.ModuleList()], ids=["list", "tuple", "ModuleList"])
def test_no_modules(name: str, empty: Any) -> None:
    with pytest.raises(InputError, match="SNNFX304"):
        EVERY_FUNCTION[name](random(4, 2, 3), empty)


def test_chunks_take_one_module() -> None:
    for several in ([nn.Identity()], nn.ModuleList([nn.Identity()])):
        with pytest.raises(InputError, match=f"SNNFX304 a {type(several).__name__}"):
            chunk_multi_step_forward(2, random(4, 2), several)


@every_function
@pytest.mark.parametrize("x_seq", [3, None, "x", [1, 2], {"a": None}, (torch.zeros(4, 2, 4), 1.0), (), {}])
def test_not_tensors(name: str, x_seq: Any) -> None:
    refused(EVERY_FUNCTION[name], x_seq, "SNNFX305")


@every_function
def test_no_dimension_for_time(name: str) -> None:
    refused(EVERY_FUNCTION[name], torch.tensor(1.0), "SNNFX306")
    refused(EVERY_FUNCTION[name], [random(4, 4), torch.tensor(1.0)], "SNNFX306", r"x_seq\[1\] is \[\]")


@pytest.mark.parametrize("split_size", [0, -1, 2.0, None, "2"])
def test_split_size_is_an_int_above_zero(split_size: Any) -> None:
    refused(lambda x_seq, module: chunk_multi_step_forward(split_size, x_seq, module), random(4, 2), "SNNFX302")


def test_folding_needs_a_batch_dimension() -> None:
    refused(seq_to_ann_forward, random(4), "SNNFX306", r"x_seq is \[4\]")
    for b in (2, -3):
        refused(lambda x_seq, m, b=b: seq_to_ann_forward(x_seq, m, batch_dim=b), random(4, 2, 3), "SNNFX306")


def test_folding_needs_the_same_batch_everywhere() -> None:
    refused(seq_to_ann_forward, (random(4, 2), random(4, 1)), "SNNFX303", r"x_seq\[1\] is \[4, 1\]")
    refused(
        lambda x_seq, module: seq_to_ann_forward(x_seq, module, batch_dim=(0, 1)),
        (random(4, 2, 3), random(4, 2, 3)),
        "SNNFX303",
    )


@pytest.mark.parametrize("option", ["batch_dim", "out_batch_dim"])
@pytest.mark.parametrize("value", [None, 0.0, "0", (0, None)])
def test_a_batch_dim_is_an_int_or_ints(option: str, value: Any) -> None:
    refused(lambda x_seq, module: seq_to_ann_forward(x_seq, module, **{option: value}), random(4, 2), "SNNFX309")


def test_there_is_one_batch_dim_for_each_tensor() -> None:
    x_seq = random(4, 2, 3)
    refused(lambda x_seq, module: seq_to_ann_forward(x_seq, module, batch_dim=(0, 0)), x_seq, "SNNFX309", "2 entries")
    with pytest.raises(InputError, match="SNNFX309 `out_batch_dim` has 2 entries for 1 tensors"):
        seq_to_ann_forward(x_seq, lambda x: x, out_batch_dim=(0, 0))


@pytest.mark.parametrize("run", [multi_step_forward, t_last_multi_step_forward, seq_to_ann_forward, map_forward])
def test_a_tensor_is_not_taken_apart_into_constants(run: Callable[..., Any]) -> None:
    refused(lambda x_seq, module: run(x_seq, module, constants=random(2)), random(4, 2), "SNNFX309", "Pass a tuple")


# torch.compile


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("nested_input", [False, True])
def test_folding_compiles_at_most_twice_for_any_number_of_time_steps(dynamic: bool | None, nested_input: bool) -> None:
    fc = nn.Linear(3, 2)

    def net(x: Tensor) -> Any:
        if nested_input:
            return seq_to_ann_forward((x, {"z": x}), lambda x, z: (fc(x + z["z"]), None))[0]
        return seq_to_ann_forward(x, [fc, torch.tanh])

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=dynamic)
    for T in (4, 5, 8, 16, 33):
        x_seq = torch.rand(T, 2, 3)
        torch.testing.assert_close(compiled(x_seq), net(x_seq))
    assert counter.frame_count <= 2


def test_folding_along_another_dimension_compiles_for_any_number_of_time_steps() -> None:
    def net(x: Tensor) -> Tensor:
        return seq_to_ann_forward(x, torch.tanh, batch_dim=1, out_batch_dim=-1)

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for T in (4, 5, 8, 16):
        x_seq = torch.rand(T, 3, 2)
        torch.testing.assert_close(compiled(x_seq), x_seq.tanh())
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "run",
    [
        multi_step_forward,
        map_forward,
        lambda x_seq, module: chunk_multi_step_forward(2, x_seq, module),
        lambda x_seq, module: multi_step_forward(x_seq, [module, Leaky()], state="reset"),
        lambda x_seq, module: multi_step_forward(x_seq, lambda x, state: norse_cell(module(x), state), state=None),
        lambda x_seq, module: map_forward((x_seq, x_seq), lambda x, z: {"y": module(x) + z.sum(0)[:2], "none": None}),
    ],
)
def test_all_compile_without_graph_breaks(run: Callable[..., Any]) -> None:
    x_seq, fc = torch.rand(5, 4, 3), nn.Linear(3, 2)
    compiled = torch.compile(lambda x: run(x, fc), fullgraph=True, backend="eager")
    actual, expected = compiled(x_seq), run(x_seq, fc)
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)
    torch.testing.assert_close(pytree.tree_leaves(actual), pytree.tree_leaves(expected))


# SpikingJelly


@given(T=time_steps, N=st.integers(1, 3), split_size=st.integers(1, 7))
def test_equal_to_spikingjelly_where_both_run(T: int, N: int, split_size: int) -> None:
    forward = pytest.importorskip("spikingjelly.activation_based.functional.forward")
    x_seq = random(T, N, 2, 5)
    x_last = x_seq.movedim(0, -1).contiguous()
    stateless = [nn.Conv1d(2, 3, 3).double(), nn.Tanh()]
    stateful = nn.Sequential(*stateless, Leaky())

    def both(name: str, *arguments: Any) -> None:
        results = []
        for module in (functional, forward):
            functional.reset_net(stateful)
            results.append(getattr(module, name)(*arguments))
        same(results[0], results[1])

    both("multi_step_forward", x_seq, [*stateless, stateful[2]])
    both("multi_step_forward", x_seq, stateful)
    both("t_last_multi_step_forward", x_last, stateful)
    both("chunk_multi_step_forward", split_size, x_seq, lambda x: functional.multi_step_forward(x, stateful))
    both("seq_to_ann_forward", x_seq, stateless)
    both("seq_to_ann_forward", (x_seq, x_seq + 1), lambda x, z: (x * z, x[:, 0]))
    both("t_last_seq_to_ann_forward", x_last, stateless)
    both("t_last_seq_to_ann_forward", x_last, lambda x: (x - x.mean(0), x.sum(1)))
