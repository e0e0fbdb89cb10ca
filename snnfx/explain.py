"""`snnfx.explain`: what a conversion does with each part of a model, and why."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from snnfx.convert import convert
from snnfx.errors import CaptureError
from snnfx.expressions import expression, expression_of_initial_value
from snnfx.isolation import undisturbed
from snnfx.net import ConvertOptions, Net
from snnfx.passes.chunk import plan_chunks
from snnfx.passes.dependence import is_random, is_size
from snnfx.program import Region, StepProgram, describe_node, is_structural, operation_name, place_of
from snnfx.regions import MapRegion
from snnfx.report import ChunkRow, InputRow, NotFolded, Operation, PassRow, Problem, RegionRow, Report, SlotRow
from snnfx.tracer import apply_autograd_function, expect_size

__all__ = ["Report", "explain"]

_PAST = {"fold": "folded", "map": "mapped", "loop": "looped", "once": "computed once"}


def explain(
    model: nn.Module,
    *,
    example_inputs: Any = None,
    time_dim: Any = 0,
    entry: str = "forward",
    batch_norm: str = "fold",
    chunk: int | str | None = "auto",
    carry_state: bool = False,
) -> Report:
    """Tell what `snnfx.convert` does with a model: what is folded, mapped or looped, and why.

    A model that cannot be converted gives a report as well, with the reason in `report.error`. The model is not changed.

    Args:
        model: a single-step model; or a converted net, which is reported on as it is (the options are its own then).
        example_inputs: as for `snnfx.convert`, like the following; without it shapes are not known.
        time_dim: where T is in each input.
        entry: the name of the method that is one step.
        batch_norm: "fold" or "per_step".
        chunk: time steps to run at once in inference.
        carry_state: keep the state from call to call.

    Returns:
        A `Report`: `print(report)`, `report.to_dict()`, `report.to_markdown()`. Regions, shapes and reasons are those of
        the mode (training or evaluation) that the model is in; differences between the modes are listed.

    Raises:
        InputError: an option or `example_inputs` does not fit, or `model` is no module.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfx.neuron.LIFNode(tau=2.0), torch.nn.Linear(4, 2))
        >>> report = snnfx.explain(model)
        >>> report.coverage
        '2 of 3 nodes folded into 2 regions; 1 loop'
        >>> [(row.what, row.code) for row in report.not_folded]
        [('1', 'SNNFX107')]
    """
    if isinstance(model, Net):
        return _report_on(model)
    options = ConvertOptions("m", time_dim, entry, batch_norm, chunk, carry_state)
    try:
        net = convert(
            model,
            example_inputs=example_inputs,
            time_dim=time_dim,
            entry=entry,
            batch_norm=batch_norm,
            chunk=chunk,
            carry_state=carry_state,
        )
    except CaptureError as error:
        problem = Problem(error.code, str(error), error.where, error.why, error.hint)
        return Report(type(model).__name__, model.training, dataclasses.asdict(options), problem)
    return _report_on(net)


def _report_on(net: Net) -> Report:
    program = net.program
    counts = _counts(program)
    return Report(
        model=type(net.source).__name__,
        training=net.training,
        options=dataclasses.asdict(net.options),
        coverage=_coverage(program, counts),
        counts=counts,
        inputs=tuple(_inputs(net)),
        regions=tuple(_region_row(program, region) for region in _shown_regions(program)),
        not_folded=tuple(_not_folded(program)),
        slots=tuple(_slots(program)),
        opaque=dict(program.opaque),
        first_step=_first_step(program),
        fixed=tuple(_fixed_sizes(program)),
        mode_differences=tuple(_mode_differences(net)),
        batch_norm=tuple(_batch_norm(net)),
        random=tuple(_random(program)),
        fallbacks=tuple(_fallbacks(net)),
        chunk=_chunk(net),
        passes=tuple(PassRow(r.description, r.milliseconds, r.note) for r in net.history),
    )


# -- nodes and regions ---------------------------------------------------------------------------------------------


def _is_computing(node: Node) -> bool:
    """Whether a node counts: it computes something, and is not merely an element of a tuple, a size or a check."""
    if not node.op.startswith("call") or is_structural(node) or is_size(node) or node.target is expect_size:
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return not (isinstance(source, Node) and isinstance(source.meta.get("val"), tuple | list))
    return True


def _computing(region: Region) -> list[Node]:
    return [node for node in region.nodes if _is_computing(node)]


def _shown_regions(program: StepProgram) -> list[Region]:
    return [region for region in program.regions if _computing(region)]


def _counts(program: StepProgram) -> dict[str, int]:
    """Computing nodes by kind of their region, and in all."""
    counts = {kind: 0 for kind in ("fold", "map", "loop", "once")}
    for region in program.regions:
        counts[region.kind] += len(_computing(region))
    return {"nodes": sum(counts.values()), **counts}


def _coverage(program: StepProgram, counts: dict[str, int]) -> str:
    regions = Counter(region.kind for region in _shown_regions(program))
    parts = [f"{counts['fold']} of {_count(counts['nodes'], 'node')} folded"]
    if counts["fold"]:
        parts[0] += f" into {_count(regions['fold'], 'region')}"
    if regions["loop"]:
        parts.append(_count(regions["loop"], "loop"))
    if counts["once"]:
        parts.append(f"{counts['once']} computed once")
    if counts["map"]:
        reasons = [row.reason for row in _not_folded(program) if row.kind == "map"]
        different = list(dict.fromkeys(reasons))
        because = f" because {different[0]}" if different else ""
        others = f", and for {_count(len(different) - 1, 'other reason')}" if len(different) > 1 else ""
        parts.append(f"{counts['map']} mapped{because}{others}")
    return "; ".join(parts)


def _region_row(program: StepProgram, region: Region) -> RegionRow:
    nodes = _computing(region)
    counted = Counter(_operation(program, node) for node in nodes)
    return RegionRow(
        name=region.name,
        kind=region.kind,
        nodes=len(nodes),
        contains=tuple(dataclasses.replace(item, count=count) for item, count in counted.items()),
        outputs=tuple(dict.fromkeys(_shapes_leaving(program, region))),
        slots=tuple(region.slots),
    )


def _operation(program: StepProgram, node: Node) -> Operation:
    module = program.module_of(node)
    if module is not None:
        return Operation(describe_node(node), type(module).__name__)
    within = str(node.meta.get("module", ""))
    if node.target is apply_autograd_function:
        holder = program.resolve(str(node.args[0].target))  # type: ignore[union-attr]
        return Operation(holder.function.__name__, within=within)
    name = "indexing" if node.target is operator.getitem else operation_name(node)
    return Operation(name, within=within)


def _shapes_leaving(program: StepProgram, region: Region) -> Iterator[str]:
    inside = set(region.nodes)
    outputs = {value for value in program.outputs if isinstance(value, Node)}
    for node in region.nodes:
        leaves = node in outputs or any(user not in inside and user.op != "output" for user in node.users)
        if node.op.startswith("call") and leaves:
            shape = _shape(program, node, time=region.kind != "once")
            if shape:
                yield shape


def _shape(program: StepProgram, node: Node, time: bool = False) -> str:
    """The shape of a value with its batch as N, e.g. "[T, N, 64, 28, 28]"; "" when it is not known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    sizes = [str(size) for size in value.shape]
    dim = node.meta.get("batch_dim")
    if node.op == "placeholder" and "slot" not in node.meta:
        dim = 0 if node.name in program.batched_inputs and sizes else None
    if isinstance(dim, int) and dim < len(sizes):
        sizes[dim] = "N"
    return f"[{', '.join(['T', *sizes] if time else sizes)}]"


def _not_folded(program: StepProgram) -> Iterator[NotFolded]:
    for region in program.regions:
        for node, refusal in region.refusals():
            if _is_computing(node):
                yield NotFolded(
                    node=node.name,
                    what=describe_node(node),
                    region=region.name,
                    kind=region.kind,
                    code=refusal.code,
                    reason=refusal.reason.rstrip("."),
                    where=place_of(node),
                    hint=refusal.hint,
                )


def _inputs(net: Net) -> Iterator[InputRow]:
    program = net.program
    by_name = program.nodes_by_name
    for leaf, dim in zip(program.input_leaves, net._time_dims, strict=True):
        if leaf.placeholder is None:
            continue
        node = by_name[leaf.placeholder]
        value = node.meta.get("val")
        yield InputRow(
            name=leaf.name,
            shape=_shape(program, node),
            dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "",
            time_dim=dim,
            least_rank=program.requirements.get(leaf.placeholder, 0),
        )


# -- state ---------------------------------------------------------------------------------------------------------


def _slots(program: StepProgram) -> Iterator[SlotRow]:
    region_of = {slot: region.name for region in program.regions for slot in region.slots}
    by_name = program.nodes_by_name
    for slot, initial in zip(program.slots, program.initial_values, strict=True):
        node = by_name.get(slot.placeholder)
        text = "the first step makes it" if program.first_step is not None else expression_of_initial_value(program, initial)
        shape = _shape(program, node) if node is not None else ""
        yield SlotRow(slot.name, text, region_of.get(slot.name, ""), shape, slot.discovered)


def _first_step(program: StepProgram) -> str:
    """How the first step differs from the others."""
    if program.first_step is None:
        return ""
    first, later = _keys(program.first_step), _keys(program)
    text = "The first step does something else than the others and is run on its own (SNNFX212)."
    only_first, only_later = _missing(first, later), _missing(later, first)
    if only_first:
        text += f" Only in the first: {_and(only_first)}."
    if only_later:
        text += f" Only in the others: {_and(only_later)}."
    return text


# -- notes ---------------------------------------------------------------------------------------------------------


def _fixed_sizes(program: StepProgram) -> Iterator[str]:
    seen: set[str] = set()
    for node in program.graph.nodes:
        if node.target is expect_size:
            size, expected, place = node.args
            note = (
                f"`{expression(size)}` has to be {expected} in every call: the model's Python code used it as a number while "
                f"it was captured{f' ({place})' if place else ''}."
            )
            if note not in seen:
                seen.add(note)
                yield note


def _batch_norm(net: Net) -> Iterator[str]:
    """Which statistics the BatchNorm layers use in training, by how the training program treats them."""
    program = net._programs[True]
    names: dict[str, list[str]] = {}
    for region in program.regions:
        for node in region.nodes:
            if node.op == "call_module" and isinstance(program.resolve(str(node.target)), _BatchNorm):
                names.setdefault(region.kind, []).append(str(node.target))
    if "fold" in names:
        yield (
            f'BatchNorm of {_and(names["fold"])}: in training, statistics over all T*N samples (batch_norm="fold"), as '
            'multi-step SNNs are trained; batch_norm="per_step" does exactly what the stepped model does. In evaluation mode '
            "there is no difference."
        )
    stepped = [*names.get("map", []), *names.get("loop", [])]
    if stepped:
        yield f"BatchNorm of {_and(stepped)}: in training, statistics of each time step, as in the stepped model."
    if "once" in names:
        yield f"BatchNorm of {_and(names['once'])}: computed once, with the statistics of the N samples."


def _random(program: StepProgram) -> Iterator[str]:
    nodes = [node for region in program.regions for node in region.nodes if is_random(program, node)]
    dropouts = [describe_node(node) for node in nodes if isinstance(program.module_of(node), _DropoutNd)]
    others = [f"{describe_node(node)}{_at(node)}" for node in nodes if describe_node(node) not in dropouts]
    if dropouts:
        yield f"Dropout of {_and(dropouts)}: a fresh mask at each time step in training, as in the stepped model."
    if others:
        yield f"New random numbers at each time step: {_and(others)}."


def _mode_differences(net: Net) -> Iterator[str]:
    """What the programs of training and evaluation mode do with the same node, and the nodes that one of them lacks."""
    training, evaluation = net._programs[True], net._programs[False]
    if training is evaluation:
        return
    in_training, in_evaluation = _keys(training), _keys(evaluation)
    changed: dict[tuple[str, str], list[str]] = {}
    for key, node in in_training.items():
        other = in_evaluation.get(key)
        if other is not None and node.meta.get("kind") != other.meta.get("kind"):
            changed.setdefault((node.meta["kind"], other.meta["kind"]), []).append(describe_node(node))
    for (kind, other_kind), names in changed.items():
        yield f"{_and(names)}: {_PAST[kind]} in training, {_PAST[other_kind]} in evaluation mode."
    for mode, missing in (("training", _missing(in_training, in_evaluation)), ("evaluation", _missing(in_evaluation, in_training))):
        if missing:
            yield f"Only in {mode} mode: {_and(missing)}."
    other_arguments = [
        f"{describe_node(node)}{_at(node)}"
        for key, node in in_training.items()
        if key in in_evaluation and _constants(node) != _constants(in_evaluation[key])
    ]
    if other_arguments:
        yield f"Called with other arguments in training than in evaluation mode: {_and(other_arguments)}."


_Key = tuple[str, Any, int]


def _keys(program: StepProgram) -> dict[_Key, Node]:
    """The computing nodes by what and where they are, the same in programs captured from the same model."""
    keys: dict[_Key, Node] = {}
    count: Counter[tuple[str, Any]] = Counter()
    for node in program.graph.nodes:
        if _is_computing(node) and (not program.regions or "kind" in node.meta):
            what = (describe_node(node), node.meta.get("where"))
            keys[(*what, count[what])] = node
            count[what] += 1
    return keys


def _missing(here: dict[_Key, Node], there: dict[_Key, Node]) -> list[str]:
    return [f"{describe_node(node)}{_at(node)}" for key, node in here.items() if key not in there]


def _constants(node: Node) -> str:
    """The arguments of a node, apart from those that other nodes compute."""
    return str(torch.fx.map_arg((node.args, node.kwargs), lambda n: None))


def _fallbacks(net: Net) -> Iterator[str]:
    for region in net.snnfx_regions.modules():  # type: ignore[union-attr, operator]
        if isinstance(region, MapRegion) and region.refused_by_vmap:
            reason = region.refused_by_vmap.rstrip(".")
            yield f"torch.vmap refused {region.label}: {reason}. Its steps are run one by one (SNNFX504)."


def _chunk(net: Net) -> ChunkRow:
    chunk = net.options.chunk
    if chunk is None or isinstance(chunk, int):
        plan = plan_chunks(net.program, (), chunk)
        return ChunkRow(plan.length, plan.bytes_per_step, plan.reason)
    inputs = [node.meta.get("val") for node in net.program.input_nodes()]
    if not all(isinstance(value, Tensor) for value in inputs):
        return ChunkRow(None, 0, 'chunk="auto": decided at the first call, from the shapes (example_inputs would tell)')
    device = next((p.device for p in net.source.parameters()), torch.device("cpu"))
    steps = [torch.empty(value.shape, dtype=value.dtype, device=device) for value in inputs]  # type: ignore[union-attr]
    sequences = [x.unsqueeze(0) if dim is not None else x for x, dim in zip(steps, net._tensor_dims(), strict=True)]
    try:
        with undisturbed(net.source):
            plan = net.chunk_plan(*sequences)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException):
        return ChunkRow(None, 0, "the bytes of one time step cannot be told from shapes alone")
    return ChunkRow(plan.length, plan.bytes_per_step, plan.reason)


# -- words ---------------------------------------------------------------------------------------------------------


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _and(names: Iterable[str], most: int = 6) -> str:
    different = list(dict.fromkeys(names))
    if len(different) > most:
        different = [*different[:most], f"{len(different) - most} more"]
    return different[0] if len(different) == 1 else f"{', '.join(different[:-1])} and {different[-1]}"


def _at(node: Node) -> str:
    return f" ({place_of(node)})" if place_of(node) else ""
