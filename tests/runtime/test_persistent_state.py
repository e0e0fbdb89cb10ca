"""Persistent slots at run time: where a call starts, and how it writes the last value back."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import snnfx
from snnfx.errors import InputError
from snnfx.functional import reset_net
from support.stepping import assert_same, step_model

T, N, C = 6, 3, 4


def sequence() -> Tensor:
    return torch.rand(T, N, C, dtype=torch.float64)


class Assigned(nn.Module):
    """A homeostatic threshold, and a membrane that starts anew in each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(C, C).double()
        self.register_buffer("theta", torch.full((C,), 0.5, dtype=torch.float64))
        self.v = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        self.v = x if self.v is None else 0.8 * self.v + x
        z = torch.sigmoid(self.v - self.theta)
        self.theta = self.theta + 0.05 * (z.mean(0) - 0.2)
        return z

    def reset(self) -> None:
        self.v = None


class InPlace(nn.Module):
    """A running average that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fc = nn.Linear(C, C).double()
        self.register_buffer("n", torch.zeros(C, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.fc(x) * (1 + self.n.clone()))
        with torch.no_grad():
            self.n += 0.1 * y.mean(0)
        return y

    def reset(self) -> None: ...


MODELS = [Assigned, InPlace]


def buffer_of(model: nn.Module) -> Tensor:
    return next(iter(model.buffers()))


@pytest.mark.parametrize("model", MODELS)
def test_each_call_starts_from_the_value_in_the_model(model: Any) -> None:
    made, x_seq = model(), sequence()
    stepped, net = copy.deepcopy(made), snnfx.convert(made)
    for _ in range(3):
        expected = step_model(stepped, x_seq)
        stepped.reset()
        assert_same(net(x_seq), expected)
        assert_same(buffer_of(made), buffer_of(stepped).detach())


def test_a_change_in_place_keeps_the_tensor() -> None:
    model = InPlace()
    tensor, alias = model.n, model.n.view(-1)
    snnfx.convert(model)(sequence())
    assert model.n is tensor and alias.any()


@pytest.mark.parametrize("model", MODELS)
def test_the_value_written_back_is_detached(model: Any) -> None:
    made = model()
    net = snnfx.convert(made)
    for _ in range(2):
        net(sequence()).sum().backward()
        assert buffer_of(made).grad_fn is None and not buffer_of(made).requires_grad


@pytest.mark.parametrize("model", MODELS)
def test_two_calls_before_the_backward_pass(model: Any) -> None:
    net = snnfx.convert(model())
    (net(sequence()).sum() + net(sequence()).sum()).backward()


@pytest.mark.parametrize("model", MODELS)
def test_training_follows_a_call_in_inference_mode(model: Any) -> None:
    made = model()
    net = snnfx.convert(made, lower=None)
    with torch.inference_mode():
        net(sequence())
    assert not buffer_of(made).is_inference()
    net(sequence()).sum().backward()


@pytest.mark.parametrize("model", MODELS)
def test_copies_have_buffers_of_their_own(model: Any) -> None:
    net, x_seq = snnfx.convert(model()), sequence()
    net(x_seq)
    clone, loaded = copy.deepcopy(net), pickle.load(io.BytesIO(pickle.dumps(net)))
    expected = net(x_seq)
    assert_same([clone(x_seq), loaded(x_seq)], [expected, expected])


@pytest.mark.parametrize("model", MODELS)
def test_run_and_stream_write_back(model: Any) -> None:
    made, x_seq = model(), sequence()
    stepped, streamed = copy.deepcopy(made), copy.deepcopy(made)
    expected = step_model(stepped, x_seq)
    y_seq, state = snnfx.convert(made).run(x_seq)
    name = next(name for name, _ in made.named_buffers())
    assert_same([y_seq, state[name], buffer_of(made)], [expected, buffer_of(stepped), buffer_of(stepped).detach()])
    with torch.no_grad():
        assert_same(torch.cat(list(snnfx.convert(streamed).stream(x_seq.split(2)))), expected.detach())
    assert_same(buffer_of(streamed), buffer_of(stepped).detach())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_inference_in_chunks_follows_stepping(model: Any, chunk: int) -> None:
    made, x_seq = model().eval(), sequence()
    stepped = copy.deepcopy(made)
    with torch.no_grad():
        assert_same(snnfx.convert(made, chunk=chunk)(x_seq), step_model(stepped, x_seq))
    assert_same(buffer_of(made), buffer_of(stepped))


def test_a_state_that_is_given_wins_and_an_absent_one_starts_from_the_model() -> None:
    model, x_seq = Assigned(), sequence()
    stepped, net = copy.deepcopy(model), snnfx.convert(model)
    expected = step_model(stepped, x_seq)
    first, state = net.run(x_seq[:2])
    rest, _ = net.run(x_seq[2:], state={"v": state["v"]})
    assert_same(torch.cat([first, rest]), expected)
    again, _ = net.run(x_seq[2:], state=state)
    assert_same(again, expected[2:])


def test_a_reset_keeps_persistent_state() -> None:
    model = Assigned()
    net = snnfx.convert(model)
    net(sequence())
    before = model.theta.clone()
    reset_net(net)
    assert_same(model.theta, before)


@pytest.mark.parametrize("model", MODELS)
def test_gradients_flow_from_step_to_step_in_the_step_form(model: Any) -> None:
    made, x_seq = model(), sequence()
    stepped, net = copy.deepcopy(made), snnfx.convert(made, step_mode="s")
    y_seq, expected = torch.stack([net(x) for x in x_seq]), step_model(stepped, x_seq)
    assert_same(y_seq, expected)
    y_seq.sum().backward()
    expected.sum().backward()
    assert_same(made.fc.weight.grad, stepped.fc.weight.grad)


@pytest.mark.parametrize("options", [{"carry_state": True}, {"step_mode": "s"}], ids=str)
def test_a_buffer_set_between_calls_is_read(options: dict[str, Any]) -> None:
    model, x_seq = Assigned(), sequence()
    stepped, net = copy.deepcopy(model), snnfx.convert(model, **options)
    parts = list(x_seq) if "step_mode" in options else list(x_seq.split(3))
    net(parts[0])
    step_model(stepped, x_seq[: parts[0].shape[0] if "carry_state" in options else 1])
    stepped.theta, model.theta = (torch.ones(C, dtype=torch.float64) for _ in range(2))
    actual = net(parts[1])
    expected = step_model(stepped, parts[1] if "carry_state" in options else parts[1].unsqueeze(0))
    assert_same(actual.detach(), expected.detach().view_as(actual))


@pytest.mark.parametrize("model", MODELS)
def test_a_compiled_net_writes_back(model: Any) -> None:
    made, x_seq = model(), sequence()
    stepped = copy.deepcopy(made)
    torch._dynamo.reset()
    compiled = torch.compile(snnfx.convert(made), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        expected = step_model(stepped, x_seq)
        stepped.reset()
        assert_same(compiled(x_seq).detach(), expected.detach())
        assert_same(buffer_of(made), buffer_of(stepped).detach())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_call_during_a_backward_pass_is_refused(model: Any, use_reentrant: bool) -> None:
    made = model()
    net = snnfx.convert(made)
    y_seq = checkpoint(net, sequence().requires_grad_(), use_reentrant=use_reentrant)
    before = buffer_of(made).clone()
    with pytest.raises(InputError, match="SNNFX320"):
        y_seq.sum().backward()
    assert_same(buffer_of(made), before)


@pytest.mark.parametrize("model", MODELS)
def test_a_call_inside_a_transform_is_refused(model: Any) -> None:
    made = model()
    before, net = buffer_of(made), snnfx.convert(made)
    with pytest.raises(InputError, match="SNNFX321"):
        torch.func.vmap(net)(torch.stack([sequence(), sequence()]))
    assert buffer_of(made) is before


@pytest.mark.parametrize("model", MODELS)
def test_verify_compares_persistent_state(model: Any) -> None:
    made = model()
    assert snnfx.verify(made, snnfx.convert(made), sequence())


def test_reports_name_persistent_state() -> None:
    report = str(snnfx.explain(Assigned(), example_inputs=sequence()[0]))
    assert any("theta" in line and "lives on from call to call" in line for line in report.splitlines())
