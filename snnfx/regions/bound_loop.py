"""`BoundLoop`: a loop region with its modules, whose kernels are bound to the layout of the first call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from snnfx.lowering.elementwise.bound_step import BoundStep
from snnfx.lowering.events.spike_bits import SpikeBits
from snnfx.lowering.events.spike_readers import SpikeReader
from snnfx.regions.eager_regions import EagerLoop

__all__ = ["BoundLoop"]

_MOST_BINDINGS = 4
"""A loop whose inputs have ever other layouts stays unbound after this many bindings."""


_PLAIN = (Tensor, nn.Parameter, nn.Buffer)

Results = tuple[tuple[Tensor, ...], tuple[Any, ...]]
BitResults = tuple[tuple[Tensor | SpikeBits, ...], tuple[Any, ...]]


class BoundLoop:
    """Runs a loop region from the reset state: `(outputs [T, *], final states)`.

    The caller guarantees that the settings of the modules are those of the first call.

    Args:
        region: the region.
        constants: the constants of the region: modules, and objects that never change.
        tensors: the positions of constants that are tensors, which the caller passes behind the inputs.
        with_finals: whether the caller reads the final states; else the call may return none.
        readers: the layers that read the only output, if they take bits. While all of them run by events, the output
            is a `SpikeBits`.
    """

    def __init__(
        self,
        region: EagerLoop,
        constants: Sequence[Any],
        tensors: Sequence[int] = (),
        with_finals: bool = True,
        readers: Sequence[SpikeReader] = (),
    ) -> None:
        self.region, self.constants, self.with_finals = region, tuple(constants), with_finals
        self.tensors, self.readers = tuple(tensors), tuple(readers)
        self.step: BoundStep | None = None
        self.step_in_bits: BoundStep | None = None
        self.bindings = self.bit_bindings = 0

    def __call__(self, *arguments: Tensor) -> BitResults:
        """Run the bound kernels, or the region as it runs unbound if the inputs have another layout."""
        if self.readers and not self.tensors and all(reader.runs_by_events for reader in self.readers):
            in_bits = self._run_in_bits(arguments, self.constants)
            if in_bits is not None:
                return in_bits
        results = self.run_bound(arguments)
        return self.run_unbound(arguments) if results is None else results

    def run_bound(self, arguments: Sequence[Tensor]) -> Results | None:
        """Run the bound kernels; None if there are none for the layout of these inputs."""
        if self.step is None:
            return None
        x_seq, constants, given = self._split(arguments)
        if not all(type(tensor) in _PLAIN for tensor in given):
            return None
        return self.step.run(x_seq, constants, given)

    def run_unbound(self, arguments: Sequence[Tensor]) -> Results:
        """Run the region as it runs unbound, then bind its kernels to the layout of these inputs."""
        x_seq, constants, _ = self._split(arguments)
        results = self.region.loop_eagerly(x_seq, None, constants)
        if self.bindings < _MOST_BINDINGS:
            self.bindings += 1
            kernels = self.region.kernels
            self.step = None if kernels is None else kernels.bound_step(x_seq, constants, self.with_finals)
        return results

    def _split(self, arguments: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Any, ...], tuple[Tensor, ...]]:
        """The inputs, all constants, and the tensors among the constants."""
        if not self.tensors:
            return tuple(arguments), self.constants, ()
        count = len(arguments) - len(self.tensors)
        given, merged = tuple(arguments[count:]), list(self.constants)
        for i, tensor in zip(self.tensors, given, strict=True):
            merged[i] = tensor
        return tuple(arguments[:count]), tuple(merged), given

    def _run_in_bits(
        self, x_seq: Sequence[Tensor], constants: Sequence[Any]
    ) -> tuple[tuple[SpikeBits], tuple[Tensor, ...]] | None:
        """Run the kernels that write bits; None if there are none for these inputs."""
        kernels = self.region.kernels
        for is_bound in (True, False):
            if not is_bound:
                if kernels is None or self.bit_bindings >= _MOST_BINDINGS:
                    return None
                self.bit_bindings += 1
                self.step_in_bits = kernels.bound_step(x_seq, constants, self.with_finals, in_bits=True)
            step = self.step_in_bits
            results = None if step is None else step.run(x_seq, constants)
            if step is not None and results is not None:
                (words,), finals = results
                shape, order, T = step.step
                return (SpikeBits(words, (T, *shape), order, step.output_dtypes[0]),), finals
        return None
