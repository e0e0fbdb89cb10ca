"""Compare two step programs node by node, and derive initial values from their differences."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from snnfx.ir.facts import INPUT, SLOT
from snnfx.ir.module_effects import has_in_place_flag, keeps_statistics
from snnfx.ir.nodes import IN_PLACE_OPERATORS, is_in_place
from snnfx.ir.program import StepProgram
from snnfx.ops.step_functions import expect_size
from snnfx.sandbox.tensor_values import same_values

__all__ = ["GraphMatch"]

_NO_VALUE = object()


class GraphMatch:
    """Matches program `a` against program `b`, where slots of `b` may match any expression of `a`.

    Args:
        a: the program with expressions where `b` may read a slot (the cold trace).
        b: the program with slots (the warm trace).
        bindable: slots of `b` that may be bound to expressions of `a`, each with its value in the trace of `a`. If it
            is a number or a tensor, Python evaluated expressions with it: `a` contains the constant 0.1 where `b` has
            the node `mul(0.5, v)`.
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
        """Copy the expressions that slots of `b` are bound to into `b`, as initial values, with their size checks."""
        checks = self._checks_of_first_step()
        # The first read of an attribute makes its node, so the position of that node says nothing.
        copied: dict[Node, Node] = {a: b for a, b in self.matched.items() if a.op != "get_attr"}
        initial = []
        for slot, value in zip(self.b.slots, self.b.initial_values, strict=True):
            if slot.name in self.bindable:
                # A slot that nothing reads starts from the value in the model.
                value = self.bound.get(slot.name, self.bindable[slot.name])
                value = map_arg(self.a.as_node(value), lambda n: self._copy(n, copied))
            initial.append(value)
        self.b.set_output(self.b.outputs, self.b.next_states, initial)
        for check in checks:
            self._copy(check, copied)

    def _checks_of_first_step(self) -> list[Node]:
        """The size checks of `a` that `b` lacks: the model's code decided about its initial state by these sizes."""
        known, missing = _size_checks(self.b), []
        for check in _size_checks(self.a):
            bound, matched = dict(self.bound), dict(self.matched)
            for other in known:
                if self._same(check, other):
                    break
                self.bound, self.matched = dict(bound), dict(matched)
            else:
                missing.append(check)
            self.bound = bound
        return missing

    def _copy(self, node: Node, copied: dict[Node, Node]) -> Node:
        pending = [node]  # iterative, because a graph may be deeper than Python's stack
        while pending:
            missing = [n for n in pending[-1].all_input_nodes if n not in copied]
            if missing and pending[-1] not in copied:
                pending += reversed(missing)
            else:
                self._copy_one(pending.pop(), copied)
        return copied[node]

    def _copy_one(self, node: Node, copied: dict[Node, Node]) -> None:
        if node in copied:
            return
        if node.op == "placeholder":
            copied[node] = next(
                n for n in self.b.graph.nodes if n.op == "placeholder" and _is_same_placeholder(n, node)
            )
            return
        arguments = map_arg((node.args, node.kwargs), copied.__getitem__)
        # At the same position as in `a`, to keep its order relative to in-place operations.
        before = node.prev
        while before.op != "root" and before not in copied:
            before = before.prev
        target = node.target
        if node.op == "get_attr" and target in self.a.constants:
            target = self.b.constant(self.a.constants[str(target)])
        anchor = copied.get(before)
        if anchor is None or anchor.op == "placeholder":  # never between placeholders
            anchor = self._last_placeholder()
        with self.b.graph.inserting_after(anchor):
            new = self.b.graph.create_node(node.op, target, *arguments)
        new.meta = dict(node.meta)
        copied[node] = new

    def _last_placeholder(self) -> Node:
        found: Node = [n for n in self.b.graph.nodes if n.op == "placeholder"][-1]
        return found

    def _same(self, a: Any, b: Any) -> bool:
        open_comparisons = [self._compare(a, b)]  # iterative, because a graph may be deeper than Python's stack
        answer: bool | None = None
        while open_comparisons:
            try:
                parts = open_comparisons[-1].send(answer)
            except StopIteration as done:
                open_comparisons.pop()
                answer = done.value
            else:
                open_comparisons.append(self._compare(*parts))
                answer = None
        return bool(answer)

    def _compare(self, a: Any, b: Any) -> Generator[tuple[Any, Any], Any, bool]:
        """Whether two values are the same computation; yields pairs of parts and receives whether they are the same."""
        if isinstance(b, Node) and SLOT.of(b) in self.bindable and b.op == "placeholder":
            return self._bind(SLOT.of(b), a)
        if isinstance(b, Node) and self._is_evaluated(a, b):
            return True
        if isinstance(a, Node) != isinstance(b, Node):
            return False
        if isinstance(a, Node):
            reduced = self._sum_without_slot(b)
            if reduced is None:
                return (yield from self._compare_nodes(a, b))
            bound, matched = dict(self.bound), dict(self.matched)
            if (yield from self._compare_nodes(a, b)):
                return True
            self.bound, self.matched = bound, matched
            value, slot = reduced
            return bool((yield a, value) and self._bind(slot, 0.0))
        if type(a) is not type(b):
            return False
        if isinstance(a, slice):
            a, b = (a.start, a.stop, a.step), (b.start, b.stop, b.step)
        if isinstance(a, tuple | list):
            if len(a) != len(b):
                return False
            for parts in zip(a, b, strict=True):
                if not (yield parts):
                    return False
            return True
        if isinstance(a, dict):
            if a.keys() != b.keys():
                return False
            for key in a:
                if not (yield a[key], b[key]):
                    return False
            return True
        return bool(a == b) or (a != a and b != b)

    def _sum_without_slot(self, b: Node) -> tuple[Node, str] | None:
        """For `0.9 * v + x`, where slot v starts as None: `(x, "v")`, its value for v = 0.

        This matches `self.v = x if self.v is None else 0.9 * self.v + x`.
        """
        operation = _arithmetic(b)
        if operation not in ("add", "sub") or len(b.args) != 2:
            return None
        for remaining, product in ((0, 1), (1, 0)) if operation == "add" else ((0, 1),):
            slot = self._slot_of_product(b.args[product])
            if slot is not None and isinstance(b.args[remaining], Node):
                return b.args[remaining], slot  # type: ignore[return-value]
        return None

    def _slot_of_product(self, b: Any) -> str | None:
        """The slot v of a product `c * v`, where v starts as None and c depends on neither slots nor inputs.

        Otherwise c may be infinite or NaN, so that the product with v = 0 is NaN.
        """
        while isinstance(b, Node) and b.op != "placeholder":
            operation = _arithmetic(b)
            if operation not in ("mul", "div", "neg"):
                return None
            slots = [a for a in b.args if self._reads_a_slot(a)]
            if len(slots) != 1 or (operation == "div" and slots[0] is b.args[1]):
                return None
            if not all(operand is slots[0] or self._is_invariant(operand) for operand in b.args):
                return None
            b = slots[0]
        slot = SLOT.of(b) if isinstance(b, Node) else None
        return str(slot) if slot in self.bindable and self.bindable[slot] is None else None

    def _reads_a_slot(self, value: Any) -> bool:
        return isinstance(value, Node) and any(SLOT.is_known(n) for n in _ancestors(value))

    def _is_invariant(self, value: Any) -> bool:
        return not isinstance(value, Node) or all(n.op != "placeholder" for n in _ancestors(value))

    def _bind(self, slot: str, a: Any) -> bool:
        """Bind a slot to its initial value `a`, an expression or constant of the cold trace."""
        value = _NO_VALUE if isinstance(a, Node) and a.op != "get_attr" else self._constant_of(a)
        if slot in self.bound:
            bound = self.bound[slot]
            return bound is a or (value is not _NO_VALUE and _equal(self._constant_of(bound), value))
        self.bound[slot] = a
        return True

    def _constant_of(self, a: Any) -> Any:
        """The value of a number or constant of the cold trace; `_NO_VALUE` for other nodes."""
        if not isinstance(a, Node):
            return a
        return self.a.constants.get(str(a.target), _NO_VALUE) if a.op == "get_attr" else _NO_VALUE

    def _is_evaluated(self, a: Any, b: Node) -> bool:
        """Whether the constant `a` is the value of expression `b` for the initial values of its slots."""
        constant = self._constant_of(a)
        if constant is _NO_VALUE or not b.op.startswith("call"):
            return False
        slots: set[str] = set()
        if not _equal(constant, self._evaluate(b, slots)) or not slots:
            return False
        return all(self._bind(slot, self.bindable[slot]) for slot in slots)

    def _evaluate(self, b: Node, slots: set[str]) -> Any:
        """Evaluate an expression of constants and of slots that start as numbers or tensors."""
        values: dict[Node, Any] = {}
        pending = [b]
        while pending:
            node = pending[-1]
            missing = [] if node.op == "placeholder" else [n for n in node.all_input_nodes if n not in values]
            if missing and node not in values:
                pending += reversed(missing)
                continue
            pending.pop()
            if node.op == "placeholder":
                slots.add(SLOT.of(node))
            if node not in values:
                values[node] = self._evaluate_one(node, values)
            if values[node] is _NO_VALUE:
                return _NO_VALUE
        return values[b]

    def _evaluate_one(self, node: Node, values: dict[Node, Any]) -> Any:
        if node.op == "placeholder":
            start = self.bindable.get(SLOT.of(node))
            return _NO_VALUE if start is None else start
        if node.op == "get_attr":
            return self.b.constants.get(str(node.target), _NO_VALUE)
        if node.op not in ("call_function", "call_method"):
            return _NO_VALUE
        args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
        target: Any = node.target
        try:
            with torch.no_grad():
                return target(*args, **kwargs) if callable(target) else getattr(args[0], target)(*args[1:], **kwargs)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            return _NO_VALUE  # e.g. a number has no method `sigmoid`, so Python cannot have evaluated it

    def _compare_nodes(self, a: Node, b: Node) -> Generator[tuple[Any, Any], Any, bool]:
        if a in self.matched:
            return self.matched[a] is b
        if a.op != b.op and not (a.op.startswith("call") and b.op.startswith("call")):
            return False
        if a.op == "placeholder":
            same = _is_same_placeholder(a, b)
        elif a.op == "get_attr":
            same = _same_object(self.a.resolve, str(a.target), self.b.resolve, str(b.target))
        else:
            same = _operation(a) == _operation(b)
            same = same and (yield tuple(a.args), tuple(b.args))
            same = same and (yield a.kwargs, b.kwargs)
        if same:
            self.matched[a] = b
        return same


def _size_checks(program: StepProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.target is expect_size]


def _effects(program: StepProgram) -> list[Node]:
    """The nodes with side effects.

    `v += x` does not count if v has no later reader, because on a number it is not an in-place operation.
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
    """Normalized operation of a node: torch.fx records `tensor + proxy` as a method, `proxy + proxy` as an operator."""
    if node.op == "call_method" and node.target in _METHODS and not node.kwargs:
        return "call_function", _METHODS[str(node.target)]
    target: Any = node.target
    return node.op, IN_PLACE_OPERATORS.get(target, target)


_ARITHMETIC = {
    function: name
    for name, functions in {
        "add": (operator.add, torch.add),
        "sub": (operator.sub, torch.sub),
        "mul": (operator.mul, torch.mul),
        "div": (operator.truediv, torch.div),
        "neg": (operator.neg, torch.neg),
    }.items()
    for function in functions
}


def _arithmetic(node: Node) -> str:
    """The name of an arithmetic operation on one or two operands; "" for other operations."""
    if node.kwargs:
        return ""
    if node.op == "call_method":
        return str(node.target) if node.target in _ARITHMETIC.values() else ""
    return _ARITHMETIC.get(IN_PLACE_OPERATORS.get(node.target, node.target), "")  # type: ignore[arg-type]


def _ancestors(node: Node) -> set[Node]:
    """A node and all nodes that it depends on."""
    nodes: set[Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current not in nodes:
            nodes.add(current)
            pending += current.all_input_nodes
    return nodes


def _is_same_placeholder(a: Node, b: Node) -> bool:
    return (SLOT.of(a), INPUT.of(a)) == (SLOT.of(b), INPUT.of(b))


def _equal(a: Any, b: Any) -> bool:
    if a is _NO_VALUE or b is _NO_VALUE:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and same_values(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _same_object(resolve_a: Callable[[str], Any], a: str, resolve_b: Callable[[str], Any], b: str) -> bool:
    first, second = resolve_a(a), resolve_b(b)
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and same_values(first, second)
    function = getattr(first, "function", None)
    return function is not None and function is getattr(second, "function", None)
