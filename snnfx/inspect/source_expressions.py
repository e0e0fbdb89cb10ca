"""Print nodes of a step graph as Python expressions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import SLOT
from snnfx.ir.nodes import is_module_call
from snnfx.ir.printing import describe_node, operation_name
from snnfx.ir.program import StepProgram
from snnfx.state.registry import adapter_of

__all__ = ["expression", "expression_of_initial_value"]

_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_LONGEST = 60


_DEEPEST = 12
"""Operations inside each other, at most; a state of many steps is much deeper."""


def expression(program: StepProgram, value: Any) -> str:
    """Print a value as an expression of inputs, slots, parameters and modules: ``full((x.shape[0], 5), 0.3)``.

    Long operands are printed as the name of their operation.
    """
    return _Printer(program).text(value)


class _Printer:
    """Prints expressions; an operand with several readers is printed once.

    Args:
        program: the program of the nodes.
    """

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self._inputs = {leaf.placeholder: leaf.name for leaf in program.input_leaves}
        self._operands: dict[Node, str] = {}
        self._depth = 0

    def text(self, value: Any) -> str:
        if isinstance(value, tuple | list):
            inner = ", ".join(self._operand(item) for item in value)
            return f"({inner}{',' if len(value) == 1 else ''})" if isinstance(value, tuple) else f"[{inner}]"
        if isinstance(value, slice):
            parts = ["" if part is None else self._operand(part) for part in (value.start, value.stop)]
            return ":".join(parts) + (f":{self._operand(value.step)}" if value.step is not None else "")
        if not isinstance(value, Node):
            return "..." if value is Ellipsis else str(value).removeprefix("torch.")
        if value.op.startswith("call"):
            return self._call(value)
        return str(SLOT.of(value) or self._inputs.get(value.name, str(value.target)))

    def _operand(self, value: Any) -> str:
        if not isinstance(value, Node) or not value.op.startswith("call"):
            return self.text(value)
        if value not in self._operands:
            self._depth += 1
            text = "" if self._depth > _DEEPEST else self.text(value)
            self._depth -= 1
            self._operands[value] = text if 0 < len(text) <= _LONGEST else _abbreviated(value)
        return self._operands[value]

    def _call(self, node: Node) -> str:
        args = [self._operand(arg) for arg in node.args]
        kwargs = [f"{key}={self._operand(arg)}" for key, arg in node.kwargs.items()]
        if node.target is getattr:
            return f"{args[0]}.{args[1]}"
        if node.target is operator.getitem:
            index = node.args[1]
            inner = ", ".join(self._operand(i) for i in index) if isinstance(index, tuple) else args[1]
            return f"{args[0]}[{inner}]"
        if node.target in _INFIX and len(args) == 2:
            return f"{args[0]} {_INFIX[node.target]} {args[1]}"
        if node.op == "call_method":
            return f"{args[0]}.{node.target}({', '.join([*args[1:], *kwargs])})"
        name = str(node.target) if node.op == "call_module" else operation_name(node)
        return f"{name}({', '.join([*args, *kwargs])})"


def _abbreviated(node: Node) -> str:
    return f"{describe_node(node)}(...)"


def expression_of_initial_value(program: StepProgram, initial: Any) -> str:
    """The initial value of a slot: a number, the module that sets it, or an expression of the first inputs."""
    if isinstance(initial, Tensor):
        return f"a tensor {list(initial.shape)}"
    if not isinstance(initial, Node):
        return "computed at the first step" if initial is None else str(initial)
    if is_module_call(initial):
        return _set_by_module(program, initial)
    text = expression(program, initial)
    return text if len(text) <= _LONGEST else _abbreviated(initial)


def _set_by_module(program: StepProgram, initial: Node) -> str:
    """The initial value of a neuron's state as a number if it is one, else the module class that sets it."""
    module = program.module_of(initial)
    adapter = adapter_of(module) if module is not None else None
    _, index, *inputs = initial.args
    number = None
    if adapter is not None and adapter.elementwise(module) and len(inputs) == 1 and not initial.kwargs:  # type: ignore[arg-type]
        with torch.no_grad():
            value = adapter.initial(module, torch.zeros(1, 1))[int(index)]  # type: ignore[arg-type]
        number = value.flatten()[0].item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return str(number) if isinstance(number, bool | int | float) else f"set by {type(module).__name__}"
