"""What a plan depends on in a model: its modules, its code, and the values that its code reads.

A description has a digest for each module, function and value, so that a difference can be named. Plain values of
state (membrane potentials, step counters) and the values of parameters and buffers are not described.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import sys
import types
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snnfx._version import __version__
from snnfx.capture.code_reads import is_library_code
from snnfx.capture.guarded_reads import recollected_guards, values_read_by
from snnfx.ir.guards import ABSENT, Guards, GuardSources, ModuleRoot
from snnfx.sandbox.torch_internals import OpOverload, OpOverloadPacket
from snnfx.saving.plain_values import NotStorable

__all__ = ["Description", "describe_model", "difference"]

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range, slice)
_INTERNALS = frozenset(vars(nn.Module())) | {"_memories", "_initial_memories", "_memories_rv", "_backward_hooks"}
"""Attributes of every module, and those where modules with registered memories keep them."""
_WITHOUT_VALUE = ("_thread", "threading", "logging", "_contextvars")
"""The modules of objects that no result of a step depends on: locks, loggers."""
_CONTAINERS = (list, tuple, dict, set, frozenset, deque)


@dataclass
class Description:
    """What a plan depends on in a model.

    Args:
        digests: `{part: {name: digest}}` for the parts "version", "module", "code" and "value".
        guards: the guards of each set of sources.
        functions: the autograd.Functions that the model's code refers to, by name.
        locations: the objects that the guards refer to, in a fixed order.
    """

    digests: dict[str, dict[str, str]]
    guards: list[Guards]
    functions: dict[str, type]
    locations: list[Any]


def describe_model(model: nn.Module, sources: list[tuple[GuardSources, ...]]) -> Description:
    """Describe a model.

    Args:
        model: the model.
        sources: `Guards.sources` of the programs.

    Raises:
        NotStorable: the model has no such description.
    """
    refusal = next((s.refusal for group in sources for s in group if s.refusal), "")
    if refusal:
        raise NotStorable(refusal)
    names = {m: n for n, m in model.named_modules()}
    missing = {name for group in sources for s in group for name in s.traced} - set(names.values())
    missing |= {name for group in sources for s in group for name, _ in (*s.reads, *s.flags)} - set(names.values())
    if missing:
        raise NotStorable(f"the model has no module `{min(missing)}`")
    state = {pair for group in sources for s in group for pair in s.state}
    digests: dict[str, dict[str, str]] = {"version": _versions(model), "module": {}, "code": {}, "value": {}}
    for name, module in model.named_modules():
        digests["module"][name] = _digest(_module_text(name, module, state))
    guards: list[Guards] = []
    functions: dict[str, type] = {}
    locations: list[Any] = []
    for number, group in enumerate(sources):
        found, code = recollected_guards(model, group)
        guards.append(found)
        for function in code:
            for value in values_read_by(function):
                functions |= _autograd_functions(value)
            if not is_library_code(function):
                key = f"{function.__module__}.{function.__qualname__}"
                digests["code"][key] = _digest(digests["code"].get(key, ""), _function_text(function))
        for guard in found.reads:
            text = _expected_text(guard.expected, names)
            functions |= _autograd_functions(guard.expected)
            key = guard.name if isinstance(guard.root, ModuleRoot) else f"{guard.root.name}: {guard.name}"
            key = f"{number} {guard.test} {key}"
            digests["value"][key] = _digest(digests["value"].get(key, ""), text)
            if guard.test == "same" and guard.expected is not ABSENT:
                locations.append(guard.expected)
        digests["value"][f"{number} modes"] = repr(sorted(found.modes))
    return Description(digests, guards, functions, locations)


def difference(saved: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> str:
    """The first difference between two descriptions, as a clause; "" if there is none."""
    clauses = {
        "version": "{name} is {b}, the file was written with {a}",
        "module": "the module `{name}` differs",
        "code": "the code of `{name}` differs",
        "value": "the value of `{name}` differs",
    }
    for part, clause in clauses.items():
        a, b = saved.get(part, {}), now[part]
        for name in (*b, *(n for n in a if n not in b)):
            if a.get(name) != b.get(name):
                shown = name.split(" ", 2)[-1] if part == "value" else name or "the model"
                return clause.format(name=shown, a=a.get(name, "another one"), b=b.get(name, "missing"))
    return ""


def _autograd_functions(value: Any) -> dict[str, type]:
    """An autograd.Function, or that of its method `apply`, by name."""
    value = value.__self__ if isinstance(value, types.MethodType) else value
    is_function = isinstance(value, type) and issubclass(value, torch.autograd.Function)
    return {_qualified(value): value} if is_function else {}


def _versions(model: nn.Module) -> dict[str, str]:
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"  # its byte code
    versions = {"snnfx": __version__, "torch": str(torch.__version__), "Python": python}
    packages = {type(m).__module__.partition(".")[0] for m in model.modules()} - {"torch", "snnfx", "__main__"}
    for package in sorted(packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # code of the user, whose digests are compared
            continue
    return versions


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


def _qualified(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _module_text(name: str, module: nn.Module, state: set[tuple[str, str]]) -> str:
    lines = [_qualified(type(module)), repr([*module._modules])]
    for kind in ("_parameters", "_buffers"):
        for key, tensor in vars(module)[kind].items():
            lines.append(f"{kind} {key} {None if tensor is None else (tuple(tensor.shape), tensor.dtype)}")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    lines.append(repr([len(vars(module)[h]) for h in hooks]))
    for key, value in sorted(vars(module).items()):
        if key not in _INTERNALS and (name, key) not in state:
            lines.append(f"{key} {_attribute_text(value)}")
    return "\n".join(lines)


def _attribute_text(value: Any) -> str:
    """A text of an attribute; for an object that is not a plain value, its type."""
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, list | tuple):
        return f"{_qualified(type(value))} [{', '.join(map(_attribute_text, value))}]"
    if isinstance(value, set | frozenset):
        return f"{_qualified(type(value))} {sorted(map(_attribute_text, value))}"
    if isinstance(value, dict):
        return f"{_qualified(type(value))} {[(_attribute_text(k), _attribute_text(v)) for k, v in value.items()]}"
    if isinstance(value, FunctionType):
        return f"{_qualified(value)} {_function_text(value)}"
    return _qualified(value) if isinstance(value, type) else _qualified(type(value))


def _code_text(code: CodeType) -> str:
    constants = [_code_text(c) if isinstance(c, CodeType) else _constant_text(c) for c in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_argcount, code.co_flags)
    return f"{code.co_name} {code.co_code.hex()} {names} {code.co_exceptiontable.hex()} {constants}"


def _constant_text(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _function_text(function: FunctionType) -> str:
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    return f"{_code_text(function.__code__)} {[_attribute_text(value) for value in defaults]}"


def _expected_text(value: Any, names: Mapping[nn.Module, str]) -> str:
    """A text of the expected value of a guard, the same in another process.

    Raises:
        NotStorable: the value is an object that has none.
    """
    if value is ABSENT or isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, enum.Enum):
        return f"{_qualified(type(value))} {value.name}"
    if isinstance(value, nn.Module):
        return f"module {names[value]}" if value in names else f"{_qualified(type(value))}"
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} {value.dtype}"
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, FunctionType):
        return f"{_qualified(value)} {_function_text(value)}"
    if isinstance(value, type | torch.jit.ScriptFunction):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
    if isinstance(value, BuiltinFunctionType | types.MethodDescriptorType | types.WrapperDescriptorType | np.ufunc):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    if isinstance(value, OpOverload | OpOverloadPacket):
        return f"operator {value}"
    if isinstance(value, types.MethodType):
        return f"{_expected_text(value.__func__, names)} of {_expected_text(value.__self__, names)}"
    if isinstance(value, staticmethod | classmethod):
        return _expected_text(value.__func__, names)
    if isinstance(value, property):
        return str([_expected_text(f, names) for f in (value.fget, value.fset)])
    if isinstance(value, functools.partial):
        return str([_expected_text(v, names) for v in (value.func, value.args, value.keywords)])
    if isinstance(value, np.ndarray | np.generic):
        return f"array {value.shape} {value.dtype} {value.tobytes().hex()}"
    if isinstance(value, _CONTAINERS):
        return _container_text(value, names)
    if type(value).__module__ in _WITHOUT_VALUE:
        return _qualified(type(value))
    if isinstance(getattr(value, "__dict__", None), dict):
        # The values in it that the code reads have guards of their own.
        return f"{_qualified(type(value))} {[(k, _attribute_text(v)) for k, v in vars(value).items()]}"
    raise NotStorable(f"the code of the model reads a {_qualified(type(value))}, which has no digest")


def _container_text(value: Any, names: Mapping[nn.Module, str]) -> str:
    if isinstance(value, dict):
        parts = [(_expected_text(k, names), _expected_text(v, names)) for k, v in value.items()]
        return f"{_qualified(type(value))} {parts}"
    texts = [_expected_text(v, names) for v in value]
    return f"{_qualified(type(value))} {sorted(texts) if isinstance(value, set | frozenset) else texts}"
