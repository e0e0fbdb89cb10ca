"""An evaluation BatchNorm in the weights of the layer before it: the numbers of stepping, whatever changes later."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint as checkpointed

import snnfx
from snnfx.analysis.batch_norm_folding import layer_of_norm
from support.stepping import assert_same, assert_same_run, fresh_copy, run_net, run_stepped, step_model

T, N = 4, 3


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What torch's batch_norm was called with, shapes apart that are merely planned with."""
    called: list[Tensor] = []
    original = torch.nn.functional.batch_norm

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(x) is Tensor and not x.is_meta:
            called.append(x)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "batch_norm", counted)
    yield called


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(tau=2.0, surrogate_function=snnfx.surrogate.Sigmoid())


def seen(norm: nn.Module) -> nn.Module:
    """A BatchNorm that has seen data."""
    with torch.no_grad():
        norm.running_mean.normal_(0.2, 0.3)
        norm.running_var.uniform_(0.2, 2.0)
        if norm.affine:
            norm.weight.uniform_(-1.0, 3.0)
            norm.bias.normal_(0.5, 0.3)
    return norm


class Net(nn.Module):
    """Convolution, BatchNorm, pooling, neurons, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 16, 3, padding=1), seen(nn.BatchNorm2d(16))
        self.pool, self.lif1 = nn.MaxPool2d(2), lif()
        self.conv2, self.bn2, self.lif2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), seen(nn.BatchNorm2d(16)), lif()

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif1(self.pool(self.bn1(self.conv1(x))))
        return self.lif2(self.pool(self.bn2(self.conv2(x))))


def made(model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return (Net() if model is None else model).double().eval()


def images(channels: int = 2, size: int = 16) -> Tensor:
    return 4 * torch.rand(T, N, channels, size, size, dtype=torch.float64)


def folded(net: snnfx.Net) -> dict[str, str]:
    """The names of BatchNorms with those of the layers that compute them."""
    nodes = net.programs[False].graph.nodes
    return {n.name: layer_of_norm(n).name for n in nodes if n.meta.get("in_weights")}


@torch.no_grad()
def stepped(model: nn.Module, x_seq: Tensor) -> Tensor:
    return step_model(fresh_copy(model), x_seq)


@torch.no_grad()
def assert_steps(net: snnfx.Net, model: nn.Module, x_seq: Tensor, tolerance: float = 1e-12) -> None:
    assert_same(net(x_seq), stepped(model, x_seq), tolerance)


# -- what is folded -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lower", ["auto", None])
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_norm_before_a_pooling_is_computed_by_the_convolution(norms: list[Tensor], lower: Any, step_mode: str) -> None:
    model = made()
    net = snnfx.convert(model, lower=lower, step_mode=step_mode)
    assert folded(net) == {"bn1": "conv1", "bn2": "conv2"}
    x_seq = images()
    with torch.no_grad():
        y_seq = net(x_seq) if step_mode == "m" else torch.stack([net(x) for x in x_seq])
    assert norms == []
    assert_same(y_seq, stepped(model, x_seq), 1e-12)
    assert y_seq.unique().tolist() == [0, 1]


def test_norm_next_to_a_neuron_is_left_to_its_kernel(norms: list[Tensor]) -> None:
    model = made(nn.Sequential(nn.Conv2d(2, 16, 3), seen(nn.BatchNorm2d(16)), lif()))
    assert folded(snnfx.convert(model)) == {}
    net = snnfx.convert(model, lower=None)
    assert list(folded(net)) == ["_1"]
    assert_steps(net, model, images())
    assert len(norms) == T  # those of the oracle


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 600), (6,)),
    "linear without bias": (lambda: nn.Linear(5, 600, bias=False), (6,)),
    "conv1d": (lambda: nn.Conv1d(6, 40, 3, stride=2, groups=2), (6, 64)),
    "conv2d": (lambda: nn.Conv2d(6, 16, 3, padding="same", dilation=2, padding_mode="circular"), (6, 16, 16)),
    "conv2d without bias": (lambda: nn.Conv2d(6, 16, (3, 1), bias=False), (6, 16, 16)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (6, 16, 16)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), (6, 8, 8, 8)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(6, 20, 3, stride=2, groups=2), (6, 64)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(6, 9, 3, stride=2, output_padding=1, groups=3), (6, 12, 12)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(6, 4, 2, stride=2, padding=1, bias=False), (6, 6, 6, 6)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_all_kinds(norms: list[Tensor], name: str, affine: bool) -> None:
    make, shape = LAYERS[name]
    layer = make()
    is_linear = isinstance(layer, nn.Linear)
    channels = layer.out_features if is_linear else layer.out_channels
    kind = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[0 if is_linear else len(shape) - 1]
    model = made(nn.Sequential(layer, seen(kind(channels, affine=affine)), nn.ReLU()))
    net = snnfx.convert(model)
    assert len(folded(net)) == 1
    x_seq = torch.randn(T, N, *((5,) if is_linear else shape), dtype=torch.float64)
    with torch.no_grad():
        y_seq = net(x_seq)
    assert norms == []
    assert_same(y_seq, stepped(model, x_seq), 1e-12)


def test_single_precision_agrees_to_its_rounding() -> None:
    """Weights are folded in float64 and rounded once: 1e-5 of values of about 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), seen(nn.BatchNorm2d(16)), nn.AvgPool2d(2)).eval()
    net = snnfx.convert(model)
    assert len(folded(net)) == 1
    assert_steps(net, model, torch.randn(T, N, 8, 16, 16), tolerance=1e-5)


class Branches(nn.Module):
    """A norm that several read, one whose layer is read as well, and one that is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.lif = nn.Conv2d(2, 16, 3, padding=1), seen(nn.BatchNorm2d(16)), lif()
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), seen(nn.BatchNorm2d(16))
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, padding=1), seen(nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        current = self.bn1(self.conv1(x))
        before = self.conv2(self.lif(current) + current.sigmoid())
        return before.relu() + self.bn2(before), self.bn3(self.conv3(before))


def test_only_norms_whose_layer_nobody_else_reads() -> None:
    model = made(Branches())
    net = snnfx.convert(model)
    assert folded(net) == {"bn1": "conv1", "bn3": "conv3"}
    assert_steps(net, model, images())


class Again(nn.Module):
    """One convolution with two norms, one norm with two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 16, 3, padding=1), nn.Conv2d(2, 16, 3, padding=1)
        self.bn1, self.bn2 = seen(nn.BatchNorm2d(16)), seen(nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu() + self.bn2(self.conv1(x)).relu() + self.bn2(self.conv2(x)).relu()


def test_layers_called_again_are_folded_for_each_norm(norms: list[Tensor]) -> None:
    model = made(Again())
    net = snnfx.convert(model)
    assert len(folded(net)) == 3
    for _ in range(2):
        with torch.no_grad():
            y_seq = net(x_seq := images())
        assert norms == []
        assert_same(y_seq, stepped(model, x_seq), 1e-12)
        norms.clear()


def test_what_does_not_change_with_time_is_folded_too(norms: list[Tensor]) -> None:
    model = made()
    net = snnfx.convert(model, time_dim=None)
    assert folded(net) == {"bn1": "conv1", "bn2": "conv2"}
    x = images()[0]
    with torch.no_grad():
        y_seq = net(x, T=T)
    assert norms == []
    assert_same(y_seq, stepped(model, x.expand(T, *x.shape)), 1e-12)


class Subclass(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "norm"),
    [
        (Subclass(2, 16, 3), seen(nn.BatchNorm2d(16))),
        (nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16, track_running_stats=False)),
        (nn.Conv2d(2, 16, 3), nn.InstanceNorm2d(16)),
        (parametrizations.weight_norm(nn.Conv2d(2, 16, 3)), seen(nn.BatchNorm2d(16))),
    ],
)
def test_other_layers_and_norms_are_left_alone(layer: nn.Module, norm: nn.Module) -> None:
    model = made(nn.Sequential(layer, norm, nn.ReLU()))
    net = snnfx.convert(model)
    assert folded(net) == {}
    assert_steps(net, model, images())


def test_too_many_weights_for_small_images_are_left_alone(norms: list[Tensor]) -> None:
    model = made(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), seen(nn.BatchNorm2d(64)), nn.ReLU()))
    net = snnfx.convert(model)
    for size, calls in ((4, 1), (16, 0)):
        norms.clear()
        with torch.no_grad():
            net(images(64, size))
        assert len(norms) == calls


def test_linear_layer_over_a_longer_input_is_left_alone(norms: list[Tensor]) -> None:
    """A BatchNorm normalises dim 1, a linear layer makes the last dim."""
    model = made(nn.Sequential(nn.Linear(5, 16), seen(nn.BatchNorm1d(16)), nn.ReLU()))
    net = snnfx.convert(model)
    assert_steps(net, model, torch.rand(T, 600, 16, 5, dtype=torch.float64))
    assert len(norms) == 1 + T


def test_wrong_number_of_channels_is_an_error_as_before() -> None:
    model = made(nn.Sequential(nn.Conv2d(2, 16, 3), seen(nn.BatchNorm2d(1)), nn.ReLU()))
    x_seq = images()
    with pytest.raises(RuntimeError) as expected, torch.no_grad():
        model(x_seq[0])
    with pytest.raises(RuntimeError) as actual, torch.no_grad():
        snnfx.convert(model)(x_seq)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize("variance", [0.0, float("nan")])
def test_weights_that_would_not_be_finite_are_left_alone(variance: float) -> None:
    model = made(nn.Sequential(nn.Conv2d(2, 16, 3), seen(nn.BatchNorm2d(16, eps=0.0)), nn.Hardtanh()))
    model[1].running_var[3], model[0].weight.data[3], model[0].bias.data[3] = variance, 0.0, model[1].running_mean[3]
    x_seq = images()
    with torch.no_grad():
        torch.testing.assert_close(
            snnfx.convert(model)(x_seq), stepped(model, x_seq), atol=1e-12, rtol=1e-12, equal_nan=True
        )


# -- what changes later -------------------------------------------------------------------------------------------


def grow(model: nn.Module) -> None:
    with torch.no_grad():
        model.conv1.weight.mul_(1.5)


def grow_past_the_version_counter(model: nn.Module) -> None:
    model.conv1.weight.data.mul_(1.5)


def move_statistics(model: nn.Module) -> None:
    model.bn2.running_mean.data.add_(0.2)
    model.bn1.running_var.data.mul_(0.5)


def train_the_norms(model: nn.Module) -> None:
    """torch's kernel changes the running statistics and counts no version."""
    for norm in (model.bn1, model.bn2):
        norm.train()
        norm(torch.rand(8, 16, 4, 4, dtype=torch.float64))
        norm.eval()


def train_by_a_fused_optimizer(model: nn.Module) -> None:
    """It counts no version, either."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(model.parameters(), lr=0.1, fused=True).step()


def load_weights(model: nn.Module) -> None:
    model.load_state_dict(made(Net()).state_dict() | {"bn1.bias": torch.ones(16, dtype=torch.float64)})


def assign_weights(model: nn.Module) -> None:
    model.load_state_dict({k: v * 1.25 for k, v in model.state_dict().items()}, assign=True)


def new_parameter(model: nn.Module) -> None:
    model.bn1.weight = nn.Parameter(model.bn1.weight.detach() * 2)


def other_eps(model: nn.Module) -> None:
    model.bn1.eps = 0.5


def without_bias(model: nn.Module) -> None:
    model.conv1.bias = None


def other_storage(model: nn.Module) -> None:
    model.conv1.weight.data = model.conv1.weight.data.flip(0)


@pytest.mark.parametrize(
    "change",
    [
        grow,
        grow_past_the_version_counter,
        move_statistics,
        train_the_norms,
        train_by_a_fused_optimizer,
        load_weights,
        assign_weights,
        new_parameter,
        other_eps,
        without_bias,
        other_storage,
    ],
)
def test_changes_are_seen_at_the_next_call(norms: list[Tensor], change: Callable[[nn.Module], None]) -> None:
    model = made()
    net = snnfx.convert(model)
    x_seq = images()
    with torch.no_grad():
        before, _, _ = net.run(x_seq, record=("lif2.v",))
        states = net.run(x_seq)[1]
    change(model)
    norms.clear()
    with torch.no_grad():
        after, changed = net.run(x_seq)
    assert norms == []
    assert not torch.equal(states["lif2.v"], changed["lif2.v"])
    assert before.shape == after.shape
    assert_same(after, stepped(model, x_seq), 1e-12)


@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
@pytest.mark.filterwarnings("ignore:SNNFX315")
def test_a_norm_that_is_put_into_training_is_noticed(batch_norm: str) -> None:
    model = made()
    net = snnfx.convert(model, batch_norm=batch_norm)
    x_seq = images()
    assert_steps(net, model, x_seq)
    model.bn1.train()
    expected = fresh_copy(model)
    fresh = snnfx.convert(fresh_copy(model), batch_norm=batch_norm)
    with torch.no_grad():
        y_seq = net(x_seq)
        assert_same(y_seq, fresh(x_seq), 1e-12)
        if batch_norm == "per_step":
            assert_same(y_seq, step_model(expected, x_seq), 1e-12)
            assert_same(dict(model.named_buffers()), dict(expected.named_buffers()), 1e-12)
    assert model.bn1.num_batches_tracked == fresh.bn1.num_batches_tracked > 0
    model.bn1.eval()
    assert_steps(net, model, x_seq)


def test_training_is_left_as_it_is() -> None:
    model = made().train()
    net = snnfx.convert(model, batch_norm="per_step")
    x_seq = images()
    assert_same_run(run_net(snnfx.convert(fresh_copy(model), batch_norm="per_step"), x_seq), run_stepped(model, x_seq))
    net(x_seq).sum().backward()
    assert_steps(net.eval(), model.eval(), x_seq)


def test_a_norm_frozen_in_training_stays_as_it_is() -> None:
    model = made().train()
    model.bn1.eval()
    model.bn2.eval()
    x_seq = images()
    assert_same_run(run_net(snnfx.convert(fresh_copy(model)), x_seq), run_stepped(model, x_seq))


# -- who looks on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [None, "regions", 2])
def test_gradients_are_those_of_stepping(norms: list[Tensor], checkpoint: Any) -> None:
    model = made()
    x_seq = images()
    expected = run_stepped(model, x_seq)
    norms.clear()
    assert_same_run(run_net(snnfx.convert(fresh_copy(model), checkpoint=checkpoint), x_seq), expected)
    assert norms or checkpoint == "regions"  # which normalizes with the statistics, apart from taking them


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_backward_computes_again_is_what_forward_computed(
    norms: list[Tensor], reentrant: bool, frozen: bool
) -> None:
    """A spike must not flip in between: both times the modules are called as they are."""
    model = made()
    model.conv1.requires_grad_(not frozen)
    model.bn1.requires_grad_(not frozen)
    net = snnfx.convert(model)
    y_seq = checkpointed(net, images().requires_grad_(), use_reentrant=reentrant)
    assert len(norms) == 2
    y_seq.sum().backward()
    assert len(norms) == 4


def test_without_a_need_for_gradients_they_still_have_to_be_off(norms: list[Tensor]) -> None:
    net = snnfx.convert(made().requires_grad_(False))
    net(images())
    assert len(norms) == 2


def test_recorded_values_are_at_hand() -> None:
    model = made()
    net = snnfx.convert(model)
    x_seq = images()
    with torch.no_grad():
        y_seq, _, record = net.run(x_seq, record=("conv1", "bn1", "bn2"))
        current = torch.stack([model.conv1(x) for x in x_seq])
        assert_same(record["conv1"], current, 1e-12)
        assert_same(record["bn1"], torch.stack([model.bn1(x) for x in current]), 1e-12)
        assert record["bn2"].shape == (T, N, 16, 8, 8)
        assert_same(y_seq, stepped(model, x_seq), 1e-12)


@pytest.mark.parametrize("name", ["conv1", "bn1"])
@pytest.mark.parametrize("early", [True, False])
def test_hooks_are_called(name: str, early: bool) -> None:
    model = made()
    module = model.get_submodule(name)
    net = None if early else snnfx.convert(model)
    calls: list[str] = []
    handle = module.register_forward_hook(lambda module, args, output: calls.append(name) or 2 * output)
    net = net or snnfx.convert(model)
    x_seq = images()
    with torch.no_grad():
        y_seq = net(x_seq)
    assert calls == [name]
    assert_same(y_seq, stepped(model, x_seq), 1e-12)
    handle.remove()
    assert_steps(net, model, x_seq)


def test_hooks_of_all_modules_are_called() -> None:
    model = made()
    net = snnfx.convert(model)
    assert_steps(net, model, images())
    called: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        with torch.no_grad():
            net(images())
    finally:
        handle.remove()
    assert called.count(nn.BatchNorm2d) == 2


def pruned(model: nn.Module) -> None:
    prune.l1_unstructured(model.conv1, "weight", amount=0.5)


def parametrized(model: nn.Module) -> None:
    parametrizations.weight_norm(model.conv1)
    with torch.no_grad():
        model.conv1.parametrizations.weight.original0.mul_(2.0)


def with_another_forward(model: nn.Module) -> None:
    model.bn1.forward = lambda x: 2 * nn.BatchNorm2d.forward(model.bn1, x)


@pytest.mark.parametrize("change", [pruned, parametrized, with_another_forward])
def test_layers_that_become_something_else_are_called_as_they_are(change: Callable[[nn.Module], None]) -> None:
    model = made()
    net = snnfx.convert(model)
    x_seq = images()
    assert_steps(net, model, x_seq)
    change(model)
    expected: list[Tensor] = []
    with torch.no_grad():
        for x in x_seq:
            expected.append(model.bn1(model.conv1(x)))
        _, _, record = net.run(x_seq, record=("bn1",))
    assert_same(record["bn1"], torch.stack(expected), 1e-12)


# -- transformations ----------------------------------------------------------------------------------------------


def test_compiled_nets_follow_the_weights() -> None:
    model = made()
    x_seq = images()
    compiled = torch.compile(snnfx.convert(model), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(x_seq), stepped(model, x_seq), 1e-12)
        grow_past_the_version_counter(model)
        move_statistics(model)
        assert_same(compiled(x_seq), stepped(model, x_seq), 1e-12)


def test_exported_programs_are_the_same() -> None:
    model = made()
    net = snnfx.convert(model)
    x_seq = images()
    with torch.no_grad():
        net(x_seq)
        exported = torch.export.export(net, (x_seq,))
        assert_same(exported.module()(x_seq), stepped(model, x_seq), 1e-12)
    assert any("batch_norm" in str(node.target) for node in exported.graph.nodes)


def feed_forward() -> nn.Module:
    return made(nn.Sequential(nn.Conv2d(2, 16, 3), seen(nn.BatchNorm2d(16)), nn.ReLU()))


def test_traces_hold_the_weights_and_not_what_was_made_of_them() -> None:
    model = feed_forward()
    net = snnfx.convert(model)
    x_seq = images()
    with torch.no_grad():
        net(x_seq)
        traced = make_fx(lambda x: net(x))(x_seq)
        model[0].weight.data.mul_(1.5)
        assert_same(traced(x_seq), stepped(model, x_seq), 1e-12)


def test_functional_calls_have_their_own_weights() -> None:
    model = feed_forward()
    net = snnfx.convert(model)
    x_seq = images()
    others = [{k: v * scale for k, v in model.named_parameters()} for scale in (1.0, 1.5)]
    stacked = {k: torch.stack([other[k].detach() for other in others]) for k in others[0]}
    with torch.no_grad():
        net(x_seq)
        expected = torch.stack([torch.stack([torch.func.functional_call(model, w, x) for x in x_seq]) for w in others])
        one_by_one = torch.stack([torch.func.functional_call(net, w, x_seq) for w in others])
        at_once = torch.vmap(lambda w: torch.func.functional_call(net, w, x_seq))(stacked)
    assert_same(one_by_one, expected, 1e-12)
    assert_same(at_once, expected, 1e-12)


def test_tangents_of_the_weights_are_kept() -> None:
    model = feed_forward()
    net = snnfx.convert(model)
    x_seq = images()

    def of(module: nn.Module, run: Callable[..., Tensor]) -> Tensor:
        weights = {k: v.detach() for k, v in module.named_parameters()}
        with torch.no_grad():
            return torch.func.jvp(lambda w: run(module, w), (weights,), (weights,))[1]

    actual = of(net, lambda net, w: torch.func.functional_call(net, w, x_seq))
    expected = of(model, lambda m, w: torch.stack([torch.func.functional_call(m, w, x) for x in x_seq]))
    assert_same(actual, expected, 1e-12)


def test_autocast_and_half_precision_are_left_alone(norms: list[Tensor]) -> None:
    model = feed_forward().float()
    net = snnfx.convert(model)
    x_seq = images().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y_seq = net(x_seq)
        expected = step_model(fresh_copy(model), x_seq)
    assert y_seq.dtype == expected.dtype
    torch.testing.assert_close(y_seq, expected, atol=0.05, rtol=0.02)
    model.bfloat16()
    norms.clear()
    with torch.no_grad():
        net(x_seq.bfloat16())
    assert len(norms) == 1


def test_weights_folded_in_inference_mode_serve_outside_of_it(norms: list[Tensor]) -> None:
    model = made()
    net = snnfx.convert(model)
    x_seq = images()
    with torch.inference_mode():
        expected = net(x_seq)
    assert_same(run_net(net, x_seq).outputs, expected.clone(), 1e-12)
    norms.clear()
    with torch.no_grad():
        assert torch.equal(net(x_seq), expected)
    assert norms == []


# -- life ---------------------------------------------------------------------------------------------------------


def test_nothing_is_added_to_the_model_or_the_net() -> None:
    model = made()
    names, keys = [set(m.__dict__) for m in model.modules()], list(model.state_dict())
    net = snnfx.convert(model)
    assert_steps(net, model, images())
    assert list(model.state_dict()) == list(net.state_dict()) == keys
    assert [set(m.__dict__) for m in model.modules()] == names


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_copies_and_pickles(norms: list[Tensor], step_mode: str) -> None:
    model = made()
    net = snnfx.convert(model, step_mode=step_mode)
    x_seq = images()
    expected = stepped(model, x_seq)
    with torch.no_grad():
        for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert folded(copied) == folded(net)
            norms.clear()
            actual = torch.stack([copied(x) for x in x_seq]) if step_mode == "s" else copied(x_seq)
            assert norms == []
            assert_same(actual, expected, 1e-12)
            grow(copied)
    assert_same(expected, stepped(model, x_seq), 0.0)


def test_other_dtypes_and_memory_formats(norms: list[Tensor]) -> None:
    model = made()
    net = snnfx.convert(model)
    x_seq = images()
    assert_steps(net, model, x_seq)
    for change in (
        lambda: net.to(memory_format=torch.channels_last),
        lambda: net.float(),
        lambda: net.to(memory_format=torch.contiguous_format),
        lambda: net.double(),
    ):
        change()
        dtype = model.conv1.weight.dtype
        x = x_seq.to(dtype)
        with torch.no_grad():
            norms.clear()
            _, state = net.run(x)
            assert norms == []
            clone = fresh_copy(model)
            step_model(clone, x)
        assert_same(state["lif2.v"], clone.lif2.v, 1e-12 if dtype == torch.float64 else 1e-4)


def test_chunks_give_what_the_whole_gives() -> None:
    model = made().float()
    net = snnfx.convert(model)
    x_seq = images().float()
    with torch.no_grad():
        parts = list(net.stream(x_seq.split(1)))
        assert torch.equal(torch.cat(parts), net(x_seq))


def test_explain_history_and_pictures_say_what_was_folded() -> None:
    model = made()
    net = snnfx.convert(model, example_inputs=images()[0])
    text = str(snnfx.explain(net))
    assert "bn1 into conv1 and bn2 into conv2" in " ".join(text.split())
    assert any(note.startswith("BatchNorm folded into weights") for note in snnfx.explain(fresh_copy(model)).batch_norm)
    assert not any("folded into weights" in note for note in snnfx.explain(nn.Linear(2, 2)).batch_norm)
    (record,) = [r for r in net.history if r.description == "fold_batch_norm"]
    assert record.note == "in evaluation, bn1 into conv1, bn2 into conv2"
    picture = str(snnfx.draw(net))
    assert "conv1" in picture and "bn1" in picture
