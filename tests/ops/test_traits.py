"""Each trait in the table of operators against torch: the operation runs on random tensors."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverloadPacket
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from snnfx.ops.operator_lookup import traits_of_class, traits_of_function, traits_of_name
from snnfx.ops.step_functions import reduced_over_time, set_part
from snnfx.ops.traits import MODULES, ROWS, OperatorTraits


@dataclass
class Case:
    """A call of an operation; its tensors are made anew for each run."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def traits(self) -> OperatorTraits:
        return traits_of_name(self.name)

    def tensors(self) -> list[Tensor]:
        return [t for t in pytree.tree_leaves(self.args) if isinstance(t, Tensor)]

    def floats(self) -> list[Tensor]:
        return [t for t in self.tensors() if t.is_floating_point()]

    def run(self, replaced: dict[int, Tensor] | None = None, **kwargs: Any) -> Any:
        """The result, with some of the tensors (by position) replaced, from the same random numbers at each call."""
        torch.manual_seed(0)
        return self.draw(replaced, **kwargs)

    def draw(self, replaced: dict[int, Tensor] | None = None, **kwargs: Any) -> Any:
        """The result, from the random numbers that follow."""
        leaves, spec = pytree.tree_flatten(self.args)
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for number, i in enumerate(positions):
            leaves[i] = (replaced or {}).get(number, leaves[i]).clone(memory_format=torch.preserve_format)
        self.given = [leaves[i] for i in positions]
        return self.function(*pytree.tree_unflatten(leaves, spec), **{**self.kwargs, **kwargs})

    def __repr__(self) -> str:
        return self.name


def results(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def values(*shape: int) -> Tensor:
    """Different numbers between 0.1 and 0.9, exact in float32."""
    generator = torch.Generator().manual_seed(sum(shape))
    count = torch.Size(shape).numel()
    return (0.1 + 0.8 * torch.randperm(count, generator=generator).double() / max(count, 1)).reshape(shape)


def integers(*shape: int) -> Tensor:
    return (values(*shape) * 9).long() + 1


def find(name: str) -> Callable[..., Any]:
    """The function or method of an operation."""
    if name == "unfold_dim":
        return Tensor.unfold
    for namespace, spelling in (
        (F, name),
        (torch, name),
        (torch.special, name.removeprefix("special_")),
        (torch.linalg, name),
        (Tensor, name),
    ):
        found = getattr(namespace, spelling, None)
        if callable(found):
            return found
    packet = getattr(torch.ops.aten, name, None)
    assert packet is not None, name
    return packet


def case(name: str, *args: Any, function: Callable[..., Any] | None = None, **kwargs: Any) -> Case:
    return Case(name, function or find(name), args, kwargs)


X, Y, IMAGE, SEQUENCE = values(3, 4), values(3, 4).flip(0).contiguous() * 0.9, values(2, 3, 6, 6), values(2, 3, 8)
MASK = X > 0.5
INTEGERS = integers(3, 4)
VOLUME = values(2, 3, 6, 6, 6)


def _split(names: str) -> list[str]:
    return names.split()


def _elementwise_cases() -> Iterator[Case]:
    binary = _split(
        "arctan2 atan2 copysign eq ne lt le gt ge greater greater_equal less less_equal not_equal add sub subtract "
        "rsub mul multiply div divide true_divide maximum minimum fmax fmin fmod remainder floor_divide hypot "
        "heaviside isclose logaddexp logaddexp2 nextafter pow float_power xlogy special_xlog1py special_zeta "
        "igamma igammac tanh_backward sigmoid_backward silu_backward gelu_backward clamp_min clamp_max"
    )
    integer = _split("bitwise_and bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift gcd lcm ldexp")
    for name in binary:
        yield case(name, X, Y)
    for name in integer:
        yield case(name, INTEGERS, INTEGERS.flip(1).contiguous())
    for name in _split("__lshift__ __rshift__ __xor__"):
        yield case(name, INTEGERS, INTEGERS.flip(1).contiguous(), function=getattr(torch.ops.aten, name))
    for name in _split("logical_and logical_or logical_xor"):
        yield case(name, MASK, MASK.flip(1).contiguous())
    yield case("bitwise_not", INTEGERS)
    yield case("polygamma", X, function=lambda x: torch.polygamma(1, x))
    yield case("addcmul", X, Y, Y)
    yield case("addcdiv", X, Y, Y)
    yield case("lerp", X, Y, Y)
    yield case("where", MASK, X, Y)
    yield case("masked_fill", X, MASK, 0.25)
    yield case("threshold", X, 0.5, 0.1)
    yield case("threshold_backward", X, Y, 0.5)
    yield case("logit_backward", X, Y)
    yield case("native_dropout_backward", X, MASK, 2.0)
    yield case("clamp", X, 0.3, 0.6)
    yield case("clip", X, 0.3, 0.6)
    yield case("full_like", X, 0.5)
    yield case("mvlgamma", X + 2, 2)
    yield case("isneginf", X)
    yield case("acosh", X + 1)
    yield case("arccosh", X + 1)
    yield case("rrelu", X - 0.5, training=True)
    yield case("identity", X, function=nn.Identity())
    yield case("reduced_over_time", X, function=reduced_over_time)
    for name in _split("chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w"):
        yield case(f"special_{name}", X, INTEGERS.double())
        yield case(f"special_shifted_{name}", X, INTEGERS.double())
    for name in _split("hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l legendre_polynomial_p"):
        yield case(f"special_{name}", X, INTEGERS.double())


def _pool_cases() -> Iterator[Case]:
    for d, x in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME)):
        yield case(f"avg_pool{d}d", x, 2)
        yield case(f"max_pool{d}d", x, 2)
        yield case(f"adaptive_avg_pool{d}d", x, 2)
        yield case(f"adaptive_max_pool{d}d", x, 2)
        yield case(f"max_pool{d}d_with_indices", x, 2, function=getattr(F, f"max_pool{d}d_with_indices"))
        pool = getattr(F, f"adaptive_max_pool{d}d_with_indices")
        yield case(f"adaptive_max_pool{d}d_with_indices", x, 2, function=pool)
        yield case(f"lp_pool{d}d", x, 2.0, 2)
        pooled, indices = getattr(F, f"max_pool{d}d")(x, 2, return_indices=True)
        yield case(f"max_unpool{d}d", pooled, indices, 2)
        weight, bias = values(3, 3, *(3,) * d), values(3)
        yield case(f"conv{d}d", x, weight)
        yield case(f"conv_transpose{d}d", x, weight)
        del bias


def _others() -> Iterator[Case]:
    for name in _split("sum mean amax amin all any argmax argmin nanmean nansum std var vector_norm logsumexp prod"):
        yield case(name, MASK if name in ("all", "any") else X, dim=1)
    for name in _split("argsort softmax log_softmax softmin cumsum cumprod logcumsumexp sort median nanmedian mode"):
        yield case(name, X, dim=1)
    for name in _split("cummax cummin max min glu"):
        yield case(name, X, dim=1)
    yield case("count_nonzero", MASK, dim=1)
    yield case("norm", X, dim=1)
    yield case("diff", X)
    yield case("normalize", X)
    yield case("cosine_similarity", X, Y)
    yield case("pairwise_distance", X, Y)
    yield case("topk", X, 2)
    yield case("kthvalue", X, 2)
    yield case("aminmax", X, dim=1)
    yield case("std_mean", X, dim=1)
    yield case("var_mean", X, dim=1)
    yield case("gumbel_softmax", X)
    yield case("multinomial", X, 2)
    yield case("flip", X, (0,))
    yield case("roll", X, 1, 0)
    yield case("gather", X, 1, INTEGERS % 4)
    yield case("take_along_dim", X, INTEGERS % 4, 1)
    yield case("index_select", X, 1, torch.tensor([2, 0, 1, 1]))
    yield case("scatter", X, 1, torch.tensor([[1], [0], [2]]), Y)
    yield case("scatter_add", X, 1, torch.tensor([[1], [0], [2]]), Y)
    yield case("repeat", X, 2, 1)
    yield case("tile", X, (2, 1))
    yield case("repeat_interleave", X, 2, dim=1)
    yield case("pixel_shuffle", values(2, 4, 3, 3), 2)
    yield case("pixel_unshuffle", IMAGE, 2)
    yield case("channel_shuffle", values(2, 4, 3, 3), 2)
    yield case("pad", X, (1, 1))
    yield case("tril", X)
    yield case("triu", X)
    for name in _split("cat concat concatenate stack hstack vstack dstack row_stack column_stack"):
        yield case(name, [X, Y])
    yield case("set_part", X, 1, Y[1], function=set_part)
    yield case("select", X, 0, 1)
    yield case("narrow", X, 0, 1, 2)
    yield case("flatten", X)
    yield case("unflatten", X, 1, (2, 2))
    yield case("squeeze", X[None])
    yield case("unsqueeze", X, 0)
    yield case("view", X, 4, 3)
    yield case("reshape", X, (4, 3))
    yield case("expand", X[None], 2, 3, 4)
    yield case("expand_as", X[None], values(2, 3, 4))
    yield case("view_as", X, Y)
    yield case("reshape_as", X, Y)
    yield case("broadcast_to", X, (2, 3, 4))
    for name in _split("transpose swapaxes swapdims"):
        yield case(name, X, 0, 1)
    yield case("permute", X, (1, 0))
    yield case("movedim", X, 0, 1)
    yield case("moveaxis", X, 0, 1)
    for name in _split("t adjoint ravel real conj atleast_1d atleast_2d atleast_3d diagonal detach contiguous clone"):
        yield case(name, X)
    for name in _split("bfloat16 bool double float half byte cpu int long short positive"):
        yield case(name, X)
    yield case("to", X, torch.float64)
    yield case("type", X, torch.float64)
    yield case("type_as", X, Y)
    yield case("getattr", X, "T", function=getattr)
    yield case("getitem", X, slice(1, 3), function=lambda x, index: x[index])
    yield case("unfold_dim", X, 1, 2, 1)
    yield case("chunk", X, 2, 1)
    yield case("split", X, 2, 1)
    yield case("tensor_split", X, 2, 1)
    yield case("unbind", X, 0)
    yield case("dropout", X)
    yield case("alpha_dropout", X, training=True)
    yield case("feature_alpha_dropout", IMAGE, training=True)
    yield case("feature_dropout", IMAGE, 0.5, True)
    yield case("native_dropout", X, 0.5, True)
    yield case("dropout1d", SEQUENCE)
    yield case("dropout2d", IMAGE)
    yield case("dropout3d", VOLUME)
    for name in _split("rand_like randn_like bernoulli poisson"):
        yield case(name, X)
    yield case("randint_like", X, 10)
    yield case("normal", X, Y)
    for name in _split("rand randn zeros ones empty"):
        yield case(name, 3, 4)
    yield case("randint", 10, (3, 4))
    yield case("randperm", 20)
    yield case("arange", 5)
    yield case("eye", 3)
    yield case("full", (3, 4), 0.5)
    yield case("tensor", [1.5, 2.0])
    yield case("scalar_tensor", 2)
    yield case("linspace", 0, 1, 4)
    yield case("empty_like", X)
    yield case("prelu", values(2, 3, 4, 4) - 0.5, values(3))
    yield case("linear", X, values(5, 4))
    yield case("matmul", X, values(4, 5))
    yield case("mm", X, values(4, 5))
    yield case("bmm", values(2, 3, 4), values(2, 4, 5))
    yield case("mv", X, values(4))
    yield case("dot", values(4), values(4).flip(0).contiguous())
    yield case("outer", values(4), values(3))
    yield case("tensordot", X, values(4, 5), 1)
    yield case("addmm", values(3, 5), X, values(4, 5))
    yield case("addmv", values(3), X, values(4))
    yield case("baddbmm", values(2, 3, 5), values(2, 3, 4), values(2, 4, 5))
    yield case("bilinear", X, values(3, 5), values(2, 4, 5))
    yield case("einsum", "ij,jk->ik", X, values(4, 5))
    yield case("embedding", torch.tensor([1, 2]), values(4, 3))
    attention = [values(2, 3, 4, 4), values(2, 3, 4, 4).flip(0), values(2, 3, 4, 4).flip(1)]
    yield case("scaled_dot_product_attention", *attention)
    yield case("unfold", IMAGE, 2)
    yield case("fold", values(2, 12, 9), (4, 4), 2)
    yield case("interpolate", IMAGE, scale_factor=2.0)
    yield case("batch_norm", IMAGE, torch.zeros(3).double(), torch.ones(3).double(), training=True)
    yield case("instance_norm", IMAGE, torch.zeros(3).double(), torch.ones(3).double())
    yield case("layer_norm", X, (4,))
    yield case("rms_norm", X, (4,))
    yield case("group_norm", IMAGE, 3)
    yield case("local_response_norm", IMAGE, 2)
    for name in _split("size numel nelement dim ndimension is_floating_point is_complex element_size"):
        yield case(name, X)
    yield case("item", X[0, 0])
    yield case("equal", X, Y)
    yield case("allclose", X, Y)


def _aten_cases() -> Iterator[Case]:
    aten = torch.ops.aten
    yield case("alias", X)
    yield case("lift_fresh", X)
    yield case("lift", X)
    yield case("lift_fresh_copy", X)
    yield case("slice", X, 0, 1, 3, function=aten.slice)
    yield case("split_with_sizes", X, [1, 3], 1)
    yield case("_unsafe_view", X, [4, 3])
    yield case("unsafe_split", X, 2, 1)
    yield case("unsafe_chunk", X, 2, 1)
    yield case("_to_copy", X, function=aten._to_copy)
    yield case("expand_copy", X[None], [2, 3, 4])
    yield case("view_copy", X, [4, 3])
    yield case("squeeze_copy", X[None])
    yield case("unsqueeze_copy", X, 0)
    yield case("select_backward", X, [3, 2, 4], 1, 0)
    yield case("slice_backward", X, [3, 8], 1, 2, 6, 1)
    yield case("_reshape_alias", X, [4, 3], [3, 1], function=aten._reshape_alias)
    yield case("as_strided", X, (4, 3), (1, 4))
    yield case("as_strided_scatter", X, X.t().contiguous(), (4, 3), (1, 4))
    yield case("resize", X, 2, 4, function=lambda x, *size: x.resize_(*size))
    yield case("set", X, function=lambda x: x.set_(x.untyped_storage(), 0, (3, 4), (4, 1)))
    yield case("convolution", IMAGE, values(3, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    grad = F.conv2d(IMAGE, values(3, 3, 3, 3))
    sizes = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False])
    yield case("convolution_backward", grad, IMAGE, values(3, 3, 3, 3), None, *sizes)
    v, g = values(4, 3), values(4, 1)
    saved = aten._weight_norm_interface(v, g, 0)[1]
    yield case("_weight_norm_interface_backward", v.flip(0), v, g, saved, 0)
    yield case("index", X, [MASK], function=aten.index)
    yield case("masked_select", X, MASK)
    yield case("masked_scatter_backward", X, MASK, [int(MASK.sum())], function=aten.masked_scatter_backward)
    for name in ("index_put", "_unsafe_index_put"):
        yield case(name, X, [MASK], Y[0, 0], function=getattr(aten, name))
    yield case("_index_put_impl", X, [MASK], Y[0, 0], function=aten._index_put_impl_)
    yield case("masked_scatter", X, MASK, Y)


def _unary_cases(given: set[str]) -> Iterator[Case]:
    """A case of one operand for each further operation of torch that ATen tags as element-wise."""
    names = {n for namespace in (torch, F, torch.special) for n in dir(namespace) if not n.endswith("_")}
    prefixed = {f"special_{n}" for n in dir(torch.special)}
    for name in sorted((names | prefixed | {n for r in ROWS for n in r.names.split()}) - given):
        packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
        row = any(name in r.names.split() and r.elementwise for r in ROWS)
        if row or (isinstance(packet, OpOverloadPacket) and traits_of_name(name).elementwise):
            yield case(name, X)


_GIVEN = [*_elementwise_cases(), *_pool_cases(), *_others(), *_aten_cases()]
CASES = [*_GIVEN, *_unary_cases({c.name for c in _GIVEN} | {"cut_history", "update_trace"})]

OF_MODULES = {"nn.MultiheadAttention", "nn.RNN", "nn.TransformerEncoder", "nn.RNNCell"}
ON_GPU = {"cuda"}
OF_SNNFX = {"call_opaque", "call_stateful", "draw_dropout_mask", "cut_history", "update_trace"}
"""Operations that are tested with the modules, or where snnfx defines them."""


def having(trait: str, value: Any = None) -> Any:
    """Parametrize over the cases with a trait (of a value)."""
    found = [c for c in CASES if (getattr(c.traits, trait) if value is None else getattr(c.traits, trait) == value)]
    assert found
    return pytest.mark.parametrize("case", found, ids=repr)


def test_each_operation_has_one_row_and_a_case() -> None:
    names = [name for row in ROWS for name in row.names.split()]
    assert len(names) == len(set(names))
    assert set(names) - {c.name for c in CASES} == OF_MODULES | OF_SNNFX | ON_GPU


# --- claims


@having("elementwise")
def test_elementwise_depends_on_one_position_in_the_same_way_everywhere(case: Case) -> None:
    before = case.run()
    assert isinstance(before, Tensor)
    operands = case.tensors()
    changed = {}
    for number, operand in enumerate(operands):
        assert operand.shape == before.shape
        changed[number] = operand.clone()
        other = ~operand[1, 2] if operand.dtype == torch.bool else operand[1, 2] + 1
        changed[number][1, 2] = other
    after = case.run(changed)
    differs = ~torch.isclose(after.double(), before.double(), rtol=0, atol=0, equal_nan=True)
    differs[1, 2] = False
    assert not differs.any()
    if not case.traits.random:
        order = torch.randperm(before.numel())
        permuted = case.run({i: t.flatten()[order].reshape(t.shape) for i, t in enumerate(operands)})
        torch.testing.assert_close(permuted.flatten(), before.flatten()[order], rtol=0, atol=0, equal_nan=True)


@having("view", "view")
def test_view_shares_memory_with_its_first_operand(case: Case) -> None:
    result = case.run()
    assert all(shares(r, case.given[0]) for r in results(result))


@pytest.mark.parametrize("case", [c for c in CASES if not c.traits.view and c.tensors()], ids=repr)
def test_other_operations_return_new_memory(case: Case) -> None:
    if case.traits.strided or case.name == "_index_put_impl":
        pytest.skip("writes in place")
    result = case.run()
    assert not any(shares(r, t) for r in results(result) for t in case.given)


def shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@having("in_order")
def test_in_order_moves_the_elements_without_changing_their_order(case: Case) -> None:
    result = results(case.run())
    elements = {0.0, *(float(v) for t in case.floats() for v in t.flatten())}
    assert {float(v) for r in result for v in r.flatten()} <= elements
    if len(result) == 1 and len(case.floats()) == 1 and result[0].numel() == case.floats()[0].numel():
        assert torch.equal(result[0].flatten(), case.floats()[0].flatten())


@having("parts")
def test_parts_share_no_memory_with_each_other(case: Case) -> None:
    first, *others = case.run()
    first.fill_(7)
    assert others
    assert not any((o == 7).any() for o in others)


def combined(case: Case, positions: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The result for `2 x - 3 y` at some operands, and `2 f(x) - 3 f(y)`."""
    tensors = case.tensors()
    x = {i: tensors[i] for i in positions}
    y = {i: torch.flip(tensors[i], (-1,)) + 0.25 for i in positions}
    fx, fy = results(case.run(x)), results(case.run(y))
    both = results(case.run({i: 2 * x[i] - 3 * y[i] for i in positions}))
    return both, [2 * a - 3 * b for a, b in zip(fx, fy, strict=True)]


def is_linear(case: Case, positions: list[int]) -> bool:
    return all(torch.allclose(a, b) for a, b in zip(*combined(case, positions), strict=True))


@having("linear")
def test_linear_keeps_sums_of_operands(case: Case) -> None:
    positions = [i for i, t in enumerate(case.tensors()) if t.is_floating_point()]
    kind = case.traits.linear
    if kind == "each":
        assert all(is_linear(case, [i]) for i in positions)
    else:
        assert is_linear(case, positions if kind == "all" else positions[:1])


@having("offset")
def test_offset_adds_a_constant(case: Case) -> None:
    plain = case.run()
    constant = 0.5 if case.name == "pad" else values(plain.shape[1]) + 1
    with_offset = functools.partial(case.run, **{case.traits.offset: constant})
    assert not torch.allclose(with_offset(), plain)
    x = case.tensors()[0]
    zero = with_offset({0: torch.zeros_like(x)})
    torch.testing.assert_close(with_offset({0: 2 * x}) - zero, 2 * (with_offset() - zero))


@having("linear_without")
def test_linear_without_names_an_argument_that_breaks_linearity(case: Case) -> None:
    broken = Case(case.name, case.function, case.args, {case.traits.linear_without: "floor"})
    assert not is_linear(broken, [0])


def draws(run: Callable[[], Any]) -> bool:
    """Whether a call draws random numbers."""
    before = torch.get_rng_state()
    run()
    return not torch.equal(torch.get_rng_state(), before)


@having("random", "always")
def test_random_draws_numbers(case: Case) -> None:
    torch.manual_seed(0)
    a, b = (results(case.draw()) for _ in range(2))
    assert not all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("case", [c for c in CASES if not c.traits.random], ids=repr)
def test_other_operations_draw_no_numbers(case: Case) -> None:
    case.run()
    assert not draws(case.draw)


@having("random", "training")
def test_dropout_draws_numbers_in_training_only(case: Case) -> None:
    operand = case.args[0]
    assert draws(lambda: case.function(operand, 0.5, True))
    assert not draws(lambda: case.function(operand, 0.5, False))


def test_attention_draws_numbers_with_dropout_only() -> None:
    (attention,) = [c for c in CASES if c.traits.random == "dropout_p"]
    assert not draws(lambda: attention.function(*attention.args))
    assert draws(lambda: attention.function(*attention.args, dropout_p=0.5))


def flops(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@having("product")
def test_product_computes_products(case: Case) -> None:
    position = len(case.tensors()) - 1
    x = case.tensors()[position]
    y = x.flip(0) + 0.25
    at_x, at_y, between = (case.run({position: v}) for v in (x, y, 2 * x - y))
    assert flops(case.run) or torch.allclose(between, 2 * at_x - at_y)


@pytest.mark.parametrize("case", [c for c in CASES if not c.traits.product and c.tensors()], ids=repr)
def test_other_operations_compute_no_products(case: Case) -> None:
    assert not flops(case.run)


@having("weighted")
def test_weighted_arguments_exist(case: Case) -> None:
    assert len(case.traits.weighted.split()) in (1, 2)
    rest = case.tensors()[len(case.traits.weighted.split()) :]
    assert is_linear(case, [0])
    assert len(case.traits.weighted.split()) == 1 or not rest


@having("mixes")
def test_mixing_results_depend_on_other_positions(case: Case) -> None:
    before = case.run()
    for number, operand in enumerate(case.tensors()):
        for flat in range(0, operand.numel(), max(1, operand.numel() // 16)):
            if not (operand.is_floating_point() or operand.dtype == torch.bool):
                continue
            place = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), operand.shape))
            changed = operand.clone()
            changed[place] = ~changed[place] if operand.dtype == torch.bool else 1.375 - changed[place]
            if _changes_elsewhere(before, case.run({number: changed}), operand.shape, place):
                return
    pytest.fail("each element depends on its own position only")


def _changes_elsewhere(before: Any, after: Any, shape: torch.Size, place: tuple[int, ...]) -> bool:
    if not results(before):
        return before != after or before is False
    for a, b in zip(results(before), results(after), strict=True):
        differs = a != b
        if a.shape == shape:
            differs[place] = False
        if differs.any():
            return True
    return False


def test_statistics_are_those_of_the_batch() -> None:
    for name in (c.name for c in CASES if c.traits.statistics):
        function = getattr(F, name)
        mean = torch.zeros(3).double()
        before = function(IMAGE, mean, torch.ones(3).double(), **({"training": True} if name == "batch_norm" else {}))
        assert mean.any(), "updates running statistics"
        assert before.mean().abs() < 1e-6


@having("integers")
def test_integers_stay_below_the_bound(case: Case) -> None:
    counts = {i: (t * 9).round() + i for i, t in enumerate(case.tensors()) if t.is_floating_point()}
    bounds = [float(t.max()) for t in counts.values()]
    limit = {
        "keeps": bounds[0],
        "sum": sum(bounds),
        "product": functools.reduce(lambda a, b: a * b, bounds),
        "largest": max(bounds),
    }
    for result in results(case.run(counts)):
        assert torch.equal(result, result.round())
        assert result.min() >= 0
        assert result.max() <= limit[case.traits.integers]


@pytest.mark.parametrize("case", [c for c in CASES if c.traits.keeps_layout], ids=repr)
def test_operations_of_any_layout_keep_the_memory_format(case: Case) -> None:
    image = {}
    for number, tensor in enumerate(case.tensors()):
        if tensor.shape == X.shape:
            image[number] = tensor.reshape(1, 2, 3, 2).repeat(2, 1, 1, 1).to(memory_format=torch.channels_last)
        elif tensor.dim() == 4:
            image[number] = tensor.to(memory_format=torch.channels_last)
    if case.kwargs.get("dim") == 1:
        case = Case(case.name, case.function, case.args, {"dim": (2, 3), "keepdim": True})
    for result in results(case.run(image)):
        if result.dim() == 4 and case.traits.view != "maybe":
            assert result.is_contiguous(memory_format=torch.channels_last)
    if not case.traits.random and case.name != "empty_like":
        plain = {i: t.contiguous() for i, t in image.items()}
        for a, b in zip(results(case.run(image)), results(case.run(plain)), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


@having("strided")
def test_strided_operations_depend_on_the_memory_of_the_operand(case: Case) -> None:
    in_order = case.run()
    operand = case.tensors()[0]
    assert not torch.equal(case.run({0: operand.t().contiguous().t()}), in_order)


@having("selection", "reads")
def test_selections_read_what_the_mask_selects(case: Case) -> None:
    result = case.run()
    assert torch.equal(result, X[MASK])


@having("selection", "writes")
def test_selections_write_what_the_mask_selects(case: Case) -> None:
    result = case.run()
    assert torch.equal(result[~MASK], X[~MASK])
    assert not torch.equal(result, X)


@having("pair")
def test_pairs_are_values_and_indices(case: Case) -> None:
    found, indices = case.run()
    assert found.is_floating_point()
    assert indices.dtype == torch.int64


@having("binary")
def test_binary_form_is_the_named_operation(case: Case) -> None:
    assert torch.equal(case.function(X, Y), getattr(torch, case.traits.binary)(X, Y))


@having("joins")
def test_joins_have_all_elements(case: Case) -> None:
    result = case.run()
    assert sorted(result.flatten().tolist()) == sorted([*X.flatten().tolist(), *Y.flatten().tolist()])


@having("accumulates")
def test_accumulations_may_take_their_values_in_any_order(case: Case) -> None:
    a, b = (MASK, MASK.flip(0)) if case.name.startswith("logical") else (X, Y)
    if case.name.startswith("bitwise"):
        a, b = INTEGERS, INTEGERS.flip(0)
    start = torch.ones_like(a)
    if case.name == "set_part":
        together, exchanged = (set_part(set_part(start, i, a[i]), j, a[j]) for i, j in ((0, 1), (1, 0)))
    elif case.name == "stack":
        together, exchanged = (
            case.function([torch.stack([start, p]), torch.stack([q, q])]) for p, q in ((a, b), (b, a))
        )
        assert together.numel() == exchanged.numel()
        return
    elif case.traits.joins:
        together, exchanged = (case.function([case.function([start, p]), q]) for p, q in ((a, b), (b, a)))
    else:
        together, exchanged = (case.function(case.function(start, p), q) for p, q in ((a, b), (b, a)))
    first, second = together.flatten().sort().values, exchanged.flatten().sort().values
    assert torch.allclose(first.double(), second.double())


@having("comparison")
def test_comparisons_return_masks(case: Case) -> None:
    assert case.run().dtype == torch.bool


@having("number")
def test_numbers_are_no_tensors(case: Case) -> None:
    assert not isinstance(case.run(), Tensor)


@having("creates")
def test_creation_takes_no_tensors(case: Case) -> None:
    assert not case.tensors()
    assert isinstance(case.run(), Tensor)


# --- modules


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_traits_of_their_function(name: str) -> None:
    cls = getattr(nn, name)
    assert traits_of_class(cls) == traits_of_name(MODULES[name])
    assert traits_of_class(type("Own", (cls,), {})).names == "", "its forward may differ"


@pytest.mark.parametrize("cls", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_draw_numbers_with_dropout_only(cls: type) -> None:
    x = values(3, 2, 4).float()
    assert not draws_of(cls(4, 4, num_layers=2), x)
    assert draws_of(cls(4, 4, num_layers=2, dropout=0.5), x)


def draws_of(module: nn.Module, x: Tensor) -> bool:
    return draws(lambda: module(x))


def test_multihead_attention_draws_numbers_with_dropout_only() -> None:
    x = values(2, 3, 4).float()
    for dropout in (0.0, 0.5):
        layer = nn.MultiheadAttention(4, 2, dropout=dropout)
        assert draws(lambda layer=layer: layer(x, x, x)) == bool(dropout)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell", "RNN", "GRU", "TransformerEncoderLayer"])
def test_layers_with_products_compute_them(name: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2) if name.startswith("T") else getattr(nn, name)(4, 4)
    x = values(2, 4).float() if name.endswith("Cell") else values(3, 2, 4).float()
    assert traits_of_class(type(layer)).product
    assert flops(lambda: layer(x))


# --- look-up


def test_spellings_of_one_operation_have_its_traits() -> None:
    sums = (torch.add, operator.add, operator.iadd, torch.ops.aten.add, torch.ops.aten.add.Tensor)
    assert {traits_of_function(f).linear for f in sums} == {"all"}
    assert traits_of_function(F.relu_).elementwise
    assert traits_of_function(torch.special.entr).elementwise, "only ATen states it"
    assert traits_of_function(torch.ops.aten.add_.Tensor).linear == "", "it writes its operand"


def test_functions_of_users_have_no_traits() -> None:
    def relu(x: Tensor) -> Tensor:
        return x.softmax(0)

    assert not traits_of_function(relu).elementwise
