"""Proxies: the recorded values of one time step."""

from __future__ import annotations

import dis
import inspect
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.errors import CaptureError
from snnfx.ir.facts import NUMBER, SHAPE_LIKE, VALUE, WHERE
from snnfx.ir.nodes import IN_PLACE_OPERATORS, object_of
from snnfx.ops.operator_lookup import traits_of
from snnfx.ops.step_functions import set_part_
from snnfx.sandbox.user_code import format_location, user_location

__all__ = ["UNKNOWN", "StepProxy", "data_refusal", "needs_examples", "value_of"]

UNKNOWN = object()
"""The value of a proxy without an example value."""


_READ_AT_ONCE = frozenset(
    "ndim is_cuda requires_grad layout is_floating_point is_complex is_sparse is_quantized is_nested".split()
)
"""Attributes that a known tensor answers without a record."""


class StepProxy(fx.Proxy):
    """A recorded value of one step; with example inputs it knows its shape and dtype."""

    __array_priority__ = Tensor.__array_priority__
    """NumPy then leaves `numpy.float64(0.5) * proxy` to the proxy, as for a tensor."""
    _is_param = False
    _is_buffer = False

    def stands_for(self, cls: Any) -> bool:
        """Whether the recorded value is an instance of `cls`, for `isinstance` in the model's code."""
        value = value_of(self)
        if value is not UNKNOWN:
            return isinstance(value, cls)
        return not SHAPE_LIKE.of(self.node) and issubclass(Tensor, cls)

    def __getattr__(self, name: str) -> Any:
        # NumPy asks for its protocols and for methods of arrays, and a recorded attribute would answer.
        is_of_size = not SHAPE_LIKE.of(self.node) or hasattr(torch.Size, name) or hasattr(int, name)
        if name.startswith("__array_") or not is_of_size:
            raise AttributeError(f"{self.node.name} has no attribute {name!r}")
        value = value_of(self)
        if isinstance(value, Tensor):
            if name in _READ_AT_ONCE:
                return getattr(value, name)
            if name in ("dim", "ndimension"):
                return value.dim
        if name in ("values", "indices") and (
            isinstance(value, tuple) or (value is UNKNOWN and _returns_pair(self.node))
        ):
            return self[0 if name == "values" else 1]  # type: ignore[index]
        if name in ("shape", "dtype", "device", "T", "mT", "H", "mH", "real", "imag"):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    @property
    def data(self) -> Any:
        """The detached value: equivalent to `.data`, and supported by vmap."""
        return self.tracer.create_proxy("call_method", "detach", (self,), {})

    @data.setter
    def data(self, value: Any) -> None:
        if type(value) is StepProxy and object_of(value.node) is object_of(self.node):
            return  # the second half of `x.data += 1`, which changes x in place
        raise data_refusal(f"`{self.node.target if self.node.op == 'get_attr' else self.node.name}`")

    def __len__(self) -> int:
        value = value_of(self)
        if value is UNKNOWN:
            raise needs_examples(self)
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(self.shape[0])  # recorded, because the graph is valid for this size only
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        value = value_of(self)
        if value is not UNKNOWN:
            if isinstance(value, Tensor) and value.dim() == 0:
                raise TypeError("iteration over a 0-d tensor")
            return iter([self[i] for i in range(len(self))])  # type: ignore[index]
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        if caller is not None:
            for instruction in dis.get_instructions(caller.f_code):
                if instruction.offset == caller.f_lasti and instruction.opname == "UNPACK_SEQUENCE":
                    return iter([self[i] for i in range(instruction.argval)])  # type: ignore[index]
        raise needs_examples(self)

    def _in_place(self, on_numbers: Callable[..., Any], on_tensors: Callable[..., Any], other: Any) -> Any:
        """Record `x += 1`: in place for a tensor, whose aliases change too; a new value for a number."""
        value = value_of(self)
        is_number = SHAPE_LIKE.of(self.node) if value is UNKNOWN else not isinstance(value, Tensor)
        operation = on_numbers if is_number or NUMBER.of(self.node) else on_tensors
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(index) is StepProxy and isinstance(value, int | float) and _is_mask_of(index.node, self.node):
            self.tracer.create_proxy("call_method", "masked_fill_", (self, index, value), {})
        else:
            self.tracer.create_proxy("call_function", set_part_, (self, index, value), {})

    def __eq__(self, other: object) -> Any:
        if other is None:
            return False  # as for a tensor and a number
        return self.tracer.create_proxy("call_function", operator.eq, (self, other), {})

    def __ne__(self, other: object) -> Any:
        if other is None:
            return True
        return self.tracer.create_proxy("call_function", operator.ne, (self, other), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.concrete(self, bool))  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return int(self.tracer.concrete(self, int))  # type: ignore[attr-defined]

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.concrete(self, float))  # type: ignore[attr-defined]

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        is_shape = isinstance(value_of(self), tuple)
        number = [int(size) for size in self] if is_shape else self.tracer.concrete(self, float)  # type: ignore[attr-defined]
        return sys.modules["numpy"].asarray(number, *args, **kwargs)

    def __str__(self) -> str:
        value, node = value_of(self), self.node
        is_one_size = node.target is operator.getitem or (node.target == "size" and len(node.args) == 2)
        is_size = SHAPE_LIKE.of(node) and (type(value) is int or (value is UNKNOWN and is_one_size))
        return str(int(self)) if is_size else super().__str__()  # code may decide by the text: blocks[str(x.shape[1])]

    def __format__(self, specification: str) -> str:
        if not specification:
            return str(self)
        is_unknown_tensor = value_of(self) is UNKNOWN and not SHAPE_LIKE.of(self.node)
        if is_unknown_tensor:  # only a tensor of one element has a format
            return object.__format__(self, specification)
        return format(self.tracer.concrete(self, float, is_text=True), specification)  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return id(self)


def _assignment(in_place: Callable[..., Any], on_numbers: Callable[..., Any]) -> Callable[..., Any]:
    def assign(self: StepProxy, other: Any) -> Any:
        return self._in_place(on_numbers, in_place, other)

    return assign


for _in_place, _on_numbers in IN_PLACE_OPERATORS.items():
    if _in_place is not set_part_:
        setattr(StepProxy, f"__{_in_place.__name__}__", _assignment(_in_place, _on_numbers))


def value_of(proxy: StepProxy) -> Any:
    """The example value of a proxy: a fake tensor, a Python object, or UNKNOWN."""
    return proxy.node.meta.get("val", UNKNOWN)


def _is_mask_of(mask: Node, node: Node) -> bool:
    """Whether `mask` is known to be a boolean mask with the shape of `node`."""
    mask_value, value = VALUE.of(mask), VALUE.of(node)
    if isinstance(mask_value, Tensor) and isinstance(value, Tensor):
        return mask_value.dtype is torch.bool and mask_value.shape == value.shape
    is_comparison = traits_of(mask).comparison
    return is_comparison and mask.args[0] is node and isinstance(mask.args[1], int | float)


def _returns_pair(node: Node) -> bool:
    """Whether a node without example value is a call that returns `(values, indices)`."""
    return traits_of(node).pair


def data_refusal(name: str) -> CaptureError:
    """The error for a step that assigns `.data` of a tensor."""
    return CaptureError(
        "SNNFX206",
        f"a step assigns the `.data` of {name}",
        where=format_location(user_location()),
        why="it swaps the memory of the tensor behind autograd, so the gradients of earlier steps would be wrong.",
        hint="Copy the value instead: with torch.no_grad(): self.w.copy_(value).",
    )


def needs_examples(proxy: StepProxy) -> CaptureError:
    """The error for a shape query that requires example inputs."""
    return CaptureError(
        "SNNFX202",
        "the model reads the shape of a value",
        where=format_location(WHERE.of(proxy.node)),
        why="shapes are unknown without example_inputs.",
        hint="Pass example_inputs=(x,) with the inputs of ONE step, including the batch dimension.",
    )
