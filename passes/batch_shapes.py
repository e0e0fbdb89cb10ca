"""How operations on shapes move the batch: views, permutations, slices, sizes, tensors made from sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from snnfx.passes.batch_facts import BOTTOM, OTHER, UNKNOWN, Fact, Rank, Repeated, ShapeFact, SizeFact, Value, leaves
from snnfx.passes.batch_site import Site, aligned, broadcast, is_batch_sized, lost, number

__all__ = ["attribute", "cat", "create", "expand", "flatten", "getitem", "interleave", "make_constant", "move_dims"]
__all__ += ["numel", "permute", "pieces", "python_value", "rank_of", "repeat", "reverse", "select", "size", "squeeze"]
__all__ += ["stack", "transpose", "transpose_last", "unbind", "unflatten", "unsqueeze", "view", "view_as"]


def _moved(fact: Fact, dim: int | None, change: int = 0) -> Fact:
    """The same tensor with its batch elsewhere and `change` more dimensions."""
    return Fact(fact.rank + change, dim, fact.size, varying=fact.varying)


# --- the order of dimensions


def transpose(site: Site) -> Value:
    """Swap two dimensions."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    return _swap(site, fact, site["dim0"], site["dim1"])


def _swap(site: Site, fact: Fact, first: Any, second: Any) -> Value:
    axes = site.axes(fact, [first, second])
    if axes is None:
        return UNKNOWN
    if fact.dim is None or fact.dim not in axes:
        return _moved(fact, fact.dim)
    other = axes[1] if axes[0] == fact.dim else axes[0]
    if other < 0:
        site.refuse_rank("moves the batch to a place counted from the right")
        return UNKNOWN
    return _moved(fact, other)


def transpose_last(site: Site) -> Value:
    """Swap the last two dimensions: `x.mT`."""
    fact = site["input"]
    return _swap(site, fact, -2, -1) if isinstance(fact, Fact) else UNKNOWN


def reverse(site: Site) -> Value:
    """Reverse the dimensions: `x.T`, `x.t()`."""
    fact = site["input"]
    if not isinstance(fact, Fact) or fact.dim is None:
        return fact if isinstance(fact, Fact) else UNKNOWN
    if fact.rank.known is None:
        site.refuse_rank("moves the batch to a place counted from the right")
        return UNKNOWN
    return _moved(fact, fact.rank.known - 1 - fact.dim)


def permute(site: Site) -> Value:
    """Any order of the dimensions; it says how many there are."""
    fact, order = site["input"], [number(dim) for dim in leaves(site["dims"])]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if None in order:
        site.refuse("SNNFX101", f"the order of dimensions in {site.text} is not constant")
        return UNKNOWN
    if fact.dim is None:
        return _moved(fact, None)
    places = [dim % len(order) for dim in order if dim is not None]
    if not site.require(fact.rank, len(order), "names all dimensions") or fact.dim not in places:
        return UNKNOWN
    return _moved(fact, places.index(fact.dim))


def move_dims(site: Site) -> Value:
    """`movedim(input, source, destination)`."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    source, destination = site.axes(fact, site["source"]), site.axes(fact, site["destination"])
    if source is None or destination is None:
        return UNKNOWN
    if fact.dim is None:
        return _moved(fact, None)
    if min(source + destination) < 0 and not (min(source) < 0 and min(destination) < 0 and len(source) == 1):
        site.refuse_rank("moves dimensions to places counted from the right")
        return UNKNOWN
    if source[0] < 0:  # to the right of the batch, before and after
        return _moved(fact, fact.dim)
    # Dimensions to the right of all that are named stay where they are.
    count = max(*source, *destination, fact.dim) + 1
    rest = iter([dim for dim in range(count) if dim not in source])
    order = [source[destination.index(i)] if i in destination else next(rest) for i in range(count)]
    return _moved(fact, order.index(fact.dim))


# --- more and fewer dimensions


def unsqueeze(site: Site) -> Value:
    """A new dimension of size 1."""
    fact, dim = site["input"], number(site["dim"])
    if not isinstance(fact, Fact):
        return UNKNOWN
    if dim is None:
        site.refuse("SNNFX101", f"the dimension of {site.text} is not a constant number")
        return UNKNOWN
    if fact.dim is None:
        return _moved(fact, None, 1)
    if dim < 0:
        # It lies at rank + 1 + dim, which is to the right of the batch if that has -1 - dim dimensions behind it.
        if fact.rank.known is not None:
            dim += fact.rank.known + 1
        elif site.require(fact.rank, fact.dim - dim, f"counts dim {dim} from the right of the batch"):
            return _moved(fact, fact.dim, 1)
        else:
            return UNKNOWN
    return _moved(fact, fact.dim + 1 if dim <= fact.dim else fact.dim, 1)


def squeeze(site: Site) -> Value:
    """Drop dimensions of size 1; without `dim` also the batch, when it has one sample."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    anonymous = Rank(0, site.node.name)  # how many were dropped is only known with example inputs
    if fact.dim is None:
        return Fact(anonymous, varying=fact.varying)
    axes = site.axes(fact, site["dim"]) if site["dim"] is not None else []
    if axes is None:
        return UNKNOWN
    if not axes or fact.dim in axes:
        site.refuse(
            "SNNFX110",
            f"{site.text} drops the batch when it has one sample",
            "Name the dimension, e.g. x.squeeze(-1).",
        )
        return UNKNOWN
    if any(0 <= axis < fact.dim for axis in axes):
        site.refuse_rank("may drop a dimension in front of the batch")
        return UNKNOWN
    return Fact(anonymous, fact.dim, fact.size)


def flatten(site: Site) -> Value:
    """Merge the dimensions from `start_dim` to `end_dim`; the batch may be the first of them."""
    fact, start, end = site["input"], number(site["start_dim"]), number(site["end_dim"])
    if not isinstance(fact, Fact):
        return UNKNOWN
    if start is None or end is None:
        site.refuse("SNNFX101", f"the dimensions of {site.text} are not constant numbers")
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
        return Fact(rank, fact.dim, fact.size) if site.require(fact.rank, start + 1, "needs a batch") else lost(rank)
    if 0 <= end < fact.dim:
        return Fact(rank, fact.dim - (end - start), fact.size)
    if start == end:
        return fact
    if start < fact.dim:
        site.refuse_mixing(fact, "merges the dimensions in front of it with", "Transpose the batch to the front first.")
        return lost(rank)
    return Fact(rank, start, site.fresh)


def unflatten(site: Site) -> Value:
    """Split one dimension; where it is the batch, the first part has to be the batch."""
    fact, sizes = site["input"], list(leaves(site["sizes"]))
    if not isinstance(fact, Fact):
        return UNKNOWN
    axis = site.axis(fact, site["dim"])
    if axis is None:
        return UNKNOWN
    if not all(map(_is_size, sizes)):
        site.refuse("SNNFX101", f"the sizes in {site.text} are not known")
        return UNKNOWN
    grows = len(sizes) - 1
    if fact.dim is None or axis != fact.dim:
        if is_batch_sized(sizes):
            _refuse_batch_size(site)
        shifts = fact.dim is not None and 0 <= axis < fact.dim
        return _moved(fact, fact.dim + grows if shifts and fact.dim is not None else fact.dim, grows)
    if is_batch_sized(sizes[1:]):
        _refuse_batch_size(site)
        return UNKNOWN
    symbol = _symbol_in_place(site, sizes[0])
    return Fact(fact.rank + grows, fact.dim, symbol) if symbol else lost(fact.rank + grows)


def _refuse_batch_size(site: Site) -> None:
    site.refuse("SNNFX110", f"{site.text} uses the size of the batch as the size of another dimension")


def _symbol_in_place(site: Site, entry: Any) -> str | None:
    """The size symbol that a shape entry in the place of the batch stands for; None after a refusal."""
    if isinstance(entry, SizeFact) and entry.symbol is not None:
        return entry.symbol
    if number(entry) == -1:
        return site.fresh
    site.refuse(
        "SNNFX104",
        f"{site.text} has a number in the place of the batch",
        "Use x.shape[0] or -1 there, or x.flatten(1).",
    )
    return None


# --- views


def view(site: Site) -> Value:
    """`view` and `reshape`: memory order, so the batch has to stay in front of what is merged or split."""
    fact, shape = site["input"], site["shape"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if isinstance(shape, ShapeFact):
        return _view_like(site, fact, shape.of)
    entries = list(leaves(shape))
    if not all(map(_is_size, entries)):
        site.refuse("SNNFX101", f"the shape in {site.text} is not known")  # also x.view(dtype)
        return UNKNOWN
    rank = Rank(len(entries))
    batch_sized = [i for i, entry in enumerate(entries) if is_batch_sized(entry)]
    if fact.dim is None:
        if batch_sized:
            site.refuse("SNNFX110", f"{site.text} gives the size of the batch to a tensor without a batch")
            return UNKNOWN
        return Fact(rank, varying=fact.varying, known=_literal(entries))
    inferred = [i for i, entry in enumerate(entries) if number(entry) == -1]
    if len(batch_sized) > 1:
        _refuse_batch_size(site)
        return UNKNOWN
    if not batch_sized and not inferred:
        _symbol_in_place(site, None)
        return lost(rank)
    place = (batch_sized or inferred)[0]
    if not _keeps_prefix(site, fact, entries[:place]):
        if batch_sized:
            site.refuse_mixing(fact, "moves elements across", "Transpose the batch to the front first.")
        else:
            _symbol_in_place(site, entries[0])
            site.refuse_mixing(fact, "moves elements across")
        return lost(rank)
    symbol = _symbol_in_place(site, entries[place])
    return Fact(rank, place, symbol)


def _is_size(entry: Any) -> bool:
    return isinstance(entry, SizeFact) or number(entry) is not None


def _literal(entries: Sequence[Any]) -> tuple[int | None, ...]:
    values = [number(entry) for entry in entries]
    return tuple(None if value == -1 else value for value in values)


def _keeps_prefix(site: Site, fact: Fact, prefix: list[Any]) -> bool:
    """Whether the dimensions in front of the batch are the same before and after."""
    if fact.dim == 0:
        return all(number(entry) == 1 for entry in prefix)
    operand = site.node.args[0]
    name = getattr(operand, "name", "")
    return len(prefix) == fact.dim and all(
        isinstance(entry, SizeFact) and entry.origin == (name, i) for i, entry in enumerate(prefix)
    )


def _view_like(site: Site, fact: Fact, other: Fact) -> Value:
    if fact.dim is None and other.dim is None:
        return Fact(other.rank, varying=fact.varying)
    if fact.dim != 0 or other.dim != 0:
        site.refuse("SNNFX105", f"{site.text} takes its shape from a tensor whose batch is elsewhere ({fact}; {other})")
        return UNKNOWN
    return other


def view_as(site: Site) -> Value:
    """`view_as`, `reshape_as`."""
    fact, other = site["input"], site["other"]
    return _view_like(site, fact, other) if isinstance(fact, Fact) and isinstance(other, Fact) else UNKNOWN


def expand(site: Site) -> Value:
    """`expand`, `broadcast_to`: -1 keeps a size; the batch keeps its size, or is where a tensor without one grows."""
    fact, shape = site["input"], site["shape"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if isinstance(shape, ShapeFact):
        return broadcast(site, [shape.of, fact])
    entries = list(leaves(shape))
    if not all(map(_is_size, entries)):
        site.refuse("SNNFX101", f"the shape in {site.text} is not known")
        return UNKNOWN
    rank = Rank(len(entries))
    places = [i for i, entry in enumerate(entries) if is_batch_sized(entry)]
    if len(places) > 1:
        _refuse_batch_size(site)
        return UNKNOWN
    if fact.dim is None:
        return _grow_to_batch(site, fact, entries, places) if places else _expanded_constant(fact, entries)
    # torch asks for at least as many entries as there are dimensions.
    if fact.rank.known is None and not site.require(fact.rank, len(entries), "names all dimensions"):
        return UNKNOWN
    place = len(entries) - (len(entries) if fact.rank.known is None else fact.rank.known) + fact.dim
    if any(i != place for i in places):
        _refuse_batch_size(site)
        return UNKNOWN
    entry = entries[place]
    if number(entry) != -1 and not (isinstance(entry, SizeFact) and entry.symbol == fact.size):
        _symbol_in_place(site, None)
        return lost(rank)
    return Fact(rank, place, fact.size)


def _expanded_constant(fact: Fact, entries: Sequence[Any]) -> Fact:
    return Fact(Rank(len(entries)), varying=fact.varying, known=_literal(entries))


def _grow_to_batch(site: Site, fact: Fact, entries: Sequence[Any], places: list[int]) -> Value:
    """A tensor without a batch, repeated for each sample."""
    place, rank = places[0], fact.rank.known
    if fact.varying:
        site.refuse("SNNFX105", f"{site.text} expands a value that varies in time but has no batch dimension")
    if rank is None:
        site.refuse_rank()
        return UNKNOWN
    own = place - (len(entries) - rank)
    if own >= 0 and (own >= len(fact.known) or fact.known[own] != 1):
        site.refuse("SNNFX104", f"{site.text} has a fixed size in the place of the batch")
        return UNKNOWN
    return Fact(Rank(len(entries)), place, entries[place].symbol)


def repeat(site: Site) -> Value:
    """`repeat`, `tile`: not along the batch."""
    fact, counts = site["input"], list(leaves(site["repeats"]))
    if not isinstance(fact, Fact):
        return UNKNOWN
    if not all(map(_is_size, counts)):
        site.refuse("SNNFX101", f"the counts in {site.text} are not known")
        return UNKNOWN
    places = [i for i, count in enumerate(counts) if is_batch_sized(count)]
    if fact.dim is None:
        if not places:
            return Fact(Rank(len(counts)), varying=fact.varying)
        if len(places) > 1:
            _refuse_batch_size(site)
            return UNKNOWN
        return _grow_to_batch(site, fact, counts, places)
    if places:
        _refuse_batch_size(site)
        return UNKNOWN
    if fact.rank.known is None and not site.require(fact.rank, len(counts), "names all dimensions"):
        return UNKNOWN
    rank = len(counts) if fact.rank.known is None else fact.rank.known
    place = len(counts) - rank + fact.dim
    if place < fact.dim or number(counts[place]) != 1:
        site.refuse_mixing(fact, "repeats all samples in turn along", "Use repeat_interleave for the batch.")
        return Fact(Rank(max(rank, len(counts))), max(place, fact.dim), site.fresh)
    return Fact(Rank(len(counts)), place, fact.size)


def interleave(site: Site) -> Value:
    """`repeat_interleave`: each sample several times in a row may be folded."""
    fact, dim, repeats = site["input"], site["dim"], site["repeats"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    if dim is None or number(repeats) is None:
        site.refuse("SNNFX101", f"{site.text} is in the table with a number and a dimension only")
        return UNKNOWN
    axis = site.axis(fact, dim)
    if axis is None or fact.dim != axis:
        return _moved(fact, fact.dim)
    return Fact(fact.rank, fact.dim, site.fresh)


# --- parts and collections


def cat(site: Site) -> Value:
    """Join tensors along a dimension that is not the batch."""
    tensors, dim = site["tensors"], site["dim"]
    fact = aligned(site, list(leaves(tensors)), "joining them")
    if fact is None:
        return UNKNOWN
    axis = site.axis(fact, dim)
    if axis is None:
        return UNKNOWN
    if fact.dim is not None and axis == fact.dim:
        site.refuse_mixing(fact, "joins along", "Join along a feature dimension, e.g. dim=1.")
        return Fact(fact.rank, fact.dim, site.fresh)
    return _moved(fact, fact.dim)


def stack(site: Site) -> Value:
    """Join tensors along a new dimension, which moves the batch when it comes in front of it."""
    fact = aligned(site, list(leaves(site["tensors"])), "joining them")
    if fact is None:
        return UNKNOWN
    site.arguments["input"] = fact
    return unsqueeze(site)


def pieces(site: Site) -> Value:
    """`chunk`, `split`, `tensor_split`: not along the batch."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    axis = site.axis(fact, site["dim"])
    if axis is None:
        return UNKNOWN
    if fact.dim is not None and axis == fact.dim:
        site.refuse_mixing(fact, "cuts along", "Cut a feature dimension, e.g. dim=1.")
        return Repeated(Fact(fact.rank, fact.dim, site.fresh))
    return Repeated(_moved(fact, fact.dim))


def unbind(site: Site) -> Value:
    """All slices along a dimension that is not the batch."""
    part = select(site)
    return Repeated(part) if isinstance(part, Fact) else UNKNOWN


def select(site: Site) -> Value:
    """One slice along a dimension that is not the batch."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    axis = site.axis(fact, site["dim"])
    if axis is None:
        return UNKNOWN
    if fact.dim is None:
        return _moved(fact, None, -1)
    if axis == fact.dim:
        site.refuse_mixing(fact, "picks from", "Every sample has to be treated the same; index a feature dimension.")
        return lost(fact.rank - 1)
    return _moved(fact, fact.dim - 1 if 0 <= axis < fact.dim else fact.dim, -1)


def getitem(site: Site) -> Value:
    """`x[...]`: of a tensor, a tuple, or a shape."""
    source, index = site["input"], site["index"]
    if isinstance(source, tuple):
        return _element(site, source, index)
    if isinstance(source, ShapeFact):
        return _size_of(site, source, index)
    if not isinstance(source, Fact):
        return UNKNOWN
    items = index if isinstance(index, tuple) else (index,)
    return _sliced(site, source, items)


def _element(site: Site, source: tuple[Any, ...], index: Any) -> Value:
    if isinstance(source, Repeated):
        return source if isinstance(index, slice) else source[0]  # type: ignore[no-any-return]
    place = number(index)
    if isinstance(index, slice):
        bounds = [number(bound) for bound in (index.start, index.stop, index.step)]
        return _as_fact(source[slice(*bounds)])
    if place is None or not -len(source) <= place < len(source):
        site.refuse("SNNFX101", f"which element {site.text} takes is not known")
        return UNKNOWN
    return _as_fact(source[place])


def _as_fact(value: Any) -> Value:
    if isinstance(value, int) and not isinstance(value, bool):
        return SizeFact(value=value)
    if value is None or isinstance(value, bool | float | str):
        return OTHER
    return value  # type: ignore[no-any-return]


def _size_of(site: Site, shape: ShapeFact, index: Any) -> Value:
    fact = shape.of
    if isinstance(index, slice):
        stop = number(index.stop)
        if index.start in (None, 0) and index.step in (None, 1) and stop is not None and stop >= 0:
            site.require(fact.rank, stop, f"reads {stop} sizes")
            return tuple(_one_size(shape, i) for i in range(stop))
        site.refuse_rank("reads sizes counted from the right")
        return UNKNOWN
    axis = site.axis(fact, index)
    return UNKNOWN if axis is None else _one_size(shape, axis)


def _one_size(shape: ShapeFact, axis: int) -> SizeFact:
    symbol = shape.of.size if axis == shape.of.dim else None
    return SizeFact(symbol, origin=(shape.tensor, axis))


def _sliced(site: Site, fact: Fact, items: tuple[Any, ...]) -> Value:
    for item in items:
        if not (item is None or item is Ellipsis or isinstance(item, slice) or number(item) is not None):
            kind = "a tensor" if isinstance(item, Fact) else "something that is not a constant number"
            site.refuse("SNNFX101", f"{site.text} indexes with {kind}", "Use torch.gather or torch.index_select.")
            return UNKNOWN
    if is_batch_sized(items):
        _refuse_batch_size(site)
    middle = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    left, right = items[:middle], items[middle + 1 :]
    consumed = sum(item is not None for item in right)
    change = sum((item is None) - (number(item) is not None) for item in left + right)
    rank = fact.rank + change
    if fact.dim is None:
        return Fact(rank, varying=fact.varying)
    walk = _Walk(site, fact)
    for item in left:
        walk.take(item)
    if consumed or any(item is None for item in right):
        if fact.rank.known is not None:
            walk.skip_to(fact.rank.known - consumed)
            for item in right:
                walk.take(item)
        elif not site.require(fact.rank, max(fact.dim, walk.axis - 1) + 1 + consumed, "counts from the right of the batch"):
            return UNKNOWN
    if walk.dropped:
        return lost(rank)
    walk.skip_to(max(walk.axis, fact.dim + 1))
    return Fact(rank, walk.place, walk.size)


class _Walk:
    """Goes through an index from the left and notes where the batch ends up."""

    def __init__(self, site: Site, fact: Fact) -> None:
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
                hint = "Every sample has to be treated the same; index a feature dimension, e.g. x[:, 0]."
                self.site.refuse_mixing(self.fact, "picks from", hint)
            return
        if at_batch:
            self.place = self.out
            if item.start not in (None, 0) or item.stop is not None or item.step not in (None, 1):
                self.site.refuse_mixing(self.fact, "cuts", "Slice a feature dimension, e.g. x[:, :4].")
                self.size = self.site.fresh
        self.out += 1

    def skip_to(self, axis: int) -> None:
        """Dimensions that are taken whole."""
        while self.axis < axis:
            self.take(slice(None))


# --- sizes and what is made of them


def attribute(site: Site) -> Value:
    """`x.shape`, `x.T`, `x.dtype`, ..."""
    name = site["name"]
    if name in ("dtype", "device", "layout", "is_cuda", "requires_grad"):
        return OTHER
    if not isinstance(site["input"], Fact):
        site.refuse("SNNFX101", f"{site.text} is not in the table")
        return UNKNOWN
    found = _ATTRIBUTES.get(name)
    if found is None:
        site.refuse("SNNFX101", f"the attribute `{name}` is not in the table")
        return UNKNOWN
    return found(site)


def size(site: Site) -> Value:
    """`x.size()`, `x.size(0)`, `x.shape`."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    tensor = getattr(site.node.args[0], "name", "")
    shape = ShapeFact(fact, tensor)
    if site["dim"] is not None:
        return _size_of(site, shape, site["dim"])
    if fact.rank.known is None:
        return shape
    return tuple(_one_size(shape, i) for i in range(fact.rank.known))


def numel(site: Site) -> Value:
    """How many elements a tensor has: a multiple of the batch."""
    fact = site["input"]
    if not isinstance(fact, Fact):
        return UNKNOWN
    return SizeFact(site.fresh if fact.batched else None)


def rank_of(site: Site) -> Value:
    """`x.dim()`, `x.ndim`."""
    fact = site["input"]
    return SizeFact(value=fact.rank.known) if isinstance(fact, Fact) else UNKNOWN


def _same_tensor(site: Site) -> Value:
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


def python_value(site: Site) -> Value:
    """A question about the tensor that does not depend on the batch."""
    return OTHER


def create(site: Site) -> Value:
    """`torch.zeros(sizes)`, `x.new_full(sizes, value)`: the value is the same at each step, the size may be the batch's."""
    shape = site["size"]
    if isinstance(shape, ShapeFact):
        return Fact(shape.of.rank, shape.of.dim, shape.of.size)
    entries = list(leaves(shape))
    if not all(map(_is_size, entries)):
        site.refuse("SNNFX101", f"the shape in {site.text} is not known")
        return UNKNOWN
    places = [i for i, entry in enumerate(entries) if is_batch_sized(entry)]
    if len(places) > 1:
        _refuse_batch_size(site)
        return UNKNOWN
    if places:
        return Fact(Rank(len(entries)), places[0], entries[places[0]].symbol)
    return Fact(Rank(len(entries)), known=_literal(entries))


def make_constant(site: Site) -> Value:
    """`torch.arange(n)`, `torch.eye(n)`, `torch.tensor(data)`: made of numbers that are not the batch size."""
    operands = list(leaves(site.arguments))
    if is_batch_sized(operands):
        site.refuse("SNNFX110", f"{site.text} depends on the size of the batch")
        return UNKNOWN
    if any(isinstance(operand, Fact) for operand in operands) or UNKNOWN in operands:
        site.refuse("SNNFX101", f"{site.text} is in the table with numbers only")
        return UNKNOWN
    if BOTTOM in operands:
        return BOTTOM
    ranks = {"arange": 1, "linspace": 1, "eye": 2}
    return Fact(Rank(ranks[site.name]) if site.name in ranks else Rank(0, site.node.name))
