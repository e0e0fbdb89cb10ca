"""The table of batch rules against torch: what it lets through folds exactly, what does not fold it refuses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from snnfx.passes.batch import BatchAnalysis, Fact, SizeFact, infer_batch, model_input
from snnfx.passes.batch_facts import OTHER, UNKNOWN, Rank, Repeated, ShapeFact, leaves
from snnfx.passes.batch_lookup import look_up, row_names
from snnfx.passes.batch_rules import MODULES

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
            part = part.double() if isinstance(part, nn.Module) or (isinstance(part, Tensor) and part.is_floating_point()) else part
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
        steps = [[_random([n if d == N else d for d in shape], self.kind, generator) for shape in self.shapes] for _ in range(T)]
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
        row = look_up(node, self.resolve) if node.op.startswith("call") else None
        return row is not None and row.row.random

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
        return torch.rand(*shape, generator=generator) < 0.5
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


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
    if isinstance(fact, Repeated):
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
            assert sizes.setdefault(str(fact.size), size) == size, (node, fact, value.shape)
        for known, size in zip(fact.known, value.shape, strict=False):
            assert known in (None, size), (node, fact, value.shape)


def fold(fact: Any, values: list[Any]) -> Any:
    """The value that a folded region has for the values of T steps."""
    if isinstance(fact, Repeated):
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
    operands = {}
    row = look_up(node, case.resolve)
    for operand in node.all_input_nodes:
        fact = analysis.facts[operand]
        assert not any(leaf is UNKNOWN for leaf in leaves([fact])), (node, operand)
        if any(isinstance(leaf, Fact) and leaf.varying and not leaf.batched for leaf in leaves([fact])):
            assert row is not None, node
            assert row.row.shape_only, f"{node} was let through with an operand that varies but has no batch"
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
