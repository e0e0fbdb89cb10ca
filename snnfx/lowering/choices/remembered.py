"""Measured values by key, kept in this process and in the cache folder.

A value is measured until two measurements agree, at most three times, because other processes may take the cores. Two
that agree are stored; otherwise the value holds for this process only. A file that is not complete counts as empty.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch

from snnfx.errors import warn_once
from snnfx.lowering.elementwise.cpp.build import find_compiler, identity_of
from snnfx.lowering.elementwise.kernel_cache import places, write_atomically

__all__ = ["Remembered"]

V = TypeVar("V")
Key = tuple[object, ...]


class Remembered(Generic[V]):
    """Values by key.

    Args:
        stem: the beginning of the file's name.
        accept: the value that an entry of the file stands for; None: the entry is ignored.
        agree: the value of two measurements that agree, else None.
        otherwise: the value of three measurements that do not agree, for this process.
    """

    def __init__(
        self,
        stem: str,
        accept: Callable[[object], V | None],
        agree: Callable[[V, V], V | None],
        otherwise: Callable[[V, V, V], V],
    ) -> None:
        self.stem, self._accept, self._agree, self._otherwise = stem, accept, agree, otherwise
        self._known: dict[Key, V] = {}
        self._lock = threading.RLock()

    def known(self, key: Key) -> V | None:
        """The value that this process uses for a key; None before the first `get`."""
        return self._known.get(key)

    def get(self, key: Key, measure: Callable[[], V]) -> V:
        """The value of a key, measured if it is unknown; the text of the key identifies it on disk."""
        found = self._known.get(key)
        if found is None:
            with self._lock:
                found = self._known.get(key)
                if found is None:
                    found = self._known[key] = self._stored_or_measured(repr(key), measure)
        return found

    def forget(self) -> None:
        """Forget the values of this process; those on disk stay."""
        self._known.clear()

    def stored(self) -> dict[str, V]:
        """The values of the cache folder, and of the temporary folder that replaces it if it is read-only."""
        return {key: value for path in places(self._name()) for key, value in self._read(path).items()}

    def _stored_or_measured(self, key: str, measure: Callable[[], V]) -> V:
        stored = self.stored().get(key)
        if stored is not None:
            return stored
        first, second = measure(), measure()
        agreed = self._agree(first, second)
        if agreed is None:
            third = measure()
            pairs = (self._agree(earlier, third) for earlier in (second, first))
            agreed = next((value for value in pairs if value is not None), None)
            if agreed is None:
                return self._otherwise(first, second, third)
        content = json.dumps({**self.stored(), key: agreed}, indent=1).encode()
        try:
            write_atomically(content, places(self._name())[0])
        except OSError as error:
            warn_once(
                "SNNFX510",
                f"measured choices cannot be stored ({error.strerror or error}), so each process measures them again. "
                "Set SNNFX_CACHE_DIR to a folder with space that can be written.",
                key=("measured choices", self.stem),
            )
        return agreed

    def _read(self, path: Path) -> dict[str, V]:
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or not complete
            return {}
        if not isinstance(entries, dict):
            return {}
        accepted = {key: self._accept(value) for key, value in entries.items()}
        return {key: value for key, value in accepted.items() if value is not None}

    def _name(self) -> str:
        return f"{self.stem}_{_machine()}.json"


@functools.cache
def _machine() -> str:
    compiler = find_compiler()
    text = f"{identity_of(compiler) if compiler else ''}{torch.__version__}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
