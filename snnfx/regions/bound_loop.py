"""`BoundLoop`: a loop region with its modules, whose kernels are bound to the layout of the first call.

A loop that runs step by step, because its step has no kernel or steps are faster, runs flat functions of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from snnfx.lowering.elementwise.bound_step import BoundStep
from snnfx.ops.sequence_functions import stack_steps, unbind_steps
from snnfx.regions.eager_regions import EagerLoop
from snnfx.regions.region_kernels import BoundMixedLoop

__all__ = ["MOST_BINDINGS", "BoundLoop", "FlatSteps", "Results"]

MOST_BINDINGS = 4
"""A loop whose inputs have ever other layouts stays unbound after this many bindings."""


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

State = tuple[Any, ...] | None
"""The state before the first step; None: the reset state."""
Results = tuple[tuple[Tensor, ...], tuple[Any, ...]]


@dataclass(frozen=True)
class FlatSteps:
    """The steps of a loop as functions without module calls, which run the modules that the loop was bound to.

    Args:
        step: `(*tensors among the constants, *inputs, state) -> (outputs, state)`.
        first: the same from the reset state, without the argument `state`; None: `step` with state None.
        structures: whether outputs may be structures.
        first_by_kernels: `first`, with kernels for the neurons.
    """

    step: Callable[..., Any]
    first: Callable[..., Any] | None
    structures: bool
    first_by_kernels: Callable[..., Any] | None = None

    def run(
        self, x_seq: Sequence[Tensor], given: Sequence[Tensor], state: State = None, by_kernels: bool = False
    ) -> Results:
        """Run all steps of a sequence: `(outputs [T, *], state)`."""
        first = self.first_by_kernels if by_kernels else self.first
        outputs: list[tuple[Tensor, ...]] = []
        for x in zip(*(unbind_steps(x) for x in x_seq), strict=True):
            if state is None and first is not None:
                y, state = first(*given, *x)
            else:
                y, state = self.step(*given, *x, state)
            outputs.append(y)
        device = x_seq[0].device
        return tuple([stack_steps(y, device, self.structures) for y in zip(*outputs, strict=True)]), state or ()


class BoundLoop:
    """Runs a loop region: `(outputs [T, *], final states)`.

    The caller guarantees that the settings of the modules are those of the first call.

    Args:
        region: the region.
        constants: the constants of the region: modules, and objects that never change.
        tensors: the positions of constants that are tensors, which the caller passes behind the inputs.
        with_finals: whether the caller reads the final states; else the call may return none.
        steps: the steps as functions, for loops that run step by step.
    """

    def __init__(
        self,
        region: EagerLoop,
        constants: Sequence[Any],
        tensors: Sequence[int] = (),
        with_finals: bool = True,
        steps: FlatSteps | None = None,
    ) -> None:
        self.region, self.constants, self.with_finals = region, tuple(constants), with_finals
        self.tensors, self.steps = tuple(tensors), steps
        self.step: BoundStep | BoundMixedLoop | None = None
        self.without_kernel = False
        """Whether the region has no kernel for the bound layout, so that its steps run one by one."""
        self.bindings = 0

    def __call__(self, *arguments: Tensor, state: State = None) -> Results:
        """Run the bound kernels, or the region as it runs unbound if the inputs have another layout."""
        results = self.run_bound(arguments, state)
        return self.run_unbound(arguments, state) if results is None else results

    def run_bound(self, arguments: Sequence[Tensor], state: State = None) -> Results | None:
        """Run the bound kernels or steps; None if there are none for the layout of these inputs."""
        if self.step is None and not self.without_kernel:
            return None
        x_seq, constants, given = self._split(arguments)
        if not all(type(tensor) in _PLAIN for tensor in given):
            return None
        if self.step is None or self._prefers_steps(x_seq, state):
            return None if self.steps is None else self.steps.run(x_seq, given, state, self.step is not None)
        if isinstance(self.step, BoundMixedLoop):
            return self.step.run(x_seq, constants, given, state)
        return None if state is not None else self.step.run(x_seq, constants, given)

    def _prefers_steps(self, x_seq: Sequence[Tensor], state: State) -> bool:
        kernels = self.region.kernels
        if kernels is None or self.steps is None or not isinstance(self.step, BoundMixedLoop):
            return False
        return kernels.stepping.is_stepped(x_seq, state)

    def run_unbound(self, arguments: Sequence[Tensor], state: State = None) -> Results:
        """Run the region as it runs unbound, then bind its kernels to the layout of these inputs."""
        x_seq, constants, _ = self._split(arguments)
        results = self.region.loop_eagerly(x_seq, state, constants)
        if self.bindings < MOST_BINDINGS:
            self.bindings += 1
            self._bind(x_seq, constants, state)
        return results

    def _bind(self, x_seq: Sequence[Tensor], constants: Sequence[Any], state: State) -> None:
        kernels = self.region.kernels
        self.step = None if kernels is None else kernels.bound_step(x_seq, constants, self.with_finals, state)
        self.without_kernel = self.step is None and (
            kernels is None or kernels.prepare(x_seq, state, constants) is None
        )

    def _split(self, arguments: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Any, ...], tuple[Tensor, ...]]:
        """The inputs, all constants, and the tensors among the constants."""
        if not self.tensors:
            return tuple(arguments), self.constants, ()
        count = len(arguments) - len(self.tensors)
        given, merged = tuple(arguments[count:]), list(self.constants)
        for i, tensor in zip(self.tensors, given, strict=True):
            merged[i] = tensor
        return tuple(arguments[:count]), tuple(merged), given
