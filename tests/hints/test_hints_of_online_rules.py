"""Hints of online training (61x and its options): each leads to a training step with right gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import online
from snnfx.neuron import CUBALIFNode, LeakyIntegrator, LIFNode
from snnfx.online import BPTT, FPTT, OSTL, OTTT_A, OTTT_O, SLTT, SLTT_K, EProp, FPTTTerm, Rule, Trainer
from support.hints import refused, silent, warned
from support.stepping import fresh_copy

T, N, C = 4, 3, 4


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def mlp(make: Callable[[], nn.Module] = lambda: LIFNode(tau=2.0, v_threshold=0.5)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 5), make(), nn.Linear(5, 3), make())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


X = torch.rand(T, N, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
TARGET = torch.rand(T, N, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def bptt_gradients(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss, target: Tensor = TARGET
) -> list[Tensor]:
    """The gradients of the mean loss of all steps, by stepping a copy of the model."""
    clone = fresh_copy(model)
    losses = [loss(clone(x), target if target.dim() < 3 else target[t]) for t, x in enumerate(X)]
    torch.stack(losses).mean().backward()
    return [p.grad for p in clone.parameters() if p.grad is not None]


def trains(rule: Rule = BPTT, model: nn.Module | None = None, loss: Any = F.mse_loss, **options: Any) -> Trainer:
    """Train one step; BPTT must give the gradients of the stepped model."""
    model = mlp() if model is None else model
    expected = bptt_gradients(model) if rule.name == "BPTT" and loss is F.mse_loss else None
    with silent():
        trainer = Trainer(model, rule, sgd(model), loss, **options)
        trainer.step(X, TARGET)
    if expected is not None:
        torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], expected)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    return trainer


# -- options -----------------------------------------------------------------------------------------------------------


def test_an_optimizer_of_another_type() -> None:
    refused(
        "SNNFX309",
        "online/call_checks.py:check_optimizer",
        "Pass e.g. torch.optim.SGD(model.parameters(), lr=0.1).",
        lambda: Trainer(mlp(), BPTT, 0.1, F.mse_loss),
        names="float",
    )
    model = mlp()
    Trainer(model, BPTT, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss).step(X, TARGET)


def test_lbfgs() -> None:
    model = mlp()
    refused(
        "SNNFX309",
        "online/call_checks.py:check_optimizer",
        "Use e.g. torch.optim.Adam.",
        lambda: Trainer(model, BPTT, torch.optim.LBFGS(model.parameters()), F.mse_loss),
        names="LBFGS",
    )
    Trainer(model, BPTT, torch.optim.Adam(model.parameters()), F.mse_loss).step(X, TARGET)


def test_an_optimizer_of_another_model() -> None:
    model = mlp()
    refused(
        "SNNFX612",
        "online/call_checks.py:check_optimizer",
        "Build the optimizer from model.parameters() (a converted net shares the parameters of its model).",
        lambda: Trainer(model, BPTT, sgd(copy.deepcopy(model)), F.mse_loss),
        names="4 of the optimizer's 4 parameters",
    )
    trains(BPTT, model)
    net = snnfx.convert(model)
    Trainer(net, BPTT, torch.optim.SGD(model.parameters(), lr=0.1), F.mse_loss).step(X, TARGET)


def test_frozen_parameters() -> None:
    model = mlp().requires_grad_(False)
    refused(
        "SNNFX612",
        "online/call_checks.py:check_optimizer",
        "Call requires_grad_() on the parameters to train.",
        lambda: Trainer(model, BPTT, sgd(model), F.mse_loss),
    )
    model.requires_grad_()
    trains(BPTT, model)


def averages_of(model: nn.Module) -> Any:
    return online.fptt_online_training_init_w_ra(sgd(model))


def with_half_precision(model: nn.Module) -> Any:
    return [w.float() for w in averages_of(model)]


def test_running_averages_that_do_not_match() -> None:
    """Each way to be wrong names its entry, and the averages of the hint work."""
    model = mlp()
    wrong: dict[str, Any] = {
        "w_ra is a tuple": tuple(averages_of(model)),
        "w_ra has 3 entries": averages_of(model)[:-1],
        "w_ra[0] has shape": averages_of(model)[::-1],
        "w_ra[0] is torch.float32": with_half_precision(model),
        "w_ra[0] shares its memory": list(model.parameters()),
    }
    for text, averages in wrong.items():
        call = lambda w_ra=averages: online.fptt_online_training(  # noqa: E731
            model, sgd(model), X, TARGET, F.mse_loss, 0.5, w_ra
        )
        refused(
            "SNNFX613",
            "online/call_checks.py:check_averages",
            "Create it with fptt_online_training_init_w_ra(optimizer), from the same optimizer.",
            call,
            names=text,
        )
    optimizer = sgd(model)
    w_ra = online.fptt_online_training_init_w_ra(optimizer)
    before = [w.clone() for w in w_ra]
    online.fptt_online_training(model, optimizer, X, TARGET, F.mse_loss, 0.5, w_ra)
    assert any(not torch.equal(a, b) for a, b in zip(before, w_ra, strict=True))


def test_more_sampled_steps_than_time_steps() -> None:
    model = mlp()
    error = refused(
        "SNNFX614",
        "online/call_checks.py:check_random_steps",
        "Choose K between 1 and ",
        lambda: Trainer(model, SLTT_K(T + 1), sgd(model), F.mse_loss).step(X, TARGET),
        names=f"samples {T + 1} time steps",
    )
    assert error.hint == f"Choose K between 1 and {T}."
    trains(SLTT_K(T), model)
    trains(SLTT_K(1), model)


def test_a_reduced_net() -> None:
    net = snnfx.convert(mlp(), reduce="mean")
    refused(
        "SNNFX616",
        "online/edited_nets.py:EditedNets.__init__",
        "Convert the model without reduce=.",
        lambda: Trainer(net, SLTT, sgd(net), F.mse_loss),
        names="reduce='mean'",
    )
    trains(BPTT, snnfx.convert(net.source).source)


def test_a_net_with_a_checkpoint_option() -> None:
    model = mlp()
    net = snnfx.convert(model, checkpoint="regions")
    expected = bptt_gradients(model)
    trainer = warned(
        "SNNFX508",
        "online/edited_nets.py:edited_nets_of",
        ". Bound its memory with chunk= of the Trainer.",
        lambda: Trainer(net, SLTT, sgd(net), F.mse_loss),
        names="checkpoint=",
    )
    trainer.step(X, TARGET)
    with silent():
        whole, chunked = mlp(), mlp()
        Trainer(whole, SLTT, sgd(whole), F.mse_loss).step(X, TARGET)
        Trainer(chunked, SLTT, sgd(chunked), F.mse_loss, chunk=1).step(X, TARGET)
    torch.testing.assert_close([p.grad for p in chunked.parameters()], [p.grad for p in whole.parameters()])
    assert len(expected) == 4


def test_an_input_without_time_steps() -> None:
    model = mlp()
    refused(
        "SNNFX306",
        "online/inputs.py:example_of_one_step",
        "Pass each sequence as a tensor [T, N, ...].",
        lambda: Trainer(model, BPTT, sgd(model), F.mse_loss).step(torch.tensor(1.0), TARGET),
        names="shape []",
    )
    trains(BPTT, model)


def test_a_target_that_is_an_array() -> None:
    model = mlp()
    target = numpy.asarray(TARGET)
    refused(
        "SNNFX610",
        "online/inputs.py:time_first_target.time_first",
        "Convert it with torch.as_tensor.",
        lambda: Trainer(model, BPTT, sgd(model), F.mse_loss).step(X, target),
        names="ndarray",
    )
    expected = bptt_gradients(model)
    Trainer(model, BPTT, sgd(model), F.mse_loss).step(X, torch.as_tensor(target))
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_a_target_without_time() -> None:
    model, target = mlp(), torch.tensor(0.5)

    def loss(y: Tensor, target: Tensor) -> Tensor:
        return ((y - target) ** 2).mean()

    refused(
        "SNNFX610",
        "online/inputs.py:time_first_target.time_first",
        "If the target is the same at every time step, pass target_dim=None to the Trainer.",
        lambda: Trainer(model, BPTT, sgd(model), loss).step(X, target),
        names="no time dimension",
    )
    expected = bptt_gradients(model, loss, target)
    Trainer(model, BPTT, sgd(model), loss, target_dim=None).step(X, target)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)


def test_a_target_of_another_length() -> None:
    model, labels = mlp(), TARGET[0]
    refused(
        "SNNFX610",
        "online/inputs.py:time_first_target",
        "Pass one target per time step; if the target is the same at every step, pass target_dim=None to the Trainer.",
        lambda: Trainer(model, BPTT, sgd(model), F.mse_loss).step(X, labels),
        names="3 time steps",
    )
    expected = bptt_gradients(model, target=labels)
    Trainer(model, BPTT, sgd(model), F.mse_loss, target_dim=None).step(X, labels)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    trains(BPTT, model)


# -- rules -------------------------------------------------------------------------------------------------------------


def test_an_unknown_variant_of_fptt() -> None:
    refused(
        "SNNFX309",
        "online/learning_rules.py:FPTTTerm.__post_init__",
        "Choose one of 'reference', 'paper', 'authors'.",
        lambda: FPTTTerm(0.5, variant="x"),
        names="'x'",
    )
    for variant in ("reference", "paper", "authors"):
        trains(FPTT(0.5)(extra=FPTTTerm(0.5, variant=variant)))


@pytest.mark.parametrize("field", ["operand", "signal", "dropout"])
def test_an_unknown_value_of_a_rule(field: str) -> None:
    error = refused(
        "SNNFX309",
        "online/learning_rules.py:Rule.__post_init__",
        "Choose one of ",
        lambda: Rule(**{field: "x"}),
        names=field,
    )
    choices = [word.strip(" .'") for word in error.hint.removeprefix("Choose one of").split(",")]
    for choice in choices:
        try:
            Rule(**{field: choice})
        except snnfx.errors.InputError as contradiction:
            assert contradiction.code == "SNNFX616"


def test_an_unknown_cut() -> None:
    refused(
        "SNNFX309",
        "online/learning_rules.py:Rule.__post_init__",
        "Choose 'all', 'spiking' or a tuple of slot names.",
        lambda: SLTT(cut="some"),
        names="'some'",
    )
    for cut in ("all", "spiking", ("1.v",)):
        trains(SLTT(cut=cut))


def test_an_unknown_leak() -> None:
    refused(
        "SNNFX309",
        "online/learning_rules.py:Rule.__post_init__",
        "Choose 'post', 'pre' or a number.",
        lambda: OTTT_A(trace_leak="x"),
        names="'x'",
    )
    trains(OTTT_A(trace_leak="post"))
    trains(OTTT_A(trace_leak=0.5))
    trains(OTTT_A(trace_leak="pre"), nn.Sequential(LIFNode(), mlp()))


def test_an_unknown_extra_term() -> None:
    refused(
        "SNNFX309",
        "online/learning_rules.py:Rule.__post_init__",
        "Use an FPTTTerm or None.",
        lambda: FPTT(0.5)(extra=1),
    )
    trains(FPTT(0.5)(extra=FPTTTerm(0.5)))
    trains(FPTT(0.5)(extra=None))


def test_traces_with_gradients_through_time() -> None:
    refused(
        "SNNFX616",
        "online/learning_rules.py:Rule._refuse_contradictions",
        'Use temporal="cut" with traces, or operand="raw".',
        lambda: Rule(operand="trace", temporal="keep"),
        names="contradicts itself",
    )
    trains(Rule(operand="trace", temporal="cut"))
    trains(Rule(operand="raw", temporal="keep"))


def test_layers_with_a_cut_of_some_slots() -> None:
    refused(
        "SNNFX616",
        "online/learning_rules.py:Rule._refuse_contradictions",
        'Use cut="all".',
        lambda: OSTL(cut="spiking"),
    )
    trains(OSTL(cut="all"))


def test_sampled_steps_with_gradients_through_time() -> None:
    refused(
        "SNNFX616",
        "online/learning_rules.py:Rule._refuse_contradictions",
        'Use temporal="cut" and cut="all".',
        lambda: SLTT_K(2)(cut="spiking"),
    )
    trains(SLTT_K(2)(temporal="cut", cut="all"))


def test_sampled_steps_with_updates_within_the_sequence() -> None:
    refused(
        "SNNFX616",
        "online/learning_rules.py:Rule._refuse_contradictions",
        'Use update="end".',
        lambda: SLTT_K(2)(update="step"),
    )
    trains(SLTT_K(2)(update="end"))


def test_fptt_with_updates_at_the_end() -> None:
    refused(
        "SNNFX616",
        "online/learning_rules.py:Rule._refuse_contradictions",
        'Use update="step" and random_steps=None.',
        lambda: FPTT(0.5)(update="end"),
    )
    trains(FPTT(0.5)(update="step", random_steps=None))


class FirstStepDiffers(nn.Module):
    def __init__(self, differs: bool) -> None:
        super().__init__()
        self.first, self.later, self.out = nn.Linear(C, 3), nn.Linear(C, 3), LIFNode()
        self.differs = differs
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            y = self.first(x) if self.differs else self.later(x)
        else:
            y = self.later(x) + (self.h if self.differs else 0)
        self.h = y
        return self.out(y)


class SameSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.later, self.out = nn.Linear(C, 3), LIFNode()
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = x.new_zeros(x.shape[0], 3)
        self.h = self.later(x) + 0.5 * self.h
        return self.out(self.h)


def test_traces_of_a_model_whose_first_step_differs() -> None:
    refused(
        "SNNFX616",
        "passes/trace_operands.py:TraceOperands.apply",
        "Use a rule without traces, or run the same operations at every step.",
        lambda: Trainer(m := FirstStepDiffers(True), OTTT_A, sgd(m), F.mse_loss).step(X, TARGET),
    )
    trains(BPTT, FirstStepDiffers(True))
    trains(OTTT_A, SameSteps())


def test_layers_of_a_model_whose_first_step_differs() -> None:
    refused(
        "SNNFX616",
        "analysis/recurrent_layers.py:find_layers",
        "Use a rule without layers (not OSTL), or run the same operations at every step.",
        lambda: Trainer(m := FirstStepDiffers(True), OSTL, sgd(m), F.mse_loss).step(X, TARGET),
    )
    trains(BPTT, FirstStepDiffers(True))
    trains(OSTL, SameSteps())


def test_weights_without_a_learning_signal() -> None:
    refused(
        "SNNFX616",
        "passes/cut_spatial_edges.py:_refuse_weights_without_signal",
        "Connect the neurons of these weights to a readout that does not fire (e.g. LeakyIntegrator), freeze the ",
        lambda: Trainer(m := mlp(), EProp, sgd(m), F.mse_loss).step(X, TARGET),
        names="the weights of `0`",
    )
    model = mlp()
    model[3] = LeakyIntegrator(tau=2.0)
    trains(EProp, model)
    trains(EProp(signal="spatial"))


def test_a_leak_without_a_neuron() -> None:
    refused(
        "SNNFX615",
        "analysis/trace_leaks.py:TraceLeaks.of",
        "Do not trace inputs, or pass the leak as a number.",
        lambda: Trainer(m := mlp(), OTTT_A(trace_leak="pre", trace_inputs=True), sgd(m), F.mse_loss).step(X, TARGET),
        names="`0`",
    )
    trains(OTTT_A(trace_leak="pre", trace_inputs=False))
    trains(OTTT_A(trace_leak=0.5, trace_inputs=True))


def test_a_neuron_with_several_leaks() -> None:
    model = mlp(lambda: CUBALIFNode(c_decay=0.5, v_decay=0.75))
    refused(
        "SNNFX615",
        "analysis/leak.py:several_leaks_error",
        "Pass the leak of the traces as a number, e.g. trace_leak=0.9.",
        lambda: Trainer(model, OTTT_A, sgd(model), F.mse_loss).step(X, TARGET),
        names="is not one number",
    )
    trains(OTTT_A(trace_leak=0.9), model)


class Projects(nn.Module):
    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.weight, self.lif = LIFNode(), nn.Parameter(torch.rand(3, C)), LIFNode()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.product(self.first(x), self.weight))


def test_weights_without_a_trace() -> None:
    model = Projects(lambda x, w: torch.einsum("bi,oi->bo", x, w))
    trainer = Trainer(model, OTTT_A, sgd(model), F.mse_loss)
    warned(
        "SNNFX618",
        "passes/trace_operands.py:TraceOperands._warn_of_other_weights",
        "convolutions and products with a weight support one",
        lambda: trainer.step(X, TARGET),
        names="einsum",
    )
    trains(OTTT_A, Projects(F.linear))
    trains(OTTT_A, Projects(lambda x, w: x @ w.T))


class LearnsItsStart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.start = nn.Linear(C, 3), nn.Parameter(torch.full((3,), 0.3))
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.v = 0.5 * (self.start.expand_as(y) if self.v is None else self.v) + y
        return self.v


def test_a_learned_initial_state() -> None:
    model = LearnsItsStart()
    trainer = Trainer(model, SLTT, sgd(model), F.mse_loss)
    warned(
        "SNNFX619",
        "passes/cut_temporal_edges.py:_warn_of_learned_initial_states",
        "is learned, but gets no gradient: the rule detaches this state. Exempt it with cut=",
        lambda: trainer.step(X, TARGET),
        names="`v`",
    )
    assert model.start.grad is None or not model.start.grad.any()
    kept = LearnsItsStart()
    trains(SLTT(cut=()), kept)
    torch.testing.assert_close([p.grad for p in kept.parameters()], bptt_gradients(LearnsItsStartLike(kept)))
    frozen = LearnsItsStart()
    frozen.start.requires_grad_(False)
    trains(SLTT, frozen)


class LearnsItsStartLike(LearnsItsStart):
    """A copy with the parameters before the update."""

    def __init__(self, trained: LearnsItsStart) -> None:
        super().__init__()
        with torch.no_grad():
            for own, other in zip(self.parameters(), trained.parameters(), strict=True):
                own.copy_(other + 0.1 * other.grad)


# -- losses ------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_a_scalar() -> None:
    refused(
        "SNNFX611",
        "online/losses.py:as_scalar",
        "Return one number per time step, e.g. with .mean().",
        lambda: Trainer(m := mlp(), BPTT, sgd(m), lambda y, target: (y - target) ** 2).step(X, TARGET),
        names="shape [3, 3]",
    )
    trains(BPTT, loss=lambda y, target: ((y - target) ** 2).mean())


def test_a_loss_without_a_gradient() -> None:
    refused(
        "SNNFX611",
        "online/training_call.py:require_differentiable",
        "Compute it from the model's outputs, without detach() or item(), and train at least one parameter that ",
        lambda: Trainer(m := mlp(), BPTT, sgd(m), lambda y, target: y.detach().sum()).step(X, TARGET),
    )
    trains(BPTT, loss=lambda y, target: y.sum())


def test_a_loss_that_reads_a_value() -> None:
    def reads(y: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(y, target) if y.sum().item() >= 0 else y.sum()

    def selects(y: Tensor, target: Tensor) -> Tensor:
        return torch.where(y.sum() >= 0, F.mse_loss(y, target), y.sum())

    model = mlp()
    expected = bptt_gradients(model)
    trainer = Trainer(model, BPTT, sgd(model), reads)
    warned(
        "SNNFX617",
        "online/losses.py:_agrees_under_vmap",
        "the loss is evaluated step by step, because it fails under torch.vmap (",
        lambda: trainer.step(X, TARGET),
        names="torch.where",
    )
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    followed = mlp()
    trains(BPTT, followed, loss=selects)
    torch.testing.assert_close([p.grad for p in followed.parameters()], expected)


def test_a_sequence_that_is_not_batch_first() -> None:
    model = mlp()
    refused(
        "SNNFX610",
        "online/spikingjelly_functions.py:ottt_online_training",
        "Pass a tensor [B, T, ...].",
        lambda: online.ottt_online_training(model, sgd(model), torch.rand(N), TARGET, F.mse_loss, False),
        names="x_seq has shape [3]",
    )
    x_seq, target = X.transpose(0, 1), TARGET.transpose(0, 1)
    _, y_all = online.ottt_online_training(model, sgd(model), x_seq, target, F.mse_loss, False)
    assert y_all.shape == target.shape


# -- the trainer -------------------------------------------------------------------------------------------------------


def trainer_with(**options: Any) -> Trainer:
    model = mlp()
    return Trainer(model, options.pop("rule", BPTT), sgd(model), options.pop("loss", F.mse_loss), **options)


def test_a_rule_of_another_type() -> None:
    refused(
        "SNNFX309",
        "online/trainer.py:Trainer.__init__",
        "Choose one from snnfx.online, e.g. OTTT_A, or build a Rule.",
        lambda: trainer_with(rule="OTTT"),
    )
    trains(OTTT_A)
    trains(Rule())


def test_an_unknown_batch_norm() -> None:
    refused(
        "SNNFX309",
        "online/trainer.py:Trainer.__init__",
        "Choose 'per_step' or 'fold'.",
        lambda: trainer_with(batch_norm="x"),
    )
    trains(BPTT, batch_norm="per_step")
    trains(BPTT, batch_norm="fold")


def test_a_loss_that_is_not_a_function() -> None:
    refused(
        "SNNFX309",
        "online/trainer.py:Trainer.__init__",
        "Pass a function loss(y_t, target_t), e.g. torch.nn.functional.mse_loss.",
        lambda: trainer_with(loss="mse"),
    )
    trains(BPTT, loss=F.mse_loss)


def test_an_unknown_target_dim() -> None:
    refused(
        "SNNFX309",
        "online/trainer.py:Trainer.__init__",
        "Pass the time dimension of the target (an int), None, or 'output'.",
        lambda: trainer_with(target_dim="x"),
    )
    for target_dim in (0, "output"):
        trains(BPTT, target_dim=target_dim)
    trainer_with(target_dim=None).step(X, TARGET[0])


def test_accumulation_with_updates_within_a_sequence() -> None:
    refused(
        "SNNFX616",
        "online/trainer.py:Trainer.__init__",
        "Use accumulate=1, or a rule with update='end', e.g. OTTT_A.",
        lambda: trainer_with(rule=OTTT_O, accumulate=2),
        names="over 2 calls",
    )
    trains(OTTT_O, accumulate=1)
    trainer = trainer_with(rule=OTTT_A, accumulate=2)
    trainer.step(X, TARGET)
    assert trainer.step(X, TARGET).updates == 1


def test_float16_with_a_regulariser() -> None:
    refused(
        "SNNFX616",
        "online/trainer.py:Trainer.__init__",
        "Use amp_dtype=torch.bfloat16, which needs no gradient scaling.",
        lambda: trainer_with(rule=FPTT(0.5), amp_dtype=torch.float16),
    )
    torch.set_default_dtype(torch.float32)
    model = mlp()
    Trainer(model, FPTT(0.5), sgd(model), F.mse_loss, amp_dtype=torch.bfloat16).step(X.float(), TARGET.float())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_data_parallel_model() -> None:
    model = mlp()
    refused(
        "SNNFX309",
        "online/trainer.py:unwrapped",
        "Pass the model itself, or use DistributedDataParallel with one process per device.",
        lambda: Trainer(nn.DataParallel(model), BPTT, sgd(model), F.mse_loss),
    )
    trains(BPTT, model)


def test_an_unknown_scale_of_the_loss() -> None:
    refused(
        "SNNFX309",
        "online/trainer.py:checked_scale",
        "Choose 'mean', 'sum' or a number.",
        lambda: trainer_with(loss_scale="x"),
    )
    trains(BPTT, loss_scale="mean")
    for scale, factor in (("sum", T), (2.0, None)):
        model = mlp()
        expected = bptt_gradients(model)
        Trainer(model, BPTT, sgd(model), F.mse_loss, loss_scale=scale).step(X, TARGET)
        if factor is not None:
            torch.testing.assert_close([p.grad for p in model.parameters()], [factor * g for g in expected])


def test_an_unknown_dtype_of_autocast() -> None:
    refused(
        "SNNFX309",
        "online/updates.py:Updates.__init__",
        "Choose torch.bfloat16, torch.float16 or None.",
        lambda: trainer_with(amp_dtype=torch.float64),
    )
    trains(BPTT, amp_dtype=None)
    torch.set_default_dtype(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        model = mlp()
        Trainer(model, BPTT, sgd(model), F.mse_loss, amp_dtype=dtype).step(X.float(), TARGET.float())
        assert all(p.isfinite().all() for p in model.parameters())


def test_an_option_of_fptt_that_is_no_bool() -> None:
    refused(
        "SNNFX309",
        "online/learning_rules.py:FPTTTerm.__post_init__",
        "Choose True or False.",
        lambda: FPTTTerm(0.5, "authors", keep_multipliers="no"),  # type: ignore[arg-type]
        names="keep_multipliers",
    )
    for choice in (True, False):
        trains(FPTT(0.5, "authors", keep_multipliers=choice))


def test_a_state_of_another_trainer() -> None:
    model = mlp()
    trainer = trains(FPTT(0.5, "authors"), model)
    state = trainer.state_dict()
    refused(
        "SNNFX622",
        "online/trainer_state.py:_mismatch",
        "Load the state_dict() of a Trainer with the same parameters in the same order.",
        lambda: trainer.load_state_dict(trainer.optimizer.state_dict()),
    )
    copied = fresh_copy(model)
    resumed = Trainer(copied, FPTT(0.5, "authors"), sgd(copied), F.mse_loss)
    resumed.load_state_dict(state)
    for other in (trainer, resumed):
        other.step(X, TARGET)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))


class LeakPerNeuron(nn.Module):
    """Neurons with a learned leak each."""

    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, neurons))
        self.v: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.v = torch.sigmoid(self.w) * self.v + x
        return torch.sigmoid(self.v)


def test_a_trace_for_each_neuron_behind_a_layer_that_mixes_them() -> None:
    def mixing() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(C, 5), LIFNode(tau=2.0), nn.Linear(5, 3), nn.LayerNorm(3), LeakPerNeuron(3))

    refused(
        "SNNFX620",
        "analysis/trace_leaks.py:TraceLeaks._refused",
        "Pass the leak of the traces as a number, e.g. trace_leak=0.9.",
        lambda: Trainer(m := mixing(), OTTT_A, sgd(m), F.mse_loss, example_inputs=X[0]),
    )
    trains(OTTT_A(trace_leak=0.9), mixing(), example_inputs=X[0])
