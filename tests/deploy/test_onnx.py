"""ONNX models compute what the net computes, in onnxruntime."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import snnfx
from snnfx.errors import ExportError
from support.export_models import SIZES, TwoStates, mlp
from support.nets import ACCEPTANCE, CSNN

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_model_equals_the_net_for_other_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = snnfx.convert(CSNN().eval(), example_inputs=ACCEPTANCE["csnn"].example())
    path = snnfx.export(net, tmp_path / "net.onnx", torch.rand(4, 2, 1, 8, 8))
    model = session(path)
    for T, N in SIZES:
        x_seq = torch.rand(T, N, 1, 8, 8) * 2
        (y_seq,) = model.run(None, {"x": x_seq.numpy()})
        torch.testing.assert_close(torch.from_numpy(y_seq), net(x_seq).detach())


def test_names_axes_and_metadata(tmp_path: Path) -> None:
    net = snnfx.convert(TwoStates().eval(), example_inputs=(torch.rand(2, 5),))
    model = onnx.load(snnfx.export(net, tmp_path / "net.onnx", torch.rand(3, 2, 5), state=True))
    onnx.checker.check_model(model, full_check=True)
    slots = [slot.name for slot in net.program.slots]
    assert [v.name for v in model.graph.input] == ["x", *slots]
    assert [v.name for v in model.graph.output] == ["output", *(f"{slot}.next" for slot in slots)]
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["T", "N", 5]
    metadata = json.loads({p.key: p.value for p in model.metadata_props}["snnfx"])
    assert metadata["snnfx_version"] == snnfx.__version__
    initial = {s["slot"]: s["initial"] for s in metadata["states"]}
    assert initial == {"v": 0, "threshold": pytest.approx(0.1)}


def test_two_halves_with_state_equal_the_whole(tmp_path: Path) -> None:
    net = snnfx.convert(TwoStates().eval(), example_inputs=(torch.rand(2, 5),))
    model = session(snnfx.export(net, tmp_path / "net.onnx", torch.rand(3, 2, 5), state=True, check=False))
    x_seq = torch.rand(6, 3, 5) * 2
    state = {"v": torch.zeros(3, 4), "threshold": torch.full((3, 4), 0.1)}
    outputs: list[Tensor] = []
    for part in x_seq.split(3):
        names = [v.name for v in model.get_outputs()]
        feeds = {"x": part.numpy(), **{name: v.numpy() for name, v in state.items()}}
        results = dict(zip(names, map(torch.from_numpy, model.run(None, feeds)), strict=True))
        outputs.append(results["output"])
        state = {name: results[f"{name}.next"] for name in state}
    torch.testing.assert_close(torch.cat(outputs), net(x_seq).detach())


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_package_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    net = snnfx.convert(mlp().eval())
    with pytest.raises(ExportError, match=f"SNNFX803 {missing} is not installed"):
        snnfx.export(net, tmp_path / "net.onnx", torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


def test_large_weights_lie_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snnfx.deploy.onnx_file.EXTERNAL_DATA_FROM", 1000)
    net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(40, 30), snnfx.neuron.IFNode()).eval())
    path = snnfx.export(net, tmp_path / "net.onnx", torch.rand(3, 2, 40))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    x_seq = torch.rand(2, 1, 40)
    (y_seq,) = session(path).run(None, {session(path).get_inputs()[0].name: x_seq.numpy()})
    torch.testing.assert_close(torch.from_numpy(y_seq), net(x_seq).detach())


def test_slot_with_the_name_of_its_buffer_is_an_input(tmp_path: Path) -> None:
    class Average(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            self.total = self.total * 0.5 + x.mean()
            return x * self.total

    net = snnfx.convert(Average().eval(), example_inputs=(torch.rand(2, 5),))
    path = snnfx.export(net, tmp_path / "net.onnx", torch.rand(3, 2, 5), state=True)
    model, x_seq = session(path), torch.rand(4, 1, 5)
    assert "total" in [v.name for v in model.get_inputs()]
    feeds = {"x": x_seq.numpy(), "total": torch.tensor(7.0).numpy(), "start": torch.tensor(False).numpy()}
    names = [v.name for v in model.get_inputs()]
    y_seq, total = model.run(None, {k: v for k, v in feeds.items() if k in names})
    expected, state = net.run(x_seq, state={"total": torch.tensor(7.0)})
    torch.testing.assert_close(torch.from_numpy(y_seq), expected.detach())
    torch.testing.assert_close(torch.as_tensor(total), state["total"])


def test_nothing_is_printed_or_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    class Mixes(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0, keepdim=True)

    layers = [torch.nn.Linear(5, 4), Mixes(), snnfx.neuron.LIFNode(), Mixes()]
    net = snnfx.convert(torch.nn.Sequential(*layers).eval(), example_inputs=torch.rand(2, 5))
    for suffix in ("onnx", "pt2"):
        snnfx.export(net, tmp_path / f"net.{suffix}", torch.rand(3, 2, 5), check=False)
    assert [r.getMessage() for r in caplog.records if r.levelno >= 30] == []
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""


def test_detached_states_of_snntorch(tmp_path: Path) -> None:
    snn = pytest.importorskip("snntorch")
    alpha = snn.Alpha(alpha=0.9, beta=0.8, init_hidden=True)
    net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(5, 4), alpha).eval())
    model = session(snnfx.export(net, tmp_path / "net.onnx", torch.rand(3, 2, 5), check=False))
    x_seq = torch.rand(6, 1, 5) * 5
    (y_seq,) = model.run(None, {model.get_inputs()[0].name: x_seq.numpy()})
    torch.testing.assert_close(torch.from_numpy(y_seq), net(x_seq).detach())


@pytest.mark.parametrize(
    ("dtype", "layer", "code"),
    [
        (torch.float64, torch.nn.Conv2d(1, 2, 3), "SNNFX827 onnxruntime cannot run net.onnx on a CPU"),
        (torch.bfloat16, torch.nn.Linear(6, 2), "SNNFX827 onnxruntime cannot run net.onnx on a CPU"),
        (torch.bfloat16, torch.nn.Conv2d(1, 2, 3), "SNNFX807 the net has no ONNX form"),
    ],
)
def test_dtypes_without_kernels_are_named(
    dtype: torch.dtype, layer: torch.nn.Module, code: str, tmp_path: Path
) -> None:
    net = snnfx.convert(torch.nn.Sequential(copy.deepcopy(layer), snnfx.neuron.LIFNode()).to(dtype).eval())
    x_seq = torch.rand(3, 2, 1, 6, 6, dtype=dtype)
    with pytest.raises(ExportError, match=rf"(?s){code}.*net.float\(\)"):
        snnfx.export(net, tmp_path / "net.onnx", x_seq)
    assert not list(tmp_path.iterdir())
    snnfx.export(net.float(), tmp_path / "net.onnx", x_seq.float())


def test_constant_padding_for_other_sizes(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.ConstantPad2d((1, 2, 0, 1), 0.25), snnfx.neuron.LIFNode(v_threshold=0.4))
    net = snnfx.convert(model.eval())
    model = session(snnfx.export(net, tmp_path / "net.onnx", torch.rand(3, 2, 1, 4, 4), check=False))
    for T, N in ((1, 1), (5, 3)):
        x_seq = torch.rand(T, N, 1, 4, 4)
        (y_seq,) = model.run(None, {model.get_inputs()[0].name: x_seq.numpy()})
        torch.testing.assert_close(torch.from_numpy(y_seq), net(x_seq))
