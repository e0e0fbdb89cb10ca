"""`snnfx.draw`: pictures of a model's step graph and of the regions of a converted net.

A picture is made from a step program alone. This module decides which node belongs into which frame,
`snnfx.inspect.picture.painter` turns nodes into boxes and arrows, `snnfx.inspect.picture.dot` writes the DOT text.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.capture.capture import capture
from snnfx.errors import CaptureError, InputError
from snnfx.inspect.picture.densities import Densities
from snnfx.inspect.picture.dot import STYLES, Box, Cluster, Member, Picture, write_dot
from snnfx.inspect.picture.drawing import Drawing, check_file
from snnfx.inspect.picture.drawn_operations import DrawnOperations
from snnfx.inspect.picture.frames import Frames, frames_of_modules, frames_of_regions, repetition_titles
from snnfx.inspect.picture.painter import Painter
from snnfx.inspect.picture.repeated_blocks import Repetition
from snnfx.inspect.profile_data import ProfileData
from snnfx.inspect.region_execution import how_region_will_run
from snnfx.ir.facts import VALUE
from snnfx.ir.graph_pass import Pass
from snnfx.ir.history import PassRecord
from snnfx.ir.pass_manager import PassManager
from snnfx.ir.program import STAGES, Region, StepProgram
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
    depth: int | None = None,
    profile: ProfileData | None = None,
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
        depth: the number of levels of modules that are drawn open. Modules below are boxes; consecutive ones of the
            same structure are one box with their count. None: all modules are open, and in a picture of more than 24
            operations, consecutive blocks of the same structure are drawn once, in a frame with their count.
        profile: a report of `snnfx.profile(net, ...)`: neurons show their firing rates, layers the density of their
            inputs, and regions how they ran.

    Returns:
        The picture. Notebooks display it; `str()` or `.source` is the DOT text, `.save(file)` writes a file.

    Raises:
        ToolError: SNNFX603, `file` has another suffix; SNNFX601, graphviz is missing. Both are checked first.
        CaptureError: the model cannot be captured (codes 2xx).
        InputError: SNNFX706, no program of this stage or record; SNNFX901, `depth` is negative or `profile` is not a
            report of `snnfx.profile`.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode())
        >>> net = snnfx.convert(model, example_inputs=torch.rand(4, 3))
        >>> "[T, N, 2] float32" in str(snnfx.draw(net))
        True
    """
    path = None if file is None else check_file(file)
    look = _look(depth, profile)
    if isinstance(model, PassRecord):
        picture = _picture_of_record(model, look)
    elif stage is not None:
        picture = _picture_of_record(_record_of_stage(model, stage), look)
    elif isinstance(model, Net):
        picture = _picture_of_net(model, example_inputs, look)
    else:
        picture = _picture_of_model(model, example_inputs, entry, look)
    drawing = Drawing(write_dot(picture))
    if path is not None:
        drawing.save(path)
    return drawing


@dataclass(frozen=True)
class _Look:
    """The levels of modules that are drawn open, and what a profile measured."""

    depth: int | None
    profile: ProfileData | None

    @property
    def densities(self) -> Densities | None:
        return None if self.profile is None else Densities(self.profile)


def _look(depth: int | None, profile: ProfileData | None) -> _Look:
    if depth is not None and (not isinstance(depth, int) or isinstance(depth, bool) or depth < 0):
        raise InputError(
            "SNNFX901",
            f"depth={depth!r} cannot be drawn",
            why="`depth` counts levels of modules.",
            hint="Pass 0 or more, or None for all levels: snnfx.draw(net, depth=1).",
        )
    if profile is not None and not isinstance(profile, ProfileData):
        raise InputError(
            "SNNFX901",
            f"profile={type(profile).__name__} cannot be drawn",
            why="firing rates come from a report of snnfx.profile.",
            hint="Measure first: snnfx.draw(net, profile=snnfx.profile(net, x_seq)).",
        )
    return _Look(depth, profile)


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


def _picture_of_record(record: PassRecord, look: _Look) -> Picture:
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
        picture = _picture_of_step(program, program.training, look, batch_known=False)
        return replace(picture, subtitle=subtitle)
    painter, members = _regions(program, _recorded_values(program), look, {})
    return Picture(
        type(program.source).__name__,
        subtitle,
        [*painter.inputs({}), *members, *painter.outputs()],
        painter.edges(),
        _legend(painter),
    )


def _picture_of_model(model: nn.Module, example_inputs: Any, entry: str, look: _Look) -> Picture:
    program = _captured(model, example_inputs, entry, model.training)
    batch_known = True
    try:
        # Partition records the batch dimension of each node.
        PassManager([Partition()]).run(program)
    except CaptureError:
        batch_known = False
    return _picture_of_step(program, model.training, look, batch_known)


def _picture_of_step(program: StepProgram, training: bool, look: _Look, batch_known: bool = True) -> Picture:
    drawn = DrawnOperations(program, look.depth)
    frames = frames_of_modules(drawn)
    painter = Painter(drawn, _recorded_values(program), frames.frame_of, densities=look.densities)
    painter.batch_known = batch_known
    members = _module_clusters(painter, frames)
    stateful = any(box.style == "stateful" for box in painter.boxes)
    legend = [*(["stateful"] if stateful else []), *(["carried"] if program.slots else [])]
    legend += ["density"] * (look.profile is not None)
    return Picture(
        type(program.source).__name__,
        f"one time step, {_mode(training)}",
        [*painter.inputs({}), *members, *painter.outputs()],
        painter.edges(),
        legend,
    )


def _picture_of_net(net: Net, example_inputs: Any, look: _Look) -> Picture:
    program = net.program
    if net.options.step_mode == "s":
        picture = _picture_of_step(program, net.training, look, batch_known=program.whole_sequences is None)
        if program.whole_sequences is None:
            return picture
        return replace(picture, subtitle=f"whole sequences, {_mode(net.training)}")
    values = _recorded_values(program)
    if example_inputs is not None:
        values = _values_for(program, example_inputs, net.options.entry) or values
    painter, members = _regions(program, values, look, _how_regions_run(net, look.profile))
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
        _legend(painter),
    )


def _how_regions_run(net: Net, profile: ProfileData | None) -> dict[str, str]:
    """How each region runs, as measured or as expected."""
    measured = {row.region: row.runs_as for row in profile.regions} if profile is not None else {}
    modules, program = net.region_modules(), net.program
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    return {
        r.name: measured.get(r.name) or how_region_will_run(program, r, modules.get(r.name), device)
        for r in program.regions
    }


def _legend(painter: Painter) -> list[str]:
    kinds = set(painter.kinds.values())
    legend = [kind for kind in ("once", "fold", "events", "map", "loop") if kind in kinds]
    return legend + ["carried"] * bool(painter.program.slots) + ["density"] * (painter.densities is not None)


def _regions(
    program: StepProgram, values: Mapping[str, Any], look: _Look, how: Mapping[str, str]
) -> tuple[Painter, list[Member]]:
    """The painter of a program with regions, and the boxes in frames of regions."""
    region_of = {node: region.name for region in program.regions for node in region.nodes}
    runs = {region.name: (region.kind, how.get(region.name, "")) for region in program.regions}
    drawn = DrawnOperations(program, look.depth, region_of, runs)
    frames = frames_of_regions(drawn, region_of, program)
    styles = {
        frame: "events" if how.get(region.name) == "by events" else region.kind
        for frame, region in frames.regions.items()
    }
    painter = Painter(drawn, values, frames.frame_of, styles, look.densities)

    def inside(frame: str) -> list[Member]:
        members: list[Member] = []
        for child in frames.children.get(frame, []):
            region = frames.regions.get(child)
            if region is not None:
                members.append(_region_cluster(painter, child, region, how.get(region.name, "")))
            else:
                members.append(_repetition_cluster(painter, frames.repetitions[child], child, inside(child)))
        return members + painter.members(frame)

    return painter, inside("")


_NOTED = ("kernel", "stepped", "stepped, with kernels", "by events", "dense and by events")
"""How regions run, where the kind of the region does not say it."""


def _region_cluster(painter: Painter, frame: str, region: Region, how: str) -> Cluster:
    refusals = [(node, refusal) for node, refusal in region.refusals() if node in painter.depth]
    codes = {refusal.code for _, refusal in refusals}
    shared = codes.pop() if len(codes) == 1 else ""
    reasons = dict.fromkeys(f"{refusal.code} {refusal.reason}" for _, refusal in refusals)
    part = "" if frame == region.name else "continued"
    note = ", ".join(filter(None, [part, how if how in _NOTED else "", shared]))
    style = painter.kinds[frame]
    cluster = Cluster(frame, style, region.name, note=note)
    cluster.tooltip = "\n".join([f"{region.name}: {STYLES[style].meaning}", *([how] if how else []), *reasons])
    cluster.members = painter.members(frame, show_codes=not shared)
    return cluster


def _repetition_cluster(painter: Painter, repetition: Repetition, frame: str, members: list[Member]) -> Cluster:
    title, note = repetition_titles(painter.program, repetition)
    if repetition.modules:
        _shorten_names(members, f"{repetition.modules[0]}.")
    tooltip = ", ".join(repetition.modules) or title
    return Cluster(frame.replace(" ", "_"), "container", title, members, note, f"{tooltip}\ndepth= draws each of them")


def _shorten_names(members: list[Member], prefix: str) -> None:
    """Leave the name of a frame out of the names in it."""
    for member in members:
        if isinstance(member, Cluster):
            _shorten_names(member.members, prefix)
        elif isinstance(member, Box):
            member.rows = [replace(row, name=row.name.removeprefix(prefix)) for row in member.rows]


def _mode(training: bool) -> str:
    return "training mode" if training else "evaluation mode"


def _captured(model: nn.Module, example_inputs: Any, entry: str, training: bool) -> StepProgram:
    program = capture(model, example_inputs, entry, training)
    passes: list[Pass] = [Normalize(), RemoveDeadCode()]
    PassManager(passes).run(program)
    return program


def _recorded_values(program: StepProgram) -> dict[str, Any]:
    return {node.name: VALUE.of(node) for node in program.graph.nodes if VALUE.is_known(node)}


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


def _module_clusters(painter: Painter, frames: Frames) -> list[Member]:
    """The boxes of a model in frames nested like its modules."""
    resolve: Callable[[str], Any] = painter.program.resolve

    def inside(frame: str, depth: int) -> list[Member]:
        members = painter.members(frame)
        for child in frames.children.get(frame, []):
            below = inside(child, depth + 1)
            module, repetition = frames.modules.get(child, ""), frames.repetitions.get(child)
            if len(below) == 1 and repetition is None:
                members += below
                continue
            style = "inner container" if depth % 2 else "container"
            if repetition is None:
                title, note, tooltip = module, type(resolve(module)).__name__, ""
            else:
                title, note = repetition_titles(painter.program, repetition)
                tooltip = ", ".join(repetition.modules) + "\ndepth= draws each of them"
            if module:
                _shorten_names(below, f"{module}.")
            members.append(Cluster(f"c{len(numbers)}", style, title, below, note, tooltip))
            numbers.append(child)
        return members

    numbers: list[str] = []
    return inside("", 0)
