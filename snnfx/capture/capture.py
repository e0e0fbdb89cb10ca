"""Capture: trace one time step of a model into a step program with explicit state.

A trace starts from the reset state of the model. A module that declares its state (`MemoryModule`, adapters) becomes
one call with explicit state (neurons), or its forward is traced with its attributes as slots. Any other attribute that
a step changes is discovered as a slot.

The model is traced twice: cold (slots at their initial values) and warm (slots as placeholders), because models contain
code like `if self.v is None: self.v = torch.full_like(x, 0.3)`. If the two traces differ only where the warm one reads
a slot, the expression in the cold trace is the initial value of the slot. If they differ elsewhere, the cold trace
becomes the program of the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.parameter import is_lazy

from snnfx.capture.attribute_slots import AttributeSlot, is_number, recorded
from snnfx.capture.capture_session import CaptureSession, erase_unused_placeholders
from snnfx.capture.cold_trace import ColdTrace, TracedCall, refer_to_model, refuse_growth, refusing_growth
from snnfx.capture.graph_matching import GraphMatch
from snnfx.capture.guarded_reads import ReachableCode
from snnfx.capture.iteration_tracking import IterationLimit
from snnfx.capture.recording_copy import RecordingCopy, capture_lock
from snnfx.capture.step_arguments import carried_arguments, step_arguments
from snnfx.capture.step_changes import NewChange, StepChanges
from snnfx.capture.tracer import RECORDED_NUMBER, SubmoduleNotTraceable
from snnfx.capture.unsupported_modules import refuse_unsupported_modules
from snnfx.errors import CaptureError, InputError, warn
from snnfx.ir.edits import add_placeholder
from snnfx.ir.facts import SLOT
from snnfx.ir.program import InputLeaf, Slot, StepProgram, results_of
from snnfx.sandbox.isolation import autocast_cache_disabled
from snnfx.sandbox.torch_internals import FakeTensorMode, pytree
from snnfx.sandbox.user_code import location_of_forward
from snnfx.state.carry import OutputPath

__all__ = ["capture", "capture_both_modes", "trace_of_call"]

_Recorded = TypeVar("_Recorded")


def capture_both_modes(
    model: nn.Module,
    example_inputs: Any = None,
    entry: str = "forward",
    carry: Mapping[str, OutputPath] | None = None,
    iterations: IterationLimit | None = None,
    traced: TracedCall | None = None,
) -> tuple[StepProgram, StepProgram]:
    """Capture a model in training and in evaluation mode; the arguments are those of `capture`.

    Args:
        traced: a trace of the same call in evaluation mode, which need not be repeated.

    Returns:
        `(training program, evaluation program)`; the same object twice if the mode makes no difference.
    """
    _check_model(model, entry)
    if traced is not None and not traced.mode_matters:
        program = traced.program(training=True)
        if program is not None:
            return program, program
    training, mode_matters = _capture_copy(model, example_inputs, entry, True, carry, iterations)
    if not mode_matters:
        return training, training
    known = None if traced is None else traced.program(training=False)
    evaluation = known or _capture_copy(model, example_inputs, entry, False, carry, iterations)[0]
    match = GraphMatch(training, evaluation)
    if match.same_program():
        training.guards = training.guards.union(evaluation.guards)
        return training, training
    _rename_constants(evaluation, training.constants | (training.first_step.constants if training.first_step else {}))
    return training, evaluation


def _rename_constants(program: StepProgram, taken: dict[str, Any]) -> None:
    """Rename constants that conflict with `taken`, because a net stores the constants of all programs together."""
    renamed: dict[str, str] = {}
    names_in_use = dict(taken)
    for name, value in program.constants.items():
        new = name
        while new in names_in_use and names_in_use[new] is not value:
            new = f"{new}_"
        renamed[name] = new
        names_in_use[new] = value
    program.constants = {renamed[name]: value for name, value in program.constants.items()}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = renamed.get(str(node.target), node.target)
    if program.first_step is not None:
        _rename_constants(program.first_step, names_in_use)


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    entry: str = "forward",
    training: bool | None = None,
    carry: Mapping[str, OutputPath] | None = None,
    iterations: IterationLimit | None = None,
) -> StepProgram:
    """Capture one step of `model` without changing the model.

    Args:
        model: a single-step model.
        example_inputs: the inputs of ONE call, including the batch dimension: a tensor, a tuple of arguments, or a dict
            of keyword arguments. Without it the arguments are the method's required parameters, all tensors.
        entry: name of the method that computes one step.
        training: the mode to capture; default: the current mode of the model.
        carry: arguments that carry an output of the previous step, each with the position of that output.
        iterations: for a model that runs over time itself, whose whole call is captured: label each node with the
            iterations of the loops that recorded it, up to this limit. None: a forward that loops over time is refused.

    Returns:
        The step program, stage "captured".

    Raises:
        CaptureError: the model cannot be captured (codes 2xx); nothing is changed.
        InputError: `example_inputs` does not match the method's signature.
    """
    _check_model(model, entry)
    training = model.training if training is None else training
    return _capture_copy(model, example_inputs, entry, training, carry, iterations)[0]


def trace_of_call(
    model: nn.Module, example_inputs: Any, entry: str, training: bool, iterations: IterationLimit
) -> TracedCall:
    """Trace a whole call of a model that runs over time itself once, from its reset state, to find its loops."""
    _check_model(model, entry)

    def record(session: CaptureSession, leaves: list[InputLeaf], spec: pytree.TreeSpec) -> ColdTrace:
        return ColdTrace.record(session, leaves, spec, training)

    return TracedCall(*_on_copy(model, example_inputs, entry, training, None, iterations, record))


def _capture_copy(
    model: nn.Module,
    example_inputs: Any,
    entry: str,
    training: bool,
    carry: Mapping[str, OutputPath] | None,
    iterations: IterationLimit | None,
) -> tuple[StepProgram, bool]:
    """Capture a structural copy of a model: the program of the model, and whether its mode may matter."""
    program, copy = _on_copy(
        model,
        example_inputs,
        entry,
        training,
        carry,
        iterations,
        lambda session, leaves, spec: _capture_once(session, leaves, spec, training),
    )
    refer_to_model(program, copy)
    return program, copy.training_was_read


def _on_copy(
    model: nn.Module,
    example_inputs: Any,
    entry: str,
    training: bool,
    carry: Mapping[str, OutputPath] | None,
    iterations: IterationLimit | None,
    record: Callable[[CaptureSession, list[InputLeaf], pytree.TreeSpec], _Recorded],
) -> tuple[_Recorded, RecordingCopy]:
    """Record a structural copy of a model: the result of `record`, and the copy."""
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True) if example_inputs is not None else None
    carried = carried_arguments(model, entry, example_inputs, carry or {}, fake_mode)
    arguments, leaves, spec = step_arguments(model, entry, example_inputs, fake_mode, tuple(c.name for c in carried))
    opaque: dict[str, str] = {}
    with capture_lock, autocast_cache_disabled():
        copy = RecordingCopy(model)
        copy.set_mode(training)
        changes = StepChanges(copy.root, entry)
        code = ReachableCode(dict(copy.root.named_modules()), entry)
        code.close()
        # A model that asks for the gradient mode is captured in the mode of the caller.
        gradients = torch.is_grad_enabled() or "torch.is_grad_enabled" not in code.modes()
        while True:
            try:
                session = CaptureSession(copy, entry, arguments, opaque, fake_mode, carried, changes, code, iterations)
                with copy.watched(), torch.set_grad_enabled(gradients):
                    return record(session, leaves, spec), copy
            except NewChange:
                continue
            except SubmoduleNotTraceable as failure:
                if failure.name in opaque:
                    where = location_of_forward(model, entry)
                    raise CaptureError(
                        "SNNFX201", "the model cannot be traced", where=where, why=failure.reason
                    ) from failure
                _refuse_undeclared_state(copy.root, failure)
                if failure.name == "" and (entry != "forward" or carried or iterations is not None):
                    assert failure.error is not None
                    raise failure.error from failure.__cause__
                opaque[failure.name] = failure.reason
                changes = StepChanges(copy.root, entry)


def _capture_once(
    session: CaptureSession, leaves: list[InputLeaf], spec: pytree.TreeSpec, training: bool
) -> StepProgram:
    model, entry, carried = session.model, session.entry, session.carried
    discovered: dict[str, AttributeSlot] = {}
    cold = ColdTrace.record(session, leaves, spec, training)
    cold_discoveries, values = cold.discoveries, cold.next_values()
    if session.time_loop is not None and training:  # once for both modes
        warn("SNNFX115", session.time_loop.warning())
    for attribute in cold_discoveries:
        discovered[attribute.name] = attribute
    if cold.suffices():
        return cold.program()
    starts_as_none = cold.start_as_none()
    cold_program = session.program(cold.tracer, leaves, spec, training, drop_overwritten=False)
    structures = [c.structure for c in carried]
    sizes: dict[str, Any] = {}
    for _ in range(_MOST_WARM_TRACES):
        shapes = {name: recorded(value) for name, value in values.items()}
        shapes.update({a.name: a.after for a in discovered.values()})
        shapes.update(sizes)
        warm, more = session.trace(discovered, warm=True, shapes=shapes)
        new = [a for a in more if a.name not in discovered]
        following = dict(zip(warm.slot_values, results_of(warm.graph)[1], strict=True))
        # A state may take its final shape only after several steps.
        sizes = {n: recorded(v) for n, v in following.items() if _has_other_shape(recorded(v), shapes.get(n))}
        if not new and not sizes:
            break
        discovered.update({a.name: a for a in new})
    if sizes:
        name, value = next(iter(sizes.items()))
        refuse_growth(name, following[name], f"its shape is {list(shapes[name].shape)}, then {list(value.shape)}")
    if new:
        raise CaptureError(
            "SNNFX201",
            f"each step adds state to the model, `{new[0].name}` last",
            where=location_of_forward(new[0].module),
            why="a net must have the same states at every step.",
            hint="Register the states with snnfx.MemoryModule.register_memory.",
        )
    if [c.structure for c in carried] != structures:
        raise CaptureError(
            "SNNFX201",
            f"the structure of the carried state {', '.join(c.name for c in carried)} changes in the second step",
            where=location_of_forward(model, entry),
            why="a state must have the same structure at every step.",
            hint="Return the state with the same nesting and keys as the state argument.",
        )
    program = refusing_growth(session.program(warm, leaves, spec, training, set(discovered)))
    program.setting_reads = session.setting_reads(discovered.values())
    program.guards = session.guards(discovered.values())
    program.initial_attributes = session.initial_attributes(discovered.values())
    # After the cold trace, discovered attributes contain their next values.
    outputs, nexts, initials = cold_program.results
    by_name = dict(zip((s.name for s in cold_program.slots), zip(nexts, initials, strict=True), strict=True))
    for attribute in cold_discoveries:
        by_name.setdefault(attribute.name, (attribute.final_node(), None))
    for attribute in discovered.values():
        by_name.setdefault(attribute.name, (attribute.before if is_number(attribute.before) else None, None))
    cold_program.slots = _slots_with_placeholders(cold_program, program.slots)
    cold_program.set_output(
        outputs, [by_name[s.name][0] for s in program.slots], [by_name[s.name][1] for s in program.slots]
    )
    starts = {a.name: a.before for a in discovered.values()} | session.matched_slot_reset_values()
    erase_unused_placeholders(cold_program)
    passed_by_caller = {name for c in carried if c.required for name in c.argument().slot_names()}
    bindable = {
        s.name: starts.get(s.name) for s in program.slots if s.name not in session.leaf_slots() | passed_by_caller
    }
    match = GraphMatch(cold_program, program, bindable)
    if match.same_program() and not _reads_none_elsewhere(program, match, starts_as_none):
        match.move_initial_values()
    else:
        _rename_constants(cold_program, program.constants)
        program.first_step = cold_program
    return program


_MOST_WARM_TRACES = 4


def _has_other_shape(after: Any, before: Any) -> bool:
    return isinstance(after, Tensor) and isinstance(before, Tensor) and after.shape != before.shape


def _refuse_undeclared_state(model: nn.Module, failure: SubmoduleNotTraceable) -> None:
    """Refuse an untraceable module with unregistered state, which a net cannot carry across steps."""
    prefix = f"{failure.name}." if failure.name else ""
    undeclared = [a for a in failure.undeclared if a.name.startswith(prefix)]
    if not undeclared:
        return
    module = undeclared[0].module
    lines = [
        f'self.register_memory("{a.attribute}", {_describe_initial_value(a)})' for a in undeclared if a.module is module
    ]
    what = f"`{failure.name}`" if failure.name else "the model"
    cause = failure.__cause__
    advice = (
        f"{RECORDED_NUMBER} Or derive"
        if isinstance(cause, CaptureError) and cause.hint == RECORDED_NUMBER
        else "Derive"
    )
    raise CaptureError(
        "SNNFX213",
        f"{what} cannot be traced, and its state `{undeclared[0].name}` is not registered",
        where=(failure.error.where if failure.error else "") or location_of_forward(module),
        why=f"{failure.reason.rstrip('.')}. A net can step it untraced, but then carries only registered states.",
        hint=f"{advice} {type(module).__name__} from snnfx.MemoryModule, with {', '.join(dict.fromkeys(lines))} "
        "instead of the plain attribute; the other code need not change.",
    ) from failure.__cause__


def _describe_initial_value(attribute: AttributeSlot) -> str:
    is_plain = not attribute.path and (attribute.before is None or is_number(attribute.before))
    return repr(attribute.before) if is_plain else "initial"


def _slots_with_placeholders(program: StepProgram, slots: list[Slot]) -> list[Slot]:
    """The slots of another trace with the placeholders of `program`; adds unused placeholders where missing."""
    known = {SLOT.of(n): n.name for n in program.graph.nodes if n.op == "placeholder" and SLOT.is_known(n)}
    first = next(iter(program.graph.nodes))
    result: list[Slot] = []
    for slot in slots:
        if slot.name not in known:
            with program.graph.inserting_before(first):
                node = add_placeholder(program.graph, slot.name)
            SLOT.set(node, slot.name)
            known[slot.name] = node.name
        result.append(replace(slot, placeholder=known[slot.name]))
    return result


def _reads_none_elsewhere(program: StepProgram, match: GraphMatch, names: set[str]) -> bool:
    """Whether a node outside the cycle of a state reads the state although it starts as None.

    Such a node runs for the whole sequence at once, and a sequence cannot contain None.
    """
    for slot, node, following in zip(program.slots, program.slot_nodes(), program.next_states, strict=True):
        if slot.name in names and match.bound.get(slot.name) is None:
            ancestors: set[Node] = set()
            stack = [following] if isinstance(following, Node) else []
            while stack:
                current = stack.pop()
                if current not in ancestors:
                    ancestors.add(current)
                    stack.extend(current.all_input_nodes)
            if any(user not in ancestors for user in node.users):
                return True
    return False


def _check_model(model: nn.Module, entry: str) -> None:
    if not isinstance(model, nn.Module):
        raise InputError("SNNFX304", f"expected an nn.Module, got {type(model).__name__}")
    if not callable(getattr(model, entry, None)):
        raise InputError(
            "SNNFX309",
            f"{type(model).__name__} has no method {entry!r} for entry=",
            hint="Name the method that computes one time step.",
        )
    refuse_unsupported_modules(model, entry)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise CaptureError(
                "SNNFX207",
                f"`{name}` is not initialised",
                where=location_of_forward(model, entry),
                why="it belongs to a lazy module.",
                hint="Call the model once with the inputs of one step, then convert it.",
            )
