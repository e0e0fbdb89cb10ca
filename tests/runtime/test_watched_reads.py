"""Guards of values in namespaces of modules: nothing that changes stays unseen once the values are watched."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from snnfx.ir.guards import Guard, NamespaceRoot, Step
from snnfx.ir.guards import passes as passes_test
from snnfx.runtime import guard_check
from snnfx.runtime.watched_reads import WatchedReads


class Settings:
    scale = 2

    def __init__(self) -> None:
        self.name = "a"


class OtherSettings(Settings):
    pass


def namespace() -> dict[str, Any]:
    """A module with values of each kind that guards read."""
    module = ModuleType("constants")
    module.limit = 3  # type: ignore[attr-defined]
    values: dict[str, Any] = {f"function{k}": object() for k in range(16)}
    values |= {
        "number": 1,
        "settings": Settings(),
        "table": {"x": 1},
        "items": [1, 2],
        "names": {"x"},
        "module": module,
    }
    return values | {"nested": [Settings()], "pair": (1, 2)}


def guards_of(values: dict[str, Any]) -> list[Guard]:
    root = NamespaceRoot(values)

    def guard(test: str, expected: Any, *path: Step) -> Guard:
        return Guard(root, path, test, expected, "")  # type: ignore[arg-type]

    settings, instance = ("key", "settings"), values["settings"]
    nested = (("key", "nested"), ("item", 0))
    return [
        *(guard("same", values[f"function{k}"], ("key", f"function{k}")) for k in range(16)),
        guard("value", 1, ("key", "number")),
        guard("type", Settings, settings),
        guard("value", "a", settings, ("instance", "name")),
        guard("value", 2, settings, ("class", "scale")),
        guard("value", 2, settings, ("attribute", "scale")),
        guard("keys", (dict, ["name"]), settings, ("attribute", "__dict__")),
        guard("contents", dict(values["table"]), ("key", "table")),
        guard("contents", [1, 2], ("key", "items")),
        guard("contents", {"x"}, ("key", "names")),
        guard("contents", (1, 2), ("key", "pair")),
        guard("value", 3, ("key", "module"), ("attribute", "limit")),
        guard("length", (list, 1), ("key", "nested")),
        guard("value", "a", *nested, ("instance", "name")),
        guard("some", None, ("key", "settings")),
        guard("same", instance, settings),
    ]


def watched(values: dict[str, Any]) -> tuple[list[Guard], WatchedReads]:
    reads, model = guards_of(values), nn.Identity()
    assert all(passes_test(r.test, r.resolve(model), r.expected) for r in reads)
    found = WatchedReads(reads, lambda some: guard_check._compiled(some, model))
    found.update()
    return reads, found


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another function": lambda v: v.update(function3=object()),
    "a variable is deleted": lambda v: v.pop("function3"),
    "another number": lambda v: v.update(number=2),
    "an equal number of another type": lambda v: v.update(number=True),
    "another attribute of an object": lambda v: setattr(v["settings"], "name", "b"),
    "a new attribute of an object": lambda v: setattr(v["settings"], "scale", 5),
    "another dict of an object": lambda v: setattr(v["settings"], "__dict__", {"name": "b"}),
    "another class of an object": lambda v: setattr(v["settings"], "__class__", OtherSettings),
    "another object": lambda v: v.update(settings=Settings()),
    "another value in a dict": lambda v: v["table"].update(x=2),
    "an equal value in a dict, of another type": lambda v: v["table"].update(x=1.0),
    "another element of a list": lambda v: v["items"].__setitem__(0, 7),
    "an equal element of a list, of another type": lambda v: v["items"].__setitem__(0, 1.0),
    "one more element of a list": lambda v: v["items"].append(3),
    "no elements in a list": lambda v: v["nested"].clear(),
    "one more element of a set": lambda v: v["names"].add("y"),
    "another tuple": lambda v: v.update(pair=(1, 3)),
    "another attribute of a module": lambda v: setattr(v["module"], "limit", 4),
    "another attribute of an element": lambda v: setattr(v["nested"][0], "name", "b"),
    "another element with another attribute": lambda v: v.update(nested=[OtherSettings()]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change: str) -> None:
    values = namespace()
    _, found = watched(values)
    assert found.are_unchanged()
    CHANGES[change](values)
    assert not found.are_unchanged()


def test_a_change_of_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = watched(namespace())
    assert found.are_unchanged()
    monkeypatch.setattr(Settings, "scale", 3)
    assert not found.are_unchanged()


def test_guards_of_a_variable_that_often_changes_are_tested_and_others_stay_watched() -> None:
    values = namespace()
    reads, found = watched(values)
    for count in range(3):
        values["count"] = count
        if not found.are_unchanged():
            found.update()
    values["count"] = -1
    assert found.are_unchanged()  # their own tests hold
    values["function3"] = object()
    assert not found.are_unchanged()
    values["function3"] = reads[3].expected
    values["table"]["x"] = 2
    assert not found.are_unchanged()


def test_forgotten_values_are_unknown() -> None:
    _, found = watched(namespace())
    found.forget()
    assert not found.are_unchanged()


def test_few_guards_are_not_watched() -> None:
    values = namespace()
    found = WatchedReads(guards_of(values)[:4], lambda some: guard_check._compiled(some, nn.Identity()))
    found.update()
    assert not found.are_unchanged()
