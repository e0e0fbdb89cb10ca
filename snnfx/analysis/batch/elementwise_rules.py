"""Batch rules of element-wise operations, reductions, pooling, convolution and normalisation.

A rule takes a `CallSite`, returns the fact of the result, and refuses the site where folding would be wrong. Arguments
that a row does not list as operands were checked before: they are invariant in time and have no batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snnfx.analysis.batch.call_site import (
    CallSite,
    broadcast,
    common_fact,
    constant_int,
    is_batch_sized,
    require_trailing,
    without_batch,
)
from snnfx.analysis.batch.facts import UNDETERMINED, UNKNOWN, Fact, Rank, SizeFact, Undetermined, Unknown, Value, leaves

__all__ = [
    "Along",
    "BatchFirst",
    "Trailing",
    "elementwise",
    "embedding",
    "extremum",
    "like_input",
    "median",
    "normalized_dimensions",
    "one_hot",
    "pad",
    "pairwise",
    "prelu",
    "scatter",
    "softmax",
    "where",
]


def elementwise(site: CallSite) -> Value:
    """Element-wise operation with broadcasting; without tensors, arithmetic on sizes."""
    operands = [*leaves(site.arguments)]
    if any(isinstance(operand, Fact | Unknown | Undetermined) for operand in operands):
        return broadcast(site, operands)
    return _arithmetic(site, operands) if getattr(site.node.target, "__module__", "") == "_operator" else UNKNOWN


def _arithmetic(site: CallSite, operands: list[Any]) -> Value:
    if site.name == "add" and all(isinstance(operand, tuple | list) for operand in site["operands"]):
        return tuple(entry for operand in site["operands"] for entry in operand)
    batch_sized = [operand for operand in operands if is_batch_sized(operand)]
    if batch_sized:
        scaled = _scaled(site, batch_sized, operands)
        if scaled is None:
            site.refuse(
                "SNNFX110",
                f"{site.text} computes with the batch size; only its multiples can be folded",
                "Compute sizes from the feature dimensions.",
            )
            return UNKNOWN
        return scaled
    values = [constant_int(operand) for operand in operands]
    if callable(site.node.target) and None not in values:
        result = site.node.target(*values)
        return SizeFact(value=result if isinstance(result, int) else None)
    return SizeFact()


def _scaled(site: CallSite, batch_sized: list[Any], operands: list[Any]) -> SizeFact | None:
    """A multiple of the batch size, times or divided by a size; None for a result that folding does not scale."""
    if len(operands) != 2 or not all(isinstance(size, SizeFact) for size in batch_sized):
        return None
    if site.name == "remainder":
        return SizeFact(value=0) if _quotient(site, batch_sized, operands) is not None else None
    if len(batch_sized) == 2 or site.name == "floor_divide":
        return _quotient(site, batch_sized, operands) if site.name == "floor_divide" else None
    symbol = batch_sized[0].symbol
    assert symbol is not None
    factor, _, base = symbol.rpartition("*")
    if site.name == "mul":
        place = 0 if operands[1] is batch_sized[0] else 1
        constant = constant_int(operands[place])
        if constant is None:
            return SizeFact(site.fresh_multiple(symbol, _identity(site, operands, place)))
        if constant < 1:
            return None
        constant *= int(factor or 1)
        return SizeFact(symbol if constant == 1 else f"{constant}*{base}")
    return None


def _quotient(site: CallSite, batch_sized: list[Any], operands: list[Any]) -> SizeFact | None:
    """A multiple of the batch size divided by a size that divides it without a remainder; None if that is unknown."""
    if len(batch_sized) == 2:
        whole, part = (size.symbol for size in batch_sized)
        return SizeFact() if site.is_multiple(whole, part) else None
    if operands[0] is not batch_sized[0]:
        return None
    symbol = batch_sized[0].symbol
    factor, _, base = symbol.rpartition("*")
    multiple, cofactor = site.multiples.get(symbol, ("", None))
    if cofactor is not None and cofactor == _identity(site, operands, 1):
        return SizeFact(multiple)
    divisor = constant_int(operands[1])
    if divisor and int(factor or 1) % divisor == 0:
        quotient = int(factor or 1) // divisor
        return SizeFact(base if quotient == 1 else f"{quotient}*{base}")
    return None


def _identity(site: CallSite, operands: list[Any], place: int) -> object:
    """Equal for operands that are the same size; None if unknown."""
    fact, node = operands[place], site.node.args[place] if len(site.node.args) == 2 else None
    return (fact.origin if isinstance(fact, SizeFact) else None) or node


def where(site: CallSite) -> Value:
    """`where(condition, a, b)`; refuses `where(condition)`, whose shape depends on values."""
    if len(site["operands"]) < 3 and not site["options"]:
        site.refuse("SNNFX101", f"the shape of {site.text} depends on values")
        return UNKNOWN
    return elementwise(site)


def like_input(site: CallSite) -> Value:
    """The fact of the first argument (`type_as`, `rand_like`, dropout)."""
    value = site["input"]
    return value if isinstance(value, Fact) else UNKNOWN


@dataclass(frozen=True)
class Trailing:
    """Operation on the last `count` dimensions, independent along all others.

    Args:
        count: a number, or a function of the site.
        operands: tensors that share the batch and are broadcast.
        grows: number of dimensions that the result has more than the operands.
        pair: whether the result is a pair of tensors: True, False, or the name of the argument that decides.
    """

    count: int | Callable[[CallSite], int | None]
    operands: tuple[str, ...] = ("input",)
    grows: int = 0
    pair: bool | str = False

    def __call__(self, site: CallSite) -> Value:
        fact = broadcast(site, [site[name] for name in self.operands])
        if not isinstance(fact, Fact):
            return fact
        count = self.count if isinstance(self.count, int) else self.count(site)
        if count is None:
            site.refuse("SNNFX101", f"the number of dimensions that {site.text} works on is not a constant")
            return UNKNOWN
        result = Fact(fact.rank + self.grows, fact.dim, fact.size, varying=fact.varying)
        if not require_trailing(site, fact, count):
            result = without_batch(result.rank)
        is_pair = site[self.pair] not in (None, False) if isinstance(self.pair, str) else self.pair
        return (result, result) if is_pair else result


@dataclass(frozen=True)
class BatchFirst:
    """Operation on samples in dim 0, independent along it: convolution, group norm.

    Args:
        least: least rank with a batch; torch takes a tensor of lower rank as one unbatched sample.
        to: rank of the result, where it differs from the input.
    """

    least: int
    to: int | None = None

    def __call__(self, site: CallSite) -> Value:
        fact = site["input"]
        if not isinstance(fact, Fact):
            return UNKNOWN
        rank = fact.rank if self.to is None else Rank(self.to)
        if fact.dim is None:
            return Fact(rank, varying=fact.varying)
        if fact.dim != 0:
            site.refuse_mixing(fact, "mixes elements along", "Move the batch to dim 0.")
            return without_batch(rank)
        if not site.require(fact.rank, self.least, "takes its samples along dim 0"):
            return without_batch(rank) if self.to is None else UNKNOWN
        return Fact(rank, 0, fact.size)


@dataclass(frozen=True)
class Along:
    """Operation along the dimensions named in an argument, independent along all others.

    Args:
        dim: name of that argument.
        drops: whether the dimensions are removed: True, False, or the name of the `keepdim` argument.
        outputs: number of tensors in the result.
        operands: tensors that share the batch and are broadcast.
        aligned: the operands must have the same shape; they are not broadcast.
        grows: number of dimensions appended to the result.
        resizes: whether the size of the dimension may change.
    """

    dim: str = "dim"
    drops: bool | str = False
    outputs: int = 1
    operands: tuple[str, ...] = ("input",)
    aligned: bool = False
    grows: int = 0
    resizes: bool = False

    def __call__(self, site: CallSite) -> Value:
        values = [site[name] for name in self.operands if site[name] is not None]
        fact = common_fact(site, values) if self.aligned else broadcast(site, values)
        if not isinstance(fact, Fact):
            return UNDETERMINED if fact is UNDETERMINED else UNKNOWN
        dims = site[self.dim]
        if isinstance(dims, bool):  # x.std(False): the flag of another overload
            site.refuse("SNNFX101", f"no batch rule covers this overload of {site.text}")
            return UNKNOWN
        if dims is None or dims == () or dims == []:
            return self._whole(site, fact)
        axes = site.axes(fact, dims)
        if axes is None:
            return UNKNOWN
        return self._pack(self._result(site, fact, axes))

    def _whole(self, site: CallSite, fact: Fact) -> Value:
        if fact.batched:
            site.refuse_mixing(fact, "operates on all dimensions, including", "Name the feature dimensions in `dim`.")
        if site[self.dim] is not None or not isinstance(self.drops, str):
            return UNKNOWN  # the meaning of an empty tuple, and so the shape, differs between operations
        return self._pack(without_batch(fact.rank if site[self.drops] not in (None, False) else Rank(0)))

    def _result(self, site: CallSite, fact: Fact, axes: list[int]) -> Fact:
        keeps = self.drops is False or (isinstance(self.drops, str) and site[self.drops] not in (None, False))
        rank = fact.rank + self.grows
        if not keeps:
            rank = rank - len(axes)
        if fact.dim is not None and fact.dim in axes:
            site.refuse_mixing(fact, "operates along", "Use a feature dimension, e.g. dim=1, if that was not intended.")
            if self.drops is not False:
                ones = (*(None for _ in range(fact.dim)), 1) if keeps else ()
                return Fact(rank, varying=True, known=ones)
            if self.resizes:
                return Fact(rank, fact.dim, site.fresh)
        if fact.dim is None:
            return Fact(rank, varying=fact.varying)
        before = 0 if keeps else sum(0 <= axis < fact.dim for axis in axes)
        return Fact(rank, fact.dim - before, fact.size)

    def _pack(self, fact: Fact) -> Value:
        return (fact,) * self.outputs if self.outputs > 1 else fact


def softmax(site: CallSite) -> Value:
    """`softmax` along `dim`; the default is dim 0 for ranks 0, 1 and 3, and dim 1 for others."""
    fact = site["input"]
    if site["dim"] is None and isinstance(fact, Fact):
        rank = fact.rank.known
        if rank is None:
            site.refuse_rank("has a default dimension that depends on the rank")
            return fact
        site.arguments["dim"] = 0 if rank in (0, 1, 3) else 1
    return Along()(site)


def extremum(site: CallSite) -> Value:
    """`max` and `min`: of two tensors, along a dimension (with indices), or of all elements."""
    other = site["dim"] if site["dim"] is not None else site["other"]
    if isinstance(other, Fact):
        return broadcast(site, [site["input"], other])
    return Along(drops="keepdim", outputs=1 if other is None else 2)(site)


def median(site: CallSite) -> Value:
    """`median`: along a dimension (with indices) or of all elements."""
    return Along(drops="keepdim", outputs=1 if site["dim"] is None else 2)(site)


def pairwise(site: CallSite) -> Value:
    """`pairwise_distance` along the last dimension."""
    fact = Trailing(1, operands=("x1", "x2"))(site)
    if not isinstance(fact, Fact) or site["keepdim"] not in (None, False):
        return fact
    return Fact(fact.rank - 1, fact.dim, fact.size, varying=fact.varying)


def scatter(site: CallSite) -> Value:
    """`scatter(input, dim, index, src)` along one dimension; `src` may be a number."""
    operands = ("input", "index", "src") if isinstance(site["src"], Fact) else ("input", "index")
    return Along(operands=operands, aligned=True)(site)


def normalized_dimensions(site: CallSite) -> int | None:
    """The number of dimensions that `layer_norm` normalises."""
    shape = site["normalized_shape"]
    return 1 if constant_int(shape) is not None else len(list(leaves(shape)))


def embedding(site: CallSite) -> Value:
    """`embedding`: each index becomes a vector."""
    if site["max_norm"] is not None:
        site.refuse("SNNFX101", f"{site.text} changes its weight (max_norm)")
    if site["scale_grad_by_freq"] not in (None, False):
        site.refuse("SNNFX103", f"{site.text} scales gradients by how often an index occurs in the batch")
    return Trailing(0, grows=1)(site)


def one_hot(site: CallSite) -> Value:
    """`one_hot`: each index becomes a vector of `num_classes` elements."""
    if constant_int(site["num_classes"]) in (None, -1):
        hint = "Pass num_classes."
        site.refuse("SNNFX103", f"{site.text} infers the number of classes from the largest index in the batch", hint)
    return Trailing(0, grows=1)(site)


def prelu(site: CallSite) -> Value:
    """`prelu`: element-wise with one weight; otherwise one weight for each channel in dim 1."""
    weight = site["weight"]
    if isinstance(weight, Fact) and (weight.rank.known == 0 or weight.known == (1,)):
        return like_input(site)
    return BatchFirst(2)(site)


def pad(site: CallSite) -> Value:
    """`pad`: two numbers for each of the last dimensions."""
    amounts = list(leaves(site["pad"]))
    count = 1 if len(amounts) == 1 else len(amounts) // 2
    return Trailing(count)(site)
