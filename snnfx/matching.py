"""Comparing two captured step programs node by node, and reading initial values off the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from snnfx.program import StepProgram

__all__ = ["GraphMatch"]


class GraphMatch:
    """Match program `a` against program `b`, where slots of `b` may stand for any expression of `a`.

    Args:
        a: the program that may have expressions where `b` reads a slot (the cold trace).
        b: the program with slots (the warm trace).
        bindable: names of slots of `b` that may be bound to expressions of `a`.
    """

    def __init__(self, a: StepProgram, b: StepProgram, bindable: set[str] | None = None) -> None:
        self.a, self.b = a, b
        self.bindable = bindable or set()
        self.bound: dict[str, Any] = {}
        self.matched: dict[Node, Node] = {}

    def same_program(self) -> bool:
        """Whether outputs, next states and effects of the two programs are the same computation."""
        if [s.name for s in self.a.slots] != [s.name for s in self.b.slots]:
            return False
        if self.a.output_spec != self.b.output_spec or self.a.opaque.keys() != self.b.opaque.keys():
            return False
        if not self._same(self.a.outputs, self.b.outputs) or not self._same(self.a.next_states, self.b.next_states):
            return False
        if not self.bindable and not self._same(self.a.initial_values, self.b.initial_values):
            return False
        return (self.a.first_step is None) == (self.b.first_step is None) and (
            self.a.first_step is None
            or self.b.first_step is None
            or GraphMatch(self.a.first_step, self.b.first_step).same_program()
        )

    def move_initial_values(self) -> None:
        """Write what the slots of `b` were bound to into `b`, as its initial values."""
        copied: dict[Node, Node] = dict(self.matched)
        initial = []
        for slot, known in zip(self.b.slots, self.b.initial_values, strict=True):
            if slot.name in self.bindable:
                known = map_arg(self.bound.get(slot.name), lambda n: self._copy(n, copied))
            initial.append(known)
        self.b.set_output(self.b.outputs, self.b.next_states, initial)

    def _copy(self, node: Node, copied: dict[Node, Node]) -> Node:
        if node not in copied:
            arguments = map_arg((node.args, node.kwargs), lambda n: self._copy(n, copied))
            with self.b.graph.inserting_before(self.b.output):
                target = node.target
                if node.op == "get_attr" and target in self.a.constants:
                    target = self._constant(self.a.constants[target])
                new = self.b.graph.create_node(node.op, target, *arguments)
            new.meta = dict(node.meta)
            copied[node] = new
        return copied[node]

    def _constant(self, value: Any) -> str:
        for name, known in self.b.constants.items():
            if known is value:
                return name
        name = f"snnfx_constant_{len(self.b.constants)}"
        self.b.constants[name] = value
        return name

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(b, Node) and b.meta.get("slot") in self.bindable and b.op == "placeholder":
            return self._bind(b.meta["slot"], a)
        if isinstance(a, Node) != isinstance(b, Node):
            return False
        if isinstance(a, Node):
            return self._same_node(a, b)
        if type(a) is not type(b):
            return False
        if isinstance(a, tuple | list):
            return len(a) == len(b) and all(self._same(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(self._same(a[k], b[k]) for k in a)
        if isinstance(a, slice):
            return self._same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
        return bool(a == b) or (a != a and b != b)

    def _bind(self, slot: str, a: Any) -> bool:
        if slot in self.bound:
            known = self.bound[slot]
            return known is a if isinstance(known, Node) or isinstance(a, Node) else bool(known == a)
        self.bound[slot] = a
        return True

    def _same_node(self, a: Node, b: Node) -> bool:
        if a in self.matched:
            return self.matched[a] is b
        if a.op != b.op:
            return False
        if a.op == "placeholder":
            same = (a.meta.get("slot"), a.meta.get("input")) == (b.meta.get("slot"), b.meta.get("input"))
        elif a.op == "get_attr":
            same = _same_object(self.a.resolve, str(a.target), self.b.resolve, str(b.target))
        else:
            same = a.target == b.target and self._same(tuple(a.args), tuple(b.args)) and self._same(a.kwargs, b.kwargs)
        if same:
            self.matched[a] = b
        return same


def _same_object(resolve_a: Callable[[str], Any], a: str, resolve_b: Callable[[str], Any], b: str) -> bool:
    first, second = resolve_a(a), resolve_b(b)
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
    function = getattr(first, "function", None)
    return function is not None and function is getattr(second, "function", None)
