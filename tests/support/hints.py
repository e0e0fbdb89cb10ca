"""Hints of messages: where the source writes them, and which of them a test follows.

A site is a function of the source with the text of one hint, or of one warning. `hint_sites` finds the sites in the
syntax trees of the source. A test in tests/hints/ follows a hint: `refused` or `warned` provokes the message by a small
model, and the rest of the test does as the hint says. `followed_hints` reads the calls of these functions from the
syntax trees of the tests, so a new hint without a test is found without running anything.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import snnfx
from snnfx.errors import SnnfxError, SnnfxWarning
from snnfx.inspect.report import NotFolded

ROOT = Path(__file__).parents[2]
HOLE = "\0"
"""Stands for a formatted value in the text of a hint."""


@dataclass(frozen=True)
class HintSite:
    """One hint or warning in the source: file and function, text, and line."""

    function: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"{self.function} (line {self.line}): {self.text.replace(HOLE, '{}')}"


@functools.cache
def hint_sites() -> list[HintSite]:
    """All hints and warnings of the source."""
    files = [p for folder in ("snnfx", "passes") for p in sorted((ROOT / folder).rglob("*.py"))]
    texts = {path: path.read_text() for path in files}
    trees = {path: ast.parse(text) for path, text in texts.items() if "hint" in text}
    own = {path: _positions_of_hint(tree) for path, tree in trees.items()}
    positions = {"Refusal": 2} | {name: position for found in own.values() for name, position in found.items()}
    relevant = re.compile(rf"\b({'|'.join(['hint', 'warn', 'warn_once', *positions])})\b")
    sites = []
    for path, text in texts.items():
        if relevant.search(text):  # parsing takes long
            tree = trees[path] if path in trees else ast.parse(text)
            sites += _SitesOfFile(path, tree, positions, own.get(path, {})).sites()
    return sites


def _positions_of_hint(tree: ast.Module) -> dict[str, int]:
    """Names of functions with a positional parameter `hint`, and its position in a call."""
    found, nodes = {}, list(ast.walk(tree))
    methods = {f for c in nodes if isinstance(c, ast.ClassDef) for f in c.body}
    for function in nodes:
        if isinstance(function, ast.FunctionDef):
            names = [a.arg for a in function.args.args]
            if "hint" in names:
                found[function.name] = names.index("hint") - (function in methods and names[0] == "self")
    return found


class _SitesOfFile:
    def __init__(self, path: Path, tree: ast.Module, positions: dict[str, int], own: dict[str, int]) -> None:
        self.path, self.tree = path.relative_to(ROOT).as_posix().removeprefix("snnfx/"), tree
        # A function of this file hides one of the same name in another file.
        hidden = {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}
        self.positions = {name: position for name, position in positions.items() if name not in hidden} | own

    def sites(self) -> Iterator[HintSite]:
        yield from self._visit(self.tree, [], [])

    def _visit(self, node: ast.AST, names: list[str], scopes: list[ast.AST]) -> Iterator[HintSite]:
        for child in ast.iter_child_nodes(node):
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if isinstance(child, ast.Call):
                for value in self._hints(child):
                    for text in self._texts(value, [*scopes]):
                        yield HintSite(f"{self.path}:{'.'.join(names)}", text, child.lineno)
            yield from self._visit(
                child,
                [*names, child.name] if inside else names,  # type: ignore[attr-defined]
                [*scopes, child] if inside else scopes,
            )

    def _hints(self, call: ast.Call) -> Iterator[ast.expr]:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("warn", "warn_once") and len(call.args) > 1:
            yield call.args[1]
        elif ast.unparse(call.func) == "warnings.warn" and not self.path.endswith("errors.py"):
            yield call.args[0]
        keywords = [k.value for k in call.keywords if k.arg == "hint"]
        position = self.positions.get(name)
        if keywords:
            yield from keywords
        elif position is not None and len(call.args) > position:
            yield call.args[position]

    def _texts(self, value: ast.expr | None, scopes: list[ast.AST], depth: int = 0) -> list[str]:
        """The texts that an expression may have; a value from elsewhere is a hole."""
        if isinstance(value, ast.Constant):
            return [value.value] if value.value else []
        if isinstance(value, ast.JoinedStr):
            return ["".join(v.value if isinstance(v, ast.Constant) else HOLE for v in value.values)]  # type: ignore[misc]
        if isinstance(value, ast.IfExp):
            return self._texts(value.body, scopes, depth) + self._texts(value.orelse, scopes, depth)
        if isinstance(value, ast.BinOp):
            pairs = [self._texts(v, scopes, depth) or [""] for v in (value.left, value.right)]
            return [a + b for a in pairs[0] for b in pairs[1]]
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "format":
            return self._texts(value.args[0], scopes, depth)
        if isinstance(value, ast.Name) and depth < 3:
            return self._texts_of_name(value.id, scopes, depth)
        return []

    def _texts_of_name(self, name: str, scopes: list[ast.AST], depth: int) -> list[str]:
        for scope in (*reversed(scopes), self.tree):
            found: list[str] = []
            for node in ast.walk(scope) if scope is not self.tree else self.tree.body:
                if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in targets:
                        found += self._texts(_value_for(name, target, node.value), scopes, depth + 1)
            is_parameter = isinstance(scope, ast.FunctionDef) and name in [a.arg for a in scope.args.args]
            if found or is_parameter:
                return found
        return []


def _value_for(name: str, target: ast.expr, value: ast.expr | None) -> ast.expr | None:
    if isinstance(target, ast.Name) and target.id == name:
        return value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        found = [_value_for(name, t, v) for t, v in zip(target.elts, value.elts, strict=True)]
        return next((v for v in found if v is not None), None)
    return None


@dataclass(frozen=True)
class FollowedHint:
    """A call of `refused`, `warned` or `not_folded` in a test: the function of the source and a part of its text."""

    code: str
    function: str
    text: str
    where: str

    def covers(self, site: HintSite) -> bool:
        return self.function == site.function and self.text in site.text


@functools.cache
def followed_hints() -> list[FollowedHint]:
    """The hints that the tests in tests/hints/ follow."""
    found = []
    for path in sorted((ROOT / "tests" / "hints").glob("test_*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("refused", "warned", "not_folded"):
                if not isinstance(call.args[0], ast.Constant):  # the same hint with several codes
                    call.args[0] = ast.Constant("SNNFX309")
                code, function, text = (ast.literal_eval(a) for a in call.args[:3])
                found.append(FollowedHint(code, function, text, f"{path.name}:{call.lineno}"))
    return found


def refused(
    code: str, function: str, hint: str, call: Callable[[], Any], *, names: str = "", at: str = ""
) -> SnnfxError:
    """Check that a call is refused with a code, by a function of the source, and with a hint.

    Args:
        code: the code of the error.
        function: the function of the source that wrote the hint, e.g. "emit/arguments.py:Arguments.bind".
        hint: a part of the hint without formatted values.
        call: raises the error.
        names: the object that the message must name.
        at: a part of the user's line that the message must point to.
    """
    with _frames_of_errors() as frames, pytest.raises(SnnfxError) as raised:
        call()
    error = raised.value
    assert error.code == code, str(error)
    assert hint in error.hint, str(error)
    assert names in str(error), str(error)
    assert function in frames, f"{function} is not among {frames}"
    assert error.hint[:1].isupper() or error.hint.startswith("`"), error.hint
    assert error.hint.endswith((".", ")")), error.hint
    if at:
        assert at in source_line(error.where), f"{error.where}: {source_line(error.where)!r}"
    return error


def source_line(where: str) -> str:
    """The line of the source that a location `file:line` names."""
    match = re.search(r"([^\s`]+\.py):(\d+)", where)
    assert match is not None, f"{where!r} names no line"
    return linecache.getline(_absolute(match.group(1)), int(match.group(2)))


def _absolute(name: str) -> str:
    return name if Path(name).is_absolute() else str(next(p for p in (ROOT / "tests").rglob(Path(name).name)))


@contextmanager
def _frames_of_errors() -> Iterator[list[str]]:
    """Record the functions of the source that create an error."""
    frames: list[str] = []
    original = SnnfxError.__init__

    def recording(self: SnnfxError, *args: Any, **kwargs: Any) -> None:
        frame: Any = sys._getframe(1)
        for _ in range(4):
            if frame is None:
                break
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                name = frame.f_code.co_qualname.replace(".<locals>", "")
                frames.append(f"{path.relative_to(ROOT).as_posix().removeprefix('snnfx/')}:{name}")
            frame = frame.f_back
        original(self, *args, **kwargs)

    SnnfxError.__init__ = recording  # type: ignore[method-assign]
    try:
        yield frames
    finally:
        SnnfxError.__init__ = original  # type: ignore[method-assign]


def warned(code: str, function: str, text: str, call: Callable[[], Any], *, names: str = "") -> Any:
    """Check that a call warns with a code at the line of the caller, and return its result.

    Args:
        code: the code of the warning.
        function: the function of the source that warns.
        text: a part of the message without formatted values.
        call: warns.
        names: the object that the message must name.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    found = [w for w in caught if issubclass(w.category, SnnfxWarning) and str(w.message).startswith(code)]
    assert len(found) == 1, [str(w.message) for w in caught]
    message = str(found[0].message)
    assert text.removeprefix(f"{code} ") in message, message
    assert names in message, message
    assert found[0].filename == call.__code__.co_filename, f"{found[0].filename}:{found[0].lineno}"
    return result


@contextmanager
def silent() -> Iterator[None]:
    """Turn warnings of snnfx into errors: a followed hint must not lead to another message."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SnnfxWarning)
        yield


def not_folded(
    code: str, function: str, hint: str, model: nn.Module, example_inputs: Any = None, *, at: str = "", **options: Any
) -> NotFolded:
    """Check that `explain` reports a node that is not folded, with a code and a hint."""
    report = snnfx.explain(model, example_inputs=example_inputs, **options)
    assert report.error is None, str(report.error)
    rows = [row for row in report.not_folded if row.code == code and hint in row.hint]
    assert rows, [(row.what, row.code, row.reason, row.hint) for row in report.not_folded]
    if at:
        assert at in source_line(rows[0].where), rows[0].where
    return rows[0]


def is_folded(
    model: nn.Module, example_inputs: Any = None, *, allowed: tuple[str, ...] = ("SNNFX107",), **options: Any
) -> None:
    """Check that `explain` reports no node that is not folded, except for allowed codes."""
    report = snnfx.explain(model, example_inputs=example_inputs, **options)
    assert report.error is None, str(report.error)
    rows = [(row.what, row.code, row.reason) for row in report.not_folded if row.code not in allowed]
    assert not rows, rows
