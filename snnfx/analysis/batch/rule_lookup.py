"""Find the batch rule of a node and bind its arguments by name."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.analysis.batch.facts import Fact, Rank
from snnfx.analysis.batch.module_rules import OnTrace
from snnfx.analysis.batch.rule_table import DIFFERENT_SIGNATURES, ELEMENTWISE_ROW, GIVEN, ROWS, OperatorRule
from snnfx.ir.module_effects import estimates_weights
from snnfx.ir.printing import operation_name
from snnfx.ops.online_functions import traced_call, traced_module
from snnfx.ops.operator_lookup import operation_of, operation_of_class, traits_of, traits_of_function, traits_of_name
from snnfx.ops.traits import UNKNOWN, OperatorTraits
from snnfx.sandbox.torch_internals import OpOverload, OpOverloadPacket
from snnfx.state.leaf_modules import is_declared_leaf

__all__ = ["RuleMatch", "constant_fact", "find_rule", "row_names"]


@dataclass(frozen=True)
class RuleMatch:
    """A row that applies to a node: the row, the matched name, the bound arguments and the module."""

    row: OperatorRule
    name: str
    arguments: dict[str, Any]
    module: nn.Module | None = None
    traits: OperatorTraits = UNKNOWN

    @property
    def draws(self) -> bool:
        """Whether a call draws new random numbers; folded, a value without a batch would be drawn only once."""
        return self.traits.random in ("always", "training")


def find_rule(node: Node, resolve: Callable[[str], object]) -> RuleMatch | None:
    """The rule of a node with its arguments by name; None if no row matches name and arguments."""
    if node.op == "call_module":
        return _find_rule_of_module(node, resolve(str(node.target)))
    if node.target is traced_module or node.target is traced_call:
        return _find_rule_of_traced(node, resolve)
    row, name = _row_of(node), operation_of(node) or operation_name(node)
    if row is None:
        return None
    arguments = bind(row.signature, node.args, node.kwargs)
    if arguments is None:
        return None
    traits = traits_of_function(node.target) if node.op == "call_function" else traits_of_name(name)
    return RuleMatch(row, name, arguments, _module_argument(node, resolve), traits)


def _row_of(node: Node) -> OperatorRule | None:
    """The row of a function or method; an element-wise operation without a row has the element-wise rule."""
    # The signatures of operators of a library differ from those of the functions of the same name.
    if node.target not in DIFFERENT_SIGNATURES and not isinstance(node.target, OpOverload | OpOverloadPacket):
        row = _rows().get(operation_of(node))
        if row is not None:
            return row
    return ELEMENTWISE_ROW if traits_of(node).elementwise else None


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
        traits = traits_of_name(str(name))
        found = None if row is None or arguments is None else RuleMatch(row, str(name), arguments, traits=traits)
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


_MAY_BE_OVERRIDDEN = {"__init__", "__repr__", "extra_repr", "reset_parameters", "__setstate__", "_load_from_state_dict"}


def _find_rule_of_module(node: Node | NodeCall, module: object) -> RuleMatch | None:
    if not isinstance(module, nn.Module):
        return None
    cls, name_of_row = _class_with_row(module)
    if not name_of_row or estimates_weights(module):
        return None
    traits = traits_of_name(name_of_row)
    row = _rows().get(name_of_row, ELEMENTWISE_ROW if traits.elementwise else None)
    if row is None:
        return None
    names, _, star, _, _ = _parse(row.signature)
    if star:
        return RuleMatch(row, name_of_row, {star: tuple(node.args), **node.kwargs}, module, traits)
    # Arguments of the call bind to `forward`; the other arguments of the row are attributes of the module.
    forward = list(inspect.signature(cls.forward).parameters)[1:]
    if len(node.args) > len(forward):
        return None
    spelling = {forward[0]: names[0]} if forward else {}  # nn.RMSNorm calls its input `x`
    arguments: dict[str, Any] = {
        spelling.get(name, name): value
        for name, value in {**dict(zip(forward, node.args, strict=False)), **node.kwargs}.items()
    }
    given = GIVEN.get(cls.__name__, {})
    for name in names:
        if name in arguments:
            continue
        source = given.get(name, name)
        if not isinstance(source, str):
            arguments[name] = source
        elif hasattr(module, source):
            value = getattr(module, source)
            arguments[name] = constant_fact(value) if isinstance(value, Tensor) else value
    return RuleMatch(row, name_of_row, arguments, module, traits)


def _class_with_row(module: nn.Module) -> tuple[type[nn.Module], str]:
    """The class of torch that the module computes like, and the name of its row; "" if it has none."""
    cls = type(module)
    if "forward" in vars(module):
        return cls, ""
    vouched = is_declared_leaf(module)
    mro = cls.__mro__
    for i, base in enumerate(mro):
        name = operation_of_class(base)
        if name and issubclass(base, nn.Module):
            trusted = vouched or (cls.forward is base.forward and not _changes_helpers(mro[:i], base))
            return base, name if trusted else ""
    is_layer = any(base.__module__.startswith("torch.nn.") and base is not nn.Module for base in mro)
    is_elementwise = getattr(cls, "snnfx_elementwise", False) or (vouched and not is_layer)
    return cls, "identity" if is_elementwise else ""


def _changes_helpers(subclasses: Sequence[type], base: type) -> bool:
    """Whether a subclass overrides a method that the inherited forward may call."""
    helpers = {"__call__", "_call_impl", "__getattr__", "__getattribute__"}
    for cls in base.__mro__[: base.__mro__.index(nn.Module)]:
        helpers.update(name for name, value in vars(cls).items() if callable(value))
    return any(name in vars(cls) for cls in subclasses for name in helpers - _MAY_BE_OVERRIDDEN)


def constant_fact(tensor: Tensor) -> Fact:
    """The fact of a parameter, a buffer or a constant."""
    return Fact(Rank(tensor.dim()), known=tuple(tensor.shape))
