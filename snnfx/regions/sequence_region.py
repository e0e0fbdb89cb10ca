"""Base class of regions that run over a sequence, and their handles.

A region has no parameters of its own: its graph takes modules and parameters as arguments ("constants"), so the keys of
the net's state_dict stay the model's. The operator `snnfx::run_region` names a region by its handle, a string.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.errors import PassError
from snnfx.sandbox.torch_internals import BatchNormBase

__all__ = ["RegionGraph", "SequenceRegion", "buffers_of", "region_of_handle", "tensors_of"]

_handles: weakref.WeakValueDictionary[str, SequenceRegion] = weakref.WeakValueDictionary()
_counter = itertools.count()


class RegionGraph(fx.GraphModule):
    """The graph of one step of a region.

    Its placeholders are the constants of the region, the inputs of the step and, in loops, its state.
    """

    def without_dead_code(self) -> RegionGraph:
        """Erase the nodes that no result needs; nodes of a region graph have no side effects."""
        needed = {self.graph.output_node()}
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
            elif node.op != "placeholder":
                self.graph.erase_node(node)
        self.recompile()
        return self


class SequenceRegion(nn.Module):
    """A region that runs over a whole sequence, registered under a handle.

    Args:
        label: qualified name for messages.
        step: the graph of one step.
    """

    def __init__(self, label: str, step: RegionGraph) -> None:
        super().__init__()
        self.label = label
        self.step = step
        self.handle = f"{label}#{next(_counter)}"
        self.resolve: Callable[[str], Any] | None = None
        self.constant_targets: list[str | None] = []
        self.output_count = 0
        self.slot_count = 0
        _handles[self.handle] = self

    def bind(self, resolve: Callable[[str], Any], constant_targets: Sequence[str | None], output_count: int) -> None:
        """Set how the operator, which receives only tensors, finds the modules among the constants.

        Args:
            resolve: returns the module of a target.
            constant_targets: the target of each constant that is a module, None for a tensor.
            output_count: number of outputs of a step.
        """
        self.__dict__["resolve"] = resolve
        self.constant_targets = list(constant_targets)
        self.output_count = output_count

    def runs_as_operator(self, constants: Sequence[Any]) -> bool:
        """Return True under torch.compile, unless a module changes its buffers: the loop is then unrolled."""
        return torch.compiler.is_compiling() and not any(
            isinstance(m, BatchNormBase) and m.training
            for c in constants
            if isinstance(c, nn.Module)
            for m in c.modules()
        )


def buffers_of(constants: Sequence[Any]) -> list[Tensor]:
    """The buffers that a step may change."""
    modules = [m for c in constants if isinstance(c, nn.Module) for m in c.modules() if m.training]
    return [buffer for m in modules for buffer in m.buffers(recurse=False)]


def tensors_of(constants: Sequence[Any]) -> list[Tensor]:
    """The tensors among a region's constants, in order; of a module its parameters, then its buffers."""
    tensors: list[Tensor] = []
    for constant in constants:
        if isinstance(constant, nn.Module):
            tensors.extend(constant.parameters())
            tensors.extend(constant.buffers())
        elif isinstance(constant, Tensor):
            tensors.append(constant)
    return tensors


def region_of_handle(handle: str) -> SequenceRegion:
    """The living region that is registered under a handle.

    Raises:
        PassError: SNNFX503, its net was deleted, or the program was loaded into another process.
    """
    region = _handles.get(handle)
    if region is None:
        raise PassError(
            "SNNFX503",
            f"the region `{handle}` no longer exists",
            why="a compiled or exported program refers to the regions of a living net of the same process.",
            hint="Keep the net alive, or convert and compile again.",
        )
    return region
