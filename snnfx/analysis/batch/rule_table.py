"""The table of batch rules: operations that may be folded. Operations without a row are refused.

A row lists names of operations, their arguments, and their rule. The names, and the operations that share the rule of
element-wise operations, are those of the table of operators (`snnfx.ops.traits`).
Every row is tested against torch (`tests/analysis/batch/test_rule_table.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from snnfx.analysis.batch import element_rules as elements
from snnfx.analysis.batch import elementwise_rules as elementwise
from snnfx.analysis.batch import indexing_rules as indexing
from snnfx.analysis.batch import module_rules as modules
from snnfx.analysis.batch import product_rules as products
from snnfx.analysis.batch import shape_rules as shapes
from snnfx.analysis.batch.call_site import CallSite
from snnfx.analysis.batch.elementwise_rules import Along, BatchFirst, Trailing
from snnfx.analysis.batch.facts import Value
from snnfx.analysis.batch.product_rules import MatMul
from snnfx.ops.traits import MODULES
from snnfx.ops.traits import ROWS as OPERATORS

__all__ = ["DIFFERENT_SIGNATURES", "ELEMENTWISE_ROW", "ELEMENTWISE_RULES", "GIVEN", "ROWS", "OperatorRule"]


@dataclass(frozen=True)
class OperatorRule:
    """A row of the table: operations and their batch rule.

    Args:
        names: names of the operations, separated by spaces.
        signature: names and defaults of the arguments. A final `...` takes all others, which must not depend on the
            batch; `*name` takes any number of arguments.
        rule: returns the fact of the result, or refuses the site.
        operands: arguments that the rule checks. All others must be invariant in time and have no batch.
        sizes: arguments that may contain the batch size.
        shape_only: the result depends on the shapes of the operands only, so it is invariant in time.
    """

    names: str
    signature: str
    rule: Callable[[CallSite], Value]
    operands: str = "input"
    sizes: str = ""
    shape_only: bool = False


_COPIES = "bfloat16 bool byte clone contiguous cpu cuda detach double float half int long short to type_as"
_MAX_POOL = "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False"
_UNPOOL = "input, indices, kernel_size, stride=None, padding=0, output_size=None"
_EMBEDDING = "input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False"
_BATCH_NORM = "input, running_mean, running_var, weight=None, bias=None, training=False, ..."
_INSTANCE_NORM = "input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, ..."
_ATTENTION = "query, key, value, attn_mask=None, ..."
_MULTIHEAD = (
    "query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None, average_attn_weights=True, ..."
)
_ENCODER = "src, src_mask=None, src_key_padding_mask=None, is_causal=None, mask=None"

_ROWS: tuple[OperatorRule, ...] = (
    # copies
    OperatorRule("where", "*operands, **options", elementwise.where, operands="operands options"),
    OperatorRule(_COPIES, "input, *others, **options", elementwise.like_input, operands="input others options"),
    OperatorRule("zeros_like ones_like full_like empty_like", "input, ...", elementwise.like_input, shape_only=True),
    OperatorRule("dropout alpha_dropout rrelu", "input, ...", elementwise.like_input),
    OperatorRule("rand_like randn_like randint_like", "input, ...", elementwise.like_input),
    OperatorRule("bernoulli poisson normal", "*operands, **options", elementwise.elementwise, "operands options"),
    OperatorRule("apply_autograd_function", "holder, *operands", modules.autograd_function, operands="operands"),
    # along named dimensions
    OperatorRule("sum nansum", "input, dim=None, keepdim=False, ...", Along(drops="keepdim")),
    OperatorRule(
        "mean nanmean prod logsumexp amax amin", "input, dim=None, keepdim=False, ...", Along(drops="keepdim")
    ),
    OperatorRule("all any argmax argmin count_nonzero", "input, dim=None, keepdim=False, ...", Along(drops="keepdim")),
    OperatorRule("std var", "input, dim=None, unbiased=True, keepdim=False, ...", Along(drops="keepdim")),
    OperatorRule(
        "std_mean var_mean", "input, dim=None, unbiased=True, keepdim=False, ...", Along(drops="keepdim", outputs=2)
    ),
    OperatorRule("norm", "input, p='fro', dim=None, keepdim=False, ...", Along(drops="keepdim")),
    OperatorRule("vector_norm", "input, ord=2, dim=None, keepdim=False, ...", Along(drops="keepdim")),
    OperatorRule(
        "max min", "input, dim=None, keepdim=False, other=None", elementwise.extremum, operands="input dim other"
    ),
    OperatorRule("aminmax", "input, dim=None, keepdim=False", Along(drops="keepdim", outputs=2)),
    OperatorRule("median nanmedian", "input, dim=None, keepdim=False", elementwise.median),
    OperatorRule("mode", "input, dim=-1, keepdim=False", Along(drops="keepdim", outputs=2)),
    OperatorRule("kthvalue", "input, k, dim=-1, keepdim=False", Along(drops="keepdim", outputs=2)),
    OperatorRule("topk", "input, k, dim=-1, ...", Along(outputs=2, resizes=True)),
    OperatorRule("sort", "input, dim=-1, ...", Along(outputs=2)),
    OperatorRule("argsort", "input, dim=-1, ...", Along()),
    OperatorRule("cumsum cumprod logcumsumexp", "input, dim, ...", Along()),
    OperatorRule("cummax cummin", "input, dim", Along(outputs=2)),
    OperatorRule("diff", "input, n=1, dim=-1", Along(resizes=True)),
    OperatorRule("flip", "input, *dims", Along(dim="dims")),
    OperatorRule("roll", "input, shifts, dims=None", Along(dim="dims")),
    OperatorRule("softmax log_softmax softmin", "input, dim=None, ...", elementwise.softmax),
    OperatorRule("gumbel_softmax", "input, tau=1, hard=False, eps=1e-10, dim=-1", Along()),
    OperatorRule("glu", "input, dim=-1", Along(resizes=True)),
    OperatorRule("normalize", "input, p=2.0, dim=1, ...", Along()),
    OperatorRule("cosine_similarity", "x1, x2, dim=1, ...", Along(drops=True, operands=("x1", "x2")), operands="x1 x2"),
    OperatorRule("index_select", "input, dim, index", Along(resizes=True)),
    OperatorRule(
        "gather", "input, dim, index, ...", Along(operands=("input", "index"), aligned=True), operands="input index"
    ),
    OperatorRule(
        "take_along_dim", "input, indices, dim=None", Along(operands=("input", "indices")), operands="input indices"
    ),
    OperatorRule("scatter scatter_add", "input, dim, index, src, ...", elementwise.scatter, operands="input index src"),
    OperatorRule("narrow", "input, dim, start, length", Along(resizes=True)),
    OperatorRule("select", "input, dim, index", indexing.select),
    OperatorRule("unbind", "input, dim=0", indexing.unbind),
    OperatorRule("unfold_dim", "input, dimension, size, step", Along(dim="dimension", grows=1, resizes=True)),
    OperatorRule("chunk", "input, chunks, dim=0", indexing.split),
    OperatorRule("tensor_split", "input, indices_or_sections, dim=0", indexing.split),
    OperatorRule("split", "input, split_size_or_sections, dim=0", indexing.split),
    OperatorRule("cat concat concatenate", "tensors, dim=0", indexing.cat, operands="tensors"),
    OperatorRule("stack", "tensors, dim=0", indexing.stack, operands="tensors"),
    # on the last dimensions
    OperatorRule("linear", "input, weight, bias=None", products.linear),
    OperatorRule("bilinear", "input1, input2, weight, bias=None", products.bilinear, operands="input1 input2"),
    OperatorRule("layer_norm rms_norm", "input, normalized_shape, ...", Trailing(elementwise.normalized_dimensions)),
    OperatorRule("avg_pool1d lp_pool1d adaptive_avg_pool1d", "input, ...", Trailing(1)),
    OperatorRule("avg_pool2d lp_pool2d adaptive_avg_pool2d", "input, ...", Trailing(2)),
    OperatorRule("avg_pool3d lp_pool3d adaptive_avg_pool3d", "input, ...", Trailing(3)),
    OperatorRule("max_pool1d", _MAX_POOL, Trailing(1, pair="return_indices")),
    OperatorRule("max_pool2d", _MAX_POOL, Trailing(2, pair="return_indices")),
    OperatorRule("max_pool3d", _MAX_POOL, Trailing(3, pair="return_indices")),
    OperatorRule("adaptive_max_pool1d", "input, output_size, return_indices=False", Trailing(1, pair="return_indices")),
    OperatorRule("adaptive_max_pool2d", "input, output_size, return_indices=False", Trailing(2, pair="return_indices")),
    OperatorRule("adaptive_max_pool3d", "input, output_size, return_indices=False", Trailing(3, pair="return_indices")),
    OperatorRule("max_pool1d_with_indices adaptive_max_pool1d_with_indices", "input, ...", Trailing(1, pair=True)),
    OperatorRule("max_pool2d_with_indices adaptive_max_pool2d_with_indices", "input, ...", Trailing(2, pair=True)),
    OperatorRule("max_pool3d_with_indices adaptive_max_pool3d_with_indices", "input, ...", Trailing(3, pair=True)),
    OperatorRule("max_unpool1d", _UNPOOL, Trailing(1, ("input", "indices")), "input indices", sizes="output_size"),
    OperatorRule("max_unpool2d", _UNPOOL, Trailing(2, ("input", "indices")), "input indices", sizes="output_size"),
    OperatorRule("max_unpool3d", _UNPOOL, Trailing(3, ("input", "indices")), "input indices", sizes="output_size"),
    OperatorRule("pad", "input, pad, ...", elementwise.pad),
    OperatorRule("pixel_shuffle pixel_unshuffle", "input, ...", Trailing(3)),
    OperatorRule("tril triu", "input, diagonal=0", Trailing(2)),
    OperatorRule("pairwise_distance", "x1, x2, p=2.0, eps=1e-6, keepdim=False", elementwise.pairwise, operands="x1 x2"),
    OperatorRule("embedding", _EMBEDDING, elementwise.embedding),
    OperatorRule("one_hot", "input, num_classes=-1", elementwise.one_hot),
    # independent along dim 0
    OperatorRule("conv1d conv_transpose1d", "input, weight, ...", BatchFirst(3)),
    OperatorRule("conv2d conv_transpose2d", "input, weight, ...", BatchFirst(4)),
    OperatorRule("conv3d conv_transpose3d", "input, weight, ...", BatchFirst(5)),
    OperatorRule("unfold", "input, ...", BatchFirst(4, to=3)),
    OperatorRule("fold", "input, ...", BatchFirst(3, to=4)),
    OperatorRule("interpolate", "input, ...", BatchFirst(3)),
    OperatorRule("group_norm", "input, num_groups, ...", BatchFirst(2)),
    OperatorRule("local_response_norm", "input, ...", BatchFirst(3)),
    OperatorRule("channel_shuffle", "input, groups", BatchFirst(3)),
    OperatorRule("prelu", "input, weight", elementwise.prelu),
    OperatorRule("feature_alpha_dropout", "input, ...", BatchFirst(2)),
    OperatorRule("dropout1d", "input, ...", BatchFirst(3)),
    OperatorRule("dropout2d", "input, ...", BatchFirst(4)),
    OperatorRule("dropout3d", "input, ...", BatchFirst(5)),
    OperatorRule("batch_norm", _BATCH_NORM, modules.batch_norm),
    OperatorRule("instance_norm", _INSTANCE_NORM, modules.instance_norm),
    # products
    OperatorRule("matmul", "input, other", MatMul("input", "other"), operands="input other"),
    OperatorRule("mm bmm", "input, mat2", MatMul("input", "mat2"), operands="input mat2"),
    OperatorRule("mv", "input, vec", MatMul("input", "vec"), operands="input vec"),
    OperatorRule("addmm", "input, mat1, mat2, ...", MatMul("mat1", "mat2", "input"), operands="input mat1 mat2"),
    OperatorRule("addmv", "input, mat, vec, ...", MatMul("mat", "vec", "input"), operands="input mat vec"),
    OperatorRule(
        "baddbmm", "input, batch1, batch2, ...", MatMul("batch1", "batch2", "input"), operands="input batch1 batch2"
    ),
    OperatorRule("einsum", "equation, *operands", products.einsum, operands="operands"),
    OperatorRule("scaled_dot_product_attention", _ATTENTION, products.attention, operands="query key value attn_mask"),
    OperatorRule("change_value copied read_parameter", "*operands", elementwise.elementwise, operands="operands"),
    # inserted by online rules
    OperatorRule("cut_history", "input", elementwise.like_input),
    OperatorRule("update_trace", "*operands", elementwise.elementwise, operands="operands"),
    OperatorRule("ones_per_sample", "input", modules.sample_ones),
    OperatorRule("draw_dropout_mask", "how, input, name", elementwise.like_input),
    # modules
    OperatorRule(
        "nn.MultiheadAttention", _MULTIHEAD, modules.multihead_attention, "query key value key_padding_mask attn_mask"
    ),
    OperatorRule("nn.TransformerEncoder", _ENCODER, modules.encoder, "src src_mask mask src_key_padding_mask"),
    OperatorRule("nn.RNNCell", "input, hx=None", modules.cell, operands="input hx"),
    OperatorRule("nn.RNN", "input, hx=None", modules.recurrent, operands="input hx"),
    # shapes
    OperatorRule("transpose swapaxes swapdims", "input, dim0, dim1", shapes.transpose),
    OperatorRule("t", "input", shapes.reverse),
    OperatorRule("adjoint", "input", shapes.transpose_last),
    OperatorRule("permute", "input, *dims", shapes.permute),
    OperatorRule("movedim moveaxis", "input, source, destination", shapes.move_dims),
    OperatorRule("unsqueeze", "input, dim", shapes.unsqueeze),
    OperatorRule("squeeze", "input, dim=None", shapes.squeeze),
    OperatorRule("flatten ravel", "input, start_dim=0, end_dim=-1", shapes.flatten),
    OperatorRule("unflatten", "input, dim, sizes", shapes.unflatten, sizes="sizes"),
    OperatorRule("view reshape", "input, *shape", shapes.view, sizes="shape"),
    OperatorRule("view_as reshape_as", "input, other", shapes.view_as, operands="input other"),
    OperatorRule("expand broadcast_to", "input, *shape", shapes.expand, sizes="shape"),
    OperatorRule("expand_as", "*operands", elementwise.elementwise, operands="operands"),
    OperatorRule("repeat tile", "input, *repeats", shapes.repeat, sizes="repeats"),
    OperatorRule("repeat_interleave", "input, repeats, dim=None, ...", shapes.interleave),
    OperatorRule("getitem", "input, index", indexing.getitem, operands="input index"),
    OperatorRule("set_part", "input, index, value", indexing.set_part, operands="input index value"),
    # sizes, and tensors created from sizes
    OperatorRule("getattr", "input, name", indexing.attribute),
    OperatorRule("size", "input, dim=None", indexing.size),
    OperatorRule("numel nelement", "input", indexing.numel),
    OperatorRule("dim ndimension", "input", indexing.rank_of),
    OperatorRule("is_floating_point is_complex element_size get_device", "input, ...", indexing.python_value),
    OperatorRule("expect_size", "size, expected, where", modules.expect_size, operands="size"),
    OperatorRule("zeros ones empty", "*size, **options", indexing.create, sizes="size", shape_only=True),
    OperatorRule("full", "size, fill_value, ...", indexing.create, sizes="size", shape_only=True),
    OperatorRule("rand randn", "*size, **options", indexing.create, sizes="size"),
    OperatorRule(
        "new_zeros new_ones new_empty", "input, *size, **options", indexing.create, sizes="size", shape_only=True
    ),
    OperatorRule("new_full", "input, size, fill_value, ...", indexing.create, sizes="size", shape_only=True),
    OperatorRule(
        "arange linspace eye tensor scalar_tensor", "*values, **options", indexing.make_constant, "values options"
    ),
    # loops of whole calls
    OperatorRule("run_loop", "loop, steps, inputs, state", elements.loop, operands="inputs state", sizes="steps"),
    OperatorRule("read_elements", "x, dim, start, step, count", elements.read, operands="x", sizes="count"),
    OperatorRule("stack_elements", "parts, is_sequence, dim=0", elements.stack, operands="parts"),
    OperatorRule("concatenate_elements", "parts, is_sequence, dim=0", elements.concatenate, operands="parts"),
    OperatorRule("write_elements", "x, dim, start, step, values", elements.write, operands="x values"),
    # state
    OperatorRule("call_stateful", "module, state, *inputs, **options", modules.stateful, operands="state inputs"),
    OperatorRule("initial_value", "module, index, *inputs, **options", modules.initial_state, operands="inputs"),
    OperatorRule(
        "call_opaque opaque_initial_value", "*operands, **options", modules.opaque, operands="operands options"
    ),
)


_WITH_RULE = frozenset(name for row in _ROWS for name in row.names.split())

ELEMENTWISE_ROW = OperatorRule(
    " ".join(n for row in OPERATORS if row.elementwise for n in row.names.split() if n not in _WITH_RULE),
    "*operands, **options",
    elementwise.elementwise,
    operands="operands options",
)
"""The rule of all element-wise operations without a rule of their own."""

ROWS = (ELEMENTWISE_ROW, *_ROWS)

GIVEN: dict[str, Mapping[str, Any]] = {
    "Softmax2d": {"dim": -3},
    "Unflatten": {"sizes": "unflattened_size"},
    **{name: {"pad": "padding"} for name, operation in MODULES.items() if operation == "pad"},
}
"""Class of `torch.nn` -> argument of its row -> the attribute of another name (a str), or a fixed value.

All other arguments that a call does not pass are attributes of the module.
"""

ELEMENTWISE_RULES = frozenset(
    {elementwise.elementwise, elementwise.where, modules.autograd_function, modules.stateful, modules.initial_state}
)
"""Element-wise rules, which ignore undetermined operands (state slots in the first iteration)."""

DIFFERENT_SIGNATURES = frozenset({torch.batch_norm, torch.instance_norm, torch.embedding})
"""Functions of torch whose argument order differs from torch.nn.functional."""
