"""Replan a net: for inputs that its plan does not cover, and after a setting of the model changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.emit.bounded_cache import BoundedCache
from snnfx.errors import CaptureError, InputError, warn, warn_once
from snnfx.ir.program_equality import is_same_plan
from snnfx.sandbox.contents_snapshot import MISSING

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["PlanCache", "capture_again", "net_for"]


MOST_PLANS = 8
"""The most nets that a net keeps for calls that its own plan does not cover."""


class PlanCache(BoundedCache["Net"]):
    """The nets planned for calls that the plan of a net does not cover, the least recently used first.

    A key is the rank of each input and which of their batch dimensions are equal (`Arguments.plan_key`).
    """

    def __init__(self) -> None:
        super().__init__(MOST_PLANS)
        self._announced: set[Any] = set()

    def is_new(self, ranks: Any) -> bool:
        """Whether this is the first question about inputs of these ranks."""
        is_new = ranks not in self._announced
        self._announced.add(ranks)
        return is_new


def net_for(net: Net, leaves: list[Tensor], given: dict[str, Any]) -> Net | None:
    """The net planned for inputs of these ranks and batch sizes; None if the plan of `net` covers them.

    Args:
        net: caches the nets planned for other inputs.
        leaves: the tensor inputs of a call, time first.
        given: the carried arguments of the call.

    Raises:
        InputError: an input has another rank than in `example_inputs` (SNNFX325), the batch sizes differ and the model
            fails with them (SNNFX303), or the net cannot be planned again (SNNFX306).
        CaptureError: the model cannot be captured with these inputs.
    """
    arguments = net._arguments
    if arguments.covered(leaves):
        return None
    arguments.check_ranks(leaves)
    key = arguments.plan_key(leaves)
    planned = net._nets_for_shapes.get(key)
    if planned is None:
        planned = _planned_again(net, leaves, given)
        net._nets_for_shapes.put(key, planned)
    return planned


def _planned_again(net: Net, leaves: list[Tensor], given: dict[str, Any]) -> Net:
    """Plan a net again for the inputs of a call."""
    arguments = net._arguments
    if net._replan is None:
        raise InputError(
            "SNNFX306",
            f"the plan of the net does not cover inputs of shapes {[list(x.shape) for x in leaves]}",
            hint="Convert the model with example_inputs of these shapes.",
        )
    ranks = tuple(x.dim() for x in leaves)
    if net._nets_for_shapes.is_new(ranks):
        warn(
            "SNNFX102",
            f"the plan of the net (batched inputs, equal batch sizes) does not cover inputs of rank {ranks}, time "
            "included; the net is planned again for them and may map regions instead of folding them. Pass "
            "example_inputs to plan once.",
        )
    steps = arguments.at_step(leaves, 0)
    args, kwargs = _example(net, steps, given)
    try:
        with _first_attributes(net):
            return net._replan(net, args, kwargs)
    except CaptureError as error:
        sizes = arguments.batch_sizes(leaves)
        if len(set(sizes.values())) < 2 or not _can_be_planned(net, _with_equal_batches(steps), given):
            raise  # the sizes are not the cause
        raise InputError(
            "SNNFX303",
            "the batch sizes of the inputs differ",
            where=", ".join(f"`{name}`: {size}" for name, size in sizes.items()),
            why=f"one step of the model fails with them: {error.why or error.what}",
            hint="Give all inputs the same batch size.",
        ) from error


def _with_equal_batches(steps: list[Tensor]) -> list[Tensor]:
    """The inputs of one step with the smallest batch among them, in their memory formats."""
    least = min(x.shape[0] for x in steps if x.dim() > 0)
    return [x[:least] if x.dim() > 0 else x for x in steps]


def _can_be_planned(net: Net, steps: list[Tensor], given: dict[str, Any]) -> bool:
    """Whether a net can be planned for these inputs of one step."""
    assert net._replan is not None
    args, kwargs = _example(net, steps, given)
    try:
        with _first_attributes(net):
            net._replan(net, args, kwargs)
    except CaptureError:
        return False
    return True


def net_for_modes(net: Net, modes: tuple[Any, ...], leaves: list[Tensor], given: dict[str, Any]) -> Net:
    """The net planned for the current modes of torch, which the model's code reads.

    Args:
        net: caches the nets planned for other modes.
        modes: the values of the modes.
        leaves, given: the inputs of a call.

    Raises:
        InputError: SNNFX315, the graph was replaced by hand.
    """
    key = (net.source.training, modes)
    if key not in net._nets_for_modes:
        names = ", ".join(f"{name}() is {value}" for name, value in zip(net.program.guards.modes, modes, strict=True))
        replan = _checked_replan(net, f"{names}, but the step was captured in another mode")
        with _first_attributes(net):
            net._nets_for_modes[key] = replan(net, *_example_of_call(net, leaves, given))
    return net._nets_for_modes[key]


# Compiled code detects changed settings too, but cannot capture the model as part of one graph (fullgraph=True).
@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="SNNFX315 a setting of the model changed after conversion: call the net once without torch.compile"
)
def capture_again(net: Net, leaves: list[Tensor], given: dict[str, Any]) -> None:
    """Capture the model again after a guard failed.

    Args:
        net: the net whose graph may be out of date; it is updated in place.
        leaves, given: the inputs of the call.

    Raises:
        InputError: SNNFX315, the graph was replaced by hand.
        CaptureError: the changed model cannot be captured.
    """
    check = net._guard_checks[net.source.training]
    if check.holds():
        return
    what, guard = check.describe_failure(), check.failed_read()
    replan = _checked_replan(net, what)
    advice = " Make it a buffer or a parameter if it changes often." if guard is not None and guard.is_number else ""
    warn_once(
        "SNNFX315",
        f"{what}; the net captures the model again.{advice}",
        key=(weakref.ref(net), guard.name if guard is not None else what),
    )
    with _first_attributes(net):
        recaptured = replan(net, *_example_of_call(net, leaves, given))
    programs = recaptured.programs
    if not check.tree_changed() and all(is_same_plan(net.programs[mode], programs[mode]) for mode in programs):
        net.use_guards(programs)
    else:
        net._use_programs(programs, recaptured.history, net.options)


@contextmanager
def _first_attributes(net: Net) -> Iterator[None]:
    """Give the attributes of the model that are state the values with which each call of the net starts.

    The model may have been stepped since its conversion.
    """
    model, values = net.source, net.first_attributes
    state = {(a.owner, a.attribute) for program in net.programs.values() for a in program.initial_attributes}
    own = {key: model.get_submodule(key[0]).__dict__.get(key[1], MISSING) for key in state}
    try:
        for owner, attribute in state:
            values.restore(model, owner, attribute)
        yield
    finally:
        for (owner, attribute), value in own.items():
            attributes = model.get_submodule(owner).__dict__
            if value is MISSING:
                attributes.pop(attribute, None)
            else:
                attributes[attribute] = value


def _checked_replan(net: Net, what: str) -> Callable[..., Net]:
    """The function that plans the net again; refused for a graph that was replaced by hand."""
    if net._replan is None or net._executable.graphs.is_replaced:
        raise InputError(
            "SNNFX315",
            what,
            why="the graph was replaced by hand, and capturing the model again would discard it.",
            hint="Convert the model again, or restore the value.",
        )
    return net._replan


def _example_of_call(net: Net, leaves: list[Tensor], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs for a new capture; none if the first capture had none."""
    if net.options.takes != "sequence" and not net.program.input_ranks:
        return (), {}
    steps = net._arguments.at_step(leaves, 0) if net.options.step_mode == "m" else leaves
    return _example(net, steps, given)


def _example(net: Net, steps: list[Tensor], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of one step, as example inputs for capture."""
    args, kwargs = net._arguments.arguments_of(steps)
    return args, kwargs | {c.name: given[c.name] for c in net.program.carried if c.required and c.name in given}
