"""Hints of calls of a net (3xx): each leads to a call with the result of the stepped model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snnfx
from snnfx import functional, neuron
from support.hints import refused, silent, warned
from support.stepping import assert_converts, assert_same, fresh_copy, run_net, run_stepped

T, N, C = 5, 2, 3


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape or (T, N, C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small(training: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 4), neuron.LIFNode(tau=2.0, v_threshold=0.3), nn.Linear(4, 2)).train(training)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 4), nn.BatchNorm1d(4), neuron.LIFNode(tau=2.0, v_threshold=0.3))


def stepped(model: nn.Module, x_seq: Tensor) -> Tensor:
    clone = fresh_copy(model)
    return torch.stack([clone(x) for x in x_seq]).detach()


def is_stepped(net: Any, y_seq: Tensor, x_seq: Tensor | None = None) -> None:
    assert_same(y_seq.detach(), stepped(net.source, sequence() if x_seq is None else x_seq))


# -- arguments ---------------------------------------------------------------------------------------------------------


class Gains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor, doubles: bool) -> Tensor:
        return self.lif(2 * x if doubles else x)


def test_another_constant() -> None:
    net = snnfx.convert(Gains(), example_inputs=(sequence()[0], True))
    refused(
        "SNNFX307",
        "emit/arguments.py:Arguments.bind",
        "Convert again with this value in example_inputs.",
        lambda: net(sequence(), False),
        names="`doubles` is False",
    )
    net = snnfx.convert(Gains(), example_inputs=(sequence()[0], False))
    clone = Gains()
    assert_same(net(sequence(), False), torch.stack([clone(x, False) for x in sequence()]))


def test_another_number_of_arguments() -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX307",
        "emit/arguments.py:Arguments._bind_by_name",
        "Pass the inputs of one step, each with a time dimension, or convert with other example_inputs.",
        lambda: net(sequence(), sequence()),
        names="(input)",
    )
    is_stepped(net, net(sequence()))


def test_a_number_of_steps_that_is_not_an_int() -> None:
    net = snnfx.convert(small(), time_dim=None)
    refused(
        "SNNFX309",
        "emit/arguments.py:Arguments.time_first",
        "Pass an int above 0.",
        lambda: net(sequence()[0], T=2.5),
        names="T=2.5",
    )
    is_stepped(net, net(sequence()[0], T=3), sequence()[:1].expand(3, N, C))


def test_an_input_without_a_time_dimension() -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX306",
        "emit/arguments.py:Arguments.time_first",
        "Pass a sequence, [T, N, ...].",
        lambda: net(torch.tensor(1.0)),
        names="`input` has shape []",
    )
    is_stepped(net, net(sequence()))


def test_no_time_dimension_at_all() -> None:
    net = snnfx.convert(small(), time_dim=None)
    refused(
        "SNNFX310",
        "emit/arguments.py:Arguments.time_first",
        "Pass the number of time steps: net(x, T=8).",
        lambda: net(sequence()[0]),
    )
    is_stepped(net, net(sequence()[0], T=8), sequence()[:1].expand(8, N, C))


def test_plans_take_the_time_steps_and_the_inputs() -> None:
    """Each wrong call of a plan names its fault; the call of the hint gives a plan."""
    net = snnfx.convert(small())
    calls: dict[str, tuple[str, Callable[[], Any]]] = {
        "T is a Tensor": ("SNNFX309", lambda: net.recompute_plan(sequence())),
        "got 2 inputs": ("SNNFX307", lambda: net.recompute_plan(T, sequence(), sequence())),
        "`input` has shape []": ("SNNFX306", lambda: net.recompute_plan(T, torch.tensor(1.0))),
        "has 5 time steps, T is 3": ("SNNFX303", lambda: net.recompute_plan(3, sequence())),
    }
    for names, (code, call) in calls.items():
        error = refused(
            code,
            "emit/arguments.py:Arguments.check_time_first",
            "): the number of time steps, then the inputs of a call, time first.",
            call,
            names=names,
        )
        assert error.hint.startswith("Call net.recompute_plan(T, input)")
    assert net.recompute_plan(T, sequence()) is not None
    refused(
        "SNNFX301",
        "emit/arguments.py:Arguments.check_time_first",
        "Pass at least one time step.",
        lambda: net.recompute_plan(0, sequence()[:0]),
        names="T=0",
    )
    assert net.recompute_plan(1, sequence()[:1]) is not None


def test_an_input_of_another_rank() -> None:
    net = snnfx.convert(small(), example_inputs=sequence()[0])
    images = sequence(T, N, 4, C)
    refused(
        "SNNFX325",
        "emit/arguments.py:Arguments.check_ranks",
        " dimensions, or convert the model again with example_inputs like one step of this input.",
        lambda: net(images),
        names="Pass `input` with 3 dimensions",
    )
    is_stepped(net, net(sequence()))
    net = snnfx.convert(small(), example_inputs=images[0])
    is_stepped(net, net(images), images)


def test_a_state_of_other_slots() -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX308",
        "emit/arguments.py:Arguments.check_state",
        "Pass the state that net.run returned, or None for the reset state.",
        lambda: net.run(sequence(), state={"1.u": 0.0}),
        names="unknown ['1.u']",
    )
    first, state = net.run(sequence()[:2])
    second, _ = net.run(sequence()[2:], state=state)
    is_stepped(net, torch.cat([first, second]))
    is_stepped(net, net.run(sequence(), state=None)[0])


def test_a_state_of_another_batch() -> None:
    net = snnfx.convert(small())
    _, state = net.run(sequence(T, N + 1, C))
    refused(
        "SNNFX308",
        "emit/arguments.py:Arguments.check_shapes",
        "Pass the state that net.run returned for these samples, or None for the reset state.",
        lambda: net.run(sequence(), state=state),
        names="`1.v` has shape [3, 4]",
    )
    _, state = net.run(sequence()[:2])
    assert_same(net.run(sequence()[2:], state=state)[0].detach(), stepped(net.source, sequence())[2:])
    is_stepped(net, net.run(sequence())[0])


class TakesState(nn.Module):
    def forward(self, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.5 * v + x
        return v.relu(), v


def test_a_missing_initial_value() -> None:
    x = sequence()[0]
    net = snnfx.convert(TakesState(), example_inputs=(x, x), carry={"v": 1})
    error = refused(
        "SNNFX308",
        "emit/arguments.py:Arguments.first_state",
        "Pass it as an argument: net(x_seq, ",
        lambda: net(sequence()),
        names="`v` is missing",
    )
    assert error.hint == "Pass it as an argument: net(x_seq, v=...)."
    v = torch.ones(N, C)
    y_seq = net(sequence(), v=v)[0]
    for t, x in enumerate(sequence()):
        y, v = TakesState()(x, v)
        assert_same(y_seq[t], y)


class FirstStepDiffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.later = nn.Linear(C, C), nn.Linear(C, C)
        self.h: Any = None
        self.lif = neuron.LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.first(x) if self.h is None else self.later(x) + self.h
        return self.lif(self.h)


def without_state(model: FirstStepDiffers) -> Tensor:
    clone = FirstStepDiffers()
    clone.load_state_dict(model.state_dict())
    return torch.stack([clone(x) for x in sequence()]).detach()


def test_an_incomplete_state() -> None:
    class Carried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode(v_threshold=0.3)

        def forward(self, x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
            u = 2 * x if u is None else 0.5 * u + x
            return self.lif(u), u

    net = snnfx.convert(Carried(), step_mode="s")
    y, state = net.run(sequence()[0])
    refused(
        "SNNFX308",
        "emit/arguments.py:Arguments.first_state",
        "Pass the complete state that net.run returned, or None for the reset state.",
        lambda: net.run(sequence()[1], state={"lif.v": state["lif.v"]}),
        names="u is missing",
    )
    clone = Carried()
    first, u = clone(sequence()[0])
    assert_same(y, first)
    assert_same(net.run(sequence()[1], state=state)[0], clone(sequence()[1], u)[0])
    assert_same(net.run(sequence()[0], state=None)[0], y)


def test_record_of_a_model_whose_first_step_differs() -> None:
    net = snnfx.convert(FirstStepDiffers())
    refused(
        "SNNFX311",
        "runtime/execution.py:Execution._run_all_steps",
        "Run one step first: _, state = net.run(x_seq[:1]); then record the rest with state=state.",
        lambda: net.run(sequence(), record="lif"),
    )
    _, state = net.run(sequence()[:1])
    y_seq, _, recorded = net.run(sequence()[1:], state=state, record="lif")
    assert_same(recorded["lif"], y_seq)
    assert_same(y_seq.detach(), without_state(net.source)[1:])


def test_a_record_in_single_steps() -> None:
    net = snnfx.convert(small(), step_mode="s")
    refused(
        "SNNFX311",
        "runtime/execution.py:Execution.run_step",
        'Convert with step_mode="m".',
        lambda: net.run(sequence()[0], record="1"),
    )
    net = snnfx.convert(small(), step_mode="m")
    is_stepped(net, net.run(sequence(), record="1")[0])


def test_a_record_behind_a_reduction() -> None:
    net = snnfx.convert(small(), reduce="mean")
    refused(
        "SNNFX311",
        "runtime/recordings.py:Recordings._emit",
        "Convert without reduce= to record it.",
        lambda: net.run(sequence(), record="2"),
        names="`2`",
    )
    net = snnfx.convert(small())
    y_seq, _, recorded = net.run(sequence(), record="2")
    assert_same(recorded["2"], y_seq)


def test_a_record_of_an_unknown_name() -> None:
    net = snnfx.convert(small())
    error = refused(
        "SNNFX311",
        "runtime/recordings.py:recorded_node",
        "Record any of ",
        lambda: net.run(sequence(), record="9"),
        names="`9`",
    )
    names = error.hint.removeprefix("Record any of ").removesuffix(".").split(", ")
    assert list(net.run(sequence(), record=names)[2]) == names


def test_a_record_with_a_checkpoint() -> None:
    net = snnfx.convert(small(), checkpoint=2)
    y_seq = warned(
        "SNNFX508",
        "runtime/execution.py:Execution.run_sequence",
        ": the recorded values keep the whole autograd graph alive.",
        lambda: net.run(sequence().requires_grad_(), record="1.v")[0],
        names="record=",
    )
    is_stepped(net, y_seq)


def test_unequal_batches() -> None:
    class Adds(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    net = snnfx.convert(Adds())
    refused(
        "SNNFX303",
        "runtime/replanning.py:_planned_again",
        "Give all inputs the same batch size.",
        lambda: net(sequence(), sequence(T, N + 1, C)),
        names="`a`: 2, `b`: 3",
    )
    with silent():
        assert_same(net(sequence(), sequence()), 2 * sequence())


class Flattened(nn.Module):
    """Takes images and another input of any batch size."""

    def __init__(self, reshaped: bool = False) -> None:
        super().__init__()
        self.lif, self.reshaped = neuron.LIFNode(v_threshold=0.3), reshaped

    def forward(self, x: Tensor, w: Tensor) -> Any:
        y = x.reshape(x.shape[0], -1) if self.reshaped else x.view(x.shape[0], -1)
        return self.lif(y), w * 2


@pytest.mark.parametrize("others", [N, N + 3], ids=["equal batches", "other batches"])
def test_a_view_of_images_in_channels_last_format(others: int) -> None:
    x, w = sequence(T, N, 5, 6, 2).permute(0, 1, 4, 2, 3), sequence(T, others, C)
    error = refused(
        "SNNFX225",
        "capture/example_values.py:ExampleValues._refuse_memory_format",
        "Use `reshape`, which copies if necessary, instead of `view`",
        lambda: snnfx.convert(Flattened(), example_inputs=(x[0], w[0]))(x, w),
        names="`view`",
        at="x.view(",
    )
    assert "shape [2, 2, 5, 6] and strides (60, 1, 12, 2)" in str(error)
    with silent():
        assert_converts(Flattened(reshaped=True), x, w, examples=True)


def test_a_view_of_images_in_another_format_than_the_example_inputs_with_unequal_batches() -> None:
    x, w = sequence(T, N, 2, 5, 6), sequence(T, N + 3, C)
    net = snnfx.convert(Flattened(), example_inputs=(x[0], w[0, :N]))
    assert_same(net(x, w), run_stepped(Flattened(), x, w).outputs)
    with pytest.raises(snnfx.errors.CaptureError, match=r"SNNFX225 `view` fails on the memory format"):
        snnfx.convert(Flattened(), example_inputs=(x[0], w[0, :N]))(
            x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3), w
        )


def test_unequal_batches_are_not_blamed_for_another_failure() -> None:
    class Fails(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Any:
            return a.view(a.shape[0], 7), b

    with pytest.raises(snnfx.errors.CaptureError, match=r"SNNFX201 .* fails at `view`"):
        snnfx.convert(Fails())(sequence(), sequence(T, N + 1, C))


class ReadsSetting(nn.Module):
    def __init__(self, tau: Any = 2.0) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), neuron.LIFNode(v_threshold=0.3)
        if isinstance(tau, Tensor):
            self.register_buffer("tau", tau)
        else:
            self.tau = tau

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x) * self.tau)


def test_a_changed_setting() -> None:
    net = snnfx.convert(ReadsSetting())
    net.source.tau = 3.0
    y_seq = warned(
        "SNNFX315",
        "runtime/replanning.py:capture_again",
        "; the net captures the model again.",
        lambda: net(sequence()),
        names="Make it a buffer or a parameter if it changes often.",
    )
    is_stepped(net, y_seq)
    net = snnfx.convert(ReadsSetting(torch.tensor(2.0)))
    net.source.tau.fill_(3.0)
    with silent():
        is_stepped(net, net(sequence()))


def test_a_changed_setting_of_an_edited_graph() -> None:
    net = snnfx.convert(ReadsSetting())
    net.graph = net.graph
    net.source.tau = 3.0
    refused(
        "SNNFX315",
        "runtime/replanning.py:_checked_replan",
        "Convert the model again, or restore the value.",
        lambda: net(sequence()),
        names="tau",
    )
    again = snnfx.convert(net.source)
    is_stepped(again, again(sequence()))
    net.source.tau = 2.0
    is_stepped(net, net(sequence()))


def test_a_plan_that_cannot_be_made_again() -> None:
    net = snnfx.convert(small())
    net._replan = None
    refused(
        "SNNFX306",
        "runtime/replanning.py:_planned_again",
        "Convert the model with example_inputs of these shapes.",
        lambda: net(sequence()[:, 0]),
        names="[[5, 3]]",
    )
    net = snnfx.convert(small(), example_inputs=sequence()[0, 0])
    is_stepped(net, net(sequence()[:, 0]), sequence()[:, 0])


def test_a_decision_by_another_size() -> None:
    class ByColumns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh() if x.shape[1] > C else 2 * x

    wide = sequence(T, N, C + 1)
    net = snnfx.convert(ByColumns(), example_inputs=sequence()[0])
    refused(
        "SNNFX312",
        "ops/step_functions.py:expect_size",
        "Convert again with example_inputs of the new sizes and dtypes.",
        lambda: net(wide),
        names="a condition on sizes or dtypes is True",
        at="x.shape[1]",
    )
    net = snnfx.convert(ByColumns(), example_inputs=wide[0])
    is_stepped(net, net(wide), wide)


def test_a_size_of_another_capture() -> None:
    class PerColumn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for i in range(x.shape[1]):
                x = x.tanh() if i % 2 else 1.5 * x
            return x

    wide = sequence(T, N, C + 1)
    net = snnfx.convert(PerColumn(), example_inputs=sequence()[0])
    refused(
        "SNNFX312",
        "ops/step_functions.py:expect_size",
        "Convert again with example_inputs of the new size.",
        lambda: net(wide),
        names="a size is 4",
        at="x.shape[1]",
    )
    net = snnfx.convert(PerColumn(), example_inputs=wide[0])
    is_stepped(net, net(wide), wide)


def test_an_input_of_several_lengths() -> None:
    net = snnfx.convert(small())
    ragged = torch.nested.nested_tensor([sequence()[:3, 0], sequence()[:, 1]])
    packed = nn.utils.rnn.pack_sequence([sequence()[:, 1], sequence()[:3, 0]])
    refused(
        "SNNFX305",
        "sandbox/dense_inputs.py:not_a_dense_tensor",
        "Pad it: x = torch.nested.to_padded_tensor(x, 0.0).",
        lambda: net(ragged),
        names="`input` is a nested tensor",
    )
    padded = torch.nested.to_padded_tensor(ragged, 0.0).transpose(0, 1)
    is_stepped(net, net(padded), padded)
    refused(
        "SNNFX305",
        "sandbox/dense_inputs.py:not_a_dense_tensor",
        "Pad it: x, lengths = torch.nn.utils.rnn.pad_packed_sequence(x).",
        lambda: snnfx.convert(small(), example_inputs=packed),
        names="PackedSequence",
    )
    x_seq, _ = nn.utils.rnn.pad_packed_sequence(packed)
    is_stepped(net, net(x_seq), x_seq)


# -- state that changes its shape, and parts that run step by step -----------------------------------------------------


def test_a_state_without_a_value_of_its_region() -> None:
    class Carried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode(v_threshold=0.3)

        def forward(self, x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
            u = torch.zeros_like(x) if u is None else u
            s = self.lif(x + u)
            return s, 0.5 * u + s

    net = snnfx.convert(Carried())
    first, state = net.run(sequence()[:2])
    refused(
        "SNNFX308",
        "ops/sequence_functions.py:select_state",
        "Pass the whole state, or none.",
        lambda: net.run(sequence(), state={"lif.v": state["lif.v"]}),
        names="no value for u",
    )
    u = None
    y_seq = torch.cat([first, net.run(sequence()[2:], state=state)[0]])
    for t, x in enumerate(sequence()):
        y, u = net.source(x, u)
        assert_same(y_seq[t], y)
    assert_same(net.run(sequence())[0], y_seq)


class Untraceable(nn.Module):
    def __init__(self, convert: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.convert = convert

    def forward(self, x: Tensor) -> Any:
        return self.convert(x) if float(x.sum()) > -1 else x


def test_a_part_that_returns_no_tensor() -> None:
    refused(
        "SNNFX313",
        "ops/sequence_functions.py:stack_steps",
        "Return tensors or numbers from the module.",
        lambda: snnfx.convert(nn.Sequential(Untraceable(lambda x: "a")))(sequence()),
        names="str",
    )
    assert_converts(nn.Sequential(Untraceable(lambda x: 2 * x)), sequence())
    assert snnfx.convert(nn.Sequential(Untraceable(lambda x: 0.5)))(sequence()).tolist() == [0.5] * len(sequence())


def test_a_part_that_returns_a_structure() -> None:
    class Around(nn.Module):
        def __init__(self, read: Callable[[Any], Any]) -> None:
            super().__init__()
            self.part, self.read = Untraceable(lambda x: (x, 2 * x)), read

        def forward(self, x: Tensor) -> Any:
            return self.read(self.part(x))

    refused(
        "SNNFX313",
        "ops/sequence_functions.py:stack_steps",
        "or read the elements where it is called: y = self.part(x); return y[0], y[1].",
        lambda: snnfx.convert(Around(lambda y: y))(sequence()),
        names="tuple",
    )
    for found, expected in zip(snnfx.convert(Around(lambda y: (y[0], y[1])))(sequence()), (1, 2), strict=True):
        assert_same(found, sequence() * expected)


def test_a_part_that_returns_other_structures() -> None:
    model = Untraceable(lambda x: (x, x) if float(x.sum()) > 3 else x)
    x_seq = torch.ones(2, N, C) * torch.tensor([1.0, 0.1])[:, None, None]
    refused(
        "SNNFX313",
        "ops/sequence_functions.py:_stack_structures",
        "Return the same tuple, list or dict of tensors at each step.",
        lambda: snnfx.convert(model)(x_seq),
        names="at step 0 than at step 1",
    )
    with torch.no_grad():
        refused(
            "SNNFX313",
            "runtime/joined_outputs.py:flatten_alike",
            "Return the same tuple, list or dict of tensors at each step.",
            lambda: snnfx.convert(model.eval(), chunk=1)(x_seq),
            names="in one chunk than in the next",
        )
    net = snnfx.convert(Untraceable(lambda x: (x, x) if float(x.sum()) > 3 else (x, 2 * x)))
    assert_same(net(x_seq)[1], x_seq * torch.tensor([1.0, 2.0])[:, None, None])


def test_a_part_that_changes_its_shape() -> None:
    class Grows(snnfx.MemoryModule):
        def __init__(self, last: int | None) -> None:
            super().__init__()
            self.register_memory("h", torch.zeros(2, C))
            self.last = last

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) < -1:
                return x
            h = torch.cat([self.h, x])
            self.h = h if self.last is None else h[-self.last :]
            return self.h

    refused(
        "SNNFX313",
        "ops/sequence_functions.py:stack_steps",
        "Keep the shape of states: self.h = torch.cat([self.h, x])[-k:], starting from k values.",
        lambda: snnfx.convert(nn.Sequential(Grows(None)))(sequence()),
        names="shape [4, 3] at the first step",
    )
    assert_converts(nn.Sequential(Grows(2)), sequence())


def test_a_state_of_another_shape_than_its_next_value() -> None:
    class Delays(nn.Module):
        def __init__(self, start: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.start = start
            self.h: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = self.start(x)
            before = self.h + 0.0
            self.h = x
            return before

    refused(
        "SNNFX313",
        "ops/sequence_functions.py:expand_initial_value",
        "Create the state in its final shape, e.g. with torch.zeros_like of the value assigned to it.",
        lambda: snnfx.convert(Delays(lambda x: torch.zeros(x.shape[0], 4)))(sequence()),
        names="`h` changes its shape",
    )
    assert_same(snnfx.convert(Delays(torch.zeros_like))(sequence()), torch.cat([torch.zeros(1, N, C), sequence()[:-1]]))


# -- functional --------------------------------------------------------------------------------------------------------


def test_chunks_of_no_steps() -> None:
    net = snnfx.convert(small(training=False), carry_state=True)
    refused(
        "SNNFX302",
        "functional.py:chunk_multi_step_forward",
        "Pass an int above 0.",
        lambda: functional.chunk_multi_step_forward(0, sequence(), net),
    )
    is_stepped(net, functional.chunk_multi_step_forward(2, sequence(), net))


def test_states_of_several_modules() -> None:
    model = small()
    refused(
        "SNNFX308",
        "functional.py:_entry_of_each",
        'Pass a list, or "reset".',
        lambda: functional.multi_step_forward(sequence(), list(model), state={"a": 1}),
    )
    y_seq, state = functional.multi_step_forward(sequence()[:2], list(model), state="reset")
    rest, _ = functional.multi_step_forward(sequence()[2:], list(model), state=state)
    assert_same(torch.cat([y_seq, rest]).detach(), stepped(model, sequence()))


def test_a_state_of_one_module() -> None:
    lif = neuron.LIFNode(v_threshold=0.3)
    refused(
        "SNNFX308",
        "functional.py:_pure_step",
        'Pass a tuple or a dict with a value for each slot, or "reset".',
        lambda: functional.multi_step_forward(sequence(), lif, state={"u": 1}),
        names="['v']",
    )
    zeros = torch.zeros(N, C)
    for state in ("reset", (zeros,), {"v": zeros}):
        assert_same(functional.multi_step_forward(sequence(), lif, state=state)[0], stepped(lif, sequence()))


def test_a_module_that_mixes_samples() -> None:
    refused(
        "SNNFX313",
        "functional.py:_unfold",
        "Use map_forward.",
        lambda: functional.seq_to_ann_forward(sequence(), lambda x: x.sum(0)),
    )
    assert_same(functional.map_forward(sequence(), lambda x: x.sum(0)), sequence().sum(1))


def test_no_module() -> None:
    refused(
        "SNNFX304",
        "functional.py:_check_modules",
        "Pass a module.",
        lambda: functional.multi_step_forward(sequence(), []),
    )
    assert_same(functional.multi_step_forward(sequence(), [small()]).detach(), stepped(small(), sequence()))


def test_constants_that_are_not_a_tuple() -> None:
    add = torch.add
    refused(
        "SNNFX309",
        "functional.py:_check_modules",
        "Pass a tuple of arguments.",
        lambda: functional.map_forward(sequence(), add, constants=torch.ones(C)),
    )
    assert_same(functional.map_forward(sequence(), add, constants=(torch.ones(C),)), sequence() + 1)


def test_dimensions_that_are_not_ints() -> None:
    refused(
        "SNNFX309",
        "functional.py:_dim_of_each",
        "Pass an int, or a tuple of ints.",
        lambda: functional.seq_to_ann_forward(sequence(), torch.relu, batch_dim="x"),
    )
    for dim in (0, (0,)):
        assert_same(functional.seq_to_ann_forward(sequence(), torch.relu, batch_dim=dim), sequence())


# -- streams -----------------------------------------------------------------------------------------------------------


def stream_is_stepped(items: Any, net: Any = None, **options: Any) -> None:
    net = snnfx.convert(small(training=False)) if net is None else net
    with silent():
        y_seq = torch.cat(list(net.stream(items, **options)))
    is_stepped(net, y_seq, sequence()[: len(y_seq)])


def test_a_stream_of_unknown_items() -> None:
    net = snnfx.convert(small(training=False))
    refused(
        "SNNFX309",
        "runtime/streaming.py:Stream.__init__",
        'Choose "chunks" or "steps".',
        lambda: net.stream([sequence()], of="x"),
    )
    stream_is_stepped([sequence()], of="chunks")
    stream_is_stepped(list(sequence()), of="steps")


def test_a_stream_of_a_single_step_net() -> None:
    net = snnfx.convert(small(training=False), step_mode="s")
    refused(
        "SNNFX309",
        "runtime/streaming.py:Stream.__init__",
        'Call it step by step, or convert with step_mode="m".',
        lambda: net.stream([sequence()]),
    )
    state, steps = None, []
    for x in sequence():
        y, state = net.run(x, state=state)
        steps.append(y)
    is_stepped(net, torch.stack(steps))
    stream_is_stepped([sequence()], net.convert_to("m"))


def test_a_stream_that_is_not_iterable() -> None:
    net = snnfx.convert(small(training=False))
    refused(
        "SNNFX305",
        "runtime/streaming.py:Stream.__init__",
        "Pass a generator, a list or a DataLoader.",
        lambda: net.stream(3),
    )
    stream_is_stepped([sequence()])
    stream_is_stepped(x for x in sequence().split(2))
    stream_is_stepped(torch.utils.data.DataLoader(sequence(), batch_size=2))


def test_a_stream_of_one_tensor() -> None:
    net = snnfx.convert(small(training=False))
    refused(
        "SNNFX309",
        "runtime/streaming.py:Stream.__init__",
        'Split it into chunks, net.stream(x_seq.split(16)), or stream steps with of="steps".',
        lambda: net.stream(sequence()),
    )
    stream_is_stepped(sequence().split(2))
    stream_is_stepped(sequence(), of="steps")


def test_a_stream_with_statistics_over_time() -> None:
    net = snnfx.convert(normed())
    refused(
        "SNNFX317",
        "runtime/streaming.py:Stream._refuse_statistics_over_time",
        'Call net.eval() for inference; to train, convert with batch_norm="per_step".',
        lambda: next(net.stream([sequence()])),
        names="`1`",
    )
    stream_is_stepped(sequence().split(2), net.eval())
    stream_is_stepped(sequence().split(2), snnfx.convert(normed(), batch_norm="per_step"))


def test_a_stream_without_time() -> None:
    net = snnfx.convert(small(training=False), time_dim=None)
    refused(
        "SNNFX310",
        "runtime/streaming.py:Stream._check_chunks",
        'Stream one item per step: net.stream(itertools.repeat(x, 100), of="steps").',
        lambda: next(net.stream([sequence()[0]])),
    )
    y_seq = torch.cat(list(net.stream(itertools.repeat(sequence()[0], 100), of="steps")))
    is_stepped(net, y_seq, sequence()[:1].expand(100, N, C))


def test_an_empty_chunk() -> None:
    net, chunks = snnfx.convert(small(training=False)), [sequence()[:2], sequence()[:0], sequence()[2:]]
    refused(
        "SNNFX301",
        "runtime/streaming.py:Stream._check_chunks",
        "Skip empty chunks: net.stream(x for x in chunks if x.numel()).",
        lambda: list(net.stream(chunks)),
        names="item 1",
    )
    stream_is_stepped(x for x in chunks if x.numel())


def test_items_that_are_not_inputs() -> None:
    net = snnfx.convert(small(training=False))
    arrays, loader = [x.numpy() for x in sequence().split(2)], [(x, 0) for x in sequence().split(2)]
    refused(
        "SNNFX305",
        "runtime/streaming.py:Stream._bind_item",
        "Convert arrays to tensors: net.stream(torch.from_numpy(x) for x in arrays).",
        lambda: list(net.stream(arrays)),
        names="item 0",
    )
    stream_is_stepped(torch.from_numpy(x) for x in arrays)
    refused(
        "SNNFX307",
        "runtime/streaming.py:Stream._bind_item",
        "Pass only the inputs of the net: net.stream(x for x, label in loader).",
        lambda: list(net.stream(loader)),
        names="item 0",
    )
    stream_is_stepped(x for x, label in loader)
    refused(
        "SNNFX305",
        "runtime/streaming.py:Stream._bind_item",
        "Yield a tensor, a tuple of positional arguments or a dict of keyword arguments.",
        lambda: list(net.stream([None])),
    )
    stream_is_stepped([(x,) for x in sequence().split(2)])
    stream_is_stepped([{"input": x} for x in sequence().split(2)])


def test_carried_arguments_in_a_stream() -> None:
    class Carried(nn.Module):
        def forward(self, x: Tensor, u: Tensor | None = None) -> tuple[Tensor, Tensor]:
            u = x if u is None else 0.5 * u + x
            return u.relu(), u

    net, start = snnfx.convert(Carried()), torch.ones(N, C)
    refused(
        "SNNFX307",
        "runtime/streaming.py:Stream._bind_item",
        " Pass carried arguments with state=, by slot name.",
        lambda: list(net.stream([(sequence(), start)])),
    )
    parts, u = list(net.stream(sequence().split(2), state={"u": start})), start
    for t, x in enumerate(sequence()):
        y, u = net.source(x, u)
        assert_same(torch.cat(parts)[t], y)


def test_steps_of_several_shapes() -> None:
    net = snnfx.convert(small(training=False))
    steps = [sequence()[0], sequence()[1, :1]]
    refused(
        "SNNFX303",
        "runtime/streaming.py:_stack",
        "Yield steps of one shape; for a DataLoader, set drop_last=True.",
        lambda: list(net.stream(steps, of="steps")),
        names="[2, 3] and [1, 3]",
    )
    samples = sequence().flatten(0, 1)[:-1]
    loader = torch.utils.data.DataLoader(samples, batch_size=N, drop_last=True)
    stream_is_stepped(loader, of="steps")


# -- backward passes and transforms ------------------------------------------------------------------------------------


def test_a_carried_state_in_a_backward_pass() -> None:
    net = snnfx.convert(small(), carry_state=True)
    x_seq = sequence().requires_grad_()

    def call() -> None:
        checkpoint(net, x_seq, use_reentrant=False).sum().backward()

    refused(
        "SNNFX320",
        "runtime/backward_pass.py:refuse_to_carry_state_in_backward",
        "Convert with checkpoint=..., or pass the state explicitly: ",
        call,
        names="1.v",
    )
    expected = run_stepped(small(), sequence())
    net = snnfx.convert(small(), carry_state=True, checkpoint="regions")
    assert_same(run_net(net, sequence()).input_grads, expected.input_grads)
    net = snnfx.convert(small())
    x_seq = sequence().requires_grad_()
    y_seq, _ = checkpoint(net.run, x_seq, state=None, use_reentrant=False)
    assert_same(y_seq.detach(), expected.outputs)
    y_seq.sum().backward()
    plain = sequence().requires_grad_()
    net(plain).sum().backward()
    assert_same(x_seq.grad, plain.grad)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.count = self.count + 1
        return self.fc(x) * (1 + self.count)


def test_an_updated_buffer_in_a_backward_pass() -> None:
    net = snnfx.convert(Counts())
    x_seq = sequence().requires_grad_()
    refused(
        "SNNFX320",
        "runtime/backward_pass.py:refuse_to_update_slots",
        'Let the net recompute by itself: snnfx.convert(model, checkpoint="regions").',
        lambda: checkpoint(net, x_seq, use_reentrant=False).sum().backward(),
        names="`count`",
    )
    assert_converts(Counts(), sequence(), checkpoint="regions")


def test_an_updated_buffer_in_a_transform() -> None:
    net = snnfx.convert(Counts())
    refused(
        "SNNFX321",
        "runtime/backward_pass.py:refuse_to_update_slots",
        "Compute gradients with torch.autograd, or call net.eval() if only training updates the tensor.",
        lambda: torch.func.grad(lambda x: net(x).sum())(sequence()),
        names="`count`",
    )
    x_seq = sequence().requires_grad_()
    (gradient,) = torch.autograd.grad(snnfx.convert(Counts())(x_seq).sum(), x_seq)
    assert gradient.any()
    net.eval()
    expected = net.source.fc.weight.sum(0).expand(T, N, C).detach() * (1 + net.source.count)
    assert_same(torch.func.grad(lambda x: net(x).sum())(sequence()).detach(), expected)
