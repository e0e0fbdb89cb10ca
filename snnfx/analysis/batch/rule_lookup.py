"""Find the batch rule of a node and bind its arguments by name."""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from snnfx.analysis.batch.facts import Fact, Rank
from snnfx.analysis.batch.module_rules import OnTrace
from snnfx.analysis.batch.rule_table import (
    DIFFERENT_SIGNATURES,
    METHODS,
    MODULES,
    OPERATORS,
    ROWS,
    ModuleRule,
    OperatorRule,
)
from snnfx.ir.module_effects import estimates_weights
from snnfx.ops.elements import concatenate_elements, read_elements, stack_elements, write_elements
from snnfx.ops.online_functions import (
    cut_history,
    draw_dropout_mask,
    ones_per_sample,
    traced_call,
    traced_module,
    update_trace,
)
from snnfx.ops.run_loop import run_loop
from snnfx.ops.step_functions import (
    apply_autograd_function,
    change_value,
    copied,
    expect_size,
    read_parameter,
    set_part,
)
from snnfx.state.leaf_modules import is_declared_leaf
from snnfx.state.step_calls import call_opaque, call_stateful, initial_value, opaque_initial_value

__all__ = ["RuleMatch", "constant_fact", "find_rule", "row_names"]


@dataclass(frozen=True)
class RuleMatch:
    """A row that applies to a node: the row, the matched name, the bound arguments and the module."""

    row: OperatorRule
    name: str
    arguments: dict[str, Any]
    module: nn.Module | None = None


def find_rule(node: Node, resolve: Callable[[str], object]) -> RuleMatch | None:
    """The rule of a node with its arguments by name; None if no row matches name and arguments."""
    if node.op == "call_module":
        return _find_rule_of_module(node, resolve(str(node.target)))
    if node.target is traced_module or node.target is traced_call:
        return _find_rule_of_traced(node, resolve)
    name = _function_names().get(node.target) if node.op == "call_function" else _method_name(str(node.target))
    row = _rows().get(name) if name is not None else None
    if row is None or name is None:
        return None
    arguments = bind(row.signature, node.args, node.kwargs)
    if arguments is None:
        return None
    return RuleMatch(row, name, arguments, _module_argument(node, resolve))


def _find_rule_of_traced(node: Node, resolve: Callable[[str], object]) -> RuleMatch | None:
    """The rule of a weight op with a trace: the row of the op, on its operand."""
    if node.target is traced_module:
        called, operand, trace, *rest = node.args
        assert isinstance(called, Node)
        found = _find_rule_of_module(NodeCall((operand,), {}), resolve(str(called.target)))
    else:
        name, position, trace, bias_trace, *args = node.args
        operand, rest = args[position], [bias_trace]  # type: ignore[index]
        row = _rows().get(str(name))
        arguments = None if row is None else bind(row.signature, args, node.kwargs)
        found = None if row is None or arguments is None else RuleMatch(row, str(name), arguments)
    if found is None:
        return None
    row = replace(found.row, rule=OnTrace(found.row.rule), operands=f"{found.row.operands} operand traces")
    traces = tuple(t for t in (trace, *rest) if t is not None)
    return replace(found, row=row, arguments={**found.arguments, "operand": operand, "traces": traces})


@dataclass(frozen=True)
class NodeCall:
    """The arguments of a module call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def row_names() -> list[str]:
    """All names in the rule table."""
    return list(_rows())


@cache
def _rows() -> dict[str, OperatorRule]:
    return {name: row for row in ROWS for name in row.names.split()}


@cache
def _function_names() -> dict[Any, str]:
    """Function -> its name in the rule table."""
    names: dict[Any, str] = {builtins.getattr: "getattr"}
    for function in (
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
        run_loop,
        set_part,
        stack_elements,
        update_trace,
        write_elements,
    ):
        names[function] = function.__name__
    for name in _rows():
        for namespace in (torch, F, torch.special, torch.linalg):
            for spelling in (name, name + "_"):
                found = getattr(namespace, spelling, None)
                if callable(found) and found not in DIFFERENT_SIGNATURES:
                    names.setdefault(found, name)
    for name, row_name in OPERATORS.items():
        names[getattr(operator, name)] = row_name
        in_place = getattr(operator, "i" + name.rstrip("_"), None)
        if in_place is not None and name not in ("nv", "nvert"):
            names[in_place] = row_name
    return names


def _method_name(method: str) -> str:
    name = method.removesuffix("_") if not method.endswith("__") else method
    return METHODS.get(name, name)


def _module_argument(node: Node, resolve: Callable[[str], object]) -> nn.Module | None:
    """The module argument of a stateful call, or the holder of an autograd.Function."""
    first = node.args[0] if node.args else None
    if isinstance(first, Node) and first.op == "get_attr":
        found = resolve(str(first.target))
        if isinstance(found, nn.Module):
            return found
    return None


_RENAMED = {"axis": "dim", "keepdims": "keepdim", "self": "input"}


def bind(signature: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bind arguments to the signature of a row by name; None if they do not fit."""
    if kwargs.get("out") is not None:
        return None
    names, defaults, star, double_star, rest = _parse(signature)
    bound: dict[str, Any] = dict(zip(names, args, strict=False))
    extra = tuple(args[len(names) :])
    options = {_RENAMED.get(key, key): value for key, value in kwargs.items()}
    if options.keys() & bound.keys():
        return None
    for key in names:
        if key in options:
            bound[key] = options.pop(key)
        elif key not in bound:
            if key not in defaults:
                return None
            bound[key] = defaults[key]
    if star:
        given = options.pop(star, extra)
        packed = star in _PACKED and len(extra) == 1 and isinstance(extra[0], tuple | list | Node)
        bound[star] = extra[0] if packed else given
    elif extra:
        if not rest:
            return None
        bound["..."] = extra
    if double_star:
        bound[double_star] = options
    elif options:
        if not rest:
            return None
        bound["... by name"] = options
    return bound


_PACKED = frozenset({"shape", "size", "dims", "repeats"})
"""Arguments that torch accepts one by one or as one tuple."""


@cache
def _parse(signature: str) -> tuple[list[str], dict[str, Any], str, str, bool]:
    names: list[str] = []
    defaults: dict[str, Any] = {}
    star = double_star = ""
    rest = False
    for part in signature.split(", "):
        name, has_default, default = part.partition("=")
        if part == "...":
            rest = True
        elif part.startswith("**"):
            double_star = part[2:]
        elif part.startswith("*"):
            star = part[1:]
        else:
            names.append(name)
            if has_default:
                defaults[name] = ast.literal_eval(default)
    return names, defaults, star, double_star, rest


@cache
def _module_classes() -> dict[type, ModuleRule]:
    return {getattr(nn, name): row for row in MODULES for name in row.classes.split()}


_ELEMENTWISE_MODULE = ModuleRule("", "relu")
_MAY_BE_OVERRIDDEN = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__setstate__", "_load_from_state_dict"}


def _find_rule_of_module(node: Node | NodeCall, module: object) -> RuleMatch | None:
    if not isinstance(module, nn.Module):
        return None
    cls, module_row = _class_with_row(module)
    if module_row is None or estimates_weights(module):
        return None
    row = _rows()[module_row.row]
    names, _, star, _, _ = _parse(row.signature)
    if star:
        return RuleMatch(row, module_row.row, {star: tuple(node.args), **node.kwargs}, module)
    # Arguments of the call bind to `forward`; the other arguments of the row are attributes of the module.
    forward = list(inspect.signature(cls.forward).parameters)[1:]
    if len(node.args) > len(forward):
        return None
    spelling = {forward[0]: names[0]} if forward else {}  # nn.RMSNorm calls its input `x`
    arguments: dict[str, Any] = {
        spelling.get(name, name): value
        for name, value in {**dict(zip(forward, node.args, strict=False)), **node.kwargs}.items()
    }
    for name in names:
        if name in arguments:
            continue
        source = module_row.given.get(name, name)
        if not isinstance(source, str):
            arguments[name] = source
        elif hasattr(module, source):
            value = getattr(module, source)
            arguments[name] = constant_fact(value) if isinstance(value, Tensor) else value
    return RuleMatch(row, module_row.row, arguments, module)


def _class_with_row(module: nn.Module) -> tuple[type[nn.Module], ModuleRule | None]:
    cls = type(module)
    if "forward" in vars(module):
        return cls, None
    vouched = is_declared_leaf(module)
    mro = cls.__mro__
    for i, base in enumerate(mro):
        row = _module_classes().get(base)
        if row is not None and issubclass(base, nn.Module):
            trusted = vouched or (cls.forward is base.forward and not _changes_helpers(mro[:i], base))
            return base, row if trusted else None
    is_layer = any(base.__module__.startswith("torch.nn.") and base is not nn.Module for base in mro)
    if getattr(cls, "snnfx_elementwise", False) or (vouched and not is_layer):
        return cls, _ELEMENTWISE_MODULE
    return cls, None


def _changes_helpers(subclasses: Sequence[type], base: type) -> bool:
    """Whether a subclass overrides a method that the inherited forward may call."""
    helpers = {"__call__", "_call_impl", "__getattr__", "__getattribute__"}
    for cls in base.__mro__[: base.__mro__.index(nn.Module)]:
        helpers.update(name for name, value in vars(cls).items() if callable(value))
    return any(name in vars(cls) for cls in subclasses for name in helpers - _MAY_BE_OVERRIDDEN)


def constant_fact(tensor: Tensor) -> Fact:
    """The fact of a parameter, a buffer or a constant."""
    return Fact(Rank(tensor.dim()), known=tuple(tensor.shape))
