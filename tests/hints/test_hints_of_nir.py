"""Hints of NIR files: each leads to a file that `snnfx.from_nir` reads back as the same net."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from support.hints import refused, silent, warned
from support.stepping import step_model

nir = pytest.importorskip("nir")
np = pytest.importorskip("numpy")

X_SEQ = torch.rand(8, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES = torch.rand(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Step(snnfx.MemoryModule):
    """A step whose code is a function of the module and the input."""

    def __init__(self, code: Callable[[Any, Tensor], Any], v: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.code = nn.Linear(2, 2).double(), code
        self.register_memory("v", v)
        self.register_buffer("mask", torch.tensor([1.0, 0.0]).double())

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def spike(self: Any, v: Tensor) -> Tensor:
    y = (v > 0.5).to(v.dtype)
    self.v = v * (1 - y)
    return y


def lif(self: Any, x: Tensor) -> Tensor:
    return spike(self, 0.5 * self.v + self.fc(x))


def net_of(code: Callable[[Any, Tensor], Any] | nn.Module) -> Any:
    return snnfx.convert(code if isinstance(code, nn.Module) else Step(code)).eval()


def comes_back(code: Callable[[Any, Tensor], Any] | nn.Module, folder: Path, x_seq: Tensor = X_SEQ) -> None:
    """Export without another message, and step the imported model."""
    net = net_of(code)
    with silent():
        path = snnfx.export(net, folder / "net.nir", x_seq)
    with torch.no_grad():
        torch.testing.assert_close(step_model(snnfx.from_nir(path), x_seq), net(x_seq))


def is_written(code: Callable[[Any, Tensor], Any] | nn.Module, folder: Path, x_seq: Tensor = X_SEQ) -> None:
    """Export a .pt2 file, the other way that hints give."""
    net = net_of(code)
    with silent():
        snnfx.export(net, folder / "net.pt2", x_seq, check=False)
    found = torch.export.load(folder / "net.pt2").module()(x_seq)
    torch.testing.assert_close(found, net(x_seq))


# -- options and packages ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"state": True}, {"step": True}, {"dynamic": ("T",)}])
def test_an_option_without_a_meaning(options: dict[str, Any], tmp_path: Path) -> None:
    refused(
        "SNNFX801",
        "deploy/nir_export.py:check_nir_options",
        "Leave it out, or export a .pt2 file.",
        lambda: snnfx.export(net_of(lif), tmp_path / "net.nir", X_SEQ, **options),
        names=f"`{next(iter(options))}`",
    )
    comes_back(lif, tmp_path)


def test_an_illegal_time_step(tmp_path: Path) -> None:
    path = tmp_path / "net.nir"
    refused(
        "SNNFX801",
        "deploy/nir_export.py:write_nir",
        "Pass a positive number of seconds, e.g. dt=1e-4.",
        lambda: snnfx.export(net_of(lif), path, X_SEQ, dt=-1.0),
        names="dt=-1.0",
    )
    assert snnfx.from_nir(snnfx.export(net_of(lif), path, X_SEQ, dt=1e-4)).dt == 1e-4


def test_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        refused(
            "SNNFX803",
            "deploy/nir_file.py:require_nir",
            "Run `pip install snnfx[nir]`.",
            lambda: snnfx.from_nir(tmp_path / "net.nir"),
        )
    comes_back(lif, tmp_path)


# -- parts without a form ----------------------------------------------------------------------------------------------


def test_another_first_step(tmp_path: Path) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.v = nn.Linear(2, 2).double(), nn.Linear(2, 2).double(), None

        def forward(self, x: Tensor) -> Tensor:
            return spike(self, self.a(x) if self.v is None else 0.5 * self.v + self.b(x))

    refused(
        "SNNFX813",
        "deploy/nir_export.py:write_nir",
        "Create the states before the first step, with register_memory.",
        lambda: snnfx.export(net_of(First()), tmp_path / "net.nir", X_SEQ),
    )
    comes_back(lif, tmp_path)


class Pooled(nn.Module):
    def __init__(self, before: float, after: float) -> None:
        super().__init__()
        self.conv, self.pool, self.before, self.after = nn.Conv2d(1, 1, 1).double(), nn.AvgPool2d(2), before, after

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.before if self.before else self.conv(x)
        return self.pool(y) + self.after if self.after else self.pool(y)


def test_a_constant_without_a_layer_before_it(tmp_path: Path) -> None:
    refused(
        "SNNFX813",
        "deploy/nir_file.py:_refused",
        "Replace this part, or export a .pt2 or .onnx file.",
        lambda: snnfx.export(net_of(Pooled(0.0, 1.0)), tmp_path / "net.nir", IMAGES),
        names="a constant is added to its input",
        at="self.after",
    )
    comes_back(Pooled(1.0, 0.0), tmp_path, IMAGES)
    is_written(Pooled(0.0, 1.0), tmp_path, IMAGES)


def above(self: Any, x: Tensor) -> Tensor:
    return (self.fc(x) > 0.3).to(x.dtype)


@pytest.mark.parametrize(
    ("code", "wrong", "right", "why"),
    [
        ("SNNFX813", lambda self, x: x - x, lif, "its input is constant."),
        (
            "SNNFX814",
            lambda self, x: spike(self, self.v + self.fc(x) + 0.1),
            lambda self, x: spike(self, self.v + self.fc(x)),
            "its potential drifts without input",
        ),
        ("SNNFX814", lambda self, x: spike(self, 1.5 * self.v + self.fc(x)), lif, "is not between 0 and 1"),
        ("SNNFX814", lambda self, x: (self.fc(x) < 0.3).to(x.dtype), above, "it fires below a threshold"),
    ],
)
def test_a_part_without_a_form(code: str, wrong: Any, right: Any, why: str, tmp_path: Path) -> None:
    refused(
        code,
        "deploy/nir_file.py:_refused",
        "Replace this part, or export a .pt2 or .onnx file.",
        lambda: snnfx.export(net_of(wrong), tmp_path / "net.nir", X_SEQ),
        names=why,
    )
    assert not list(tmp_path.iterdir())
    comes_back(right, tmp_path)


def keep(self: Any, v: Tensor) -> Tensor:
    self.v = v
    return v


def soft_reset(self: Any, x: Tensor) -> Tensor:
    v = 0.5 * self.v + self.fc(x)
    y = (v > 0.5).to(v.dtype)
    self.v = v - 0.5 * y
    return y


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda self, x: keep(self, (self.v + self.fc(x)) * 0.5 * self.mask), "do not read its input."),
        (soft_reset, "soft reset"),
        (lambda self, x: torch.tanh(self.fc(x)), "not a linear function"),
    ],
)
def test_a_neuron_without_a_form(wrong: Any, why: str, tmp_path: Path) -> None:
    refused(
        "SNNFX814",
        "deploy/nir_parts.py:_Builder._refused",
        "Use a neuron with a constant threshold and a reset to a value, such as snnfx.neuron.LIFNode(), or export a "
        ".pt2 or .onnx file.",
        lambda: snnfx.export(net_of(wrong), tmp_path / "net.nir", X_SEQ),
        names=why,
    )
    comes_back(nn.Sequential(nn.Linear(2, 2).double(), neuron.LIFNode(v_threshold=0.2)), tmp_path)


def test_another_initial_potential(tmp_path: Path) -> None:
    net = snnfx.convert(Step(lif, v=0.3)).eval()
    path = warned(
        "SNNFX815",
        "deploy/nir_file.py:_Writer._with_initial",
        "NIR has no initial potential: only snnfx.from_nir reads it, from the metadata of the node.",
        lambda: snnfx.export(net, tmp_path / "net.nir", X_SEQ),
        names="`neuron`",
    )
    with torch.no_grad():
        torch.testing.assert_close(step_model(snnfx.from_nir(path), X_SEQ), net(X_SEQ))
    comes_back(lif, tmp_path)


def test_a_kernel_whose_shape_nir_does_not_infer(tmp_path: Path) -> None:
    refused(
        "SNNFX813",
        "deploy/nir_layers.py:_square",
        "Use a square kernel, or one whose height and width differ by an even number.",
        lambda: snnfx.export(net_of(nn.Conv2d(1, 1, (2, 3)).double()), tmp_path / "net.nir", IMAGES),
        names="[2, 3]",
    )
    for kernel in ((3, 3), (1, 3)):
        comes_back(nn.Sequential(nn.Conv2d(1, 1, kernel).double()), tmp_path, IMAGES)


def test_a_value_without_a_batch_dimension(tmp_path: Path) -> None:
    refused(
        "SNNFX813",
        "deploy/nir_step.py:AtenStep.features",
        'Write the step for inputs "[N, *]".',
        lambda: snnfx.export(net_of(lambda self, x: spike(self, x.mean())), tmp_path / "net.nir", X_SEQ),
    )
    comes_back(lif, tmp_path)


def test_a_value_that_python_reads(tmp_path: Path) -> None:
    net = snnfx.convert(Step(lambda self, x: spike(self, 0.5 * self.v + x * x.max().item())), chunk=None).eval()
    refused(
        "SNNFX805",
        "deploy/nir_step.py:_Recorder._record",
        "Replace this operation; one step may compute with tensors, but neither read their values in Python nor depend "
        "on them.",
        lambda: snnfx.export(net, tmp_path / "net.nir", X_SEQ),
        names="item",
        at="item()",
    )
    comes_back(lif, tmp_path)


# -- import ------------------------------------------------------------------------------------------------------------


def lif_node(size: int) -> Any:
    return nir.LIF(np.full(size, 2e-4), np.ones(size), np.zeros(size), np.ones(size))


def test_a_time_step_that_is_too_long(tmp_path: Path) -> None:
    nir.write(tmp_path / "net.nir", nir.NIRGraph.from_list(lif_node(2)))
    refused(
        "SNNFX816",
        "deploy/nir_modules.py:_Importer._decay",
        "Pass the dt of the file.",
        lambda: snnfx.from_nir(tmp_path / "net.nir", dt=1.0),
        names="`lif`",
    )
    model = snnfx.from_nir(tmp_path / "net.nir", dt=1e-4)
    expected = step_model(neuron.LIFNode(v_threshold=1.0), X_SEQ)
    torch.testing.assert_close(step_model(model, X_SEQ), expected)


def test_a_cycle_of_unknown_shape() -> None:
    def graph() -> Any:
        nodes = {
            "input": nir.Input({"input": np.array([1, 4, 4])}),
            "conv": nir.Conv2d(None, np.ones((1, 1, 1, 1)), (1, 1), (0, 0), (1, 1), 1, np.zeros(1)),
            "delay": nir.Delay(np.full((1, 4, 4), 1e-4)),
            "output": nir.Output({"output": np.array([1, 4, 4])}),
        }
        edges = [("input", "conv"), ("conv", "delay"), ("delay", "conv"), ("conv", "output")]
        return nir.NIRGraph(nodes, edges, metadata={"snnfx_delayed_edges": '[["conv", "delay"]]'}, type_check=False)

    unknown = graph()
    refused(
        "SNNFX816",
        "deploy/from_nir.py:_shape",
        "Run `graph.infer_types()`.",
        lambda: snnfx.from_nir(unknown),
        names="`conv`",
    )
    unknown.infer_types()
    assert step_model(snnfx.from_nir(unknown), IMAGES).shape == IMAGES.shape


def test_reduced_outputs(tmp_path: Path) -> None:
    model = Step(lif)
    refused(
        "SNNFX813",
        "deploy/nir_export.py:write_nir",
        "Convert the model without reduce, and reduce the outputs where the file runs.",
        lambda: snnfx.export(snnfx.convert(model, reduce="mean").eval(), tmp_path / "net.nir", X_SEQ),
    )
    comes_back(model, tmp_path)


def test_a_step_for_one_sample(tmp_path: Path) -> None:
    model, x_seq = nn.Sequential(nn.Linear(3, 2), neuron.IFNode()).double(), torch.rand(4, 2, 3).double()
    net = snnfx.convert(model, example_inputs=x_seq[0, 0]).eval()
    refused(
        "SNNFX813",
        "deploy/nir_export.py:_check_steps",
        "Write the step for any batch size, and pass inputs with a batch: [T, N, *].",
        lambda: snnfx.export(net, tmp_path / "net.nir", x_seq[:, 0]),
        names="`0(input_1)`",
    )
    comes_back(model, tmp_path, x_seq)
