"""`snnfx._progress`: bars on terminals only, removed at the end."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import snnfx
from snnfx._progress import is_shown, progress, progress_over


class Screen(io.StringIO):
    def __init__(self, is_terminal: bool) -> None:
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


def terminal_as_stderr(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal as stderr; not a fixture, because pytest sets stderr between the fixtures and the test."""
    monkeypatch.delenv("SNNFX_PROGRESS", raising=False)
    terminal = Screen(True)
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def test_a_terminal_shows_the_title_and_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal_as_stderr(monkeypatch)
    with progress("convert", 2, "passes", delay=0.0) as bar:
        bar.start("hoist")
        bar.advance()
        bar.clear()
        bar.advance("sink")
    drawn = screen.getvalue()
    assert "convert" in drawn and "hoist" in drawn and "0/2" in drawn
    assert drawn.rstrip(" ").endswith("\r")  # the line is empty at the end


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal_as_stderr(monkeypatch)
    assert list(progress_over(range(3), "verify")) == [0, 1, 2]
    assert screen.getvalue().strip() == ""


@pytest.mark.parametrize(
    ("setting", "is_terminal", "expected"), [("", False, False), ("0", True, False), ("1", False, True)]
)
def test_bars_follow_the_terminal_and_the_setting(
    setting: str, is_terminal: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNNFX_PROGRESS", setting)
    monkeypatch.setattr(sys, "stderr", Screen(is_terminal))
    assert is_shown() == expected


def test_a_process_without_stderr_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNNFX_PROGRESS", raising=False)
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_shown()


def test_an_exception_removes_the_bar_and_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal_as_stderr(monkeypatch)
    with pytest.raises(KeyboardInterrupt), progress("export", 3, delay=0.0) as bar:
        bar.start("trace")
        raise KeyboardInterrupt
    assert screen.getvalue().rstrip(" ").endswith("\r")


def test_long_work_of_the_library_shows_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal_as_stderr(monkeypatch)
    model = nn.Sequential(nn.Linear(3, 4), snnfx.neuron.LIFNode())
    monkeypatch.setattr(progress.__wrapped__, "__defaults__", (None, "steps", 0.0))  # type: ignore[attr-defined]
    net = snnfx.convert(model)
    assert "convert Sequential" in screen.getvalue()
    snnfx.verify(model, net, torch.rand(5, 2, 3))
    assert "verify" in screen.getvalue()
