"""The kernels of one loop region, recorded at the first call and cached.

The cache key of a recording has the dtypes and shapes of a step (only the ranks, if the step reads no sizes) and the
settings of the region's modules: every call checks `neuron.tau`. It does not have T. Built kernels are cached by their
source text, so another `tau` or batch size builds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.errors import warn_once
from snnfx.lowering.aten_recording import LoweringRefused
from snnfx.lowering.elementwise.autograd_kernel import needs_of, run_lowered
from snnfx.lowering.elementwise.back_end_choice import DEVICES, device_kind_of
from snnfx.lowering.elementwise.bound_step import BoundStep
from snnfx.lowering.elementwise.lowered_step import LoweredStep, Needs
from snnfx.lowering.elementwise.translation import TranslatedStep
from snnfx.lowering.live_settings import SettingsOfRegion
from snnfx.lowering.mixed.autograd_loop import run_mixed
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.step_lowering import LoweringResult, StepLowering
from snnfx.regions.stepping_choice import RunLoop, SteppingChoice
from snnfx.sandbox.torch_internals import are_transforms_active, dispatch_mode_count, forward_mode_level

__all__ = ["BoundMixedLoop", "PreparedCall", "RegionKernels"]

_MAX_RECORDINGS = 64
"""Cached recordings of a region, at most."""
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


@dataclass
class PreparedCall:
    """A lowered step with the arguments of a call.

    Args:
        kernels: the kernels of the region.
        entry, lowered: the lowered step.
        x_seq, constants: the arguments of the call.
        constants_read: the tensors among the constants that the step reads.
    """

    kernels: RegionKernels
    entry: LoweringResult
    lowered: LoweredStep | MixedStep
    x_seq: Sequence[Tensor]
    constants: Sequence[Any]
    constants_read: list[Tensor]

    @property
    def starts_from_numbers(self) -> bool:
        """Whether the states before the first step are numbers, or given by the caller."""
        return self.entry.initial is None or None not in self.entry.initial.numbers

    def runs_first_step(self, state: Sequence[Any] | None) -> bool:
        """Whether the first step runs as an eager graph, because only it can initialise the states."""
        return state is None and self.kernels.first is not None and self.entry.initial is None

    @property
    def operand_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the operands that do not change with time."""
        return [] if isinstance(self.lowered, MixedStep) else list(self.lowered.step.operand_shapes)

    def first_states(self, state: Sequence[Any] | None) -> list[Any]:
        """The states before the first step."""
        if state is None and self.kernels.first is not None:
            assert self.entry.initial is not None
            return self.entry.initial.values(self.constants, self.x_seq, self.kernels.step_lowering.start)
        return list(state or ())


class RegionKernels:
    """Runs a loop region by generated kernels if its step can be lowered.

    Args:
        label: the name of the region, for messages.
        step: `(*constants, *inputs, state) -> (outputs, state)`.
        first: `(*constants, *inputs) -> (outputs, state)`, None without state.
        make_start: builds the graph `(*constants, *inputs) -> (states before the first step, states after it)`.
        by_events: whether products may visit only the elements of their operands that are not zero.
    """

    def __init__(
        self,
        label: str,
        step: fx.GraphModule,
        first: fx.GraphModule | None,
        make_start: Callable[[], fx.GraphModule],
        by_events: bool = False,
    ) -> None:
        self.label, self.first = label, first
        self.step_lowering = StepLowering(step, first, make_start, by_events)
        self.entries: dict[Any, LoweringResult] = {}
        self._latest: tuple[Any, LoweringResult] | None = None
        self._settings = SettingsOfRegion()
        self.refusal = ""
        self.in_use: LoweredStep | MixedStep | None = None
        self.stepping = SteppingChoice(step)

    @property
    def reason_for_steps(self) -> str:
        """Why the latest call ran step by step, as a clause; "" if it did not."""
        return self.refusal or self.stepping.reason

    def run(
        self,
        x_seq: Sequence[Tensor],
        state: Sequence[Any] | None,
        constants: Sequence[Any],
        steps: RunLoop | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Run all steps of a sequence; None if the steps have to run one by one.

        Args:
            x_seq, state, constants: the arguments of the call.
            steps: runs the steps one by one; None if this must not be chosen.
        """
        if steps is not None and self.stepping.is_stepped(x_seq, state):
            return None
        prepared = self.prepare(x_seq, state, constants)
        if prepared is None:
            return None
        is_mixed = isinstance(prepared.lowered, MixedStep)
        if is_mixed and steps is not None and self.stepping.prefers_steps(x_seq, state, constants, self.run, steps):
            return None
        return self.run_prepared(prepared, x_seq, state)

    def run_prepared(
        self, prepared: PreparedCall, x_seq: Sequence[Tensor], state: Sequence[Any] | None
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Run a call by its lowered step; None if the steps have to run one by one."""
        if prepared.runs_first_step(state):
            return self._after_first_step(prepared)
        states = prepared.first_states(state)
        needs = needs_of(x_seq, states, prepared.constants_read) if torch.is_grad_enabled() else None
        if not self.build_for(prepared, needs):
            return None
        self.in_use = prepared.lowered
        if isinstance(prepared.lowered, LoweredStep):
            return run_lowered(prepared.lowered, x_seq, states, prepared.constants_read, needs)
        if not prepared.lowered.fits(states):
            self.refusal = "a state before the first step has another shape than the states after it"
            return None
        return run_mixed(prepared.lowered, x_seq, states, prepared.constants_read, needs)

    def _after_first_step(self, prepared: PreparedCall) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Run the first step as an eager graph, then all others without autograd."""
        assert self.first is not None and isinstance(prepared.lowered, MixedStep)
        x_seq = prepared.x_seq
        outputs, states = self.first.forward(*prepared.constants, *[x[0] for x in x_seq])
        self.in_use = prepared.lowered
        if x_seq[0].shape[0] == 1:
            return tuple([y.unsqueeze(0) for y in outputs]), states
        later = [x[1:] for x in x_seq]
        needs = needs_of(later, states, prepared.constants_read) if torch.is_grad_enabled() else None
        if not self.build_for(prepared, needs):
            return None
        later_outputs, states = run_mixed(prepared.lowered, later, states, prepared.constants_read, needs)
        if any(y.shape != rest.shape[1:] for y, rest in zip(outputs, later_outputs, strict=True)):
            self.refusal = "the outputs of the first step have another shape than those of the later steps"
            return None
        pairs = zip(outputs, later_outputs, strict=True)
        return tuple([torch.cat((y.unsqueeze(0), rest)) for y, rest in pairs]), states

    def prepare(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> PreparedCall | None:
        """The lowered step for these arguments, recorded if necessary; None if the step cannot be lowered."""
        if not _is_supported(x_seq, state, constants):
            return None
        settings = self._settings.of(constants)
        if settings is None:
            return None
        entry = self._entry(x_seq, state, constants, settings)
        lowered = entry.lowered
        if lowered is None:
            self.refusal = entry.reason
            return None
        if state is not None:
            fits = lowered.fits(state) if isinstance(lowered, MixedStep) else _states_fit(state, x_seq, lowered.step)
            if not fits:
                self.refusal = "a given state has another shape than the states after a step"
                return None
        return PreparedCall(self, entry, lowered, x_seq, constants, [fetch(constants) for fetch in entry.constants])

    def bound_step(
        self,
        x_seq: Sequence[Tensor],
        constants: Sequence[Any],
        with_finals: bool = True,
        state: Sequence[Any] | None = None,
        in_bits: bool = False,
    ) -> BoundStep | BoundMixedLoop | None:
        """The kernels of a call, bound to its layout; None if they cannot be bound.

        Args:
            x_seq, constants, state: as for `run`; only a mixed loop is bound to a state.
            with_finals: whether the calls read the final states.
            in_bits: whether the calls return their output as bits.
        """
        prepared = self.prepare(x_seq, state, constants)
        if prepared is None or prepared.entry.baked:
            return None
        lowered = prepared.lowered
        if isinstance(lowered, MixedStep):
            return None if in_bits else BoundMixedLoop(prepared, state)
        if state is not None or prepared.runs_first_step(None):
            return None
        if not isinstance(lowered, LoweredStep) or not prepared.starts_from_numbers:
            return None
        numbers = prepared.first_states(None)
        needs = needs_of(x_seq, numbers, prepared.constants_read) if torch.is_grad_enabled() else None
        if not self.build_for(prepared, needs):
            return None
        fetchers = prepared.entry.constants
        return BoundStep.of(
            lowered,
            x_seq,
            numbers,
            needs,
            constants,
            lambda given: [fetch(given) for fetch in fetchers],
            with_finals,
            in_bits,
        )

    def build_for(self, prepared: PreparedCall, needs: Needs | None) -> bool:
        """Build the kernels of a call; if that fails, the region runs step by step from now on."""
        entry = prepared.entry
        if needs in entry.built:
            return True
        try:
            x_seq = prepared.x_seq[0]
            prepared.lowered.build(needs, x_seq.numel() // x_seq.shape[0])
        except LoweringRefused as reason:
            entry.lowered, entry.reason = None, str(reason)
            self.refusal = entry.reason
            warn_once("SNNFX505", f"loops run step by step in PyTorch: {reason}.", key="build")
            return False
        entry.built |= {needs}
        return True

    def _entry(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any], settings: Any
    ) -> LoweringResult:
        device = x_seq[0].device
        kind = device_kind_of(device)
        fixed = (
            settings,
            None if state is None else tuple([_state_key(s) for s in state]),
            device,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            torch.get_default_dtype(),
            torch.is_inference_mode_enabled(),  # a recording in inference mode has no backward pass
        )
        exact = (tuple([(x.shape[1:], x.dtype) for x in x_seq]), fixed)
        if self._latest is not None and self._latest[0] == exact:
            entry = self._latest[1]
        else:
            entry = self._cached_or_lowered(exact, x_seq, state, constants)
        for fetch, reference, version in entry.baked:
            tensor = fetch(constants)
            if tensor is not reference() or tensor._version != version:
                entry, _ = self.step_lowering.lower(x_seq, state, constants)
                self._keep(exact, entry)
                break
        self._latest = exact, entry
        return entry

    def _cached_or_lowered(
        self, exact: tuple[Any, Any], x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> LoweringResult:
        """The cached result for the sizes of these inputs or for all sizes; recorded if there is none."""
        entry = self.entries.get(exact)
        if entry is None:
            general = (tuple([(_broadcast_pattern(x.shape[1:]), x.dtype) for x in x_seq]), exact[1])
            entry = self.entries.get(general)
            if entry is None:
                entry, is_general = self.step_lowering.lower(x_seq, state, constants)
                self._keep(general if is_general else exact, entry)
        return entry

    def _keep(self, key: Any, entry: LoweringResult) -> None:
        for oldest in [*self.entries][: 1 - _MAX_RECORDINGS]:  # a list, since other threads change the dict
            self.entries.pop(oldest, None)
        self.entries[key] = entry


class BoundMixedLoop:
    """The mixed loop of calls that have one layout.

    Args:
        prepared: a call with this layout.
        state: its state before the first step; None: the reset state.
    """

    def __init__(self, prepared: PreparedCall, state: Sequence[Any] | None) -> None:
        # Not the prepared call, which keeps its input alive.
        self.kernels, self.entry, self.lowered = prepared.kernels, prepared.entry, prepared.lowered
        self.layout = _layout((*prepared.x_seq, *_tensors_among(prepared.constants)), state)

    def run(
        self,
        x_seq: Sequence[Tensor],
        constants: Sequence[Any],
        given: Sequence[Tensor],
        state: Sequence[Any] | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Run a sequence: `(outputs, final states)`; None if the tensors have another layout.

        Args:
            x_seq: the inputs.
            constants: the constants of the call.
            given: the tensors among them.
            state: the state before the first step.
        """
        if _layout((*x_seq, *given), state) != self.layout:
            return None
        read = [fetch(constants) for fetch in self.entry.constants]
        prepared = PreparedCall(self.kernels, self.entry, self.lowered, x_seq, constants, read)
        self.kernels.stepping.reason = ""
        return self.kernels.run_prepared(prepared, x_seq, state)


def _tensors_among(values: Sequence[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor)]


def _layout(tensors: Sequence[Tensor], state: Sequence[Any] | None) -> list[object]:
    layout: list[object] = [(t.shape, t.dtype, t.device, t.requires_grad) for t in tensors]
    for value in state or ():
        is_tensor = type(value) in _PLAIN_TENSORS
        layout.append((value.shape, value.dtype, value.device) if is_tensor else (type(value), value))
    return layout if state is None else [*layout, len(state)]


def _is_supported(x_seq: Sequence[Any], state: Sequence[Any] | None, constants: Sequence[Any]) -> bool:
    """Whether the arguments are plain tensors on a device with kernels, modules and numbers, and no mode is active."""
    if dispatch_mode_count() or are_transforms_active():
        return False
    if forward_mode_level() >= 0:
        return False
    device = x_seq[0].device
    if device_kind_of(device) not in DEVICES:
        return False
    for value in (*x_seq, *(state or ()), *constants):
        if isinstance(value, Tensor):
            if type(value) not in _PLAIN_TENSORS:
                return False
            if value.device != device and (value.dim() > 0 or value.device.type != "cpu"):
                return False
            if value.layout != torch.strided or value.is_nested:
                return False
        elif not isinstance(value, nn.Module | bool | int | float):
            return False
    return bool(x_seq[0].shape[0] > 0)


def _states_fit(state: Sequence[Any], x_seq: Sequence[Tensor], step: TranslatedStep) -> bool:
    """Whether states can be expanded to the shape of a step; some libraries pass an empty tensor as reset state."""
    shapes = [s.shape for s in state if isinstance(s, Tensor)]
    if all(shape == x_seq[0].shape[1:] for shape in shapes):
        return True
    read = [x.shape[1:] for x, d in zip(x_seq, step.expressions.sequences, strict=True) if d != "unused"]
    try:
        full = torch.broadcast_shapes(*read, *step.operand_shapes)
        return not read or all(torch.broadcast_shapes(full, shape) == full for shape in shapes)
    except RuntimeError:
        return False


def _broadcast_pattern(shape: Sequence[int]) -> tuple[bool, ...]:
    """The dimensions of a shape that broadcast."""
    return tuple([n == 1 for n in shape])


def _state_key(value: Any) -> Any:
    return (value.dtype, _broadcast_pattern(value.shape)) if isinstance(value, Tensor) else (type(value), value)
