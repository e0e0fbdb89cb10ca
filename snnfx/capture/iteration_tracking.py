"""Label recorded nodes with the iterations of the Python loops that recorded them.

A loop is a backward jump in the bytecode: its extent reaches from the target of the jump to the jump. The tracker
follows the control flow of the capturing thread, so it knows in which iteration of which loop each frame is. The
position of one instruction is not enough: nested loops, loops that run again, and `continue` would be confused.

On Python 3.11 the control flow comes from opcode events of `sys.settrace`, on later versions from the JUMP and BRANCH
events of `sys.monitoring`. Only frames of user code with a loop in them get such events.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import numbers
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import CodeType, FrameType, TracebackType
from typing import Any

from torch import Tensor, fx

from snnfx.capture.variable_accesses import VariableAccesses
from snnfx.sandbox.user_code import is_library_code

__all__ = [
    "CalledFunction",
    "FunctionKey",
    "Iteration",
    "IterationLimit",
    "IterationTracker",
    "Kinds",
    "LoopSource",
    "LoopValues",
    "TooManyIterations",
]


FunctionKey = tuple[str, str, int]
"""File, name and first line of a function of the user."""

Kinds = dict[str, set[str]]
"""The kinds of the values of each variable: "tensor", "tensors" (a list of them), "number" or "other"."""


@dataclass
class CalledFunction:
    """A function of the user that the iterations of a loop call.

    Args:
        kinds: the kinds of its variables.
        sites: file and line of the user's code that calls it.
    """

    kinds: Kinds = field(default_factory=dict)
    sites: set[tuple[str, int]] = field(default_factory=set)


@dataclass
class LoopValues:
    """The code and the variables of a loop that runs.

    Args:
        called: the functions that its iterations call and that record nodes.
        kinds: the kinds of the variables of the function with the loop.
    """

    called: dict[FunctionKey, CalledFunction] = field(default_factory=dict)
    kinds: Kinds = field(default_factory=dict)
    noted: tuple[int, int] | None = None
    """The latest run and iteration whose variables are known."""

    def note_variables(self, frame: FrameType, iteration: tuple[int, int]) -> None:
        """Note the kinds of the variables, once for each iteration."""
        if self.noted != iteration:
            self.noted = iteration
            _note_kinds(self.kinds, frame)

    def note_calls(self, calls: Iterable[tuple[FunctionKey, FrameType, tuple[str, int]]]) -> None:
        """Note functions that run in an iteration: `(function, its frame, file and line of the call)`."""
        for key, frame, site in calls:
            function = self.called.setdefault(key, CalledFunction())
            function.sites.add(site)
            _note_kinds(function.kinds, frame)


def _note_kinds(kinds: Kinds, frame: FrameType) -> None:
    for name, value in frame.f_locals.items():
        kinds.setdefault(name, set()).add(_kind_of(value))


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor | fx.Proxy):
        return "tensor"
    if isinstance(value, list | tuple | dict):
        values = list(value.values() if isinstance(value, dict) else value)
        return "tensors" if all(_kind_of(v) in ("tensor", "tensors") for v in values) else "other"
    return "number" if isinstance(value, numbers.Number) else "other"


@dataclass(frozen=True)
class LoopSource:
    """A loop in the user's code.

    Args:
        filename, line, column: the position of its first instruction.
        function: the qualified name of the function with the loop.
        of_module: whether the loop is the call of a library module on sequences at this line; `function` is its name.
        values: the code and the variables of its iterations.
    """

    filename: str
    line: int
    column: int
    function: str
    of_module: bool = False
    values: LoopValues = field(default_factory=LoopValues, compare=False)

    @property
    def where(self) -> tuple[str, int] | None:
        """File and line; None for a library module that no code of the user calls."""
        return (self.filename, self.line) if self.filename else None


@dataclass(frozen=True)
class Iteration:
    """One iteration of a loop that runs.

    Args:
        source: the loop in the user's code.
        run: a number for this run of the loop: a loop in a method that is called twice runs twice.
        index: the number of the iteration.
    """

    source: LoopSource
    run: int
    index: int


class TooManyIterations(BaseException):
    """Ends a capture whose loops run longer than its `IterationLimit`; no handler in the model may catch it."""


@dataclass(frozen=True)
class IterationLimit:
    """The most iterations of a loop that a capture records; None: any number."""

    most: int | None = None

    def check(self, iterations: tuple[Iteration, ...]) -> None:
        """Raise TooManyIterations if one of the loops has reached the limit."""
        if self.most is not None and any(i.index >= self.most for i in iterations):
            raise TooManyIterations


@dataclass(frozen=True)
class _Extent:
    """The instructions of a loop: offsets `start` to `end`, and the offsets of the jumps back to `start`."""

    source: LoopSource
    start: int
    end: int
    jumps: frozenset[int]


class IterationTracker:
    """Follows the loops of user code in the current thread while it is entered."""

    def __init__(self) -> None:
        self._frames: dict[FrameType, _FrameLoops] = {}
        self._extents: dict[int, tuple[CodeType, tuple[_Extent, ...]]] = {}
        self._functions: dict[int, tuple[CodeType, FunctionKey | None]] = {}
        """User code by name; None for other code."""
        self._runs = 0
        self._of_modules: list[Iteration] = []
        """The iterations of loops of library modules that run, the outermost first."""

    @contextlib.contextmanager
    def loop(self, source: LoopSource) -> Iterator[Callable[[], None]]:
        """Label nodes with the iterations of a loop that capture itself runs; yields a call for the next iteration."""
        run, index = self.next_run(), -1

        def next_iteration() -> None:
            nonlocal index
            if index >= 0:
                self._of_modules.pop()
            index += 1
            self._of_modules.append(Iteration(source, run, index))

        try:
            yield next_iteration
        finally:
            if index >= 0:
                self._of_modules.pop()

    def current(self) -> tuple[Iteration, ...]:
        """The iterations that the running code belongs to, the outermost loop first."""
        found: list[Iteration] = []
        calls: list[tuple[FunctionKey, FrameType, tuple[str, int]]] = []
        inner: tuple[FunctionKey, FrameType] | None = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            known = self._functions.get(id(code))  # hashing code takes longer than a call of it
            if known is None:
                name = (code.co_filename, code.co_name, code.co_firstlineno) if _is_user_code(code) else None
                known = self._functions[id(code)] = code, name
            if known[1] is not None:
                if inner is not None:
                    calls.append((*inner, (code.co_filename, frame.f_lineno)))
                inner = known[1], frame
            loops = self._frames.get(frame)
            if loops is not None:
                loops.arrive(frame.f_lasti)
                running = loops.iterations()
                for iteration in running:
                    iteration.source.values.note_calls(calls)
                    iteration.source.values.note_variables(frame, (iteration.run, iteration.index))
                found += reversed(running)
            frame = frame.f_back
        return (*reversed(found), *self._of_modules)

    def __enter__(self) -> IterationTracker:
        if sys.version_info >= (3, 12):
            self._start_monitoring()
        else:
            self._before = sys.gettrace()
            of_variables = isinstance(getattr(self._before, "__self__", None), VariableAccesses)
            self._beside = self._before if of_variables else None
            sys.settrace(self._on_call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if sys.version_info >= (3, 12):
            self._stop_monitoring()
        else:
            sys.settrace(self._before)
        self._frames.clear()

    def pause(self) -> Any:
        """Stop following the control flow; returns the argument of `resume`, or None if nothing is followed."""
        follow = sys.gettrace()
        if follow is None or getattr(follow, "__self__", None) is not self:
            return None
        sys.settrace(None)
        return follow

    def resume(self, follow: Any) -> None:
        """Follow the control flow again, after `pause`."""
        if follow is not None:
            sys.settrace(follow)

    def loops_of(self, frame: FrameType) -> _FrameLoops | None:
        """The loops of a frame of user code; None for other frames and for code without loops."""
        loops = self._frames.get(frame)
        if loops is None:
            code = frame.f_code
            known = self._extents.get(id(code))  # hashing code takes longer than a call of it
            if known is None:
                extents = [replace(e, source=replace(e.source, values=LoopValues())) for e in _extents(code)]
                known = self._extents[id(code)] = code, tuple(extents)
            if not known[1]:
                return None
            loops = self._frames[frame] = _FrameLoops(known[1], self)
        return loops

    def next_run(self) -> int:
        self._runs += 1
        return self._runs

    # -- Python 3.11 ------------------------------------------------------------------------------------------------

    def _on_call(self, frame: FrameType, event: Any, argument: Any) -> Any:
        follow = self._follow_loops(frame)
        beside = self._beside(frame, event, argument) if self._beside is not None else None
        if follow is None or beside is None:
            return follow or beside

        def on_opcode(frame: FrameType, event: Any, argument: Any) -> Any:
            follow(frame, event, argument)
            beside(frame, event, argument)
            return on_opcode

        return on_opcode

    def _follow_loops(self, frame: FrameType) -> Any:
        """The trace function of a frame; None for code without loops."""
        known = self._extents.get(id(frame.f_code))
        if known is not None and not known[1]:  # most calls
            return None
        loops = self.loops_of(frame)
        if loops is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def on_opcode(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "opcode":
                loops.arrive(frame.f_lasti)
            elif event == "return" and not frame.f_code.co_flags & inspect.CO_GENERATOR:
                self._frames.pop(frame, None)
            return on_opcode

        return on_opcode

    # -- Python 3.12 and later ----------------------------------------------------------------------------------------

    if sys.version_info >= (3, 12):

        def _start_monitoring(self) -> None:
            monitoring, events = sys.monitoring, sys.monitoring.events
            self._tool = next(tool for tool in range(6) if monitoring.get_tool(tool) is None)
            monitoring.use_tool_id(self._tool, "snnfx capture")
            self._thread = threading.get_ident()
            self._watched: set[CodeType] = set()
            self._jumps = events.JUMP
            # Python 3.14 splits BRANCH into two events.
            for name in (
                ("JUMP", "BRANCH_LEFT", "BRANCH_RIGHT") if hasattr(events, "BRANCH_LEFT") else ("JUMP", "BRANCH")
            ):
                event = getattr(events, name)
                monitoring.register_callback(self._tool, event, self._on_jump)
                self._jumps |= event
            starts = events.PY_START | events.PY_RESUME
            for event in (events.PY_START, events.PY_RESUME):
                monitoring.register_callback(self._tool, event, self._on_start)
            monitoring.set_events(self._tool, starts)

        def _on_start(self, code: CodeType, offset: int) -> None:
            if code not in self._watched and _extents(code):
                self._watched.add(code)
                sys.monitoring.set_local_events(self._tool, code, self._jumps)

        def _on_jump(self, code: CodeType, offset: int, destination: int) -> None:
            if threading.get_ident() != self._thread:
                return
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code is not code:
                frame = frame.f_back
            loops = self.loops_of(frame) if frame is not None else None
            if loops is not None:
                loops.arrive(offset)
                loops.arrive(destination)

        def _stop_monitoring(self) -> None:
            for code in self._watched:
                sys.monitoring.set_local_events(self._tool, code, 0)
            sys.monitoring.set_events(self._tool, 0)
            sys.monitoring.free_tool_id(self._tool)


class _FrameLoops:
    """The loops of one frame, with the iterations that it is in."""

    def __init__(self, extents: tuple[_Extent, ...], tracker: IterationTracker) -> None:
        self._extents, self._tracker = extents, tracker
        self._running: dict[_Extent, tuple[int, int]] = {}
        self._offset = -1

    def arrive(self, offset: int) -> None:
        """Follow the control flow to an instruction."""
        previous, self._offset = self._offset, offset
        if previous == offset:
            return
        for extent in self._extents:
            if not extent.start <= offset <= extent.end:
                self._running.pop(extent, None)
            elif extent not in self._running:
                self._running[extent] = self._tracker.next_run(), 0
            elif offset == extent.start and previous in extent.jumps:
                run, index = self._running[extent]
                self._running[extent] = run, index + 1

    def iterations(self) -> list[Iteration]:
        """The current iterations, the outermost loop first."""
        return [Iteration(e.source, *self._running[e]) for e in self._extents if e in self._running]


_PYTHON = sysconfig.get_path("stdlib") + "/"


@functools.lru_cache(maxsize=1024)
def _is_user_code(code: CodeType) -> bool:
    of_python = code.co_filename.startswith(_PYTHON) and "site-packages" not in code.co_filename
    return not of_python and not is_library_code(code)


@functools.lru_cache(maxsize=1024)
def _extents(code: CodeType) -> tuple[_Extent, ...]:
    """The loops of user code, the outermost first; none for code of torch, snnfx and Python itself."""
    if not _is_user_code(code):
        return ()
    jumps: dict[int, set[int]] = {}
    positions = {}
    prefixes: list[int] = []
    for instruction in dis.get_instructions(code):
        positions[instruction.offset] = instruction.positions
        if instruction.opname == "EXTENDED_ARG":
            prefixes.append(instruction.offset)
            continue
        if "JUMP_BACKWARD" in instruction.opname:
            # The jump of a long loop has a prefix, and its event may come at the prefix alone.
            jumps.setdefault(instruction.argval, set()).update(prefixes, [instruction.offset])
        prefixes.clear()
    extents = []
    for start, sources in jumps.items():
        position = positions[start]
        line = (position.lineno if position is not None else None) or code.co_firstlineno
        column = (position.col_offset if position is not None else None) or 0
        source = LoopSource(code.co_filename, line, column, code.co_qualname)
        extents.append(_Extent(source, start, max(sources), frozenset(sources)))
    return tuple(sorted(extents, key=lambda e: (e.start, -e.end)))
