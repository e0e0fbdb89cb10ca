"""Build generated C++ and load it: a cache on disk by content, safe when several processes build at once."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from snnfx.lowering.aten_recording import LoweringRefused
from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource

__all__ = ["Library", "cache_directory", "find_compiler", "load"]

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""No -ffast-math: NaN, infinities and the order of operations stay as they are written."""


def cache_directory() -> Path:
    """Where built kernels are kept: SNNFX_CACHE_DIR, or a folder of the user's cache."""
    given = os.environ.get("SNNFX_CACHE_DIR")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "snnfx"


def find_compiler() -> str | None:
    """The C++ compiler: $CXX, g++, clang++ or c++; None where there is none or SNNFX_KERNELS=0.

    SNNFX_KERNELS=0 forbids kernels on all devices. SNNFX_KERNELS=triton has the Triton back end run tensors on the CPU
    as well, in Triton's interpreter, which has to be asked for before Triton is imported (TRITON_INTERPRET=1). That is
    slow, and meant for trying the kernels of a GPU where there is none.
    """
    if os.environ.get("SNNFX_KERNELS") == "0":
        return None
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found is not None:
            return found
    return None


@functools.cache
def _identity_of(compiler: str) -> str:
    """What tells builds apart that -march=native makes different: the compiler's version and the processor."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    processor = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
    except OSError:
        processor = platform.processor()
    return f"{version}{processor}{platform.machine()}{' '.join(FLAGS)}"


class Library:
    """A loaded kernel."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.run: Callable[[Any], None] = self._library.run
        self.run.restype, self.run.argtypes = None, [ctypes.c_void_p]
        self.run_part: Callable[[Any, int, int], None] = self._library.run_part
        self.run_part.restype = None
        self.run_part.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]


_loaded: dict[str, Library] = {}
_lock = threading.Lock()


def load(source: KernelSource) -> Library:
    """The library of a source: loaded already, built before, or built now.

    Raises:
        LoweringRefused: there is no compiler, or it cannot build this.
    """
    library = _loaded.get(source.text)
    if library is not None:
        return library
    with _lock:
        if source.text not in _loaded:
            _loaded[source.text] = Library(_built(source.text))
        return _loaded[source.text]


def _built(text: str) -> Path:
    compiler = find_compiler()
    if compiler is None:
        raise LoweringRefused("there is no C++ compiler (g++, clang++ or $CXX)")
    key = hashlib.sha256(f"{_identity_of(compiler)}\0{text}".encode()).hexdigest()[:32]
    directory = usable_directory()
    path = directory / f"{key}.so"
    if not path.exists():
        _build(compiler, text, path)
    return path


def usable_directory() -> Path:
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    return Path(_directory_of_this_process())


@functools.cache
def _directory_of_this_process() -> str:
    """For a cache that cannot be written: kept until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="snnfx_")
    _kept.append(folder)
    return folder.name


_kept: list[Any] = []


def _build(compiler: str, text: str, path: Path) -> None:
    """Compile beside the final place, then rename: another process sees all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build_") as folder:
        source, result = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(text)
        for native in ("-march=native", None):
            command = [compiler, *FLAGS, *([native] if native else []), str(source), "-o", str(result)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(result, path)
                return
    raise LoweringRefused(f"{Path(compiler).name} cannot build the kernel: {done.stderr.strip().splitlines()[:1]}")


@functools.cache
def openmp() -> tuple[int, int, int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the runtime that torch has loaded.

    Threads of a second pool would compete with torch's for the cores.
    """
    torch.get_num_threads()
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = dict.fromkeys(line.split()[-1] for line in maps.splitlines() if "omp" in line and ".so" in line)
    for path in paths:
        if not any(name in os.path.basename(path) for name in ("libgomp", "libiomp", "libomp")):
            continue
        try:
            library = ctypes.CDLL(path)
            functions = [library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads]
        except (OSError, AttributeError):
            continue
        parallel, thread, team = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions)
        return parallel, thread, team
    return None
