"""Exported programs compute what the net computes, for other T and N, in a process without snnfx."""

from __future__ import annotations

import copy
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx import neuron
from snnfx.errors import ExportError, SnnfxWarning
from support.export_models import (
    SIZES,
    GatedCells,
    OtherFirstStep,
    SameConstantTwice,
    StartsWithOneSample,
    TwoStates,
    mlp,
)
from support.nets import ACCEPTANCE
from support.stepping import step_model


def exported(
    path: Path, make: Callable[[], nn.Module], *inputs: Tensor, convert: dict[str, Any] | None = None, **options: Any
) -> tuple[Any, Any, nn.Module]:
    """The loaded program, the net and the model."""
    torch.manual_seed(0)
    model = make().eval()
    net = snnfx.convert(copy.deepcopy(model), **convert or {}).eval()
    snnfx.export(net, path / "net.pt2", *inputs, check=False, **options)
    return torch.export.load(path / "net.pt2").module(), net, model


def assert_equal(actual: Any, expected: Any) -> None:
    a, b = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("name", ["recurrent", "batch_coupled", "two_inputs", "neuron_twice"])
def test_program_equals_the_stepped_model_for_other_sizes(name: str, tmp_path: Path) -> None:
    case = ACCEPTANCE[name]
    program, _, model = exported(tmp_path, case.make, *case.sequences(4), convert={"example_inputs": case.example()})
    for T, N in SIZES:
        inputs = [torch.rand(T, N, *shape[1:]) * 2 for shape in case.shapes]
        with torch.no_grad():
            assert_equal(program(*inputs), step_model(copy.deepcopy(model), *inputs))


@pytest.mark.parametrize("make", [TwoStates, OtherFirstStep, GatedCells, StartsWithOneSample, SameConstantTwice])
def test_neurons_of_the_user(make: type[nn.Module], tmp_path: Path) -> None:
    program, _, model = exported(tmp_path, make, torch.rand(3, 2, 5))
    for T, N in SIZES:
        x_seq = torch.rand(T, N, 5) * 2
        with torch.no_grad():
            assert_equal(program(x_seq), step_model(copy.deepcopy(model), x_seq))


def test_two_halves_with_state_equal_the_whole(tmp_path: Path) -> None:
    program, net, _ = exported(tmp_path, TwoStates, torch.rand(3, 2, 5), state=True)
    x_seq = torch.rand(6, 3, 5) * 2
    zeros = {"v": torch.zeros(3, 4), "threshold": torch.full((3, 4), 0.1)}
    state = {slot.name: zeros[slot.name] for slot in net.program.slots}
    first, state = program(x_seq[:2], state)
    second, state = program(x_seq[2:], state)
    expected, final = net.run(x_seq)
    assert_equal(torch.cat([first, second]), expected)
    assert_equal([state[name] for name in final], list(final.values()))


def test_start_selects_the_reset_state_where_the_first_step_differs(tmp_path: Path) -> None:
    program, net, _ = exported(tmp_path, OtherFirstStep, torch.rand(3, 2, 5), state=True)
    x_seq = torch.rand(6, 3, 5)
    first, state = program(x_seq[:2], {"v": torch.full((3, 4), 9.0)}, torch.tensor(True))
    second, state = program(x_seq[2:], state, torch.tensor(False))
    assert_equal(torch.cat([first, second]), net(x_seq))


def test_single_steps_carry_the_state(tmp_path: Path) -> None:
    program, net, _ = exported(tmp_path, mlp, torch.rand(2, 5), step=True)
    x_seq = torch.rand(4, 3, 5) * 3
    state = {slot.name: torch.zeros(3, n) for slot, n in zip(net.program.slots, (4, 3), strict=True)}
    outputs = []
    for x in x_seq:
        y, state = program(x, state)
        outputs.append(y)
    assert_equal(torch.stack(outputs), net(x_seq))


@pytest.mark.parametrize("options", [{"time_dim": -1}, {"reduce": "mean"}, {"reduce": "last"}])
def test_options_of_the_conversion(options: dict[str, Any], tmp_path: Path) -> None:
    def sequence(T: int, N: int) -> Tensor:
        x = torch.rand(T, N, 5) * 3
        return x.permute(1, 2, 0).contiguous() if "time_dim" in options else x

    program, net, _ = exported(tmp_path, mlp, sequence(4, 2), convert=options)
    for T, N in SIZES:
        x_seq = sequence(T, N)
        assert_equal(program(x_seq), net(x_seq).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    program, net, _ = exported(tmp_path, lambda: mlp().to(dtype), torch.rand(3, 2, 5, dtype=dtype))
    x_seq = torch.rand(5, 1, 5, dtype=dtype) * 3
    assert_equal(program(x_seq), net(x_seq).detach())


def test_carried_argument_that_the_caller_passes(tmp_path: Path) -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(5, 4)

        def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
            mem = 0.8 * mem + self.fc(x)
            return (mem > 0.2).float(), mem

    options = {"carry": {"mem": 1}, "example_inputs": (torch.rand(2, 5), torch.rand(2, 4))}
    program, net, _ = exported(tmp_path, Explicit, torch.rand(3, 2, 5), torch.rand(2, 4), convert=options)
    x_seq, mem = torch.rand(4, 3, 5), torch.rand(3, 4)
    assert_equal(program(x_seq, mem), pytree.tree_map(Tensor.detach, net(x_seq, mem)))


def test_export_changes_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), neuron.LIFNode())
    net = snnfx.convert(model)
    model[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes, random = [m.training for m in net.modules()], torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        snnfx.export(net, tmp_path / "net.pt2", torch.rand(3, 2, 5), check=False)
        torch.set_rng_state(random)
        snnfx.export(net, tmp_path / "other.pt2", torch.ones(3, 2, 5), check=False, dynamic=("N",))
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_file_refers_to_no_code_of_snnfx(tmp_path: Path) -> None:
    exported(tmp_path, mlp, torch.rand(3, 2, 5))
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        for name in archive.namelist():
            assert name.endswith("metadata.json") or b"snnfx" not in archive.read(name)


def test_check_runs_the_file_without_snnfx(tmp_path: Path) -> None:
    net = snnfx.convert(mlp().eval())
    path = snnfx.export(net, tmp_path / "net.pt2", torch.rand(3, 2, 5))
    assert path == tmp_path / "net.pt2"
    assert [f.name for f in tmp_path.iterdir()] == ["net.pt2"]


def test_memory_options_are_announced(tmp_path: Path) -> None:
    net = snnfx.convert(mlp().eval(), chunk=2)
    with pytest.warns(SnnfxWarning, match="SNNFX825 chunk=2 of the net is not exported"):
        snnfx.errors._warned.clear()
        snnfx.export(net, tmp_path / "net.pt2", torch.rand(5, 2, 5), check=False)


def test_sequence_model_that_mixes_time_steps_is_refused(tmp_path: Path) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 4), neuron.LIFNode()

        def forward(self, x_seq: Tensor) -> Tensor:
            return torch.stack([self.lif(self.fc(x)) for x in x_seq - x_seq.mean(0)])

    net = snnfx.convert(Centred().eval(), takes="sequence", example_inputs=torch.rand(4, 2, 5))
    with pytest.raises(ExportError, match=r"SNNFX819 .*test_export.py:\d+"):
        snnfx.export(net, tmp_path / "net.pt2", torch.rand(4, 2, 5))


def test_net_that_fails_for_one_sample_warns(tmp_path: Path) -> None:
    class SecondSample(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x[1]

    net = snnfx.convert(nn.Sequential(SecondSample(), neuron.LIFNode()).eval(), example_inputs=torch.rand(3, 5))
    snnfx.errors._warned.clear()
    with pytest.warns(SnnfxWarning, match="SNNFX818 the file is not checked for T = 1, N = 1"):
        snnfx.export(net, tmp_path / "net.pt2", torch.rand(4, 3, 5), check=False)


def test_wrong_results_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snnfx.deploy.checking._run", lambda *_: 2 * [[torch.full((3, 2, 3), 7.0)]])
    net = snnfx.convert(mlp().eval())
    with pytest.raises(ExportError, match="SNNFX808.*differ"):
        snnfx.export(net, tmp_path / "net.pt2", torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "options", "code"),
    [
        ("net.pth", {}, "SNNFX801"),
        ("net.pt2", {"dynamic": ("B",)}, "SNNFX801"),
        ("net.onnx", {"package": "aot"}, "SNNFX801"),
        ("net.pt2", {"package": "aot"}, "SNNFX807"),
        ("missing/net.pt2", {}, "SNNFX802"),
        (".", {}, "SNNFX80[12]"),
    ],
)
def test_illegal_options(path: str, options: dict[str, Any], code: str, tmp_path: Path) -> None:
    net = snnfx.convert(mlp().eval())
    with pytest.raises(ExportError, match=code):
        snnfx.export(net, tmp_path / path, torch.rand(3, 2, 5), **options)
    assert not list(tmp_path.iterdir())


def test_opaque_part_is_refused_by_name(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    net = snnfx.convert(nn.Sequential(nn.Linear(5, 4), Branch(), neuron.LIFNode()).eval())
    with pytest.raises(ExportError, match=r"SNNFX804 `1`"):
        snnfx.export(net, tmp_path / "net.pt2", torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


def test_net_in_training_mode_warns(tmp_path: Path) -> None:
    net = snnfx.convert(mlp().train())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        snnfx.errors._warned.clear()
        snnfx.export(net, tmp_path / "net.pt2", torch.rand(3, 2, 5), check=False)
    assert any("SNNFX811" in str(w.message) for w in caught)
    assert net.training


class SliceWritten(nn.Module):
    """Each step writes a part of the potential in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.v is None:
            self.v = torch.zeros_like(x)
        self.v = self.v * 0.9 + x
        self.v[:, 0] = 0.5 * self.v[:, 1]
        self.v[:, 2:] -= 0.1
        return (self.v > 0.2).float()


@pytest.mark.parametrize("step", [False, True])
def test_slices_written_in_a_step(step: bool, tmp_path: Path) -> None:
    program, net, model = exported(tmp_path, SliceWritten, torch.rand(2, 5) if step else torch.rand(3, 2, 5), step=step)
    for T, N in SIZES:
        x_seq = torch.rand(T, N, 5) * 2
        with torch.no_grad():
            expected = step_model(copy.deepcopy(model), x_seq)
            if not step:
                assert_equal(program(x_seq), expected)
                continue
            outputs, state = [], {slot.name: torch.zeros(N, 4) for slot in net.program.slots}
            for x in x_seq:
                y, state = program(x, state)
                outputs.append(y)
            assert_equal(torch.stack(outputs), expected)


def test_inputs_of_any_memory_layout(tmp_path: Path) -> None:
    program, net, _ = exported(tmp_path, mlp, torch.rand(2, 3, 5).transpose(0, 1))
    x_seq = torch.rand(5, 2, 4).permute(2, 1, 0) * 3
    assert not x_seq.is_contiguous()
    assert_equal(program(x_seq), net(x_seq).detach())


@pytest.mark.parametrize(
    "pad",
    [
        nn.ZeroPad2d(1),
        nn.ConstantPad2d((1, 0, 2, 1), 0.5),
        nn.ZeroPad2d((-1, 1, 0, -2)),
        nn.Conv2d(2, 3, 4, padding="same"),
        nn.CircularPad2d(1),
    ],
    ids=["zero", "constant", "negative", "uneven", "circular"],
)
@pytest.mark.parametrize("in_loop", [False, True])
def test_padding_for_other_sizes(pad: nn.Module, in_loop: bool, tmp_path: Path) -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pad, self.lif, self.v = pad, neuron.LIFNode(v_threshold=0.4), None

        def forward(self, x: Tensor) -> Tensor:
            if in_loop:
                self.v = x if self.v is None else 0.5 * self.v + x
                return self.pad(self.v)  # type: ignore[no-any-return]
            return self.lif(self.pad(x))  # type: ignore[no-any-return]

    program, _, model = exported(tmp_path, Padded, torch.rand(3, 2, 2, 5, 5))
    for T, N in SIZES:
        x_seq = torch.rand(T, N, 2, 5, 5) * 3
        with torch.no_grad():
            assert_equal(program(x_seq), step_model(copy.deepcopy(model), x_seq))


def test_state_with_several_rows_for_each_sample(tmp_path: Path) -> None:
    class RowsAsSamples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode(v_threshold=0.4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(x.flatten(0, 1)).unflatten(0, (-1, 3))  # type: ignore[no-any-return]

    options = {"convert": {"example_inputs": torch.rand(2, 3, 4)}, "state": True}
    program, net, _ = exported(tmp_path, RowsAsSamples, torch.rand(4, 2, 3, 4), **options)
    for T, N in SIZES:
        x_seq = torch.rand(T, N, 3, 4)
        outputs, final = net.run(x_seq)
        assert_equal(program(x_seq, {"lif.v": torch.zeros(3 * N, 4)}), (outputs, final))


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("options", [{}, {"state": True}])
def test_net_for_one_sample_has_a_dynamic_number_of_steps(
    example: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    model = mlp().eval()
    net = snnfx.convert(copy.deepcopy(model), example_inputs=torch.rand(5) if example else None).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = snnfx.export(net, tmp_path / "net.pt2", torch.rand(3, 5), check=False, **options)
    assert "SNNFX826" in "".join(str(w.message) for w in caught)
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["metadata.json"])["dynamic"] == ["T"]
    state = {slot.name: torch.zeros(n) for slot, n in zip(net.program.slots, (4, 3), strict=True)}
    for T in (1, 7):
        x_seq = torch.rand(T, 5) * 3
        with torch.no_grad():
            expected = step_model(copy.deepcopy(model), x_seq)
            found = program(x_seq, state)[0] if options else program(x_seq)
        assert_equal(found, expected)


class DtypeOfTheFirstStep(nn.Module):
    """The first step returns the currents, later steps masks; or the first step masks and later steps potentials."""

    def __init__(self, mask_first: bool) -> None:
        super().__init__()
        self.mask_first, self.v = mask_first, None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = x > 0.5 if self.mask_first else x
            return self.v
        self.v = 0.5 * self.v + x
        return self.v if self.mask_first else self.v > 1.0


@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize("mask_first", [False, True])
def test_first_step_of_another_dtype_keeps_its_values(mask_first: bool, step: bool, tmp_path: Path) -> None:
    model = DtypeOfTheFirstStep(mask_first)
    net = snnfx.convert(copy.deepcopy(model)).eval()
    given = torch.rand(2, 5) if step else torch.rand(3, 2, 5)
    path = snnfx.export(net, tmp_path / "net.pt2", given, step=step)
    extra = {"metadata.json": ""}
    program: Any = torch.export.load(path, extra_files=extra).module()
    assert [t["dtype"] for t in json.loads(extra["metadata.json"])["outputs"]] == ["float32"]
    for T, N in SIZES:
        x_seq = torch.rand(T, N, 5)
        expected = step_model(copy.deepcopy(model), x_seq).float()
        if not step:
            assert_equal(program(x_seq), expected)
            continue
        outputs, state = [], {"v": torch.zeros(N, 5)}
        for t, x in enumerate(x_seq):
            y, state = program(x, state, torch.tensor(t == 0))
            outputs.append(y)
        assert_equal(torch.stack(outputs), expected)
