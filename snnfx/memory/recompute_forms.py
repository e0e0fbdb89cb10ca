"""The forms of a net that save less for the backward pass, emitted when a plan needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from snnfx.analysis.integer_ranges import infer_integer_ranges
from snnfx.emit.compiled_graph import compile_graph
from snnfx.emit.emitted_graphs import REGIONS
from snnfx.emit.fold_parts import emit_parts, split_folds, takes_batch_statistics
from snnfx.emit.recompute_segments import RecomputePlan, recompute_segments, segments_of
from snnfx.emit.tiling import group_tiles
from snnfx.errors import InputError, warn_once
from snnfx.ir.program import Region, StepProgram, describe_node
from snnfx.memory.budget import bytes_as_text
from snnfx.memory.memory_model import NotPredictable
from snnfx.memory.training_planner import TrainingPlanner
from snnfx.recompute.recomputation import run_segment
from snnfx.recompute.replay import recompute_lock
from snnfx.recompute.segment import Segment, TileCall
from snnfx.recompute.tile import Slices, Tile
from snnfx.sandbox.torch_internals import are_transforms_active

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = ["Recomputation", "check_checkpoint_option", "refuse_statistics_over_time"]


def check_checkpoint_option(checkpoint: Any) -> None:
    """Raise InputError for an invalid value of the option `checkpoint`."""
    if checkpoint is None or checkpoint in ("auto", "selective", "regions"):
        return
    if isinstance(checkpoint, bool) or not isinstance(checkpoint, int) or checkpoint < 1:
        hint = 'Use a number of time steps above 0, "selective", "regions", "auto" or None.'
        raise InputError("SNNFX309", f"checkpoint={checkpoint!r} is not a valid value", hint=hint)


def refuse_statistics_over_time(program: StepProgram, training: bool, what: str) -> None:
    """Raise if time steps depend on each other through batch statistics over time.

    Raises:
        InputError: SNNFX317, a BatchNorm in training computes its statistics over T*N.
    """
    for region in program.regions:
        for node in region.nodes:
            if training and region.kind == "fold" and takes_batch_statistics(program, node):
                raise InputError(
                    "SNNFX317",
                    f"{what} would change the result of `{describe_node(node)}`",
                    why='with batch_norm="fold", it computes its statistics in training over all time steps.',
                    hint='Use checkpoint="regions" (it does not cut time), batch_norm="per_step", or net.eval().',
                )


@dataclass(frozen=True)
class RecomputeForm:
    """A form of the net whose calls are grouped into tiles, for making segments.

    Args:
        graph: the graph of `snnfx.emit.tiling`.
        tiles: its tiles, by name.
        regions: the regions of the net; split regions are replaced by their parts.
    """

    graph: fx.Graph
    tiles: Mapping[str, Tile]
    regions: tuple[Region, ...]


class Recomputation:
    """Emits and caches the forms of one net that recompute parts in backward."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.runners: dict[Any, Callable[..., Any]] = {}
        self.forms: dict[Any, RecomputeForm] = {}

    def form(self, part: str) -> RecomputeForm:
        """The "main" or "plain" graph of the current mode in tiles."""
        net = self.net
        key = (net.training, part)
        if key not in self.forms:
            program, label = net.program, f"parts_{len(self.forms)}"
            parts = split_folds(program)
            whole = {p.region.name for p in parts if any(p.region is region for region in program.regions)}
            split = {region.name for region in program.regions} - whole
            known = {n: m for n, m in net._graphs.region_modules(net.training).items() if n not in split}
            plain = (net._arguments.tensor_dims, net._arguments.output_time_dim) if part == "plain" else None
            graph, modules = emit_parts(
                program, parts, f"{REGIONS}.{label}", net._graphs.target_name, known, net.options.reduce, plain
            )
            net._graphs.keep(label, modules)
            graph, tiles = group_tiles(program, graph, parts, f"{REGIONS}.{label}_tiles")
            net._graphs.keep(f"{label}_tiles", tiles)
            self.forms[key] = RecomputeForm(graph, tiles, tuple(part.region for part in parts))
        return self.forms[key]

    @property
    def is_wanted(self) -> bool:
        """Whether the options ask for recomputation in training."""
        options = self.net.options
        return options.checkpoint is not None and (options.checkpoint != "auto" or options.memory_budget is not None)

    def applies(self) -> bool:
        """Whether this call keeps a history that a plan could make smaller."""
        net = self.net
        if not self.is_wanted or not torch.is_grad_enabled() or net.options.step_mode == "s" or net._graphs.is_replaced:
            return False
        if are_transforms_active():
            return False
        if torch.compiler.is_compiling():
            return not _warn_compiled_net_ignores_checkpoint()
        return True

    def runner(self, part: str, plan: RecomputePlan) -> Callable[..., Any]:
        """The "main" or "plain" form of the net with the segments of a plan."""
        net, form = self.net, self.form(part)
        key = (net.training, part, plan.segments, tuple(sorted(plan.slices.items(), key=str)), plan.twice, plan.packs)
        if key not in self.runners:
            label = f"recomputed_{len(self.runners)}"
            graph, modules = recompute_segments(
                form.graph,
                form.tiles,
                plan,
                f"{REGIONS}.{label}",
                net.program.nodes_by_name,
                infer_integer_ranges(net.program),
            )
            net._graphs.keep(label, modules)
            self.runners[key] = _one_at_a_time(compile_graph(graph))
        return self.runners[key]

    def one_chunk(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function of some time steps, `(inputs, state) -> (outputs, state)`, for recomputation in backward."""

        def run_chunk(_: Tile, *arguments: Any) -> Any:
            *inputs, state, _source = arguments
            outputs, state = run(inputs, state)
            return tuple(outputs), (state,)

        def checkpointed(x: list[Tensor], first: Any) -> Any:
            count = len(x)
            # A step may draw random numbers, so the RNG state is replayed.
            tile = Tile("a chunk of time steps", fx.Graph(), run_chunk, [True] * count, False, False, is_random=True)
            call = TileCall(tile, tuple(range(count)), (count,), (count + 1,), ())
            segment = Segment("a chunk of time steps", (), (), call, Slices(), False, {}, bool)
            outputs, (state,) = run_segment(segment, (*x, first, self.net.source))
            return outputs, state

        return checkpointed

    def plan(self, checkpoint: str, T: int, leaves: Sequence[Tensor], state: Mapping[str, Any] | None) -> RecomputePlan:
        """The plan of `checkpoint="selective"` or `"regions"`."""
        try:
            planner = TrainingPlanner(self.net, T, leaves, state)
        except NotPredictable as unknown:
            return self._plan_without_bytes(checkpoint, T, str(unknown))
        plan = planner.selective() if checkpoint == "selective" else planner.least()
        budget, peak = self.net.options.memory_budget, planner.peak(plan)
        if isinstance(budget, int) and peak.bytes > budget:
            needed = f'checkpoint="{checkpoint}" needs {bytes_as_text(peak.bytes)} at {peak.name}'
            instead = 'Use checkpoint="auto", which respects the budget.'
            warn_once("SNNFX508", f"memory_budget is {bytes_as_text(budget)}, but {needed}. {instead}")
        what = "everything except matrix products" if checkpoint == "selective" else "everything"
        return replace(plan, reason=f"{what} is recomputed in the backward pass")

    def _plan_without_bytes(self, checkpoint: str, T: int, why: str) -> RecomputePlan:
        """The same plan without predicted sizes."""
        form = self.form("main")
        groups = [
            (*(products if checkpoint == "regions" else ()), *statistics, name)
            for name, (products, statistics) in segments_of(form.graph, form.tiles).items()
        ]
        slices = {group[-1]: Slices(steps=max(1, T // 4)) for group in groups}
        return RecomputePlan(tuple(groups), slices, packs=True, reason=f"recomputed region by region ({why})")


def _one_at_a_time(run: Callable[..., Any]) -> Callable[..., Any]:
    def run_locked(*arguments: Any) -> Any:
        with recompute_lock:
            return run(*arguments)

    return run_locked


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _warn_compiled_net_ignores_checkpoint() -> bool:
    warn_once(
        "SNNFX506",
        "checkpoint= and memory_budget= ignored: under torch.compile, the partitioner of the compiler chooses which "
        "tensors to save for backward. Both options work if the net is not compiled.",
    )
    return True
