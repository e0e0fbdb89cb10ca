"""Partition the step graph into regions: distribute the time loop (typed fusion).

Replaces one loop over the whole step by one region after the other. Nodes on a cycle of the dependence graph stay in a
loop over t. All other nodes form maximal connected convex regions of one kind: invariant nodes run once,
batch-equivariant nodes are folded, the rest is mapped over time. Legal because no value flows backwards in time between
regions and because regions are convex: no path leaves a region and returns to it. Regions grow greedily along edges in
program order (`snnfx.analysis.convex_regions`); unconnected branches are not joined, as borders are views without cost.
Source: Kennedy & McKinley 1993.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from snnfx.analysis.backward_linearity import has_nonlinear_backward
from snnfx.analysis.batch.equivariance import BatchAnalysis, infer_batch
from snnfx.analysis.batch.facts import Fact, model_input
from snnfx.analysis.batch.mixed_batch_sizes import find_mixed_batches_in_folds, has_mixed_batches_in_loop, sizes_of
from snnfx.analysis.batch_norm_folding import folds_time_into_dim_0
from snnfx.analysis.convex_regions import form_regions
from snnfx.analysis.dependence import Dependence, analyse_dependence, ancestors
from snnfx.analysis.statistic_reads import is_statistic_read, update_chains
from snnfx.errors import Refusal
from snnfx.ir.facts import (
    BATCH_DIM,
    BATCH_SIZES,
    FOLDS_DIM_0,
    KIND,
    MODULE,
    REFUSAL,
    REGION,
    SLOT,
    STEP_REFUSAL,
    SUNK,
    VALUE,
    VARYING,
)
from snnfx.ir.module_effects import estimates_weights, flags_of_updates, updates_buffers
from snnfx.ir.nodes import is_size, takes_from_tuple
from snnfx.ir.printing import operation_name
from snnfx.ir.program import SELF_TARGET, StepProgram
from snnfx.ir.setting_read import SettingRead
from snnfx.lowering.elementwise.elementwise_functions import prove_elementwise_functions
from snnfx.ops.step_functions import apply_autograd_function
from snnfx.passes.base import Pass
from snnfx.sandbox.torch_internals import BatchNormBase, InstanceNormBase, NormBase
from snnfx.state.step_calls import call_opaque

__all__ = ["Partition"]


@dataclass(frozen=True)
class Partition(Pass):
    """Assign a kind and a region to every node.

    Args:
        batch_norm: "fold" or "per_step", see `snnfx.convert`.
        invariant_inputs: placeholders of inputs that do not change with time.
    """

    name = "partition"
    requires = ("normalized", "partitioned")
    ensures = "partitioned"
    may_change = ("regions",)

    batch_norm: str = "fold"
    invariant_inputs: tuple[str, ...] = field(default=())

    def apply(self, program: StepProgram) -> str:
        prove_elementwise_functions(program)
        # Their backward needs the gradient of each step, not the sum over all steps.
        not_once = {node for node in self._invariant_functions(program) if has_nonlinear_backward(program, node)}
        dependence, analysis = self._analyse_updates(program, not_once)
        program.requirements = dict(analysis.requirements)
        for node in program.graph.nodes:
            VARYING.set(node, node in dependence.varying and not SUNK.of(node))
            BATCH_DIM.set(node, _batch_dim(analysis.facts.get(node)))
            BATCH_SIZES.set(node, frozenset(sizes_of(analysis.facts.get(node))))
            REFUSAL.clear(node)
        refusals = dict(analysis.refusals)
        while True:
            kinds = _kinds(program, dependence, refusals, self.batch_norm, not_once)
            program.regions = form_regions(program, dependence, kinds)
            mixed = find_mixed_batches_in_folds(program.regions, analysis.facts)
            if not mixed:
                break
            refusals.update(mixed)
        for region in program.regions:
            if region.kind == "loop" and has_mixed_batches_in_loop(region, analysis.facts):
                for node in region.nodes:
                    STEP_REFUSAL.set(node, True)
            for node in region.nodes:
                KIND.set(node, region.kind)
                REGION.set(node, region.name)
        counts = {kind: sum(r.kind == kind for r in program.regions) for kind in ("once", "fold", "map", "loop")}
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        return f"{sum(len(r.nodes) for r in program.regions)} nodes in {len(program.regions)} regions: {summary}"

    def _analyse_updates(self, program: StepProgram, not_once: Set[Node]) -> tuple[Dependence, BatchAnalysis]:
        """The analyses with the buffers found that are updated at every step, not once for the sequence.

        A buffer with several calls or reads is updated at every step if one of these calls is not folded. All its calls
        and reads are then stepped together.
        """
        chains = update_chains(program)
        stepped: set[Node] = set()
        while True:
            dependence, analysis = self._analyse(program, not_once, stepped)
            sequential, changing = dependence.sequential, self._updates_at_every_step(program, stepped)
            folds = self.batch_norm == "fold"
            unfolded = {n for n in analysis.refusals if not (folds and folds_time_into_dim_0(program, n))}
            more = [
                chain
                for chain in chains
                if not stepped.issuperset(chain)
                and any(not is_statistic_read(n) and (n in sequential or n in unfolded or changing(n)) for n in chain)
            ]
            if not more:
                return dependence, analysis
            stepped.update(node for chain in more for node in chain)

    def _analyse(
        self, program: StepProgram, not_once: Set[Node], stepped: Set[Node] = frozenset()
    ) -> tuple[Dependence, BatchAnalysis]:
        updates = self._updates_at_every_step(program, stepped)

        def changing(node: Node) -> bool:
            return node in not_once or updates(node)

        program.setting_reads = _with_flags(program, self.batch_norm)
        dependence = analyse_dependence(program, self.invariant_inputs, changing)
        analysis = infer_batch(
            program.graph,
            program.resolve,
            _input_facts(program),
            carried=dependence.carried,
            varying=dependence.varying,
            training=program.training,
            batch_norm=self.batch_norm,  # type: ignore[arg-type]
            training_of=program.is_in_training,
        )
        return dependence, analysis

    def _invariant_functions(self, program: StepProgram) -> list[Node]:
        """The calls of autograd functions on operands that do not change with time."""
        functions = [node for node in program.graph.nodes if node.target is apply_autograd_function]
        if not functions:
            return []
        updates = self._updates_at_every_step(program, frozenset())
        varying = analyse_dependence(program, self.invariant_inputs, updates).varying
        return [node for node in functions if node not in varying]

    def _updates_at_every_step(self, program: StepProgram, stepped: Set[Node]) -> Callable[[Node], bool]:
        """A predicate for calls that update their module at every step, even for an invariant input.

        In training mode, these are BatchNorms with statistics per step by option, InstanceNorms with running statistics
        and weights estimated by power iteration; opaque calls and the calls and reads in `stepped` always.
        """

        def changing(node: Node) -> bool:
            if node.target is call_opaque or node in stepped:
                return True
            if node.op != "call_module" or not updates_buffers(program, node):
                return False
            module = program.resolve(str(node.target))
            if isinstance(module, NormBase):
                return module.running_mean is not None and (
                    isinstance(module, InstanceNormBase) or self.batch_norm == "per_step"
                )
            return estimates_weights(module)

        return changing


def _with_flags(program: StepProgram, batch_norm: str) -> list[SettingRead]:
    """The setting reads with the `training` flags that decide how layers run; a net checks them at each call.

    A layer whose mode is not that of its model uses its own flag. Flags of layers that the step does not call are those
    of removed calls.
    """
    found: dict[str, SettingRead] = {}
    called: set[str] = set()
    outputs = ancestors([n for n in program.outputs if isinstance(n, Node)])
    for node in program.graph.nodes:
        target = str(node.target)
        if target in program.constants or not node.op.startswith("call"):
            continue
        flags = flags_of_updates(program, node)
        called.update(flag.owner for flag in flags)
        module = program.resolve(target) if node.op == "call_module" else None
        is_batch_norm = isinstance(module, BatchNormBase)
        tracks = bool(flags)
        if isinstance(module, NormBase) and ((tracks and batch_norm == "per_step") or (is_batch_norm and not tracks)):
            flag = program.mode_of(module)
            owner = "" if target == SELF_TARGET else target
            found[owner] = SettingRead(owner, "training", flag, str(flag))
        elif not program.training and (not is_batch_norm or node not in outputs):
            # With statistics over all steps, a BatchNorm whose value is needed runs alike in both modes.
            found.update((flag.owner, flag) for flag in flags)
    called.update(found)
    return [*(r for r in program.setting_reads if r.name != "training" or r.owner not in called), *found.values()]


def _input_facts(program: StepProgram) -> dict[Node, Fact]:
    """The facts of inputs: dim 0 is the batch; a size other than the first input's gets its own symbol."""
    facts: dict[Node, Fact] = {}
    batched: set[str] = set()
    first_size: int | None = None
    for node in program.input_nodes():
        value = VALUE.of(node)
        size = None if value is None or value.dim() == 0 else value.shape[0]
        if first_size is None:
            first_size = size
        shares_batch = value is None or (size is not None and size == first_size)
        if shares_batch:
            batched.add(node.name)
        if value is not None:
            program.input_ranks[node.name] = value.dim()
        facts[node] = model_input(node, "N" if shares_batch else f"N_{node.name}")
    program.batched_inputs = frozenset(batched)
    return facts


def _batch_dim(fact: Any) -> Any:
    """The batch dimension of a value: an int, None, or a tuple for a tuple."""
    if isinstance(fact, tuple | list):
        return tuple(_batch_dim(f) for f in fact)
    return fact.dim if isinstance(fact, Fact) else None


def _opaque(program: StepProgram, node: Node) -> Refusal | None:
    if node.target is not call_opaque:
        return None
    name = MODULE.of(node)
    what = f"`{name}`" if name else "the model"
    reason = f"{what} could not be traced: {program.opaque.get(name, 'it contains stateful modules')}"
    return Refusal("SNNFX108", reason, "It runs step by step, unchanged.")


def _kinds(
    program: StepProgram,
    dependence: Dependence,
    refusals: Mapping[Node, Refusal],
    batch_norm: str,
    not_once: Set[Node],
) -> dict[Node, str]:
    """The kind of region of each computing node; sets `REFUSAL` where it is not folded."""
    cycle_slots = {
        node: [SLOT.of(n) for n in cycle if SLOT.is_known(n)] for cycle in dependence.cycles for node in cycle
    }
    kinds: dict[Node, str] = {}
    for node in program.graph.nodes:
        STEP_REFUSAL.clear(node)
        FOLDS_DIM_0.clear(node)
        if node in cycle_slots:
            kinds[node] = "loop"
            if any(n in refusals for n in [node, *_size_ancestors(node)]):
                # Even with known states, the steps cannot be folded.
                STEP_REFUSAL.set(node, True)
            through = ", ".join(cycle_slots[node]) or "the buffers that a layer updates at each call"
            reason = f"its value depends on the previous step through {through}"
            REFUSAL.set(node, _opaque(program, node) or Refusal("SNNFX107", reason))
            continue
        if not node.op.startswith("call") or node in dependence.initial_only or is_size(node):
            continue
        # A size is recomputed in each region that reads it, so its refusal applies to its readers, whose own refusal
        # may only follow from it.
        refusal = next((refusals[n] for n in [*_size_ancestors(node), node] if n in refusals), None)
        estimates = node.op == "call_module" and estimates_weights(program.resolve(str(node.target)))
        if estimates and updates_buffers(program, node):
            refusal = Refusal("SNNFX109", f"`{node.target}` updates its weight estimate at each call")
        if node in not_once:
            reason = "its backward is not linear in the gradient, so each step runs it"
            refusal = Refusal("SNNFX109", reason)
        if refusal is not None and _splits_gradient_of_ties(node):
            reason = f"vmap passes the gradient of `{operation_name(node)}` to only one of equal values"
            refusal = Refusal("SNNFX109", reason)
        if node.target is call_opaque:
            REFUSAL.set(node, _opaque(program, node))
            kinds[node] = "loop"
        elif is_statistic_read(node):
            kinds[node] = "read"
        elif node not in dependence.varying or SUNK.of(node):
            kinds[node] = "once"
        elif refusal is None and not _reads_steps_without_batch(node, dependence):
            kinds[node] = "fold"
        elif batch_norm == "fold" and folds_time_into_dim_0(program, node):
            FOLDS_DIM_0.set(node, True)
            kinds[node] = "norm"
        else:
            refusal = refusal or Refusal("SNNFX102", "an operand is mapped and has no batch dimension")
            REFUSAL.set(node, refusal)
            kinds[node] = {"SNNFX106": "per_step", "SNNFX109": "step"}.get(refusal.code, "map")
            if kinds[node] == "per_step" and isinstance(program.module_of(node), InstanceNormBase):
                kinds[node] = "step"  # vmap cannot update its running statistics
    for node in program.graph.nodes:
        # An element of a tuple belongs to the region of the tuple, even if only an initial value reads it.
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and source in kinds and takes_from_tuple(node):
            kinds[node] = kinds[source]
            if kinds[node] == "loop" and (source.target is call_opaque or REFUSAL.of(source) is None):
                REFUSAL.clear(node)  # the refusal concerns the call, not its elements
    return kinds


def _splits_gradient_of_ties(node: Node) -> bool:
    """Whether the node reduces all elements to an extremum, where torch splits the gradient among ties."""
    return operation_name(node) in ("max", "min", "median", "nanmedian") and len(node.args) == 1 and not node.kwargs


def _reads_steps_without_batch(node: Node, dependence: Dependence) -> bool:
    """Whether an operand is a mapped value without a batch, which a fold cannot read."""
    return any(
        operand in dependence.varying
        and BATCH_DIM.of(operand) is None
        and (REFUSAL.is_known(operand) or FOLDS_DIM_0.is_known(operand))
        for operand in node.all_input_nodes
        if operand.op.startswith("call") and not is_size(operand)
    )


def _size_ancestors(node: Node) -> list[Node]:
    """The sizes that a node depends on through sizes only."""
    found: list[Node] = []
    stack = list(node.all_input_nodes)
    while stack:
        operand = stack.pop()
        if is_size(operand) and operand not in found:
            found.append(operand)
            stack.extend(operand.all_input_nodes)
    return found
