"""How a region of a net runs: as a kernel, stepped, dense or by events."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from snnfx.analysis.lowerable_loops import has_only_linear_products, mixing_node
from snnfx.inspect.event_layers import event_decision
from snnfx.ir.program import Region, StepProgram
from snnfx.lowering.elementwise.back_end_choice import reason_without_back_end
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.region_modules import LoopRegion, MapRegion

__all__ = ["how_region_ran", "how_region_will_run"]


def how_region_ran(program: StepProgram, region: Region, module: nn.Module | None) -> str:
    """How the latest call ran a region, e.g. "kernel"; "" if unknown.

    Args:
        program: the program of the region.
        region: the region.
        module: what the net runs for it.
    """
    if isinstance(module, LoopRegion):
        lowered = module.kernels.in_use if module.kernels is not None else None
        if lowered is None:
            return "stepped"
        return "stepped, with kernels" if isinstance(lowered, MixedStep) and lowered.reason_for_python else "kernel"
    if isinstance(module, MapRegion):
        return "vmap over T" if not module.refused_by_vmap else "stepped"
    decisions = [event_decision(program, node) for node in region.nodes]
    by_events = [decision.by_events for decision in decisions if decision is not None]
    if any(by_events):
        return "by events" if all(by_events) else "dense and by events"
    return {"fold": "dense, T in the batch", "once": "once"}.get(region.kind, "")


def how_region_will_run(program: StepProgram, region: Region, module: nn.Module | None, device: torch.device) -> str:
    """How the latest call ran a region; before the first call, how a call is expected to run a loop."""
    if not isinstance(module, LoopRegion):
        return how_region_ran(program, region, module)
    kernels = module.kernels
    if kernels is None or kernels.reason_for_steps or region.lowering_refusal:
        return "stepped"
    if kernels.in_use is not None:
        return how_region_ran(program, region, module)
    if reason_without_back_end(device):
        return "stepped"
    # An absorbed layer is one multiplication and one addition in the kernel.
    own = replace(region, nodes=[node for node in region.nodes if node.name not in region.absorbed])
    if mixing_node(program, own) is None or has_only_linear_products(program, own):
        return "kernel"
    return "stepped, with kernels"
