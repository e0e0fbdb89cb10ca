"""Draw benchmark results as an SVG file; needs matplotlib (`pip install ".[bench]"`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

__all__ = ["draw"]

OURS, PEER, PLAIN = "#2a6f97", "#c8553d", "#9aa0a6"


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw one row of panels per suite, for the first malloc setting that was measured."""
    plt.switch_backend("svg")
    mpl.rcParams["svg.hashsalt"] = "snnfx"
    drawing = {"layers": _draw_layers, "networks": _draw_networks, "events": _draw_events}
    rows = [name for name in drawing if found.get(name)]
    figure, axes = plt.subplots(len(rows), 2, figsize=(10, 3.8 * len(rows)), squeeze=False, layout="constrained")
    for row, name in zip(axes, rows, strict=True):
        malloc = found[name][0]["malloc"]
        cases = [result for result in found[name] if result["malloc"] == malloc]
        drawing[name](row, cases)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_layers(row: Any, cases: list[dict[str, Any]]) -> None:
    lif = sorted((c for c in cases if c["case"]["neuron"] == "LIF" and c["case"]["elements"] == 1 << 18), key=_steps)
    for axis, kind, limit, title in (
        (row[0], "forward", "one pass", "LIF layer, 262,144 neurons: forward"),
        (row[1], "training", "three passes", "forward and backward"),
    ):
        steps = [_steps(case) for case in lif]
        for side, color, label in (("SpikingJelly", PEER, "SpikingJelly, multi-step"), ("snnfx", OURS, "snnfx")):
            axis.plot(steps, [case[kind][side] for case in lif], "o-", color=color, label=label)
        axis.plot(steps, [case[kind][limit] for case in lif], "--", color=PLAIN, label=f"{limit} over memory (bound)")
        axis.set(title=title, xscale="log", yscale="log", xlabel="time steps", ylabel="ms")
        axis.set_xticks(steps, [str(t) for t in steps])
        axis.minorticks_off()
    row[0].legend(frameon=False)


def _draw_networks(row: Any, cases: list[dict[str, Any]]) -> None:
    labels = [f"{c['case']['network']}  T={c['case']['T']} N={c['case']['N']}" for c in cases]
    places = range(len(cases))
    for axis, kind in zip(row, ("inference", "training"), strict=True):
        for place, case in zip(places, cases, strict=True):
            times = case[kind]
            axis.barh(place, times["stepped"] / times["snnfx"], 0.6, color=OURS)
            axis.plot([times["stepped"] / times["floor"]] * 2, [place - 0.4, place + 0.4], color=PLAIN, lw=2)
            if "SpikingJelly" in times:
                axis.plot(times["stepped"] / times["SpikingJelly"], place, "D", color=PEER)
        axis.axvline(1, color="black", lw=0.8)
        axis.set(title=f"{kind}: speed-up over stepping")
        axis.set_yticks(places, labels if kind == "inference" else [""] * len(cases))
        axis.invert_yaxis()
    row[1].plot([], [], "s", color=OURS, label="snnfx")
    row[1].plot([], [], "D", color=PEER, label="SpikingJelly, multi-step")
    row[1].plot([], [], color=PLAIN, lw=2, label="bound: the network without neurons")
    row[1].figure.legend(*row[1].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)


def _draw_events(row: Any, cases: list[dict[str, Any]]) -> None:
    networks = list(dict.fromkeys((c["case"]["network"], c["case"]["T"], c["case"]["N"]) for c in cases))
    for axis, kind in zip(row, ("inference", "training"), strict=True):
        for network, marker in zip(networks, "osD^v", strict=False):
            own = [c for c in cases if (c["case"]["network"], c["case"]["T"], c["case"]["N"]) == network]
            rates = [100 * c["case"]["rate"] for c in own]
            label = "{}  T={} N={}".format(*network)
            for side, color in (("snnfx", OURS), ("SpikingJelly", PEER)):
                ratios = [c[kind][side] / c[kind]["floor"] for c in own]
                axis.plot(rates, ratios, f"{marker}-", color=color, label=label if side == "snnfx" else None)
        axis.axhline(1, color=PLAIN, lw=2)
        axis.set(title=f"{kind} at a firing rate: time / bound", yscale="log", xlabel="firing rate (%)")
        axis.set_xticks(rates, [f"{rate:.0f}" for rate in rates])
        low, high = axis.get_ylim()
        axis.set_ylim(low, 2.5 * high if kind == "inference" else high)  # room for the legend
        axis.set_yticks(*_ratios((low, high)))
        axis.minorticks_off()
    row[0].legend(frameon=False, loc="upper right", ncols=2, fontsize="small")


def _ratios(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """Ticks of a logarithmic axis of ratios between two limits, and their labels."""
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if limits[0] <= t <= limits[1]]
    return ticks, [f"{t:g}" for t in ticks]


def _steps(case: dict[str, Any]) -> int:
    steps: int = case["case"]["T"]
    return steps
