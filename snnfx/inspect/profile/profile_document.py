"""A profile as a document, printed as text or Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from snnfx.inspect.document import NO_BREAK, Bullets, Document, Paragraph, Table, Title
from snnfx.inspect.profile_data import FiringRate, ProfileData
from snnfx.memory.budget import bytes_as_text

__all__ = [
    "channels_as_text",
    "count_as_text",
    "energy_as_text",
    "memory_sentence",
    "milliseconds_as_text",
    "subtitle_of",
]

_MOST_CHANNELS = 12
_MOST_HOLDERS = 6


def profile_document(data: ProfileData) -> Document:
    """The sections of a profile: time, rates, operations, memory, advice."""
    blocks: list[Title | Paragraph | Bullets | Table] = [
        Title(f"{data.model}, {'training step' if data.train else 'inference'}", 1),
        Paragraph(subtitle_of(data)),
        *_time(data),
        *_rates(data),
        *_operations(data),
        *_memory(data),
        Title("Next steps"),
    ]
    advice = [[f"{a.option}: {a.text}"] for a in data.advice]
    blocks.append(Bullets(advice) if advice else Paragraph("No option stands out: nothing to change."))
    if data.notes:
        blocks += [Title("Notes"), Bullets([[note] for note in data.notes])]
    return blocks


def subtitle_of(data: ProfileData) -> str:
    """Time, inputs and environment in one sentence."""
    shapes = ", ".join(str(list(shape)) for shape in data.inputs)
    time = milliseconds_as_text(data.forward)
    if data.train:
        time = f"{time} forward, {milliseconds_as_text(data.backward)} backward"
    calls = f"median of {data.repeats} calls" if data.repeats > 1 else "one call"
    return f"{time} ({calls}), inputs {shapes}. {data.environment}."


def _time(data: ProfileData) -> Document:
    total = sum(row.forward + row.backward for row in data.regions) or 1.0
    rows = [
        [
            row.region or "(between regions)",
            row.runs_as or row.kind,
            milliseconds_as_text(row.forward),
            milliseconds_as_text(row.backward) if data.train else "",
            f"{(row.forward + row.backward) / total:.0%}",
            ", ".join(row.contents),
        ]
        for row in data.regions
    ]
    header = ["region", "runs", "forward", "backward", "share", "contains"]
    return [Title("Time"), Table(header, rows, frozenset({0}))]


def _rates(data: ProfileData) -> Document:
    if not data.rates:
        return [Title("Firing rates"), Paragraph("No layer of spiking neurons: no loop has outputs of only 0 and 1.")]
    rows = [
        [row.layer, f"{row.rate:.4f}", str(row.neurons), _part(row, row.silent), _part(row, row.saturated)]
        for row in data.rates
    ]
    return [
        Title("Firing rates"),
        Paragraph("Spikes per neuron and time step. Silent channels have none; saturated ones a rate of 0.95 or more."),
        Table(["layer", "rate", "neurons", "silent channels", "saturated channels"], rows, frozenset({0})),
    ]


def _part(row: FiringRate, channels: Sequence[int]) -> str:
    count = len(row.channels)
    return f"{len(channels)} of {count}: {channels_as_text(channels)}" if channels else ""


def channels_as_text(channels: Sequence[int], most: int = _MOST_CHANNELS) -> str:
    """Format channel numbers with ranges: "0, 3-7, 9"."""
    ranges: list[list[int]] = []
    for channel in channels:
        if ranges and ranges[-1][1] == channel - 1:
            ranges[-1][1] = channel
        else:
            ranges.append([channel, channel])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in ranges]
    return ", ".join(texts[:most] + (["..."] if len(texts) > most else []))


def _operations(data: ProfileData) -> Document:
    rows = [
        [
            row.layer,
            row.kind,
            count_as_text(row.dense_macs),
            count_as_text(row.macs) if row.macs else "",
            count_as_text(row.acs) if row.spikes else "",
            f"{row.density:.1%}",
            energy_as_text(data.energy_model.joules(row.macs, row.acs)),
        ]
        for row in data.operations
    ]
    model = data.energy_model
    text = (
        f"{count_as_text(data.macs)} MACs and {count_as_text(data.acs)} ACs (synaptic operations) in the call, "
        f"forward: {energy_as_text(data.energy)}; with dense inputs {count_as_text(data.dense_macs)} MACs and "
        f"{energy_as_text(data.dense_energy)}. Energy model: {model.mac_pj:g}{NO_BREAK}pJ per MAC, "
        f"{model.ac_pj:g}{NO_BREAK}pJ per AC; {model.source}; memory traffic not included."
    )
    header = ["layer", "type", "dense MACs", "MACs", "ACs", "input density", "energy"]
    blocks: list[Title | Paragraph | Bullets | Table] = [Title("Operations"), Paragraph(text)]
    blocks += [Table(header, rows, frozenset({0}))] if rows else []
    if data.uncounted:
        blocks.append(Bullets([[f"not counted: {name}, because {why}"] for name, why in data.uncounted.items()]))
    return blocks


def memory_sentence(data: ProfileData) -> str:
    """The predicted peak in one sentence, or why there is none."""
    memory = data.memory
    if not memory.peak:
        return f"No prediction: {memory.reason.rstrip('.')}."
    where = f" in the backward pass of {memory.region}" if memory.backward else f" while {memory.region} runs"
    steps = f", {memory.steps} of {data.T} time steps at once" if memory.steps < data.T else ""
    return f"Predicted peak {bytes_as_text(memory.peak)}{where}{steps}; inputs and parameters are not counted."


def _memory(data: ProfileData) -> Document:
    rows = [
        [h.what, h.region, f"{h.dtype} {list(h.shape)}" if h.shape else "", h.kind, bytes_as_text(h.bytes)]
        for h in data.memory.holders[:_MOST_HOLDERS]
    ]
    blocks: list[Title | Paragraph | Bullets | Table] = [Title("Memory"), Paragraph(memory_sentence(data))]
    header = ["allocated at the peak", "region", "tensor", "kind", "bytes"]
    return [*blocks, *([Table(header, rows, frozenset({1, 2}))] if rows else [])]


def milliseconds_as_text(milliseconds: float) -> str:
    """Format a time: "3.42 ms", "120 µs", "1.24 s"."""
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f}{NO_BREAK}s"
    if milliseconds >= 1:
        return f"{milliseconds:.3g}{NO_BREAK}ms"
    return f"{milliseconds * 1000:.0f}{NO_BREAK}µs"


def count_as_text(count: float) -> str:
    """Format a number of operations: "812", "45.2 k", "1.31 M", "2.40 G"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{NO_BREAK}{unit}"
    return f"{count:.0f}"


def energy_as_text(joules: float) -> str:
    """Format an energy: "12.3 nJ"."""
    for unit, size in (("J", 1.0), ("mJ", 1e-3), ("µJ", 1e-6), ("nJ", 1e-9)):
        if joules >= size:
            return f"{joules / size:.3g}{NO_BREAK}{unit}"
    return f"{joules / 1e-12:.3g}{NO_BREAK}pJ"
