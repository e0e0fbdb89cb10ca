"""Errors of `snnfx.export` are clear, and leave no file and no half-written one."""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import ExportError, InputError

SUFFIXES = ("pt2", "onnx", "nir")
PACKAGE_OF = {"onnx": "onnx", "nir": "nir"}


def require(suffix: str) -> None:
    if suffix in PACKAGE_OF:
        pytest.importorskip(PACKAGE_OF[suffix])


def net() -> snnfx.Net:
    torch.manual_seed(0)
    return snnfx.convert(nn.Sequential(nn.Linear(5, 4), snnfx.neuron.LIFNode()).eval())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_folder(suffix: str, tmp_path: Path) -> None:
    require(suffix)
    with pytest.raises(ExportError, match="SNNFX802 .*the folder .*missing does not exist"):
        snnfx.export(net(), tmp_path / "missing" / f"net.{suffix}", torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folder_without_permission(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(suffix)
    # The superuser may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ExportError, match="SNNFX802 .*no permission to write"):
        snnfx.export(net(), tmp_path / f"net.{suffix}", torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_failure_keeps_the_file_that_was_there(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(suffix)
    path = tmp_path / f"net.{suffix}"
    path.write_text("an older file")

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ExportError, match="SNNFX802 .*No space left on device"):
        snnfx.export(net(), path, torch.rand(3, 2, 5), check=False)
    assert [f.name for f in tmp_path.iterdir()] == [path.name] and path.read_text() == "an older file"


@pytest.mark.parametrize("suffix", PACKAGE_OF)
def test_missing_package(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    missing = PACKAGE_OF[suffix]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    with pytest.raises(ExportError, match=rf"(?s)SNNFX803 {missing} is not installed.*pip install snnfx\[{suffix}\]"):
        snnfx.export(net(), tmp_path / f"net.{suffix}", torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["net", "net.pth", "net.ONNX", "net.pt2.gz"])
def test_wrong_suffix(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="SNNFX801 .*has the suffix"):
        snnfx.export(net(), tmp_path / name, torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("example", [True, False])
def test_wrong_number_of_features(suffix: str, example: bool, tmp_path: Path) -> None:
    require(suffix)
    model = nn.Sequential(nn.Linear(5, 4), snnfx.neuron.LIFNode()).eval()
    converted = snnfx.convert(model, example_inputs=torch.rand(2, 5) if example else None)
    with pytest.raises(InputError, match=r"(?s)SNNFX327 .*shape \[2, 7\].*`0` expects 5 features, and the step has 7"):
        snnfx.export(converted, tmp_path / f"net.{suffix}", torch.rand(3, 2, 7))
    assert not list(tmp_path.iterdir())


def test_wrong_size_in_the_middle_of_a_step_is_located(tmp_path: Path) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return x.relu() * self.weight

    with pytest.raises(InputError, match=r"SNNFX327 .*test_export_errors.py:\d+"):
        snnfx.export(snnfx.convert(Split()), tmp_path / "net.pt2", torch.rand(3, 2, 5))


@pytest.mark.parametrize("options", [{}, {"state": True}, {"step": True}])
def test_step_for_one_batch_size_is_refused_without_a_log(
    options: dict[str, bool], tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class TwoSamples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(5, 4), snnfx.neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.fc(x) + torch.ones(2, 4))  # type: ignore[no-any-return]

    converted = snnfx.convert(TwoSamples().eval(), example_inputs=torch.rand(2, 5))
    inputs = torch.rand(2, 5) if "step" in options else torch.rand(3, 2, 5)
    with pytest.raises(ExportError, match="SNNFX806 the batch size cannot be dynamic"):
        snnfx.export(converted, tmp_path / "net.pt2", inputs, **options)
    printed = capfd.readouterr()
    assert printed.out + printed.err == "" and not [r for r in caplog.records if r.levelno >= 30]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", PACKAGE_OF)
def test_broken_package(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require(suffix)
    original = importlib.import_module

    def broken(name: str, package: str | None = None) -> object:
        if name == PACKAGE_OF[suffix]:
            raise AttributeError("module 'numpy' has no attribute 'bool'")
        return original(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ExportError, match=f"(?s)SNNFX828 .*{suffix} cannot be imported.*no attribute 'bool'"):
        snnfx.export(net(), tmp_path / f"net.{suffix}", torch.rand(3, 2, 5))
    assert not list(tmp_path.iterdir())


def test_step_for_one_sample_has_no_form_in_nir(tmp_path: Path) -> None:
    pytest.importorskip("nir")
    model = nn.Sequential(nn.Linear(5, 4), snnfx.neuron.LIFNode()).eval()
    with pytest.raises(ExportError, match="SNNFX813 the step has no form in NIR.*needs 2 dimensions"):
        snnfx.export(snnfx.convert(model, example_inputs=torch.rand(5)), tmp_path / "net.nir", torch.rand(3, 5))
    assert not list(tmp_path.iterdir())
