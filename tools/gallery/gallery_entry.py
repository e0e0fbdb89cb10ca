"""An entry of the gallery: a model, its inputs, and the call that its author makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx.functional import reset_net

__all__ = ["Entry", "rates", "sequence_of"]


@dataclass(frozen=True)
class Entry:
    """A model in the style of published code.

    Args:
        name: its name in the tables.
        style: the library or repositories whose idioms it follows.
        make: constructor.
        inputs: the inputs of one call of the net, for a number of time steps.
        T: number of time steps.
        takes: the `takes` of the conversion. "step": the author steps the model in a loop around it.
        carries: whether a step returns its state behind the output and takes it as its last argument.
        other_T: another number of time steps that the model runs; None if its code fixes the number.
        options: further options of the conversion.
    """

    name: str
    style: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    T: int
    takes: str = "sequence"
    carries: bool = False
    other_T: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def convert(self, model: nn.Module) -> snnfx.Net:
        inputs = self.inputs(self.T)
        options = {"batch_norm": "per_step", **self.options} if self.takes == "step" else self.options
        example = inputs if self.takes == "sequence" else tuple(x[0] for x in inputs)
        return snnfx.convert(model, takes=self.takes, example_inputs=example, **options)

    def run_as_author(self, model: nn.Module, *inputs: Tensor) -> Any:
        """Call a model that runs over time itself, or step it and stack its outputs."""
        _reset(model)
        if self.takes == "sequence":
            return model(*inputs)
        if self.carries:
            return _step_with_state(model, inputs)
        return _stacked([model(*step) for step in zip(*inputs, strict=True)])


def _reset(model: nn.Module) -> None:
    """Reset the neurons of libraries, and those of the gallery by their own method."""
    reset_net(model)
    for module in model.modules():
        reset: Any = getattr(module, "reset_state", None)
        if reset is not None:
            reset()


def _step_with_state(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The stacked outputs and the last state of a model that takes and returns its state."""
    outputs, state = [], None
    for step in zip(*inputs, strict=True):
        y, state = model(*step) if state is None else model(*step, state)
        outputs.append(y)
    return _stacked(outputs), state


def _stacked(steps: list[Any]) -> Any:
    leaves = zip(*(pytree.tree_leaves(y) for y in steps), strict=True)
    return pytree.tree_unflatten([torch.stack(values) for values in leaves], pytree.tree_structure(steps[0]))


def sequence_of(*shape: int, scale: float = 1.0, time_dim: int = 0) -> Callable[[int], tuple[Tensor, ...]]:
    """Random sequences of samples of a shape, with the time steps at a dimension."""

    def inputs(T: int) -> tuple[Tensor, ...]:
        return ((scale * torch.rand(T, *shape)).movedim(0, time_dim).contiguous(),)

    return inputs


def rates(*shape: int, rate: float = 0.2, time_dim: int = 0) -> Callable[[int], tuple[Tensor, ...]]:
    """Random spike trains."""

    def inputs(T: int) -> tuple[Tensor, ...]:
        return ((torch.rand(T, *shape) < rate).to(torch.get_default_dtype()).movedim(0, time_dim).contiguous(),)

    return inputs
