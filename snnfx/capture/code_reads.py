"""The names that Python code reads and stores: globals, variables of a closure, attributes."""

from __future__ import annotations

import dis
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

import torch

from snnfx.sandbox.user_code import PACKAGE

__all__ = ["CodeReads", "is_library_code", "is_library_file", "reads_of"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_STANDARD_LIBRARY = os.path.join(sysconfig.get_paths()["stdlib"], "")
_READS_BY_NAME = frozenset(("getattr", "hasattr", "vars", "__dict__", "__getattribute__", "attrgetter"))
"""Names whose use means that code may read attributes that it does not name."""
_TESTS_OF_NAMES = frozenset(("getattr", "hasattr"))
"""Of these, functions that take a name, which may be a constant."""


@dataclass(frozen=True)
class CodeReads:
    """Names in the code of a function and of the functions defined inside it.

    Args:
        global_names: global variables, each with the attributes read from it: `cfg.a.k` is `("cfg", "a", "k")`.
        closure_names: the same for variables of the closure.
        attributes: all attribute names.
        reads_by_name: whether attributes may be read that are not in `attributes`.
        imports: modules imported inside the code, as `(name, level, imported names)`.
        stored_globals: global variables that the code assigns or deletes.
        stored_closure: variables of the closure that it assigns or deletes.
        stored_attributes: attributes that it assigns or deletes.
        read_attributes: attributes that it reads, other than to assign them in the same statement (`x.n += 1`).
        tested: the attribute names in calls such as `hasattr(x, "name")`, where the attribute may be absent.
    """

    global_names: frozenset[tuple[str, ...]]
    closure_names: frozenset[tuple[str, ...]]
    attributes: frozenset[str]
    reads_by_name: bool
    imports: frozenset[tuple[str, int, tuple[str, ...]]]
    stored_globals: frozenset[str]
    stored_closure: frozenset[str]
    tested: frozenset[str] = frozenset()
    stored_attributes: frozenset[str] = frozenset()
    read_attributes: frozenset[str] = frozenset()


@lru_cache(maxsize=4096)
def reads_of(code: CodeType) -> CodeReads:
    """The names that a code object reads and stores."""
    global_names: set[tuple[str, ...]] = set()
    closure_names: set[tuple[str, ...]] = set()
    attributes: set[str] = set()
    tested: set[str] = set()
    reads_by_name = False
    imports: set[tuple[str, int, tuple[str, ...]]] = set()
    stored_globals: set[str] = set()
    stored_closure: set[str] = set()
    stored_attributes: set[str] = set()
    read_attributes: set[str] = set()
    for part in _with_inner_code(code):
        chain: tuple[str, ...] = ()
        target = global_names
        constants: list[Any] = [0, None]  # the last two
        instructions = [*dis.get_instructions(part)]
        for index, instruction in enumerate(instructions):
            operation, name = instruction.opname, str(instruction.argval)
            if operation in ("EXTENDED_ARG", "CACHE"):
                continue
            if operation in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                attributes.add(name)
                if not index or instructions[index - 1].opname != "COPY":
                    read_attributes.add(name)
                if chain:
                    chain += (name,)
                continue
            if chain:
                target.add(chain)
                chain = ()
            if operation in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                constant = _constant_name(instructions, index) if name in _TESTS_OF_NAMES else None
                if constant is not None:
                    tested.add(constant)
                reads_by_name = reads_by_name or (name in _READS_BY_NAME and constant is None)
                chain, target = (name,), global_names
            elif operation in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"):
                if name in code.co_freevars:
                    chain, target = (name,), closure_names
            elif operation in ("LOAD_CONST", "LOAD_SMALL_INT"):
                constants = [constants[-1], instruction.argval]
            elif operation == "IMPORT_NAME":
                level, names = constants
                imports.add((name, level, names or ()))
            elif operation in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                stored_globals.add(name)
            elif operation in ("STORE_DEREF", "DELETE_DEREF") and name in code.co_freevars:
                stored_closure.add(name)
            elif operation in ("STORE_ATTR", "DELETE_ATTR", "IMPORT_FROM"):
                attributes.add(name)
                (read_attributes if operation == "IMPORT_FROM" else stored_attributes).add(name)
        if chain:
            target.add(chain)
    return CodeReads(
        frozenset(global_names),
        frozenset(closure_names),
        frozenset(attributes | tested),
        reads_by_name or not attributes.isdisjoint(_READS_BY_NAME),
        frozenset(imports),
        frozenset(stored_globals),
        frozenset(stored_closure),
        frozenset(tested),
        frozenset(stored_attributes),
        frozenset(read_attributes | tested),
    )


def _constant_name(instructions: list[dis.Instruction], index: int) -> str | None:
    """The name in `hasattr(x, "name")` or `getattr(x, "name", default)`, if no branch lies inside the call.

    Args:
        instructions: the instructions of a code object.
        index: the index of the instruction that loads `hasattr` or `getattr`.
    """
    depth, start, found = 0, 0, None
    for number, instruction in enumerate(instructions[index:]):
        operation = instruction.opname
        if instruction.opcode in dis.hasjrel or instruction.opcode in dis.hasjabs:
            return None
        before, depth = depth, depth + dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
        if number == 0:
            start = depth
        elif depth < start:  # the result replaces the function and its arguments
            return found if operation == "CALL" and depth == start - 1 else None
        elif operation in ("PRECALL", "CACHE", "EXTENDED_ARG"):
            continue
        elif depth == start + 1:
            found = None  # the first argument
        elif depth == start + 2:
            is_name = before == start + 1 and operation == "LOAD_CONST"  # otherwise the result of an operation
            found = instruction.argval if is_name and isinstance(instruction.argval, str) else None
    return None


def _with_inner_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner_code(constant)


def is_library_code(function: FunctionType) -> bool:
    """Whether a function belongs to torch, snnfx or the standard library, whose globals are not settings."""
    return is_library_file(function.__code__.co_filename)


def is_library_file(filename: str) -> bool:
    """Whether a file belongs to torch, snnfx or the standard library."""
    if filename.startswith((_TORCH, PACKAGE, "<frozen")):
        return True
    return filename.startswith(_STANDARD_LIBRARY) and "-packages" not in filename
