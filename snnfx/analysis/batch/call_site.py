"""One call under analysis: its arguments as facts, and the reason not to fold it."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.fx import Node

from snnfx.analysis.batch.facts import (
    UNDETERMINED,
    UNKNOWN,
    Fact,
    Rank,
    ShapeFact,
    SizeFact,
    Value,
    leaves,
    rank_difference,
)
from snnfx.errors import Refusal
from snnfx.ir.printing import operation_name

__all__ = [
    "CallSite",
    "broadcast",
    "common_fact",
    "constant_int",
    "is_batch_sized",
    "require_trailing",
    "without_batch",
]


@dataclass
class CallSite:
    """A call in the step graph.

    Args:
        node: the call.
        name: name of the operation in the rule table.
        arguments: argument name -> fact, Python value, or a nested container of both.
        module: the called module, if any.
        training, batch_norm: as for `infer_batch`.
        inputs: names of the model's inputs, whose rank may be required.
        refusal: why the node is not folded (the first reason).
        requirements: input name -> least rank of one step that the rules assumed.
        multiples: size symbol -> the size symbol that it is a multiple of, and the other factor if that is one size;
            for all sites of an analysis.
    """

    node: Node
    name: str
    arguments: dict[str, Any]
    module: nn.Module | None
    training: bool
    batch_norm: str
    inputs: Set[str]
    refusal: Refusal | None = None
    requirements: dict[str, int] = field(default_factory=dict)
    multiples: dict[str, tuple[str, object]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def refuse(self, code: str, reason: str, hint: str = "") -> None:
        """Do not fold this node."""
        if self.refusal is None:
            self.refusal = Refusal(code, reason, hint)

    @property
    def fresh(self) -> str:
        """A size symbol of this node alone, equal in every iteration of the analysis."""
        return f"size({self.node.name})"

    def fresh_multiple(self, symbol: str, factor: object = None) -> str:
        """`fresh`, for a size that is a multiple of another one; `factor` identifies the other factor."""
        self.multiples[self.fresh] = symbol, factor
        return self.fresh

    def is_multiple(self, symbol: str, of: str) -> bool:
        """Whether a size is a multiple of another one, which does not depend on the batch size."""
        found: str | None = symbol
        while found is not None and found != of:
            factor, _, base = found.rpartition("*")
            found = base if factor else self.multiples.get(found, (None, None))[0]
        return found == of

    @property
    def text(self) -> str:
        """The call in Python syntax, for messages."""
        node = self.node
        args = [*map(_text, node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())]
        if node.op == "call_method":
            return f"`{args[0]}.{node.target}({', '.join(args[1:])})`"
        if operation_name(node) == "getitem":
            inner = node.args[1]
            index = ", ".join(map(_text, inner)) if isinstance(inner, tuple) else args[1]
            return f"`{args[0]}[{index}]`"
        name = str(node.target) if node.op == "call_module" else operation_name(node)
        return f"`{name}({', '.join(args)})`"

    def require(self, rank: Rank, least: int, why: str) -> bool:
        """Whether a value has at least `least` dimensions; records this as a requirement of the input where unknown.

        `why` completes the sentence "the call ..., so it needs `least` dimensions".
        """
        if rank.known is not None:
            if rank.known < least:
                self.refuse(
                    "SNNFX102",
                    f"{self.text} {why}, so it needs {least} dimensions, but one step has {rank.known}",
                    f"Give each step at least {least} dimensions, the first of them the batch.",
                )
            return rank.known >= least
        if rank.base in self.inputs:
            needed = max(least - rank.offset, self.requirements.get(rank.base, 0))
            self.requirements[rank.base] = needed
            return True
        self.refuse_rank(why)
        return False

    def refuse_rank(self, why: str = "depends on the rank") -> None:
        """Do not fold: the rule needs a rank that is unknown."""
        self.refuse("SNNFX111", f"{self.text} {why}, but the number of dimensions is unknown", "Pass example_inputs.")

    def refuse_mixing(self, fact: Fact, what: str, hint: str = "") -> None:
        """Do not fold: the operation combines elements along the batch dimension."""
        self.refuse("SNNFX103", f"{self.text} {what} dim {fact.dim}, the batch dimension", hint)

    def axis(self, fact: Fact, dim: Any) -> int | None:
        """A `dim` argument counted from the left; negative where it is known to be to the right of the batch.

        Returns None and refuses the site if `dim` is not a constant.
        """
        place = constant_int(dim)
        if place is None:
            self.refuse("SNNFX101", f"the dimension of {self.text} is not a constant")
            return None
        if place >= 0:
            return place
        if fact.rank.known is not None:
            return place + fact.rank.known
        if fact.dim is not None:
            self.require(fact.rank, fact.dim + 1 - place, f"counts dim {place} from the right")
        return place

    def axes(self, fact: Fact, dims: Any) -> list[int] | None:
        """`axis` for one dimension or several."""
        found = [self.axis(fact, dim) for dim in leaves(dims)]
        return None if None in found else [axis for axis in found if axis is not None]


def _text(value: Any) -> str:
    if isinstance(value, slice):
        parts = ["" if part is None else _text(part) for part in (value.start, value.stop)]
        return ":".join(parts) + (f":{_text(value.step)}" if value.step is not None else "")
    return "..." if value is Ellipsis else str(value)


def constant_int(value: Any) -> int | None:
    """The value of a constant int, literal or computed from ranks; None for anything else."""
    if isinstance(value, SizeFact):
        return value.value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_batch_sized(value: Any) -> bool:
    """Whether a Python value contains the batch size."""
    return any(
        (isinstance(leaf, SizeFact) and leaf.symbol is not None) or (isinstance(leaf, ShapeFact) and leaf.of.batched)
        for leaf in leaves(value)
    )


def without_batch(rank: Rank) -> Fact:
    """The fact of a value that varies in time and has lost its batch dimension."""
    return Fact(rank, varying=True)


def require_trailing(site: CallSite, fact: Fact, count: int) -> bool:
    """Whether the batch is in front of the last `count` dimensions; refuses the site otherwise."""
    if fact.dim is None:
        return True
    if fact.dim > 0 and fact.rank.known is not None and fact.rank.known < fact.dim + 1 + count:
        site.refuse_mixing(fact, f"works on the last {count} dimensions, which include")
        return False
    return site.require(
        fact.rank, fact.dim + 1 + count, f"works on the last {count} dimensions and needs a batch in front of them"
    )


def broadcast(site: CallSite, values: Iterable[Any]) -> Value:
    """The fact of an element-wise result, by the broadcasting rules of torch.

    The batch dimensions of all operands must coincide, counted from the right. An operand without a batch must be
    invariant in time and must have size 1 where it overlaps the batch.
    """
    operands = list(leaves(list(values)))
    if any(is_batch_sized(operand) for operand in operands):
        site.refuse(
            "SNNFX110",
            f"{site.text} computes with the batch size",
            "Use the size of a feature dimension, or take a mean over a feature dimension.",
        )
    tensors = [operand for operand in operands if isinstance(operand, Fact)]
    if UNKNOWN in operands:
        site.refuse("SNNFX105", f"the batch dimension of an operand of {site.text} is unknown")
        return UNKNOWN
    if not tensors:
        return UNDETERMINED if UNDETERMINED in operands else UNKNOWN
    batched = [tensor for tensor in tensors if tensor.batched]
    if not batched:
        # An undetermined slot may add a batch and more dimensions than the constants have.
        return UNDETERMINED if UNDETERMINED in operands else _broadcast_constants(tensors)
    result = batched[0]
    for tensor in batched[1:]:
        merged = _merge_batched(site, result, tensor)
        if merged is None:
            return UNKNOWN
        result = merged
    for tensor in tensors:
        if not tensor.batched:
            merged = _merge_constant(site, result, tensor)
            if merged is None:
                return UNKNOWN
            result = merged
    return result


def _broadcast_constants(tensors: list[Fact]) -> Value:
    if len(tensors) == 1:
        return tensors[0]
    ranks = [tensor.rank for tensor in tensors]
    gaps = [rank_difference(rank, ranks[0]) for rank in ranks]
    varying = any(tensor.varying for tensor in tensors)
    if any(g is None for g in gaps):
        return UNKNOWN
    largest = max(g for g in gaps if g is not None)
    return Fact(ranks[0] + largest, varying=varying)


def _merge_batched(site: CallSite, a: Fact, b: Fact) -> Fact | None:
    assert a.dim is not None and b.dim is not None
    from_right = rank_difference(a.rank - a.dim, b.rank - b.dim)
    if from_right is None:
        site.refuse_rank("broadcasts operands of different rank")
        return None
    if from_right != 0:
        site.refuse("SNNFX105", f"the operands of {site.text} have their batch in different dimensions ({a}; {b})")
        return None
    if a.size != b.size:
        reason = f"the operands of {site.text} may have different batch sizes ({a.size}, {b.size})"
        site.refuse("SNNFX105", reason)
        return None
    if a.dim == b.dim and a.known != b.known:
        return replace(a, known=())
    return a if a.dim >= b.dim else b


def _merge_constant(site: CallSite, result: Fact, constant: Fact) -> Fact | None:
    """The fact of `result`, which has a batch, broadcast with a tensor without one."""
    assert result.dim is not None
    if constant.varying:
        site.refuse(
            "SNNFX105",
            f"an operand of {site.text} varies in time but has no batch dimension",
            "Compute that operand for each sample, or keep it: the result is the same, only slower.",
        )
    if constant.rank.known == 0:
        return result
    right = result.rank - result.dim  # the batch is the `right`-th dimension from the right
    reach = rank_difference(constant.rank, right)
    if reach is None:
        return _merge_unrelated(site, result, constant)
    if reach < 0:
        return result
    if reach > 0 and result.known:
        result = replace(result, known=())  # the constant may have larger dimensions in front of the batch
    assert result.dim is not None
    size = constant.known[reach] if reach < len(constant.known) else None
    if size != 1:
        code = "SNNFX105" if constant.varying else "SNNFX104"
        site.refuse(code, f"an operand of {site.text} has a fixed size in the batch dimension of the other operand")
        return None
    return result if reach <= result.dim else Fact(constant.rank, reach, result.size)


def _merge_unrelated(site: CallSite, result: Fact, constant: Fact) -> Fact | None:
    rank = constant.rank.known
    if rank is None or result.rank.known is not None:
        site.refuse_rank("broadcasts operands of different rank")
        return None
    assert result.dim is not None
    ones = next((i for i, size in enumerate(constant.known) if size != 1), len(constant.known))
    why = f"broadcasts with a constant of {rank} dimensions that must not overlap the batch"
    if not site.require(result.rank, max(result.dim + 1 + rank - ones, rank), why):
        return None
    return result


def common_fact(site: CallSite, values: Iterable[Any], equal_ranks: bool = True) -> Fact | None:
    """The fact shared by tensors that must have the same rank and batch; None after a refusal.

    If no tensor has a batch, this is the fact of the first. `equal_ranks`: torch raises for different ranks.
    """
    tensors = list(leaves(list(values)))
    if not tensors or not all(isinstance(tensor, Fact) for tensor in tensors):
        site.refuse("SNNFX105", f"the batch dimension of an operand of {site.text} is unknown")
        return None
    batched = [tensor for tensor in tensors if tensor.batched]
    if not batched:
        return tensors[0]  # type: ignore[no-any-return]
    # Prefer a known rank: the other operands have the same, or torch raises.
    first: Fact = min(batched, key=lambda fact: fact.rank.known is None)
    for tensor in tensors:
        if not tensor.batched:
            code = "SNNFX105" if tensor.varying else "SNNFX104"
            site.refuse(code, f"an operand of {site.text} has no batch dimension, but another has one")
            return None
        known = first.rank.known
        if equal_ranks and known is not None and tensor.rank.known is None:
            tensor = (
                replace(tensor, rank=first.rank)
                if site.require(tensor.rank, known, "takes operands of one rank")
                else tensor
            )
        if (tensor.rank, tensor.dim, tensor.size) != (first.rank, first.dim, first.size):
            site.refuse("SNNFX105", f"the operands of {site.text} have different batch dimensions ({first}; {tensor})")
            return None
    return first
