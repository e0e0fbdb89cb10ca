"""The table of batch rules against torch: what it lets through folds exactly, what does not fold it refuses."""

from __future__ import annotations

import json
import operator
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from snnfx import MemoryModule
from snnfx.analysis.batch.equivariance import BatchAnalysis, Fact, SizeFact, infer_batch, model_input
from snnfx.analysis.batch.facts import UNKNOWN, Rank, ShapeFact, UniformTuple, leaves
from snnfx.analysis.batch.rule_lookup import find_rule, row_names
from snnfx.ops.step_functions import (
    FunctionHolder,
    apply_autograd_function,
    expect_size,
    reduced_over_time,
    set_part,
)
from snnfx.ops.traits import MODULES
from snnfx.state import leaf_modules as leaves_module
from snnfx.state.leaf_modules import declare_leaf
from snnfx.state.step_calls import call_stateful, initial_value

T = 3
BATCHES = (2, 3)
N = "N"

# --- tracing and analysing a small program


@dataclass
class Case:
    """A step `fn(self, x, ...)`, the shapes of its inputs (with "N" for the batch size), and the parts it uses."""

    name: str
    fn: Callable[..., Any]
    shapes: Sequence[Sequence[Any]]
    parts: dict[str, Any] = field(default_factory=dict)
    kind: str = "float"
    training: bool = False
    batch_norm: str = "fold"
    invariant: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        root = type("Step", (nn.Module,), {"forward": self.fn})()
        for name, part in self.parts.items():
            part = (
                part.double()
                if isinstance(part, nn.Module) or (isinstance(part, Tensor) and part.is_floating_point())
                else part
            )
            if isinstance(part, Tensor):
                root.register_buffer(name, part)
            else:
                setattr(root, name, part)
        self.root = root.train(self.training)
        self.graph = _Tracer().trace(root)
        self.placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]

    def resolve(self, target: str) -> Any:
        found: Any = self.root
        for atom in target.split("."):
            found = getattr(found, atom)
        return found

    def inputs(self, n: int) -> list[list[Tensor]]:
        """The inputs of T steps for a batch of n samples."""
        generator = torch.Generator().manual_seed(n)
        steps = [
            [_random([n if d == N else d for d in shape], self.kind, generator) for shape in self.shapes]
            for _ in range(T)
        ]
        for i in self.invariant:
            for step in steps:
                step[i] = steps[0][i]
        return steps

    def analyse(self, ranks: str) -> BatchAnalysis:
        """`ranks`: "known" (of the inputs), "symbolic", or "values" (an example at each node)."""
        for node in self.graph.nodes:
            node.meta.pop("val", None)
        values = self.run_step(self.inputs(2)[0])
        if ranks == "values":
            for node, value in values.items():
                node.meta["val"] = value
        facts = {node: model_input(node) for node in self.placeholders}
        if ranks == "known":
            facts = {
                node: Fact(Rank(len(shape)), 0, N) if shape else Fact(Rank(0), varying=True)
                for node, shape in zip(self.placeholders, self.shapes, strict=True)
            }
        return infer_batch(
            self.graph,
            self.resolve,
            facts,
            carried={},
            varying=self.varying(),
            training=self.training,
            batch_norm=self.batch_norm,  # type: ignore[arg-type]
        )

    def varying(self) -> set[fx.Node]:
        found = {node for i, node in enumerate(self.placeholders) if i not in self.invariant}
        for node in self.graph.nodes:
            if found.intersection(node.all_input_nodes) or self.is_random(node):
                found.add(node)
        return found

    def is_random(self, node: fx.Node) -> bool:
        row = find_rule(node, self.resolve) if node.op.startswith("call") else None
        return row is not None and row.draws

    def run_step(self, inputs: Sequence[Tensor]) -> dict[fx.Node, Any]:
        """The value of every node in one step."""
        values: dict[fx.Node, Any] = dict(zip(self.placeholders, inputs, strict=True))
        for node in self.graph.nodes:
            if node.op != "placeholder" and node.op != "output":
                values[node] = self.run_node(node, values)
        return values

    def run_node(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "get_attr":
            return self.resolve(str(node.target))
        if node.op == "call_module":
            return self.resolve(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return not isinstance(m, nn.Sequential)


def _random(shape: Sequence[int], kind: str, generator: torch.Generator) -> Tensor:
    if kind == "int":
        return torch.randint(0, 4, tuple(shape), generator=generator)
    if kind == "bool":
        return torch.rand(tuple(shape), generator=generator) < 0.5
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


# --- the probe: one run on all steps against the steps one by one


def probe(case: Case, analysis: BatchAnalysis) -> int:
    """Fold every node that was not refused and compare it with its steps; check every fact. Gives the number folded."""
    folded = 0
    for n in BATCHES:
        steps = [case.run_step(inputs) for inputs in case.inputs(n)]
        sizes = {N: n}
        for node in case.graph.nodes:
            if node.op == "output":
                continue
            fact = analysis.facts[node]
            for step in steps:
                check_fact(case, fact, step[node], sizes, node)
            if node.op.startswith("call") and node not in analysis.refusals:
                check_fold(case, analysis, node, steps)
                folded += 1
    return folded


def check_fact(case: Case, fact: Any, value: Any, sizes: dict[str, int], node: fx.Node) -> None:
    if isinstance(fact, UniformTuple):
        for element in value:
            check_fact(case, fact[0], element, sizes, node)
    elif isinstance(fact, tuple):
        assert len(fact) == len(value), node
        for f, v in zip(fact, value, strict=True):
            check_fact(case, f, v, sizes, node)
    elif isinstance(fact, SizeFact):
        if fact.value is not None:
            assert value == fact.value, node
        if fact.symbol is not None:
            assert sizes.setdefault(fact.symbol, value) == value, (node, fact, value)
    elif isinstance(fact, Fact):
        assert isinstance(value, Tensor), node
        rank = fact.rank.known
        if fact.rank.base in {p.name for p in case.placeholders}:
            place = [p.name for p in case.placeholders].index(fact.rank.base)
            rank = len(case.shapes[place]) + fact.rank.offset
        assert rank in (None, value.dim()) or fact.rank.base, (node, fact, value.shape)
        if rank is not None:
            assert rank == value.dim(), (node, fact, value.shape)
        if fact.dim is not None:
            assert fact.dim < value.dim(), (node, fact, value.shape)
            size = value.shape[fact.dim]
            # Behind a node that is stepped, only the number of dimensions is known.
            is_new = fact.size == f"size of {node.name}"
            assert is_new or sizes.setdefault(str(fact.size), size) == size, (node, fact, value.shape)
        for known, size in zip(fact.known, value.shape, strict=False):
            assert known in (None, size), (node, fact, value.shape)


def fold(fact: Any, values: list[Any]) -> Any:
    """The value that a folded region has for the values of T steps."""
    if isinstance(fact, UniformTuple):
        fact = (fact[0],) * len(values[0])
    if isinstance(fact, tuple):
        elements = [fold(f, [v[i] for v in values]) for i, f in enumerate(fact)]
        if isinstance(values[0], torch.Size):
            return torch.Size(elements)
        return tuple(elements)
    if isinstance(fact, Fact) and fact.dim is not None:
        return torch.cat(values, fact.dim)
    if isinstance(fact, SizeFact) and fact.symbol is not None:
        return sum(values)
    if isinstance(fact, ShapeFact):
        shape = list(values[0])
        if fact.of.dim is not None:
            shape[fact.of.dim] *= T
        return torch.Size(shape)
    assert fact is not UNKNOWN
    return values[0]


def check_fold(case: Case, analysis: BatchAnalysis, node: fx.Node, steps: list[dict[fx.Node, Any]]) -> None:
    if node.target is operator.getitem and isinstance(steps[0][node.args[0]], tuple):
        return  # an element goes where its tuple goes
    operands = {}
    for operand in node.all_input_nodes:
        fact = analysis.facts[operand]
        assert not any(leaf is UNKNOWN for leaf in leaves([fact])), (node, operand)
        changing = any(isinstance(leaf, Fact) and leaf.varying and not leaf.batched for leaf in leaves([fact]))
        assert not changing, f"{node} was let through with an operand that varies but has no batch"
        operands[operand] = fold(fact, [step[operand] for step in steps])
    expected = fold(analysis.facts[node], [step[node] for step in steps])
    result = case.run_node(node, operands)
    compare(result, expected, exact=not (case.is_random(node) or "empty" in str(node.target)), what=(case.name, node))


def compare(result: Any, expected: Any, exact: bool, what: Any) -> None:
    if isinstance(expected, tuple | list):
        assert len(result) == len(expected), what
        for r, e in zip(result, expected, strict=True):
            compare(r, e, exact, what)
    elif isinstance(expected, Tensor):
        assert result.shape == expected.shape, (what, result.shape, expected.shape)
        if exact:
            torch.testing.assert_close(result, expected, equal_nan=True, msg=lambda m: f"{what}: {m}")
    else:
        assert result == expected, what


# --- legal uses of every row

X2, X3, X4, X5 = (N, 4), (N, 4, 5), (N, 4, 6, 6), (N, 4, 6, 6, 6)

UNARY = (
    "abs absolute acos acosh angle arccos arccosh arcsin arcsinh arctan arctanh asin asinh atan atanh ceil celu "
    "conj cos cosh deg2rad digamma elu erf erfc erfinv exp exp2 expit expm1 fix floor frac gelu hardshrink hardsigmoid "
    "hardswish hardtanh i0 isfinite isinf isnan isneginf isposinf isreal leaky_relu lgamma log log10 log1p log2 "
    "logical_not logit logsigmoid mish nan_to_num neg negative positive rad2deg reciprocal relu relu6 round rsqrt selu "
    "sgn sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign sqrt square tan tanh tanhshrink trunc "
    "clone detach zeros_like ones_like empty_like rand_like randn_like bernoulli poisson dropout alpha_dropout rrelu"
).split()
BINARY = (
    "add arctan2 atan2 clamp clamp_max clamp_min clip copysign div divide eq float_power floor_divide fmax fmin fmod "
    "ge greater greater_equal gt heaviside hypot isclose ldexp le less less_equal logaddexp logaddexp2 logical_and "
    "logical_or logical_xor lt maximum minimum mul multiply ne nextafter not_equal pow remainder rsub sub subtract "
    "true_divide xlogy normal"
).split()
INTEGER_BINARY = "bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor".split()


def function_named(name: str) -> Callable[..., Any]:
    for namespace in (F, torch, torch.special, torch.linalg):
        if callable(getattr(namespace, name, None)):
            return getattr(namespace, name)  # type: ignore[no-any-return]
    raise AttributeError(name)


def unary(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """A step that applies `f` to its input."""
    return lambda self, x: f(x, *args, **kwargs)


def binary(f: Callable[..., Any]) -> Callable[..., Any]:
    """A step that applies `f` to its two inputs."""
    return lambda self, x, y: f(x, y)


def method(name: str, *args: Any) -> Callable[..., Any]:
    """A step that calls a method of its input."""
    return lambda self, x: getattr(x, name)(*args)


def joining(f: Callable[..., Any]) -> Callable[..., Any]:
    """A step that joins its two inputs along dimension 1."""
    return lambda self, x, y: f([x, y], 1)


def weighted(f: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """A step that applies `f` with the weight `w` of the model."""
    return lambda self, x: f(x, self.w, **kwargs)


def asking(name: str) -> Callable[..., Any]:
    """A step that asks a tensor something and goes on."""
    return lambda self, x: (getattr(x, name)(), x.relu())[1]


def there_and_back(pool: Callable[..., Any], unpool: Callable[..., Any]) -> Callable[..., Any]:
    """A step that pools with indices and puts the values back."""

    def step(self: Any, x: Any) -> Any:
        pair = pool(x, 2, return_indices=True)
        return unpool(pair[0], pair[1], 2)

    return step


def pair_of(x: Any) -> tuple[Any, Any]:
    """The two elements of a recorded pair."""
    return x[0], x[1]


def record(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Put a call into the graph that torch.fx cannot see by itself, because no argument is a tensor."""
    proxies = [leaf for leaf in leaves([list(args), kwargs]) if isinstance(leaf, fx.Proxy)]
    return proxies[0].tracer.create_proxy("call_function", f, args, kwargs)


def elementwise_cases() -> Iterator[Case]:
    for name in UNARY:
        f = function_named(name)
        yield Case(name, unary(f), [X3])
    for name in BINARY:
        f = function_named(name)
        yield Case(name, binary(f), [X3, X3])
    for name in INTEGER_BINARY:
        f = function_named(name)
        yield Case(name, binary(f), [X3, X3], kind="int")
    for name in ("cpu", "contiguous", "bool", "byte", "double", "float", "half", "bfloat16", "int", "long", "short"):
        yield Case(name, method(name), [X3])


W = {"w": torch.randn(5, 7), "b": torch.randn(7)}


def legal_cases() -> Iterator[Case]:
    yield from elementwise_cases()
    yield Case("operators", lambda self, x, y: (-x + 2 * y - x / 3) ** 2 % 0.7 // 0.1 + abs(+x), [X3, X3])
    yield Case(
        "comparisons", lambda self, x, y: ((x < y) & (x <= 0.5) | (x > 0.2) ^ (x >= y)) & ~(x == y) | (x != y), [X3, X3]
    )
    yield Case("shifts", lambda self, x, y: (x << y) >> 1, [X3, X3], kind="int")
    yield Case("in-place operators", lambda self, x: operator.iadd(x * 1, 1), [X3])
    yield Case(
        "broadcast parameter", lambda self, x: x * self.w + self.b, [X3], {"w": torch.randn(4, 5), "b": torch.randn(5)}
    )
    yield Case("parameter of size 1 on the batch", lambda self, x: x + self.p, [X3], {"p": torch.randn(1, 4, 5)})
    yield Case("parameter with more dimensions", lambda self, x: x + self.p, [X2], {"p": torch.randn(7, 1, 4)})
    yield Case("other ranks", lambda self, x, y: x + y.unsqueeze(0), [(N, 4), (N, 4)])
    yield Case("addcmul", lambda self, x, y: torch.addcmul(x, y, y, value=2), [X3, X3])
    yield Case("addcdiv", lambda self, x, y: torch.addcdiv(x, x, y + 1), [X3, X3])
    yield Case("lerp", lambda self, x, y: torch.lerp(x, y, 0.3), [X3, X3])
    yield Case("bitwise_not", lambda self, x: torch.bitwise_not(x), [X3], kind="bool")
    yield Case("masked_fill", lambda self, x: x.masked_fill(x > 0.5, 0.0), [X3])
    yield Case("polygamma", lambda self, x: torch.polygamma(1, x), [X3])
    yield Case("threshold", lambda self, x: F.threshold(x, 0.5, 0.0), [X3])
    yield Case("where", lambda self, x, y: torch.where(x > y, x, y) + torch.where(x > 0.5, 1.0, 0.0), [X3, X3])
    yield Case("where by name", lambda self, x, y: torch.where(condition=x > y, input=x, other=y), [X3, X3])
    yield Case("to", lambda self, x: x.to(torch.float32).to(x.dtype).type_as(x).to(x), [X3])
    yield Case("full_like", lambda self, x: torch.full_like(x, 0.5), [X3])
    yield Case("randint_like", lambda self, x: torch.randint_like(x, 5), [X3])

    # along named dimensions
    for name in "sum nansum mean nanmean prod logsumexp amax amin argmax argmin std var norm median nanmedian".split():
        f = function_named(name)
        dim = {"norm": {"p": 2, "dim": 1}}.get(name, {"dim": 1})
        yield Case(name, unary(f, **dim), [X3])
        yield Case(name + " keepdim", unary(f, **{**dim, "dim": -1}, keepdim=True), [X3])
    yield Case("sum of several", lambda self, x: x.sum((1, -1)) + x.mean(dim=[1, 2]), [X3])
    yield Case("vector_norm", lambda self, x: torch.linalg.vector_norm(x, 2, 1), [X3])
    yield Case("all", lambda self, x: (x > 0.1).all(1), [X3])
    yield Case("any", lambda self, x: (x > 0.9).any(-1, keepdim=True), [X3])
    yield Case("count_nonzero", lambda self, x: torch.count_nonzero(x > 0.5, 1), [X3])
    yield Case("std_mean", lambda self, x: torch.std_mean(x, 1), [X3])
    yield Case("var_mean", lambda self, x: torch.var_mean(x, 1, keepdim=True)[1], [X3])
    yield Case("max", lambda self, x, y: (x.max(1)[0], x.max(dim=-1, keepdim=True)[1], torch.max(x, y)), [X3, X3])
    yield Case("min", lambda self, x, y: (torch.min(x, 1)[0], x.min(y)), [X3, X3])
    yield Case("aminmax", lambda self, x: torch.aminmax(x, dim=1), [X3])
    for name in "mode sort topk cummax cummin kthvalue".split():
        f = function_named(name)
        args = (2,) if name in ("topk", "kthvalue") else ()
        yield Case(name, unary(f, *args, dim=1), [X3])
    for name in "argsort cumsum cumprod logcumsumexp softmax log_softmax softmin glu normalize".split():
        f = function_named(name)
        yield Case(name, unary(f, dim=1), [X3])
        yield Case(name + " last", unary(f, dim=-1), [(N, 5, 4)])
    yield Case("gumbel_softmax", lambda self, x: F.gumbel_softmax(x, dim=1), [X3])
    yield Case("diff", lambda self, x: torch.diff(x, dim=1), [X3])
    yield Case("flip", lambda self, x: x.flip(1) + x.flip([1, 2]) + torch.flip(x, dims=(-1,)), [X3])
    yield Case("roll", lambda self, x: torch.roll(x, 1, 1) + x.roll((1, 2), dims=(1, 2)), [X3])
    yield Case("cosine_similarity", lambda self, x, y: F.cosine_similarity(x, y, dim=1), [X3, X3])
    yield Case("index_select", lambda self, x: x.index_select(1, self.i), [X3], {"i": torch.tensor([2, 0])})
    yield Case("gather", lambda self, x: x.gather(1, (x > 0.5).long()), [X3])
    yield Case("take_along_dim", lambda self, x: torch.take_along_dim(x, (x > 0.5).long(), 1), [X3])
    yield Case("scatter", lambda self, x: x.scatter(1, (x > 0.5).long(), 1.0), [X3])
    yield Case("scatter_add", lambda self, x: x.scatter_add(1, (x > 0.5).long(), x), [X3])
    yield Case("narrow", lambda self, x: x.narrow(1, 1, 2), [X3])
    yield Case("select", lambda self, x: x.select(1, 1) + torch.select(x, -2, 0), [X3])
    yield Case("unbind", lambda self, x: x.unbind(1)[2], [X3])
    yield Case("unfold_dim", lambda self, x: x.unfold(1, 2, 1), [X3])
    yield Case("chunk", lambda self, x: x.chunk(2, 1)[0] + x.chunk(2, dim=1)[1], [X3])
    yield Case("tensor_split", lambda self, x: x.tensor_split(2, dim=1)[1], [X3])
    yield Case("split", lambda self, x: torch.split(x, 2, 1)[0] + x.split([1, 3], dim=1)[1][:, 1:], [X3])
    for name in "cat concat concatenate".split():
        f = function_named(name)
        yield Case(name, joining(f), [X3, X3])
    yield Case("cat last", lambda self, x, y: torch.cat((x, y), dim=-1), [X3, X3])
    yield Case("stack", lambda self, x, y: torch.stack([x, y], 1), [X3, X3])
    yield Case("stack in front", lambda self, x, y: torch.stack([x, y]).sum(0), [X3, X3])
    yield Case("stack at the end", lambda self, x, y: torch.stack([x, y], dim=-1), [X3, X3])

    # on the last dimensions
    yield Case(
        "linear", lambda self, x: F.linear(x, self.w, self.b), [X3], {"w": torch.randn(7, 5), "b": torch.randn(7)}
    )
    yield Case("bilinear", lambda self, x, y: F.bilinear(x, y, self.w), [X3, X3], {"w": torch.randn(2, 5, 5)})
    yield Case(
        "layer_norm",
        lambda self, x: F.layer_norm(x, (4, 5)) + F.layer_norm(x, [5], self.w),
        [X3],
        {"w": torch.randn(5)},
    )
    yield Case("rms_norm", lambda self, x: F.rms_norm(x, (5,)), [X3])
    for d, shape in ((1, (N, 4, 6)), (2, X4), (3, X5)):
        for name in ("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool"):
            f = getattr(F, f"{name}{d}d")
            yield Case(f"{name}{d}d", unary(f, 2), [shape])
        f = getattr(F, f"lp_pool{d}d")
        yield Case(f"lp_pool{d}d", unary(f, 2.0, 2), [shape])
        pool, unpool = getattr(F, f"max_pool{d}d"), getattr(F, f"max_unpool{d}d")
        yield Case(
            f"max_unpool{d}d",
            there_and_back(pool, unpool),
            [shape],
        )
        adaptive = getattr(F, f"adaptive_max_pool{d}d")
        yield Case(f"adaptive_max_pool{d}d indices", unary(adaptive, 2, True), [shape])
        conv, transposed = getattr(F, f"conv{d}d"), getattr(F, f"conv_transpose{d}d")
        weight = torch.randn(4, 4, *(3,) * d)
        yield Case(f"conv{d}d", weighted(conv, padding=1), [shape], {"w": weight})
        yield Case(f"conv_transpose{d}d", weighted(transposed, stride=2), [shape], {"w": weight})
        dropout = getattr(F, f"dropout{d}d")
        yield Case(f"dropout{d}d", unary(dropout, 0.5, True), [shape])
    yield Case("pool of the channels", lambda self, x: F.max_pool2d(x.transpose(0, 1), 2), [X4])
    yield Case("pad", lambda self, x: F.pad(x, (1, 2)) + F.pad(x, [1, 2, 0, 0], value=1.0), [X3])
    yield Case("pad reflecting", lambda self, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), [X4])
    yield Case("pixel_shuffle", lambda self, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), [X4])
    yield Case("tril", lambda self, x: torch.tril(x) + x.triu(1), [X3])
    yield Case("pairwise_distance", lambda self, x, y: F.pairwise_distance(x, y), [X3, X3])
    yield Case("pairwise_distance keepdim", lambda self, x, y: F.pairwise_distance(x, y, keepdim=True), [X3, X3])
    yield Case("embedding", lambda self, x: F.embedding(x, self.w), [X3], {"w": torch.randn(4, 3)}, kind="int")
    yield Case("one_hot", lambda self, x: F.one_hot(x, 4), [X3], kind="int")

    # one sample at a time
    yield Case("unfold", lambda self, x: F.fold(F.unfold(x, 2), (6, 6), 2), [X4])
    yield Case("interpolate", lambda self, x: F.interpolate(x, scale_factor=2), [X4])
    yield Case("group_norm", lambda self, x: F.group_norm(x, 2), [X3])
    yield Case("local_response_norm", lambda self, x: F.local_response_norm(x, 2), [X4])
    yield Case("channel_shuffle", lambda self, x: F.channel_shuffle(x, 2), [X4])
    yield Case("prelu", lambda self, x: F.prelu(x, self.w), [X3], {"w": torch.randn(4)})
    yield Case("prelu with one weight", lambda self, x: F.prelu(x, self.w), [(N,)], {"w": torch.randn(1)})
    yield Case("feature_alpha_dropout", lambda self, x: F.feature_alpha_dropout(x, 0.5, True), [X3])
    stats = {"m": torch.randn(4), "v": torch.rand(4)}
    yield Case("batch_norm", lambda self, x: F.batch_norm(x, self.m, self.v), [X3], stats)
    yield Case("instance_norm", lambda self, x: F.instance_norm(x), [X3])

    # products
    yield Case("matmul", lambda self, x: torch.matmul(x, self.w) + x @ self.w, [X3], W)
    yield Case("matmul with a vector", lambda self, x: x @ self.v, [X3], {"v": torch.randn(5)})
    yield Case("matmul with matrices", lambda self, x: x @ self.v, [X3], {"v": torch.randn(1, 5, 2)})
    yield Case("matmul with more matrices", lambda self, x: x.unsqueeze(1) @ self.v, [X3], {"v": torch.randn(3, 5, 2)})
    yield Case(
        "parameter @ batch",
        lambda self, x: self.w @ x + (self.v @ x).unsqueeze(1),
        [X3],
        {"w": torch.randn(3, 4), "v": torch.randn(4)},
    )
    yield Case("batch as columns", lambda self, x: (self.w @ x.t()).t(), [X2], {"w": torch.randn(3, 4)})
    yield Case("batch @ batch", lambda self, x, y: x @ y.mT + torch.bmm(x, y.transpose(1, 2)), [X3, X3])
    yield Case("mm", lambda self, x: torch.mm(x, self.w), [(N, 5)], W)
    yield Case("mv", lambda self, x: x.mv(self.v), [(N, 5)], {"v": torch.randn(5)})
    yield Case("addmm", lambda self, x: torch.addmm(self.b, x, self.w), [(N, 5)], W)
    yield Case("addmv", lambda self, x, y: torch.addmv(y, x, self.v), [(N, 5), (N,)], {"v": torch.randn(5)})
    yield Case("baddbmm", lambda self, x, y: torch.baddbmm(x, x, y), [(N, 4, 4), (N, 4, 4)])
    yield Case("einsum", lambda self, x, y: torch.einsum("nij,nkj->nik", x, y), [X3, X3])
    yield Case("einsum moves the batch", lambda self, x: torch.einsum("nij, jk -> kni", x, self.w), [X3], W)
    yield Case("einsum implicit", lambda self, x: torch.einsum("bij,jk", x, self.w), [X3], W)
    yield Case("einsum ellipsis", lambda self, x: torch.einsum("...ij,jk->...ik", x, self.w), [X3], W)
    yield Case("attention", lambda self, x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True), [X4, X4])
    yield Case(
        "attention with mask",
        lambda self, x: F.scaled_dot_product_attention(x, x, x, self.m),
        [X4],
        {"m": torch.randn(6, 6)},
    )

    # shapes
    for name in "transpose swapaxes swapdims".split():
        yield Case(name, method(name, 1, 2), [X3])
    yield Case("transpose the batch", lambda self, x: x.transpose(0, 1).relu().sum(0), [X3])
    yield Case("transpose last", lambda self, x: x.transpose(-1, -2) + x.mT + x.adjoint(), [X3])
    yield Case("t", lambda self, x: x.t().softmax(0).T, [X2])
    yield Case("permute", lambda self, x: x.permute(0, 2, 1) + torch.permute(x, (0, -1, 1)), [X3])
    yield Case("permute the batch", lambda self, x: x.permute(2, 0, 1).cumsum(0).permute(1, 0, 2), [X3])
    yield Case("movedim", lambda self, x: x.movedim(1, 2) + x.movedim((1, 2), (2, 1)), [X3])
    yield Case(
        "moveaxis", lambda self, x: torch.moveaxis(x, 0, 1).movedim(1, 0) + x.movedim(-1, -2).movedim(-1, -2), [X3]
    )
    yield Case("unsqueeze", lambda self, x: x.unsqueeze(0).unsqueeze(-1).unsqueeze(2), [X3])
    yield Case("squeeze", lambda self, x: x[:, :, :1].squeeze(-1).relu(), [X3])
    yield Case("squeeze several", lambda self, x: x[:, :1, :1].squeeze((1, 2)), [X3])
    yield Case("flatten", lambda self, x: x.flatten(1) + torch.flatten(x, start_dim=-2), [X3])
    yield Case("flatten with the batch", lambda self, x: x.flatten(0, 1).relu().view(x.shape[0], 4, 5), [X3])
    yield Case("flatten behind", lambda self, x: x.flatten(1, -2) + x.flatten(-3, -2).flatten(1, 1), [X4])
    yield Case("ravel", lambda self, x: x.ravel(), [X3])
    yield Case("unflatten", lambda self, x: x.unflatten(1, (2, 2)) + x.unflatten(-2, (2, -1)), [X3])
    yield Case("unflatten the batch", lambda self, x: x.flatten(0, 1).unflatten(0, (-1, 4)), [X3])
    yield Case("unflatten to the batch", lambda self, x: x.flatten(0, 1).unflatten(0, (x.shape[0], 4)) + x, [X3])
    yield Case("view", lambda self, x: x.view(x.shape[0], -1) + x.view(x.size(0), 20), [X3])
    yield Case("view -1", lambda self, x: x.view(-1, 10), [X3])
    yield Case("view to more", lambda self, x: x.view(x.shape[0], 2, 2, 5).view(1, -1, 20), [X3])
    yield Case("view of a multiple", lambda self, x: x.reshape(x.shape[0] * 4, 5).view(x.shape[0], 4, 5) + x, [X3])
    yield Case("view of a product", lambda self, x: x.reshape(x.shape[0] * x.shape[1], 5), [X3])
    yield Case("view of a shape", lambda self, x: x.flatten(1).view(x.shape) + x.flatten(1).reshape(x.size()), [X3])
    yield Case(
        "view of part of a shape",
        lambda self, x: x.view(x.shape[:1] + (20,)) + x.view(x.shape[0], x.shape[1] * 5),
        [X3],
    )
    yield Case("view behind", lambda self, x: x.transpose(0, 1).contiguous().relu(), [X3])
    yield Case("view_as", lambda self, x, y: x.view_as(y) + x.reshape_as(y), [(N, 20), X3])
    yield Case(
        "expand", lambda self, x: x.unsqueeze(1).expand(-1, 3, -1) + x.unsqueeze(1).expand(x.shape[0], 3, 4), [X2]
    )
    yield Case("expand in front", lambda self, x: x.expand(7, -1, -1), [X2])
    yield Case(
        "expand a parameter",
        lambda self, x: torch.cat([self.p.expand(x.shape[0], -1, -1), x], 1),
        [X3],
        {"p": torch.randn(1, 1, 5)},
    )
    yield Case(
        "expand a constant to x",
        lambda self, x: self.p.expand_as(x) + self.p.expand(x.shape),
        [X3],
        {"p": torch.randn(5)},
    )
    yield Case("broadcast_to", lambda self, x: torch.broadcast_to(x.unsqueeze(1), (x.shape[0], 3, 4)), [X2])
    yield Case("repeat", lambda self, x: x.repeat(1, 2, 1) + x.tile((1, 2, 1)), [X3])
    yield Case("repeat in front", lambda self, x: x.repeat(7, 1, 1, 1), [X3])
    yield Case("repeat a parameter", lambda self, x: self.p.repeat(x.shape[0], 1) + x, [X2], {"p": torch.randn(1, 4)})
    yield Case("repeat_interleave", lambda self, x: x.repeat_interleave(2, 0), [X3])
    yield Case("repeat_interleave features", lambda self, x: torch.repeat_interleave(x, 2, dim=1), [X3])
    yield Case(
        "getitem", lambda self, x: x[:, 0] + x[:, 1:3].sum(1) + x[:, -1, :] + x[..., 0].sum(1, keepdim=True), [X3]
    )
    yield Case("getitem None", lambda self, x: x[:, None] * x[:, :, None][:, :, 0, None, :].mean(2, True)[:, :1], [X3])
    yield Case("reduced_over_time", lambda self, x: record(reduced_over_time, x), [X3])
    yield Case("set_part number", lambda self, x: record(set_part, x, (slice(None), 0), 1.5), [X3])
    yield Case("set_part ellipsis", lambda self, x: record(set_part, x, (..., slice(1, 2)), 0.0), [X3])
    yield Case(
        "set_part value", lambda self, x: record(set_part, x, (slice(None), slice(0, 2)), x[:, 1:3] * 2), [(N, 3, 4)]
    )
    yield Case(
        "set_part constant",
        lambda self, x: record(set_part, x, (slice(None), 0), self.c),
        [(N, 3, 4)],
        {"c": torch.arange(4.0)},
    )
    yield Case("getitem ellipsis", lambda self, x: x[..., None, 1:] + x[:, ..., :1][..., None], [X3])
    yield Case("getitem batch elsewhere", lambda self, x: x.transpose(0, 1)[0] + x.transpose(0, 1)[1:, :, 2:3][0], [X3])
    yield Case(
        "attributes",
        lambda self, x: x.T.T + x.data + x.real + record(torch.zeros, 1, dtype=x.dtype, device=x.device),
        [X2],
    )
    yield Case("mH", lambda self, x: x.mH.mT, [X3])

    # sizes, and what is made of them
    yield Case("size", lambda self, x: x / x.shape[1] + x * x.size(-1) / x.dim() * x.ndimension() + x.ndim, [X3])
    yield Case("numel", lambda self, x: (x.view(x.numel()) * 2).view_as(x), [X3])
    yield Case("nelement", lambda self, x: x.reshape(x.nelement()).reshape_as(x) + x, [X3])
    for name in ("is_floating_point", "is_complex", "element_size", "get_device"):
        yield Case(name, asking(name), [X3])
    yield Case("zeros", lambda self, x: record(torch.zeros, x.shape[0], 4, 5) + record(torch.ones, x.shape) + x, [X3])
    yield Case("zeros in a tuple", lambda self, x: record(torch.zeros, (x.shape[0], x.shape[1]), dtype=x.dtype), [X3])
    yield Case("empty", lambda self, x: record(torch.empty, x.shape[0], 1), [X3])
    yield Case("full", lambda self, x: record(torch.full, (x.shape[0], 1, 5), 0.5) * x, [X3])
    yield Case("rand", lambda self, x: record(torch.rand, x.shape[0], 4) + record(torch.randn, (x.size(0), 4)), [X2])
    yield Case(
        "new_zeros", lambda self, x: x.new_zeros(x.shape[0], 4) + x.new_ones(4) + x.new_full((x.size(0), 1), 2.0), [X2]
    )
    yield Case("new_empty", lambda self, x: x.new_empty(x.shape[0], 4), [X2])
    yield Case(
        "arange",
        lambda self, x: (
            x
            + record(torch.arange, x.shape[1])
            + record(torch.linspace, 0, 1, x.shape[1])
            + record(torch.eye, x.shape[1])[0]
        ),
        [X2],
    )
    yield Case(
        "tensor", lambda self, x: x * record(torch.tensor, x.shape[1]) + record(torch.scalar_tensor, x.dim()), [X2]
    )
    yield Case(
        "parameters alone",
        lambda self, x: x * torch.fft.fft(self.p).abs().sigmoid().mean(),
        [X2],
        {"p": torch.randn(4)},
    )
    yield Case("invariant input", lambda self, x, y: x + y.relu(), [X2, X2], invariant=(1,))
    yield from module_cases()


def module_cases() -> Iterator[Case]:
    def call(name: str, module: nn.Module, *shapes: Any, **options: Any) -> Case:
        steps = {
            1: lambda self, x: self.m(x),
            2: lambda self, x, y: self.m(x, y),
            3: lambda self, x, y, z: self.m(x, y, z),
        }
        return Case(name, steps[len(shapes)], shapes, {"m": module}, **options)

    for name in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU "
        "Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink Dropout AlphaDropout RReLU PReLU FeatureAlphaDropout"
    ).split():
        yield call(name, getattr(nn, name)(), X3)
        yield call(name + " in training", getattr(nn, name)(), X3, training=True)
    yield call("Threshold", nn.Threshold(0.5, 0.0), X3)
    yield call("PReLU by channel", nn.PReLU(4), X3)
    for name in ("Softmax", "LogSoftmax", "Softmin"):
        yield call(name, getattr(nn, name)(dim=1), X3)
    yield call("Softmax without dim", nn.Softmax(), X2)
    yield call("Softmax2d", nn.Softmax2d(), X4)
    yield call("GLU", nn.GLU(), (N, 5, 4))
    yield call("Linear", nn.Linear(5, 7), X3)
    yield call("Bilinear", nn.Bilinear(5, 5, 3), X3, X3)
    yield call("LayerNorm", nn.LayerNorm((4, 5)), X3)
    yield call("RMSNorm", nn.RMSNorm(5), X3)
    yield call("GroupNorm", nn.GroupNorm(2, 4), X3)
    yield call("LocalResponseNorm", nn.LocalResponseNorm(2), X4)
    for d, shape in ((1, (N, 4, 6)), (2, X4), (3, X5)):
        yield call(f"Conv{d}d", getattr(nn, f"Conv{d}d")(4, 3, 3, padding=1), shape)
        yield call(f"ConvTranspose{d}d", getattr(nn, f"ConvTranspose{d}d")(4, 3, 3), shape)
        yield call(f"BatchNorm{d}d", getattr(nn, f"BatchNorm{d}d")(4), shape)
        yield call(f"InstanceNorm{d}d", getattr(nn, f"InstanceNorm{d}d")(4), shape)
        yield call(f"Dropout{d}d", getattr(nn, f"Dropout{d}d")(), shape, training=True)
        for name in ("AvgPool", "MaxPool", "AdaptiveAvgPool", "AdaptiveMaxPool"):
            yield call(f"{name}{d}d", getattr(nn, f"{name}{d}d")(2), shape)
        yield call(f"LPPool{d}d", getattr(nn, f"LPPool{d}d")(2, 2), shape)
        for name in ("ConstantPad", "CircularPad", "ReflectionPad", "ReplicationPad", "ZeroPad"):
            args = (1, 0.5) if name == "ConstantPad" else (1,)
            yield call(f"{name}{d}d", getattr(nn, f"{name}{d}d")(*args), shape)
        pool, unpool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True), getattr(nn, f"MaxUnpool{d}d")(2)
        parts = {"pool": pool, "unpool": unpool}
        yield Case(f"MaxUnpool{d}d", lambda self, x: self.unpool(*pair_of(self.pool(x))), [shape], parts)
    yield call("SyncBatchNorm", nn.SyncBatchNorm(4), X3)
    yield call("Upsample", nn.Upsample(scale_factor=2), X4)
    yield call("UpsamplingNearest2d", nn.UpsamplingNearest2d(scale_factor=2), X4)
    yield call("UpsamplingBilinear2d", nn.UpsamplingBilinear2d(scale_factor=2), X4)
    yield call("PixelShuffle", nn.PixelShuffle(2), X4)
    yield call("PixelUnshuffle", nn.PixelUnshuffle(2), X4)
    yield call("ChannelShuffle", nn.ChannelShuffle(2), X4)
    yield call("Flatten", nn.Flatten(), X3)
    yield call("Unflatten", nn.Unflatten(1, (2, 2)), X3)
    yield call("Unfold", nn.Unfold(2), X4)
    yield call("Fold", nn.Fold((3, 3), 2), (N, 8, 4))
    yield call("Embedding", nn.Embedding(4, 3), X2, kind="int")
    yield call("CosineSimilarity", nn.CosineSimilarity(), X3, X3)
    yield call("PairwiseDistance", nn.PairwiseDistance(), X3, X3)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    yield call("MultiheadAttention", attention, (N, 4, 6), (N, 5, 6), (N, 5, 6))
    swapped = nn.MultiheadAttention(6, 2)

    def between_transposes(self: Any, x: Any) -> Any:
        y = x.transpose(0, 1)
        return self.m(y, y, y)[0].transpose(0, 1) + x

    yield Case("MultiheadAttention, batch second", between_transposes, [(N, 4, 6)], {"m": swapped})
    yield Case(
        "MultiheadAttention weights",
        lambda self, x: self.m(x, x, x, average_attn_weights=False)[1],
        [(N, 4, 6)],
        {"m": attention},
    )
    masked = {"m": attention, "mask": torch.randn(4, 4)}
    yield Case(
        "MultiheadAttention mask",
        lambda self, x: self.m(x, x, x, need_weights=False, attn_mask=self.mask)[0],
        [(N, 4, 6)],
        masked,
    )
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    yield call("TransformerEncoderLayer", layer, (N, 4, 6))
    yield call("TransformerEncoder", nn.TransformerEncoder(layer, 2), (N, 4, 6))
    yield call("RNNCell", nn.RNNCell(4, 5), (N, 4), (N, 5))
    yield call("GRUCell", nn.GRUCell(4, 5), (N, 4))
    yield Case("LSTMCell", lambda self, x, h: self.m(x, (h, h))[1], [(N, 4), (N, 5)], {"m": nn.LSTMCell(4, 5)})


LEGAL = list(legal_cases())
NEEDS_EXAMPLES = {"parameter with more dimensions", "expand in front", "repeat in front"}
"""Without knowing ranks, the batch is taken to be in the first dimension that an argument or a parameter names."""
NEEDS_A_GPU = {"cuda"}
NEVER_LEGAL = {"nn.RNN", "call_opaque", "opaque_initial_value"}
TESTED_ELSEWHERE = {"call_stateful", "initial_value", "apply_autograd_function", "expect_size"}
TESTED_ELSEWHERE |= {"cut_history", "update_trace", "ones_per_sample", "draw_dropout_mask"}  # in test_online_ops.py
TESTED_ELSEWHERE |= {"change_value"}  # in test_capture.py, with changes in place
TESTED_ELSEWHERE |= {"copied", "read_parameter"}  # in test_step_changes.py, with parameters that a step changes
TESTED_ELSEWHERE |= {"run_loop", "read_elements", "stack_elements", "concatenate_elements", "write_elements"}
# in tests/sequence, with time as the batch


@pytest.mark.parametrize("case", LEGAL, ids=lambda case: case.name)
def test_what_the_table_lets_through_folds_exactly(case: Case) -> None:
    for ranks in ("known", "values"):
        analysis = case.analyse(ranks)
        assert not analysis.refusals
        assert probe(case, analysis) > 0
    symbolic = case.analyse("symbolic")
    if case.name not in NEEDS_EXAMPLES:
        assert {refusal.code for refusal in symbolic.refusals.values()} <= {"SNNFX111", "SNNFX105"}
    ranks_of = {node.name: len(shape) for node, shape in zip(case.placeholders, case.shapes, strict=True)}
    if all(least <= ranks_of[name] for name, least in symbolic.requirements.items()):
        probe(case, symbolic)
    else:  # the call would be mapped
        assert case.name in NEEDS_EXAMPLES


def test_every_row_has_a_legal_case() -> None:
    covered = {
        found.name
        for case in LEGAL
        for node in case.graph.nodes
        if node.op.startswith("call") and (found := find_rule(node, case.resolve)) is not None
    }
    assert set(row_names()) - NEVER_LEGAL - NEEDS_A_GPU - TESTED_ELSEWHERE - covered == set()


def test_every_module_class_has_a_case() -> None:
    called = {
        type(case.resolve(str(node.target))).__name__
        for case in LEGAL
        for node in case.graph.nodes
        if node.op == "call_module"
    }
    assert MODULES.keys() - called == {"RNN", "GRU", "LSTM"}


# --- illegal uses


@dataclass
class Illegal(Case):
    """A step whose first refused node has to be refused with `code`; `conservative`: why, although it would fold."""

    code: str = ""
    conservative: str = ""


def illegal(code: str, name: str, fn: Callable[..., Any], *shapes: Any, **options: Any) -> Illegal:
    return Illegal(name, fn, shapes, code=code, **options)


def illegal_cases() -> Iterator[Illegal]:
    # no row
    denied = "deny by default"
    yield illegal("SNNFX101", "no row", unary(torch.fft.fft), X3, conservative=denied)
    yield illegal("SNNFX101", "masked_select", lambda self, x: torch.masked_select(x, x > 0.5), X3, conservative=denied)
    yield illegal("SNNFX101", "nonzero", lambda self, x: torch.where(x > 0.5), X3)
    yield illegal("SNNFX101", "tensor index", lambda self, x: x[self.i], X3, parts={"i": torch.tensor([0, 1])})
    yield illegal("SNNFX101", "boolean index", lambda self, x: x[x > 0.5], X3, conservative=denied)
    whole = slice(None)
    yield illegal("SNNFX103", "set_part of a sample", lambda self, x: record(set_part, x, 0, 1.0), X3)
    yield illegal("SNNFX103", "set_part in a cut", lambda self, x: record(set_part, x, (slice(1, None), 0), 1.0), X3)
    by_mask = illegal("SNNFX101", "set_part by mask", lambda self, x: record(set_part, x, x > 0.5, 1.0), X3)
    by_mask.conservative = denied
    yield by_mask
    yield illegal("SNNFX103", "set_part of a sum", lambda self, x: record(set_part, x, (whole, 0), x[:, 1].sum(0)), X3)
    constant = {"c": torch.ones(2, 4, 5)}
    into = lambda self, x: record(set_part, self.c, 0, x[0])  # noqa: E731
    yield illegal("SNNFX103", "set_part in a constant", into, X3, parts=constant)
    yield illegal("SNNFX101", "view as another dtype", lambda self, x: x.view(torch.int32), (N,), conservative=denied)
    embedding = nn.Embedding(4, 3, max_norm=1.0)
    yield illegal(
        "SNNFX101",
        "embedding",
        lambda self, x: self.m(x),
        X2,
        parts={"m": embedding},
        kind="int",
        conservative="changes its weight",
    )
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    yield illegal(
        "SNNFX101",
        "spectral norm",
        lambda self, x: self.m(x),
        X2,
        parts={"m": spectral},
        conservative="wrong in training only",
    )
    # too few dimensions
    layers: list[tuple[str, nn.Module, Sequence[int]]] = [
        ("Linear", nn.Linear(4, 5), (4,)),
        ("Conv1d", nn.Conv1d(4, 5, 2), (4, 6)),
        ("Conv2d", nn.Conv2d(4, 5, 2), (4, 6, 6)),
        ("Conv3d", nn.Conv3d(4, 5, 2), (4, 6, 6, 6)),
        ("ConvTranspose2d", nn.ConvTranspose2d(4, 5, 2), (4, 6, 6)),
        ("LayerNorm", nn.LayerNorm((4, 5)), (4, 5)),
        ("InstanceNorm2d", nn.InstanceNorm2d(4), (4, 6, 6)),
        ("PixelShuffle", nn.PixelShuffle(2), (4, 6, 6)),
        ("RNNCell", nn.RNNCell(4, 5), (4,)),
    ]
    for name, layer, shape in layers:
        yield illegal("SNNFX102", f"unbatched {name}", lambda self, x: self.m(x), shape, parts={"m": layer})
    yield illegal("SNNFX102", "unbatched Dropout2d", lambda self, x: self.m(x), (4, 6, 6), parts={"m": nn.Dropout2d()})
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    yield illegal("SNNFX102", "unbatched attention", lambda self, x: self.m(x, x, x)[0], (4, 6), parts={"m": attention})
    yield illegal("SNNFX102", "a number at each step", lambda self, x: x * 2, ())
    yield illegal("SNNFX102", "sdpa", lambda self, x: F.scaled_dot_product_attention(x, x, x), (4, 6))
    # along the batch
    yield illegal("SNNFX103", "x.mean(0)", lambda self, x: x - x.mean(0), X3)
    yield illegal("SNNFX103", "x.mean(0, keepdim)", lambda self, x: x - x.mean(0, keepdim=True), X3)
    yield illegal("SNNFX103", "x.mean()", lambda self, x: x - x.mean(), X3)
    yield illegal("SNNFX103", "x.sum(-3)", lambda self, x: x.sum(-3), X3)
    yield illegal("SNNFX103", "x.sum((0, 1))", lambda self, x: x.sum((0, 1)), X3)
    for name in (
        "std var amax argmax prod logsumexp median mode sort argsort cumsum cummax softmax log_softmax normalize diff"
    ).split():
        yield illegal("SNNFX103", f"{name} over the batch", unary(function_named(name), dim=0), X3)
    yield illegal("SNNFX103", "max of all", lambda self, x: x.max(), X3)
    yield illegal("SNNFX103", "max over the batch", lambda self, x: x.max(0)[0], X3)
    yield illegal("SNNFX103", "norm", lambda self, x: x.norm(), X3)
    yield illegal("SNNFX103", "topk", lambda self, x: x.topk(1, 0)[0], X3)
    yield illegal("SNNFX103", "flip", lambda self, x: x.flip(0), X3)
    yield illegal("SNNFX103", "roll", lambda self, x: x.roll(1, 0), X3)
    yield illegal("SNNFX103", "roll of all", lambda self, x: x.roll(1), X3)
    yield illegal("SNNFX103", "cat", lambda self, x, y: torch.cat([x, y]), X3, X3)
    yield illegal("SNNFX103", "chunk", lambda self, x: x.chunk(2)[0], X3)
    yield illegal("SNNFX103", "split", lambda self, x: x.split(1)[0], X3)
    yield illegal("SNNFX103", "unbind", lambda self, x: x.unbind()[0], X3)
    yield illegal("SNNFX103", "x[0]", lambda self, x: x[0], X3)
    yield illegal("SNNFX103", "x[-1]", lambda self, x: x[-1, :, None], X3)
    yield illegal("SNNFX103", "x[:1]", lambda self, x: x[:1], X3)
    yield illegal("SNNFX103", "x[::2]", lambda self, x: x[::2, 0], (3, 4, 5))
    yield illegal("SNNFX103", "x[..., 0, 0, 0]", lambda self, x: x[..., 0, 0, 0], X3)
    yield illegal("SNNFX103", "select", lambda self, x: x.select(0, 0), X3)
    yield illegal("SNNFX103", "narrow", lambda self, x: x.narrow(0, 0, 1), X3)
    yield illegal(
        "SNNFX103", "index_select", lambda self, x: x.index_select(0, self.i), X3, parts={"i": torch.tensor([1, 0])}
    )
    yield illegal("SNNFX103", "gather", lambda self, x: x.gather(0, (x > 0.5).long()), X3)
    yield illegal("SNNFX103", "repeat", lambda self, x: x.repeat(2, 1, 1), X3)
    yield illegal("SNNFX103", "x @ x.t()", lambda self, x: x @ x.t(), X2)
    yield illegal("SNNFX103", "x.t() @ w", lambda self, x: x.t() @ torch.ones_like(x), X2)
    yield illegal("SNNFX103", "w @ x", lambda self, x: self.w @ x, (2, 4), parts={"w": torch.randn(3, 2)})
    yield illegal("SNNFX103", "einsum", lambda self, x: torch.einsum("nij->ij", x), X3)
    yield illegal("SNNFX105", "einsum of two batches", lambda self, x, y: torch.einsum("ni,mi->nm", x, y), X2, X2)
    yield illegal(
        "SNNFX103",
        "Conv on a transposed batch",
        lambda self, x: F.conv1d(x.transpose(0, 1), self.w),
        (2, 4, 6),
        parts={"w": torch.randn(3, 2, 2)},
    )
    yield illegal(
        "SNNFX103", "Linear on the batch", lambda self, x: self.m(x.t()), (2, 4), parts={"m": nn.Linear(2, 3)}
    )
    swapped = nn.MultiheadAttention(6, 2)
    yield illegal(
        "SNNFX103", "attention along the batch", lambda self, x: self.m(x, x, x)[0], (N, 4, 6), parts={"m": swapped}
    )
    yield illegal(
        "SNNFX103", "one_hot", lambda self, x: F.one_hot(x), X2, kind="int", conservative="by chance: depends on values"
    )
    yield illegal("SNNFX103", "flatten across", lambda self, x: x.transpose(0, 1).flatten(0, 1), X3)
    yield illegal("SNNFX103", "view across", lambda self, x: x.transpose(0, 1).reshape(x.shape[0], -1), X3)
    # literal sizes
    yield illegal("SNNFX104", "view(2, -1)", lambda self, x: x.view(2, -1), (2, 4, 5))
    yield illegal("SNNFX104", "view(2, 20)", lambda self, x: x.view(2, 20), (2, 4, 5))
    yield illegal("SNNFX104", "view of a feature size", lambda self, x: x.reshape(x.shape[1], -1), (4, 4, 5))
    yield illegal("SNNFX104", "unflatten", lambda self, x: x.unflatten(0, (2, -1)), (4, 5))
    yield illegal("SNNFX104", "expand", lambda self, x: x.unsqueeze(1).expand(2, 3, -1), (2, 4))
    yield illegal(
        "SNNFX104", "parameter over the batch", lambda self, x: x + self.p, (2, 4), parts={"p": torch.randn(2, 4)}
    )
    yield illegal("SNNFX104", "zeros(2, 4)", lambda self, x: x + x.new_zeros(2, 4), (2, 4))
    yield illegal(
        "SNNFX104",
        "cat with a parameter",
        lambda self, x: torch.cat([x, self.p], 1),
        (2, 4),
        parts={"p": torch.randn(2, 4)},
    )
    yield illegal(
        "SNNFX104",
        "expanded parameter",
        lambda self, x: self.p.expand(x.shape[0], -1),
        (2, 4),
        parts={"p": torch.randn(2, 4)},
    )
    yield illegal(
        "SNNFX104",
        "bias over the batch",
        lambda self, x: F.linear(x, self.w, self.p),
        (2, 4),
        parts={"w": torch.randn(3, 4), "p": torch.randn(2, 3)},
    )
    yield illegal(
        "SNNFX104",
        "einsum with a parameter",
        lambda self, x: torch.einsum("ni,ni->ni", x, self.p),
        (2, 4),
        parts={"p": torch.randn(2, 4)},
    )
    # batches that do not lie on each other
    yield illegal("SNNFX105", "other places", lambda self, x: x + x.transpose(0, 1), (2, 2, 4))
    yield illegal("SNNFX105", "other ranks", lambda self, x, y: x + y, (2, 2), (2,))
    yield illegal(
        "SNNFX105",
        "other sizes",
        lambda self, x, y: x.view(-1, 2) + y,
        (2, 2),
        (2, 2),
        conservative="the sizes may differ",
    )
    yield illegal("SNNFX105", "scatter of a parameter", lambda self, x: x.index_select(1, (x[:, 0] > 0).long()), (2, 4))
    yield illegal("SNNFX105", "weight from the batch", lambda self, x, y: F.linear(x, y), (2, 4), (2, 4))
    yield illegal(
        "SNNFX105", "random without a batch", lambda self, x: x + F.dropout(self.p), X2, parts={"p": torch.ones(4)}
    )
    yield illegal("SNNFX105", "noise without a batch", lambda self, x: x + record(torch.rand, x.shape[1]), X2)
    yield illegal(
        "SNNFX105",
        "attention mask of the batch",
        lambda self, x, y: self.m(x, x, x, attn_mask=y)[0],
        (4, 4, 6),
        (4, 4),
        parts={"m": attention},
    )
    yield illegal("SNNFX103", "type of a value without a batch", lambda self, x: (x > 0).to(x.mean(0).dtype), X2)
    yield illegal("SNNFX103", "size of a value without a batch", lambda self, x: x.view(-1, x.mean(0).shape[0]), X2)
    yield illegal("SNNFX103", "zeros like a value without a batch", lambda self, x: x + torch.zeros_like(x.mean(0)), X2)
    # sizes as numbers
    yield illegal("SNNFX110", "x / x.shape[0]", lambda self, x: x / x.shape[0], X3)
    yield illegal("SNNFX110", "half the batch", lambda self, x: x.view(x.shape[0] // 2 + 1, -1), (2, 4))
    yield illegal("SNNFX110", "one more", lambda self, x: record(torch.zeros, x.shape[0] + 1, 4), X2)
    yield illegal("SNNFX110", "two batches", lambda self, x: record(torch.zeros, x.shape[0], x.shape[0]), X2)
    yield illegal("SNNFX110", "eye", lambda self, x: record(torch.eye, x.shape[0]), X2)
    yield illegal("SNNFX110", "arange", lambda self, x: x + record(torch.arange, x.shape[0]).unsqueeze(1), X2)
    yield illegal("SNNFX110", "squeeze", lambda self, x: x.squeeze(), X3, conservative="wrong for one sample only")
    yield illegal("SNNFX110", "squeeze(0)", lambda self, x: x.squeeze(0), X3, conservative="wrong for one sample only")
    yield illegal("SNNFX110", "slice", lambda self, x: x[:, : x.shape[0]], X3)
    yield illegal("SNNFX110", "transposed view", lambda self, x: x.view(-1, x.shape[0], x.shape[0]), (2, 4))
    yield illegal("SNNFX110", "interpolate", lambda self, x: F.interpolate(x, size=x.shape[0]), X3)
    yield illegal(
        "SNNFX109",
        "GRU",
        lambda self, x: self.m(x)[0],
        (N, 4, 6),
        parts={"m": nn.GRU(6, 3, batch_first=True)},
        conservative="as specified",
    )


ILLEGAL = list(illegal_cases())


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: case.name)
def test_what_does_not_fold_is_refused_with_its_reason(case: Illegal) -> None:
    for ranks in ("known", "values"):
        analysis = case.analyse(ranks)
        first = next(node for node in case.graph.nodes if node in analysis.refusals)
        refusal = analysis.refusals[first]
        assert refusal.code == case.code, refusal
        assert refusal.reason
        probe_at_own_size(case, analysis)
        assert bool(case.conservative) == folds_after_all(case, analysis, first), refusal


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda case: case.name)
def test_without_examples_nothing_illegal_is_let_through(case: Illegal) -> None:
    analysis = case.analyse("symbolic")
    met = all(
        least <= len(case.shapes[[p.name for p in case.placeholders].index(name)])
        for name, least in analysis.requirements.items()
    )
    if met:
        assert analysis.refusals
        probe_at_own_size(case, analysis)


def probe_at_own_size(case: Case, analysis: BatchAnalysis) -> None:
    """The probe; a program with literal sizes only runs at its own batch size."""
    if any(N in shape for shape in case.shapes):
        probe(case, analysis)
        return
    steps = [case.run_step(inputs) for inputs in case.inputs(2)]
    for node in case.graph.nodes:
        if node.op.startswith("call"):
            for step in steps:
                check_fact(case, analysis.facts[node], step[node], {}, node)
            if node not in analysis.refusals:
                check_fold(case, analysis, node, steps)


def folds_after_all(case: Case, analysis: BatchAnalysis, node: fx.Node) -> bool:
    """Whether folding the refused node would have been right for this example."""
    steps = [case.run_step(inputs) for inputs in case.inputs(2)]
    fact = analysis.facts[node]
    if fact is UNKNOWN:
        fact = Fact(Rank(0), 0)
    if isinstance(fact, Fact) and fact.varying:
        return False
    operands = {o: fold(analysis.facts[o], [step[o] for step in steps]) for o in node.all_input_nodes}
    try:
        compare(
            case.run_node(node, operands), fold(fact, [step[node] for step in steps]), not case.is_random(node), node
        )
    except (AssertionError, RuntimeError, IndexError, TypeError, ValueError):
        return False
    return True


# --- the mode of the net


@pytest.mark.parametrize(
    "module", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)], ids=lambda m: type(m).__name__
)
def test_batch_norm_in_training_folds_only_when_that_is_declared(module: nn.Module) -> None:
    shape = X4 if isinstance(module, nn.BatchNorm2d) else X3

    def refusals(**options: Any) -> list[str]:
        case = Case("", lambda self, x: self.m(x), [shape], {"m": module}, **options)
        return [refusal.code for refusal in case.analyse("known").refusals.values()]

    assert refusals(training=False, batch_norm="per_step") == []
    assert refusals(training=True, batch_norm="fold") == []
    assert refusals(training=True, batch_norm="per_step") == ["SNNFX106"]


def test_a_frozen_batch_norm_may_be_thawed_so_it_is_not_folded_per_step() -> None:
    case = Case("", lambda self, x: self.m(x), [X3], {"m": nn.BatchNorm1d(4)}, training=True, batch_norm="per_step")
    case.root.m.eval()
    assert [r.code for r in case.analyse("known").refusals.values()] == ["SNNFX106"]


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_without_running_statistics_uses_those_of_the_batch_even_in_evaluation(training: bool) -> None:
    module = nn.BatchNorm1d(4, track_running_stats=False)
    case = Case("", lambda self, x: self.m(x), [X3], {"m": module}, training=training, batch_norm="fold")
    assert [r.code for r in case.analyse("known").refusals.values()] == ([] if training else ["SNNFX106"])


def test_functional_batch_norm_goes_by_its_own_flag() -> None:
    stats = {"m": torch.randn(4), "v": torch.rand(4)}
    case = Case("", lambda self, x: F.batch_norm(x, self.m, self.v, training=True), [X3], stats, batch_norm="per_step")
    assert [r.code for r in case.analyse("known").refusals.values()] == ["SNNFX106"]


@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
def test_instance_norm_updates_its_running_statistics_at_each_step(batch_norm: str) -> None:
    module = nn.InstanceNorm1d(4, track_running_stats=True)
    case = Case("", lambda self, x: self.m(x), [X3], {"m": module}, training=True, batch_norm=batch_norm)
    assert [r.code for r in case.analyse("known").refusals.values()] == ["SNNFX106"]
    assert not Case("", lambda self, x: self.m(x), [X3], {"m": module}, training=False).analyse("known").refusals


def test_an_encoder_with_parts_of_the_users_own_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    layer.norm1 = nn.BatchNorm1d(4)  # type: ignore[assignment]
    case = Case("", lambda self, x: self.m(x), [(N, 4, 6)], {"m": layer})
    assert [r.code for r in case.analyse("known").refusals.values()] == ["SNNFX101"]


# --- which modules are trusted


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class OwnHelper(nn.Conv1d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x - x.mean(0), weight, bias)


class OwnName(nn.Linear):
    """Changes nothing that computes."""

    def extra_repr(self) -> str:
        return "mine"


def codes_of_module(module: nn.Module, shape: Sequence[Any]) -> list[str]:
    case = Case("", lambda self, x: self.m(x), [shape], {"m": module})
    return [refusal.code for refusal in case.analyse("known").refusals.values()]


def test_a_subclass_with_a_forward_or_helper_of_its_own_is_not_trusted() -> None:
    assert codes_of_module(OwnForward(4, 5), X2) == ["SNNFX101"]
    assert codes_of_module(OwnHelper(4, 5, 2), (N, 4, 6)) == ["SNNFX101"]
    assert codes_of_module(OwnName(4, 5), X2) == []


def test_a_forward_put_on_the_instance_is_not_trusted() -> None:
    module = nn.Linear(4, 5)
    module.forward = lambda x: x - x.mean(0)  # type: ignore[method-assign, assignment]
    assert codes_of_module(module, X2) == ["SNNFX101"]


def test_parametrized_modules_are_still_their_class() -> None:
    assert codes_of_module(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), X2) == []


def test_a_declared_leaf_class_has_the_rules_of_its_torch_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Spike(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).to(x.dtype)

    assert codes_of_module(Wrapper(4, 5), X2) == ["SNNFX101"]
    assert codes_of_module(Spike(), X2) == ["SNNFX101"]
    monkeypatch.setattr(leaves_module, "_declared_leaves", dict(leaves_module._declared_leaves))
    declare_leaf(Wrapper)
    declare_leaf(Spike)
    assert codes_of_module(Wrapper(4, 5), X2) == []
    assert codes_of_module(Spike(), X2) == []
    assert codes_of_module(Wrapper(4, 5), (4,)) == ["SNNFX102"]


def test_a_module_that_says_it_is_elementwise_is_believed() -> None:
    class Spike(nn.Module):
        snnfx_elementwise = True

        def forward(self, x: Tensor) -> Tensor:
            return (x > 0).to(x.dtype)

    assert codes_of_module(Spike(), X2) == []


# --- state


class Neuron(MemoryModule):
    elementwise = True

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.5 * self.v + x
        return (self.v > 1).to(x)


def graph_with_state(
    step: Callable[[fx.Graph, fx.Node, fx.Node], tuple[Any, Any]], initial: Any = 0.0
) -> tuple[fx.Graph, fx.Node, fx.Node, dict[str, Any]]:
    """A graph of `(x, v) -> (output, next v)` as capture makes it."""
    graph = fx.Graph()
    x, v = graph.placeholder("x"), graph.placeholder("v")
    output, following = step(graph, x, v)
    graph.output(((output,), (following,), (initial,)))
    return graph, x, v, {"neuron": Neuron(), "p": torch.ones(4)}


def analyse_state(
    step: Callable[..., Any], initial: Any = 0.0, rank: int | None = 2
) -> tuple[BatchAnalysis, fx.Graph, fx.Node]:
    graph, x, v, parts = graph_with_state(step, initial)
    fact = model_input(x) if rank is None else Fact(Rank(rank), 0, N)
    following = graph.output_node().args[0][1][0]  # type: ignore[index]
    varying = {node for node in graph.nodes if node.op != "get_attr"}
    analysis = infer_batch(
        graph, parts.__getitem__, {x: fact}, carried={v: following}, varying=varying, training=False, batch_norm="fold"
    )
    return analysis, graph, v


def test_a_neuron_hands_the_place_of_the_batch_on() -> None:
    def step(graph: fx.Graph, x: fx.Node, v: fx.Node) -> tuple[Any, Any]:
        pair = graph.call_function(call_stateful, (graph.get_attr("neuron"), (v,), x))
        spike = graph.call_function(operator.getitem, (pair, 0))
        states = graph.call_function(operator.getitem, (pair, 1))
        following = graph.call_function(operator.getitem, (states, 0))
        return graph.call_method("flatten", (spike, 1)), following

    analysis, graph, v = analyse_state(step, rank=None)
    assert not analysis.refusals
    assert analysis.facts[v] == Fact(Rank(0, "x"), 0, N)
    assert analysis.facts[graph.output_node().args[0][0][0]] == Fact(Rank(2), 0, N)  # type: ignore[index]
    assert analysis.requirements == {"x": 2}


def test_a_slot_gets_its_fact_around_the_loop() -> None:
    def step(graph: fx.Graph, x: fx.Node, v: fx.Node) -> tuple[Any, Any]:
        decayed = graph.call_method("mul", (v, 0.5))
        following = graph.call_function(torch.add, (decayed, x))
        return graph.call_method("sum", (v, 1)), following

    analysis, _, v = analyse_state(step)
    assert not analysis.refusals
    assert analysis.facts[v] == Fact(Rank(2), 0, N)


def test_a_slot_that_moves_its_batch_each_step_has_none() -> None:
    def step(graph: fx.Graph, x: fx.Node, v: fx.Node) -> tuple[Any, Any]:
        following = graph.call_method("transpose", (graph.call_function(torch.add, (v, x)), 0, 1))
        return graph.call_method("sum", (v, 1)), following

    analysis, graph, v = analyse_state(step)
    assert analysis.facts[v] is UNKNOWN
    assert analysis.refusals[graph.output_node().args[0][0][0]].code == "SNNFX105"  # type: ignore[index]


def test_a_counter_is_not_known_to_have_a_batch() -> None:
    def step(graph: fx.Graph, x: fx.Node, v: fx.Node) -> tuple[Any, Any]:
        following = graph.call_method("add", (v, 1))
        return graph.call_method("mul", (x, following)), following

    analysis, graph, v = analyse_state(step)
    assert analysis.facts[v] is UNKNOWN
    assert analysis.refusals[graph.output_node().args[0][0][0]].code == "SNNFX105"  # type: ignore[index]


def test_an_initial_value_of_another_shape_is_seen() -> None:
    def step(graph: fx.Graph, x: fx.Node, v: fx.Node) -> tuple[Any, Any]:
        following = graph.call_function(torch.add, (v, x))
        return graph.call_method("sum", (v, 1)), following

    graph, x, v, parts = graph_with_state(step)
    with graph.inserting_before(graph.output_node()):
        initial = graph.get_attr("p")
    following = graph.output_node().args[0][1][0]  # type: ignore[index]
    varying = {node for node in graph.nodes if node.op != "get_attr"}

    def facts(initial: Any) -> Any:
        return infer_batch(
            graph,
            parts.__getitem__,
            {x: Fact(Rank(2), 0, N)},
            carried={v: following},
            varying=varying,
            training=False,
            batch_norm="fold",
            initial={v: initial},
        ).facts[v]

    assert facts(0.0) == Fact(Rank(2), 0, N)
    assert facts(initial) is UNKNOWN


def test_an_initial_value_has_the_shape_of_the_first_input() -> None:
    def step(graph: fx.Graph, x: fx.Node, v: fx.Node) -> tuple[Any, Any]:
        first = graph.call_function(initial_value, (graph.get_attr("neuron"), 0, x))
        return graph.call_function(torch.add, (first, x)), x

    analysis, _, _ = analyse_state(step)
    assert not analysis.refusals


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x


class ElementwiseSquare(Square):
    snnfx_elementwise = True


@pytest.mark.parametrize(("function", "expected"), [(Square, ["SNNFX101"]), (ElementwiseSquare, [])])
def test_an_autograd_function_is_folded_if_it_says_it_is_elementwise(function: Any, expected: list[str]) -> None:
    def fn(self: Any, x: Any) -> Any:
        return x.tracer.create_proxy("call_function", apply_autograd_function, (self.holder, x), {})

    class Tracer(_Tracer):
        def create_arg(self, a: Any) -> Any:
            return (
                self.create_node("get_attr", "holder", (), {})
                if isinstance(a, FunctionHolder)
                else super().create_arg(a)
            )

    root = type("Step", (nn.Module,), {"forward": fn})()
    root.holder = FunctionHolder(function)
    graph = Tracer().trace(root)
    x = next(iter(graph.nodes))
    varying = {node for node in graph.nodes if node.op != "get_attr"}
    analysis = infer_batch(
        graph,
        lambda target: getattr(root, target),
        {x: model_input(x)},
        carried={},
        varying=varying,
        training=True,
        batch_norm="fold",
    )
    assert [refusal.code for refusal in analysis.refusals.values()] == expected


def checked(x: Any, size: Any, expected: int) -> Any:
    record(expect_size, size, expected, "model.py:1")
    return x.relu()


def test_a_size_that_python_used_as_a_number_is_checked_in_a_fold_unless_it_is_the_batch() -> None:
    def codes(dim: int) -> list[str]:
        case = Case("", lambda self, x: checked(x, x.shape[dim], (2, 4)[dim]), [(2, 4)])
        return [refusal.code for refusal in case.analyse("known").refusals.values()]

    assert codes(1) == []
    assert codes(0) == ["SNNFX110"]


# --- whole models, without example inputs


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layers(x) * self.scale, dim=-1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))
        self.branch = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6))
        self.gain = nn.Parameter(torch.ones(1, 6, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.gain * self.branch(x))
        x = torch.cat([x, x.mean(1, keepdim=True)], dim=1)[:, :6]
        x = self.pool(x)
        return self.head(x.view(x.size(0), -1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.mix = nn.Linear(6, 18)
        self.token = nn.Parameter(torch.randn(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        y = self.norm(x).transpose(0, 1)
        x = x + self.attention(y, y, y)[0].transpose(0, 1)
        q, k, v = self.mix(x).chunk(3, dim=-1)
        scores = torch.softmax(q @ k.transpose(-2, -1), dim=-1)
        return (scores @ v)[:, 0]


@pytest.mark.parametrize(
    ("model", "shape", "least"),
    [(Perceptron(), (N, 4, 5), 2), (Residual(), (N, 4, 8, 8), 4), (Attention(), (N, 4, 6), 3)],
    ids=lambda value: type(value).__name__,
)
def test_whole_models_fold_without_example_inputs(model: nn.Module, shape: Sequence[Any], least: int) -> None:
    case = Case(
        "", type(model).forward, [shape], dict(model.named_children()) | dict(model.named_parameters(recurse=False))
    )
    for ranks in ("symbolic", "known", "values"):
        analysis = case.analyse(ranks)
        assert not analysis.refusals
        probe(case, analysis)
        if ranks == "symbolic":
            assert analysis.requirements == {"x": least}


def test_a_graph_of_torch_fx_is_enough() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Conv1d(4, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(25, 3)))
    x = next(iter(traced.graph.nodes))
    analysis = infer_batch(
        traced.graph,
        traced.get_submodule,
        {x: model_input(x)},
        carried={},
        varying=set(traced.graph.nodes),
        training=False,
        batch_norm="fold",
    )
    assert not analysis.refusals
    assert analysis.requirements == {x.name: 3}


def test_two_inputs_of_unknown_rank_are_not_aligned_by_guess() -> None:
    case = Case("", lambda self, x, y: x + y, [X2, X2])
    assert [r.code for r in case.analyse("symbolic").refusals.values()] == ["SNNFX111"]


def test_facts_go_on_behind_a_refused_node() -> None:
    case = Case("", lambda self, x: (x - x.mean(0, keepdim=True)).relu() + x, [X3])
    for ranks in ("known", "symbolic"):
        analysis = case.analyse(ranks)
        refused = {str(node): refusal.code for node, refusal in analysis.refusals.items()}
        if ranks == "known":
            assert refused == {"mean": "SNNFX103", "sub": "SNNFX105"}
        last = analysis.facts[case.graph.output_node().args[0]]  # type: ignore[index]
        assert ranks == "symbolic" or last == Fact(Rank(3), 0, N)


def test_an_example_that_contradicts_the_table_vetoes() -> None:
    case = Case("", lambda self, x: x.relu(), [X3])
    case.analyse("values")
    relu = case.graph.output_node().args[0]
    relu.meta["val"] = torch.empty(7, 4, 5)
    x = case.placeholders[0]
    analysis = infer_batch(
        case.graph,
        case.resolve,
        {x: model_input(x)},
        carried={},
        varying=case.varying(),
        training=False,
        batch_norm="fold",
    )
    assert analysis.refusals[relu].code == "SNNFX101"


def test_a_reason_names_the_call_and_the_hint_says_what_to_do() -> None:
    case = Case("", lambda self, x: x.mean(0), [X3])
    (refusal,) = case.analyse("known").refusals.values()
    assert refusal.reason == "`x.mean(0)` operates along dim 0, the batch dimension"
    assert refusal.hint == "Use a feature dimension, e.g. dim=1, if that was not intended."


# --- random programs


Operation = Callable[[Any, list[Any]], Any]


def operations(draw: st.DrawFn, pool: list[Any]) -> Operation:
    """One random operation on values of the pool, legal or not."""
    i, j = (draw(st.integers(0, len(pool) - 1)) for _ in range(2))
    a, b = (draw(st.integers(-4, 3)) for _ in range(2))
    k = draw(st.integers(1, 3))
    keep = draw(st.booleans())
    index = tuple(
        draw(
            st.lists(
                st.sampled_from([slice(None), 0, -1, None, slice(0, 2), slice(1, None), Ellipsis]),
                min_size=1,
                max_size=3,
            )
        )
    )
    entries = tuple(draw(st.lists(st.sampled_from(["B", -1, 1, 2, 3, 4, 6]), min_size=1, max_size=3)))

    def shape(x: Any) -> tuple[Any, ...]:
        return tuple(x.shape[0] if entry == "B" else entry for entry in entries)

    choices: list[Operation] = [
        lambda self, p: p[i].relu(),
        lambda self, p: p[i] + p[j],
        lambda self, p: p[i] * self.w,
        lambda self, p: p[i] - self.v,
        lambda self, p: torch.where(p[i] > 0.5, p[i], p[j]),
        lambda self, p: p[i].softmax(a),
        lambda self, p: p[i].cumsum(a),
        lambda self, p: p[i].sum(a, keepdim=keep),
        lambda self, p: p[i].mean((a, b), keepdim=keep),
        lambda self, p: p[i].max(a)[0],
        lambda self, p: p[i] - p[i].mean(a, keepdim=keep),
        lambda self, p: p[i].transpose(a, b),
        lambda self, p: p[i].movedim(a, b),
        lambda self, p: p[i].permute(*([2, 0, 1] if keep else [1, 0])),
        lambda self, p: p[i].unsqueeze(a),
        lambda self, p: p[i].squeeze(a),
        lambda self, p: p[i].flatten(a, b),
        lambda self, p: p[i].unflatten(a, (k, -1) if keep else (-1, k)),
        lambda self, p: p[i].reshape(shape(p[j])),
        lambda self, p: p[i].expand(shape(p[j])),
        lambda self, p: p[i].repeat(shape(p[j])),
        lambda self, p: p[i][index],
        lambda self, p: p[i].chunk(2, a)[0],
        lambda self, p: p[i].select(a, 0),
        lambda self, p: torch.cat([p[i], p[j]], a),
        lambda self, p: torch.stack([p[i], p[j]], a),
        lambda self, p: torch.matmul(p[i], p[j]),
        lambda self, p: torch.matmul(p[i], p[j].transpose(-1, -2)),
        lambda self, p: p[i] @ self.w,
        lambda self, p: self.w @ p[i],
        lambda self, p: torch.einsum("...i,i->...", p[i], self.v),
        lambda self, p: torch.einsum("ij,jk->ki" if keep else "ijk,ikl->ijl", p[i], p[j]),
        lambda self, p: F.layer_norm(p[i], (3,) * k),
        lambda self, p: F.pad(p[i], (1, 0) * k),
        lambda self, p: F.avg_pool1d(p[i], k),
        lambda self, p: F.normalize(p[i], dim=a),
        lambda self, p: p[i] / p[j].shape[a],
        lambda self, p: p[i].new_ones(shape(p[j])) * p[i],
        lambda self, p: p[i].repeat_interleave(2, a),
        lambda self, p: p[i].flip(a),
        lambda self, p: p[i].gather(a, (p[j] > 1e9).long()),
        lambda self, p: F.scaled_dot_product_attention(p[i], p[j], p[j]),
    ]
    return draw(st.sampled_from(choices))


@st.composite
def random_programs(draw: st.DrawFn) -> Case:
    """A chain of operations that runs on one step; sizes are few and small, so that they coincide by chance."""
    shapes = [tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))) for _ in range(draw(st.integers(1, 2)))]
    n = draw(st.integers(1, 3))
    shapes = [(n, *shape) for shape in shapes]
    parts = {"w": torch.rand(3, 3), "v": torch.rand(3)}
    holder = type("Parts", (), {name: part.double() for name, part in parts.items()})()
    values = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    chain: list[Operation] = []
    for _ in range(draw(st.integers(1, 6))):
        operation = operations(draw, values)
        try:
            value = operation(holder, values)
        except (RuntimeError, IndexError, TypeError, ValueError):
            continue
        if value.numel() < 2000:
            values.append(value)
            chain.append(operation)

    def run(self: Any, pool: list[Any]) -> Any:
        for operation in chain:
            pool.append(operation(self, pool))
        return pool[-1]

    fn = (lambda self, x: run(self, [x])) if len(shapes) == 1 else (lambda self, x, y: run(self, [x, y]))
    return Case("random", fn, shapes, parts)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(random_programs())
def test_random_programs_fold_where_the_table_lets_them(case: Case) -> None:
    for ranks in ("known", "values", "symbolic"):
        analysis = case.analyse(ranks)
        ranks_of = {node.name: len(shape) for node, shape in zip(case.placeholders, case.shapes, strict=True)}
        if all(least <= ranks_of[name] for name, least in analysis.requirements.items()):
            probe_at_own_size(case, analysis)


# --- an independent oracle: DTensor's sharding propagation. What folds is what needs no communication when the batch is
# --- sharded, and comes out sharded where the table says the batch is.


STRICTER_ORACLE = {
    "tril": "DTensor gathers: its rule takes a replicated matrix",
    "CircularPad": "made of slices and copies that DTensor gathers",
    "BatchNorm": "in evaluation no statistics of the batch are used; DTensor has one rule for both modes",
    "batch_norm": "the same",
    "expand a": "made of a parameter alone: DTensor keeps it replicated, at the full size",
    "repeat a parameter": "the same",
    "new_zeros": "the same",
}
"""Parts of names of cases that fold although DTensor communicates or replicates, and why."""


UNJUDGED = {
    "made of sizes alone, not of a sharded tensor": "arange empty eye full linspace new_full new_ones new_zeros ones "
    "rand randn scalar_tensor tensor zeros ones_per_sample",
    "DTensor has no rule": "bilinear fold normal poisson unfold unfold_dim cut_history draw_dropout_mask update_trace "
    "change_value",
    "attention without a fused kernel takes DTensor minutes": "nn.MultiheadAttention nn.TransformerEncoder "
    "scaled_dot_product_attention",
    "stricter than folding, see STRICTER_ORACLE": "batch_norm expand_as tril triu",
}
"""Rows that only the numeric probe judges, by the reason."""


def dtensor_verdicts() -> dict[str, str]:
    """For each legal case: "ok", "no rule: ..." or what DTensor does that folding could not."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    verdicts = {}
    for case in LEGAL:
        # Attention without a fused kernel takes DTensor minutes.
        if not case.training and "ttention" not in case.name and "Encoder" not in case.name:
            both = [dtensor_verdict(case, n, mesh) for n in (4, 6)]
            verdicts[case.name] = next((verdict for verdict in both if verdict != "ok"), "ok")
    return verdicts


def dtensor_verdict(case: Case, n: int, mesh: Any) -> str:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    def replicated(tensor: Any) -> Any:
        return (
            DTensor.from_local(tensor, mesh, [Replicate()], run_check=False) if isinstance(tensor, Tensor) else tensor
        )

    def sharded(tensor: Tensor) -> Any:
        return DTensor.from_local(tensor.chunk(2)[0].contiguous(), mesh, [Shard(0)], run_check=False)

    facts = case.analyse("known").facts
    values: dict[fx.Node, Any] = dict(zip(case.placeholders, map(sharded, case.inputs(n)[0]), strict=True))
    communication = CommDebugMode()
    for node in case.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            values[node] = replicated(case.resolve(str(node.target)))
            continue
        try:
            with communication:
                if node.op == "call_module":
                    module = case.resolve(str(node.target))
                    weights = {k: replicated(v) for k, v in (*module.named_parameters(), *module.named_buffers())}
                    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                    values[node] = torch.func.functional_call(module, weights, args, kwargs)
                else:
                    values[node] = case.run_node(node, values)
        except (NotImplementedError, RuntimeError) as error:
            return f"no rule: {error}"
        if communication.get_total_counts():
            return f"communication at {node}"
        results = values[node] if isinstance(values[node], tuple | list) else (values[node],)
        expected = facts[node] if isinstance(facts[node], tuple) else (facts[node],)
        if isinstance(expected, UniformTuple):
            expected = (expected[0],) * len(results)
        for result, fact in zip(results, expected, strict=True):
            if isinstance(result, Tensor) and not isinstance(result, DTensor):
                return f"no rule: {node} is made of sizes alone"
            batched = isinstance(result, DTensor) and isinstance(fact, Fact) and fact.dim is not None
            if batched and result.placements != (Shard(fact.dim),):
                return f"{node} has {result.placements}, the table says the batch is at {fact.dim}"
    return "ok"


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no torch.distributed")
def test_the_sharding_propagation_of_dtensor_agrees() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout.splitlines()[-1])
    disagreements = {name: v for name, v in verdicts.items() if v != "ok" and not v.startswith("no rule")}
    unexplained = {name: v for name, v in disagreements.items() if not any(part in name for part in STRICTER_ORACLE)}
    assert not unexplained
    assert {part for part in STRICTER_ORACLE if not any(part in name for name in disagreements)} == set()
    assert sum(v == "ok" for v in verdicts.values()) > 400
    judged = {
        found.name
        for case in LEGAL
        if verdicts.get(case.name) == "ok"
        for node in case.graph.nodes
        if node.op.startswith("call") and (found := find_rule(node, case.resolve)) is not None
    }
    unjudged = {name for names in UNJUDGED.values() for name in names.split()}
    assert set(row_names()) - judged - NEVER_LEGAL - NEEDS_A_GPU - TESTED_ELSEWHERE <= unjudged
    assert unjudged & judged == set(), "the oracle judges these now"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps(dtensor_verdicts()))
