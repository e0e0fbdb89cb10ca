"""The memory model: the bytes that an emitted graph holds over its execution, as a function of the steps run at once.

Every region call is run on meta tensors (`snnfx.memory.meter`); what it takes is affine in the number of steps. The
life of the values between the calls is read off the graph. So the peak for any number of steps, any chunk, and any
plan of what backward computes again is a sum over a table, without another run.
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
from snnfx.memory.meta_run import MetaCopy, MetaRun
from snnfx.memory.meter import Count, NamedBytes
from snnfx.memory.tensor_names import Naming
from snnfx.regions.region_modules import LoopRegion
from snnfx.sandbox.isolation import rng_state

__all__ = ["Affine", "CallCost", "MemoryModel", "NotPredictable", "TensorNames", "model_memory"]


class NotPredictable(Exception):
    """The bytes of a net cannot be told from shapes; the reason is a clause."""


@dataclass(frozen=True)
class Affine:
    """`constant + per_step * k` bytes for k time steps."""

    constant: float = 0.0
    per_step: float = 0.0

    def __call__(self, steps: int) -> float:
        return max(0.0, self.constant + self.per_step * steps)


@dataclass
class CallCost:
    """One call of the emitted graph.

    Args:
        name: of its region, or of the node for what is between regions.
        is_region: whether it runs a region.
        role: "product" for a tile that is dear to compute again, "statistics", or "".
        reads: values (numbers into `MemoryModel.values`) that it is given.
        makes: values that it makes.
        saves: values that its history holds.
        dies: values that are not needed after it in forward.
        finals: values that are not needed after it, except as the final state.
        bytes: its `CallBytes`, each number as an affine function.
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
    """Who made what, for one number of steps.

    Args:
        values: of each value of the model.
        saved: of each call, what its history holds besides values.
        widest: of each call, what is alive at its widest point besides what there was before, without a history.
        widest_with_history: the same while a history is kept.
    """

    values: list[NamedBytes]
    saved: list[tuple[NamedBytes, ...]]
    widest: list[tuple[NamedBytes, ...]]
    widest_with_history: list[tuple[NamedBytes, ...]]


@dataclass
class MemoryModel:
    """The bytes of a net for inputs of one shape; see `model_memory`.

    Args:
        calls: in the order in which they run.
        values: bytes of each value that goes from call to call.
        outputs: the values that are returned.
        training: whether a history was looked at.
        state: bytes of the final state.
        step_of: the node of the step that a value is a sequence of, by name.
        named: what is known about who made what, with `describe`.
    """

    calls: list[CallCost]
    values: list[Affine]
    outputs: tuple[int, ...]
    training: bool
    state: Affine
    step_of: dict[int, str]
    named: TensorNames | None = None
    _known: dict[int, list[dict[str, float]]] = field(default_factory=dict, repr=False)

    def costs(self, steps: int) -> list[dict[str, float]]:
        """The bytes of each call for so many steps."""
        if steps not in self._known:
            self._known[steps] = [{name: cost(steps) for name, cost in call.bytes.items()} for call in self.calls]
        return self._known[steps]


def model_memory(
    executable: Executable,
    leaves: Sequence[Tensor],
    state: Mapping[str, Any] | None,
    training: bool,
    describe: int | None = None,
    in_tiles: bool = False,
) -> MemoryModel:
    """The memory model of the current mode of a net.

    Args:
        executable: in step mode "m".
        leaves: inputs with time first; only shapes and dtypes are looked at.
        state: the state before the first step, None: the reset state.
        training: whether a history is kept.
        describe: also note who made what, for so many time steps.
        in_tiles: of the form from which segments are made, see `snnfx.emit.recompute_forms`.

    Raises:
        NotPredictable: the net looks at values, or does what meta tensors do not do.
    """
    meta_copy = MetaCopy(executable)
    generators = rng_state()
    try:
        with _without_echo():
            runs, described = _walks(meta_copy, leaves, state, training, describe, in_tiles)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise NotPredictable(str(error).splitlines()[0]) from error
    finally:
        generators.restore()
    return _table(runs[0], runs[-1], training, described)


@contextlib.contextmanager
def _without_echo() -> Iterator[None]:
    """torch.fx prints the code of a graph that fails; here that is no failure, and is told in the reason."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        yield
    sys.stderr.write(printed.getvalue())


def _walks(
    meta_copy: MetaCopy,
    leaves: Sequence[Tensor],
    state: Mapping[str, Any] | None,
    training: bool,
    describe: int | None,
    in_tiles: bool,
) -> tuple[list[MetaRun], MetaRun | None]:
    """One walk, or two for different numbers of steps; and one that says who made what, if that is asked for."""
    executable = meta_copy.executable
    if state is None and (executable.training, "first") in executable.graphs.emitted:
        # The first step is run by itself: the others start from the state behind it.
        state = MetaRun(meta_copy, leaves, None, training=False, steps=1, part="first").run().result[1]
    if any(
        isinstance(m, LoopRegion) and m.kernels is None for m in executable.root.modules()
    ) or not meta_copy.has_kernels(leaves):
        # A Python loop makes tensors of single steps, one for each: they are told by running one more. The few
        # tensors of a step must not be what is widest; it takes more steps to see that.
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


def _table(walk: MetaRun, longer: MetaRun, training: bool, described: MetaRun | None) -> MemoryModel:
    """The table for any number of steps, from a walk that tells what grows with them, or from two walks."""

    def affine(a: Count, b: Count) -> Affine:
        if longer is walk:
            return Affine(a.constant, a.over_time / walk.steps)
        per_step = b.total - a.total
        return Affine(a.total - walk.steps * per_step, per_step)

    if len(walk.calls) != len(longer.calls) or len(walk.values) != len(longer.values):
        raise NotPredictable("it does something else for another number of time steps")
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
        for a, b in zip(walk.calls, longer.calls, strict=True)
    ]
    outputs, state = walk.result[0], walk.result[1]
    returned = walk.numbers(outputs)
    in_state = walk.numbers(state)
    last: dict[int, int] = {}
    for index, call in enumerate(calls):
        last.update(dict.fromkeys((*call.reads, *call.makes), index))
    for value, index in last.items():
        if value in in_state and value not in returned:
            calls[index].finals += (value,)
        elif value not in returned:
            calls[index].dies += (value,)
    values = [affine(a, b) for a, b in zip(walk.values, longer.values, strict=True)]
    total = [values[v] for v in in_state]
    return MemoryModel(
        calls,
        values,
        returned,
        training,
        Affine(sum(v.constant for v in total), sum(v.per_step for v in total)),
        walk.step_of,
        _names(described) if described is not None and len(described.calls) == len(calls) else None,
    )


def _names(walk: MetaRun) -> TensorNames:
    found = [call.bytes for call in walk.calls]
    return TensorNames(
        walk.named, [c.saved_parts for c in found], [c.parts for c in found], [c.parts_with_history for c in found]
    )
