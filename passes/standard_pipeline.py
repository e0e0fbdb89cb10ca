"""The order of passes from a captured step to a planned program, with the user's passes at their stages."""

from __future__ import annotations

from snnfx.ir.graph_pass import Pass, stages_of
from snnfx.ir.options import ConvertOptions, time_dims_of_leaves
from snnfx.ir.program import StepProgram
from snnfx.passes.absorb import Absorb
from snnfx.passes.choose_event_layers import ChooseEventLayers
from snnfx.passes.choose_memory_format import ChooseMemoryFormat
from snnfx.passes.fold_batch_norm import FoldBatchNorm
from snnfx.passes.lower import Lower
from snnfx.passes.normalize import Normalize
from snnfx.passes.partition import Partition
from snnfx.passes.remove_dead_code import RemoveDeadCode
from snnfx.passes.sink_reductions import SinkReductions

__all__ = ["pipeline", "planning", "replanning"]


def pipeline(program: StepProgram, options: ConvertOptions | None = None) -> list[Pass]:
    """The passes that `snnfx.convert` runs on a captured step, in order.

    Args:
        program: the step, at stage "captured".
        options: the options of the conversion; its `passes` run at the end of the stages that they require.

    Example:
        >>> import torch, snnfx
        >>> from snnfx.passes import pipeline
        >>> net = snnfx.convert(torch.nn.Linear(3, 2))
        >>> [p.name for p in pipeline(net.program)][:3]
        ['normalize', 'remove_dead_code', 'partition']
    """
    options = ConvertOptions() if options is None else options
    own = _own_passes(options)
    edits = [*own["normalized"], RemoveDeadCode()] if own["normalized"] else []
    return [*own["captured"], Normalize(), RemoveDeadCode(), *edits, *planning(program, options)]


def planning(program: StepProgram, options: ConvertOptions) -> list[Pass]:
    """The last passes of the pipeline, which plan regions, layouts and kernels of a normalized step."""
    own, invariant = _own_passes(options), _invariant_inputs(program, options)
    sinking = [SinkReductions(reduce=options.reduce, invariant_inputs=invariant)] if options.reduce is not None else []
    layout = [ChooseMemoryFormat()] if options.memory_format is not None else []
    partition = Partition(batch_norm=options.batch_norm, invariant_inputs=invariant)
    lowering = [Lower(), Absorb()] if options.lower is not None else []
    events = [ChooseEventLayers()] if options.lower == "auto" else []
    planned = [*layout, *lowering, *events, FoldBatchNorm()]
    return [*sinking, partition, *own["partitioned"], *planned, *own["planned"]]


def replanning(program: StepProgram, options: ConvertOptions) -> list[Pass]:
    """The passes of `planning` for a program that already has the graph changes of the user's passes."""
    return [item for item in planning(program, options) if item.is_built_in or "graph" not in item.may_change]


def _own_passes(options: ConvertOptions) -> dict[str, list[Pass]]:
    """The user's passes, by the stage at whose end they run."""
    own: dict[str, list[Pass]] = {stage: [] for stage in ("captured", "normalized", "partitioned", "planned")}
    for item in options.passes:
        own[stages_of(item)[0]].append(item)
    return own


def _invariant_inputs(program: StepProgram, options: ConvertOptions) -> tuple[str, ...]:
    dims = time_dims_of_leaves(options.time_dim, program)
    leaves = zip(program.input_leaves, dims, strict=True)
    return tuple(leaf.placeholder for leaf, dim in leaves if leaf.placeholder and dim is None)
