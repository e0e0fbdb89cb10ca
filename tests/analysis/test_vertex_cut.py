"""The cheapest cut of values agrees with a search through all subsets."""

import itertools
import math
import random

import pytest

from snnfx.analysis.vertex_cut import VertexCut


def _separates(cut, operands, sources, needed):
    """Whether all needed values can be computed from a set of values."""
    stack, seen = [v for v in needed if v not in cut], set()
    while stack:
        value = stack.pop()
        if value in sources:
            return False
        if value not in seen:
            seen.add(value)
            stack += [o for o in operands[value] if o not in cut]
    return True


def _graph(costs, operands, sources, needed):
    cut = VertexCut()
    for value, cost in costs.items():
        cut.add_value(value, cost)
        for operand in operands[value]:
            cut.add_operand(value, operand)
    for value in sources:
        cut.add_source(value)
    for value in needed:
        cut.add_needed(value)
    return cut


@pytest.mark.parametrize("seed", range(30))
def test_cut_costs_no_more_than_any_subset(seed):
    draw = random.Random(seed)
    n = draw.randint(2, 8)
    costs = {v: draw.choice([0.25, 1.0, 2.0, math.inf]) for v in range(n)}
    operands = {v: [o for o in range(v) if draw.random() < 0.4] for v in range(n)}
    sources = {v for v in range(n) if not operands[v]} | {v for v in range(n) if draw.random() < 0.1}
    needed = draw.sample(range(n), draw.randint(1, n))
    subsets = itertools.chain.from_iterable(itertools.combinations(range(n), k) for k in range(n + 1))
    least = min(sum(costs[v] for v in s) for s in subsets if _separates(set(s), operands, sources, needed))
    cut = _graph(costs, operands, sources, needed).cheapest()
    if least == math.inf:
        assert cut is None
    else:
        assert _separates(cut, operands, sources, needed)
        assert sum(costs[v] for v in cut) == least


def test_cut_is_empty_without_sources():
    assert _graph({"a": 1.0, "b": 1.0}, {"a": [], "b": ["a"]}, [], ["b"]).cheapest() == set()


def test_cut_is_empty_if_nothing_is_needed():
    assert _graph({"a": 1.0}, {"a": []}, ["a"], []).cheapest() == set()


def test_value_of_infinite_cost_is_in_no_cut():
    costs = {"a": math.inf, "b": 5.0, "c": math.inf}
    assert _graph(costs, {"a": [], "b": ["a"], "c": ["b"]}, ["a"], ["c"]).cheapest() == {"b"}


def test_there_is_no_cut_if_all_values_on_a_path_cost_infinitely_much():
    assert _graph({"a": math.inf, "b": math.inf}, {"a": [], "b": ["a"]}, ["a"], ["b"]).cheapest() is None
