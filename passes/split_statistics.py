"""Split folds at their batch statistics, so that what comes before them may go through the sequence in chunks.

`fold(pool, conv, bn)` becomes `fold(pool, conv)` and `fold(bn)`: BatchNorm in training needs all steps, pooling and
convolution do not. Legal for any cut of a fold: both parts are batch-equivariant, and borders are views. Used only for
forms of the graph that compute parts again in backward.
"""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx, nn
from torch.fx import Node

from snnfx.functional import seq_to_ann_forward
from snnfx.passes.dependence import is_random, is_size
from snnfx.passes.region_builder import RegionBuilder, same_for_all_samples
from snnfx.program import Region, StepProgram, keeps_statistics

__all__ = ["split_statistics"]


def split_statistics(
    program: StepProgram, graph: fx.Graph, container: str
) -> tuple[fx.Graph, list[Region], dict[str, nn.Module]]:
    """The emitted graph with such folds split.

    Args:
        program: what the graph was emitted from.
        graph: as `passes.emit` makes it; it is not changed.
        container: where the net will keep the modules of the parts.

    Returns:
        The graph, the regions that it runs (the parts are called "fold_2" and "fold_2_statistics"), and the new modules
        by name.
    """
    new = fx.Graph()
    env: dict[Node, Node] = {}
    modules: dict[str, nn.Module] = {}
    regions = {region.name: [region] for region in program.regions}
    for node in graph.nodes:
        if node in env:
            continue
        name = _fold_name(node)
        parts = _parts(program, regions[name][0], node) if name else None
        if parts is None:
            env[node] = new.node_copy(node, env.__getitem__)
            continue
        assert name is not None
        whole = regions[name][0]
        regions[name] = parts
        _emit_parts(program, node, whole, parts, new, env, container, modules)
    return new, [part for group in regions.values() for part in group], modules


def _fold_name(node: Node) -> str | None:
    if node.op == "call_function" and node.target is seq_to_ann_forward:
        return str(node.args[1].target).rpartition(".")[2]  # type: ignore[union-attr]
    return None


def _parts(program: StepProgram, region: Region, call: Node) -> list[Region] | None:
    """What comes before any statistics, and the rest; None where there is nothing to gain or the cut is not plain."""
    if "batch_dim" in call.kwargs or "out_batch_dim" in call.kwargs:
        return None
    late: dict[Node, None] = {}
    for node in region.nodes:
        if keeps_statistics(program, node) or is_random(program, node) or any(n in late for n in node.all_input_nodes):
            late[node] = None
    early = [node for node in region.nodes if node not in late]
    if not late or not any(node.op == "call_module" for node in early):
        return None
    if any("step_node" not in user.meta for user in call.users):
        return None
    crossing = _crossing(program, region, early, late)
    if any(n.meta.get("batch_dim") != 0 or same_for_all_samples(n) for n in (*crossing, *_read_outside(call, region))):
        return None
    return [replace(region, nodes=early), replace(region, name=f"{region.name}_statistics", nodes=list(late))]


def _crossing(program: StepProgram, region: Region, early: list[Node], late: dict[Node, None]) -> list[Node]:
    needed = set(RegionBuilder(program, list(late), []).inputs)
    return [node for node in early if node in needed and not is_size(node)]


def _read_outside(call: Node, region: Region) -> list[Node]:
    names = {user.meta.get("step_node") for user in call.users}
    return [node for node in region.nodes if node.name in names]


def _emit_parts(
    program: StepProgram,
    call: Node,
    region: Region,
    parts: list[Region],
    new: fx.Graph,
    env: dict[Node, Node],
    container: str,
    modules: dict[str, nn.Module],
) -> None:
    early, late = parts
    whole = RegionBuilder(program, region.nodes, [])
    values: dict[Node, Node] = {n: env[x] for n, x in zip(whole.inputs, call.args[0], strict=True)}  # type: ignore[arg-type]
    constants = dict(zip(whole.constants, call.kwargs.get("constants", ()), strict=True))  # type: ignore[arg-type]
    outside = {node.name: node for node in _read_outside(call, region)}
    crossing = _crossing(program, early, early.nodes, dict.fromkeys(late.nodes))
    for part, more in ((early, crossing), (late, [])):
        builder = RegionBuilder(program, part.nodes, [])
        wanted = list(dict.fromkeys([*(n for n in part.nodes if n.name in outside), *more]))
        name = part.name if part is late else f"{part.name}_start"
        modules[name] = builder.graph_module(wanted)
        given = tuple(env[constants[key]] for key in builder.constants)
        inputs = tuple(values[n] for n in builder.inputs)
        attribute = new.get_attr(f"{container}.{name}")
        made = new.call_function(
            seq_to_ann_forward, (inputs, attribute), {"constants": given} if given else {}, name=part.name
        )
        made.meta["region_name"] = part.name
        for index, node in enumerate(wanted):
            values[node] = new.call_function(operator.getitem, (made, index))
            kept = ("where", "module", "val", "region", "varying")
            values[node].meta.update({k: v for k, v in node.meta.items() if k in kept}, step_node=node.name)
    env[call] = made  # its elements are made here
    for user in call.users:
        env[user] = values[outside[user.meta["step_node"]]]
