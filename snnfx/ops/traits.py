"""The table of operators: which operations are element-wise, views, linear, random, products, and so on.

All analyses, passes and lowerings read it. A torch function, a function of `torch.nn.functional`, a tensor method, an
operator of ATen and an operator of Python of one name are the same operation, and a module has the traits of the
function that it computes. The rows contain only traits that torch does not state: `snnfx.ops.operator_lookup` adds the
tags and alias annotations of ATen (`torch.Tag.pointwise`, `torch.Tag.nondeterministic_seeded`, `Tensor(a)`). An
operation without traits is not rewritten. Every trait is tested against torch (`tests/ops/test_traits.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["MODULES", "PYTHON_OPERATORS", "ROWS", "UNKNOWN", "OperatorTraits"]


@dataclass(frozen=True)
class OperatorTraits:
    """A row of the table: operations and their traits.

    Args:
        names: names of the operations, separated by spaces.
        elementwise: an element of the result depends only on the elements of the operands at its position, after
            broadcasting. Without a batch rule of its own, such an operation has the element-wise one.
        view: "view": the result shares memory with the first operand, if its layout permits; "maybe": it is the
            operand, a view of it or a new tensor, depending on the arguments.
        in_order: the elements of the result are elements of the operands, or 0, and keep their order.
        parts: the result is a tuple of parts that share no memory with each other.
        linear: "first": linear in the first operand, "each": in each operand if the others are fixed, "all": in all
            operands together.
        offset: an argument that adds a constant, so that the operation is affine.
        linear_without: an argument with which the operation is not linear.
        random: "always": draws random numbers; an argument or attribute: draws if it is true (`training`) or not 0.
        product: computes a matrix product, a convolution, or a look-up in a weight.
        weighted: arguments that may be the operand of a weight.
        mixes: an element of the result depends on elements at other positions, and the result is not a view.
        statistics: uses, in training, statistics of the batch, and updates running statistics.
        integers: the bound of the result for non-negative integers: "keeps" the bound of its operand, the "sum", the
            "product" or the "largest" of the bounds of its operands.
        any_layout: takes images in any memory format and returns them in the same format, as most element-wise
            operations do.
        own_layout: element-wise, but returns images in the memory format of its own.
        strided: depends on the strides of an operand, not only on its elements.
        selection: "reads" or "writes" the elements that a mask selects.
        pair: with its usual arguments, returns a tuple `(values, indices)`.
        binary: the operation that it computes with a tensor as second operand.
        joins: joins its operands, so that the result is larger than each of them.
        accumulates: applied again and again, collects values; their order changes at most the order of the elements.
        comparison: compares two operands.
        number: returns a Python number, or a property that is not a tensor.
        creates: creates a tensor from sizes and numbers.
        decomposition: a function that computes the same with operators of ATen, for kernels.
    """

    names: str
    elementwise: bool = False
    view: str = ""
    in_order: bool = False
    parts: bool = False
    linear: str = ""
    offset: str = ""
    linear_without: str = ""
    random: str = ""
    product: bool = False
    weighted: str = ""
    mixes: bool = False
    statistics: bool = False
    integers: str = ""
    any_layout: bool = False
    own_layout: bool = False
    strided: bool = False
    selection: str = ""
    pair: bool = False
    binary: str = ""
    joins: bool = False
    accumulates: bool = False
    comparison: bool = False
    number: bool = False
    creates: bool = False
    decomposition: Callable[..., Any] | None = None

    @property
    def keeps_layout(self) -> bool:
        """Whether the memory format of images does not matter to the operation."""
        return self.any_layout or (self.elementwise and not self.own_layout)


UNKNOWN = OperatorTraits("")

ROWS: tuple[OperatorTraits, ...] = (
    # element-wise operations that ATen does not tag, and further traits of those that it tags
    OperatorTraits(
        "arccos arccosh arcsin arcsinh arctan arctan2 arctanh clip expit floor_divide hardswish isclose isreal "
        "softsign tanhshrink where zeros_like ones_like full_like update_trace",
        elementwise=True,
    ),
    OperatorTraits("logsigmoid masked_fill", elementwise=True, own_layout=True),
    OperatorTraits("mvlgamma rrelu", own_layout=True),
    OperatorTraits("conj", elementwise=True, view="maybe"),
    OperatorTraits("conj_physical", view="maybe"),
    OperatorTraits(
        "eq ge greater greater_equal gt le less less_equal lt ne not_equal", elementwise=True, comparison=True
    ),
    OperatorTraits("abs absolute ceil floor relu relu6 trunc fix", elementwise=True, integers="keeps"),
    OperatorTraits("add", elementwise=True, linear="all", integers="sum", accumulates=True),
    OperatorTraits("sub subtract", elementwise=True, linear="all", accumulates=True),
    OperatorTraits("rsub", elementwise=True, linear="all"),
    OperatorTraits("mul multiply", elementwise=True, linear="each", integers="product", accumulates=True),
    OperatorTraits("div divide", elementwise=True, linear="first", linear_without="rounding_mode"),
    OperatorTraits("true_divide", elementwise=True, linear="first"),
    OperatorTraits("neg negative", elementwise=True, linear="first"),
    OperatorTraits("maximum minimum logical_and logical_or bitwise_and bitwise_or", elementwise=True, accumulates=True),
    OperatorTraits(
        "positive identity reduced_over_time",
        elementwise=True,
        linear="first",
        view="maybe",
        integers="keeps",
        in_order=True,
    ),
    OperatorTraits("clone", elementwise=True, linear="first", integers="keeps", in_order=True),
    OperatorTraits("contiguous", linear="first", view="maybe", integers="keeps", in_order=True),
    OperatorTraits("detach", elementwise=True, view="view", integers="keeps", in_order=True),
    OperatorTraits("bfloat16 bool double float half", elementwise=True, view="maybe"),
    OperatorTraits("to", view="maybe", in_order=True),
    OperatorTraits("byte cpu cuda int long short type type_as", view="maybe"),
    OperatorTraits("cut_history", elementwise=True, view="view"),
    OperatorTraits("prelu empty_like", any_layout=True),
    # random operations that ATen does not tag, or that draw numbers in training only
    OperatorTraits("dropout dropout2d", random="training", view="maybe", any_layout=True),
    OperatorTraits("dropout1d dropout3d alpha_dropout feature_alpha_dropout", random="training", view="maybe"),
    OperatorTraits("feature_dropout native_dropout", random="training"),
    OperatorTraits("draw_dropout_mask", random="always", any_layout=True),
    OperatorTraits("rand_like randn_like", any_layout=True),
    OperatorTraits("gumbel_softmax", random="always", mixes=True),
    OperatorTraits("multinomial", mixes=True),
    # tensors from sizes
    OperatorTraits("zeros ones empty full arange eye linspace rand randn randint randperm", creates=True),
    OperatorTraits("tensor scalar_tensor", creates=True),
    # reductions, and operations along a dimension
    OperatorTraits("sum mean", mixes=True, linear="first", any_layout=True),
    OperatorTraits("amax amin", mixes=True, any_layout=True),
    OperatorTraits(
        "all any argmax argmin argsort count_nonzero logsumexp nanmean nansum norm prod std var vector_norm cumsum "
        "cumprod logcumsumexp diff softmax log_softmax softmin glu normalize cosine_similarity pairwise_distance",
        mixes=True,
    ),
    OperatorTraits("max", mixes=True, pair=True, binary="maximum"),
    OperatorTraits("min", mixes=True, pair=True, binary="minimum"),
    OperatorTraits("sort topk median nanmedian mode kthvalue cummax cummin", mixes=True, pair=True),
    OperatorTraits("aminmax std_mean var_mean", mixes=True),
    # operations that move elements
    OperatorTraits("flip roll", mixes=True, linear="first", integers="keeps"),
    OperatorTraits("gather index_select scatter scatter_add take_along_dim", mixes=True),
    OperatorTraits("repeat tile repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle", mixes=True),
    OperatorTraits("pad", linear="first", offset="value"),
    OperatorTraits("tril triu", linear="first"),
    OperatorTraits(
        "cat concat concatenate",
        linear="all",
        integers="largest",
        in_order=True,
        joins=True,
        accumulates=True,
        any_layout=True,
    ),
    OperatorTraits("stack", linear="all", in_order=True, joins=True, accumulates=True),
    OperatorTraits("hstack vstack dstack row_stack column_stack", joins=True),
    OperatorTraits("set_part", accumulates=True),
    OperatorTraits("index masked_select masked_scatter_backward", selection="reads"),
    OperatorTraits("index_put _index_put_impl _unsafe_index_put masked_scatter", selection="writes"),
    # views
    OperatorTraits(
        "select narrow flatten unflatten squeeze unsqueeze view reshape expand",
        view="view",
        linear="first",
        integers="keeps",
        in_order=True,
    ),
    OperatorTraits("transpose permute movedim", view="view", linear="first", integers="keeps"),
    OperatorTraits("t swapaxes", view="view", linear="first", integers="keeps"),
    OperatorTraits("view_as expand_as", view="view", integers="keeps"),
    OperatorTraits("diagonal getattr", view="view"),
    OperatorTraits("getitem", view="view", linear="first"),
    OperatorTraits("chunk split", view="view", parts=True, linear="first", in_order=True),
    OperatorTraits("unbind", view="view", parts=True, linear="first", in_order=True),
    OperatorTraits("tensor_split", view="view", parts=True),
    OperatorTraits(
        "unfold_dim swapdims moveaxis ravel adjoint reshape_as broadcast_to real atleast_1d atleast_2d atleast_3d",
        view="maybe",
    ),
    # operators of ATen that implement other operations
    OperatorTraits("alias lift_fresh slice", view="view", linear="first", in_order=True),
    OperatorTraits("split_with_sizes", view="view", parts=True, linear="first"),
    OperatorTraits("_unsafe_view unsafe_split", view="view", linear="first", in_order=True),
    OperatorTraits("unsafe_chunk", view="view", linear="first"),
    OperatorTraits("lift", view="maybe", in_order=True),
    OperatorTraits("lift_fresh_copy", in_order=True),
    OperatorTraits(
        "_to_copy expand_copy view_copy squeeze_copy unsqueeze_copy select_backward slice_backward",
        linear="first",
        in_order=True,
    ),
    OperatorTraits("_weight_norm_interface_backward", linear="first"),
    OperatorTraits("_reshape_alias", view="view", linear="first", in_order=True, strided=True),
    OperatorTraits("as_strided as_strided_scatter resize set", strided=True),
    OperatorTraits("convolution convolution_backward", product=True, mixes=True),
    # products
    OperatorTraits("linear", product=True, mixes=True, linear="first", offset="bias", weighted="input"),
    OperatorTraits("conv1d conv3d", product=True, mixes=True, linear="first", offset="bias", weighted="input"),
    OperatorTraits(
        "conv_transpose1d conv_transpose3d", product=True, mixes=True, linear="first", offset="bias", weighted="input"
    ),
    OperatorTraits(
        "conv2d conv_transpose2d",
        product=True,
        mixes=True,
        linear="first",
        offset="bias",
        weighted="input",
        any_layout=True,
    ),
    OperatorTraits("matmul", product=True, mixes=True, linear="each", weighted="input other"),
    OperatorTraits("mm", product=True, mixes=True, linear="each", weighted="input mat2"),
    OperatorTraits("bmm mv dot outer tensordot", product=True, mixes=True, linear="each"),
    OperatorTraits("addmm addmv baddbmm bilinear einsum embedding", product=True, mixes=True),
    OperatorTraits("scaled_dot_product_attention", product=True, mixes=True, random="dropout_p"),
    OperatorTraits("nn.MultiheadAttention nn.RNN", product=True, mixes=True, random="dropout"),
    OperatorTraits("nn.TransformerEncoder nn.RNNCell", product=True, mixes=True),
    OperatorTraits("call_opaque call_stateful", product=True),
    # layers of images
    OperatorTraits("avg_pool1d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool3d", mixes=True, linear="first"),
    OperatorTraits("avg_pool2d adaptive_avg_pool2d", mixes=True, linear="first", any_layout=True),
    OperatorTraits("max_pool1d max_pool3d", mixes=True, integers="keeps"),
    OperatorTraits("max_pool2d", mixes=True, integers="keeps", any_layout=True),
    OperatorTraits("adaptive_max_pool1d adaptive_max_pool3d", mixes=True),
    OperatorTraits("adaptive_max_pool2d", mixes=True, any_layout=True),
    OperatorTraits("max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices", mixes=True, pair=True),
    OperatorTraits(
        "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices",
        mixes=True,
        pair=True,
    ),
    OperatorTraits("lp_pool1d lp_pool2d lp_pool3d max_unpool1d max_unpool2d max_unpool3d unfold fold", mixes=True),
    OperatorTraits("interpolate", mixes=True, any_layout=True),
    # normalisations
    OperatorTraits("batch_norm", mixes=True, statistics=True, any_layout=True),
    OperatorTraits("instance_norm", mixes=True, statistics=True),
    OperatorTraits("layer_norm rms_norm group_norm local_response_norm", mixes=True),
    # values that are not tensors
    OperatorTraits("item size numel nelement dim ndimension is_floating_point is_complex element_size", number=True),
    OperatorTraits("equal allclose", mixes=True, number=True),
)

MODULES: dict[str, str] = {
    **{name: name.lower() for name in "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity Mish".split()},
    **{name: name.lower() for name in "ReLU ReLU6 RReLU SELU Sigmoid SiLU Softplus Softshrink Softsign Tanh".split()},
    **{
        name: name.lower() for name in "Dropout Dropout1d Dropout2d Dropout3d Flatten Unflatten Linear Bilinear".split()
    },
    **{name: name.lower() for name in "PReLU GLU LogSigmoid Tanhshrink Threshold Unfold Fold Embedding".split()},
    "LeakyReLU": "leaky_relu",
    "AlphaDropout": "alpha_dropout",
    "FeatureAlphaDropout": "feature_alpha_dropout",
    "Softmax": "softmax",
    "LogSoftmax": "log_softmax",
    "Softmin": "softmin",
    "Softmax2d": "softmax",
    **{f"Conv{d}d": f"conv{d}d" for d in (1, 2, 3)},
    **{f"ConvTranspose{d}d": f"conv_transpose{d}d" for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": "batch_norm" for d in (1, 2, 3)},
    "SyncBatchNorm": "batch_norm",
    **{f"InstanceNorm{d}d": "instance_norm" for d in (1, 2, 3)},
    "LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "GroupNorm": "group_norm",
    "LocalResponseNorm": "local_response_norm",
    **{f"AvgPool{d}d": f"avg_pool{d}d" for d in (1, 2, 3)},
    **{f"LPPool{d}d": f"lp_pool{d}d" for d in (1, 2, 3)},
    **{f"AdaptiveAvgPool{d}d": f"adaptive_avg_pool{d}d" for d in (1, 2, 3)},
    **{f"MaxPool{d}d": f"max_pool{d}d" for d in (1, 2, 3)},
    **{f"AdaptiveMaxPool{d}d": f"adaptive_max_pool{d}d" for d in (1, 2, 3)},
    **{f"MaxUnpool{d}d": f"max_unpool{d}d" for d in (1, 2, 3)},
    **{f"{mode}Pad{d}d": "pad" for mode in ("Constant", "Circular", "Reflection", "Replication") for d in (1, 2, 3)},
    **{f"ZeroPad{d}d": "pad" for d in (1, 2, 3)},
    "Upsample": "interpolate",
    "UpsamplingNearest2d": "interpolate",
    "UpsamplingBilinear2d": "interpolate",
    "PixelShuffle": "pixel_shuffle",
    "PixelUnshuffle": "pixel_unshuffle",
    "ChannelShuffle": "channel_shuffle",
    "CosineSimilarity": "cosine_similarity",
    "PairwiseDistance": "pairwise_distance",
    "MultiheadAttention": "nn.MultiheadAttention",
    "TransformerEncoderLayer": "nn.TransformerEncoder",
    "TransformerEncoder": "nn.TransformerEncoder",
    **dict.fromkeys(("RNNCell", "GRUCell", "LSTMCell"), "nn.RNNCell"),
    **dict.fromkeys(("RNN", "GRU", "LSTM"), "nn.RNN"),
}
"""Class of `torch.nn` -> the operation that it computes."""

PYTHON_OPERATORS: dict[str, str] = {
    "floordiv": "floor_divide",
    "truediv": "true_divide",
    "mod": "remainder",
    "and_": "bitwise_and",
    "or_": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
    "pos": "positive",
    **{name: name for name in ("abs", "add", "sub", "mul", "pow", "neg", "matmul", "getitem")},
    **{name: name for name in ("lt", "le", "gt", "ge", "eq", "ne")},
}
"""Function of Python's operator module (and its in-place form, e.g. iadd) -> operation."""
