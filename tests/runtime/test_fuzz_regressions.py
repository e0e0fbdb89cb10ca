"""What `tools/fuzz` found, each as small as it got; the reference is a plain loop over the model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from support.stepping import assert_converts, assert_same, fresh_copy, step_model

EXAMPLES = pytest.mark.parametrize("examples", [True, False], ids=["examples", "no-examples"])


class Step(nn.Module):
    """A model of one function and one optional layer."""

    def __init__(self, function: Any, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 0.4


@EXAMPLES
def test_state_that_starts_as_a_number_is_read_outside_of_the_loop_at_the_only_step(examples: bool) -> None:
    class Delayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h: Any = 0.0

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.h
            self.h = 0.5 * self.h + x
            return y

    assert_converts(Delayed(), sequence(1, 2, 6), examples=examples)


@EXAMPLES
def test_named_field_of_a_pair_goes_where_the_pair_is(examples: bool) -> None:
    model = Step(lambda self, x: self.layer(x.max(1).values), neuron.LIFNode(v_threshold=0.5))
    assert_converts(model, sequence(3, 2, 4, 5), examples=examples)


@EXAMPLES
def test_initial_value_made_of_one_element_of_a_tuple(examples: bool) -> None:
    class Halves(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("h", None)

        def forward(self, x: Tensor) -> Tensor:
            left, right = x.chunk(2, 1)
            if self.h is None:
                self.h = left.detach() * 0.5
            self.h = 0.5 * self.h + right
            return self.h

    assert_converts(Halves(), sequence(4, 2, 6), examples=examples)


@EXAMPLES
def test_running_statistics_of_a_layer_whose_output_nobody_reads(examples: bool) -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.bn(x)
            return x * 2

    assert_converts(Watched().double(), sequence(4, 5, 3), examples=examples)


def test_batch_norm_that_vmap_refuses_counts_its_batches_once() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0.3 else x - 1

    model = nn.Sequential(Opaque(), nn.BatchNorm1d(3))
    net = snnfx.convert(model, batch_norm="fold")
    net(torch.rand(4, 5, 3))
    assert model[1].num_batches_tracked in (1, 4)


@EXAMPLES
def test_spectral_norm_estimates_its_weight_at_each_step(examples: bool) -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3).double())
    assert_converts(nn.Sequential(layer), sequence(3, 2, 6), examples=examples)


@EXAMPLES
def test_functional_batch_norm_over_the_batch_in_evaluation(examples: bool) -> None:
    model = Step(lambda self, x: F.batch_norm(x, None, None, training=True)).eval()
    assert_converts(model, sequence(3, 4, 5), examples=examples)
    assert_converts(model.train(), sequence(3, 4, 5), examples=examples, batch_norm="fold")


@EXAMPLES
def test_change_in_place_of_a_value_that_has_a_view_is_refused(examples: bool) -> None:
    def function(self: Step, x: Tensor) -> Tensor:
        y = x * 1.5
        view = y.flatten(1)
        y.add_(1)
        return view

    with pytest.raises(snnfx.errors.CaptureError, match="SNNFX214"):
        snnfx.convert(Step(function), example_inputs=torch.rand(2, 3) if examples else None)


def test_change_in_place_of_a_value_whose_view_was_read_before_is_functional() -> None:
    def function(self: Step, x: Tensor) -> Tensor:
        y = x * 1.5
        total = y.flatten(1).sum(1, keepdim=True)
        y.add_(1)
        return y + total

    assert_converts(Step(function), sequence(3, 2, 4))


def test_layer_in_place_on_another_name_of_a_state_is_refused() -> None:
    class Cell(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("h", 0.0)
            self.drop = nn.Dropout(0.3)
            self.clip = nn.Hardtanh(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            self.h = self.h * 0.5 + x
            return self.clip(self.drop(self.h))

    with pytest.raises(snnfx.errors.CaptureError, match="SNNFX214"):
        snnfx.convert(Cell())


@EXAMPLES
def test_layer_in_place_behind_a_neuron_is_no_problem(examples: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(), nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True))
    assert_converts(model.double(), sequence(3, 2, 4), examples=examples)


@EXAMPLES
def test_value_made_of_sizes_feeds_a_neuron(examples: bool) -> None:
    def function(self: Step, x: Tensor) -> tuple[Tensor, Tensor]:
        ramp = torch.arange(x.shape[1], dtype=x.dtype) * 0.3
        return self.layer(ramp) * x, ramp

    assert_converts(Step(function, neuron.LIFNode(v_threshold=0.5)), sequence(4, 2, 4), examples=examples)


def test_value_made_of_the_size_of_a_mapped_value_is_not_folded() -> None:
    def function(self: Step, x: Tensor) -> Tensor:
        y = self.layer(x)  # without a batch: [3, 6] is one sample
        return y * torch.arange(y.shape[0]).sum()

    assert_converts(Step(function, nn.Conv1d(3, 2, 1).double()), sequence(2, 3, 6), examples=True)


def test_len_of_the_example_holds_for_its_size_only() -> None:
    model = Step(lambda self, x: x * len(x))
    net = snnfx.convert(model, example_inputs=torch.rand(3, 2))
    assert_same(net(sequence_ := sequence(4, 3, 2)), step_model(model, sequence_))
    longer = sequence(4, 5, 2)
    try:
        outputs = net(longer)
    except snnfx.errors.InputError as error:
        assert error.code == "SNNFX312"
    else:
        assert_same(outputs, step_model(model, longer))


@pytest.mark.parametrize("T", [1, 3])
def test_layer_called_twice_updates_its_statistics_in_the_order_of_the_calls(T: int) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = x.abs()
            self.bn(x)
            return self.bn(y)

    model = Twice().double()
    snnfx.verify(model, snnfx.convert(model, batch_norm="fold"), sequence(T, 4, 3))
    assert_converts(model, sequence(T, 4, 3))


def test_spectral_norm_called_twice_estimates_its_weight_in_the_order_of_the_calls() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4).double())
    assert_converts(Step(lambda self, x: self.layer(self.layer(x).tanh()), layer), sequence(3, 2, 4))


def test_opaque_module_fed_by_an_invariant_input() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0.3 else x - 1

    model = nn.Sequential(Opaque())
    image = torch.rand(3, 2)
    net = snnfx.convert(model, time_dim=None)
    assert_same(net(image, T=4), model(image).expand(4, 3, 2))


def test_view_of_the_last_sample_is_as_contiguous_as_in_one_step() -> None:
    model = Step(lambda self, x: self.layer(x[-1:]), Step(lambda self, x: x.view(-1, x.shape[-1])))
    assert_converts(model, sequence(2, 3, 1, 4, 4), examples=True)


def test_largest_of_all_elements_shares_its_gradient_among_equals() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / (1 + x.max())

    x_seq = torch.ones(2, 3, 4, dtype=torch.float64)
    assert_converts(Constant(), x_seq)


@EXAMPLES
def test_initial_value_that_only_running_statistics_depend_on(examples: bool) -> None:
    class Trace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h: Any = None
            self.bn = nn.BatchNorm1d(6, affine=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = x.detach() * 0.5
            self.bn(x + self.h)
            self.h = x
            return x * 2

    x_seq = sequence(3, 4, 6)
    model, other = Trace().double(), Trace().double()
    net = snnfx.convert(model, batch_norm="per_step", example_inputs=x_seq[0] if examples else None)
    net(x_seq)
    step_model(fresh := fresh_copy(other), x_seq)
    assert_same(dict(model.named_buffers()), dict(fresh.named_buffers()))


def test_verify_looks_at_the_regions_that_run_the_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.bn(x + y)

    model = Two().double()
    net = snnfx.convert(model, batch_norm="fold")
    snnfx.verify(model, net, sequence(3, 4, 3), sequence(3, 1, 3))
    snnfx.verify(model, net, sequence(3, 4, 3), sequence(3, 4, 3))


def test_layer_called_twice_behind_operations_over_the_batch_updates_its_statistics_in_the_order_of_the_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            mixed = x.flip(0)  # not step by step along the batch: what follows is mapped
            self.bn(mixed.transpose(0, 1).reshape(-1, 3) * 2)
            self.bn(x.mean(0, keepdim=True).repeat(2, 1))
            return x

    model = Twice().double()
    net = snnfx.convert(model, batch_norm="fold", example_inputs=torch.rand(4, 3))
    x_seq = sequence(3, 4, 3)
    net(x_seq)
    changed = {name: b.clone() for name, b in model.named_buffers()}
    fresh = Twice().double()
    fresh.bn(torch.cat([x.flip(0).transpose(0, 1).reshape(-1, 3) * 2 for x in x_seq]))
    fresh.bn(torch.cat([x.mean(0, keepdim=True).repeat(2, 1) for x in x_seq]))
    assert_same(changed, dict(fresh.named_buffers()))


class OwnLeak(snnfx.MemoryModule):
    """Gives its state itself, not a copy of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        return self.v


class OpaqueLeak(OwnLeak):
    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        if float(self.v.detach().mean()) > 0.4:
            self.v = self.v - 0.5
        return self.v


def relu_in_place(y: Tensor) -> Tensor:
    return F.relu(y, inplace=True)


def twice_in_place(y: Tensor) -> Tensor:
    y.mul_(2)
    return y


@EXAMPLES
@pytest.mark.parametrize("change", [relu_in_place, twice_in_place])
@pytest.mark.parametrize("leak", [OwnLeak, neuron.LeakyIntegrator])
def test_change_in_place_of_an_output_that_is_the_state_changes_the_state(
    leak: Any, change: Any, examples: bool
) -> None:
    model = Step(lambda self, x: change(self.layer(x - 0.3)), leak())
    assert_converts(model, sequence(4, 2, 3), examples=examples)


@pytest.mark.parametrize("change", [relu_in_place, twice_in_place])
def test_change_in_place_of_an_opaque_output_that_is_the_state_needs_examples(change: Any) -> None:
    model = Step(lambda self, x: change(self.layer(x - 0.3)), OpaqueLeak())
    assert_converts(model, sequence(4, 2, 3), examples=True)
    with pytest.raises(snnfx.errors.CaptureError, match="SNNFX214.*may be the state of `layer`"):
        snnfx.convert(model)


def test_change_in_place_of_a_view_of_the_state_is_refused() -> None:
    model = nn.Sequential(neuron.LeakyIntegrator(), nn.Flatten(), nn.ReLU(inplace=True))
    with pytest.raises(snnfx.errors.CaptureError, match="SNNFX214"):
        snnfx.convert(model)


@EXAMPLES
@pytest.mark.parametrize("change", [relu_in_place, twice_in_place])
def test_spikes_may_be_changed_in_place(change: Any, examples: bool) -> None:
    model = Step(lambda self, x: change(self.layer(x)), neuron.LIFNode(v_threshold=0.5))
    assert_converts(model, sequence(4, 2, 3), examples=examples)


@EXAMPLES
def test_part_of_a_value_that_a_layer_changed_in_place_is_changed(examples: bool) -> None:
    model = Step(lambda self, x: self.layer(y := x - 0.5) + y[:, :1], nn.ReLU(inplace=True))
    assert_converts(model, sequence(3, 2, 4), examples=examples)


@EXAMPLES
def test_data_of_a_mapped_value_is_detached(examples: bool) -> None:
    model = Step(lambda self, x: x.flip(0).data * x)
    assert_converts(model, sequence(3, 2, 4), examples=examples)


@EXAMPLES
@pytest.mark.parametrize("drop", [False, True], ids=["input", "dropout"])
def test_verify_runs_a_layer_that_changes_what_it_is_given_in_place(drop: bool, examples: bool) -> None:
    model = Step(lambda self, x: self.layer(F.dropout(x, 1.0) if drop else x), nn.Hardtanh(inplace=True))
    x_seq = sequence(2, 4, 3) * 2
    snnfx.verify(model, snnfx.convert(model, example_inputs=x_seq[0] if examples else None), x_seq)


@EXAMPLES
@pytest.mark.parametrize("rank", [3, 4])
def test_state_that_changes_its_shape_after_the_first_step_is_refused(rank: int, examples: bool) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = torch.zeros(x.shape[0], 4)
            before = self.h + 0.0
            self.h = x
            return before

    x_seq = torch.rand(3, *(4, 2, 3, 4)[4 - rank :])
    net = snnfx.convert(Growing(), example_inputs=x_seq[0] if examples else None)
    with pytest.raises(snnfx.errors.InputError, match="SNNFX313 the state `h` changes its shape"):
        net(x_seq)


@EXAMPLES
def test_first_value_without_a_batch_stands_for_that_of_every_sample(examples: bool) -> None:
    class Trace(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("h", torch.full((4,), 0.3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            before = x + self.h
            self.h = x
            return before

    assert_converts(Trace(), sequence(3, 2, 4), examples=examples)


@EXAMPLES
def test_spikingjelly_neuron_called_with_two_shapes_in_a_step_is_refused(examples: bool) -> None:
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    model = Step(lambda self, x: self.layer(x).sum() + self.layer(x[:, :2]), sj.LIFNode())
    with pytest.raises(snnfx.errors.SnnfxError, match=r"SNNFX308 state `v` of LIFNode has shape \[2, 4\]"):
        snnfx.convert(model, example_inputs=torch.rand(2, 4) if examples else None)(torch.rand(3, 2, 4))


def test_net_that_calls_a_function_without_a_name_of_its_own_pickles() -> None:
    net = snnfx.convert(nn.Sequential(Pooled()))
    x_seq = torch.rand(3, 2, 1, 4, 4)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x_seq), net(x_seq))


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)


def test_batch_norm_that_averages_over_all_batches_tells_its_shape() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), Step(lambda self, x: x.expand(2, *x.shape))).double()
    net = snnfx.convert(model, example_inputs=torch.rand(4, 3, dtype=torch.float64))
    assert not net.program.opaque
    snnfx.verify(model, net, sequence(3, 4, 3))


@EXAMPLES
def test_dtype_and_size_of_an_image_behind_a_convolution(examples: bool) -> None:
    model = Step(lambda self, x: (y := self.layer(x)).to(y.dtype) * y.size(1), nn.Conv2d(2, 3, 3))
    assert_converts(model.double(), sequence(2, 2, 2, 5, 5), examples=examples)


@pytest.mark.parametrize("asks", [False, True])
def test_model_is_captured_in_both_modes_only_if_it_asks_for_its_mode(asks: bool) -> None:
    modes: list[bool] = []

    def function(self: Step, x: Tensor) -> Tensor:
        modes.append(vars(self)["training"])
        return x * 2 if asks and self.layer.asked() else x + 1

    class Inside(nn.Module):
        def asked(self) -> bool:
            return self.training

    net = snnfx.convert(Step(function, Inside()))
    assert modes == ([True, False] if asks else [True])
    x_seq = torch.ones(2, 3)
    assert net(x_seq).unique().item() == 2.0
    assert net.eval()(x_seq + 1).unique().item() == 3.0
    assert "training" not in vars(nn.Module)


def test_flag_of_a_layer_is_that_of_the_mode() -> None:
    model = Step(lambda self, x: F.dropout(x, self.layer.p, self.layer.training), nn.Dropout(0.5))
    for training in (True, False):
        net = snnfx.convert(model.train(training))
        x_seq = torch.ones(4, 3, 50)
        assert torch.equal(net.eval()(x_seq), x_seq)
        assert not torch.equal(net.train()(x_seq), x_seq)


@EXAMPLES
@pytest.mark.parametrize("decay", [1.0, 0.5], ids=["held", "decaying"])
def test_state_of_another_shape_than_the_inputs_of_its_loop_keeps_it(decay: float, examples: bool) -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = torch.full_like(F.max_pool2d(x, 2), 0.3)
            if decay < 1:
                self.h = self.h * decay
            return self.h + x.mean()

    assert_converts(Pool(), sequence(3, 2, 1, 4, 4), examples=examples)


def test_attribute_that_only_an_initial_value_reads_is_kept() -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = x * 0 + 1
            self.h = self.h * 0.8
            return self.h

    model, x_seq = nn.Sequential(Decay(), Decay()).double(), torch.rand(4, 2, 3, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.testing.assert_close(net(x_seq), step_model(model, x_seq))


def test_state_of_which_only_the_shape_is_read() -> None:
    class Checked(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("h", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = torch.zeros(x.shape[0], 3, dtype=x.dtype)
            before = x + self.h
            assert before.shape == x.shape
            self.h = x * 2
            return self.h

    model, x_seq = Checked().double(), torch.rand(4, 2, 3, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    torch.testing.assert_close(net(x_seq), step_model(model, x_seq))


@EXAMPLES
@pytest.mark.parametrize("training", [True, False])
def test_state_whose_shape_nothing_tells_that_a_step_reads(examples: bool, training: bool) -> None:
    """The kernel made a state without dimensions: only the first value had a shape, and that came in as a number."""

    class Halving(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("h", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = torch.zeros(x.shape[0], 4, dtype=x.dtype) + 0.5
            self.h = 0.5 * self.h
            return self.h

    x, model = sequence(3, 5), Halving().train(training)
    net = snnfx.convert(model, example_inputs=x if examples else None, time_dim=None)
    for batch in (3, 2):
        outputs, state = net.run(x[:batch], T=3)
        expected = step_model(fresh_copy(model), x[:batch].expand(3, batch, 5))
        assert_same([outputs, state["h"]], [expected, expected[-1]])


@EXAMPLES
def test_batch_norm_of_a_constant_whose_batch_is_not_known(examples: bool) -> None:
    """SNNFX305 at the call: a fold without inputs. Its statistics are updated at each step."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad, self.norm, self.lif = nn.ZeroPad2d(1), nn.BatchNorm1d(6), neuron.IFNode(v_threshold=0.7)

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.norm(self.pad(x)))

    x, model = sequence(3, 4), Padded().double()
    plain = fresh_copy(model)
    expected = step_model(plain, x.expand(3, 3, 4))
    net = snnfx.convert(model, example_inputs=x if examples else None, time_dim=None, batch_norm="per_step")
    assert_same(net(x, T=3), expected)
    assert_same(model.norm.running_mean, plain.norm.running_mean)


class CountsUnread(snnfx.MemoryModule):
    """Its state is a buffer's next value, which no output reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rate", torch.zeros(2))
        self.register_memory("h", torch.full((3, 2), 0.2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.rate = self.rate * 0.9 + x.detach().reshape(-1, x.shape[-1]).mean(0) * 0.1
        self.h = x / (1 + self.rate.abs())
        return self.h


def test_values_that_only_final_states_need_may_share_a_region_with_others() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.glu, self.part = nn.GLU(-1), CountsUnread()

        def forward(self, x: Tensor) -> Tensor:
            y = self.glu(x)
            self.part(y)
            return y

    model, x_seq = Unread().double(), sequence(4, 3, 4)
    expected = step_model(fresh := copy.deepcopy(model), x_seq)
    assert_same(snnfx.convert(model, example_inputs=x_seq[0])(x_seq), expected)
    assert_same(model.part.rate, fresh.part.rate)


@EXAMPLES
def test_instance_norm_of_an_input_without_time_updates_its_statistics_at_each_step(examples: bool) -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm2d(2, track_running_stats=True)

        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            return x + self.norm(image)

    x_seq, image = sequence(3, 4, 2, 3, 3), sequence(4, 2, 3, 3)
    model = Conditioned().double()
    stepped = copy.deepcopy(model)
    net = snnfx.convert(model, example_inputs=(x_seq[0], image) if examples else None, time_dim=(0, None))
    expected = torch.stack([stepped(x, image) for x in x_seq])
    torch.testing.assert_close(net(x_seq, image), expected)
    torch.testing.assert_close(model.norm.running_mean, stepped.norm.running_mean)


@EXAMPLES
def test_a_map_that_vmap_refuses_with_an_index_error_runs_step_by_step(examples: bool) -> None:
    net = snnfx.convert(Step(lambda self, x: x.flip(0) * 2), example_inputs=torch.tensor(1.0) if examples else None)
    x_seq = torch.rand(3)
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX504"):
        torch.testing.assert_close(net(x_seq), x_seq * 2)


def test_a_fold_that_only_updates_buffers_is_bound() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.lif = nn.BatchNorm1d(4), neuron.IFNode(v_threshold=0.7)

        def forward(self, x: Tensor) -> Tensor:
            y = self.lif(x)
            self.norm(y * 2)
            return y

    model, x_seq = Unread().double(), sequence(3, 5, 4)
    expected = step_model(fresh_copy(model), x_seq)
    folded = nn.BatchNorm1d(4).double()
    net = snnfx.convert(model, example_inputs=x_seq[0])
    for _ in range(4):
        assert_same(net(x_seq), expected)
        folded(2 * expected.flatten(0, 1))
    assert_same([*model.norm.buffers()], [*folded.buffers()])
