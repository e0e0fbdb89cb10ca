"""`Executable`: step programs together with the emitted graphs, arguments and modules that run them.

`snnfx.runtime.net.Net` owns one. The memory model and the calls of a net take the executable, so that emission, memory
planning and execution do not depend on `Net`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from snnfx.emit.arguments import Arguments
from snnfx.emit.emitted_graphs import CONSTANTS, REGIONS, EmittedGraphs
from snnfx.emit.recompute_forms import RecomputeForm, RecomputeForms
from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.ir.history import History
from snnfx.ir.options import ConvertOptions, time_dims_of_leaves
from snnfx.ir.program import SELF_TARGET, Region, StepProgram

__all__ = ["Executable"]


class Executable:
    """The step programs of one model, ready to run in training and evaluation mode.

    Args:
        root: the module that the emitted graphs take as first argument; their targets are attribute paths on it.
        source: the single-step model. Its `training` flag selects the program, graphs and arguments in use.
        programs: the step program of each mode, `{training: program}`.
        options: the options of the conversion.
        history: gets a record of each emitted graph.

    Attributes:
        graphs: the emitted graphs; `graphs.emit()` makes them and the children of `root` that they call.
    """

    def __init__(
        self,
        root: nn.Module,
        source: nn.Module,
        programs: Mapping[bool, StepProgram],
        options: ConvertOptions,
        history: History | None = None,
    ) -> None:
        self.root, self.source, self.options = root, source, options
        self.programs = dict(programs)
        time_dims = time_dims_of_leaves(options.time_dim, programs[True])
        self._arguments = {mode: Arguments(p, time_dims, options) for mode, p in programs.items()}
        self.graphs = EmittedGraphs(
            root, self.programs, self._arguments, options, History() if history is None else history
        )
        self._recompute_forms = RecomputeForms(self.graphs)

    def with_source(self, source: nn.Module) -> Executable:
        """The same graphs for a copy of the model, which has the same submodules."""
        executable = copy.copy(self)
        root = nn.Module()
        own = {name: self.root._modules[name] for name in (CONSTANTS, REGIONS)}
        root.__dict__.update(_parameters=source._parameters, _buffers=source._buffers)
        root.__dict__.update({"_modules": {**source._modules, **own}, SELF_TARGET: source})
        executable.root, executable.source = root, source
        return executable

    @property
    def training(self) -> bool:
        """Whether the model is in training mode."""
        return self.source.training

    @property
    def program(self) -> StepProgram:
        """The step program of the current mode."""
        return self.programs[self.source.training]

    @property
    def regions(self) -> list[Region]:
        """The regions of the current mode, in execution order."""
        return self.program.regions

    @property
    def arguments(self) -> Arguments:
        """The arguments of a call in the current mode."""
        return self._arguments[self.source.training]

    @property
    def varying_inputs(self) -> list[bool]:
        """For each tensor input, whether it has a time dimension."""
        return self.arguments.varying

    @property
    def constants(self) -> nn.Module:
        """The child of `root` that stores the constants of the programs."""
        constants = self.root._modules[CONSTANTS]
        assert constants is not None
        return constants

    def region_modules(self) -> dict[str, nn.Module]:
        """The modules that run the regions of the current mode, by region name."""
        return self.graphs.region_modules(self.source.training)

    def graph_runner(self, part: str) -> Callable[..., Any] | None:
        """The function that runs the graph of a part in the current mode; None if this mode has no such part."""
        return self.graphs.runners.get((self.source.training, part))

    def recompute_form(self, part: str) -> RecomputeForm:
        """The "main" or "plain" graph of the current mode, divided into tiles."""
        return self._recompute_forms.form(self.source.training, part)

    def recomputing_runner(self, part: str, plan: RecomputePlan) -> Callable[..., Any]:
        """The function that runs the "main" or "plain" graph of the current mode with the segments of a plan."""
        return self._recompute_forms.runner(self.source.training, part, plan)
