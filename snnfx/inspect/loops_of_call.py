"""The loops of a model that runs over time itself, as rows of a report."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from snnfx.inspect.conversion_notes import kernels_of_loops
from snnfx.inspect.report import LoopRow
from snnfx.ops.run_loop import LoopHandle, run_loop
from snnfx.runtime.net import Net

__all__ = ["loops_of_call"]


def loops_of_call(net: Net) -> Iterator[LoopRow]:
    """The loops that a net of a model that runs over time itself calls."""
    for node in net.program.graph.nodes:
        if node.target is not run_loop:
            continue
        handle, steps = net.program.resolve(str(node.args[0].target)), node.args[1]
        assert isinstance(handle, LoopHandle)
        of_loop: Net = handle.net  # type: ignore[assignment]
        yield LoopRow(
            where=handle.location,
            iterations="T" if isinstance(steps, Node) else str(steps),
            slots=tuple(slot.name for slot in of_loop.program.slots),
            regions=tuple(region.kind for region in of_loop.program.regions),
            kernels=tuple(kernels_of_loops(of_loop)),
        )
