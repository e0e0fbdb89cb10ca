"""Verify step programs, by the rules of each stage, and emitted graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from functools import partial, reduce
from typing import Any

from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.errors import PassError
from snnfx.ir.facts import FACTS, KIND, REGION, SLOT, SUNK, VALUE
from snnfx.ir.module_effects import has_in_place_flag
from snnfx.ir.nodes import is_in_place
from snnfx.ir.printing import format_node, text_of_value
from snnfx.ir.program import SELF_TARGET, STAGES, StepProgram
from snnfx.ir.value_inference import UNKNOWN, failure_on_numbers, infer_value, is_same_shape
from snnfx.ops.written_arguments import written_arguments
from snnfx.sandbox.torch_internals import pytree

__all__ = ["verify_emitted", "verify_failures", "verify_program", "verify_structure"]

_KINDS = ("once", "fold", "map", "loop")


def verify_program(
    program: StepProgram, after: str = "capture", changed: Collection[Node] = (), where: str = ""
) -> None:
    """Check the invariants of every program and of its stage.

    Args:
        program: the program.
        after: the pass that ran last, for the message.
        changed: nodes whose shapes are checked by running them on the meta device.
        where: file and line of a user's pass.

    Raises:
        PassError: SNNFX501, with the pass, the node, and ten lines of IR around it.
    """
    verify_structure(program, after, where)
    require = _requirement(program.graph, after, where)
    nodes = list(program.graph.nodes)
    _verify_values(program, changed, require)
    stage = STAGES.index(program.stage)
    if stage >= STAGES.index("normalized"):
        for node in nodes:
            why = "it is an in-place operation, and the program is normalized"
            require(not is_in_place(node), node, f"{why}; use the out-of-place operation")
    if stage >= STAGES.index("partitioned"):
        _verify_regions(program, nodes, require)


def verify_structure(program: StepProgram, after: str, where: str = "", changed: Collection[Node] = ()) -> None:
    """Check that nodes, operands, targets, slots, facts and the output are legal, without their values and regions.

    Args:
        program: the program.
        after, where: see `verify_program`.
        changed: nodes that a user's pass added or changed, which may not write their operands or contain tensors.

    Raises:
        PassError: SNNFX501.
    """
    require = _requirement(program.graph, after, where)
    nodes = list(program.graph.nodes)
    _verify_output(program, nodes, require)
    _verify_nodes(program, nodes, require)
    _lint(program.graph, require)
    _verify_slots(program, nodes, require)
    _verify_facts(program, nodes, require)
    _verify_changed(program, changed, require)


def verify_failures(program: StepProgram, failures: Mapping[Node, Exception], after: str, where: str) -> None:
    """Refuse nodes that cannot run on their operands: their run on the meta device failed, and one on numbers fails.

    Raises:
        PassError: SNNFX501.
    """
    require = _requirement(program.graph, after, where)
    for node in failures:
        error = failure_on_numbers(program, node)
        if error is not None:
            first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
            require(False, node, f"it fails with {type(error).__name__}: {first_line}")


def verify_emitted(graph: fx.Graph, root: nn.Module, after: str) -> None:
    """Check an emitted graph: its order, its only output, and its targets on the module that owns it.

    Raises:
        PassError: SNNFX501.
    """
    require = _requirement(graph, after)
    _lint(graph, require)
    nodes = list(graph.nodes)
    outputs = [node for node in nodes if node.op == "output"]
    require(len(outputs) == 1, None, f"it has {len(outputs)} output nodes")
    require(nodes[-1] is outputs[0], nodes[-1], "it is behind the output")
    for node in nodes:
        if node.op in ("get_attr", "call_module") and node.target != SELF_TARGET:
            require(_resolves(partial(_attribute, root), str(node.target)), node, f"the net has no `{node.target}`")


_Require = Callable[[bool, Node | None, str], None]


def _requirement(graph: fx.Graph, after: str, where: str = "") -> _Require:
    def require(condition: bool, node: Node | None, why: str) -> None:
        if not condition:
            raise PassError(
                "SNNFX501",
                f"the pass `{after}` broke the graph",
                where=where,
                why=f"{why}.\n{_excerpt(graph, node)}",
                hint="Correct the pass; the program and the model were put back." if where else "",
            )

    return require


def _lint(graph: fx.Graph, require: _Require) -> None:
    try:
        graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        require(False, None, f"graph.lint failed: {str(error).splitlines()[0].rstrip('.')}")


def _verify_output(program: StepProgram, nodes: list[Node], require: _Require) -> None:
    """Check that the graph ends with its only output, which has three parts."""
    outputs = [node for node in nodes if node.op == "output"]
    require(len(outputs) == 1, None, f"it has {len(outputs)} output nodes")
    require(nodes[-1] is outputs[0], nodes[-1], "it is behind the output")
    parts = program.output.args[0]
    is_complete = isinstance(parts, tuple) and len(parts) == 3
    require(is_complete, program.output, "the output is not (outputs, next states, initial values)")
    leaves = program.output_spec.num_leaves
    require(
        len(program.outputs) == leaves,
        program.output,
        f"{len(program.outputs)} outputs, but the model returns {leaves}",
    )


def _verify_slots(program: StepProgram, nodes: list[Node], require: _Require) -> None:
    """Check that each slot has a placeholder, a next and an initial value, and each placeholder a slot or an input."""
    require(
        len(program.next_states) == len(program.slots) == len(program.initial_values),
        program.output,
        f"{len(program.slots)} slots, but {len(program.next_states)} next and "
        f"{len(program.initial_values)} initial values",
    )
    by_name = program.nodes_by_name
    for slot in program.slots:
        placeholder = by_name.get(slot.placeholder)
        if program.first_step is None or slot.placeholder:
            require(placeholder is not None, None, f"the slot {slot.name} has no placeholder {slot.placeholder!r}")
            reads = SLOT.of(placeholder) if placeholder is not None else None
            require(reads == slot.name, placeholder, f"it is not the placeholder of slot {slot.name}")
    for leaf in program.input_leaves:
        exists = leaf.placeholder is None or leaf.placeholder in by_name
        require(exists, None, f"the input {leaf.name} has no placeholder {leaf.placeholder!r}")
    read = {slot.placeholder for slot in program.slots} | {leaf.placeholder for leaf in program.input_leaves}
    for node in nodes:
        is_read = node.op != "placeholder" or node.name in read
        require(is_read, node, "it is the placeholder of no slot and no input; add one to program.slots")


def _verify_nodes(program: StepProgram, nodes: list[Node], require: _Require) -> None:
    """Check operands and targets."""
    position = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        for operand in node.all_input_nodes:
            if position.get(operand, len(nodes)) < position[node]:
                continue
            if operand.graph is not node.graph:
                require(False, node, f"its operand {operand} belongs to another graph; use graph.node_copy")
            require(operand in position, node, f"its operand {operand} was erased")
            require(False, node, f"its operand {operand} does not come before it")
        if node.op in ("get_attr", "call_module"):
            require(_resolves(program.resolve, str(node.target)), node, f"the model has no `{node.target}`")
        if node.op == "call_module":
            is_module = isinstance(program.resolve(str(node.target)), nn.Module)
            require(is_module, node, f"`{node.target}` is not a module")


def _verify_changed(program: StepProgram, changed: Collection[Node], require: _Require) -> None:
    """Check the nodes that a user's pass added or changed: no operands in place, and no tensors in arguments."""
    is_normalized = STAGES.index(program.stage) >= STAGES.index("normalized")
    for node in changed:
        leaves = pytree.tree_leaves((node.args, node.kwargs))
        has_tensor = any(isinstance(leaf, Tensor) for leaf in leaves)
        require(not has_tensor, node, "an argument is a tensor; use program.add_constant(name, tensor)")
        if not is_normalized:
            continue
        why = "it is an in-place operation, and the program is normalized"
        require(not _writes(node), node, f"{why}; use the out-of-place operation")
        if has_in_place_flag(program, node):
            others = [user for operand in node.all_input_nodes for user in operand.users if user is not node]
            reader = f"{others[0]} reads its operand too" if others else ""
            require(not others, node, f"its module has inplace=True, and {reader}; use inplace=False")


def _writes(node: Node) -> bool:
    """Whether a call writes an operand: by its name, an `out` argument, or the schema of an operator."""
    out = node.kwargs.get("out")
    return (
        is_in_place(node)
        or any(isinstance(leaf, Node) for leaf in pytree.tree_leaves(out))
        or node.target in (operator.setitem, "__setitem__")
        or (node.op == "call_function" and bool(written_arguments(node.target)))
    )


def _verify_facts(program: StepProgram, nodes: list[Node], require: _Require) -> None:
    """Check that facts have their types, and belong to a stage that the program has reached."""
    planned = [fact for fact in FACTS.values() if fact.since in ("partitioned", "planned") and fact is not SUNK]
    is_partitioned = STAGES.index(program.stage) >= STAGES.index("partitioned")
    for node in nodes:
        for key, value in node.meta.items():
            fact = FACTS.get(key)
            legal = fact is None or fact.has_legal_type(value)
            require(legal, node, f"its fact {key!r} is a {type(value).__name__}")
        if not is_partitioned:
            early = next((fact for fact in planned if fact.key in node.meta), None)
            if early is not None:
                require(False, node, f"it has the fact {early.key!r} of stage {early.since!r}")


def _verify_values(program: StepProgram, changed: Collection[Node], require: _Require) -> None:
    """Check the shapes and dtypes of changed nodes."""
    for node in changed:
        if not VALUE.is_known(node) or node.graph is not program.graph or not node.op.startswith("call"):
            continue
        recorded, inferred = VALUE.of(node), infer_value(program, node)
        if inferred is not UNKNOWN and not is_same_shape(recorded, inferred):
            why = f"its value is recorded as {_shape(recorded)}, but it is {_shape(inferred)}"
            require(False, node, f"{why}; delete node.meta[{VALUE.key!r}], and the manager infers it")


def _shape(value: Any) -> str:
    return text_of_value(value) or type(value).__name__


def _attribute(root: nn.Module, target: str) -> object:
    return reduce(getattr, target.split("."), root)


def _resolves(resolve: Callable[[str], object], target: str) -> bool:
    try:
        resolve(target)
    except AttributeError:
        return False
    return True


def _verify_regions(program: StepProgram, nodes: list[Node], require: _Require) -> None:
    """Check that regions are disjoint and convex, and that only loops have state slots."""
    region_of: dict[Node, int] = {}
    present = set(nodes)
    for index, region in enumerate(program.regions):
        require(region.kind in _KINDS, None, f"region {region.name} has the unknown kind {region.kind!r}")
        for node in region.nodes:
            erased = node.graph is program.graph and node not in present
            require(not erased, None, f"region {region.name} contains the erased node {node.name}")
            require(node not in region_of, node, f"it is in two regions, one of them {region.name}")
            require(node.graph is program.graph, node, f"region {region.name} contains a node of another graph")
            region_of[node] = index
            agrees = KIND.of(node) == region.kind and REGION.of(node) == region.name
            facts = f"region {REGION.of(node)!r} of kind {KIND.of(node)!r}"
            require(agrees, node, f"its facts name {facts}, but it is in {region.name} of kind {region.kind!r}")
        if region.kind != "loop":
            require(
                not region.slots,
                None,
                f"the {region.kind} region {region.name} contains the state slots {region.slots}",
            )
    for index, region in enumerate(program.regions):
        for node in region.nodes:
            for operand in node.all_input_nodes:
                if operand in region_of:
                    require(
                        region_of[operand] <= index, node, f"its operand {operand} is in a later region: not convex"
                    )


def _excerpt(graph: fx.Graph, node: Node | None, around: int = 5) -> str:
    nodes = list(graph.nodes)
    index = nodes.index(node) if node in nodes else 0
    lines = []
    for i in range(max(0, index - around), min(len(nodes), index + around + 1)):
        marker = "--> " if node is not None and i == index else "    "
        lines.append(marker + format_node(nodes[i]))
    return "\n".join(lines)
