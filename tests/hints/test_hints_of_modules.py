"""Hints of neurons, surrogates, memories, carried states and modules of other libraries."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import snnfx
from snnfx import neuron, surrogate
from snnfx.errors import CODES, describe_code
from support.hints import refused
from support.stepping import assert_converts, assert_same, run_stepped

T, N, C = 5, 2, 3


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape or (T, N, C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def converts(*modules: nn.Module) -> None:
    assert_converts(nn.Sequential(nn.Linear(C, C), *modules), sequence())


# -- memories ----------------------------------------------------------------------------------------------------------


class Memory(snnfx.MemoryModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.used = 1
        self.name = name
        self.register_memory(name, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        setattr(self, self.name, 0.5 * getattr(self, self.name) + x)
        return getattr(self, self.name)


def test_a_memory_with_a_name_that_python_refuses() -> None:
    refused(
        "SNNFX309",
        "memory_module.py:MemoryModule.register_memory",
        "Choose a Python identifier.",
        lambda: Memory("a b"),
        names="`a b`",
    )
    converts(Memory("a_b"))


def test_a_memory_with_a_name_in_use() -> None:
    refused(
        "SNNFX309",
        "memory_module.py:MemoryModule.register_memory",
        "Choose another name.",
        lambda: Memory("used"),
        names="`used`",
    )
    converts(Memory("unused"))


# -- neurons and surrogates --------------------------------------------------------------------------------------------


def test_a_surrogate_that_is_a_class() -> None:
    refused(
        "SNNFX309",
        "neuron.py:_spike_callable",
        "Pass an instance: ",
        lambda: neuron.LIFNode(surrogate_function=surrogate.ATan),
        names="ATan()",
    )
    converts(neuron.LIFNode(surrogate_function=surrogate.ATan()))


def test_a_surrogate_that_is_a_number() -> None:
    refused(
        "SNNFX309",
        "neuron.py:_spike_callable",
        "Pass a spike function, e.g. snnfx.surrogate.ATan().",
        lambda: neuron.LIFNode(surrogate_function=2.0),
    )
    converts(neuron.LIFNode(surrogate_function=surrogate.ATan()))


def test_a_wrong_number_of_states() -> None:
    lif, x = neuron.LIFNode(), sequence()[0]
    refused(
        "SNNFX308",
        "neuron.py:ElementwiseNode.step",
        "Pass a tuple with one value for each state.",
        lambda: lif.step((0.0, 0.0), x),
        names="it has 1: v",
    )
    assert_same(lif.step((0.0,), x)[0], neuron.LIFNode()(x))


class TracedNeurons(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, neuron.BaseNode | surrogate.Surrogate) or super().is_leaf_module(m, module_qualified_name)


def test_a_neuron_traced_by_torch_fx() -> None:
    class Tracing(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Linear)

    model = nn.Sequential(nn.Linear(C, C), neuron.LIFNode())
    refused(
        "SNNFX305",
        "neuron.py:ElementwiseNode._checked_input",
        "To trace a model, use snnfx.convert, or treat neurons as leaf modules.",
        lambda: Tracing().trace(model),
        names="Proxy",
    )
    converts(neuron.LIFNode())
    traced = fx.GraphModule(model, TracedNeurons().trace(model))
    x = sequence()[0]
    assert_same(traced(x), nn.Sequential(model[0], neuron.LIFNode())(x))


def test_a_surrogate_traced_by_torch_fx() -> None:
    class Tracing(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.Linear)

    class Spikes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.spike = nn.Linear(C, C), surrogate.ATan()

        def forward(self, x: Tensor) -> Tensor:
            return self.spike(self.fc(x))

    model = Spikes()
    refused(
        "SNNFX305",
        "surrogate.py:Surrogate.forward",
        "To trace a model, use snnfx.convert, or treat snnfx.surrogate.Surrogate as a leaf module.",
        lambda: Tracing().trace(model),
    )
    assert_converts(model, sequence())
    traced = fx.GraphModule(model, TracedNeurons().trace(model))
    assert_same(torch.stack([traced(x) for x in sequence()]).detach(), run_stepped(model, sequence()).outputs)


def test_a_state_of_another_batch() -> None:
    model = nn.Sequential(neuron.LIFNode())
    model(sequence()[0])
    refused(
        "SNNFX308",
        "neuron.py:ElementwiseNode._like_input",
        "Call snnfx.functional.reset_net(model) before inputs of another shape, e.g. another batch size.",
        lambda: model(sequence()[0, :1]),
        names="state `v` of LIFNode has shape [2, 3], its input [1, 3]",
    )
    snnfx.functional.reset_net(model)
    assert_same(model(sequence()[0, :1]), neuron.LIFNode()(sequence()[0, :1]))


def bell(x: Tensor, alpha: float) -> Tensor:
    return torch.exp(-alpha * x.abs())


def test_a_derivative_with_self() -> None:
    def define() -> None:
        class Bell(surrogate.Surrogate):
            def derivative(self, x: Tensor, alpha: float) -> Tensor:
                return bell(x, alpha)

    refused(
        "SNNFX309",
        "surrogate.py:Surrogate.__init_subclass__",
        "Put @staticmethod above `def ",
        define,
        names="`derivative` of Bell",
    )

    class Bell(surrogate.Surrogate):
        @staticmethod
        def derivative(x: Tensor, alpha: float) -> Tensor:
            return bell(x, alpha)

    converts(neuron.LIFNode(surrogate_function=Bell(alpha=2.0)))


def test_a_surrogate_without_a_derivative() -> None:
    class Empty(surrogate.Surrogate):
        """Defines nothing."""

    class Bell(surrogate.Surrogate):
        derivative = staticmethod(bell)

    refused(
        "SNNFX309",
        "surrogate.py:Surrogate._keep_whole_in_compiled_graphs",
        "Define a static method `derivative(x, ...)`.",
        lambda: Empty(alpha=2.0),
        names="Empty",
    )
    converts(neuron.LIFNode(surrogate_function=Bell(alpha=2.0)))


def test_a_surrogate_without_a_primitive() -> None:
    class Line(surrogate.Surrogate):
        @staticmethod
        def derivative(x: Tensor, alpha: float) -> Tensor:
            return torch.full_like(x, alpha)

        @staticmethod
        def primitive(x: Tensor, alpha: float) -> Tensor:
            return alpha * x

    refused(
        "SNNFX309",
        "surrogate.py:Surrogate.__setattr__",
        "Define a static method `primitive(x, ...)`, or pass primitive= to CustomSurrogate.",
        lambda: surrogate.CustomSurrogate(bell, spiking=False, alpha=2.0),
    )
    x = sequence()[0]
    custom = surrogate.CustomSurrogate(Line.derivative, primitive=Line.primitive, spiking=False, alpha=2.0)
    for smooth in (Line(spiking=False, alpha=2.0), custom):
        assert_same(smooth(x), 2 * x)


def test_a_derivative_that_is_not_a_function() -> None:
    refused(
        "SNNFX309",
        "surrogate.py:CustomSurrogate.__init__",
        "Pass a function of x.",
        lambda: surrogate.CustomSurrogate(nn.Sigmoid()),
        names="Sigmoid",
    )
    converts(neuron.LIFNode(surrogate_function=surrogate.CustomSurrogate(torch.sigmoid)))


def test_a_hyperparameter_with_a_name_in_use() -> None:
    refused(
        "SNNFX309",
        "surrogate.py:CustomSurrogate.__init__",
        "Choose another name.",
        lambda: surrogate.CustomSurrogate(bell, training=2.0),
        names="`training`",
    )
    converts(neuron.LIFNode(surrogate_function=surrogate.CustomSurrogate(bell, alpha=2.0)))


def test_a_hyperparameter_that_is_a_tensor() -> None:
    tau = torch.tensor(2.0)
    refused(
        "SNNFX309",
        "surrogate.py:checked_number",
        "Pass a float, e.g. value.item(); it cannot be learned.",
        lambda: neuron.LIFNode(tau=tau),
        names="`tau` of LIFNode",
    )
    converts(neuron.LIFNode(tau=tau.item()))


# -- arguments and carried states --------------------------------------------------------------------------------------


class ByHand(nn.Module):
    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        v = x if state is None else 0.5 * state["v"] + x
        return v.relu(), {"v": v}


def carried(net: Any, state: Any = None) -> None:
    y_seq = net(sequence(), state)[0]
    for t, x in enumerate(sequence()):
        y, state = net.source(x, state)
        assert_same(y_seq[t], y)


def test_a_carry_that_is_not_a_dict() -> None:
    refused(
        "SNNFX309",
        "state/carry.py:paths_of",
        'Write carry={"state": 1}.',
        lambda: snnfx.convert(ByHand(), carry=["state"]),
    )
    carried(snnfx.convert(ByHand(), carry={"state": 1}))


def test_a_carry_without_a_position() -> None:
    class Nested(nn.Module):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            v = x if state is None else 0.5 * state + x
            return v.relu(), (v, 2 * v)

    refused(
        "SNNFX309",
        "state/carry.py:paths_of",
        "Give an index into the outputs of a step, or a tuple of indices: carry={",
        lambda: snnfx.convert(ByHand(), carry={"state": 1.5}),
        names="`state`",
    )
    carried(snnfx.convert(ByHand(), carry={"state": 1}))
    net, v = snnfx.convert(Nested(), carry={"state": (1, 0)}), None
    for t, x in enumerate(sequence()):
        y, (v, _) = Nested()(x, v)
        assert_same(net(sequence())[0][t], y)


def test_a_carry_without_an_argument() -> None:
    error = refused(
        "SNNFX309",
        "capture/step_arguments.py:carried_arguments",
        "Its arguments are ",
        lambda: snnfx.convert(ByHand(), carry={"stat": 1}),
        names="`stat`",
    )
    assert error.hint == "Its arguments are x, state."
    carried(snnfx.convert(ByHand(), carry={"state": 1}))


def test_a_carry_without_an_output() -> None:
    refused(
        "SNNFX309",
        "capture/step_arguments.py:carried_output",
        "Pass the index of the next state in the outputs of the step.",
        lambda: snnfx.convert(ByHand(), carry={"state": 5}),
        names="`state`",
    )
    carried(snnfx.convert(ByHand(), carry={"state": 1}))


def test_a_state_of_another_structure() -> None:
    net = snnfx.convert(ByHand())
    refused(
        "SNNFX308",
        "state/carry.py:flatten_state",
        "Pass the state that a call returned, or omit the argument to start from the reset state.",
        lambda: net(sequence(), torch.zeros(N, C)),
        names="`state`",
    )
    carried(net)
    carried(net, net(sequence())[1])


def test_an_example_of_a_state_of_another_structure() -> None:
    class Required(nn.Module):
        def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            v = 0.5 * (state["v"] if isinstance(state, dict) else state) + x
            return v.relu(), {"v": v}

    x = sequence()[0]
    refused(
        "SNNFX308",
        "capture/step_arguments.py:CarriedLeaf.take",
        "Pass an example with the structure that one step returns.",
        lambda: snnfx.convert(Required(), example_inputs=(x, torch.zeros(N, C)), carry={"state": 1}),
        names="`state`",
    )
    net = snnfx.convert(Required(), example_inputs=(x, {"v": torch.zeros(N, C)}), carry={"state": 1})
    carried(net, {"v": torch.ones(N, C)})


def test_examples_of_another_type() -> None:
    refused(
        "SNNFX305",
        "capture/step_arguments.py:as_call",
        "Pass the inputs of ONE call: a tensor, a tuple of arguments, or a dict of keyword arguments.",
        lambda: snnfx.convert(nn.Sequential(nn.Linear(C, C)), example_inputs=3.0),
        names="float",
    )
    x = sequence()[0]
    for examples in (x, (x,), {"input": x}):
        net = snnfx.convert(nn.Sequential(nn.Linear(C, C)), example_inputs=examples)
        given = {"input": sequence()} if isinstance(examples, dict) else sequence()
        y_seq = net(**given) if isinstance(given, dict) else net(given)
        assert_same(y_seq.detach(), run_stepped(net.source, sequence()).outputs)


def test_examples_that_do_not_match_the_step() -> None:
    x = sequence()[0]
    refused(
        "SNNFX307",
        "capture/step_arguments.py:step_arguments",
        "Pass the inputs of ONE call: a tensor, a tuple of arguments, or a dict of keyword arguments.",
        lambda: snnfx.convert(nn.Sequential(nn.Linear(C, C)), example_inputs=(x, x)),
        names="Sequential.forward",
    )
    assert_converts(nn.Sequential(nn.Linear(C, C)), sequence())


def test_examples_without_a_tensor() -> None:
    refused(
        "SNNFX305",
        "capture/step_arguments.py:step_arguments",
        "Pass the inputs of one call of the model.",
        lambda: snnfx.convert(nn.Sequential(nn.Linear(C, C)), example_inputs=(3.0,)),
    )
    assert_converts(nn.Sequential(nn.Linear(C, C)), sequence())


def test_an_entry_that_is_not_a_method() -> None:
    class Entry(nn.Module):
        def step(self, x: Tensor) -> Tensor:
            return 2 * x

    refused(
        "SNNFX309",
        "capture/capture.py:_check_model",
        "Name the method that computes one time step.",
        lambda: snnfx.convert(Entry(), entry="nothing"),
        names="'nothing'",
    )
    assert_converts(Entry(), sequence(), entry="step")


def test_a_time_dimension_that_is_a_bool() -> None:
    refused(
        "SNNFX309",
        "ir/options.py:time_dims_of_leaves",
        "Pass the position of T as an int, or None for an input that does not change with time.",
        lambda: snnfx.convert(nn.Sequential(nn.Linear(C, C)), time_dim=True),
    )
    model = nn.Sequential(nn.Linear(C, C))
    net = snnfx.convert(model, time_dim=1)
    assert_same(net(sequence().transpose(0, 1)).transpose(0, 1), model(sequence()))
    assert_same(snnfx.convert(model, time_dim=None)(sequence()[0], T=2), model(sequence()[0]).expand(2, N, C))


def test_time_dimensions_of_other_arguments() -> None:
    model = nn.Sequential(nn.Linear(C, C))
    refused(
        "SNNFX309",
        "ir/options.py:time_dims_of_leaves.spread",
        "Pass an int, or one entry for each argument; None for an input that does not change with time.",
        lambda: snnfx.convert(model, time_dim=(0, 0)),
    )
    for time_dim in (0, (0,)):
        assert_same(snnfx.convert(model, time_dim=time_dim)(sequence()), model(sequence()))


def test_a_packed_sequence_as_state() -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if float(x.detach().sum()) > 3.0:
                self.state = pack_sequence([x[0], x[1]])
            return x if self.state is None else x + pad_packed_sequence(self.state)[0].sum()

    class Pads(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("state", torch.zeros(C, N))

        def forward(self, x: Tensor) -> Tensor:
            if float(x.detach().sum()) > 3.0:
                self.state = pad_packed_sequence(pack_sequence([x[0], x[1]]))[0]
            return x + self.state.sum()

    x_seq = sequence() * torch.tensor([0.1, 0.1, 5.0, 0.1, 5.0])[:, None, None]
    net = snnfx.convert(nn.Sequential(Packs()))
    refused(
        "SNNFX213",
        "state/composite_adapter.py:_refusing_unregistered_state",
        "Store the padded tensor in a registered memory: torch.nn.utils.rnn.pad_packed_sequence(x)[0].",
        lambda: net(x_seq),
        names="`state`",
        at="def forward",
    )
    assert_converts(nn.Sequential(Pads()), x_seq)


# -- modules of other libraries ----------------------------------------------------------------------------------------


def test_norse_modules_that_loop_over_time() -> None:
    norse = pytest.importorskip("norse.torch")
    error = refused(
        "SNNFX205",
        "state/adapters/norse.py:_NorseSequenceAdapter.refuse",
        "Use norse.torch.",
        lambda: snnfx.convert(nn.Sequential(norse.LIF())),
        names="LIF",
    )
    cell = getattr(norse, error.hint.removeprefix("Use norse.torch.").removesuffix("."))
    runs_as_cell(cell())
    refused(
        "SNNFX205",
        "state/adapters/norse.py:_NorseSequenceAdapter.refuse",
        "Use the module inside it, which computes one step.",
        lambda: snnfx.convert(nn.Sequential(norse.Lift(cell()))),
    )
    runs_as_cell(norse.Lift(cell()).lifted_module)


class StepsCell(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.cell(x, state)


def runs_as_cell(cell: nn.Module) -> None:
    net, state = snnfx.convert(StepsCell(cell)), None
    y_seq = net(5 * sequence())[0]
    for t, x in enumerate(5 * sequence()):
        y, state = cell(x, state)
        assert_same(y_seq[t].detach(), y.detach())


def test_a_norse_state_of_another_structure() -> None:
    norse = pytest.importorskip("norse.torch")

    class Passes(StepsCell):
        def forward(self, x: Tensor, state: Any = None) -> Any:
            return self.cell(x, torch.zeros_like(x))

    refused(
        "SNNFX211",
        "state/adapters/norse.py:NorseAdapter.read_call",
        "Pass the state that the cell returned.",
        lambda: snnfx.convert(Passes(norse.LIFCell())),
        names="LIFCell",
    )
    runs_as_cell(norse.LIFCell())


def test_states_that_an_snntorch_neuron_does_not_accept() -> None:
    snntorch = pytest.importorskip("snntorch")

    class Passes(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.lif, self.count = snntorch.Synaptic(alpha=0.9, beta=0.8), count
            self.states: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.states is None:
                self.states = (torch.zeros_like(x), torch.zeros_like(x))
            s, *states = self.lif(x, *self.states[: self.count])
            self.states = tuple(states)
            return s

    refused(
        "SNNFX211",
        "state/adapters/snntorch.py:SnnTorchAdapter.read_call",
        "Pass all states of the neuron, or none; with init_hidden=True pass none.",
        lambda: snnfx.convert(Passes(1)),
        names="passes only some of",
    )
    model = Passes(2)
    y_seq = snnfx.convert(model)(3 * sequence())
    assert_same(y_seq, torch.stack([model(x) for x in 3 * sequence()]))
    hidden = nn.Sequential(snntorch.Synaptic(alpha=0.9, beta=0.8, init_hidden=True))
    assert_same(snnfx.convert(hidden)(3 * sequence()), torch.stack([hidden(x) for x in 3 * sequence()]))


def test_snntorch_neurons_that_take_all_steps() -> None:
    snntorch = pytest.importorskip("snntorch")
    refused(
        "SNNFX205",
        "state/adapters/snntorch.py:_SnnTorchSequenceAdapter.refuse",
        "Use snntorch.Leaky, which has a single step, or convert the other parts of the model.",
        lambda: snnfx.convert(nn.Sequential(nn.Linear(C, C), snntorch.LeakyParallel(C, C))),
        names="LeakyParallel",
    )
    model = nn.Sequential(snntorch.Leaky(beta=0.9, init_hidden=True))
    assert_same(snnfx.convert(model)(3 * sequence()), torch.stack([model(x) for x in 3 * sequence()]))
    converts()


def test_spikingjelly_neurons_without_a_single_step() -> None:
    neurons = pytest.importorskip("spikingjelly.activation_based.neuron")
    refused(
        "SNNFX205",
        "state/adapters/spikingjelly.py:StepModeAdapter.refuse",
        "Use a neuron with a single step, or convert the other parts of the model.",
        lambda: snnfx.convert(nn.Sequential(nn.Linear(C, C), neurons.PSN(T=4))),
        names="PSN",
    )
    converts(neurons.LIFNode())
    converts()


def test_spikingjelly_in_multi_step_mode() -> None:
    library = pytest.importorskip("spikingjelly.activation_based")
    model = nn.Sequential(nn.Linear(C, C), library.neuron.LIFNode(step_mode="m"))
    refused(
        "SNNFX204",
        "state/adapters/spikingjelly.py:StepModeAdapter.refuse",
        'Convert the whole call with takes="sequence" and example_inputs=(x_seq,).',
        lambda: snnfx.convert(model),
        names="LIFNode",
    )
    x_seq = sequence()
    net = snnfx.convert(model, takes="sequence", example_inputs=(x_seq,))
    expected = copy.deepcopy(model)(x_seq)
    assert torch.equal(net(x_seq), expected)


def test_a_spikingjelly_neuron_with_inputs_of_two_shapes() -> None:
    neurons = pytest.importorskip("spikingjelly.activation_based.neuron")

    class Pools(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.first = neurons.LIFNode()
            self.second = self.first if shared else neurons.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)[:, :1])

    refused(
        "SNNFX308",
        "state/adapters/spikingjelly.py:SpikingJellyAdapter._refuse_other_shape",
        "Use one neuron per input shape, and pass a state with the shape of the input.",
        lambda: snnfx.convert(Pools(True))(sequence()),
        names="state `v` of LIFNode",
    )
    assert_converts(Pools(False), sequence())


# -- codes -------------------------------------------------------------------------------------------------------------


def test_an_unknown_code() -> None:
    error = refused("SNNFX309", "errors.py:describe_code", "Use one of ", lambda: describe_code("SNNFX999"))
    for code in error.hint.removeprefix("Use one of ").removesuffix(".").split(", "):
        assert describe_code(code).startswith(f"{code}: {CODES[code].title}")
