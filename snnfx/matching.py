"""Comparing two captured step programs node by node, and reading initial values off the difference."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from snnfx.program import IN_PLACE_OPERATORS, StepProgram, has_in_place_flag, is_in_place, keeps_statistics

__all__ = ["GraphMatch"]

_NO_VALUE = object()


class GraphMatch:
    """Match program `a` against program `b`, where slots of `b` may stand for any expression of `a`.

    Args:
        a: the program that may have expressions where `b` reads a slot (the cold trace).
        b: the program with slots (the warm trace).
        bindable: slots of `b` that may be bound to expressions of `a`, with the value that each of them had when `a`
            was traced. Where that is a number or a tensor, Python computed with it at once: `a` has 0.1 in the place
            of what is the node `mul(0.5, v)` in `b`.
    """

    def __init__(self, a: StepProgram, b: StepProgram, bindable: Mapping[str, Any] | None = None) -> None:
        self.a, self.b = a, b
        self.bindable = dict(bindable or {})
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
        if not self._same(_effects(self.a), _effects(self.b)):
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
                # What nothing reads starts as the model has it.
                known = self.bound.get(slot.name, self.bindable[slot.name])
                known = map_arg(self._as_node(known), lambda n: self._copy(n, copied))
            initial.append(known)
        self.b.set_output(self.b.outputs, self.b.next_states, initial)

    def _as_node(self, value: Any) -> Any:
        """A tensor as a node of `a`."""
        if not isinstance(value, Tensor):
            return value
        target = self._constant(value, self.a)
        with self.a.graph.inserting_before(self.a.output):
            return self.a.graph.get_attr(target)

    def _copy(self, node: Node, copied: dict[Node, Node]) -> Node:
        if node not in copied and node.op == "placeholder":
            copied[node] = next(n for n in self.b.graph.nodes if n.op == "placeholder" and _reads_the_same(n, node))
        if node not in copied:
            arguments = map_arg((node.args, node.kwargs), lambda n: self._copy(n, copied))
            # Where `a` has it, so that it comes behind what was changed in place before it, and before all else.
            before = node.prev
            while before.op != "root" and before not in copied:
                before = before.prev
            target = node.target
            if node.op == "get_attr" and target in self.a.constants:
                target = self._constant(self.a.constants[str(target)], self.b)
            with self.b.graph.inserting_after(copied.get(before, self._last_placeholder())):
                new = self.b.graph.create_node(node.op, target, *arguments)
            new.meta = dict(node.meta)
            copied[node] = new
        return copied[node]

    def _last_placeholder(self) -> Node:
        found: Node = [n for n in self.b.graph.nodes if n.op == "placeholder"][-1]
        return found

    @staticmethod
    def _constant(value: Any, program: StepProgram) -> str:
        for name, known in program.constants.items():
            if known is value:
                return name
        name = f"snnfx_constant_{len(program.constants)}"
        program.constants[name] = value
        return name

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(b, Node) and b.meta.get("slot") in self.bindable and b.op == "placeholder":
            return self._bind(b.meta["slot"], a)
        if isinstance(b, Node) and self._is_what_python_made(a, b):
            return True
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
        """Let a slot begin as `a`: an expression or a constant of the cold trace."""
        value = _NO_VALUE if isinstance(a, Node) and a.op != "get_attr" else self._constant_of(a)
        if slot in self.bound:
            known = self.bound[slot]
            return known is a or (value is not _NO_VALUE and _equal(self._constant_of(known), value))
        self.bound[slot] = a
        return True

    def _constant_of(self, a: Any) -> Any:
        """The value of a number or a constant of the cold trace."""
        if not isinstance(a, Node):
            return a
        return self.a.constants.get(str(a.target), _NO_VALUE) if a.op == "get_attr" else _NO_VALUE

    def _is_what_python_made(self, a: Any, b: Node) -> bool:
        """Whether `a` is the constant that the expression `b` has for the values that the slots start from."""
        constant = self._constant_of(a)
        if constant is _NO_VALUE or not b.op.startswith("call"):
            return False
        slots: set[str] = set()
        if not _equal(constant, self._evaluate(b, slots)) or not slots:
            return False
        return all(self._bind(slot, self.bindable[slot]) for slot in slots)

    def _evaluate(self, b: Any, slots: set[str]) -> Any:
        """The value of an expression over nothing but slots that start as numbers or tensors, and constants."""
        if b.op == "placeholder":
            start = self.bindable.get(b.meta.get("slot"))
            slots.add(b.meta.get("slot"))
            return _NO_VALUE if start is None else start
        if b.op == "get_attr":
            return self.b.constants.get(str(b.target), _NO_VALUE)
        if b.op not in ("call_function", "call_method"):
            return _NO_VALUE
        values = {operand: self._evaluate(operand, slots) for operand in b.all_input_nodes}
        if any(value is _NO_VALUE for value in values.values()):
            return _NO_VALUE
        args, kwargs = map_arg((b.args, b.kwargs), values.__getitem__)
        try:
            with torch.no_grad():
                return (
                    b.target(*args, **kwargs) if callable(b.target) else getattr(args[0], b.target)(*args[1:], **kwargs)
                )
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return _NO_VALUE  # a number has no method `sigmoid`: then Python has made nothing of it

    def _same_node(self, a: Node, b: Node) -> bool:
        if a in self.matched:
            return self.matched[a] is b
        if a.op != b.op and not (a.op.startswith("call") and b.op.startswith("call")):
            return False
        if a.op == "placeholder":
            same = _reads_the_same(a, b)
        elif a.op == "get_attr":
            same = _same_object(self.a.resolve, str(a.target), self.b.resolve, str(b.target))
        else:
            same = (
                _operation(a) == _operation(b)
                and self._same(tuple(a.args), tuple(b.args))
                and self._same(a.kwargs, b.kwargs)
            )
        if same:
            self.matched[a] = b
        return same


def _effects(program: StepProgram) -> list[Node]:
    """The nodes that matter although nobody may read what they return.

    Not among them is `v += x` where v has no later reader: on a number, it is no operation in place.
    """
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    return [
        n
        for n in program.graph.nodes
        if keeps_statistics(program, n)
        or has_in_place_flag(program, n)
        or (
            is_in_place(n)
            and not (n.target in IN_PLACE_OPERATORS and max(position[user] for user in n.args[0].users) == position[n])
        )
    ]


_METHODS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv}


def _operation(node: Node) -> tuple[str, Any]:
    """What a node computes: `tensor + proxy` is recorded as a method, `proxy + proxy` as an operator."""
    if node.op == "call_method" and node.target in _METHODS and not node.kwargs:
        return "call_function", _METHODS[str(node.target)]
    target: Any = node.target
    return node.op, IN_PLACE_OPERATORS.get(target, target)


def _reads_the_same(a: Node, b: Node) -> bool:
    return (a.meta.get("slot"), a.meta.get("input")) == (b.meta.get("slot"), b.meta.get("input"))


def _equal(a: Any, b: Any) -> bool:
    if a is _NO_VALUE or b is _NO_VALUE:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _same_object(resolve_a: Callable[[str], Any], a: str, resolve_b: Callable[[str], Any], b: str) -> bool:
    first, second = resolve_a(a), resolve_b(b)
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)
    function = getattr(first, "function", None)
    return function is not None and function is getattr(second, "function", None)
