"""Split fold regions at products and batch statistics, for graphs that recompute parts in backward.

`fold(pool, conv, bn)` becomes `fold(pool)`, `fold(conv)` and the normalisation. Products (convolutions, linear layers,
attention) take most of the time, and their gradients need only their inputs. The operations between products take
little time but most of the memory, so they are cheap to recompute (Korthikanti et al. 2022). Normalisation needs the
statistics of all time steps; given these, it runs on any slice of the sequence. Any split of a fold is legal because
the parts are batch-equivariant and exchange views.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.fx import Node, map_arg

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.dependence import is_random, may_be_random, operands_through_sizes
from snnfx.analysis.first_step_match import match_first_step
from snnfx.analysis.lowerable_loops import mixing_node, reason_against_kernel
from snnfx.analysis.statistics_over_time import takes_batch_statistics
from snnfx.emit.emitter import TargetName
from snnfx.emit.multi_step import emit_multi_step
from snnfx.emit.plain_graph import emit_plain
from snnfx.emit.region_builder import same_for_all_samples
from snnfx.functional import seq_to_ann_forward
from snnfx.ir.facts import BATCH_DIM, BATCH_SIZES, REFUSAL, REGION_NAME, STEP_NODE, STEP_REFUSAL, VARYING
from snnfx.ir.module_effects import statistics_of_function
from snnfx.ir.nodes import is_size, takes_from_tuple
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.operator_lookup import traits_of_name
from snnfx.ops.step_batch_norm import batch_norm_per_step
from snnfx.recompute.batch_statistics import batch_statistics, normalize, step_statistics
from snnfx.state.leaf_modules import has_torch_forward

__all__ = ["LIGHT", "NORM", "PRODUCT", "FoldPart", "emit_parts", "split_folds"]

LIGHT, PRODUCT, NORM = "light", "product", "norm"


@dataclass(frozen=True)
class FoldPart:
    """A region, or a part of a fold region.

    Args:
        region: the nodes of the part.
        role: "light" for a part that is cheap to recompute, "product" for an expensive part, "norm" for a BatchNorm
            that may take statistics; "" for a region that stays outside tiles.
        is_random: whether the part draws random numbers.
        by_steps: whether the part may run on slices of the time steps.
        by_samples: whether the part may run on slices of the batch.
    """

    region: Region
    role: str
    is_random: bool = False
    by_steps: bool = False
    by_samples: bool = False


def split_folds(program: StepProgram) -> list[FoldPart]:
    """The regions of a partitioned program with its folds split into parts, in execution order."""
    match = match_first_step(program)
    # The first step of such a loop is another graph, which may mix samples.
    whole = match.loops if match is not None else {}
    return [part for region in program.regions for part in _parts_of(program, region, region.name in whole)]


def _parts_of(program: StepProgram, region: Region, is_whole: bool) -> list[FoldPart]:
    if is_whole:
        return [FoldPart(region, "")]
    if region.kind == "fold":
        return _Fold(program, region).parts()
    if region.kind == "map" and len(region.nodes) == 1 and _takes_statistics_of_steps(region.nodes[0]):
        return [FoldPart(region, NORM if _is_batch_norm(program, region.nodes[0]) else "")]
    if region.kind not in ("map", "loop") or any(map(statistics_of_function, region.nodes)):
        # Recomputation copies the buffers of modules only, so a function must not update its buffers again.
        return [FoldPart(region, "")]
    reasons = (
        reason_against_kernel(program, region) or mixing_node(program, region) or _any(program, region, may_be_random)
    )
    return [_classify(program, region, LIGHT if region.kind == "loop" and not reasons else PRODUCT)]


def _classify(program: StepProgram, region: Region, role: str) -> FoldPart:
    is_random = _any(program, region, may_be_random)
    by_steps = not is_random and not _any(program, region, takes_batch_statistics)
    by_samples = by_steps and region.kind != "map" and (region.kind == "fold" or _steps_by_sample(region))
    return FoldPart(region, role, is_random, by_steps, by_samples)


def _any(program: StepProgram, region: Region, predicate: Any) -> bool:
    return any(predicate(program, node) for node in region.nodes)


def _steps_by_sample(region: Region) -> bool:
    """Whether a step of a loop, state included, is batch-equivariant."""
    nodes = [n for n in region.nodes if not is_size(n) and VARYING.of(n)]
    return all(not STEP_REFUSAL.is_known(n) and _is_batch_first(BATCH_DIM.of(n)) for n in nodes)


def _is_batch_first(dim: Any) -> bool:
    return all(map(_is_batch_first, dim)) if isinstance(dim, tuple) else dim == 0


class _Fold:
    """Splits one fold into parts: connected nodes of one kind.

    A node is in the phase of its operands if it has their kind, and otherwise in the next phase. So no value flows from
    a part to an earlier part.
    """

    def __init__(self, program: StepProgram, region: Region) -> None:
        self.program, self.region = program, region
        self.kind: dict[Node, str] = {}
        self.phase: dict[Node, int] = {}
        self.group: dict[Node, Node] = {}
        inside = set(region.nodes)
        for node in region.nodes:
            operands = [n for n in operands_through_sizes(node) if n in inside]
            source = next((n for n in operands), None)
            if source is not None and (is_size(node) or takes_from_tuple(node)):
                self.kind[node], self.phase[node] = self.kind[source], self.phase[source]
            else:
                self.kind[node] = kind = _kind_of(program, node)
                phases = [self.phase[n] + (0 if kind != NORM and self.kind[n] == kind else 1) for n in operands]
                self.phase[node] = max(phases, default=0)
            self.group[node] = node
            for n in operands:
                if self._key(n) == self._key(node) and self.kind[node] != NORM:
                    self._join(n, node)

    def _key(self, node: Node) -> tuple[int, str]:
        return self.phase[node], self.kind[node]

    def _find(self, node: Node) -> Node:
        while self.group[node] is not node:
            node = self.group[node]
        return node

    def _join(self, a: Node, b: Node) -> None:
        self.group[self._find(b)] = self._find(a)

    def parts(self) -> list[FoldPart]:
        """The parts in execution order; the whole fold if values between the parts would not have a plain batch."""
        groups: dict[Node, list[Node]] = {}
        for node in self.region.nodes:
            groups.setdefault(self._find(node), []).append(node)
        ordered = sorted(groups.values(), key=lambda nodes: self.phase[nodes[0]])
        if len(ordered) == 1 and self.kind[ordered[0][0]] != NORM:
            return [_classify(self.program, self.region, self.kind[ordered[0][0]])]
        if not all(map(self._has_plain_borders, self.region.nodes)) or not all(map(_takes_one_batch, ordered)):
            return [_classify(self.program, self.region, PRODUCT)]
        parts, names = [], _names(self.region.name, [self.kind[nodes[0]] for nodes in ordered])
        for nodes, name in zip(ordered, names, strict=True):
            kind = self.kind[nodes[0]]
            region = replace(self.region, name=name, nodes=nodes)
            parts.append(FoldPart(region, NORM) if kind == NORM else _classify(self.program, region, kind))
        return parts

    def _has_plain_borders(self, node: Node) -> bool:
        if is_size(node):
            return True
        inside = [user for user in node.users if user in self.group]
        if all(self._find(user) is self._find(node) for user in inside):
            return True
        return isinstance(BATCH_DIM.of(node), int) and not same_for_all_samples(node)


def _takes_one_batch(nodes: Sequence[Node]) -> bool:
    """Whether the inputs of a part have one batch size: a fold may merge other dimensions into its batch."""
    outside = {n for node in nodes for n in operands_through_sizes(node)} - set(nodes)
    return len({size for node in outside for size in BATCH_SIZES.of(node)}) < 2


def _names(name: str, kinds: Sequence[str]) -> list[str]:
    """A name for each part of a fold; the first product keeps the name of the fold."""
    first_product = kinds.index(PRODUCT) if PRODUCT in kinds else None
    names, count = [], 0
    for index, kind in enumerate(kinds):
        if index == first_product:
            names.append(name)
            continue
        count += 1
        names.append(f"{name}_{'norm' if kind == NORM else 'part'}_{count}")
    return names


def _takes_statistics_of_steps(node: Node) -> bool:
    refusal = REFUSAL.of(node)
    return node.op == "call_module" and refusal is not None and refusal.code == "SNNFX106"


def _kind_of(program: StepProgram, node: Node) -> str:
    if _is_batch_norm(program, node) and BATCH_DIM.of(node) == 0 == BATCH_DIM.of(node.args[0]):  # type: ignore[arg-type]
        return NORM
    is_expensive = _is_product(program, node) or is_random(program, node) or takes_batch_statistics(program, node)
    return PRODUCT if is_expensive else LIGHT


def _is_batch_norm(program: StepProgram, node: Node) -> bool:
    """Whether a node calls a BatchNorm with the forward of torch."""
    module = program.module_of(node)
    if node.op != "call_module" or not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return False
    return has_torch_forward(module) and len(node.args) == 1 and not node.kwargs


def _is_product(program: StepProgram, node: Node) -> bool:
    """Whether a node is a product, or an unknown operation, which may be one."""
    rule = find_rule(node, program.resolve)
    return rule is None or traits_of_name(rule.name).product


def emit_parts(
    program: StepProgram,
    parts: Sequence[FoldPart],
    container: str,
    target_name: TargetName,
    regions: dict[str, nn.Module],
    reduce: str | None,
    plain: tuple[Sequence[int | None], int] | None,
) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """Emit a program with its folds split into parts: `(graph, region modules by name)`.

    Args:
        program: a program at stage "partitioned".
        parts: the parts that `split_folds` returned.
        container, target_name, reduce: as for `emit_multi_step`.
        regions: the modules of the regions that were not split, which this graph shares.
        plain: `time_dims` and `output_time_dim` of the plain graph; None: the graph with state.
    """
    program = replace(program, regions=[part.region for part in parts])
    if plain is None:
        emitted = emit_multi_step(program, container, target_name, reduce=reduce)
    else:
        emitted = emit_plain(program, container, target_name, regions, *plain, reduce)
    norms = {part.region.name: part.region for part in parts if part.role == NORM}
    return _split_norms(emitted.graph, norms), {**emitted.regions, **regions}


def _split_norms(graph: fx.Graph, norms: Mapping[str, Region]) -> fx.Graph:
    """The graph with each BatchNorm split into its statistics and the normalisation."""
    by_node = {region.nodes[0].name: name for name, region in norms.items() if region.kind == "map"}
    new = fx.Graph()
    env: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.target is batch_norm_per_step and STEP_NODE.of(node) in by_node:
            x_seq, module = (env[n] for n in node.all_input_nodes)
            env[node] = _normalize(new, x_seq, module, by_node[STEP_NODE.of(node)], per_step=True)
            env[node].meta.update(node.meta)
        elif node.target is seq_to_ann_forward and (name := _region_of(node)) in norms:
            (x_seq,), (module,) = (
                map_arg(operands, env.__getitem__) for operands in (node.args[0], node.kwargs["constants"])
            )
            env[node] = _normalize(new, x_seq, module, name, per_step=False)
        elif node.target is operator.getitem and isinstance(node.args[0], Node) and _region_of(node.args[0]) in norms:
            env[node] = env[node.args[0]]  # `normalize` returns a tensor, not a tuple
            env[node].meta.update(node.meta)
        else:
            env[node] = new.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    return new


def _region_of(node: Node) -> str:
    is_fold = node.op == "call_function" and node.target is seq_to_ann_forward
    return str(node.args[1].target).rpartition(".")[2] if is_fold else ""  # type: ignore[union-attr]


def _normalize(graph: fx.Graph, x_seq: Node, module: Node, name: str, per_step: bool) -> Node:
    statistics = graph.call_function(
        step_statistics if per_step else batch_statistics, (x_seq, module), name=f"{name}_statistics"
    )
    REGION_NAME.set(statistics, f"{name}_stats")
    mean, var = (graph.call_function(operator.getitem, (statistics, index)) for index in range(2))
    options: dict[str, Any] = {"per_step": True} if per_step else {}
    value = graph.call_function(normalize, (x_seq, mean, var, module), options, name=name)
    REGION_NAME.set(value, name)
    return value
