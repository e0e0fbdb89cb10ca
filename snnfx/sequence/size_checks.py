"""Sizes in the iterations of a loop: tests that only decide about iterations, and checks of the inputs."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import ITERATIONS, VALUE
from snnfx.ir.nodes import is_size
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.step_functions import expect_size
from snnfx.sequence.loop_runs import LoopRun

__all__ = ["move_size_checks_first", "remove_loop_tests"]


def move_size_checks_first(program: StepProgram) -> str:
    """Move checks of sizes of the inputs in front of all loops: those of `len(x)` in an iteration; return a note."""
    graph = program.graph
    known: set[Any] = set()
    first = next((n for n in graph.nodes if n.op not in ("placeholder", "get_attr")), graph.output_node())
    moved = 0
    for node in list(graph.nodes):
        if node.target is not expect_size or not ITERATIONS.of(node) or node.users or isinstance(node.args[1], bool):
            continue
        chain = _of_inputs(node)
        if chain is None:
            continue
        moved += 1
        key = (*((n.target, tuple(a for a in n.args if not isinstance(a, Node))) for n in chain[1:]), chain[-1].args[0])
        if (key, node.args[1]) in known:
            _erase_unused(program, node, set())
            continue
        known.add((key, node.args[1]))
        with graph.inserting_before(first):
            copies: dict[Node, Node] = {}
            for part in reversed(chain):
                copies[part] = graph.node_copy(part, lambda n, copies=copies: copies.get(n, n))  # type: ignore[misc]
                ITERATIONS.clear(copies[part])
        _erase_unused(program, node, set())
    return f"moved {moved} checks of sizes"


def _of_inputs(node: Node) -> list[Node] | None:
    """The nodes from a check back to the one that reads an input; None if it checks another size."""
    chain = [node]
    while True:
        operand = chain[-1].args[0]
        if not isinstance(operand, Node) or len(chain[-1].all_input_nodes) != 1:
            return None
        if operand.op == "placeholder":
            return chain
        if not is_size(operand):
            return None
        chain.append(operand)


def _erase_unused(program: StepProgram, node: Node, removed: set[Node]) -> None:
    """Erase a node, and the sizes that only it reads."""
    operands = node.all_input_nodes
    program.graph.erase_node(node)
    removed.add(node)
    for operand in operands:
        if is_size(operand) and not operand.users and operand not in removed:
            _erase_unused(program, operand, removed)


def _copy_in_front(program: StepProgram, anchor: Node, check: Node) -> None:
    """Copy a check, with the computation of its size, in front of a node."""
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    copies: dict[Node, Node] = {}

    def copy(node: Node) -> Node:
        if order[node] < order[anchor]:
            return node
        if node not in copies:
            operands = {n: copy(n) for n in node.all_input_nodes}
            with program.graph.inserting_before(anchor):
                copies[node] = program.graph.node_copy(node, lambda n: operands[n])
            ITERATIONS.clear(copies[node])
        return copies[node]

    copy(check)


def _form(node: Node) -> Any:
    """A size as nested tuples that are equal for equal computations; any other value as its node.

    The elements of a sequence have one form: their sizes are equal.
    """
    if not is_size(node):
        source = node.args[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, Node) and isinstance(node.args[1], int):
            of_sequence = isinstance(VALUE.of(source), Tensor) or operation_name(source) == "unbind"
            return ("element", source) if of_sequence else node
        return ("element", *node.args[:2]) if operation_name(node) == "select" else node
    return node.target, *(_form(a) if isinstance(a, Node) else repr(a) for a in node.args)


def _tensors_read(check: Node) -> set[Node]:
    """The values whose sizes a check reads."""
    found: set[Node] = set()
    pending = list(check.all_input_nodes)
    while pending:
        node = pending.pop()
        if is_size(node):
            pending += node.all_input_nodes
        else:
            found.add(node)
    return found


def remove_loop_tests(program: StepProgram, run: LoopRun, any_length: bool) -> None:
    """Remove the checks of sizes that decide about the next iteration: `while t < x.shape[0]`.

    Checks that are the same in each iteration, such as `if x.shape[1] > 3`, move in front of the loop.

    Args:
        program: the program of the call.
        run: the loop.
        any_length: whether the number of iterations follows from the inputs. If not, the two tests around the end stay
            in front of the loop: they are the guard of the number of iterations.
    """
    tests: dict[Any, list[Node]] = {}
    for body in run.bodies:
        inside = set(body)
        for node in body:
            operand = node.args[0] if node.target is expect_size else None
            if isinstance(operand, Node) and isinstance(node.args[1], bool) and operand in inside:
                operands = tuple([_form(n) for n in operand.all_input_nodes])
                tests.setdefault((operand.target, operands, node.args[2]), []).append(node)
    removed: set[Node] = set()
    unneeded: list[Node] = []
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    start = next((node for body in run.bodies for node in body), None)
    for nodes in tests.values():
        assert start is not None
        numbers = {tuple(v for v in n.args[0].args if isinstance(v, int)) for n in nodes}  # type: ignore[union-attr]
        if len(numbers) == len(nodes) > 1:
            before_end = [n for n in nodes if n.args[1] is not nodes[-1].args[1]][-1:]
            kept = [] if any_length else [*before_end, nodes[-1]]
        elif len(numbers) == 1 and all(order[n] < order[start] for n in _tensors_read(nodes[0])):
            kept = nodes[:1]
        else:
            continue
        for node in kept:
            _copy_in_front(program, start, node)
        unneeded += nodes
    for node in unneeded:  # behind all copies, which stand in front of a node of the loop
        _erase_unused(program, node, removed)
    for body in run.bodies:
        body[:] = [n for n in body if n not in removed]
