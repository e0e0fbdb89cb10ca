"""Split folds at what multiplies and at batch statistics, for forms of the graph that compute parts again in backward.

`fold(pool, conv, bn)` becomes `fold(pool)`, `fold(conv)` and the normalisation. Products (convolutions, linear layers,
attention) take most of the time, and their gradient needs no more than what goes into them. What lies between takes
little time and holds most of the memory: it is cheap to compute again (Korthikanti et al. 2022). Normalising needs the
statistics of all steps, but with these at hand it can be done on any part of the sequence. Legal for any cut of a fold:
the parts are batch-equivariant, and their borders are views.
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
from snnfx.analysis.lowerable_loops import mixing_node, reason_against_kernel
from snnfx.emit.emitter import TargetName
from snnfx.emit.multi_step import emit_multi_step
from snnfx.emit.plain_graph import emit_plain
from snnfx.emit.region_builder import same_for_all_samples
from snnfx.functional import seq_to_ann_forward
from snnfx.ir.module_effects import keeps_statistics
from snnfx.ir.nodes import is_size, takes_from_tuple
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.step_batch_norm import batch_norm_per_step
from snnfx.recompute.batch_statistics import batch_statistics, normalize, step_statistics
from snnfx.sandbox.torch_internals import BatchNormBase
from snnfx.state.leaf_modules import has_torch_forward

__all__ = ["LIGHT", "NORM", "PRODUCT", "FoldPart", "emit_parts", "split_folds", "takes_batch_statistics"]

LIGHT, PRODUCT, NORM = "light", "product", "norm"


@dataclass(frozen=True)
class FoldPart:
    """A region, or a part of one.

    Args:
        region: what it computes.
        role: "light" for what is cheap to compute again, "product" for what is not, or "norm" for a BatchNorm that may
            take statistics; "" for what is neither over time nor in a region of its own.
        is_random: whether it draws random numbers.
        by_steps, by_samples: whether it may be run on some time steps, or samples, after the others.
    """

    region: Region
    role: str
    is_random: bool = False
    by_steps: bool = False
    by_samples: bool = False


def split_folds(program: StepProgram) -> list[FoldPart]:
    """The regions of a partitioned program, folds in parts, in an order in which they can run."""
    return [part for region in program.regions for part in _parts_of(program, region)]


def _parts_of(program: StepProgram, region: Region) -> list[FoldPart]:
    if region.kind == "fold":
        return _Fold(program, region).parts()
    if region.kind == "map" and len(region.nodes) == 1 and _takes_statistics_of_steps(region.nodes[0]):
        return [FoldPart(region, NORM if _is_batch_norm(program, region.nodes[0]) else "")]
    if region.kind not in ("map", "loop"):
        return [FoldPart(region, "")]
    reasons = (
        reason_against_kernel(program, region) or mixing_node(program, region) or _any(program, region, may_be_random)
    )
    return [_described(program, region, LIGHT if region.kind == "loop" and not reasons else PRODUCT)]


def _described(program: StepProgram, region: Region, role: str) -> FoldPart:
    is_random = _any(program, region, may_be_random)
    by_steps = not is_random and not _any(program, region, takes_batch_statistics)
    by_samples = by_steps and region.kind != "map" and (region.kind == "fold" or _steps_by_sample(region))
    return FoldPart(region, role, is_random, by_steps, by_samples)


def _any(program: StepProgram, region: Region, holds: Any) -> bool:
    return any(holds(program, node) for node in region.nodes)


def _steps_by_sample(region: Region) -> bool:
    """Whether a step of a loop is batch-equivariant, its state too."""
    nodes = [n for n in region.nodes if not is_size(n) and n.meta.get("varying", True)]
    return all("step_refusal" not in n.meta and _is_in_front(n.meta.get("batch_dim")) for n in nodes)


def _is_in_front(dim: Any) -> bool:
    return all(map(_is_in_front, dim)) if isinstance(dim, tuple) else dim == 0


class _Fold:
    """One fold in parts: nodes of one kind that hang together.

    A node is in the phase after those of its operands, or in theirs if it is of their kind. So no value goes from a
    part to a part that runs before it.
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
                alike = kind != NORM
                phases = [self.phase[n] + (0 if alike and self.kind[n] == kind else 1) for n in operands]
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
        """The parts in an order in which they can run; the fold as it is where a border would not be plain."""
        groups: dict[Node, list[Node]] = {}
        for node in self.region.nodes:
            groups.setdefault(self._find(node), []).append(node)
        ordered = sorted(groups.values(), key=lambda nodes: self.phase[nodes[0]])
        if len(ordered) == 1 and self.kind[ordered[0][0]] != NORM:
            return [_described(self.program, self.region, self.kind[ordered[0][0]])]
        if not all(map(self._has_plain_borders, self.region.nodes)) or not all(map(_takes_one_batch, ordered)):
            return [_described(self.program, self.region, PRODUCT)]
        found, names = [], _names(self.region.name, [self.kind[nodes[0]] for nodes in ordered])
        for nodes, name in zip(ordered, names, strict=True):
            kind = self.kind[nodes[0]]
            region = replace(self.region, name=name, nodes=nodes)
            found.append(FoldPart(region, NORM) if kind == NORM else _described(self.program, region, kind))
        return found

    def _has_plain_borders(self, node: Node) -> bool:
        if is_size(node):
            return True
        inside = [user for user in node.users if user in self.group]
        if all(self._find(user) is self._find(node) for user in inside):
            return True
        return isinstance(node.meta.get("batch_dim"), int) and not same_for_all_samples(node)


def _takes_one_batch(nodes: Sequence[Node]) -> bool:
    """Whether what comes into a part has batches of one size: others may be merged into it inside of a fold."""
    outside = {n for node in nodes for n in operands_through_sizes(node)} - set(nodes)
    return len({size for node in outside for size in node.meta.get("batch_sizes", ())}) < 2


def _names(name: str, kinds: Sequence[str]) -> list[str]:
    """A name for each part of a fold; the first product has that of the fold."""
    first = kinds.index(PRODUCT) if PRODUCT in kinds else None
    found, count = [], 0
    for index, kind in enumerate(kinds):
        if index == first:
            found.append(name)
            continue
        count += 1
        found.append(f"{name}_{'norm' if kind == NORM else 'part'}_{count}")
    return found


def _takes_statistics_of_steps(node: Node) -> bool:
    refusal = node.meta.get("refusal")
    return node.op == "call_module" and refusal is not None and refusal.code == "SNNFX106"


def _kind_of(program: StepProgram, node: Node) -> str:
    if _is_batch_norm(program, node) and node.meta.get("batch_dim") == 0 == node.args[0].meta.get("batch_dim"):  # type: ignore[union-attr]
        return NORM
    dear = _multiplies(program, node) or is_random(program, node) or takes_batch_statistics(program, node)
    return PRODUCT if dear else LIGHT


def _is_batch_norm(program: StepProgram, node: Node) -> bool:
    """Whether a node calls a BatchNorm that computes what torch's does."""
    module = program.module_of(node)
    if node.op != "call_module" or not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return False
    return has_torch_forward(module) and len(node.args) == 1 and not node.kwargs


def takes_batch_statistics(program: StepProgram, node: Node) -> bool:
    """Whether what a node computes for some steps in training depends on the others: it takes statistics."""
    module = program.module_of(node)
    if module is not None and any(isinstance(m, BatchNormBase) for m in module.modules()):
        return True
    if keeps_statistics(program, node):
        return True
    found = find_rule(node, program.resolve)
    return found is not None and found.name in ("batch_norm", "instance_norm")


def _multiplies(program: StepProgram, node: Node) -> bool:
    """Whether a node is a product, or not known to be none."""
    found = find_rule(node, program.resolve)
    return found is None or found.name in _PRODUCTS


_PRODUCTS = frozenset(
    "matmul mm bmm mv addmm addmv baddbmm linear bilinear einsum conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d scaled_dot_product_attention embedding nn.MultiheadAttention "
    "nn.TransformerEncoder nn.RNNCell nn.RNN call_opaque call_stateful".split()
)


def emit_parts(
    program: StepProgram,
    parts: Sequence[FoldPart],
    container: str,
    target_name: TargetName,
    regions: dict[str, nn.Module],
    reduce: str | None,
    plain: tuple[Sequence[int | None], int] | None,
) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """Emit a program in parts: the graph, and the modules that it runs.

    Args:
        program: at stage "partitioned".
        parts: from `split_folds`.
        container, target_name, reduce: as for `passes.emit`.
        regions: the modules of the regions that were not split, used again.
        plain: `time_dims` and `output_time_dim` of the plain form; None: the form with state.
    """
    program = replace(program, regions=[part.region for part in parts])
    if plain is None:
        emitted = emit_multi_step(program, container, target_name, reduce=reduce)
    else:
        emitted = emit_plain(program, container, target_name, regions, *plain, reduce)
    norms = {part.region.name: part.region for part in parts if part.role == NORM}
    return _with_statistics(emitted.graph, norms), {**emitted.regions, **regions}


def _with_statistics(graph: fx.Graph, norms: Mapping[str, Region]) -> fx.Graph:
    """The graph with each BatchNorm as its statistics and the normalisation."""
    by_node = {region.nodes[0].name: name for name, region in norms.items() if region.kind == "map"}
    new = fx.Graph()
    env: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.target is batch_norm_per_step and node.meta["step_node"] in by_node:
            x_seq, module = (env[n] for n in node.all_input_nodes)
            env[node] = _normalized(new, x_seq, module, by_node[node.meta["step_node"]], per_step=True)
            env[node].meta.update(node.meta)
        elif node.target is seq_to_ann_forward and (name := _region_of(node)) in norms:
            (x_seq,), (module,) = (
                map_arg(given, env.__getitem__) for given in (node.args[0], node.kwargs["constants"])
            )
            env[node] = _normalized(new, x_seq, module, name, per_step=False)
        elif node.target is operator.getitem and isinstance(node.args[0], Node) and _region_of(node.args[0]) in norms:
            env[node] = env[node.args[0]]  # the tensor itself
            env[node].meta.update(node.meta)
        else:
            env[node] = new.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    return new


def _region_of(node: Node) -> str:
    is_fold = node.op == "call_function" and node.target is seq_to_ann_forward
    return str(node.args[1].target).rpartition(".")[2] if is_fold else ""  # type: ignore[union-attr]


def _normalized(graph: fx.Graph, x_seq: Node, module: Node, name: str, per_step: bool) -> Node:
    taken = graph.call_function(
        step_statistics if per_step else batch_statistics, (x_seq, module), name=f"{name}_statistics"
    )
    taken.meta["region_name"] = f"{name}_stats"
    mean, var = (graph.call_function(operator.getitem, (taken, index)) for index in range(2))
    options: dict[str, Any] = {"per_step": True} if per_step else {}
    value = graph.call_function(normalize, (x_seq, mean, var, module), options, name=name)
    value.meta["region_name"] = name
    return value
