"""What the batch analysis knows of the value of one step: where its batch dimension is, and how large.

A node may be folded when `f(cat_t x_t) == cat_t f(x_t)`, the concatenation being along the batch dimension of each
value. A `Fact` says which dimension that is. Facts are about shapes alone: whether a node may be folded is said by the
absence of a refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

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

    `base == ""` is a known number. Adding and subtracting ints moves the offset.
    """

    offset: int
    base: str = ""

    @property
    def known(self) -> int | None:
        """The number, or None when it is relative to an unknown rank."""
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
    """`a - b` where that is known."""
    return a.offset - b.offset if a.base == b.base else None


@dataclass(frozen=True)
class Fact:
    """A tensor.

    Args:
        rank: its number of dimensions in one step.
        dim: which dimension is the batch, counted from the left; None: it has none (a parameter, `x.mean(0)`).
        size: symbol of the size of that dimension. Equal symbols are equal sizes; "N" is that of the model's inputs.
            Folded, every size that has a symbol is T times what it is in one step.
        known: without a batch dimension, the sizes of the leading dimensions as far as they are known.
        varying: without a batch dimension, whether the value may differ between time steps.
    """

    rank: Rank
    dim: int | None = None
    size: str | None = None
    known: tuple[int | None, ...] = ()
    varying: bool = False

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
    """A Python int that is made of sizes.

    Args:
        symbol: the size symbol it equals, or None when it does not depend on the batch.
        value: the number, where it is the same in every call.
        origin: the name of the tensor and the dimension it was read from.
    """

    symbol: str | None = None
    value: int | None = None
    origin: tuple[str, int] | None = None


@dataclass(frozen=True)
class ShapeFact:
    """`x.shape` of a tensor whose rank is not a known number."""

    of: Fact
    tensor: str


class UniformTuple(tuple[Any, ...]):
    """A tuple of unknown length; the one element stands for all."""

    def __new__(cls, element: Any) -> UniformTuple:
        return super().__new__(cls, (element,))


@dataclass(frozen=True)
class NonTensor:
    """A Python object that is the same at each step and whatever the batch: a dtype, a device, a module."""


@dataclass(frozen=True)
class Unknown:
    """Nothing is known."""


@dataclass(frozen=True)
class Undetermined:
    """Not computed yet: a state slot in the first round. Neutral in elementwise operations."""


NON_TENSOR, UNKNOWN, UNDETERMINED = NonTensor(), Unknown(), Undetermined()

Value = Fact | SizeFact | ShapeFact | NonTensor | Unknown | Undetermined | tuple[Any, ...]
"""What is known of a value; a tuple of values has a tuple of facts."""


def join(a: Value, b: Value) -> Value:
    """What holds whether the value is described by `a` or by `b`."""
    if a == b or b == UNDETERMINED:
        return a
    if a == UNDETERMINED:
        return b
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and type(a) is type(b) is tuple:
        return tuple(join(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Fact) and isinstance(b, Fact) and a.dim is None and b.dim is None and a.rank == b.rank:
        return Fact(a.rank, varying=a.varying or b.varying)
    return UNKNOWN


def leaves(value: Any) -> Iterator[Any]:
    """The facts and Python values in nested arguments."""
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
    """The fact of an input of the model: its batch is dimension 0 of one step.

    Args:
        node: the placeholder; `meta["val"]`, where present, gives the number of dimensions of one step.
        size: symbol of the batch size; inputs with the same symbol have to have the same batch size in each call.
    """
    example = node.meta.get("val")
    rank = Rank(example.dim()) if isinstance(example, Tensor) else Rank(0, node.name)
    if rank.known == 0:
        return Fact(rank, varying=True)
    return Fact(rank, 0, size)
