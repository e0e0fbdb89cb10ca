"""Record calls of library modules in multi-step mode, which take and return whole sequences, time first.

A neuron is recorded as a loop over time: one call of its single step in each iteration, as if the loop stood in the
model's code. A stateless layer is recorded as one call on values with time folded into the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snnfx.capture.example_values import ExampleValues
from snnfx.capture.iteration_tracking import IterationTracker, LoopSource
from snnfx.capture.proxy import UNKNOWN, StepProxy, value_of
from snnfx.capture.recorder import Recorder
from snnfx.errors import CaptureError
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import format_location, user_location

__all__ = ["record_folded_call", "record_steps"]


def record_steps(
    recorder: Recorder,
    values: ExampleValues,
    tracker: IterationTracker,
    name: str,
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """Record the call of a neuron on sequences as a loop of single steps.

    Args:
        recorder: the recorder of the trace.
        values: the example values of its nodes.
        tracker: labels the nodes with the iterations of the loop.
        name: the qualified name of the neuron.
        call: records one step: `call(t, args, kwargs)`.
        args, kwargs: the sequences, time first, and other arguments.

    Returns:
        The outputs, stacked over time.
    """
    where = user_location() or ("", 0)
    sequences, spec = pytree.tree_flatten((args, kwargs))
    positions = [i for i, a in enumerate(sequences) if type(a) is StepProxy and isinstance(value_of(a), Tensor)]
    if not positions:
        raise _refuse_call(name, "none of its arguments is a sequence")
    # Like `range(x.shape[0])` in the model's code, this records a check of the size.
    shape: Any = recorder.record_at(name, "call_function", getattr, (sequences[positions[0]], "shape"), {})
    steps = int(shape[0])
    if any(value_of(sequences[i]).shape[0] != steps for i in positions):
        raise _refuse_call(name, "its arguments have different numbers of time steps")
    outputs = []
    elements: dict[int, Any] = {}
    """The value of an element of each sequence; all have the same shape."""
    with tracker.loop(LoopSource(*where, 0, name, of_module=True)) as next_iteration:
        for t in range(steps):
            next_iteration()
            step = list(sequences)
            for i in positions:
                with values.already_evaluated(elements.get(i, UNKNOWN)):
                    step[i] = recorder.record_at(name, "call_method", "select", (sequences[i], 0, t), {})
                elements[i] = value_of(step[i])
            step_args, step_kwargs = pytree.tree_unflatten(step, spec)
            outputs.append(call(t, step_args, step_kwargs))
    leaves = [pytree.tree_flatten(output) for output in outputs]
    stacked = [
        recorder.record_at(name, "call_function", torch.stack, (list(values),), {})
        for values in zip(*(flat for flat, _ in leaves), strict=True)
    ]
    return pytree.tree_unflatten(stacked, leaves[0][1])


def record_folded_call(recorder: Recorder, name: str, call: Callable[..., Any], args: Any) -> Any:
    """Record the call of a layer on sequences `[T, N, *]` as a call on `[T * N, *]`.

    Args:
        recorder: the recorder of the trace.
        name: the qualified name of the layer.
        call: records the call of the layer: `call(args)`.
        args: the sequences, time first.
    """
    if any(type(a) is not StepProxy for a in args):
        raise _refuse_call(name, "one of its arguments is no tensor that depends on an input")
    shape: Any = recorder.record_at(name, "call_function", getattr, (args[0], "shape"), {})
    sizes = [shape[0], shape[1]]
    folded = tuple(recorder.record_at(name, "call_method", "flatten", (a, 0, 1), {}) for a in args)
    y = call(folded)
    return recorder.record_at(name, "call_method", "unflatten", (y, 0, tuple(sizes)), {})


def _refuse_call(name: str, why: str) -> CaptureError:
    return CaptureError(
        "SNNFX234",
        f"the call of `{name}` in multi-step mode cannot be captured",
        where=format_location(user_location()),
        why=f"{why}.",
        hint="Pass tensors with time in dimension 0 as arguments.",
    )
