"""Terminal output of the demonstration: sections, aligned items, colours and a progress bar."""

from __future__ import annotations

import os
import shutil
import sys

__all__ = ["Terminal"]


class Terminal:
    """Print colours and a progress bar; plain lines if the output is not a terminal or NO_COLOR is set."""

    def __init__(self) -> None:
        self.interactive = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.colours = self.interactive and "NO_COLOR" not in os.environ
        encoding = (sys.stdout.encoding or "ascii").lower()
        self.bar_glyphs = ("█", "░") if encoding.startswith("utf") else ("#", ".")

    def paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colours else text

    def bold(self, text: str) -> str:
        return self.paint(text, "1")

    def dim(self, text: str) -> str:
        return self.paint(text, "2")

    def good(self, text: str) -> str:
        return self.paint(text, "32")

    def bad(self, text: str) -> str:
        return self.paint(text, "31")

    def section(self, title: str, explanation: str) -> None:
        print(f"\n{self.paint(title, '1;36')}  {self.dim(explanation)}", flush=True)

    def item(self, name: str, value: str) -> None:
        print(f"  {name:<22}{value}", flush=True)

    def line(self, text: str) -> None:
        """Print a line in place of the last `working` or `progress` text."""
        print(f"  {text}" + ("\x1b[K" if self.interactive else ""), flush=True)

    def working(self, text: str) -> None:
        """Show the current activity on a line that the next output overwrites; print nothing without a terminal."""
        if self.interactive:
            print(f"  {self.dim(text)}\x1b[K", end="\r", flush=True)

    def progress(self, fraction: float, text: str, *, milestone: bool) -> None:
        """Redraw the progress bar in place; without a terminal, print a line at milestones only."""
        if self.interactive:
            width = max(10, min(32, shutil.get_terminal_size().columns - 60))
            full = round(fraction * width)
            bar = self.paint(self.bar_glyphs[0] * full, "32") + self.dim(self.bar_glyphs[1] * (width - full))
            print(f"\r  {bar} {fraction:4.0%}  {text}\x1b[K", end="\n" if fraction >= 1 else "", flush=True)
        elif milestone:
            print(f"  {fraction:4.0%}  {text}", flush=True)
