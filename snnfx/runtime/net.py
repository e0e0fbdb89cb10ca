"""`Net`: the converted model, a torch.fx.GraphModule that runs whole sequences.

The net owns an `Executable` (`snnfx.emit.executable`): step programs, and emitted graphs that are functional,
`(inputs, state, time) -> (outputs, final state)`. A call binds its arguments (`snnfx.emit.arguments`), replans the net
if its plan does not cover them (`snnfx.runtime.replanning`), and executes the graphs (`snnfx.runtime.execution`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.allocator import expect_large_blocks
from snnfx.capture.setting_reads import first_changed_setting, watch_settings
from snnfx.emit.arguments import Arguments, signature_of
from snnfx.emit.executable import Executable
from snnfx.emit.readable_code import readable_code
from snnfx.emit.recompute_segments import RecomputePlan
from snnfx.errors import AllocationError
from snnfx.ir.graph_pass import check_picklable
from snnfx.ir.history import History, PassRecord
from snnfx.ir.options import ConvertOptions
from snnfx.ir.program import Region, StepProgram
from snnfx.ir.serialization import copy_model, pack_programs, unpack_programs
from snnfx.memory.allocation_failure import explain_allocation_failure, is_allocation_failure
from snnfx.memory.chunk_plan import ChunkPlan
from snnfx.ops.run_loop import LoopHandle
from snnfx.runtime.backward_pass import is_in_backward_pass, refuse_to_carry_state_in_backward
from snnfx.runtime.bound_calls import BoundCalls
from snnfx.runtime.compiled_call import call_as_operator
from snnfx.runtime.execution import Execution
from snnfx.runtime.guard_check import GuardCheck
from snnfx.runtime.net_operator import NetOperator
from snnfx.runtime.net_summary import summary_as_html, summary_as_text
from snnfx.runtime.no_iterations import run_no_iterations
from snnfx.runtime.persistent_state import PersistentState
from snnfx.runtime.replanning import PlanCache, capture_again, net_for, net_for_modes
from snnfx.runtime.source_module import SourceModule
from snnfx.runtime.streaming import Stream
from snnfx.runtime.whole_sequences import refuse_whole_sequences
from snnfx.sandbox.attribute_values import AttributeValues
from snnfx.state.carry import outputs_without, with_final_state
from snnfx.state.registry import reset_net
from snnfx.state.reset_detection import ResetDetection

__all__ = ["ConvertOptions", "Net"]


class Net(SourceModule):
    """A single-step model converted to run whole sequences; made by `snnfx.convert`.

    `y_seq = net(x_seq)` starts every call from the reset state. A buffer or parameter that the steps change lives on in
    the model, as the running statistics of BatchNorm do. `run` takes and returns the state. `graph`, `code`,
    `regions` and `program` show the converted model, and `history` lists the passes that made it.

    The net shares the parameters, buffers, children and training mode of its `source` model.
    """

    history: History
    first_attributes: AttributeValues
    """The plain attributes of the model at conversion, which may be state; the steps of the model change them later."""
    _executable: Executable
    _replan: Callable[..., Net] | None
    _carried: dict[str, Any] | None
    _reset_detection: ResetDetection | None

    def __init__(
        self,
        source: nn.Module,
        programs: dict[bool, StepProgram],
        options: ConvertOptions,
        history: Sequence[PassRecord] = (),
        replan: Callable[..., Net] | None = None,
        first_attributes: AttributeValues | None = None,
    ) -> None:
        super().__init__(source)
        # Not by assignment: the model may have children with these names.
        self.__dict__.update(_replan=replan, _reset_detection=None)
        self.__dict__["first_attributes"] = first_attributes or AttributeValues.of(source)
        self._carried = None
        self._use_programs(programs, history, options)
        expect_large_blocks()

    # -- building -------------------------------------------------------------------------------------------------

    def _use_programs(
        self, programs: dict[bool, StepProgram], history: Sequence[PassRecord], options: ConvertOptions
    ) -> None:
        """Emit the graphs of these programs and run them from now on; earlier graphs and plans are dropped."""
        self.share_children()
        # The graphs are emitted again.
        own_history = History(record for record in history if record.stage != "emitted")
        executable = Executable(self, self.source, programs, options, own_history)
        self.__dict__.update(history=own_history, _executable=executable)
        self._watch(programs)
        self._nets_for_shapes = PlanCache()
        self._nets_for_modes: dict[Any, Net] = {}
        self._execution = Execution(executable)
        executable.graphs.emit()
        self._forget_bound_calls()
        self._graph = executable.graphs.shown[self.training]
        self._graph.owning_module = self
        self.recompile()

    def use_guards(self, programs: dict[bool, StepProgram]) -> None:
        """Replace the guards by those of new programs that are the same otherwise."""
        for mode, program in programs.items():
            self.programs[mode].guards = program.guards
            self.programs[mode].setting_reads = program.setting_reads
        self._watch(self.programs)
        self._forget_bound_calls()

    def _forget_bound_calls(self) -> None:
        self._bound_calls = BoundCalls(self._executable, self._guard_checks)
        self._bound_iterations = BoundCalls(self._executable, self._guard_checks, "iterations")
        # Compiled code checks the handle of the operator, so that it is compiled again.
        self._operator = NetOperator(
            self._executable, self._current_executable, self.call_without_hooks, self._execute, self.check_guards
        )

    def _watch(self, programs: dict[bool, StepProgram]) -> None:
        """Bind the guards of these programs to the model."""
        self._watched_settings = {mode: watch_settings(p.setting_reads, self.source) for mode, p in programs.items()}
        self._guard_checks = {mode: GuardCheck(p, self.source) for mode, p in programs.items()}

    def region_modules(self) -> dict[str, nn.Module]:
        """The modules that run the regions of the current mode, by region name."""
        return self._executable.region_modules()

    def recompile(self) -> Any:
        """Regenerate the code of the current graph; `forward` stays the Python function that drives it."""
        code = super().recompile()

        def forward(self: Net, *args: Any, T: int | None = None, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return _compiled_forward(self, args, kwargs, T)
            try:
                if T is None and not kwargs:
                    bound = self._bound_calls.find(args)
                    if bound is not None:
                        return bound(*args)
                return _forward(self, args, kwargs, T)
            except (RuntimeError, MemoryError) as error:
                if not is_allocation_failure(error) or isinstance(error, AllocationError):
                    raise
                raise explain_allocation_failure(error, self._execution.plans.shortest_chunk) from error

        # Each net has code of its own, because Dynamo limits the graphs for one code object.
        forward.__code__ = forward.__code__.replace()
        # torch.export matches dynamic_shapes by argument names.
        executable = self.__dict__.get("_executable")
        forward.__signature__ = signature_of(executable and executable.programs[True])  # type: ignore[attr-defined]
        forward.__doc__ = _forward.__doc__
        type(self).forward = forward
        # GraphModule wraps the call to explain errors of generated code, which is slow; that of nn.Module stays, looked
        # up at each call: capture replaces it during a trace.
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode (training or evaluation)."""
        executable = self.__dict__.get("_executable")
        shown = executable.graphs.shown.get(self.training) if executable is not None else None
        return self._graph if shown is None else shown

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        """Replace the graph of the current mode, or of both modes if they share a program."""
        executable = self.__dict__.get("_executable")
        self._graph = graph
        graph.owning_module = self
        if executable is not None:
            executable.graphs.replace(self.training, graph)
            self._forget_bound_calls()
        self.recompile()

    @property
    def code(self) -> str:
        """The graph of the current mode as Python code to read; functions of snnfx have their plain names."""
        return readable_code(self.graph, self)

    def __repr__(self) -> str:
        return summary_as_text(self.source, self.program, self._shown_step_mode)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return summary_as_html(self.source, self.program, self._shown_step_mode)

    @property
    def _shown_step_mode(self) -> str:
        return "m" if self.loops else self.options.step_mode

    @property
    def program(self) -> StepProgram:
        """The step program of the current mode."""
        return self._executable.program

    @property
    def programs(self) -> dict[bool, StepProgram]:
        """The step programs, by the value of `training`."""
        return self._executable.programs

    @property
    def options(self) -> ConvertOptions:
        """The options of `snnfx.convert`."""
        return self._executable.options

    @options.setter
    def options(self, options: ConvertOptions) -> None:
        self._executable.options = options
        self._forget_bound_calls()

    @property
    def positional_inputs(self) -> int:
        """The number of tensors of `bound` that belong to positional arguments."""
        return self._arguments.positional_inputs

    def covers(self, leaves: list[Tensor]) -> bool:
        """Whether the plan covers inputs of these shapes, time first; for others the net is planned again."""
        return self._arguments.covered(leaves)

    @property
    def varying_inputs(self) -> list[bool]:
        """For each tensor input, whether it has a time dimension."""
        return self._arguments.varying

    @property
    def _arguments(self) -> Arguments:
        """The arguments of a call in the current mode."""
        return self._executable.arguments

    @property
    def regions(self) -> list[Region]:
        """The regions of the current mode, in execution order."""
        return self.program.regions

    # -- running --------------------------------------------------------------------------------------------------

    def run(
        self,
        *args: Any,
        state: dict[str, Any] | None = None,
        record: Sequence[str] = (),
        T: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a sequence with explicit state; the net stores none, except buffers and parameters that the steps change.

        Args:
            *args: the inputs, as for calling the net.
            state: the state before the first step, `{"lif1.v": Tensor, ...}`; None: the reset state. A buffer or
                parameter that the steps change starts from the model, unless the state contains it.
            record: qualified names of modules or slots to record over time: the output of a module, or the value of a
                slot after each step.
            T: the number of time steps; required if no input has a time dimension.
            **kwargs: inputs by name.

        Returns:
            `(y_seq, final state)`, or `(y_seq, final state, {name: [T, N, *]})` with `record`. Carried outputs (see
            `carry` of `snnfx.convert`) are in the state, not in `y_seq`.

        Raises:
            InputError: the inputs are invalid (SNNFX301, 303, 305 to 307, 310), the state has other slots (SNNFX308),
                or a name in `record` is unknown (SNNFX311).

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
        if state is not None or names:
            refuse_whole_sequences(self.program, "net.run with record=" if names else "net.run with state=")
        _, leaves, given, T = self._bind_call(args, kwargs, T)
        outputs, state, records = self._execute(leaves, given, state, names, T)
        outputs = outputs_without(outputs, [c.path for c in self.program.carried])
        return (outputs, state, dict(zip(names, records, strict=True))) if names else (outputs, state)

    def bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None = None
    ) -> tuple[list[Tensor], dict[str, Any], int]:
        """Bind the arguments of a call for `run_bound`: `(tensors with time first, carried arguments by name, T)`.

        Raises:
            InputError: as for `run`.
        """
        _, ordered, given, steps = self._bind_call(args, kwargs, T)
        assert steps is not None
        return ordered, given, steps

    def run_bound(
        self, leaves: list[Tensor], given: dict[str, Any], state: dict[str, Any] | None, T: int | None
    ) -> tuple[Any, dict[str, Any]]:
        """Run the inputs that `bound` returned, or a slice of them over time.

        Args:
            leaves: one tensor for each input of a step, time first; without time in step mode "s".
            given: carried arguments, for the first slice.
            state: as for `run`.
            T: the number of time steps; None in step mode "s".

        Returns:
            `(outputs without carried outputs, final state)`.
        """
        outputs, state, _ = self._execute(leaves, given, state, (), T)
        return outputs_without(outputs, [c.path for c in self.program.carried]), state

    def _current_executable(self) -> Executable:
        return self._executable

    def call_without_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """Call the net without the hooks of the net itself."""
        return self.forward(*args, **kwargs)

    def run_iterations(self, steps: int, inputs: list[Tensor], state: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...]]:
        """Run the iterations of a loop whose step this net is; see `snnfx.ops.run_loop`.

        Args:
            steps: the number of iterations.
            inputs: one tensor for each input of the step, time first.
            state: values before the first iteration, by slot; None: the initial value.
        """
        given = {name: value for name, value in state.items() if value is not None}
        if not torch.compiler.is_compiling() and steps < 1:
            return run_no_iterations(
                self.program,
                lambda zeros: self._execute(zeros, {}, given or None, (), 1)[:2],
                inputs,
                self._arguments.varying,
                given,
            )
        arguments: tuple[Tensor, ...] = ()
        if not given and inputs and not torch.compiler.is_compiling():
            has_time = any(self._arguments.varying)
            arguments = tuple(inputs) if has_time else (*inputs, torch.arange(steps, device=inputs[0].device))
            bound = self._bound_iterations.find(arguments)
            if bound is not None:
                return bound(*arguments)  # type: ignore[no-any-return]
        outputs, final, _ = self._execute(inputs, {}, given or None, (), steps)
        if arguments and self._arguments.covered(inputs):
            run = self._execution.plans.runner_at_once("main", inputs, steps)
            if run is not None:
                self._bound_iterations.bind_later(arguments, run)
        return outputs, tuple(final[slot.name] for slot in self.program.slots)

    @property
    def loops(self) -> list[Net]:
        """For a model that runs over time itself: the nets of its loops, in execution order."""
        handles = (value for value in self.program.constants.values() if isinstance(value, LoopHandle))
        return [handle.net for handle in handles]  # type: ignore[misc]

    def tensors_of_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among the arguments of one step, in the order of `varying_inputs`."""
        args, kwargs, _ = self.split_carried(args, kwargs)
        return self._arguments.bind(args, kwargs)

    def stream(self, inputs: Iterable[Any], *, of: str = "chunks", state: dict[str, Any] | None = None) -> Stream:
        """Stream a sequence from an iterable, in memory that does not grow with its length.

        Args:
            inputs: yields the arguments of a call for the next k time steps (`of="chunks"`, `[k, N, *]`, any k) or for
                one time step (`of="steps"`, `[N, *]`): a tensor, a tuple of positional arguments or a dict of keyword
                arguments. Items are requested one at a time. For a DataLoader with labels, pass
                `(x for x, label in loader)`.
            of: "chunks" or "steps"; steps are stacked into chunks, whose length is chosen as for `chunk=`.
            state: the state before the first step, as for `run`; None: the reset state, or with `carry_state=True` the
                state that the net carries. The net then updates its carried state after each chunk, as after a call.

        Returns:
            An iterator over the outputs, chunk by chunk; with `reduce=`, over the reduction of all steps so far. Its
            attribute `state` is the state after the latest chunk, and `steps` the number of time steps so far. Autograd
            records as in `run`: use `torch.no_grad()` for inference.

        Raises:
            InputError: `of` or the step mode is invalid (SNNFX309); an item does not match the inputs of the net
                (SNNFX305, 307); a chunk has no time steps (SNNFX301); no input has a time dimension, so only steps can
                be streamed (SNNFX310); a BatchNorm in training takes its statistics over all time steps (SNNFX317, at
                the first chunk); otherwise as for `run`.

        Example:
            >>> import torch, snnfx
            >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode()))
            >>> x_seq = torch.rand(10, 4, 3)
            >>> stream = net.stream(x_seq.split(4))
            >>> y_seq = torch.cat(list(stream))
            >>> torch.equal(y_seq, net(x_seq)), stream.steps, list(stream.state)
            (True, 10, ['1.v'])
        """
        refuse_whole_sequences(self.program, "net.stream")
        return Stream(self, inputs, of, state)

    def _bind_call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Any], int | None]:
        """Bind the arguments of a call: `(tensors, tensors with time first, carried arguments by name, T)`.

        The model is captured again if one of its settings has changed since.
        """
        arguments = self._arguments
        args, kwargs, given = arguments.split_carried(args, kwargs)
        leaves = ordered = arguments.bind(args, kwargs)
        if self.options.step_mode == "m":
            ordered, T = arguments.time_first(leaves, T)
        net = self.in_current_modes(ordered, given)
        net.check_guards(ordered, given)
        return leaves, ordered, given, T

    def _execute(
        self,
        leaves: list[Tensor],
        given: dict[str, Any],
        state: dict[str, Any] | None,
        record: tuple[str, ...],
        T: int | None,
    ) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
        """Run bound inputs: a sequence, time first, or one step in step mode "s", which ignores T."""
        in_modes = self.in_current_modes(leaves, given)
        if in_modes is not self:
            return in_modes._execute(leaves, given, state, record, T)
        if T is None or self.options.step_mode == "s":
            self._arguments.check_ranks(leaves, time_first=False)
            return self._execution.run_step(leaves, given, state, record)
        replanned = net_for(self, leaves, given)
        if replanned is not None:
            replanned.check_guards(leaves, given)
            return replanned._execute(leaves, given, state, record, T)
        return self._execution.run_sequence(leaves, given, state, record, T)

    def check_guards(self, leaves: list[Tensor], given: dict[str, Any]) -> None:
        """Capture the model again if something outside the graph has changed that the step depends on.

        Args:
            leaves, given: the inputs of the call.
        """
        if torch.compiler.is_compiling():  # compiled code has guards of its own for other reads
            if first_changed_setting(self._watched_settings[self.source.training]) is not None:
                capture_again(self, leaves, given)
        elif not self._guard_checks[self.source.training].holds():
            capture_again(self, leaves, given)

    def in_current_modes(self, leaves: list[Tensor], given: dict[str, Any]) -> Net:
        """The net for the current modes of torch (gradients, autocast, ...), if the model's code reads them."""
        check = self._guard_checks[self.source.training]
        if not check.guards.modes or torch.compiler.is_compiling():
            return self
        modes = check.modes()
        return self if modes is None else net_for_modes(self, modes, leaves, given)

    def split_carried(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """Split the arguments of a call into `(args, kwargs, carried arguments by name)`."""
        return self._arguments.split_carried(args, kwargs)

    def planned_for(self, *args: Any, T: int | None = None, **kwargs: Any) -> Net:
        """The net that runs these inputs: this net, or the net planned for shapes that its plan does not cover.

        Arguments and errors are those of `run`.
        """
        _, leaves, given, _ = self._bind_call(args, kwargs, T)
        in_modes = self.in_current_modes(leaves, given)
        if in_modes is not self:
            return in_modes.planned_for(*args, T=T, **kwargs)
        replanned = net_for(self, leaves, given) if self.options.step_mode == "m" else None
        return self if replanned is None else replanned

    def chunk_plan(self, *sequences: Tensor, state: dict[str, Any] | None = None) -> ChunkPlan:
        """The chunk plan of inference for inputs (time first) and a first state of these shapes."""
        return self._execution.plans.chunk_plan(sequences, state)

    def recompute_plan(self, T: int, *sequences: Tensor) -> RecomputePlan:
        """The recompute plan of training on T time steps of inputs of these shapes.

        Args:
            T: the number of time steps.
            *sequences: one tensor for each input, time first whatever `time_dim` is; only shapes are read.

        Raises:
            InputError: the inputs are invalid (SNNFX301, 303, 305 to 307, 309); SNNFX318, the budget is too small.
        """
        self._arguments.check_time_first(T, sequences, "recompute_plan")
        return self._execution.plans.recompute_plan(T, sequences)

    @property
    def persistent_state(self) -> PersistentState:
        """The buffers and parameters that the steps of the current mode change."""
        return self._execution.persistent

    # -- state carried across calls -----------------------------------------------------------------------------------

    @property
    def carried_state(self) -> dict[str, Any] | None:
        """The state carried across calls, by slot name; None: the reset state."""
        if self._carried is None or torch.compiler.is_compiling():
            return self._carried
        if self._reset_detection is not None and self._reset_detection.was_reset():
            self.reset_carried_state()
        elif not torch.is_inference_mode_enabled() and any(map(_is_inference, self._carried.values())):
            # Autograd does not accept tensors that a call under `torch.inference_mode` created.
            self._carried = {k: v.clone() if _is_inference(v) else v for k, v in self._carried.items()}
        return self._carried

    @carried_state.setter
    def carried_state(self, state: dict[str, Any] | None) -> None:
        if self._carried is None and not torch.compiler.is_compiling():
            if self._reset_detection is None:
                self.__dict__["_reset_detection"] = ResetDetection(self.source)
            else:
                self._reset_detection.was_reset()  # resets from before this state do not count
        self._carried = state

    def reset(self) -> None:
        """Reset the state carried across calls, like `snnfx.functional.reset_net(net)`.

        `spikingjelly.activation_based.functional.reset_net` calls this method; `snntorch.utils.reset` resets the
        carried state too.
        """
        reset_net(self)

    def _carried_slots(self) -> set[str]:
        """The slots whose state a call carries; in step mode "s" the caller passes carried arguments to every call."""
        slots = {slot.name for slot in self.program.slots}
        if self.options.carry_state:
            return slots
        return slots - {name for c in self.program.carried for name in c.slot_names()}

    def reset_carried_state(self) -> None:
        """Discard the state carried across calls (`snnfx.functional.reset_net`)."""
        self._carried = None

    def detach_carried_state(self) -> None:
        """Detach the state carried across calls (`snnfx.functional.detach_net`)."""
        if self._carried is not None:
            detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self._carried.items()}
            self._carried = detached

    # -- conversion and copies ----------------------------------------------------------------------------------------

    def convert_to(self, step_mode: str) -> Net:
        """A net with the same programs and modules in another step mode."""
        if self.program.whole_sequences is not None:
            if step_mode == "s":
                refuse_whole_sequences(self.program, 'step_mode="s"')
            return self
        if step_mode == self.options.step_mode:
            return self
        # The step of a model that runs over time itself takes one time step.
        takes = "step" if step_mode == "s" else self.options.takes
        options = replace(self.options, step_mode=step_mode, takes=takes)
        return Net(self.source, self.programs, options, self.history, self._replan, self.first_attributes)

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        source = copy_model(self.source, memo)
        packed = pack_programs(self.programs)
        carried = copy.deepcopy(self._detached_state(), memo)
        history = self.history.on(source)
        programs = copy.deepcopy(packed, memo)
        clone = _rebuild(source, programs, self.options, history, self._replan, carried, self.first_attributes)
        memo[id(self)] = clone
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        # GraphModule would trace the module again, so pack the step programs and the model instead.
        check_picklable(self.options.passes)
        packed = pack_programs(self.programs)
        carried = self._detached_state()
        attributes = self.first_attributes
        return _rebuild, (self.source, packed, self.options, self.history, self._replan, carried, attributes)

    def _detached_state(self) -> dict[str, Any] | None:
        """The carried state for a copy of the net, without its autograd graph."""
        state = self.carried_state
        return state and {name: v.detach() if isinstance(v, Tensor) else v for name, v in state.items()}


def _forward(self: Net, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None) -> Any:
    """Run a whole sequence from the reset state, or from the carried state with `carry_state=True`."""
    options = self.options
    if options.stores_state and is_in_backward_pass():
        refuse_to_carry_state_in_backward(self._carried_slots())
    leaves, ordered, given, T = self._bind_call(args, kwargs, T)
    arguments = self._arguments
    # The chunk plan holds only for inputs that the plan of the net covers.
    net = self.in_current_modes(ordered, given)
    if T is not None and not options.carry_state and arguments.covered(ordered) and net is self:
        run = self._execution.plans.runner_at_once("plain", ordered, T)
        if run is not None:
            has_time = any(arguments.varying)
            if not torch.compiler.is_compiling() and has_time and not kwargs and arguments.is_plain:
                self._bound_calls.bind_later(args, run)
            return run(self, *leaves) if has_time else run(self, *leaves, torch.arange(T, device=leaves[0].device))
        if arguments.is_time_first and not kwargs and not options.stores_state and not torch.compiler.is_compiling():
            execution = self._execution
            if execution.runs_first_separately(ordered, T):
                self._bound_calls.bind_first_later(args, execution.run_bound_first)
    state = self.carried_state if options.stores_state else None
    state = self._execution.persistent.carried(state)
    if state is not None and self.program.carried and not options.carry_state:
        carried = self._carried_slots()
        state = {name: value for name, value in state.items() if name in carried} or None
    outputs, state, _ = self._execute(ordered, given, state, (), T)
    outputs = with_final_state(outputs, self.program.carried, state)
    if options.stores_state:
        self._execution.persistent.remember(keep_graph=not options.carry_state)
        self.carried_state = state
        if options.carry_state:
            self.detach_carried_state()
    return outputs


def _compiled_forward(self: Net, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None) -> Any:
    """Run a call that torch.compile traces: as one operator if possible."""
    operator = self._operator
    found = call_as_operator(operator, args, kwargs, T, self._carried if operator.carries_state else None)
    if found is None:
        return _forward(self, args, kwargs, T)
    outputs, finals = found
    if operator.carries_state:
        self.carried_state = {name: value.detach() for name, value in finals.items()}
    return outputs


def _rebuild(
    source: nn.Module,
    packed: tuple[Any, ...],
    options: ConvertOptions,
    history: Sequence[PassRecord],
    replan: Any,
    carried: dict[str, Any] | None = None,
    first_attributes: AttributeValues | None = None,
) -> Net:
    net = Net(source, unpack_programs(packed, source), options, history, replan, first_attributes)
    if carried is not None:
        net.carried_state = carried
    return net


def _is_inference(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_inference()
