"""Decide which frame of a picture each operation is in: modules or regions, and frames around repeated blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from snnfx.inspect.picture.drawn_operations import DrawnOperations
from snnfx.inspect.picture.repeated_blocks import Repetition
from snnfx.ir.program import Region, StepProgram

__all__ = ["Frames", "frames_of_modules", "frames_of_regions", "repetition_titles"]


@dataclass
class Frames:
    """The frames of a picture as a tree; the outermost frame is "".

    Args:
        frame_of: operation -> its innermost frame.
        children: frame -> the frames in it, in the order of their operations.
        modules: frame -> its module.
        regions: frame -> its region; a region that crosses the border of a repeated block has several frames.
        repetitions: frame -> the blocks that it is drawn once for.
    """

    frame_of: dict[Node, str] = field(default_factory=dict)
    children: dict[str, list[str]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    repetitions: dict[str, Repetition] = field(default_factory=dict)
    _known: set[str] = field(default_factory=set)

    def place(self, node: Node, path: Iterable[str]) -> None:
        """Put an operation into the last of these frames, each of which is inside the one before."""
        outer = ""
        for frame in path:
            if frame not in self._known:
                self._known.add(frame)
                self.children.setdefault(outer, []).append(frame)
            outer = frame
        self.frame_of[node] = outer


def frames_of_modules(drawn: DrawnOperations) -> Frames:
    """Frames nested like the containers of the model; a frame of repeated modules stands for all of them."""
    frames = Frames()
    for node in drawn.nodes:
        repetitions = _open(drawn, node)
        path = _without_modules(frames, repetitions, "")
        for container in drawn.containers[node]:
            if container == drawn.closed.get(node):
                break
            path.append(f"module {container}")
            frames.modules[path[-1]] = container
            for repetition in repetitions:
                if container in repetition.modules:
                    frames.repetitions[path[-1]] = repetition
            path += _without_modules(frames, repetitions, container)
        frames.place(node, path)
    return frames


def frames_of_regions(drawn: DrawnOperations, region_of: Mapping[Node, str], program: StepProgram) -> Frames:
    """One frame for each region, in frames of repeated blocks."""
    frames = Frames()
    regions = {region.name: region for region in program.regions}
    parts: dict[tuple[str, Repetition | None], str] = {}
    of_region = {node: region_of[node] for node in drawn.nodes if node in region_of and node not in drawn.closed}
    # Frames are drawn in the order of the regions.
    order = {name: index for index, name in enumerate(regions)}
    for node in sorted(drawn.nodes, key=lambda n: order.get(of_region.get(n, ""), len(order))):
        repetitions = _open(drawn, node)
        path = [_frame_of(frames, repetition) for repetition in repetitions]
        if node in of_region:
            name = of_region[node]
            key = (name, repetitions[-1] if repetitions else None)
            if key not in parts:
                number = sum(known == name for known, _ in parts) + 1
                parts[key] = f"{name}_part{number}" if number > 1 else name
                frames.regions[parts[key]] = regions[name]
            path.append(parts[key])
        frames.place(node, path)
    for slot, value in drawn.slots.items():
        writer = drawn.source(value)
        if slot in region_of and writer in frames.frame_of:
            frames.frame_of[slot] = frames.frame_of[writer]
    return frames


def repetition_titles(program: StepProgram, repetition: Repetition) -> tuple[str, str]:
    """Title and note of the frame of a repetition: `4 × BasicBlock`, `layer1.0 … layer1.3`."""
    if not repetition.modules:
        return f"{repetition.count} ×", "blocks of the same structure"
    kinds = dict.fromkeys(type(program.resolve(module)).__name__ for module in repetition.modules)
    return f"{repetition.count} × {' / '.join(kinds)}", f"{repetition.modules[0]} … {repetition.modules[-1]}"


def _open(drawn: DrawnOperations, node: Node) -> list[Repetition]:
    """The repetitions around a node that have a frame: a closed module shows its count itself."""
    closed = drawn.closed.get(node)
    return [r for r in drawn.repetitions.get(node, []) if closed is None or closed not in r.modules]


def _without_modules(frames: Frames, repetitions: list[Repetition], module: str) -> list[str]:
    """The frames of the repetitions directly inside a module whose blocks are not modules."""
    return [_frame_of(frames, r) for r in repetitions if not r.modules and r.module == module]


def _frame_of(frames: Frames, repetition: Repetition) -> str:
    known = next((frame for frame, other in frames.repetitions.items() if other is repetition), None)
    if known is None:
        known = f"repetition {len(frames.repetitions)}"
        frames.repetitions[known] = repetition
    return known
