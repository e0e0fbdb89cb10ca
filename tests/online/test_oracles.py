"""The oracles of the online rules agree with one another where theory says that they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.online_equations import (
    dense_ottt,
    eprop,
    layerwise_exact,
    mse_slope,
)
from support.online_models import LEAKS, Graph, N, T, close, dense_net, differ, equations_of, sequences, sgd
from support.online_oracles import (
    Outcome,
    PlainReadout,
    RecurrentLIF,
    bptt,
    fptt,
    mse,
    ostl,
    ottt,
    rtrl,
    sltt,
    truncated_bptt,
)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize("detach_reset", [True, False])
def test_rtrl_by_forward_mode_is_bptt(detach_reset: bool) -> None:
    model = dense_net(detach_reset=detach_reset)
    x_seq, target = (s[:4] for s in sequences(4, 5))
    expected = bptt(model, x_seq, target, mse).gradients
    for name, gradient in rtrl(model, x_seq, target, mse).items():
        assert expected[name].any()
        close(gradient, expected[name])


def test_rtrl_is_bptt_with_recurrence_and_readout() -> None:
    model = nn.Sequential(RecurrentLIF(4, 5, 0.8), nn.Linear(5, 2, bias=False), PlainReadout(0.9))
    nn.init.normal_(model[0].inp.weight, 0.4, 0.5)
    x_seq, target = sequences(2, 4)
    expected = bptt(model, x_seq, target, mse).gradients
    for name, gradient in rtrl(model, x_seq, target, mse).items():
        assert expected[name].any()
        close(gradient, expected[name])


@pytest.mark.parametrize("trace_input", [True, False])
def test_ottt_on_modules_is_ottt_written_out(trace_input: bool) -> None:
    model = dense_net((0.5, 0.7, 0.6))
    x_seq, target = sequences(3, 5)
    leaks = {"2": 0.7, "4": 0.6} | ({"0": 0.5} if trace_input else {})
    found = ottt(model, x_seq, target, mse, leaks).gradients
    weights, biases = dense_ottt(equations_of(model), x_seq, target, mse_slope, trace_input)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        close(found[f"{2 * layer}.weight"], weight)
        close(found[f"{2 * layer}.bias"], bias)


def test_layerwise_exact_is_ottt_with_everything_traced() -> None:
    model = dense_net((0.5, 0.7, 0.6))
    x_seq, target = sequences(3, 5)
    exact, exact_biases = layerwise_exact(equations_of(model), x_seq, target, mse_slope)
    traced, untraced_biases = dense_ottt(equations_of(model), x_seq, target, mse_slope, trace_input=True)
    for a, b in zip(exact, traced, strict=True):
        close(a, b)
    assert all(differ(a, b) for a, b in zip(exact_biases, untraced_biases, strict=True))


def test_layerwise_exact_on_modules_is_layerwise_exact_written_out() -> None:
    model = dense_net((0.5, 0.7, 0.6))
    x_seq, target = sequences(3, 5)
    weights, biases = layerwise_exact(equations_of(model), x_seq, target, mse_slope)
    found = ostl(model, ("1", "3", "5"), x_seq, target, mse)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        close(found[f"{2 * layer}.weight"], weight)
        close(found[f"{2 * layer}.bias"], bias)


def test_layerwise_exact_is_bptt_in_the_last_layer() -> None:
    model = dense_net()
    x_seq, target = sequences(4, 5)
    weights, biases = layerwise_exact(equations_of(model), x_seq, target, mse_slope)
    expected = bptt(model, x_seq, target, mse).gradients
    close(weights[-1], expected["2.weight"])
    close(biases[-1], expected["2.bias"])
    assert differ(weights[0], expected["0.weight"])


def graph_runs() -> tuple[Outcome, Outcome, Outcome]:
    model = Graph()
    x_seq, target = sequences(4, 1, 8, 8)
    return (
        ottt(model, x_seq, target, mse, LEAKS),
        bptt(model, x_seq, target, mse),
        sltt(model, x_seq, target, mse),
    )


def test_ottt_of_the_last_layer_is_bptt_through_any_operation_before_the_weight() -> None:
    online, through_time, spatial = graph_runs()
    close(online.gradients["fc.weight"], through_time.gradients["fc.weight"])
    assert differ(spatial.gradients["fc.weight"], through_time.gradients["fc.weight"])


def test_ottt_of_the_first_layer_is_sltt() -> None:
    online, through_time, spatial = graph_runs()
    close(online.gradients["conv1.weight"], spatial.gradients["conv1.weight"])
    assert differ(through_time.gradients["conv1.weight"], spatial.gradients["conv1.weight"])


def test_ottt_leaves_biases_untraced() -> None:
    online, through_time, spatial = graph_runs()
    for name in ("conv1.bias", "conv3.bias", "fc.bias"):
        close(online.gradients[name], spatial.gradients[name])
        assert differ(online.gradients[name], through_time.gradients[name])


def test_traces_matter_in_every_inner_layer_of_the_graph() -> None:
    online, _, spatial = graph_runs()
    for name in ("conv2.weight", "conv3.weight", "fc.weight"):
        assert differ(online.gradients[name], spatial.gradients[name])


def test_all_runs_see_the_same_outputs() -> None:
    online, through_time, spatial = graph_runs()
    assert 0.05 < through_time.outputs.mean() < 0.95
    assert torch.equal(online.outputs, through_time.outputs) and torch.equal(spatial.outputs, through_time.outputs)


def test_a_trace_before_a_max_pool_is_another_rule() -> None:
    # Max-pooling is not linear: the pool of a trace is not the trace of the pool, which the weight is given.
    spikes = (torch.rand(T, N, 1, 4, 4) < 0.5).double()
    before, after = torch.zeros(N, 1, 4, 4), torch.zeros(N, 1, 2, 2)
    for s in spikes:
        before = 0.5 * before + s
        after = 0.5 * after + F.max_pool2d(s, 2)
    assert differ(F.max_pool2d(before, 2), after)
    before = sum(0.5 ** (T - 1 - t) * F.avg_pool2d(s, 2) for t, s in enumerate(spikes))
    after = F.avg_pool2d(sum(0.5 ** (T - 1 - t) * s for t, s in enumerate(spikes)), 2)
    close(before, after)


def test_one_step_makes_all_rules_equal() -> None:
    model = Graph()
    x_seq, target = sequences(4, 1, 8, 8)
    x_seq, target = x_seq[:1], target[:1]
    expected = bptt(model, x_seq, target, mse).gradients
    for run in (ottt(model, x_seq, target, mse, LEAKS), sltt(model, x_seq, target, mse)):
        for name, gradient in run.gradients.items():
            close(gradient, expected[name])


def test_truncation_after_every_step_is_sltt() -> None:
    model = dense_net()
    x_seq, target = sequences(4, 5)
    spatial = sltt(model, x_seq, target, mse, scale=1 / T).gradients
    truncated = truncated_bptt(model, x_seq, target, mse, K=1, scale=1 / T).gradients
    for name, gradient in spatial.items():
        close(truncated[name], gradient)


def test_sltt_k_over_all_choices_of_one_step_adds_up_to_sltt() -> None:
    model = dense_net()
    x_seq, target = sequences(4, 5)
    spatial = sltt(model, x_seq, target, mse).gradients
    single = [sltt(model, x_seq, target, mse, steps=[t]).gradients for t in range(T)]
    for name, gradient in spatial.items():
        close(sum(one[name] for one in single), gradient)


def test_online_updates_with_learning_rate_zero_accumulate_the_same_gradients() -> None:
    model = Graph()
    x_seq, target = sequences(4, 1, 8, 8)
    still = ottt(model, x_seq, target, mse, LEAKS, make_optimizer=lambda w: torch.optim.SGD(w, lr=0.0))
    for name, gradient in ottt(model, x_seq, target, mse, LEAKS).gradients.items():
        close(still.gradients[name], gradient)


def test_eprop_is_bptt_where_nothing_goes_from_neuron_to_neuron_over_time() -> None:
    model = nn.Sequential(RecurrentLIF(4, 5, 0.8, cut=True), nn.Linear(5, 2, bias=False), PlainReadout(0.9))
    nn.init.normal_(model[0].inp.weight, 0.4, 0.5)
    x_seq, target = sequences(2, 4)
    expected = bptt(model, x_seq, target, mse)
    W_in, W_rec, W_out = (p.detach() for p in model.parameters())
    found = eprop(W_in, W_rec, W_out, x_seq, target, mse_slope, 0.8, 0.9)
    close(found["outputs"], expected.outputs)
    for name, parameter in (("in", "0.inp.weight"), ("rec", "0.rec.weight"), ("out", "1.weight")):
        assert found[name].any()
        close(found[name], expected.gradients[parameter])


def test_eprop_is_not_bptt_of_the_recurrent_net() -> None:
    model = nn.Sequential(RecurrentLIF(4, 5, 0.8), nn.Linear(5, 2, bias=False), PlainReadout(0.9))
    nn.init.normal_(model[0].inp.weight, 0.4, 0.5)
    x_seq, target = sequences(2, 4)
    W_in, W_rec, W_out = (p.detach() for p in model.parameters())
    found = eprop(W_in, W_rec, W_out, x_seq, target, mse_slope, 0.8, 0.9)
    expected = bptt(model, x_seq, target, mse).gradients
    assert differ(found["in"], expected["0.inp.weight"])
    close(found["out"], expected["1.weight"])


class Quadratic(nn.Module):
    """No state: its loss has a known minimum, to which one FPTT problem can be solved."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_fptt_paper_and_authors_agree_where_the_first_problem_is_solved_exactly() -> None:
    model = Quadratic()
    x_seq, target = torch.rand(1, N, 4), torch.rand(1, N, 4)
    paper, authors = (
        fptt(model, x_seq, target, mse, 0.5, sgd, variant, inner_steps=400) for variant in ("paper", "authors")
    )
    close(paper.parameters["w"], authors.parameters["w"])
    close(paper.extra["multipliers"][0], authors.extra["multipliers"][0], 1e-10)
    close(paper.extra["averages"][0], authors.extra["averages"][0], 1e-10)


def test_fptt_first_update_is_that_of_plain_descent_in_every_variant() -> None:
    model = dense_net()
    x_seq, target = sequences(4, 5)
    x_seq, target = x_seq[:1], target[:1]
    gradients = bptt(model, x_seq, target, mse).gradients
    for variant in ("reference", "paper", "authors"):
        after = fptt(model, x_seq, target, mse, 0.5, sgd, variant).parameters
        for name, p in model.named_parameters():
            close(after[name], p.detach() - 0.1 * gradients[name])


def test_fptt_reference_and_paper_agree_without_state_and_with_one_entry_a_parameter() -> None:
    # Then mean and sum are one thing, and there is no state to be at the wrong step of.
    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.a * x + self.b)

    x_seq, target = torch.rand(T, N, 1), torch.rand(T, N, 1)
    model = Scalars()
    reference, paper = (fptt(model, x_seq, target, mse, 0.5, sgd, v) for v in ("reference", "paper"))
    for name, value in reference.parameters.items():
        close(paper.parameters[name], value)
    # The reference leaves the running average alone after the last step.
    assert differ(paper.extra["averages"][0], reference.extra["averages"][0])
