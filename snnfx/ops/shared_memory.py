"""The memory of tensors: where it is, and whether two views of it share elements."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["addresses_of", "are_disjoint"]


def addresses_of(tensors: Iterable[Tensor]) -> set[int]:
    """The addresses of the storages of tensors, from the tensors where possible: reading a storage takes longer."""
    return {t.untyped_storage().data_ptr() if t.storage_offset() else t.data_ptr() for t in tensors}


def are_disjoint(a: Tensor, b: Tensor) -> bool:
    """Whether two strided views of one storage are known to share no element.

    Their dimensions are read as digits of the positions of elements, e.g. row and column. Where every position has one
    representation, a view is a box of digits, and two boxes are disjoint if they are so in one dimension.
    """
    if a.dtype != b.dtype:
        return False
    if a.numel() == 0 or b.numel() == 0:
        return True
    sizes = [{s: n for n, s in zip(t.shape, t.stride(), strict=True) if n > 1} for t in (a, b)]
    strides = sorted({*sizes[0], *sizes[1], 1}, reverse=True)
    if strides[-1] < 1 or any(len(s) != sum(n > 1 for n in t.shape) for s, t in zip(sizes, (a, b), strict=True)):
        return False  # expanded, or two dimensions with one stride
    boxes = [
        _box(int(t.storage_offset()), [of.get(s, 1) for s in strides], strides)
        for t, of in zip((a, b), sizes, strict=True)
    ]
    first, second = boxes
    if first is None or second is None:
        return False
    return any(x + n <= y or y + m <= x for (x, n), (y, m) in zip(first, second, strict=True))


def _box(offset: int, sizes: list[int], strides: list[int]) -> list[tuple[int, int]] | None:
    """The first digit and the number of digits of each dimension; None if a digit would be carried."""
    box = []
    for size, stride in zip(sizes, strides, strict=True):
        digit, offset = divmod(offset, stride)
        box.append((digit, size))
    largest = 0  # the position that the digits of smaller strides reach
    for k in reversed(range(len(strides))):
        digit, size = box[k]
        largest += (digit + size - 1) * strides[k]
        if k and largest >= strides[k - 1]:
            return None
    return box
