"""Decide Python branches on numbers that only count the steps, such as `if self.t == 0`.

In the trace of a later step such a number is a slot. Its value after the first step is known, so the branch of the
second step is too. After the trace the update of the number is known, and the branch has to be the same in all later
steps: either the number takes few values, or it grows by a constant and the branch compares it with a number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from snnfx.errors import CaptureError
from snnfx.ir.facts import NUMBER, SLOT
from snnfx.ir.printing import operation_name
from snnfx.sandbox.user_code import format_location

__all__ = ["StepCounts"]

_MOST_VALUES = 4096
"""Values of a number that recurs, at most."""
_MODULES = ("_operator", "math", "builtins")


@dataclass
class _Branch:
    node: Node
    number: type
    value: Any
    slot: Node
    where: Any


class StepCounts:
    """The branches of one trace on numbers that count the steps.

    Args:
        starts: the value of each number after the first step, by the name of its slot.
    """

    def __init__(self, starts: dict[str, Any]) -> None:
        self.starts = starts
        self.branches: list[_Branch] = []

    def decide(self, node: Node, number: type, where: Any) -> Any:
        """The value of a node in the second step, as a bool, int or float; None if it depends on other values."""
        slot = self._slot_of(node)
        if slot is None or number is not bool:
            return None
        value = bool(_evaluate(node, slot, self.starts[SLOT.of(slot)]))
        self.branches.append(_Branch(node, number, value, slot, where))
        return value

    def check(self, following: dict[str, Any]) -> None:
        """Check that each branch is the same in all later steps.

        Args:
            following: the node or number that each slot has after the step.

        Raises:
            CaptureError: SNNFX250, a later step takes the other branch.
        """
        for branch in self.branches:
            name = SLOT.of(branch.slot)
            after = following[name]
            if not self._stays(branch, getattr(after, "node", after)):
                raise CaptureError(
                    "SNNFX250",
                    f"a later step takes another branch than the second one, because `{name}` counts the steps",
                    where=format_location(branch.where),
                    why=f"`{operation_name(branch.node)}` is {branch.value} in the second step, and a net runs "
                    "the same operations in all steps but the first.",
                    hint=f"Keep `{name}` in a tensor, such as torch.zeros_like(x), and choose with torch.where.",
                )

    def _slot_of(self, node: Node) -> Node | None:
        """The only slot that a computation on numbers depends on."""
        slots: set[Node] = set()
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current.op == "placeholder":
                if not NUMBER.of(current) or SLOT.of(current) not in self.starts:
                    return None
                slots.add(current)
            elif current.op != "call_function" or getattr(current.target, "__module__", "") not in _MODULES:
                return None
            stack += [n for n in current.all_input_nodes if n not in seen]
            seen.update(current.all_input_nodes)
        return slots.pop() if len(slots) == 1 else None

    def _stays(self, branch: _Branch, following: Any) -> bool:
        start = self.starts[SLOT.of(branch.slot)]
        values = list(_values(start, branch.slot, following))
        if any(bool(_evaluate(branch.node, branch.slot, v)) != branch.value for v in values):
            return False
        return len(values) <= _MOST_VALUES or _stays_forever(branch, following, start)


def _values(start: Any, slot: Node, following: Any) -> Iterator[Any]:
    """The different values of a number, from the second step on; more than `_MOST_VALUES` if they do not recur."""
    seen: set[Any] = set()
    value = start
    while (type(value), value) not in seen and len(seen) <= _MOST_VALUES:
        seen.add((type(value), value))
        yield value
        value = _evaluate(following, slot, value) if isinstance(following, Node) else following


def _evaluate(node: Any, slot: Node, value: Any) -> Any:
    """The value of a computation on numbers for one value of its slot."""
    known: dict[Node, Any] = {slot: value}

    def of(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        if argument not in known:
            target: Callable[..., Any] = argument.target  # type: ignore[assignment]
            known[argument] = target(*[of(a) for a in argument.args], **argument.kwargs)
        return known[argument]

    return of(node)


def _stays_forever(branch: _Branch, following: Any, start: Any) -> bool:
    """Whether a comparison has one value for all `start + k * increment`."""
    increment = _offset(following, branch.slot)
    node = branch.node
    if not increment or not isinstance(increment, int) or not isinstance(start, int):
        return False
    bound: Any = 0
    if _offset(node, branch.slot) is not None:  # `if self.t`
        offset, name, flipped = _offset(node, branch.slot), "ne", False
    else:
        name = operation_name(node)
        if name not in ("eq", "ne", "lt", "le", "gt", "ge") or len(node.args) != 2:
            return False
        left, right = node.args
        flipped = not isinstance(left, Node)
        offset, bound = _offset(right if flipped else left, branch.slot), left if flipped else right
    if offset is None or isinstance(bound, Node) or not isinstance(bound, int | float) or math.isnan(bound):
        return False
    first = start + offset
    if name in ("eq", "ne"):
        steps = (bound - first) / increment
        return branch.value is (name == "ne") and (steps < 0 or steps != int(steps))
    limit = math.inf if increment > 0 else -math.inf
    compare = getattr(operator, name)
    return bool(compare(bound, limit) if flipped else compare(limit, bound)) is branch.value


def _offset(node: Any, slot: Node) -> Any:
    """`c` where a node computes `slot + c`; None for other computations."""
    offset: Any = 0
    while node is not slot:
        name = operation_name(node) if isinstance(node, Node) else ""
        if name not in ("add", "iadd", "sub", "isub") or len(node.args) != 2:
            return None
        left, right = node.args
        if name in ("add", "iadd") and not isinstance(left, Node):
            left, right = right, left
        if isinstance(right, Node) or not isinstance(right, int):
            return None
        offset += right if name.endswith("add") else -right
        node = left
    return offset
