"""Compare two planned programs exactly: whether one can run in place of the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import VALUE
from snnfx.ir.guards import is_same_value
from snnfx.ir.program import StepProgram

__all__ = ["has_same_nodes", "is_same_plan"]

_FIELDS = ("slots", "requirements", "input_ranks", "batched_inputs", "opaque", "inferred_carry", "overwritten", "stage")
_SPECS = ("input_spec", "output_spec", "input_leaves", "carried", "training")
_PLAN = ("kind", "region", "refusal", "batch_dim", "varying", "batch_sizes", "slot", "input")


def is_same_plan(a: StepProgram, b: StepProgram) -> bool:
    """Whether two programs of one model have the same nodes, the same constant objects and the same regions."""
    if any(getattr(a, name) != getattr(b, name) for name in _FIELDS + _SPECS):
        return False
    if len(a.graph.nodes) != len(b.graph.nodes) or a.constants.keys() != b.constants.keys():
        return False
    if not all(_is_same_constant(value, b.constants[name]) for name, value in a.constants.items()):
        return False
    if not all(_is_same_node(m, n) for m, n in zip(a.graph.nodes, b.graph.nodes, strict=True)):
        return False
    if _flags(a) != _flags(b):
        return False  # the emitted order of calls depends on the layers that update buffers
    if _regions(a) != _regions(b) or not _is_same(_initial_attributes(a), _initial_attributes(b)):
        return False
    if a.first_step is None or b.first_step is None:
        return a.first_step is b.first_step
    return is_same_plan(a.first_step, b.first_step)


def _flags(program: StepProgram) -> dict[str, Any]:
    """The `training` flags of layers that the plan depends on."""
    return {read.owner: read.value for read in program.setting_reads if read.name == "training"}


def has_same_nodes(a: StepProgram, b: StepProgram) -> bool:
    """Whether two programs have the same nodes and constant objects, in the first step as well."""
    if len(a.graph.nodes) != len(b.graph.nodes) or a.constants.keys() != b.constants.keys():
        return False
    if not all(_is_same_constant(value, b.constants[name]) for name, value in a.constants.items()):
        return False
    if not all(_is_same_node(m, n) for m, n in zip(a.graph.nodes, b.graph.nodes, strict=True)):
        return False
    if a.first_step is None or b.first_step is None:
        return a.first_step is b.first_step
    return has_same_nodes(a.first_step, b.first_step)


def _is_same_node(a: Node, b: Node) -> bool:
    return (
        (a.op, a.name) == (b.op, b.name)
        and (a.target is b.target or a.target == b.target)
        and _is_same(a.args, b.args)
        and _is_same(a.kwargs, b.kwargs)
        and all(a.meta.get(key) == b.meta.get(key) for key in _PLAN)
        and _shape(a) == _shape(b)
    )


def _shape(node: Node) -> Any:
    value = VALUE.of(node)
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return isinstance(a, Node) and isinstance(b, Node) and a.name == b.name
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [*a] == [*b] and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, slice):
        return _is_same((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    if isinstance(a, Tensor):
        return a is b
    return is_same_value(a, b)


def _is_same_constant(a: Any, b: Any) -> bool:
    function = getattr(a, "function", None)  # of a holder that each capture makes
    return a is b or (function is not None and type(a) is type(b) and function is getattr(b, "function", None))


def _regions(program: StepProgram) -> list[Any]:
    return [
        (r.name, r.kind, [n.name for n in r.nodes], r.slots, r.lowering_refusal, r.absorbed) for r in program.regions
    ]


def _initial_attributes(program: StepProgram) -> list[Any]:
    return [(i.owner, i.attribute, i.value, i.exists) for i in program.initial_attributes]
