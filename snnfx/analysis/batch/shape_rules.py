"""Batch rules of permutations, views and expansion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from snnfx.analysis.batch.call_site import CallSite, broadcast, constant_int, is_batch_sized, without_batch
from snnfx.analysis.batch.facts import UNKNOWN, Fact, Rank, ShapeFact, SizeFact, Value, leaves

__all__ = ["expand", "flatten", "interleave", "is_known_size", "literal_sizes", "move_batch", "move_dims", "permute"]
__all__ += [
    "refuse_batch_size",
    "repeat",
    "reverse",
    "squeeze",
    "transpose",
    "transpose_last",
    "unflatten",
    "unsqueeze",
]
__all__ += ["view", "view_as"]


def move_batch(fact: Fact, dim: int | None, change: int = 0) -> Fact:
    """The fact with the batch in `dim` and `change` more dimensions."""
    return Fact(fact.rank + change, dim, fact.size, varying=fact.varying)


def transpose(site: CallSite) -> Value:
    """`transpose`: swap two dimensions."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    return _swap(site, fact, site["dim0"], site["dim1"])


def _swap(site: CallSite, fact: Fact, first: Any, second: Any) -> Value:
    axes = site.axes(fact, [first, second])
    if axes is None:
        return UNKNOWN
    if fact.dim is None or fact.dim not in axes:
        return move_batch(fact, fact.dim)
    other = axes[1] if axes[0] == fact.dim else axes[0]
    if other < 0:
        site.refuse_rank("moves the batch to a dimension counted from the right")
        return UNKNOWN
    return move_batch(fact, other)


def transpose_last(site: CallSite) -> Value:
    """Swap the last two dimensions: `x.mT`."""
    fact = site["input"]
    return _swap(site, fact, -2, -1) if isinstance(fact, Fact) else UNKNOWN


def reverse(site: CallSite) -> Value:
    """Reverse the dimensions: `x.T`, `x.t()`."""
    fact = site["input"]
    if not isinstance(fact, Fact) or fact.dim is None:
        return fact if isinstance(fact, Fact) else UNKNOWN
    if fact.rank.known is None:
        site.refuse_rank("moves the batch to a dimension counted from the right")
        return UNKNOWN
    return move_batch(fact, fact.rank.known - 1 - fact.dim)


def permute(site: CallSite) -> Value:
    """`permute`: any order of the dimensions, which also gives the rank."""
    fact, order = site["input"], [constant_int(dim) for dim in leaves(site["dims"])]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if None in order:
        site.refuse("SNNFX101", f"the order of dimensions in {site.text} is not a constant")
        return UNKNOWN
    if fact.dim is None:
        return move_batch(fact, None)
    places = [dim % len(order) for dim in order if dim is not None]
    if not site.require(fact.rank, len(order), "lists every dimension") or fact.dim not in places:
        return UNKNOWN
    return move_batch(fact, places.index(fact.dim))


def move_dims(site: CallSite) -> Value:
    """`movedim(input, source, destination)`."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    source, destination = site.axes(fact, site["source"]), site.axes(fact, site["destination"])
    if source is None or destination is None:
        return UNKNOWN
    if fact.dim is None:
        return move_batch(fact, None)
    if min(source + destination) < 0 and not (min(source) < 0 and min(destination) < 0 and len(source) == 1):
        site.refuse_rank("moves dimensions to positions counted from the right")
        return UNKNOWN
    if source[0] < 0:  # to the right of the batch, before and after
        return move_batch(fact, fact.dim)
    # Dimensions to the right of all named ones keep their position.
    count = max(*source, *destination, fact.dim) + 1
    rest = iter([dim for dim in range(count) if dim not in source])
    order = [source[destination.index(i)] if i in destination else next(rest) for i in range(count)]
    return move_batch(fact, order.index(fact.dim))


def unsqueeze(site: CallSite) -> Value:
    """`unsqueeze`: insert a dimension of size 1."""
    fact, dim = site["input"], constant_int(site["dim"])
    if not isinstance(fact, Fact):
        return UNKNOWN
    if dim is None:
        site.refuse("SNNFX101", f"the dimension of {site.text} is not a constant")
        return UNKNOWN
    if fact.dim is None:
        return move_batch(fact, None, 1)
    if dim < 0:
        # Its position is rank + 1 + dim: to the right of the batch if -1 - dim dimensions follow the batch.
        if fact.rank.known is not None:
            dim += fact.rank.known + 1
        elif site.require(fact.rank, fact.dim - dim, f"counts dim {dim} from the right"):
            return move_batch(fact, fact.dim, 1)
        else:
            return UNKNOWN
    result = move_batch(fact, fact.dim + 1 if dim <= fact.dim else fact.dim, 1)
    return result.with_ones_in_front() if fact.has_ones_in_front else result


def squeeze(site: CallSite) -> Value:
    """`squeeze`: remove dimensions of size 1; without `dim`, also a batch of one sample."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    anonymous = Rank(0, site.node.name)  # only example inputs tell how many dimensions were removed
    if fact.dim is None:
        return Fact(anonymous, varying=fact.varying)
    axes = site.axes(fact, site["dim"]) if site["dim"] is not None else []
    if axes is None:
        return UNKNOWN
    if not axes or fact.dim in axes:
        site.refuse(
            "SNNFX110",
            f"{site.text} removes the batch dimension for a batch of one sample",
            "Name the dimension, e.g. x.squeeze(-1).",
        )
        return UNKNOWN
    if fact.has_ones_in_front and all(0 <= axis < fact.dim for axis in axes):
        count = len(set(axes))
        return move_batch(fact, fact.dim - count, -count).with_ones_in_front()
    if any(0 <= axis < fact.dim for axis in axes):
        site.refuse_rank("may remove a dimension in front of the batch")
        return UNKNOWN
    return Fact(anonymous, fact.dim, fact.size)


def flatten(site: CallSite) -> Value:
    """`flatten`: merge `start_dim` to `end_dim`; the batch may be the first of them."""
    fact, start, end = site["input"], constant_int(site["start_dim"]), constant_int(site["end_dim"])
    if not isinstance(fact, Fact):
        return UNKNOWN
    if start is None or end is None:
        site.refuse("SNNFX101", f"the dimensions of {site.text} are not constants")
        return UNKNOWN
    known = fact.rank.known
    if known is not None:
        start, end = (dim + known if dim < 0 else dim for dim in (start, end))
    if (start < 0) == (end < 0):
        rank = fact.rank - (end - start)
    elif start >= 0:
        rank = Rank(start - end)  # e.g. 2 for flatten(1, -1), 3 for flatten(1, -2)
    else:
        rank = Rank(0, site.node.name)
    if fact.dim is None:
        return Fact(rank, varying=fact.varying)
    if start < 0:
        site.axis(fact, start)
        return Fact(rank, fact.dim, fact.size)
    if start > fact.dim:
        if not site.require(fact.rank, start + 1, f"flattens from dim {start}"):
            return without_batch(rank)
        behind = Fact(rank, fact.dim, fact.size)
        return behind.with_ones_in_front() if fact.has_ones_in_front else behind
    if 0 <= end < fact.dim:
        merged = Fact(rank, fact.dim - (end - start), fact.size)
        return merged.with_ones_in_front() if fact.has_ones_in_front else merged
    if start == end:
        return fact
    if start < fact.dim and fact.has_ones_in_front:
        return Fact(rank, start, fact.size if end == fact.dim else _merged(site, fact)).with_ones_in_front()
    if start < fact.dim:
        site.refuse_mixing(fact, "merges other dimensions into", "Move the batch to dim 0 first.")
        return without_batch(rank)
    return Fact(rank, start, _merged(site, fact))


def _merged(site: CallSite, fact: Fact) -> str | None:
    """The size symbol of the batch dimension, merged with those behind it."""
    return site.fresh if fact.size is None else site.fresh_multiple(fact.size)


def unflatten(site: CallSite) -> Value:
    """`unflatten`: split one dimension; if it is the batch, the first part becomes the batch."""
    fact, sizes = site["input"], list(leaves(site["sizes"]))
    if not isinstance(fact, Fact):
        return UNKNOWN
    axis = site.axis(fact, site["dim"])
    if axis is None:
        return UNKNOWN
    if not all(map(is_known_size, sizes)):
        site.refuse("SNNFX101", f"the sizes in {site.text} are unknown")
        return UNKNOWN
    grows = len(sizes) - 1
    if fact.dim is None or axis != fact.dim:
        if is_batch_sized(sizes):
            refuse_batch_size(site)
        shifts = fact.dim is not None and 0 <= axis < fact.dim
        return move_batch(fact, fact.dim + grows if shifts and fact.dim is not None else fact.dim, grows)
    ones = next((i for i, size in enumerate(sizes) if constant_int(size) != 1), 0)  # literal sizes in front
    if is_batch_sized(sizes[ones + 1 :]):
        refuse_batch_size(site)
        return UNKNOWN
    symbol = _symbol_in_place(site, sizes[ones])
    if not symbol:
        return without_batch(fact.rank + grows)
    result = Fact(fact.rank + grows, fact.dim + ones, symbol)
    return result.with_ones_in_front() if fact.has_ones_in_front else result


def refuse_batch_size(site: CallSite) -> None:
    """Do not fold: the batch size is used as the size of another dimension."""
    site.refuse("SNNFX110", f"{site.text} uses the batch size as the size of another dimension")


def _symbol_in_place(site: CallSite, entry: Any) -> str | None:
    """The size symbol of a shape entry for the batch dimension; None after a refusal."""
    if isinstance(entry, SizeFact) and entry.symbol is not None:
        return entry.symbol
    if constant_int(entry) == -1:
        return site.fresh
    site.refuse(
        "SNNFX104",
        f"{site.text} has a literal size for the batch dimension",
        "Use x.shape[0] or -1 instead, or x.flatten(1).",
    )
    return None


def view(site: CallSite) -> Value:
    """`view` and `reshape`: the batch must stay in front of all merged or split dimensions."""
    fact, shape = site["input"], site["shape"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if isinstance(shape, ShapeFact):
        return _view_like(site, fact, shape.of)
    entries = list(leaves(shape))
    if not all(map(is_known_size, entries)):
        site.refuse("SNNFX101", f"the shape in {site.text} is unknown")  # also x.view(dtype)
        return UNKNOWN
    rank = Rank(len(entries))
    batch_sized = [i for i, entry in enumerate(entries) if is_batch_sized(entry)]
    if fact.dim is None:
        if batch_sized:
            site.refuse("SNNFX110", f"{site.text} gives the batch size to a tensor without a batch")
            return UNKNOWN
        return Fact(rank, varying=fact.varying, known=literal_sizes(entries))
    inferred = [i for i, entry in enumerate(entries) if constant_int(entry) == -1]
    if len(batch_sized) > 1:
        refuse_batch_size(site)
        return UNKNOWN
    if not batch_sized and not inferred:
        _symbol_in_place(site, None)
        return without_batch(rank)
    place = (batch_sized or inferred)[0]
    if not _keeps_prefix(site, fact, entries[:place]):
        if batch_sized:
            site.refuse_mixing(fact, "moves elements across", "Move the batch to dim 0 first.")
        else:
            _symbol_in_place(site, entries[0])
            site.refuse_mixing(fact, "moves elements across")
        return without_batch(rank)
    symbol = _symbol_in_place(site, entries[place])
    result = Fact(rank, place, symbol)
    return result.with_ones_in_front() if fact.has_ones_in_front else result


def is_known_size(entry: Any) -> bool:
    """Whether a shape entry is a number or computed from sizes."""
    return isinstance(entry, SizeFact) or constant_int(entry) is not None


def literal_sizes(entries: Sequence[Any]) -> tuple[int | None, ...]:
    """The constant entries of a shape; None for the others and for -1."""
    values = [constant_int(entry) for entry in entries]
    return tuple(None if value == -1 else value for value in values)


def _keeps_prefix(site: CallSite, fact: Fact, prefix: list[Any]) -> bool:
    """Whether a view keeps the dimensions in front of the batch."""
    if fact.has_ones_in_front:
        return all(constant_int(entry) == 1 for entry in prefix)
    operand = site.node.args[0]
    name = getattr(operand, "name", "")
    return len(prefix) == fact.dim and all(
        isinstance(entry, SizeFact) and entry.origin == (name, i) for i, entry in enumerate(prefix)
    )


def _view_like(site: CallSite, fact: Fact, other: Fact) -> Value:
    if fact.dim is None and other.dim is None:
        return Fact(other.rank, varying=fact.varying)
    if fact.dim != 0 or other.dim != 0:
        site.refuse(
            "SNNFX105", f"{site.text} takes the shape of a tensor with another batch dimension ({fact}; {other})"
        )
        return UNKNOWN
    return other


def view_as(site: CallSite) -> Value:
    """`view_as`, `reshape_as`."""
    fact, other = site["input"], site["other"]
    return _view_like(site, fact, other) if isinstance(fact, Fact) and isinstance(other, Fact) else UNKNOWN


def expand(site: CallSite) -> Value:
    """`expand`, `broadcast_to`: keep the batch, or expand a tensor without a batch over it."""
    fact, shape = site["input"], site["shape"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if isinstance(shape, ShapeFact):
        return broadcast(site, [shape.of, fact])
    entries = list(leaves(shape))
    if not all(map(is_known_size, entries)):
        site.refuse("SNNFX101", f"the shape in {site.text} is unknown")
        return UNKNOWN
    rank = Rank(len(entries))
    places = [i for i, entry in enumerate(entries) if is_batch_sized(entry)]
    if len(places) > 1:
        refuse_batch_size(site)
        return UNKNOWN
    if fact.dim is None:
        return _grow_to_batch(site, fact, entries, places) if places else _expanded_constant(fact, entries)
    # torch requires at least as many entries as dimensions.
    if fact.rank.known is None and not site.require(fact.rank, len(entries), "lists every dimension"):
        return UNKNOWN
    place = len(entries) - (len(entries) if fact.rank.known is None else fact.rank.known) + fact.dim
    if any(i != place for i in places):
        refuse_batch_size(site)
        return UNKNOWN
    entry = entries[place]
    if constant_int(entry) != -1 and not (isinstance(entry, SizeFact) and entry.symbol == fact.size):
        _symbol_in_place(site, None)
        return without_batch(rank)
    return Fact(rank, place, fact.size)


def _expanded_constant(fact: Fact, entries: Sequence[Any]) -> Fact:
    return Fact(Rank(len(entries)), varying=fact.varying, known=literal_sizes(entries))


def _grow_to_batch(site: CallSite, fact: Fact, entries: Sequence[Any], places: list[int]) -> Value:
    """A tensor without a batch, expanded over the batch."""
    place, rank = places[0], fact.rank.known
    if fact.varying:
        site.refuse("SNNFX105", f"{site.text} expands a value that varies in time but has no batch dimension")
    if rank is None:
        site.refuse_rank()
        return UNKNOWN
    own = place - (len(entries) - rank)
    if own >= 0 and (own >= len(fact.known) or fact.known[own] != 1):
        site.refuse("SNNFX104", f"{site.text} has an operand with a fixed size in the batch dimension")
        return UNKNOWN
    return Fact(Rank(len(entries)), place, entries[place].symbol)


def repeat(site: CallSite) -> Value:
    """`repeat`, `tile` along dimensions other than the batch."""
    fact, counts = site["input"], list(leaves(site["repeats"]))
    if not isinstance(fact, Fact):
        return UNKNOWN
    if not all(map(is_known_size, counts)):
        site.refuse("SNNFX101", f"the repeat counts in {site.text} are unknown")
        return UNKNOWN
    places = [i for i, count in enumerate(counts) if is_batch_sized(count)]
    if fact.dim is None:
        if not places:
            return Fact(Rank(len(counts)), varying=fact.varying)
        if len(places) > 1:
            refuse_batch_size(site)
            return UNKNOWN
        return _grow_to_batch(site, fact, counts, places)
    if places:
        refuse_batch_size(site)
        return UNKNOWN
    if fact.rank.known is None and not site.require(fact.rank, len(counts), "lists every dimension"):
        return UNKNOWN
    rank = len(counts) if fact.rank.known is None else fact.rank.known
    place = len(counts) - rank + fact.dim
    if place < fact.dim or constant_int(counts[place]) != 1:
        site.refuse_mixing(fact, "repeats the whole batch along", "Use repeat_interleave for the batch.")
        return Fact(Rank(max(rank, len(counts))), max(place, fact.dim), site.fresh)
    return Fact(Rank(len(counts)), place, fact.size)


def interleave(site: CallSite) -> Value:
    """`repeat_interleave`: repeating each sample in place may be folded."""
    fact, dim, repeats = site["input"], site["dim"], site["repeats"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if dim is None or constant_int(repeats) is None:
        site.refuse("SNNFX101", f"the batch rule of {site.text} needs a constant count and a `dim`")
        return UNKNOWN
    axis = site.axis(fact, dim)
    if axis is None or fact.dim != axis:
        return move_batch(fact, fact.dim)
    return Fact(fact.rank, fact.dim, site.fresh)
