"""Refuse unsupported inputs and outputs of a step (SNNFX216): only pytrees of tensors and plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx

from snnfx.errors import CaptureError
from snnfx.sandbox.torch_internals import pytree

__all__ = ["refusal_of_nested_tensor", "refuse_inputs", "refuse_outputs"]

_SUPPORTED_CONTAINERS = "Use tuples, lists, dicts, named tuples, or a class registered with torch.utils._pytree."


def refuse_inputs(leaves: Sequence[tuple[str, Any]], where: str) -> None:
    """Refuse arguments that cannot be fixed at conversion.

    Args:
        leaves: `(name, value)` of each leaf that is not a tensor.
        where: location of the step, for the error.

    Raises:
        CaptureError: SNNFX216.
    """
    for name, value in leaves:
        reason = _reason_for_refusal(value)
        if reason:
            what = f"the input `{name}` is a {type(value).__name__}"
            raise CaptureError("SNNFX216", what, where=where, why=reason, hint=_SUPPORTED_CONTAINERS)


def refuse_outputs(leaves: Sequence[Any], where: str) -> None:
    """Refuse outputs of a step that cannot be stacked over time.

    Raises:
        CaptureError: SNNFX216.
    """
    for value in leaves:
        if isinstance(value, Tensor | fx.Proxy | fx.Node):
            continue
        reason = _reason_for_refusal(value)
        if reason:
            what = f"one step returns a {type(value).__name__}"
            raise CaptureError("SNNFX216", what, where=where, why=reason, hint=_SUPPORTED_CONTAINERS)


def _reason_for_refusal(value: Any) -> str:
    """Why a leaf is unsupported; "" for a plain value."""
    if isinstance(value, Iterator):
        return "reading an iterator exhausts it."
    if isinstance(value, set | frozenset):
        return "the elements of a set have no order."
    if type(value).__module__ == "numpy" and hasattr(value, "__array__") and bool(getattr(value, "ndim", 0)):
        return "snnfx would fix its values at conversion."
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and any(isinstance(v, Tensor | fx.Proxy) for v in pytree.tree_leaves(attributes)):
        return "it contains tensors, but its class is not a registered pytree node."
    return ""


def refusal_of_nested_tensor(name: str, where: str) -> CaptureError:
    """The error for a step that uses or changes a nested tensor; `name` may be empty."""
    return CaptureError(
        "SNNFX216",
        f"the step uses the nested tensor{f' `{name}`' if name else ''}",
        where=where,
        why="each step of a net takes samples of one shape.",
        hint="Pad it: torch.nested.to_padded_tensor(x, 0.0).",
    )
