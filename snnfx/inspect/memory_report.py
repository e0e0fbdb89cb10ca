"""The memory section of `snnfx.explain`: peak memory of each region, and the tensors allocated at the peak."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.errors import InputError, ToolError
from snnfx.inspect.document import Bullets, Document, Paragraph, Table, Title, as_markdown, as_text
from snnfx.inspect.memory_phases import PhaseMemory, RegionMemory
from snnfx.inspect.memory_picture import memory_as_svg
from snnfx.inspect.plain_data import plain_data
from snnfx.memory.budget import bytes_as_text
from snnfx.memory.checkpoint_option import asks_for_recomputation
from snnfx.memory.memory_model import MemoryModel, NotPredictable, model_memory
from snnfx.memory.peak_holders import HolderNames, TensorMakers
from snnfx.memory.planning import with_borders
from snnfx.memory.timeline import Moment, inference_timeline, training_timeline
from snnfx.memory.training_planner import packed_parts
from snnfx.sandbox.isolation import in_mode

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = [
    "MemoryReport",
    "memory_document",
    "report_memory",
]


@dataclass(frozen=True, repr=False)
class MemoryReport:
    """Memory of a call on T time steps, predicted from shapes.

    Args:
        T: number of time steps.
        inputs: shape of each input sequence, time first: `[T, N, *]`.
        budget: `memory_budget` in bytes; None without one.
        inference: memory of a call in evaluation mode without gradients.
        training: memory of a forward and backward pass in training mode.
    """

    T: int
    inputs: tuple[tuple[int, ...], ...]
    budget: int | None
    inference: PhaseMemory
    training: PhaseMemory

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, ready for `json.dumps`."""
        return plain_data(self)

    def to_markdown(self) -> str:
        """The report as GitHub-flavoured Markdown."""
        return as_markdown(memory_document(self))

    def __str__(self) -> str:
        return as_text(memory_document(self))

    __repr__ = __str__

    def svg(self) -> str:
        """Draw allocated bytes over the execution as SVG text, stacked by region, with the peak marked.

        Raises:
            InputError: SNNFX319, memory is unpredictable both in inference and in training.
        """
        if not self.is_predicted:
            raise InputError(
                "SNNFX319",
                "cannot draw the memory of this net",
                why=f"inference: {self.inference.reason.rstrip('.')}; training: {self.training.reason.rstrip('.')}.",
                hint="Print the report: its text says how the net was planned.",
            )
        return memory_as_svg(self.inference, self.training, self.T, self.budget)

    @property
    def is_predicted(self) -> bool:
        """Whether memory could be predicted, for inference or for training."""
        return bool(self.inference.moments or self.training.moments)

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write the picture of `svg` to a file with the suffix .svg.

        Raises:
            ToolError: SNNFX603, the suffix is not .svg.
            InputError: SNNFX319, see `svg`.
        """
        path = Path(file)
        if path.suffix.lower() != ".svg":
            hint = "Use the suffix .svg; a browser or rsvg-convert converts it to other formats."
            raise ToolError("SNNFX603", f"cannot draw memory to `{path.name}`", hint=hint)
        path.write_text(self.svg(), encoding="utf-8")
        return path

    def _repr_svg_(self) -> str | None:
        return self.svg() if self.is_predicted else None

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def report_memory(net: Net, steps: Sequence[Tensor], T: int) -> MemoryReport:
    """Predict the memory of a call from shapes, without running or changing the net.

    Args:
        net: a net in step mode "m".
        steps: one tensor for each input, with the shape of one time step.
        T: number of time steps.
    """
    varying = net.varying_inputs
    sequences = [x.unsqueeze(0).expand(T, *x.shape) if v else x for x, v in zip(steps, varying, strict=True)]
    with in_mode(net, training=False):
        inference = _inference(net, sequences, T)
    with in_mode(net, training=True):
        training = _training(net, sequences, T)
    budget = net.options.memory_budget
    shapes = tuple(tuple(x.shape) for x in sequences)
    return MemoryReport(T, shapes, budget if isinstance(budget, int) else None, inference, training)


def _inference(net: Net, sequences: list[Tensor], T: int) -> PhaseMemory:
    try:
        plan = net.chunk_plan(*sequences)
        steps = min(T, plan.length or T)
        model = model_memory(net._executable, sequences, None, training=False, describe=steps)
    except (NotPredictable, InputError) as error:
        return PhaseMemory("inference", T, _why_not(error))
    moments = inference_timeline(model, steps, detailed=True, hands_on=steps < T)
    return _phase("inference", model, steps, moments, plan.reason, net)


def _training(net: Net, sequences: list[Tensor], T: int) -> PhaseMemory:
    try:
        plan = net.recompute_plan(T, *sequences) if asks_for_recomputation(net.options) else RecomputePlan()
        steps = min(T, plan.steps or T)
        model = model_memory(
            net._executable,
            sequences,
            None,
            training=True,
            describe=steps,
            in_tiles=bool(plan.segments) or plan.packs,
        )
    except (NotPredictable, InputError) as error:
        return PhaseMemory("training", T, _why_not(error))
    packed = packed_parts(net._executable, model, sequences[0].element_size()) if sequences else {}
    moments = training_timeline(model, steps, plan, packed, detailed=True)
    if steps < T:
        moments = [with_borders(model, moment, T, steps) for moment in moments]
    reason = plan.reason or "No recomputation"
    return _phase("training", model, steps, moments, reason, net)


def _why_not(error: Exception) -> str:
    return str(error) if isinstance(error, InputError) else f"unknown: {error}"


def _phase(phase: str, model: MemoryModel, steps: int, moments: list[Moment], reason: str, net: Net) -> PhaseMemory:
    if not moments:
        return PhaseMemory(phase, steps, reason)
    names, makers = HolderNames(model), TensorMakers(model)
    widest = max(moments, key=lambda at: at.bytes)
    forward = {m.name: m.bytes for m in moments if m.phase == "forward"}
    backward = {m.name: m.bytes for m in moments if m.phase == "backward"}
    first = next((m for m in moments if m.phase == "backward"), None)
    kept: dict[str, float] = {}
    for key, count in first.held.items() if first is not None else ():
        if key[0] in ("value", "packed", "own"):
            kept[makers.of(key)] = kept.get(makers.of(key), 0.0) + count
    regions = [call.name for call in model.calls if call.is_region]
    return PhaseMemory(
        phase,
        steps,
        reason,
        round(widest.bytes),
        widest.name,
        widest.phase == "backward",
        tuple(sorted(names.holders(widest, makers), key=lambda holder: -holder.bytes)),
        tuple(
            RegionMemory(
                name, round(forward.get(name, 0.0)), round(kept.get(name, 0.0)), round(backward.get(name, 0.0))
            )
            for name in regions
        ),
        tuple((m.name, m.phase == "backward", makers.by_region(m)) for m in moments if m.name in regions),
    )


_MOST_HOLDERS = 8


def memory_document(memory: MemoryReport) -> Document:
    """The memory section of the report of `explain`."""
    shapes = ", ".join(str(list(shape)) for shape in memory.inputs)
    about = f"Memory for inputs {shapes}, predicted from shapes; inputs and parameters themselves are not counted."
    if memory.budget is not None:
        about += f" The budget is {bytes_as_text(memory.budget)}."
    blocks: list[Title | Paragraph | Bullets | Table] = [Title(f"Memory at T={memory.T}"), Paragraph(about)]
    for phase in (memory.inference, memory.training):
        blocks += [Title(_summary(phase), 3), Paragraph(f"{phase.reason.rstrip('.')}."), *_holders_table(phase)]
    rows = _region_rows(memory)
    if rows:
        header = ["region", "inference", "training: forward", "saved for backward", "backward"]
        blocks += [Title("Peak of each region", 3), Table(header, rows, frozenset({0}))]
    return blocks


def _summary(phase: PhaseMemory) -> str:
    when = ", backward" if phase.backward else ""
    peak = f"{bytes_as_text(phase.peak)} at {phase.region}{when}" if phase.peak else "no prediction"
    return f"{phase.phase.capitalize()}: {peak}"


def _holders_table(phase: PhaseMemory) -> Document:
    if not phase.holders:
        return []
    rows = [
        [h.what, h.region, f"{h.dtype} {list(h.shape)}" if h.shape else "", h.kind, bytes_as_text(h.bytes)]
        for h in phase.holders[:_MOST_HOLDERS]
    ]
    rest = phase.holders[_MOST_HOLDERS:]
    if rest:
        rows.append([f"{len(rest)} more", "", "", "", bytes_as_text(sum(h.bytes for h in rest))])
    return [Table(["allocated for", "region", "tensor", "kind", "bytes"], rows, frozenset({1, 2}))]


def _region_rows(memory: MemoryReport) -> list[list[str]]:
    inference = {row.region: row for row in memory.inference.regions}
    training = {row.region: row for row in memory.training.regions}

    def text(count: int) -> str:
        return bytes_as_text(count) if count else ""

    none = RegionMemory("", 0)
    rows = []
    for name in dict.fromkeys((*training, *inference)):
        a, b = inference.get(name, none), training.get(name, none)
        rows.append([name, *map(text, (a.forward, b.forward, b.kept, b.backward))])
    return rows
