"""The interface of `snnfx.online`: what it refuses before anything is changed, what it keeps, what it tells."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.errors import InputError, SnnfxWarning
from snnfx.functional import reset_net
from snnfx.neuron import AdaptiveLIFNode, CUBALIFNode, LeakyIntegrator, LIFNode, ParametricLIFNode
from snnfx.online import (
    BPTT,
    FPTT,
    OSTL,
    OTTT_A,
    OTTT_O,
    SLTT,
    SLTT_K,
    TBPTT,
    EProp,
    FPTTTerm,
    Rule,
    Trainer,
    fptt_online_training,
    fptt_online_training_init_w_ra,
    ottt_online_training,
)
from support.online_training import refused

T, N = 6, 3
RULES = [BPTT, TBPTT(2), OTTT_A, OTTT_O, SLTT, SLTT_K(2), FPTT(0.5), EProp, OSTL]
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)


def mlp(neuron: Callable[[], nn.Module] = lambda: LIFNode(tau=2.0, v_threshold=0.5)) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), neuron(), nn.Linear(5, 3), neuron())


def net_for(rule: Rule) -> nn.Sequential:
    """A net that the rule can train: with signals from a readout, one that does not fire."""
    model = mlp()
    if rule.signal == "readout":
        model[3] = LeakyIntegrator(tau=2.0)
    return model


def sequences(out: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(T, N, 4) * 3, torch.rand(T, N, out)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


# Bad input.


@each_rule
@pytest.mark.parametrize("shape", [(T - 1, N, 3), (T, N + 1, 3), (T + 4, N, 3)])
def test_a_target_of_another_length_is_refused(rule: Rule, shape: tuple[int, ...]) -> None:
    model = net_for(rule)
    trainer = Trainer(model, rule, sgd(model), F.mse_loss)
    refused(model, "SNNFX610", lambda: trainer.step(sequences()[0], torch.rand(shape)))


@each_rule
@pytest.mark.parametrize(
    "loss",
    [
        lambda y, target: (y - target) ** 2,
        lambda y, target: 1.0,
        lambda y, target: y.detach().sum(),
        nn.MSELoss(reduction="none"),
    ],
    ids=["not reduced", "a number", "without a gradient", "torch's, not reduced"],
)
def test_a_loss_that_is_no_scalar_with_a_gradient_is_refused(rule: Rule, loss: Any) -> None:
    model = net_for(rule)
    trainer = Trainer(model, rule, sgd(model), loss)
    refused(model, "SNNFX611", lambda: trainer.step(*sequences()))


@each_rule
def test_an_optimizer_of_another_model_is_refused(rule: Rule) -> None:
    model = net_for(rule)
    refused(model, "SNNFX612", lambda: Trainer(model, rule, sgd(copy.deepcopy(model)), F.mse_loss))
    for p in model.parameters():
        p.requires_grad_(False)
    refused(model, "SNNFX612", lambda: Trainer(model, rule, sgd(model), F.mse_loss))


@pytest.mark.parametrize("K", [0, -1, 1.5, True, "3"])
def test_a_number_of_steps_out_of_range_is_refused(K: Any) -> None:
    model = mlp()
    for make in (TBPTT, SLTT_K, lambda k: BPTT(update=k)):
        refused(model, "SNNFX614", lambda make=make: make(K))
    refused(model, "SNNFX614", lambda: Trainer(model, SLTT, sgd(model), F.mse_loss, chunk=K))


def test_more_random_steps_than_there_are_is_refused() -> None:
    model = mlp()
    trainer = Trainer(model, SLTT_K(T + 1), sgd(model), F.mse_loss)
    refused(model, "SNNFX614", lambda: trainer.step(*sequences()))


def test_running_averages_that_do_not_fit_are_refused() -> None:
    model = mlp()
    optimizer = sgd(model)
    right = fptt_online_training_init_w_ra(optimizer)
    x_seq, target = sequences()
    for wrong in (right[:-1], [*right, right[0]], right[::-1], tuple(right), [None] * 4):
        refused(
            model,
            "SNNFX613",
            lambda w_ra=wrong: fptt_online_training(model, optimizer, x_seq, target, F.mse_loss, 0.5, w_ra),
        )


@pytest.mark.parametrize("alpha", [0.0, -1.0, "a", float("nan")])
def test_an_alpha_that_is_not_above_zero_is_refused(alpha: Any) -> None:
    model = mlp()
    optimizer = sgd(model)
    w_ra = fptt_online_training_init_w_ra(optimizer)
    call = lambda: fptt_online_training(model, optimizer, *sequences(), F.mse_loss, alpha, w_ra)  # noqa: E731
    refused(model, "SNNFX309", call)


def test_functions_refuse_lengths_that_differ() -> None:
    model = mlp()
    optimizer = sgd(model)
    x_seq, target = torch.rand(N, T, 4), torch.rand(N, T - 1, 3)
    refused(model, "SNNFX610", lambda: ottt_online_training(model, optimizer, x_seq, target, F.mse_loss, False))
    w_ra = fptt_online_training_init_w_ra(optimizer)
    call = lambda: fptt_online_training(model, optimizer, x_seq, target[:-1], F.mse_loss, 0.5, w_ra)  # noqa: E731
    refused(model, "SNNFX610", call)


def test_rules_that_contradict_themselves_are_refused() -> None:
    for fields in (
        {"operand": "trace"},
        {"random_steps": 2},
        {"random_steps": 2, "temporal": "cut", "update": "step"},
        {"random_steps": 2, "temporal": "cut", "cut": "spiking"},
        {"extra": FPTTTerm(0.5)},
    ):
        with pytest.raises(InputError, match="SNNFX616"):
            Rule(**fields)


def test_values_that_a_rule_does_not_have_are_refused() -> None:
    for fields in (
        {"operand": "x"},
        {"signal": "x"},
        {"dropout": "x"},
        {"trace_leak": "x"},
        {"cut": "x"},
        {"extra": 1},
    ):
        with pytest.raises(InputError, match="SNNFX309"):
            Rule(**fields)


def test_a_net_without_an_output_at_each_step_is_refused() -> None:
    net = snnfx.convert(mlp(), reduce="mean")
    refused(net, "SNNFX616", lambda: Trainer(net, SLTT, sgd(net), F.mse_loss))


# The leak of a trace.


def test_a_neuron_with_two_leaks_is_refused_until_a_number_is_given() -> None:
    model = mlp(lambda: CUBALIFNode(c_decay=0.5, v_decay=0.75))
    error = refused(
        model, "SNNFX615", lambda: Trainer(model, OTTT_A, sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4))
    )
    assert "several" in str(error) and "trace_leak" in str(error)
    trainer = Trainer(model, OTTT_A(trace_leak=0.5), sgd(model), F.mse_loss)
    assert trainer.step(*sequences()).updates == 1


def test_a_leak_that_depends_on_the_potential_is_refused() -> None:
    class Quadratic(snnfx.neuron.BaseNode):
        def charge(self, v: Tensor, x: Tensor) -> Tensor:
            return v + 0.1 * v * v + x

    model = mlp(Quadratic)
    error = refused(
        model, "SNNFX615", lambda: Trainer(model, OTTT_A, sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4))
    )
    assert "depends on the potential" in str(error)


def leak_of_last_trace(trainer: Trainer) -> float:
    """Two steps of ones into a trace: 1 + leak."""
    net = trainer.nets().sequence
    node = [n for n in net.program.graph.nodes if getattr(n.target, "__name__", "") == "update_trace"][-1]
    leak = node.args[2]
    if isinstance(leak, float):
        return leak
    probe, *constants = (net.program.resolve(str(a.target)) for a in leak.args)
    return float(probe(*constants))


@pytest.mark.parametrize(
    "neuron", [lambda: LIFNode(tau=4.0), lambda: AdaptiveLIFNode(tau=4.0)], ids=["LIF", "adaptive"]
)
def test_the_leak_is_measured(neuron: Callable[[], nn.Module]) -> None:
    model = mlp(neuron)
    trainer = Trainer(model, OTTT_A, sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4))
    assert leak_of_last_trace(trainer) == pytest.approx(0.75, abs=1e-15)


def test_the_leak_follows_the_neuron() -> None:
    model = mlp()
    trainer = Trainer(model, OTTT_A, sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4))
    model[3].tau = 10.0
    assert leak_of_last_trace(trainer) == pytest.approx(0.9, abs=1e-15)


def test_a_learned_leak_is_followed_too() -> None:
    model = mlp(lambda: ParametricLIFNode(init_tau=4.0, v_threshold=0.3))
    trainer = Trainer(model, OTTT_A, sgd(model, 5.0), F.mse_loss)
    trainer.step(*sequences())
    learned = 1 - torch.sigmoid(model[3].w.detach())
    assert abs(float(learned) - 0.75) > 1e-6
    assert leak_of_last_trace(trainer) == pytest.approx(float(learned), abs=1e-12)


def test_what_is_traced_is_told() -> None:
    model = nn.Sequential(*mlp(), nn.Linear(3, 2))
    trainer = Trainer(model, OTTT_A, sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4))
    net = trainer.nets().sequence
    note = next(record.note for record in net.history if record.description.startswith("trace"))
    on_input = "it is on the network's input; trace_inputs=True gives it a trace"
    left = f'0 ({on_input}), 4 (it feeds no neuron; trace_leak="pre" or a number gives it a trace)'
    assert note == f"1 of 3 weights see a trace; not {left}"
    assert {slot.name for slot in net.program.slots} == {"1.v", "3.v", "2.trace"}
    report = snnfx.explain(net)
    assert report.traces == (
        f"0: no trace: {on_input}",
        "2: a trace with the leak of 3.v",
        '4: no trace: it feeds no neuron; trace_leak="pre" or a number gives it a trace',
    )
    assert "update_trace" in str(report) and "it feeds no neuron" in str(report)
    emitting = Trainer(model, OTTT_A(trace_leak="pre"), sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4))
    assert snnfx.explain(emitting.nets().sequence).traces[2] == "4: a trace with the leak of 3.v"


def test_a_readout_whose_gradients_flow_through_time_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 6), LIFNode(), nn.Linear(6, 3), snnfx.neuron.LeakyIntegrator())
    trainer = Trainer(model, EProp, sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4))
    report = snnfx.explain(trainer.nets().sequence)
    assert report.traces[1] == "2: no trace: its gradients flow through time in 3.v"


# What is kept, and where.


@each_rule
def test_a_trainer_leaves_no_state_in_the_model(rule: Rule) -> None:
    model = net_for(rule)
    net = snnfx.convert(model)
    x_seq, _ = sequences()
    expected = net(x_seq).detach()
    Trainer(model, rule, sgd(model, 0.0), F.mse_loss).step(*sequences())
    assert model[1].v == 0.0
    assert torch.equal(net(x_seq), expected)


def test_functions_go_on_from_the_state_of_a_model_and_leave_theirs() -> None:
    model = mlp()
    x_seq, target = torch.rand(N, 2 * T, 4) * 3, torch.rand(N, 2 * T, 3)
    optimizer = sgd(model, 0.0)
    _, whole = ottt_online_training(model, optimizer, x_seq, target, F.mse_loss, False)
    final = model[3].v
    whole_gradient = model[2].weight.grad
    reset_net(model)
    halves, gradients = [], torch.zeros_like(model[2].weight)
    for part in (slice(0, T), slice(T, None)):
        halves.append(ottt_online_training(model, optimizer, x_seq[:, part], target[:, part], F.mse_loss, False)[1])
        gradients += model[2].weight.grad
    assert torch.equal(torch.cat(halves, 1), whole)
    assert torch.equal(model[3].v, final) and not final.requires_grad
    torch.testing.assert_close(gradients, whole_gradient, atol=1e-12, rtol=0)


def test_functions_start_afresh_after_reset_net() -> None:
    model = mlp()
    x_seq, target = torch.rand(N, T, 4) * 3, torch.rand(N, T, 3)
    results = []
    for _ in range(2):
        loss, y = ottt_online_training(model, sgd(model, 0.0), x_seq, target, F.mse_loss, True)
        results.append((float(loss), y, model[2].weight.grad.clone()))
        reset_net(model)
    torch.testing.assert_close(results[0], results[1], atol=0, rtol=0)


def test_a_converted_net_starts_from_the_reset_state_at_every_call_of_a_function() -> None:
    net = snnfx.convert(mlp())
    x_seq, target = torch.rand(N, T, 4) * 3, torch.rand(N, T, 3)
    calls = [ottt_online_training(net, sgd(net, 0.0), x_seq, target, F.mse_loss, False) for _ in range(2)]
    torch.testing.assert_close(calls[0], calls[1], atol=0, rtol=0)


def test_a_model_is_captured_once_for_repeated_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    x_seq, target = torch.rand(N, T, 4), torch.rand(N, T, 3)
    optimizer = sgd(model)
    ottt_online_training(model, optimizer, x_seq, target, F.mse_loss, False)
    monkeypatch.setattr("snnfx.online.edited_nets.convert", lambda *args, **kwargs: pytest.fail("captured again"))
    ottt_online_training(model, optimizer, x_seq, target, F.mse_loss, False)


def test_a_trained_model_copies_and_pickles() -> None:
    model = mlp()
    ottt_online_training(model, sgd(model), torch.rand(N, T, 4), torch.rand(N, T, 3), F.mse_loss, False)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x_seq, target = torch.rand(N, T, 4), torch.rand(N, T, 3)
        assert ottt_online_training(clone, sgd(clone), x_seq, target, F.mse_loss, False)[1].shape == (N, T, 3)


def test_an_edited_net_copies_and_pickles() -> None:
    model = mlp()
    net = Trainer(model, OTTT_A, sgd(model), F.mse_loss, example_inputs=torch.rand(N, 4)).nets().sequence
    x_seq, _ = sequences()
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(clone(x_seq), net(x_seq))


# Results.


def test_the_result_tells_loss_outputs_metrics_and_progress() -> None:
    model = mlp()
    x_seq, target = sequences()
    seen: list[tuple[int, int]] = []
    trainer = Trainer(
        model,
        SLTT,
        sgd(model, 0.0),
        F.mse_loss,
        chunk=4,
        metrics={"rate": lambda y, target: float(y.mean())},
        progress=lambda done, T, loss: seen.append((done, T)),
    )
    result = trainer.step(x_seq, target, return_outputs=True)
    y_seq = snnfx.convert(model)(x_seq)
    expected = torch.stack([F.mse_loss(y, t) for y, t in zip(y_seq, target, strict=True)]).mean()
    torch.testing.assert_close(result.loss, expected.detach())
    assert torch.equal(result.outputs, y_seq) and not result.outputs.requires_grad
    assert result.metrics == {"rate": float(y_seq.mean())}
    assert seen == [(4, T), (T, T)]
    assert set(result.state) == {"1.v", "3.v"} and not any(v.requires_grad for v in result.state.values())


def test_one_target_for_all_steps() -> None:
    model = mlp()
    labels, x_seq = torch.tensor([0, 2, 1]), sequences()[0] * 3
    gradients = []
    for target, dim in ((labels, None), (labels.expand(T, N), 0), (labels.expand(T, N).t(), 1)):
        Trainer(model, OTTT_A, sgd(model, 0.0), F.cross_entropy, target_dim=dim).step(x_seq, target)
        gradients.append(model[2].weight.grad.clone())
    assert gradients[0].any()
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_time_may_be_last_and_inputs_may_be_the_same_at_every_step() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.lif = nn.Linear(4, 3), nn.Linear(4, 3), LIFNode(v_threshold=0.5)

        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            return self.lif(self.a(x) + self.b(image))

    model = TwoInputs()
    x_seq, target = sequences()
    image = torch.rand(N, 4)
    net = snnfx.convert(model, time_dim=(-1, None))
    repeated = snnfx.convert(model)
    gradients = []
    for rule in (SLTT, OTTT_O, SLTT_K(T)):
        for given, args in ((net, (x_seq.movedim(0, -1), image)), (repeated, (x_seq, image.expand(T, N, 4)))):
            model.zero_grad()
            Trainer(given, rule, sgd(model, 0.0), F.mse_loss).step(args, target)
            gradients.append(model.b.weight.grad.clone())
        torch.testing.assert_close(gradients[-1], gradients[-2], atol=1e-12, rtol=0)
        assert gradients[-1].any()


# The loss.


def test_a_loss_that_vmap_refuses_is_evaluated_step_by_step() -> None:
    def loss(y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(y, target) * (2.0 if float(target.sum().item()) > 4.5 else 1.0)

    model = mlp()
    x_seq, target = sequences()
    with pytest.warns(SnnfxWarning, match="SNNFX617"):
        found = Trainer(model, SLTT, sgd(model, 0.0), loss).step(x_seq, target).loss
    again = Trainer(model, SLTT, sgd(model, 0.0), loss).step(x_seq, target).loss
    y_seq = snnfx.convert(model)(x_seq)
    expected = torch.stack([loss(y, t) for y, t in zip(y_seq, target, strict=True)]).mean()
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(again, expected.detach())


def test_a_loss_that_counts_its_calls_is_called_for_every_step() -> None:
    calls = iter(range(10_000))

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return (1 + next(calls)) * F.mse_loss(y, target)

    model = mlp()
    x_seq, target = sequences()
    trainer = Trainer(model, SLTT(loss_scale="sum"), sgd(model, 0.0), loss)
    y_seq = snnfx.convert(model)(x_seq)
    singly = torch.stack([F.mse_loss(y, t) for y, t in zip(y_seq, target, strict=True)]).detach()
    torch.testing.assert_close(trainer.step(x_seq, target).loss, (singly * torch.arange(1, T + 1)).sum())
    first = next(calls)
    found = trainer.step(x_seq, target).loss
    torch.testing.assert_close(found, (singly * torch.arange(first + 2, first + 2 + T)).sum())


# Modes.


def test_batch_norm_is_per_step_unless_folding_is_asked_for() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), LIFNode(v_threshold=0.3))

    x_seq, target = sequences(5)
    stepped = make()
    torch.stack([stepped(x) for x in x_seq])
    found = {}
    for batch_norm in ("per_step", "fold"):
        model = make()
        Trainer(model, SLTT, sgd(model), F.mse_loss, batch_norm=batch_norm).step(x_seq, target)
        found[batch_norm] = model[1]
    torch.testing.assert_close(found["per_step"].running_mean, stepped[1].running_mean)
    torch.testing.assert_close(found["per_step"].running_var, stepped[1].running_var)
    assert int(found["per_step"].num_batches_tracked) == T and int(found["fold"].num_batches_tracked) == 1


def test_gradients_at_random_steps_count_statistics_once() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), LIFNode(v_threshold=0.3))
    stepped = copy.deepcopy(model)
    x_seq, target = sequences(5)
    torch.stack([stepped(x) for x in x_seq])
    Trainer(model, SLTT_K(3), sgd(model), F.mse_loss).step(x_seq, target)
    torch.testing.assert_close(model[1].running_mean, stepped[1].running_mean)
    assert int(model[1].num_batches_tracked) == T


def test_the_mode_is_that_of_the_model_at_the_call() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(1.0), nn.Linear(5, 3))
    x_seq, target = sequences()
    trainer = Trainer(model, SLTT, sgd(model, 0.0), F.mse_loss)
    trainer.step(x_seq, target)
    assert not model[2].weight.grad.any()
    model.eval()
    trainer.step(x_seq, target)
    assert model[2].weight.grad.any()
