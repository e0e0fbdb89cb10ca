"""The functions and methods that a saved graph may call, by name.

A file names functions; they are looked up in these tables and never imported. The functions of torch are those that
torch itself lists as functions of tensors, and those that make tensors.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from snnfx.ops import elements, run_loop, statistics, step_functions
from snnfx.sandbox.torch_internals import layer_functions
from snnfx.state import step_calls

__all__ = ["ATTRIBUTES", "function_named", "is_known_method", "name_of_function"]

_FACTORIES = (
    "arange as_tensor complex empty empty_like empty_strided eye full full_like linspace logspace ones ones_like polar "
    "rand rand_like randint randint_like randn randn_like scalar_tensor tensor tril_indices triu_indices zeros "
    "zeros_like is_tensor is_floating_point is_complex numel"
).split()
_BUILTINS = "abs bool complex divmod float getattr int len max min pow round slice sum".split()
_CALLERS = frozenset(("attrgetter", "call", "delitem", "itemgetter", "length_hint", "methodcaller", "setitem"))
"""Functions of `operator` that call something, or change a container."""
_MORE_METHODS = "new_empty new_full new_ones new_tensor new_zeros size to type".split()
_METHODS_WITH_EFFECTS = frozenset(
    "apply_ backward map_ map2_ numpy register_hook register_post_accumulate_grad_hook share_memory_ storage "
    "untyped_storage set_ data_ptr tolist".split()
)
_OF_SNNFX = (
    step_functions.apply_autograd_function,
    step_functions.change_value,
    step_functions.copied,
    step_functions.reduced_over_time,
    step_functions.expect_size,
    step_functions.read_parameter,
    step_functions.set_part,
    step_functions.set_part_,
    step_calls.call_opaque,
    step_calls.call_stateful,
    step_calls.initial_value,
    step_calls.opaque_initial_value,
    statistics.read_statistic,
    run_loop.run_loop,
    elements.concatenate_elements,
    elements.read_elements,
    elements.stack_elements,
    elements.write_elements,
)
ATTRIBUTES = frozenset("H T data device dtype imag is_cuda layout mH mT ndim real requires_grad shape".split())
"""The attributes that `getattr` in a saved graph may read."""


@cache
def _functions() -> dict[str, Callable[..., Any]]:
    overridable = torch.overrides.get_overridable_functions()
    of_tensors = {id(f) for namespace, functions in overridable.items() for f in functions}
    found: dict[str, Callable[..., Any]] = {}
    namespaces = {
        "torch": torch,
        "torch.nn.functional": functional,
        "torch.special": torch.special,
        "torch.linalg": torch.linalg,
        "torch.fft": torch.fft,
        layer_functions.__name__: layer_functions,
    }
    for prefix, namespace in namespaces.items():
        for name in dir(namespace):
            value = getattr(namespace, name, None)
            if not name.startswith("__") and callable(value) and id(value) in of_tensors:
                found[f"{prefix}.{name}"] = value
    found |= {f"torch.{name}": getattr(torch, name) for name in _FACTORIES}
    found |= {f"builtins.{name}": getattr(builtins, name) for name in _BUILTINS}
    for prefix, module in {"operator": operator, "math": math}.items():
        for name, value in vars(module).items():
            if not name.startswith("_") and name not in _CALLERS and type(value) is type(len):
                found[f"{prefix}.{name}"] = value
    return found | {f"{f.__module__}.{f.__name__}": f for f in _OF_SNNFX}


@cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(_functions().items())}


def name_of_function(function: Any) -> str | None:
    """The name of a function in a file; None for a function that a saved graph may not call."""
    name = _names().get(id(function))
    if name is None:
        # `torch.foo` is a new object at each access of some builtins.
        name = next((n for n, f in _functions().items() if f == function), None)
    return name


def function_named(name: str) -> Callable[..., Any] | None:
    """The function of this name; None for any other name."""
    return _functions().get(name)


@cache
def _methods() -> frozenset[str]:
    methods = {f.__name__ for f in torch.overrides.get_overridable_functions()[torch.Tensor] if hasattr(f, "__name__")}
    public = {name for name in methods | {*_MORE_METHODS} if name.isidentifier() and not name.startswith("_")}
    return frozenset(public - _METHODS_WITH_EFFECTS)


def is_known_method(name: str) -> bool:
    """Whether a saved graph may call this method of a tensor."""
    return name in _methods()
