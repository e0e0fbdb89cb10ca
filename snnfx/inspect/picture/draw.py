"""`snnfx.draw`: pictures of a model's step graph and of the regions of a converted net.

A picture is made from a step program alone. This module decides which node belongs into which frame,
`snnfx.inspect.picture.painter` turns nodes into boxes and arrows, `snnfx.inspect.picture.dot` writes the DOT text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.capture.capture import capture
from snnfx.errors import CaptureError, InputError
from snnfx.inspect.picture.dot import STYLES, Box, Cluster, Member, Picture, write_dot
from snnfx.inspect.picture.drawing import Drawing, check_file
from snnfx.inspect.picture.painter import Painter
from snnfx.ir.graph_pass import Pass
from snnfx.ir.history import PassRecord
from snnfx.ir.nodes import is_module_call
from snnfx.ir.pass_manager import PassManager
from snnfx.ir.program import STAGES, StepProgram
from snnfx.passes.normalize import Normalize
from snnfx.passes.partition import Partition
from snnfx.passes.remove_dead_code import RemoveDeadCode
from snnfx.runtime.net import Net

__all__ = ["draw"]


def draw(
    model: nn.Module | PassRecord,
    file: str | os.PathLike[str] | None = None,
    *,
    example_inputs: Any = None,
    entry: str = "forward",
    stage: str | None = None,
) -> Drawing:
    """Draw the step graph of a model, the regions of a net, or the program after a pass.

    The model or net is not changed.

    Args:
        model: a single-step model, drawn as one time step with its containers as frames; or a converted net, drawn with
            its regions as frames: once, fold, map and loop; or a record of `net.history`, drawn as the step was after
            this pass.
        file: path of the picture, with the suffix .svg, .png, .pdf or .dot (DOT text, needs no graphviz). None: write
            no file.
        example_inputs: inputs of ONE time step with the batch dimension, `[N, *]` (a tensor, a tuple or a dict); shapes
            are drawn then. A net converted with example inputs has shapes already.
        entry: name of the model's method that computes one step.
        stage: for a net, the stage whose last program is drawn: "captured", "normalized", "partitioned" or "planned".
            None: the net.

    Returns:
        The picture. Notebooks display it; `str()` or `.source` is the DOT text, `.save(file)` writes a file.

    Raises:
        ToolError: SNNFX603, `file` has another suffix; SNNFX601, graphviz is missing. Both are checked first.
        CaptureError: the model cannot be captured (codes 2xx).
        InputError: SNNFX706, no program of this stage or record.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode())
        >>> net = snnfx.convert(model, example_inputs=torch.rand(4, 3))
        >>> "[T, N, 2] float32" in str(snnfx.draw(net))
        True
    """
    path = None if file is None else check_file(file)
    if isinstance(model, PassRecord):
        picture = _picture_of_record(model)
    elif stage is not None:
        picture = _picture_of_record(_record_of_stage(model, stage))
    elif isinstance(model, Net):
        picture = _picture_of_net(model, example_inputs)
    else:
        picture = _picture_of_model(model, example_inputs, entry)
    drawing = Drawing(write_dot(picture))
    if path is not None:
        drawing.save(path)
    return drawing


def _record_of_stage(net: nn.Module, stage: str) -> PassRecord:
    if isinstance(net, Net) and stage in STAGES:
        record = net.history.last_of_stage(stage, net.training)
        if record is not None:
            return record
    where = "" if isinstance(net, Net) else "the model is not converted; "
    raise InputError(
        "SNNFX706",
        f"no program of stage {stage!r} to draw",
        why=f"{where}a net has the stages {', '.join(STAGES)}.",
        hint='Pass a net and one of these stages, e.g. snnfx.draw(net, stage="partitioned").',
    )


def _picture_of_record(record: PassRecord) -> Picture:
    program = record.program
    if program is None:
        raise InputError(
            "SNNFX706",
            f"the record of `{record.description}` has no step program",
            why="it describes an emitted graph.",
            hint="Pass a record of a pass, or a stage: snnfx.draw(net, stage='planned').",
        )
    subtitle = f"after {record.description}, stage {record.stage}, {_mode(program.training)}"
    if not program.regions:
        picture = _picture_of_step(program, program.training, batch_known=False)
        return replace(picture, subtitle=subtitle)
    painter, members = _regions(program, _recorded_values(program))
    return Picture(
        type(program.source).__name__,
        subtitle,
        [*painter.inputs({}), *members, *painter.outputs()],
        painter.edges(),
        _legend(program),
    )


def _picture_of_model(model: nn.Module, example_inputs: Any, entry: str) -> Picture:
    program = _captured(model, example_inputs, entry, model.training)
    batch_known = True
    try:
        # Partition records the batch dimension of each node.
        PassManager([Partition()]).run(program)
    except CaptureError:
        batch_known = False
    return _picture_of_step(program, model.training, batch_known)


def _picture_of_step(program: StepProgram, training: bool, batch_known: bool = True) -> Picture:
    painter = Painter(program, _recorded_values(program), _module_frames(program))
    painter.batch_known = batch_known
    members = _module_clusters(painter)
    stateful = any(box.style == "stateful" for box in painter.boxes)
    legend = [*(["stateful"] if stateful else []), *(["carried"] if program.slots else [])]
    return Picture(
        type(program.source).__name__,
        f"one time step, {_mode(training)}",
        [*painter.inputs({}), *members, *painter.outputs()],
        painter.edges(),
        legend,
    )


def _picture_of_net(net: Net, example_inputs: Any) -> Picture:
    program = net.program
    if net.options.step_mode == "s":
        picture = _picture_of_step(program, net.training, batch_known=program.whole_sequences is None)
        if program.whole_sequences is None:
            return picture
        return replace(picture, subtitle=f"whole sequences, {_mode(net.training)}")
    values = _recorded_values(program)
    if example_inputs is not None:
        values = _values_for(program, example_inputs, net.options.entry) or values
    painter, members = _regions(program, values)
    members = _chunk_frame(net, values, members)
    regions = f"{len(program.regions)} region{'s' * (len(program.regions) != 1)}"
    subtitle = f"T time steps in {regions}, {_mode(net.training)}"
    if program.first_step is not None:
        subtitle += ", first step in a separate graph"
    dims = dict(zip(program.input_nodes(), net._arguments.tensor_dims, strict=True))
    output_dim = net.options.time_dim if isinstance(net.options.time_dim, int) else 0
    painter.reduce = net.options.reduce
    return Picture(
        type(net.source).__name__,
        subtitle,
        [*painter.inputs(dims), *members, *painter.outputs(None if painter.reduce else output_dim)],
        painter.edges(),
        _legend(program),
    )


def _legend(program: StepProgram) -> list[str]:
    kinds = {region.kind for region in program.regions}
    return [kind for kind in ("once", "fold", "map", "loop") if kind in kinds] + ["carried"] * bool(program.slots)


def _regions(program: StepProgram, values: Mapping[str, Any]) -> tuple[Painter, list[Member]]:
    """The painter of a program with regions, and the boxes in frames of regions."""
    frames = {node: region.name for region in program.regions for node in region.nodes}
    painter = Painter(program, values, frames, {region.name: region.kind for region in program.regions})
    members: list[Member] = []
    for region in program.regions:
        refusals = [(node, refusal) for node, refusal in region.refusals() if node in painter.depth]
        codes = {refusal.code for _, refusal in refusals}
        shared = codes.pop() if len(codes) == 1 else ""
        reasons = dict.fromkeys(f"{refusal.code} {refusal.reason}" for _, refusal in refusals)
        cluster = Cluster(region.name, region.kind, region.name, note=shared)
        cluster.tooltip = "\n".join([f"{region.name}: {STYLES[region.kind].meaning}", *reasons])
        cluster.members = painter.members(region.name, show_codes=not shared)
        members.append(cluster)
    members += painter.members("")
    return painter, members


def _mode(training: bool) -> str:
    return "training mode" if training else "evaluation mode"


def _captured(model: nn.Module, example_inputs: Any, entry: str, training: bool) -> StepProgram:
    program = capture(model, example_inputs, entry, training)
    passes: list[Pass] = [Normalize(), RemoveDeadCode()]
    PassManager(passes).run(program)
    return program


def _recorded_values(program: StepProgram) -> dict[str, Any]:
    return {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}


def _values_for(program: StepProgram, example_inputs: Any, entry: str) -> dict[str, Any]:
    """The values of one step for other example inputs; {} when the model takes another path for them."""
    other = _captured(program.source, example_inputs, entry, program.training)

    def form(program: StepProgram) -> list[tuple[str, str, str]]:
        return [(node.name, node.op, str(node.target)) for node in program.graph.nodes]

    return _recorded_values(other) if form(other) == form(program) else {}


def _chunk_frame(net: Net, values: Mapping[str, Any], members: list[Member]) -> list[Member]:
    """Put everything between inputs and outputs into a frame that names the number of time steps in a chunk."""
    chunk = net.options.chunk
    if chunk is None:
        return members
    reason = "as many time steps as fit the memory budget"
    frame = Cluster("chunk", "chunk", "chunk: auto", members, "in inference", reason)
    if isinstance(chunk, int):
        frame.title, frame.tooltip = _chunk_title(chunk), "as requested"
        return [frame]
    program = net.program
    recorded = [values.get(node.name) for node in program.input_nodes()]
    # Planning runs the modules on tensors without values, which a user's hooks must not see.
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in net.source.modules())
    if net.training or hooked or not all(isinstance(value, Tensor) for value in recorded):
        return [frame]
    weight = next((t for t in (*net.source.parameters(), *net.source.buffers())), torch.empty(0))
    steps = [torch.empty(1, dtype=v.dtype, device=weight.device).expand(v.shape) for v in recorded]  # type: ignore[union-attr]
    varying = net._arguments.varying
    plan = net.chunk_plan(*(x.unsqueeze(0) if v else x for x, v in zip(steps, varying, strict=True)))
    if plan.length is not None:
        batch = next((f", N = {s.shape[0]}" for s in steps if s.dim()), "")
        frame.title, frame.note, frame.tooltip = _chunk_title(plan.length), f"in inference{batch}", plan.reason
    return [frame]


def _chunk_title(length: int) -> str:
    return f"chunk: {length} step{'s' * (length != 1)}"


def _module_frames(program: StepProgram) -> dict[Node, str]:
    """The qualified name of the container that each node is in."""
    frames = {}
    for node in program.graph.nodes:
        module = str(node.target) if node.op == "call_module" else str(node.meta.get("module") or "")
        calls = node.op == "call_module" or is_module_call(node)
        frames[node] = module.rpartition(".")[0] if calls else module
    return frames


def _module_clusters(painter: Painter) -> list[Member]:
    """The boxes of a model in frames nested like its modules."""
    frames = dict.fromkeys(painter.frame_of.values())
    children: dict[str, list[str]] = {}
    for frame in frames:
        while frame:
            parent = frame.rpartition(".")[0]
            siblings = children.setdefault(parent, [])
            if frame not in siblings:
                siblings.append(frame)
            frame = parent
    resolve: Callable[[str], Any] = painter.program.resolve

    def inside(frame: str, depth: int) -> list[Member]:
        members = painter.members(frame)
        for child in children.get(frame, []):
            below = inside(child, depth + 1)
            if len(below) > 1:
                style = "inner container" if depth % 2 else "container"
                for box in (box for member in below for box in _boxes_of(member)):
                    box.rows = [replace(row, name=row.name.removeprefix(f"{child}.")) for row in box.rows]
                cluster = Cluster(f"c{len(numbers)}", style, child, below, note=type(resolve(child)).__name__)
                numbers.append(child)
                members.append(cluster)
            else:
                members += below
        return members

    numbers: list[str] = []
    return inside("", 0)


def _boxes_of(member: Member) -> list[Box]:
    """The boxes of a member that are not inside a frame."""
    if isinstance(member, Cluster):
        return [box for box in member.members if isinstance(box, Box)] if member.style == "row" else []
    return [member] if isinstance(member, Box) else []
