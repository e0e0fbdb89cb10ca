"""Training with recomputation: the same gradients, one update of running statistics, less memory."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx import neuron, surrogate
from snnfx.analysis.integer_ranges import infer_integer_ranges
from snnfx.errors import InputError
from snnfx.functional import reset_net
from snnfx.recompute.bit_packing import pack, packed_bytes, unpack
from support.measured_memory import AllocatedBytes, with_statistics, without_statistics
from support.nets import ACCEPTANCE

CHECKPOINTS = ("selective", "regions", 3)


def trained(net: nn.Module, *sequences: Tensor) -> list[Tensor]:
    """Outputs, gradients and buffers after a training step, under a fixed seed."""
    torch.manual_seed(3)
    given = [x.clone().requires_grad_(x.is_floating_point()) for x in sequences]
    outputs = [y for y in pytree.tree_leaves(net(*given)) if isinstance(y, Tensor) and y.requires_grad]
    weights = [torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0)) for y in outputs]
    sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()  # type: ignore[union-attr]
    leaves = [*given, *net.parameters()]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in leaves]
    net.zero_grad()
    return [*(y.detach() for y in outputs), *grads, *(b.clone() for b in net.buffers())]


def assert_equal_training(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", ACCEPTANCE)
def test_gradients_match_stepping_the_model(name: str, checkpoint: int | str) -> None:
    acceptance = ACCEPTANCE[name]
    if acceptance.package != "torch":
        pytest.importorskip(acceptance.package)
    model = acceptance.make().double().eval()
    sequences = acceptance.sequences(7, torch.float64)

    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(model)

        def forward(self, *x_seq: Tensor) -> Any:
            reset_net(self.model)
            steps = [pytree.tree_flatten(self.model(*(x[t] for x in x_seq)))[0] for t in range(x_seq[0].shape[0])]
            return [torch.stack(y) for y in zip(*steps, strict=True) if isinstance(y[0], Tensor)]

    net = snnfx.convert(model, example_inputs=acceptance.example(torch.float64), checkpoint=checkpoint)
    assert_equal_training(trained(net, *sequences), trained(Stepped(), *sequences))


@pytest.mark.parametrize("lower", ["auto", None])
def test_running_statistics_are_updated_once(lower: str | None) -> None:
    model = with_statistics().double()
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None, lower=lower)
    net = snnfx.convert(model, checkpoint="regions", lower=lower)
    x_seq = torch.rand(6, 2, 2, 6, 6, dtype=torch.float64)
    for _ in range(2):
        assert_equal_training(trained(net, x_seq), trained(plain, x_seq))
    assert int(model[1].num_batches_tracked) == 2


class NormReadsItsOwnInput(nn.Module):
    """A product and the tile behind it read the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.lif = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.lif(self.bn(self.conv(x))), x, x, value=0.5)


class TwoCallsOfOneNeuron(nn.Module):
    """One with what is the same at all steps: another for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode(tau=1.3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.lif(x * 2) + self.lif(y)


class MeanOverTheBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.mean(0, keepdim=True)) * x.amax(0, keepdim=True)


class ChecksASize(nn.Module):
    """The number of channels is looked at behind the second product of a fold."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        for i in range(y.shape[1]):
            y = y + y[:, i : i + 1].mean()
        return y  # type: ignore[no-any-return]


class TokensOfSamples(nn.Module):
    """Tokens are merged with the samples for a layer, and come apart behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.bn, self.lif = nn.Linear(4, 4), nn.BatchNorm1d(4), neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        N, tokens, channels = x.shape
        return self.lif(self.bn(self.lin(x.flatten(0, 1))).reshape(N, tokens, channels))  # type: ignore[no-any-return]


CUT = {
    "tokens merged with samples": (TokensOfSamples, (3, 4), 0),
    "a size that is looked at": (ChecksASize, (2, 4), 0),
    "read twice": (NormReadsItsOwnInput, (2, 4, 4), 0),
    "batch merged with what is behind it": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(0, 1), neuron.LIFNode(), nn.Sigmoid()), (2, 4, 4), 0),
    "one input is the same at all steps": (TwoCallsOfOneNeuron, (6,), (0, None)),
    "batch reduced": (MeanOverTheBatch, (5,), 0),
    "changed in place": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Linear(6, 2)), (6,), 0),
    "groups without space": (
        lambda: nn.Sequential(nn.Linear(6, 6), nn.GroupNorm(6, 6), neuron.LIFNode(), nn.Sigmoid()), (6,), 0),
    "residual": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), NormReadsItsOwnInput()), (2, 4, 4), 0),
}  # fmt: skip


@pytest.mark.parametrize("bytes_of_slice", [1, 600])
@pytest.mark.parametrize("checkpoint", ["selective", "regions"])
@pytest.mark.parametrize("name", CUT)
def test_gradients_do_not_depend_on_the_slices(
    name: str, checkpoint: str, bytes_of_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snnfx.memory.training_planner.SLICE", bytes_of_slice)
    make, shape, time_dim = CUT[name]
    model: nn.Module = make().double()
    dims = time_dim if isinstance(time_dim, tuple) else (time_dim,)
    sequences = [torch.rand(*((5,) if d == 0 else ()), 4, *shape, dtype=torch.float64) for d in dims]
    options: Any = {"example_inputs": tuple(torch.rand(4, *shape).double() for _ in dims), "time_dim": time_dim}
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None, **options)
    net = snnfx.convert(model, checkpoint=checkpoint, **options)
    assert_equal_training(trained(net, *sequences), trained(plain, *sequences))


def test_dropout_is_replayed() -> None:
    model = with_statistics(dropout=0.5).double()
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None)
    net = snnfx.convert(model, checkpoint="regions")
    x_seq = torch.rand(6, 2, 2, 6, 6, dtype=torch.float64)
    before = torch.get_rng_state()
    assert_equal_training(trained(net, x_seq), trained(plain, x_seq))
    torch.set_rng_state(before)
    net(x_seq).sum().backward()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    plain(x_seq).sum().backward()
    assert torch.equal(after, torch.get_rng_state())  # backward draws nothing


@pytest.mark.parametrize("cell", [nn.GRU, nn.RNN])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_weights_of_recurrent_layers_get_their_gradient(cell: Any, checkpoint: int | str) -> None:
    class Recurrent(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.lif = cell(5, 6), neuron.LIFNode()
            self.register_memory("h", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = x.new_zeros(1, x.shape[0], 6)
            y, self.h = self.cell(x.unsqueeze(0), self.h)
            return self.lif(y[0])  # type: ignore[no-any-return]

    model = Recurrent().double()
    x_seq = torch.rand(5, 3, 5, dtype=torch.float64)
    plain = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0], checkpoint=None)
    net = snnfx.convert(model, example_inputs=x_seq[0], checkpoint=checkpoint)
    expected = trained(plain, x_seq)
    assert all(g.any() for g in expected[2:6])
    assert_equal_training(trained(net, x_seq), expected)


@pytest.mark.parametrize("checkpoint", ["selective", "regions"])
def test_an_empty_batch_is_not_recomputed(checkpoint: str) -> None:
    net = snnfx.convert(with_statistics(), checkpoint=checkpoint)
    assert net(torch.rand(3, 0, 2, 6, 6)).shape == (3, 0, 3)


@pytest.mark.parametrize("checkpoint", ["selective", "regions", 3])
def test_recomputation_restores_the_settings_of_forward(checkpoint: int | str) -> None:
    def annealed(checkpoint: int | str | None) -> list[Tensor]:
        torch.manual_seed(0)
        model = without_statistics().double()
        net = snnfx.convert(model, checkpoint=checkpoint)
        x_seq = torch.rand(7, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
        total = torch.zeros((), dtype=torch.float64)
        for threshold, reset in ((0.5, 0.0), (0.9, -0.2), (0.6, None)):
            model[1].v_threshold, model[1].v_reset = threshold, reset
            total = total + net(x_seq).square().sum()
        model[1].v_threshold, model[1].v_reset = 0.7, 0.1
        total.backward()
        assert (model[1].v_threshold, model[1].v_reset) == (0.7, 0.1)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]

    assert_equal_training(annealed(checkpoint), annealed(None))


def test_threads_train_the_same_net() -> None:
    model = with_statistics().double().eval()
    net = snnfx.convert(model, checkpoint="regions")
    x_seq = torch.rand(5, 2, 2, 6, 6, dtype=torch.float64)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(net(x_seq).sum(), parameters)
    wrong: list[int] = []

    def train(number: int) -> None:
        for _ in range(20):
            found = torch.autograd.grad(net(x_seq).sum(), parameters, allow_unused=True)
            if any(g is None or not torch.equal(g, e) for g, e in zip(found, expected, strict=True)):
                wrong.append(number)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_dropout_masks_shared_by_all_steps_are_replayed(checkpoint: int | str) -> None:
    layer = pytest.importorskip("spikingjelly.activation_based.layer")
    model = nn.Sequential(
        nn.Linear(5, 8), neuron.LIFNode(v_threshold=0.3), layer.Dropout(0.5), nn.Linear(8, 3)
    ).double()
    x_seq = torch.rand(7, 3, 5, dtype=torch.float64) * 3
    plain = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0], checkpoint=None)
    net = snnfx.convert(model, example_inputs=x_seq[0], checkpoint=checkpoint)
    assert_equal_training(trained(net, x_seq), trained(plain, x_seq))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_second_derivatives_are_refused_and_not_zero(checkpoint: int | str) -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(4, 4), nn.Softplus(), neuron.LeakyIntegrator()), checkpoint=checkpoint)
    x_seq = torch.rand(6, 3, 4, requires_grad=True)
    with pytest.raises(InputError, match="SNNFX316"):
        torch.autograd.grad(net(x_seq).sum(), x_seq, create_graph=True)


def test_dropout_in_chunks_of_time_is_replayed() -> None:
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), neuron.LIFNode(), nn.Linear(64, 2)).double()
    net = snnfx.convert(model, checkpoint=2, lower=None)
    x_seq = torch.rand(6, 3, 5, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return net(x_seq).sum()

    loss().backward()
    a = model[0].weight.grad.clone()
    model.zero_grad()
    loss().backward()
    assert torch.equal(a, model[0].weight.grad)


@pytest.mark.parametrize("steps", [1, 2, 4, 100])
def test_state_is_carried_across_checkpoints(steps: int) -> None:
    model = without_statistics().double()
    net = snnfx.convert(model, checkpoint=steps)
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None)
    x_seq = torch.rand(9, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        _, first = plain.run(x_seq[:2])
    y, state = net.run(x_seq, state=first)
    expected, expected_state = plain.run(x_seq, state=first)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    (y.sum() + state["1.v"].sum()).backward()
    (expected.sum() + expected_state["1.v"].sum()).backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_gradient_reaches_the_initial_state() -> None:
    model = without_statistics().double()
    x_seq = torch.rand(6, 3, 5, dtype=torch.float64)
    _, state = snnfx.convert(model).run(x_seq)
    found = []
    for checkpoint in (None, "regions", 2):
        leaves = {name: value.detach().requires_grad_() for name, value in state.items()}
        y, _ = snnfx.convert(model, checkpoint=checkpoint).run(x_seq, state=leaves)
        y.square().sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for others in found[1:]:
        assert_equal_training(others, found[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("reduce", ["mean", "sum", "last"])
def test_checkpoints_of_the_state_work_with_reductions(reduce: str) -> None:
    model = without_statistics().double()
    x_seq = torch.rand(7, 3, 5, dtype=torch.float64)
    plain = snnfx.convert(copy.deepcopy(model), reduce=reduce, checkpoint=None)
    assert_equal_training(trained(snnfx.convert(model, reduce=reduce, checkpoint=3), x_seq), trained(plain, x_seq))


def test_time_is_not_cut_where_statistics_go_over_it() -> None:
    with pytest.raises(InputError, match="SNNFX317.*`1`"):
        snnfx.convert(with_statistics(), checkpoint=2)
    per_step = snnfx.convert(with_statistics().double(), checkpoint=2, batch_norm="per_step")
    plain = snnfx.convert(copy.deepcopy(per_step.source), checkpoint=None, batch_norm="per_step")
    x_seq = torch.rand(5, 2, 2, 6, 6, dtype=torch.float64)
    assert_equal_training(trained(per_step, x_seq), trained(plain, x_seq))


def test_backward_uses_the_mode_of_forward() -> None:
    model = with_statistics().double()
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None)
    net = snnfx.convert(model, checkpoint="regions")
    x_seq = torch.rand(4, 2, 2, 6, 6, dtype=torch.float64)
    for side in (net, plain):
        loss = side(x_seq).sum()
        side.eval()
        loss.backward()
        assert not any(m.training for m in side.modules() if isinstance(m, nn.BatchNorm2d))
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_parameters_of_functional_call_get_the_gradient() -> None:
    model = without_statistics().double()
    net = snnfx.convert(model, checkpoint="regions")
    given = {name: (p.detach() * 1.5).requires_grad_() for name, p in net.named_parameters()}
    x_seq = torch.rand(4, 2, 5, dtype=torch.float64)
    torch.func.functional_call(net, given, (x_seq,)).sum().backward()
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.5)
    plain(x_seq).sum().backward()
    assert all(p.grad is None for p in net.parameters())
    for p, q in zip(given.values(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12)


def test_parameter_changed_before_backward_is_an_error() -> None:
    net = snnfx.convert(without_statistics(), checkpoint="regions")
    loss = net(torch.rand(4, 2, 5)).sum()
    with torch.no_grad():
        net.get_parameter("4.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_frees_everything() -> None:
    net = snnfx.convert(without_statistics(), checkpoint="regions")
    net(torch.rand(4, 2, 5)).sum().backward()  # kernels are made
    net.zero_grad()
    with AllocatedBytes() as meter:
        y = net(torch.rand(4, 2, 5))
        y.sum().backward()
        del y
        gc.collect()
        # The meter also sees the weights, through their views; their gradients are what is left.
        assert sum(meter.alive.values()) <= 2 * sum(p.numel() * 4 for p in net.parameters()) + 64
    assert all(isinstance(m.v, float) for m in net.modules() if isinstance(m, neuron.BaseNode))


def test_failing_allocation_names_the_region_and_a_remedy() -> None:
    class Huge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(3, 4), neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.fc(x)).unsqueeze(-1).expand(-1, -1, 2**50).contiguous()

    net = snnfx.convert(Huge())
    with pytest.raises(snnfx.errors.AllocationError, match=r"SNNFX507 .*\(fold_\d.*") as raised:
        net(torch.rand(2, 2, 3))
    assert "checkpoint" in raised.value.hint
    with torch.no_grad(), pytest.raises(snnfx.errors.AllocationError, match="chunk=16"):
        net(torch.rand(2, 2, 3))


def test_hooks_fire_once() -> None:
    model = without_statistics()
    net = snnfx.convert(model, checkpoint="regions")
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    net(torch.rand(4, 2, 5)).sum().backward()
    assert calls == [1]


def test_evaluation_and_no_grad_recompute_nothing() -> None:
    net = snnfx.convert(without_statistics(), checkpoint="regions")
    with torch.no_grad():
        assert net(torch.rand(4, 2, 5)).grad_fn is None


def allocated_after_forward(net: nn.Module, x_seq: Tensor) -> tuple[int, int]:
    """Bytes allocated between forward and backward, and at the peak."""
    gc.collect()
    with AllocatedBytes() as meter:
        loss = net(x_seq).sum()
        between = sum(meter.alive.values())
        loss.backward()
    net.zero_grad()
    return between, meter.peak


def test_regions_need_less_memory_than_plain_training() -> None:
    x_seq = torch.rand(16, 4, 2, 6, 6)
    model = with_statistics()
    plain, _ = allocated_after_forward(snnfx.convert(copy.deepcopy(model), checkpoint=None, lower=None), x_seq)
    between, _ = allocated_after_forward(snnfx.convert(model, checkpoint="regions", lower=None), x_seq)
    assert between < plain / 3


def test_checkpoints_of_the_state_do_not_grow_with_the_insides_of_the_net() -> None:
    model = nn.Sequential(nn.Linear(5, 200), neuron.LIFNode(), nn.Linear(200, 200), neuron.LIFNode(), nn.Linear(200, 2))
    net = snnfx.convert(model, checkpoint=8, lower=None)
    short, short_peak = allocated_after_forward(net, torch.rand(16, 4, 5))
    long, long_peak = allocated_after_forward(net, torch.rand(64, 4, 5))
    state = 2 * 4 * 200 * 4
    assert long - short <= 6 * state + 48 * 4 * 2 * 4 * 2 + 2**12  # six more borders, and the outputs
    assert long_peak < 1.5 * short_peak


def test_spikes_are_saved_in_bits() -> None:
    wide = nn.Sequential(nn.Linear(5, 800, bias=False), neuron.LIFNode(), nn.Linear(800, 2, bias=False))
    x_seq = torch.rand(8, 4, 5)
    spikes = 8 * 4 * 800
    between, _ = allocated_after_forward(snnfx.convert(wide, checkpoint="selective", lower=None), x_seq)
    state_and_weights = 2 * (4 * 800 * 4)
    # The current of the neuron in four bytes, its spikes in a bit.
    assert 4 * spikes + spikes // 8 <= between <= 4 * spikes + spikes // 8 + state_and_weights
    between, _ = allocated_after_forward(snnfx.convert(wide, checkpoint="regions", lower=None), x_seq)
    # The current is recomputed.
    assert spikes // 8 <= between <= spikes // 8 + state_and_weights


@pytest.mark.parametrize("largest", [1, 2, 3, 9, 255])
@pytest.mark.parametrize("shape", [(3, 2, 5), (4, 8), (2, 3, 4, 6, 5), (1, 1), (5, 17)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_packing_is_exact(largest: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x_seq = torch.randint(0, largest + 1, shape).to(dtype)
    packed = pack(x_seq, largest)
    assert torch.equal(unpack(packed), x_seq) and unpack(packed).dtype == dtype
    assert packed.data.numel() == packed_bytes(shape, largest)
    assert torch.equal(unpack(packed.steps(1, 3)), x_seq[1:3])


def test_packing_keeps_the_memory_format() -> None:
    x_seq = torch.randint(0, 2, (3, 2, 5, 6, 4)).float().permute(0, 1, 4, 2, 3)
    assert unpack(pack(x_seq, 1)).stride() == x_seq.stride()
    assert torch.equal(unpack(pack(x_seq, 1)), x_seq)


def largest_of(model: nn.Module, example: Tensor) -> dict[str, int]:
    """What is proven about the output of each module, by its name."""
    program = snnfx.convert(model, example_inputs=example).program
    proven = infer_integer_ranges(program).largest
    return {name: proven[n] for n in program.graph.nodes for name in n.meta.get("returned_by", ()) if n in proven}


def test_spikes_are_proven_through_pooling_and_reshaping() -> None:
    proven = largest_of(with_statistics().eval(), torch.rand(2, 2, 6, 6))
    assert {name: proven[name] for name in ("2", "3", "4", "7", "8")} == {"2": 1, "3": 1, "4": 1, "7": 1, "8": 1}
    assert not {"0", "1", "5", "6", "9"} & set(proven)


def test_sums_of_spikes_are_proven_with_their_bound() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = neuron.LIFNode(), neuron.IFNode(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.a(x) + self.b(x)) + self.a.v_threshold

    program = snnfx.convert(Adding()).program
    assert sorted(infer_integer_ranges(program).largest.values()) == [1, 1, 2]


@pytest.mark.parametrize(
    "module",
    [
        neuron.LeakyIntegrator(),
        neuron.LIFNode(surrogate_function=snnfx.surrogate.Sigmoid(spiking=False)),
        neuron.LIFNode(surrogate_function=torch.sigmoid),
    ],
)
def test_values_that_are_not_spikes_are_not_proven(module: nn.Module) -> None:
    assert "1" not in largest_of(nn.Sequential(nn.Linear(3, 3), module, nn.Linear(3, 1)), torch.rand(2, 3))


class Third(surrogate.Sigmoid):
    def forward(self, x: Tensor) -> Tensor:
        return 0.3 * super().forward(x)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, given, result: 0.3 * result)
    return layer


@pytest.mark.parametrize(
    "layers",
    [
        [hooked(neuron.LIFNode()), nn.MaxPool2d(2)],
        [neuron.LIFNode(), hooked(nn.MaxPool2d(2))],
        [neuron.LIFNode(surrogate_function=Third()), nn.MaxPool2d(2)],
        [neuron.LIFNode(), type("Halved", (nn.MaxPool2d,), {"forward": lambda self, x: x[..., ::2, ::2] * 0.5})(2)],
    ],
)
def test_spikes_that_are_changed_are_not_saved_in_bits(layers: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *layers, nn.Conv2d(3, 2, 3), neuron.LIFNode()).double()
    x_seq = torch.rand(4, 2, 2, 8, 8, dtype=torch.float64) * 3
    plain = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0], checkpoint=None)
    net = snnfx.convert(model, example_inputs=x_seq[0], checkpoint="regions")
    assert_equal_training(trained(net, x_seq), trained(plain, x_seq))


def test_indices_of_a_pool_are_not_spikes() -> None:
    class Unpooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lif, self.last = nn.Conv2d(2, 3, 3, padding=1), neuron.LIFNode(), nn.Conv2d(3, 2, 1)
            self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y, indices = self.pool(self.lif(self.conv(x)))
            return self.last(self.unpool(y * 0.5, indices))  # type: ignore[no-any-return]

    model, x_seq = Unpooled().double(), torch.rand(4, 2, 2, 8, 8, dtype=torch.float64) * 3
    plain = snnfx.convert(copy.deepcopy(model), example_inputs=x_seq[0], checkpoint=None)
    net = snnfx.convert(model, example_inputs=x_seq[0], checkpoint="regions")
    assert_equal_training(trained(net, x_seq), trained(plain, x_seq))


@pytest.mark.parametrize("name", ["LIAFNode", "ILIFNode", "TernaryIFNode"])
def test_neurons_that_fire_other_numbers_are_not_proven(name: str) -> None:
    from snnfx.analysis.integer_ranges import fires_spikes

    neurons = pytest.importorskip("spikingjelly.activation_based.neuron")
    if not hasattr(neurons, name):
        pytest.skip(f"this SpikingJelly has no {name}")
    options = {"act": torch.nn.ReLU(), "threshold_related": False} if name == "LIAFNode" else {}
    assert not fires_spikes(getattr(neurons, name)(**options))


def test_neuron_that_stops_spiking_after_conversion_is_saved_unpacked() -> None:
    model = nn.Sequential(nn.Linear(3, 3), neuron.LIFNode(), nn.Linear(3, 2)).double()
    net = snnfx.convert(model, checkpoint="regions")
    x_seq = torch.rand(5, 2, 3, dtype=torch.float64)
    net(x_seq).sum().backward()
    net.zero_grad()
    model[1].surrogate_function.spiking = False
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None)
    assert_equal_training(trained(net, x_seq), trained(plain, x_seq))


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_compiled_net_with_hooks_warns_that_it_ignores_checkpoint(checkpoint: int | str) -> None:
    torch.compiler.reset()
    net = snnfx.convert(without_statistics().double(), checkpoint=checkpoint)
    next(net.source.children()).register_forward_hook(lambda module, given, result: None)
    plain = snnfx.convert(copy.deepcopy(net.source), checkpoint=None)
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x_seq = torch.rand(7, 2, 5, dtype=torch.float64)
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX506"):
        compiled(x_seq)
    assert_equal_training(trained(compiled, x_seq), trained(plain, x_seq))


@pytest.mark.parametrize("lower", ["auto", None])
def test_recomputation_restores_autocast(lower: str | None) -> None:
    model = with_statistics()
    plain = snnfx.convert(copy.deepcopy(model), checkpoint=None, lower=lower)
    net = snnfx.convert(model, checkpoint="regions", lower=lower)
    x_seq = torch.rand(6, 2, 2, 6, 6)

    def gradients(one: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = one(x_seq)
        y.float().square().sum().backward()  # outside of it, as people do
        return [y.detach(), *(p.grad for p in one.parameters() if p.grad is not None)]

    found, expected, without = gradients(net), gradients(plain), trained(copy.deepcopy(plain), x_seq)
    assert found[0].dtype == torch.bfloat16 and not torch.equal(found[0].float(), without[0])
    assert len(found) == len(expected)
    # The bias in front of a BatchNorm has no gradient but what rounding leaves.
    scale = max(float(b.abs().max()) for b in expected[1:])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * scale)


def test_chunks_of_time_restore_autocast() -> None:
    model = without_statistics()
    plain, net = snnfx.convert(copy.deepcopy(model), checkpoint=None), snnfx.convert(model, checkpoint=3)
    x_seq = torch.rand(7, 3, 5)
    for one in (net, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = one(x_seq).float().square().sum()
        loss.backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0.02, atol=0.02 * float(q.grad.abs().max()))


def test_transforms_of_torch_func_work() -> None:
    net = snnfx.convert(without_statistics().double(), checkpoint="regions")
    x_seq = torch.rand(4, 2, 5, dtype=torch.float64)
    found = torch.func.grad(lambda x: net(x).sum())(x_seq)
    leaf = x_seq.clone().requires_grad_()
    net(leaf).sum().backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpoint", [0, -1, True, "layers", 2.0])
def test_invalid_checkpoint_is_refused(checkpoint: Any) -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.convert(without_statistics(), checkpoint=checkpoint)
