"""Sizes in the iterations of a loop: tests that only decide about iterations, and checks of the inputs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import Node

from snnfx.ir.facts import ITERATIONS
from snnfx.ir.nodes import is_size
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


def remove_loop_tests(program: StepProgram, run: LoopRun, any_length: bool) -> None:
    """Remove the checks of sizes that decide about the next iteration: `while t < x.shape[0]`.

    Args:
        program: the program of the call.
        run: the loop.
        any_length: whether the number of iterations follows from the inputs. If not, the two tests around the end stay
            in front of the loop: they are the guard of the number of iterations.
    """
    tests: dict[Any, list[Node]] = {}
    for body in run.bodies:
        inside, counts = set(body), Counter[Any]()
        for node in body:
            operand = node.args[0] if node.target is expect_size else None
            if isinstance(operand, Node) and isinstance(node.args[1], bool) and operand in inside:
                test = operand.target, node.args[2]
                tests.setdefault((test, counts[test]), []).append(node)  # the same test of each iteration
                counts[test] += 1
    removed: set[Node] = set()
    for nodes in tests.values():
        numbers = {tuple(v for v in n.args[0].args if isinstance(v, int)) for n in nodes}  # type: ignore[union-attr]
        if len(numbers) == len(nodes):
            before_end = [n for n in nodes if n.args[1] is not nodes[-1].args[1]][-1:]
            for node in () if any_length else (*before_end, nodes[-1]):
                _copy_in_front(program, run.bodies[0][0], node)
            for node in nodes:
                _erase_unused(program, node, removed)
    for body in run.bodies:
        body[:] = [n for n in body if n not in removed]
