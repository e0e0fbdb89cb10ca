"""Neurons: charge, fire, reset as documented, equal to SpikingJelly, pure in `step`, stateful when called."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from snnfx import neuron, surrogate
from snnfx.errors import InputError
from snnfx.neuron import AdaptiveLIFNode, BaseNode, CUBALIFNode, IFNode, LeakyIntegrator, LIFNode, ParametricLIFNode
from snnfx.state.registry import adapter_of, detach_net, reset_net
from snnfx.state.stateful import Stateful
from snnfx.state.step_calls import call_stateful, initial_value

T, N, C = 12, 3, 5
ALL: list[Callable[..., neuron.ElementwiseNode]] = [
    IFNode,
    LIFNode,
    ParametricLIFNode,
    AdaptiveLIFNode,
    CUBALIFNode,
    LeakyIntegrator,
]
SPIKING = ALL[:-1]
RESETS = (0.0, 0.2, None)


def sequence(dtype: torch.dtype = torch.float64, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return (torch.randn(T, N, C, generator=generator, dtype=torch.float64) * scale + 0.4).to(dtype)


def by_steps(module: nn.Module, x_seq: Tensor) -> Tensor:
    return torch.stack([module(x) for x in x_seq])


def run(module: nn.Module, x_seq: Tensor) -> dict[str, Tensor]:
    """Everything a sequence gives: outputs, final states, gradients of the input and of the parameters."""
    x_seq = x_seq.detach().clone().requires_grad_()
    output = by_steps(module, x_seq)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    states = dict(zip(module._memories, module._memories.values(), strict=True))
    loss = (output * weights).sum() + sum(state.square().sum() for state in states.values())
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(loss, [x_seq, *parameters.values()])
    result = {"output": output, **states, "x.grad": gradients[0]}
    result.update({f"{name}.grad": g for name, g in zip(parameters, gradients[1:], strict=True)})
    return {name: value.detach() for name, value in result.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


class Loop(nn.Module):
    """The equations written down once more: the surrogate as a straight-through sum, all cases by `if`."""

    def __init__(self, names: list[str], **options: Any) -> None:
        super().__init__()
        self._memories: dict[str, Any] = dict.fromkeys(names, 0.0)
        self.o = options
        if "v_reset" in options and options["v_reset"] is not None:
            self._memories["v"] = options["v_reset"]
        if "w" in options:
            self.w = nn.Parameter(torch.tensor(options["w"], dtype=torch.float64))

    def rate(self) -> Any:
        return 1 / (1 + torch.exp(-self.w)) if "w" in self.o else 1 / self.o["tau"]

    def forward(self, x: Tensor) -> Tensor:
        m, o = self._memories, self.o
        rest = o.get("v_reset") or 0.0
        if o["kind"] == "if":
            h = m["v"] + x
        elif o["kind"] == "cuba":
            m["c"] = o["c_decay"] * m["c"] + x
            h = o["v_decay"] * m["v"] + m["c"]
        else:
            leak = rest + (1 - self.rate()) * (m["v"] - rest)
            h = leak + (self.rate() * x if o["decay_input"] else x)
        if o["kind"] == "integrator":
            m["v"] = h
            return h
        threshold = o["v_threshold"] + (o["beta"] * m["b"] if "b" in m else 0.0)
        soft = torch.sigmoid(4 * (h - threshold))
        spike = (h >= threshold).to(x.dtype) - soft.detach() + soft
        in_reset = spike.detach() if o["detach_reset"] else spike
        if o["v_reset"] is None:
            m["v"] = h - in_reset * threshold
        else:
            m["v"] = h + in_reset * (o["v_reset"] - h)
        if "b" in m:
            m["b"] = (1 - 1 / o["tau_b"]) * m["b"] + 1 / o["tau_b"] * spike
        return spike


SPIKE_OPTIONS = [
    {"v_threshold": threshold, "v_reset": reset, "detach_reset": detach}
    for threshold, reset, detach in itertools.product((0.8,), RESETS, (False, True))
]
LIF_OPTIONS = [{**o, "decay_input": decay} for o in SPIKE_OPTIONS for decay in (True, False)]


# The equations


@pytest.mark.parametrize("options", SPIKE_OPTIONS, ids=str)
def test_if_equals_the_written_out_loop(options: dict[str, Any]) -> None:
    assert_same(run(IFNode(**options), sequence()), run(Loop(["v"], kind="if", **options), sequence()))


@pytest.mark.parametrize("options", LIF_OPTIONS, ids=str)
def test_lif_equals_the_written_out_loop(options: dict[str, Any]) -> None:
    loop = Loop(["v"], kind="lif", tau=3.0, **options)
    assert_same(run(LIFNode(tau=3.0, **options), sequence(scale=3.0)), run(loop, sequence(scale=3.0)))


@pytest.mark.parametrize("options", LIF_OPTIONS, ids=str)
def test_parametric_lif_equals_the_written_out_loop(options: dict[str, Any]) -> None:
    node = ParametricLIFNode(init_tau=3.0, **options).double()
    loop = Loop(["v"], kind="plif", w=node.w.item(), **options)
    assert_same(run(node, sequence(scale=3.0)), run(loop, sequence(scale=3.0)))


@pytest.mark.parametrize("options", LIF_OPTIONS, ids=str)
def test_adaptive_lif_equals_the_written_out_loop(options: dict[str, Any]) -> None:
    node = AdaptiveLIFNode(tau=3.0, tau_b=4.0, beta=1.3, **options)
    loop = Loop(["v", "b"], kind="alif", tau=3.0, tau_b=4.0, beta=1.3, **options)
    assert_same(run(node, sequence(scale=3.0)), run(loop, sequence(scale=3.0)))


@pytest.mark.parametrize("options", SPIKE_OPTIONS, ids=str)
def test_cuba_lif_equals_the_written_out_loop(options: dict[str, Any]) -> None:
    node = CUBALIFNode(c_decay=0.3, v_decay=0.6, surrogate_function=surrogate.Sigmoid(), **options)
    loop = Loop(["v", "c"], kind="cuba", c_decay=0.3, v_decay=0.6, **options)
    assert_same(run(node, sequence()), run(loop, sequence()))


@pytest.mark.parametrize("decay_input", [True, False])
def test_leaky_integrator_equals_the_written_out_loop(decay_input: bool) -> None:
    loop = Loop(["v"], kind="integrator", tau=3.0, decay_input=decay_input)
    assert_same(run(LeakyIntegrator(3.0, decay_input), sequence()), run(loop, sequence()))


@pytest.mark.parametrize("node_type", SPIKING, ids=lambda t: t.__name__)
def test_the_sequences_of_these_tests_make_neurons_fire_and_be_silent(node_type: Callable[..., BaseNode]) -> None:
    rate = by_steps(node_type(), sequence()).mean()
    assert 0.1 < rate < 0.9


def test_a_neuron_exactly_at_its_threshold_fires() -> None:
    assert IFNode(v_threshold=0.5)(torch.tensor([0.5, 0.4999])).tolist() == [1.0, 0.0]


def test_gradients_of_the_initial_state() -> None:
    node, x_seq = LIFNode(v_reset=None), sequence()[:4]
    v0 = torch.zeros(N, C, dtype=torch.float64, requires_grad=True)
    v, total = v0, torch.zeros(())
    for x in x_seq:
        spike, (v,) = node.step((v,), x)
        total = total + spike.sum() + v.sum()
    (grad,) = torch.autograd.grad(total, v0)
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


# SpikingJelly


def spikingjelly() -> Any:
    return pytest.importorskip("spikingjelly.activation_based.neuron")


@pytest.mark.parametrize("options", SPIKE_OPTIONS, ids=str)
def test_if_equals_spikingjelly(options: dict[str, Any]) -> None:
    assert_same(run(IFNode(**options), sequence()), run(spikingjelly().IFNode(**options), sequence()))


@pytest.mark.parametrize("options", LIF_OPTIONS, ids=str)
def test_lif_equals_spikingjelly(options: dict[str, Any]) -> None:
    ours, theirs = LIFNode(tau=1.7, **options), spikingjelly().LIFNode(tau=1.7, **options)
    assert_same(run(ours, sequence()), run(theirs, sequence()))


@pytest.mark.parametrize("options", LIF_OPTIONS, ids=str)
def test_parametric_lif_equals_spikingjelly(options: dict[str, Any]) -> None:
    ours = ParametricLIFNode(init_tau=1.7, **options).double()
    theirs = spikingjelly().ParametricLIFNode(init_tau=1.7, **options).double()
    assert_same(run(ours, sequence()), run(theirs, sequence()))


def test_state_dicts_are_exchangeable_with_spikingjelly() -> None:
    ours, theirs = ParametricLIFNode(init_tau=1.7), spikingjelly().ParametricLIFNode(init_tau=4.0)
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert theirs.w.item() == pytest.approx(-math.log(0.7))


@pytest.mark.parametrize("v_reset", RESETS)
def test_cuba_lif_equals_spikingjelly(v_reset: float | None) -> None:
    assert_same(
        run(CUBALIFNode(v_reset=v_reset), sequence()), run(spikingjelly().CUBALIFNode(v_reset=v_reset), sequence())
    )


def test_leaky_integrator_equals_spikingjelly() -> None:
    theirs = spikingjelly().NonSpikingLIFNode(tau=3.0)
    assert torch.equal(by_steps(LeakyIntegrator(tau=3.0), sequence()), torch.stack(theirs(sequence())))


@pytest.mark.parametrize("name", ["IFNode", "LIFNode", "ParametricLIFNode", "CUBALIFNode"])
def test_defaults_and_rounding_are_those_of_spikingjelly(name: str) -> None:
    ours, theirs = getattr(neuron, name)(), getattr(spikingjelly(), name)()
    x_seq = sequence(torch.float32)
    assert torch.equal(by_steps(ours, x_seq), by_steps(theirs, x_seq))
    assert torch.equal(ours.v, theirs.v)


# The pure step


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_calling_is_stepping_with_the_state_in_attributes(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    called, stepped = node_type(), node_type()
    state = stepped.initial_state(sequence(torch.float32)[0])
    for x in sequence(torch.float32):
        output, state = stepped.step(state, x)
        assert torch.equal(called(x), output)
        for name, value in zip(called.state_names(), state, strict=True):
            assert torch.equal(getattr(called, name), value)


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_step_changes_nothing(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    node = node_type()
    x = sequence(torch.float32)[0]
    state = tuple(torch.full_like(x, 0.3) for _ in node.state_names())
    x_before, state_before = x.clone(), [s.clone() for s in state]
    first = node.step(state, x)
    second = node.step(state, x)
    assert torch.equal(first[0], second[0])
    assert torch.equal(x, x_before)
    assert all(torch.equal(a, b) for a, b in zip(state, state_before, strict=True))
    assert all(not isinstance(getattr(node, name), Tensor) for name in node.state_names())


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_the_stateful_protocol(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    node, x = node_type(), sequence(torch.float32)[0]
    assert isinstance(node, Stateful)
    adapter = adapter_of(node)
    assert adapter is not None and adapter.elementwise(node)
    assert adapter.names(node) == node.state_names() == node.memory_names()
    state = node.initial_state(x)
    assert all(torch.equal(initial_value(node, i, x), value) for i, value in enumerate(state))
    assert torch.equal(call_stateful(node, state, x)[0], node.step(state, x)[0])


def test_state_names() -> None:
    names = {cls.__name__: cls().state_names() for cls in ALL}
    assert names.pop("AdaptiveLIFNode") == ("v", "b")
    assert names.pop("CUBALIFNode") == ("v", "c")
    assert set(names.values()) == {("v",)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_everything_has_the_dtype_of_the_input(
    node_type: Callable[..., neuron.ElementwiseNode], dtype: torch.dtype
) -> None:
    node, x = node_type(), sequence(dtype)[0].requires_grad_()
    state = node.initial_state(x)
    output, after = node.step(state, x)
    assert {t.dtype for t in (*state, output, *after)} == {dtype}
    assert not any(s.requires_grad for s in state)
    assert torch.autograd.grad(output.sum(), x)[0].dtype == dtype


def test_initial_state_is_v_reset_in_the_shape_of_the_input() -> None:
    x = torch.rand(2, 3)
    assert torch.equal(LIFNode(v_reset=-0.5).initial_state(x)[0], torch.full((2, 3), -0.5))
    assert torch.equal(LIFNode(v_reset=None).initial_state(x)[0], torch.zeros(2, 3))
    v, b = AdaptiveLIFNode(v_reset=0.25).initial_state(x)
    assert float(v.mean()) == 0.25 and not b.any()


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_a_number_stands_for_a_state_filled_with_it(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    node, x = node_type(), sequence(torch.float32)[0]
    numbers = tuple(0.1 * (i + 1) for i in range(len(node.state_names())))
    output, state = node.step(numbers, x)
    reference, full = node.step(tuple(torch.full_like(x, n) for n in numbers), x)
    assert torch.equal(output, reference)
    assert all(torch.equal(a, b) for a, b in zip(state, full, strict=True))
    assert float(IFNode().step((1,), torch.zeros(1))[0]) == 1.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_integer_inputs_are_currents_in_the_default_dtype(dtype: torch.dtype) -> None:
    events = (sequence() > 0.5).to(dtype)
    node, reference = LIFNode(tau=1.5), LIFNode(tau=1.5)
    assert torch.equal(by_steps(node, events), by_steps(reference, events.float()))
    assert node.v.dtype == node.initial_state(events[0])[0].dtype == torch.float32


def test_a_scalar_neuron() -> None:
    node = LIFNode()
    assert node(torch.tensor(3.0)).shape == node.v.shape == ()


# States that do not fit


def test_another_batch_size_is_refused_with_both_shapes_and_the_way_out() -> None:
    node = LIFNode()
    node(torch.rand(4, 3))
    with pytest.raises(
        InputError, match=r"SNNFX308 state `v` of LIFNode has shape \[4, 3\], its input \[2, 3\]"
    ) as error:
        node(torch.rand(2, 3))
    assert "reset_net" in str(error.value)
    assert node.v.shape == (4, 3)
    reset_net(node)
    assert node(torch.rand(2, 3)).shape == (2, 3)


def test_a_state_that_would_broadcast_is_refused_too() -> None:
    with pytest.raises(InputError, match="SNNFX308"):
        IFNode().step((torch.zeros(1, 3),), torch.rand(2, 3))


def test_a_state_of_another_number_of_slots_is_refused() -> None:
    with pytest.raises(InputError, match=r"SNNFX308 AdaptiveLIFNode\.step got 1 states: it has 2: v, b"):
        AdaptiveLIFNode().step((0.0,), torch.rand(2))


def test_a_state_of_another_dtype_is_converted() -> None:
    node = LIFNode()
    node(torch.rand(2, 3, dtype=torch.float64))
    assert node(torch.rand(2, 3, dtype=torch.bfloat16)).dtype == node.v.dtype == torch.bfloat16


def test_tracing_through_a_neuron_is_refused_instead_of_baking_its_state() -> None:
    with pytest.raises(InputError, match=r"SNNFX305 LIFNode was called with a Proxy"):
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), LIFNode()))


# Reset, copies


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_reset_starts_again(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    node, x_seq = node_type(), sequence(torch.float32)
    first = by_steps(node, x_seq)
    assert not torch.equal(by_steps(node, x_seq), first)
    node.reset()
    assert torch.equal(by_steps(node, x_seq), first)


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_copies_in_the_middle_of_training_go_on_alike(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    node, x_seq = node_type(), sequence(torch.float32).requires_grad_()
    by_steps(node, x_seq).sum().backward()
    assert node.v.grad_fn is not None
    clone = copy.deepcopy(node)
    assert clone.v.grad_fn is None
    detach_net(node)
    other = pickle.loads(pickle.dumps(node))
    expected = by_steps(node, x_seq)
    assert torch.equal(by_steps(clone, x_seq), expected)
    assert torch.equal(by_steps(other, x_seq), expected)


def test_the_state_is_not_in_the_state_dict() -> None:
    node = ParametricLIFNode()
    node(torch.rand(2))
    assert list(node.state_dict()) == ["w"]
    assert not LIFNode().state_dict()


def test_neurons_do_not_share_their_surrogate() -> None:
    one, two = LIFNode(), LIFNode()
    assert one.surrogate_function is not two.surrogate_function
    one.surrogate_function.alpha = 1.0
    assert two.surrogate_function.alpha == 4.0


# Hyperparameters


def test_hyperparameters_are_live() -> None:
    node, x = LIFNode(tau=2.0), torch.full((1,), 1.8)
    assert float(node(x)) == 0.0
    node.tau, node.v_threshold, node.v_reset, node.decay_input = 4.0, 0.5, 0.125, False
    node.reset()
    reference = LIFNode(4.0, False, 0.5, 0.125)
    for _ in range(4):
        assert torch.equal(node(x), reference(x))
        assert torch.equal(node.v, reference.v)


def test_v_reset_set_before_the_first_step_is_the_initial_state() -> None:
    node = LIFNode()
    node.v_reset = 0.25
    assert node.v == 0.25
    assert float(node.initial_state(torch.zeros(1))[0]) == 0.25
    node(torch.zeros(1))
    node.v_reset = None
    assert float(node.v) == 0.25  # a running state is not touched
    node.reset()
    assert node.v == 0.0


def test_v_reset_does_not_overwrite_a_state_that_was_set_by_hand() -> None:
    node = LIFNode()
    node.v = 0.7
    node.v_reset = 0.25
    assert node.v == 0.7


def test_the_surrogate_is_live() -> None:
    node, x = IFNode(), torch.ones(1, requires_grad=True)
    node.surrogate_function = surrogate.ATan(alpha=3.0)
    assert float(torch.autograd.grad(node(x).sum(), x)[0]) == 1.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LIFNode(tau=1.0), r"`tau` of LIFNode cannot be 1.0: it must be a finite number above 1"),
        (lambda: LIFNode(tau=math.inf), r"`tau` of LIFNode cannot be inf"),
        (lambda: LIFNode(tau=torch.tensor(2.0)), r"`tau` of LIFNode cannot be a Tensor"),
        (lambda: LIFNode(decay_input=1), r"`decay_input` of LIFNode cannot be 1: it must be True or False"),
        (lambda: ParametricLIFNode(init_tau=0.5), r"`init_tau` of ParametricLIFNode cannot be 0.5"),
        (lambda: IFNode(v_threshold=math.nan), r"`v_threshold` of IFNode cannot be nan"),
        (lambda: IFNode(v_threshold=None), r"`v_threshold` of IFNode cannot be None"),
        (lambda: IFNode(v_reset="soft"), r"`v_reset` of IFNode cannot be 'soft'"),
        (lambda: IFNode(detach_reset=None), r"`detach_reset` of IFNode cannot be None"),
        (lambda: IFNode(surrogate_function=surrogate.ATan), r"cannot be ATan: .*\nPass an instance: ATan\(\)"),
        (lambda: IFNode(surrogate_function="ATan"), r"`surrogate_function` of IFNode cannot be 'ATan'"),
        (lambda: AdaptiveLIFNode(tau_b=1), r"`tau_b` of AdaptiveLIFNode cannot be 1"),
        (lambda: AdaptiveLIFNode(beta=math.inf), r"`beta` of AdaptiveLIFNode cannot be inf"),
        (lambda: CUBALIFNode(c_decay=1.5), r"`c_decay` of CUBALIFNode cannot be 1.5: .* from 0 to 1"),
        (lambda: CUBALIFNode(v_decay=-0.1), r"`v_decay` of CUBALIFNode cannot be -0.1"),
        (lambda: LeakyIntegrator(tau=0), r"`tau` of LeakyIntegrator cannot be 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=f"SNNFX309 .*{message}|SNNFX309 {message}"):
        make()


def test_a_hyperparameter_set_out_of_range_is_refused_and_keeps_its_value() -> None:
    node = LIFNode()
    with pytest.raises(InputError, match="SNNFX309"):
        node.tau = 0.5
    assert node.tau == 2.0


def test_integers_are_taken_as_floats() -> None:
    node = LIFNode(tau=2, v_threshold=1, v_reset=0)
    assert [type(v) for v in (node.tau, node.v_threshold, node.v_reset, node.v)] == [float] * 4


def test_repr_shows_the_hyperparameters() -> None:
    assert repr(LeakyIntegrator(3.0, False)) == "LeakyIntegrator(tau=3.0, decay_input=False)"
    text = repr(AdaptiveLIFNode(tau_b=7.0, v_reset=None))
    assert all(part in text for part in ("v_reset=None", "tau=2.0", "tau_b=7.0", "beta=1.8", "Sigmoid(alpha=4.0)"))
    assert "tau=4" in repr(ParametricLIFNode(init_tau=4.0))


def test_a_parameter_without_a_value_can_be_printed() -> None:
    with torch.device("meta"):
        assert "tau" not in repr(ParametricLIFNode())
    with FakeTensorMode():
        assert "tau" not in repr(ParametricLIFNode())


def test_tau_of_a_parametric_neuron_follows_its_parameter() -> None:
    node = ParametricLIFNode(init_tau=4.0)
    assert node.tau == pytest.approx(4.0)
    with torch.no_grad():
        node.w.zero_()
    assert node.tau == pytest.approx(2.0)


# Neurons of one's own


class DoubleIF(BaseNode):
    def charge(self, v: Tensor, x: Tensor) -> Tensor:
        return v + 2 * x


class Counting(IFNode):
    """One more state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("count", 0.0)

    def advance(self, x: Tensor, v: Tensor, count: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        spike, (v,) = super().advance(x, v)
        return spike, (v, count + spike)


def test_own_neuron_from_a_charge() -> None:
    own, reference = run(DoubleIF(v_reset=None), sequence()), run(IFNode(v_reset=None), 2 * sequence())
    reference["x.grad"] *= 2
    assert_same(own, reference)


def test_own_neuron_with_another_state() -> None:
    node, x_seq = Counting(), sequence()
    spikes = by_steps(node, x_seq)
    assert torch.equal(node.count, spikes.sum(0))
    assert [s.shape for s in node.initial_state(x_seq[0])] == [(N, C), (N, C)]


def test_a_foreign_function_as_surrogate() -> None:
    node = IFNode(surrogate_function=lambda x: (x > 0).to(x.dtype))
    assert node(torch.tensor([1.0, 1.5])).tolist() == [0.0, 1.0]
    assert "lambda" not in repr(node)


def test_a_neuron_without_charge_says_so() -> None:
    with pytest.raises(NotImplementedError, match=r"BaseNode must define charge\(v, x\)"):
        BaseNode()(torch.zeros(1))


# Transforms


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_fake_tensors(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    with FakeTensorMode() as mode:
        node = node_type()
        x = mode.from_tensor(torch.rand(4, 3))
        output, state = node.step(node.initial_state(x), x)
    assert output.shape == (4, 3)
    assert [s.shape for s in state] == [(4, 3)] * len(node.state_names())


def test_functional_call_replaces_the_parameter() -> None:
    node, x = ParametricLIFNode(), torch.rand(3)
    v = torch.full((3,), 0.5)
    w = torch.tensor(1.5)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.node = node

        def forward(self, v: Tensor, x: Tensor) -> Tensor:
            return self.node.step((v,), x)[1][0]

    replaced = torch.func.functional_call(Step(), {"node.w": w}, (v, x))
    other = ParametricLIFNode()
    other.w.data = w
    assert torch.equal(replaced, other.step((v,), x)[1][0])
    assert not torch.equal(replaced, node.step((v,), x)[1][0])


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_torch_func_transforms_of_the_step(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    node, x = node_type(), sequence(torch.float32)[0]
    state = tuple(torch.full_like(x, 0.3) for _ in node.state_names())
    output, after = node.step(state, x)

    mapped, mapped_after = torch.func.vmap(lambda s, x: node.step(s, x))(state, x)
    assert torch.equal(mapped, output)
    assert all(torch.equal(a, b) for a, b in zip(mapped_after, after, strict=True))
    started, _ = torch.func.vmap(lambda x: node.step(node.initial_state(x), x))(x)
    assert torch.equal(started, node.step(node.initial_state(x), x)[0])

    def total(state: tuple[Tensor, ...], x: Tensor) -> Tensor:
        output, after = node.step(state, x)
        return output.sum() + sum(s.square().sum() for s in after)

    leaves = tuple(s.clone().requires_grad_() for s in (*state, x))
    reference = torch.autograd.grad(total(leaves[:-1], leaves[-1]), leaves)
    grads, grad_x = torch.func.grad(total, argnums=(0, 1))(state, x)
    for actual, expected in zip((*grads, grad_x), reference, strict=True):
        torch.testing.assert_close(actual, expected)
    _, tangent = torch.func.jvp(lambda x: total(state, x), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, reference[-1].sum())


def test_an_ensemble_by_vmap_over_stacked_parameters() -> None:
    nodes = [ParametricLIFNode(init_tau=tau) for tau in (1.5, 2.0, 8.0)]
    stacked, _ = torch.func.stack_module_state(nodes)  # type: ignore[arg-type]
    x = torch.rand(4) + 1

    def fresh_step(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        node = copy.deepcopy(nodes[0])
        return torch.func.functional_call(node, parameters, (x,))

    outputs = torch.func.vmap(fresh_step, in_dims=(0, None))(stacked, x)
    for node, output in zip(nodes, outputs, strict=True):
        assert torch.equal(node(x), output)


def test_under_autocast_the_potential_has_the_dtype_of_the_layer_before() -> None:
    layer, node = nn.Linear(4, 4), LIFNode()
    with torch.autocast("cpu", torch.bfloat16):
        spike = node(layer(torch.rand(2, 4)))
        assert spike.dtype == node.v.dtype == torch.bfloat16
        node.reset()
        spike = node(layer(torch.rand(2, 4)).float())
        assert spike.dtype == node.v.dtype == torch.float32
        spike.sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("node_type", ALL, ids=lambda t: t.__name__)
def test_compiles_as_one_graph_and_keeps_its_state(node_type: Callable[..., neuron.ElementwiseNode]) -> None:
    compiled_node, node = node_type(), node_type()
    compiled = torch.compile(compiled_node, backend="aot_eager", fullgraph=True)
    x_seq = sequence(torch.float32).requires_grad_()
    actual = torch.stack([compiled(x) for x in x_seq])
    expected = by_steps(node, x_seq)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(compiled_node.v, node.v)
    weights = torch.linspace(-1, 1, T).view(T, 1, 1)
    grads = [torch.autograd.grad((y * weights).sum(), x_seq)[0] for y in (actual, expected)]
    torch.testing.assert_close(grads[0], grads[1])


def test_a_whole_model_trains() -> None:
    layers = [nn.Linear(6, 32), LIFNode(), nn.Linear(32, 32), AdaptiveLIFNode(), nn.Linear(32, 2), LeakyIntegrator()]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    x = torch.rand(32, 6) * 4
    x_seq, target = x.expand(8, 32, 6), (x[:, 0] > x[:, 1]).long()
    losses = []
    for _ in range(30):
        reset_net(model)
        loss = nn.functional.cross_entropy(by_steps(model, x_seq).sum(0), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_saving_a_model_with_a_running_state() -> None:
    model = nn.Sequential(nn.Linear(3, 3), LIFNode())
    model(torch.rand(2, 3))
    detach_net(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.rand(2, 3)
    assert torch.equal(loaded(x), model(x))
