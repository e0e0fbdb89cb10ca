"""Progress bars of long work, on terminals only.

A bar is drawn on stderr if stderr is a terminal. `SNNFX_PROGRESS=0` turns bars off, and `SNNFX_PROGRESS=1` draws them
everywhere, for example in notebooks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

__all__ = ["Progress", "is_shown", "progress", "progress_over"]

Item = TypeVar("Item")

_DELAY = 0.5
"""Seconds of work before a bar appears, so that short work does not flicker."""


class Progress:
    """A progress bar, or nothing.

    Args:
        bar: the bar of tqdm; None draws nothing.
    """

    def __init__(self, bar: Any = None) -> None:
        self._bar = bar

    def advance(self, what: str = "") -> None:
        """Finish one part of the work; `what` names the finished part."""
        if self._bar is not None:
            if what:
                self._bar.set_postfix_str(what, refresh=False)
            self._bar.update()

    def clear(self) -> None:
        """Remove the bar from the terminal until the next part, so that other text can be printed."""
        if self._bar is not None:
            self._bar.clear()

    def start(self, what: str) -> None:
        """Name the part of the work that begins."""
        if self._bar is not None:
            self._bar.set_postfix_str(what)


def is_shown() -> bool:
    """Whether bars are drawn."""
    setting = os.environ.get("SNNFX_PROGRESS", "")
    if setting in ("0", "1"):
        return setting == "1"
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def progress(title: str, total: int | None = None, unit: str = "steps", delay: float = _DELAY) -> Iterator[Progress]:
    """Draw a bar for the work inside; it disappears at the end, also after an exception.

    Args:
        title: the name of the work.
        total: number of parts; None if unknown.
        unit: the name of the parts.
        delay: seconds before the bar appears.
    """
    if not is_shown():
        yield Progress()
        return
    # Imported here, because most processes draw no bar.
    from tqdm.auto import tqdm

    bar = tqdm(desc=title, total=total, unit=f" {unit}", leave=False, delay=delay, dynamic_ncols=True)
    try:
        yield Progress(bar)
    finally:
        bar.close()


def progress_over(items: Iterable[Item], title: str, total: int | None = None, unit: str = "steps") -> Iterator[Item]:
    """Iterate with a bar.

    Args:
        items: the parts of the work.
        title: the name of the work.
        total: number of parts; None: `len(items)` if it has one.
        unit: the name of the parts.
    """
    count = len(items) if total is None and isinstance(items, Sized) else total
    with progress(title, count, unit) as bar:
        for item in items:
            yield item
            bar.advance()
