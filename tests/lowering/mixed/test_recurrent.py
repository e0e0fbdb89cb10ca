"""Loops with products or convolutions inside, against the user's model stepped in a plain loop under autograd."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import snnfx
from snnfx import neuron, surrogate
from snnfx.errors import InputError
from snnfx.functional import reset_net
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.mixed import convolution_calls, operations
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.region_modules import LoopRegion
from support.stepping import assert_converts, assert_same, assert_same_run, fresh_copy, run_net, run_stepped

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")


def loops_of(net: Any) -> list[LoopRegion]:
    return [loop for loop in net.snnfx_regions.modules() if isinstance(loop, LoopRegion)]


def mixed_of(net: Any) -> list[MixedStep]:
    """What runs the loops that were run without autograd."""
    used = [loop.kernels.in_use for loop in loops_of(net) if loop.kernels is not None]
    return [step for step in used if isinstance(step, MixedStep)]


def assert_lowered(net: Any) -> MixedStep:
    """What runs the one loop with products; no loop was stepped by PyTorch."""
    assert all(loop.kernels is not None and not loop.kernels.refusal for loop in loops_of(net))
    (step,) = mixed_of(net)
    return step


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype) + 0.5


class Feedback(nn.Module):
    """A user's own layer: its spikes come back through a Linear."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.fc, self.rec, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        with torch.no_grad():
            self.fc.weight.mul_(4)  # so that it spikes
        self.lif = neuron.LIFNode(surrogate_function=surrogate.ATan(), **options)
        self.spk: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.spk is None:
            self.spk = torch.zeros(x.shape[0], 6, dtype=x.dtype)
        self.spk = self.lif(self.fc(x) + self.rec(self.spk))
        return self.out(self.spk)


class ConvolutionalFeedback(snnfx.MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.rec = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.lif = neuron.ParametricLIFNode(surrogate_function=surrogate.ATan())
        self.register_memory("spike", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.spike is None:
            self.spike = torch.zeros_like(x)
        self.spike = self.lif(x + self.rec(self.spike))
        return self.spike


class TwoProducts(snnfx.MemoryModule):
    """Two layers that excite each other: the second product takes what kernels have made of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4, bias=False)
        self.gain = nn.Parameter(torch.rand(5))
        self.a, self.b = neuron.LIFNode(surrogate_function=surrogate.ATan()), neuron.IFNode()
        self.register_memory("back", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.back is None:
            self.back = torch.zeros_like(x)
        first = self.a((self.up(x * 0.5 + self.back) * self.gain).tanh() + 0.3)
        self.back = self.b(self.down(first)) * 0.7 + self.back * 0.1
        return first


class Normalized(snnfx.MemoryModule):
    """A state behind a LayerNorm and a softmax: neither products nor elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rec = nn.LayerNorm(4), nn.Linear(4, 4)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = torch.softmax(self.norm(x + self.rec(self.h)), 1) * 2.0 + self.h.mean(1, keepdim=True)
        return self.h


class Gated(snnfx.MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 4)
        self.lif = neuron.LIFNode(surrogate_function=surrogate.ATan())
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = self.cell(x, self.h)
        return self.lif(3.0 * self.h + x)


class Attending(snnfx.MemoryModule):
    """Batched products of what varies with what varies, views between them."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        scores = torch.bmm(self.key(self.h), x.transpose(1, 2)).tanh()
        self.h = 0.5 * self.h + torch.bmm(scores, self.value(x + self.h))
        return self.h[:, 1:, :]


class LearntStart(snnfx.MemoryModule):
    """The first state is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.rec = nn.Parameter(torch.randn(4)), nn.Linear(4, 4)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = self.start + 0.1 * x
        self.h = torch.tanh(x + self.rec(self.h))
        return self.h


class ClippedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.1, 0.1)


class Leaf(snnfx.MemoryModule):
    """A recurrent layer that gives its step as a function, so that nothing of it leaves the loop beforehand."""

    def __init__(self, of_weight: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.w_in, self.w, self.of_weight = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 6)), of_weight
        self.register_memory("h", 0.0)

    def state_names(self) -> tuple[str, ...]:
        return ("h",)

    def initial_state(self, x: Tensor) -> Any:
        return (torch.zeros(x.shape[0], 6, dtype=x.dtype),)

    def step(self, state: Any, x: Tensor) -> Any:
        (h,) = state
        h = torch.tanh(self.w_in(x) + h @ self.of_weight(self.w))
        return h, (h,)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.h, Tensor):
            (self.h,) = self.initial_state(x)
        y, (self.h,) = self.step((self.h,), x)
        return y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "feedback": (Feedback, (4,)),
    "feedback, soft reset": (lambda: Feedback(v_reset=None, detach_reset=True), (4,)),
    "convolution": (ConvolutionalFeedback, (2, 5, 4)),
    "two products": (TwoProducts, (4,)),
    "attention": (Attending, (3, 4)),
    "LayerNorm": (Normalized, (4,)),
    "GRUCell": (Gated, (4,)),
    "learnt start": (LearntStart, (4,)),
    "a leaf": (lambda: nn.Sequential(Leaf()), (4,)),
    "gradient that is clipped at each step": (lambda: nn.Sequential(Leaf(ClippedGradient.apply)), (4,)),
}


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_and_gradients_as_stepping(name: str, T: int) -> None:
    make, shape = MODELS[name]
    net = assert_converts(make().double(), x_of(T, 3, *shape), examples=True)
    assert_lowered(net)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_one_sample_and_an_empty_batch(name: str, batch: int) -> None:
    make, shape = MODELS[name]
    assert_converts(make().double(), x_of(4, batch, *shape), examples=True)


def spikingjelly_container() -> nn.Module:
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    from spikingjelly.activation_based import neuron as sj_neuron

    return nn.Sequential(nn.Linear(4, 6), layer.LinearRecurrentContainer(sj_neuron.LIFNode(), 6, 6), nn.Linear(6, 2))


def snntorch_neuron(name: str, **options: Any) -> nn.Module:
    snntorch = pytest.importorskip("snntorch")
    cls = getattr(snntorch, name)
    # snnTorch's own surrogates make float32 spikes of any input.
    lif = cls(beta=0.9, linear_features=6, init_hidden=True, spike_grad=surrogate.ATan(), **options)
    return nn.Sequential(nn.Linear(4, 6), lif, nn.Linear(6, 2))


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "SpikingJelly LinearRecurrentContainer": spikingjelly_container,
    "snnTorch RLeaky": lambda: snntorch_neuron("RLeaky"),
    "snnTorch RLeaky, learnt": lambda: snntorch_neuron("RLeaky", learn_beta=True, learn_threshold=True),
    "snnTorch RSynaptic": lambda: snntorch_neuron("RSynaptic", alpha=0.8),
}


@pytest.mark.parametrize("T", [1, 2, 33])
@pytest.mark.parametrize("name", LIBRARIES)
def test_recurrent_layers_of_libraries(name: str, T: int) -> None:
    net = assert_converts(LIBRARIES[name]().double(), x_of(T, 3, 4), examples=True)
    assert_lowered(net)


class Cell(nn.Module):
    """One of Norse's cells, its state taken and returned."""

    def __init__(self, name: str) -> None:
        super().__init__()
        norse = pytest.importorskip("norse.torch")
        self.cell, self.out = getattr(norse, name)(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        z, state = self.cell(x, state)
        return self.out(z.to(x.dtype)), state


@pytest.mark.parametrize("name", ["LIFRecurrentCell", "LSNNRecurrentCell", "LIFRefracRecurrentCell"])
def test_cells_of_norse(name: str) -> None:
    model = Cell(name).double()
    x_seq = (x_of(9, 3, 4) * 20).requires_grad_()
    state, ys = None, []
    for x in x_seq:
        y, state = model(x, state)
        ys.append(y)
    expected = torch.stack(ys)
    leaves = [x_seq, *model.parameters()]
    expected_grads = torch.autograd.grad(expected.cos().sum(), leaves)
    net = snnfx.convert(model)
    actual, _ = net(x_seq)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert_lowered(net)
    for a, e in zip(torch.autograd.grad(actual.cos().sum(), leaves), expected_grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


# -- state ------------------------------------------------------------------------------------------------------------


def stepped_from(model: Feedback, x_seq: Tensor, v: Tensor, spk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs and final states of a Feedback from a state, written out."""
    ys = []
    for x in x_seq:
        h = v + (model.fc(x) + model.rec(spk) - v) / 2.0
        spk = model.lif.surrogate_function(h - 1.0)
        v = (1.0 - spk) * h
        ys.append(model.out(spk))
    return torch.stack(ys), v, spk


def test_gradients_of_initial_and_final_states() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    leaves = [x_of(7, 3, 4), x_of(3, 6), torch.rand(3, 6, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    x_seq, v, spk = leaves
    expected = stepped_from(model, x_seq, v, spk)
    y_seq, final = net.run(x_seq, state={"lif.v": v, "spk": spk})
    actual = (y_seq, final["lif.v"], final["spk"])
    assert_lowered(net)
    wanted = [*leaves, *model.parameters()]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    for which in ((0, 1, 2), (1,), (2,)):  # from each result alone as well: then nothing comes from above elsewhere
        grads = [
            torch.autograd.grad(sum(values[k].sin().sum() for k in which), wanted, retain_graph=True, allow_unused=True)
            for values in (actual, expected)
        ]
        for a, e in zip(*grads, strict=True):
            assert (a is None or not a.any()) if e is None else torch.allclose(a, e, rtol=1e-10, atol=1e-10)


def test_a_state_that_is_smaller_than_a_step_is_repeated() -> None:
    net = snnfx.convert(TwoProducts().double(), example_inputs=x_of(3, 4))
    small = torch.rand(4, dtype=torch.float64, requires_grad=True)
    x_seq, grads = x_of(5, 3, 4), []
    rest = {"a.v": torch.zeros(3, 5, dtype=torch.float64), "b.v": torch.zeros(3, 4, dtype=torch.float64)}
    for state in (small, small.expand(3, 4)):
        y_seq, _ = net.run(x_seq, state={"back": state, **rest})
        grads.append(torch.autograd.grad(y_seq.sin().sum(), small)[0])
    assert_lowered(net)
    torch.testing.assert_close(*grads)


def test_carried_state_chunks_and_streams_give_the_whole() -> None:
    model = Feedback().double()
    x_seq = x_of(8, 3, 4)
    whole = snnfx.convert(fresh_copy(model), example_inputs=x_of(3, 4))(x_seq)
    carrying = snnfx.convert(fresh_copy(model), example_inputs=x_of(3, 4), carry_state=True)
    torch.testing.assert_close(torch.cat([carrying(x_seq[:3]), carrying(x_seq[3:])]), whole)
    reset_net(carrying)
    torch.testing.assert_close(carrying(x_seq), whole)
    chunked = snnfx.convert(fresh_copy(model), example_inputs=x_of(3, 4), chunk=3)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x_seq), whole)
        torch.testing.assert_close(torch.cat(list(chunked.stream(x_seq.split(3)))), whole)


# -- what changes between calls ---------------------------------------------------------------------------------------


def check(net: Any, model: nn.Module, x_seq: Tensor, tolerance: float = 1e-10) -> None:
    """Outputs and gradients of all parameters are those of the model as it is now."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    stepper = fresh_copy(model)
    stepper.__dict__["spk"] = None
    expected = torch.stack([stepper(x) for x in x_seq])
    for y_seq, owned in ((net(x_seq), parameters), (expected, [p for p in stepper.parameters() if p.requires_grad])):
        found.append([y_seq, *torch.autograd.grad(y_seq.square().sum(), owned)])
    for a, e in zip(*found, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * max(1.0, float(e.detach().abs().max())))


def test_weights_are_read_at_every_call() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        x_seq = x_of(5, 3, 4)
        check(net, model, x_seq)
        net(x_seq).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.rec.weight.data = torch.randn(6, 6, dtype=torch.float64)
    check(net, model, x_seq)
    model.rec = nn.Linear(6, 6, bias=False).double()
    check(snnfx.convert(model, example_inputs=x_of(3, 4)), model, x_seq)
    assert_lowered(net)


def test_a_weight_changed_before_backward_is_an_error() -> None:
    model = Feedback().double()
    y_seq = snnfx.convert(model, example_inputs=x_of(3, 4))(x_of(5, 3, 4))
    with torch.no_grad():
        model.rec.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y_seq.sum().backward()


def test_an_output_changed_in_place_leaves_gradients_right() -> None:
    model = TwoProducts().double()
    x_seq = x_of(5, 3, 4)
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    expected = torch.autograd.grad((net(x_seq) * 2).square().sum(), list(model.parameters()))
    actual = torch.autograd.grad(net(x_seq).mul_(2).square().sum(), list(model.parameters()))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_frozen_weights_and_other_batches() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    for batch in (3, 5, 1, 3):
        check(net, model, x_of(4, batch, 4))
    model.rec.weight.requires_grad_(False)
    check(net, model, x_of(4, 3, 4))
    model.requires_grad_(False)
    model.rec.bias.requires_grad_()
    check(net, model, x_of(4, 3, 4))
    assert_lowered(net)


def test_a_changed_hyperparameter_acts_at_the_next_call() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    x_seq = x_of(6, 3, 4)
    before = net(x_seq)
    model.lif.tau = 5.0
    check(net, model, x_seq)
    assert not torch.equal(net(x_seq), before)


def test_memory_layouts_of_the_input() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    check(net, model, x_of(4, 3, 6).transpose(0, 2)[:, :, :])
    check(net, model, x_of(3, 4).expand(6, 3, 4))
    check(net, model, x_of(6, 3, 8)[..., ::2])


def test_float32() -> None:
    model = Feedback()
    net = snnfx.convert(model, example_inputs=torch.rand(3, 4))
    check(net, model, x_of(20, 3, 4, dtype=torch.float32), tolerance=1e-4)
    assert_lowered(net)


def test_without_gradients_nothing_is_kept() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    x_seq = x_of(6, 3, 4)
    with torch.no_grad():
        y_seq = net(x_seq)
    assert not y_seq.requires_grad
    assert assert_lowered(net)._training == {}
    torch.testing.assert_close(y_seq, net(x_seq).detach())


def test_copies_and_pickles() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    x_seq = x_of(6, 3, 4)
    expected = net(x_seq)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x_seq), expected)
        assert_lowered(other)


def test_more_steps_than_arguments_are_laid_out_for_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_STRUCTS_AT_ONCE", 4)
    monkeypatch.setattr(convolution_calls, "_LARGEST_WORK", 0)
    for T in (4, 5, 11):
        step = assert_lowered(assert_converts(ConvolutionalFeedback().double(), x_of(T, 3, 2, 5, 4), examples=True))
        assert step.reason_for_python


def test_several_threads() -> None:
    class Wide(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.rec = nn.Linear(600, 600)
            self.lif = neuron.LIFNode(surrogate_function=surrogate.ATan())
            self.register_memory("spike", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.spike is None:
                self.spike = torch.zeros_like(x)
            self.spike = self.lif(x + self.rec(self.spike))
            return self.spike

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert_lowered(assert_converts(Wide().double(), x_of(4, 32, 600), examples=True))
    finally:
        torch.set_num_threads(threads)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_hooks_see_every_step() -> None:
    model, calls = Feedback().double(), []
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    x_seq = x_of(5, 3, 4)
    expected = net(x_seq)
    handle = model.rec.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(net(x_seq), expected)
    assert len(calls) == 5
    handle.remove()


def test_autocast_is_left_to_pytorch() -> None:
    model = Feedback()
    net, stepped = (snnfx.convert(model, example_inputs=torch.rand(3, 4), lower=lower) for lower in ("auto", None))
    x_seq = torch.rand(5, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(x_seq), stepped(x_seq))
    assert mixed_of(net) == []


def test_the_gradient_of_a_gradient_is_refused() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    loss = net(x_of(5, 3, 4)).square().sum()
    with pytest.raises(InputError, match="SNNFX316"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_forward_mode_and_functorch_are_left_to_pytorch() -> None:
    model = TwoProducts().double()
    net, stepped = (snnfx.convert(model, example_inputs=x_of(3, 4), lower=lower) for lower in ("auto", None))
    x_seq, tangent = x_of(4, 3, 4), x_of(4, 3, 4)
    _, actual = torch.func.jvp(lambda x: net(x).sin(), (x_seq,), (tangent,))
    _, expected = torch.func.jvp(lambda x: stepped(x).sin(), (x_seq,), (tangent,))
    torch.testing.assert_close(actual, expected)
    assert mixed_of(net) == []


class Wandering(snnfx.MemoryModule):
    """Draws numbers in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.rec = nn.Linear(4, 4)
        self.register_memory("h", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.h = x + 0.1 * self.rec(torch.dropout(x + self.h, 0.5, True))
        return self.h


def test_random_steps_are_stepped() -> None:
    net = snnfx.convert(Wandering().double(), example_inputs=x_of(3, 4))
    net(x_of(5, 3, 4))
    assert mixed_of(net) == []
    (note,) = snnfx.explain(net).kernels
    assert note.startswith("Stepped by PyTorch") and "random" in note


class Counting(snnfx.MemoryModule):
    """BatchNorm inside a loop, in training: every step changes its running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rec = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.zeros_like(x)
        self.h = torch.tanh(self.norm(x + self.rec(self.h)))
        return self.h


def test_running_statistics_change_once_a_step() -> None:
    net = assert_converts(Counting().double(), x_of(5, 3, 4), examples=True)
    assert mixed_of(net) == []
    net.eval()
    net(x_of(5, 3, 4))
    assert len(mixed_of(net)) == 1


def test_lower_none_switches_it_off() -> None:
    net = snnfx.convert(Feedback().double(), example_inputs=x_of(3, 4), lower=None)
    net(x_of(5, 3, 4))
    assert mixed_of(net) == []


def test_explain_tells_of_it() -> None:
    net = snnfx.convert(Feedback().double(), example_inputs=x_of(3, 4))
    (before,) = snnfx.explain(net).kernels
    assert before == ("One kernel for all time steps, products included: loop_1, compiled at the first call.")
    net(x_of(5, 3, 4)).sum().backward()
    (after,) = snnfx.explain(net).kernels
    assert after.startswith("One kernel for all time steps, products included: loop_1; ")
    assert after.endswith("% of the inputs of its products were not zero; training saves 2 tensors of all steps.")


# -- what is done -----------------------------------------------------------------------------------------------------


def backward_of(net: Any) -> Any:
    return list(assert_lowered(net)._training.values())[-1]


def test_a_recurrent_layer_is_one_product_and_one_kernel_a_step() -> None:
    net = snnfx.convert(Feedback().double(), example_inputs=x_of(3, 4))
    net(x_of(5, 3, 4)).sum().backward()
    passes = backward_of(net)
    for schedule in (passes.forward, passes.backward):
        assert sum(len(stage.groups) for stage in schedule.stages) == 1
        products = [c.name for stage in schedule.stages for c in stage.calls if c.name in ("mm", "addmm")]
        assert len(products) == 1
    # The gradient of the weight is one product over all steps, that of the bias a sum that the kernel adds up.
    hows = [d.how for gradient in passes.constant_gradients if gradient is not None for d in gradient.parts()]
    assert hows.count("product") == 1 and hows.count("sum") == 1


def test_a_convolution_has_one_weight_gradient_for_all_steps() -> None:
    net = snnfx.convert(ConvolutionalFeedback().double(), example_inputs=x_of(3, 2, 5, 4))
    net(x_of(5, 3, 2, 5, 4)).sum().backward()
    hows = [d.how for gradient in backward_of(net).constant_gradients if gradient is not None for d in gradient.parts()]
    assert hows.count("convolution") >= 1


def test_what_needs_no_state_runs_once() -> None:
    """A product of the input inside an opaque cell is one product before the loop."""

    net = assert_converts(nn.Sequential(Leaf()).double(), x_of(6, 3, 4), examples=True)
    passes = backward_of(net)
    assert [c.name for c in passes.forward.before] == ["addmm"]
    assert "mm" in [c.name for c in passes.backward.after]  # the gradient of the input
    assert sum(c.name in ("mm", "addmm") for stage in passes.forward.stages for c in stage.calls) == 1


# -- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["feedback", "convolution", "two products"])
def test_compiling_does_not_depend_on_the_number_of_steps(name: str) -> None:
    make, shape = MODELS[name]
    model = make().double()
    net = snnfx.convert(model, example_inputs=x_of(3, *shape))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for T in (4, 5, 8, 16, 33):
        x_seq = x_of(T, 3, *shape).requires_grad_()
        leaves = [x_seq, *model.parameters()]
        actual, expected = compiled(x_seq), net(x_seq)
        torch.testing.assert_close(actual, expected)
        for a, e in zip(
            torch.autograd.grad(actual.square().sum(), leaves),
            torch.autograd.grad(expected.square().sum(), leaves),
            strict=True,
        ):
            torch.testing.assert_close(a, e)
    assert counter.frame_count <= 2


def test_a_loop_whose_first_step_nobody_knows_compiles() -> None:
    """SpikingJelly's container makes its state in its first step; under torch.compile its loop is stepped."""
    model = spikingjelly_container().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    compiled, x_seq = torch.compile(net, fullgraph=True, backend="aot_eager"), x_of(5, 3, 4)
    actual, expected = compiled(x_seq), net(x_seq)
    torch.testing.assert_close(actual, expected)
    wanted = list(model.parameters())
    for a, e in zip(
        torch.autograd.grad(actual.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, e)


def test_compiled_for_any_batch() -> None:
    model = Feedback().double()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter, dynamic=True)
    for T, batch in ((4, 3), (6, 5), (5, 7), (5, 5)):
        x_seq = x_of(T, batch, 4)
        actual, expected = compiled(x_seq), net(x_seq)
        torch.testing.assert_close(actual, expected)
        wanted = list(model.parameters())
        for a, e in zip(
            torch.autograd.grad(actual.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(a, e)
    assert counter.frame_count <= 2


def test_exported() -> None:
    model = Feedback().double().eval()
    net = snnfx.convert(model, example_inputs=x_of(3, 4))
    x_seq = x_of(5, 3, 4)
    program = torch.export.export(net, (x_seq,), dynamic_shapes=({0: torch.export.Dim("T", min=2)},))
    torch.testing.assert_close(program.module()(x_of(9, 3, 4) * 0 + 1.0), net(x_of(9, 3, 4) * 0 + 1.0))


class Inside(nn.Module):
    """Spikes come back into a layer that returns several values."""

    def __init__(self, layer: nn.Module, pick: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.pick, self.back = layer, pick, nn.Linear(4, 5)
        self.lif = neuron.LIFNode(v_threshold=0.1)
        self.spk: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.spk is None:
            self.spk = torch.zeros_like(x[:, 0, :4])
        self.spk = self.lif(self.pick(self.layer, x + self.back(self.spk).unsqueeze(1)))
        return self.spk


class CarriesLSTM(snnfx.MemoryModule):
    """A recurrent layer whose own states go from step to step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lif = nn.LSTM(5, 4, 2, batch_first=True), neuron.LIFNode(v_threshold=0.1)
        self.register_memory("h", None)
        self.register_memory("c", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h, self.c = x.new_zeros(2, x.shape[0], 4), x.new_zeros(2, x.shape[0], 4)
        y, (self.h, self.c) = self.layer(x, (self.h, self.c))
        return self.lif(y[:, -1])


RETURNING_SEVERAL: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: Inside(nn.LSTM(5, 4, batch_first=True), lambda f, x: f(x)[0].mean(1)),
    "lstm, last hidden state": lambda: Inside(nn.LSTM(5, 4, 2, batch_first=True), lambda f, x: f(x)[1][0][-1]),
    "lstm, cell state": lambda: Inside(nn.LSTM(5, 4), lambda f, x: f(x.transpose(0, 1))[1][1][0]),
    "lstm both ways": lambda: Inside(nn.LSTM(5, 2, batch_first=True, bidirectional=True), lambda f, x: f(x)[0][:, 0]),
    "gru": lambda: Inside(nn.GRU(5, 4, 2, batch_first=True), lambda f, x: f(x)[1][-1]),
    "lstm cell": lambda: Inside(nn.LSTMCell(5, 4), lambda f, x: f(x[:, 0])[1]),
    "attention": lambda: Inside(
        nn.MultiheadAttention(5, 1, batch_first=True), lambda f, x: f(x, x, x, need_weights=False)[0][:, 0, :4]
    ),
    "indices not used": lambda: Inside(nn.MaxPool1d(2, return_indices=True), lambda f, x: f(x.mT)[0].sum(2)[:, 1:]),
    "states of its own": CarriesLSTM,
}


@pytest.mark.parametrize("lower", ["auto", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # of float32, oneDNN computes the LSTM
@pytest.mark.parametrize("name", RETURNING_SEVERAL)
def test_layers_that_return_several_values(name: str, dtype: torch.dtype, lower: Any) -> None:
    """`copy_(): argument 'other' must be Tensor, not NoneType`: without autograd, oneDNN returns no workspace."""
    model = RETURNING_SEVERAL[name]()
    x_seq = x_of(5, 3, 4, 5)
    expected = run_stepped(copy.deepcopy(model).double(), x_seq)
    model = model.to(dtype)
    net = snnfx.convert(model, example_inputs=x_seq[0].to(dtype), lower=lower)
    found = run_net(net, x_seq.to(dtype))
    expected.buffers = found.buffers = {}
    if dtype is torch.float64:
        assert_same_run(found, expected)
        return
    tolerance = 1e-4
    torch.testing.assert_close(found.outputs.double(), expected.outputs, atol=tolerance, rtol=tolerance)
    for name, gradient in expected.parameter_grads.items():
        assert_same(found.parameter_grads[name].double(), gradient, tolerance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_a_constant_of_integers_keeps_its_values(dtype: torch.dtype) -> None:
    class Scaled(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.feedback = nn.Linear(3, 3)
            self.register_buffer("scale", torch.tensor(4).to(dtype))
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.v * 0.5 + x * self.scale + self.feedback(torch.sigmoid(x + self.v)) * 0.1
            return self.v

    model, x_seq = Scaled().double(), torch.rand(4, 2, 3, dtype=torch.float64)
    net = snnfx.convert(fresh_copy(model))
    assert_same(net(x_seq), torch.stack([model(x) for x in x_seq]))
    assert_lowered(net)
