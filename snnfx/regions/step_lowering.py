"""The step_lowering of a region: one step is recorded, and lowered to kernels, or there is a reason why not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from snnfx.lowering.aten_recording import LoweringRefused, Recording, preserved_rng_state, record_step
from snnfx.lowering.elementwise.aten_table import decomposition
from snnfx.lowering.elementwise.back_end_choice import back_end_of
from snnfx.lowering.elementwise.initial_states import (
    InitialStates,
    initial_states_by_comparison,
    initial_states_of_start,
)
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.lowering.elementwise.translation import translate
from snnfx.lowering.mixed.first_states import initial_states_of_each
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.sequence_region import buffers_of
from snnfx.state.registry import adapter_of, call_stateful, initial_value

__all__ = ["Recorded", "StepLowering"]


@dataclass
class Recorded:
    """One recording, or why there is none.

    Args:
        lowered: what runs; None: see `reason`.
        initial: the states before the first step; None: they are given, or only the first step itself makes them.
        constants: how to fetch the tensors that the step reads from the constants of a call.
        baked: of tensors whose values the recording holds: how to fetch them, and what they were (id and version).
        kept_alive: what the key of the recording names by its id.
        reason: why there is none.
        built: what was built for it.
    """

    lowered: LoweredStep | MixedStep | None
    initial: InitialStates | None
    constants: tuple[Callable[[Sequence[Any]], Tensor], ...] = ()
    baked: tuple[tuple[Callable[[Sequence[Any]], Tensor], int, int], ...] = ()
    kept_alive: tuple[Any, ...] = ()
    reason: str = ""
    built: frozenset[Any] = frozenset()


class StepLowering:
    """Records steps of one region.

    Args:
        step: `(*constants, *inputs, state) -> (outputs, state)`.
        first: `(*constants, *inputs) -> (outputs, state)`, None without state.
        make_start: makes the graph `(*constants, *inputs) -> (states before the first step, states after it)`.
    """

    def __init__(
        self, step: fx.GraphModule, first: fx.GraphModule | None, make_start: Callable[[], fx.GraphModule]
    ) -> None:
        self.step, self.first, self._make_start = step, first, make_start
        self._start: fx.GraphModule | None = None

    def start(self) -> fx.GraphModule:
        """The graph of the states before the first step."""
        if self._start is None:
            self._start = self._make_start()
        return self._start

    def recorded(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> tuple[Recorded, bool]:
        """Record a step, and whether the recording (or the reason against one) holds for other sizes of its inputs."""
        # Without their history: the step_lowering of the backward pass must not go through it.
        constants = [c.detach().requires_grad_(c.requires_grad) if isinstance(c, Tensor) else c for c in constants]
        alive = tuple(
            x for c in constants if isinstance(c, nn.Module) for m in c.modules() for x in m.__dict__.values()
        )
        buffers = buffers_of(constants)
        try:
            inputs = [x[0] for x in x_seq]
            with torch.no_grad():
                after = self._after_one_step(inputs, state, constants)
            step = functools.partial(self.step.forward, *constants)
            recording = record_step(step, inputs, after, True, decomposition)
            starts = self.first is not None and state is None
            lowered, initial = self._lowered(recording, inputs, after, starts, constants)
            if any(_differs(buffer, value) for buffer, value in buffers):
                raise LoweringRefused("the step changes a buffer")
        except LoweringRefused as reason:
            return Recorded(None, None, reason=str(reason), kept_alive=alive), True
        except Exception as error:  # in the user's code: should it be an error of the model, the loop raises it again
            reason_text = f"its step cannot be differentiated in a step_lowering: {type(error).__name__}: {error}"
            return Recorded(None, None, reason=reason_text.rstrip("."), kept_alive=alive), True
        finally:
            for buffer, value in buffers:
                if _differs(buffer, value):  # past the version counter: no user has seen the step_lowering
                    buffer.data.copy_(value)
        entry = Recorded(
            lowered,
            initial,
            tuple(_fetcher(recording.constants[i], constants) for _, i in _constants_of(lowered)),
            tuple((_fetcher(t, constants), id(t), version) for t, version in recording.baked),
            alive,
        )
        if isinstance(lowered, MixedStep):
            return entry, False
        holds_for_all = not lowered.step.holds_sizes and (not recording.reads_sizes or self._is_vouched_for(constants))
        return entry, holds_for_all

    def _lowered(
        self,
        recording: Recording,
        inputs: Sequence[Tensor],
        after: Sequence[Tensor],
        starts: bool,
        constants: Sequence[Any],
    ) -> tuple[LoweredStep | MixedStep, InitialStates | None]:
        """One kernel for all steps; where the step is not elementwise, the step without autograd."""
        device = inputs[0].device
        try:
            _refuse_other_shapes(inputs, after)
            lowered = LoweredStep(translate(recording), back_end_of(device), device)
            initial = self._initial_states(recording, inputs, constants) if starts else None
            if initial is not None:
                self._refuse_unknown_shape(lowered, initial, inputs, constants)
            return lowered, initial
        except LoweringRefused as reason:
            if device.type != "cpu" or torch.is_autocast_enabled("cpu"):
                raise
            mixed = MixedStep(recording, str(reason))
        if not starts:
            return mixed, None
        try:
            return mixed, initial_states_of_each(self._recording_of(self.start(), inputs, constants))
        except (LoweringRefused, TypeError):  # TypeError: a module makes its states itself, from None
            return mixed, None

    def _refuse_unknown_shape(
        self, lowered: LoweredStep, initial: InitialStates, inputs: Sequence[Tensor], constants: Sequence[Any]
    ) -> None:
        """A kernel has no shape of its own: one that only the first values of the states had is lost with them."""
        x_seq, shape = [x.unsqueeze(0) for x in inputs], lowered.step.shape
        if lowered.shape_of_step(x_seq, ()) != shape:
            states = initial.values(constants, x_seq, self.start)
            if lowered.shape_of_step(x_seq, states) != shape:
                raise LoweringRefused("the states have a shape that nothing tells which each step reads")

    def _recording_of(self, graph: fx.GraphModule, inputs: Sequence[Tensor], constants: Sequence[Any]) -> Recording:
        return record_step(functools.partial(graph.forward, *constants), inputs, None, False, decomposition)

    def _after_one_step(
        self, inputs: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> list[Tensor]:
        """The states after a step: what all later steps start from."""
        with preserved_rng_state(inputs[0].device):
            if state is None and self.first is not None:
                _, after = self.first.forward(*constants, *inputs)
            else:
                _, after = self.step.forward(*constants, *inputs, tuple(state or ()))
        for value in after:
            if not isinstance(value, Tensor):
                raise LoweringRefused(f"a state is a {type(value).__name__} that Python computes")
        return list(after)

    def _initial_states(
        self, recording: Recording, inputs: Sequence[Tensor], constants: Sequence[Any]
    ) -> InitialStates:
        def fetcher(tensor: Tensor) -> Callable[[Sequence[Any]], Tensor]:
            return _fetcher(tensor, constants)

        try:
            return initial_states_of_start(self._recording_of(self.start(), inputs, constants), fetcher)
        except (LoweringRefused, TypeError):  # TypeError: a module makes its states itself, from None
            assert self.first is not None
            return initial_states_by_comparison(recording, self._recording_of(self.first, inputs, constants), fetcher)

    def _is_vouched_for(self, constants: Sequence[Any]) -> bool:
        """Whether sizes are only read by modules that are known to be elementwise."""
        modules = dict(zip((n for n in self.step.graph.nodes if n.op == "placeholder"), constants, strict=False))
        for node in self.step.graph.nodes:
            if _reads_size(node):
                return False
            if node.op == "call_function" and node.target in (call_stateful, initial_value):
                module = modules.get(node.args[0])
                adapter = adapter_of(module) if isinstance(module, nn.Module) else None
                if adapter is None or not adapter.elementwise(cast(nn.Module, module)):
                    return False
            elif node.op == "call_function" and node.args:
                module = modules.get(node.args[0])
                known = type(module).__module__.startswith(("torch.nn.", "snnfx."))
                if isinstance(module, nn.Module) and not known:
                    return False
        return True


def _differs(a: Tensor, b: Tensor) -> bool:
    """Whether values changed; NaN is the same as NaN."""
    if torch.equal(a, b):
        return False
    return not (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a != a, b != b))


def _constants_of(lowered: LoweredStep | MixedStep) -> tuple[tuple[int, int], ...]:
    return lowered.constants if isinstance(lowered, MixedStep) else lowered.step.constants


def _refuse_other_shapes(inputs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """A kernel gives all states the shape of its inputs, of which some may only serve for the first values."""
    try:
        shape = torch.broadcast_shapes(*[v.shape for v in (*inputs, *states)])
    except RuntimeError:
        shape = None
    if any(state.shape != shape for state in states):
        raise LoweringRefused("a state has another shape than the inputs")


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "numel", "nelement", "__len__")
    return node.op == "call_function" and (node.target is len or (node.target is getattr and node.args[1] == "shape"))


def _fetcher(tensor: Tensor, constants: Sequence[Any]) -> Callable[[Sequence[Any]], Tensor]:
    """How to get at a constant of a recording in later calls: where it is now, or the tensor itself."""
    for index, constant in enumerate(constants):
        if constant is tensor:
            return lambda given, index=index: given[index]  # type: ignore[misc]
        if isinstance(constant, nn.Module):
            for module in constant.modules():
                for registry in (module._parameters, module._buffers):
                    for name, value in registry.items():
                        if value is tensor:
                            return lambda given, registry=registry, name=name: registry[name]  # type: ignore[misc]
    return lambda given: tensor
