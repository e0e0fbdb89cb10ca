"""The density below which a product is faster by events, measured once for each machine and shape.

The first call of a shape times the dense product and the kernel at two densities, on a part of the batch: the time of
the kernel grows linearly with the density. `snnfx.lowering.choices.remembered` keeps the result; of three measurements
that do not agree the median holds. Where choices are pinned (`snnfx.lowering.choices.permission`), a
fixed density decides, so that equal inputs run alike in each process.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from snnfx.lowering.choices.permission import may_measure_now, pinned_by
from snnfx.lowering.choices.remembered import Remembered

__all__ = ["FIXED", "REMEMBERED", "crossover"]

FIXED = 0.15
"""The crossover of calls that must not be measured."""

_SPARSE, _DENSER, _HIGHEST = 0.05, 0.3, 0.9
_MARGIN = 0.95
"""The part of the dense time that the kernel may take at the crossover."""

_REPEATS = 3
_AGREEMENT = 0.1
"""The largest difference of two measurements that agree."""

REMEMBERED: Remembered[float] = Remembered(
    "crossovers",
    accept=lambda value: float(value) if isinstance(value, int | float) else None,
    agree=lambda first, second: (first + second) / 2 if abs(first - second) <= _AGREEMENT else None,
    otherwise=lambda *measured: sorted(measured)[1],
)


def crossover(
    key: tuple[object, ...], x: Tensor, dense: Callable[[Tensor], Tensor], events: Callable[[Tensor], Tensor | None]
) -> float:
    """The crossover of a shape; measured if it is unknown.

    Args:
        key: identifies the shape; its text identifies it on disk.
        x: an example input; only its shape and memory format are used.
        dense, events: both ways to compute the product.
    """
    if pinned_by():
        return FIXED
    key = (*key, torch.get_num_threads())
    found = REMEMBERED.known(key)
    if found is None:
        found = REMEMBERED.get(key, lambda: _measure(x, dense, events)) if may_measure_now() else FIXED
    return found


@torch.no_grad()
def _measure(x: Tensor, dense: Callable[[Tensor], Tensor], events: Callable[[Tensor], Tensor | None]) -> float:
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
