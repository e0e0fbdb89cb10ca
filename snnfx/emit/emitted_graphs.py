"""The graphs that a net runs: emitted from its step programs, compiled, and kept by mode and part.

The parts are "main", with the state as a value; "plain", from the reset state, which is what a user sees and exports;
and "first", for a first step that does something else than the others. One program for both modes makes one of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx, nn

from snnfx.emit.compiled_graph import compile_graph
from snnfx.emit.multi_step import emit_multi_step
from snnfx.emit.plain_graph import emit_plain
from snnfx.emit.single_step import emit_single_step
from snnfx.ir.program import SELF_TARGET
from snnfx.sandbox.torch_internals import pytree

if TYPE_CHECKING:
    from snnfx.runtime.net import Net

__all__ = [
    "CONSTANTS",
    "REGIONS",
    "EmittedGraphs",
]

REGIONS = "snnfx_regions"
"""The child of a net under which the modules of its regions are."""
CONSTANTS = "snnfx_constants"
"""The child of a net under which the constants of its programs are."""


class EmittedGraphs:
    """The graphs of one net.

    Args:
        net: `emit` makes its children for regions and constants.

    Attributes:
        emitted: by `(training, part)`.
        runners: functions that run them, by `(training, part)`.
        shown: the graph of each mode that a user sees.
        is_replaced: whether a user gave the net a graph.
    """

    def __init__(self, net: Net) -> None:
        self.net = net
        self.emitted: dict[tuple[bool, str], fx.Graph] = {}
        self.runners: dict[tuple[bool, str], Callable[..., Any]] = {}
        self.shown: dict[bool, fx.Graph] = {}
        self.is_replaced = False
        self._programs = [q for p in net.programs.values() for q in (p, p.first_step) if q is not None]

    def emit(self) -> None:
        """Make the graphs of both modes; the net has all of its attributes by now (see `target_name`)."""
        constants = {name: value for p in self._programs for name, value in p.constants.items()}
        self.net._modules[CONSTANTS] = _hold_constants(constants)
        self.net._modules[REGIONS] = nn.Module()
        if not self._are_shared:
            self._emit(True, "in_training")
            self._emit(False, "in_evaluation")
            return
        self._emit(True, "both_modes")
        self.shown[False] = self.shown[True]
        self.emitted.update({(False, part): graph for (_, part), graph in self.emitted.items()})
        self.runners.update({(False, part): runner for (_, part), runner in self.runners.items()})

    @property
    def _are_shared(self) -> bool:
        """Whether both modes run the same program."""
        return self.net.programs[True] is self.net.programs[False]

    def _emit(self, mode: bool, label: str) -> None:
        net, program, options = self.net, self.net.programs[mode], self.net.options
        container = f"{REGIONS}.{label}"
        if options.step_mode == "m":
            emitted = emit_multi_step(program, container, self.target_name, reduce=options.reduce)
        else:
            emitted = emit_single_step(program, container, self.target_name)
        self._take(mode, "main", emitted.graph)
        is_plain = program.first_step is None and not program.carried and _is_plain_structure(program.output_spec)
        if options.step_mode == "m" and is_plain:
            dims, output_dim = net._arguments.tensor_dims, net._arguments.output_time_dim
            plain = emit_plain(program, container, self.target_name, emitted.regions, dims, output_dim, options.reduce)
            self._take(mode, "plain", plain.graph)
            emitted.regions.update(plain.regions)
        self.keep(label, emitted.regions)
        if program.first_step is not None:
            first = emit_single_step(program.first_step, f"{REGIONS}.{label}_first", self.target_name)
            self.keep(f"{label}_first", first.regions)
            self.emitted[mode, "first"] = first.graph
            self.runners[mode, "first"] = compile_graph(first.graph)

    def _take(self, mode: bool, part: str, graph: fx.Graph) -> None:
        self.shown[mode] = self.emitted[mode, part] = graph
        self.runners[mode, part] = compile_graph(graph)

    def replace(self, training: bool, graph: fx.Graph) -> None:
        """Run a user's graph in a mode, and in both while they are one."""
        self.is_replaced = True
        runner = compile_graph(graph)
        for mode in (True, False) if self._are_shared else (training,):
            self.shown[mode] = graph
            self.runners[mode, "plain" if (mode, "plain") in self.runners else "main"] = runner

    def keep(self, label: str, regions: Mapping[str, nn.Module]) -> None:
        """Keep modules where a graph that was emitted for the container `snnfx_regions.<label>` finds them."""
        container = nn.Module()
        container._modules.update(regions)
        self._containers[label] = container

    def region_modules(self, training: bool) -> dict[str, nn.Module]:
        """What runs the regions in a mode, by their names."""
        own = "in_training" if training else "in_evaluation"
        container = cast(nn.Module, self._containers[own if own in self._containers else "both_modes"])
        return dict(container.named_children())

    @property
    def _containers(self) -> dict[str, nn.Module | None]:
        return cast(nn.Module, self.net._modules[REGIONS])._modules

    def target_name(self, target: str) -> str:
        """Where the net keeps what a target of a program names."""
        net = self.net
        if target == SELF_TARGET:
            return target
        if any(target in program.constants for program in self._programs):
            return f"{CONSTANTS}.{target}"
        # A child called like a method or an attribute of the net (`run`, `options`, ...) is reached through the model.
        first = target.partition(".")[0]
        return f"{SELF_TARGET}.{target}" if hasattr(type(net), first) or first in net.__dict__ else target


def _is_plain_structure(spec: pytree.TreeSpec) -> bool:
    """Whether outputs nested like this can be returned by a graph."""
    return spec.type in (None, tuple, list, dict) and all(map(_is_plain_structure, spec.children()))


def _hold_constants(constants: Mapping[str, Any]) -> nn.Module:
    """A module without parameters or persistent buffers that keeps the constants of a program."""
    holder = nn.Module()
    for name, value in constants.items():
        if isinstance(value, nn.Module):
            holder._modules[name] = value
        elif isinstance(value, Tensor) and not value.requires_grad:
            holder.register_buffer(name, value.detach(), persistent=False)
        else:
            holder.__dict__[name] = value
    return holder
