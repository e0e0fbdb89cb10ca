"""All traces of one capture, and the programs made from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from snnfx.capture.attribute_changes import AttributeChanges, refuse_change
from snnfx.capture.attribute_slots import AttributeSlot, is_number, known_value
from snnfx.capture.guarded_reads import ReachableCode, guards_of
from snnfx.capture.iteration_tracking import IterationLimit
from snnfx.capture.leaf_module_states import owners
from snnfx.capture.module_registries import registries_of_copies
from snnfx.capture.proxy import StepProxy
from snnfx.capture.recording_copy import RecordingCopy, classes_of_originals
from snnfx.capture.step_arguments import CarriedLeaf, carried_output
from snnfx.capture.step_changes import StepChanges, modules_with
from snnfx.capture.time_loops import TimeLoop, find_time_loop
from snnfx.capture.trace_faults import raise_internal_fault
from snnfx.capture.tracer import StepTracer, SubmoduleNotTraceable
from snnfx.capture.variable_changes import VariableChanges
from snnfx.errors import CaptureError
from snnfx.ir.conditions import Condition
from snnfx.ir.facts import INPUT, SLOT
from snnfx.ir.guards import Guard, Guards, ModuleRoot, text_of
from snnfx.ir.program import InitialAttribute, InputLeaf, Slot, StepProgram, results_of
from snnfx.ir.setting_read import SettingRead
from snnfx.sandbox.contents_snapshot import MISSING, Change
from snnfx.sandbox.snapshot import StateSnapshot
from snnfx.sandbox.torch_internals import FakeTensorMode, pytree
from snnfx.sandbox.user_code import location_of_forward
from snnfx.state.carry import SlotName, with_output_at
from snnfx.state.composite_adapter import composite_adapter, is_stateful_tree
from snnfx.state.leaf_modules import is_leaf
from snnfx.state.registry import adapter_of, current_storage_of, storage_of
from snnfx.state.stateful import Adapter

__all__ = ["CaptureSession", "erase_unused_placeholders"]


class CaptureSession:
    """Runs the traces of one capture and discovers the attributes that they change.

    Args:
        copy: the copy of the model that the traces run on.
        entry: name of the method that computes one step.
        arguments: `(args, kwargs)` of one step, with an `ArgumentLeaf` for each tensor.
        opaque: qualified names of submodules that must not be traced, each with the reason.
        fake_mode: the fake tensor mode of example values, or None without example inputs.
        carried: the carried arguments.
        changes: the tensors of the model that a step changes, as far as known.
        code: the Python code that the step can reach.
        iterations: for a whole call of a model that runs over time itself: record its loops, up to this limit.
    """

    def __init__(
        self,
        copy: RecordingCopy,
        entry: str,
        arguments: Any,
        opaque: dict[str, str],
        fake_mode: FakeTensorMode | None,
        carried: list[CarriedLeaf],
        changes: StepChanges,
        code: ReachableCode,
        iterations: IterationLimit | None = None,
    ) -> None:
        self.iterations = iterations
        self.copy, self.model = copy, copy.root
        self.entry, self.arguments, self.changes = entry, arguments, changes
        self.opaque, self.fake_mode, self.carried = opaque, fake_mode, carried
        self.code, self.variables = code, VariableChanges(code)
        self.user_reads: dict[tuple[nn.Module, str], None] = {}
        self.consumed_tensors: dict[int, Tensor] = {}
        self.conditions: dict[Condition, Any] = {}
        self.stateful = _outermost_stateful(self.model, opaque)
        self.reads: dict[tuple[nn.Module, str], tuple[Any, str]] = {}
        self.set_before_read: set[tuple[nn.Module, str]] = set()
        """Attributes that every step sets before it reads them."""
        self.time_loop: TimeLoop | None = None
        """A part of the cold trace that may be a loop over time."""
        self._written: set[str] = set()
        self.accessed_before_call: set[str] = set()
        """Leaf modules whose state the model accesses before it calls them; their slots are matched too."""

    def _is_matched(self, prefix: str, leaf: bool) -> bool:
        """Whether comparing the cold and the warm trace determines the initial values of a module's slots."""
        return not leaf or prefix.removesuffix(".") in self.accessed_before_call

    def matched_slots(self) -> set[str]:
        """The slots whose initial values the comparison of the cold and the warm trace determines."""
        return {
            prefix + n for prefix, m, a, leaf in self.stateful if self._is_matched(prefix, leaf) for n in a.names(m)
        }

    def matched_slot_reset_values(self) -> dict[str, Any]:
        """The reset values of `matched_slots`."""
        starts: dict[str, Any] = {}
        with StateSnapshot.of(self.model, rng=False):
            for prefix, module, adapter, leaf in self.stateful:
                if self._is_matched(prefix, leaf):
                    adapter.reset(module)
                    starts.update(zip([prefix + n for n in adapter.names(module)], adapter.read(module), strict=True))
        return starts

    def leaf_slots(self) -> set[str]:
        """The slots whose initial values come from the adapters of leaf modules, or from the tensors of the model."""
        slots = {prefix + n for prefix, m, a, leaf in self.stateful for n in a.names(m)}
        return (slots - self.matched_slots()) | self.changes.found.keys()

    def setting_reads(self, discovered: Iterable[AttributeSlot]) -> list[SettingRead]:
        """The plain values that the model's code reads in the traces, except state."""
        state = self._state(discovered)
        paths = {module: name for name, module in self.model.named_modules()}
        reads = {key: read for key, read in self.reads.items() if key not in state and key[0] in paths}
        return [SettingRead(paths[module], name, *read) for (module, name), read in reads.items()]

    def _state(self, discovered: Iterable[AttributeSlot]) -> set[tuple[nn.Module, str]]:
        """The module attributes that are slots, or that every step sets before it reads them."""
        state = {owner for _, m, adapter, _ in self.stateful for owner in owners(m, adapter)}
        return state | {(a.module, a.attribute) for a in discovered} | self.set_before_read

    def guards(self, discovered: Iterable[AttributeSlot]) -> Guards:
        """The guards of everything outside the graph that the traces depend on, in the user's model."""
        traced = [name for name, _ in self._traced_modules() if name or self.entry == "forward"]
        original_of = self.copy.original_of
        guards = guards_of(
            self.copy.model,
            self.entry,
            traced,
            self.opaque,
            [(original_of(module), name) for module, name in self.user_reads],
            {(original_of(m), name) for m, name in self._state(discovered) | current_storage_of(self.model)},
            self.consumed_tensors.values(),
            [original_of(container) for container in self.variables.growing.values()],
            {original_of(m): m.__dict__["training"] for m in self.model.modules() if "training" in m.__dict__},
            self.variables.set_before_read,
        )
        guards.reads += [
            Guard(ModuleRoot(""), (("condition", condition),), "value", value, text_of(value))
            for condition, value in self.conditions.items()
        ]
        if self.conditions:
            why = "the step branches on values of parameters or buffers"
            guards.sources = tuple(replace(sources, refusal=why) for sources in guards.sources)
        return guards

    def initial_attributes(self, discovered: Iterable[AttributeSlot]) -> list[InitialAttribute]:
        """The values of attributes with discovered slots before the first step."""
        paths = {module: name for name, module in self.model.named_modules()}
        starts = {(paths[a.module], a.attribute): a.start for a in discovered}
        tensors = [c.initial_attribute(paths[c.module]) for c in self.changes.found.values() if c.kind == "attribute"]
        return tensors + [
            InitialAttribute(*key, None, exists=False)
            if start is MISSING
            else InitialAttribute(*key, pytree.tree_map_only(Tensor, lambda v: v.detach().clone(), start))
            for key, start in starts.items()
        ]

    def trace(
        self, discovered: dict[str, AttributeSlot], warm: bool, shapes: dict[str, Any] | None = None
    ) -> tuple[StepTracer, list[AttributeSlot]]:
        """Run one trace.

        Args:
            discovered: discovered slots by name.
            warm: read slots from placeholders; a cold trace starts from the reset values.
            shapes: example values of slots.

        Returns:
            The tracer with its graph, and the changed attributes that are not in `discovered`.
        """
        while True:
            tracer = StepTracer(self.arguments, self.entry, self.opaque, self.fake_mode, self.iterations)
            tracer.reads, tracer.user_reads = self.reads, self.user_reads
            tracer.consumed.tensors = self.consumed_tensors
            tracer.conditions = self.conditions
            accessed_before_call = tracer.leaf_states.accessed_before_call
            try:
                changed = self._trace(tracer, discovered, warm, shapes or {})
            except Exception as error:
                if not warm and self.iterations is None:
                    _refuse_time_loop(tracer, error)
                if warm or accessed_before_call <= self.accessed_before_call:
                    raise
            else:
                if not warm and self.iterations is None:
                    self.time_loop = _refuse_time_loop(tracer)
                if warm or accessed_before_call <= self.accessed_before_call:
                    self._refuse_reads_of_growing_containers(discovered, shapes or {})
                    return tracer, changed
            self.accessed_before_call |= accessed_before_call  # repeat the trace with their reset values

    def _refuse_reads_of_growing_containers(self, discovered: dict[str, AttributeSlot], shapes: dict[str, Any]) -> None:
        """Trace once more if containers grow: a growing container that the step reads is state, and refused."""
        growing = [a for a in discovered.values() if a.grows]
        if not growing:
            return
        try:
            for attribute in growing:
                attribute.is_watched = True
            self._trace(StepTracer(self.arguments, self.entry, self.opaque, self.fake_mode), discovered, True, shapes)
        except Exception as error:  # torch may refuse the list subclass in any way, which means that it was read
            raise_internal_fault(error, f"`{growing[0].name}` is refused as state")
            raise growing[0].refusal() from error
        finally:
            for attribute in growing:
                attribute.is_watched = False

    def _trace(
        self, tracer: StepTracer, discovered: dict[str, AttributeSlot], warm: bool, shapes: dict[str, Any]
    ) -> list[AttributeSlot]:
        changed: list[AttributeSlot] = []
        starts: dict[str, tuple[Any, ...]] = {}

        def prepare(tracer: StepTracer) -> None:
            for prefix, module, adapter, leaf in self.stateful:
                slots = [prefix + name for name in adapter.names(module)]
                if leaf:
                    self._begin_leaf(tracer, prefix, module, adapter, warm, shapes)
                elif warm:
                    adapter.write(module, [tracer.add_slot(slot, *known_value(shapes.get(slot))) for slot in slots])
                else:
                    adapter.reset(module)
                    tracer.slot_values.update(zip(slots, adapter.read(module), strict=True))
                starts[prefix] = adapter.read(module)
            for attribute in discovered.values():
                number = is_number(attribute.before) and is_number(attribute.result)
                known = known_value(shapes.get(attribute.name))
                if number:
                    tracer.counts.starts[attribute.name] = attribute.result
                attribute.write(tracer.add_slot(attribute.name, *known, number=number))
            for c in self.carried:
                values = {**c.examples, **shapes}
                tracer.carried_arguments[c.name] = (
                    pytree.tree_map(
                        lambda leaf, values=values, numbers=c.numbers: (
                            tracer.add_slot(leaf.name, *known_value(values.get(leaf.name)), number=leaf.name in numbers)
                            if isinstance(leaf, SlotName)
                            else leaf
                        ),
                        c.structure,
                    )
                    if warm or c.required
                    else None
                )
            self.changes.start(tracer, shapes)

        def take_carried(outputs: Any) -> Any:
            for c in self.carried:
                c.take(carried_output(self.model, outputs, c), tracer.slot_values)
            for c in self.carried:
                outputs = with_output_at(outputs, c.path, None)
            return outputs

        tracer.take_carried = take_carried

        def finish(tracer: StepTracer) -> None:
            for prefix, module, adapter, leaf in self.stateful:
                if leaf:
                    tracer.leaf_states.read_attributes(prefix.removesuffix("."), module, adapter)
                else:
                    names = [prefix + name for name in adapter.names(module)]
                    for name, start, value in zip(names, starts.get(prefix, ()), adapter.read(module), strict=True):
                        self._refuse_unsupported_state(module, name, start, value)
                        tracer.slot_values[name] = value
            for attribute in discovered.values():
                value = attribute.read(tracer.proxy(tracer.slot_placeholders[attribute.name]))
                self._written.add(attribute.name)
                self._refuse_unsupported_state(attribute.module, attribute.name, attribute.before, value)
                tracer.slot_values[attribute.name] = value
            tracer.counts.check(tracer.slot_values)
            self.changes.finish(tracer)
            growing = {(a.module, a.attribute) for a in discovered.values() if a.path and not a.keeps_structure()}
            changed.extend(
                a
                for a in changes.attributes(traced, slots | self.changes.keys(), tracer.first_reads)
                if a.name not in discovered and (a.module, a.attribute) not in growing
            )
            self.set_before_read |= changes.set_before_read

        traced = {module for _, module in self._traced_modules()}
        slots = {owner for _, m, adapter, _ in self.stateful for owner in owners(m, adapter)}
        slots |= storage_of(self.model)
        blocked = ("",) if "" in self.opaque else self._untraced_prefixes()
        watched = self.changes.watched(tracer, blocked, slots)
        types = classes_of_originals(self.code.namespaces_with("type"))
        registries = registries_of_copies(self.copy)
        with StateSnapshot.of(self.model, rng=False, functions=True), self.variables, watched, types, registries:
            changes = AttributeChanges(self.model, self.entry)
            try:
                tracer.record(self.model, prepare, finish)
            except SubmoduleNotTraceable as failure:
                changed = list(changes.attributes(traced, slots | self.changes.keys(), tracer.first_reads))
                failure.undeclared = list({a.name: a for a in (*discovered.values(), *changed)}.values())
                raise
        return changed

    def _refuse_unsupported_state(self, module: nn.Module, slot: str, before: Any, after: Any) -> None:
        """Refuse a slot value other than a tensor, a number, or None before the first write."""
        is_state = isinstance(after, StepProxy | Tensor) or is_number(after)
        if not is_state and not (after is None and before is None and slot not in self._written):
            prefix, dot, attribute = slot.rpartition(".")
            if isinstance(after, tuple | list | dict):
                raise _refusal_of_container(prefix, module, attribute, after)
            refuse_change(prefix + dot, module, Change((attribute,), before, after, ""), self.entry)
        if is_state:
            self._written.add(slot)

    def _begin_leaf(
        self, tracer: StepTracer, prefix: str, module: nn.Module, adapter: Adapter, warm: bool, shapes: dict[str, Any]
    ) -> None:
        """Create the slots of a leaf module, and set its attributes to their values."""
        name = prefix.removesuffix(".")
        is_matched = self._is_matched(prefix, leaf=True)
        if is_matched:
            tracer.leaf_states.match_initial_values(name, module, adapter)
        if is_matched and not warm:
            tracer.leaf_states.start_from_reset_values(name, module, adapter)
            return
        for slot in adapter.names(module):
            tracer.add_slot(prefix + slot, *(known_value(shapes.get(prefix + slot)) if is_matched else ()))
        tracer.leaf_states.start_from_placeholders(name, module, adapter)

    def _traced_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules whose forward is traced: neither leaf modules nor inside one."""
        if "" in self.opaque:
            return
        opened = modules_with(self.model, self.changes.found.values())
        for name, module in self.model.named_modules():
            if not f"{name}.".startswith(self._untraced_prefixes()) and (not is_leaf(module) or module in opened):
                yield name, module

    def _untraced_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the names in opaque modules and stateful leaf modules."""
        leaves = (prefix for prefix, _, _, leaf in self.stateful if leaf)
        return (*(f"{name}." for name in self.opaque), *leaves)

    def program(
        self,
        tracer: StepTracer,
        leaves: list[InputLeaf],
        spec: pytree.TreeSpec,
        training: bool,
        discovered: set[str] | None = None,
        drop_overwritten: bool = True,
    ) -> StepProgram:
        """Build the program of a finished trace, without the slots of modules that are never called."""
        graph = tracer.graph
        outputs, nexts, initials = results_of(graph)
        # torch.fx renames a placeholder that would shadow a builtin (`input`), so it is found by its index.
        placeholders = {INPUT.of(n): n.name for n in graph.nodes if INPUT.is_known(n) and n.op == "placeholder"}
        leaves = [replace(leaf, placeholder=placeholders.get(index)) for index, leaf in enumerate(leaves)]
        used_slots: list[tuple[Slot, Any, Any]] = []
        carried = {name for c in self.carried for name in c.argument().slot_names()}
        for (name, _), following, initial in zip(tracer.slot_values.items(), nexts, initials, strict=True):
            placeholder = tracer.slot_placeholders.get(name)
            is_untouched = placeholder is not None and following is placeholder and len(placeholder.users) == 1
            if is_untouched and name not in carried:  # the net returns every part of a carried argument
                continue
            is_overwritten = name in tracer.overwritten_slots and placeholder is not None and not placeholder.users
            if drop_overwritten and is_overwritten:
                continue
            change = self.changes.found.get(name)
            persistent = change.persistent if change is not None else ""
            is_discovered = name in (discovered or ()) or (change is not None and not persistent)
            slot = Slot(name, placeholder.name if placeholder else "", is_discovered, persistent)
            used_slots.append((slot, following, initial))
        program = StepProgram(
            graph=graph,
            source=self.model,
            constants=tracer.constants,
            input_leaves=leaves,
            input_spec=spec,
            output_spec=tracer.output_spec,  # type: ignore[arg-type]
            slots=[slot for slot, _, _ in used_slots],
            training=training,
            opaque=dict(self.opaque),
            carried=[c.argument() for c in self.carried],
            overwritten=frozenset(tracer.overwritten_slots - {slot.name for slot, _, _ in used_slots}),
        )
        program.set_output(outputs, [n for _, n, _ in used_slots], [i for _, _, i in used_slots])
        erase_unused_placeholders(program)
        return program


def _refusal_of_container(name: str, module: nn.Module, memory: str, value: Any) -> SubmoduleNotTraceable:
    """The error for a registered state that holds several tensors: a net steps its module as a whole."""
    error = CaptureError(
        "SNNFX218",
        f"the state `{memory}` of {type(module).__name__} is a {type(value).__name__}",
        where=location_of_forward(module),
        why="a registered state of a traced module is one tensor or number.",
        hint=f'Register one for each element, such as self.register_memory("{memory}_0", None), or use a plain '
        f"attribute, self.{memory} = None.",
    )
    return SubmoduleNotTraceable(name, f"its state `{memory}` is a {type(value).__name__}", error)


def erase_unused_placeholders(program: StepProgram) -> None:
    """Remove placeholders that no slot uses."""
    used = {slot.placeholder for slot in program.slots}
    for node in list(program.graph.nodes):
        if node.op == "placeholder" and SLOT.is_known(node) and node.name not in used and not node.users:
            program.graph.erase_node(node)


def _outermost_stateful(model: nn.Module, opaque: dict[str, str]) -> list[tuple[str, nn.Module, Adapter, bool]]:
    """`(prefix, module, adapter, is_leaf)` of the stateful modules that are not inside a leaf module."""
    outermost: list[tuple[str, nn.Module, Adapter, bool]] = []
    covered: tuple[str, ...] = ()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if covered and prefix.startswith(covered):
            continue
        adapter = adapter_of(module)
        composite = composite_adapter(module) if name in opaque or is_stateful_tree(module, adapter) else None
        if composite is not None:
            covered = (*covered, prefix)
            if composite.names(module):
                outermost.append((prefix, module, composite, True))
        elif adapter is not None and adapter.names(module):
            leaf = adapter.is_leaf(module)
            if leaf:
                covered = (*covered, prefix)
            outermost.append((prefix, module, adapter, leaf))
    return outermost


def _refuse_time_loop(tracer: StepTracer, error: Exception | None = None) -> TimeLoop | None:
    """Refuse a forward that certainly loops over time; returns a loop that is uncertain.

    Args:
        tracer: the tracer, after its trace.
        error: the error with which the trace ended; a loop over time is its cause, or at least more important.
    """
    if getattr(tracer, "graph", None) is None:
        return None
    loop = find_time_loop(tracer.graph, tracer.constants, tracer.calls.sites)
    if loop is not None and loop.is_certain:
        raise loop.error() from error
    return loop
