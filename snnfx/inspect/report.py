"""The report of `snnfx.explain`, as data and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snnfx.errors import CODES
from snnfx.inspect.document import NO_BREAK, Bullets, Document, Paragraph, Table, Title, as_markdown, as_text
from snnfx.inspect.memory_report import MemoryReport, memory_document
from snnfx.inspect.plain_data import plain_data

__all__ = [
    "ChunkRow",
    "InputRow",
    "LoopRow",
    "NotFolded",
    "Operation",
    "PassRow",
    "Problem",
    "RegionRow",
    "Report",
    "SlotRow",
]

_KINDS = {
    "fold": "one call for all time steps, with T folded into the batch dimension",
    "map": "one call for all time steps, vectorised over T with torch.vmap",
    "loop": "one time step after another",
    "once": "computed once for all time steps",
}


@dataclass(frozen=True)
class Problem:
    """The reason why a model cannot be converted: the parts of a `CaptureError`."""

    code: str
    text: str
    where: str = ""
    why: str = ""
    hint: str = ""


@dataclass(frozen=True)
class InputRow:
    """One input tensor of a step.

    Args:
        name: name of the argument.
        shape: shape of one step, e.g. "[N, 1, 28, 28]"; "" if captured without example inputs.
        dtype: e.g. "float32"; "" if unknown.
        time_dim: the time dimension of the input sequence; None for an input that is the same at every step.
        least_rank: minimum number of dimensions of one step. For inputs with fewer dimensions (or, captured with
            example inputs, another number) the net is planned again at the call.
    """

    name: str
    shape: str
    dtype: str
    time_dim: int | None
    least_rank: int


@dataclass(frozen=True)
class Operation:
    """Calls of one module, or of one operation inside a module, in a region.

    Args:
        name: qualified name of the module, or name of the operation.
        type: class of the module; "" for an operation.
        within: qualified name of the module that contains the operation; "" for the model itself.
        count: number of nodes.
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
        name: name of the region, e.g. "fold_2".
        kind: "once", "fold", "map" or "loop".
        nodes: number of computing nodes.
        contains: its operations, in program order.
        outputs: shapes of its outputs over the whole sequence, e.g. "[T, N, 64, 28, 28]"; () if unknown.
        slots: its state slots.
    """

    name: str
    kind: str
    nodes: int
    contains: tuple[Operation, ...]
    outputs: tuple[str, ...]
    slots: tuple[str, ...]


@dataclass(frozen=True)
class NotFolded:
    """One node that is not folded, with the reason.

    A node on a cycle whose result has no known batch dimension has a second entry, with the code of that reason,
    because the nodes that read its result cannot be folded either.

    Args:
        node: name in the step graph.
        what: qualified name of the module, or the operation and the module that contains it.
        region: name of its region.
        kind: kind of that region.
        code: code of the reason, see `snnfx.errors.describe_code`.
        reason: the reason, as a clause.
        where: file and line, e.g. "file.py:41"; "" if unknown.
        hint: how to avoid it, or "".
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
        initial: its initial value, as text.
        region: its loop, or "" for a value that is only delayed by one step.
        shape: shape at one step, e.g. "[N, 64, 28, 28]"; "" if unknown.
        discovered: True if no class declares it, so that it was inferred from the attributes that a step changes.
        persistent: True for a buffer or parameter, which lives on from call to call.
    """

    name: str
    initial: str
    region: str
    shape: str
    discovered: bool
    persistent: bool = False


@dataclass(frozen=True)
class LoopRow:
    """A loop of a model that runs over time itself, in execution order.

    Args:
        where: the user's file and line.
        iterations: the number of iterations; "T" if it follows from the size of an input.
        slots: the values that an iteration takes from the previous one.
        regions: the kinds of the regions of its step, in execution order.
        kernels: the loops compiled into kernels and, for others, the reason.
    """

    where: str
    iterations: str
    slots: tuple[str, ...]
    regions: tuple[str, ...]
    kernels: tuple[str, ...]


@dataclass(frozen=True)
class ChunkRow:
    """The number of time steps in a chunk in inference; None for all, or when it is planned at the first call."""

    length: int | None
    bytes_per_step: int
    reason: str


@dataclass(frozen=True)
class PassRow:
    """One record of `net.history`: a pass with its options, its duration in milliseconds, and its note."""

    description: str
    milliseconds: float
    note: str


@dataclass(frozen=True, repr=False)
class Report:
    """Report on a conversion, the result of `snnfx.explain`.

    `str()` formats it for a terminal, `to_markdown()` for an issue or a notebook, `to_dict()` as plain data.

    Args:
        model: class name of the model.
        training: the mode (True: training) for which regions, shapes and reasons are reported.
        options: the options of the conversion.
        error: why the model cannot be converted, or None. With an error, all later fields are empty.
        too_little: why `memory_budget` is too small, or "".
        coverage: one sentence: the number of folded nodes, and why other nodes are not folded.
        counts: number of computing nodes by kind of region, and in total ("nodes").
        inputs: the input tensors.
        regions: the regions, in execution order.
        loops: for a model that runs over time itself, the loops in its code that are called from the rest of the call.
        not_folded: the nodes that are not folded, with the reason.
        slots: the state slots.
        opaque: modules that could not be traced, with the reason.
        first_step: how the first step differs, if it runs in a separate graph; else "".
        carried: arguments that carry outputs of the previous step.
        fixed: sizes that the model's Python code used as numbers, for which alone the net is valid.
        mode_differences: differences between training and evaluation mode.
        reduced: nodes that run once, on the outputs reduced over time.
        batch_norm: statistics of BatchNorm layers in training, and BatchNorm layers folded into weights.
        random: nodes that draw random numbers.
        fallbacks: regions that torch.vmap refused at run time.
        traces: for a net of an online rule: the eligibility trace of each weight, or why it has none.
        kernels: the loops compiled into kernels and, for other loops, the reason.
        events: how the layers that read spikes ran at their latest call.
        formats: the memory format of convolutions at their latest call, and whether it was measured.
        products: the library of dense linear layers at their latest call, if it is not torch's BLAS.
        chunk: the chunk plan for inference.
        compiled: how torch.compile runs the net.
        memory: the predicted memory of a call on T time steps; None unless `explain` was called with T.
        passes: the passes of the pipeline, with their durations.
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
    loops: tuple[LoopRow, ...] = ()
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
    traces: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    events: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    chunk: ChunkRow | None = None
    compiled: str = ""
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
            *_section("Regions, in execution order", _regions_table(self.regions)),
            *_legend({region.kind for region in self.regions}),
            *_section("Loops of the call, in execution order", _loops_table(self.loops)),
            *self._not_folded(),
            *_section("Kernels", _bullets([[note] for note in self.kernels])),
            *_section("Layers that read spikes", _bullets([[note] for note in self.events])),
            *_section("Memory format", _bullets([[note] for note in self.formats])),
            *_section("Linear layers", _bullets([[note] for note in self.products])),
            *_section("State", _slots_table(self.slots)),
            *_section("Eligibility traces", _bullets([[trace] for trace in self.traces])),
            *(memory_document(self.memory) if self.memory is not None else []),
            *_section("Notes", _bullets([[note] for note in self._notes()])),
            *self._footer(),
        ]

    def _codes(self) -> list[str]:
        """The codes of all reasons: first causes, then their consequences, then sequential and opaque nodes."""
        order = {"SNNFX105": 1, "SNNFX107": 2, "SNNFX108": 2}
        return sorted(dict.fromkeys(row.code for row in self.not_folded), key=lambda code: order.get(code, 0))

    def _not_folded(self) -> Document:
        """One block for each code: one line for each loop (sequential nodes), else one item for each reason."""
        blocks: list[Title | Bullets] = []
        for code in self._codes():
            rows = [row for row in self.not_folded if row.code == code]
            blocks.append(Title(f"{code} {CODES[code].title}", 3))
            blocks.append(Bullets(self._loops(rows) if code == "SNNFX107" else _reasons(rows)))
        return [Title("Not folded"), *blocks] if blocks else []

    def _loops(self, rows: Sequence[NotFolded]) -> list[list[str]]:
        lines = []
        for region in self.regions:
            locations = [row.where for row in rows if row.region == region.name and row.where]
            if any(row.region == region.name for row in rows):
                prefix = f"{region.contains[0].name}." if len(region.contains) == 1 else ""
                state = ", ".join(slot.removeprefix(prefix) for slot in region.slots)
                lines.append([_located(f"{region.name}: {_contents(region)}, state {state}", locations)])
        return lines

    def _notes(self) -> Iterable[str]:
        if self.options.get("step_mode") == "s" and self.options.get("takes") != "sequence":
            yield 'This net runs one step at a time; the report shows its regions with step_mode="m".'
        reported = {row.what for row in self.not_folded if row.code == "SNNFX108"}
        for name, reason in self.opaque.items():
            if (name or "the model") in reported:
                continue
            module = f"`{name}`" if name else "the model"
            yield f"{module} could not be traced and is called at every time step: {reason.rstrip('.')}."
        if self.first_step:
            yield self.first_step
        yield from (*self.carried, *self.fixed, *self.reduced, *self.batch_norm, *self.random)
        yield from (*self.mode_differences, *self.fallbacks)

    def _footer(self) -> Document:
        blocks: list[Title | Paragraph] = []
        if self.chunk is not None:
            blocks += [Title("Chunks (inference)"), Paragraph(f"{self.chunk.reason}.")]
        if self.compiled:
            blocks += [Title("torch.compile"), Paragraph(f"{self.compiled}.")]
        if self.passes:
            times: dict[str, float] = {}
            for record in self.passes:
                name = record.description.partition("{")[0]
                times[name] = times.get(name, 0.0) + record.milliseconds
            each = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in times.items())
            blocks += [Title("Pipeline"), Paragraph(f"{each}; {sum(times.values()):.1f} ms in total.")]
        if self.not_folded:
            blocks.append(Paragraph(f"To look up a code: python -m snnfx explain --code {self._codes()[0]}"))
        return blocks


def _document_of_failure(model: str, error: Problem) -> Document:
    return [
        Title(f"{model} cannot be converted", 1),
        *(Paragraph(line) for line in error.text.splitlines()),
        Paragraph(CODES[error.code].meaning),
        Paragraph(f"To look up the code: python -m snnfx explain --code {error.code}"),
    ]


def _inputs_table(inputs: Sequence[InputRow]) -> Table:
    rows = []
    for x in inputs:
        shape = x.shape or f"at least {x.least_rank} dimensions"
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


def _loops_table(loops: Sequence[LoopRow]) -> Table:
    rows = [[x.where, x.iterations, ", ".join(x.slots), ", ".join(x.regions), " ".join(x.kernels)] for x in loops]
    return Table(["loop", "iterations", "state", "regions", "kernels"], rows, frozenset({0, 2}))


def _slots_table(slots: Sequence[SlotRow]) -> Table:
    rows = []
    for slot in slots:
        notes = ["undeclared, inferred from attribute changes"] if slot.discovered else []
        notes += ["lives on from call to call"] if slot.persistent else []
        notes += [] if slot.region else ["delayed by one step, not in a loop"]
        rows.append([slot.name, slot.initial, slot.shape, ", ".join(notes)])
    return Table(["slot", "initial value", "one step", "note"], rows, frozenset({0, 2}))


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


def _located(text: str, locations: Iterable[str]) -> str:
    known = list(dict.fromkeys(locations))
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return f"{text} ({', '.join(known[:3])}{more})" if known else text


def _bullets(items: Sequence[Sequence[str]]) -> Bullets:
    return Bullets(items)


def _section(title: str, block: Table | Bullets) -> Document:
    content = block.rows if isinstance(block, Table) else block.items
    return [Title(title), block] if content else []
