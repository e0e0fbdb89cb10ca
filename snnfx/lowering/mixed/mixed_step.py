"""A recorded step with products or convolutions inside, as two passes over a sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import LoweringRefused, Recording
from snnfx.lowering.elementwise.cpp.build import load
from snnfx.lowering.elementwise.lowered_step import Needs
from snnfx.lowering.elementwise.translation import Replay
from snnfx.lowering.mixed.call_kinds import calls_behind
from snnfx.lowering.mixed.constant_gradients import Deferred, plan_gradient
from snnfx.lowering.mixed.executor import run_schedule
from snnfx.lowering.mixed.loop_saved_values import LoopSavedValues, plan_saved_values
from snnfx.lowering.mixed.schedule import Goal, Kinds, LoopCarried, Schedule

__all__ = ["MixedStep", "Passes"]


_BY_STRIDES = frozenset(("as_strided", "as_strided_scatter", "_reshape_alias", "resize_", "set_"))


@dataclass
class Passes:
    """Both passes of a training step with certain gradients.

    Args:
        plan: what the forward pass keeps.
        forward, backward: the schedules.
        grads: for each value in the order of `backward.goal.carried` that is the gradient of a state, its number.
        deferred: for each position in `MixedStep.constants`, how its gradient is computed; None: it has none.
    """

    plan: LoopSavedValues
    forward: Schedule
    backward: Schedule
    grads: tuple[int, ...]
    deferred: tuple[Deferred | None, ...]


@dataclass
class MixedStep:
    """A recorded step, ready to run over sequences.

    Args:
        recording: of the step and its backward pass.
        reason: why it is not one kernel for all steps, as a clause.

    Attributes:
        constants: the constants that the step reads, as `(number of value, index of constant)`.

    Raises:
        LoweringRefused: the states do not keep their shape or dtype.
    """

    recording: Recording
    reason: str = ""
    constants: tuple[tuple[int, int], ...] = field(init=False, default=())
    _kinds: Kinds = field(init=False)
    _inference: Schedule | None = None
    _training: dict[Needs, Passes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recording, values = self.recording, self.recording.values
        for value in values:
            if value.origin == "state":
                after = values[recording.next_states[value.index]]
                if (value.shape, value.dtype) != (after.shape, after.dtype):
                    raise LoweringRefused("a state has another shape or dtype after each step")
            if value.varying and value.call is not None and value.call.name in _BY_STRIDES:
                raise LoweringRefused(f"`{value.call.name}` depends on where values are in memory")
        self._kinds = Kinds(recording)
        invariant = [n for n, v in enumerate(values) if v.call is not None and not v.varying]
        self.constants = tuple((n, v.index) for n, v in enumerate(values) if v.origin == "constant")
        self._prologue = Replay(calls_behind(values, invariant))
        self._numbers = {
            origin: {v.index: n for n, v in enumerate(values) if v.origin == origin}
            for origin in ("sequence", "state", "grad_output", "grad_state")
        }

    @property
    def differentiable(self) -> list[bool]:
        """For the outputs, then the states after a step, whether they require a gradient."""
        recording = self.recording
        outputs = [k in self._numbers["grad_output"] for k in range(len(recording.outputs))]
        return outputs + [k in self._numbers["grad_state"] for k in range(len(recording.next_states))]

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        """Of the outputs."""
        return [self.recording.values[n].dtype for n in self.recording.outputs]

    @property
    def state_dtypes(self) -> list[torch.dtype]:
        """Of the states."""
        return [self.recording.values[n].dtype for n in self.recording.next_states]

    def fits(self, states: Sequence[object]) -> bool:
        """Whether states can be expanded to those that the step was recorded with."""
        for k, state in enumerate(states):
            if isinstance(state, Tensor):
                shape = self.recording.values[self.recording.next_states[k]].shape
                sizes = zip(reversed(state.shape), reversed(shape), strict=False)
                if state.dim() > len(shape) or any(size not in (1, other) for size, other in sizes):
                    return False
        return True

    # -- what is planned --------------------------------------------------------------------------------------------

    @property
    def heavy(self) -> list[str]:
        """Names of what PyTorch computes in each step."""
        names = [c.name for stage in self.inference().stages for c in stage.calls if self._kinds.of(c) == "heavy"]
        return list(dict.fromkeys(names))

    def inference(self) -> Schedule:
        """The pass that keeps nothing."""
        if self._inference is None:
            self._inference = self._forward(LoopSavedValues((), (), ()))
        return self._inference

    def training(self, needs: Needs) -> Passes:
        """The passes of a training step with certain gradients."""
        found = self._training.get(needs)
        if found is None:
            found = self._training[needs] = self._plan(needs)
        return found

    def _forward(self, plan: LoopSavedValues) -> Schedule:
        recording, states = self.recording, self._numbers["state"]
        carried = tuple(LoopCarried(states.get(k), n) for k, n in enumerate(recording.next_states))
        stacks = dict.fromkeys((*recording.outputs, *plan.values, *(states[k] for k in plan.states)))
        return Schedule(
            recording, self._kinds, Goal(carried, frozenset(self._numbers["sequence"].values()), tuple(stacks), ())
        )

    def _plan(self, needs: Needs) -> Passes:
        recording, values = self.recording, self.recording.values
        grads = [g for g, n in zip(recording.grad_sequences, needs.sequences, strict=True) if n and g is not None]
        deferred: list[Deferred | None] = []
        for (_, index), need in zip(self.constants, needs.constants, strict=True):
            number = recording.grad_constants.get(index) if need else None
            is_there = number is not None and values[number].varying
            deferred.append(plan_gradient(recording, self._kinds, number) if is_there and number is not None else None)
        parts = [part for d in deferred if d is not None for part in d.parts()]
        sums = tuple(dict.fromkeys(part.number for part in parts if part.how == "sum"))
        stacks = tuple(dict.fromkeys((*grads, *(n for part in parts for n in part.stacks))))
        states = self._carried_gradients(needs, (*stacks, *sums))
        carried = tuple(LoopCarried(self._numbers["grad_state"].get(k), recording.grad_states[k]) for k in states)
        roots = (*stacks, *sums, *(c.following for c in carried if c.following is not None))
        plan = plan_saved_values(recording, self._kinds, self._read_by_gradients(roots))
        at_hand = {*self._numbers["grad_output"].values(), *plan.values}
        at_hand.update(self._numbers["state"][k] for k in plan.states)
        at_hand.update(self._numbers["sequence"][i] for i in plan.inputs)
        backward = Schedule(recording, self._kinds, Goal(carried, frozenset(at_hand), stacks, sums))
        return Passes(plan, self._forward(plan), backward, tuple(states), tuple(deferred))

    def _carried_gradients(self, needs: Needs, roots: Sequence[int]) -> list[int]:
        """The states whose gradient goes from step to step."""
        recording, leaves = self.recording, self._numbers["grad_state"]
        found = {k for k, n in enumerate(needs.states) if n and (recording.grad_states[k] is not None or k in leaves)}
        while True:
            wanted = [*roots, *(g for k in found if (g := recording.grad_states[k]) is not None)]
            read = {r for call in calls_behind(recording.values, wanted) for r in call.references()} | set(wanted)
            more = found | {k for k, number in leaves.items() if number in read}
            if more == found:
                return sorted(found)
            found = more

    def _read_by_gradients(self, roots: Sequence[int]) -> list[int]:
        """Values of the forward pass that the backward pass reads."""
        values = self.recording.values
        found: dict[int, None] = dict.fromkeys(n for n in roots if values[n].varying and not values[n].tangential)
        for call in calls_behind(values, roots):
            if any(values[r].tangential for r in call.results):
                found.update(dict.fromkeys(r for r in call.references() if not values[r].tangential))
        return [n for n in found if values[n].varying]

    def build(self, needs: Needs | None, elements: int) -> None:
        """Build the kernels of a call.

        Raises:
            LoweringRefused: one cannot be built.
        """
        del elements
        passes = None if needs is None else self.training(needs)
        schedules = [self.inference()] if passes is None else [passes.forward, passes.backward]
        for schedule in schedules:
            for stage in schedule.stages:
                for group in stage.groups:
                    load(group.source)

    @property
    def saves(self) -> str:
        """What a training step keeps of the sequence, as a clause; "" before the first training step."""
        if not self._training:
            return ""
        plan = list(self._training.values())[-1].plan
        count = len(plan.values) + len(plan.states)
        inputs = ", and its input" if plan.inputs else ""
        return f"; training keeps {count} tensor{'s' if count != 1 else ''} of all steps{inputs}"

    # -- running ----------------------------------------------------------------------------------------------------

    def _invariants(self, constants: Sequence[Tensor]) -> dict[int, Tensor]:
        known = {number: c.detach() for (number, _), c in zip(self.constants, constants, strict=True)}
        with torch.no_grad():
            self._prologue.run(known, ())
        return known

    def forward(
        self,
        x_seq: Sequence[Tensor],
        states: Sequence[Tensor | float],
        constants: Sequence[Tensor],
        needs: Needs | None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Run a sequence: outputs `[T, N, *]`, final states `[N, *]`, and what is kept.

        Args:
            x_seq: the inputs, `[T, N, *]` each.
            states: before the first step, numbers or tensors that can be expanded to `[N, *]`.
            constants: those of `self.constants`.
            needs: None: nothing is kept.
        """
        recording = self.recording
        passes = None if needs is None else self.training(needs)
        schedule = self.inference() if passes is None else passes.forward
        stacks = {n: _plain(x_seq[i]) for i, n in self._numbers["sequence"].items()}
        result = run_schedule(
            schedule, x_seq[0].shape[0], stacks, self._invariants(constants), states, False, own=recording.outputs
        )
        outputs: list[Tensor] = []
        for number in recording.outputs:
            value = result.stacks[number]
            outputs.append(value.clone() if any(value is other for other in outputs) else value)
        finals = [final.clone() for final in result.finals]
        if passes is None:
            return outputs, finals, []
        taken = set(recording.outputs)
        saved = [result.stacks[n].clone() if n in taken else result.stacks[n] for n in passes.plan.values]
        saved += [result.stacks[self._numbers["state"][k]] for k in passes.plan.states]
        return outputs, finals, saved

    def backward(
        self,
        needs: Needs,
        T: int,
        x_seq: Sequence[Tensor | None],
        constants: Sequence[Tensor],
        saved: Sequence[Tensor],
        grad_outputs: Sequence[Tensor | None],
        grad_finals: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Gradients of the inputs, `[T, N, *]`, of the initial states, `[N, *]`, and of the constants.

        Args:
            needs, T, x_seq, constants, saved: of the forward pass; only the inputs that are kept are looked at.
            grad_outputs, grad_finals: from above, None for zero.
        """
        recording, passes = self.recording, self.training(needs)
        plan, numbers = passes.plan, self._numbers
        stacks: dict[int, Tensor] = {}
        for k, number in numbers["grad_output"].items():
            stacks[number] = self._above(number, grad_outputs[k], (T,))
        for i in plan.inputs:
            x = x_seq[i]
            assert x is not None
            stacks[numbers["sequence"][i]] = _plain(x)
        stacks.update(zip((*plan.values, *(numbers["state"][k] for k in plan.states)), saved, strict=True))
        initial = [0.0 if (g := grad_finals[k]) is None else g for k in passes.grads]
        invariants = self._invariants(constants)
        result = run_schedule(passes.backward, T, stacks, invariants, initial, reverse=True)
        found_x = [
            result.stacks[g] if n and g is not None else None
            for g, n in zip(recording.grad_sequences, needs.sequences, strict=True)
        ]
        found_states: list[Tensor | None] = [None] * len(needs.states)
        for k, final in zip(passes.grads, result.finals, strict=True):
            found_states[k] = final.clone() if needs.states[k] else None
        with torch.no_grad():
            found = [
                None if d is None else d.value(recording, result.sums, result.stacks, invariants)
                for d in passes.deferred
            ]
        return found_x, found_states, found

    def _above(self, number: int, gradient: Tensor | None, leading: tuple[int, ...]) -> Tensor:
        value = self.recording.values[number]
        if gradient is None:
            return torch.zeros((), dtype=value.dtype).expand(*leading, *value.shape)
        return _plain(gradient)


def _plain(tensor: Tensor) -> Tensor:
    """Without history and lazy signs, which are not in memory."""
    tensor = tensor.detach()
    return tensor.resolve_neg() if tensor.is_neg() else tensor
