"""Find folds whose inputs have batches of different sizes.

Inside a fold, a batch may change its size: `x.flatten(0, 1)` makes a larger one, `h.view_as(x)` goes back. But T is
folded into the inputs of a fold as into one batch. So where values with different batches come in from outside and meet
in a node, such as the spikes of `lif(x.flatten(0, 1))` and `x` in `view_as`, that node is not folded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch.fx import Node

from snnfx.analysis.batch.facts import Fact, Value, leaves
from snnfx.analysis.dependence import operands_through_sizes
from snnfx.errors import Refusal
from snnfx.ir.printing import operation_name
from snnfx.ir.program import Region

__all__ = ["find_mixed_batches_in_folds", "has_mixed_batches_in_loop", "sizes_of"]


def find_mixed_batches_in_folds(regions: Iterable[Region], facts: Mapping[Node, Value]) -> dict[Node, Refusal]:
    """The nodes of folds in which inputs with batches of different sizes meet, with the reason not to fold them."""
    found: dict[Node, Refusal] = {}
    for region in regions:
        if region.kind == "fold":
            for node, sizes in _mixed_batches(region, facts):
                reason = f"`{operation_name(node)}` takes values with batches of different sizes ({', '.join(sizes)})"
                found[node] = Refusal("SNNFX105", reason)
    return found


def has_mixed_batches_in_loop(region: Region, facts: Mapping[Node, Value]) -> bool:
    """Whether the inputs and states of a loop have batches of different sizes, so that its steps do not fold."""
    outside = {n for node in region.nodes for n in operands_through_sizes(node)} - set(region.nodes)
    slots = {node for node in region.nodes if node.op == "placeholder"}
    return len({size for node in outside | slots for size in sizes_of(facts.get(node))}) > 1


def _mixed_batches(region: Region, facts: Mapping[Node, Value]) -> Iterator[tuple[Node, list[str]]]:
    """The first nodes behind inputs of different sizes, with these sizes."""
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
    """The sizes of the batches of a value: one, or one for each element of a tuple."""
    return (fact.size for fact in leaves(value) if isinstance(fact, Fact) and fact.batched and fact.size is not None)
