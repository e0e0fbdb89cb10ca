"""The disk cache of kernels: damaged files are built anew, and its size is limited."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from snnfx import errors
from snnfx.errors import InputError
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.elementwise.kernel_cache import is_complete, places, store

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


def other_machine(path: Path) -> bytes:
    """The library for another processor: the field `e_machine` of its header."""
    content = bytearray(path.read_bytes()[:-32])
    content[18:20] = b"\xff\xff"
    return bytes(content)


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("content", [other_machine, lambda path: b"not a library"], ids=["machine", "text"])
def test_a_complete_file_that_cannot_be_loaded_is_built_anew(content: Callable[[Path], bytes], tmp_path: Path) -> None:
    assert run_kernel(tmp_path).returncode == 0
    (path,) = tmp_path.glob("*.so")
    built = path.read_bytes()
    store(content(path), path)
    assert is_complete(path)
    again = run_kernel(tmp_path)
    assert again.returncode == 0, again.stderr
    assert path.read_bytes() == built


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_two_processes_build_the_same_kernel_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: run_kernel(tmp_path), range(2)))
    assert [result.returncode for result in results] == [0, 0], results
    (path,) = tmp_path.iterdir()
    assert is_complete(path)


def test_a_kernel_under_the_name_of_another_one_is_damaged(tmp_path: Path) -> None:
    store(b"library a", tmp_path / "a.so")
    (tmp_path / "b.so").write_bytes((tmp_path / "a.so").read_bytes())
    assert is_complete(tmp_path / "a.so") and not is_complete(tmp_path / "b.so")


@pytest.fixture
def file_for_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that cannot be written, even by root: a file has its name."""
    path = tmp_path / "file"
    path.write_text("not a folder")
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(path))
    errors._warned.clear()
    return path


def test_a_folder_that_cannot_be_written_is_replaced_with_one_warning(file_for_folder: Path) -> None:
    with pytest.warns(errors.SnnfxWarning, match="SNNFX510") as caught:
        paths = [store(b"library", places(name)[0]) for name in ("a.so", "b.so", "a.so")]
    assert len(caught) == 1
    assert file_for_folder not in paths[0].parents and paths[0] == paths[2]
    for name, path in zip(("a.so", "b.so"), paths, strict=False):
        assert next(filter(is_complete, places(name))) == path


def test_a_folder_without_space_keeps_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors._warned.clear()
    replace = os.replace

    def full(source: str, path: Path) -> None:
        if path.parent == tmp_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, path)

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(errors.SnnfxWarning, match="No space left"):
        assert is_complete(store(b"library", tmp_path / "a.so"))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_kernels_run_without_a_folder_that_can_be_written(file_for_folder: Path) -> None:
    result = run_kernel(file_for_folder)
    assert "SNNFX510" in result.stderr and "SNNFX505" not in result.stderr  # a warning is an error in this process
    command = [sys.executable, "-W", "error::snnfx.errors.SnnfxWarning", "-W", "ignore:SNNFX510", "-c"]
    done = subprocess.run(
        [*command, textwrap.dedent(STEP)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
        path = tmp_path / f".write_{name}"
        path.touch()
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    store(b"x", tmp_path / "a.so")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".write_new", "a.so"]


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
