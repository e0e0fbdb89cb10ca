"""Choose the memory format of images: channels-last around 2-d convolutions (data layout selection).

On a CPU, oneDNN's convolutions and torch's pooling are several times faster when the channels are innermost in memory.
The pass marks the values that may have this format: those of 2-d convolutions, and what is computed from them by
operations that take any format and hand it on. Where such a value leaves them (a `view`, an operation that is not
known, an output), the emitted code brings it back to row-major. Convolutions with more weights than their images have
elements are faster row-major: which it is, is decided at the call, where T and N are known. Values are the same up to
the rounding of another convolution kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.fx import Node

from snnfx.analysis.batch.rule_table import ELEMENTWISE_OPERATIONS
from snnfx.analysis.dependence import is_size
from snnfx.ir.program import StepProgram, is_structural, operation_name, takes_from_tuple
from snnfx.ops.online_functions import traced_call, traced_module
from snnfx.ops.step_functions import apply_autograd_function
from snnfx.passes.base import Pass
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_stateful, initial_value

__all__ = ["ChooseMemoryFormat", "image_of", "is_convolution", "takes_any_layout", "weights_of"]

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)

_MODULES = (
    *_CONVOLUTIONS,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.Upsample,
    nn.Dropout,
    nn.Dropout2d,
    nn.Identity,
    nn.ZeroPad2d,
    nn.PReLU,
    *(
        getattr(nn, name)
        for name in "CELU ELU GELU Hardsigmoid Hardswish Hardtanh LeakyReLU Mish ReLU ReLU6 SELU Sigmoid SiLU Softplus "
        "Softsign Tanh".split()
    ),
)

_OPERATIONS = frozenset(
    "conv2d conv_transpose2d max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d interpolate dropout "
    "dropout2d batch_norm cat where clone detach float half bfloat16 double bool zeros_like ones_like full_like "
    "rand_like randn_like empty_like sum mean amax amin cut_history update_trace draw_dropout_mask".split()
)


@dataclass(frozen=True)
class ChooseMemoryFormat(Pass):
    """Mark the nodes whose values may be channels-last (`node.meta["channels_last"]`)."""

    name = "choose_memory_format"
    requires = "partitioned"

    def apply(self, program: StepProgram) -> str:
        following = dict(zip((s.placeholder for s in program.slots), program.next_states, strict=True))
        marked: set[Node] = set()
        before = -1
        while len(marked) != before:  # once more where a state hands the format on to the next step
            before = len(marked)
            for node in program.graph.nodes:
                if _may_be_channels_last(program, node, marked, following):
                    marked.add(node)
            for region in program.regions:
                values = {operand for node in region.nodes for operand in (node, *node.all_input_nodes)}
                if region.kind == "loop" and marked & values:
                    # One kernel gives all its results the format of its input, whatever is between them.
                    marked.update(n for n in region.nodes if not is_size(n))
        for node in program.graph.nodes:
            node.meta.pop("channels_last", None)
        for node in marked:
            node.meta["channels_last"] = True
        convolutions = sum(is_convolution(program, node) for node in marked)
        return f"{len(marked)} values around {convolutions} convolutions may be channels-last"


def _may_be_channels_last(program: StepProgram, node: Node, marked: set[Node], following: dict[str, object]) -> bool:
    if node in marked or is_convolution(program, node):
        return True
    if is_size(node):
        return False  # a number or a dtype, though one of an image
    if node.op == "placeholder":
        return following.get(node.name) in marked
    return takes_any_layout(program, node) and any(operand in marked for operand in node.all_input_nodes)


def is_convolution(program: StepProgram, node: Node) -> bool:
    """Whether a node is a convolution over images."""
    if node.op == "call_module":
        return type(program.resolve(str(node.target))) in _CONVOLUTIONS
    if node.target is traced_module:
        return type(program.resolve(str(node.args[0].target))) in _CONVOLUTIONS  # type: ignore[union-attr]
    name = node.args[0] if node.target is traced_call else operation_name(node)
    return node.op == "call_function" and name in ("conv2d", "conv_transpose2d")


def image_of(node: Node) -> object:
    """What a convolution over images is given."""
    position = {traced_module: 1, traced_call: 4}.get(node.target, 0)  # type: ignore[arg-type]
    return node.args[position] if len(node.args) > position else None


def weights_of(program: StepProgram, node: Node) -> int:
    """How many weights a convolution over images has; 0 where that is not known."""
    if node.op == "call_module":
        return _elements(program.resolve(str(node.target)).weight)
    if node.target is traced_module:
        return _elements(program.resolve(str(node.args[0].target)).weight)  # type: ignore[union-attr]
    position = 5 if node.target is traced_call else 1
    weight = node.args[position] if len(node.args) > position else node.kwargs.get("weight")
    if not isinstance(weight, Node):
        return 0
    return _elements(program.resolve(str(weight.target)) if weight.op == "get_attr" else weight.meta.get("val"))


def _elements(weight: object) -> int:
    return weight.numel() if isinstance(weight, Tensor) else 0


def takes_any_layout(program: StepProgram, node: Node) -> bool:
    """Whether the result of an operation has the format of its operand and does not depend on it otherwise."""
    if node.op == "output" or is_size(node) or is_structural(node):
        return True
    if node.op == "call_module":
        return type(program.resolve(str(node.target))) in _MODULES
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
    name = operation_name(node)
    return name in ELEMENTWISE_OPERATIONS or name in _OPERATIONS
