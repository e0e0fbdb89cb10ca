"""Forms of the emitted graphs that save less for backward, made when a plan needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from snnfx.analysis.integer_ranges import infer_integer_ranges
from snnfx.emit.compiled_graph import compile_graph
from snnfx.emit.emitted_graphs import REGIONS, EmittedGraphs
from snnfx.emit.fold_parts import emit_parts, split_folds
from snnfx.emit.recompute_segments import RecomputePlan, recompute_segments
from snnfx.emit.tiling import group_tiles
from snnfx.ir.program import Region
from snnfx.recompute.tile import Tile

__all__ = ["RecomputeForm", "RecomputeForms"]


@dataclass(frozen=True)
class RecomputeForm:
    """An emitted graph whose calls are tiles, from which `recompute_segments` makes segments.

    Args:
        graph: made by `snnfx.emit.tiling.group_tiles`.
        tiles: the tiles that the graph runs, by name.
        regions: the regions of the program; a fold region that was split is replaced by its parts.
    """

    graph: fx.Graph
    tiles: Mapping[str, Tile]
    regions: tuple[Region, ...]


_making = threading.RLock()
"""Acquired while a form is made: forms number their containers, and calls of several threads may need the same form."""


class RecomputeForms:
    """Makes and caches the recompute forms of emitted graphs, by mode and part."""

    def __init__(self, graphs: EmittedGraphs) -> None:
        self.graphs = graphs
        self._forms: dict[tuple[bool, str], RecomputeForm] = {}
        self._runners: dict[Any, Callable[..., Any]] = {}

    def form(self, training: bool, part: str) -> RecomputeForm:
        """The "main" or "plain" graph of a mode, divided into tiles."""
        with _making:
            return self._form(training, part)

    def _form(self, training: bool, part: str) -> RecomputeForm:
        graphs, key = self.graphs, (training, part)
        if key not in self._forms:

            def emit() -> tuple[RecomputeForm, fx.Graph, str]:
                form = self._make_form(training, part, f"parts_{len(self._forms)}")
                return form, form.graph, f"{len(form.tiles)} tiles"

            self._forms[key] = graphs.run("group_tiles", part, training, emit)
        return self._forms[key]

    def _make_form(self, training: bool, part: str, label: str) -> RecomputeForm:
        graphs, program = self.graphs, self.graphs.programs[training]
        parts = split_folds(program)
        whole = {p.region.name for p in parts if any(p.region is region for region in program.regions)}
        split = {region.name for region in program.regions} - whole
        modules = {n: m for n, m in graphs.region_modules(training).items() if n not in split}
        arguments = graphs.arguments[training]
        plain = (arguments.tensor_dims, arguments.output_time_dim) if part == "plain" else None
        container, reduce = f"{REGIONS}.{label}", graphs.options.reduce
        graph, made = emit_parts(program, parts, container, graphs.target_name, modules, reduce, plain)
        graphs.keep(label, made)
        graph, tiles = group_tiles(program, graph, parts, f"{container}_tiles")
        graphs.keep(f"{label}_tiles", tiles)
        return RecomputeForm(graph, tiles, tuple(part.region for part in parts))

    def runner(self, training: bool, part: str, plan: RecomputePlan) -> Callable[..., Any]:
        """The function that runs the "main" or "plain" graph of a mode with the segments of a plan."""
        with _making:
            return self._runner(training, part, plan)

    def _runner(self, training: bool, part: str, plan: RecomputePlan) -> Callable[..., Any]:
        form, program = self.form(training, part), self.graphs.programs[training]
        key = (training, part, plan.segments, tuple(sorted(plan.slices.items(), key=str)), plan.twice, plan.packs)
        if key not in self._runners:
            label = f"recomputed_{len(self._runners)}"

            def emit() -> tuple[fx.Graph, fx.Graph, str]:
                nodes, ranges = program.nodes_by_name, infer_integer_ranges(program)
                graph, modules = recompute_segments(form.graph, form.tiles, plan, f"{REGIONS}.{label}", nodes, ranges)
                self.graphs.keep(label, modules)
                return graph, graph, f"{len(plan.segments)} segments"

            self._runners[key] = compile_graph(self.graphs.run("recompute", part, training, emit))
        return self._runners[key]
