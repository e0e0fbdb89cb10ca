"""Hold values that an iteration reads of an iteration before the previous one: axonal and synaptic delays.

An iteration of a re-rolled loop reads values of the previous one. A value of the d-th iteration before is passed on
through d - 1 more states: each iteration holds the value that the next one reads.
"""

from __future__ import annotations

from torch.fx import Node, map_arg

from snnfx.ir.program import StepProgram
from snnfx.ops.elements import hold

__all__ = ["hold_delayed_values"]


def hold_delayed_values(program: StepProgram, bodies: list[list[Node]]) -> None:
    """Add nodes to the iterations that hold the delayed values which the next iteration reads.

    Args:
        program: the program of the call.
        bodies: the nodes of each iteration, with equal operations from the second one; gets the new nodes.
    """
    if len(bodies) < 3 or len({len(body) for body in bodies}) > 1:
        return
    while (found := _delayed_reads(bodies)) is not None:
        values, readers, delay, position = found
        _hold(program, bodies, values, readers, delay, position)


def _delayed_reads(bodies: list[list[Node]]) -> tuple[list[Node], list[tuple[int, Node]], int, int] | None:
    """`(value that each iteration reads, position of readers, delay, position of the value)` of one delayed value."""
    place = {node: (i, p) for i, body in enumerate(bodies) for p, node in enumerate(body)}
    last = len(bodies) - 1
    for position in range(len(bodies[0])):
        inputs = [list(_operands(body[position])) for body in bodies]
        if len({len(operands) for operands in inputs}) > 1:
            continue
        for index, value in enumerate(inputs[last]):
            iteration, source = place.get(value, (last, 0))
            delay = last - iteration
            values = [operands[index] for operands in inputs]
            if delay >= 2 and all(place.get(values[i]) == (i - delay, source) for i in range(delay, last + 1)):
                if any(place.get(values[i], (-1, 0))[0] >= i for i in range(delay)):
                    continue
                readers = [(i, body[position]) for i, body in enumerate(bodies)]
                return values, readers, delay, source
    return None


def _operands(node: Node) -> list[Node]:
    """The nodes among the arguments, in order, with repetitions."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _hold(
    program: StepProgram,
    bodies: list[list[Node]],
    values: list[Node],
    readers: list[tuple[int, Node]],
    delay: int,
    source: int,
) -> None:
    """Let the iteration before each reader hold its value."""
    graph, count = program.graph, len(bodies)
    following = [*values[1:], bodies[count - delay][source]]
    held: list[Node] = []
    for body, value in zip(bodies, following, strict=True):
        with graph.inserting_after(body[-1]):
            node = graph.call_function(hold, (value,))
        node.meta = {k: v for k, v in body[-1].meta.items() if k in ("iterations",)} | {
            k: v for k, v in value.meta.items() if k in ("val", "where", "module")
        }
        body.append(node)
        held.append(node)
    for i, reader in readers:
        if i:
            reader.replace_input_with(values[i], held[i - 1])
