"""Regions at run time: BatchNorm per step, delays, maps, and the operator that stands for a region in compiled code."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import PassError, SnnfxWarning
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.ops.sequence_functions import (
    delay_one_step,
    repeat_over_time,
    select_state,
    stack_steps,
    time_steps,
)
from snnfx.ops.step_batch_norm import batch_norm_per_step
from snnfx.regions import step_lowering
from snnfx.regions.operator import run_loop_as_operator, run_map_as_operator
from snnfx.regions.region_modules import LoopRegion, MapRegion
from snnfx.regions.sequence_region import SequenceRegion, region_of_handle, tensors_of
from snnfx.sandbox import internal_faults
from support.stepping import assert_same, run_stepped

T, N, C = 4, 3, 5

BATCH_NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(C), (N, C)),
    "1d with length": (lambda: nn.BatchNorm1d(C), (N, C, 6)),
    "2d": (lambda: nn.BatchNorm2d(C), (N, C, 4, 4)),
    "3d": (lambda: nn.BatchNorm3d(C), (N, C, 2, 3, 2)),
    "cumulative average": (lambda: nn.BatchNorm1d(C, momentum=None), (N, C)),
    "momentum 0.3": (lambda: nn.BatchNorm2d(C, momentum=0.3, eps=1e-2), (N, C, 2, 2)),
    "not affine": (lambda: nn.BatchNorm1d(C, affine=False), (N, C)),
    "no running statistics": (lambda: nn.BatchNorm1d(C, track_running_stats=False), (N, C)),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("already_seen", [0, 2])
def test_batch_norm_per_step_is_t_calls(name: str, training: bool, already_seen: int) -> None:
    make, shape = BATCH_NORMS[name]
    module, reference = make().double(), make().double()
    for _ in range(already_seen):
        module(torch.rand(shape, dtype=torch.float64))
    if module.affine:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    reference.load_state_dict(module.state_dict())
    module.train(training)
    reference.train(training)
    x_seq = torch.randn((T, *shape), dtype=torch.float64, requires_grad=True)
    weights = torch.randn((T, *shape), dtype=torch.float64)
    expected = torch.stack([reference(x) for x in x_seq.unbind(0)])
    expected_grads = torch.autograd.grad((expected * weights).sum(), [x_seq, *reference.parameters()])
    actual = batch_norm_per_step(x_seq, module)
    actual_grads = torch.autograd.grad((actual * weights).sum(), [x_seq, *module.parameters()])
    assert_same(actual, expected)
    assert_same(actual_grads, expected_grads, 1e-8)
    assert_same(dict(module.named_buffers()), dict(reference.named_buffers()))


def test_batch_norm_per_step_calls_hooks_at_each_step_and_raises_what_torch_raises() -> None:
    module, seen = nn.BatchNorm1d(C), []
    handle = module.register_forward_hook(lambda *args: seen.append(args[1][0].shape))
    batch_norm_per_step(torch.rand(T, N, C), module)
    assert seen == [torch.Size((N, C))] * T
    handle.remove()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm_per_step(torch.rand(T, 1, C), module)
    with pytest.raises(ValueError, match="2D or 3D"):
        batch_norm_per_step(torch.rand(T, N, C, 2, 2), module)


def test_batch_norm_per_step_in_half_precision_keeps_its_dtype() -> None:
    module = nn.BatchNorm1d(C).to(torch.bfloat16)
    y = batch_norm_per_step(torch.rand(T, N, C, dtype=torch.bfloat16), module)
    assert y.dtype == torch.bfloat16
    assert module.running_mean.dtype == torch.bfloat16


# -- small runtime functions -------------------------------------------------------------------------------------------


def test_steps_that_start_as_a_number_or_a_smaller_tensor_are_stacked_like_the_later_ones() -> None:
    last = torch.ones(2, 3, dtype=torch.float64)
    cpu = torch.device("cpu")
    assert_same(stack_steps([0.5, last, last], cpu)[0], torch.full((2, 3), 0.5, dtype=torch.float64))
    assert stack_steps([torch.zeros(3, dtype=torch.float64), last], cpu).shape == (2, 2, 3)
    assert_same(stack_steps([1, 2, 3], cpu), torch.tensor([1, 2, 3]))
    assert stack_steps([1, 2.5], cpu).dtype == torch.float64


def test_a_delay_begins_with_the_given_state_or_the_initial_value() -> None:
    following, time = torch.arange(6.0).view(3, 2), torch.arange(3)
    assert delay_one_step(following, None, 7.0, time).tolist() == [[7, 7], [0, 1], [2, 3]]
    assert delay_one_step(following, (torch.tensor([8.0, 9.0]),), 7.0, time).tolist() == [[8, 9], [0, 1], [2, 3]]
    assert delay_one_step(2.0, None, torch.zeros(2), time).tolist() == [[0, 0], [2, 2], [2, 2]]
    assert delay_one_step(2, None, 0.5, time).tolist() == [0.5, 2, 2]
    assert delay_one_step(following[:1], None, 7.0, time[:1]).tolist() == [[7, 7]]


def test_an_invariant_value_is_repeated_as_a_view() -> None:
    value, time = torch.rand(2, 3), time_steps(torch.rand(T, 1))
    assert time.tolist() == list(range(T))
    repeated = repeat_over_time(value, time)
    assert repeated.shape == (T, 2, 3) and repeated.data_ptr() == value.data_ptr()
    assert repeat_over_time(None, time) is None


def test_the_reset_state_is_none() -> None:
    assert select_state(None, ("a",)) is None
    assert select_state({"a": 1, "b": 2}, ("b", "a")) == (2, 1)


# -- regions of nets ---------------------------------------------------------------------------------------------------


def regions_of(net: snnfx.Net, kind: type[SequenceRegion]) -> list[Any]:
    return [module for module in net.modules() if type(module) is kind]


class Recurrent(snnfx.MemoryModule):
    """Two slots, a parameter and a module on the cycle."""

    def __init__(self) -> None:
        super().__init__()
        self.input, self.back = nn.Linear(C, C), nn.Linear(C, C)
        self.gain = nn.Parameter(torch.rand(C))
        self.lif = neuron.LIFNode(tau=2.0)
        self.register_memory("trace", 0.0)
        self.register_memory("spike", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        if self.spike is None:
            self.spike = torch.zeros_like(x)
        self.trace = 0.8 * self.trace + self.gain * self.spike
        self.spike = self.lif(x + self.back(self.spike) - self.trace + 0.5)
        return self.spike + self.trace


def loop_of(model: nn.Module) -> tuple[LoopRegion, tuple[Any, ...]]:
    net = snnfx.convert(model)
    (loop,) = regions_of(net, LoopRegion)
    loop.owner = [net]  # keeps the model alive for `resolve`
    constants = tuple(
        net.program.resolve(str(key.target)) if hasattr(key, "target") else net.program.resolve(key)
        for key in _constants_of(net)
    )
    return loop, constants


def _constants_of(net: snnfx.Net) -> Sequence[Any]:
    from snnfx.emit.region_builder import RegionBuilder

    (region,) = [r for r in net.regions if r.kind == "loop"]
    builder = RegionBuilder(net.program, region.nodes, region.slots)
    builder.add_initial_values(region.slots)
    return list(builder.constants)


def trained_tensors_of(constants: Sequence[Any]) -> list[Tensor]:
    modules = [c for c in constants if isinstance(c, nn.Module)]
    return [p for m in modules for p in m.parameters()] + [c for c in constants if isinstance(c, Tensor)]


@pytest.mark.parametrize("given", [False, True], ids=["reset", "given"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("through_state", [False, True], ids=["outputs", "final-state"])
def test_a_loop_as_operator_has_the_values_and_gradients_of_stepping(
    given: bool, steps: int, through_state: bool
) -> None:
    loop, constants = loop_of(Recurrent().double())
    x_seq = torch.randn(steps, N, C, dtype=torch.float64, requires_grad=True)
    inputs = (x_seq,)
    state = tuple(torch.randn(N, C, dtype=torch.float64, requires_grad=True) for _ in range(3)) if given else None
    leaves = [x_seq, *trained_tensors_of(constants), *(state or ())]
    results = []
    for run in (loop.multi_step, lambda *a: run_loop_as_operator(loop, *a)):
        y, final = run(inputs, state, constants)
        generator = torch.Generator().manual_seed(3)
        picked = final if through_state else y
        loss = sum((torch.rand(v.shape, generator=generator, dtype=v.dtype) * v).sum() for v in picked)
        results.append((y, final, torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)))
    assert_same(results[1], results[0])


def test_the_gradient_of_a_loop_is_that_of_finite_differences() -> None:
    class Smooth(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.back = nn.Linear(2, 2)
            self.register_memory("v", 0.1)

        def forward(self, x: Tensor) -> Tensor:
            self.v = torch.tanh(self.back(0.5 * self.v + x))
            return self.v

    loop, constants = loop_of(Smooth().double())
    x_seq = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)

    def run(x_seq: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        y, final = run_loop_as_operator(loop, (x_seq,), (v,), constants)
        return (*y, *final)

    assert torch.autograd.gradcheck(run, (x_seq, v))


def test_the_operator_satisfies_torchs_checks() -> None:
    loop, constants = loop_of(Recurrent().double())
    x_seq = torch.randn(3, N, C, dtype=torch.float64, requires_grad=True)

    tensors = tensors_of(constants)
    needs = [t.requires_grad for t in (x_seq, *tensors)]
    arguments = (loop.handle, [x_seq], tensors, [], False, needs)
    torch.library.opcheck(torch.ops.snnfx.run_region.default, arguments)
    state = [torch.zeros(N, C, dtype=torch.float64) for _ in range(3)]
    given = (*arguments[:3], state, True, [*needs, False, False, False])
    torch.library.opcheck(torch.ops.snnfx.run_region.default, given)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y - y.mean(0)


def test_a_map_as_operator_has_the_values_and_gradients_of_stepping() -> None:
    model = Centred().double()
    net = snnfx.convert(model)
    (region,) = regions_of(net, MapRegion)
    x_seq = torch.randn(T, N, C, dtype=torch.float64, requires_grad=True)
    inputs = tuple(x_seq for _ in range(len(region.step.graph.find_nodes(op="placeholder"))))
    weights = torch.rand(T, N, C, dtype=torch.float64)
    results = []
    for run in (region.map_steps, lambda *a: run_map_as_operator(region, *a)):
        (y,) = run(inputs, ())
        results.append((y, torch.autograd.grad((weights * y).sum(), x_seq)))
    assert_same(results[1], results[0])
    assert_same(results[0][0], torch.stack([x - x.mean(0) for x in x_seq]))
    given = (region.handle, list(inputs), [], [], False, [True] * len(inputs))
    torch.library.opcheck(torch.ops.snnfx.run_region.default, given)


class ScaledByTime(nn.Module):
    """The factor of a step has no batch dimension, so its product with a parameter is mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return x * (1 - self.scale * factor.sigmoid())


def test_a_map_of_elementwise_operations_equals_stepping_without_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ScaledByTime().double()
    net = snnfx.convert(model, example_inputs=(torch.rand(N, C).double(), torch.rand(1, C).double()))
    x_seq, factors = torch.randn(T, N, C).double(), torch.randn(T, 1, C).double().requires_grad_()
    expected = torch.stack([model(x, f) for x, f in zip(x_seq, factors, strict=True)])
    wanted = torch.autograd.grad(expected.square().sum(), (factors, model.scale))
    assert regions_of(net, MapRegion)
    monkeypatch.setattr(torch, "vmap", lambda *_, **__: pytest.fail("vmap"))
    actual = net(x_seq, factors)
    assert_same(actual, expected)
    assert_same(torch.autograd.grad(actual.square().sum(), (factors, model.scale)), wanted)


@pytest.mark.parametrize("shape", [(), (C,), (2, 1, C)])
def test_a_map_of_operands_of_other_ranks_equals_stepping(shape: tuple[int, ...]) -> None:
    model = ScaledByTime().double()
    x_seq, factors = torch.randn(T, N, C).double(), torch.randn(T, *shape).double()
    net = snnfx.convert(model, example_inputs=(x_seq[0], factors[0]))
    expected = torch.stack([model(x, f) for x, f in zip(x_seq, factors, strict=True)])
    assert_same(net(x_seq, factors), expected)


def test_a_map_that_vmap_refuses_is_stepped_with_one_warning() -> None:
    class Refused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.nonzero().sum() + x.mean(0)

    net, x_seq = snnfx.convert(Refused()), torch.rand(T, N, C)
    with pytest.warns(SnnfxWarning, match="SNNFX504.*vmap refused"):
        y = net(x_seq)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(net(x_seq), y)
    assert_same(y, run_stepped(net.source, x_seq).outputs)


def test_a_fault_of_the_model_in_a_map_is_raised_as_it_is() -> None:
    net = snnfx.convert(Centred())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(torch.rand(T, N, C + 1))


def test_a_region_of_a_net_that_is_gone_is_named() -> None:
    net = snnfx.convert(nn.Sequential(neuron.LIFNode(), nn.Linear(C, C)))
    (loop,) = regions_of(net, LoopRegion)
    handle = loop.handle
    assert region_of_handle(handle) is loop
    del net, loop
    gc.collect()
    with pytest.raises(PassError, match="SNNFX503.*loop"):
        region_of_handle(handle)


def test_a_copied_net_runs_its_own_regions() -> None:
    import copy

    net = snnfx.convert(Recurrent())
    other = copy.deepcopy(net)
    handles = [{r.handle for r in regions_of(n, LoopRegion)} for n in (net, other)]
    assert not handles[0] & handles[1]


def test_a_region_graph_has_no_parameters_of_its_own() -> None:
    net = snnfx.convert(Recurrent())
    (loop,) = regions_of(net, LoopRegion)
    assert list(loop.state_dict()) == []
    assert list(loop.parameters()) == []


def test_a_map_that_falls_back_prints_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    class Fading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.t += 0.5
            return x * math.exp(-self.t)

    net = snnfx.convert(Fading())
    x_seq = torch.rand(5, 2, 3)
    with pytest.warns(SnnfxWarning, match="SNNFX504"):
        y_seq = net(x_seq)
    torch.testing.assert_close(y_seq, torch.stack([x * math.exp(-0.5 * (t + 1)) for t, x in enumerate(x_seq)]))
    assert capfd.readouterr().err == ""


# -- faults of snnfx itself ------------------------------------------------------------------------------------------


def kernel_net() -> Any:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    return snnfx.convert(nn.Sequential(neuron.LIFNode()))


def test_an_internal_fault_in_lowering_surfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(recording: Any) -> Any:
        raise KeyError("mistake")

    monkeypatch.setattr(step_lowering, "translate", broken)
    net = kernel_net()
    with pytest.raises(KeyError, match="mistake"):
        net(torch.rand(3, N, C))
    monkeypatch.setattr(internal_faults, "STRICT", False)
    with pytest.warns(SnnfxWarning, match="SNNFX509 a loop runs step by step"):
        y = net(torch.rand(3, N, C))
    assert y.shape == (3, N, C)
    (reason,) = snnfx.explain(net).kernels
    assert "failed to lower its step" in reason


def test_an_error_of_the_model_while_its_step_is_recorded_is_no_internal_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*args: Any) -> Any:
        raise ValueError("not now")

    net = kernel_net()
    (loop,) = [m for m in net.modules() if isinstance(m, LoopRegion)]
    assert loop.kernels is not None
    monkeypatch.setattr(loop.kernels.step_lowering, "step", SimpleNamespace(forward=refuses))
    assert net(torch.rand(3, N, C)).shape == (3, N, C)
    assert "recording its step raised ValueError: not now" in loop.kernels.refusal
