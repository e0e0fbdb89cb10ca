"""Errors of `snnfx.export` are clear, and leave no file and no half-written one."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import snnfx
from snnfx.errors import ExportError

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
