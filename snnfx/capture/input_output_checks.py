"""What a step may take and return: tensors and plain values, nested in what pytree knows (SNNFX216)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from snnfx.errors import CaptureError
from snnfx.sandbox.torch_internals import pytree

__all__ = ["refuse_inputs", "refuse_outputs"]

_NESTS = "Use tuples, lists, dicts, named tuples, or a class that is registered with torch.utils._pytree."


def refuse_inputs(leaves: Sequence[tuple[str, Any]], where: str) -> None:
    """Refuse leaves of the arguments that cannot be fixed at conversion: `(name, value)` of what is no tensor.

    Raises:
        CaptureError: SNNFX216.
    """
    for name, value in leaves:
        reason = _unfit(value)
        if reason:
            what = f"the input `{name}` is a {type(value).__name__}"
            raise CaptureError("SNNFX216", what, where=where, why=reason, hint=_NESTS)


def refuse_outputs(leaves: Sequence[Any], where: str) -> None:
    """Refuse leaves of what a step returns that cannot be put together over time.

    Raises:
        CaptureError: SNNFX216.
    """
    for value in leaves:
        if isinstance(value, Tensor | fx.Proxy | fx.Node):
            continue
        reason = _unfit(value)
        if reason:
            what = f"one step returns a {type(value).__name__}"
            raise CaptureError("SNNFX216", what, where=where, why=reason, hint=_NESTS)


def _unfit(value: Any) -> str:
    """Why a leaf is neither a tensor nor a plain value; "" if it is plain."""
    if isinstance(value, Iterator):
        return "an iterator is used up by being looked at."
    if isinstance(value, set | frozenset):
        return "a set has no order."
    if type(value).__module__ == "numpy" and hasattr(value, "__array__") and bool(getattr(value, "ndim", 0)):
        return "it would be fixed at conversion."
    inside = getattr(value, "__dict__", None)
    if isinstance(inside, dict) and any(isinstance(v, Tensor | fx.Proxy) for v in pytree.tree_leaves(inside)):
        return "it holds tensors, but pytree does not know it."
    return ""
