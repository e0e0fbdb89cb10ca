"""Passes: graph transformations of a step program, and the pass manager that runs them."""

from __future__ import annotations

if __name__ != "snnfx.passes":
    raise ImportError("this folder is the package snnfx.passes: write `import snnfx.passes`, not `import passes`")

from snnfx.passes.absorb import Absorb
from snnfx.passes.base import Match, Pass, PassManager, Rewrite, StepProgram, call, verify_program
from snnfx.passes.choose_event_layers import ChooseEventLayers
from snnfx.passes.choose_memory_format import ChooseMemoryFormat
from snnfx.passes.cut_layers import CutLayers
from snnfx.passes.cut_spatial_edges import CutSpatialEdges
from snnfx.passes.cut_temporal_edges import CutTemporalEdges
from snnfx.passes.fold_batch_norm import FoldBatchNorm
from snnfx.passes.hold_dropout import HoldDropout
from snnfx.passes.lower import Lower
from snnfx.passes.normalize import Normalize
from snnfx.passes.partition import Partition
from snnfx.passes.read_states_as_inputs import ReadStatesAsInputs
from snnfx.passes.remove_dead_code import RemoveDeadCode
from snnfx.passes.sink_reductions import SinkReductions
from snnfx.passes.standard_pipeline import pipeline
from snnfx.passes.tap_layers import TapLayers
from snnfx.passes.trace_operands import TraceOperands

__all__ = [
    "Absorb",
    "ChooseEventLayers",
    "ChooseMemoryFormat",
    "CutLayers",
    "CutSpatialEdges",
    "CutTemporalEdges",
    "FoldBatchNorm",
    "HoldDropout",
    "Lower",
    "Match",
    "Normalize",
    "Partition",
    "Pass",
    "PassManager",
    "ReadStatesAsInputs",
    "RemoveDeadCode",
    "Rewrite",
    "SinkReductions",
    "StepProgram",
    "TapLayers",
    "TraceOperands",
    "call",
    "pipeline",
    "verify_program",
]
