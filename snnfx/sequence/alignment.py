"""Prove that the iterations of a loop run the same step.

The iterations are compared node by node. An argument is then one of: a value of the same iteration, a value of the
previous iteration (carried), a value from outside the loop, a value from outside that differs from iteration to
iteration (an element of a sequence), or a constant. The first iteration may start differently
(`snnfx.sequence.first_iteration`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from snnfx.ir.printing import describe_node
from snnfx.ir.program import StepProgram
from snnfx.sequence.first_iteration import fit_first
from snnfx.sequence.roles import Carried, Differs, Outside, Own, Varying, operation

__all__ = ["Alignment", "align"]


@dataclass
class Alignment:
    """The common step of the iterations of a loop.

    Args:
        bodies: the nodes of each iteration.
        template: the nodes of one iteration; positions are indices into it.
        arguments: `(args, kwargs)` of each position, with roles instead of nodes.
        first: the value of each position in the first iteration: a node, or a number that Python evaluated.
        initial: the values before the first iteration, by carried position.
    """

    bodies: list[list[Node]]
    template: list[Node]
    arguments: list[tuple[Any, Any]]
    first: list[Any]
    initial: dict[int, Any]

    def value(self, iteration: int, position: int) -> Any:
        """The value at a position of an iteration."""
        return self.first[position] if iteration == 0 else self.bodies[iteration][position]

    @property
    def count(self) -> int:
        """The number of iterations."""
        return len(self.bodies)


def align(program: StepProgram, bodies: list[list[Node]]) -> Alignment:
    """Find the common step of the iterations.

    Raises:
        Differs: they do not run the same step, the first apart from its start.
    """
    if len(bodies) < 2:
        raise Differs("it has a single iteration", bodies[0][0] if bodies and bodies[0] else None)
    later = _Later(bodies)
    arguments = later.arguments()
    first, initial, added = fit_first(program, bodies, arguments, later.before)
    if len(bodies) == 2 and any(not isinstance(v, Node) for v in first):
        raise Differs("two iterations are too few to compare", bodies[1][0])
    for position, (args, kwargs) in enumerate(arguments):
        fitted = first[position]
        if position in added:
            actual: tuple[Any, Any] = (added[position], {})
        elif isinstance(fitted, Node):
            actual = (fitted.args, fitted.kwargs)
        else:
            continue
        arguments[position] = _with_first_values((args, kwargs), actual)
    return Alignment(bodies, list(bodies[1]), arguments, first, initial)


class _Later:
    """Compares all iterations but the first."""

    def __init__(self, bodies: list[list[Node]]) -> None:
        self.bodies = bodies[1:]
        self.place = {node: (i, p) for i, body in enumerate(bodies) for p, node in enumerate(body)}
        self.before: dict[int, Any] = {}
        """The value before the second iteration, by carried position."""

    def arguments(self) -> list[tuple[Any, Any]]:
        template = self.bodies[0]
        for body in self.bodies[1:]:
            for a, b in zip(template, body, strict=False):
                if operation(a) != operation(b):
                    raise Differs(f"one iteration runs `{describe_node(a)}`, another `{describe_node(b)}`", b)
            if len(body) != len(template):
                longer = max(body, template, key=len)
                extra = longer[min(len(body), len(template))]
                raise Differs(f"only some iterations run `{describe_node(extra)}`", extra)
        return [
            (
                self._combine([body[p].args for body in self.bodies], template[p]),
                self._combine([body[p].kwargs for body in self.bodies], template[p]),
            )
            for p in range(len(template))
        ]

    def _combine(self, values: list[Any], node: Node) -> Any:
        """The role of the arguments at one place, one value for each iteration."""
        sample = values[0]
        if any(isinstance(v, Node) for v in values):
            return self._role(values, node)
        if isinstance(sample, tuple | list):
            if any(type(v) is not type(sample) or len(v) != len(sample) for v in values):
                raise Differs(f"the arguments of `{describe_node(node)}` grow from iteration to iteration", node)
            parts = [self._combine(list(part), node) for part in zip(*values, strict=True)]
            if isinstance(sample, tuple) and hasattr(sample, "_fields"):
                return type(sample)(*parts)
            return tuple(parts) if isinstance(sample, tuple) else parts
        if isinstance(sample, dict):
            if any(not isinstance(v, dict) or v.keys() != sample.keys() for v in values):
                raise Differs(f"the arguments of `{describe_node(node)}` differ", node)
            return {k: self._combine([v[k] for v in values], node) for k in sample}
        if isinstance(sample, slice):
            parts = [
                self._combine(list(p), node) for p in zip(*((v.start, v.stop, v.step) for v in values), strict=True)
            ]
            return slice(*parts)
        if all(type(v) is type(sample) and (v == sample or (v != v and sample != sample)) for v in values):
            return sample
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return Varying(tuple(values))
        other = next(v for v in values if type(v) is not type(sample) or v != sample)
        raise Differs(f"an argument of `{describe_node(node)}` is {sample!r}, then {other!r}", node)

    def _role(self, values: list[Any], node: Node) -> Any:
        places = [self.place.get(v) if isinstance(v, Node) else None for v in values]
        own = places[0]
        if own is not None and all(p == (i, own[1]) for i, p in enumerate(places, 1)):
            return Own(own[1])
        if len(values) > 1:
            carried = places[1]
            if carried is not None and all(p == (i - 1, carried[1]) for i, p in enumerate(places[1:], 2)):
                return self._carried(carried[1], values[0], node)
        elif own is not None and own[0] == 0:
            raise Differs("two iterations are too few to compare", node)
        if all(p is None for p in places):
            if all(v is values[0] for v in values):
                return Outside(values[0])
            if all(isinstance(v, Node) for v in values):
                return Varying(tuple(values))
        raise Differs(f"`{describe_node(node)}` reads a value of an iteration before the previous one", node)

    def _carried(self, position: int, before: Any, node: Node) -> Carried:
        known = self.before.setdefault(position, before)
        if known is not before:
            raise Differs(f"`{describe_node(node)}` starts from two values", node)
        return Carried(position)


def _with_first_values(expected: Any, actual: Any) -> Any:
    """Add the value of the first iteration to all `Varying` roles."""
    if isinstance(expected, Varying):
        return Varying((actual, *expected.values))
    if isinstance(expected, tuple) and hasattr(expected, "_fields"):
        return type(expected)(*(_with_first_values(e, a) for e, a in zip(expected, actual, strict=True)))
    if isinstance(expected, tuple | list):
        return type(expected)(_with_first_values(e, a) for e, a in zip(expected, actual, strict=True))
    if isinstance(expected, dict):
        return {k: _with_first_values(v, actual[k]) for k, v in expected.items()}
    if isinstance(expected, slice):
        parts = ((expected.start, actual.start), (expected.stop, actual.stop), (expected.step, actual.step))
        return slice(*(_with_first_values(e, a) for e, a in parts))
    return expected
