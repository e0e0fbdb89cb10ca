"""Lower the step of a region: record one step, then build kernels from the recording."""

from __future__ import annotations

import contextlib
import functools
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from snnfx.ir.guards import is_same_tensor
from snnfx.lowering.aten_recording import LoweringRefused, Recording, record_step
from snnfx.lowering.elementwise.aten_table import decomposition
from snnfx.lowering.elementwise.back_end_choice import back_end_of
from snnfx.lowering.elementwise.initial_states import (
    InitialStates,
    initial_states_by_comparison,
    initial_states_of_start,
)
from snnfx.lowering.elementwise.lowered_step import LoweredStep
from snnfx.lowering.elementwise.translation import translate
from snnfx.lowering.mixed.first_states import initial_states_by_calls, initial_states_of_each
from snnfx.lowering.mixed.mixed_step import MixedStep
from snnfx.regions.sequence_region import buffers_of
from snnfx.sandbox.internal_faults import is_internal_fault, surface
from snnfx.sandbox.random_draws import draws_undone
from snnfx.sandbox.tensor_values import restore_value
from snnfx.state.registry import adapter_of
from snnfx.state.step_calls import call_stateful, initial_value

__all__ = ["LoweringResult", "StepLowering"]


@dataclass
class LoweringResult:
    """The lowered step of a region, or the reason for not lowering it.

    Args:
        lowered: the lowered step, or None.
        initial: the states before the first step; None if the caller gives them or only the first step computes them.
        constants: functions that fetch the tensors that the step reads from the constants of a call.
        baked: for each tensor whose value is part of the recording: how to fetch it, a reference to it, its version.
        keep_alive: the objects whose ids are part of the cache key.
        reason: if `lowered` is None, the reason as a clause.
        built: the gradients (None: inference) for which the kernels have been built.
    """

    lowered: LoweredStep | MixedStep | None
    initial: InitialStates | None
    constants: tuple[Callable[[Sequence[Any]], Tensor], ...] = ()
    baked: tuple[tuple[Callable[[Sequence[Any]], Tensor], weakref.ref[Tensor], int], ...] = ()
    keep_alive: tuple[Any, ...] = ()
    reason: str = ""
    built: frozenset[Any] = frozenset()


class StepLowering:
    """Records and lowers the step of one region.

    Args:
        step: `(*constants, *inputs, state) -> (outputs, state)`.
        first: `(*constants, *inputs) -> (outputs, state)`, None without state.
        make_start: builds the graph `(*constants, *inputs) -> (states before the first step, states after it)`.
        by_events: whether products may visit only the elements of their operands that are not zero.
    """

    def __init__(
        self,
        step: fx.GraphModule,
        first: fx.GraphModule | None,
        make_start: Callable[[], fx.GraphModule],
        by_events: bool,
    ) -> None:
        self.step, self.first, self._make_start, self._by_events = step, first, make_start, by_events
        self._start: fx.GraphModule | None = None

    def start(self) -> fx.GraphModule:
        """The graph that computes the states before the first step."""
        if self._start is None:
            self._start = self._make_start()
        return self._start

    def lower(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> tuple[LoweringResult, bool]:
        """Lower a step: `(result, whether the result holds for inputs of other sizes)`."""
        if not torch.is_inference_mode_enabled():
            return self._lower(x_seq, state, constants)
        # Later calls may train, and a recording of inference tensors has no autograd graph.
        with torch.inference_mode(False), torch.no_grad():
            normal = [_without_inference(c) for c in constants]
            states = None if state is None else [_without_inference(s) for s in state]
            return self._lower([_without_inference(x) for x in x_seq], states, normal)

    def _lower(
        self, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> tuple[LoweringResult, bool]:
        # Detached from their autograd graph: recording the backward pass must not enter it.
        constants = [c.detach().requires_grad_(c.requires_grad) if isinstance(c, Tensor) else c for c in constants]
        keep_alive = tuple(
            x for c in constants if isinstance(c, nn.Module) for m in c.modules() for x in m.__dict__.values()
        )
        buffers = [(buffer, buffer.clone()) for buffer in buffers_of(constants)]
        try:
            inputs = [x[0] for x in x_seq]
            with torch.no_grad():
                after = self._after_one_step(inputs, state, constants)
            step = functools.partial(self.step.forward, *constants)
            with _model_errors_refuse():
                recording = record_step(step, inputs, after, True, decomposition)
            starts = self.first is not None and state is None
            lowered, initial = self._lower_recording(recording, inputs, after, starts, constants)
            if not all(is_same_tensor(buffer, value) for buffer, value in buffers):
                raise LoweringRefused("the step changes a buffer")
        except LoweringRefused as reason:
            return LoweringResult(None, None, reason=str(reason), keep_alive=keep_alive), True
        except Exception as error:  # not the model's: `_model_errors_refuse` converts those
            surface(error, "a loop runs step by step in PyTorch")
            reason_text = f"snnfx failed to lower its step: {type(error).__name__}: {error}"
            return LoweringResult(None, None, reason=reason_text.rstrip("."), keep_alive=keep_alive), True
        finally:
            for buffer, value in buffers:
                restore_value(buffer, value)
        entry = LoweringResult(
            lowered,
            initial,
            tuple(_fetcher(recording.constants[i], constants) for _, i in _constants_of(lowered)),
            tuple((_fetcher(t, constants), weakref.ref(t), version) for t, version in recording.baked),
            keep_alive,
        )
        if isinstance(lowered, MixedStep):
            return entry, False
        holds_for_all = not lowered.step.has_fixed_sizes and (
            not recording.reads_sizes or self._only_elementwise_modules_read_sizes(self.step.graph, constants)
        )
        if initial is not None and initial.depends_on_sizes:
            holds_for_all = False
        return entry, holds_for_all

    def _lower_recording(
        self,
        recording: Recording,
        inputs: Sequence[Tensor],
        after: Sequence[Tensor],
        starts: bool,
        constants: Sequence[Any],
    ) -> tuple[LoweredStep | MixedStep, InitialStates | None]:
        """One kernel for all steps; if the step is not element-wise, a schedule that runs without autograd."""
        device = inputs[0].device
        try:
            translated = translate(recording)
            kinds = translated.expressions.sequences
            _refuse_other_shapes([x for x, k in zip(inputs, kinds, strict=True) if k != "unused"], after)
            lowered = LoweredStep(translated, back_end_of(device), device)
            initial = self._initial_states(recording, inputs, constants) if starts else None
            if initial is not None:
                self._refuse_unknown_shape(lowered, initial, inputs, constants)
            return lowered, initial
        except LoweringRefused as reason:
            if device.type != "cpu" or torch.is_autocast_enabled("cpu"):
                raise
            if any(value.has_selected_size for value in recording.values):
                raise  # a loop with products stores each value of a step in a tensor of fixed size
            mixed = MixedStep(recording, str(reason), self._by_events)
        if not starts:
            return mixed, None
        with contextlib.suppress(LoweringRefused):
            return mixed, initial_states_of_each(self._recording_of_start(inputs, constants))
        assert self.first is not None
        with contextlib.suppress(LoweringRefused):
            return mixed, initial_states_by_calls(recording, self._recording_of(self.first, inputs, constants))
        return mixed, None

    def _refuse_unknown_shape(
        self, lowered: LoweredStep, initial: InitialStates, inputs: Sequence[Tensor], constants: Sequence[Any]
    ) -> None:
        """Refuse a step whose shape depends on the shape of the initial states, which become numbers."""
        x_seq, shape = [x.unsqueeze(0) for x in inputs], lowered.step.shape
        if lowered.shape_of_step(x_seq, ()) != shape:
            with _model_errors_refuse():
                states = initial.values(constants, x_seq, self.start)
            if lowered.shape_of_step(x_seq, states) != shape:
                raise LoweringRefused("the shape of its states does not follow from the tensors that each step reads")

    def _recording_of(self, graph: fx.GraphModule, inputs: Sequence[Tensor], constants: Sequence[Any]) -> Recording:
        with _model_errors_refuse():
            return record_step(functools.partial(graph.forward, *constants), inputs, None, False, decomposition)

    def _recording_of_start(self, inputs: Sequence[Tensor], constants: Sequence[Any]) -> Recording:
        try:
            return self._recording_of(self.start(), inputs, constants)
        except TypeError as error:
            raise LoweringRefused("a module initialises its own state, from None") from error

    def _after_one_step(
        self, inputs: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
    ) -> list[Tensor]:
        """The states after one step, which have the shapes and dtypes of all later states."""
        with draws_undone(), _model_errors_refuse():
            if state is None and self.first is not None:
                _, after = self.first.forward(*constants, *inputs)
            else:
                _, after = self.step.forward(*constants, *inputs, tuple(state or ()))
        for value in after:
            if not isinstance(value, Tensor):
                raise LoweringRefused(f"a state is a {type(value).__name__}, which Python computes, not a tensor")
        return list(after)

    def _initial_states(
        self, recording: Recording, inputs: Sequence[Tensor], constants: Sequence[Any]
    ) -> InitialStates:
        def fetcher(tensor: Tensor) -> Callable[[Sequence[Any]], Tensor]:
            return _fetcher(tensor, constants)

        graph = self.start()
        try:
            of_start = self._recording_of_start(inputs, constants)
            initial = initial_states_of_start(of_start, fetcher)
        except LoweringRefused:
            assert self.first is not None
            graph, of_start = self.first, self._recording_of(self.first, inputs, constants)
            initial = initial_states_by_comparison(recording, of_start, fetcher)
        initial.depends_on_sizes = of_start.reads_sizes and not self._only_elementwise_modules_read_sizes(
            graph.graph, constants
        )
        return initial

    def _only_elementwise_modules_read_sizes(self, graph: fx.Graph, constants: Sequence[Any]) -> bool:
        """Whether only modules known to be element-wise read sizes, and tensors of one value take them."""
        modules = dict(zip((n for n in graph.nodes if n.op == "placeholder"), constants, strict=False))
        for node in graph.nodes:
            if _reads_size(node) and not _sizes_uniform_tensors(node):
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


@contextlib.contextmanager
def _model_errors_refuse() -> Iterator[None]:
    """Refuse to lower a step in which the user's model or torch raises; the stepped loop then raises the error."""
    try:
        yield
    except LoweringRefused:
        raise
    except Exception as error:
        if is_internal_fault(error):
            raise
        reason = f"recording its step raised {type(error).__name__}: {error}"
        raise LoweringRefused(reason.rstrip(".")) from error


def _without_inference(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _constants_of(lowered: LoweredStep | MixedStep) -> tuple[tuple[int, int], ...]:
    return lowered.constants if isinstance(lowered, MixedStep) else lowered.step.constants


def _refuse_other_shapes(inputs: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    """Refuse states that do not have the shape to which inputs and states broadcast."""
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


_UNIFORM: dict[Any, int | None] = {
    torch.zeros: None, torch.ones: None, torch.full: 1, "new_zeros": None, "new_ones": None, "new_full": 2
}  # fmt: skip
"""Operators that create a tensor of one value from sizes, with the position of that value."""


def _sizes_uniform_tensors(node: fx.Node) -> bool:
    """Whether a size is only the size of tensors of one value, which are the same number for any size."""
    pending = [node]
    while pending:
        size = pending.pop()
        for user in size.users:
            if user.target is operator.getitem and user.args[0] is size:
                pending.append(user)
                continue
            if user.target not in _UNIFORM or "fill_value" in user.kwargs:
                return False
            position = _UNIFORM[user.target]
            if position is not None and (len(user.args) <= position or user.args[position] is size):
                return False
    return True


def _fetcher(tensor: Tensor, constants: Sequence[Any]) -> Callable[[Sequence[Any]], Tensor]:
    """A function that fetches a recorded constant in later calls: by its place in the constants, else by reference."""
    for index, constant in enumerate(constants):
        if constant is tensor:
            return lambda given, index=index: given[index]  # type: ignore[misc]
        if isinstance(constant, nn.Module):
            for path, module in constant.named_modules():
                for registry in ("_parameters", "_buffers"):
                    for name, value in module.__dict__[registry].items():
                        if value is tensor:
                            return _fetcher_of_registered(index, path, registry, name)
    return lambda given: tensor


def _fetcher_of_registered(index: int, path: str, registry: str, name: str) -> Callable[[Sequence[Any]], Tensor]:
    """Fetch by path, not from the registry itself: recomputation runs with copies of the modules."""
    if not path:
        return lambda given: given[index].__dict__[registry][name]
    atoms = path.split(".")

    def fetch(given: Sequence[Any]) -> Tensor:
        module = given[index]
        for atom in atoms:
            module = module._modules[atom]
        return module.__dict__[registry][name]  # type: ignore[no-any-return]

    return fetch
