"""Which products read spikes: values that come from a comparison through operations that keep zeros."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import Node

from snnfx.analysis.integer_ranges import fires_spikes
from snnfx.ir.nodes import is_size, is_structural, takes_from_tuple
from snnfx.ir.printing import operation_name
from snnfx.ir.program import StepProgram
from snnfx.ops.step_functions import apply_autograd_function
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_stateful

__all__ = ["is_matrix_product", "operands_from_spikes", "reads_spikes"]

_COMPARISONS = frozenset(
    "gt greater ge greater_equal lt less le less_equal eq ne not_equal heaviside logical_and logical_or".split()
)
_KEEPS_ZEROS = frozenset(
    "flatten reshape view unflatten permute transpose t adjoint movedim moveaxis swapaxes swapdims squeeze unsqueeze "
    "contiguous clone detach float double to type_as half bfloat16 max_pool1d max_pool2d max_pool3d avg_pool1d "
    "avg_pool2d avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout pad "
    "narrow select index_select chunk split tensor_split getitem unbind expand repeat tile flip roll neg negative abs "
    "absolute relu pixel_shuffle pixel_unshuffle unfold div divide true_divide zero_pad2d".split()
)
"""Operations whose result is zero where their first operand is, up to its shape."""

_TRANSPOSED = ("T", "mT", "H", "mH")
"""Attributes of a tensor that are views of it."""

_JOINS = frozenset("cat concat concatenate stack hstack vstack add sub subtract maximum where".split())
"""Operations whose result is sparse if all their tensor operands are."""

_FACTORS = frozenset("mul multiply".split())
"""Operations whose result is zero where one of their operands is."""

_MATRIX_PRODUCTS = (operator.matmul, torch.matmul, torch.bmm)

_MODULES = (
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ReLU,
    *(getattr(nn, f"{kind}Pool{dims}d") for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg") for dims in (1, 2, 3)),
)


def reads_spikes(program: StepProgram, product: Node) -> bool:
    """Whether the first operand of a product comes from spikes.

    A neuron counts as a source of spikes if its step is element-wise. Whether its output has many zeros is measured at
    each call.
    """
    operand = product.args[0] if product.args else product.kwargs.get("input")
    return isinstance(operand, Node) and _comes_from_spikes(program, operand)


def is_matrix_product(node: Node) -> bool:
    """Whether a node multiplies two matrices, or two batches of them."""
    if node.op == "call_method":
        is_product = node.target in ("matmul", "bmm", "__matmul__")
    else:
        is_product = node.op == "call_function" and node.target in _MATRIX_PRODUCTS
    return is_product and len(node.args) == 2 and not node.kwargs and len(node.all_input_nodes) > 0


def operands_from_spikes(program: StepProgram, product: Node) -> str:
    """The operands of a product of matrices that come from spikes: "first", "second", "both" or ""."""
    found = [isinstance(x, Node) and _comes_from_spikes(program, x) for x in product.args]
    return {(True, True): "both", (True, False): "first", (False, True): "second"}.get((found[0], found[1]), "")


def _comes_from_spikes(program: StepProgram, value: Node) -> bool:
    following = dict(zip((s.placeholder for s in program.slots), program.next_states, strict=True))
    pending, seen, has_source = [value], set[Node](), False
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_source(program, node):
            has_source = True
            continue
        operands = _operands_with_zeros(program, node, following)
        if operands is None:
            return False
        pending.extend(operands)
    return has_source


def _is_source(program: StepProgram, node: Node) -> bool:
    if node.target is call_stateful:
        module = program.module_of(node)
        adapter = adapter_of(module) if module is not None else None
        return adapter is not None and module is not None and adapter.elementwise(module)
    if node.target is apply_autograd_function:
        return True
    if node.op == "call_module":
        return fires_spikes(program.resolve(str(node.target)))
    return node.op in ("call_function", "call_method") and operation_name(node) in _COMPARISONS


def _operands_with_zeros(program: StepProgram, node: Node, following: dict[str, object]) -> Iterable[Node] | None:
    """The operands from which a node has its zeros; None if it has none."""
    if node.op == "placeholder":
        next_state = following.get(node.name)
        return [next_state] if isinstance(next_state, Node) else None
    if node.op == "call_module":
        module = program.resolve(str(node.target))
        return node.all_input_nodes[:1] if type(module) in _MODULES else None
    if not node.op.startswith("call"):
        return None
    if takes_from_tuple(node) or is_structural(node):
        return node.all_input_nodes[:1]
    name = operation_name(node)
    if name in _KEEPS_ZEROS or (node.target is getattr and node.args[1] in _TRANSPOSED):
        return node.all_input_nodes[:1]
    if is_matrix_product(node):  # few spikes have few pairs; a product with other values has no zeros
        return node.all_input_nodes
    tensors = [operand for operand in node.all_input_nodes if not is_size(operand)]
    if name in _FACTORS:
        # With two factors, one source is enough: the product is as sparse as the sparser one.
        sparse = [operand for operand in tensors if _may_be_sparse(program, operand)]
        return sparse[:1] or None
    if name in _JOINS and tensors and not any(isinstance(a, int | float) and a for a in _added(name, node)):
        return tensors
    return None


def _may_be_sparse(program: StepProgram, node: Node) -> bool:
    return _is_source(program, node) or takes_from_tuple(node) or operation_name(node) in _KEEPS_ZEROS


def _added(name: str, node: Node) -> tuple[object, ...]:
    """The operands of a sum; a number would fill the zeros."""
    return node.args[:2] if name in ("add", "sub", "subtract", "maximum") else ()
