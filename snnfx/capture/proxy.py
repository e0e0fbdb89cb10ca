"""What stands for a value while one step is recorded."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from snnfx.errors import CaptureError
from snnfx.ir.nodes import IN_PLACE_OPERATORS
from snnfx.ir.printing import operation_name
from snnfx.ops.step_functions import set_part_
from snnfx.sandbox.user_code import format_location

__all__ = ["UNKNOWN", "StepProxy", "needs_examples", "value_of"]

UNKNOWN = object()
"""The value of a proxy of which no example is known."""


class StepProxy(fx.Proxy):
    """A recorded value of one step. With example inputs it answers questions about its shape."""

    _is_param = False
    _is_buffer = False

    def stands_for(self, cls: Any) -> bool:
        """Whether the value behind the proxy is an instance of `cls`: what `isinstance` says in the model's code."""
        value = value_of(self)
        if value is not UNKNOWN:
            return isinstance(value, cls)
        return not self.node.meta.get("shape_like") and issubclass(Tensor, cls)

    def __getattr__(self, name: str) -> Any:
        value = value_of(self)
        if isinstance(value, Tensor):
            if name in ("ndim", "is_cuda", "requires_grad", "layout", "is_floating_point", "is_complex"):
                return getattr(value, name)
            if name in ("dim", "ndimension"):
                return value.dim
        if name in ("values", "indices") and (
            isinstance(value, tuple) or (value is UNKNOWN and _gives_pair(self.node))
        ):
            return self[0 if name == "values" else 1]  # type: ignore[index]
        if name == "data":
            return self.tracer.create_proxy("call_method", "detach", (self,), {})  # the same, and vmap takes it
        if name in ("shape", "dtype", "device", "T", "mT", "H", "mH", "real", "imag"):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __len__(self) -> int:
        value = value_of(self)
        if value is UNKNOWN:
            raise needs_examples(self)
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(self.shape[0])  # remembered: the graph holds for this size only
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
        """`x += 1` changes a tensor, whoever else holds it; of a number it makes another number."""
        value = value_of(self)
        is_number = self.node.meta.get("shape_like") if value is UNKNOWN else not isinstance(value, Tensor)
        operation = on_numbers if is_number or self.node.meta.get("number") else on_tensors
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        if type(index) is StepProxy and isinstance(value, int | float) and _is_mask_of(index.node, self.node):
            self.tracer.create_proxy("call_method", "masked_fill_", (self, index, value), {})
        else:
            self.tracer.create_proxy("call_function", set_part_, (self, index, value), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.concrete(self))  # type: ignore[attr-defined]

    def __index__(self) -> int:
        return int(self.tracer.concrete(self))  # type: ignore[attr-defined]

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.concrete(self))  # type: ignore[attr-defined]

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
    """The example of the value, a fake tensor or a Python object, or UNKNOWN."""
    return proxy.node.meta.get("val", UNKNOWN)


def _is_mask_of(mask: Node, node: Node) -> bool:
    """Whether `mask` is known to be a mask with the shape of a value."""
    known, of = mask.meta.get("val"), node.meta.get("val")
    if isinstance(known, Tensor) and isinstance(of, Tensor):
        return known.dtype is torch.bool and known.shape == of.shape
    compared = mask.op != "placeholder" and operation_name(mask) in ("gt", "ge", "lt", "le", "eq", "ne")
    return compared and mask.args[0] is node and isinstance(mask.args[1], int | float)


_PAIRS = frozenset("max min sort topk median nanmedian mode kthvalue cummax cummin".split())


def _gives_pair(node: Node) -> bool:
    """Whether the node, whose value is not known, is a call that gives `(values, indices)`."""
    return node.op in ("call_function", "call_method") and operation_name(node) in _PAIRS


def needs_examples(proxy: StepProxy) -> CaptureError:
    """The error of a question that only an example can answer."""
    return CaptureError(
        "SNNFX202",
        "the model asks for the shape of a value while it is captured",
        where=format_location(proxy.node.meta.get("where")),
        why="without example_inputs there is no answer.",
        hint="Pass example_inputs=(x,) with what ONE step takes, batch dimension included.",
    )
