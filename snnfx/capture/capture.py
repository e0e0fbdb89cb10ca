"""nn.Module -> step graph: one time step of a model with its state as values.

The model is traced from its reset state. A module that declares its state (`MemoryModule`, adapters) is either one
call with explicit state (neurons) or traced through with its attributes as slots; any other attribute that a step
changes is discovered as a slot. Modules that are traced through are traced twice, cold (slots at their initial
values) and warm (slots as values), because people write `if self.v is None: self.v = torch.full_like(x, 0.3)`:
where the two traces differ only in what stands for a slot, that expression is the slot's initial value; any other
difference makes the cold trace the program of the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.parameter import is_lazy

from snnfx.capture.attribute_slots import AttributeSlot, is_number, recorded
from snnfx.capture.capture_session import CaptureSession, erase_unused_placeholders
from snnfx.capture.graph_matching import GraphMatch
from snnfx.capture.patches import watched_training_flag
from snnfx.capture.step_arguments import CarriedLeaf, carried_arguments, step_arguments
from snnfx.capture.tracer import SubmoduleNotTraceable
from snnfx.errors import CaptureError, InputError
from snnfx.ir.program import InputLeaf, Slot, StepProgram, add_placeholder, results_of
from snnfx.sandbox.isolation import autocast_cache_disabled
from snnfx.sandbox.snapshot import StateSnapshot
from snnfx.sandbox.torch_internals import FakeTensor, FakeTensorMode, pytree
from snnfx.sandbox.user_code import location_of_forward
from snnfx.state.carry import OutputPath

__all__ = ["capture", "capture_both_modes"]


def capture_both_modes(
    model: nn.Module,
    example_inputs: Any = None,
    entry: str = "forward",
    carry: Mapping[str, OutputPath] | None = None,
) -> tuple[StepProgram, StepProgram]:
    """Capture a model in training and in evaluation mode.

    Returns:
        `(training program, evaluation program)`; the same object twice when the mode makes no difference.
    """
    _check_model(model, entry)
    with watched_training_flag(model) as flag:
        training = capture(model, example_inputs, entry, training=True, carry=carry)
    if not flag.was_read:
        return training, training
    evaluation = capture(model, example_inputs, entry, training=False, carry=carry)
    match = GraphMatch(training, evaluation)
    if match.same_program():
        return training, training
    _rename_constants(evaluation, training.constants | (training.first_step.constants if training.first_step else {}))
    return training, evaluation


def _rename_constants(program: StepProgram, taken: dict[str, Any]) -> None:
    """Give the constants of a program names that no other object has among `taken`: a net keeps them together."""
    renamed: dict[str, str] = {}
    everything = dict(taken)
    for name, value in program.constants.items():
        new = name
        while new in everything and everything[new] is not value:
            new = f"{new}_"
        renamed[name] = new
        everything[new] = value
    program.constants = {renamed[name]: value for name, value in program.constants.items()}
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = renamed.get(str(node.target), node.target)
    if program.first_step is not None:
        _rename_constants(program.first_step, everything)


def capture(
    model: nn.Module,
    example_inputs: Any = None,
    entry: str = "forward",
    training: bool | None = None,
    carry: Mapping[str, OutputPath] | None = None,
) -> StepProgram:
    """Capture one step of `model`; the model is left exactly as it was.

    Args:
        model: a single-step model.
        example_inputs: what ONE call takes, batch dimension included: a tensor, a tuple of positional arguments, or a
            dict of keyword arguments. Without it the arguments are the method's required parameters, all tensors.
        entry: the method that is one step.
        training: the mode to capture; default: the mode the model is in.
        carry: arguments that are outputs of the step before, and where in the outputs they are.

    Returns:
        The step program, stage "captured".

    Raises:
        CaptureError: the model cannot be captured (codes 2xx), before anything has been changed.
        InputError: `example_inputs` does not fit the method's signature.
    """
    _check_model(model, entry)
    training = model.training if training is None else training
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True) if example_inputs is not None else None
    carried = carried_arguments(model, entry, example_inputs, carry or {}, fake_mode)
    arguments, leaves, spec = step_arguments(model, entry, example_inputs, fake_mode, tuple(c.name for c in carried))
    opaque: dict[str, str] = {}
    with StateSnapshot.of(model), _mode(model, training), torch.enable_grad(), autocast_cache_disabled():
        while True:
            try:
                program = _capture_once(model, entry, arguments, leaves, spec, opaque, fake_mode, training, carried)
                break
            except SubmoduleNotTraceable as failure:
                if failure.name in opaque:
                    where = location_of_forward(model, entry)
                    raise CaptureError(
                        "SNNFX201", "the model cannot be traced", where=where, why=failure.reason
                    ) from failure
                _refuse_undeclared_state(model, failure)
                if failure.name == "" and (entry != "forward" or carried):
                    assert failure.error is not None
                    raise failure.error from failure.__cause__
                opaque[failure.name] = failure.reason
    for captured in filter(None, (program, program.first_step)):
        for node in captured.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(_as_meta_tensor, node.meta["val"])
    return program


def _capture_once(
    model: nn.Module,
    entry: str,
    arguments: Any,
    leaves: list[InputLeaf],
    spec: pytree.TreeSpec,
    opaque: dict[str, str],
    fake_mode: FakeTensorMode | None,
    training: bool,
    carried: list[CarriedLeaf],
) -> StepProgram:
    traced = CaptureSession(model, entry, arguments, opaque, fake_mode, carried)
    discovered: dict[str, AttributeSlot] = {}
    cold, found = traced.trace(discovered, warm=False)
    values = dict(zip(cold.slot_values, results_of(cold.graph)[1], strict=True))
    for attribute in found:
        discovered[attribute.name] = attribute
    starts_as_none = {name for c in carried if not c.required for name in c.argument().slot_names()}
    if not discovered and not traced.traced_module_slots() and not starts_as_none:
        return replace(traced.program(cold, leaves, spec, training), setting_reads=traced.setting_reads(()))
    cold_program = traced.program(cold, leaves, spec, training, drop_overwritten=False)
    structures = [c.structure for c in carried]
    for _ in range(3):
        shapes = {name: recorded(value) for name, value in values.items()}
        shapes.update({a.name: a.after for a in discovered.values()})
        warm, more = traced.trace(discovered, warm=True, shapes=shapes)
        new = [a for a in more if a.name not in discovered]
        if not new:
            break
        discovered.update({a.name: a for a in new})
    else:
        raise CaptureError(
            "SNNFX201",
            f"the state of the model does not settle: each step adds to it, `{new[0].name}` last",
            where=location_of_forward(new[0].module),
            why="a net has the same states at every step.",
            hint="Register the states with snnfx.MemoryModule.register_memory.",
        )
    if [c.structure for c in carried] != structures:
        raise CaptureError(
            "SNNFX201",
            f"the carried state {', '.join(c.name for c in carried)} has another structure after the second step",
            where=location_of_forward(model, entry),
            why="a net has the same states at every step.",
            hint="Let one step return the state nested as it takes it.",
        )
    program = traced.program(warm, leaves, spec, training, set(discovered))
    program.setting_reads = traced.setting_reads(discovered.values())
    program.initial_attributes = traced.initial_attributes(discovered.values())
    # What the cold trace left in discovered attributes is their next value there.
    outputs, nexts, initials = cold_program.results
    by_name = dict(zip((s.name for s in cold_program.slots), zip(nexts, initials, strict=True), strict=True))
    for attribute in found:
        by_name.setdefault(attribute.name, (attribute.final_node(), None))
    for attribute in discovered.values():
        by_name.setdefault(attribute.name, (attribute.before if is_number(attribute.before) else None, None))
    cold_program.slots = _slots_with_placeholders(cold_program, program.slots)
    cold_program.set_output(
        outputs, [by_name[s.name][0] for s in program.slots], [by_name[s.name][1] for s in program.slots]
    )
    starts = {a.name: a.before for a in discovered.values()} | traced.traced_module_initial_values()
    erase_unused_placeholders(cold_program)
    given = {name for c in carried if c.required for name in c.argument().slot_names()}
    bindable = {s.name: starts.get(s.name) for s in program.slots if s.name not in traced.leaf_slots() | given}
    match = GraphMatch(cold_program, program, bindable)
    if match.same_program() and not _reads_none_elsewhere(program, match, starts_as_none):
        match.move_initial_values()
    else:
        _rename_constants(cold_program, program.constants)
        program.first_step = cold_program
    return program


def _refuse_undeclared_state(model: nn.Module, failure: SubmoduleNotTraceable) -> None:
    """Refuse a module that cannot be traced, and that keeps state where a step of it as it is does not hand it on."""
    prefix = f"{failure.name}." if failure.name else ""
    inside = [a for a in failure.undeclared if a.name.startswith(prefix)]
    if not inside:
        return
    module = inside[0].module
    lines = [f'self.register_memory("{a.attribute}", {_start_in_words(a)})' for a in inside if a.module is module]
    what = f"`{failure.name}`" if failure.name else "the model"
    raise CaptureError(
        "SNNFX213",
        f"{what} cannot be traced, and its state `{inside[0].name}` is not registered",
        where=(failure.error.where if failure.error else "") or location_of_forward(module),
        why=f"{failure.reason.rstrip('.')}. It could be stepped as it is, but that hands on registered states only.",
        hint=f"Derive {type(module).__name__} from snnfx.MemoryModule, with {', '.join(dict.fromkeys(lines))} instead "
        "of the plain attribute; the rest may stay as it is.",
    ) from failure.__cause__


def _start_in_words(attribute: AttributeSlot) -> str:
    is_plain = not attribute.path and (attribute.before is None or is_number(attribute.before))
    return repr(attribute.before) if is_plain else "initial"


def _slots_with_placeholders(program: StepProgram, slots: list[Slot]) -> list[Slot]:
    """The slots of another trace for this one; those that it does not read get a placeholder that nobody uses."""
    known = {n.meta["slot"]: n.name for n in program.graph.nodes if n.op == "placeholder" and "slot" in n.meta}
    first = next(iter(program.graph.nodes))
    found: list[Slot] = []
    for slot in slots:
        if slot.name not in known:
            with program.graph.inserting_before(first):
                node = add_placeholder(program.graph, slot.name)
            node.meta["slot"] = slot.name
            known[slot.name] = node.name
        found.append(replace(slot, placeholder=known[slot.name]))
    return found


def _reads_none_elsewhere(program: StepProgram, match: GraphMatch, names: set[str]) -> bool:
    """Whether a state that is None at first is read by something that its own next value does not depend on.

    That is run for the whole sequence at once, and None is no part of a sequence.
    """
    for slot, node, following in zip(program.slots, program.slot_nodes(), program.next_states, strict=True):
        if slot.name in names and match.bound.get(slot.name) is None:
            before: set[Node] = set()
            stack = [following] if isinstance(following, Node) else []
            while stack:
                current = stack.pop()
                if current not in before:
                    before.add(current)
                    stack.extend(current.all_input_nodes)
            if any(user not in before for user in node.users):
                return True
    return False


def _check_model(model: nn.Module, entry: str) -> None:
    if not isinstance(model, nn.Module):
        raise InputError("SNNFX304", f"expected an nn.Module, got {type(model).__name__}")
    if not callable(getattr(model, entry, None)):
        raise InputError(
            "SNNFX309",
            f"entry={entry!r} is no method of {type(model).__name__}",
            hint="Name the method that computes one time step.",
        )
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(parameter):
            raise CaptureError(
                "SNNFX207",
                f"`{name}` has no values yet",
                where=location_of_forward(model, entry),
                why="it belongs to a lazy module.",
                hint="Call the model once with a batch of one step, then convert it.",
            )


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the training flag of all modules: what is traced through may look at it; layers do so at the call as well."""
    # Not by the attribute: that somebody looks at it is noticed.
    before = [(m, m.__dict__["training"]) for m in model.modules() if "training" in m.__dict__]
    if model.__dict__.get("training") == training:
        yield
        return
    try:
        for m, _ in before:
            m.training = training
        yield
    finally:
        for m, flag in before:
            m.training = flag


def _as_meta_tensor(value: Any) -> Any:
    """A tensor with the shape, strides and dtype of a fake one, and no memory or mode behind it."""
    if isinstance(value, FakeTensor | Tensor):
        return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
    return value
