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
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from snnfx.carry import CarriedArgument, OutputPath, SlotName, output_at, split_arguments, with_output_at
from snnfx.errors import CaptureError, InputError
from snnfx.leaves import is_leaf
from snnfx.matching import GraphMatch
from snnfx.program import InputLeaf, Slot, StepProgram, add_placeholder
from snnfx.proxy import StepProxy
from snnfx.state import Adapter, StateSnapshot, adapter_of, composite_adapter, copy_containers, is_stateful_tree
from snnfx.tracer import ArgumentLeaf, StepTracer, SubmoduleNotTraceable

__all__ = ["as_call", "capture", "capture_both_modes"]


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
    training = capture(model, example_inputs, entry, training=True, carry=carry)
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
    carried = _carried_arguments(model, entry, example_inputs, carry or {}, fake_mode)
    arguments, leaves, spec = _arguments(model, entry, example_inputs, fake_mode, tuple(c.name for c in carried))
    opaque: dict[str, str] = {}
    with StateSnapshot.of(model), _mode(model, training), torch.enable_grad():
        while True:
            try:
                program = _capture_once(model, entry, arguments, leaves, spec, opaque, fake_mode, training, carried)
                break
            except SubmoduleNotTraceable as failure:
                if failure.name in opaque or failure.name == "":
                    raise CaptureError("SNNFX201", "the model cannot be traced", why=failure.reason) from failure
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
    carried: list[_Carried],
) -> StepProgram:
    traced = _Traced(model, entry, arguments, opaque, fake_mode, carried)
    discovered: dict[str, _Attribute] = {}
    cold, found = traced.trace(discovered, warm=False)
    values = {name: node for name, node in zip(cold.slot_values, cold.graph.output_node().args[0][1], strict=True)}  # type: ignore[index]
    for attribute in found:
        discovered[attribute.name] = attribute
    starts_as_none = {name for c in carried if not c.required for name in c.argument().slot_names()}
    if not discovered and not traced.inlined_slots() and not starts_as_none:
        return traced.program(cold, leaves, spec, training)
    cold_program = traced.program(cold, leaves, spec, training, drop_overwritten=False)
    structures = [c.structure for c in carried]
    for _ in range(3):
        shapes = {name: _recorded(value) for name, value in values.items()}
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
            where=type(new[0].module).__name__,
            why="a net has the same states at every step.",
            hint="Register the states with snnfx.MemoryModule.register_memory.",
        )
    if [c.structure for c in carried] != structures:
        raise CaptureError(
            "SNNFX201",
            f"the carried state {', '.join(c.name for c in carried)} has another structure after the second step",
            where=type(model).__name__,
            why="a net has the same states at every step.",
            hint="Let one step return the state nested as it takes it.",
        )
    program = traced.program(warm, leaves, spec, training, set(discovered))
    # What the cold trace left in discovered attributes is their next value there.
    outputs, nexts, initials = cold_program.output.args[0]  # type: ignore[misc]
    by_name = dict(zip((s.name for s in cold_program.slots), zip(nexts, initials, strict=True), strict=True))
    for attribute in found:
        by_name.setdefault(attribute.name, (attribute.final_node(), None))
    for attribute in discovered.values():
        by_name.setdefault(attribute.name, (attribute.before if _is_number(attribute.before) else None, None))
    cold_program.slots = _slots_with_placeholders(cold_program, program.slots)
    cold_program.set_output(outputs, [by_name[s.name][0] for s in program.slots], [by_name[s.name][1] for s in program.slots])
    starts = {a.name: a.before for a in discovered.values()} | traced.inlined_starts()
    _erase_unused_placeholders(cold_program)
    given = {name for c in carried if c.required for name in c.argument().slot_names()}
    bindable = {s.name: starts.get(s.name) for s in program.slots if s.name not in traced.leaf_slots() | given}
    match = GraphMatch(cold_program, program, bindable)
    if match.same_program() and not _reads_none_elsewhere(program, match, starts_as_none):
        match.move_initial_values()
    else:
        _rename_constants(cold_program, program.constants)
        program.first_step = cold_program
    return program


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


@dataclass
class _Carried:
    """An argument that is carried, while it is captured.

    `structure` is found by the trace that starts from None; or it is that of an example, if `required`, whose values
    are in `examples` by slot.
    """

    name: str
    path: OutputPath
    required: bool = False
    structure: Any = None
    examples: dict[str, Any] = field(default_factory=dict)
    numbers: set[str] = field(default_factory=set)

    def argument(self) -> CarriedArgument:
        return CarriedArgument(self.name, self.path, self.structure, self.required)

    def take(self, value: Any, slot_values: dict[str, Any]) -> None:
        """Note down the next value of the argument: its structure, and the value of each slot."""
        flat, spec = pytree.tree_flatten_with_path(pytree.tree_map(_spread, value))
        structure: list[Any] = []
        for path, leaf in flat:
            if isinstance(leaf, StepProxy | Tensor) or (_is_number(leaf) and not isinstance(leaf, bool)):
                structure.append(SlotName(".".join([self.name, *map(_key_of, path)])))
                slot_values[structure[-1].name] = leaf
                if not isinstance(leaf, StepProxy | Tensor):
                    self.numbers.add(structure[-1].name)
            else:
                structure.append(leaf)
        after = pytree.tree_unflatten(structure, spec)
        if self.required and self.structure is not None and after != self.structure:
            raise InputError(
                "SNNFX308",
                f"the example of the state `{self.name}` is nested in another way than what one step returns",
                hint="Give it as one step returns it.",
            )
        self.structure = after


def _spread(value: Any) -> Any:
    """A recorded value that is known to be a tuple, as a tuple of recorded values."""
    known = _recorded(value)
    if isinstance(known, tuple | list):
        elements = [_spread(value[index]) for index in range(len(known))]
        return type(known)(*elements) if hasattr(known, "_fields") else type(known)(elements)
    return value


def _key_of(key: Any) -> str:
    """What one entry of a pytree path is called."""
    return str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", None))))


@dataclass
class _Attribute:
    """A plain attribute (or buffer) that a step changes."""

    name: str
    module: nn.Module
    attribute: str
    before: Any
    after: Any
    result: Any
    container: Any = None
    path: tuple[Any, ...] = ()

    def final_node(self) -> Any:
        return self.result.node if type(self.result) is StepProxy else self.result

    def write(self, value: Any) -> None:
        if self.path:
            leaves, spec = pytree.tree_flatten_with_path(self._current())
            if spec != pytree.tree_structure(self.container):
                leaves, spec = pytree.tree_flatten_with_path(self.container)
            value = pytree.tree_unflatten([value if path == self.path else leaf for path, leaf in leaves], spec)
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = value
        else:
            self.module.__dict__[self.attribute] = value

    def read(self, written: StepProxy) -> Any:
        """The value after the step that began with `written`."""
        if not self.path:
            return self._current()
        leaves = dict(pytree.tree_flatten_with_path(self._current())[0])
        if pytree.tree_structure(self._current()) == pytree.tree_structure(self.container):
            return leaves[self.path]
        if not written.node.users:
            return written  # a list that notes something down for somebody else grows; nothing reads it
        raise CaptureError(
            "SNNFX201",
            f"`{self.attribute}` of {type(self.module).__name__} has another structure after each step",
            why="it holds state, and a net has the same states at every step.",
            hint="Keep a fixed number of tensors in it, or register them with snnfx.MemoryModule.register_memory.",
        )

    def _current(self) -> Any:
        if self.attribute in self.module._buffers:
            return self.module._buffers[self.attribute]
        return self.module.__dict__.get(self.attribute)


class _Traced:
    """Runs the traces of one capture and finds out which attributes they change."""

    def __init__(
        self,
        model: nn.Module,
        entry: str,
        arguments: Any,
        opaque: dict[str, str],
        fake_mode: FakeTensorMode | None,
        carried: list[_Carried],
    ) -> None:
        self.model, self.entry, self.arguments = model, entry, arguments
        self.opaque, self.fake_mode, self.carried = opaque, fake_mode, carried
        self.stateful = _outermost_stateful(model, opaque)

    def inlined_slots(self) -> set[str]:
        return {f"{prefix}{n}" for prefix, m, a, leaf in self.stateful if not leaf for n in a.names(m)}

    def inlined_starts(self) -> dict[str, Any]:
        """The reset values of the slots that are traced through."""
        starts: dict[str, Any] = {}
        with StateSnapshot.of(self.model):
            for prefix, module, adapter, leaf in self.stateful:
                if not leaf:
                    adapter.reset(module)
                    starts.update(zip([prefix + n for n in adapter.names(module)], adapter.read(module), strict=True))
        return starts

    def leaf_slots(self) -> set[str]:
        return {f"{prefix}{n}" for prefix, m, a, leaf in self.stateful if leaf for n in a.names(m)}

    def trace(
        self, discovered: dict[str, _Attribute], warm: bool, shapes: dict[str, Any] | None = None
    ) -> tuple[StepTracer, list[_Attribute]]:
        """One trace; returns the tracer (with its graph) and the attributes that were changed beyond `discovered`."""
        tracer = StepTracer(self.arguments, self.entry, self.opaque, self.fake_mode)
        found: list[_Attribute] = []
        shapes = shapes or {}

        def prepare(tracer: StepTracer) -> None:
            for prefix, module, adapter, leaf in self.stateful:
                slots = [prefix + name for name in adapter.names(module)]
                if leaf:
                    for slot in slots:
                        tracer.add_slot(slot)
                elif warm:
                    adapter.write(module, [tracer.add_slot(slot, *_known(shapes.get(slot))) for slot in slots])
                else:
                    adapter.reset(module)
                    tracer.slot_values.update(zip(slots, adapter.read(module), strict=True))
            for attribute in discovered.values():
                number = _is_number(attribute.before) and _is_number(attribute.result)
                known = _known(shapes.get(attribute.name))
                attribute.write(tracer.add_slot(attribute.name, *known, number=number))
            for c in self.carried:
                values = {**c.examples, **shapes}
                tracer.carried_arguments[c.name] = (
                    pytree.tree_map(
                        lambda leaf, values=values, numbers=c.numbers: tracer.add_slot(
                            leaf.name, *_known(values.get(leaf.name)), number=leaf.name in numbers
                        )
                        if isinstance(leaf, SlotName)
                        else leaf,
                        c.structure,
                    )
                    if warm or c.required
                    else None
                )

        def take_carried(outputs: Any) -> Any:
            for c in self.carried:
                c.take(_output_at(self.model, outputs, c), tracer.slot_values)
            for c in self.carried:
                outputs = with_output_at(outputs, c.path, None)
            return outputs

        tracer.take_carried = take_carried

        def finish(tracer: StepTracer) -> None:
            for prefix, module, adapter, leaf in self.stateful:
                if not leaf:
                    names = [prefix + name for name in adapter.names(module)]
                    tracer.slot_values.update(zip(names, adapter.read(module), strict=True))
            for attribute in discovered.values():
                tracer.slot_values[attribute.name] = attribute.read(tracer.proxy(tracer.slot_placeholders[attribute.name]))
            nested = {(a.module, a.attribute) for a in discovered.values() if a.path}
            found.extend(
                a for a in self._changed(before) if a.name not in discovered and (a.module, a.attribute) not in nested
            )

        with StateSnapshot.of(self.model):
            before = {m: (copy_containers(m.__dict__), dict(m._buffers), _versions(m)) for m in self.model.modules()}
            try:
                tracer.record(self.model, prepare, finish)
            finally:
                self._refuse_changed_tensors(before)
        return tracer, found

    def _traced_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules whose forward is traced through: not leaves, and not inside one."""
        hidden = tuple(f"{name}." for name in self.opaque)
        inside = tuple(prefix for prefix, _, _, leaf in self.stateful if leaf)
        for name, module in self.model.named_modules():
            below_leaf = f"{name}.".startswith(hidden + inside) if hidden + inside else False
            if not below_leaf and not is_leaf(module):
                yield name, module

    def _changed(self, before: dict[nn.Module, Any]) -> Iterator[_Attribute]:
        skip = {"_memories", "training"}
        for name, module in self._traced_modules():
            attributes, buffers, _ = before[module]
            old = {**{k: v for k, v in attributes.items() if k not in ("_buffers", "_parameters", "_modules")}, **buffers}
            new = {**{k: v for k, v in module.__dict__.items() if k in old or not k.startswith("_")}, **module._buffers}
            for key, value in new.items():
                if key in skip or key in ("_buffers", "_parameters", "_modules"):
                    continue
                slot = f"{name}.{key}" if name else key
                if _is_state_change(old.get(key), value):
                    yield _Attribute(slot, module, key, old.get(key), _recorded(value), value)
                elif isinstance(value, tuple | list | dict) and any(type(x) is StepProxy for x in pytree.tree_leaves(value)):
                    yield from _changed_elements(slot, module, key, old.get(key), value)

    def _refuse_changed_tensors(self, before: dict[nn.Module, Any]) -> None:
        for name, module in self._traced_modules():
            for key, (tensor, version) in before[module][2].items():
                if tensor._version != version:
                    raise CaptureError(
                        "SNNFX206",
                        f"the tensor `{name + '.' if name else ''}{key}` is changed in place",
                        where=type(module).__name__,
                        why="a step may only change state by assigning it, so that it can be handed from step to step.",
                        hint="Write `self.x = self.x + ...`, or register it as a memory of a snnfx.MemoryModule.",
                    )

    def program(
        self,
        tracer: StepTracer,
        leaves: list[InputLeaf],
        spec: pytree.TreeSpec,
        training: bool,
        discovered: set[str] | None = None,
        drop_overwritten: bool = True,
    ) -> StepProgram:
        """The program of a finished trace; slots of modules that were never called are left out."""
        graph = tracer.graph
        outputs, nexts, initials = graph.output_node().args[0]  # type: ignore[misc]
        # torch.fx renames what would hide a builtin (`input`), so the placeholders are found by their place.
        placeholders = {n.meta["input"]: n.name for n in graph.nodes if "input" in n.meta and n.op == "placeholder"}
        leaves = [replace(leaf, placeholder=placeholders.get(index)) for index, leaf in enumerate(leaves)]
        kept: list[tuple[Slot, Any, Any]] = []
        for (name, _), following, initial in zip(tracer.slot_values.items(), nexts, initials, strict=True):
            placeholder = tracer.slot_placeholders.get(name)
            if placeholder is not None and following is placeholder and len(placeholder.users) == 1:
                continue
            is_overwritten = name in tracer.overwritten_slots and placeholder is not None and not placeholder.users
            if drop_overwritten and is_overwritten:
                continue
            slot = Slot(name, placeholder.name if placeholder else "", name in (discovered or ()))
            kept.append((slot, following, initial))
        program = StepProgram(
            graph=graph,
            source=self.model,
            constants=tracer.constants,
            input_leaves=leaves,
            input_spec=spec,
            output_spec=tracer.output_spec,  # type: ignore[arg-type]
            slots=[slot for slot, _, _ in kept],
            training=training,
            opaque=dict(self.opaque),
            carried=[c.argument() for c in self.carried],
            overwritten=frozenset(tracer.overwritten_slots - {slot.name for slot, _, _ in kept}),
        )
        program.set_output(outputs, [n for _, n, _ in kept], [i for _, _, i in kept])
        _erase_unused_placeholders(program)
        return program


def _erase_unused_placeholders(program: StepProgram) -> None:
    """Remove the placeholders of what is no slot."""
    used = {slot.placeholder for slot in program.slots}
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and "slot" in node.meta and node.name not in used and not node.users:
            program.graph.erase_node(node)


def _outermost_stateful(model: nn.Module, opaque: dict[str, str]) -> list[tuple[str, nn.Module, Adapter, bool]]:
    """`(prefix, module, adapter, is leaf)` of stateful modules, those inside a leaf covered by the leaf."""
    found: list[tuple[str, nn.Module, Adapter, bool]] = []
    covered: tuple[str, ...] = ()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if covered and prefix.startswith(covered):
            continue
        adapter = adapter_of(module)
        whole = composite_adapter(module) if name in opaque or is_stateful_tree(module, adapter) else None
        if whole is not None:
            covered = (*covered, prefix)
            if whole.names(module):
                found.append((prefix, module, whole, True))
        elif adapter is not None and adapter.names(module):
            leaf = adapter.is_leaf(module)
            if leaf:
                covered = (*covered, prefix)
            found.append((prefix, module, adapter, leaf))
    return found


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
                why="it belongs to a lazy module.",
                hint="Call the model once with a batch of one step, then convert it.",
            )


def _output_at(model: nn.Module, outputs: Any, carried: _Carried) -> Any:
    try:
        return output_at(outputs, carried.path)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "SNNFX309",
            f"carry: the outputs of a step of {type(model).__name__} have nothing at {carried.path}",
            why=f"`{carried.name}` should be carried from there.",
            hint="Give the index of the next state in what the step returns.",
        ) from error


def _carried_arguments(
    model: nn.Module,
    entry: str,
    example_inputs: Any,
    carry: Mapping[str, OutputPath],
    fake_mode: FakeTensorMode | None,
) -> list[_Carried]:
    """The arguments to be carried, with the structure of those for which there is an example and no default."""
    if not carry:
        return []
    parameters = {p.name: p for p in list(inspect.signature(getattr(type(model), entry)).parameters.values())[1:]}
    args, kwargs = as_call(example_inputs)
    _, _, examples = split_arguments(list(parameters.values()), list(carry), args, kwargs)
    found = []
    for name, path in carry.items():
        if name not in parameters:
            raise InputError(
                "SNNFX309",
                f"carry: {type(model).__name__}.{entry} has no argument `{name}`",
                hint=f"Its arguments are {', '.join(parameters)}.",
            )
        carried = _Carried(name, path)
        if examples.get(name) is not None and parameters[name].default is not None:
            carried.required = True
            carried.take(examples[name], carried.examples)
            carried.examples = {
                slot: fake_mode.from_tensor(value.detach(), static_shapes=True)
                for slot, value in carried.examples.items()
                if isinstance(value, Tensor) and fake_mode is not None
            }
        found.append(carried)
    return found


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`example_inputs` as `(args, kwargs)`."""
    if example_inputs is None:
        return (), {}
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    return ((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)), {}


def _arguments(
    model: nn.Module, entry: str, example_inputs: Any, fake_mode: FakeTensorMode | None, carried: tuple[str, ...] = ()
) -> tuple[Any, list[InputLeaf], pytree.TreeSpec]:
    """`((args, kwargs) with ArgumentLeaf in place of tensors, leaves, spec)`, without the carried arguments."""
    signature = inspect.signature(getattr(type(model), entry))
    parameters = list(signature.parameters.values())[1:]
    if example_inputs is None:
        names = []
        for p in parameters:
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in carried:
                continue
            if p.default is p.empty:
                behind = any(q.name in carried for q in parameters[: parameters.index(p)])
                names.append((p.name, behind or p.kind is p.KEYWORD_ONLY))
        if not names:
            raise CaptureError(
                "SNNFX211",
                f"{type(model).__name__}.{entry} has no required arguments",
                why=f"its signature is {entry}{signature}.",
                hint="Pass example_inputs=(x, ...) with what one step takes.",
            )
        given: tuple[tuple[Any, ...], dict[str, Any]] = (
            tuple(_Unknown(n) for n, keyword in names if not keyword),
            {n: _Unknown(n) for n, keyword in names if keyword},
        )
    else:
        given = split_arguments(parameters, carried, *as_call(example_inputs))[:2]
    try:
        bound = signature.bind(model, *given[0], **given[1], **dict.fromkeys(carried))
    except TypeError as error:
        raise InputError(
            "SNNFX307",
            f"example_inputs does not fit {type(model).__name__}.{entry}{signature}",
            why=f"{error}.",
            hint="It has to be what ONE call takes: a tensor, a tuple of arguments, or a dict of keyword arguments.",
        ) from error
    del bound
    flat, spec = pytree.tree_flatten_with_path(given)
    names_in_order = [p.name for p in parameters]
    leaves: list[InputLeaf] = []
    arguments: list[Any] = []
    for path, value in flat:
        name = _leaf_name(path, names_in_order)
        if isinstance(value, Tensor | _Unknown):
            fake = () if isinstance(value, _Unknown) else (fake_mode.from_tensor(value.detach(), static_shapes=True),)  # type: ignore[union-attr]
            arguments.append(ArgumentLeaf(name, len(leaves), *fake))
            leaves.append(InputLeaf(name, name.replace(".", "_")))
        else:
            arguments.append(value)
            leaves.append(InputLeaf(name, None, value))
    if not any(leaf.placeholder for leaf in leaves):
        raise InputError("SNNFX305", "example_inputs holds no tensor", hint="Pass what one call of the model takes.")
    return pytree.tree_unflatten(arguments, spec), leaves, spec


class _Unknown:
    """An argument of which only the name is known."""

    def __init__(self, name: str) -> None:
        self.name = name


def _leaf_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """`x`, or `x.0.key` for nested arguments."""
    keys = [getattr(k, "idx", getattr(k, "key", getattr(k, "name", None))) for k in path]
    if keys[0] == 0:
        position = int(keys[1])
        first = parameters[position] if position < len(parameters) else f"arg{position}"
        # *args all share one parameter name
        if parameters and position >= len(parameters) - 1 and position > 0 and first == parameters[-1] and len(parameters) <= position:
            first = f"{first}{position}"
    else:
        first = str(keys[1])
    return ".".join([first, *(str(k) for k in keys[2:])])


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set the training flag of everything that is traced through; leaves look at their own flag at the call."""
    if model.training == training:
        yield
        return
    before = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in before:
            if m is model or not is_leaf(m):
                m.training = training
        yield
    finally:
        for m, flag in before:
            m.training = flag


def _versions(module: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The buffers of a module and the tensors in its plain attributes, with the number of changes they have seen."""
    named = {**module.__dict__, **module._buffers}
    return {k: (v, v._version) for k, v in named.items() if type(v) is not StepProxy and isinstance(v, Tensor)}


def _is_state_change(old: Any, new: Any) -> bool:
    if type(new) is StepProxy:
        return True
    if _is_number(new) and (old is None or _is_number(old)):
        return bool(old != new)
    return False


def _changed_elements(slot: str, module: nn.Module, key: str, old: Any, new: Any) -> Iterator[_Attribute]:
    """State that is kept in a tuple, a list or a dict: one slot for each element that a step changes."""
    before = dict(pytree.tree_flatten_with_path(old)[0])
    new = pytree.tree_map(lambda leaf: leaf, new)  # a copy: the model's own list is put back after the trace
    for path, value in pytree.tree_flatten_with_path(new)[0]:
        if _is_state_change(before.get(path), value):
            name = slot + "".join(f".{getattr(k, 'idx', getattr(k, 'key', getattr(k, 'name', k)))}" for k in path)
            yield _Attribute(name, module, key, before.get(path), _recorded(value), value, new, path)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and type(value) is not StepProxy


def _recorded(value: Any) -> Any:
    """The fake value behind a proxy or node, or None."""
    if type(value) is StepProxy:
        return value.node.meta.get("val")
    if isinstance(value, Node):
        return value.meta.get("val")
    return None


def _known(value: Any) -> tuple[Any, ...]:
    return () if value is None else (value,)


def _as_meta_tensor(value: Any) -> Any:
    """A tensor with the shape, strides and dtype of a fake one, and no memory or mode behind it."""
    if isinstance(value, FakeTensor | Tensor):
        return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device="meta")
    return value
