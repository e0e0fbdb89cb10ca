"""The report of `snnfx.explain`: what a conversion does with each part of a model, as data and as a text to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snnfx.errors import CODES
from snnfx.inspect.document import NO_BREAK, Bullets, Document, Paragraph, Table, Title, as_markdown, as_text
from snnfx.inspect.memory_report import MemoryReport, memory_document
from snnfx.inspect.plain_data import plain_data

__all__ = ["ChunkRow", "InputRow", "NotFolded", "Operation", "PassRow", "Problem", "RegionRow", "Report", "SlotRow"]

_KINDS = {
    "fold": "T is folded into the batch, one call for all time steps",
    "map": "all time steps at once, but each on its own",
    "loop": "one time step after the other",
    "once": "computed once for all time steps",
}


@dataclass(frozen=True)
class Problem:
    """Why the model cannot be converted: the parts of a `CaptureError`."""

    code: str
    text: str
    where: str = ""
    why: str = ""
    hint: str = ""


@dataclass(frozen=True)
class InputRow:
    """One tensor that a step takes.

    Args:
        name: of the argument.
        shape: of one step, e.g. "[N, 1, 28, 28]"; "" when it was captured without example inputs.
        dtype: e.g. "float32"; "" when it is not known.
        time_dim: where T is in the sequence, None for an input that is the same at every step.
        least_rank: number of dimensions that one step has to have; with fewer (or, captured with examples, other) ones
            the net is planned again at the call.
    """

    name: str
    shape: str
    dtype: str
    time_dim: int | None
    least_rank: int


@dataclass(frozen=True)
class Operation:
    """Something that a region computes: calls of a module, or of an operation within a module.

    Args:
        name: qualified name of the module, or name of the operation.
        type: class of the module; "" for an operation.
        within: qualified name of the module that an operation is in, "" for the model itself.
        count: how many nodes.
    """

    name: str
    type: str = ""
    within: str = ""
    count: int = 1

    def __str__(self) -> str:
        text = f"{self.name} ({self.type})" if self.type else self.name
        text += f" in {self.within}" if self.within else ""
        return f"{self.count} x {text}" if self.count > 1 else text


@dataclass(frozen=True)
class RegionRow:
    """One region, in execution order.

    Args:
        name: of the region, e.g. "fold_2".
        kind: "once", "fold", "map" or "loop".
        nodes: the number of computing nodes.
        contains: what it computes, in program order.
        outputs: shapes of what leaves it, over the whole sequence: "[T, N, 64, 28, 28]"; () when not known.
        slots: the state slots in it.
    """

    name: str
    kind: str
    nodes: int
    contains: tuple[Operation, ...]
    outputs: tuple[str, ...]
    slots: tuple[str, ...]


@dataclass(frozen=True)
class NotFolded:
    """One node that is not folded, and why.

    A node on a cycle that also loses track of the batch has a second entry, with the code of that reason: it is why
    what reads its result is not folded either.

    Args:
        node: name in the step graph.
        what: what it is in the user's words.
        region: name of its region.
        kind: kind of that region.
        code: of the reason, see `snnfx.errors.describe_code`.
        reason: a clause.
        where: `file.py:41`, or "".
        hint: what to do about it, or "".
    """

    node: str
    what: str
    region: str
    kind: str
    code: str
    reason: str
    where: str
    hint: str


@dataclass(frozen=True)
class SlotRow:
    """One state slot.

    Args:
        name: qualified name.
        initial: its value before the first step, as text.
        region: the loop that it lives in, or "" for a value that is only handed to the next step.
        shape: of one step, e.g. "[N, 64, 28, 28]", or "".
        discovered: no class declared it; it was found by watching which attributes a step changes.
    """

    name: str
    initial: str
    region: str
    shape: str
    discovered: bool


@dataclass(frozen=True)
class ChunkRow:
    """How many time steps are run at once in inference; None for all, or when it is decided at the call."""

    length: int | None
    bytes_per_step: int
    reason: str


@dataclass(frozen=True)
class PassRow:
    """One record of `net.history`: the pass with its options, its time in milliseconds, and its note."""

    description: str
    milliseconds: float
    note: str


@dataclass(frozen=True, repr=False)
class Report:
    """What a conversion does with a model; made by `snnfx.explain`.

    `str()` is a text for the terminal, `to_markdown()` one for an issue or a notebook, `to_dict()` plain data.

    Args:
        model: class of the model.
        training: the mode that regions, shapes and reasons are those of.
        options: the options of the conversion.
        error: why there is no conversion; everything below is empty then.
        too_little: why `memory_budget` is refused, "" where it is not.
        coverage: one sentence: how many nodes are folded, and why the others are not.
        counts: number of computing nodes by kind of region, and in all ("nodes").
        inputs, regions, not_folded, slots: see the classes.
        opaque: modules that could not be traced, with the reason.
        first_step: how the first step differs, where it is run on its own; else "".
        carried: arguments that are outputs of the step before.
        fixed: sizes that the model's Python code used as numbers, so that the net holds for them alone.
        mode_differences: what is done differently in training and in evaluation mode.
        reduced: what runs once, on the reduction over time.
        batch_norm: which statistics the BatchNorm layers use in training, and which of them are folded into weights.
        random: nodes that draw random numbers.
        fallbacks: what torch.vmap refused when the net was run.
        kernels: which loops run as one generated kernel, and why others do not.
        chunk: the chunk plan for inference.
        memory: of a call on T steps, if it was asked for.
        passes: the history of the pipeline.
    """

    model: str
    training: bool
    options: Mapping[str, Any]
    error: Problem | None = None
    too_little: str = ""
    coverage: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[InputRow, ...] = ()
    regions: tuple[RegionRow, ...] = ()
    not_folded: tuple[NotFolded, ...] = ()
    slots: tuple[SlotRow, ...] = ()
    opaque: Mapping[str, str] = field(default_factory=dict)
    first_step: str = ""
    carried: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    mode_differences: tuple[str, ...] = ()
    reduced: tuple[str, ...] = ()
    batch_norm: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    fallbacks: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    chunk: ChunkRow | None = None
    memory: MemoryReport | None = None
    passes: tuple[PassRow, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers, ready for `json.dumps`."""
        memory = None if self.memory is None else self.memory.to_dict()
        return {**plain_data(dataclasses.replace(self, memory=None)), "memory": memory}

    def to_markdown(self) -> str:
        """The report as GitHub-flavoured Markdown."""
        return as_markdown(self._document())

    def __str__(self) -> str:
        return as_text(self._document())

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def _document(self) -> Document:
        if self.error is not None:
            return _document_of_failure(self.model, self.error)
        mode = "training" if self.training else "evaluation"
        return [
            Title(f"{self.model}, {mode} mode", 1),
            *(Paragraph(line) for line in self.too_little.splitlines()),
            Paragraph(f"{self.coverage}."),
            *_section("Inputs", _inputs_table(self.inputs)),
            *_section("Regions, in the order in which they run", _regions_table(self.regions)),
            *_legend({region.kind for region in self.regions}),
            *self._not_folded(),
            *_section("Kernels", _bullets([[note] for note in self.kernels])),
            *_section("State", _slots_table(self.slots)),
            *(memory_document(self.memory) if self.memory is not None else []),
            *_section("Good to know", _bullets([[note] for note in self._notes()])),
            *self._footer(),
        ]

    def _codes(self) -> list[str]:
        """The codes of all reasons: first causes, then what follows from them, then what has to be as it is."""
        order = {"SNNFX105": 1, "SNNFX107": 2, "SNNFX108": 2}
        return sorted(dict.fromkeys(row.code for row in self.not_folded), key=lambda code: order.get(code, 0))

    def _not_folded(self) -> Document:
        """One block for each code: what is on a cycle in a line for each loop, the rest by node."""
        blocks: list[Title | Bullets] = []
        for code in self._codes():
            rows = [row for row in self.not_folded if row.code == code]
            blocks.append(Title(f"{code} {CODES[code].title}", 3))
            blocks.append(Bullets(self._loops(rows) if code == "SNNFX107" else _reasons(rows)))
        return [Title("Not folded"), *blocks] if blocks else []

    def _loops(self, rows: Sequence[NotFolded]) -> list[list[str]]:
        lines = []
        for region in self.regions:
            places = [row.where for row in rows if row.region == region.name and row.where]
            if any(row.region == region.name for row in rows):
                prefix = f"{region.contains[0].name}." if len(region.contains) == 1 else ""
                through = ", ".join(slot.removeprefix(prefix) for slot in region.slots)
                lines.append([_located(f"{region.name}: {_contents(region)}, through {through}", places)])
        return lines

    def _notes(self) -> Iterable[str]:
        if self.options.get("step_mode") == "s":
            yield 'This net runs one step at a time; the regions are those that it has with step_mode="m".'
        told = {row.what for row in self.not_folded if row.code == "SNNFX108"}
        for name, reason in self.opaque.items():
            if (name or "the model") in told:
                continue
            what = f"`{name}`" if name else "the model"
            yield f"{what} could not be traced and is stepped as it is: {reason.rstrip('.')}."
        if self.first_step:
            yield self.first_step
        yield from (*self.carried, *self.fixed, *self.reduced, *self.batch_norm, *self.random)
        yield from (*self.mode_differences, *self.fallbacks)

    def _footer(self) -> Document:
        blocks: list[Title | Paragraph] = []
        if self.chunk is not None:
            blocks += [Title("Chunks (inference)"), Paragraph(f"{self.chunk.reason}.")]
        if self.passes:
            times: dict[str, float] = {}
            for record in self.passes:
                name = record.description.partition("{")[0]
                times[name] = times.get(name, 0.0) + record.milliseconds
            each = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in times.items())
            blocks += [Title("Pipeline"), Paragraph(f"{each}; {sum(times.values()):.1f} ms in all.")]
        if self.not_folded:
            blocks.append(Paragraph(f"More about a code: python -m snnfx explain --code {self._codes()[0]}"))
        return blocks


def _document_of_failure(model: str, error: Problem) -> Document:
    return [
        Title(f"{model} cannot be converted", 1),
        *(Paragraph(line) for line in error.text.splitlines()),
        Paragraph(CODES[error.code].meaning),
        Paragraph(f"More about it: python -m snnfx explain --code {error.code}"),
    ]


def _inputs_table(inputs: Sequence[InputRow]) -> Table:
    rows = []
    for x in inputs:
        shape = x.shape or f"{x.least_rank} dimensions or more"
        time = "the same at every step" if x.time_dim is None else f"dim {x.time_dim} of the sequence"
        rows.append([x.name, shape, x.dtype, time])
    return Table(["input", "one step", "dtype", "time"], rows, frozenset({0, 1}))


def _regions_table(regions: Sequence[RegionRow]) -> Table:
    rows = [[r.name, _contents(r), "; ".join(r.outputs), ", ".join(r.slots)] for r in regions]
    return Table(["region", "contains", "output", "state"], rows, frozenset({0, 2, 3}))


def _contents(region: RegionRow) -> str:
    return ", ".join(str(item).replace(" ", NO_BREAK) for item in region.contains)


def _legend(kinds: set[str]) -> Document:
    lines = [[f"{kind}: {meaning}"] for kind, meaning in _KINDS.items() if kind in kinds]
    return [Bullets(lines)] if lines else []


def _slots_table(slots: Sequence[SlotRow]) -> Table:
    rows = []
    for slot in slots:
        notes = ["state found by watching attributes"] if slot.discovered else []
        notes += [] if slot.region else ["only handed to the next step, no loop"]
        rows.append([slot.name, slot.initial, slot.shape, ", ".join(notes)])
    return Table(["slot", "starts at", "one step", "note"], rows, frozenset({0, 2}))


def _reasons(rows: Sequence[NotFolded]) -> list[list[str]]:
    """One item for each reason, with the hint below it."""
    grouped: dict[tuple[str, str], list[NotFolded]] = {}
    for row in rows:
        grouped.setdefault((row.reason, row.hint), []).append(row)
    items = []
    for (reason, hint), same in grouped.items():
        names = ", ".join(dict.fromkeys(f"{row.what} [{row.region}]" for row in same))
        head = _located(names, [row.where for row in same if row.where])
        items.append([f"{head}: {reason}.", hint] if hint else [f"{head}: {reason}."])
    return items


def _located(text: str, places: Iterable[str]) -> str:
    known = list(dict.fromkeys(places))
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return f"{text} ({', '.join(known[:3])}{more})" if known else text


def _bullets(items: Sequence[Sequence[str]]) -> Bullets:
    return Bullets(items)


def _section(title: str, block: Table | Bullets) -> Document:
    content = block.rows if isinstance(block, Table) else block.items
    return [Title(title), block] if content else []
