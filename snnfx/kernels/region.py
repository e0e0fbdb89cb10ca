"""The kernels of one loop region: made at the first call, kept by what they depend on, or a reason why there are none.

A recording holds for the dtypes and shapes of a step (for its ranks, where nobody looked at sizes), and for the Python
values in the modules of the region: `neuron.tau` is looked at in every call. T is in nothing. Kernels are kept by
their text, so another `tau` or batch size builds nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from snnfx.errors import warn_once
from snnfx.kernels.aten import decomposition
from snnfx.kernels.back_ends import DEVICES, back_end_of, kind_of
from snnfx.kernels.function import needs_of, run_lowered
from snnfx.kernels.initial import InitialStates, initial_states_by_comparison, initial_states_of_start
from snnfx.kernels.lowered import LoweredStep, Needs
from snnfx.kernels.record import NotLowered, Recording, random_numbers_kept, record_step
from snnfx.kernels.settings import SettingsOfRegion
from snnfx.kernels.translate import TranslatedStep, translate
from snnfx.loops.function import run_mixed
from snnfx.loops.initial import initial_states_of_each
from snnfx.loops.mixed import MixedStep
from snnfx.regions import buffers_of
from snnfx.state import adapter_of, call_stateful, initial_value

__all__ = ["Prepared", "RegionKernels"]

_MOST = 64
"""Recordings kept for a region."""
_PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)


@dataclass
class _Entry:
    """One recording, or why there is none."""

    lowered: LoweredStep | MixedStep | None
    initial: InitialStates | None
    constants: tuple[Callable[[Sequence[Any]], Tensor], ...] = ()
    baked: tuple[tuple[Callable[[Sequence[Any]], Tensor], int, int], ...] = ()
    kept_alive: tuple[Any, ...] = ()
    reason: str = ""
    built: frozenset[Any] = frozenset()


@dataclass
class Prepared:
    """A recording with the arguments of a call.

    Args:
        kernels, entry, lowered: what was recorded.
        x_seq, constants: of the call.
        given: the tensors among the constants that the step reads.
    """

    kernels: RegionKernels
    entry: _Entry
    lowered: LoweredStep | MixedStep
    x_seq: Sequence[Tensor]
    constants: Sequence[Any]
    given: list[Tensor]

    @property
    def starts_from_numbers(self) -> bool:
        """Whether the reset state is made of numbers."""
        return self.entry.initial is None or None not in self.entry.initial.numbers

    def runs_first_step(self, state: Sequence[Any] | None) -> bool:
        """Whether the first step has to be run as it is: nobody else knows what it starts from."""
        return state is None and self.kernels.first is not None and self.entry.initial is None

    @property
    def operand_shapes(self) -> list[tuple[int, ...]]:
        """Of what does not change with time."""
        return [] if isinstance(self.lowered, MixedStep) else list(self.lowered.step.operand_shapes)

    def first_states(self, state: Sequence[Any] | None) -> list[Any]:
        """The states before the first step."""
        if state is None and self.kernels.first is not None:
            assert self.entry.initial is not None
            return self.entry.initial.values(self.constants, self.x_seq, self.kernels.start)
        return list(state or ())


class RegionKernels:
    """Runs a loop region by generated kernels where that is possible.

    Args:
        label: of the region, for messages.
        step: `(*constants, *inputs, state) -> (outputs, state)`.
        first: `(*constants, *inputs) -> (outputs, state)`, None without state.
        make_start: makes the graph `(*constants, *inputs) -> (states before the first step, states after it)`.
    """

    def __init__(
        self, label: str, step: fx.GraphModule, first: fx.GraphModule | None, make_start: Callable[[], fx.GraphModule]
    ) -> None:
        self.label, self.step, self.first, self.make_start = label, step, first, make_start
        self._start: fx.GraphModule | None = None
        self.entries: dict[Any, _Entry] = {}
        self._latest: tuple[Any, _Entry] | None = None
        self._settings = SettingsOfRegion()
        self.refusal = ""
        self.in_use: LoweredStep | MixedStep | None = None

    def run(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """All steps of a sequence, or None when they have to be run one by one."""
        prepared = self.prepared(x_seq, state, constants)
        if prepared is None:
            return None
        if prepared.runs_first_step(state):
            return self._after_first_step(prepared)
        states = prepared.first_states(state)
        needs = needs_of(x_seq, states, prepared.given) if torch.is_grad_enabled() else None
        if not self.ready(prepared, needs):
            return None
        self.in_use = prepared.lowered
        if isinstance(prepared.lowered, LoweredStep):
            return run_lowered(prepared.lowered, x_seq, states, prepared.given, needs)
        if not prepared.lowered.fits(states):
            self.refusal = "a state before the first step has another shape than those after it"
            return None
        return run_mixed(prepared.lowered, x_seq, states, prepared.given, needs)

    def _after_first_step(self, prepared: Prepared) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """The first step as it is, then all others."""
        assert self.first is not None and isinstance(prepared.lowered, MixedStep)
        x_seq = prepared.x_seq
        outputs, states = self.first.forward(*prepared.constants, *[x[0] for x in x_seq])
        self.in_use = prepared.lowered
        if x_seq[0].shape[0] == 1:
            return tuple([y.unsqueeze(0) for y in outputs]), states
        later = [x[1:] for x in x_seq]
        needs = needs_of(later, states, prepared.given) if torch.is_grad_enabled() else None
        if not self.ready(prepared, needs):
            return None
        found, states = run_mixed(prepared.lowered, later, states, prepared.given, needs)
        if any(y.shape != rest.shape[1:] for y, rest in zip(outputs, found, strict=True)):
            self.refusal = "the first step has outputs of another shape than the others"
            return None
        return tuple([torch.cat((y.unsqueeze(0), rest)) for y, rest in zip(outputs, found, strict=True)]), states

    def prepared(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> Prepared | None:
        """The recording for these arguments, made if need be, with its constants; None where there is none."""
        if not _ordinary(x_seq, state, constants):
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
            fits = lowered.fits(state) if isinstance(lowered, MixedStep) else _fit(state, x_seq, lowered.step)
            if not fits:
                self.refusal = "a given state has another shape than the states after a step"
                return None
        return Prepared(self, entry, lowered, x_seq, constants, [fetch(constants) for fetch in entry.constants])

    def start(self) -> fx.GraphModule:
        """The graph of the states before the first step."""
        if self._start is None:
            self._start = self.make_start()
        return self._start

    def ready(self, prepared: Prepared, needs: Needs | None) -> bool:
        """Build what a call needs; where that fails, the region is not lowered from now on."""
        entry = prepared.entry
        if needs in entry.built:
            return True
        try:
            x_seq = prepared.x_seq[0]
            prepared.lowered.build(needs, x_seq.numel() // x_seq.shape[0])
        except NotLowered as reason:
            entry.lowered, entry.reason = None, str(reason)
            self.refusal = entry.reason
            warn_once("SNNFX505", f"loops are run step by step by PyTorch: {reason}.", key="build")
            return False
        entry.built |= {needs}
        return True

    # -- recordings -----------------------------------------------------------------------------------------------

    def _entry(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any], settings: Any
    ) -> _Entry:
        device = x_seq[0].device
        kind = kind_of(device)
        fixed = (
            settings,
            None if state is None else tuple([_of_state(s) for s in state]),
            device,
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            torch.get_default_dtype(),
        )
        exact = (tuple([(x.shape[1:], x.dtype) for x in x_seq]), fixed)
        if self._latest is not None and self._latest[0] == exact:
            entry = self._latest[1]
        else:
            entry = self._found_or_recorded(exact, x_seq, state, constants)
        for fetch, identity, version in entry.baked:
            tensor = fetch(constants)
            if id(tensor) != identity or tensor._version != version:
                entry, _ = self._record(x_seq, state, constants)
                self._keep(exact, entry)
                break
        self._latest = exact, entry
        return entry

    def _found_or_recorded(
        self, exact: tuple[Any, Any], x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> _Entry:
        """What is kept for the sizes of these inputs, or for all sizes."""
        entry = self.entries.get(exact)
        if entry is None:
            general = (tuple([(_pattern(x.shape[1:]), x.dtype) for x in x_seq]), exact[1])
            entry = self.entries.get(general)
            if entry is None:
                entry, is_general = self._record(x_seq, state, constants)
                self._keep(general if is_general else exact, entry)
        return entry

    def _keep(self, key: Any, entry: _Entry) -> None:
        if len(self.entries) >= _MOST:
            self.entries.pop(next(iter(self.entries)))
        self.entries[key] = entry

    def _record(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> tuple[_Entry, bool]:
        """Record a step, and whether the recording (or the reason against one) holds for other sizes of its inputs."""
        # Without their history: the rehearsal of the backward pass must not go through it.
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
                raise NotLowered("the step changes a buffer")
        except NotLowered as reason:
            return _Entry(None, None, reason=str(reason), kept_alive=alive), True
        except Exception as error:  # in the user's code: should it be an error of the model, the loop raises it again
            reason_text = f"its step cannot be differentiated in a rehearsal: {type(error).__name__}: {error}"
            return _Entry(None, None, reason=reason_text.rstrip("."), kept_alive=alive), True
        finally:
            for buffer, value in buffers:
                if _differs(buffer, value):  # past the version counter: no user has seen the rehearsal
                    buffer.data.copy_(value)
        entry = _Entry(
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
            return lowered, self._initial_states(recording, inputs, constants) if starts else None
        except NotLowered as reason:
            if device.type != "cpu" or torch.is_autocast_enabled("cpu"):
                raise
            mixed = MixedStep(recording, str(reason))
        try:
            return mixed, initial_states_of_each(self._recorded(self.start(), inputs, constants)) if starts else None
        except (NotLowered, TypeError):  # TypeError: a module makes its states itself, from None
            return mixed, None

    def _recorded(self, graph: fx.GraphModule, inputs: Sequence[Tensor], constants: Sequence[Any]) -> Recording:
        return record_step(functools.partial(graph.forward, *constants), inputs, None, False, decomposition)

    def _after_one_step(
        self, inputs: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> list[Tensor]:
        """The states after a step: what all later steps start from."""
        with random_numbers_kept(inputs[0].device):
            if state is None and self.first is not None:
                _, after = self.first.forward(*constants, *inputs)
            else:
                _, after = self.step.forward(*constants, *inputs, tuple(state or ()))
        for value in after:
            if not isinstance(value, Tensor):
                raise NotLowered(f"a state is a {type(value).__name__} that Python computes")
        return list(after)

    def _initial_states(
        self, recording: Recording, inputs: Sequence[Tensor], constants: Sequence[Any]
    ) -> InitialStates:
        def fetcher(tensor: Tensor) -> Callable[[Sequence[Any]], Tensor]:
            return _fetcher(tensor, constants)

        try:
            return initial_states_of_start(self._recorded(self.start(), inputs, constants), fetcher)
        except (NotLowered, TypeError):  # TypeError: a module makes its states itself, from None
            assert self.first is not None
            return initial_states_by_comparison(recording, self._recorded(self.first, inputs, constants), fetcher)

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
        raise NotLowered("a state has another shape than the inputs")


def _ordinary(x_seq: Sequence[Any], state: Sequence[Any] | None, constants: Sequence[Any]) -> bool:
    """Whether these are plain tensors on a device with kernels, which nobody watches, and modules and numbers."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0:
        return False
    device = x_seq[0].device
    if kind_of(device) not in DEVICES:
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


def _fit(state: Sequence[Any], x_seq: Sequence[Tensor], step: TranslatedStep) -> bool:
    """Whether states can be expanded to the shape of a step; some libraries pass an empty one for the reset state."""
    shapes = [s.shape for s in state if isinstance(s, Tensor)]
    if all(shape == x_seq[0].shape[1:] for shape in shapes):
        return True
    read = [x.shape[1:] for x, d in zip(x_seq, step.expressions.sequences, strict=True) if d != "unused"]
    try:
        full = torch.broadcast_shapes(*read, *step.operand_shapes)
        return not read or all(torch.broadcast_shapes(full, shape) == full for shape in shapes)
    except RuntimeError:
        return False


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "numel", "nelement", "__len__")
    return node.op == "call_function" and (node.target is len or (node.target is getattr and node.args[1] == "shape"))


def _pattern(shape: Sequence[int]) -> tuple[bool, ...]:
    """What of a shape decides how values are combined."""
    return tuple([n == 1 for n in shape])


def _of_state(value: Any) -> Any:
    return (value.dtype, _pattern(value.shape)) if isinstance(value, Tensor) else (type(value), value)


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
