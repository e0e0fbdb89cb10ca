"""The pass manager: run passes in order, enforce their declarations, verify the program, record the IR.

The manager compares the program and the model before and after a user's pass. A change that the pass has not declared
is put back, and the error names the pass. If the graph changed, the manager infers the shapes of changed nodes. If
regions existed, it runs the passes that planned them again. Rewrites that need more than their program
(`run_rewrite`) and emission (`run_emission`) are checked and recorded alike. With SNNFX_DEBUG=1 in the environment,
every pass prints its options and its diff of the IR to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx._progress import Progress
from snnfx.errors import PassError, SnnfxError
from snnfx.ir.attachments import located
from snnfx.ir.facts import VALUE
from snnfx.ir.graph_pass import Pass, check_passes, location_of_pass, stages_of
from snnfx.ir.guards import ModuleTree
from snnfx.ir.history import History, PassRecord
from snnfx.ir.model_snapshot import ModelSnapshot, has_other_values, has_values
from snnfx.ir.printing import format_graph
from snnfx.ir.program import STAGES, StepProgram
from snnfx.ir.program_snapshot import ProgramSnapshot
from snnfx.ir.value_inference import update_values
from snnfx.ir.verifier import verify_emitted, verify_failures, verify_program, verify_structure
from snnfx.sandbox import internal_faults
from snnfx.sandbox.random_draws import draws_undone
from snnfx.sandbox.tensor_snapshot import TensorSnapshot
from snnfx.sandbox.user_code import format_location, location_of_error

__all__ = ["PassManager", "PassRecord", "run_emission", "run_rewrite"]

R = TypeVar("R")


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order.

    Args:
        passes: the pipeline.
        verify: verify the program after each pass.
    """

    passes: Sequence[Pass]
    verify: bool = True

    def run(self, program: StepProgram, history: History | None = None, bar: Progress | None = None) -> History:
        """Apply all passes to `program` in place.

        Args:
            program: the program.
            history: the history to which records are appended; None: a new one.
            bar: a progress bar that advances with each pass.

        Returns:
            `history` (default: a new one) with one record appended for each pass.

        Raises:
            PassError: a pass requires another stage (SNNFX502), left the graph invalid (SNNFX501), changed a part that
                it does not declare (SNNFX701), is not well defined (SNNFX702), failed (SNNFX703), or returned no note
                (SNNFX704).
        """
        history = History() if history is None else history
        check_passes(self.passes)
        previous = history[-1].ir if history else str(program)
        state = ProgramSnapshot(program)
        annotating: list[Pass] = []
        for item in self.passes:
            if bar is not None:
                bar.start(item.name)
            again: list[Pass] = []
            run = _Run(item, program, state, self.verify)
            run.apply()
            if not item.is_built_in:
                again = run.invalidate(annotating)
            for replayed in (item, *again):
                if replayed is not item:
                    run = _Run(replayed, program, state, self.verify)
                    run.apply()
                if replayed.ensures is not None:
                    program.stage = replayed.ensures
                if self.verify:
                    run.verify()
                state = ProgramSnapshot(program)
                note = run.note if replayed is item else f"again, as `{item.name}` changed the graph: {run.note}"
                previous = _record(history, run, note, previous, state)
            if "graph" not in item.may_change:
                annotating.append(item)
            if bar is not None:
                bar.advance()
        return history


@dataclass(frozen=True)
class _Rewrite(Pass):
    """A pass whose `apply` calls a function, which has the program and more."""

    description: str
    change: Callable[[], str]

    name = "rewrite"
    requires = STAGES
    may_change = ("graph", "slots", "inputs", "outputs", "regions")

    def apply(self, program: StepProgram) -> str:
        return self.change()

    def __str__(self) -> str:
        return self.description


def run_rewrite(description: str, program: StepProgram, change: Callable[[], str], history: History) -> None:
    """Run a rewrite that needs more than its program, e.g. a second capture; check and record it like a pass.

    Args:
        description: the name, with options as in "reroll_loops{loops=2}".
        program: the program that it changes.
        change: changes the program; returns the note.
        history: gets the record.
    """
    PassManager([_Rewrite(description, change)]).run(program, history)


def run_emission(
    description: str,
    program: StepProgram,
    root: nn.Module,
    emit: Callable[[], tuple[R, fx.Graph, str]],
    history: History,
    training: bool | None = None,
) -> R:
    """Emit a graph from a program; check and record it like a pass.

    Args:
        description: the name with its options.
        program: the program, which emission must not change.
        root: the module that the targets of the graph refer to.
        emit: returns `(result, emitted graph, note)`.
        history: gets the record.
        training: the mode of the graph; None for both.

    Raises:
        PassError: SNNFX501, the emitted graph is invalid; SNNFX701, emission changed the program or the model.
    """
    name = description.partition("{")[0]
    before = (ModelSnapshot(program.source), ProgramSnapshot(program)) if internal_faults.STRICT else None
    start = time.perf_counter()
    result, graph, note = emit()
    milliseconds = (time.perf_counter() - start) * 1e3
    if before is not None:
        changed = [clause for _, clause in before[0].changes()]
        changed += [f"the {part} of the program" for part in before[1].changed_parts(program)]
        if changed:
            raise PassError("SNNFX701", f"`{name}` changed {', '.join(changed[:4])}", why="it may only read them.")
    verify_emitted(graph, root, after=name)
    last = next((r.ir for r in reversed([*history.passes()]) if r.training in (None, training)), "")
    record = PassRecord(description, milliseconds, note, format_graph(graph), last, "emitted", training)
    history.append(record)
    print_record(record)
    return result


def _record(history: History, run: _Run, note: str, before: str, state: ProgramSnapshot) -> str:
    """Append the record of a pass; return the printed program."""
    program = run.program
    ir = str(program)
    record = PassRecord(str(run.item), run.milliseconds, note, ir, before, program.stage, program.training, state)
    history.append(record)
    print_record(record)
    return ir


def print_record(record: PassRecord) -> None:
    """Print a record to stderr if SNNFX_DEBUG=1."""
    if os.environ.get("SNNFX_DEBUG") == "1":
        print(record.report(colour=sys.stderr.isatty()), file=sys.stderr)


class _Run:
    """One run of a pass on a program, with the checks of its declarations.

    Args:
        item: the pass.
        program: the program.
        before: the snapshot of the program before the pass.
        verify: verify the structure of the graph after a user's pass.
    """

    def __init__(self, item: Pass, program: StepProgram, before: ProgramSnapshot, verify: bool = True) -> None:
        self.item, self.program, self.before, self.verifies = item, program, before, verify
        self.guarded = not item.is_built_in or internal_faults.STRICT
        self.changed: Collection[Node] = ()
        self.model: ModelSnapshot | None = None
        self.note, self.milliseconds = "", 0.0

    def apply(self) -> None:
        """Apply the pass to the program and, for a user's pass, to a first step that differs."""
        item, program = self.item, self.program
        stages = stages_of(item)
        if program.stage not in stages:
            later = STAGES.index(program.stage) < STAGES.index(stages[0])
            raise PassError(
                "SNNFX502",
                f"the pass `{item.name}` requires stage {' or '.join(map(repr, stages))}, the program is at "
                f"{program.stage!r}",
                where="" if item.is_built_in else location_of_pass(item),
                hint=f"Run the passes that reach stage {stages[0]!r} first." if later else "Run the pass earlier.",
            )
        model = self.model = ModelSnapshot(program.source) if self.guarded else None
        constants = [] if item.is_built_in else _constants(program)
        start = time.perf_counter()
        try:
            # The random numbers that a user's pass draws are given back; those of other threads are not.
            with contextlib.nullcontext() if item.is_built_in else draws_undone():
                note = self._apply_to(program)
            self.milliseconds = (time.perf_counter() - start) * 1e3
            if model is not None:
                self._enforce(note, model, constants)
            if not item.is_built_in:
                self._find_targets()
                if self.verifies:
                    self._verify_structure()
        except BaseException:
            for _, snapshot in constants:
                snapshot.restore()
            self._restore()
            raise
        self.note = note
        if "modules" in item.may_change and not item.is_built_in and program.guards.tree is not None:
            program.guards.tree = ModuleTree(program.source, program.guards.tree.traced)

    def _restore(self) -> None:
        """Put the program and the model back after a user's pass failed."""
        if not self.item.is_built_in:
            if self.model is not None:
                self.model.restore()
            self.before.restore(self.program)

    def _find_targets(self) -> None:
        """Find the modules that the pass has attached."""
        first = self.program.first_step
        for program in (self.program, *([] if first is None else [first])):
            for node in program.graph.nodes:
                if node.op in ("call_module", "get_attr") and node.target not in program.constants:
                    node.target = located(program.source, str(node.target))

    def _verify_structure(self) -> None:
        """Verify the nodes of a user's pass before their values are inferred."""
        item, where = self.item, location_of_pass(self.item)
        first, before = self.program.first_step, self.before.first_step
        verify_structure(self.program, item.name, where, self.before.changed_nodes(self.program))
        if first is not None and before is not None:
            verify_structure(first, item.name, where, before.changed_nodes(first))

    def _apply_to(self, program: StepProgram) -> str:
        if self.item.is_built_in:
            return self.item.apply(program)
        try:
            note = self.item.apply(program)
            first = program.first_step
            if first is not None:
                first.stage = min(program.stage, "normalized", key=STAGES.index)
                self.item.apply(first)
        except SnnfxError:
            raise
        except Exception as error:
            raise PassError(
                "SNNFX703",
                f"the pass `{self.item.name}` failed",
                where=format_location(location_of_error(error)) or location_of_pass(self.item),
                why=f"{type(error).__name__}: {error}",
                hint="Correct the pass at this line; the program and the model were put back.",
            ) from error
        return note

    def _enforce(self, note: object, model: ModelSnapshot, constants: list[tuple[str, TensorSnapshot]]) -> None:
        """Refuse changes that the pass has not declared."""
        item, where = self.item, location_of_pass(self.item)
        if not isinstance(note, str):
            raise PassError(
                "SNNFX704",
                f"the pass `{item.name}` returned no note",
                where=where,
                why=f"`apply` returned {note!r}.",
                hint='Return a short text, e.g. return "replaced 3 nodes".',
            )
        if item.is_built_in:
            undeclared = list(model.changes())
        else:
            undeclared = [(kind, clause) for kind, clause in model.changes() if kind not in item.may_change]
            parts = [*self.before.changed_parts(self.program)]
            if self.before.first_step is not None and self.program.first_step is not None:
                parts += [*self.before.first_step.changed_parts(self.program.first_step)]
            parts = [*dict.fromkeys(parts)]
            undeclared += [(part, f"the {part} of the program") for part in parts if part not in item.may_change]
            self._enforce_fields(constants)
        if undeclared:
            kinds = dict.fromkeys(kind for kind, _ in undeclared)
            declared = (*item.may_change, *kinds)
            raise PassError(
                "SNNFX701",
                f"the pass `{item.name}` changed {', '.join(clause for _, clause in undeclared[:4])}",
                where=where,
                why=f"it declares may_change = {item.may_change}; the change was put back.",
                hint=f"Leave {', '.join(kinds)} unchanged, or declare may_change = {declared}.",
            )

    def _enforce_fields(self, constants: list[tuple[str, TensorSnapshot]]) -> None:
        """Refuse changes of the parts of the program that no pass may change."""
        program, item = self.program, self.item
        fields = [f"`program.{name}`" for name in self.before.changed_fields(program)]
        fields += [f"`program.constants[{name!r}]`" for name, snapshot in constants if has_other_values(snapshot)]
        if fields:
            raise PassError(
                "SNNFX701",
                f"the pass `{item.name}` changed {', '.join(fields[:4])}",
                where=location_of_pass(item),
                why="passes do not change it; the change was put back.",
                hint=f"Leave {fields[0]} unchanged; a pass changes the graph and the parts in `may_change`.",
            )

    def invalidate(self, annotating: Sequence[Pass]) -> list[Pass]:
        """Infer the values of changed nodes and drop the regions that a change of the graph invalidates.

        Returns:
            The passes to run again, of those that ran before.
        """
        program, before = self.program, self.before
        changed = self._update_values(program, before)
        if program.first_step is not None and before.first_step is not None:
            self._update_values(program.first_step, before.first_step)
        self.changed = changed
        if program.stage not in ("partitioned", "planned") or not before.graph_changed(program):
            return []
        program.unplanned()
        return list(annotating)

    def _update_values(self, program: StepProgram, before: ProgramSnapshot) -> list[Node]:
        """Infer the values of changed nodes; return the nodes whose values the verifier checks."""
        values = {row.node: row.meta.get(VALUE.key) for row in before.rows}
        changed = before.changed_nodes(program)
        given = [n for n in program.graph.nodes if VALUE.is_known(n) and VALUE.of(n) is not values.get(n)]
        failures = update_values(program, changed, given)
        try:
            verify_failures(program, failures, self.item.name, location_of_pass(self.item))
        except PassError:
            self._restore()
            raise
        return list(dict.fromkeys((*changed, *given)))

    def verify(self) -> None:
        """Verify the program; after a failure of a user's pass, put it back."""
        where = "" if self.item.is_built_in else location_of_pass(self.item)
        name = str(self.item).partition("{")[0]
        try:
            verify_program(self.program, after=name, changed=self.changed, where=where)
            if self.program.first_step is not None and not self.item.is_built_in:
                verify_program(self.program.first_step, after=name, where=where)
        except PassError:
            self._restore()
            raise


def _constants(program: StepProgram) -> list[tuple[str, TensorSnapshot]]:
    """Snapshots of the constant tensors of a program by value."""
    tensors = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return [(name, TensorSnapshot(tensor)) for name, tensor in tensors.items() if has_values(tensor)]
