"""The life of a converted net: copies, pickles, modes, devices and dtypes, hooks, names, calls that do not fit."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError, SnnfxError, SnnfxWarning
from snnfx.functional import reset_net
from snnfx.ir.serialization import pack_program, unpack_program
from support.stepping import assert_same, run_stepped, step_model

T, N, C = 5, 3, 4


class Model(nn.Module):
    """A layer that is never called, a folded front, a map, a loop, a buffer, state, a constant, two modes."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(2, 2)
        self.last = nn.Linear(C, 2)
        self.first = nn.Linear(C, C)
        self.bn = nn.BatchNorm1d(C)
        self.lif = neuron.ParametricLIFNode()
        self.gain = nn.Parameter(torch.rand(C))
        self.register_buffer("decay", torch.full((1, C), 0.5))
        self.trace: Any = 0.0

    def forward(self, x: Tensor) -> Any:
        x = self.bn(self.first(x)) * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)
        x = x - x.mean(0)
        spike = self.lif(x * (2.0 if self.training else 3.0))
        self.trace = self.decay * self.trace + spike * self.gain
        return self.last(spike + self.trace), {"spike": spike}


class Peeled(snnfx.MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)
        self.register_memory("v", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        y = x if self.v is None else self.v * 0.5
        self.v = x if self.v is None else self.v + x
        return y


def simple() -> nn.Sequential:
    return nn.Sequential(nn.Linear(C, C), neuron.LIFNode(), nn.Linear(C, 2)).double()


def sequence(*shape: int) -> Tensor:
    return 2 * torch.randn(shape or (T, N, C), dtype=torch.float64)


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Model, Peeled, simple, neuron.LIFNode], ids=lambda f: f.__name__)
@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_a_net_that_does_the_same_and_shares_nothing(
    make: Callable[[], nn.Module], with_examples: bool, way: str
) -> None:
    x_seq = sequence()
    net = snnfx.convert(
        make().double().eval(), example_inputs=x_seq[0] if with_examples else None, batch_norm="per_step"
    )
    if way == "deepcopy":
        other = copy.deepcopy(net)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(net))
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert isinstance(other, snnfx.Net) and not other.training
    assert other.options == net.options and str(other.program) == str(net.program)
    assert [(r.name, r.kind) for r in other.regions] == [(r.name, r.kind) for r in net.regions]
    assert len(other.history) == len(net.history)
    assert_same(other.run(x_seq), net.run(x_seq))
    assert not {id(p) for p in other.parameters()} & {id(p) for p in net.parameters()}
    for mode in (True, False):
        torch.manual_seed(1)
        expected = copy.deepcopy(net).train(mode)(x_seq)
        torch.manual_seed(1)
        assert_same(other.train(mode)(x_seq), expected)


def test_a_copy_after_a_training_step() -> None:
    model = simple()
    model(sequence()[0])
    net = snnfx.convert(model)
    net(sequence()).sum().backward()
    other = copy.deepcopy(net)
    assert other.source is not model
    assert_same(other(sequence(2, N, C)).shape, torch.Size((2, N, 2)))


def test_a_packed_program_is_the_program() -> None:
    net = snnfx.convert(Model(), example_inputs=sequence()[0].float())
    for mode in (True, False):
        program = net.train(mode).program
        again = unpack_program(pickle.loads(pickle.dumps(pack_program(program))), net.source)
        assert str(again) == str(program)
        assert [n.name for n in again.graph.nodes] == [n.name for n in program.graph.nodes]
        assert (again.slots, again.input_leaves, again.training) == (
            program.slots,
            program.input_leaves,
            program.training,
        )
        assert (again.input_spec, again.output_spec) == (program.input_spec, program.output_spec)
        for a, b in zip(again.regions, program.regions, strict=True):
            assert (a.name, a.kind, a.slots, [n.name for n in a.nodes]) == (
                b.name,
                b.kind,
                b.slots,
                [n.name for n in b.nodes],
            )


# -- sharing with the model --------------------------------------------------------------------------------------------


def test_the_state_dict_is_the_models_with_unused_layers_in_their_places() -> None:
    model = Model()
    net = snnfx.convert(model)
    assert list(net.state_dict()) == list(model.state_dict())
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in model.named_parameters()]
    other = Model()
    net.load_state_dict(other.state_dict())
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    optimizer = torch.optim.Adam(net.parameters())
    again = torch.optim.Adam(model.parameters())
    net(sequence().float())[0].sum().backward()
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    index = [n for n, _ in model.named_parameters()].index("first.weight")
    assert again.state_dict()["state"][index]["exp_avg"].shape == (C, C)


def test_modes_are_shared_both_ways_and_frozen_layers_stay_frozen_in_the_models_hands() -> None:
    model = Model()
    net = snnfx.convert(model)
    net.eval()
    assert not model.training and not model.bn.training
    net.train()
    model.bn.eval()
    before = model.bn.running_mean.clone()
    net(sequence().float())
    assert torch.equal(model.bn.running_mean, before)


def test_the_mode_of_the_model_is_that_of_the_net() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), snnfx.neuron.LIFNode())
    net = snnfx.convert(model)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x_seq = torch.rand(4, 2, 1, 6, 6)
    for mode in (False, True, False):
        model.train(mode)
        assert net.training is mode
        before = model[1].num_batches_tracked.clone()
        with warnings.catch_warnings():
            warnings.simplefilter("error", SnnfxWarning)  # nothing is captured again
            net(x_seq)
            compiled(x_seq)
        assert model[1].num_batches_tracked - before == 2 * mode


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_moving_a_net_moves_the_model_and_its_constants(dtype: torch.dtype) -> None:
    model = Model().eval()
    net = snnfx.convert(model).to(dtype)
    assert model.first.weight.dtype == dtype
    x_seq = sequence().to(dtype)
    y, _ = net(x_seq)
    assert y.dtype == dtype
    assert_same(y.detach(), run_stepped(model, x_seq).outputs[0], 1e-2 if dtype != torch.float64 else 1e-10)


def test_assigning_a_parameter_of_the_net_assigns_it_in_the_model() -> None:
    model = Model()
    net = snnfx.convert(model)
    net.gain = nn.Parameter(torch.zeros(C))
    assert model.gain is net.gain
    net.first.weight = nn.Parameter(torch.zeros(C, C))
    assert not model.first.weight.any()


def test_hooks_on_leaves_run_and_may_be_added_and_removed_later() -> None:
    model, seen = simple(), []
    net = snnfx.convert(model)
    handles = [
        module.register_forward_hook(lambda m, args, y, name=name: seen.append((name, y.shape[0])))
        for name, module in model.named_children()
    ]
    expected = net(sequence()).detach()
    assert seen == [("0", T * N)] + [("1", N)] * T + [("2", T * N)]
    for handle in handles:
        handle.remove()
    seen.clear()
    assert net(sequence()).shape == expected.shape and seen == []


def test_a_hook_that_changes_the_output_of_a_neuron_is_obeyed() -> None:
    model, x_seq = simple(), sequence()
    model[1].register_forward_hook(lambda module, args, y: y * 0)
    assert_same(snnfx.convert(model)(x_seq).detach(), run_stepped(model, x_seq).outputs)


CLASHING = (
    "run",
    "graph",
    "program",
    "regions",
    "state",
    "options",
    "source",
    "history",
    "code",
    "time",
    "train_",
    "x",
)


class Clashing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in CLASHING:
            self.add_module(name, nn.Linear(C, C) if name != "regions" else neuron.LIFNode())

    def forward(self, x: Tensor) -> Tensor:
        for name in CLASHING:
            x = self._modules[name](2 * x)
        return x


def test_children_that_are_called_like_methods_of_a_net() -> None:
    model, x_seq = Clashing().double(), sequence()
    net = snnfx.convert(model)
    assert list(net.state_dict()) == list(model.state_dict())
    assert [slot.name for slot in net.program.slots] == ["regions.v"]
    expected = run_stepped(model, x_seq).outputs
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert_same(other(x_seq).detach(), expected)
        assert other.options.step_mode == "m" and other.history


# -- runs --------------------------------------------------------------------------------------------------------------


def test_records_are_the_outputs_of_modules_and_the_states_after_each_step() -> None:
    model, x_seq = simple(), sequence()
    y, state, records = snnfx.convert(model).run(x_seq, record=("0", "1", "1.v", "2"))
    potentials = []
    model[1].register_forward_hook(lambda module, args, out: potentials.append(module.v.detach()))
    step_model(model, x_seq)
    assert_same(records["1.v"].detach(), torch.stack(potentials))
    assert_same(records["0"], model[0](x_seq))
    assert_same(records["2"], y)
    assert_same(records["1.v"][-1], state["1.v"])
    assert set(records["1"].unique().tolist()) <= {0.0, 1.0}


def test_gradients_reach_given_states_and_come_from_final_ones() -> None:
    net, x_seq = snnfx.convert(simple()), sequence().requires_grad_()
    start = torch.zeros(N, C, dtype=torch.float64, requires_grad=True)
    y, state = net.run(x_seq, state={"1.v": start})
    grads = torch.autograd.grad(y.sum(), [start, x_seq], retain_graph=True)
    assert all(g.any() for g in grads)
    assert torch.autograd.grad(state["1.v"].sum(), x_seq)[0].any()


def test_carried_state_does_not_grow_a_history() -> None:
    net = snnfx.convert(simple(), carry_state=True)
    for _ in range(3):
        net(sequence()).sum().backward()


def test_the_single_step_form_starts_again_after_reset() -> None:
    net, x_seq = snnfx.convert(simple(), step_mode="s"), sequence()
    steps = [net(x) for x in x_seq]
    assert_same(torch.stack(steps).detach(), run_stepped(net.source, x_seq).outputs)
    reset_net(net)
    assert_same(net(x_seq[0]), steps[0])
    y, state = net.run(x_seq[0])
    assert_same(y, steps[0])
    assert_same(net.run(x_seq[1], state=state)[0], steps[1])


@pytest.mark.parametrize("k", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("time_dim", [0, -1, None])
@pytest.mark.parametrize("make", [simple, Peeled], ids=["simple", "peeled"])
def test_chunks_equal_the_whole(k: int, time_dim: int | None, make: Callable[[], nn.Module]) -> None:
    model, x_seq = make().double().eval(), sequence(7, N, C)
    given = x_seq[0] if time_dim is None else x_seq.movedim(0, time_dim)
    T = {"T": 7} if time_dim is None else {}
    with torch.no_grad():
        whole = snnfx.convert(model, time_dim=time_dim, chunk=None).run(given, **T)
        assert_same(snnfx.convert(model, time_dim=time_dim, chunk=k).run(given, **T), whole)


def test_chunks_are_for_inference_only() -> None:
    model, calls = simple().eval(), []
    model[0].register_forward_hook(lambda module, args, y: calls.append(y.shape[0]))
    net, x_seq = snnfx.convert(model, chunk=2), sequence()
    net(x_seq)
    with torch.no_grad():
        net.train()(x_seq)
        assert calls == [T * N] * 2
        net.eval()(x_seq)
    assert calls[2:] == [2 * N, 2 * N, N]


@pytest.mark.parametrize("shape", [(1, N, C), (T, 1, C), (1, 1, C), (T, 0, C)])
@pytest.mark.parametrize("make", [simple, Peeled], ids=["simple", "peeled"])
def test_sequences_of_one_step_one_sample_or_none(shape: tuple[int, ...], make: Callable[[], nn.Module]) -> None:
    model, x_seq = make().double(), sequence(*shape)
    expected = run_stepped(model, x_seq).outputs
    assert_same(snnfx.convert(model)(x_seq).detach(), expected)
    assert_same(snnfx.convert(model, example_inputs=x_seq[0])(x_seq).detach(), expected)


# -- calls that do not fit ---------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(a) + b


WRONG_CALLS: dict[str, tuple[str, Callable[[snnfx.Net, snnfx.Net, snnfx.Net], Any]]] = {
    "no steps": ("SNNFX301", lambda net, two, image: net(sequence(0, N, C))),
    "T is 0": ("SNNFX301", lambda net, two, image: image(sequence()[0], T=0)),
    "two lengths": ("SNNFX303", lambda net, two, image: two(sequence(5, N, C), sequence(4, N, C))),
    "T is another": ("SNNFX303", lambda net, two, image: net(sequence(), T=4)),
    "a list": ("SNNFX305", lambda net, two, image: net([1, 2])),
    "a number": ("SNNFX305", lambda net, two, image: net(3)),
    "no dimensions": ("SNNFX306", lambda net, two, image: net(torch.tensor(1.0))),
    "too many": ("SNNFX307", lambda net, two, image: net(sequence(), sequence())),
    "none": ("SNNFX307", lambda net, two, image: net()),
    "an unknown name": ("SNNFX307", lambda net, two, image: net(y=sequence())),
    "an unknown slot": ("SNNFX308", lambda net, two, image: net.run(sequence(), state={"1.u": 0.0})),
    "a missing slot": ("SNNFX308", lambda net, two, image: net.run(sequence(), state={})),
    "T is no number": ("SNNFX309", lambda net, two, image: image(sequence()[0], T=2.5)),
    "no T": ("SNNFX310", lambda net, two, image: image(sequence()[0])),
    "nothing to record": ("SNNFX311", lambda net, two, image: net.run(sequence(), record="9")),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_call_that_does_not_fit_raises_before_any_work(name: str) -> None:
    code, call = WRONG_CALLS[name]
    calls: list[Any] = []
    models = [simple(), TwoInputs().double(), simple()]
    nets = [snnfx.convert(m, time_dim=d) for m, d in zip(models, (0, 0, None), strict=True)]
    for model in models:
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(InputError, match=code):
        call(*nets)
    assert calls == []


WRONG_OPTIONS: dict[str, dict[str, Any]] = {
    "step_mode": {"step_mode": "x"},
    "batch_norm": {"batch_norm": "x"},
    "chunk word": {"chunk": "x"},
    "chunk 0": {"chunk": 0},
    "chunk True": {"chunk": True},
    "entry": {"entry": "nothing"},
    "time_dim word": {"time_dim": "x"},
    "time_dim for two": {"time_dim": (0, 0)},
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_without_a_meaning_are_refused(name: str) -> None:
    with pytest.raises(SnnfxError, match="SNNFX30[29]"):
        snnfx.convert(simple(), **WRONG_OPTIONS[name])


def test_what_is_no_module_cannot_be_converted() -> None:
    with pytest.raises(InputError, match="SNNFX304"):
        snnfx.convert(lambda x: x)  # type: ignore[arg-type]


def test_arguments_may_be_given_by_name_or_by_position() -> None:
    net, a, b = snnfx.convert(TwoInputs().double()), sequence(), sequence()
    assert_same(net(b=b, a=a), net(a, b))
    assert_same(net(a, b=b), net(a, b))
    assert list(inspect.signature(net.forward).parameters) == ["a", "b", "T"]
