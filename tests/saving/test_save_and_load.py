"""A loaded net computes what the saved net computes, with the saved plan if the model is the same."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import ExportError, InputError, SaveError, SnnfxWarning
from snnfx.ir.program import StepProgram
from snnfx.saving.model_description import describe_model
from snnfx.saving.program_records import ProgramWriter
from snnfx.saving.save import sources_of
from support.author_neurons import NEURONS
from support.export_models import OtherFirstStep, TwoStates, mlp
from support.nets import ACCEPTANCE


def saved(net: Any, folder: Path) -> Path:
    return snnfx.save(net, folder / "net.safetensors")


def load_with_plan(path: Path, model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", SnnfxWarning)
        net = snnfx.load(path, model)
    assert net.history[0].description.startswith("load")
    return net


def assert_same(net: Any, loaded: Any, *inputs: Tensor) -> None:
    a, b = net(*inputs), loaded(*inputs)
    for x, y in zip(torch.utils._pytree.tree_leaves(a), torch.utils._pytree.tree_leaves(b), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["csnn", "residual", "unet", "recurrent", "batch_coupled", "two_inputs"])
def test_plan_of_an_acceptance_net(name: str, tmp_path: Path) -> None:
    case = ACCEPTANCE[name]
    net = snnfx.convert(case.make(), example_inputs=case.example()).eval()
    loaded = load_with_plan(saved(net, tmp_path), case.make())
    assert [r.kind for r in loaded.regions] == [r.kind for r in net.regions]
    assert not loaded.training
    assert_same(net, loaded, *case.sequences(4))


@pytest.mark.parametrize(
    "make", [TwoStates, OtherFirstStep, *(NEURONS[n] for n in ("MaskedWrite", "ScriptedHelpers", "NewZeros"))]
)
def test_plan_of_a_neuron_of_the_user(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    net = snnfx.convert(make())
    loaded = load_with_plan(saved(net, tmp_path), make())
    assert_same(net, loaded, torch.rand(5, 2, 5) * 2)


def test_gradients_and_other_shapes_after_loading(tmp_path: Path) -> None:
    net = snnfx.convert(mlp())
    loaded = load_with_plan(saved(net, tmp_path), mlp())
    x_seq = torch.rand(4, 2, 5) * 3
    for n in (net, loaded):
        n(x_seq).sum().backward()
    for p, q in zip(net.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for shape in ((4, 5), (4, 2, 3, 5)):
        assert_same(net, loaded, torch.rand(shape) * 3)


def test_options_state_and_modes_are_restored(tmp_path: Path) -> None:
    net = snnfx.convert(mlp(), carry_state=True, reduce="mean", chunk=3, memory_budget="64MiB", lower=None)
    net.source[0].eval()
    net(torch.rand(4, 2, 5) * 3)
    loaded = load_with_plan(saved(net, tmp_path), mlp().eval())
    assert loaded.options == net.options
    assert [m.training for m in loaded.source] == [False, True, True, True]
    assert_same(net, loaded, torch.rand(4, 2, 5) * 3)


def test_tied_parameters_and_other_buffers_are_restored(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
            self.b.weight = self.a.weight
            self.register_buffer("scale", torch.rand(1), persistent=False)
            self.lif = neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.b(self.a(x)) * self.scale)

    net = snnfx.convert(Tied())
    loaded = load_with_plan(saved(net, tmp_path), Tied())
    assert loaded.source.a.weight is loaded.source.b.weight
    assert_same(net, loaded, torch.rand(4, 2, 5))


class Gain(nn.Module):
    def __init__(self, gain: float = 2.0) -> None:
        super().__init__()
        self.fc, self.gain, self.lif = nn.Linear(5, 4), gain, neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x) * self.gain)


def test_another_setting_converts_again(tmp_path: Path) -> None:
    net = snnfx.convert(Gain(2.0))
    with pytest.warns(SnnfxWarning, match=r"SNNFX822 .* the module `the model` differs"):
        loaded = snnfx.load(saved(net, tmp_path), Gain(0.5))
    x_seq = torch.rand(4, 2, 5)
    net.source.gain = 0.5
    with pytest.warns(SnnfxWarning, match="SNNFX315"):
        assert_same(net, loaded, x_seq)


def test_other_code_converts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(snnfx.convert(Gain()), tmp_path)
    monkeypatch.setattr(Gain, "forward", lambda self, x: self.lif(self.fc(x) + 1))
    with pytest.warns(SnnfxWarning, match=r"SNNFX822 .* the code of"):
        loaded = snnfx.load(path, Gain())
    assert_same(loaded, snnfx.convert(loaded.source), torch.rand(4, 2, 5))


def test_a_plan_that_depends_on_values_of_parameters_converts_again(tmp_path: Path) -> None:
    make = NEURONS["ParameterCompared"]
    net = snnfx.convert(make())
    with pytest.warns(SnnfxWarning, match="SNNFX822"):
        loaded = snnfx.load(saved(net, tmp_path), make())
    assert_same(net, loaded, torch.rand(4, 2, 5))


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(5, 4), neuron.LIFNode()

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.lif(self.fc(x)) for x in x_seq])


class MixedOverTime(Looped):
    def forward(self, x_seq: Tensor) -> Tensor:
        return super().forward(x_seq - x_seq.mean(0))


@pytest.mark.parametrize("make", [Looped, MixedOverTime])
def test_models_that_run_over_time(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    net = snnfx.convert(make(), takes="sequence", example_inputs=torch.rand(4, 2, 5))
    loaded = load_with_plan(saved(net, tmp_path), make())
    for T, N in ((4, 2), (7, 3)):
        assert_same(net, loaded, torch.rand(T, N, 5) * 3)


def test_another_model_is_refused_unchanged(tmp_path: Path) -> None:
    path = saved(snnfx.convert(mlp()), tmp_path)
    other = nn.Sequential(nn.Linear(5, 9), neuron.LIFNode(), nn.Linear(9, 3), neuron.ParametricLIFNode())
    before = other[0].weight.clone()
    with pytest.raises(SaveError, match="SNNFX821"):
        snnfx.load(path, other)
    assert torch.equal(other[0].weight, before)


def test_refusals_of_save_leave_no_file(tmp_path: Path) -> None:
    net = snnfx.convert(mlp())
    with pytest.raises(ExportError, match="SNNFX802"):
        snnfx.save(net, tmp_path / "missing" / "net.safetensors")
    with pytest.raises(SaveError, match="SNNFX824"):
        snnfx.save(mlp(), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def spikingjelly_net() -> nn.Module:
    sj = pytest.importorskip("spikingjelly.activation_based.neuron")
    return nn.Sequential(nn.Linear(5, 4), sj.LIFNode(tau=3.0), nn.Linear(4, 3), sj.ParametricLIFNode())


def test_plan_of_a_spikingjelly_net(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = snnfx.convert(spikingjelly_net())
    loaded = load_with_plan(saved(net, tmp_path), spikingjelly_net())
    assert_same(net, loaded, torch.rand(4, 2, 5) * 3)


def test_net_of_single_steps_goes_on(tmp_path: Path) -> None:
    net = snnfx.convert(mlp(), step_mode="s")
    x_seq = torch.rand(4, 2, 5) * 3
    net(x_seq[0])
    loaded = load_with_plan(saved(net, tmp_path), mlp())
    assert loaded.options.step_mode == "s"
    for x in x_seq:
        assert_same(net, loaded, x)


def test_inputs_by_position_and_by_name(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 4), neuron.LIFNode()

        def forward(self, x: Tensor, *, gain: Tensor) -> Tensor:
            return self.lif(self.fc(x) * gain)

    example = {"x": torch.rand(2, 5), "gain": torch.rand(2, 4)}
    net = snnfx.convert(Two(), example_inputs=example)
    loaded = load_with_plan(saved(net, tmp_path), Two())
    x_seq, gain = torch.rand(4, 2, 5), torch.rand(4, 2, 4) * 5
    assert torch.equal(net(x_seq, gain=gain), loaded(x_seq, gain=gain))


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(snnfx.convert(mlp()), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: snnfx.load(path, mlp()), lambda: snnfx.save(snnfx.convert(mlp()), tmp_path / "other")):
        with pytest.raises(SaveError, match=r"(?s)SNNFX803 the package safetensors is missing.*snnfx\[save\]"):
            call()
    assert list(tmp_path.iterdir()) == [path]


def test_loaded_net_without_a_step_form_refuses_single_steps(tmp_path: Path) -> None:
    net = snnfx.convert(MixedOverTime(), takes="sequence", example_inputs=torch.rand(4, 2, 5))
    loaded = load_with_plan(saved(net, tmp_path), MixedOverTime())
    assert loaded.program.whole_sequences == net.program.whole_sequences
    for n in (net, loaded):
        with pytest.raises(InputError, match=r"SNNFX235 .*test_save_and_load.py:\d+"):
            snnfx.convert(n, step_mode="s")


def test_every_field_of_a_program_is_saved() -> None:
    net = snnfx.convert(mlp())
    sources = sources_of(net)
    description = describe_model(net.source, sources)
    record = ProgramWriter(net, description.functions, description.locations).programs(net)[0]
    from_elsewhere = {"graph": "nodes", "source": "model", "guards": "has_guards"}
    saved_fields = {from_elsewhere.get(f.name, f.name) for f in dataclasses.fields(StepProgram)} - {"model"}
    assert saved_fields == record.keys()


@pytest.mark.parametrize("options", [{"carry_state": True}, {"chunk": 2}, {"chunk": 3, "carry_state": True}])
def test_other_first_steps_with_options_go_on(options: dict[str, Any], tmp_path: Path) -> None:
    net = snnfx.convert(OtherFirstStep(), **options)
    net(torch.rand(4, 2, 5))
    loaded = load_with_plan(saved(net, tmp_path), OtherFirstStep())
    assert loaded.options == net.options
    for T in (1, 5):
        assert_same(net, loaded, torch.rand(T, 2, 5))
