"""Facts of the batch analysis: the rank, batch dimension and batch size of each value.

A node may be folded if `f(cat_t x_t) == cat_t f(x_t)`, where `cat` concatenates along the batch dimension of each
value. A `Fact` names that dimension. Facts describe shapes only; a node may be folded if it has no refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from snnfx.ir.facts import VALUE

__all__ = [
    "NON_TENSOR",
    "UNDETERMINED",
    "UNKNOWN",
    "Fact",
    "NonTensor",
    "Rank",
    "ShapeFact",
    "SizeFact",
    "Undetermined",
    "UniformTuple",
]
__all__ += ["Unknown", "Value", "join", "leaves", "model_input", "rank_difference"]


@dataclass(frozen=True)
class Rank:
    """A number of dimensions: `offset`, or the unknown rank of `base` (an input or another node) plus `offset`.

    `base == ""`: the number is known. Adding or subtracting an int changes the offset.
    """

    offset: int
    base: str = ""

    @property
    def known(self) -> int | None:
        """The number; None if it is relative to an unknown rank."""
        return None if self.base else self.offset

    def __add__(self, n: int) -> Rank:
        return Rank(self.offset + n, self.base)

    def __sub__(self, n: int) -> Rank:
        return Rank(self.offset - n, self.base)

    def __str__(self) -> str:
        if not self.base:
            return str(self.offset)
        return f"rank({self.base})" + (f"{self.offset:+d}" if self.offset else "")


def rank_difference(a: Rank, b: Rank) -> int | None:
    """`a - b`, or None if it is unknown."""
    return a.offset - b.offset if a.base == b.base else None


@dataclass(frozen=True)
class Fact:
    """The rank and batch dimension of a tensor at one time step.

    Args:
        rank: its number of dimensions in one step.
        dim: the batch dimension, counted from the left; None: no batch (a parameter, `x.mean(0)`).
        size: symbol of the batch size. Equal symbols are equal sizes; "N" is the batch size of the model's inputs.
            Folding makes every size with a symbol T times as large.
        known: for a tensor without a batch, the known sizes of its leading dimensions; for one with a batch, a 1 for
            each dimension in front of the batch if they all have the literal size 1.
        varying: for a tensor without a batch, whether the value may differ between time steps.
    """

    rank: Rank
    dim: int | None = None
    size: str | None = None
    known: tuple[int | None, ...] = ()
    varying: bool = False

    @property
    def has_ones_in_front(self) -> bool:
        """Whether the dimensions in front of the batch have the literal size 1, so that merging them mixes nothing."""
        return self.dim is not None and len(self.known) == self.dim

    def with_ones_in_front(self) -> Fact:
        """The fact of a tensor whose dimensions in front of the batch have the literal size 1."""
        return replace(self, known=(1,) * (self.dim or 0))

    @property
    def batched(self) -> bool:
        """Whether the tensor has a batch dimension."""
        return self.dim is not None

    def __str__(self) -> str:
        if self.dim is None:
            return f"rank {self.rank}, no batch, {'varying' if self.varying else 'invariant'}"
        return f"rank {self.rank}, batch {self.size} at {self.dim}"


@dataclass(frozen=True)
class SizeFact:
    """A Python int computed from sizes.

    Args:
        symbol: the size symbol that it equals; None if it does not depend on the batch.
        value: the number, if it is the same in every call.
        origin: name of the tensor and dimension that it was read from.
    """

    symbol: str | None = None
    value: int | None = None
    origin: tuple[str, int] | None = None


@dataclass(frozen=True)
class ShapeFact:
    """`x.shape` of a tensor of unknown rank."""

    of: Fact
    tensor: str


class UniformTuple(tuple[Any, ...]):
    """A tuple of unknown length whose elements share one fact."""

    def __new__(cls, element: Any) -> UniformTuple:
        return super().__new__(cls, (element,))


@dataclass(frozen=True)
class NonTensor:
    """A Python object that depends neither on time nor on the batch: a dtype, a device, a module."""


@dataclass(frozen=True)
class Unknown:
    """No fact is known: the top of the lattice."""


@dataclass(frozen=True)
class Undetermined:
    """No fact yet: a state slot in the first iteration. The bottom of the lattice."""


NON_TENSOR, UNKNOWN, UNDETERMINED = NonTensor(), Unknown(), Undetermined()

Value = Fact | SizeFact | ShapeFact | NonTensor | Unknown | Undetermined | tuple[Any, ...]
"""The fact of any value; a tuple of values has a tuple of facts."""


def join(a: Value, b: Value) -> Value:
    """The least fact implied by both `a` and `b` (join of the lattice)."""
    if a == b or b == UNDETERMINED:
        return a
    if a == UNDETERMINED:
        return b
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and type(a) is type(b) is tuple:
        return tuple(join(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Fact) and isinstance(b, Fact) and a.dim is None and b.dim is None and a.rank == b.rank:
        return Fact(a.rank, varying=a.varying or b.varying)
    if isinstance(a, Fact) and isinstance(b, Fact) and replace(a, known=()) == replace(b, known=()):
        return replace(a, known=())
    return UNKNOWN


def leaves(value: Any) -> Iterator[Any]:
    """The facts and Python values in nested arguments, one by one."""
    if isinstance(value, tuple | list):
        for element in value:
            yield from leaves(element)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))
    else:
        yield value


def model_input(node: Node, size: str = "N") -> Fact:
    """The fact of an input of the model, whose batch is dim 0 of one step.

    Args:
        node: the placeholder; `meta["val"]`, if present, gives the rank of one step.
        size: symbol of the batch size. Inputs with equal symbols must have equal batch sizes in each call.
    """
    example = VALUE.of(node)
    rank = Rank(example.dim()) if isinstance(example, Tensor) else Rank(0, node.name)
    if rank.known == 0:
        return Fact(rank, varying=True)
    return Fact(rank, 0, size)
