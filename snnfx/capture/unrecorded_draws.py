"""Detect random numbers that a step draws without recording a node; a net would repeat them at every call.

The random number generators belong to all threads of a process. Capture neither compares nor restores their states:
another thread may draw meanwhile. It detects the draws of its own thread before they happen: those of torch by a
dispatch mode, those of Python by a profile function. NumPy's draws are visible to neither; its state is compared if the
step runs code that refers to `numpy.random`.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
from torch import nn

from snnfx.capture.inline_modules import is_traced_inline
from snnfx.capture.iteration_tracking import IterationTracker
from snnfx.capture.recorder import Recorder
from snnfx.capture.recording_copy import is_recording_module
from snnfx.errors import CaptureError
from snnfx.sandbox.profile_function import restore_profile
from snnfx.sandbox.random_draws import PYTHON_GENERATOR, refers_to_numpy_random
from snnfx.sandbox.rng_states import numpy_rng_state, restore_numpy_rng_state
from snnfx.sandbox.torch_internals import TorchDispatchMode
from snnfx.sandbox.user_code import format_location, location_of_forward, user_location

__all__ = ["PythonDraw", "UnrecordedDraws", "refuse_unregistered_module"]

_DRAWS = ("random", "getrandbits", "seed", "setstate")
"""The methods of Python's generator in C, which all its other methods call."""
_DRAW_FROM_TORCH = ("torch", "_operator", "builtins", "math", "snnfx.", "spikingjelly.", "snntorch.", "norse.")
"""Packages that draw all random numbers from generators of torch."""
_SEEDS = ("manual_seed", "seed", "set_state", "set_offset", "graphsafe_set_state")
_CALL = nn.Module.__call__.__code__


class PythonDraw(Exception):
    """The step is about to draw a random number from Python."""


class UnrecordedDraws:
    """Detects the draws of one trace inside its context.

    Args:
        recorder: records the step.
        tracker: follows the loops of the step's code, if they are recorded.
    """

    def __init__(self, recorder: Recorder, tracker: IterationTracker | None = None) -> None:
        self._recorder, self._tracker = recorder, tracker
        self._refusal: CaptureError | None = None
        self._drew_from_python = False
        self._numpy_state: Any = None
        self._refers_to_numpy: dict[int, tuple[CodeType, bool]] = {}
        self._keeps_profile = False
        self._python_state: Any = None

    @contextlib.contextmanager
    def detected(self) -> Iterator[None]:
        """Detect draws inside the context.

        Raises:
            CaptureError: SNNFX215, the step draws from a generator of torch.
            PythonDraw: the step draws from Python's global generator.
        """
        before = sys.getprofile()
        with _RefusingDraws(self):
            sys.setprofile(self._profile)
            try:
                yield
            finally:
                restore_profile(before)
        if self._refusal is not None:
            raise self._refusal

    def from_python_or_numpy(self) -> bool:
        """Whether the step drew from the generators of Python or NumPy; NumPy's state is restored."""
        return self._drew_from_python or self._restore_numpy()

    def unobserved(self) -> _Unobserved:
        """Run code of snnfx and operations of torch at full speed: they draw nothing from Python and have no loops."""
        return _Unobserved(None if self._keeps_profile else sys.getprofile(), self._tracker)

    @contextlib.contextmanager
    def allowed_in(self, *modules: str) -> Iterator[None]:
        """Run code of these Python modules on example values; afterwards Python and NumPy have drawn nothing."""
        if self._keeps_profile or all(name.startswith(_DRAW_FROM_TORCH) for name in modules):
            yield
            return
        profile, self._keeps_profile = sys.getprofile(), True
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            self._keeps_profile = False
            self._restore_numpy()
            if self._python_state is not None:
                random.setstate(self._python_state)
                self._python_state = None
            restore_profile(profile)

    def refuse_torch(self, where: str) -> None:
        """Raise the error for a draw from a generator of torch."""
        self._refusal = CaptureError(
            "SNNFX215",
            "the step draws random numbers that the graph does not record",
            where=where or location_of_forward(self._recorder.root),
            why="every call of the net would use the same numbers.",
            hint="Draw them with torch.rand, torch.randn, torch.rand_like or torch.bernoulli of a recorded value.",
        )
        raise self._refusal

    @property
    def is_evaluating(self) -> bool:
        """Whether Python runs on example values, on which torch draws nothing."""
        return self._recorder.is_evaluating

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            owner = getattr(argument, "__self__", None)
            kind = type(owner)
            if kind is random.Random:
                if owner is PYTHON_GENERATOR and argument.__name__ in _DRAWS:
                    self._before_python_draw()
            elif kind is torch.Generator and owner is torch.default_generator and argument.__name__ in _SEEDS:
                self.refuse_torch(format_location(user_location()))
        elif event == "call":
            code = frame.f_code
            if code is _CALL:
                module = frame.f_locals["self"]
                is_unknown = not is_recording_module(module) and not is_traced_inline(module)
                if is_unknown and not self._recorder.is_evaluating:
                    refuse_unregistered_module(module)
            elif self._numpy_state is None:
                known = self._refers_to_numpy.get(id(code))  # hashing code takes longer than a call of it
                if known is None:
                    known = self._refers_to_numpy[id(code)] = code, refers_to_numpy_random(code, frame.f_globals)
                if known[1]:
                    self._numpy_state = numpy_rng_state()

    def _before_python_draw(self) -> None:
        if self._keeps_profile:
            if self._python_state is None:
                self._python_state = random.getstate()
            return
        self._drew_from_python = True
        raise PythonDraw

    def _restore_numpy(self) -> bool:
        if self._numpy_state is None or numpy_rng_state() == self._numpy_state:
            return False
        restore_numpy_rng_state(self._numpy_state)
        return True


class _Unobserved:
    """Runs its context without the profile function and without the tracker of loops."""

    __slots__ = ("_follow", "_profile", "_tracker")

    def __init__(self, profile: Any, tracker: IterationTracker | None) -> None:
        self._profile, self._tracker = profile, tracker

    def __enter__(self) -> None:
        self._follow = None if self._tracker is None else self._tracker.pause()
        if self._profile is not None:
            sys.setprofile(None)

    def __exit__(self, *exc_info: object) -> None:
        if self._tracker is not None:
            self._tracker.resume(self._follow)
        if self._profile is not None:
            restore_profile(self._profile)


def refuse_unregistered_module(module: nn.Module) -> NoReturn:
    """Refuse a call of a module that is not a submodule of the model."""
    raise CaptureError(
        "SNNFX211",
        f"the model calls a {type(module).__name__} that is not one of its submodules",
        where=format_location(user_location()),
        why="snnfx can trace only registered modules.",
        hint="Assign it as an attribute of a module, or use nn.ModuleList or nn.ModuleDict.",
    )


class _RefusingDraws(TorchDispatchMode):
    """Refuses operators that draw random numbers from a generator of torch."""

    def __init__(self, draws: UnrecordedDraws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not self.draws.is_evaluating:
            self.draws.refuse_torch(format_location(user_location()))
        return func(*args, **(kwargs or {}))
