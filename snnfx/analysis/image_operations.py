"""Operations on images: 2-d convolutions, and operations that preserve the memory format."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.ir.facts import VALUE
from snnfx.ir.nodes import is_size, is_structural, takes_from_tuple
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import traced_call, traced_module
from snnfx.ops.operator_lookup import operation_of_class, traits_of, traits_of_class
from snnfx.ops.step_functions import apply_autograd_function
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_stateful, initial_value

__all__ = ["convolution_of", "image_of", "is_convolution", "takes_any_layout", "weights_of"]

_CONVOLUTIONS = ("conv2d", "conv_transpose2d")


def is_convolution(program: StepProgram, node: Node) -> bool:
    """Whether a node is a 2-d convolution."""
    if node.op == "call_module":
        return operation_of_class(type(program.resolve(str(node.target)))) in _CONVOLUTIONS
    if node.target is traced_module:
        return operation_of_class(type(program.resolve(str(node.args[0].target)))) in _CONVOLUTIONS  # type: ignore[union-attr]
    name = node.args[0] if node.target is traced_call else operation_name(node)
    return node.op == "call_function" and name in _CONVOLUTIONS


def image_of(node: Node) -> object:
    """The image operand of a 2-d convolution."""
    position = {traced_module: 1, traced_call: 4}.get(node.target, 0)  # type: ignore[arg-type]
    return node.args[position] if len(node.args) > position else None


def convolution_of(program: StepProgram, node: Node) -> tuple[Any, ...] | None:
    """Shape of the weight, stride, padding, dilation and groups of a plain `conv2d`; None if they are unknown."""
    if node.op == "call_module":
        layer = program.resolve(str(node.target))
        if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros":
            return None
        return tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups
    if node.op != "call_function" or operation_name(node) != "conv2d":
        return None
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight = given.get("weight")
    if not isinstance(weight, Node):
        return None
    tensor = program.resolve(str(weight.target)) if weight.op == "get_attr" else VALUE.of(weight)
    settings = [given.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    pairs = [_pair(value) for value in settings]
    groups = given.get("groups", 1)
    if not isinstance(tensor, Tensor) or None in pairs or not isinstance(groups, int):
        return None
    return tuple(map(int, tensor.shape)), *pairs, groups


def _pair(value: object) -> tuple[int, int] | str | None:
    """A setting of a convolution for both dimensions; None if it is not constant."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, tuple | list) and len(value) in (1, 2) and all(isinstance(v, int) for v in value):
        return value[0], value[-1]
    return value if isinstance(value, str) else None


def weights_of(program: StepProgram, node: Node) -> int:
    """The number of weights of a 2-d convolution; 0 if unknown."""
    if node.op == "call_module":
        return _elements(program.resolve(str(node.target)).weight)
    if node.target is traced_module:
        return _elements(program.resolve(str(node.args[0].target)).weight)  # type: ignore[union-attr]
    position = 5 if node.target is traced_call else 1
    weight = node.args[position] if len(node.args) > position else node.kwargs.get("weight")
    if not isinstance(weight, Node):
        return 0
    return _elements(program.resolve(str(weight.target)) if weight.op == "get_attr" else VALUE.of(weight))


def _elements(weight: object) -> int:
    return weight.numel() if isinstance(weight, Tensor) else 0


def takes_any_layout(program: StepProgram, node: Node) -> bool:
    """Whether an operation accepts any memory format and returns the format of its operand."""
    if node.op == "output" or is_size(node) or is_structural(node):
        return True
    if node.op == "call_module":
        return traits_of_class(type(program.resolve(str(node.target)))).keeps_layout
    if not node.op.startswith("call"):
        return False
    if node.target in (traced_module, traced_call):
        return is_convolution(program, node)
    if node.target in (call_stateful, initial_value):
        module = program.module_of(node)
        adapter = adapter_of(module) if module is not None else None
        return adapter is not None and module is not None and adapter.elementwise(module)
    if node.target is apply_autograd_function:
        return getattr(getattr(program.module_of(node), "function", None), "snnfx_elementwise", False)
    if takes_from_tuple(node):
        return True
    return traits_of(node).keeps_layout
