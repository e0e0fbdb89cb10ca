"""The density below which a product is faster by events, measured once for each machine and shape.

The first call of a shape times the dense product and the kernel at two densities, on a part of the batch: the time of
the kernel grows linearly with the density. Two measurements that agree are kept in the cache folder; two that do not,
because other processes took the cores, hold for this process only and are moved towards an expected value. Under
`torch.use_deterministic_algorithms(True)` a fixed density decides, so that equal inputs run alike in each process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import find_compiler, identity_of
from snnfx.lowering.elementwise.kernel_cache import places, write_atomically

__all__ = ["FIXED", "crossover"]

FIXED = 0.15
"""The crossover of deterministic runs."""

_SPARSE, _DENSER, _HIGHEST = 0.05, 0.3, 0.6
_MARGIN = 0.95
"""The part of the dense time that the kernel may take at the crossover."""

_REPEATS = 3
_AGREEMENT = 0.1
"""The largest difference of two measurements that agree."""

_EXPECTED = 0.3

_lock = threading.Lock()
_measured: dict[tuple[object, ...], float] = {}


def crossover(
    key: tuple[object, ...], x: Tensor, dense: Callable[[Tensor], Tensor], events: Callable[[Tensor], Tensor]
) -> float:
    """The crossover of a shape; measured if it is unknown.

    Args:
        key: identifies the shape; its text identifies it on disk.
        x: an example input; only its shape and memory format are used.
        dense, events: both ways to compute the product.
    """
    if torch.are_deterministic_algorithms_enabled():
        return FIXED
    key = (*key, torch.get_num_threads())
    found = _measured.get(key)
    if found is None:
        with _lock:
            found = _measured.get(key)
            if found is None:
                found = _measured[key] = _from_disk_or_measured(repr(key), x, dense, events)
    return found


def _from_disk_or_measured(
    key: str, x: Tensor, dense: Callable[[Tensor], Tensor], events: Callable[[Tensor], Tensor]
) -> float:
    stored = _stored()
    if key not in stored:
        with torch.no_grad():
            first, second = (_measure(x, dense, events) for _ in range(2))
        if abs(first - second) > _AGREEMENT:
            return sorted((first, second, _EXPECTED))[1]
        stored = {**_stored(), key: (first + second) / 2}
        write_atomically(json.dumps(stored, indent=1).encode(), places(_name())[0])
    return stored[key]


def _measure(x: Tensor, dense: Callable[[Tensor], Tensor], events: Callable[[Tensor], Tensor]) -> float:
    generator = torch.Generator().manual_seed(0)  # leaves the global generator alone
    drawn = torch.empty_like(x).uniform_(generator=generator)
    sparse, denser = ((drawn < density).to(x.dtype) for density in (_SPARSE, _DENSER))
    calls = [(dense, sparse), (events, sparse), (events, denser)]
    best = [float("inf")] * len(calls)
    for repeat in range(_REPEATS + 1):
        for k, (function, argument) in enumerate(calls):
            start = time.perf_counter()
            function(argument)
            if repeat:  # the first calls build and allocate
                best[k] = min(best[k], time.perf_counter() - start)
    time_of_dense, low, high = best
    slope = max((high - low) / (_DENSER - _SPARSE), 1e-9)
    return min(max((_MARGIN * time_of_dense - low) / slope + _SPARSE, 0.0), _HIGHEST)


def _stored() -> dict[str, float]:
    """The measured values of the cache folder, and of the temporary folder that replaces it if it is read-only."""
    return {key: value for path in places(_name()) for key, value in _read(path).items()}


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(k): float(v) for k, v in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):  # not there yet, or not complete
        return {}


@functools.cache
def _machine() -> str:
    compiler = find_compiler()
    text = f"{identity_of(compiler) if compiler else ''}{torch.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _name() -> str:
    return f"crossovers_{_machine()}.json"
