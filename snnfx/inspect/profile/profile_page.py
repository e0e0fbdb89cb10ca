"""A profile as one HTML page that loads no other file: tables, charts and the drawn net.

The page is well-formed XML. A click on a region, in the picture or in a table, highlights its rows everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from html import escape

from snnfx.inspect.profile.page_charts import (
    channel_strip,
    memory_chart,
    potential_chart,
    rate_line,
    spike_raster,
)
from snnfx.inspect.profile.page_style import SCRIPT, STYLE
from snnfx.inspect.profile.profile_document import (
    channels_as_text,
    count_as_text,
    energy_as_text,
    memory_sentence,
    milliseconds_as_text,
    subtitle_of,
)
from snnfx.inspect.profile_data import FiringRate, LayerOperations, ProfileData, RegionTime
from snnfx.memory.budget import bytes_as_text

__all__ = ["profile_page"]

_MOST_HOLDERS = 10
_HINT = "Select a region in the picture or in a table to highlight it everywhere."


def profile_page(data: ProfileData) -> str:
    """The page as text."""
    kind = "training step" if data.train else "inference"
    regions = json.dumps({row.region: _summary(row, data) for row in data.regions if row.region})
    # Neither `<` nor `&` may appear in the script of well-formed XML.
    regions = regions.replace("<", "\\u003c").replace("&", "\\u0026")
    body = "\n".join(
        [
            f'<header><h1>{_text(data.model)}<span class="badge">{kind}</span></h1>'
            f'<p class="soft">{_text(subtitle_of(data))}</p></header>',
            _tiles(data),
            '<div class="columns"><div class="aside">',
            _picture(data),
            _advice(data),
            "</div><div>",
            _time(data),
            _memory(data),
            "</div></div>",
            _rates(data),
            _operations(data),
            _recordings(data),
            _footer(data),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{_text(data.model)}, {kind}: snnfx profile</title>\n<style>{STYLE}</style>\n</head>\n"
        f'<body>\n<main>\n{body}\n</main>\n<script type="application/json" id="regions">{regions}</script>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _text(text: str) -> str:
    printable = "".join(c if c.isprintable() or c == "\N{NO-BREAK SPACE}" else " " for c in text)
    return escape(printable)


def _summary(row: RegionTime, data: ProfileData) -> str:
    time = milliseconds_as_text(row.forward)
    if data.train:
        time = f"{time} forward, {milliseconds_as_text(row.backward)} backward"
    return f"{row.runs_as or row.kind}, {time}: {', '.join(row.contents)}"


def _tiles(data: ProfileData) -> str:
    total = data.forward + data.backward
    per_step = milliseconds_as_text(total / max(data.T, 1))
    tiles = [("time of a call", milliseconds_as_text(total), f"{per_step} per time step")]
    silent = sum(len(row.silent) for row in data.rates)
    rate = f"{data.rate:.4f}" if data.rates else "none"
    tiles.append(("firing rate", rate, f"{silent} silent channel{'s' * (silent != 1)}" if data.rates else "no spikes"))
    tiles.append(("synaptic operations", count_as_text(data.acs), f"ACs, and {count_as_text(data.macs)} MACs"))
    share = f"{data.energy / data.dense_energy:.0%} of dense inputs" if data.dense_energy else "nothing counted"
    tiles.append(("energy estimate", energy_as_text(data.energy), share))
    peak = bytes_as_text(data.memory.peak) if data.memory.peak else "unknown"
    tiles.append(("peak memory", peak, f"at {data.memory.region}" if data.memory.peak else "no prediction"))
    cells = "".join(
        f'<div class="tile"><span>{_text(a)}</span><b>{_text(b)}</b><span>{_text(c)}</span></div>' for a, b, c in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _card(title: str, text: str, content: str, name: str = "") -> str:
    about = f'<p class="soft small">{text}</p>' if text else ""
    mark = f' id="{name}"' if name else ""
    return f'<section class="card"{mark}><h2>{_text(title)}</h2>{about}{content}</section>'


def _table(header: Sequence[tuple[str, str]], rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col" class="{style}">{_text(name)}</th>' for name, style in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(region: str, cells: Iterable[tuple[str, str]]) -> str:
    mark = f' data-region="{_text(region)}" tabindex="0" aria-pressed="false"' if region else ""
    return f"<tr{mark}>" + "".join(f'<td class="{style}">{content}</td>' for content, style in cells) + "</tr>"


def _picture(data: ProfileData) -> str:
    hint = f'<p id="detail" class="soft" aria-live="polite">{_HINT}</p>'
    if not data.picture:
        return _card(
            "The net",
            "The picture needs the program dot: install graphviz and profile again.",
            hint,
        )
    svg = data.picture[data.picture.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    # Only declarations of namespaces contain URLs; a tooltip becomes a title, which needs no namespace.
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<a xlink:title="([^"]*)">', r"<a><title>\1</title>", svg)
    buttons = (
        '<div class="bar-of-buttons"><button type="button" data-fit="1" aria-pressed="true">Fit width</button>'
        '<button type="button" data-fit="0" aria-pressed="false">Full size</button></div>'
    )
    return _card("The net", "", f'{hint}{buttons}<div class="picture fit" tabindex="0">{svg}</div>')


def _time(data: ProfileData) -> str:
    total = sum(row.forward + row.backward for row in data.regions) or 1.0
    most = max((row.forward + row.backward for row in data.regions), default=1.0) or 1.0
    rows = []
    for row in data.regions:
        style = row.kind or "between"
        share = (row.forward + row.backward) / total
        bars = f'<i class="{style}" style="width:{row.forward / most * 100:.1f}%"></i>'
        bars += f'<i class="{style} back" style="width:{row.backward / most * 100:.1f}%"></i>' if data.train else ""
        name = f'<span class="kind {style}"></span><span class="mono">{_text(row.region or "between regions")}</span>'
        contents = f'<span class="sub">{_text(", ".join(row.contents))}</span>'
        times = milliseconds_as_text(row.forward)
        if data.train:
            times += f'<span class="sub">+ {milliseconds_as_text(row.backward)}</span>'
        cells = [
            (name + contents, "name"),
            (_text(row.runs_as), "wide small soft"),
            (f'{share:.0%}<span class="track">{bars}</span>', "bar"),
            (times, "n"),
        ]
        rows.append(_row(row.region, cells))
    header = [("region", ""), ("runs", "wide"), ("share", ""), ("time", "n")]
    parts = " Solid and first: forward. Pale and second: backward, each region on its own." if data.train else ""
    return _card("Time of each region", f"Median of {data.repeats} calls.{parts}", _table(header, rows), "time")


def _memory(data: ProfileData) -> str:
    kinds = {row.region: row.kind for row in data.regions}
    rows = [
        _row(
            holder.region if holder.region in kinds else "",
            [
                (f'{_text(holder.what)}<span class="sub">{_text(holder.kind)}</span>', "name"),
                (f'<span class="mono">{_text(f"{list(holder.shape)}" if holder.shape else "")}</span>', "wide"),
                (_text(bytes_as_text(holder.bytes)), "n"),
            ],
        )
        for holder in data.memory.holders[:_MOST_HOLDERS]
    ]
    table = _table([("allocated at the peak", ""), ("tensor", "wide"), ("bytes", "n")], rows) if rows else ""
    return _card("Memory over the call", _text(memory_sentence(data)), memory_chart(data.memory, kinds) + table)


def _rates(data: ProfileData) -> str:
    if not data.rates:
        return _card("Firing rates", "No layer of spiking neurons: no loop has outputs of only 0 and 1.", "")
    most = max(row.rate for row in data.rates) or 1.0
    rows = [
        _row(
            row.region,
            [
                (f'<span class="mono">{_text(row.layer)}</span><span class="sub">{_neurons(row)}</span>', "name"),
                (
                    f"{row.rate:.4f}"
                    f'<span class="track"><i class="spike" style="width:{row.rate / most * 100:.1f}%"></i></span>',
                    "bar",
                ),
                (channel_strip(row), "wide bar"),
                (rate_line(row.over_time), "wide bar"),
                (_channels(row), "small"),
            ],
        )
        for row in data.rates
    ]
    header = [("layer", ""), ("rate", ""), ("channels", "wide"), ("over time", "wide"), ("silent, saturated", "")]
    text = (
        "Spikes per neuron and time step. A silent channel has no spike in this call; a saturated one fires at "
        "95&#160;% of the steps or more. A darker cell is a more active channel."
    )
    return _card("Firing rates", text, _table(header, rows))


def _neurons(row: FiringRate) -> str:
    channels = len(row.channels)
    return f"{row.neurons} neurons" + (f", {channels} channels" if channels not in (1, row.neurons) else "")


def _channels(row: FiringRate) -> str:
    count, parts = len(row.channels), []
    for name, channels, style in (("silent", row.silent, "warn"), ("saturated", row.saturated, "bad")):
        if channels:
            style = "bad" if len(channels) == count else style
            parts.append(
                f'<span class="badge {style}">{len(channels)} of {count} {name}</span>'
                f'<span class="sub">{channels_as_text(channels, 8)}</span>'
            )
    return "".join(parts)


def _operations(data: ProfileData) -> str:
    most = max((row.dense_macs for row in data.operations), default=1) or 1
    rows = [_operation_row(row, data, most) for row in data.operations]
    header = [
        ("layer", ""),
        ("input density", ""),
        ("dense MACs", "wide n"),
        ("MACs", "n wide"),
        ("ACs", "n"),
        ("energy", "n"),
    ]
    text = (
        "Forward pass of the whole call. A product whose input has only 0 and 1 adds one weight for each spike (an "
        "accumulate, AC); all others multiply (MAC)."
    )
    legend = (
        '<div class="legend"><span><span class="kind spike"></span>spike input</span>'
        '<span><span class="kind dense"></span>real-valued input</span></div>'
    )
    table = _table(header, rows) if rows else ""
    missing = "".join(f"<li>{_text(name)}: {_text(why)}</li>" for name, why in data.uncounted.items())
    if missing:
        table += f'<p class="small">Not counted:</p><ul class="notes">{missing}</ul>'
    return _card("Operations", text, legend + table)


def _operation_row(row: LayerOperations, data: ProfileData, most: int) -> str:
    style = "spike" if row.spikes == 1.0 else "dense"
    size = max(row.dense_macs / most * 100, 2.0)
    bar = (
        f'<span class="track" style="width:{size:.1f}%"><i class="{style}" style="width:{row.density * 100:.1f}%"></i>'
        "</span>"
    )
    energy = data.energy_model.joules(row.macs, row.acs)
    return _row(
        row.region,
        [
            (f'<span class="mono">{_text(row.layer)}</span><span class="sub">{_text(row.kind)}</span>', "name"),
            (f"{row.density:.1%}{bar}", "bar"),
            (count_as_text(row.dense_macs), "wide n"),
            (count_as_text(row.macs) if row.macs else "", "n wide"),
            (count_as_text(row.acs) if row.spikes else "", "n"),
            (energy_as_text(energy), "n"),
        ],
    )


def _advice(data: ProfileData) -> str:
    if not data.advice:
        return _card("Next steps", "No option stands out: nothing to change.", "")
    items = "".join(
        f'<li{_mark(advice.region, data)}><span class="mono">{_text(advice.option)}</span>{_text(advice.text)}</li>'
        for advice in data.advice
    )
    return _card("Next steps", "", f'<ul class="advice">{items}</ul>')


def _mark(region: str, data: ProfileData) -> str:
    is_known = any(row.region == region for row in data.regions)
    return (
        f' data-region="{_text(region)}" tabindex="0" role="button" aria-pressed="false"' if region and is_known else ""
    )


def _recordings(data: ProfileData) -> str:
    if not data.recordings:
        return ""
    figures = "".join(
        f'<figure><figcaption><span class="mono">{_text(r.name)}</span> <span class="soft">sample 0, '
        f"{len(r.values[0])} of {r.units} units</span></figcaption>"
        f"{spike_raster(r) if r.spikes else potential_chart(r)}</figure>"
        for r in data.recordings
    )
    return _card(
        "Recorded layers",
        "Spikes as marks, other values as lines of up to five units.",
        f'<div class="figures">{figures}</div>',
    )


def _footer(data: ProfileData) -> str:
    model = data.energy_model
    notes = "".join(f"<li>{_text(note)}</li>" for note in data.notes)
    return (
        f"<footer><p>Energy model: {model.mac_pj:g}&#160;pJ per MAC, {model.ac_pj:g}&#160;pJ per AC; "
        f"{_text(model.source)}. Memory traffic is not included. Memory is predicted from shapes.</p>"
        f"{f'<ul class={chr(34)}notes{chr(34)}>{notes}</ul>' if notes else ''}<p>Made by snnfx.profile.</p></footer>"
    )
