"""`snnfx.explain`: report which nodes are folded, mapped or looped, and why."""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Unpack

from torch import Tensor, nn
from torch.fx import Node

from snnfx.analysis.batch.equivariance import infer_batch, model_input
from snnfx.analysis.dependence import analyse_dependence
from snnfx.convert import convert_without_budget
from snnfx.errors import CaptureError, InputError, Refusal
from snnfx.inspect.computing_nodes import computing_nodes, is_computing
from snnfx.inspect.conversion_notes import (
    batch_norm_semantics,
    carried_arguments,
    compiled_form,
    eligibility_traces,
    first_step_differs,
    fixed_sizes,
    folded_batch_norms,
    kernels_of_loops,
    mode_differences,
    random_nodes,
    reduced_outputs,
    statistic_reads,
    vmap_fallbacks,
)
from snnfx.inspect.event_layers import event_layers
from snnfx.inspect.image_formats import image_formats
from snnfx.inspect.linear_layers import linear_layers
from snnfx.inspect.loops_of_call import loops_of_call
from snnfx.inspect.memory_report import MemoryReport, report_memory
from snnfx.inspect.report import (
    ChunkRow,
    InputRow,
    LoopRow,
    NotFolded,
    Operation,
    PassRow,
    Problem,
    RegionRow,
    Report,
    SlotRow,
)
from snnfx.inspect.source_expressions import expression_of_initial_value
from snnfx.ir.facts import BATCH_DIM, MODULE, SLOT, VALUE
from snnfx.ir.options import ConvertKeywords, ConvertOptions
from snnfx.ir.printing import describe_node, location_of, operation_name
from snnfx.ir.program import Region, StepProgram
from snnfx.memory.budget import read_memory_budget
from snnfx.memory.chunk_plan import plan_chunks
from snnfx.memory.planning import example_steps, refuse_impossible_budget
from snnfx.ops.run_loop import run_loop
from snnfx.ops.step_functions import apply_autograd_function
from snnfx.runtime.net import Net
from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.random_draws import draws_undone

__all__ = ["Report", "explain"]


def explain(model: nn.Module, *, T: int | None = None, **options: Unpack[ConvertKeywords]) -> Report:
    """Report how `snnfx.convert` converts a model: nodes folded, mapped or looped, and why.

    The model is not changed. If it cannot be converted, the report has the reason in `report.error`. If `memory_budget`
    is too small for one time step, the report has the reason in `report.too_little`.

    Args:
        model: a single-step model, or a converted net. A net is reported with its own options; of `options`, only
            `example_inputs` is used then.
        T: number of time steps. If given, also predict the memory of a call on T steps with inputs like
            `example_inputs`: the peak of each region in inference and in training, and the tensors allocated there.
            `report.memory` has the data, `report.memory.save("memory.svg")` draws them. Default: None.
        **options: the options of `snnfx.convert`: `example_inputs` (without it shapes are unknown), `time_dim`,
            `entry`, `batch_norm`, `chunk`, `reduce`, `carry`, `checkpoint`, `memory_budget` and so on.

    Returns:
        A `Report`: `print(report)`, `report.to_dict()`, `report.to_markdown()`. It describes the current mode of the
        model (training or evaluation) and lists differences from the other mode.

    Raises:
        InputError: an option or `example_inputs` has an illegal value; SNNFX301: T is below 1; SNNFX304: `model` is not
            a module; SNNFX309: T is given without `example_inputs`.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfx.neuron.LIFNode(tau=2.0), torch.nn.Linear(4, 2))
        >>> report = snnfx.explain(model)
        >>> report.coverage
        '2 of 3 nodes folded into 2 regions; 1 loop'
        >>> [(row.what, row.code) for row in report.not_folded]
        [('1', 'SNNFX107')]
    """
    if T is not None and (isinstance(T, bool) or not isinstance(T, int) or T < 1):
        raise InputError("SNNFX301", f"T={T!r} is not a number of time steps", hint="Pass an int above 0.")
    if isinstance(model, Net):
        return _report_on(model, T, options.get("example_inputs"))
    given: dict[str, Any] = dict(options)
    example_inputs, carry = given.pop("example_inputs", None), given.pop("carry", None)
    convert_options = ConvertOptions(**{**given, "memory_budget": read_memory_budget(given.get("memory_budget"))})
    try:
        net = convert_without_budget(model, convert_options, example_inputs, carry)
    except CaptureError as error:
        problem = Problem(error.code, str(error), error.where, error.why, error.hint)
        as_data = {**_options_as_data(convert_options), "carry": carry}
        return Report(type(model).__name__, model.training, as_data, problem)
    return _report_on(net, T, None)


def _options_as_data(options: ConvertOptions) -> dict[str, Any]:
    """The options as plain values; a pass is its name with its options."""
    plain = dataclasses.asdict(dataclasses.replace(options, passes=()))
    return plain | {"passes": tuple(str(item) for item in options.passes)}


def _report_on(net: Net, T: int | None, example_inputs: Any) -> Report:
    program = net.program
    counts = _counts(program)
    not_folded = [*_not_folded(program), *_losing_the_batch(net)]
    loops = tuple(loops_of_call(net))
    return Report(
        model=type(net.source).__name__,
        training=net.training,
        options=_options_as_data(net.options),
        too_little=_too_little(net),
        coverage=_coverage_of_call(program, loops)
        if loops or program.whole_sequences is not None
        else _coverage(program, counts, not_folded),
        counts=counts,
        inputs=tuple(_inputs(net)),
        regions=tuple(_region_row(program, region) for region in _shown_regions(program)),
        loops=loops,
        not_folded=tuple(not_folded),
        slots=tuple(_slots(program)) if not loops else (),
        opaque=dict(program.opaque),
        first_step=first_step_differs(program),
        carried=tuple(carried_arguments(program)),
        fixed=tuple(fixed_sizes(program)),
        mode_differences=tuple(mode_differences(net)),
        reduced=tuple(reduced_outputs(net)),
        batch_norm=(*batch_norm_semantics(net), *statistic_reads(net), *folded_batch_norms(net)),
        random=tuple(random_nodes(program)),
        fallbacks=tuple(vmap_fallbacks(net)),
        traces=tuple(eligibility_traces(program)),
        kernels=tuple(kernels_of_loops(net)),
        events=tuple(event_layers(net.program)),
        formats=tuple(image_formats(net.program)),
        products=tuple(linear_layers(net.program)),
        chunk=_chunk(net),
        compiled=compiled_form(net),
        memory=_memory(net, T, example_inputs) if T is not None and net.options.step_mode == "m" else None,
        passes=tuple(PassRow(r.description, r.milliseconds, r.note) for r in net.history),
    )


def _shown_regions(program: StepProgram) -> list[Region]:
    return [region for region in program.regions if computing_nodes(region)]


def _counts(program: StepProgram) -> dict[str, int]:
    """The number of computing nodes by kind of region, and in total."""
    counts = dict.fromkeys(("fold", "map", "loop", "once"), 0)
    for region in program.regions:
        counts[region.kind] += len(computing_nodes(region))
    return {"nodes": sum(counts.values()), **counts}


def _causes(not_folded: Sequence[NotFolded]) -> list[NotFolded]:
    """Why nodes are mapped: reasons in the nodes themselves if there are any, else those in their operands."""
    rows = [row for row in not_folded if row.code not in ("SNNFX107", "SNNFX108") or row.kind == "map"]
    return [row for row in rows if row.code != "SNNFX105"] or rows


def _coverage(program: StepProgram, counts: dict[str, int], not_folded: Sequence[NotFolded]) -> str:
    regions = Counter(region.kind for region in _shown_regions(program))
    parts = [f"{counts['fold']} of {_count(counts['nodes'], 'node')} folded"]
    if counts["fold"]:
        parts[0] += f" into {_count(regions['fold'], 'region')}"
    if regions["loop"]:
        parts.append(_count(regions["loop"], "loop"))
    if counts["once"]:
        parts.append(f"{counts['once']} computed once")
    if counts["map"]:
        different = list(dict.fromkeys(row.reason for row in _causes(not_folded)))
        because = f" because {different[0]}" if different else ""
        others = f", and for {_count(len(different) - 1, 'other reason')}" if len(different) > 1 else ""
        parts.append(f"{counts['map']} mapped{because}{others}")
    return "; ".join(parts)


def _coverage_of_call(program: StepProgram, loops: Sequence[LoopRow]) -> str:
    """One sentence about the call of a model that runs over time itself."""
    around = sum(is_computing(node) and node.target is not run_loop for node in program.graph.nodes)
    with_kernels = sum(any("kernel" in note.split(":")[0] for note in loop.kernels) for loop in loops)
    text = (
        f"{_count(len(loops), 'loop')} over time, {with_kernels} of them with kernels; "
        f"{_count(around, 'node')} around them on whole sequences"
    )
    if program.whole_sequences is None:
        return text
    why, where = program.whole_sequences
    return f"{text}, so there is no step form: {why}" + (f" ({where})" if where else "")


def _region_row(program: StepProgram, region: Region) -> RegionRow:
    nodes = computing_nodes(region)
    operations = Counter(_operation(program, node) for node in nodes)
    return RegionRow(
        name=region.name,
        kind=region.kind,
        nodes=len(nodes),
        contains=tuple(dataclasses.replace(item, count=count) for item, count in operations.items()),
        outputs=tuple(dict.fromkeys(_shapes_leaving(program, region))),
        slots=tuple(region.slots),
    )


def _operation(program: StepProgram, node: Node) -> Operation:
    module = program.module_of(node)
    if module is not None:
        return Operation(describe_node(node), type(module).__name__)
    within = str(MODULE.of(node))
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
    """The shape of a value with its batch size as N, e.g. "[T, N, 64, 28, 28]"; "" if unknown."""
    value = VALUE.of(node)
    if not isinstance(value, Tensor):
        return ""
    sizes = [str(size) for size in value.shape]
    dim = BATCH_DIM.of(node)
    if node.op == "placeholder" and not SLOT.is_known(node):
        dim = 0 if node.name in program.batched_inputs and sizes else None
    if isinstance(dim, int) and dim < len(sizes):
        sizes[dim] = "N"
    return f"[{', '.join(['T', *sizes] if time else sizes)}]"


def _not_folded(program: StepProgram) -> Iterator[NotFolded]:
    for region in program.regions:
        for node, refusal in region.refusals():
            if is_computing(node):
                yield _row(program, region, node, refusal)


def _losing_the_batch(net: Net) -> Iterator[NotFolded]:
    """Nodes on a cycle whose result has no known batch dimension, so that its readers cannot be folded."""
    program = net.program
    if not any(refusal.code == "SNNFX105" for region in program.regions for _, refusal in region.refusals()):
        return
    dims = zip(program.input_leaves, net._arguments.time_dims, strict=True)
    dependence = analyse_dependence(program, [leaf.placeholder or "" for leaf, dim in dims if dim is None])
    inputs = {n: model_input(n, "N" if n.name in program.batched_inputs else n.name) for n in program.input_nodes()}
    refusals = infer_batch(
        program.graph,
        program.resolve,
        inputs,
        carried=dependence.carried,
        varying=dependence.varying,
        training=program.training,
        batch_norm=net.options.batch_norm,  # type: ignore[arg-type]
        training_of=program.is_in_training,
    ).refusals
    for region in program.regions:
        for node in region.nodes if region.slots else ():
            refusal = refusals.get(node)
            consequence = refusal is None or refusal.code in ("SNNFX105", "SNNFX108")
            if refusal is not None and not consequence and is_computing(node):
                reason = f"{refusal.reason.rstrip('.')}, so nodes that read its result are not folded"
                yield _row(program, region, node, Refusal(refusal.code, reason, refusal.hint))


def _row(program: StepProgram, region: Region, node: Node, refusal: Refusal) -> NotFolded:
    operation = dataclasses.replace(_operation(program, node), type="")
    return NotFolded(
        node=node.name,
        what=str(operation),
        region=region.name,
        kind=region.kind,
        code=refusal.code,
        reason=refusal.reason.rstrip("."),
        where=location_of(node),
        hint=refusal.hint,
    )


def _inputs(net: Net) -> Iterator[InputRow]:
    program = net.program
    by_name = program.nodes_by_name
    for leaf, dim in zip(program.input_leaves, net._arguments.time_dims, strict=True):
        if leaf.placeholder is None:
            continue
        node = by_name[leaf.placeholder]
        value = VALUE.of(node)
        yield InputRow(
            name=leaf.name,
            shape=_shape(program, node),
            dtype=str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else "",
            time_dim=dim,
            least_rank=program.requirements.get(leaf.placeholder, 0),
        )


def _slots(program: StepProgram) -> Iterator[SlotRow]:
    region_of = {slot: region.name for region in program.regions for slot in region.slots}
    by_name = program.nodes_by_name
    given = {name for argument in program.carried if argument.required for name in argument.slot_names()}
    for slot, initial in zip(program.slots, program.initial_values, strict=True):
        node = by_name.get(slot.placeholder)
        # If the first step runs in a separate graph, the initial value of the later steps depends on the inputs.
        text = expression_of_initial_value(program, None if program.first_step is not None else initial)
        text = "passed by the caller" if slot.name in given else text
        text = "the value in the model" if slot.persistent else text
        shape = _shape(program, node) if node is not None else ""
        yield SlotRow(slot.name, text, region_of.get(slot.name, ""), shape, slot.discovered, bool(slot.persistent))


def _chunk(net: Net) -> ChunkRow | None:
    if net.options.step_mode == "s":
        return None
    chunk = net.options.chunk
    if chunk is None or isinstance(chunk, int):
        plan = plan_chunks(chunk)
        return ChunkRow(plan.length, plan.bytes_per_step, plan.reason)
    steps = example_steps(net._executable)
    if steps is None:
        return ChunkRow(
            None, 0, 'chunk="auto": planned at the first call, from the input shapes (or now, with example_inputs)'
        )
    sequences = [x.unsqueeze(0) if v else x for x, v in zip(steps, net.varying_inputs, strict=True)]
    try:
        with isolated(net.source, rng=False), draws_undone():
            plan = net.chunk_plan(*sequences)
    except InputError as error:
        if error.code != "SNNFX318":
            raise
        return ChunkRow(None, 0, str(error).rstrip("."))
    return ChunkRow(plan.length, plan.bytes_per_step, plan.reason)


def _too_little(net: Net) -> str:
    """Why `convert` refuses the memory budget, or ""."""
    try:
        with isolated(net.source, rng=False), draws_undone():
            refuse_impossible_budget(net._executable)
    except InputError as error:
        if error.code != "SNNFX318":
            raise
        return str(error)
    return ""


def _memory(net: Net, T: int, example_inputs: Any) -> MemoryReport:
    if example_inputs is None:
        steps = example_steps(net._executable)
    else:
        kwargs = example_inputs if isinstance(example_inputs, dict) else {}
        args = () if kwargs else example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
        steps = net.tensors_of_step(tuple(args), kwargs)
    if steps is None:
        hint = "Pass example_inputs: the inputs of ONE time step, with the batch dimension."
        why = "memory is predicted from shapes, and without example_inputs they are unknown."
        raise InputError("SNNFX309", f"cannot predict the memory of T={T} time steps", why=why, hint=hint)
    return report_memory(net, steps, T)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
