"""What a call of online training takes: where time is, what has a history, what wraps a model; and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.errors import SnnfxWarning
from snnfx.neuron import LIFNode
from snnfx.online import (
    BPTT,
    OTTT_A,
    OTTT_O,
    SLTT,
    EProp,
    Trainer,
    fptt_online_training,
    fptt_online_training_init_w_ra,
    ottt_online_training,
)
from support.online_models import close, dense_net, sgd
from support.online_oracles import PlainLIF, TriangleSpike, bptt, mse, sltt
from support.online_training import Trained, refused, same

T = 5


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def given() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A model, and as many steps as samples."""
    model = dense_net()
    return model, (torch.rand(T, T, 5) < 0.5).double(), torch.rand(T, T, 4)


# Where time is.


def test_the_target_has_time_where_the_outputs_of_a_net_have_it() -> None:
    model, x_seq, target = given()
    seen: list[tuple[Any, Any]] = []

    def metric(y_seq: Tensor, target: Tensor) -> float:
        seen.append((y_seq, target))
        return 0.0

    net = snnfx.convert(model, time_dim=1)
    found = Trained(net, SLTT, x_seq.transpose(0, 1), target.transpose(0, 1), metrics={"seen": metric})
    same(found.gradients, sltt(model, x_seq, target, mse, 1 / T).gradients)
    expected = net(x_seq.transpose(0, 1)).detach()
    close(found.result.outputs, expected)
    close(seen[0][0], expected)
    close(seen[0][1], target.transpose(0, 1))
    elsewhere = Trained(net, SLTT, x_seq.transpose(0, 1), target, target_dim=0)
    same(elsewhere.gradients, found.gradients)


@pytest.mark.parametrize("time_dim", [1, -1])
def test_functions_have_time_where_they_say_whatever_the_net_has(time_dim: int) -> None:
    model, x_seq, target = given()
    nets = [snnfx.convert(copy.deepcopy(model), time_dim=dim) for dim in (0, time_dim)]
    results = []
    for net in nets:
        optimizer = sgd(list(net.parameters()))
        w_ra = fptt_online_training_init_w_ra(optimizer)
        fptt_online_training(net, optimizer, x_seq, target, mse, 0.5, w_ra)
        x, wanted = x_seq.transpose(0, 1), target.transpose(0, 1)
        results.append(ottt_online_training(net, optimizer, x, wanted, mse, False))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    same(*({n: p.grad for n, p in net.named_parameters()} for net in nets))  # type: ignore[arg-type]
    same(*({n: p.detach() for n, p in net.named_parameters()} for net in nets))


def test_one_image_for_all_steps() -> None:
    model, x_seq, target = given()
    image = x_seq[0]
    net = snnfx.convert(model, time_dim=None)
    expected = sltt(model, image.expand(T, *image.shape), target, mse, 1 / T)
    same(Trained(net, SLTT, image, target).gradients, expected.gradients)
    labels = torch.arange(T) % 4
    trainer = Trainer(net, SLTT, sgd(list(net.parameters())), F.cross_entropy, target_dim=None)
    result = trainer.step(image, labels, T=3, return_outputs=True)
    assert result.outputs.shape == (3, T, 4)


def test_inputs_by_keyword_or_nested() -> None:
    class Named(nn.Module):
        def __init__(self, layers: nn.Sequential) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
            return self.layers(x if pair is None else x + pair[0] * pair[1])

    model, x_seq, target = given()
    expected = sltt(model, 2 * x_seq, target, mse, 1 / T).gradients
    ones = torch.ones_like(x_seq)
    for x in ({"x": 2 * x_seq}, {"x": x_seq, "pair": (x_seq, ones)}, (x_seq, (x_seq, ones))):
        found = Trained(Named(copy.deepcopy(model)), SLTT, x, target).gradients  # type: ignore[arg-type]
        same({n.removeprefix("layers."): g for n, g in found.items()}, expected)


def test_samples_without_a_batch() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), PlainLIF(0.5, 0.2), nn.Flatten(0), nn.Linear(64, 5))
    x_seq, target = torch.rand(T, 2, 6, 6), torch.rand(T, 5)
    same(Trained(model, SLTT, x_seq, target).gradients, sltt(model, x_seq, target, mse, 1 / T).gradients)


# What has a history.


@pytest.mark.parametrize("chunk", [2, T])
def test_no_gradient_goes_into_the_history_of_what_is_given(chunk: int) -> None:
    model, x_seq, target = given()
    encoder, teacher = nn.Linear(5, 5), nn.Linear(4, 4)
    _, state = snnfx.convert(model).run(x_seq)
    trainer = Trainer(model, OTTT_A, sgd(list(model.parameters())), mse, chunk=chunk)
    first = trainer.step(x_seq, target).state
    for name, value in state.items():
        first[name] = value
    x, wanted = encoder(x_seq), teacher(target)
    for _ in range(2):
        trainer.step(x, wanted, state=first)
    assert encoder.weight.grad is None and teacher.weight.grad is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_training_inside_of_no_grad_trains(context: Callable[[], Any]) -> None:
    model, x_seq, target = given()
    expected = sltt(model, x_seq, target, mse, 1 / T).gradients
    trainer = Trainer(model, SLTT, sgd(list(model.parameters())), mse)
    with context():
        trainer.step(x_seq * 1.0, target * 1.0)
    same({n: p.grad for n, p in model.named_parameters()}, expected)  # type: ignore[misc]


# What wraps a model.


def test_a_compiled_model_is_taken_as_it_was() -> None:
    model, x_seq, target = given()
    expected = sltt(model, x_seq, target, mse, 1 / T).gradients
    for wrapped in (torch.compile(model), torch.compile(snnfx.convert(model))):
        model.zero_grad()
        Trainer(wrapped, SLTT, torch.optim.SGD(model.parameters(), lr=0.0), mse).step(x_seq, target)
        same({n: p.grad for n, p in model.named_parameters()}, expected)  # type: ignore[misc]


class ExplicitState(nn.Module):
    """State that goes in and comes out; beside it, what a step gives."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.fc(x)
        mem = 0.7 * (torch.zeros_like(x) if mem is None else mem) + x
        spike = TriangleSpike.apply(mem - 1)
        return spike, mem - spike.detach()


def test_functions_take_models_with_explicit_state() -> None:
    model = ExplicitState()
    _, x_seq, target = given()
    before = set(vars(model))
    expected = Trained(model, OTTT_A(loss_scale="sum"), x_seq, target)
    x, wanted = x_seq.transpose(0, 1), target.transpose(0, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(2):  # from the reset state each time: nothing is kept
        loss, y_all = ottt_online_training(model, optimizer, x, wanted, mse, False)
        close(loss, expected.result.loss)
        close(y_all, expected.result.outputs.transpose(0, 1))
        same({n: p.grad for n, p in model.named_parameters()}, expected.gradients)  # type: ignore[misc]
    fptt_online_training(model, optimizer, x_seq, target, mse, 0.5, fptt_online_training_init_w_ra(optimizer))
    assert {name for name in set(vars(model)) - before if "mem" in name or "state" in name} == set()


# What is refused.


def refusals(model: nn.Module) -> dict[str, tuple[str, Callable[[], Any]]]:
    _, x_seq, target = given()
    optimizer = sgd(list(model.parameters()))
    trainer = Trainer(model, SLTT, optimizer, mse)
    w_ra = fptt_online_training_init_w_ra(optimizer)

    def fptt(averages: Any) -> Any:
        return fptt_online_training(model, optimizer, x_seq, target, mse, 0.5, averages)

    return {
        "no module": ("SNNFX309", lambda: Trainer(lambda x: x, SLTT, optimizer, mse)),  # type: ignore[arg-type]
        "no optimizer": ("SNNFX309", lambda: Trainer(model, SLTT, None, mse)),  # type: ignore[arg-type]
        "LBFGS": ("SNNFX309", lambda: Trainer(model, SLTT, torch.optim.LBFGS(model.parameters()), mse)),
        "DataParallel": ("SNNFX309", lambda: Trainer(nn.DataParallel(model), SLTT, optimizer, mse)),
        "a target_dim that is no place": ("SNNFX309", lambda: Trainer(model, SLTT, optimizer, mse, target_dim="x")),
        "a norm that is no number": ("SNNFX309", lambda: Trainer(model, SLTT, optimizer, mse, clip_grad_norm=True)),
        "an array as input": ("SNNFX306", lambda: trainer.step(x_seq.numpy(), target)),
        "no time steps": ("SNNFX306", lambda: trainer.step(x_seq[:0], target[:0])),
        "an array as target": ("SNNFX610", lambda: trainer.step(x_seq, target.numpy())),
        "averages of another type": ("SNNFX613", lambda: fptt([w.float() for w in w_ra])),
        "averages that are the parameters": ("SNNFX613", lambda: fptt(list(model.parameters()))),
    }


@pytest.mark.parametrize("case", list(refusals(dense_net())))
def test_what_cannot_be_trained_is_refused(case: str) -> None:
    model = dense_net()
    code, call = refusals(model)[case]
    refused(model, code, call)


def test_a_sequence_without_a_length_is_refused() -> None:
    model, x_seq, _ = given()
    net = snnfx.convert(model, time_dim=None)
    trainer = Trainer(net, SLTT, sgd(list(net.parameters())), F.cross_entropy, target_dim=None)
    refused(model, "SNNFX310", lambda: trainer.step(x_seq[0], torch.arange(T) % 4))


def test_eprop_refuses_weights_that_no_error_reaches_until_they_are_frozen() -> None:
    model = nn.Sequential(nn.Linear(5, 6), LIFNode(), nn.Linear(6, 4), LIFNode())
    _, x_seq, target = given()
    error = refused(
        model, "SNNFX616", lambda: Trainer(model, EProp, sgd(list(model.parameters())), mse).step(x_seq, target)
    )
    assert "weights of `0`" in str(error)
    for p in model[0].parameters():
        p.requires_grad_(False)
    found = Trained(model, EProp(trace_inputs=False, operand="raw"), x_seq, target).gradients
    assert found["2.weight"].any()


def test_values_beside_the_tensors_of_a_target_are_handed_on() -> None:
    model, x_seq, target = given()

    def loss(y: Tensor, wanted: tuple[Tensor, float]) -> Tensor:
        return wanted[1] * mse(y, wanted[0])

    for rule in (SLTT, OTTT_O):
        same(
            Trained(model, rule, x_seq, (target, 2.0), loss).gradients,  # type: ignore[arg-type]
            Trained(model, rule, x_seq, target, lambda y, t: 2.0 * mse(y, t)).gradients,
        )


# What a rule cannot do for a part of the model, it says.


class Opaque(nn.Module):
    """Looks at a value, so it cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(5, 5), LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x) if float(x.detach().sum()) > -1.0 else x)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.lif = nn.Parameter(torch.randn(5, 5)), LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(torch.einsum("bi,oi->bo", x, self.weight))


@pytest.mark.parametrize("part", [Opaque, Einsum])
def test_weights_that_have_no_trace_are_told(part: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(5, 5), LIFNode(v_threshold=0.3), part(), nn.Linear(5, 4), LIFNode())
    _, x_seq, target = given()
    with pytest.warns(SnnfxWarning, match="SNNFX618") as caught:
        found = Trained(model, OTTT_A, x_seq, target)
    told = [str(w.message) for w in caught if issubclass(w.category, SnnfxWarning)]
    assert len(told) == 1, told
    assert any(slot.endswith("trace") for slot in found.result.state)


def test_every_weight_of_an_ordinary_model_has_a_trace_or_a_reason(recwarn: pytest.WarningsRecorder) -> None:
    model, x_seq, target = given()
    normed = nn.Sequential(model[0], nn.BatchNorm1d(6), model[1], nn.LayerNorm(6), nn.Dropout(0.1), *model[2:])
    Trained(normed, OTTT_A, x_seq, target)
    assert not [w for w in recwarn if issubclass(w.category, SnnfxWarning)]


class LearnedStart(nn.Module):
    """The potential before the first step is a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.first = nn.Linear(5, 4), nn.Parameter(torch.full((4,), 0.3))
        self.v: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = self.first.expand_as(x)
        u = 0.7 * self.v + x
        spike = TriangleSpike.apply(u - 1)
        self.v = u - spike.detach()
        return spike


def test_a_learned_first_state_is_trained_where_it_is_kept_and_told_of_where_it_is_cut() -> None:
    model = LearnedStart()
    _, x_seq, target = given()
    for chunk in (2, None):
        found = Trained(model, BPTT, x_seq, target, chunk=chunk).gradients
        same(found, bptt(model, x_seq, target, mse, 1 / T).gradients)
    with pytest.warns(SnnfxWarning, match="SNNFX619.*`v`"):
        spatial = Trained(model, SLTT, x_seq, target).gradients
    close(spatial["fc.weight"], sltt(model, x_seq, target, mse, 1 / T).gradients["fc.weight"])
    assert not spatial["first"].any()
