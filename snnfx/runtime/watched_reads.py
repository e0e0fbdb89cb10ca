"""Prove at once that many guarded values are unchanged, by the versions of the dicts that contain them.

The code of a library reads hundreds of globals: functions of its modules, loggers, tables. Python changes the version
of a dict at each write, so a few comparisons show that all of its values are still the same objects. Other attributes
and the elements of lists are read again and compared by identity. Only reads that end at another mutable value, such
as a set, still run the test of their guard.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from types import ModuleType
from typing import Any

from snnfx.ir.guards import ABSENT, Guard, NamespaceRoot
from snnfx.sandbox.torch_internals import dict_version

__all__ = ["WatchedReads"]

_FEWEST_READS = 16
"""Guards below which their own tests are faster."""
_MOST_UPDATES = 64

_Place = int | tuple[int, str]
"""The id of a dict or list, or the id of an object with the name of an attribute."""

_IMPLIED = ("same", "value", "some")
"""Tests whose result follows from the identity of an immutable value."""
_IMMUTABLE = (bool, int, float, complex, str, bytes, type(None))


class WatchedReads:
    """Guards of values in namespaces of modules, watched once they hold.

    Args:
        reads: the guards of a program.
        compiled: makes a function that returns the index of the first guard that fails, or -1.
    """

    def __init__(self, reads: Sequence[Guard], compiled: Callable[[list[Guard]], Callable[[], int]]) -> None:
        self._compiled = compiled
        self._changing: set[_Place] = set()
        """The places that changed between two calls although all guards hold: their guards are tested."""
        self._updates = 0 if sum(isinstance(r.root, NamespaceRoot) for r in reads) >= _FEWEST_READS else _MOST_UPDATES
        self._reads = list(reads)
        self._watch: _Watch | None = None

    def are_unchanged(self) -> bool:
        """Whether all guards hold because nothing has changed since `update`; False if that is unknown."""
        watch = self._watch
        return watch is not None and watch.is_unchanged()

    def update(self) -> None:
        """Watch the values of now; the caller then tests all guards, and calls `forget` if one fails."""
        if self._watch is not None:
            self._changing |= self._watch.changed()
            self._watch = None
        if self._updates < _MOST_UPDATES:
            self._updates += 1
            self._watch = _Watch(self._reads, self._changing, self._compiled)

    def forget(self) -> None:
        """Watch nothing until the next `update`."""
        self._watch = None


class _Watch:
    """The values of guards at one time.

    Args:
        reads: the guards.
        changing: the places that are not watched.
        compiled: as for `WatchedReads`.
    """

    def __init__(
        self, reads: Iterable[Guard], changing: set[_Place], compiled: Callable[[list[Guard]], Callable[[], int]]
    ) -> None:
        self._dicts: dict[int, tuple[dict[Any, Any], int]] = {}
        self._lists: dict[int, tuple[list[Any], list[Any]]] = {}
        self._attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._known: dict[tuple[Any, ...], tuple[bool, Any]] = {}
        self._changing = changing
        others = [read for read in reads if not self._covers(read)]
        self._first_failure = compiled(others) if others else lambda: -1
        self._watched = [watched for watched, _ in self._dicts.values()]
        self._versions = [version for _, version in self._dicts.values()]
        self._watched_lists = [watched for watched, _ in self._lists.values()]
        self._lengths = [*map(len, self._watched_lists)]
        self._elements = [element for _, elements in self._lists.values() for element in elements]
        entries = self._attributes.values()
        self._objects, self._names, self._values = ([entry[k] for entry in entries] for k in range(3))

    def is_unchanged(self) -> bool:
        """Whether each place has the same value, and the guards of all other places hold."""
        try:
            return (
                all(map(operator.eq, map(dict_version, self._watched), self._versions))
                and all(map(operator.is_, map(getattr, self._objects, self._names), self._values))
                and [*map(len, self._watched_lists)] == self._lengths
                and all(map(operator.is_, chain.from_iterable(self._watched_lists), self._elements))
                and self._first_failure() < 0
            )
        except AttributeError:  # an attribute was deleted
            return False

    def changed(self) -> set[_Place]:
        """The places that have changed."""
        dicts: set[_Place] = {
            key for key, (watched, version) in self._dicts.items() if dict_version(watched) != version
        }
        entries = self._attributes.items()
        return dicts | {key for key, (owner, name, value) in entries if getattr(owner, name, ABSENT) is not value}

    def _covers(self, read: Guard) -> bool:
        """Watch what a guard reads; False if the guard has to be tested at each call."""
        if not isinstance(read.root, NamespaceRoot) or type(read.root.namespace) is not dict:
            return False
        is_watched, value = self._value_at(read.root.namespace, read.path)
        if not is_watched:
            return False
        if read.test in _IMPLIED:
            return read.test != "value" or type(value) in _IMMUTABLE
        if read.test == "type":
            return self._watch_attribute(value, "__class__", type(value))
        if type(value) is dict:
            return read.test in ("length", "keys", "contents") and self._watch_dict(value)
        if type(value) is list:
            return read.test in ("length", "contents") and self._watch_list(value)
        return read.test in ("length", "contents") and isinstance(value, tuple | frozenset)

    def _value_at(self, namespace: dict[Any, Any], path: tuple[tuple[str, Any], ...]) -> tuple[bool, Any]:
        """Watch the values on a path: whether that is possible, and the last value."""
        if not path:
            return True, namespace
        found = self._known.get((id(namespace), path))
        if found is None:
            is_watched, parent = self._value_at(namespace, path[:-1])
            found = self._step(parent, *path[-1]) if is_watched else (False, None)
            self._known[id(namespace), path] = found
        return found

    def _step(self, parent: Any, kind: str, key: Any) -> tuple[bool, Any]:
        if kind == "key" and type(parent) is dict:
            return self._watch_dict(parent), parent.get(key, ABSENT)
        if kind == "item" and isinstance(parent, tuple | list) and 0 <= key < len(parent):
            is_watched = isinstance(parent, tuple) or (type(parent) is list and self._watch_list(parent))
            return is_watched, parent[key]
        if kind == "instance" and type(getattr(parent, "__dict__", None)) is dict:
            attributes = parent.__dict__
            is_fixed = isinstance(parent, ModuleType) or self._watch_attribute(parent, "__dict__", attributes)
            return is_fixed and self._watch_dict(attributes), attributes.get(key, ABSENT)
        if kind == "attribute" and type(parent) is ModuleType and not key.startswith("__") and key in vars(parent):
            return self._watch_dict(vars(parent)), vars(parent)[key]
        if kind in ("attribute", "class"):
            if kind == "class" and not self._watch_attribute(parent, "__class__", type(parent)):
                return False, None
            owner = type(parent) if kind == "class" else parent
            value = getattr(owner, key, ABSENT)
            return self._watch_attribute(owner, key, value), value
        return False, None

    def _watch_dict(self, values: dict[Any, Any]) -> bool:
        if id(values) in self._changing:
            return False
        self._dicts.setdefault(id(values), (values, dict_version(values)))
        return True

    def _watch_list(self, values: list[Any]) -> bool:
        if id(values) in self._changing:
            return False
        self._lists.setdefault(id(values), (values, [*values]))
        return True

    def _watch_attribute(self, owner: Any, name: str, value: Any) -> bool:
        """Read an attribute again at each call; False if each read makes another object."""
        place = id(owner), name
        if value is ABSENT or place in self._changing or getattr(owner, name, ABSENT) is not value:
            return False
        self._attributes[place] = owner, name, value
        return True
