"""Mark the layers that may visit only the inputs that are not zero (sparse evaluation of spikes).

Replaces a linear layer or convolution of a fold, which multiplies all its inputs, by a call that adds the weights of
the active inputs if there are few of them. The pass marks layers whose input comes from a neuron or a comparison, also
through views, poolings, concatenations and sums, and products of two matrices of which one does, as in attention;
`snnfx.lowering.events` measures the density at each call and decides.
The products of a lowered loop are marked as well: `snnfx.lowering.mixed` counts the density of each row and decides.
Legal because a product with a zero adds nothing; the sums are in another order, so results differ by rounding.
Source: event-driven simulation, reviewed by Brette et al., "Simulation of networks of spiking neurons", 2007.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from snnfx.analysis.lowerable_loops import mixing_node
from snnfx.analysis.spike_operands import is_matrix_product, operands_from_spikes, reads_spikes
from snnfx.ir.facts import EVENTS, LOOP_EVENTS, SITE, SPIKES
from snnfx.ir.program import StepProgram
from snnfx.ir.sites import new_site
from snnfx.lowering.events.event_layers import FUNCTIONS
from snnfx.lowering.events.layer_decisions import LAYERS
from snnfx.passes.base import Pass

__all__ = ["ChooseEventLayers"]


@dataclass(frozen=True)
class ChooseEventLayers(Pass):
    """Mark layers and loops that may run by events (the facts `EVENTS` and `LOOP_EVENTS`)."""

    name = "choose_event_layers"
    requires = "partitioned"
    may_change = ()

    def apply(self, program: StepProgram) -> str:
        for node in program.graph.nodes:
            EVENTS.clear(node)
            SPIKES.clear(node)
            SITE.clear(node)
            LOOP_EVENTS.clear(node)
        marked = [
            node
            for region in program.regions
            if region.kind == "fold"
            for node in region.nodes
            if _reads_spikes(program, node)
        ]
        for node in marked:
            EVENTS.set(node, True)
            if is_matrix_product(node):
                SPIKES.set(node, operands_from_spikes(program, node))
                SITE.set(node, new_site())
        loops = [region for region in program.regions if region.kind == "loop" and region.lowering_refusal == ""]
        for mixing in (mixing_node(program, region) for region in loops):
            if mixing is not None:
                LOOP_EVENTS.set(mixing, True)
        return f"{', '.join(node.name for node in marked) or 'nothing'} may run by events"


def _reads_spikes(program: StepProgram, node: Node) -> bool:
    if is_matrix_product(node):
        return bool(operands_from_spikes(program, node))
    is_layer = node.op == "call_module" and type(program.resolve(str(node.target))) in LAYERS and len(node.args) == 1
    is_function = node.op == "call_function" and node.target in FUNCTIONS
    return (is_layer or is_function) and reads_spikes(program, node)
