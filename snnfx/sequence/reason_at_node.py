"""The base of exceptions that stop a rewrite of a call: a reason, and the node that it is about."""

from __future__ import annotations

from torch.fx import Node

from snnfx.ir.printing import location_of

__all__ = ["ReasonAtNode"]


class ReasonAtNode(Exception):
    """A reason against a rewrite.

    Args:
        why: the reason, as a clause.
        node: the node that it is about; None for the whole call.
    """

    def __init__(self, why: str, node: Node | None = None) -> None:
        super().__init__(why)
        self.why, self.node = why, node

    @property
    def location(self) -> str:
        """The user's file and line."""
        return location_of(self.node) if self.node is not None else ""
