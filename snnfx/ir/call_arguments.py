"""The operation of a call and its arguments by name, whether it is a function, a method or an activation module.

`softmax(x, -1)`, `F.softmax(x, dim=-1)`, `x.softmax(-1)` and `nn.Softmax(-1)` are the same call. Names and defaults
come from the signature of the function of `torch.nn.functional`, or from the schema of the operator of ATen.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn import functional

from snnfx.ops.operator_lookup import operation_of, operation_of_class
from snnfx.sandbox.torch_internals import OpOverloadPacket

__all__ = ["arguments_of_call", "arguments_of_module", "operation_key"]

REQUIRED = inspect.Parameter.empty


def operation_key(node: Node, module: nn.Module | None = None) -> Any:
    """What two calls of one operation have in common: its name, or the function or class of an unknown operation.

    Args:
        node: the call.
        module: the module of a call_module node.
    """
    if module is not None:
        return _operation_of_activation(module) or type(module)
    return operation_of(node) or node.target


def arguments_of_call(name: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call by name, with defaults; the first is "input". None if no signature fits.

    Args:
        name: the operation.
        args, kwargs: the arguments.
    """
    given = {("input" if key == "self" else key): value for key, value in kwargs.items()}
    for parameters in _signatures(name) if isinstance(name, str) else ():
        positional = [key for key, (_, is_positional) in parameters.items() if is_positional]
        if len(args) > len(positional) or not given.keys() <= parameters.keys():
            continue
        bound = dict(zip(positional, args, strict=False))
        if bound.keys() & given.keys():
            continue
        defaults = {key: default for key, (default, _) in parameters.items() if default is not REQUIRED}
        found = defaults | bound | given
        if found.keys() == parameters.keys():
            # `inplace` does not change the value, and `_stacklevel` belongs to a warning.
            return {key: found[key] for key in parameters if key != "inplace" and not key.startswith("_")}
    return None


def arguments_of_module(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of the call of an activation module, with its attributes; None for other modules."""
    name = _operation_of_activation(module)
    if not name:
        return None
    parameters = next(iter(_signatures(name)), {})
    attributes = {key: getattr(module, key) for key in [*parameters][1:] if hasattr(module, key)}
    for key, value in attributes.items():
        default = parameters[key][0]
        if isinstance(value, int | float) and value == default:
            attributes[key] = default  # 1 and 1.0
    return arguments_of_call(name, args, attributes | dict(kwargs))


def _operation_of_activation(module: nn.Module) -> str:
    """The operation of an activation module of torch without parameters; "" for other modules."""
    if type(module).__module__ != "torch.nn.modules.activation" or module._parameters:
        return ""
    return "" if isinstance(module, nn.Softmax2d) else operation_of_class(type(module))


@functools.cache
def _signatures(name: str) -> tuple[dict[str, tuple[Any, bool]], ...]:
    """The signatures of an operation: parameter -> (default, whether it may be positional)."""
    found = []
    function = getattr(functional, name, None)
    if inspect.isfunction(function):
        parameters = inspect.signature(function).parameters
        if all(p.kind is not p.VAR_POSITIONAL for p in parameters.values()):
            found.append({key: (p.default, p.kind is not p.KEYWORD_ONLY) for key, p in parameters.items()})
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    for overload in packet.overloads() if isinstance(packet, OpOverloadPacket) else ():
        schema = getattr(packet, overload)._schema
        if not any(argument.is_out for argument in schema.arguments):
            names = ["input" if argument.name == "self" else argument.name for argument in schema.arguments]
            defaults = [a.default_value if a.has_default_value() else REQUIRED for a in schema.arguments]
            positional = [not argument.kwarg_only for argument in schema.arguments]
            found.append(dict(zip(names, zip(defaults, positional, strict=True), strict=True)))
    return tuple(found)
