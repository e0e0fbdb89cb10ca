"""In training, the kernel of a loop computes the BatchNorms and additions between the layers and the neuron.

The oracle runs the layers of the model over all steps at once, as `batch_norm="fold"` says, and steps each neuron in a
plain loop.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.functional import reset_net
from snnfx.regions import normed_loop

T, N = 4, 3


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sequences take the kernel, too."""
    monkeypatch.setattr(normed_loop, "LEAST_ELEMENTS", {"row-major": 0, "channels-last": 0})


def lif() -> snnfx.neuron.LIFNode:
    return snnfx.neuron.LIFNode(tau=2.0, surrogate_function=snnfx.surrogate.ATan(), detach_reset=True)


class Block(nn.Module):
    """Layers as `Sequential`, with neurons that step over time if `over_time` is set."""

    over_time = False

    def run(self, neuron: nn.Module, x: Tensor) -> Tensor:
        if not self.over_time:
            return neuron(x)  # type: ignore[no-any-return]
        steps = [neuron(step) for step in x.unflatten(0, (T, -1)).unbind(0)]
        return torch.stack(steps).flatten(0, 1)


class Plain(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.lif = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), lif()
        self.pool, self.fc, self.norm2, self.lif2 = nn.MaxPool2d(2), nn.Linear(54, 5), nn.BatchNorm1d(5), lif()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.run(self.lif, self.norm(self.conv(x))))
        return self.run(self.lif2, self.norm2(self.fc(y.flatten(1))))


class Residual(Block):
    """A shortcut with a BatchNorm, one without, and a sum of three values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0, self.lif0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), lif()
        self.conv1, self.norm1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2, self.lif1 = nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), lif()
        self.conv3, self.norm3, self.lif2 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), lif()

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self.lif0, self.norm0(self.conv0(x)))
        z = self.run(self.lif1, self.norm1(self.conv1(y)) + self.norm2(self.conv2(y)))
        return self.run(self.lif2, torch.add(self.norm3(self.conv3(z)), z) + y)


class NormOfInput(Block):
    """BatchNorms without a layer before them: of the input, and of a spike train that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lif = nn.BatchNorm2d(2, affine=False), lif()
        self.norm2, self.lif2 = nn.BatchNorm2d(2, momentum=None), lif()

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self.lif, self.norm(x))
        return self.run(self.lif2, self.norm2(y) + y) + y


class LearnedLeak(Block):
    """A neuron with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6, track_running_stats=False)
        self.lif = snnfx.neuron.ParametricLIFNode(surrogate_function=snnfx.surrogate.ATan(), detach_reset=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.lif, self.norm(self.conv(x)))


MODELS: dict[str, tuple[type[Block], int]] = {
    "plain": (Plain, 2),
    "residual": (Residual, 4),
    "norm of an input": (NormOfInput, 2),
    "learned leak": (LearnedLeak, 1),
}


def made(cls: type[Block]) -> Block:
    torch.manual_seed(0)
    model = cls().double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.affine:
            nn.init.normal_(m.weight, 1.0, 0.3)
            nn.init.normal_(m.bias, 0.5, 0.3)
    return model


def oracle_of(model: Block) -> Callable[[Tensor], Tensor]:
    """A function from a sequence to the output sequence."""
    model.over_time = True

    def run(x_seq: Tensor) -> Tensor:
        reset_net(model)
        return model(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])  # type: ignore[no-any-return]

    return run


def converted(model: Block, size: int = 6) -> snnfx.Net:
    return snnfx.convert(model, example_inputs=torch.rand(N, 2, size, size, dtype=torch.float64))


def step(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, steps: int) -> list[Tensor]:
    """Outputs, gradients and buffers of the last of several training steps."""
    for _ in range(steps):
        module.zero_grad()
        x = x.detach().requires_grad_()
        y = run(x)
        (y * torch.linspace(-1.0, 1.0, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert x.grad is not None
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    return [y, x.grad, *grads, *(b for n, b in module.named_buffers() if "lif" not in n)]


def norms_in_kernels(net: snnfx.Net) -> int:
    return sum(len(getattr(m, "norms_in_kernel", ())) for m in net.region_modules().values())


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_equals_folded_layers_and_stepped_neurons(name: str, channels_last: bool) -> None:
    cls, count = MODELS[name]
    model = made(cls)
    net, reference = converted(copy.deepcopy(model)), model
    x = torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    if channels_last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, N))
    found = step(net, net, x, steps=4)
    assert norms_in_kernels(net) == count
    assert_alike(found, step(oracle_of(reference), reference, x, steps=4))


def test_explain_names_the_norms() -> None:
    net = converted(made(Residual))
    step(net, net, torch.randn(T, N, 2, 6, 6, dtype=torch.float64), steps=4)
    text = " ".join(str(snnfx.explain(net)).split())
    assert "`norm1` and `norm2` by loop_3" in text
    net.eval()
    net(torch.randn(T, N, 2, 6, 6, dtype=torch.float64))


def test_a_frozen_norm_uses_its_running_statistics() -> None:
    model = made(Plain)
    net, reference = converted(copy.deepcopy(model)), model
    x = torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    run = oracle_of(reference)
    assert_alike(step(net, net, x, steps=4), step(run, reference, x, steps=4))
    for m in (net.source, reference):
        m.norm.eval()
    assert_alike(step(net, net, x, steps=4), step(run, reference, x, steps=4))
    for m in (net.source, reference):
        m.norm.train()
    assert_alike(step(net, net, x, steps=4), step(run, reference, x, steps=4))


def test_hooks_and_changed_settings_are_seen() -> None:
    model = made(Plain)
    net, reference = converted(copy.deepcopy(model)), model
    x, run = torch.randn(T, N, 2, 6, 6, dtype=torch.float64), oracle_of(reference)
    assert_alike(step(net, net, x, steps=4), step(run, reference, x, steps=4))
    calls = []
    for m in (net.source, reference):
        m.norm.register_forward_hook(lambda module, args, y: calls.append(module) or y * 1.5)
    assert_alike(step(net, net, x, steps=2), step(run, reference, x, steps=2))
    assert len(calls) == 4
    for m in (net.source, reference):
        m.norm._forward_hooks.clear()
        m.norm2.eps = 0.3
        m.norm2.momentum = 0.9
        m.norm2.weight = nn.Parameter(m.norm2.weight.detach() * 2)
    assert_alike(step(net, net, x, steps=4), step(run, reference, x, steps=4))


def test_a_norm_that_is_called_twice_keeps_its_order_of_updates() -> None:
    class Shared(Block):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.lif = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), lif()
            self.lif2 = lif()

        def forward(self, x: Tensor) -> Tensor:
            return self.run(self.lif2, self.norm(self.run(self.lif, self.norm(self.conv(x)))))

    model = made(Shared)
    net, reference = converted(copy.deepcopy(model)), model
    x = torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    assert_alike(step(net, net, x, steps=4), step(oracle_of(reference), reference, x, steps=4))
    assert norms_in_kernels(net) == 0


class AddsTwoCallsOfANorm(Block):
    """The sum reads the second call first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2, self.norm, self.lif = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), lif()

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm(self.conv(x))
        second = self.norm(self.conv2(x))
        return self.run(self.lif, second + first)


def test_a_norm_that_one_fold_calls_twice_keeps_its_order_of_updates() -> None:
    model = made(AddsTwoCallsOfANorm)
    net, reference = converted(copy.deepcopy(model)), model
    x = torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    assert_alike(step(net, net, x, steps=4), step(oracle_of(reference), reference, x, steps=4))
    assert norms_in_kernels(net) == 0


def channels_last(x_seq: Tensor) -> Tensor:
    return x_seq.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x_seq.shape[:2])


SAMPLES_APART: dict[str, Callable[[], Tensor]] = {
    "every second step": lambda: channels_last(torch.randn(2 * T, 1, 2, 6, 6, dtype=torch.float64))[::2],
    "one step repeated": lambda: channels_last(torch.randn(1, 1, 2, 6, 6, dtype=torch.float64)).expand(T, 1, 2, 6, 6),
}


@pytest.mark.parametrize("name", SAMPLES_APART)
def test_steps_of_one_sample_need_not_follow_each_other_in_memory(name: str) -> None:
    model = made(NormOfInput)
    net, reference = converted(copy.deepcopy(model)), model
    x, run = SAMPLES_APART[name](), oracle_of(reference)
    found = step(net, net, x, steps=4)
    assert_alike(found, step(lambda x: run(x.contiguous()), reference, x, steps=4))


@pytest.mark.parametrize("name", MODELS)
def test_hooks_of_saved_tensors_may_change_their_layout(name: str) -> None:
    model = made(MODELS[name][0])
    net, reference = converted(copy.deepcopy(model)), model
    x, run = channels_last(torch.randn(T, N, 2, 6, 6, dtype=torch.float64)), oracle_of(reference)
    step(net, net, x, steps=4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
        found = step(net, net, x, steps=1)
    assert norms_in_kernels(net) == MODELS[name][1]
    assert_alike(found, step(lambda x: run(x.contiguous()), reference, x, steps=5))


def test_one_graph_is_differentiated_twice() -> None:
    net = converted(made(Residual))
    x = torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    step(net, net, x, steps=4)
    given = x.requires_grad_()
    y = net(given).square().sum()
    wanted = [given, *net.parameters()]
    first = [g.clone() for g in torch.autograd.grad(y, wanted, retain_graph=True)]
    assert_alike(list(torch.autograd.grad(y, wanted)), first)


def test_no_grad_in_training_mode_updates_the_statistics() -> None:
    model = made(Plain)
    net, reference = converted(copy.deepcopy(model)), model
    run, x = oracle_of(reference), torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(4):
            found, expected = net(x), run(x)
    assert norms_in_kernels(net) == 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    for a, b in zip(net.source.norm.buffers(), reference.norm.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_half_precision_runs_the_norm_in_torch() -> None:
    net = snnfx.convert(made(Plain).to(torch.bfloat16), example_inputs=torch.rand(N, 2, 6, 6, dtype=torch.bfloat16))
    for _ in range(4):
        net(torch.randn(T, N, 2, 6, 6, dtype=torch.bfloat16)).sum().backward()
    assert norms_in_kernels(net) == 0


def test_second_derivatives_are_refused() -> None:
    net = converted(made(Plain))
    x = torch.randn(T, N, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(4):
        y = net(x)
    with pytest.raises(snnfx.errors.InputError, match="SNNFX316"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_threads_share_a_net() -> None:
    net = converted(made(Residual))
    net.requires_grad_(False)
    xs = [torch.randn(T, N, 2, 6, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(net(x).sum(), x)[0]

    for _ in range(4):
        expected = [gradient(x) for x in xs]
    found: dict[int, Tensor] = {}

    def work(k: int) -> None:
        for _ in range(20):
            found[k] = gradient(xs[k])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(3):
        torch.testing.assert_close(found[k], expected[k], rtol=1e-9, atol=1e-10)


def test_a_copy_of_the_net_trains_alone() -> None:
    net = converted(made(Plain))
    x = torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    step(net, net, x, steps=4)
    before = [b.clone() for b in net.buffers()]
    twin = copy.deepcopy(net)
    found = step(twin, twin, x, steps=4)
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert_alike(found, step(net, net, x, steps=4))


def test_a_net_whose_first_step_has_a_graph_of_its_own_keeps_the_norm_in_torch() -> None:
    class FirstStepDiffers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.lif = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), lif()
            self.back = nn.Conv2d(6, 6, 3, padding=1)
            self.v: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            z = self.lif(self.norm(self.conv(x)))
            self.v = torch.tanh(z) if self.v is None else torch.tanh(self.back(self.v) + z)
            return self.v

    torch.manual_seed(0)
    model, x = FirstStepDiffers().double(), torch.randn(T, N, 2, 6, 6, dtype=torch.float64)
    net = snnfx.convert(copy.deepcopy(model), example_inputs=x[0])
    without_kernels = snnfx.convert(model, example_inputs=x[0], lower=None)
    assert_alike(step(net, net, x, steps=6), step(without_kernels, without_kernels, x, steps=6))
    assert norms_in_kernels(net) == 0
