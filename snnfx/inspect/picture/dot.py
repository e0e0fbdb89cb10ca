"""Elements of a picture, their styles, and their notation as graphviz DOT text."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from snnfx.inspect.picture.densities import Density

__all__ = [
    "STYLES",
    "Box",
    "Cluster",
    "Edge",
    "LabelRow",
    "Member",
    "Picture",
    "Pill",
    "Style",
    "write_dot",
]

_FORMATS = ("svg", "png", "pdf")
_FONT = "Helvetica,Arial,sans-serif"
_INK, _FAINT, _LINE = "#1A1A1A", "#595959", "#4D4D4D"


@dataclass(frozen=True)
class Style:
    """Fill colour, border colour, and the entry in the legend ("" for none)."""

    fill: str
    border: str
    meaning: str = ""


# Hues distinguishable with colour-blindness (Okabe & Ito 2008); each tint is darker than the previous one, so that they
# also differ in grayscale; dark text is legible on all of them.
STYLES: dict[str, Style] = {
    "once": Style("#F5F5F1", "#8C8C84", "computed once"),
    "fold": Style("#D9E8F6", "#3F78AD", "T folded into the batch"),
    "map": Style("#F1DA92", "#94770F", "mapped over T (vmap)"),
    "loop": Style("#E8B59A", "#A34A1C", "one step after another"),
    "container": Style("#F6F6F6", "#B5B5B5"),
    "inner container": Style("#ECECEC", "#A6A6A6"),
    "events": Style("#CFE8D3", "#3C7F4B", "by events: zeros are skipped"),
    "chunk": Style("#FFFFFF", "#8C8C8C"),
    "layer": Style("#FFFFFF", "#7A7A7A"),
    "stateful": Style("#F8E3D8", "#A34A1C", "carries state across time steps"),
    "slot": Style("#FFFFFF", "#A34A1C"),
    "parameter": Style("#E2E2E2", "#8C8C8C"),
    "input": Style("#FFFFFF", "#1A1A1A"),
    "output": Style("#FFFFFF", "#1A1A1A"),
}


@dataclass(frozen=True)
class LabelRow:
    """One operation of a box: its type, hyperparameters, qualified name, shape, a small code, and a density."""

    title: str
    detail: str = ""
    name: str = ""
    shape: str = ""
    code: str = ""
    tooltip: str = ""
    density: Density | None = None


@dataclass
class Box:
    """A chain of operations, drawn as the rows of one table."""

    id: str
    rows: list[LabelRow]
    style: str = "layer"


@dataclass
class Pill:
    """A small node with one or two lines of text: an input, an output, a state slot or a parameter."""

    id: str
    style: str
    text: str
    shape: str = ""
    tooltip: str = ""


@dataclass
class Cluster:
    """A frame around nodes and other frames; the style "row" is an invisible frame that aligns its members in a row."""

    id: str
    style: str
    title: str
    members: list[Member] = field(default_factory=list)
    note: str = ""
    tooltip: str = ""


Member = Box | Pill | Cluster
"""An element of a frame."""


@dataclass(frozen=True)
class Edge:
    """An arrow between ids or rows of boxes (`b2:r1`).

    A `carried` arrow leads from one time step to the next. With `upwards` the head is drawn above the tail, for an
    arrow that closes a cycle. A `main` arrow is kept straight.
    """

    tail: str
    head: str
    label: str = ""
    carried: bool = False
    upwards: bool = False
    main: bool = False


@dataclass
class Picture:
    """A complete picture; `legend` names the styles that the legend explains."""

    title: str
    subtitle: str
    members: list[Member]
    edges: list[Edge]
    legend: list[str]


def write_dot(picture: Picture) -> str:
    """Write a picture as DOT text: names may contain any character, and equal pictures give equal texts."""
    lines = [
        "digraph snnfx {",
        f'  graph [rankdir=TB, newrank=true, fontname="{_FONT}", fontcolor="{_INK}", fontsize=10, labelloc=t, '
        f'pad=0.15, nodesep=0.25, ranksep=0.2, bgcolor=white, tooltip=" ", label={_heading(picture)}];',
        f'  node [fontname="{_FONT}", fontcolor="{_INK}", fontsize=10, shape=plain, tooltip=" "];',
        f'  edge [fontname="{_FONT}", fontcolor="{_FAINT}", fontsize=8, color="{_LINE}", arrowsize=0.6, penwidth=0.9, '
        'tooltip=" "];',
    ]
    lines += ["  " + line for member in picture.members for line in _member(member)]
    for rank, style in (("source", "input"), ("sink", "output")):
        ends = [member.id for member in picture.members if isinstance(member, Pill) and member.style == style]
        if ends:
            lines.append(f"  {{ rank={rank}; {'; '.join(ends)}; }}")
    lines += ["  " + _edge(edge) for edge in picture.edges]
    lines += ["  " + line for line in _keep_inputs_on_top(picture)]
    return "\n".join([*lines, "}"]) + "\n"


def _member(member: Member) -> Iterator[str]:
    if isinstance(member, Cluster):
        yield from _cluster(member)
    elif isinstance(member, Box):
        yield _box(member)
    else:
        yield _pill(member)


def _cluster(cluster: Cluster) -> Iterator[str]:
    if cluster.style == "row":
        yield f"subgraph cluster_{cluster.id} {{"
        yield '  graph [style=invis, margin=0, label=""];'
        for member in cluster.members:
            yield from ("  " + line for line in _member(member))
        yield f"  {{ rank=same; {'; '.join(member.id for member in cluster.members)}; }}"
        yield "}"
        return
    style = STYLES[cluster.style]
    look = "rounded,dashed" if cluster.style == "chunk" else "rounded,filled"
    note = f'<FONT POINT-SIZE="8" COLOR="{_FAINT}">{_markup(cluster.note)}</FONT>' if cluster.note else ""
    title = f'<FONT POINT-SIZE="9"><B>{_markup(cluster.title)}{_GAP if note else ""}</B>{note}</FONT>'
    yield f"subgraph cluster_{cluster.id} {{"
    yield (
        f'  graph [style="{look}", fillcolor="{style.fill}", color="{style.border}", labeljust=l, labelloc=t, '
        f'margin=7, tooltip="{_quoted(cluster.tooltip or cluster.title)}", label=<{title}>];'
    )
    for member in cluster.members:
        yield from ("  " + line for line in _member(member))
    yield "}"


def _keep_inputs_on_top(picture: Picture) -> Iterator[str]:
    """Invisible edges from an input to states and parameters, which `dot` would otherwise draw next to the inputs."""
    inputs = [member.id for member in picture.members if isinstance(member, Pill) and member.style == "input"]
    for pill in _top_level_pills(picture.members):
        if inputs and pill.style in ("slot", "parameter"):
            yield f"{inputs[0]} -> {pill.id} [style=invis, weight=0];"


def _top_level_pills(members: Sequence[Member]) -> Iterator[Pill]:
    for member in members:
        if isinstance(member, Pill):
            yield member
        elif isinstance(member, Cluster) and member.style != "row":
            yield from _top_level_pills(member.members)


def _box(box: Box) -> str:
    style = STYLES[box.style]
    shaped, measured = any(row.shape for row in box.rows), any(row.density for row in box.rows)
    rows = "<HR/>".join(f"<TR>{_cells(row, index, shaped, measured)}</TR>" for index, row in enumerate(box.rows))
    tooltip = "\n".join(row.tooltip for row in box.rows if row.tooltip)
    table = (
        f'<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" CELLPADDING="3" STYLE="ROUNDED" COLOR="{style.border}" '
        f'BGCOLOR="{style.fill}">{rows}</TABLE>'
    )
    return f'{box.id} [tooltip="{_quoted(tooltip)}", label=<{table}>];'


_GAP = "&#160;"
"""A space, put at the END of a piece of text because some viewers drop it at the beginning."""


def _cells(row: LabelRow, index: int, shaped: bool, measured: bool) -> str:
    detail = _markup(row.detail) if row.detail else ""
    gap = _GAP if row.detail else ""
    code = f' <FONT POINT-SIZE="8" COLOR="#8A3A10">{_markup(row.code)}</FONT>' if row.code else ""
    cells = f'<TD PORT="r{index}" ALIGN="LEFT" WIDTH="54"><B>{_markup(row.title)}{gap}</B>{detail}{code}</TD>'
    cells += f'<TD ALIGN="LEFT">{_small(row.name)}</TD>'
    cells += f'<TD ALIGN="RIGHT">{_small(row.shape)}</TD>' if shaped else ""
    return cells + (_density(row.density) if measured else "")


def _density(density: Density | None) -> str:
    if density is None:
        return "<TD></TD>"
    color = _tint(0.0 if density.of_input else density.mean)
    text = f'<FONT POINT-SIZE="8" COLOR="{_INK}">{_markup(density.text)}</FONT>'
    return f'<TD ALIGN="RIGHT" BGCOLOR="{color}">{text}</TD>'


def _tint(fraction: float) -> str:
    """A colour from white to a strong yellow; dark text is legible on all of them."""
    share = min(1.0, fraction) ** 0.5
    channels = [round(255 + (end - 255) * share) for end in (0xF2, 0xB7, 0x05)]
    return "#" + "".join(f"{channel:02X}" for channel in channels)


def _small(text: str) -> str:
    return f'<FONT POINT-SIZE="8" COLOR="{_FAINT}">{_markup(text)}</FONT>' if text else ""


def _pill(pill: Pill) -> str:
    style = STYLES[pill.style]
    look = {
        "input": 'shape=box, style="rounded,filled", penwidth=1.6, height=0.3, margin="0.15,0.06"',
        "output": 'shape=box, style="rounded,filled", peripheries=2, height=0.3, margin="0.15,0.06"',
        "slot": 'shape=ellipse, style=filled, height=0.2, width=0.3, margin="0.03,0.01", fontsize=9',
        "parameter": 'shape=box, style=filled, height=0.2, width=0.3, margin="0.05,0.02", fontsize=8',
    }[pill.style]
    text = f"<B>{_markup(pill.text)}</B>" if pill.style in ("input", "output") else _markup(pill.text)
    shape = f"<BR/>{_small(pill.shape)}" if pill.shape else ""
    return (
        f'{pill.id} [{look}, fillcolor="{style.fill}", color="{style.border}", '
        f'tooltip="{_quoted(pill.tooltip)}", label=<{text}{shape}>];'
    )


def _edge(edge: Edge) -> str:
    attributes = [f"label=<&#160;{_markup(edge.label)}>"] if edge.label else []
    if edge.carried:
        attributes.append(f'style=dashed, color="{STYLES["slot"].border}", fontcolor="{STYLES["slot"].border}"')
    if edge.main:
        attributes.append("weight=8")
    tail, head = edge.tail, edge.head
    if edge.upwards:
        # `dot` ranks the tail above the head, so the edge is written in reverse.
        attributes.append("dir=back")
        tail, head = head, tail
    return f"{tail} -> {head} [{', '.join(attributes)}];" if attributes else f"{tail} -> {head};"


def _heading(picture: Picture) -> str:
    """The title and, below it, the legend with one coloured cell for each style in the picture."""
    cells = "".join(
        f'<TD BGCOLOR="{STYLES[name].fill}" BORDER="1" COLOR="{STYLES[name].border}">'
        f'<FONT POINT-SIZE="9"><B>{_markup(name)}{_GAP}</B>{_markup(STYLES[name].meaning)}</FONT></TD>'
        for name in picture.legend
        if name in STYLES
    )
    if "carried" in picture.legend:
        color = STYLES["slot"].border
        cells += f'<TD><FONT POINT-SIZE="9" COLOR="{color}">- - &#8594; state carried to the next step</FONT></TD>'
    if "density" in picture.legend:
        cells += (
            f'<TD BGCOLOR="{_tint(0.1)}"><FONT POINT-SIZE="9"><B>10 %{_GAP}</B>spikes per neuron and step</FONT></TD>'
            f'<TD BORDER="1" COLOR="#B5B5B5"><FONT POINT-SIZE="9"><B>in 10 %{_GAP}</B>inputs that are not 0</FONT></TD>'
        )
    legend = f'<TABLE BORDER="0" CELLSPACING="4" CELLPADDING="3"><TR>{cells}</TR></TABLE>'
    below = f"<TR><TD>{legend}</TD></TR>" if cells else ""
    subtitle = f'<FONT POINT-SIZE="10" COLOR="{_FAINT}">{_markup(picture.subtitle)}</FONT>'
    title = f'<TR><TD><FONT POINT-SIZE="13"><B>{_markup(picture.title)}{_GAP}</B></FONT>{subtitle}</TD></TR>'
    return f'<<TABLE BORDER="0" CELLSPACING="0" CELLPADDING="1">{title}{below}</TABLE>>'


def _plain(text: str) -> str:
    """Replace backslashes and control characters, which graphviz interprets differently by context."""
    text = text.replace("\\", "\N{SET MINUS}")
    return "".join(c if c.isprintable() or c in "\n " else "\N{REPLACEMENT CHARACTER}" for c in text)


def _markup(text: str) -> str:
    """Escape text for an HTML-like label."""
    return html.escape(_plain(text)).replace("\n", " ")


def _quoted(text: str) -> str:
    """Escape text for a quoted attribute, where graphviz resolves HTML entities as well."""
    return html.escape(_plain(text)).replace("\n", "&#10;")
