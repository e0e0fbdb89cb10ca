"""Hints of options, of memory and of fallbacks while a net runs: each leads to the result of the stepped model."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import errors, neuron
from snnfx.errors import SnnfxWarning
from snnfx.lowering.batch_norm.training_norm import GradientOwner, channel_factors
from snnfx.lowering.choices import remembered
from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.events import crossovers, layer_decisions
from snnfx.lowering.events.event_source import SOURCES
from snnfx.lowering.events.layer_decisions import latest_decision
from snnfx.lowering.pooling.max_pool import max_pool
from snnfx.passes import Normalize, Partition, PassManager, RemoveDeadCode
from snnfx.regions.sequence_region import region_of_handle
from snnfx.runtime.net_operator import NetOperator
from snnfx.sandbox import internal_faults
from support.hints import refused, silent, warned
from support.stepping import assert_converts, assert_same, fresh_copy, run_net, run_stepped

T, N, C = 6, 2, 3


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape or (T, N, C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def small(training: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    lif = neuron.LIFNode(tau=2.0, v_threshold=0.3)
    return nn.Sequential(nn.Linear(C, 4), lif, nn.Linear(4, 2)).train(training)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 4), nn.BatchNorm1d(4), neuron.LIFNode(tau=2.0, v_threshold=0.3))


def trains_as_stepped(net: Any) -> None:
    expected = run_stepped(net.source, sequence())
    found = run_net(net, sequence())
    assert_same(found.outputs, expected.outputs)
    assert_same(found.input_grads, expected.input_grads)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "accepted"),
    [("step_mode", {"m", "s"}), ("batch_norm", {"fold", "per_step"}), ("reduce", None), ("memory_format", {"auto"})],
)
def test_a_word_that_an_option_does_not_accept(option: str, accepted: set[str] | None) -> None:
    error = refused(
        "SNNFX309",
        "convert.py:_check_choice",
        "Choose one of ",
        lambda: snnfx.convert(small(), **{option: "x"}),
        names=f"{option}='x'",
    )
    words = {word.strip(" '.") for word in error.hint.removeprefix("Choose one of").split(",")}
    assert accepted is None or words == accepted
    for word in words:
        snnfx.convert(small(), **{option: word})


def test_a_chunk_that_is_not_a_length() -> None:
    refused(
        "SNNFX309",
        "memory/chunk_plan.py:check_chunk_option",
        'Use a number of time steps, None, or "auto".',
        lambda: snnfx.convert(small(), chunk="x"),
    )
    for chunk in (2, None, "auto"):
        assert_converts(small(training=False), sequence(), chunk=chunk)


def test_a_chunk_below_one() -> None:
    refused(
        "SNNFX302",
        "memory/chunk_plan.py:check_chunk_option",
        "A chunk has at least one time step.",
        lambda: snnfx.convert(small(), chunk=0),
    )
    assert_converts(small(training=False), sequence(), chunk=1)


def test_a_checkpoint_of_another_kind() -> None:
    refused(
        "SNNFX309",
        "memory/checkpoint_option.py:check_checkpoint_option",
        'Use a number of time steps above 0, "selective", "regions", "auto" or None.',
        lambda: snnfx.convert(small(), checkpoint=0),
    )
    for checkpoint in (2, "selective", "regions", "auto", None):
        trains_as_stepped(snnfx.convert(small(), checkpoint=checkpoint))


@pytest.mark.parametrize("budget", [-1, "much"])
def test_a_budget_that_is_not_a_size(budget: Any) -> None:
    refused(
        "SNNFX309",
        "memory/budget.py:read_memory_budget",
        'Use bytes (an int, or text such as "512MiB"), a fraction of the free memory (a float up to 1.0), or None.',
        lambda: snnfx.convert(small(), memory_budget=budget),
    )
    for accepted in (2**29, "512MiB", 0.5, None):
        trains_as_stepped(snnfx.convert(small(), memory_budget=accepted))


def test_a_budget_above_the_free_memory() -> None:
    refused(
        "SNNFX309",
        "memory/budget.py:read_memory_budget",
        'A float is a fraction of the free memory, up to 1.0. For bytes use an int, int(2e9), or text, "2GB".',
        lambda: snnfx.convert(small(), memory_budget=2e9),
    )
    assert snnfx.convert(small(), memory_budget=int(2e9)).options.memory_budget == 2 * 10**9
    assert snnfx.convert(small(), memory_budget="2GB").options.memory_budget == 2 * 10**9


def test_statistics_over_time_and_a_checkpoint() -> None:
    refused(
        "SNNFX317",
        "memory/checkpoint_option.py:refuse_statistics_over_time",
        'Use checkpoint="regions" (it does not cut time), batch_norm="per_step", or net.eval().',
        lambda: snnfx.convert(normed(), checkpoint=2),
        names="`1`",
    )
    folded = run_net(snnfx.convert(normed(), checkpoint=None), sequence())
    found = run_net(snnfx.convert(normed(), checkpoint="regions"), sequence())
    assert_same(found.outputs, folded.outputs)
    assert_same(found.parameter_grads["0.weight"], folded.parameter_grads["0.weight"])
    trains_as_stepped(snnfx.convert(normed(), checkpoint=2, batch_norm="per_step"))
    trains_as_stepped(snnfx.convert(normed().eval(), checkpoint=2))


def test_changed_parameters_and_a_checkpoint() -> None:
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.w = nn.Linear(C, C), nn.Parameter(torch.ones(C))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.w.mul_(0.5)
            return self.fc(x) + self.w

    refused(
        "SNNFX317",
        "memory/checkpoint_option.py:refuse_changed_parameters",
        'Use checkpoint="regions", which saves the value of each step, or checkpoint=None.',
        lambda: snnfx.convert(Decays(), checkpoint=2),
        names="`w`",
    )
    for checkpoint in ("regions", None):
        assert_converts(Decays(), sequence(), checkpoint=checkpoint)


def test_a_checkpoint_that_exceeds_the_budget() -> None:
    x_seq = sequence(16, 16, C)
    net = snnfx.convert(small(), example_inputs=x_seq[0], checkpoint="regions", memory_budget=1000)
    warned(
        "SNNFX508",
        "memory/checkpoint_option.py:plan_checkpoint",
        "memory_budget is ",
        lambda: net(x_seq),
        names='Use checkpoint="auto", which respects the budget.',
    )
    with silent():
        net = snnfx.convert(small(), example_inputs=x_seq[0], checkpoint="auto", memory_budget=2**20)
        trains_as_stepped(net)


def test_a_checkpoint_of_a_compiled_net() -> None:
    torch.compiler.reset()
    model = small()
    model[2].register_forward_hook(lambda module, given, result: None)
    net = snnfx.convert(model, checkpoint="regions")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(sequence())
    assert [str(w.message)[:8] for w in caught if issubclass(w.category, SnnfxWarning)] == ["SNNFX506"]
    with silent():
        trains_as_stepped(net)
    warned(
        "SNNFX506",
        "memory/checkpoint_option.py:_warn_compiled_net_ignores_checkpoint",
        "Both options work if the net is not compiled.",
        compiled_warning,
    )


def compiled_warning() -> None:
    from snnfx.memory import checkpoint_option

    snnfx.errors._warned.clear()
    checkpoint_option._warn_compiled_net_ignores_checkpoint()


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(C, C), neuron.LIFNode(v_threshold=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lif(self.fc(x))
        return x * 2 if float(x.detach().sum()) > 1 else x


@pytest.mark.parametrize("training", [True, False])
def test_a_budget_of_a_net_that_reads_values(training: bool) -> None:
    model = ReadsValues().train(training)
    x = sequence()[0]

    def run() -> None:
        net = snnfx.convert(model, example_inputs=x, memory_budget=2**20)
        with torch.set_grad_enabled(training):
            net(sequence())

    warned(
        "SNNFX508",
        "memory/planning.py:_warn_of_unknown_bytes",
        " Set ",
        run,
        names='checkpoint="regions" or checkpoint=' if training else "chunk=",
    )
    with silent():
        options: dict[str, Any] = {"checkpoint": "regions"} if training else {"chunk": 2}
        trains_as_stepped(snnfx.convert(model, example_inputs=x, **options))


def test_a_budget_below_one_step() -> None:
    x_seq = sequence(T, 8, C)
    error = refused(
        "SNNFX318",
        "memory/planning.py:refuse_impossible_budget",
        " This is the minimum for one time step of example_inputs; ",
        lambda: snnfx.convert(small(), example_inputs=x_seq[0], memory_budget=100),
    )
    assert "snnfx.explain(model, example_inputs=x, T=...)" in error.hint
    budget = int(error.hint.split("memory_budget=")[1].split()[0])
    snnfx.convert(small(), example_inputs=x_seq[0], memory_budget=budget)
    peak = snnfx.explain(small(), example_inputs=x_seq[0], T=T).memory
    assert peak is not None and peak.training.peak > budget


def test_a_budget_that_a_call_exceeds() -> None:
    x_seq = sequence(64, 64, C)
    net = snnfx.convert(small(), memory_budget=5000)
    error = refused(
        "SNNFX318",
        "memory/planning.py:cannot_be_met",
        "Set memory_budget=",
        lambda: net(x_seq),
        names="memory_budget is",
    )
    budget = int(error.hint.split("memory_budget=")[1].split()[0])
    model = small()
    net = snnfx.convert(model, memory_budget=budget)
    assert_same(net(x_seq).detach(), run_stepped(model, x_seq).outputs)


def test_a_budget_of_an_evaluation_with_gradients() -> None:
    x_seq = sequence(64, 64, C)
    net = snnfx.convert(small(training=False), memory_budget=20_000)
    refused(
        "SNNFX318",
        "memory/planning.py:cannot_be_met",
        " For inference, call the net under `with torch.no_grad():`, which saves nothing for backward.",
        lambda: net(x_seq.requires_grad_()),
    )
    with torch.no_grad():
        assert_same(net(x_seq), run_stepped(net.source, x_seq).outputs)


class Huge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, 4)
        self.size = 2**50

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).unsqueeze(-1).expand(-1, -1, self.size).contiguous()


def test_out_of_memory() -> None:
    net = snnfx.convert(Huge())
    refused(
        "SNNFX507",
        "memory/allocation_failure.py:explain_allocation_failure",
        'Convert with checkpoint="regions" or a memory_budget, or use a smaller batch.',
        lambda: net(sequence()),
        names="fold_",
    )

    def infer() -> None:
        with torch.no_grad():
            net(sequence())

    refused(
        "SNNFX507",
        "memory/allocation_failure.py:explain_allocation_failure",
        "Call net.eval(), since only evaluation mode runs in chunks, and convert with chunk=",
        infer,
    )
    refused(
        "SNNFX507",
        "memory/allocation_failure.py:explain_allocation_failure",
        "memory_budget; or use a smaller batch.",
        infer,
    )
    for options in ({"checkpoint": "regions"}, {"memory_budget": 2**28}, {"chunk": 16}):
        trains_as_stepped(snnfx.convert(small(), **options))
        with torch.no_grad():
            net = snnfx.convert(small(training=False), **options)
            assert_same(net(sequence()), run_stepped(net.source, sequence()).outputs)


# -- kernels and regions -----------------------------------------------------------------------------------------------


def second_derivative(net: Any) -> None:
    x_seq = sequence().requires_grad_()
    torch.autograd.grad(net(x_seq).sum(), x_seq, create_graph=True)[0].sum().backward()


class Smooth(nn.Module):
    """A state without spikes, so that its second derivative is not zero."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C) if mixed else nn.Identity()
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        v = torch.zeros_like(x) if self.v is None else self.v
        self.v = torch.tanh(0.5 * self.fc(v) + x * x)
        return self.v


def is_twice_differentiable(model: nn.Module, **options: Any) -> None:
    results = []
    for run in (snnfx.convert(model, **options), None):
        x_seq = sequence().requires_grad_()
        clone = fresh_copy(model)
        y_seq = run(x_seq) if run is not None else torch.stack([clone(x) for x in x_seq])
        (first,) = torch.autograd.grad(y_seq.sum(), x_seq, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), x_seq)[0])
    assert_same(results[0], results[1])


def test_a_second_derivative_of_an_elementwise_kernel() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    refused(
        "SNNFX316",
        "lowering/elementwise/autograd_kernel.py:_KernelFunction.backward",
        "Convert with lower=None: PyTorch then runs the loop and differentiates twice.",
        lambda: second_derivative(snnfx.convert(Smooth(mixed=False))),
    )
    is_twice_differentiable(Smooth(mixed=False), lower=None)


def test_a_second_derivative_of_a_bound_call() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    x_seq, net = sequence(), snnfx.convert(small())
    for _ in range(3):  # the graph is bound in the second call, its loop in the third one
        net(x_seq)
    weight = net.source[0].weight
    refused(
        "SNNFX316",
        "lowering/elementwise/bound_step.py:_BoundFunction.backward",
        "Convert with lower=None: PyTorch then runs the loop and differentiates twice.",
        lambda: torch.autograd.grad(net(x_seq).sum(), weight, create_graph=True),
    )
    is_twice_differentiable(Smooth(mixed=False), lower=None)


def test_a_second_derivative_of_a_mixed_kernel() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    refused(
        "SNNFX316",
        "lowering/mixed/autograd_loop.py:_Loop.backward",
        "Convert with lower=None: PyTorch then runs the loop and differentiates twice.",
        lambda: second_derivative(snnfx.convert(Smooth(mixed=True))),
    )
    is_twice_differentiable(Smooth(mixed=True), lower=None)


def test_a_second_derivative_of_a_recomputed_segment() -> None:
    refused(
        "SNNFX316",
        "recompute/recomputation.py:_RecomputedSegment.backward",
        "Convert with checkpoint=None, lower=None: PyTorch then builds the autograd graph.",
        lambda: second_derivative(snnfx.convert(Smooth(mixed=False), checkpoint="regions", lower=None)),
    )
    is_twice_differentiable(Smooth(mixed=False), checkpoint=None, lower=None)


def test_hooks_in_a_recomputed_segment() -> None:
    model = small()
    net = snnfx.convert(model, checkpoint="regions")
    model[1].register_forward_hook(lambda module, given, result: None)
    warned(
        "SNNFX504",
        "recompute/recomputation.py:run_segment",
        " in the backward pass: a module in it has forward hooks, which would run twice. Autograd saves its ",
        lambda: net(sequence()),
        names="forward hooks",
    )
    trains_as_stepped(net)


def test_a_region_that_vmap_refuses() -> None:
    class Assigns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.nonzero().sum() + x.mean(0)

    class Fills(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - (x != 0).sum() + x.mean(0)

    net = snnfx.convert(Assigns())
    y_seq = warned(
        "SNNFX504",
        "regions/eager_regions.py:EagerMap.map_eagerly",
        "torch.vmap refused the region ",
        lambda: net(sequence()),
        names="its steps run one by one",
    )
    assert_same(y_seq, run_stepped(Assigns(), sequence()).outputs)
    with silent():
        assert_converts(Fills(), sequence())


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rare(neuron.LIFNode):
        def charge(self, v: Tensor, x: Tensor) -> Tensor:
            return v * 0.3171 + x * x * x

    monkeypatch.setattr(build, "_loaded", {})
    monkeypatch.setenv("SNNFX_KERNELS", "0")
    net = snnfx.convert(nn.Sequential(Rare()))
    y_seq = warned(
        "SNNFX505",
        "regions/region_kernels.py:RegionKernels.build_for",
        "loops run step by step in PyTorch: ",
        lambda: net(sequence()),
        names="SNNFX_KERNELS",
    )
    assert_same(y_seq, run_stepped(net.source, sequence()).outputs)
    monkeypatch.delenv("SNNFX_KERNELS")
    with silent():
        assert_converts(nn.Sequential(Rare()), sequence())


def test_a_compiler_that_fails_for_layers_of_spikes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    model = nn.Sequential(neuron.IFNode(v_threshold=3.0), nn.Linear(512, 1024))
    x_seq, net = 1.5 * torch.rand(8, 8, 512), snnfx.convert(model).eval()
    expected = run_stepped(model, x_seq).outputs
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.delenv("SNNFX_MEASURE", raising=False)
    monkeypatch.setattr(crossovers.REMEMBERED, "get", lambda *_: 1.0)
    monkeypatch.setattr(crossovers.REMEMBERED, "_known", {})
    monkeypatch.setattr(layer_decisions, "_built", {})
    dense = snnfx.convert(model, lower="dense").eval()
    with torch.no_grad(), monkeypatch.context() as patch:
        dense(x_seq)  # builds the kernel of the neuron, which stays in use
        events = {source.text for source in SOURCES.values()}
        patch.setattr(build, "_loaded", {text: v for text, v in build._loaded.items() if text not in events})
        patch.setenv("CXX", str(broken))
        y_seq = warned(
            "SNNFX505",
            "lowering/events/layer_decisions.py:has_kernel",
            'Set CXX to another C++ compiler, or convert with lower="dense".',
            lambda: net(x_seq),
            names="layers run densely: broken cannot build the kernel",
        )
        assert_same(y_seq, expected)
        assert latest_decision(model[1].weight) is None
        errors._warned.clear()
        with silent():
            assert_same(dense(x_seq), expected)
    with torch.no_grad(), silent():  # the other compiler again
        assert_same(net(x_seq), expected)
        decision = latest_decision(model[1].weight)
        assert decision is not None and decision.by_events


def test_a_compiler_that_fails_for_a_pooling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    x, broken = torch.rand(2, 3, 8, 8), tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    max_pool(x, 2)
    with monkeypatch.context() as patch:
        patch.setattr(build, "_loaded", {})
        patch.setenv("SNNFX_CACHE_DIR", str(tmp_path / "cache"))
        patch.setenv("CXX", str(broken))
        y = warned(
            "SNNFX505",
            "lowering/elementwise/cpp/build.py:builds",
            "Set CXX to another C++ compiler.",
            lambda: max_pool(x, 2),
            names="max pooling runs in PyTorch: broken cannot build the kernel",
        )
    expected = nn.functional.max_pool2d(x, 2)
    assert torch.equal(y, expected)
    with silent():
        assert torch.equal(max_pool(x, 2), expected)


def test_measurements_that_cannot_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: bytes, path: Path) -> None:
        raise OSError(28, "No space left on device")

    def choices() -> remembered.Remembered[int]:
        return remembered.Remembered("choices of a test", accept=lambda v: v, agree=lambda a, b: a, otherwise=max)

    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(remembered, "write_atomically", full)
        chosen = warned(
            "SNNFX510",
            "lowering/choices/remembered.py:Remembered._stored_or_measured",
            "Set SNNFX_CACHE_DIR to a folder with space that can be written.",
            lambda: choices().get(("key",), lambda: 3),
            names="No space left on device",
        )
    assert chosen == 3
    with silent():
        assert choices().get(("key",), lambda: 3) == 3
        assert choices().get(("key",), lambda: pytest.fail("measured again")) == 3


def test_second_derivatives_through_a_norm_in_a_kernel() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), neuron.LIFNode()).double()
    norm = nn.BatchNorm1d(5)
    x_seq = torch.randn(4, 3, 5, requires_grad=True)
    y, mean, scale, bias = channel_factors(x_seq, norm, GradientOwner())
    refused(
        "SNNFX316",
        "lowering/batch_norm/training_norm.py:_ChannelFactors.backward",
        "Convert with lower=None: PyTorch then runs the loop and differentiates twice.",
        lambda: torch.autograd.grad(((y - mean) * scale + bias).sum(), x_seq, create_graph=True),
    )
    net, given = snnfx.convert(model, lower=None), torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(net(given).sum(), given, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), given)[0].isfinite().all()


def test_an_internal_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internal_faults, "STRICT", False)
    try:
        raise KeyError("mistake")
    except KeyError as error:
        fault = error
    warned(
        "SNNFX509",
        "sandbox/internal_faults.py:surface",
        "Please report this message.",
        lambda: internal_faults.surface(fault, "a loop runs step by step"),
        names="KeyError",
    )


def test_a_region_that_no_longer_exists() -> None:
    net = snnfx.convert(small())
    handle = next(m.handle for m in net.modules() if hasattr(m, "handle"))
    assert region_of_handle(handle) is not None
    exported = torch.export.export(net, (sequence(),))
    assert_same(exported.module()(sequence()).detach(), net(sequence()).detach())
    del net, exported
    gc.collect()
    refused(
        "SNNFX503",
        "regions/sequence_region.py:region_of_handle",
        "Keep the net alive, or convert and compile again.",
        lambda: region_of_handle(handle),
    )
    assert_converts(small(), sequence())


def test_a_compiled_net_that_no_longer_exists() -> None:
    operator = snnfx.convert(small())._operator
    handle = operator.handle
    assert NetOperator.of_handle(handle) is operator
    del operator
    gc.collect()
    refused(
        "SNNFX503",
        "runtime/net_operator.py:NetOperator.of_handle",
        "Keep the net alive, or convert and compile again.",
        lambda: NetOperator.of_handle(handle),
    )


def test_a_second_derivative_of_a_compiled_net() -> None:
    net = snnfx.convert(small())
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    x_seq = sequence().requires_grad_()
    (first,) = torch.autograd.grad(compiled(x_seq).sin().sum(), x_seq, create_graph=True)
    refused(
        "SNNFX316",
        "runtime/run_net.py:_RunNetBackward.backward",
        "Differentiate the net itself, without torch.compile.",
        lambda: first.sum().backward(),
    )
    is_twice_differentiable(Smooth(mixed=False), lower=None)


def test_a_compiled_net_whose_graph_is_lost() -> None:
    compiled = torch.compile(snnfx.convert(small()), backend="eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.detach):
        y_seq = compiled(sequence())
    refused(
        "SNNFX511",
        "runtime/run_net.py:_run_net_backward",
        "Run the compiled net outside of the hooks; checkpoint= of snnfx.convert saves memory in a compiled net too.",
        lambda: y_seq.sum().backward(),
    )
    net = snnfx.convert(small(), checkpoint="regions")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with silent():
        assert_same(compiled(sequence()).detach(), run_stepped(small(), sequence()).outputs)
        compiled(sequence()).sum().backward()


def test_passes_in_an_illegal_order() -> None:
    from snnfx.capture.capture import capture

    refused(
        "SNNFX502",
        "ir/pass_manager.py:_Run.apply",
        "Run the passes that reach stage ",
        lambda: PassManager([Partition()]).run(capture(small())),
        names="stage 'normalized'",
    )
    PassManager([Normalize(), RemoveDeadCode(), Partition()]).run(capture(small()))
