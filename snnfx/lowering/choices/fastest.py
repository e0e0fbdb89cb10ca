"""The fastest of several functions that compute the same, for a key."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from snnfx.lowering.choices.permission import may_measure_now, pinned_by
from snnfx.lowering.choices.remembered import Key, Remembered
from snnfx.sandbox.rng_states import rng_restorer, rng_states

__all__ = ["Choice", "Fastest"]

_SECONDS = 0.01
"""Time of one measurement, about; a key is measured two or three times."""

_MOST_SECONDS = 0.03
_SAFE_ROUNDS, _MOST_ROUNDS = 3, 5
"""Other processes may interrupt one or two rounds; the safe number is only for measurements below the most seconds."""

_MARGIN = 0.9
"""Timings of two functions that are about as fast differ by so much."""


@dataclass(frozen=True)
class Choice:
    """A choice.

    Args:
        name: of the chosen function.
        reason: "measured", or why the fixed function was chosen, as a clause.
        is_final: False if a later call may choose another function.
    """

    name: str
    reason: str
    is_final: bool = True


class Fastest:
    """Chooses a function for each key: measured once for each machine, or fixed.

    Args:
        stem: the beginning of the name of the file that keeps the measurements.
        names: the names of the functions.
        clock: returns the time in seconds.
        margin: the part of the time of the fixed function below which another one is worth a change.
    """

    def __init__(
        self,
        stem: str,
        names: tuple[str, ...],
        clock: Callable[[], float] = time.perf_counter,
        margin: float = _MARGIN,
    ) -> None:
        self.names, self._clock, self._margin = names, clock, margin
        self.remembered: Remembered[str] = Remembered(
            stem,
            accept=lambda value: value if isinstance(value, str) and value in names else None,
            agree=lambda first, second: first if first == second else None,
            otherwise=lambda *measured: "",
        )

    def choose(self, key: Key, fixed: str, functions: Callable[[], Mapping[str, Callable[[], object]]]) -> Choice:
        """The choice for a key.

        Args:
            key: what the time depends on; the number of threads is added.
            fixed: the function to use unless another one is measured to be faster.
            functions: makes the functions by name, for a measurement. Those that draw random numbers are not timed.
        """
        pinned = pinned_by()
        if pinned:
            return Choice(fixed, f"fixed by {pinned}", is_final=False)
        key = (*key, torch.get_num_threads())
        found = self.remembered.known(key)
        if found is None:
            if not may_measure_now():
                return Choice(fixed, "fixed in a call that cannot be measured", is_final=False)
            found = self.remembered.get(key, lambda: self.measure(fixed, functions()))
        return Choice(found, "measured") if found else Choice(fixed, "fixed after three measurements that differ")

    def measure(self, fixed: str, functions: Mapping[str, Callable[[], object]]) -> str:
        """The name of the fastest function; the first round only builds and allocates."""
        if any(_draws_random_numbers(function) for function in functions.values()):
            return fixed
        best = dict.fromkeys(functions, float("inf"))
        begin = self._clock()
        for round_number in range(1, _MOST_ROUNDS + 1):
            for name, function in functions.items():
                start = self._clock()
                function()
                best[name] = min(best[name], self._clock() - start)
            if self._clock() - begin > (_SECONDS if round_number >= _SAFE_ROUNDS else _MOST_SECONDS):
                break
        fastest = min(best, key=lambda name: best[name])
        return fastest if best[fastest] < self._margin * best[fixed] else fixed


def _draws_random_numbers(function: Callable[[], object]) -> bool:
    """Call a function, and set the generators back if it draws random numbers."""
    states, restore = rng_states(), rng_restorer()
    function()
    if rng_states() == states:
        return False
    restore()
    return True
