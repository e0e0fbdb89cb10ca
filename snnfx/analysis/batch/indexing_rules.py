"""Batch rules of indexing, concatenation, sizes, and tensors created from sizes."""

from __future__ import annotations

from typing import Any

from snnfx.analysis.batch.call_site import CallSite, broadcast, common_fact, constant_int, is_batch_sized, without_batch
from snnfx.analysis.batch.facts import (
    NON_TENSOR,
    UNDETERMINED,
    UNKNOWN,
    Fact,
    Rank,
    ShapeFact,
    SizeFact,
    UniformTuple,
    Unknown,
    Value,
    leaves,
    rank_difference,
)
from snnfx.analysis.batch.shape_rules import (
    is_known_size,
    literal_sizes,
    move_batch,
    refuse_batch_size,
    reverse,
    transpose_last,
    unsqueeze,
)

__all__ = ["attribute", "cat", "create", "getitem", "make_constant", "numel", "python_value", "rank_of", "split"]
__all__ += ["set_part"]
__all__ += ["select", "size", "stack", "unbind"]


def cat(site: CallSite) -> Value:
    """`cat` along a dimension other than the batch."""
    tensors, dim = site["tensors"], site["dim"]
    fact = common_fact(site, list(leaves(tensors)))
    if fact is None:
        return UNKNOWN
    axis = site.axis(fact, dim)
    if axis is None:
        return UNKNOWN
    if fact.dim is not None and axis == fact.dim:
        site.refuse_mixing(fact, "concatenates along", "Concatenate along a feature dimension, e.g. dim=1.")
        return Fact(fact.rank, fact.dim, site.fresh)
    return move_batch(fact, fact.dim)


def stack(site: CallSite) -> Value:
    """`stack` along a new dimension, which moves the batch if inserted in front of it."""
    fact = common_fact(site, list(leaves(site["tensors"])))
    if fact is None:
        return UNKNOWN
    site.arguments["input"] = fact
    return unsqueeze(site)


def split(site: CallSite) -> Value:
    """`chunk`, `split`, `tensor_split` along a dimension other than the batch."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    axis = site.axis(fact, site["dim"])
    if axis is None:
        return UNKNOWN
    if fact.dim is not None and axis == fact.dim:
        site.refuse_mixing(fact, "splits", "Split a feature dimension, e.g. dim=1.")
        return UniformTuple(without_batch(fact.rank))  # the last piece may be smaller
    return UniformTuple(move_batch(fact, fact.dim))


def unbind(site: CallSite) -> Value:
    """`unbind` along a dimension other than the batch."""
    part = select(site)
    return UniformTuple(part) if isinstance(part, Fact) else UNKNOWN


def select(site: CallSite) -> Value:
    """`select` along a dimension other than the batch."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    axis = site.axis(fact, site["dim"])
    if axis is None:
        return UNKNOWN
    if fact.dim is None:
        return move_batch(fact, None, -1)
    if axis == fact.dim:
        site.refuse_mixing(fact, "selects samples from", "Index a feature dimension.")
        return without_batch(fact.rank - 1)
    return move_batch(fact, fact.dim - 1 if 0 <= axis < fact.dim else fact.dim, -1)


def getitem(site: CallSite) -> Value:
    """`x[...]` of a tensor, a tuple, or a shape."""
    source, index = site["input"], site["index"]
    if isinstance(source, tuple):
        return _element(site, source, index)
    if isinstance(source, ShapeFact):
        return _size_of(site, source, index)
    if not isinstance(source, Fact):
        return UNKNOWN
    items = index if isinstance(index, tuple) else (index,)
    return _sliced(site, source, items)


def set_part(site: CallSite) -> Value:
    """`x[index] = value`, where the index keeps the batch and the value has it in the same dimension."""
    target, index, value = site["input"], site["index"], site["value"]
    if not isinstance(target, Fact):
        return UNKNOWN
    part = _sliced(site, target, index if isinstance(index, tuple) else (index,))
    if not isinstance(part, Fact):
        return UNKNOWN
    merged = broadcast(site, [part, value])
    if merged == part:
        return target
    if (
        isinstance(merged, Fact)
        and not merged.batched
        and not target.batched
        and rank_difference(merged.rank, part.rank) == 0
    ):
        return Fact(target.rank, varying=merged.varying)
    site.refuse(
        "SNNFX105", f"the value assigned in {site.text} has its batch in another dimension than the indexed part"
    )
    return UNKNOWN


def _element(site: CallSite, source: tuple[Any, ...], index: Any) -> Value:
    if isinstance(source, UniformTuple):
        return source if isinstance(index, slice) else source[0]
    place = constant_int(index)
    if isinstance(index, slice):
        bounds = [constant_int(bound) for bound in (index.start, index.stop, index.step)]
        return _as_fact(source[slice(*bounds)])
    if place is None or not -len(source) <= place < len(source):
        site.refuse("SNNFX101", f"the element that {site.text} selects is unknown")
        return UNKNOWN
    return _as_fact(source[place])


def _as_fact(value: Any) -> Value:
    if isinstance(value, int) and not isinstance(value, bool):
        return SizeFact(value=value)
    if value is None or isinstance(value, bool | float | str):
        return NON_TENSOR
    return value  # type: ignore[no-any-return]


def _size_of(site: CallSite, shape: ShapeFact, index: Any) -> Value:
    fact = shape.of
    if isinstance(index, slice):
        stop = constant_int(index.stop)
        if index.start in (None, 0) and index.step in (None, 1) and stop is not None and stop >= 0:
            site.require(fact.rank, stop, f"reads the first {stop} sizes")
            return tuple(_one_size(shape, i) for i in range(stop))
        site.refuse_rank("reads sizes counted from the right")
        return UNKNOWN
    axis = site.axis(fact, index)
    return UNKNOWN if axis is None else _one_size(shape, axis)


def _one_size(shape: ShapeFact, axis: int) -> SizeFact:
    fact = shape.of
    symbol = fact.size if axis == fact.dim else None
    is_one = fact.has_ones_in_front and fact.dim is not None and 0 <= axis < fact.dim
    return SizeFact(symbol, value=1 if is_one else None, origin=(shape.tensor, axis))


def _sliced(site: CallSite, fact: Fact, items: tuple[Any, ...]) -> Value:
    for item in items:
        if not (item is None or item is Ellipsis or isinstance(item, slice) or constant_int(item) is not None):
            kind = "a tensor" if isinstance(item, Fact) else "a value that is not a constant"
            site.refuse("SNNFX101", f"{site.text} indexes with {kind}", "Use torch.gather or torch.index_select.")
            return UNKNOWN
    bounds = list(leaves(items))
    if is_batch_sized(bounds):
        refuse_batch_size(site)
    if any(isinstance(bound, Fact | Unknown) for bound in bounds):
        site.refuse("SNNFX101", f"a slice bound in {site.text} is a tensor")
    middle = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    left, right = items[:middle], items[middle + 1 :]
    consumed = sum(item is not None for item in right)
    change = sum((item is None) - (constant_int(item) is not None) for item in left + right)
    rank = fact.rank + change
    if fact.dim is None:
        return Fact(rank, varying=fact.varying)
    walk = _IndexBinding(site, fact)
    for item in left:
        walk.take(item)
    if consumed or any(item is None for item in right):
        if fact.rank.known is not None:
            walk.skip_to(fact.rank.known - consumed)
            for item in right:
                walk.take(item)
        else:
            least = max(fact.dim, walk.axis - 1) + 1 + consumed
            if not site.require(fact.rank, least, "counts dimensions from the right"):
                return UNKNOWN
    if walk.dropped:
        return without_batch(rank)
    walk.skip_to(max(walk.axis, fact.dim + 1))
    result = Fact(rank, walk.place, walk.size)
    return result.with_ones_in_front() if fact.has_ones_in_front else result


class _IndexBinding:
    """Applies the items of an index from the left and tracks the batch dimension."""

    def __init__(self, site: CallSite, fact: Fact) -> None:
        self.site, self.fact, self.size = site, fact, fact.size
        self.axis = 0
        self.out = 0
        self.place: int | None = None
        self.dropped = False

    def take(self, item: Any) -> None:
        if item is None:
            self.out += 1
            return
        at_batch = self.axis == self.fact.dim
        self.axis += 1
        if not isinstance(item, slice):
            if at_batch:
                self.dropped = True
                hint = "Index a feature dimension, e.g. x[:, 0]."
                self.site.refuse_mixing(self.fact, "selects samples from", hint)
            return
        if at_batch:
            self.place = self.out
            if item.start not in (None, 0) or item.stop is not None or item.step not in (None, 1):
                self.site.refuse_mixing(self.fact, "slices", "Slice a feature dimension, e.g. x[:, :4].")
                self.size = self.site.fresh
        self.out += 1

    def skip_to(self, axis: int) -> None:
        """Keep all dimensions up to `axis`."""
        while self.axis < axis:
            self.take(slice(None))


def attribute(site: CallSite) -> Value:
    """Attributes of a tensor: `x.shape`, `x.T`, `x.dtype`, ..."""
    name = site["name"]
    if not isinstance(site["input"], Fact):
        return UNKNOWN
    if name in ("dtype", "device", "layout", "is_cuda", "requires_grad"):
        return python_value(site)
    found = _ATTRIBUTES.get(name)
    if found is None:
        site.refuse("SNNFX101", f"no batch rule covers the attribute `{name}`")
        return UNKNOWN
    return found(site)


def _can_be_read(fact: Any) -> bool:
    """Whether a folded region can take the tensor as an input and read its shape or dtype."""
    return isinstance(fact, Fact) and (fact.batched or not fact.varying)


def size(site: CallSite) -> Value:
    """`x.size()`, `x.size(0)`, `x.shape`."""
    fact = site["input"]
    if not _can_be_read(fact):
        return UNKNOWN
    tensor = getattr(site.node.args[0], "name", "")
    shape = ShapeFact(fact, tensor)
    if site["dim"] is not None:
        return _size_of(site, shape, site["dim"])
    if fact.rank.known is None:
        return shape
    return tuple(_one_size(shape, i) for i in range(fact.rank.known))


def numel(site: CallSite) -> Value:
    """`x.numel()`: a multiple of the batch size."""
    fact = site["input"]
    return SizeFact(site.fresh if fact.batched else None) if _can_be_read(fact) else UNKNOWN


def rank_of(site: CallSite) -> Value:
    """`x.dim()`, `x.ndim`."""
    fact = site["input"]
    return SizeFact(value=fact.rank.known) if _can_be_read(fact) else UNKNOWN


def _same_tensor(site: CallSite) -> Value:
    return site["input"]  # type: ignore[no-any-return]


_ATTRIBUTES = {
    "shape": size,
    "ndim": rank_of,
    "T": reverse,
    "mT": transpose_last,
    "mH": transpose_last,
    "data": _same_tensor,
    "real": _same_tensor,
    "imag": _same_tensor,
}


def python_value(site: CallSite) -> Value:
    """A property of a tensor that does not depend on the batch."""
    return NON_TENSOR if _can_be_read(site["input"]) else UNKNOWN


def create(site: CallSite) -> Value:
    """`torch.zeros(sizes)`, `x.new_full(sizes, value)`: one of the sizes may be the batch size."""
    shape = site["size"]
    if isinstance(shape, ShapeFact):
        return Fact(shape.of.rank, shape.of.dim, shape.of.size)
    entries = list(leaves(shape))
    if not all(map(is_known_size, entries)):
        site.refuse("SNNFX101", f"the shape in {site.text} is unknown")
        return UNKNOWN
    places = [i for i, entry in enumerate(entries) if is_batch_sized(entry)]
    if len(places) > 1:
        refuse_batch_size(site)
        return UNKNOWN
    if places:
        return Fact(Rank(len(entries)), places[0], entries[places[0]].symbol)
    return Fact(Rank(len(entries)), known=literal_sizes(entries))


def make_constant(site: CallSite) -> Value:
    """`torch.arange(n)`, `torch.eye(n)`, `torch.tensor(data)` of numbers other than the batch size."""
    operands = list(leaves(site.arguments))
    if is_batch_sized(operands):
        site.refuse("SNNFX110", f"{site.text} depends on the batch size")
        return UNKNOWN
    if any(isinstance(operand, Fact) for operand in operands) or UNKNOWN in operands:
        site.refuse("SNNFX101", f"no batch rule covers {site.text} with tensors")
        return UNKNOWN
    if UNDETERMINED in operands:
        return UNDETERMINED
    ranks = {"arange": 1, "linspace": 1, "eye": 2}
    values = site["values"]
    return Fact(Rank(ranks[site.name] if site.name in ranks else _nesting(values[0] if values else 0)))


def _nesting(data: Any) -> int:
    return 1 + _nesting(data[0] if data else 0) if isinstance(data, tuple | list) else 0
