"""`MixedStep`: a recorded step that contains products or convolutions, run over a sequence without autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import LoweringRefused, Recording
from snnfx.lowering.elementwise.cpp.build import load
from snnfx.lowering.elementwise.lowered_step import Needs
from snnfx.lowering.elementwise.translation import Replay
from snnfx.lowering.mixed.bound_runs import run_schedule
from snnfx.lowering.mixed.call_kinds import calls_needed_for
from snnfx.lowering.mixed.compiled_loop import build_loop
from snnfx.lowering.mixed.constant_gradients import ConstantGradient, plan_gradient
from snnfx.lowering.mixed.gradient_by_events import build_product_by_events
from snnfx.lowering.mixed.loop_saved_values import LoopSavedValues, plan_saved_values
from snnfx.lowering.mixed.schedule import CallKinds, LoopCarried, PassGoal, Schedule
from snnfx.sandbox.torch_internals import dispatch_mode_count

__all__ = ["MixedStep", "TrainingPasses"]

_MOST_VIEWED_BYTES = 1 << 20
"""Bytes of the constants up to which the views of the latest ones are kept, which keeps their memory alive."""


@dataclass
class TrainingPasses:
    """Both passes of a training step, for one choice of gradients.

    Args:
        plan: the values that the forward pass saves for backward.
        forward, backward: the schedules.
        grads: the states whose gradients are loop-carried, in the order of `backward.goal.carried`.
        constant_gradients: for each of `MixedStep.constants`, how to compute its gradient; None: no gradient.
    """

    plan: LoopSavedValues
    forward: Schedule
    backward: Schedule
    grads: tuple[int, ...]
    constant_gradients: tuple[ConstantGradient | None, ...]


@dataclass
class MixedStep:
    """A recorded step that runs over sequences without autograd.

    Args:
        recording: the step and its backward pass.
        reason: why the step is not element-wise, as a clause.
        by_events: whether products may visit only the elements of their operands that are not zero.

    Attributes:
        constants: the constants that the step reads, as `(number of value, index of constant)`.

    Raises:
        LoweringRefused: the states change their shape or dtype, or the step depends on strides.
    """

    recording: Recording
    reason: str = ""
    by_events: bool = False
    constants: tuple[tuple[int, int], ...] = field(init=False, default=())
    _kinds: CallKinds = field(init=False)
    _inference: Schedule | None = None
    _views: tuple[list[object], dict[int, Tensor]] | None = None
    """The latest invariants, with the places of the constants, if all of them are views of constants."""
    _training: dict[Needs, TrainingPasses] = field(default_factory=dict)

    def __post_init__(self) -> None:
        recording, values = self.recording, self.recording.values
        for value in values:
            if value.origin == "state":
                after = values[recording.next_states[value.index]]
                if (value.shape, value.dtype) != (after.shape, after.dtype):
                    raise LoweringRefused("a state has another shape or dtype after each step")
            if value.varying and value.call is not None and value.call.traits.strided:
                raise LoweringRefused(f"`{value.call.name}` depends on where values are in memory")
        self._kinds = CallKinds(recording)
        invariant = [n for n, v in enumerate(values) if v.call is not None and not v.varying]
        self.constants = tuple((n, v.index) for n, v in enumerate(values) if v.origin == "constant")
        self._prologue = Replay(calls_needed_for(values, invariant))
        self._numbers = {
            origin: {v.index: n for n, v in enumerate(values) if v.origin == origin}
            for origin in ("sequence", "state", "grad_output", "grad_state")
        }

    @property
    def differentiable(self) -> list[bool]:
        """Whether each output, then each state after a step, requires a gradient."""
        recording = self.recording
        outputs = [k in self._numbers["grad_output"] for k in range(len(recording.outputs))]
        return outputs + [k in self._numbers["grad_state"] for k in range(len(recording.next_states))]

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the outputs."""
        return [self.recording.values[n].dtype for n in self.recording.outputs]

    @property
    def state_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the states."""
        return [self.recording.values[n].dtype for n in self.recording.next_states]

    def fits(self, states: Sequence[object]) -> bool:
        """Whether states can be expanded to the shapes of the recorded states."""
        for k, state in enumerate(states):
            if isinstance(state, Tensor):
                shape = self.recording.values[self.recording.next_states[k]].shape
                sizes = zip(reversed(state.shape), reversed(shape), strict=False)
                if state.dim() > len(shape) or any(size not in (1, other) for size, other in sizes):
                    return False
        return True

    @property
    def reason_for_python(self) -> str:
        """Why Python code runs the steps one by one, as a clause; "" if compiled code runs all steps of a pass."""
        schedules = self._schedules()
        for schedule in schedules:
            if schedule.reason_for_python:
                return schedule.reason_for_python
        if any(schedule.reason_for_python is not None for schedule in schedules):
            return ""
        names = " and ".join(f"`{name}`" for name in self.inference().calls_of_pytorch)
        return f"PyTorch computes {names} in each step" if names else ""

    @property
    def has_products(self) -> bool:
        """Whether the steps contain products or convolutions."""
        return any(call.traits.product for call in self.inference().inside)

    @property
    def density(self) -> float | None:
        """The fraction of the operands of products that was not zero in the latest forward pass, if it was counted."""
        forward = [passes.forward for passes in self._training.values()] or [self.inference()]
        return forward[-1].density

    def _schedules(self) -> list[Schedule]:
        passes = [s for p in self._training.values() for s in (p.forward, p.backward)]
        return passes + ([self._inference] if self._inference is not None else [])

    def inference(self) -> Schedule:
        """The schedule of inference, which saves nothing."""
        if self._inference is None:
            self._inference = self._forward(LoopSavedValues((), (), ()))
        return self._inference

    def training(self, needs: Needs) -> TrainingPasses:
        """The passes of a training step with these gradients."""
        passes = self._training.get(needs)
        if passes is None:
            passes = self._training[needs] = self._plan(needs)
        return passes

    def _forward(self, plan: LoopSavedValues) -> Schedule:
        recording, states = self.recording, self._numbers["state"]
        carried = tuple(LoopCarried(states.get(k), n) for k, n in enumerate(recording.next_states))
        stacks = dict.fromkeys((*recording.outputs, *plan.values, *(states[k] for k in plan.states)))
        goal = PassGoal(carried, frozenset(self._numbers["sequence"].values()), tuple(stacks), ())
        return Schedule(recording, self._kinds, goal, self.by_events)

    def _plan(self, needs: Needs) -> TrainingPasses:
        recording = self.recording
        grads = [g for g, n in zip(recording.grad_sequences, needs.sequences, strict=True) if n and g is not None]
        constant_gradients: list[ConstantGradient | None] = []
        for (_, index), need in zip(self.constants, needs.constants, strict=True):
            number = recording.grad_constants.get(index) if need else None
            constant_gradients.append(
                None if number is None else plan_gradient(recording, self._kinds, number, self.by_events)
            )
        parts = [part for d in constant_gradients if d is not None for part in d.parts()]
        sums = tuple(dict.fromkeys(part.number for part in parts if part.how == "sum"))
        stacks = tuple(dict.fromkeys((*grads, *(n for part in parts for n in part.stacks))))
        states = self._carried_gradients(needs, (*stacks, *sums))
        carried = tuple(LoopCarried(self._numbers["grad_state"].get(k), recording.grad_states[k]) for k in states)
        roots = (*stacks, *sums, *(c.following for c in carried if c.following is not None))
        plan = plan_saved_values(recording, self._kinds, self._read_by_gradients(roots))
        given = {*self._numbers["grad_output"].values(), *plan.values}
        given.update(self._numbers["state"][k] for k in plan.states)
        given.update(self._numbers["sequence"][i] for i in plan.inputs)
        backward = Schedule(recording, self._kinds, PassGoal(carried, frozenset(given), stacks, sums), self.by_events)
        return TrainingPasses(plan, self._forward(plan), backward, tuple(states), tuple(constant_gradients))

    def _carried_gradients(self, needs: Needs, roots: Sequence[int]) -> list[int]:
        """The states whose gradients are loop-carried."""
        recording, leaves = self.recording, self._numbers["grad_state"]
        carried = {k for k, n in enumerate(needs.states) if n and (recording.grad_states[k] is not None or k in leaves)}
        while True:
            wanted = [*roots, *(g for k in carried if (g := recording.grad_states[k]) is not None)]
            read = {r for call in calls_needed_for(recording.values, wanted) for r in call.references()} | set(wanted)
            more = carried | {k for k, number in leaves.items() if number in read}
            if more == carried:
                return sorted(carried)
            carried = more

    def _read_by_gradients(self, roots: Sequence[int]) -> list[int]:
        """Values of the forward pass that the backward pass reads."""
        values = self.recording.values
        read: dict[int, None] = dict.fromkeys(n for n in roots if values[n].varying and not values[n].depends_on_grad)
        for call in calls_needed_for(values, roots):
            if any(values[r].depends_on_grad for r in call.results):
                read.update(dict.fromkeys(r for r in call.references() if not values[r].depends_on_grad))
        return [n for n in read if values[n].varying]

    def build(self, needs: Needs | None, elements: int) -> None:
        """Build the kernels of a call.

        Raises:
            LoweringRefused: a kernel cannot be built.
        """
        del elements
        passes = None if needs is None else self.training(needs)
        schedules = [self.inference()] if passes is None else [passes.forward, passes.backward]
        for schedule in schedules:
            for stage in schedule.stages:
                for group in stage.groups:
                    load(group.source)
            for dtype in _dtypes_of_products(schedule):
                build_loop(dtype)
                if passes is not None and self.by_events:
                    build_product_by_events(dtype)

    @property
    def saves(self) -> str:
        """A clause about the tensors that training saves for backward; "" before the first training step."""
        if not self._training:
            return ""
        plan = list(self._training.values())[-1].plan
        count = len(plan.values) + len(plan.states)
        inputs = ", and its input" if plan.inputs else ""
        return f"; training saves {count} tensor{'s' if count != 1 else ''} of all steps{inputs}"

    def invariants(self, constants: Sequence[Tensor]) -> dict[int, Tensor]:
        """The values that do not change with time, constants included, by number; the caller does not change it."""
        places: list[object] = [(c.data_ptr(), c.shape, c.stride(), c.dtype, c.is_neg()) for c in constants]
        latest = self._views  # read once, since another thread may replace it
        if latest is not None and latest[0] == places and not dispatch_mode_count():
            return latest[1]
        known = {number: c.detach() for (number, _), c in zip(self.constants, constants, strict=True)}
        with torch.no_grad():
            self._prologue.run(known, ())
        if sum([c.nbytes for c in constants]) <= _MOST_VIEWED_BYTES and not dispatch_mode_count():
            memory = {c.untyped_storage().data_ptr() for c in constants}
            are_views = all(v.untyped_storage().data_ptr() in memory for v in known.values())
            self._views = (places, known) if are_views else None
        return known

    def forward(
        self,
        x_seq: Sequence[Tensor],
        states: Sequence[Tensor | float],
        constants: Sequence[Tensor],
        needs: Needs | None,
        invariants: dict[int, Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Run a sequence: outputs `[T, N, *]`, final states `[N, *]`, and the tensors saved for backward.

        Args:
            x_seq: the inputs, `[T, N, *]` each.
            states: the states before the first step, numbers or tensors that can be expanded to `[N, *]`.
            constants: the tensors of `self.constants`.
            needs: the gradients that are needed; None: save nothing.
            invariants: the result of `self.invariants(constants)`, if it is known.
        """
        recording = self.recording
        passes = None if needs is None else self.training(needs)
        schedule = self.inference() if passes is None else passes.forward
        stacks = {n: _dense_values(x_seq[i]) for i, n in self._numbers["sequence"].items()}
        known = self.invariants(constants) if invariants is None else invariants
        T, outputs_of = x_seq[0].shape[0], recording.outputs
        result = run_schedule(schedule, T, stacks, known, states, False, unshared=outputs_of, constants=constants)
        outputs: list[Tensor] = []
        for number in recording.outputs:
            value = result.stacks[number]
            outputs.append(value.clone() if any(value is other for other in outputs) else value)
        finals = result.own_finals()
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
        invariants: dict[int, Tensor] | None = None,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
        """Gradients of the inputs, `[T, N, *]`, of the initial states, `[N, *]`, and of the constants.

        Args:
            needs, T, constants, saved, invariants: as in the forward pass.
            x_seq: the inputs; those that are not saved may be None.
            grad_outputs, grad_finals: the gradients of the outputs and final states; None: zero.
        """
        recording, passes = self.recording, self.training(needs)
        plan, numbers = passes.plan, self._numbers
        stacks: dict[int, Tensor] = {}
        for k, number in numbers["grad_output"].items():
            stacks[number] = self._incoming_gradient(number, grad_outputs[k], (T,))
        for i in plan.inputs:
            x = x_seq[i]
            assert x is not None
            stacks[numbers["sequence"][i]] = _dense_values(x)
        stacks.update(zip((*plan.values, *(numbers["state"][k] for k in plan.states)), saved, strict=True))
        initial = [0.0 if (g := grad_finals[k]) is None else g for k in passes.grads]
        if invariants is None:
            invariants = self.invariants(constants)
        result = run_schedule(passes.backward, T, stacks, invariants, initial, reverse=True, constants=constants)
        grad_x = [
            result.stacks[g] if n and g is not None else None
            for g, n in zip(recording.grad_sequences, needs.sequences, strict=True)
        ]
        grad_states: list[Tensor | None] = [None] * len(needs.states)
        for k, final in zip(passes.grads, result.own_finals(), strict=True):
            grad_states[k] = final if needs.states[k] else None
        with torch.no_grad():
            grad_constants = [
                None if d is None else d.evaluate(recording, T, result.sums, result.stacks, invariants)
                for d in passes.constant_gradients
            ]
        return grad_x, grad_states, grad_constants

    def _incoming_gradient(self, number: int, gradient: Tensor | None, leading: tuple[int, ...]) -> Tensor:
        value = self.recording.values[number]
        if gradient is None:
            return torch.zeros((), dtype=value.dtype, device="cpu").expand(*leading, *value.shape)
        return _dense_values(gradient)


def _dtypes_of_products(schedule: Schedule) -> set[torch.dtype]:
    """The dtypes of products in the loop; without products, those of the sums, or any."""
    values = schedule.recording.values
    dtypes = {values[r].dtype for call in schedule.inside if call.traits.product for r in call.results}
    return dtypes or {values[n].dtype for n in schedule.goal.sums} or {torch.float32}


def _dense_values(tensor: Tensor) -> Tensor:
    """Detach a tensor and resolve its lazy negation, which kernels do not see."""
    tensor = tensor.detach()
    return tensor.resolve_neg() if tensor.is_neg() else tensor
