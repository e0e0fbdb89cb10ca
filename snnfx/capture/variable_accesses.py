"""Find the global variables and the attributes that a step reads before it sets them.

A variable that a step sets first carries no value from one step to the next. The order of reads and writes comes from
the instructions that run: the code alone does not tell it, because one function may set what another one reads.

On Python 3.11 the instructions come from opcode events of `sys.settrace`, on later versions from the INSTRUCTION events
of `sys.monitoring`. Only code with the names of such variables gets such events.
"""

from __future__ import annotations

import dis
import sys
import threading
import types
from collections.abc import Iterable
from types import CodeType, FrameType
from typing import Any

from snnfx.capture.code_reads import is_library_file

__all__ = ["ATTRIBUTE", "VariableAccesses"]

_LOADS = frozenset(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"))
_STORES = frozenset(("STORE_GLOBAL", "DELETE_GLOBAL"))
_ATTRIBUTES = frozenset(("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM"))
_OWN_NAMESPACE = frozenset(("globals", "__globals__"))
"""Names whose use may read any variable of the Python module with the code."""
_READS_BY_NAME = frozenset(("getattr", "hasattr", "vars", "__dict__", "attrgetter"))
"""Names whose use may read any variable of a Python module that the code imports."""


ATTRIBUTE = 0
"""Stands for the `id` of a namespace in the accesses to attributes."""


class VariableAccesses:
    """Follows the reads and writes of global variables in the current thread while it is entered.

    Args:
        variables: the namespaces, each with the name of a variable in it.
        attributes: names of attributes to follow; those of several objects are not told apart.

    Attributes:
        set: the variables that were set, by the `id` of the namespace and the name.
        read: the variables that were read.
        read_first: the variables that were read before they were set.
    """

    def __init__(self, variables: Iterable[tuple[dict[str, Any], str]], attributes: Iterable[str] = ()) -> None:
        self._attributes = frozenset(attributes)
        self._names: dict[int, set[str]] = {}
        for namespace, name in variables:
            self._names.setdefault(id(namespace), set()).add(name)
        self._concerning = _OWN_NAMESPACE.union(_READS_BY_NAME, self._attributes, *self._names.values())
        self._codes: dict[tuple[int, int], tuple[CodeType, dict[int, _Access]]] = {}
        self.set: set[tuple[int, str]] = set()
        self.read_first: set[tuple[int, str]] = set()
        self.read: set[tuple[int, str]] = set()

    def __enter__(self) -> VariableAccesses:
        if self._names or self._attributes:
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._names or self._attributes:
            self._stop()

    def _accesses(self, code: CodeType, namespace: dict[str, Any]) -> dict[int, _Access]:
        """What each instruction of the code does to the variables, by its offset."""
        key = id(code), id(namespace)
        if key not in self._codes:
            concerns = not is_library_file(code.co_filename) and not self._concerning.isdisjoint(code.co_names)
            self._codes[key] = code, self._accesses_of_instructions(code, namespace) if concerns else {}
        return self._codes[key][1]

    def _accesses_of_instructions(self, code: CodeType, namespace: dict[str, Any]) -> dict[int, _Access]:
        instructions = [*dis.get_instructions(code)]
        own = id(namespace)
        imported = {id(vars(value)) for value in namespace.values() if type(value) is types.ModuleType}
        if any(i.opname == "IMPORT_NAME" for i in instructions):
            imported |= self._names.keys()
        others = [n for n in self._names if n in imported and n != own]
        found: dict[int, _Access] = {}
        prefixes: list[int] = []
        for instruction in instructions:
            operation, name = instruction.opname, str(instruction.argval)
            if operation == "EXTENDED_ARG":
                prefixes.append(instruction.offset)
                continue
            reads: list[tuple[int, str]] = []
            if operation in (*_LOADS, *_ATTRIBUTES):
                if name in _OWN_NAMESPACE:
                    reads += [(own, v) for v in self._names.get(own, ())]
                if name in _READS_BY_NAME or name in _OWN_NAMESPACE:
                    reads += [(n, v) for n in others for v in self._names[n]]
            if operation in _LOADS and name in self._names.get(own, ()):
                reads.append((own, name))
            if operation in _ATTRIBUTES:
                reads += [(n, name) for n in others if name in self._names[n]]
                reads += [(ATTRIBUTE, name)] if name in self._attributes else []
                reads += [(ATTRIBUTE, v) for v in self._attributes] if name in _READS_BY_NAME else []
            elif name in _READS_BY_NAME and operation in _LOADS:
                reads += [(ATTRIBUTE, v) for v in self._attributes]
            access = tuple((n, v, False) for n, v in reads)
            if operation in ("STORE_ATTR", "DELETE_ATTR") and name in self._attributes:
                access = ((ATTRIBUTE, name, True),)
            if operation in _STORES and name in self._names.get(own, ()):
                access = ((own, name, True),)
            if access:
                # The event of an instruction with a prefix may come at the prefix alone.
                found.update(dict.fromkeys((*prefixes, instruction.offset), access))
            prefixes.clear()
        return found

    def _arrive(self, accesses: dict[int, _Access], offset: int) -> None:
        for namespace, name, is_store in accesses.get(offset, ()):
            if is_store:
                self.set.add((namespace, name))
                continue
            self.read.add((namespace, name))
            if (namespace, name) not in self.set:
                self.read_first.add((namespace, name))

    # -- Python 3.11 ------------------------------------------------------------------------------------------------

    def on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        """The trace function of a frame, for `sys.settrace`; None for code without an access."""
        accesses = self._accesses(frame.f_code, frame.f_globals)
        if not accesses:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def on_opcode(frame: FrameType, event: str, argument: Any) -> Any:
            if event == "opcode":
                self._arrive(accesses, frame.f_lasti)
            return on_opcode

        return on_opcode

    if sys.version_info < (3, 12):

        def _start(self) -> None:
            self._before = sys.gettrace()
            sys.settrace(self.on_call)

        def _stop(self) -> None:
            sys.settrace(self._before)

    # -- Python 3.12 and later ----------------------------------------------------------------------------------------

    else:

        def _start(self) -> None:
            monitoring, events = sys.monitoring, sys.monitoring.events
            self._tool = next(tool for tool in range(6) if monitoring.get_tool(tool) is None)
            monitoring.use_tool_id(self._tool, "snnfx variables")
            self._thread = threading.get_ident()
            self._watched: set[CodeType] = set()
            monitoring.register_callback(self._tool, events.INSTRUCTION, self._on_instruction)
            for event in (events.PY_START, events.PY_RESUME):
                monitoring.register_callback(self._tool, event, self._on_start)
            monitoring.set_events(self._tool, events.PY_START | events.PY_RESUME)

        def _on_start(self, code: CodeType, offset: int) -> None:
            if code not in self._watched and self._accesses(code, sys._getframe(1).f_globals):
                self._watched.add(code)
                sys.monitoring.set_local_events(self._tool, code, sys.monitoring.events.INSTRUCTION)

        def _on_instruction(self, code: CodeType, offset: int) -> None:
            if threading.get_ident() == self._thread:
                self._arrive(self._accesses(code, sys._getframe(1).f_globals), offset)

        def _stop(self) -> None:
            for code in self._watched:
                sys.monitoring.set_local_events(self._tool, code, 0)
            sys.monitoring.set_events(self._tool, 0)
            sys.monitoring.free_tool_id(self._tool)


_Access = tuple[tuple[int, str, bool], ...]
"""The namespaces and names of the variables that an instruction reads, or sets if the flag is true."""
