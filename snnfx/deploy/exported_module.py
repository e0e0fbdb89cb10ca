"""The net as a pure function of its inputs and states, for tracing: loops as `scan`, no kernels, no memory formats.

Two forms. The form by regions runs the emitted multi-step graph, so that folds run on all time steps at once. Where the
first step differs from the later ones in more than initial values, and for single steps, the whole step is one region.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.deploy.refusals import ExportRefused, refused_region
from snnfx.deploy.scanned_regions import Loops, as_tensor, first_or_later, scan_loop, scan_map, scan_steps_of
from snnfx.emit.executable import Executable
from snnfx.functional import map_forward, multi_step_forward, seq_to_ann_forward
from snnfx.lowering.choices.image_formats import fastest_format
from snnfx.ops.memory_format import channels_last, image_format, row_major
from snnfx.ops.sequence_functions import (
    call_module,
    call_once,
    delay_one_step,
    expand_initial_value,
    hold_over_time,
    reduce_over_time,
    start_value,
)
from snnfx.regions.region_modules import LoopRegion

__all__ = ["ExportedNet", "StateForm", "run_region_graph", "run_step"]

State = dict[str, Any]


@dataclass(frozen=True)
class StateForm:
    """The states that an exported file takes and returns.

    Args:
        given: the slots whose values the file takes.
        returned: the slots whose final values it returns.
        has_start: whether it also takes a bool that selects the reset state instead of the given states.
    """

    given: tuple[str, ...] = ()
    returned: tuple[str, ...] = ()
    has_start: bool = False


class ExportedNet:
    """The function that is traced: `(*inputs, *states[, start]) -> (outputs, final states)`.

    Args:
        executable: of a net in step mode "m", or "s" for a single step.
        stepwise: the executable of the same net in step mode "s", for the form by whole steps; None: by regions.
        states: the states that it takes and returns.
        steps: unroll the loops to this number of time steps; None: `scan`.
        T: the number of time steps, if no input has a time dimension.
    """

    def __init__(
        self,
        executable: Executable,
        stepwise: Executable | None,
        states: StateForm,
        steps: int | None = None,
        T: int | None = None,
    ) -> None:
        self.executable, self.stepwise, self.states, self.steps, self.T = executable, stepwise, states, steps, T
        self.is_single_step = executable.options.step_mode == "s"

    def __call__(self, *flat: Tensor) -> tuple[tuple[Any, ...], State]:
        count = len(self.executable.varying_inputs)
        given = dict(zip(self.states.given, flat[count:], strict=False))
        loops = Loops(self.steps, flat[-1] if self.states.has_start else None)
        state = given or None
        if self.is_single_step:
            outputs, final = self._one_step(self.executable, flat[:count], state, loops)
        else:
            leaves = self._time_first(flat[:count])
            sequences = [x for x, v in zip(leaves, self.executable.varying_inputs, strict=True) if v]
            like = sequences[0] if sequences else None
            T = self.T if like is None else like.shape[0]
            device = leaves[0].device if leaves else None
            assert T is not None
            time = torch.arange(T, device=device)
            if self.stepwise is not None:
                outputs, final = self._by_steps(self.stepwise, leaves, state, time, loops)
            else:
                run = _GraphRun(self.executable, "main", loops)
                outputs, final, _ = run.run(*leaves, state, time)
            outputs = tuple(self._time_back(y) for y in outputs)
        like = flat[0] if flat else torch.empty(())
        return outputs, {name: as_tensor(final[name], like) for name in self.states.returned}

    def _time_first(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        dims = self.executable.arguments.tensor_dims
        return [x.movedim(d, 0).contiguous() if d else x for x, d in zip(leaves, dims, strict=True)]

    def _time_back(self, y: Any) -> Any:
        return self.executable.arguments.time_back(y)

    def _one_step(
        self, executable: Executable, leaves: Sequence[Tensor], state: State | None, loops: Loops
    ) -> tuple[tuple[Any, ...], State]:
        """One step: from the state, from the reset state, or as `loops.start` says."""
        later = None if state is None else run_step(executable, leaves, state)
        if later is not None and loops.start is None:
            return later
        first = run_step(executable, leaves, None)
        if later is None:
            return first
        assert loops.start is not None
        names = list(first[1])
        reset, given = ((y, [s[name] for name in names]) for y, s in (first, later))
        outputs, final = first_or_later(loops.start, reset, given, leaves[0])
        return tuple(outputs), dict(zip(names, final, strict=True))

    def _by_steps(
        self, executable: Executable, leaves: Sequence[Tensor], state: State | None, time: Tensor, loops: Loops
    ) -> tuple[tuple[Any, ...], State]:
        """Run the whole step in one loop."""
        varying = executable.varying_inputs
        sequences = [x for x, v in zip(leaves, varying, strict=True) if v] or [time]
        constants = [x for x, v in zip(leaves, varying, strict=True) if not v]
        slots = [slot.name for slot in executable.program.slots]

        def step(*arguments: Any, is_first: bool = False) -> tuple[Sequence[Any], Sequence[Any]]:
            rest = list(arguments)
            before = None if is_first else dict(zip(slots, rest.pop(), strict=True))
            same, x = iter(rest[: len(constants)]), iter(rest[len(constants) :])
            inputs = [next(x) if v else next(same) for v in varying]
            y, after = run_step(executable, inputs, before)
            return [v for v in y if isinstance(v, Tensor)], [after[name] for name in slots]

        def first(*arguments: Any) -> Any:
            return step(*arguments, is_first=True)

        given = None if state is None else [as_tensor(state[name], sequences[0]) for name in slots]
        has_first = given is None or loops.start is not None
        outputs, final = scan_steps_of(step, first if has_first else None, sequences, constants, given, loops)
        reduce = self.executable.options.reduce
        values = iter(outputs if reduce is None else [reduce_over_time(y, reduce) for y in outputs])
        program = executable.program
        flat = tuple(next(values) if isinstance(v, Node) else v for v in program.outputs)
        return flat, dict(zip(slots, final, strict=True))


def run_step(executable: Executable, leaves: Sequence[Tensor], state: State | None) -> tuple[tuple[Any, ...], State]:
    """One step of an executable in step mode "s": `(outputs, next states)`."""
    has_first = state is None and (False, "first") in executable.graphs.emitted
    run = _GraphRun(executable, "first" if has_first else "main", Loops())
    outputs, following, _ = run.run(*leaves, state, None)
    return tuple(outputs), following


class _GraphRun(fx.Interpreter):
    """Runs an emitted graph with functions that can be exported in place of those that run kernels."""

    def __init__(self, executable: Executable, part: str, loops: Loops) -> None:
        graph = executable.graphs.emitted[False, part]
        super().__init__(executable.root, graph=graph)
        self.extra_traceback = False
        self.loops, self.executable = loops, executable
        self.functions: Mapping[Any, Callable[..., Any]] = {
            seq_to_ann_forward: _fold,
            map_forward: self._map,
            multi_step_forward: self._loop,
            call_once: lambda region, constants: run_region_graph(region)(*constants),
            call_module: self._call_region,
            start_value: self._start_value,
            delay_one_step: self._delay,
            hold_over_time: self._hold,
            row_major: lambda x: x,
        }

    def run_node(self, node: Node) -> Any:
        try:
            return super().run_node(node)
        except ExportRefused as refusal:
            raise refusal.in_region(node.name) from refusal.__cause__
        except Exception as error:
            raise refused_region(node.name, node, error) from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.functions.get(target, target)(*args, **kwargs)

    def _map(self, x_seq: Any, region: Any, constants: Sequence[Any] = ()) -> Any:
        return scan_map(run_region_graph(region.step), x_seq, constants, self.loops)

    def _loop(self, x_seq: Any, region: LoopRegion, state: Any, constants: Sequence[Any] = ()) -> Any:
        return scan_loop(region, run_region_graph, x_seq, state or None, constants, self.loops)

    def _call_region(self, region: nn.Module, *arguments: Any) -> Any:
        """The region of a whole step: `(*constants, *inputs, state)`."""
        assert isinstance(region, LoopRegion)
        *rest, state = arguments
        if state is None and region.first is not None:
            return run_region_graph(region.first)(*rest)
        return run_region_graph(region.step)(*rest, state)

    def _start_value(self, state: State | None, name: str, current: Tensor) -> Any:
        value = start_value(state, name, current)
        is_given = state is not None and name in state
        return torch.where(self.loops.start, current, value) if is_given and self.loops.start is not None else value

    def _delay(
        self,
        following: Any,
        state: Any,
        initial: Any,
        time: Tensor,
        slot: str = "",
        has_batch: bool = False,
        unexpanded: int | None = 0,
    ) -> Tensor:
        if state is not None and self.loops.start is not None:
            first = expand_initial_value(0 if initial is None else initial, state[0], slot, has_batch, unexpanded)
            state = (torch.where(self.loops.start, first, state[0]),)
        return delay_one_step(following, state, initial, time, slot, has_batch, unexpanded)

    def _hold(self, state: Any, initial: Any, time: Tensor) -> Tensor:
        if state is not None and self.loops.start is not None:
            state = (torch.where(self.loops.start, as_tensor(initial, state[0]), state[0]),)
        return hold_over_time(state, initial, time)


class _RegionGraphRun(fx.Interpreter):
    """Runs the graph of a region without changes of the memory format."""

    def __init__(self, region: fx.GraphModule) -> None:
        super().__init__(region)
        self.extra_traceback = False

    def run_node(self, node: Node) -> Any:
        try:
            return super().run_node(node)
        except ExportRefused:
            raise
        except Exception as error:
            raise refused_region("", node, error) from error

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in (fastest_format, image_format, row_major, channels_last):
            return args[0]
        return target(*args, **kwargs)


def run_region_graph(region: fx.GraphModule) -> Callable[..., Any]:
    """The function that runs the graph of a region."""
    return lambda *arguments: _RegionGraphRun(region).run(*arguments)


def _fold(
    x_seq: Sequence[Tensor],
    region: fx.GraphModule,
    constants: Sequence[Any] = (),
    batch_dim: int | Sequence[int] = 0,
    out_batch_dim: int | Sequence[int] = 0,
) -> tuple[Any, ...]:
    """`seq_to_ann_forward` without the checks of sizes, which would fix T and N."""
    dims = _each(batch_dim, len(x_seq))
    T = x_seq[0].shape[0]
    folded = [(x.movedim(0, d) if d else x).flatten(d, d + 1) for x, d in zip(x_seq, dims, strict=True)]
    results = run_region_graph(region)(*constants, *folded)
    dims = _each(out_batch_dim, len(results))
    return tuple(_unfold(y, T, d) for y, d in zip(results, dims, strict=True))


def _each(dim: int | Sequence[int], count: int) -> Sequence[int]:
    return (dim,) * count if isinstance(dim, int) else dim


def _unfold(y: Any, T: Any, dim: int) -> Any:
    if not isinstance(y, Tensor):
        return y
    dim %= y.dim()
    return y.unflatten(dim, (T, -1)).movedim(dim, 0)
