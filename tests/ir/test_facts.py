"""Facts of nodes: every key of `node.meta` in the source is a typed fact, cleared by the rule of its stage."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import snnfx
from snnfx.ir.facts import BATCH_DIM, FACTS, KIND, VALUE, VARYING, Fact, clear_facts, copy_facts

ROOT = Path(__file__).parents[2]
FOREIGN = {"nn_module_stack", "module_class", "operation"}
"""Keys of torch, of nodes of a pattern, and of the graph that the export to NIR records."""


def keys_of_meta(tree: ast.AST) -> Iterator[str]:
    """The constant keys that code reads, sets or removes on an attribute `meta`."""
    for node in ast.walk(tree):
        key: ast.expr | None = None
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "meta":
            key = node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            owner = node.func.value
            if isinstance(owner, ast.Attribute) and owner.attr == "meta":
                key = node.args[0]
        elif isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Attribute):
            key = node.left if node.comparators[0].attr == "meta" else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            yield key.value


def test_every_key_in_the_source_is_a_fact() -> None:
    files = [*(ROOT / "snnfx").rglob("*.py"), *(ROOT / "passes").glob("*.py")]
    used = {key: file.name for file in files for key in keys_of_meta(ast.parse(file.read_text(encoding="utf-8")))}
    assert len(used) > 5
    assert {key: file for key, file in used.items() if key not in FACTS and key not in FOREIGN} == {}


def node() -> fx.Node:
    return fx.Graph().placeholder("x")


def test_a_fact_has_a_default_and_can_be_set_and_cleared() -> None:
    x = node()
    assert KIND.of(x) == "" and VARYING.of(x) is True and not KIND.is_known(x)
    KIND.set(x, "fold")
    assert KIND.of(x) == "fold" and KIND.is_known(x)
    KIND.clear(x)
    KIND.clear(x)
    assert not KIND.is_known(x)


@pytest.mark.parametrize("fact", FACTS.values(), ids=lambda fact: fact.key)
def test_a_program_that_returns_to_a_stage_loses_the_facts_of_later_stages(fact: Fact) -> None:
    x = node()
    x.meta[fact.key] = fact.default
    clear_facts([x], since="partitioned")
    assert fact.is_known(x) == (fact.since in ("captured", "normalized"))


@pytest.mark.parametrize("fact", FACTS.values(), ids=lambda fact: fact.key)
def test_the_default_has_a_legal_type(fact: Fact) -> None:
    assert fact.default is None or fact.has_legal_type(fact.default)


def test_an_unplanned_program_has_no_fact_of_a_plan() -> None:
    net = snnfx.convert(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), snnfx.neuron.LIFNode()).eval(), reduce="sum"
    )
    program = net.program.copy().unplanned()
    late = {key for key, fact in FACTS.items() if fact.since not in ("captured", "normalized")}
    assert not [n for n in program.graph.nodes if late & n.meta.keys()]


def test_copied_facts_replace_all_others() -> None:
    x, y = node(), node()
    VALUE.set(x, torch.empty(3, device="meta"))
    BATCH_DIM.set(x, 0)
    KIND.set(y, "loop")
    copy_facts(x, y)
    assert y.meta.keys() == {"val"}
