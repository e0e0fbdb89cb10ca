"""What a converted net runs for a region: graphs of one step that take their modules and parameters as arguments.

A region has no parameters of its own, so the keys of the net's state_dict stay those of the model. Called directly it
computes one step (or, folded, a large batch). For whole sequences it offers `multi_step` or `map_steps`, which
`snnfx.functional` uses: eagerly a Python loop or torch.vmap, under torch.compile one opaque operator, so that the
compiled program does not depend on T.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from snnfx.errors import PassError, warn_once
from snnfx.ops.memory_format import unbind_in_layout
from snnfx.ops.sequence_functions import stack_steps
from snnfx.sandbox.torch_internals import BatchNormBase

if TYPE_CHECKING:
    from snnfx.regions.region_kernels import RegionKernels

__all__ = [
    "LoopRegion",
    "MapRegion",
    "RegionGraph",
    "SequenceRegion",
    "buffers_of",
    "region_of_handle",
    "tensors_of",
]

_handles: weakref.WeakValueDictionary[str, SequenceRegion] = weakref.WeakValueDictionary()
_counter = itertools.count()


class RegionGraph(fx.GraphModule):
    """The graph of one step of a region; placeholders are its constants, its step inputs and, in loops, its state."""

    def without_dead_code(self) -> RegionGraph:
        """The same graph without the nodes that no result needs; nothing in a region graph has side effects."""
        needed = {self.graph.output_node()}
        for node in reversed(self.graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
            elif node.op != "placeholder":
                self.graph.erase_node(node)
        self.recompile()
        return self


class SequenceRegion(nn.Module):
    """A region that runs over a whole sequence and can be named by a handle, so that an operator can find it."""

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
        """Say where the modules among the constants are found when only their tensors are at hand."""
        self.__dict__["resolve"] = resolve
        self.constant_targets = list(constant_targets)
        self.output_count = output_count

    def runs_as_operator(self, constants: Sequence[Any]) -> bool:
        """Under torch.compile, unless a module in it changes its buffers: then the loop is unrolled."""
        return torch.compiler.is_compiling() and not any(
            isinstance(m, BatchNormBase) and m.training
            for c in constants
            if isinstance(c, nn.Module)
            for m in c.modules()
        )


class LoopRegion(SequenceRegion):
    """A strongly connected component, stepped over time.

    Args:
        label: qualified name for messages.
        step: `(*constants, *inputs, state) -> (outputs, state)`.
        first: `(*constants, *inputs) -> (outputs, state)`: the step from the reset state, None if there is no state.
    """

    def __init__(self, label: str, step: RegionGraph, first: RegionGraph | None) -> None:
        super().__init__(label, step)
        self.first = first
        self.kernels: RegionKernels | None = None

    def forward(self, *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """One step: `(*constants, *inputs, state)`, where state None means the reset state."""
        *rest, state = arguments
        if state is None and self.first is not None:
            return self.first(*rest)  # type: ignore[no-any-return]
        return self.step.forward(*rest, state)  # type: ignore[no-any-return]

    def multi_step(
        self, x_seq: tuple[Tensor, ...], state: tuple[Any, ...] | None, constants: tuple[Any, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """All steps of a sequence: `(outputs [T, *], final state)`."""
        if self.runs_as_operator(constants):
            from snnfx.regions.operator import run_loop_as_operator

            return run_loop_as_operator(self, x_seq, state, constants)
        done = None if self.kernels is None else self.kernels.run(x_seq, state, constants)
        if done is not None:
            return done
        outputs: list[tuple[Tensor, ...]] = []
        step = self.step.forward  # not step(...): module calls and their wrappers cost more than a small step
        for x in zip(*(unbind_in_layout(x) for x in x_seq), strict=True):
            y, state = self(*constants, *x, None) if state is None else step(*constants, *x, state)
            outputs.append(y)
        return tuple(stack_steps(y, x_seq[0].device) for y in zip(*outputs, strict=True)), state  # type: ignore[return-value]


class MapRegion(SequenceRegion):
    """Parallel in time but not foldable: the step graph under torch.vmap over T.

    Where vmap has no rule for an operation, the steps are run one after the other instead, with one warning.
    """

    def __init__(self, label: str, step: RegionGraph) -> None:
        super().__init__(label, step)
        self.refused_by_vmap = ""

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """One step: `(*constants, *inputs)`."""
        return self.step.forward(*arguments)  # type: ignore[no-any-return]

    def map_steps(self, x_seq: tuple[Tensor, ...], constants: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """All steps of a sequence at once: outputs `[T, *]`."""
        if self.runs_as_operator(constants):
            from snnfx.regions.operator import run_map_as_operator

            return run_map_as_operator(self, x_seq, constants)
        return self.map_eagerly(x_seq, constants)

    def map_eagerly(self, x_seq: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Tensor, ...]:
        """torch.vmap, or the steps one by one once vmap has refused."""
        if self.refused_by_vmap:
            return self._one_by_one(x_seq, constants)
        buffers = buffers_of(constants)
        try:
            return torch.vmap(lambda *x: self.step.forward(*constants, *x), randomness="different")(*x_seq)  # type: ignore[no-any-return]
        except (RuntimeError, NotImplementedError) as error:
            for buffer, value in buffers:
                # BatchNorm counts its batch before vmap finds that it has no rule. Past the version counter: an
                # earlier call may have saved the buffer for its backward pass.
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)
            result = self._one_by_one(x_seq, constants)  # raises if the model itself is at fault
            self.refused_by_vmap = str(error).splitlines()[0]
            warn_once(
                "SNNFX504",
                f"torch.vmap refused the region {self.label} ({self.refused_by_vmap}); its steps run one by one.",
                key=self.handle,
            )
            return result

    def _one_by_one(self, x_seq: Sequence[Tensor], constants: Sequence[Any]) -> tuple[Tensor, ...]:
        steps = [self.step.forward(*constants, *x) for x in zip(*(x.unbind(0) for x in x_seq), strict=True)]
        return tuple(torch.stack(y) for y in zip(*steps, strict=True))


def buffers_of(constants: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """The buffers that a step may change, with copies of their values."""
    modules = [m for c in constants if isinstance(c, nn.Module) for m in c.modules() if m.training]
    return [(buffer, buffer.clone()) for m in modules for buffer in m.buffers(recurse=False)]


def tensors_of(constants: Sequence[Any]) -> list[Tensor]:
    """The tensors of a region's constants: parameters and buffers of modules, in their order, and tensors."""
    found: list[Tensor] = []
    for constant in constants:
        if isinstance(constant, nn.Module):
            found.extend(constant.parameters())
            found.extend(constant.buffers())
        elif isinstance(constant, Tensor):
            found.append(constant)
    return found


def region_of_handle(handle: str) -> SequenceRegion:
    """The living region behind a handle.

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
