"""`snnfx.online` against the oracles, in float64: every rule, on models whose neurons are anybody's."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.online import BPTT, FPTT, OTTT_A, OTTT_O, SLTT, SLTT_K, TBPTT, EProp, Rule, Trainer
from support.online_equations import (
    eprop,
    layerwise_exact,
    mse_slope,
)
from support.online_models import N, T, close, dense_net, equations_of, sequences, sgd
from support.online_oracles import (
    GivenDropout,
    PlainLIF,
    PlainReadout,
    RecurrentLIF,
    bptt,
    fptt,
    mse,
    ottt,
    sltt,
    truncated_bptt,
)
from support.online_training import Trained, batch_norm_net, each_case, prepared, same


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


# Each rule by its oracle.


@each_case
def test_bptt(case: str) -> None:
    model, x_seq, target, _ = prepared(case)
    found, expected = Trained(model, BPTT, x_seq, target), bptt(model, x_seq, target, mse, 1 / T)
    same(found.gradients, expected.gradients)
    close(found.result.outputs, expected.outputs)
    close(found.result.loss, expected.losses.sum() / T)


@each_case
@pytest.mark.parametrize("K", [1, 3])
def test_truncated_bptt(case: str, K: int) -> None:
    model, x_seq, target, _ = prepared(case)
    same(
        Trained(model, TBPTT(K), x_seq, target).gradients, truncated_bptt(model, x_seq, target, mse, K, 1 / T).gradients
    )


def test_truncated_bptt_with_an_update_every_k_steps() -> None:
    model, x_seq, target, _ = prepared("plain")
    found = Trained(model, TBPTT(3)(update=3), x_seq, target)
    expected = truncated_bptt(model, x_seq, target, mse, 3, 1 / T, make_optimizer=sgd)
    same(found.parameters, expected.parameters)
    assert found.result.updates == 3


@each_case
def test_sltt(case: str) -> None:
    model, x_seq, target, _ = prepared(case)
    found, expected = Trained(model, SLTT, x_seq, target), sltt(model, x_seq, target, mse, 1 / T)
    same(found.gradients, expected.gradients)
    close(found.result.outputs, expected.outputs)


def test_sltt_k_takes_the_gradients_of_k_steps() -> None:
    model, x_seq, target, _ = prepared("plain")
    x_seq, target = x_seq[:5], target[:5]
    found = Trained(model, SLTT_K(2), x_seq, target).gradients
    candidates = [
        sltt(model, x_seq, target, mse, 1 / 5, steps).gradients for steps in itertools.combinations(range(5), 2)
    ]
    matches = [c for c in candidates if all(torch.allclose(found[n], c[n], atol=1e-12, rtol=0) for n in found)]
    assert len(matches) == 1


@each_case
def test_ottt_a(case: str) -> None:
    model, x_seq, target, leaks = prepared(case)
    found, expected = Trained(model, OTTT_A, x_seq, target), ottt(model, x_seq, target, mse, leaks, 1 / T)
    same(found.gradients, expected.gradients)
    close(found.result.outputs, expected.outputs)
    assert found.result.updates == 1


@each_case
def test_ottt_o(case: str) -> None:
    model, x_seq, target, leaks = prepared(case)
    found = Trained(model, OTTT_O, x_seq, target)
    expected = ottt(model, x_seq, target, mse, leaks, 1 / T, make_optimizer=sgd)
    same(found.parameters, expected.parameters)
    close(found.result.outputs, expected.outputs)
    assert found.result.updates == T


def test_ottt_with_the_input_and_biases_traced_is_exact_in_each_layer() -> None:
    model = dense_net((0.5, 0.7, 0.6))
    x_seq, target = sequences(3, 5)
    found = Trained(model, OTTT_A(trace_inputs=True, trace_bias=True, loss_scale="sum"), x_seq, target).gradients
    weights, biases = layerwise_exact(equations_of(model), x_seq, target, mse_slope)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        close(found[f"{2 * layer}.weight"], weight, 1e-10)
        close(found[f"{2 * layer}.bias"], bias, 1e-10)


def test_the_leak_of_the_emitting_neuron_or_a_number_can_be_chosen() -> None:
    model = dense_net((0.5, 0.7, 0.6))
    x_seq, target = sequences(3, 5)
    emitting = ottt(model, x_seq, target, mse, {"2": 0.5, "4": 0.7}, 1 / T).gradients
    same(Trained(model, OTTT_A(trace_leak="pre"), x_seq, target).gradients, emitting)
    number = ottt(model, x_seq, target, mse, {"2": 0.9, "4": 0.9}, 1 / T).gradients
    same(Trained(model, OTTT_A(trace_leak=0.9), x_seq, target).gradients, number)


def test_a_weight_that_feeds_no_neuron_has_no_trace_and_the_gradient_of_bptt() -> None:
    model = nn.Sequential(*dense_net(), nn.Linear(4, 3))
    x_seq, target = sequences(3, 5)
    found = Trained(model, OTTT_A, x_seq, target).gradients
    same(found, ottt(model, x_seq, target, mse, {"2": 0.7}, 1 / T).gradients)
    close(found["4.weight"], bptt(model, x_seq, target, mse, 1 / T).gradients["4.weight"])


@pytest.mark.parametrize("variant", ["reference", "paper", "authors"])
@pytest.mark.parametrize("case", ["plain", "graph"])
def test_fptt(case: str, variant: str) -> None:
    model, x_seq, target, _ = prepared(case)
    found = Trained(model, FPTT(0.5, variant), x_seq, target)
    expected = fptt(model, x_seq, target, mse, 0.5, sgd, variant)
    same(found.parameters, expected.parameters)
    close(found.result.outputs, expected.outputs)


@pytest.mark.parametrize("variant", ["reference", "paper", "authors"])
def test_fptt_with_adam(variant: str) -> None:
    model, x_seq, target, _ = prepared("plain")
    other = copy.deepcopy(model)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.05)
    Trainer(other, FPTT(0.5, variant), optimizer, mse).step(x_seq, target)
    expected = fptt(model, x_seq, target, mse, 0.5, lambda w: torch.optim.Adam(w, lr=0.05), variant)
    same({n: p.detach() for n, p in other.named_parameters()}, expected.parameters)


@pytest.mark.parametrize("variant", ["reference", "paper"])
def test_fptt_running_averages_go_on_from_call_to_call(variant: str) -> None:
    model, x_seq, target, _ = prepared("plain")
    other = copy.deepcopy(model)
    optimizer = sgd(list(other.parameters()))
    w_ra = snnfx.online.fptt_online_training_init_w_ra(optimizer)
    net = snnfx.convert(other, example_inputs=x_seq[0])
    averages = None
    for _ in range(2):
        snnfx.online.fptt_online_training(net, optimizer, x_seq, target, mse, 0.5, w_ra, variant=variant)
        expected = fptt(model, x_seq, target, mse, 0.5, sgd, variant, averages)
        averages = expected.extra["averages"]
        with torch.no_grad():
            for p, value in zip(model.parameters(), expected.parameters.values(), strict=True):
                p.copy_(value)
        for a, b in zip(w_ra, averages, strict=True):
            close(a, b, 1e-10)
        same({n: p.detach() for n, p in other.named_parameters()}, expected.parameters)


def test_eprop_is_the_published_rule() -> None:
    model = nn.Sequential(RecurrentLIF(4, 5, 0.8), nn.Linear(5, 2, bias=False), PlainReadout(0.9))
    nn.init.normal_(model[0].inp.weight, 0.4, 0.5)
    x_seq, target = sequences(2, 4)
    found = Trained(model, EProp(loss_scale="sum"), x_seq, target).gradients
    W_in, W_rec, W_out = (p.detach() for p in model.parameters())
    expected = eprop(W_in, W_rec, W_out, x_seq, target, mse_slope, 0.8, 0.9)
    for name, parameter in (("in", "0.inp.weight"), ("rec", "0.rec.weight"), ("out", "1.weight")):
        close(found[parameter], expected[name], 1e-10)


# Weights and graphs.


class ConvKind(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        rank = 1 if isinstance(conv, nn.Conv1d) else 2
        self.rank = rank
        self.first = nn.Conv1d(2, 4, 3, padding=1) if rank == 1 else nn.Conv2d(2, 4, 3, padding=1)
        self.conv = conv
        self.lif1, self.lif2 = PlainLIF(0.6, 0.5), PlainLIF(0.8, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif2(self.conv(self.lif1(self.first(x)))).flatten(2).mean(2)


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "dilated groups": lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, bias=False),
    "same padding": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "circular padding": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    "one dimension": lambda: nn.Conv1d(4, 6, 3, padding=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_ottt_of_every_kind_of_convolution(kind: str) -> None:
    model = ConvKind(CONVOLUTIONS[kind]())
    x_seq = (torch.rand(T, N, 2, *[6] * model.rank) < 0.5).double()
    target = torch.rand(T, N, 6)
    expected = ottt(model, x_seq, target, mse, {"conv": 0.8}, 1 / T).gradients
    assert expected["conv.weight"].any()
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected)


class FunctionalWeight(nn.Module):
    """The layers of `dense_net`, the second one with `F.linear` and a parameter of the model's own."""

    def __init__(self, dense: nn.Sequential) -> None:
        super().__init__()
        self.fc, self.lif1, self.lif2 = dense[0], dense[1], dense[3]
        self.weight, self.bias = dense[2].weight, dense[2].bias

    def forward(self, x: Tensor) -> Tensor:
        return self.lif2(F.linear(self.lif1(self.fc(x)), self.weight, self.bias))


def test_ottt_of_a_weight_used_by_a_function() -> None:
    dense = dense_net()
    x_seq, target = sequences(4, 5)
    expected = ottt(dense, x_seq, target, mse, {"2": 0.7}, 1 / T).gradients
    found = Trained(FunctionalWeight(dense), OTTT_A, x_seq, target).gradients
    close(found["weight"], expected["2.weight"], 1e-10)
    close(found["bias"], expected["2.bias"], 1e-10)
    close(found["fc.weight"], expected["0.weight"], 1e-10)


class LayerTwice(nn.Module):
    """One linear layer at two places of a step: each place has a trace of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(5, 6), nn.Linear(6, 6)
        self.lif1, self.lif2, self.lif3 = PlainLIF(0.5), PlainLIF(0.7), PlainLIF(0.7)
        nn.init.normal_(self.first.weight, 0.3, 0.5)
        nn.init.normal_(self.shared.weight, 0.2, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif3(self.shared(self.lif2(self.shared(self.lif1(self.first(x))))))


def test_ottt_of_a_layer_used_twice_in_a_step() -> None:
    model = LayerTwice()
    x_seq, target = sequences(6, 5)
    expected = ottt(model, x_seq, target, mse, {"shared": 0.7}, 1 / T).gradients
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected)


class Chain(nn.Module):
    """Two weights without a neuron between: the operand of the second is what the first one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 4)
        self.lif1, self.lif2 = PlainLIF(0.5), PlainLIF(0.7)
        self.functional = False
        for layer in (self.first, self.one, self.two):
            nn.init.normal_(layer.weight, 0.3, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(self.lif1(self.first(x)))
        return self.lif2(F.linear(one, self.two.weight, self.two.bias) if self.functional else self.two(one))


def test_ottt_of_weights_behind_each_other() -> None:
    model = Chain()
    x_seq, target = sequences(4, 5)
    expected = ottt(model, x_seq, target, mse, {"one": 0.7, "two": 0.7}, 1 / T).gradients
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected)
    model.functional = True
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected)


class Recurrence(nn.Module):
    """The spikes of the last step come back through a weight, whose operand has a trace like any other."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = RecurrentLIF(4, 5, 0.8)
        self.fc, self.lif = nn.Linear(5, 3), PlainLIF(0.8)
        nn.init.normal_(self.cell.inp.weight, 0.4, 0.5)
        nn.init.normal_(self.fc.weight, 0.4, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(self.cell(x)))


def test_ottt_of_a_recurrent_layer() -> None:
    model = Recurrence()
    x_seq, target = sequences(3, 4)
    expected = ottt(model, x_seq, target, mse, {"cell.rec": 0.8, "fc": 0.8}, 1 / T).gradients
    assert expected["cell.rec.weight"].any()
    same(Trained(model, OTTT_A, x_seq, target).gradients, expected)


# Dropout and BatchNorm.


class Dropped(nn.Module):
    """Also gives what comes out of the dropout, so that its mask can be seen."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.fc1, self.lif1, self.drop, self.fc2, self.lif2 = (
            nn.Linear(5, 8), PlainLIF(0.5), drop, nn.Linear(8, 4), PlainLIF(0.7),
        )  # fmt: skip
        nn.init.normal_(self.fc1.weight, 0.3, 0.5)
        nn.init.normal_(self.fc2.weight, 0.3, 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dropped = self.drop(self.lif1(self.fc1(x)))
        return self.lif2(self.fc2(dropped)), dropped


def first_mse(y: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return mse(y[0], target)


class FirstOutput(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[0]


def test_ottt_draws_one_dropout_mask_for_the_sequence() -> None:
    model = Dropped(nn.Dropout(0.5))
    x_seq, target = sequences(4, 5)
    # All hidden neurons fire in the first step, so that the mask can be read off what is let through.
    nn.init.uniform_(model.fc1.weight, 0.1, 0.5)
    x_seq[0] = 8.0
    found = Trained(model, OTTT_A, x_seq, target, first_mse, chunk=3)
    dropped = found.result.outputs[1]
    mask = (dropped > 0).any(0).double() * 2
    model.drop = GivenDropout(mask)
    expected = ottt(FirstOutput(model), x_seq, target, mse, {"model.fc2": 0.7}, 1 / T)
    close(found.result.outputs[0], expected.outputs)
    same({f"model.{n}": g for n, g in found.gradients.items()}, expected.gradients)
    assert 0 < mask.mean() < 2


def test_sltt_draws_a_dropout_mask_for_every_step() -> None:
    model = Dropped(nn.Dropout(0.5))
    x_seq = torch.ones(T, N, 5) * 3
    nn.init.constant_(model.fc1.weight, 2.0)
    dropped = Trained(model, SLTT, x_seq, torch.rand(T, N, 4), first_mse).result.outputs[1]
    assert not torch.equal(dropped[1], dropped[2])


@pytest.mark.parametrize("rule", [OTTT_A, OTTT_O], ids=lambda rule: rule.name)
def test_batch_norm_sees_one_step_at_a_time(rule: Rule) -> None:
    model = batch_norm_net()
    x_seq, target = sequences(3, 1, 8, 8)
    found = Trained(model, rule, x_seq, target)
    update = sgd if rule is OTTT_O else None
    expected = ottt(model, x_seq, target, mse, {"4": 0.6, "8": 0.6}, 1 / T, make_optimizer=update)
    if update is None:
        same(found.gradients, expected.gradients)
    else:
        same(found.parameters, expected.parameters)
    same(dict(found.model.named_buffers()), dict(expected.model.named_buffers()))
