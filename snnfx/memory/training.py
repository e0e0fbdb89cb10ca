"""The forms of a net that keep less for the backward pass, made when a plan asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from snnfx.emitted_graphs import REGIONS, compile_graph
from snnfx.errors import InputError, warn_once
from snnfx.memory.recompute import Segment, run_segment
from snnfx.passes.checkpoint import RecomputePlan, can_be_chunked, recompute_segments, region_calls
from snnfx.passes.split_statistics import split_statistics
from snnfx.passes.whole_numbers import prove_whole_numbers
from snnfx.program import Region, StepProgram, describe_node, keeps_statistics

if TYPE_CHECKING:
    from snnfx.net import Net

__all__ = ["Recomputation", "check_checkpoint_option", "grouped", "refuse_statistics_over_time"]


def check_checkpoint_option(checkpoint: Any) -> None:
    """Raise for a value that `checkpoint=` does not take."""
    if checkpoint is None or checkpoint in ("auto", "regions"):
        return
    if isinstance(checkpoint, bool) or not isinstance(checkpoint, int) or checkpoint < 1:
        hint = 'Give a number of time steps above 0, "regions", "auto" or None.'
        raise InputError("SNNFX309", f"checkpoint={checkpoint!r}", hint=hint)


def refuse_statistics_over_time(program: StepProgram, training: bool, what: str) -> None:
    """Raise where the result of some time steps depends on the others through statistics of all of them.

    Raises:
        InputError: SNNFX317, a BatchNorm in training takes its statistics over T * N.
    """
    for region in program.regions:
        for node in region.nodes:
            if training and region.kind == "fold" and keeps_statistics(program, node):
                raise InputError(
                    "SNNFX317",
                    f"{what} would change what `{describe_node(node)}` computes",
                    why='with batch_norm="fold" its statistics in training are those of all time steps together.',
                    hint='Use checkpoint="regions" (it keeps all steps together), batch_norm="per_step", or eval().',
                )


class Recomputation:
    """Makes and keeps the forms of one net that compute parts again in backward."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.runners: dict[Any, Callable[..., Any]] = {}
        self.forms: dict[Any, tuple[fx.Graph, list[Region]]] = {}

    def form(self, part: str) -> tuple[fx.Graph, list[Region]]:
        """The "main" or "plain" graph of the current mode, its folds split at statistics, and the regions in it."""
        net = self.net
        key = (net.training, part)
        if key not in self.forms:
            container = f"split_{len(self.forms)}"
            emitted = net._graphs.emitted[key]
            graph, regions, modules = split_statistics(net.program, emitted, f"{REGIONS}.{container}")
            net._graphs.keep(container, modules)
            self.forms[key] = graph, regions
        return self.forms[key]

    @property
    def is_wanted(self) -> bool:
        """Whether training is to be planned."""
        options = self.net.options
        return options.checkpoint is not None and (options.checkpoint != "auto" or options.memory_budget is not None)

    def applies(self) -> bool:
        """Whether this call keeps a history that a plan could make smaller."""
        net = self.net
        if not self.is_wanted or not torch.is_grad_enabled() or net.options.step_mode == "s" or net._graphs.is_replaced:
            return False
        if torch.compiler.is_compiling():
            return not _told_that_compiled_nets_are_left_alone()
        return True

    def runner(self, part: str, plan: RecomputePlan) -> Callable[..., Any]:
        """The "main" or "plain" form of the net with the segments of a plan."""
        net = self.net
        key = (net.training, part, plan.segments, tuple(sorted(plan.chunks.items())))
        if key not in self.runners:
            program = net.program
            label = f"recomputed_{len(self.runners)}"
            form, regions = self.form(part)
            graph, segments = recompute_segments(
                program, form, regions, plan, f"{REGIONS}.{label}", prove_whole_numbers(program)
            )
            net._graphs.keep(label, segments)
            self.runners[key] = compile_graph(graph)
        return self.runners[key]

    def one_chunk(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """A function of some time steps, `(inputs, state) -> (outputs, state)`, that is run again in backward."""

        def again(_: nn.Module, inputs: list[Tensor], state: Any) -> Any:
            return run(inputs, state)

        graph = fx.Graph()
        source, inputs, state = (graph.placeholder(name) for name in ("source", "inputs", "state"))
        call = graph.call_function(again, (source, inputs, state), name="chunk")
        graph.output((call,))
        # Whatever a step may draw is drawn again.
        segment = Segment("a chunk of time steps", graph, {}, {}, bool, frozenset({call.name}))

        def checkpointed(x: list[Tensor], first: Any) -> Any:
            return run_segment(segment, (self.net.source, x, first))[0]

        return checkpointed

    def every_region(self, T: int, leaves: Sequence[Tensor]) -> RecomputePlan:
        """The plan of `checkpoint="regions"`: each region by itself, in chunks of time where it may."""
        from snnfx.memory.model import NotPredictable, model_memory
        from snnfx.memory.plan import kept_by_history, kept_instead, packed_parts, region_chunks

        graph, regions = self.form("main")
        names = list(region_calls(graph))
        chunked = {region.name for region in regions if can_be_chunked(self.net.program, region)}
        lengths: dict[str, int | None]
        try:
            model = model_memory(self.net, leaves, None, training=True)
            lengths, packed = region_chunks(chunked, model, T), packed_parts(self.net, model)
            # What a generated kernel saves is no more than its input, which would be kept instead.
            holds = {
                call.name: kept_by_history(model, call, T) > kept_instead(model, call, T, packed)
                for call in model.calls
            }
        except NotPredictable:
            lengths, holds = {name: max(1, T // 4) for name in names if name in chunked}, {}
        return RecomputePlan(
            segments=tuple(group for group in grouped(names) if len(group) > 1 or holds.get(group[0], True)),
            chunks={name: k for name, k in lengths.items() if k is not None and k < T},
            reason="every region that would hold more than its input is computed again in the backward pass",
        )


def grouped(names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Regions by themselves, but statistics together with what they are taken of: that is not kept for them."""
    known = set(names)
    return tuple(
        (name, f"{name}_statistics") if f"{name}_statistics" in known else (name,)
        for name in names
        if not name.endswith("_statistics") or name.removesuffix("_statistics") not in known
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _told_that_compiled_nets_are_left_alone() -> bool:
    warn_once(
        "SNNFX506",
        "a compiled net keeps what the compiler's own partitioner chooses for the backward pass; checkpoint= and "
        "memory_budget= act on it when it is not compiled.",
    )
    return True
