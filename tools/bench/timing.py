"""Time alternating implementations in a fresh process, with default or tuned malloc settings."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

__all__ = ["MALLOC", "alternate", "fresh_process"]

MALLOC: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
}
"""Environment variables: default settings, and those of `snnfx.tune_allocator()`, which keep freed blocks."""


def alternate(
    sides: dict[str, Callable[[], Any]],
    seconds: float,
    least: int = 5,
    *,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 2,
    wait: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Median milliseconds of a call of each implementation.

    Args:
        sides: functions to time. They alternate, in reverse order in every other round.
        seconds: minimum total time.
        least: minimum number of rounds, after the warm-up rounds.
        clock: the clock of the calls, in seconds; `time.process_time` on a shared machine.
        warm_up: number of rounds before those that count.
        wait: waits for work that a call only started, as on a GPU; its time is part of the call.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    begin, rounds = time.perf_counter(), -warm_up
    while rounds < least or time.perf_counter() - begin < seconds:
        order = list(sides.items()) if rounds % 2 else list(sides.items())[::-1]
        for name, call in order:
            start = clock()
            call()
            if wait is not None:
                wait()
            if rounds >= 0:
                times[name].append((clock() - start) * 1e3)
        rounds += 1
    return {name: statistics.median(values) for name, values in times.items()}


@contextlib.contextmanager
def fresh_process(malloc: str) -> Iterator[Callable[..., Any]]:
    """Yield a function that calls another one in a new process; arguments and results must be picklable."""
    saved = dict(os.environ)
    os.environ.update(MALLOC[malloc])
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            yield lambda function, *args: pool.submit(function, *args).result()
    finally:
        for key in MALLOC[malloc]:
            os.environ.pop(key, None)
        os.environ.update(saved)
