"""snnfx runs under a profiler, which goes on measuring afterwards."""

from __future__ import annotations

import cProfile
import pstats
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

import snnfx
from snnfx.sandbox.random_draws import draws_undone, refusing_draws
from support.stepping import assert_converts


def measured_afterwards() -> int:
    return 3


def functions_in(profiler: cProfile.Profile) -> set[str]:
    return {name for _, _, name in pstats.Stats(profiler).stats}  # type: ignore[attr-defined]


def test_convert_runs_under_cprofile() -> None:
    model = nn.Sequential(nn.Linear(3, 4), snnfx.neuron.LIFNode(), nn.Dropout(0.0)).double()
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        assert_converts(model, torch.randn(4, 2, 3, dtype=torch.float64))
        measured_afterwards()
    finally:
        profiler.disable()
    assert {"convert", "measured_afterwards"} <= functions_in(profiler)


@pytest.mark.parametrize("context", [refusing_draws, draws_undone])
def test_a_profiler_measures_after_draws_were_observed(context: Callable[[], AbstractContextManager[None]]) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        with context():
            pass
        measured_afterwards()
    finally:
        profiler.disable()
    assert "measured_afterwards" in functions_in(profiler)


def test_a_profile_function_in_python_is_restored() -> None:
    def profile(frame: Any, event: str, argument: Any) -> None:
        pass

    sys.setprofile(profile)
    try:
        with draws_undone():
            assert sys.getprofile() is not profile
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
