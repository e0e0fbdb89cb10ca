"""Nets that are planned again: for inputs that a plan does not cover, and after a plain value of the model changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.capture.setting_reads import WatchedSetting
from snnfx.errors import CaptureError, InputError, warn_once

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["capture_again", "net_for"]


def net_for(net: Net, leaves: list[Tensor], given: dict[str, Any]) -> Net | None:
    """The net planned for the shapes of these inputs (time first), None when the plan of this one covers them.

    Args:
        net: keeps it.
        leaves: the tensors of a call.
        given: its carried arguments.

    Raises:
        InputError: SNNFX303, the batch sizes differ, and the model does not take that; SNNFX306, it cannot be planned.
        CaptureError: the model cannot be captured with these shapes.
    """
    arguments = net._arguments
    if arguments.covered(leaves):
        return None
    key = tuple(tuple(x.shape) for x in leaves)
    ranks = (net.training, tuple(x.dim() for x in leaves))
    if key not in net._nets_for_shapes:
        if net._replan is None:
            raise InputError("SNNFX306", f"inputs of shapes {[list(x.shape) for x in leaves]} do not fit the plan")
        warn_once(
            "SNNFX102",
            f"inputs of step rank {ranks[1]} are not what the net was planned for (batched, equal batch sizes); "
            "it is planned again for them, which may map instead of fold. Pass example_inputs to plan once.",
            key=(id(net), ranks),
        )
        example = _example(net, arguments.at_step(leaves, 0), given)
        try:
            net._nets_for_shapes[key] = net._replan(net, *example)
        except CaptureError as error:
            sizes = arguments.batch_sizes(leaves)
            if len(set(sizes.values())) < 2:
                raise
            raise InputError(
                "SNNFX303",
                "the batch sizes of the inputs differ",
                where=", ".join(f"`{name}`: {size}" for name, size in sizes.items()),
                why=f"one step of the model does not take them: {error.why or error.what}",
                hint="Give all inputs the same batch size, as one call of the model takes them.",
            ) from error
    return net._nets_for_shapes[key]


# Compiled code looks for changes too; a part of one graph (fullgraph=True) this cannot be.
@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="SNNFX315 a plain value of the model changed after conversion: call the net once without torch.compile"
)
def capture_again(net: Net, scalar: WatchedSetting, now: Any, leaves: list[Tensor], given: dict[str, Any]) -> None:
    """The model has another plain value than the graph: the net becomes that of the model as it is now.

    Args:
        net: whose graph is out of date.
        scalar: what changed.
        now: its value.
        leaves, given: the inputs of the call.

    Raises:
        InputError: SNNFX315, the graph was replaced by hand.
    """
    what = f"`{scalar.qualified_name}` is {now!r}, but the step was captured with {scalar.shown}"
    replan = net._replan
    if replan is None or net._executable.graphs.is_replaced:
        raise InputError(
            "SNNFX315",
            what,
            why="the graph was replaced by hand, and capturing the model again would lose that.",
            hint="Convert the model again, or set the value back.",
        )
    warn_once(
        "SNNFX315",
        f"{what}: the model is captured again."
        + (" Make it a buffer or a parameter if it changes often." if scalar.name != "training" else ""),
        key=(id(net), scalar.qualified_name),
    )
    steps = net._arguments.at_step(leaves, 0) if net.options.step_mode == "m" else leaves
    # Captured from shapes before, from shapes again.
    fresh = replan(net, *(_example(net, steps, given) if net.program.input_ranks else ((), {})))
    net._use_programs(fresh.programs, fresh.history, net.options)


def _example(net: Net, steps: list[Tensor], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one step, for capturing with their shapes."""
    args, kwargs = net._arguments.arguments_of(steps)
    return args, kwargs | {c.name: given[c.name] for c in net.program.carried if c.required and c.name in given}
