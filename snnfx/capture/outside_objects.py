"""The attributes of objects, classes and Python modules outside the model that a step may assign.

They are found from the global and closure variables that the code of the step reads, by the names that it assigns.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snnfx.capture.guarded_reads import ReachableCode, is_foreign, is_foreign_name, variables_of
from snnfx.ir.guards import ABSENT
from snnfx.sandbox.contents_snapshot import slot_names

__all__ = ["OutsideAttribute", "OutsideObjects"]

_MAX_DEPTH = 3


@dataclass(frozen=True)
class OutsideAttribute:
    """An attribute of an object outside the model, with its value before the step.

    Args:
        owner: the object.
        name: the name of the attribute.
        shown: the expression that reads it in the code of the step.
        old: the value; ABSENT if there is none.
    """

    owner: Any
    name: str
    shown: str
    old: Any

    def now(self) -> Any:
        """The present value."""
        if isinstance(self.owner, types.ModuleType | type):
            return vars(self.owner).get(self.name, ABSENT)
        own = getattr(self.owner, "__dict__", {})
        return own[self.name] if self.name in own else _of_slot(self.owner, self.name)

    def restore(self) -> None:
        """Assign the value before the step again."""
        if self.now() is self.old:
            return
        if isinstance(self.owner, type):
            type.__delattr__(self.owner, self.name) if self.old is ABSENT else type.__setattr__(
                self.owner, self.name, self.old
            )
        elif self.old is ABSENT:
            object.__delattr__(self.owner, self.name)
        else:
            object.__setattr__(self.owner, self.name, self.old)


class OutsideObjects:
    """Finds the attributes outside the model that the code of a step may assign.

    Args:
        code: the code that the step can reach.
    """

    def __init__(self, code: ReachableCode) -> None:
        self._code = code
        self._stored: set[str] = set()
        self._seen: set[int] = set()
        self.attributes: list[OutsideAttribute] = []
        size = -1
        while size != (size := len(code.functions)):  # the methods of an object that was found may lead to others
            self._seen.clear()
            self.attributes.clear()
            self._stored = {name for reads in code.functions.values() for name in reads.stored_attributes}
            self._find()
            code.close()

    def _find(self) -> None:
        for function, reads in [*self._code.functions.items()]:
            for value, chain, _, (_, name) in variables_of(function, reads):
                self._follow(value, chain, str(name))
            for name, level, _ in reads.imports:
                module = sys.modules.get(name) if not level else None
                if module is not None:
                    self._follow(module, (), name)

    def _follow(self, value: Any, chain: tuple[str, ...], shown: str) -> None:
        self._add(value, shown, 0)
        for name in chain:
            value = vars(value).get(name) if isinstance(value, types.ModuleType | type) else None
            shown = f"{shown}.{name}"
            self._add(value, shown, 0)

    def _add(self, value: Any, shown: str, depth: int) -> None:
        if id(value) in self._seen or depth > _MAX_DEPTH or not _has_attributes(value):
            return
        self._seen.add(id(value))
        for name in self._stored:
            attribute = OutsideAttribute(value, name, f"{shown}.{name}", ABSENT)
            old = attribute.now()
            if not isinstance(old, types.FunctionType | property | staticmethod | classmethod):
                self.attributes.append(OutsideAttribute(value, name, attribute.shown, old))
        if not isinstance(value, types.ModuleType | type):
            self._code.add_class(type(value))
            for name, element in _elements(value):
                if name in self._code.names:
                    self._add(element, f"{shown}.{name}", depth + 1)


def _has_attributes(value: Any) -> bool:
    """Whether a value belongs to the user and its attributes can be assigned."""
    if isinstance(value, types.ModuleType):
        return not is_foreign_name(value.__name__)
    if isinstance(value, type):
        return not is_foreign(value) and not issubclass(value, nn.Module)
    if isinstance(value, Tensor | nn.Module | types.FunctionType):
        return False
    is_plain = isinstance(value, types.SimpleNamespace) or not is_foreign(type(value))
    return is_plain and (hasattr(value, "__dict__") or bool(slot_names(type(value))))


def _elements(value: Any) -> Iterator[tuple[str, Any]]:
    yield from [*getattr(value, "__dict__", {}).items()]
    for name in slot_names(type(value)):
        yield name, _of_slot(value, name)


def _of_slot(value: Any, name: str) -> Any:
    return getattr(value, name, ABSENT) if name in slot_names(type(value)) else ABSENT
