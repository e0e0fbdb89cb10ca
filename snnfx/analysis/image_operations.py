"""Operations on images: 2-d convolutions, and operations that preserve the memory format."""

from __future__ import annotations

from torch import Tensor
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

__all__ = ["image_of", "is_convolution", "takes_any_layout", "weights_of"]

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
