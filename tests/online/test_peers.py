"""The three functions against SpikingJelly's own, in float64, on models that both can run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.online_oracles import GivenDropout, fptt, mse, ottt

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.learning import online_learning as theirs

import snnfx
from snnfx import online

T, N = 9, 4


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def lif(tau: float) -> nn.Module:
    """What SpikingJelly's OTTTLIFNode is, without its trace."""
    return snnfx.neuron.LIFNode(tau=tau, decay_input=False, v_reset=None, detach_reset=True)


def dense(neuron: Callable[[float], nn.Module], taus: tuple[float, float, float]) -> list[nn.Module]:
    sizes = (8, 12, 9, 3)
    layers: list[nn.Module] = []
    for given, size, tau in zip(sizes[:-1], sizes[1:], taus, strict=True):
        layers += [nn.Linear(given, size), neuron(tau)]
        nn.init.normal_(layers[-2].weight, 0.2, given**-0.5)
    return layers


def convolutional(neuron: Callable[[float], nn.Module], taus: tuple[float, float, float]) -> list[nn.Module]:
    # Average pools: they and a held mask give the same for the trace of a spike as the trace of what they give.
    # Of a max-pool, SpikingJelly pools the trace.
    mask = (torch.rand(N, 6, 4, 4) < 0.7) / 0.7
    layers = [
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), neuron(taus[0]), nn.AvgPool2d(2), GivenDropout(mask),
        nn.Conv2d(6, 5, 3, padding=1, bias=False), neuron(taus[1]),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 3), neuron(taus[2]),
    ]  # fmt: skip
    nn.init.normal_(layers[5].weight, 0.1, 0.3)
    nn.init.normal_(layers[9].weight, 0.02, 0.3)
    return layers


ARCHITECTURES = {"dense": (dense, (8,)), "convolutional": (convolutional, (2, 8, 8))}
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
SAME, MIXED = (2.5, 2.5, 2.5), (2.0, 3.0, 5.0)


def pair(architecture: str, taus: tuple[float, float, float]) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Their model and the plain equivalent with the same weights, and a batch `[B, T, ...]`."""
    make, shape = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    their_model = layer.OTTTSequential(*make(lambda tau: neuron.OTTTLIFNode(tau=tau), taus))
    torch.manual_seed(0)
    plain = nn.Sequential(*make(lif, taus))
    plain.load_state_dict(their_model.state_dict())
    return their_model, plain, (torch.rand(N, T, *shape) < 0.5).double(), torch.rand(N, T, 3)


def assert_same_models(a: nn.Module, b: nn.Module, gradients: bool = True) -> None:
    others = dict(b.named_parameters())
    for name, p in a.named_parameters():
        torch.testing.assert_close(p, others[name], atol=1e-10, rtol=0)
        if gradients:
            assert p.grad is not None and p.grad.any()
            torch.testing.assert_close(p.grad, others[name].grad, atol=1e-10, rtol=0)
    buffers = dict(b.named_buffers())
    for name, value in a.named_buffers():
        torch.testing.assert_close(value, buffers[name], atol=1e-10, rtol=0)


@each_architecture
def test_the_oracle_of_ottt_is_spikingjelly(architecture: str) -> None:
    their_model, plain, x_seq, target = pair(architecture, SAME)
    their_loss, their_y = theirs.ottt_online_training(their_model, sgd(their_model), x_seq, target, F.mse_loss, False)
    names = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][1:]
    leaks = dict.fromkeys(names, 1 - 1 / SAME[0])
    run = ottt(plain, x_seq.transpose(0, 1), target.transpose(0, 1), F.mse_loss, leaks)
    assert 0.02 < float(their_y.mean()) < 0.9
    torch.testing.assert_close(run.outputs.transpose(0, 1), their_y)
    torch.testing.assert_close(run.losses.sum(), their_loss)
    for name, p in their_model.named_parameters():
        torch.testing.assert_close(run.gradients[name], p.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("updates_online", [False, True])
@each_architecture
def test_ottt_on_a_plain_model_is_spikingjelly_with_its_modules(architecture: str, updates_online: bool) -> None:
    their_model, plain, x_seq, target = pair(architecture, SAME)
    optimizer, their_optimizer = sgd(plain), sgd(their_model)
    net = snnfx.convert(plain, example_inputs=x_seq[:, 0])
    for _ in range(2):
        expected = theirs.ottt_online_training(their_model, their_optimizer, x_seq, target, F.mse_loss, updates_online)
        functional.reset_net(their_model)
        found = online.ottt_online_training(net, optimizer, x_seq, target, F.mse_loss, updates_online)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        assert not found[0].requires_grad and not found[1].requires_grad
    assert_same_models(plain, their_model)


@each_architecture
def test_the_leak_of_the_emitting_neuron_is_spikingjellys(architecture: str) -> None:
    their_model, plain, x_seq, target = pair(architecture, MIXED)
    theirs.ottt_online_training(their_model, sgd(their_model), x_seq, target, F.mse_loss, False)
    rule = online.OTTT_A(trace_leak="pre", loss_scale="sum")
    trainer = online.Trainer(plain, rule, sgd(plain), F.mse_loss)
    trainer.step(x_seq.transpose(0, 1), target.transpose(0, 1))
    assert_same_models(plain, their_model)


@pytest.mark.parametrize("updates_online", [False, True])
def test_ottt_takes_models_made_of_spikingjellys_modules(updates_online: bool) -> None:
    their_model, _, x_seq, target = pair("dense", MIXED)
    same_model = copy.deepcopy(their_model)
    expected = theirs.ottt_online_training(their_model, sgd(their_model), x_seq, target, F.mse_loss, updates_online)
    found = online.ottt_online_training(same_model, sgd(same_model), x_seq, target, F.mse_loss, updates_online)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert_same_models(same_model, their_model)


def test_ottt_with_slttlifnode_is_sltt() -> None:
    torch.manual_seed(0)
    their_model = nn.Sequential(*dense(lambda tau: neuron.SLTTLIFNode(tau=tau, decay_input=False, v_reset=None), SAME))
    same_model = copy.deepcopy(their_model)
    x_seq, target = (torch.rand(N, T, 8) < 0.5).double(), torch.rand(N, T, 3)
    expected = theirs.ottt_online_training(their_model, sgd(their_model), x_seq, target, F.mse_loss, False)
    found = online.ottt_online_training(same_model, sgd(same_model), x_seq, target, F.mse_loss, False)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    assert_same_models(same_model, their_model)


# FPTT: any model without special modules.


def fptt_pair(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """Two calls of both functions with running averages that go on: the same weights and averages."""
    torch.manual_seed(0)
    their_model = nn.Sequential(*dense(lambda tau: neuron.LIFNode(tau=tau, detach_reset=True), MIXED))
    model = copy.deepcopy(their_model)
    x_seq, target = (torch.rand(T, N, 8) < 0.6).double() * 2, torch.rand(T, N, 3)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer, their_optimizer = make_optimizer(model), make_optimizer(their_model)
    w_ra = online.fptt_online_training_init_w_ra(optimizer)
    their_w_ra = theirs.fptt_online_training_init_w_ra(their_optimizer)
    for _ in range(2):
        theirs.fptt_online_training(their_model, their_optimizer, x_seq, target, F.mse_loss, 0.3, their_w_ra)
        functional.reset_net(their_model)
        online.fptt_online_training(model, optimizer, x_seq, target, F.mse_loss, 0.3, w_ra)
        functional.reset_net(model)
        torch.testing.assert_close(w_ra, their_w_ra, atol=1e-10, rtol=0)
        assert_same_models(model, their_model, gradients=False)
    assert all((p - before[n]).abs().max() > 1e-4 for n, p in model.named_parameters())


def test_fptt_is_spikingjellys_with_sgd() -> None:
    fptt_pair(lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9))


def test_fptt_is_spikingjellys_with_adam_and_two_parameter_groups() -> None:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        first, *rest = model.parameters()
        return torch.optim.Adam([{"params": rest, "lr": 0.01}, {"params": [first], "lr": 0.002}])

    fptt_pair(adam)


def test_fptt_on_a_converted_net_is_spikingjellys() -> None:
    torch.manual_seed(0)
    their_model = nn.Sequential(*dense(lambda tau: neuron.LIFNode(tau=tau), MIXED))
    model = copy.deepcopy(their_model)
    x_seq, target = (torch.rand(T, N, 8) < 0.6).double() * 2, torch.rand(T, N, 3)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    for function, module in ((theirs, their_model), (online, net)):
        optimizer = sgd(module)
        w_ra = function.fptt_online_training_init_w_ra(optimizer)
        function.fptt_online_training(module, optimizer, x_seq, target, F.mse_loss, 0.3, w_ra)
    assert_same_models(model, their_model, gradients=False)


def test_the_oracle_of_fptt_is_spikingjelly() -> None:
    torch.manual_seed(0)
    their_model = nn.Sequential(*dense(lambda tau: neuron.LIFNode(tau=tau), MIXED))
    x_seq, target = (torch.rand(T, N, 8) < 0.6).double() * 2, torch.rand(T, N, 3)
    run = fptt(their_model, x_seq, target, mse, 0.3, lambda w: torch.optim.SGD(w, lr=0.1), "reference")
    optimizer = sgd(their_model)
    w_ra = theirs.fptt_online_training_init_w_ra(optimizer)
    theirs.fptt_online_training(their_model, optimizer, x_seq, target, mse, 0.3, w_ra)
    torch.testing.assert_close(run.extra["averages"], w_ra, atol=1e-12, rtol=0)
    assert_same_models(run.model, their_model, gradients=False)


def test_fptt_leaves_frozen_parameters_alone_where_spikingjelly_raises() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*dense(lambda tau: neuron.LIFNode(tau=tau), MIXED))
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.clone()
    x_seq, target = (torch.rand(T, N, 8) < 0.5).double(), torch.rand(T, N, 3)
    optimizer = sgd(model)
    their_model = copy.deepcopy(model)
    their_optimizer = sgd(their_model)
    their_w_ra = theirs.fptt_online_training_init_w_ra(their_optimizer)
    with pytest.raises(TypeError):
        theirs.fptt_online_training(their_model, their_optimizer, x_seq, target, F.mse_loss, 0.3, their_w_ra)
    expected = fptt(model, x_seq, target, F.mse_loss, 0.3, lambda w: torch.optim.SGD(w, lr=0.1), "reference")
    w_ra = online.fptt_online_training_init_w_ra(optimizer)
    online.fptt_online_training(model, optimizer, x_seq, target, F.mse_loss, 0.3, w_ra)
    assert torch.equal(model[2].weight, frozen)
    assert_same_models(model, expected.model, gradients=False)


def test_init_w_ra_gives_independent_snapshots_in_the_order_of_the_optimizer() -> None:
    model = nn.Sequential(*dense(lif, MIXED))
    first, *rest = model.parameters()
    optimizer = torch.optim.SGD([{"params": rest}, {"params": [first]}], lr=0.1)
    found, expected = (f.fptt_online_training_init_w_ra(optimizer) for f in (online, theirs))
    assert isinstance(found, list) and len(found) == len(expected)
    for a, b, p in zip(found, expected, [*rest, first], strict=True):
        assert torch.equal(a, b) and not a.requires_grad and a.data_ptr() != p.data_ptr()
