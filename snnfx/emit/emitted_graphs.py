"""Emit and compile the graphs of step programs, by mode and part.

The parts are "main", which takes and returns the state; "plain", which starts from the reset state and is the graph
that users see and export; and "first", for a first step that differs from the later steps. Modes that share a program
share its graphs. For the step of a loop inside a call, "iterations" starts from the reset state and returns the state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor, fx, nn

from snnfx.analysis.first_step_match import match_first_step
from snnfx.emit.arguments import Arguments
from snnfx.emit.compiled_graph import compile_graph
from snnfx.emit.emitter import Emitted
from snnfx.emit.multi_step import emit_multi_step
from snnfx.emit.plain_graph import emit_iterations, emit_plain
from snnfx.emit.single_step import emit_single_step
from snnfx.ir.history import History
from snnfx.ir.options import ConvertOptions
from snnfx.ir.pass_manager import run_emission
from snnfx.ir.printing import describe_node
from snnfx.ir.program import SELF_TARGET, StepProgram
from snnfx.ops.run_loop import LoopHandle
from snnfx.sandbox.snapshot import ModuleCache
from snnfx.sandbox.torch_internals import pytree

__all__ = [
    "CONSTANTS",
    "REGIONS",
    "EmittedGraphs",
]

R = TypeVar("R")

_making = threading.RLock()
"""Acquired while a graph is made at a call: other threads may need the same one."""

REGIONS = "snnfx_regions"
"""The child of the root module that contains the modules of the regions."""
CONSTANTS = "snnfx_constants"
"""The child of the root module that stores the constants of the programs."""


class EmittedGraphs:
    """The emitted graphs of the step programs of one model.

    Args:
        root: the module that the graphs take as first argument; `emit` makes its children for regions and constants.
        programs: the step program of each mode, `{training: program}`.
        arguments: the arguments of a call in each mode.
        options: the options of the conversion.
        history: gets a record of each graph.

    Attributes:
        emitted: the graphs, by `(training, part)`.
        runners: functions that run the graphs, by `(training, part)`.
        shown: the graph of each mode that users see.
        is_replaced: whether a user replaced a graph.
        separate_statistics: mode -> the norms that take statistics of their own at the first step, and the reason.
    """

    def __init__(
        self,
        root: nn.Module,
        programs: Mapping[bool, StepProgram],
        arguments: Mapping[bool, Arguments],
        options: ConvertOptions,
        history: History,
    ) -> None:
        self.root, self.programs, self.arguments, self.options = root, programs, arguments, options
        self.history = history
        self.emitted: dict[tuple[bool, str], fx.Graph] = {}
        self.runners: dict[tuple[bool, str], Callable[..., Any]] = {}
        self.shown: dict[bool, fx.Graph] = {}
        self.is_replaced = False
        self.separate_statistics: dict[bool, tuple[str, str]] = {}
        self._all_programs = [q for p in programs.values() for q in (p, p.first_step) if q is not None]

    def emit(self) -> None:
        """Make the graphs of both modes.

        Call this once the root module has all of its attributes, because `target_name` avoids their names.
        """
        constants = {name: value for p in self._all_programs for name, value in p.constants.items()}
        self.root._modules[CONSTANTS] = _constants_module(constants)
        self.root._modules[REGIONS] = ModuleCache()
        if not self._share_program:
            self._emit(True, "in_training")
            self._emit(False, "in_evaluation")
            return
        self._emit(True, "both_modes")
        self.shown[False] = self.shown[True]
        self.emitted.update({(False, part): graph for (_, part), graph in self.emitted.items()})
        self.runners.update({(False, part): runner for (_, part), runner in self.runners.items()})

    @property
    def _share_program(self) -> bool:
        """Whether both modes run the same program."""
        return self.programs[True] is self.programs[False]

    def _emit(self, mode: bool, label: str) -> None:
        program, arguments, options = self.programs[mode], self.arguments[mode], self.options
        container = f"{REGIONS}.{label}"

        def emit_main() -> Emitted:
            if options.step_mode == "m":
                return emit_multi_step(program, container, self.target_name, reduce=options.reduce)
            return emit_single_step(program, container, self.target_name)

        def emit_without_state() -> Emitted:
            dims, output_dim = arguments.tensor_dims, arguments.output_time_dim
            return emit_plain(program, container, self.target_name, regions, dims, output_dim, options.reduce)

        regions = self._take(mode, "main", label, emit_main)
        # A graph without state cannot return the final values of persistent slots.
        needs_state = program.first_step is not None or program.carried or program.persistent_slots
        if options.step_mode == "m" and not needs_state and _is_plain_structure(program.output_spec):
            self._take(mode, "plain", label, emit_without_state)
        first, label = program.first_step, f"{label}_first"
        match = match_first_step(program) if options.step_mode == "m" else None
        if match is not None and match.refusal:
            names = ", ".join(f"`{name}`" for name in dict.fromkeys(map(describe_node, match.norms)))
            self.separate_statistics[mode] = names, match.refusal
        if first is not None and (match is None or match.refusal):
            self._take(mode, "first", label, lambda: emit_single_step(first, f"{REGIONS}.{label}", self.target_name))

    def iterations(self, mode: bool) -> fx.Graph | None:
        """The part "iterations" of a mode, made at its first use; None if the step has no such form."""
        program = self.programs[mode]
        if program.first_step is not None or program.carried or program.persistent_slots:
            return None
        with _making:
            if (mode, "iterations") not in self.emitted:
                label = self._label_of(mode)
                container, dims = f"{REGIONS}.{label}", self.arguments[mode].tensor_dims

                def emit() -> tuple[fx.Graph, fx.Graph, str]:
                    emitted = emit_iterations(program, container, self.target_name, self._regions_of(label), dims)
                    self.keep(label, emitted.regions)
                    return emitted.graph, emitted.graph, f"{len(emitted.graph.nodes)} nodes"

                graph = self.run("emit", "iterations", mode, emit)
                for same in (True, False) if self._share_program else (mode,):
                    self.emitted[same, "iterations"] = graph
            return self.emitted[mode, "iterations"]

    def _take(self, mode: bool, part: str, label: str, emit: Callable[[], Emitted]) -> dict[str, nn.Module]:
        """Emit one part of a mode and store its graph, runner and regions; return all regions of the label."""

        def emit_and_keep() -> tuple[Emitted, fx.Graph, str]:
            emitted = emit()
            self.keep(label, {**self._regions_of(label), **emitted.regions})
            return emitted, emitted.graph, f"{len(emitted.graph.nodes)} nodes"

        graph = self.run("emit", part, mode, emit_and_keep).graph
        self.emitted[mode, part] = graph
        self.runners[mode, part] = compile_graph(graph)
        if part != "first":
            self.shown[mode] = graph
        return self._regions_of(label)

    def run(self, name: str, part: str, mode: bool, emit: Callable[[], tuple[R, fx.Graph, str]]) -> R:
        """Emit a graph of a mode, check it, and add its record to the history.

        Args:
            name: "emit", or another transformation of an emitted graph.
            part: the part, and further options.
            mode: whether the graph runs in training.
            emit: returns `(result, graph, note)`; it stores the modules that the graph calls.
        """
        training = None if self._share_program else mode
        options = f"part={part!r}" + ("" if training is None else f", training={training}")
        program = self.programs[mode]
        return run_emission(f"{name}{{{options}}}", program, self.root, emit, self.history, training)

    def replace(self, training: bool, graph: fx.Graph) -> None:
        """Run a user's graph in a mode, or in both modes if they share a program."""
        self.is_replaced = True
        runner = compile_graph(graph)
        for mode in (True, False) if self._share_program else (training,):
            self.shown[mode] = graph
            self.runners[mode, "plain" if (mode, "plain") in self.runners else "main"] = runner

    def keep(self, label: str, regions: Mapping[str, nn.Module]) -> None:
        """Store region modules under `snnfx_regions.<label>`, the container that a graph was emitted for."""
        container = nn.Module()
        container._modules.update(regions)
        # A new dict: another thread may iterate over the modules of the net.
        cast(nn.Module, self.root._modules[REGIONS])._modules = {**self._containers, label: container}

    def region_modules(self, training: bool) -> dict[str, nn.Module]:
        """The modules that run the regions of a mode, by region name."""
        return self._regions_of(self._label_of(training))

    def _label_of(self, training: bool) -> str:
        own = "in_training" if training else "in_evaluation"
        return own if own in self._containers else "both_modes"

    def _regions_of(self, label: str) -> dict[str, nn.Module]:
        container = self._containers.get(label)
        return {} if container is None else dict(container.named_children())

    @property
    def _containers(self) -> dict[str, nn.Module | None]:
        return cast(nn.Module, self.root._modules[REGIONS])._modules

    def target_name(self, target: str) -> str:
        """The attribute path on the root module for a target of a program."""
        root = self.root
        if target == SELF_TARGET:
            return target
        if any(target in program.constants for program in self._all_programs):
            return f"{CONSTANTS}.{target}"
        # A child named like a method or attribute of the root (`run`, `options`, ...) is reached through the model.
        first = target.partition(".")[0]
        return f"{SELF_TARGET}.{target}" if hasattr(type(root), first) or first in root.__dict__ else target


def _is_plain_structure(spec: pytree.TreeSpec) -> bool:
    """Whether a graph can return outputs with this structure."""
    return spec.type in (None, tuple, list, dict) and all(map(_is_plain_structure, spec.children()))


def _constants_module(constants: Mapping[str, Any]) -> nn.Module:
    """A module that stores the constants of a program without parameters or persistent buffers."""
    holder = nn.Module()
    for name, value in constants.items():
        if isinstance(value, nn.Module):
            holder._modules[name] = value
        elif isinstance(value, LoopHandle):
            holder.__dict__[name] = value
            # Its constants move with the net: `net.to(...)`.
            holder._modules[f"{name}_constants"] = value.net._modules[CONSTANTS]
        elif isinstance(value, Tensor) and not value.requires_grad:
            holder.register_buffer(name, value.detach(), persistent=False)
        else:
            holder.__dict__[name] = value
    return holder
