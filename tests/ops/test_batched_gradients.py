"""Batched gradients of nets: `is_grads_batched`, `jacobian(vectorize=True)`, `gradcheck`, `torch.func`.

The oracle is one backward pass for each gradient of the batch through the user's model, stepped in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from snnfx.neuron import LIFNode
from support.stepping import fresh_copy, step_model

T, N, C = 4, 3, 6


def lif() -> nn.Module:
    return LIFNode(tau=2.0, v_threshold=0.4)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.back, self.lif = nn.Linear(C, C), lif()
        self.z: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.z = self.lif(x if self.z is None else x + self.back(self.z))
        return self.z


class Mapped(nn.Module):
    """A step that mixes the samples of the batch, so it is mapped over time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), lif()

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return self.lif(x - x.mean(0, keepdim=True) + 0.5)


class LearnedInitialState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.start = nn.Linear(C, C), nn.Parameter(torch.rand(C))
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        v = self.start if self.v is None else self.v
        self.v = 0.5 * v + self.fc(x)
        return torch.tanh(self.v)


def norm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), lif(), nn.Linear(C, 2))


def image_net() -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), lif(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


def untracked_norm_net() -> nn.Module:
    norm = nn.BatchNorm1d(C, track_running_stats=False)
    return nn.Sequential(nn.Linear(C, C), norm, lif(), nn.Linear(C, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "kernel": (lambda: nn.Sequential(nn.Linear(C, C), lif()), {}),
    "stepped": (lambda: nn.Sequential(nn.Linear(C, C), lif()), {"lower": None}),
    "mixed loop": (Recurrent, {}),
    "mapped": (Mapped, {}),
    "learned initial state": (LearnedInitialState, {}),
    "norm per step": (norm_net, {"batch_norm": "per_step"}),
    "norm per step, recomputed": (norm_net, {"batch_norm": "per_step", "checkpoint": "regions"}),
    "recomputed": (lambda: nn.Sequential(nn.Linear(C, C), lif(), nn.Linear(C, C), lif()), {"checkpoint": "regions"}),
    "selective": (lambda: nn.Sequential(nn.Linear(C, C), lif(), nn.Linear(C, C), lif()), {"checkpoint": "selective"}),
    "chunks recomputed": (lambda: nn.Sequential(nn.Linear(C, C), lif()), {"checkpoint": 2}),
    "mixed loop recomputed": (Recurrent, {"checkpoint": 2}),
    "norm without running statistics": (untracked_norm_net, {"batch_norm": "per_step"}),
    "images": (image_net, {"batch_norm": "per_step"}),
}


def make(name: str) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    build, options = MODELS[name]
    model = build().double()
    shape = (T, N, 2, 4, 4) if name == "images" else (T, N, C)
    x_seq = torch.rand(shape, dtype=torch.float64)
    return model, snnfx.convert(fresh_copy(model), **options), x_seq


def gradients_one_by_one(run: Callable[[Tensor], Tensor], leaves: list[Tensor], batch: Tensor) -> list[Tensor]:
    y = run(leaves[0])
    rows = [torch.autograd.grad(y, leaves, g, retain_graph=True, allow_unused=True) for g in batch]
    columns = zip(leaves, zip(*rows, strict=True), strict=True)
    return [torch.stack([torch.zeros_like(p) if g is None else g for g in c]) for p, c in columns]


def leaves_of(module: nn.Module, x_seq: Tensor) -> list[Tensor]:
    return [x_seq.clone().requires_grad_(), *module.parameters()]


def assert_gradients(actual: Any, leaves: list[Tensor], expected: list[Tensor]) -> None:
    for g, leaf, e in zip(actual, leaves, expected, strict=True):
        whole = torch.zeros((len(e), *leaf.shape), dtype=leaf.dtype) if g is None else g
        torch.testing.assert_close(whole, e, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 5])
def test_gradients_batched_by_autograd(name: str, size: int) -> None:
    model, net, x_seq = make(name)
    clone = fresh_copy(model)
    y = net(x_seq)
    batch = torch.randn(size, *y.shape, dtype=torch.float64)
    expected = gradients_one_by_one(lambda x: step_model(clone, x), leaves_of(clone, x_seq), batch)
    leaves = leaves_of(net, x_seq)
    actual = torch.autograd.grad(net(leaves[0]), leaves, batch, is_grads_batched=True, allow_unused=True)
    assert_gradients(actual, leaves, expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_batched_by_torch_func(name: str) -> None:
    model, net, x_seq = make(name)
    clone = fresh_copy(model)
    leaves = leaves_of(net, x_seq)
    y = net(leaves[0])
    batch = torch.randn(5, *y.shape, dtype=torch.float64)
    expected = gradients_one_by_one(lambda x: step_model(clone, x), leaves_of(clone, x_seq), batch)
    used = [i for i, e in enumerate(expected) if e.any()]
    actual = torch.vmap(lambda g: torch.autograd.grad(y, [leaves[i] for i in used], g, retain_graph=True))(batch)
    assert_gradients(actual, [leaves[i] for i in used], [expected[i] for i in used])


@pytest.mark.parametrize("name", MODELS)
def test_jacobian_vectorized(name: str) -> None:
    model, net, x_seq = make(name)

    def stepped(x_seq: Tensor) -> Tensor:
        return step_model(fresh_copy(model), x_seq).sum((0, 1))

    expected = torch.autograd.functional.jacobian(stepped, x_seq)
    actual = torch.autograd.functional.jacobian(lambda x: net(x).sum((0, 1)), x_seq, vectorize=True)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_jacrev(name: str, training: bool) -> None:
    model, net, x_seq = make(name)
    net, model = net.train(training), model.train(training)
    if training and any(getattr(m, "track_running_stats", False) for m in model.modules()):
        pytest.skip("torch.func cannot update running statistics, neither of the net nor of the model")

    def stepped(x_seq: Tensor) -> Tensor:
        return step_model(fresh_copy(model), x_seq).sum((0, 1))

    expected = torch.autograd.functional.jacobian(stepped, x_seq)
    actual = torch.func.jacrev(lambda x: net(x).sum((0, 1)))(x_seq)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("lower", ["auto", None])
def test_gradcheck_of_a_smooth_net(lower: str | None) -> None:
    torch.manual_seed(0)
    net = snnfx.convert(LearnedInitialState().double(), lower=lower)
    x_seq = torch.rand(3, 2, C, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(net, (x_seq,), check_batched_grad=True)


def test_statistics_over_all_steps() -> None:
    torch.manual_seed(0)
    for checkpoint in (None, "selective", "regions"):
        net = snnfx.convert(norm_net().double(), checkpoint=checkpoint)
        leaves = leaves_of(net, torch.rand(T, N, C, dtype=torch.float64))
        y = net(leaves[0])
        batch = torch.randn(5, *y.shape, dtype=torch.float64)
        expected = gradients_one_by_one(net, leaves, batch)
        actual = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
        assert_gradients(actual, leaves, expected)


def test_images_in_float32() -> None:
    torch.manual_seed(0)
    net = snnfx.convert(image_net(), checkpoint="regions")
    leaves = leaves_of(net, torch.rand(T, N, 2, 4, 4))
    y = net(leaves[0])
    batch = torch.randn(3, *y.shape)
    expected = gradients_one_by_one(net, leaves, batch)
    actual = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-4)


def test_recomputation_draws_the_same_random_numbers_for_each_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(C, C), nn.Dropout(0.5), lif()).double()
    net = snnfx.convert(model, checkpoint="regions")
    leaves = leaves_of(net, torch.rand(T, N, C, dtype=torch.float64))
    y = net(leaves[0])
    batch = torch.randn(5, *y.shape, dtype=torch.float64)
    expected = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in batch]
    actual = torch.autograd.grad(y, leaves, batch, is_grads_batched=True)
    assert_gradients(actual, leaves, [torch.stack(c) for c in zip(*expected, strict=True)])


def test_second_derivative_of_a_batch_is_refused() -> None:
    _, net, x_seq = make("kernel")
    x_seq.requires_grad_()
    y = net(x_seq)
    with pytest.raises(InputError, match="SNNFX316"):
        torch.autograd.grad(y, x_seq, torch.rand(2, *y.shape).double(), is_grads_batched=True, create_graph=True)
