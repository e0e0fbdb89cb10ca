"""Bound calls equal unbound ones, and whatever a binding depends on is checked at each call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.functional import reset_net
from snnfx.runtime import bound_calls
from support.stepping import step_model


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), neuron.LIFNode(), nn.Linear(5, 4, bias=False), neuron.LIFNode())


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), neuron.LIFNode(), nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3), neuron.ParametricLIFNode())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(6, 6), neuron.IFNode(), nn.Linear(6, 6), neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif1(self.fc1(x))
        return self.lif2(self.fc2(y) * y + y)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (small, (4, 2, 6)),
    "convolutional": (convolutional, (4, 2, 2, 4, 4)),
    "residual": (Residual, (4, 2, 6)),
}


def bound_net(model: nn.Module, x_seq: Tensor, **options: Any) -> Any:
    """A net whose next call with inputs like `x_seq` is bound."""
    net = snnfx.convert(model, **options)
    net(x_seq), net(x_seq)
    assert is_bound(net, x_seq)
    return net


def is_bound(net: Any, x_seq: Tensor) -> bool:
    return net._bound_calls.find((x_seq,)) is not None


def stepped(model: nn.Module, x_seq: Tensor) -> Any:
    reset_net(model)
    y_seq = step_model(model, x_seq)
    reset_net(model)
    return y_seq


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_a_bound_call_equals_stepping(name: str, training: bool) -> None:
    make, shape = MODELS[name]
    model = make().double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # a folded norm in training has other statistics than a stepped one
    x_seq = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    net = bound_net(model, x_seq)
    results = []
    for run in (net, lambda x: stepped(model, x)):
        y_seq = run(x_seq * 3)
        weights = torch.linspace(0, 1, y_seq.numel(), dtype=torch.float64).view_as(y_seq)
        gradients = torch.autograd.grad((y_seq * weights).sum(), [x_seq, *model.parameters()])
        results.append([y_seq, *gradients])
    assert is_bound(net, x_seq * 3)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_bound_call_runs_without_gradients_and_in_inference_mode() -> None:
    model, x_seq = small().eval(), torch.rand(4, 2, 6) * 3
    expected = stepped(model, x_seq)
    net = snnfx.convert(model)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert all(torch.equal(net(x_seq), expected) for _ in range(4))
            assert is_bound(net, x_seq)
    y_seq = net(x_seq)
    y_seq.sum().backward()


def test_a_changed_setting_of_a_neuron_counts() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    model[1].tau = 5.0
    model[3].v_threshold = 0.3
    assert torch.equal(net(x_seq), stepped(model, x_seq))
    model[3].surrogate_function.alpha = 1.0
    torch.testing.assert_close(net(x_seq), stepped(model, x_seq))


@pytest.mark.parametrize("index", [0, 1])
def test_a_hook_added_later_runs(index: int) -> None:
    model, x_seq = small(), torch.rand(4, 2, 6)
    net, calls = bound_net(model, x_seq), []
    model[index].register_forward_hook(lambda *_: calls.append(1))
    net(x_seq)
    assert calls


def test_a_replaced_layer_and_a_replaced_parameter_count() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    model[0].weight = nn.Parameter(torch.rand(5, 6))
    assert torch.equal(net(x_seq), stepped(model, x_seq))
    with torch.no_grad():
        model[2].weight.mul_(-1)
    assert torch.equal(net(x_seq), stepped(model, x_seq))
    model[0] = nn.Linear(6, 5)
    assert torch.equal(net(x_seq), stepped(model, x_seq))


def test_a_replaced_graph_runs() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    graph = copy.deepcopy(net.graph)
    output = graph.output_node()
    with graph.inserting_before(output):
        negated = graph.call_function(torch.neg, (output.args[0],))
    output.args = (negated,)
    net.graph = graph
    assert all(torch.equal(net(x_seq), -stepped(model, x_seq)) for _ in range(3))


def test_an_edited_region_runs() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    region = net.region_modules()["fold_0"]
    (call,) = [n for n in region.graph.nodes if n.op == "call_function"]
    with region.graph.inserting_after(call):
        doubled = region.graph.call_function(torch.mul, (call, 2))
    region.graph.output_node().args = ((doubled,),)
    region.recompile()
    with torch.no_grad():
        model_of_edit = copy.deepcopy(model)
        model_of_edit[0].weight.mul_(2)
        model_of_edit[0].bias.mul_(2)
    assert all(torch.equal(net(x_seq), stepped(model_of_edit, x_seq)) for _ in range(3))


def test_a_frozen_parameter_gets_no_gradient() -> None:
    model, x_seq = convolutional(), torch.rand(4, 2, 2, 4, 4)
    net = bound_net(model, x_seq)
    model[6].w.requires_grad_(False)
    net(x_seq).sum().backward()
    assert model[6].w.grad is None
    assert model[0].weight.grad is not None


def test_inputs_in_another_layout_are_read_right() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    transposed = x_seq.transpose(0, 1).contiguous().transpose(0, 1)
    expanded = x_seq[:, :1].expand(4, 2, 6)
    for other in (transposed, expanded, x_seq[..., :6], torch.rand(7, 3, 6) * 3):
        assert all(torch.equal(net(other), stepped(model, other)) for _ in range(3))


def test_gradients_in_any_layout_are_read_right() -> None:
    model, x_seq = small().double(), torch.rand(4, 2, 6, dtype=torch.float64) * 3
    net = bound_net(model, x_seq)
    gradient = torch.rand(4, 2, 4, dtype=torch.float64)
    layouts = (gradient, gradient.transpose(0, 2).contiguous().transpose(0, 2), gradient[:, :1].expand(4, 2, 4))
    for given in layouts:
        expected = torch.autograd.grad(stepped(model, x_seq), [*model.parameters()], given)
        for ours, theirs in zip(torch.autograd.grad(net(x_seq), [*model.parameters()], given), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_batched_gradients_and_second_derivatives_behave_as_unbound() -> None:
    model, x_seq = small().double(), torch.rand(4, 2, 6, dtype=torch.float64) * 3
    net = bound_net(model, x_seq)
    y_seq, batch = net(x_seq), torch.rand(3, 4, 2, 4, dtype=torch.float64)
    (together,) = torch.autograd.grad(y_seq, [model[0].weight], batch, is_grads_batched=True, retain_graph=True)
    (last,) = torch.autograd.grad(y_seq, [model[0].weight], batch[2], retain_graph=True)
    torch.testing.assert_close(together[2], last)
    with pytest.raises(snnfx.errors.InputError, match="SNNFX316"):
        torch.autograd.grad(y_seq.sum(), [model[0].weight], create_graph=True)


def test_transforms_run_unbound() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    batch = torch.stack([x_seq, 2 * x_seq])
    y = torch.vmap(net)(batch)
    assert torch.equal(y[1], stepped(model, 2 * x_seq))
    parameters = {name: p.detach() * 0 for name, p in model.named_parameters()}
    assert not torch.func.functional_call(net, parameters, (x_seq,)).any()


def test_threads_share_a_bound_net() -> None:
    model = small().eval()
    inputs = [torch.rand(4, 2, 6) * 3 for _ in range(4)]
    expected = [stepped(model, x) for x in inputs]
    wrong: list[int] = []
    with torch.no_grad():
        net = bound_net(model, inputs[0])

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(net(inputs[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_and_casts_of_a_bound_net_run() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(net(x_seq), stepped(model, x_seq))
    assert not clone(x_seq).any()
    net.double()
    assert torch.equal(net(x_seq.double()), stepped(model, x_seq.double()))


def test_time_in_another_dimension_is_bound() -> None:
    model, x_seq = small(), torch.rand(2, 4, 6) * 3
    net = bound_net(model, x_seq, time_dim=1)
    assert torch.equal(net(x_seq), stepped(model, x_seq.transpose(0, 1)).transpose(0, 1))


def test_training_and_evaluation_are_bound_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 50), nn.Dropout(0.5), neuron.IFNode())
    x_seq = torch.rand(4, 2, 6) * 3
    net = bound_net(model, x_seq)
    net.eval()
    assert all(torch.equal(net(x_seq), net(x_seq)) for _ in range(3))
    net.train()
    assert not torch.equal(net(x_seq), net(x_seq))


def test_other_numbers_of_threads_run() -> None:
    model, x_seq = nn.Sequential(neuron.LIFNode()), torch.rand(8, 4, 1024) * 3
    net, threads = bound_net(model, x_seq), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(net(x_seq), stepped(model, x_seq))
    finally:
        torch.set_num_threads(threads)


def test_a_setting_that_changes_at_each_call_is_not_bound_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x_seq, bindings = small(), torch.rand(4, 2, 6) * 3, []
    net = snnfx.convert(model)

    def counted(*given: Any) -> Any:
        bindings.append(1)
        return original(*given)

    original = bound_calls.bind_graph
    monkeypatch.setattr(bound_calls, "bind_graph", counted)
    for index in range(40):
        model[3].surrogate_function.alpha = 1.0 + index
        net(x_seq)
    assert 1 <= len(bindings) <= 6


def test_the_default_device_does_not_matter() -> None:
    model, x_seq = small(), torch.rand(4, 2, 6) * 3
    net, expected = bound_net(model, x_seq), stepped(model, x_seq)
    with torch.device("meta"):
        y_seq = net(x_seq)
    assert torch.equal(y_seq, expected)


class SharedBias(nn.Module):
    """Two folded regions read one parameter directly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.lif1, self.lif2 = neuron.LIFNode(), neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif1(x @ self.weight + self.bias)
        return self.lif2(y @ self.weight.t() + self.bias)


def test_regions_share_a_parameter() -> None:
    model, x_seq = SharedBias().double(), torch.randn(4, 3, 6, dtype=torch.float64)
    expected = step_model(copy.deepcopy(model), x_seq)
    torch.testing.assert_close(bound_net(model, x_seq)(x_seq), expected)
