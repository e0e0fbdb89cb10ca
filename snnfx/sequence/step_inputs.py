"""The inputs of the step of a loop: the values from outside the loop that its iterations read."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node, map_arg

from snnfx.analysis.dependence import is_random
from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import VALUE
from snnfx.ir.module_effects import statistics_of_function, updates_buffers
from snnfx.ir.nodes import is_module_call, is_size
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.run_loop import run_loop
from snnfx.sequence.element_reads import common_read, read_sequence, record_call
from snnfx.sequence.roles import DependsOnLength, Differs, has_type_of
from snnfx.sequence.step_numbers import record_numbers

__all__ = ["FILLS", "StepInputs"]


class _ReadsLength(Differs):
    """A size is the number of iterations."""


class StepInputs:
    """Adds inputs to the graph of a step, and records their values in the graph of the call.

    Args:
        program: the program of the whole call; its graph inserts in front of the loop.
        graph: the graph of the step.
        anchor: the first node of the loop.
        any_length: whether the number of iterations follows from the inputs.

    Attributes:
        placeholders: the inputs.
        values: the value of each input in the graph of the call.
        varying: for each input, whether it is a sequence.
    """

    def __init__(self, program: StepProgram, graph: fx.Graph, anchor: Node, any_length: bool) -> None:
        self.program, self.graph, self.anchor, self.any_length = program, graph, anchor, any_length
        self.placeholders: list[Node] = []
        self.values: list[Node] = []
        self.varying: list[bool] = []
        self._shared: dict[Node, Node] = {}
        """Values from outside the loop and their nodes in the step."""
        self._sources: dict[Node, list[tuple[Node, int]]] = {}
        """The sequences read from a tensor: `(placeholder, dimension of time in the tensor)`."""
        self._lengths: dict[Node, Node] = {}
        """The inputs for numbers that depend on the number of iterations."""
        self._sequences: dict[Any, Node] = {}
        """The input for each element read."""

    def sequence(self, nodes: list[Node], reader: Node) -> Node:
        """The input for values from outside the loop, one for each iteration."""
        read = common_read(nodes)
        outer = self.program.graph
        if read is not None and read in self._sequences:
            return self._sequences[read]
        if read is not None:
            source, value = read.source, read_sequence(outer, read)
            dim = read.dim
            if read.index is not None or read.keeps_dim:
                dim = -1
        elif any(n in statistics_of_function(reader) for n in nodes):
            raise Differs(f"`{describe_node(reader)}` updates other buffers in each iteration", reader)
        elif all(n.op == "get_attr" and isinstance(self.program.resolve(str(n.target)), Tensor) for n in nodes) or (
            self._are_alike(nodes) and self._stand_in_front(nodes)
        ):
            value = record_call(outer, torch.stack, (nodes,))
            source, dim = value, 0
        else:
            raise Differs(f"`{describe_node(reader)}` reads another value in each iteration", reader)
        placeholder = self._add_input(nodes[0].name, value, True, VALUE.of(nodes[0]))
        if read is not None:
            self._sequences[read] = placeholder
        if dim >= 0:
            self._sources.setdefault(source, []).append((placeholder, dim))
        return placeholder

    @staticmethod
    def _are_alike(nodes: list[Node]) -> bool:
        """Whether values are tensors of one shape and dtype."""
        first = VALUE.of(nodes[0])
        return isinstance(first, Tensor) and all(has_type_of(n, nodes[0]) for n in nodes)

    def _stand_in_front(self, nodes: list[Node]) -> bool:
        """Whether the call computes values in front of the loop: those of modules of each step, between two loops."""
        remaining = set(nodes)
        for node in self.program.graph.nodes:
            if node is self.anchor:
                break
            remaining.discard(node)
        return not remaining

    def _add_input(self, name: str, value: Node, varying: bool, example: Any) -> Node:
        placeholder = add_placeholder(self.graph, name)
        placeholder.meta = {"input": len(self.placeholders), "where": None}
        if isinstance(example, Tensor):
            VALUE.set(placeholder, example)
        self.placeholders.append(placeholder)
        self.values.append(value)
        self.varying.append(varying)
        return placeholder

    def numbers(self, values: tuple[Any, ...], reader: Node) -> Node:
        """The input for a number that the code computes from the number of the iteration."""
        if operation_name(reader) not in _ARITHMETIC | FILLS and not _selects(reader):
            raise Differs(f"an argument of `{describe_node(reader)}` is {values[0]!r}, then {values[1]!r}", reader)
        outer, dtype = self.program.graph, _dtype_beside(reader)
        value = record_numbers(outer, values, dtype) if self.any_length or _are_integers(values) else None
        if value is None and self.any_length:
            raise DependsOnLength(
                f"an argument of `{describe_node(reader)}` is {values[0]!r} in the first iteration, then {values[1]!r}",
                reader,
            )
        if value is None:
            numbers = torch.tensor(values, dtype=torch.int64 if _are_integers(values) else dtype)
            value = outer.get_attr(self.program.constant(numbers))
            value.meta = {"val": numbers, "module": ""}
        return self._add_input("number", value, True, VALUE.of(value)[0])

    def outside(self, node: Node, reader: Node) -> Node:
        """The node in the step for a value from outside the loop."""
        if node in self._shared:
            return self._shared[node]
        if node.op == "get_attr":
            new = self.graph.get_attr(str(node.target))
            new.meta = dict(node.meta)
        elif is_size(node) and not isinstance(VALUE.of(node), Tensor):
            try:
                new = self._size(node, reader)
            except _ReadsLength:
                if operation_name(reader) not in _ARITHMETIC:
                    raise
                return self._length(node)
        elif self._is_of_parameters(node):
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.outside(n, reader))
            new = self.graph.create_node(node.op, node.target, args, kwargs)
            new.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
        elif isinstance(VALUE.of(node), Tensor) or not VALUE.is_known(node):
            new = self._add_input(node.name, node, False, VALUE.of(node))
        else:
            raise Differs(f"`{describe_node(reader)}` reads `{node.name}`, which is not a tensor", reader)
        self._shared[node] = new
        return new

    def _is_of_parameters(self, node: Node) -> bool:
        """Whether a value depends on parameters and constants only, so that the step can compute it once."""
        seen, stack = set(), [node]
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.op == "placeholder" or current.target is run_loop or is_random(self.program, current):
                return False
            if updates_buffers(self.program, current) or is_module_call(current):
                return False
            stack += current.all_input_nodes
        return True

    def _length(self, node: Node) -> Node:
        """The input for a number that depends on the number of iterations: a tensor without dimensions."""
        if node not in self._lengths:
            example = VALUE.of(node)
            dtype = torch.float64 if isinstance(example, float) else torch.int64
            value = self.program.graph.call_function(torch.full, ((), node), {"dtype": dtype})
            value.meta = {"val": torch.full((), example, dtype=dtype), "module": ""}
            self._lengths[node] = self._add_input(node.name, value, False, VALUE.of(value))
        return self._lengths[node]

    def _size(self, node: Node, reader: Node) -> Node:
        """Compute a size from the inputs of the step, whose sequences have one dimension less."""
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            shape = node.args[0]
            source = shape.args[0] if shape.target is getattr and shape.args[1] == "shape" else None
            index = node.args[1]
            if isinstance(source, Node) and isinstance(index, int):
                dims = VALUE.of(source).dim()
                for placeholder, dim in self._sources.get(source, ()):
                    if index % dims == dim:
                        raise _ReadsLength(f"`{describe_node(reader)}` reads the number of iterations", reader)
                    of_step = self.graph.call_function(getattr, (placeholder, "shape"))
                    step_index = index % dims - (index % dims > dim)
                    new = self.graph.call_function(operator.getitem, (of_step, step_index))
                    of_step.meta = dict(shape.meta) | {"val": VALUE.of(placeholder).shape}
                    new.meta = dict(node.meta)
                    return new
        if node.target is getattr and node.args[1] in ("device", "dtype"):
            for placeholder, _ in self._sources.get(node.args[0], ()):  # type: ignore[arg-type]
                new = self.graph.call_function(getattr, (placeholder, node.args[1]))
                new.meta = dict(node.meta)
                return new

        def operand(n: Node) -> Node:
            is_number = n not in self._shared and is_size(n) and not isinstance(VALUE.of(n), Tensor)
            return self._size(n, reader) if is_number else self.outside(n, reader)

        args, kwargs = map_arg((node.args, node.kwargs), operand)
        new = self.graph.create_node(node.op, node.target, args, kwargs)
        new.meta = {k: v for k, v in node.meta.items() if k != "iterations"}
        return new


def _are_integers(values: tuple[Any, ...]) -> bool:
    return all(isinstance(v, int) for v in values)


def _dtype_beside(reader: Node) -> torch.dtype:
    """The dtype of a tensor that stands for a Python float among the operands of a node.

    Float64 has the precision of Python, and gives way to the dtype of floating-point tensors.
    """
    operands = [VALUE.of(n) for n in reader.all_input_nodes]
    if not operands or any(isinstance(v, Tensor) and v.dim() and v.is_floating_point() for v in operands):
        return torch.float64
    return torch.get_default_dtype()


def _selects(reader: Node) -> bool:
    """Whether a node replaces elements of a tensor by a number: `torch.where(z, t, first)`."""
    name, values = operation_name(reader), reader.args[1:] if operation_name(reader) == "where" else reader.args[:1]
    tensors = [VALUE.of(v) for v in values if isinstance(v, Node)]
    return name in ("where", "masked_fill") and any(isinstance(v, Tensor) and v.dim() > 0 for v in tensors)


FILLS = frozenset({"full_like", "full", "new_full", "fill"})
"""Operations that fill a tensor with their last argument, a number."""

_ARITHMETIC = frozenset("add sub mul div truediv pow gt ge lt le eq ne maximum minimum rsub".split())
