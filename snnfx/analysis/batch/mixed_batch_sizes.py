"""Find folds whose inputs have different batch sizes.

Inside a fold, the batch size may change: `x.flatten(0, 1)` makes it larger, `h.view_as(x)` restores it. But T is folded
into one batch size, shared by all inputs of the fold. A node that combines inputs of different batch sizes, such as the
spikes of `lif(x.flatten(0, 1))` and `x` in `view_as`, is therefore not folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch.fx import Node

from snnfx.analysis.batch.facts import Fact, Value, leaves
from snnfx.analysis.dependence import operands_through_sizes
from snnfx.errors import Refusal
from snnfx.ir.facts import FOLDS_DIM_0
from snnfx.ir.printing import operation_name
from snnfx.ir.program import Region

__all__ = ["find_mixed_batches_in_folds", "has_mixed_batches_in_loop", "sizes_of"]


def find_mixed_batches_in_folds(regions: Iterable[Region], facts: Mapping[Node, Value]) -> dict[Node, Refusal]:
    """The nodes that combine fold inputs of different batch sizes, with the reason not to fold them."""
    found: dict[Node, Refusal] = {}
    for region in regions:
        if region.kind == "fold" and not FOLDS_DIM_0.is_known(region.nodes[0]):
            for node, sizes in _mixed_batches(region, facts):
                reason = f"`{operation_name(node)}` combines values of different batch sizes ({', '.join(sizes)})"
                found[node] = Refusal("SNNFX105", reason)
    return found


def has_mixed_batches_in_loop(region: Region, facts: Mapping[Node, Value]) -> bool:
    """Whether the inputs and states of a loop have different batch sizes, so that its steps cannot be folded."""
    outside = {n for node in region.nodes for n in operands_through_sizes(node)} - set(region.nodes)
    slots = {node for node in region.nodes if node.op == "placeholder"}
    return len({size for node in outside | slots for size in sizes_of(facts.get(node))}) > 1


def _mixed_batches(region: Region, facts: Mapping[Node, Value]) -> Iterator[tuple[Node, list[str]]]:
    """The first nodes that depend on inputs of different batch sizes, with these sizes."""
    reaching: dict[Node, dict[str, None]] = {}  # the sizes of the inputs that a node depends on
    for node in region.nodes:
        sizes: dict[str, None] = {}
        is_first = True
        for operand in operands_through_sizes(node):
            inside = reaching.get(operand)
            sizes.update(dict.fromkeys(sizes_of(facts.get(operand))) if inside is None else inside)
            is_first = is_first and (inside is None or len(inside) < 2)
        reaching[node] = sizes
        if is_first and len(sizes) > 1:
            yield node, list(sizes)


def sizes_of(value: Value | None) -> Iterator[str]:
    """The batch sizes of a value: one, or one for each element of a tuple."""
    return (fact.size for fact in leaves(value) if isinstance(fact, Fact) and fact.batched and fact.size is not None)
