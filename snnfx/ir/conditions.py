"""Conditions: Python numbers that the model's code computes from parameters and buffers, such as `self.leak > 0`.

A graph contains the branch that the model's code took. A guard evaluates the condition at every call, so the parameter
may change as long as the branch stays the same.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from snnfx.ir.printing import operation_name
from snnfx.sandbox.torch_internals import disable_dispatch_modes

__all__ = ["Condition", "condition_of"]

_PURE = frozenset(
    "gt ge lt le eq ne add sub mul truediv div floordiv mod remainder pow neg abs invert and or xor not getitem max "
    "min amax amin mean sum prod any all norm exp log sqrt sigmoid tanh softplus relu clamp square reciprocal detach "
    "float double to long int bool item size numel dim shape getattr isnan isinf isfinite logical_and logical_or "
    "logical_not greater less equal allclose view reshape flatten squeeze unsqueeze select".split()
)
"""Operations without effects that may be run again at each call."""
_SYMBOLS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}
_SYMBOLS |= {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "mod": "%"}


@dataclass(frozen=True)
class _Result:
    """The result of an earlier call of a condition."""

    index: int


@dataclass(frozen=True)
class _Registered:
    """A parameter or buffer of the model."""

    name: str


@dataclass(frozen=True)
class Condition:
    """A number computed from parameters and buffers.

    Args:
        calls: `(function, or name of a method, arguments)`, in order; the last one gives the number.
        number: bool, int or float: the conversion of the result.
        shown: the condition as in code.
        where: the user's source line.
    """

    calls: tuple[tuple[Any, tuple[Any, ...]], ...]
    number: type
    shown: str
    where: str

    def evaluate(self, model: nn.Module) -> Any:
        """The current value."""
        with disable_dispatch_modes(), torch.no_grad():
            results: list[Any] = []
            for target, arguments in self.calls:
                values = [self._value(a, model, results) for a in arguments]
                results.append(getattr(values[0], target)(*values[1:]) if isinstance(target, str) else target(*values))
            return self.number(results[-1])

    @staticmethod
    def _value(argument: Any, model: nn.Module, results: list[Any]) -> Any:
        if isinstance(argument, _Result):
            return results[argument.index]
        if isinstance(argument, _Registered):
            return _registered(model, argument.name)
        return argument


def _registered(model: nn.Module, name: str) -> Any:
    """A parameter or buffer; not by `getattr`, which a trace records."""
    *path, last = name.split(".")
    for atom in path:
        model = vars(model)["_modules"][atom]
    own = vars(model)
    return own["_parameters"][last] if last in own["_parameters"] else own["_buffers"][last]


def condition_of(node: Node, model: nn.Module, number: type, where: str) -> Condition | None:
    """The condition that a node computes; None if it depends on more than parameters, buffers and plain numbers."""
    registered = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    texts: dict[Node, str] = {}
    known: dict[Node, Any] = {}

    def reference(argument: Any) -> Any:
        if isinstance(argument, Node):
            return visit(argument)
        if isinstance(argument, tuple | list):
            raise LookupError
        return argument

    def visit(current: Node) -> Any:
        if current in known:
            return known[current]
        if current.op == "get_attr":
            if str(current.target) not in registered:
                raise LookupError
            known[current], texts[current] = _Registered(str(current.target)), str(current.target)
            return known[current]
        if not current.op.startswith("call") or current.kwargs or operation_name(current) not in _PURE:
            raise LookupError
        if current.op == "call_module" or str(current.target).endswith("_") or "setitem" in str(current.target):
            raise LookupError
        arguments = tuple(reference(a) for a in current.args)
        calls.append((current.target, arguments))
        known[current], texts[current] = _Result(len(calls) - 1), _text(current, texts)
        return known[current]

    try:
        visit(node)
        condition = Condition(tuple(calls), number, texts[node], where)
        hash(condition)
    except (LookupError, TypeError):
        return None
    return condition if calls else Condition(((operator.pos, (known[node],)),), number, texts[node], where)


def _text(node: Node, texts: dict[Node, str]) -> str:
    shown = [texts[a] if isinstance(a, Node) else repr(a) for a in node.args]
    name = operation_name(node)
    if name in _SYMBOLS and len(shown) == 2:
        return f"{shown[0]} {_SYMBOLS[name]} {shown[1]}"
    if node.op == "call_method":
        return f"{shown[0]}.{name}({', '.join(shown[1:])})"
    return f"{name}({', '.join(shown)})"
