"""Settings of convolutions and poolings, as torch reads them."""

from __future__ import annotations

__all__ = ["integers"]


def integers(value: object, dims: int, least: int) -> tuple[int, ...] | None:
    """A setting of a convolution or pooling, by dimension; None if torch refuses it.

    Args:
        value: an integer for all dimensions, or a sequence.
        dims: number of dimensions.
        least: the smallest integer that torch takes.
    """
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(values) == 1:
        values *= dims
    if len(values) != dims or not all(isinstance(v, int) and v >= least for v in values):
        return None
    return values
