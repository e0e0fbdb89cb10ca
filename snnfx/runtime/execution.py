"""Execute calls on emitted graphs: all time steps at once, in chunks, or the first step separately."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.emit.executable import Executable
from snnfx.errors import InputError, warn_once
from snnfx.functional import chunk_multi_step_forward
from snnfx.memory.checkpoint_option import recomputation_applies
from snnfx.runtime.backward_pass import refuse_to_update_slots
from snnfx.runtime.call_plans import CallPlans
from snnfx.runtime.chunk_checkpoint import checkpoint_chunk
from snnfx.runtime.joined_outputs import JoinedOutputs, JoinedReductions, combine_reductions, join_two
from snnfx.runtime.persistent_state import PersistentState
from snnfx.runtime.recordings import Recordings
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Execution"]

State = dict[str, Any]
Flat = tuple[Any, ...]
"""Outputs or recorded values, flattened as a graph returns them."""


class Execution:
    """Runs the calls of one executable.

    Attributes:
        plans: the chunk and recompute plans, by the shapes of the inputs.
    """

    def __init__(self, executable: Executable) -> None:
        self.executable = executable
        self.plans = CallPlans(executable)
        self._recordings = Recordings(executable)
        self._persistent = {
            mode: PersistentState(executable.source, program.persistent_slots)
            for mode, program in executable.programs.items()
        }

    @property
    def persistent(self) -> PersistentState:
        """The persistent state of the current mode."""
        return self._persistent[self.executable.training]

    def starting_from_model(self, state: State | None) -> State | None:
        """A state with the values of the model for persistent slots that it does not contain."""
        if not self.persistent.names:
            return state
        refuse_to_update_slots(self.persistent.names)
        return {**self.persistent.starts(), **(state or {})}

    def run_sequence(
        self, leaves: list[Tensor], given: State, state: State | None, record: tuple[str, ...], T: int
    ) -> tuple[Any, State, Flat]:
        """Run T time steps; the executable is in step mode "m" and its plan covers the inputs.

        Args:
            leaves: the tensor inputs, time first.
            given: the values that the caller passes for carried arguments, by name.
            state: the state before the first step; None: the reset state.
            record: names of the modules and slots to record.
            T: the number of time steps.

        Returns:
            `(outputs, final state, recorded values)`.
        """
        executable = self.executable
        arguments = executable.arguments
        arguments.check_state(state)
        if state is not None:
            arguments.check_shapes(state, arguments.at_step(leaves, 0))
        state = self.starting_from_model(arguments.first_state(state, given))
        records: Flat = ()
        k = self.plans.chunk_length(leaves, T, state)
        checkpoint = None if record else self.plans.checkpoint_length(leaves, T, state)
        if record and recomputation_applies(executable):
            what = "checkpoint= and memory_budget= are ignored in a call with record="
            warn_once("SNNFX508", f"{what}: the recorded values keep the whole autograd graph alive.")
        if k is not None:
            flat, state, records = self._run_chunks(k, leaves, state, T, record)
        elif checkpoint is not None:
            flat, state, _ = self._run_chunks(checkpoint, leaves, state, T, (), checkpointed=True)
        else:
            flat, state, records = self._run_all_steps(leaves, state, record, T)
        if self.persistent.names:
            assert state is not None
            self.persistent.write(state)
        outputs = [arguments.time_back(y) for y in flat]
        return pytree.tree_unflatten(outputs, executable.program.output_spec), state, records

    def run_step(
        self, leaves: list[Tensor], given: State, state: State | None, record: tuple[str, ...]
    ) -> tuple[Any, State, Flat]:
        """Run one step; the executable is in step mode "s".

        Args:
            leaves: the tensor inputs of one step.
            given: the values that the caller passes for carried arguments, by name.
            state: the state before the step; None: the reset state.
            record: must be empty.

        Returns:
            `(outputs, next state, ())`.
        """
        if record:
            raise InputError(
                "SNNFX311", 'record= is not available with step_mode="s"', hint='Convert with step_mode="m".'
            )
        executable = self.executable
        arguments = executable.arguments
        arguments.check_state(state)
        if state is not None:
            arguments.check_shapes(state, leaves)
        state = self.starting_from_model(arguments.first_state(state, given))
        runners, training = executable.graphs.runners, executable.training
        part = "first" if self.persistent.is_reset(state) and (training, "first") in runners else "main"
        flat, next_state, _ = runners[training, part](executable.root, *leaves, state, None)
        self.persistent.write(next_state)
        return pytree.tree_unflatten(list(flat), executable.program.output_spec), next_state, ()

    def _with_source(self, source: nn.Module) -> Execution:
        """Execute the same graphs with the modules of a copy of the model."""
        execution = copy.copy(self)
        execution.executable = self.executable.with_source(source)
        execution.plans = copy.copy(self.plans)
        execution.plans.executable = execution.executable
        return execution

    def _run_all_steps(
        self, leaves: list[Tensor], state: State | None, record: tuple[str, ...], T: int
    ) -> tuple[Flat, State, Flat]:
        executable = self.executable
        run = self._recordings.runner(record) if record else self.plans.runner("main", leaves, T, state)
        starts_from_reset = self.persistent.is_reset(state)
        if record and starts_from_reset and executable.program.first_step is not None:
            raise InputError(
                "SNNFX311",
                "record= needs an explicit state for this model",
                why="its first step runs a different graph from the later steps.",
                hint="Run one step first: _, state = net.run(x_seq[:1]); then record the rest with state=state.",
            )
        run_first = executable.graph_runner("first") if starts_from_reset else None
        if run_first is not None:
            root = executable.root
            first, later = functools.partial(run_first, root), functools.partial(run, root)
            return *self._run_first_separately(first, later, leaves, state, T), ()
        time = torch.arange(T, device=leaves[0].device) if leaves else torch.arange(T)
        return run(executable.root, *leaves, state, time)  # type: ignore[no-any-return]

    def _run_first_separately(
        self,
        run_first: Callable[..., Any],
        run_rest: Callable[..., Any],
        leaves: list[Tensor],
        state: State | None,
        T: int,
    ) -> tuple[Flat, State]:
        """Run the first step with its own graph, and the later steps at once."""
        arguments = self.executable.arguments
        outputs, state, _ = run_first(*arguments.at_step(leaves, 0), state, None)
        reduce = self.executable.options.reduce
        if T == 1:
            if reduce is not None:
                return outputs, state
            if all(isinstance(y, Tensor) for y in outputs):
                return tuple([y.unsqueeze(0) for y in outputs]), state
            return pytree.tree_map_only(Tensor, lambda y: y.unsqueeze(0), outputs), state
        executable = self.executable
        if executable.training and True in executable.graphs.separate_statistics:
            names, reason = executable.graphs.separate_statistics[True]
            warn_once(
                "SNNFX224",
                f"training takes the batch statistics of {names} at the first step and over the later steps "
                f'separately, because {reason}. Convert with batch_norm="per_step", or give the state that is None at '
                "the first step an initial value, e.g. torch.zeros_like(x).",
            )
        time = torch.arange(1, T, device=leaves[0].device)
        rest, state, _ = run_rest(*arguments.from_step(leaves, 1), state, time)
        if reduce is not None:
            return combine_reductions([(1, outputs), (T - 1, rest)], reduce), state
        return join_two(outputs, rest), state

    def runs_first_separately(self, leaves: list[Tensor], T: int) -> bool:
        """Whether a call from the reset state runs a graph for its first step and one for all other steps at once."""
        executable = self.executable
        program = executable.program
        has_state = program.carried or program.persistent_slots
        if executable.graph_runner("first") is None or has_state or recomputation_applies(executable):
            return False
        return self.plans.chunk_length(leaves, T) is None

    def run_bound_first(
        self, run_first: Callable[..., Any], run_rest: Callable[..., Any], leaves: Sequence[Tensor]
    ) -> Any:
        """Run a call from the reset state by functions for its first step and its later steps; time is first.

        Args:
            run_first: `(*inputs) -> (outputs, state, ())`.
            run_rest: `(*inputs, state, time) -> (outputs, state, ())`.
            leaves: the inputs.
        """
        executable = self.executable
        T = next(x.shape[0] for x, v in zip(leaves, executable.arguments.varying, strict=True) if v)

        def first(*arguments: Any) -> Any:
            return run_first(*arguments[:-2])

        flat, _ = self._run_first_separately(first, run_rest, list(leaves), None, T)
        return pytree.tree_unflatten(list(flat), executable.program.output_spec)

    def _run_chunks(
        self,
        k: int,
        leaves: list[Tensor],
        state: State | None,
        T: int,
        record: tuple[str, ...],
        checkpointed: bool = False,
    ) -> tuple[Flat, State, Flat]:
        """Run k steps at a time and carry the state across the chunks; `checkpointed`: backward recomputes each."""
        varying = self.executable.varying_inputs
        sequences = tuple(x for x, v in zip(leaves, varying, strict=True) if v) or (torch.arange(T, device="cpu"),)
        reduce = self.executable.options.reduce

        def inputs_of(chunk: Iterable[Tensor]) -> list[Tensor]:
            parts = iter(chunk)
            return [next(parts) if v else x for x, v in zip(leaves, varying, strict=True)]

        def run_checkpointed(*chunk_and_state: Any) -> tuple[Flat, State]:
            *chunk, state = chunk_and_state

            def run(source: nn.Module, inputs: list[Tensor], state: State | None) -> tuple[Flat, State]:
                execution = self if source is self.executable.source else self._with_source(source)
                flat, next_state, _ = execution._run_all_steps(inputs, state, (), chunk[0].shape[0])
                return flat, next_state

            return checkpoint_chunk(run, self.executable.source)(inputs_of(chunk), state)  # type: ignore[no-any-return]

        if reduce is None and checkpointed:
            return *chunk_multi_step_forward(k, sequences, run_checkpointed, state=state), ()
        joined = JoinedOutputs(T) if reduce is None else JoinedReductions(reduce)
        recorded = JoinedOutputs(T) if record else None
        for chunk in zip(*(x.split(k) for x in sequences), strict=True):
            steps = chunk[0].shape[0]
            if checkpointed:
                flat, state = run_checkpointed(*chunk, state)
            else:
                flat, state, records = self._run_all_steps(inputs_of(chunk), state, record, steps)
                if recorded is not None:
                    recorded.add(records, steps)
            joined.add(flat, steps)
        return joined.values(), state, recorded.values() if recorded is not None else ()  # type: ignore[return-value]
