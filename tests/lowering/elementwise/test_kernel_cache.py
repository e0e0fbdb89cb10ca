"""The disk cache of kernels: damaged files are built anew, and its size is limited."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snnfx.errors import InputError
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.elementwise.kernel_cache import is_complete, store

ROOT = Path(__file__).resolve().parents[3]
STEP = """
    import torch, snnfx
    model = torch.nn.Sequential(snnfx.neuron.LIFNode(tau=2.3))
    x_seq = torch.linspace(0, 3, 60).view(4, 15)
    y_seq = snnfx.convert(model)(x_seq)
    assert torch.equal(y_seq, snnfx.convert(model, lower=None)(x_seq))
    assert "one kernel" in snnfx.explain(snnfx.convert(model)).kernels[0]
"""


def run_kernel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a kernel in a process of its own, because a process keeps the libraries that it loaded."""
    variables = {**os.environ, "SNNFX_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "error::snnfx.errors.SnnfxWarning", "-c", textwrap.dedent(STEP)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def replace_by_text(path: Path) -> None:
    path.write_text("not a library")


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_a_damaged_kernel_is_built_anew(tmp_path: Path) -> None:
    first = run_kernel(tmp_path)
    assert first.returncode == 0, first.stderr
    (path,) = tmp_path.glob("*.so")
    assert is_complete(path)
    truncate(path)
    again = run_kernel(tmp_path)
    assert again.returncode == 0, again.stderr
    assert is_complete(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [truncate, empty, change_a_byte, replace_by_text, Path.unlink])
def test_damage_is_detected(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    store(b"library" * 1000, path)
    assert is_complete(path)
    damage(path)
    assert not is_complete(path)


def ages(folder: Path, **seconds: int) -> None:
    for name, age in seconds.items():
        path = folder / f"{name}.so"
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))


def names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.so")}


def test_the_least_recently_used_files_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_CACHE_LIMIT", "0")
    for name in ("a", "b", "c"):
        store(bytes(400_000), tmp_path / f"{name}.so")
    assert names(tmp_path) == {"a", "b", "c"}
    ages(tmp_path, a=300, b=200, c=100)
    assert is_complete(tmp_path / "a.so")  # a use
    monkeypatch.setenv("SNNFX_CACHE_LIMIT", "1")
    store(bytes(400_000), tmp_path / "d.so")
    assert names(tmp_path) == {"a", "d"}
    store(bytes(3_000_000), tmp_path / "large.so")
    assert names(tmp_path) == {"large"}


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name, age in (("old", 7200), ("new", 0)):
        folder = tmp_path / f".build_{name}"
        folder.mkdir()
        os.utime(folder, (folder.stat().st_atime, folder.stat().st_mtime - age))
    store(b"x", tmp_path / "a.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".build_new", "a.so"]


@pytest.mark.parametrize("limit", ["1GB", "-1", ""])
def test_an_illegal_limit_is_refused(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_CACHE_LIMIT", limit)
    with pytest.raises(InputError, match="SNNFX326"):
        store(b"x", tmp_path / "a.so")


def _store_many(arguments: tuple[str, int]) -> bool:
    folder, first = arguments
    os.environ["SNNFX_CACHE_LIMIT"] = "1"
    for index in range(first, first + 40):
        path = Path(folder) / f"{index % 50}.so"
        if not is_complete(path):
            store(bytes([index % 50]) * 100_000, path)
    return True


def test_processes_share_a_folder_at_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_CACHE_LIMIT", "1")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.map(_store_many, [(str(tmp_path), first) for first in (0, 10, 20)]))
    left: list[Any] = list(tmp_path.iterdir())
    assert left and all(path.suffix == ".so" and is_complete(path) for path in left)
    store(bytes(100_000), tmp_path / "last.so")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20
