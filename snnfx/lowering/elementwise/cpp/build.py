"""Compile and load generated C++.

The disk cache is keyed by content; see `snnfx.lowering.elementwise.kernel_cache`.
"""

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

from snnfx._progress import progress
from snnfx.errors import warn_once
from snnfx.lowering.aten_recording import LoweringRefused
from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource
from snnfx.lowering.elementwise.kernel_cache import is_complete, places, store

__all__ = ["Library", "builds", "find_compiler", "identity_of", "kernel_threads", "load", "openmp", "parallel_fields"]

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""No -ffast-math: NaN, infinities and the order of operations are preserved."""


def find_compiler() -> str | None:
    """The path of the C++ compiler: $CXX, g++, clang++ or c++, or None.

    SNNFX_KERNELS=0 disables kernels on all devices. SNNFX_KERNELS=triton runs tensors on the CPU with the Triton back
    end, too, in Triton's interpreter, which must be enabled before Triton is imported (TRITON_INTERPRET=1). This is
    slow, and meant for testing GPU kernels without a GPU.
    """
    environment = os.environ
    if environment.get("SNNFX_KERNELS") == "0":
        return None
    key = environment.get("CXX"), environment.get("PATH")
    found = _compilers.get(key)
    if found is None:
        names = (key[0], "g++", "clang++", "c++")
        found = next((path for name in names if name and (path := shutil.which(name)) is not None), None)
        if found is not None:  # one that is installed later is found
            _compilers[key] = found
    return found


_compilers: dict[tuple[str | None, str | None], str] = {}
"""By $CXX and $PATH: a search of the path takes 100 microseconds, and each call of a layer asks."""


@functools.cache
def identity_of(compiler: str) -> str:
    """A string that identifies the compiler's version and the processor, on which -march=native depends."""
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
    """Load the library of a source, compiling it unless it is cached.

    Raises:
        LoweringRefused: there is no compiler, or compilation fails.
    """
    library = _loaded.get(source.text)
    if library is not None:
        return library
    with _lock:
        if source.text not in _loaded:
            _loaded[source.text] = _load(source.text)
        return _loaded[source.text]


def _load(text: str) -> Library:
    compiler = find_compiler()
    if compiler is None:
        raise LoweringRefused("there is no C++ compiler (g++, clang++ or $CXX), or SNNFX_KERNELS=0 is set")
    key = hashlib.sha256(f"{identity_of(compiler)}\0{text}".encode()).hexdigest()[:32]
    path = next(filter(is_complete, places(f"{key}.so")), None)
    for _ in range(_MOST_ATTEMPTS):
        is_new = path is None
        if path is None:
            with progress("build a kernel", total=1, unit="kernels", delay=0.0):
                path = _build(compiler, text, f"{key}.so")
        try:
            return Library(path)
        except (OSError, AttributeError) as error:  # AttributeError: it lacks a function of a kernel
            failure = error
            if is_new and path.exists():  # else another process has just removed it
                break
            path = None
    raise LoweringRefused(f"the compiled kernel cannot be loaded: {failure}")


def builds(source: KernelSource, otherwise: str) -> bool:
    """Whether a kernel can be built; warns once if the compiler fails (SNNFX505).

    Without a compiler, nothing is said: the loops of a net warn.

    Args:
        source: the kernel, which is loaded.
        otherwise: how the calls run without it, as a clause.
    """
    if source.text in _loaded:
        return True
    compiler = find_compiler()
    if compiler is None or (source.text, compiler) in _refused:
        return False
    try:
        load(source)
    except LoweringRefused as reason:
        _refused.add((source.text, compiler))
        warn_once(
            "SNNFX505",
            f"{otherwise}: {reason}. Set CXX to another C++ compiler.",
            key=("build", source.text, compiler),
        )
        return False
    return True


_refused: set[tuple[str, str]] = set()
"""The sources that could not be built, with the compiler."""

_MOST_ATTEMPTS = 3


def _build(compiler: str, text: str, name: str) -> Path:
    """Compile a kernel, store it in the cache, and return its path."""
    with tempfile.TemporaryDirectory(prefix="snnfx_build_") as folder:
        source, result = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(text)
        for native in ("-march=native", None):
            command = [compiler, *FLAGS, *([native] if native else []), str(source), "-o", str(result)]
            completed = subprocess.run(command, capture_output=True, text=True, check=False)
            if completed.returncode == 0:
                try:
                    return store(result.read_bytes(), places(name)[0])
                except OSError as error:
                    raise LoweringRefused(f"the compiled kernel cannot be stored: {error}") from error
    raise LoweringRefused(f"{Path(compiler).name} cannot build the kernel: {completed.stderr.strip().splitlines()[:1]}")


def kernel_threads() -> int:
    """The number of threads that kernels may use: that of torch, or one without an OpenMP runtime."""
    return torch.get_num_threads() if openmp() is not None else 1


def parallel_fields(threads: int) -> dict[str, int]:
    """The fields `threads` and `parallel` of the struct of a kernel that starts its own threads."""
    runtime = openmp() if threads > 1 else None
    return {"threads": threads, "parallel": runtime[0] if runtime else 0}


@functools.cache
def openmp() -> tuple[int, int, int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads in the OpenMP runtime of torch.

    Threads of a second pool would compete with torch's threads for the cores.
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
