"""Convert models in the style of published code, and compare and time the nets: `python tools/gallery`.

The models are written in own code, with the architecture and the idioms of the repositories that their rows name. Each
net is compared in float64 with the call that the author makes (the model itself, or a loop over time around it):
outputs, gradients and buffers to 1e-9, in training and evaluation mode, for a second number of time steps where the
model takes one. The last two columns are the time of the author's call divided by the time of the net, in float32. All
times are processor times of one thread, which other processes do not change.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from gallery_entry import Entry
from gallery_measuring import measure
from gallery_table import HEADER, compact_table, line

from snnfx._progress import progress

__all__ = ["FAMILIES", "entries", "main"]

FAMILIES = {
    "snntorch": ("snntorch",),
    "norse": ("norse",),
    "spoken_digits": (),
    "vision_loops": (),
    "containers": (),
    "single_step": (),
    "control": (),
    "multi_step": ("spikingjelly",),
    "transformers": ("spikingjelly",),
}
"""The modules `models_*.py`, and the libraries that they import."""

RESULTS = Path(__file__).resolve().parents[1] / "results" / "gallery.json"


def entries(only: str = "") -> Iterator[Entry]:
    """The entries whose name contains a text."""
    for family, libraries in FAMILIES.items():
        missing = [name for name in libraries if importlib.util.find_spec(name) is None]
        if missing:
            print(f"skipped models_{family}: {', '.join(missing)} is not installed", file=sys.stderr)
            continue
        for entry in importlib.import_module(f"models_{family}").ENTRIES:
            if only in entry.name:
                yield entry


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/gallery", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="run only models whose name contains this text")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="minimum time per comparison, 0 for none (default: 0.5)"
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=RESULTS, help=f"add the rows to a file (default: {RESULTS.name})"
    )
    parser.add_argument(
        "--readme", action="store_true", help="print the README's table of the committed results; run nothing"
    )
    arguments = parser.parse_args()
    if arguments.readme:
        print(compact_table(json.loads(RESULTS.read_text(encoding="utf-8"))["models"]))
        return 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    print(HEADER)
    rows: list[dict[str, Any]] = []
    with progress("gallery", unit="models", delay=0.0) as bar:
        for entry in entries(arguments.only):
            bar.start(entry.name)
            rows.append(measure(entry, arguments.seconds).as_data())
            bar.clear()
            print(line(rows[-1]), flush=True)
            bar.advance()
            if arguments.json:
                write(arguments.json, rows)
    agree = sum(row["verified"] == "yes" for row in rows)
    print(f"\n{agree} of {len(rows)} verified, in {time.perf_counter() - start:.0f} s.")
    return int(agree < len(rows))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows in the order of the gallery, with those of an earlier run for the other models."""
    known = json.loads(path.read_text(encoding="utf-8"))["models"] if path.exists() else []
    by_name = {row["name"]: row for row in [*known, *rows]}
    models = [by_name[entry.name] for entry in entries() if entry.name in by_name]
    path.write_text(json.dumps({"machine": _machine(), "models": models}, indent=2) + "\n", encoding="utf-8")


def _machine() -> dict[str, Any]:
    names = ("torch", "spikingjelly", "snntorch", "norse")
    versions = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    return {
        "date": datetime.date.today().isoformat(),
        "python": ".".join(map(str, sys.version_info[:3])),
        **versions,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }
