"""The memory model: predict the memory of an emitted graph as a function of the number of time steps.

Every region call runs on meta tensors (`snnfx.memory.meter`); the memory of a call is affine in the number of steps.
The lifetime of the values between the calls follows from the graph. So the peak for any number of steps, any chunk
length and any recomputation plan is a sum over a table, without another run.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from snnfx.emit.executable import Executable
from snnfx.memory.meta_run import MetaCopy, MetaRun, NotPredictable
from snnfx.memory.meter import Count, NamedBytes
from snnfx.memory.tensor_names import Naming
from snnfx.regions.region_modules import LoopRegion
from snnfx.sandbox.internal_faults import first_line, is_internal_fault, surface
from snnfx.sandbox.random_draws import draws_undone

__all__ = ["Affine", "CallCost", "MemoryModel", "NotPredictable", "TensorNames", "model_memory"]


@dataclass(frozen=True)
class Affine:
    """A size in bytes, `constant + per_step * k` for k time steps."""

    constant: float = 0.0
    per_step: float = 0.0

    def __call__(self, steps: int) -> float:
        return max(0.0, self.constant + self.per_step * steps)


@dataclass
class CallCost:
    """One call of the emitted graph.

    Args:
        name: the name of its region, or of the node if it lies between regions.
        is_region: whether it runs a region.
        role: "product" for a tile that is expensive to recompute, "statistics", or "".
        reads: input values (numbers into `MemoryModel.values`).
        makes: output values.
        saves: values that its autograd graph saves for backward.
        dies: values whose last use in forward is this call.
        finals: values whose last use is this call, except as the final state.
        bytes: the fields of its `CallBytes` as affine functions.
    """

    name: str
    is_region: bool
    role: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    saves: tuple[int, ...]
    dies: tuple[int, ...] = ()
    finals: tuple[int, ...] = ()
    bytes: dict[str, Affine] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorNames:
    """Names of tensors for one number of time steps.

    Args:
        values: the name of each value of the model.
        saved: for each call, the tensors that it saves for backward besides values.
        widest: for each call, the tensors that it has allocated at its peak without autograd.
        widest_with_history: the same with autograd.
    """

    values: list[NamedBytes]
    saved: list[tuple[NamedBytes, ...]]
    widest: list[tuple[NamedBytes, ...]]
    widest_with_history: list[tuple[NamedBytes, ...]]


@dataclass
class MemoryModel:
    """The predicted memory of a net for inputs of one shape; see `model_memory`.

    Args:
        calls: the calls in execution order.
        values: bytes of each value that one call passes to another.
        outputs: the values that the graph returns.
        training: whether the model includes autograd and the backward pass.
        state: bytes of the final state.
        step_of: for each value that is a sequence, the name of its node in the step graph.
        named: the names of tensors, with `describe`.
    """

    calls: list[CallCost]
    values: list[Affine]
    outputs: tuple[int, ...]
    training: bool
    state: Affine
    step_of: dict[int, str]
    named: TensorNames | None = None
    _costs: dict[int, list[dict[str, float]]] = field(default_factory=dict, repr=False)

    def costs(self, steps: int) -> list[dict[str, float]]:
        """The bytes of each call for this number of time steps."""
        if steps not in self._costs:
            self._costs[steps] = [{name: cost(steps) for name, cost in call.bytes.items()} for call in self.calls]
        return self._costs[steps]


def model_memory(
    executable: Executable,
    leaves: Sequence[Tensor],
    state: Mapping[str, Any] | None,
    training: bool,
    describe: int | None = None,
    in_tiles: bool = False,
) -> MemoryModel:
    """Predict the memory of a net in its current mode from shapes.

    Args:
        executable: in step mode "m".
        leaves: inputs with time first; only their shapes and dtypes matter.
        state: the state before the first step, None: the reset state.
        training: whether to include autograd and the backward pass.
        describe: also name the tensors, for this number of time steps.
        in_tiles: model the form of the net that is split into tiles for recomputation.

    Raises:
        NotPredictable: the net depends on values of tensors, or uses an operation that meta tensors do not support.
    """
    meta_copy = MetaCopy(executable)
    try:
        with draws_undone(), _without_fx_traceback_print():
            runs, described = _meta_runs(meta_copy, leaves, state, training, describe, in_tiles)
    except Exception as error:  # torch and the modules of the user may refuse meta tensors in any way
        if is_internal_fault(error):
            surface(error, "snnfx does not plan the memory of this net")
        raise NotPredictable(first_line(error)) from error
    return _table(runs[0], runs[-1], training, described)


@contextlib.contextmanager
def _without_fx_traceback_print() -> Iterator[None]:
    """Suppress the code that torch.fx prints when a graph raises: here the reason reports the error."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())


def _meta_runs(
    meta_copy: MetaCopy,
    leaves: Sequence[Tensor],
    state: Mapping[str, Any] | None,
    training: bool,
    describe: int | None,
    in_tiles: bool,
) -> tuple[list[MetaRun], MetaRun | None]:
    """One or two meta runs for the table (two with different numbers of steps), and one that names the tensors."""
    executable = meta_copy.executable
    if state is None and (executable.training, "first") in executable.graphs.emitted:
        # A separate first step runs first; the other steps start from its final state.
        state = MetaRun(meta_copy, leaves, None, training=False, steps=1, part="first").run().result[1]
    if any(
        isinstance(m, LoopRegion) and m.kernels is None for m in executable.root.modules()
    ) or not meta_copy.has_kernels(leaves):
        # A Python loop makes separate tensors for each step, which only a second run with one more step reveals. It
        # takes several steps until the stacked sequences outweigh the temporaries of one step.
        runs = [MetaRun(meta_copy, leaves, state, training, steps, None, in_tiles).run() for steps in (8, 9)]
    else:
        runs = [
            MetaRun(meta_copy, leaves, state, training, meta_copy.marker(leaves), None, in_tiles, marker=True).run()
        ]
    if not describe:
        return runs, None
    form = executable.recompute_form("main") if in_tiles else None
    regions, tiles = (executable.regions, {}) if form is None else (form.regions, form.tiles)
    naming = Naming(executable.program, regions, tiles)
    return runs, MetaRun(meta_copy, leaves, state, training, describe, naming, in_tiles).run()


def _table(run: MetaRun, longer: MetaRun, training: bool, described: MetaRun | None) -> MemoryModel:
    """The table for any number of steps, from one run that separates growing sizes, or from two runs."""

    def affine(a: Count, b: Count) -> Affine:
        if longer is run:
            return Affine(a.constant, a.over_time / run.steps)
        per_step = b.total - a.total
        return Affine(a.total - run.steps * per_step, per_step)

    if len(run.calls) != len(longer.calls) or len(run.values) != len(longer.values):
        raise NotPredictable("the net makes different calls for different numbers of time steps")
    fields = (
        "peak",
        "peak_with_history",
        "saved",
        "backward",
        "backward_held",
        "grads",
        "of_parameters",
        "written",
        "operations",
    )
    calls = [
        CallCost(
            a.name,
            a.is_region,
            a.role,
            a.reads,
            a.makes,
            a.saves,
            bytes={f: affine(getattr(a.bytes, f), getattr(b.bytes, f)) for f in fields},
        )
        for a, b in zip(run.calls, longer.calls, strict=True)
    ]
    outputs, state = run.result[0], run.result[1]
    returned = run.numbers(outputs)
    in_state = run.numbers(state)
    last: dict[int, int] = {}
    for index, call in enumerate(calls):
        last.update(dict.fromkeys((*call.reads, *call.makes), index))
    for value, index in last.items():
        if value in in_state and value not in returned:
            calls[index].finals += (value,)
        elif value not in returned:
            calls[index].dies += (value,)
    values = [affine(a, b) for a, b in zip(run.values, longer.values, strict=True)]
    total = [values[v] for v in in_state]
    return MemoryModel(
        calls,
        values,
        returned,
        training,
        Affine(sum(v.constant for v in total), sum(v.per_step for v in total)),
        run.step_of,
        _names(described) if described is not None and len(described.calls) == len(calls) else None,
    )


def _names(run: MetaRun) -> TensorNames:
    calls = [call.bytes for call in run.calls]
    return TensorNames(
        run.named, [c.saved_parts for c in calls], [c.parts for c in calls], [c.parts_with_history for c in calls]
    )
