"""Replan a net: for inputs that its plan does not cover, and after a setting of the model changed."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.capture.setting_reads import WatchedSetting
from snnfx.errors import CaptureError, InputError, warn_once

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["capture_again", "net_for"]


def net_for(net: Net, leaves: list[Tensor], given: dict[str, Any]) -> Net | None:
    """The net planned for inputs of these shapes; None if the plan of `net` covers them.

    Args:
        net: caches the nets planned for other shapes.
        leaves: the tensor inputs of a call, time first.
        given: the carried arguments of the call.

    Raises:
        InputError: the batch sizes differ and the model fails with them (SNNFX303), or the net cannot be planned again
            (SNNFX306).
        CaptureError: the model cannot be captured with these shapes.
    """
    arguments = net._arguments
    if arguments.covered(leaves):
        return None
    key = tuple(tuple(x.shape) for x in leaves)
    ranks = (net.training, tuple(x.dim() for x in leaves))
    if key not in net._nets_for_shapes:
        if net._replan is None:
            raise InputError(
                "SNNFX306",
                f"the plan of the net does not cover inputs of shapes {[list(x.shape) for x in leaves]}",
                hint="Convert the model with example_inputs of these shapes.",
            )
        warn_once(
            "SNNFX102",
            f"the plan of the net (batched inputs, equal batch sizes) does not cover inputs of rank {ranks[1]}, time "
            "included; the net is planned again for them and may map regions instead of folding them. Pass "
            "example_inputs to plan once.",
            key=(weakref.ref(net), ranks),
        )
        args, kwargs = _example(net, arguments.at_step(leaves, 0), given)
        try:
            net._nets_for_shapes[key] = net._replan(net, args, kwargs)
        except CaptureError as error:
            sizes = arguments.batch_sizes(leaves)
            if len(set(sizes.values())) < 2:
                raise
            raise InputError(
                "SNNFX303",
                "the batch sizes of the inputs differ",
                where=", ".join(f"`{name}`: {size}" for name, size in sizes.items()),
                why=f"one step of the model fails with them: {error.why or error.what}",
                hint="Give all inputs the same batch size.",
            ) from error
    return net._nets_for_shapes[key]


# Compiled code detects changed settings too, but cannot capture the model as part of one graph (fullgraph=True).
@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="SNNFX315 a setting of the model changed after conversion: call the net once without torch.compile"
)
def capture_again(net: Net, setting: WatchedSetting, now: Any, leaves: list[Tensor], given: dict[str, Any]) -> None:
    """Capture the model again after one of its settings changed.

    Args:
        net: the net whose graph is out of date; it is updated in place.
        setting: the setting that changed.
        now: its current value.
        leaves, given: the inputs of the call.

    Raises:
        InputError: SNNFX315, the graph was replaced by hand.
    """
    what = f"`{setting.qualified_name}` is {now!r}, but the step was captured with {setting.shown}"
    replan = net._replan
    if replan is None or net._executable.graphs.is_replaced:
        raise InputError(
            "SNNFX315",
            what,
            why="the graph was replaced by hand, and capturing the model again would discard it.",
            hint="Convert the model again, or restore the value.",
        )
    warn_once(
        "SNNFX315",
        f"{what}; the net captures the model again."
        + (" Make it a buffer or a parameter if it changes often." if setting.name != "training" else ""),
        key=(weakref.ref(net), setting.qualified_name),
    )
    steps = net._arguments.at_step(leaves, 0) if net.options.step_mode == "m" else leaves
    # Capture with example shapes only if the first capture had them.
    recaptured = replan(net, *(_example(net, steps, given) if net.program.input_ranks else ((), {})))
    net._use_programs(recaptured.programs, recaptured.history, net.options)


def _example(net: Net, steps: list[Tensor], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one step, as example inputs for capture."""
    args, kwargs = net._arguments.arguments_of(steps)
    return args, kwargs | {c.name: given[c.name] for c in net.program.carried if c.required and c.name in given}
