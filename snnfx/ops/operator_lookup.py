"""Look up the traits of a function, a method, a module or an operator of a library.

The traits of an operation are those of its row in `snnfx.ops.traits` and those that ATen states: the tags and alias
annotations of the operator of its name.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from snnfx.ops.elements import concatenate_elements, read_elements, stack_elements, write_elements
from snnfx.ops.online_functions import cut_history, draw_dropout_mask, ones_per_sample, update_trace
from snnfx.ops.run_loop import run_loop
from snnfx.ops.step_functions import (
    apply_autograd_function,
    change_value,
    copied,
    expect_size,
    read_parameter,
    reduced_over_time,
    set_part,
    set_part_,
)
from snnfx.ops.traits import MODULES, PYTHON_OPERATORS, ROWS, UNKNOWN, OperatorTraits
from snnfx.sandbox.torch_internals import OpOverload, OpOverloadPacket
from snnfx.state.step_calls import call_opaque, call_stateful, initial_value, opaque_initial_value

__all__ = [
    "operation_of",
    "operation_of_class",
    "operation_of_function",
    "operation_of_module",
    "operations_with",
    "register_operator",
    "traits_of",
    "traits_of_class",
    "traits_of_function",
    "traits_of_module",
    "traits_of_name",
]

_STEP_FUNCTIONS = (
    apply_autograd_function,
    call_opaque,
    call_stateful,
    change_value,
    concatenate_elements,
    copied,
    cut_history,
    draw_dropout_mask,
    expect_size,
    initial_value,
    ones_per_sample,
    opaque_initial_value,
    read_elements,
    read_parameter,
    reduced_over_time,
    run_loop,
    set_part,
    set_part_,
    stack_elements,
    update_trace,
    write_elements,
)

_registered: dict[Any, OperatorTraits] = {}


def register_operator(function: Callable[..., Any], traits: OperatorTraits) -> None:
    """Add a row for a function that capture records as one call: an operator of `torch.ops`, or after `torch.fx.wrap`.

    Args:
        function: the function.
        traits: its traits, besides those that the tags and the schema of an operator state.

    Raises:
        ValueError: the function has another row.
    """
    functions = [function]
    if isinstance(function, OpOverloadPacket):
        functions += [getattr(function, name) for name in function.overloads()]
    for known in functions:
        if _registered.get(known, traits) != traits or operation_of_function(known):
            raise ValueError(f"{function} has a row in the table of operators already")
    _registered.update(dict.fromkeys(functions, traits))
    traits_of_function.cache_clear()


def traits_of(node: Node) -> OperatorTraits:
    """The traits of a call of a function or method; `UNKNOWN` without a row, and for all other nodes."""
    if node.op == "call_method":
        traits = traits_of_name(operation_of(node))
    elif node.op == "call_function":
        traits = traits_of_function(node.target)
    else:
        return UNKNOWN
    if traits.binary and isinstance(node.args[1] if len(node.args) > 1 else node.kwargs.get("other"), Node):
        return traits_of_name(traits.binary)
    return traits


def operation_of(node: Node) -> str:
    """The operation that a node calls as a function or method, whatever its spelling; "" if it is not known."""
    if node.op == "call_method":
        return _operation_of_method(str(node.target))
    return operation_of_function(node.target) if node.op == "call_function" else ""


@cache
def traits_of_name(name: str) -> OperatorTraits:
    """The traits of the operation of this name."""
    row = _rows().get(name, UNKNOWN)
    packet = getattr(torch.ops.aten, _NAMES_IN_ATEN.get(name, name), None) if name.isidentifier() else None
    return _merged(row, _overloads(packet)) if isinstance(packet, OpOverloadPacket) else row


@lru_cache(maxsize=4096)
def traits_of_function(function: Any) -> OperatorTraits:
    """The traits of a function or of an operator of a library."""
    row = _registered.get(function)
    if isinstance(function, OpOverload):
        name = operation_of_function(function)
        merged = _merged(row or _rows().get(name, UNKNOWN), [function])
        # The result of an operator that writes is its operand.
        return replace(merged, view="", linear="", product=False, joins=False) if _writes(function) else merged
    if isinstance(function, OpOverloadPacket):
        name = operation_of_function(function)
        return _merged(row or _rows().get(name, UNKNOWN), _overloads(function))
    return row or traits_of_name(operation_of_function(function))


def operations_with(trait: str) -> list[str]:
    """The names of the rows with a trait."""
    return [name for name, row in _rows().items() if getattr(row, trait)]


def traits_of_module(module: nn.Module) -> OperatorTraits:
    """The traits of the layer of torch that a module is, or is derived from."""
    return traits_of_name(operation_of_module(module))


def traits_of_class(cls: type) -> OperatorTraits:
    """The traits of a class of `torch.nn`; `UNKNOWN` for subclasses."""
    return traits_of_name(operation_of_class(cls))


def operation_of_module(module: nn.Module) -> str:
    """The operation of the layer of torch that a module is, or is derived from; "" if there is none."""
    return next((name for cls in type(module).__mro__ if (name := operation_of_class(cls))), "")


def operation_of_class(cls: type) -> str:
    """The operation that a class of `torch.nn` computes; "" for all other classes."""
    return _classes().get(cls, "")


@lru_cache(maxsize=4096)
def operation_of_function(function: Any) -> str:
    """The operation that a function of torch, ATen, Python or snnfx computes; "" if it is not known."""
    if isinstance(function, OpOverload | OpOverloadPacket):
        namespace, name, *_ = str(function).split(".")
        return _operation_of_method(name) if namespace == "aten" else ""
    if function in _FUNCTIONS:
        return _FUNCTIONS[function]
    names = (n.removesuffix("_") for n in _SPELLINGS.get(function, ()))
    return next((n for n in names if n and hasattr(torch.ops.aten, n)), "")


def _spellings() -> dict[Any, tuple[str, ...]]:
    """Function of torch -> the names that its operator may have in ATen."""
    found: dict[Any, tuple[str, ...]] = {}
    for namespace, prefix in _NAMESPACES.items():
        for name, function in vars(namespace).items():
            if isinstance(function, FunctionType | BuiltinFunctionType):
                found[function] = (*found.get(function, ()), prefix + name, name)
    return found


@cache
def _operation_of_method(method: str) -> str:
    """The operation of a tensor method or of its in-place form."""
    name = method.removesuffix("_") if not method.endswith("__") else method
    return "unfold_dim" if name == "unfold" else name  # differs from the function of the same name


_NAMESPACES: dict[Any, str] = {torch: "", F: "", torch.special: "special_", torch.linalg: "linalg_"}
"""Namespace of functions -> prefix of their operators in ATen."""

_NAMES_IN_ATEN = {"unfold_dim": "unfold", "unfold": "im2col", "fold": "col2im"}


@cache
def _rows() -> dict[str, OperatorTraits]:
    return {name: row for row in ROWS for name in row.names.split()}


def _functions() -> dict[Any, str]:
    """Function with a row, of snnfx or of Python -> its operation."""
    found: dict[Any, str] = {builtins.getattr: "getattr"}
    found.update({function: function.__name__.removesuffix("_") for function in _STEP_FUNCTIONS})
    for name in _rows():
        for namespace in _NAMESPACES:
            for spelling in (name, name + "_"):
                function = getattr(namespace, spelling, None)
                if callable(function):
                    found.setdefault(function, name)
    for name, operation in PYTHON_OPERATORS.items():
        found[getattr(operator, name)] = operation
        in_place = getattr(operator, "i" + name.rstrip("_"), None)
        if in_place is not None and name not in ("nv", "nvert"):
            found[in_place] = operation
    return found


@cache
def _classes() -> dict[type, str]:
    return {getattr(nn, name): operation for name, operation in MODULES.items()}


def _overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    """The overloads of an operator that take or return tensors and write none."""
    overloads = [getattr(packet, name) for name in packet.overloads()]
    return [o for o in overloads if not _writes(o) and _has_tensors(o)]


def _has_tensors(overload: OpOverload) -> bool:
    return any("Tensor" in str(a.type) for a in (*overload._schema.arguments, *overload._schema.returns))


def _merged(row: OperatorTraits, overloads: Iterable[OpOverload]) -> OperatorTraits:
    """A row with the traits that the tags and alias annotations of overloads state."""
    overloads = list(overloads)
    if not overloads:
        return row
    gives_tensor = all([str(r.type) for r in o._schema.returns] == ["Tensor"] for o in overloads)
    is_pointwise = gives_tensor and all(torch.Tag.pointwise in o.tags for o in overloads)
    draws = any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads)
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for o in overloads for r in o._schema.returns)
    return replace(
        row,
        elementwise=row.elementwise or is_pointwise,
        random=row.random or ("always" if draws else ""),
        view=row.view or ("view" if is_view else ""),
    )


def _writes(overload: OpOverload) -> bool:
    return bool(overload._schema.is_mutable)


# Made at import: during a trace, some functions of torch are replaced.
_FUNCTIONS, _SPELLINGS = _functions(), _spellings()
