"""Checkpoint the state between chunks of time steps: backward runs each chunk again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from snnfx.recompute.recomputation import run_segment
from snnfx.recompute.segment import Segment, TileCall
from snnfx.recompute.tile import Slices, Tile

__all__ = ["checkpoint_chunk"]

_NAME = "a chunk of time steps"


def checkpoint_chunk(run: Callable[..., Any], source: nn.Module) -> Callable[..., Any]:
    """A function that saves only the inputs and the state of a chunk for backward.

    Args:
        run: runs some time steps, `(source, inputs, state) -> (outputs, state)`; backward runs it again.
        source: the model whose modules `run` calls; backward passes a copy of it.

    Returns:
        A function with the signature of `run`.
    """

    def run_tile(_: Tile, *operands: Any) -> Any:
        *inputs, state, source = operands
        outputs, state = run(source, inputs, state)
        return tuple(outputs), (state,)

    def checkpointed(inputs: list[Tensor], state: Any) -> Any:
        count = len(inputs)
        # Any step may draw random numbers, so backward restores the RNG state for the whole chunk.
        tile = Tile(_NAME, fx.Graph(), run_tile, [True] * count, False, False, is_random=True)
        call = TileCall(tile, tuple(range(count)), (count,), (count + 1,), ())
        segment = Segment(_NAME, (), (), call, Slices(), False, {}, bool)
        outputs, (state,) = run_segment(segment, (*inputs, state, source))
        return outputs, state

    return checkpointed
