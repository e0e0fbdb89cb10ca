"""Hints of single parts: foreign modules, whole sequences, kernels, statistics and the graphs of user's passes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import errors, neuron
from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.elementwise.kernel_cache import is_complete, places, store
from snnfx.passes import Pass, StepProgram
from snnfx.recompute.batch_statistics import batch_statistics, normalize
from snnfx.state import registry
from support.hints import refused, silent, warned
from support.looped_models import Cell, assert_converts_sequence
from support.stepping import assert_converts, assert_same, fresh_copy, run_net, run_stepped

T, N, C = 5, 2, 3


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape or (T, N, C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def lif() -> neuron.LIFNode:
    return neuron.LIFNode(tau=2.0, v_threshold=0.2)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, C), lif())


def converts(model: nn.Module, *sequences: Tensor, **options: Any) -> Any:
    with silent():
        return assert_converts(model, *(sequences or (sequence(),)), **options)


# -- foreign modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, torch.rand(N, C))])
def test_scripted_code(script: Callable[[nn.Module], Any]) -> None:
    scripted = script(nn.Linear(C, C))
    refused(
        "SNNFX220",
        "capture/unsupported_modules.py:refuse_scripted_code",
        "Use the Python module or function that it was made from; a module takes the weights with "
        "module.load_state_dict(scripted.state_dict()).",
        lambda: snnfx.convert(nn.Sequential(scripted, lif())),
        names="`0`",
    )
    module = nn.Linear(C, C)
    module.load_state_dict(scripted.state_dict())
    converts(nn.Sequential(module, lif()))


def test_a_net_that_keeps_its_state() -> None:
    for options in ({"carry_state": True}, {"step_mode": "s"}):
        net: Any = snnfx.convert(small(), **options)
        refused(
            "SNNFX221",
            "capture/unsupported_modules.py:refuse_unsupported_modules",
            "Use the model that it was converted from in its place: the attribute `source` of the net.",
            lambda net=net: snnfx.convert(nn.Sequential(net, lif())),  # type: ignore[misc]
            names="`0`",
        )
        converts(nn.Sequential(net.source, lif()))


def test_a_wrapper_for_several_processes(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(small())
        refused(
            "SNNFX222",
            "capture/unsupported_modules.py:refuse_unsupported_modules",
            "Convert the model inside it, its attribute `module`, then wrap the net.",
            lambda: snnfx.convert(wrapper),
            names="DistributedDataParallel",
        )
        expected = run_stepped(wrapper.module, sequence())
        with silent():
            net = nn.parallel.DistributedDataParallel(snnfx.convert(wrapper.module))
            assert_same(run_net(net, sequence()).outputs, expected.outputs)
    finally:
        torch.distributed.destroy_process_group()


def test_an_older_version_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldNode(nn.Module):
        __module__ = "norse.old.neuron"

        def __init__(self) -> None:
            super().__init__()
            self.v = 0.0

        def forward(self, x: Tensor) -> Tensor:
            self.v = self.v * 0.5 + x
            return (self.v > 0.5).to(x)

    monkeypatch.setattr(registry, "_imported", registry._imported - {"norse"})
    monkeypatch.setattr(registry, "_adapter_of_class", {})
    monkeypatch.delitem(sys.modules, "snnfx.state.adapters.norse", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "norse"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "norse", None)
    model = nn.Sequential(nn.Linear(C, C), OldNode())
    monkeypatch.setattr(errors, "_warned", set())
    warned(
        "SNNFX223",
        "state/registry.py:_import_adapters",
        ", so snnfx has no adapter for its modules and traces them like code of your own.",
        lambda: snnfx.convert(model),
        names="norse",
    )
    converts(model)


def spikes_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def test_a_delta_leaky_without_its_state() -> None:
    snntorch = pytest.importorskip("snntorch")
    if not hasattr(snntorch, "DeltaLeaky"):
        pytest.skip("this snnTorch has no DeltaLeaky")

    class Hidden(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(C, C), snntorch.DeltaLeaky(0.2, beta=0.9, **options)

        def forward(self, x: Tensor) -> Any:
            return self.lif(self.fc(x))

    class Passing(Hidden):
        def __init__(self) -> None:
            super().__init__()
            self.mem = self.lif.reset_mem()

        def forward(self, x: Tensor) -> Any:
            spk, self.mem = self.lif(self.fc(x), self.mem)
            return spk

    refused(
        "SNNFX211",
        "state/adapters/snntorch.py:_DeltaLeakyAdapter.read_call",
        "Pass the state, spk, mem = lif(x, mem), which starts as mem = lif.reset_mem(); or use init_hidden=True.",
        lambda: snnfx.convert(Hidden()),
    )
    for model in (Passing(), Hidden(init_hidden=True)):
        with silent():
            net = snnfx.convert(model)
        stepped = Hidden(init_hidden=True)
        stepped.fc.load_state_dict(model.fc.state_dict())
        assert_same(spikes_of(net(sequence())), torch.stack([spikes_of(stepped(x)) for x in sequence()]))


# -- states ------------------------------------------------------------------------------------------------------------


def test_a_number_of_numpy_as_state() -> None:
    class Decays(nn.Module):
        def __init__(self, gain: Any) -> None:
            super().__init__()
            self.fc, self.lif, self.gain, self.half = nn.Linear(C, C), lif(), gain, gain / gain / 2

        def forward(self, x: Tensor) -> Tensor:
            y = self.lif(self.gain * self.fc(x))
            self.gain = self.gain * self.half
            return y

    refused(
        "SNNFX218",
        "capture/attribute_changes.py:refuse_change",
        "Store a Python number: self.a = float(value).",
        lambda: snnfx.convert(Decays(numpy.float32(0.1))),
        names="`gain`",
    )
    converts(Decays(float(numpy.float32(0.1))))


def test_a_registered_container_of_a_step_method() -> None:
    class Registered(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTMCell(C, C)
            self.register_memory("hc", None)

        def step(self, x: Tensor) -> Tensor:
            self.hc = self.cell(x, self.hc)
            return self.hc[0]

    class Elements(Registered):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("hc_0", None)
            self.register_memory("hc_1", None)

        def step(self, x: Tensor) -> Tensor:
            self.hc_0, self.hc_1 = self.cell(x, None if self.hc_0 is None else (self.hc_0, self.hc_1))
            return self.hc_0

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.hc = nn.LSTMCell(C, C), None

        step = Registered.step

    refused(
        "SNNFX218",
        "capture/capture_session.py:_refusal_of_container",
        '_0", None), or use a plain attribute, self.',
        lambda: snnfx.convert(Registered(), entry="step"),
        names="`hc`",
    )
    converts(Elements(), entry="step")
    converts(Plain(), entry="step")


# -- whole sequences ---------------------------------------------------------------------------------------------------


class Looped(nn.Module):
    """A layer and a neuron in a loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.other, self.cell = nn.Linear(C, 4), nn.Linear(C, 4), Cell(0.8)

    def forward(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
        return torch.stack(out)


def test_a_sequence_model_without_an_example() -> None:
    x_seq = sequence()
    refused(
        "SNNFX233",
        "convert.py:convert_sequence_model",
        "Pass example_inputs=(x_seq,) with the inputs of one whole call.",
        lambda: snnfx.convert(Looped(), takes="sequence"),
    )
    with silent():
        assert_converts_sequence(Looped(), (x_seq,))


def test_iterations_that_differ() -> None:
    class Alternating(Looped):
        def forward(self, x: Tensor) -> Tensor:
            s, v, out = torch.zeros_like(self.fc(x[0])), None, []
            for t in range(x.shape[0]):
                s, v = self.cell(torch.relu(self.fc(x[t]) + s) if t % 2 == 0 else s * self.other(x[t]), v)
                out.append(s)
            return torch.stack(out)

    class Selecting(Looped):
        def forward(self, x: Tensor) -> Tensor:
            s, v, out = torch.zeros_like(self.fc(x[0])), None, []
            even = (torch.arange(x.shape[0]) % 2 == 0).to(x)
            for t in range(x.shape[0]):
                s, v = self.cell(select(even[t], s, self.fc(x[t]), self.other(x[t])), v)
                out.append(s)
            return torch.stack(out)

    class Stepping(Looped):
        s: Any = None
        v: Any = None

        def step(self, x: Tensor, even: Tensor) -> Tensor:
            a, b = self.fc(x), self.other(x)
            self.s, self.v = self.cell(select(even, torch.zeros_like(a) if self.s is None else self.s, a, b), self.v)
            return self.s

    def select(even: Tensor, s: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return even * torch.relu(a + s) + (1 - even) * (s * b)

    refused(
        "SNNFX230",
        "sequence/rolling.py:refusal_of_loop",
        'Run the same operations in each iteration, or convert a method that computes one step: entry="step".',
        lambda: snnfx.convert(Alternating(), takes="sequence", example_inputs=(sequence(),)),
        at="self.cell(",
    )
    with silent():
        assert_converts_sequence(Selecting(), (sequence(),))
    converts(Stepping(), sequence(), (torch.arange(T) % 2 == 0).to(torch.float64), entry="step", examples=True)


def test_a_call_that_is_shorter_than_its_separate_iterations() -> None:
    class Louder(Looped):
        def forward(self, x: Tensor) -> Tensor:
            v, out = None, []
            for t in range(x.shape[0]):
                current = self.fc(x[t])
                if t == x.shape[0] - 1:
                    current = 2 * current
                s, v = self.cell(current, v)
                out.append(s)
            return torch.stack(out)

    model = Louder()
    net = snnfx.convert(model, takes="sequence", example_inputs=(sequence(),))
    error = refused(
        "SNNFX231",
        "ops/elements.py:at_least",
        "Pass an input with at least ",
        lambda: net(sequence(1, N, C)),
    )
    steps = int(error.hint.split()[6])
    assert_same(net(sequence(steps, N, C)), model(sequence(steps, N, C)))


def test_an_input_that_is_shorter_than_its_loop() -> None:
    class Fixed(Looped):
        def forward(self, x: Tensor) -> Tensor:
            v, out = None, []
            for t in range(4):
                s, v = self.cell(self.fc(x[t]), v)
                out.append(s)
            return torch.stack(out)

    net = snnfx.convert(Fixed(), takes="sequence", example_inputs=(sequence(),))
    error = refused(
        "SNNFX231",
        "ops/elements.py:read_elements",
        "Pass an input with at least ",
        lambda: net(sequence(3, N, C)),
    )
    steps = int(error.hint.split()[6])
    assert_same(net(sequence(steps, N, C)), fresh_copy(net.source)(sequence(steps, N, C)))


# -- passes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Renamed(Pass):
    name = "renamed"
    requires = "captured"


def test_passes_for_a_net() -> None:
    @dataclass(frozen=True)
    class Count(Renamed):
        def apply(self, program: StepProgram) -> str:
            return "counted"

    net = snnfx.convert(small())
    refused(
        "SNNFX309",
        "convert.py:convert",
        "Convert the model with passes=, snnfx.convert(net.source, passes=...).",
        lambda: snnfx.convert(net, passes=[Count()]),
    )
    followed = snnfx.convert(net.source, passes=[Count()])
    assert "counted" in [record.note for record in followed.history]
    assert_same(followed(sequence()), net(sequence()))


class Gained(nn.Module):
    """A gain that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.lif, self.gain = lif(), nn.Parameter(torch.ones(C), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(x * self.gain)


class Growing(Gained):
    def forward(self, x: Tensor) -> Tensor:
        self.gain.add_(0.5)
        return super().forward(x)


def test_a_pass_that_changes_an_attribute_in_place() -> None:
    @dataclass(frozen=True)
    class InPlace(Renamed):
        method: str = "add_"

        def apply(self, program: StepProgram) -> str:
            gain = next(n for n in program.graph.nodes if n.op == "get_attr" and n.target == "gain")
            with program.graph.inserting_after(gain):
                new = program.graph.call_method(self.method, (gain, 0.5))
            gain.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
            return "added 0.5"

    refused(
        "SNNFX206",
        "passes/normalize.py:_functionalize",
        "Use an out-of-place operation in the pass, or make the change in the forward of the model.",
        lambda: snnfx.convert(Gained(), passes=[InPlace()]),
        names="`gain`",
    )
    with silent():
        net = snnfx.convert(Gained(), passes=[InPlace("add")])
    shifted = Gained()
    shifted.gain.add_(0.5)
    assert_same(net(sequence()), run_stepped(shifted, sequence()).outputs)
    with torch.no_grad(), silent():
        assert_same(snnfx.convert(Growing())(sequence()), torch.stack(steps_of(Growing())))


def steps_of(model: nn.Module) -> list[Tensor]:
    return [model(x) for x in sequence()]


def test_an_in_place_change_of_several_tensors() -> None:
    class Together(Gained):
        def forward(self, x: Tensor) -> Tensor:
            torch._foreach_add_([self.gain], 0.5)
            return super().forward(x)

    class OneByOne(Gained):
        def forward(self, x: Tensor) -> Tensor:
            for p in self.parameters():
                p.add_(0.5)
            return super().forward(x)

    refused(
        "SNNFX214",
        "passes/normalize.py:_functionalize",
        "Change the tensors one by one, e.g. for p in parameters: p.add_(1).",
        lambda: snnfx.convert(Together()),
        at="torch._foreach_add_(",
    )
    with torch.no_grad(), silent():
        assert_same(snnfx.convert(OneByOne())(sequence()), torch.stack(steps_of(OneByOne())))


def test_a_pass_with_a_circular_initial_value() -> None:
    @dataclass(frozen=True)
    class Initial(Renamed):
        requires = "normalized"
        may_change = ("graph", "slots")
        value: float | None = None

        def apply(self, program: StepProgram) -> str:
            following = program.next_states
            initial = [self.value or value for value in following]
            program.set_output(program.outputs, following, initial)
            return "changed the initial values"

    class Leak(nn.Module):
        def __init__(self, v: float = 0.0) -> None:
            super().__init__()
            self.v: Any = v

        def forward(self, x: Tensor) -> Tensor:
            self.v = 0.5 * self.v + x
            return self.v

    refused(
        "SNNFX210",
        "emit/region_builder.py:_Copier.copy",
        "Make the initial value a number, a tensor, or a function of the inputs only.",
        lambda: snnfx.convert(Leak(), passes=[Initial()]),
    )
    with silent():
        net = snnfx.convert(Leak(), passes=[Initial(0.5)])
    assert_same(net(sequence()), run_stepped(Leak(0.5), sequence()).outputs)


# -- kernels and statistics --------------------------------------------------------------------------------------------


def test_an_illegal_limit_of_the_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_CACHE_LIMIT", "1GB")
    refused(
        "SNNFX326",
        "lowering/elementwise/kernel_cache.py:_limit",
        "Set it to a number, such as 256, or to 0 for no limit.",
        lambda: store(b"x", tmp_path / "a.so"),
        names="'1GB'",
    )
    for limit in ("256", "0"):
        monkeypatch.setenv("SNNFX_CACHE_LIMIT", limit)
        store(b"x", tmp_path / f"{limit}.so")
        assert (tmp_path / f"{limit}.so").read_bytes().startswith(b"x")


def test_a_folder_of_kernels_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(file))
    warned(
        "SNNFX510",
        "lowering/elementwise/kernel_cache.py:write_atomically",
        "Set SNNFX_CACHE_DIR to a folder with space that can be written.",
        lambda: store(b"x", places("a.so")[0]),
        names=str(file),
    )
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path / "folder"))
    with silent():
        assert is_complete(store(b"x", places("a.so")[0]))
    assert (tmp_path / "folder" / "a.so").exists()


def test_a_kernel_that_an_exported_program_cannot_build(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")

    class Rare(neuron.LIFNode):
        def charge(self, v: Tensor, x: Tensor) -> Tensor:
            return v * 0.2913 + x * x * x

    net = snnfx.convert(nn.Sequential(Rare()))
    exported = torch.export.export(net, (sequence(),)).module()
    monkeypatch.setenv("SNNFX_KERNELS", "0")
    monkeypatch.setattr(build, "_loaded", {})
    for kernels in [m.kernels for m in net.modules() if hasattr(m, "kernels")]:
        kernels.entries.clear()  # as when many other shapes came between
        kernels._latest = None
    refused(
        "SNNFX503",
        "regions/kernel_operator.py:run_forward",
        "Compile or export the net again.",
        lambda: exported(sequence()),
        names="can no longer be built",
    )
    again = torch.export.export(net, (sequence(),)).module()
    assert_same(again(sequence()).detach(), run_stepped(net.source, sequence()).outputs)


def test_a_second_derivative_of_statistics() -> None:
    def net(**options: Any) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm1d(C), nn.Tanh(), neuron.LeakyIntegrator())
        return snnfx.convert(model, batch_norm="fold", **options)

    def second(net: Any) -> Tensor:
        x_seq = sequence().requires_grad_()
        (first,) = torch.autograd.grad((net(x_seq) ** 2).sum(), x_seq, create_graph=True)
        return torch.autograd.grad((first**2).sum(), x_seq)[0]

    x_seq, norm = sequence().requires_grad_(), nn.BatchNorm1d(C)
    mean, var = batch_statistics(x_seq, norm)
    y_seq = normalize(x_seq, mean.detach(), var.detach(), norm)
    refused(
        "SNNFX316",
        "recompute/batch_statistics.py:_NormalizeFunction.backward",
        "Convert with checkpoint=None, lower=None: PyTorch then builds the autograd graph.",
        lambda: torch.autograd.grad(y_seq.sum(), x_seq, create_graph=True),
    )
    refused(
        "SNNFX316",
        "recompute/batch_statistics.py:_Statistics.backward",
        "Convert with checkpoint=None, lower=None: PyTorch then builds the autograd graph.",
        lambda: torch.autograd.grad(mean.sum(), x_seq, create_graph=True),
    )
    found = second(net(checkpoint=None, lower=None))

    def by_hand(x_seq: Tensor) -> Tensor:
        y_seq = nn.functional.batch_norm(x_seq.flatten(0, 1), None, None, training=True).unflatten(0, (T, N)).tanh()
        cell = neuron.LeakyIntegrator()
        return torch.stack([cell(y) for y in y_seq])

    assert_same(found, second(by_hand))
