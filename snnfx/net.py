"""`Net`: the converted model, a torch.fx.GraphModule that runs whole sequences.

The net shares the children, parameters and buffers of the model it came from, so an optimizer of the model goes on
working and the keys of the state_dict are the model's. Its graph is functional: `(inputs, state, time) -> (outputs,
final state)`; `forward`, `run` and the chunked form around it are ordinary Python.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from snnfx.allocator import expect_large_blocks
from snnfx.arguments import Arguments
from snnfx.carry import outputs_without, rebuild_state, split_arguments, with_output_at
from snnfx.emitted_graphs import REGIONS, EmittedGraphs, compile_graph
from snnfx.errors import AllocationError, CaptureError, InputError, warn_once
from snnfx.functional import chunk_multi_step_forward
from snnfx.memory.failure import explained_failure, is_allocation_failure
from snnfx.memory.training import Recomputation, refuse_statistics_over_time
from snnfx.options import ConvertOptions, time_dims_of_leaves
from snnfx.passes.base import PassRecord
from snnfx.passes.checkpoint import RecomputePlan
from snnfx.passes.chunk import ChunkPlan, plan_chunks
from snnfx.passes.emit import emit_multi_step
from snnfx.program import SELF_TARGET, Region, StepProgram
from snnfx.regions import JoinedOutputs, combine_reductions
from snnfx.scalars import WatchedScalar, first_change, watch
from snnfx.serialize import copy_model, pack_programs, unpack_programs
from snnfx.streaming import Stream

__all__ = ["ConvertOptions", "Net"]


class Net(fx.GraphModule):
    """A converted single-step model; made by `snnfx.convert`.

    Call it with whole sequences: `y_seq = net(x_seq)` starts from the reset state every time. `run` takes and returns
    the state. `graph`, `code`, `regions` and `program` show what it does; `history` how it came about.
    """

    options: ConvertOptions
    history: list[PassRecord]
    _programs: dict[bool, StepProgram]
    _replan: Callable[..., Net] | None
    _arguments_in: dict[bool, Arguments]

    def __init__(
        self,
        source: nn.Module,
        programs: dict[bool, StepProgram],
        options: ConvertOptions,
        history: Sequence[PassRecord] = (),
        replan: Callable[..., Net] | None = None,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=type(source).__name__)
        self.__dict__.update(
            _parameters=source._parameters,
            _buffers=source._buffers,
            _non_persistent_buffers_set=source._non_persistent_buffers_set,
            _modules=OrderedDict(source._modules),
        )
        self.__dict__[SELF_TARGET] = source
        # Not by assignment: the model may have children of these names.
        self.__dict__.update(options=options, training=source.training, _replan=replan)
        self._carried: dict[str, Any] | None = None
        self._take_programs(programs, history)
        expect_large_blocks()

    # -- building -------------------------------------------------------------------------------------------------

    def _take_programs(self, programs: dict[bool, StepProgram], history: Sequence[PassRecord]) -> None:
        """Become the net of these programs; what was made for others is forgotten."""
        self.__dict__.update(_programs=programs, history=list(history))
        time_dims = time_dims_of_leaves(self.options.time_dim, programs[True])
        self._arguments_in = {mode: Arguments(p, time_dims, self.options) for mode, p in programs.items()}
        self._scalars = {mode: watch(p.scalars, self.source) for mode, p in programs.items()}
        self._nets_for_shapes: dict[Any, Net] = {}
        self._recordings: dict[Any, Callable[..., Any]] = {}
        self._chunk_plans: dict[Any, ChunkPlan] = {}
        self._recomputation = Recomputation(self)
        self._recompute_plans: dict[Any, RecomputePlan] = {}
        self._graphs = EmittedGraphs(self)
        self._graphs.emit()
        self._graph = self._graphs.shown[self.training]
        self._graph.owning_module = self
        self.recompile()

    def region_modules(self) -> dict[str, nn.Module]:
        """What runs the regions in the mode that the net is in, by their names."""
        return self._graphs.region_modules(self.training)

    def recompile(self) -> Any:
        """Regenerate the code of the current graph; `forward` stays the driver around it."""
        code = super().recompile()

        def forward(self: Net, *args: Any, T: int | None = None, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return _forward(self, args, kwargs, T)
            try:
                return _forward(self, args, kwargs, T)
            except (RuntimeError, MemoryError) as error:
                if not is_allocation_failure(error) or isinstance(error, AllocationError):
                    raise
                raise explained_failure(self, error) from error

        # torch.export matches dynamic_shapes with the names of the arguments.
        forward.__signature__ = self._signature()  # type: ignore[attr-defined]
        forward.__doc__ = _forward.__doc__
        type(self).forward = forward
        return code

    def _signature(self) -> inspect.Signature:
        """The arguments of the captured step, by name, and `T`."""
        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        T = inspect.Parameter("T", inspect.Parameter.KEYWORD_ONLY, default=None)
        programs = self.__dict__.get("_programs")
        if programs is None:
            return inspect.Signature([me, T])
        numbered = pytree.tree_unflatten(list(range(len(programs[True].input_leaves))), programs[True].input_spec)
        arguments = [*numbered[0], *numbered[1].values()]
        leaves = programs[True].input_leaves
        names = [leaves[min(pytree.tree_leaves(a), default=0)].name.partition(".")[0] for a in arguments]
        if len(set(names)) != len(names) or not all(n.isidentifier() and n not in ("self", "T") for n in names):
            many = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
            return inspect.Signature([me, many, T, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])
        positional = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        positional += [
            inspect.Parameter(c.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
            for c in programs[True].carried
        ]
        return inspect.Signature([me, *positional, T])

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode (training or evaluation)."""
        graphs = self.__dict__.get("_graphs")
        return graphs.shown[self.training] if graphs else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        """Replace the graph of the current mode (and of both, while they are one)."""
        graphs = self.__dict__.get("_graphs")
        self._graph = graph
        graph.owning_module = self
        if graphs:
            graphs.replace(self.training, graph)
        self.recompile()

    @property
    def program(self) -> StepProgram:
        """The step program of the current mode."""
        return self._programs[self.training]

    @property
    def programs(self) -> dict[bool, StepProgram]:
        """The step program of each mode, `{training: program}`."""
        return self._programs

    @property
    def positional_inputs(self) -> int:
        """How many of the tensors of `bound` belong to positional arguments."""
        args, _ = pytree.tree_unflatten(list(range(len(self.program.input_leaves))), self.program.input_spec)
        return sum(self.program.input_leaves[i].placeholder is not None for i in pytree.tree_leaves(args))

    def covers(self, leaves: list[Tensor]) -> bool:
        """Whether the net was planned for tensors of these shapes, time first; it is planned again for others."""
        return self._arguments.covered(leaves)

    @property
    def varying_inputs(self) -> list[bool]:
        """Of each tensor input, whether it has a time dimension."""
        return self._arguments.varying

    @property
    def _arguments(self) -> Arguments:
        """What a call takes in the current mode."""
        return self._arguments_in[self.training]

    @property
    def regions(self) -> list[Region]:
        """The regions of the current mode, in the order in which they run."""
        return self.program.regions

    @property
    def source(self) -> nn.Module:
        """The single-step model that the net was converted from; its modules are the net's."""
        return self.__dict__[SELF_TARGET]  # type: ignore[no-any-return]

    # -- running --------------------------------------------------------------------------------------------------

    def run(
        self,
        *args: Any,
        state: dict[str, Any] | None = None,
        record: Sequence[str] = (),
        T: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a sequence with explicit state; nothing is kept in the net.

        Args:
            *args: the inputs, as for calling the net.
            state: `{"lif1.v": Tensor, ...}`, the state before the first step; None: the reset state.
            record: qualified names of modules called in a step (their output) or of slots (their value after each
                step); the values over time are returned.
            T: the number of time steps, when no input carries time.
            **kwargs: inputs by name.

        Returns:
            `(y_seq, final state)`, or `(y_seq, final state, {name: [T, N, *]})` with `record`. Outputs that are
            carried (see `snnfx.convert`) are in the state, not in `y_seq`.

        Raises:
            InputError: the inputs do not fit (SNNFX301, 303, 305 to 307, 310), the state has other slots (SNNFX308),
                or there is nothing of a name in `record` (SNNFX311).

        Example:
            >>> import torch, snnfx
            >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode()))
            >>> x_seq = torch.rand(6, 4, 3)
            >>> first, state = net.run(x_seq[:2])
            >>> second, state, records = net.run(x_seq[2:], state=state, record=("1.v",))
            >>> torch.equal(torch.cat([first, second]), net(x_seq)), records["1.v"].shape
            (True, torch.Size([4, 4, 2]))
        """
        names = (record,) if isinstance(record, str) else tuple(record)
        _, leaves, given, T = self._received(args, kwargs, T)
        outputs, state, records = self._execute(leaves, given, state, names, T)
        outputs = outputs_without(outputs, [c.path for c in self.program.carried])
        return (outputs, state, dict(zip(names, records, strict=True))) if names else (outputs, state)

    def bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None = None
    ) -> tuple[list[Tensor], dict[str, Any], int]:
        """`(tensors with time first, carried arguments by name, T)` of a call, for `run_bound`.

        Raises:
            InputError: as `run`.
        """
        _, ordered, given, steps = self._received(args, kwargs, T)
        assert steps is not None
        return ordered, given, steps

    def run_bound(
        self, leaves: list[Tensor], given: dict[str, Any], state: dict[str, Any] | None, T: int | None
    ) -> tuple[Any, dict[str, Any]]:
        """Run what `bound` gave, or a slice of it over time: `(outputs without those that are carried, final state)`.

        Args:
            leaves: one tensor for each input of a step, time first; without time in step mode "s".
            given: carried arguments, for the first slice.
            state: as for `run`.
            T: the number of time steps; None in step mode "s".
        """
        outputs, state, _ = self._execute(leaves, given, state, (), T)
        if self.program.carried:
            outputs = outputs_without(outputs, [c.path for c in self.program.carried])
        return outputs, state

    def tensors_of_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among the arguments of one step, in the order of `varying_inputs`."""
        if self.program.carried:
            args, kwargs, _ = self.split_carried(args, kwargs)
        return self._arguments.bind(args, kwargs)

    def stream(self, inputs: Iterable[Any], *, of: str = "chunks", state: dict[str, Any] | None = None) -> Stream:
        """Run a sequence whose inputs come bit by bit, in memory that does not grow with its length.

        Args:
            inputs: yields the arguments of a call for the next few time steps (`of="chunks"`, `[k, N, *]`, any k) or
                for the next one (`of="steps"`, `[N, *]`): a tensor, a tuple of positional or a dict of keyword
                arguments. It is asked for one item at a time.
            of: "chunks" or "steps"; steps are put together to chunks of the length that the chunk plan chooses.
            state: the state before the first step, as for `run`; None: the reset state.

        Returns:
            An iterator over the outputs, chunk by chunk; with `reduce=`, over the reduction of all steps so far. Its
            `state` is the state after the last chunk, its `steps` their number. History is kept as in `run`: use it
            under `torch.no_grad()` unless you mean to differentiate.

        Raises:
            InputError: SNNFX309, `of` or the step mode does not fit; SNNFX317 at the first chunk: a BatchNorm in
                training takes its statistics over all time steps; otherwise as `run`.

        Example:
            >>> import torch, snnfx
            >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode()))
            >>> x_seq = torch.rand(10, 4, 3)
            >>> stream = net.stream(x_seq.split(4))
            >>> y_seq = torch.cat(list(stream))
            >>> torch.equal(y_seq, net(x_seq)), stream.steps, list(stream.state)
            (True, 10, ['1.v'])
        """
        return Stream(self, inputs, of, state)

    def _received(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Any], int | None]:
        """`(tensors, the same with time first, carried arguments by name, T)` of a call."""
        given: dict[str, Any] = {}
        if self.program.carried:
            args, kwargs, given = self.split_carried(args, kwargs)
        leaves = ordered = self._arguments.bind(args, kwargs)
        if self.options.step_mode == "m":
            ordered, T = self._arguments.time_first(leaves, T)
        change = first_change(self._scalars[self.training])
        if change is not None:
            self._capture_again(*change, ordered, given)
        return leaves, ordered, given, T

    # Compiled code looks for changes too; a part of one graph (fullgraph=True) this cannot be.
    @torch.compiler.disable(  # type: ignore[untyped-decorator]
        reason="SNNFX315 a plain value of the model changed after conversion: call the net once without torch.compile"
    )
    def _capture_again(self, scalar: WatchedScalar, now: Any, leaves: list[Tensor], given: dict[str, Any]) -> None:
        """The model has another plain value than the graph: the net becomes that of the model as it is now."""
        what = f"`{scalar.qualified_name}` is {now!r}, but the step was captured with {scalar.shown}"
        replan = self._replan
        if replan is None or self._graphs.is_replaced:
            raise InputError(
                "SNNFX315",
                what,
                why="the graph was replaced by hand, and capturing the model again would lose that.",
                hint="Convert the model again, or set the value back.",
            )
        warn_once(
            "SNNFX315",
            f"{what}: the model is captured again."
            + (" Make it a buffer or a parameter if it changes often." if scalar.name != "training" else ""),
            key=(id(self), scalar.qualified_name),
        )
        steps = self._arguments.at_step(leaves, 0) if self.options.step_mode == "m" else leaves
        # Captured from shapes before, from shapes again.
        fresh = replan(self, *(self._example(steps, given) if self.program.input_ranks else ((), {})))
        self._take_programs(fresh._programs, fresh.history)

    def _example(self, steps: list[Tensor], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one step, for capturing with their shapes."""
        args, kwargs = self._arguments.arguments_of(steps)
        return args, kwargs | {c.name: given[c.name] for c in self.program.carried if c.required and c.name in given}

    def _execute(
        self,
        leaves: list[Tensor],
        given: dict[str, Any],
        state: dict[str, Any] | None,
        record: tuple[str, ...],
        T: int | None,
    ) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
        """Run bound inputs, time first (one step of them in step mode "s", where T is not used)."""
        arguments = self._arguments
        if T is None or self.options.step_mode == "s":
            arguments.check_state(state)
            if state is not None:
                arguments.check_shapes(state, leaves)
            state = arguments.first_state(state, given)
            flat, state, recorded = self._single(leaves, state, record)
            return pytree.tree_unflatten(list(flat), self.program.output_spec), state, recorded
        other = self._other_net(leaves, given)
        if other is not None:
            return other._execute(leaves, given, state, record, T)
        arguments.check_state(state)
        if state is not None:
            arguments.check_shapes(state, arguments.at_step(leaves, 0))
        state = arguments.first_state(state, given)
        k = None if record else self._chunk_length(leaves, T, state)
        recompute = None if record else self._checkpoint_length(leaves, T)
        records: tuple[Any, ...] = ()
        if k is not None and k < T:
            flat, state = self._in_chunks(k, leaves, state, T)
        elif recompute is not None:
            flat, state = self._in_chunks(recompute, leaves, state, T, checkpoint=True)
        else:
            flat, state, records = self._steps(leaves, state, record, T)
        outputs = [arguments.time_back(y) for y in flat]
        return pytree.tree_unflatten(outputs, self.program.output_spec), state, records

    def _steps(
        self, leaves: list[Tensor], state: dict[str, Any] | None, record: tuple[str, ...], T: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        runner = self._recorder(record) if record else self._runner("main", leaves, T)
        if state is None and (self.training, "first") in self._graphs.runners:
            return self._first_then_rest(runner, leaves, record, T)
        time = torch.arange(T, device=leaves[0].device) if leaves else torch.arange(T)
        return runner(self, *leaves, state, time)  # type: ignore[no-any-return]

    def _first_then_rest(
        self, runner: Callable[..., Any], leaves: list[Tensor], record: tuple[str, ...], T: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """The first step does something else than the others: it is run on its own."""
        now = self._arguments.at_step(leaves, 0)
        first, state, _ = self._graphs.runners[self.training, "first"](self, *now, None, None)
        if record:
            raise InputError(
                "SNNFX311",
                "record= needs the state before the first step here",
                why="the first step of this model does something else than the others.",
                hint="Run one step first: _, state = net.run(x_seq[:1]); then record the rest with state=state.",
            )
        reduce = self.options.reduce
        if reduce is None:
            first = tuple(y.unsqueeze(0) if isinstance(y, Tensor) else y for y in first)
        if T == 1:
            return first, state, ()
        later = self._arguments.from_step(leaves, 1)
        time = torch.arange(1, T, device=leaves[0].device)
        rest, state, _ = runner(self, *later, state, time)
        if reduce is not None:
            return combine_reductions([(1, first), (T - 1, rest)], reduce), state, ()
        joined = tuple(torch.cat((a, b)) if isinstance(a, Tensor) else a for a, b in zip(first, rest, strict=True))
        return joined, state, ()

    def _single(
        self, leaves: list[Tensor], state: dict[str, Any] | None, record: tuple[str, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        if record:
            raise InputError("SNNFX311", "record= is for sequences", hint='Convert with step_mode="m".')
        part = "first" if state is None and (self.training, "first") in self._graphs.runners else "main"
        return self._graphs.runners[self.training, part](self, *leaves, state, None)  # type: ignore[no-any-return]

    def _in_chunks(
        self, k: int, leaves: list[Tensor], state: dict[str, Any] | None, T: int, checkpoint: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        varying = self._arguments.varying
        sequences = tuple(x for x, v in zip(leaves, varying, strict=True) if v) or (torch.arange(T),)

        def run(inputs: list[Tensor], state: dict[str, Any] | None, steps: int) -> Any:
            flat, state, _ = self._steps(inputs, state, (), steps)
            return flat, state

        def one_chunk(*chunk_and_state: Any) -> Any:
            *chunk, state = chunk_and_state
            parts = iter(chunk)
            inputs = [next(parts) if v else x for x, v in zip(leaves, varying, strict=True)]
            steps = chunk[0].shape[0]
            if checkpoint:
                return self._recomputation.one_chunk(lambda x, s: run(x, s, steps))(inputs, state)
            return run(inputs, state, steps)

        if self.options.reduce is None and checkpoint:
            return chunk_multi_step_forward(k, sequences, one_chunk, state=state)  # type: ignore[no-any-return]
        if self.options.reduce is None:
            joined = JoinedOutputs(T)
            for chunk in zip(*(x.split(k) for x in sequences), strict=True):
                flat, state = one_chunk(*chunk, state)
                joined.add(flat)
            return joined.values(), state  # type: ignore[return-value]
        parts: list[tuple[int, tuple[Any, ...]]] = []
        for chunk in zip(*(x.split(k) for x in sequences), strict=True):
            flat, state = one_chunk(*chunk, state)
            parts.append((chunk[0].shape[0], flat))
        return combine_reductions(parts, self.options.reduce), state  # type: ignore[return-value]

    # -- arguments ------------------------------------------------------------------------------------------------

    def split_carried(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """The arguments of a call as `(args, kwargs, those that are carried)`."""
        parameters = list(inspect.signature(getattr(type(self.source), self.options.entry)).parameters.values())[1:]
        return split_arguments(parameters, [c.name for c in self.program.carried], args, kwargs)

    def final_state_in(self, outputs: Any, state: dict[str, Any]) -> Any:
        """What the model returns: outputs with the final values of what is carried in their places."""
        for argument in self.program.carried:
            outputs = with_output_at(outputs, argument.path, rebuild_state(argument, state))
        return outputs

    def planned_for(self, *args: Any, T: int | None = None, **kwargs: Any) -> Net:
        """The net that runs these inputs: this one, or the one that it planned for shapes that its plan does not cover.

        Args and Raises as of `run`.
        """
        _, leaves, given, T = self._received(args, kwargs, T)
        other = self._other_net(leaves, given) if self.options.step_mode == "m" else None
        return self if other is None else other

    def _other_net(self, leaves: list[Tensor], given: dict[str, Any]) -> Net | None:
        """A net planned for the shapes of these inputs, when the plan of this one does not cover them."""
        if self._arguments.covered(leaves):
            return None
        key = tuple(tuple(x.shape) for x in leaves)
        ranks = (self.training, tuple(x.dim() for x in leaves))
        if key not in self._nets_for_shapes:
            if self._replan is None:
                raise InputError("SNNFX306", f"inputs of shapes {[list(x.shape) for x in leaves]} do not fit the plan")
            warn_once(
                "SNNFX102",
                f"inputs of step rank {ranks[1]} are not what the net was planned for (batched, equal batch sizes); "
                "it is planned again for them, which may map instead of fold. Pass example_inputs to plan once.",
                key=(id(self), ranks),
            )
            example = self._example(self._arguments.at_step(leaves, 0), given)
            try:
                self._nets_for_shapes[key] = self._replan(self, *example)
            except CaptureError as error:
                sizes = self._arguments.batch_sizes(leaves)
                if len(set(sizes.values())) < 2:
                    raise
                raise InputError(
                    "SNNFX303",
                    "the batch sizes of the inputs differ",
                    where=", ".join(f"`{name}`: {size}" for name, size in sizes.items()),
                    why=f"one step of the model does not take them: {error.why or error.what}",
                    hint="Give all inputs the same batch size, as one call of the model takes them.",
                ) from error
        other = self._nets_for_shapes[key]
        if other.training != self.training:
            other.__dict__["training"] = self.training
        return other

    # -- memory in training ---------------------------------------------------------------------------------------

    def _runner(self, part: str, leaves: Sequence[Tensor], T: int) -> Callable[..., Any]:
        """The form of the graph for this call: as it is, or with parts that backward computes again."""
        if self._recomputation.applies() and not isinstance(self.options.checkpoint, int):
            plan = self.recompute_plan(T, *leaves)
            if plan.segments:
                return self._recomputation.runner(part, plan)
        return self._graphs.runners[self.training, part]

    def _checkpoint_length(self, leaves: Sequence[Tensor], T: int) -> int | None:
        """Time steps between the checkpoints of the state in training, None for no such checkpoints."""
        if not self._recomputation.applies():
            return None
        k = self.recompute_plan(T, *leaves).steps
        return k if k is not None and k < T else None

    def recompute_plan(self, T: int, *sequences: Tensor) -> RecomputePlan:
        """What is computed again in the backward pass of T steps of inputs of these shapes (time first)."""
        key = (self.training, T, tuple((tuple(x.shape), x.dtype, x.requires_grad) for x in sequences))
        if key not in self._recompute_plans:
            self._recompute_plans[key] = self._plan_recomputation(T, sequences)
        return self._recompute_plans[key]

    def _plan_recomputation(self, T: int, sequences: Sequence[Tensor]) -> RecomputePlan:
        checkpoint = self.options.checkpoint
        if isinstance(checkpoint, int):
            refuse_statistics_over_time(self.program, self.training, f"checkpoint={checkpoint}")
            return RecomputePlan(steps=checkpoint, reason=f"the state is kept every {checkpoint} steps, as asked for")
        if checkpoint == "regions":
            return self._recomputation.every_region(T, sequences)
        from snnfx.memory.plan import plan_training

        return plan_training(self, T, sequences, None)

    # -- chunks ---------------------------------------------------------------------------------------------------

    def _chunk_length(self, leaves: list[Tensor], T: int, state: dict[str, Any] | None = None) -> int | None:
        """How many steps to run at once, None for all: inference in evaluation mode only, never while compiling."""
        if self.options.chunk is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return None
        if isinstance(self.options.chunk, int):
            return self.options.chunk
        return self.chunk_plan(*leaves, state=state).length

    def chunk_plan(self, *sequences: Tensor, state: dict[str, Any] | None = None) -> ChunkPlan:
        """The chunk plan for inputs (time first) and a first state of these shapes, see `snnfx.memory.plan`."""
        if self.options.chunk != "auto":
            return plan_chunks(self.options.chunk)
        steps = self._arguments.at_step(sequences, 0)
        first = tuple((k, tuple(v.shape), v.dtype) for k, v in (state or {}).items() if isinstance(v, Tensor))
        key = (tuple((tuple(x.shape), x.dtype) for x in steps), state is None, first)
        if key not in self._chunk_plans:
            from snnfx.memory.plan import plan_inference

            self._chunk_plans[key] = plan_inference(self, sequences, state)
        return self._chunk_plans[key]

    # -- recording ------------------------------------------------------------------------------------------------

    def _recorder(self, names: tuple[str, ...]) -> Callable[..., Any]:
        """A form of the graph that also returns values over time."""
        key = (self.training, names)
        if key not in self._recordings:
            program = self.program
            nodes = [self._recorded_node(program, name) for name in names]
            label = f"record_{len(self._recordings)}"
            if any(node.meta.get("sunk") for node in nodes if isinstance(node, Node)):
                raise InputError(
                    "SNNFX311",
                    f"one of {', '.join(names)} runs on the {self.options.reduce} over time",
                    why=f"with reduce={self.options.reduce!r} it has no value at each step.",
                    hint="Convert without reduce= to record it.",
                )
            name_on_net, reduce = self._graphs.target_name, self.options.reduce
            emitted = emit_multi_step(program, f"{REGIONS}.{label}", name_on_net, nodes, reduce=reduce)
            self._graphs.keep(label, emitted.regions)
            self._recordings[key] = compile_graph(emitted.graph)
        return self._recordings[key]

    @staticmethod
    def _recorded_node(program: StepProgram, name: str) -> Any:
        for slot, following in zip(program.slots, program.next_states, strict=True):
            if slot.name == name:
                return following
        known = {slot.name for slot in program.slots}
        found = None
        for node in program.graph.nodes:
            returned = node.meta.get("returned_by", ())
            known.update(returned)
            found = node if name in returned else found
        if found is None:
            raise InputError(
                "SNNFX311",
                f"there is nothing called `{name}` to record",
                why=f"known are {', '.join(sorted(k for k in known if k))}.",
            )
        return found

    # -- state carried from call to call -----------------------------------------------------------------------------

    @property
    def carried_state(self) -> dict[str, Any] | None:
        """The state carried between calls, by slot name; None: the reset state."""
        return self._carried

    @carried_state.setter
    def carried_state(self, state: dict[str, Any] | None) -> None:
        self._carried = state

    def reset_carried_state(self) -> None:
        """Forget the state carried between calls (`snnfx.functional.reset_net`)."""
        self._carried = None

    def detach_carried_state(self) -> None:
        """Cut the history of the state carried between calls (`snnfx.functional.detach_net`)."""
        if self._carried is not None:
            self._carried = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self._carried.items()}

    # -- life of the module -----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Net:
        """Set the mode of the net and of the model that it shares its modules with."""
        super().train(mode)
        self.source.training = mode
        return self

    def convert_to(self, step_mode: str) -> Net:
        """The same programs in another step mode; modules are shared."""
        if step_mode == self.options.step_mode:
            return self
        options = replace(self.options, step_mode=step_mode)
        return Net(self.source, self._programs, options, self.history, self._replan)

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        source = copy_model(self.source, memo)
        packed = pack_programs(self._programs)
        clone = _rebuild(source, copy.deepcopy(packed, memo), self.options, self.history, self._replan)
        clone.__dict__["training"] = self.training
        memo[id(self)] = clone
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        # GraphModule would trace again; the program is packed as it is, with the model beside it.
        packed = pack_programs(self._programs)
        return _rebuild, (self.source, packed, self.options, self.history, self._replan), {"training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _forward(self: Net, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None) -> Any:
    """Run a whole sequence from the reset state (or the carried one)."""
    options = self.options
    leaves, ordered, given, T = self._received(args, kwargs, T)
    plain = self._graphs.runners.get((self.training, "plain"))
    # Chunks are only planned for inputs that this plan covers.
    if plain is not None and T is not None and not options.carry_state and self._arguments.covered(ordered):
        k = self._chunk_length(ordered, T)
        if (k is None or k >= T) and self._checkpoint_length(ordered, T) is None:
            plain = self._runner("plain", ordered, T)
            carriers = any(self._arguments.varying)
            return plain(self, *leaves) if carriers else plain(self, *leaves, torch.arange(T, device=leaves[0].device))
    state = self._carried if options.carry_state or options.step_mode == "s" else None
    if state is not None and self.program.carried and not options.carry_state:
        # In single steps the caller hands on what the model takes as arguments.
        explicit = {name for c in self.program.carried for name in c.slot_names()}
        state = {name: value for name, value in state.items() if name not in explicit} or None
    outputs, state, _ = self._execute(ordered, given, state, (), T)
    outputs = self.final_state_in(outputs, state)
    if options.carry_state or options.step_mode == "s":
        self._carried = state
        if options.carry_state:
            self.detach_carried_state()
    return outputs


def _rebuild(
    source: nn.Module, packed: tuple[Any, ...], options: ConvertOptions, history: Sequence[PassRecord], replan: Any
) -> Net:
    return Net(source, unpack_programs(packed, source), options, history, replan)
