"""Complete a last iteration that runs less than the others: `if t < T - 1: v = v - s`.

Nothing reads the missing values, as they would only be read by the next iteration. So the last iteration computes them
too, for nothing, and runs the step of all others.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch.fx import Node

from snnfx.analysis.dependence import is_random
from snnfx.ir.facts import ITERATIONS, WHERE
from snnfx.ir.module_effects import updates_buffers
from snnfx.ir.nodes import is_module_call
from snnfx.ir.program import StepProgram
from snnfx.sequence.roles import operation
from snnfx.sequence.shared_nodes import matched_places

__all__ = ["complete_last_iteration"]


class _Unknown(Exception):
    """The last iteration of a value is not known."""


def complete_last_iteration(program: StepProgram, bodies: list[list[Node]]) -> None:
    """Add the operations that only the last iteration lacks.

    Args:
        program: the program of the call.
        bodies: the nodes of each iteration; the last one gets the new nodes.
    """
    if len(bodies) < 4 or not bodies[-1] or len(bodies[-1]) >= len(bodies[-2]):
        return
    before, template, last = bodies[-3:]
    keys = [_key(n) for n in template]
    if keys != [_key(n) for n in before]:
        return
    fitted = {p: last[i] for p, i in matched_places(keys, [_key(n) for n in last]).items()}
    missing = [n for p, n in enumerate(template) if p not in fitted]
    if len(fitted) < len(last) or any(_has_effects(program, n) for n in missing):
        return
    completion = _Completion(program, (before, template, last), fitted)
    try:
        arguments = {p: completion.arguments(p) for p in range(len(template)) if p not in fitted}
    except _Unknown:
        return
    bodies[-1][:] = completion.completed(arguments)


def _key(node: Node) -> Hashable:
    kind, target = operation(node)
    return kind, target, WHERE.of(node)


def _has_effects(program: StepProgram, node: Node) -> bool:
    return updates_buffers(program, node) or is_module_call(node) or is_random(program, node)


class _Missing:
    """Stands for the node at a position that is still to be added."""

    def __init__(self, position: int) -> None:
        self.position = position


class _Completion:
    def __init__(
        self, program: StepProgram, bodies: tuple[list[Node], list[Node], list[Node]], fitted: dict[int, Node]
    ) -> None:
        self.program, self.fitted = program, fitted
        self.before, self.template, self.last = bodies
        self.place = {n: (i, p) for i, body in enumerate((self.before, self.template)) for p, n in enumerate(body)}

    def arguments(self, position: int) -> tuple[Any, Any]:
        """The arguments that the node at a position has in the last iteration.

        Raises:
            _Unknown: they do not follow from the iterations before.
        """
        a, b = self.before[position], self.template[position]
        return self._following(a.args, b.args), self._following(a.kwargs, b.kwargs)

    def _following(self, a: Any, b: Any) -> Any:
        if isinstance(b, Node):
            place = self.place.get(b)
            if place is None:
                if a is b:
                    return b
                raise _Unknown
            iteration, position = place
            # The place in the iteration before shows the distance in time.
            if not isinstance(a, Node) or (iteration == 1 and self.place.get(a) != (0, position)):
                raise _Unknown
            return self.fitted.get(position, _Missing(position)) if iteration == 1 else self.template[position]
        if isinstance(b, tuple | list):
            if type(a) is not type(b) or len(a) != len(b) or hasattr(b, "_fields"):
                raise _Unknown
            return type(b)(self._following(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(b, dict):
            if not isinstance(a, dict) or a.keys() != b.keys():
                raise _Unknown
            return {k: self._following(a[k], b[k]) for k in b}
        if type(a) is not type(b) or (a != b and (a == a or b == b)):
            raise _Unknown
        return b

    def completed(self, arguments: dict[int, tuple[Any, Any]]) -> list[Node]:
        """Record the missing nodes, and return the nodes of the whole last iteration."""
        graph, nodes = self.program.graph, list[Node]()
        end = self.last[-1]

        def resolve(tree: Any) -> Any:
            if isinstance(tree, _Missing):
                return nodes[tree.position]
            if isinstance(tree, tuple | list):
                return type(tree)(resolve(v) for v in tree)
            return {k: resolve(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

        previous: Node | None = None
        for position, sample in enumerate(self.template):
            if position in self.fitted:
                previous = self.fitted[position]
            else:
                args, kwargs = (resolve(a) for a in arguments[position])
                with graph.inserting_before(self.last[0]) if previous is None else graph.inserting_after(previous):
                    previous = graph.create_node(sample.op, sample.target, args, kwargs)
                previous.meta = dict(sample.meta)
                ITERATIONS.set(previous, ITERATIONS.of(end))
            nodes.append(previous)
        return nodes
