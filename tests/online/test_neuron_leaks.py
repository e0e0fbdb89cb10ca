"""OTTT and e-prop with a leak for each neuron: a trace for each output channel, against a plain loop in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.errors import InputError
from snnfx.online import OTTT_A, OTTT_O, SLTT, SLTT_K, EProp, Rule, Trainer
from support.neuron_trace_oracle import LeaksOf, ottt_per_neuron
from support.online_equations import mse_slope
from support.online_models import N, T, close, differ, sgd
from support.online_oracles import PlainLIF, PlainReadout, TriangleSpike, bptt, mse, ottt, sltt, triangle
from support.online_training import Trained, refused, same


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


class LeakyNeurons(nn.Module):
    """LIF neurons whose leak is `sigmoid(w)`, with a w of any shape; `form` reads it in the graph."""

    def __init__(self, *shape: int, threshold: float = 0.8, form: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.threshold, self.form = threshold, form
        self.v: Tensor | float = 0.0

    def leaks(self) -> Tensor:
        return self.form(self.w).flatten()

    def forward(self, x: Tensor) -> Tensor:
        u = self.form(self.w) * self.v + x
        spike = TriangleSpike.apply(u - self.threshold)
        self.v = u - self.threshold * spike.detach()
        return spike


def leaks_of(name: str) -> LeaksOf:
    return lambda model: model.get_submodule(name).leaks()  # type: ignore[operator, no-any-return]


def initialised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() > 1:
            nn.init.normal_(module.weight, 1.0 / module.weight[0].numel(), 1.5 * module.weight[0].numel() ** -0.5)
    return model


def dense() -> nn.Module:
    return initialised(nn.Sequential(
        nn.Linear(5, 6), LeakyNeurons(6), nn.Linear(6, 4), LeakyNeurons(4), nn.Linear(4, 3), LeakyNeurons(3)
    ))  # fmt: skip


def in_the_last_of_three_dims() -> nn.Module:
    return initialised(nn.Sequential(
        nn.Linear(5, 6), LeakyNeurons(6), nn.Linear(6, 4, bias=False), LeakyNeurons(1, 4),
        nn.Linear(4, 3), PlainLIF(0.7),
    ))  # fmt: skip


def per_channel(*shape: int) -> Callable[[Tensor], Tensor]:
    """The leaks are stored as `[C]` and viewed in the graph."""
    return lambda w: torch.sigmoid(w).view(shape)


class Convolutional(nn.Module):
    """Channels with their own leaks; BatchNorm, pooling and dropout lie between the weight and its neurons."""

    def __init__(self, conv: nn.Module, dims: int = 2, between: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        ones = (1,) * dims
        first = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.lif1 = first(2, 4, 3, padding=1), LeakyNeurons(4, *ones, threshold=0.5)
        self.conv, self.between = conv, nn.Sequential(*between)
        self.lif2 = LeakyNeurons(6, threshold=0.4, form=per_channel(1, 6, *ones))
        initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif2(self.between(self.conv(self.lif1(self.first(x))))).flatten(2).mean(2)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: Convolutional(nn.Conv2d(4, 6, 3, stride=2, padding=1)),
    "dilated groups": lambda: Convolutional(nn.Conv2d(4, 6, 3, dilation=2, groups=2, bias=False)),
    "same padding": lambda: Convolutional(nn.Conv2d(4, 6, 4, padding="same")),
    "circular padding": lambda: Convolutional(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
    "transposed": lambda: Convolutional(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1)),
    "transposed groups": lambda: Convolutional(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)),
    "one dimension": lambda: Convolutional(nn.Conv1d(4, 6, 3, padding=2), 1),
    "three dimensions": lambda: Convolutional(nn.Conv3d(4, 6, 2), 3),
    "normalised and pooled": lambda: Convolutional(
        nn.Conv2d(4, 6, 3, padding=1, bias=False), 2, (nn.BatchNorm2d(6), nn.AvgPool2d(2), nn.Identity())
    ),
    "max-pooled": lambda: Convolutional(nn.Conv2d(4, 6, 3, padding=1), 2, (nn.MaxPool2d(2),)),
}
RULES = {"OTTT-A": OTTT_A, "OTTT-O": OTTT_O}


def check(
    model: nn.Module, x_seq: Tensor, leaks: dict[str, LeaksOf], rule: Rule, out: int, tolerance: float = 1e-12
) -> Trained:
    target = torch.rand(T, N, out)
    online = rule.update == "step"
    expected = ottt_per_neuron(model, x_seq, target, mse, leaks, 1 / T, make_optimizer=sgd if online else None)
    found = Trained(model, rule, x_seq, target)
    for name in leaks:
        assert expected.gradients[f"{name}.weight"].any()
    if online:
        same(found.parameters, expected.parameters, tolerance)
    same(found.gradients, expected.gradients, tolerance) if not online else None
    close(found.result.outputs, expected.outputs)
    return found


def spikes(*shape: int) -> Tensor:
    return (torch.rand(T, N, *shape) < 0.5).double()


@pytest.mark.parametrize("rule", RULES)
def test_ottt_with_learned_leaks_of_dense_layers(rule: str) -> None:
    check(dense(), spikes(5), {"2": leaks_of("3"), "4": leaks_of("5")}, RULES[rule], 3)


def test_ottt_with_learned_leaks_along_the_last_of_three_dims() -> None:
    model = in_the_last_of_three_dims()
    target = torch.rand(T, N, 2, 3)
    x_seq = spikes(2, 5)
    leaks: dict[str, LeaksOf] = {"2": leaks_of("3"), "4": lambda model: torch.full((3,), 0.7)}
    expected = ottt_per_neuron(model, x_seq, target, mse, leaks, 1 / T)
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected.gradients, 1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_ottt_with_learned_leaks_of_channels(kind: str, rule: str) -> None:
    model = CONVOLUTIONS[kind]()
    dims = 1 if kind == "one dimension" else 3 if kind == "three dimensions" else 2
    check(model, spikes(2, *[6] * dims), {"conv": leaks_of("lif2")}, RULES[rule], 6)


def test_the_last_layer_has_the_weight_and_bias_gradient_of_bptt() -> None:
    model, x_seq, target = dense(), spikes(5), torch.rand(T, N, 3)
    expected = bptt(model, x_seq, target, mse, 1 / T).gradients
    found = Trained(model, OTTT_A(trace_bias=True), x_seq, target).gradients
    for name in ("4.weight", "4.bias"):
        close(found[name], expected[name])
        assert differ(sltt(model, x_seq, target, mse, 1 / T).gradients[name], expected[name])


def test_bias_traces_of_channels_are_those_of_bptt_in_the_last_layer() -> None:
    model, x_seq, target = CONVOLUTIONS["strided"](), spikes(2, 6, 6), torch.rand(T, N, 6)
    expected = bptt(model, x_seq, target, mse, 1 / T).gradients
    found = Trained(model, OTTT_A(trace_bias=True), x_seq, target).gradients
    for name in ("conv.weight", "conv.bias"):
        close(found[name], expected[name])


def test_equal_leaks_give_the_same_as_one_leak() -> None:
    model, x_seq, target = dense(), spikes(5), torch.rand(T, N, 3)
    for neurons in (model[1], model[3], model[5]):
        nn.init.constant_(neurons.w, 0.5)
    leak = float(torch.sigmoid(torch.tensor(0.5)))
    expected = ottt(model, x_seq, target, mse, {"2": leak, "4": leak}, 1 / T).gradients
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected, 1e-12)


def test_leaks_that_start_equal_are_followed_when_they_differ() -> None:
    model, x_seq, target = dense(), spikes(5), torch.rand(T, N, 3)
    for neurons in (model[1], model[3], model[5]):
        nn.init.constant_(neurons.w, 0.5)
    trainer = Trainer(model, OTTT_A, torch.optim.SGD(model.parameters(), lr=5.0, momentum=0.5), mse)
    for _ in range(3):
        trainer.step(x_seq, target)
    assert differ(model[5].w[0], model[5].w[1])
    leaks = {"2": leaks_of("3"), "4": leaks_of("5")}
    expected = ottt_per_neuron(model, x_seq, target, mse, leaks, 1 / T).gradients
    trainer.step(x_seq, target)
    same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, 1e-12)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_do_not_change_the_gradients(chunk: int) -> None:
    for model, x_seq, out in ((dense(), spikes(5), 3), (CONVOLUTIONS["dilated groups"](), spikes(2, 6, 6), 6)):
        target = torch.rand(T, N, out)
        expected = Trained(model, OTTT_A, x_seq, target).gradients
        same(Trained(model, OTTT_A, x_seq, target, chunk=chunk).gradients, expected, 1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv", "transposed"])
def test_weights_used_by_functions(kind: str) -> None:
    class Functional(nn.Module):
        def __init__(self, model: nn.Module, name: str) -> None:
            super().__init__()
            self.inner, self.layer = model, model.get_submodule(name)
            self.layer.forward = self.call  # type: ignore[method-assign]

        def call(self, x: Tensor) -> Tensor:
            weight, bias = self.layer.weight, self.layer.bias
            if kind == "linear":
                return F.linear(x, weight, bias)
            if kind == "conv":
                return F.conv2d(x, weight, bias, 1, 0, 2, 2)
            return F.conv_transpose2d(x, weight, bias, stride=2, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    make = {"linear": dense, "conv": CONVOLUTIONS["dilated groups"], "transposed": CONVOLUTIONS["transposed groups"]}
    model = make[kind]()
    x_seq, out = (spikes(5), 3) if kind == "linear" else (spikes(2, 6, 6), 6)
    target = torch.rand(T, N, out)
    leaks = {"2": leaks_of("3"), "4": leaks_of("5")} if kind == "linear" else {"conv": leaks_of("lif2")}
    expected = ottt_per_neuron(model, x_seq, target, mse, leaks, 1 / T).gradients
    wrapped = Functional(copy.deepcopy(model), "4" if kind == "linear" else "conv")
    found = Trained(wrapped, OTTT_A, x_seq, target).gradients
    for name, gradient in expected.items():
        close(found[f"inner.{name}"], gradient)


@pytest.mark.parametrize("kind", ["dense", "strided", "same padding"])
def test_a_weight_module_with_a_forward_hook(kind: str) -> None:
    model = dense() if kind == "dense" else CONVOLUTIONS[kind]()
    x_seq, out, name = (spikes(5), 3, "4") if kind == "dense" else (spikes(2, 6, 6), 6, "conv")
    target = torch.rand(T, N, out)
    leaks = {"2": leaks_of("3"), "4": leaks_of("5")} if kind == "dense" else {"conv": leaks_of("lif2")}
    expected = ottt_per_neuron(model, x_seq, target, mse, leaks, 1 / T).gradients
    model.get_submodule(name).register_forward_hook(lambda module, args, output: None)
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected, 1e-12)


class Residual(nn.Module):
    """Two weights feed the same neurons through a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.skip = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.n1, self.n2, self.n3 = LeakyNeurons(4), LeakyNeurons(4), LeakyNeurons(4)
        initialised(self)

    def forward(self, x: Tensor) -> Tensor:
        a = self.n1(self.fc1(x))
        b = self.n2(self.fc2(a))
        return self.n3(self.skip(b) + a) + b


@pytest.mark.parametrize("rule", RULES)
def test_a_residual_graph(rule: str) -> None:
    check(Residual(), spikes(5), {"fc2": leaks_of("n2"), "skip": leaks_of("n3")}, RULES[rule], 4)


def test_rules_without_traces_do_not_depend_on_the_leaks_of_neurons() -> None:
    model, x_seq, target = dense(), spikes(5), torch.rand(T, N, 3)
    same(Trained(model, SLTT, x_seq, target).gradients, sltt(model, x_seq, target, mse, 1 / T).gradients, 1e-12)
    same(Trained(model, SLTT_K(T), x_seq, target).gradients, sltt(model, x_seq, target, mse, 1 / T).gradients, 1e-12)


@pytest.mark.parametrize("dims", ["vector", "map"])
def test_the_leaks_of_the_emitting_neurons(dims: str) -> None:
    """Each element of the operand has the leak of the neuron that emits it, also if it differs over space."""
    if dims == "vector":
        model, x_seq, out = dense(), spikes(5), 3
        names = {"2": model[1], "4": model[3]}
    else:
        model = CONVOLUTIONS["strided"]()
        model.lif1 = LeakyNeurons(4, 6, 6, threshold=0.5)
        x_seq, out, names = spikes(2, 6, 6), 6, {"conv": model.lif1}
    target = torch.rand(T, N, out)
    leaks = {name: torch.sigmoid(neurons.w.detach()) for name, neurons in names.items()}
    expected = ottt(model, x_seq, target, mse, leaks, 1 / T).gradients  # type: ignore[arg-type]
    same(Trained(model, OTTT_A(trace_leak="pre"), x_seq, target).gradients, expected, 1e-12)


# e-prop.


class RecurrentNeurons(nn.Module):
    """A recurrent layer with a leak for each neuron, and an adaptive threshold with a decay for each neuron."""

    def __init__(self, adaptive: bool) -> None:
        super().__init__()
        self.inp, self.rec = nn.Linear(4, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.w = nn.Parameter(torch.randn(5))
        self.decay, self.strength = nn.Buffer(torch.linspace(0.5, 0.9, 5)), 0.2 if adaptive else 0.0
        self.v: Tensor | float = 0.0
        self.b: Tensor | float = 0.0
        self.z: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        if self.z is None:
            self.z = torch.zeros_like(x)
        self.v = torch.sigmoid(self.w) * self.v + x + self.rec(self.z) - self.z.detach()
        self.b = self.decay * self.b + self.z.detach()
        self.z = TriangleSpike.apply(self.v - 1 - self.strength * self.b)
        return self.z


def eprop_written_out(model: nn.Sequential, x_seq: Tensor, target: Tensor) -> dict[str, Tensor]:
    """e-prop of `RecurrentNeurons`, a linear layer and a leaky readout with leak 0.9; `b` has no eligibility."""
    cell: RecurrentNeurons = model[0]  # type: ignore[assignment]
    W_in, W_rec, W_out = cell.inp.weight.detach(), cell.rec.weight.detach(), model[1].weight.detach()  # type: ignore[union-attr, operator]
    leak = torch.sigmoid(cell.w.detach())
    v = torch.zeros(N, 5)
    z, b, y = torch.zeros_like(v), torch.zeros_like(v), torch.zeros(N, 2)
    eps = {"0.inp.weight": torch.zeros(N, 5, 4), "0.rec.weight": torch.zeros(N, 5, 5)}
    filtered = {name: torch.zeros_like(e) for name, e in eps.items()}
    gradients = {name: torch.zeros(e.shape[1:]) for name, e in eps.items()}
    for x, wanted in zip(x_seq, target, strict=True):
        carried = {"0.inp.weight": x, "0.rec.weight": z}
        v = leak * v + x @ W_in.T + z @ W_rec.T - z
        b = cell.decay * b + z
        u = v - 1 - cell.strength * b
        z = (u >= 0).to(u)
        y = 0.9 * y + z @ W_out.T
        signal = mse_slope(y, wanted) @ W_out
        for name, given in carried.items():
            eps[name] = leak[:, None] * eps[name] + given[:, None, :]
            filtered[name] = 0.9 * filtered[name] + triangle(u)[:, :, None] * eps[name]
            gradients[name] += (signal[:, :, None] * filtered[name]).sum(0)
    return gradients


@pytest.mark.parametrize("adaptive", [False, True], ids=["LIF", "adaptive"])
def test_eprop_with_a_leak_for_each_neuron(adaptive: bool) -> None:
    model = nn.Sequential(RecurrentNeurons(adaptive), nn.Linear(5, 2, bias=False), PlainReadout(0.9))
    nn.init.normal_(model[0].inp.weight, 0.4, 0.5)
    x_seq, target = spikes(4) * 2, torch.rand(T, N, 2)
    found = Trained(model, EProp(loss_scale="sum"), x_seq, target).gradients
    for name, gradient in eprop_written_out(model, x_seq, target).items():
        assert gradient.any()
        close(found[name], gradient)


# Neurons of other libraries.


def test_spikingjelly_s_parametric_neurons_with_a_vector() -> None:
    neuron = pytest.importorskip("spikingjelly.activation_based.neuron")

    def plif(size: int) -> nn.Module:
        made = neuron.ParametricLIFNode(decay_input=False, v_reset=None, detach_reset=True)
        made.w = nn.Parameter(torch.randn(size))
        return made

    model = initialised(nn.Sequential(nn.Linear(5, 6), plif(6), nn.Linear(6, 4), plif(4)))
    check(model, spikes(5) * 2, {"2": lambda model: 1 - torch.sigmoid(model[3].w)}, OTTT_A, 4)  # type: ignore[index]


def test_parametric_neurons_of_snnfx_with_a_vector() -> None:
    def plif(size: int) -> nn.Module:
        made = snnfx.neuron.ParametricLIFNode(decay_input=False, v_reset=None, detach_reset=True)
        made.w = nn.Parameter(torch.randn(size))
        return made

    model = initialised(nn.Sequential(nn.Linear(5, 6), plif(6), nn.Linear(6, 4), plif(4)))
    check(model, spikes(5) * 2, {"2": lambda model: 1 - torch.sigmoid(model[3].w)}, OTTT_A, 4)  # type: ignore[index]


@pytest.mark.parametrize("rule", RULES)
def test_snntorch_s_leaky_with_a_vector_of_betas(rule: str) -> None:
    snntorch = pytest.importorskip("snntorch")

    class Layer(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.lif = snntorch.Leaky(beta=torch.rand(size), learn_beta=True, reset_mechanism="subtract")
            self.mem: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.mem is None:
                self.mem = torch.zeros_like(x)
            spike, self.mem = self.lif(x, self.mem)
            return spike.to(x)

    model = initialised(nn.Sequential(nn.Linear(5, 6), Layer(6), nn.Linear(6, 4), Layer(4)))
    leaks: dict[str, LeaksOf] = {"2": lambda model: model[3].lif.beta.clamp(0, 1)}  # type: ignore[index]
    check(model, spikes(5) * 2, leaks, RULES[rule], 4)


def test_norse_with_tensors() -> None:
    norse = pytest.importorskip("norse.torch")
    box = pytest.importorskip("norse.torch.functional.lif_box")

    class Layer(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.rate = nn.Parameter(100 + 700 * torch.rand(size))
            self.v: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.v is None:
                self.v = torch.zeros_like(x)
            p = box.LIFBoxParameters(tau_mem_inv=self.rate, v_th=torch.tensor(0.3))
            spike, state = box.lif_box_feed_forward_step(x, box.LIFBoxFeedForwardState(v=self.v), p, 0.001)
            self.v = state.v
            return spike

    assert norse is not None
    model = initialised(nn.Sequential(nn.Linear(5, 6), Layer(6), nn.Linear(6, 4), Layer(4)))
    leaks: dict[str, LeaksOf] = {"2": lambda model: 1 - 0.001 * model[3].rate}  # type: ignore[index]
    check(model, spikes(5) * 4, leaks, OTTT_A, 4)


# Refusals.


class Gated(nn.Module):
    """The leak depends on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = torch.sigmoid(x) * self.v + x
        return TriangleSpike.apply(self.v - 1)


def refusal(model: nn.Module, code: str, rule: Rule = OTTT_A, *shape: int) -> str:
    optimizer = sgd(list(model.parameters()))
    example = torch.rand(N, *(shape or (5,)))
    error = refused(model, code, lambda: Trainer(model, rule, optimizer, mse, example_inputs=example))
    number = Trainer(model, rule(trace_leak=0.5), optimizer, lambda y, target: y.sum())
    assert number.step(torch.rand(T, *example.shape), torch.zeros(T, N)).updates == 1
    return str(error)


def test_a_leak_that_depends_on_the_input_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), PlainLIF(0.5), nn.Linear(6, 4), Gated())
    assert "depends on the input" in refusal(model, "SNNFX615")


def test_leaks_that_differ_over_space_are_refused() -> None:
    model = CONVOLUTIONS["strided"]()
    model.lif2 = LeakyNeurons(6, 3, 3)
    assert "differs within an output channel" in refusal(model, "SNNFX620", OTTT_A, 2, 6, 6)


def test_an_operation_that_moves_or_mixes_the_channels_is_refused() -> None:
    flat = nn.Sequential(
        nn.Conv2d(1, 2, 3), PlainLIF(0.5), nn.Conv2d(2, 3, 1), nn.Flatten(), LeakyNeurons(48), nn.Linear(48, 2)
    )
    assert "`3` mixes or moves" in refusal(flat, "SNNFX620", OTTT_A, 1, 6, 6)
    chain = nn.Sequential(
        nn.Linear(5, 6), PlainLIF(0.5), nn.Linear(6, 4), nn.LayerNorm(4), LeakyNeurons(4), nn.Linear(4, 2)
    )
    assert "mixes or moves" in refusal(chain, "SNNFX620")
    stacked = nn.Sequential(nn.Linear(5, 6), PlainLIF(0.5), nn.Linear(6, 4), nn.Linear(4, 4), LeakyNeurons(4))
    assert "mixes or moves" in refusal(stacked, "SNNFX620")


def test_one_output_channel_for_several_leaks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6), PlainLIF(0.5), nn.Linear(6, 1), LeakyNeurons(4))
    assert "1 output channels for 4 leaks" in refusal(model, "SNNFX620")


def test_a_product_with_a_weight_is_refused() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif, self.weight, self.out = (
                nn.Linear(5, 6), PlainLIF(0.5), nn.Parameter(torch.rand(6, 4)), LeakyNeurons(4)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.lif(self.fc(x)) @ self.weight)

    assert "only linear layers" in refusal(Product(), "SNNFX620")


def test_two_layers_of_neurons_with_different_leaks_are_refused() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.lif, self.n1, self.n2 = (
                nn.Linear(5, 6), nn.Linear(6, 4), PlainLIF(0.5), LeakyNeurons(4), LeakyNeurons(4)
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.lif(self.a(x)))
            return self.n1(y) + self.n2(y)

    assert "several leaks" in refusal(Fork(), "SNNFX615")


def test_a_report_shows_the_trace_of_each_channel() -> None:
    model = dense()
    trainer = Trainer(model, OTTT_A, sgd(list(model.parameters())), mse, example_inputs=torch.rand(N, 5))
    net = trainer.nets().sequence
    assert snnfx.explain(net).traces[1:] == (
        "2: a trace with the leak of 3.v, one for each output channel",
        "4: a trace with the leak of 5.v, one for each output channel",
    )


def test_the_memory_of_a_trace_for_each_channel_bounds_the_chunks() -> None:
    model = nn.Sequential(nn.Linear(64, 256), PlainLIF(0.5), nn.Linear(256, 512), LeakyNeurons(512))
    trainer = Trainer(model, OTTT_A, sgd(list(model.parameters())), mse, example_inputs=torch.rand(8, 64))
    assert trainer.nets().step_elements == 8 * 512 * 256
    assert trainer.chunk_length(128, trainer.nets().step_elements) == 4


def test_a_refused_rule_names_the_weight() -> None:
    model = nn.Sequential(nn.Linear(5, 6), PlainLIF(0.5), nn.Linear(6, 1), LeakyNeurons(4))
    with pytest.raises(InputError, match=r"`2` cannot have a trace for each neuron of `3\.v`"):
        Trainer(model, OTTT_A, sgd(list(model.parameters())), mse, example_inputs=torch.rand(N, 5))
