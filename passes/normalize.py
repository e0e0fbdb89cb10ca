"""Normalise the step graph: functionalise in-place operations, merge get_attr nodes, order reads of statistics.

Replaces `y = x.add_(1)` by `y = x.add(1)`, and every later read of x by y. Legal if no other value shares the memory of
x; in-place operations on views and aliases are refused. Modules with `inplace=True` stay, but get a copy of an operand
that has other readers. A read of a buffer that a call of the step updates (running statistics) becomes a copy that is
ordered before or after the call (`snnfx.analysis.statistic_reads`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.analysis.state_aliases import is_output_of_stateful_call, unite_output_with_state
from snnfx.analysis.statistic_reads import read_updated_statistics
from snnfx.errors import CaptureError
from snnfx.ir.facts import INPUT, ITERATIONS, ORIGIN, WITHOUT_GRADIENT, copy_facts
from snnfx.ir.module_effects import has_in_place_flag
from snnfx.ir.nodes import IN_PLACE_OPERATORS, is_in_place, is_size, is_structural, takes_from_tuple
from snnfx.ir.printing import location_of
from snnfx.ir.program import StepProgram
from snnfx.ops.operator_lookup import traits_of, traits_of_module
from snnfx.ops.step_functions import change_value, copied, set_part_
from snnfx.passes.base import Pass

__all__ = ["Normalize"]


@dataclass(frozen=True)
class Normalize(Pass):
    """Replace in-place operations by functional ones."""

    name = "normalize"
    requires = ("captured", "normalized")
    ensures = "normalized"
    may_change = ("graph", "slots")

    def apply(self, program: StepProgram) -> str:
        replaced = 0
        if program.first_step is not None:
            self.apply(program.first_step)
        _merge_attributes(program)
        reads = read_updated_statistics(program, _may_share_memory)
        for node in list(program.graph.nodes):
            if node.target is set_part_:
                _functionalize_augmented_assignment(node)
        for node in list(program.graph.nodes):
            if is_in_place(node) or has_in_place_flag(program, node):
                _unite_changed_output_with_state(program, node)
        for node in list(program.graph.nodes):
            if is_in_place(node):
                _functionalize(program, node)
                if WITHOUT_GRADIENT.of(node):
                    WITHOUT_GRADIENT.clear(node)
                    _keep_autograd_graph(program, node)
                replaced += 1
            elif has_in_place_flag(program, node) and isinstance(operand := node.args[0], Node):
                _refuse_aliases(program, node, operand, inputs_as_well=False)
                if _read_elsewhere(node):
                    _copy_operand(program, node)
                    replaced += 1
        ordered = f", {reads} reads of updated statistics ordered" if reads else ""
        return f"{replaced} in-place operations made functional{ordered}"


def _merge_attributes(program: StepProgram) -> None:
    """Keep one get_attr node for each target."""
    first: dict[str, Node] = {}
    for node in list(program.graph.nodes):
        if node.op == "get_attr":
            known = first.setdefault(str(node.target), node)
            if known is not node:
                node.replace_all_uses_with(known)
                program.graph.erase_node(node)


def _functionalize_augmented_assignment(node: Node) -> None:
    """`x[i] += y` changes the view `x[i]` and assigns it to `x[i]`: make the change functional."""
    target, index, value = node.args
    if not isinstance(value, Node) or not is_in_place(value) or set(value.users) != {node}:
        return
    part = value.args[0]
    is_part = isinstance(part, Node) and part.target is operator.getitem and part.args == (target, index)
    if is_part and set(part.users) == {value} and value.target in IN_PLACE_OPERATORS:  # type: ignore[union-attr]
        value.target = IN_PLACE_OPERATORS[value.target]


def _unite_changed_output_with_state(program: StepProgram, node: Node) -> None:
    """If an in-place operation changes the output of a stateful module, unite that output with its state."""
    changed = node.args[0] if node.args else None
    while isinstance(changed, Node) and not is_output_of_stateful_call(changed):
        source = changed.args[0] if changed.args else None
        changed = source if isinstance(source, Node) and _may_share_memory(program, changed, source) else None
    if isinstance(changed, Node):
        unite_output_with_state(program, changed, node)


def _functionalize(program: StepProgram, node: Node) -> None:
    operand = node.args[0]
    if not isinstance(operand, Node):
        raise CaptureError(
            "SNNFX214",
            f"`{node.name}` changes several tensors in place",
            where=location_of(node),
            why="an in-place operation of a functional graph has one operand.",
            hint="Change the tensors one by one, e.g. for p in parameters: p.add_(1).",
        )
    # `detach_` changes no memory: it is an assignment of the detached tensor.
    is_detach = node.op == "call_method" and node.target == "detach_"
    is_view = traits_of(operand).view == "view" and not (is_detach and takes_from_tuple(operand))
    if is_view and not is_output_of_stateful_call(operand):
        raise CaptureError(
            "SNNFX214",
            f"`{node.name}` changes a view in place",
            where=location_of(node),
            why=f"`{operand.name}` shares memory with another tensor, which would change as well.",
            hint="Use an out-of-place operation, e.g. x = torch.where(...) or x = x.index_fill(...).",
        )
    if operand.op == "get_attr" and str(operand.target) in program.constants:
        raise CaptureError(
            "SNNFX214",
            f"`{node.name}` changes a constant tensor in place",
            where=location_of(node),
            why="the tensor does not depend on the inputs, so the change would persist across time steps.",
            hint="Create it from an input: x.new_zeros(x.shape[0], 4), torch.zeros_like(x).",
        )
    if operand.op == "get_attr":
        raise CaptureError(
            "SNNFX206",
            f"`{node.name}` changes `{operand.target}` in place",
            where=location_of(node),
            why="a pass inserted the operation after capture, which alone records changes of attributes as state.",
            hint="Use an out-of-place operation in the pass, or make the change in the forward of the model.",
        )
    if INPUT.is_known(operand) and operand.op == "placeholder":
        raise CaptureError(
            "SNNFX209",
            f"`{node.name}` changes the input `{operand.name}` in place",
            where=location_of(node),
            why="the converted net would change the caller's sequence.",
            hint="Use an out-of-place operation, e.g. x = x.add(1).",
        )
    if not is_detach:
        _refuse_aliases(program, node, operand)
    seen = False
    for user in list(program.graph.nodes):
        if seen and operand in user.all_input_nodes:
            user.replace_input_with(operand, node)
        seen = seen or user is node
    if node.kwargs.get("inplace") is True:
        node.kwargs = {**node.kwargs, "inplace": False}
        return
    if node.target in IN_PLACE_OPERATORS:
        node.target = IN_PLACE_OPERATORS[node.target]
        return
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", "")).removesuffix("_")
    if name == "copy":
        node.op, node.target, node.args = "call_function", copied, (operand, *node.args[1:2])
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "non_blocking"}
    elif hasattr(Tensor, name):
        node.op, node.target = "call_method", name
    elif name in ("fill", "zero", "normal", "uniform", "bernoulli", "random", "exponential"):
        _replace_filling(program, node, operand, name)
    else:
        raise CaptureError(
            "SNNFX214",
            f"`{node.name}` has no out-of-place form",
            where=location_of(node),
            why=f"torch has no `{name}`.",
            hint="Assign a new tensor instead.",
        )


def _keep_autograd_graph(program: StepProgram, node: Node) -> None:
    """Under `torch.no_grad()`, change the value of a tensor and keep its autograd graph."""
    with program.graph.inserting_after(node):
        changed = program.graph.call_function(change_value, (node.args[0], node))
    changed.meta = dict(node.meta)
    node.replace_all_uses_with(changed, delete_user_cb=lambda user: user is not changed)


def _refuse_aliases(program: StepProgram, node: Node, operand: Node, inputs_as_well: bool = True) -> None:
    """Refuse if another value that may share the memory of the operand is read after the change.

    `inputs_as_well`: count inputs and parameters as read after the change.
    """
    position = {n: i for i, n in enumerate(program.graph.nodes)}
    aliases, stack = {operand}, [operand]
    while stack:
        known = stack.pop()
        others = [n for n in known.all_input_nodes if _may_share_memory(program, known, n)]
        if not traits_of(known).parts or not any(takes_from_tuple(n) and n in aliases for n in known.users):
            # The parts of a partition share no memory with each other.
            others += [u for u in known.users if position[u] < position[node] and _may_share_memory(program, u, known)]
        stack += [n for n in others if n not in aliases]
        aliases.update(others)
    for other in aliases - {operand}:
        later = [user for user in other.users if position[user] > position[node]]
        if later or (inputs_as_well and other.op in ("placeholder", "get_attr")):
            raise CaptureError(
                "SNNFX214",
                f"`{node.name}` changes a tensor in place that has an alias",
                where=location_of(node),
                why=f"`{other.name}` may share its memory and is read afterwards.",
                hint="Use an out-of-place operation, or change a copy: x = x.clone().",
            )


def _may_share_memory(program: StepProgram, node: Node, operand: Node) -> bool:
    """Whether the value of `node` may be a view of `operand`, or `operand` itself."""
    if not node.args or node.args[0] is not operand:
        return False
    if is_structural(node):
        return False
    if node.op == "call_module":
        return bool(traits_of_module(program.resolve(str(node.target))).view)
    return not is_size(node) and bool(traits_of(node).view)


def _replace_filling(program: StepProgram, node: Node, operand: Node, name: str) -> None:
    """`x.fill_(3)`, `x.zero_()`, `x.normal_()`: replace by a function of the shape of x."""
    functions = {"zero": torch.zeros_like, "normal": torch.randn_like, "uniform": torch.rand_like}
    if name in functions and len(node.args) == 1 and not node.kwargs:
        node.op, node.target = "call_function", functions[name]
    elif name == "fill":
        node.op, node.target = "call_function", torch.full_like
    else:
        raise CaptureError(
            "SNNFX214",
            f"`{operand.name}.{name}_` has no out-of-place form",
            where=location_of(node),
            hint="Use torch.rand_like, torch.randn_like or torch.bernoulli.",
        )


def _read_elsewhere(node: Node) -> bool:
    operand = node.args[0]
    if not isinstance(operand, Node):
        return False
    is_view = traits_of(operand).view == "view"
    return len(operand.users) > 1 or operand.op == "placeholder" or is_view


def _copy_operand(program: StepProgram, node: Node) -> None:
    operand = node.args[0]
    assert isinstance(operand, Node)
    with program.graph.inserting_before(node):
        copy = program.graph.call_method("clone", (operand,))
    copy_facts(operand, copy, (*ORIGIN, ITERATIONS))
    node.replace_input_with(operand, copy)
    seen = False
    for user in list(program.graph.nodes):
        if seen and operand in user.all_input_nodes:
            user.replace_input_with(operand, node)
        seen = seen or user is node
