"""Generate C++ kernels: time loop inside, states cached, vector code over elements.

A source is one function for any T, N, shape, stride and number of threads: the forward pass, which may save values for
backward, or the backward pass, which runs through time in reverse. It takes a struct `Args` and includes no header of
PyTorch, so it compiles in a fraction of a second.

The elements of a step are split into blocks; a kernel runs all time steps of a block before the next block. Operands
that are not consecutive in memory (broadcast, strided) or in half precision are first copied to an array of the block;
operands that do not change with time are copied once for all steps. The inner loop thus computes no indices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snnfx.lowering.elementwise.back_end import WantedGradients
from snnfx.lowering.elementwise.cpp.cpp_time_loop import CarriedArray, TimeStep, elements, steps_at_once, time_loops
from snnfx.lowering.elementwise.cpp.cpp_writer import C_TYPES, MEMORY_TYPES, CppWriter, KernelSource, indented
from snnfx.lowering.elementwise.expressions import Expression, StepExpressions, topological
from snnfx.lowering.elementwise.saved_values import SavePlan

__all__ = ["KernelSource", "write_backward", "write_forward"]


def write_forward(step: StepExpressions, plan: SavePlan | None = None, in_bits: bool = False) -> KernelSource:
    """Write the kernel of the forward pass.

    Args:
        step: the step.
        plan: the values that are saved for backward.
        in_bits: whether the outputs, which are 0 or 1, are written as one bit each.
    """
    saved = plan.saved if plan is not None else ()
    roots = [*step.outputs, *step.next_states, *saved]
    used = topological(roots)
    writer = CppWriter(step, roots)
    invariant, once = _invariant_leaves(writer, used)
    once += writer.hoist(roots, invariant)
    sequences = [(leaf, writer.slot("sequence", leaf.index, m)) for leaf, m in _sequences_of(step, used)]
    leaves = {e.index: e for e in used if e.op == "state"}
    states: list[CarriedArray] = []
    last: list[str] = []
    for index, (following, memory) in enumerate(zip(step.next_states, step.state_dtypes, strict=True)):
        ctype, name, leaf = C_TYPES[following.dtype], f"v{index}", leaves.get(index)
        writer.buffer(name, ctype)
        if leaf is not None:
            initial = writer.slot("initial", index, memory)
            once.append(f"gather<{MEMORY_TYPES[memory]}, {ctype}>({name}, {initial}, a, 0, start, n);")
        states.append(CarriedArray(name, ctype, leaf, following))
        last.append(
            f"store<{MEMORY_TYPES[memory]}, {ctype}>({writer.slot('final', index, memory)}, 0, start, n, {name});"
        )
    memories = ["bits"] * len(step.outputs) if in_bits else step.output_dtypes
    made = [("output", i, m, e) for i, (m, e) in enumerate(zip(memories, step.outputs, strict=True))]
    made += [("saved", i, e.dtype, e) for i, e in enumerate(saved)]
    targets = [(f"{kind}{i}", writer.slot(kind, i, memory), memory, e) for kind, i, memory, e in made]

    def at(t: str, suffix: str) -> TimeStep:
        step_code = TimeStep(texts=dict(invariant))
        for leaf, operand in sequences:
            memory = step.sequences[leaf.index]
            step_code.read(writer, leaf, *writer.load(leaf, operand, memory, t, f"sequence{leaf.index}{suffix}"))
        for name, operand, memory, expression in targets:
            step_code.write(writer, expression, operand, memory, t, name + suffix)
        return step_code

    steps = steps_at_once(roots, len(sequences) + len(targets), states)
    return writer.source([*once, *time_loops(writer, roots, states, at, steps), *last])


def write_backward(step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> KernelSource:
    """Write the kernel of the backward pass over a sequence, in reverse.

    Args:
        step: forward and backward pass of one step.
        plan: the values saved by the forward pass.
        wanted: the gradients to compute.
    """
    roots = wanted.expressions(step)
    forward = [step.next_states[k] for k in plan.earlier]
    writer = CppWriter(step, [*roots, *forward])
    available = set(plan.saved)
    used = topological([*roots, *forward], available)
    invariant, once = _invariant_leaves(writer, used)
    once += writer.hoist([*roots, *forward], invariant, available)
    sequences = [(leaf, writer.slot(leaf.op, leaf.index, m)) for leaf, m in _sequences_of(step, used)]
    saved = [(e, writer.slot("saved", i, e.dtype)) for i, e in enumerate(plan.saved)]
    before = _RecomputedStates(writer, plan, invariant, sequences, saved, used) if plan.earlier else None
    targets: list[tuple[str, str, str, Expression]] = []
    for index in wanted.sequences:
        found = step.grad_sequences[index]
        if found is not None:
            memory = step.sequences[index]
            targets.append((f"grad_sequence{index}", writer.slot("grad_sequence", index, memory), memory, found))
    last: list[str] = []
    states: list[CarriedArray] = []
    for index in wanted.states(step):
        gradient = step.grad_states[index]
        above = next((e for e in used if e.op == "grad_state" and e.index == index), None)
        ctype, memory = C_TYPES[(above or gradient or step.next_states[index]).dtype], step.state_dtypes[index]
        name, final = writer.buffer(f"g{index}", ctype), writer.slot("grad_final", index, memory)
        once.append(f"gather<{MEMORY_TYPES[memory]}, {ctype}>({name}, {final}, a, 0, start, n);")
        states.append(CarriedArray(name, ctype, above, gradient))
        if index in wanted.initials:
            initial = writer.slot("grad_initial", index, memory)
            last.append(f"store<{MEMORY_TYPES[memory]}, {ctype}>({initial}, 0, start, n, {name});")
    adds: list[tuple[str, Expression]] = []
    for index in wanted.sums:
        expression, ctype = step.sums[index], C_TYPES[step.sums[index].dtype]
        name = writer.buffer(f"sum{index}", ctype)
        adds.append((name, expression))
        if step.total[index]:
            once.append(f"for (i64 i = 0; i < n; i++) {name}[i] = 0;")
            last.append(f"((double *){writer.slot('sum', index, 'float64')}.data)[k] = total<{ctype}>({name}, n);")
        else:
            operand = writer.slot("sum", index, expression.dtype)
            # Blocks with the same channels add to one array, `SUM_BLOCKS` blocks at most.
            once.append(f"if (!repeats({operand}, a) || (k - first) % SUM_BLOCKS == 0)")
            once.append(f"  for (i64 i = 0; i < a.block; i++) {name}[i] = 0;")
            last.append(f"if (!repeats({operand}, a)) keep_sum<{ctype}>({operand}, a, number, start, n, {name});")
            last.append("else if (k + 1 == blocks * (number + 1) / parts || (k + 1 - first) % SUM_BLOCKS == 0)")
            last.append(f"  keep_sum<{ctype}>({operand}, a, number, 0, a.block < a.E ? a.block : a.E, {name});")

    def at(t: str, suffix: str) -> TimeStep:
        step_code = TimeStep(texts=dict(invariant))
        if before is not None:
            step_code.first, texts = before.at(t)
            step_code.texts |= texts
        for leaf, operand in sequences:
            memory = step.memory_of(leaf)
            step_code.read(writer, leaf, *writer.load(leaf, operand, memory, t, f"{leaf.op}{leaf.index}{suffix}"))
        for number, (expression, operand) in enumerate(saved):
            line, name = _pointer_to_saved(expression, operand, t, f"saved{number}{suffix}")
            step_code.declarations.append(line)
            step_code.texts[expression] = f"{name}[i]"
        for name, operand, memory, expression in targets:
            step_code.write(writer, expression, operand, memory, t, name + suffix)
        step_code.adds = adds
        return step_code

    steps = 1 if before is not None else steps_at_once(roots, len(sequences) + len(saved) + len(targets), states)
    return writer.source([*once, *time_loops(writer, roots, states, at, steps, backwards=True), *last])


def _sequences_of(step: StepExpressions, used: Iterable[Expression]) -> list[tuple[Expression, str]]:
    """The leaves that change with time, with their dtypes in memory."""
    return [(e, step.memory_of(e)) for e in used if e.op in ("sequence", "grad_output")]


def _invariant_leaves(writer: CppWriter, used: Iterable[Expression]) -> tuple[dict[Expression, str], list[str]]:
    """The leaves that do not change with time: `(text of each leaf, lines before the steps)`."""
    texts: dict[Expression, str] = {}
    lines: list[str] = []
    for leaf in used:
        if leaf.op == "invariant":
            line, name = writer.load_invariant(leaf)
            lines.append(line)
            texts[leaf] = writer.read(leaf, name)
    return texts, lines


def _pointer_to_saved(expression: Expression, operand: str, t: str, name: str) -> tuple[str, str]:
    ctype = C_TYPES[expression.dtype]
    return f"const {ctype} *RESTRICT {name} = (const {ctype} *){operand}.data + {t} * {operand}.time + start;", name


class _RecomputedStates:
    """Recomputes the states before a step of the backward pass from values saved at the previous step."""

    def __init__(
        self,
        writer: CppWriter,
        plan: SavePlan,
        invariant: dict[Expression, str],
        sequences: Sequence[tuple[Expression, str]],
        saved: Sequence[tuple[Expression, str]],
        used: Iterable[Expression],
    ) -> None:
        self.writer, self.plan, self.invariant, self.sequences, self.saved = writer, plan, invariant, sequences, saved
        self.leaves = {e.index: e for e in used if e.op == "state"}
        self.initial = {k: writer.slot("initial", k, writer.step.state_dtypes[k]) for k in plan.earlier}

    def at(self, t: str) -> tuple[list[str], dict[Expression, str]]:
        """The code for step t: `(lines, text of each state)`."""
        step, writer, step_code = self.writer.step, self.writer, TimeStep(texts=dict(self.invariant))
        earlier = f"({t} - 1)"
        for leaf, operand in self.sequences:
            if leaf.op == "sequence":
                name = f"sequence{leaf.index}_before"
                step_code.read(writer, leaf, *writer.load(leaf, operand, step.memory_of(leaf), earlier, name))
        for number, (expression, operand) in enumerate(self.saved):
            line, name = _pointer_to_saved(expression, operand, earlier, f"saved{number}_before")
            step_code.declarations.append(line)
            step_code.texts[expression] = f"{name}[i]"
        initial: list[str] = []
        texts: dict[Expression, str] = {}
        for index in self.plan.earlier:
            following, memory = step.next_states[index], step.state_dtypes[index]
            ctype = C_TYPES[following.dtype]
            name = writer.buffer(f"before{index}", ctype)
            initial.append(f"gather<{MEMORY_TYPES[memory]}, {ctype}>({name}, {self.initial[index]}, a, 0, start, n);")
            step_code.writes.append((name, following))
            leaf = self.leaves[index]
            texts[leaf] = writer.read(leaf, name)
        body = elements(writer, [e for _, e in step_code.writes], (), step_code)
        loop = [*step_code.declarations, "EACH", "for (i64 i = 0; i < n; i++) {", *indented(body, 1), "}"]
        return [f"if ({t} > 0) {{", *indented(loop, 1), "} else {", *indented(initial, 1), "}"], texts
