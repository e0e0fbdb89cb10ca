"""Generated C++: the time loop inside, the state of a block of neurons in a cache, vector code over the block.

A source is one function, for any T, N, shape, stride and number of threads: `forward`, which may save values for the
backward pass, or `backward`, which goes through time in reverse. It is a plain function of a struct `Args`, without a
header of PyTorch's, so that it builds in a fraction of a second.

The elements of a step are taken in blocks; for each block all time steps are done before the next one. Operands whose
elements do not lie one after the other (broadcast, strided, half precision) are first copied to a block of their own,
those that do not change with time once for all steps, so that no index is computed in the inner loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snnfx.kernels.back_end import Backward, Slot
from snnfx.kernels.cpp_prelude import PRELUDE
from snnfx.kernels.expressions import Expression, StepExpressions, topological
from snnfx.kernels.layout import MAX_DIMS
from snnfx.kernels.saving import SavePlan

__all__ = ["KernelSource", "write_backward", "write_forward"]

_C = {"float32": "float", "float64": "double", "bool": "float"}
_MEMORY = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "float",
    "float64": "double",
    "bool": "uint8_t",
}
_WRITTEN = (0.0, 1.0, -1.0, 2.0, 0.5)
"""Numbers that are written into the source; all others are arguments, so that changing one builds nothing."""

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_ROUNDED = {"sqrt": "rooted", "abs": "absolute"}
_BLOCK_BYTES = 65536
"""Of one array of a block, at most; `launch` takes shorter blocks where that is faster."""

_STACK_BYTES = 8 * _BLOCK_BYTES
"""Of all arrays of a block, at most: threads have small stacks."""


@dataclass(frozen=True)
class KernelSource:
    """A generated kernel.

    Args:
        text: C++, with the entry points `run(const Args *)` and `run_part(const Args *, part, parts)`.
        slots: its operands, in order.
        literals: numbers that it is passed.
        block: most elements of a block, a power of two.
    """

    text: str
    slots: tuple[Slot, ...]
    literals: tuple[float, ...]
    block: int


class _Writer:
    """Collects the parts of a kernel."""

    def __init__(self, step: StepExpressions, roots: Iterable[Expression]) -> None:
        self.step = step
        self.slots: list[Slot] = []
        self.literals: dict[float, int] = {}
        self.buffers: list[str] = []
        self.hoisted: list[str] = []
        self.names: dict[Expression, str] = {}
        used = topological(roots)
        self.wide = any(e.dtype == "float64" for e in used)
        for expression in used:
            if expression.op == "constant":
                self._constant(expression)
            elif expression.op == "scalar":
                self._scalar(expression)

    def slot(self, kind: str, index: int, dtype: str) -> str:
        """A new operand; its text in C++."""
        self.slots.append(Slot(kind, index, dtype))
        return f"a.operand[{len(self.slots) - 1}]"

    def buffer(self, name: str, ctype: str) -> str:
        self.buffers.append(f"alignas(64) {ctype} {name}[BLOCK];")
        return name

    def _constant(self, expression: Expression) -> None:
        ctype = _C[expression.dtype]
        if expression.value in _WRITTEN:
            self.names[expression] = f"({ctype}){expression.value!r}"
            return
        index = self.literals.setdefault(expression.value, len(self.literals))
        self.names[expression] = f"k{expression.number}"
        self.hoisted.append(f"const {ctype} k{expression.number} = ({ctype})a.literal[{index}];")

    def _scalar(self, expression: Expression) -> None:
        ctype, memory = _C[expression.dtype], _MEMORY[self.step.operands[expression.index]]
        operand = self.slot("operand", expression.index, self.step.operands[expression.index])
        name = f"s{expression.index}"
        self.hoisted.append(f"const {ctype} {name} = widened<{ctype}, {memory}>(*(const {memory} *){operand}.data);")
        self.names[expression] = name

    def load(self, expression: Expression, memory: str) -> tuple[str, str]:
        """A sequence that an expression stands for: `(declaration of its pointer, name of the pointer)`."""
        operand = self.slot("sequence", expression.index, memory)
        return self.load_again(expression, operand, memory, "t", f"sequence{expression.index}")

    def load_invariant(self, expression: Expression) -> tuple[str, str]:
        """As `load` for an operand that does not change with time; one that repeats is copied for the first block."""
        memory, ctype = self.step.operands[expression.index], _C[expression.dtype]
        operand, name = self.slot("operand", expression.index, memory), f"operand{expression.index}"
        buffer = self.buffer(f"{name}_block", ctype)
        loader = f"Loader<{_MEMORY[memory]}, {ctype}>::at({buffer}, {operand}, a, 0, start, n)"
        self.hoisted.append(f"const bool {name}_repeats = repeats({operand}, a);")
        line = f"const {ctype} *RESTRICT {name} = k > first && {name}_repeats ? {buffer} : {loader};"
        return line, name

    def load_again(self, expression: Expression, operand: str, memory: str, t: str, name: str) -> tuple[str, str]:
        ctype = _C[expression.dtype]
        buffer = self.buffer(f"{name}_block", ctype)
        line = (
            f"const {ctype} *RESTRICT {name} = "
            f"Loader<{_MEMORY[memory]}, {ctype}>::at({buffer}, {operand}, a, {t}, start, n);"
        )
        return line, name

    def hoist(
        self, roots: Sequence[Expression], at_hand: dict[Expression, str], saved: Iterable[Expression] = ()
    ) -> list[str]:
        """Lines that compute for a block what does not change with time, once for all steps.

        Args:
            roots: what each step computes.
            at_hand: the invariant leaves; what is computed here is added.
            saved: values of each step that are in memory.
        """
        leaves: dict[Expression, set[str]] = {}
        lines: list[str] = []
        saved = set(saved)
        used = topological(roots, saved)
        for expression in used:
            if expression in saved:
                continue
            if expression.op == "invariant":
                leaves[expression] = {f"operand{expression.index}"}
            elif expression.op in ("constant", "scalar"):
                leaves[expression] = set()
            elif expression.operands and all(o in leaves for o in expression.operands):
                leaves[expression] = set().union(*(leaves[o] for o in expression.operands))
        changing = [e for e in used if e not in leaves]
        wanted = {o for e in changing if e not in saved for o in e.operands} | set(roots)
        for expression in used:
            if not leaves.get(expression) or not expression.operands or expression not in wanted:
                continue
            if expression.dtype == "bool":
                continue
            name = self.buffer(f"once{expression.number}", _C[expression.dtype])
            body, names = self.body([expression], at_hand)
            again = " && ".join(f"{leaf}_repeats" for leaf in sorted(leaves[expression]))
            lines.append(f"if (k == first || !({again})) for (i64 i = 0; i < n; i++) {{")
            lines += _indented([*body, f"{name}[i] = {names[expression]};"], 1)
            lines.append("}")
            at_hand[expression] = f"{name}[i]"
        return lines

    def read(self, expression: Expression, pointer: str) -> str:
        return f"({pointer}[i] != 0)" if expression.dtype == "bool" else f"{pointer}[i]"

    def body(
        self, roots: Sequence[Expression], at_hand: dict[Expression, str]
    ) -> tuple[list[str], dict[Expression, str]]:
        """The lines that compute expressions of one element, and the name of each."""
        names = {**self.names, **at_hand}
        lines: list[str] = []
        for expression in topological(roots, names):
            if expression in names and expression not in at_hand:
                continue
            if expression in at_hand:
                if expression.dtype != "bool":
                    name = f"e{expression.number}"
                    lines.append(f"const {_C[expression.dtype]} {name} = {at_hand[expression]};")
                    names[expression] = name
                continue
            text = _text(expression, [names[o] for o in expression.operands])
            if expression.dtype == "bool":
                names[expression] = text  # in place: a variable of type bool keeps g++ from vectorising
            else:
                names[expression] = f"e{expression.number}"
                lines.append(f"const {_C[expression.dtype]} {names[expression]} = {text};")
        return lines, names

    def target(self, kind: str, index: int, memory: str, dtype: str) -> tuple[str, str, str]:
        """Where values of each step are written: `(declaration, pointer, what follows the loop)`."""
        operand = self.slot(kind, index, memory)
        ctype, name = _C[dtype], f"{kind}{index}"
        if _MEMORY[memory] == ctype and dtype != "bool":
            return f"{ctype} *RESTRICT {name} = ({ctype} *){operand}.data + t * {operand}.time + start;", name, ""
        self.buffer(name, ctype)
        return "", name, f"store<{_MEMORY[memory]}, {ctype}>({operand}, t, start, n, {name});"

    def source(self, per_block: list[str]) -> KernelSource:
        """The whole text."""
        size, arrays = 8 if self.wide else 4, max(1, len(self.buffers))
        block = min(_BLOCK_BYTES // size, 1 << (_STACK_BYTES // (size * arrays)).bit_length() - 1)
        define = [
            f"#define MAX_DIMS {MAX_DIMS}",
            f"#define LITERALS {max(1, len(self.literals))}",
            f"#define OPERANDS {max(1, len(self.slots))}",
        ]
        lines = [
            *define,
            PRELUDE,
            f"static constexpr i64 BLOCK = {block};",
            "static void part(const Args &a, i64 number, i64 parts) {",
            "  const i64 blocks = (a.E + a.block - 1) / a.block;",
            *_indented(self.buffers, 1),
            *_indented(self.hoisted, 1),
            "  const i64 first = blocks * number / parts;",
            "  for (i64 k = first; k < blocks * (number + 1) / parts; k++) {",
            "    const i64 start = k * a.block, n = a.E - start < a.block ? a.E - start : a.block;",
            *_indented(per_block, 2),
            "  }",
            "}",
            'extern "C" void run_part(const Args *a, i64 number, i64 parts) { part(*a, number, parts); }',
            "static void work(void *p) { const Args &a = *(const Args *)p; part(a, a.thread(), a.team()); }",
            'extern "C" void run(const Args *a) {',
            "  if (a->threads > 1) a->parallel(work, (void *)a, (unsigned)a->threads, 0);",
            "  else part(*a, 0, 1);",
            "}",
        ]
        return KernelSource("\n".join(lines) + "\n", tuple(self.slots), tuple(self.literals), block)


def write_forward(step: StepExpressions, plan: SavePlan | None = None) -> KernelSource:
    """The forward pass over a whole sequence; with a plan, it saves what the backward pass needs."""
    saved = plan.saved if plan is not None else ()
    roots = [*step.outputs, *step.next_states, *saved]
    writer = _Writer(step, roots)
    at_hand: dict[Expression, str] = {}
    once: list[str] = []
    each: list[str] = []
    leaves = [e for e in topological(roots) if e.op in ("sequence", "invariant")]
    for leaf in leaves:
        if leaf.op == "invariant":
            line, name = writer.load_invariant(leaf)
            once.append(line)
        else:
            line, name = writer.load(leaf, step.sequences[leaf.index])
            each.append(line)
        at_hand[leaf] = writer.read(leaf, name)
    once += writer.hoist(roots, at_hand)
    states = {e.index: e for e in topological(roots) if e.op == "state"}
    last: list[str] = []
    for index, (following, memory) in enumerate(zip(step.next_states, step.state_dtypes, strict=True)):
        ctype, name = _C[following.dtype], writer.buffer(f"v{index}", _C[following.dtype])
        if index in states:
            once.append(
                f"gather<{_MEMORY[memory]}, {ctype}>({name}, {writer.slot('initial', index, memory)}, a, 0, start, n);"
            )
            at_hand[states[index]] = writer.read(states[index], name)
        last.append(f"store<{_MEMORY[memory]}, {ctype}>({writer.slot('final', index, memory)}, 0, start, n, {name});")
    writes: list[tuple[str, Expression]] = []
    after: list[str] = []
    targets = [("output", i, m, e) for i, (m, e) in enumerate(zip(step.output_dtypes, step.outputs, strict=True))]
    targets += [("saved", i, e.dtype, e) for i, e in enumerate(saved)]
    for kind, index, memory, expression in targets:
        line, name, afterwards = writer.target(kind, index, memory, expression.dtype)
        each += [line] if line else []
        after += [afterwards] if afterwards else []
        writes.append((name, expression))
    writes += [(f"v{i}", e) for i, e in enumerate(step.next_states) if not (e.op == "state" and e.index == i)]
    body = _loop(writer, roots, at_hand, writes)
    per_block = [*once, "for (i64 t = 0; t < a.T; t++) {", *_indented([*each, *body, *after], 1), "}", *last]
    return writer.source(per_block)


def write_backward(step: StepExpressions, plan: SavePlan, wanted: Backward) -> KernelSource:
    """The backward pass over a whole sequence, in reverse.

    Args:
        step: forward and backward of one step.
        plan: what the forward pass has saved.
        wanted: the gradients to compute.
    """
    roots = wanted.expressions(step)
    writer = _Writer(step, [*roots, *(step.next_states[k] for k in plan.earlier)])
    at_hand: dict[Expression, str] = {}
    before: dict[Expression, str] = {}
    once: list[str] = []
    each: list[str] = []
    each_before: list[str] = []
    available = set(plan.saved)
    used = topological([*roots, *(step.next_states[k] for k in plan.earlier)], available)
    for leaf in used:
        if leaf.op == "invariant":
            line, name = writer.load_invariant(leaf)
            once.append(line)
            at_hand[leaf] = before[leaf] = writer.read(leaf, name)
        elif leaf.op in ("sequence", "grad_output"):
            memory = (step.sequences if leaf.op == "sequence" else step.output_dtypes)[leaf.index]
            operand = writer.slot(leaf.op, leaf.index, memory)
            line, name = writer.load_again(leaf, operand, memory, "t", f"{leaf.op}{leaf.index}")
            each.append(line)
            at_hand[leaf] = writer.read(leaf, name)
            if leaf.op == "sequence" and plan.earlier:
                line, name = writer.load_again(leaf, operand, memory, "t - 1", f"{leaf.op}{leaf.index}_before")
                each_before.append(line)
                before[leaf] = writer.read(leaf, name)
    invariant = {leaf: name for leaf, name in at_hand.items() if leaf.op == "invariant"}
    once += writer.hoist([*roots, *(step.next_states[k] for k in plan.earlier)], invariant, available)
    for names in (at_hand, before):
        names.update(invariant)
    for index, expression in enumerate(plan.saved):
        operand = writer.slot("saved", index, expression.dtype)
        ctype = _C[expression.dtype]
        for lines, names, t, name in (
            (each, at_hand, "t", f"saved{index}"),
            (each_before, before, "(t - 1)", f"saved{index}_before"),
        ):
            lines.append(
                f"const {ctype} *RESTRICT {name} = (const {ctype} *){operand}.data + {t} * {operand}.time + start;"
            )
            names[expression] = f"{name}[i]"
    recompute = _states_from_before(writer, plan, before, each_before, at_hand, used)
    last: list[str] = []
    writes: list[tuple[str, Expression]] = []
    after: list[str] = []
    for index in wanted.sequences:
        found = step.grad_sequences[index]
        if found is None:
            continue
        line, name, afterwards = writer.target("grad_sequence", index, step.sequences[index], found.dtype)
        each += [line] if line else []
        after += [afterwards] if afterwards else []
        writes.append((name, found))
    for index in wanted.states(step):
        gradient = step.grad_states[index]
        above = next((e for e in used if e.op == "grad_state" and e.index == index), None)
        dtype = (above or gradient or step.next_states[index]).dtype
        name = writer.buffer(f"g{index}", _C[dtype])
        memory = step.state_dtypes[index]
        once.append(
            f"gather<{_MEMORY[memory]}, {_C[dtype]}>("
            f"{name}, {writer.slot('grad_final', index, memory)}, a, 0, start, n);"
        )
        if above is not None:
            at_hand[above] = f"{name}[i]"
        if gradient is None:
            after.append(f"for (i64 i = 0; i < n; i++) {name}[i] = 0;")
        else:
            writes.append((name, gradient))
        if index in wanted.initials:
            last.append(
                f"store<{_MEMORY[memory]}, {_C[dtype]}>("
                f"{writer.slot('grad_initial', index, memory)}, 0, start, n, {name});"
            )
    adds: list[tuple[str, Expression]] = []
    for index in wanted.sums:
        expression, ctype = step.sums[index], _C[step.sums[index].dtype]
        name = writer.buffer(f"sum{index}", ctype)
        once.append(f"for (i64 i = 0; i < n; i++) {name}[i] = 0;")
        adds.append((name, expression))
        if step.total[index]:
            last.append(f"((double *){writer.slot('sum', index, 'float64')}.data)[k] = total<{ctype}>({name}, n);")
        else:
            operand = writer.slot("sum", index, expression.dtype)
            last.append(f"store<{ctype}, {ctype}>({operand}, 0, start, n, {name});")
    body = _loop(writer, roots, at_hand, writes, adds)
    per_step = [*recompute, *each, *body, *after]
    per_block = [*once, "for (i64 t = a.T - 1; t >= 0; t--) {", *_indented(per_step, 1), "}", *last]
    return writer.source(per_block)


def _states_from_before(
    writer: _Writer,
    plan: SavePlan,
    before: dict[Expression, str],
    loads: list[str],
    at_hand: dict[Expression, str],
    used: list[Expression],
) -> list[str]:
    """Lines that compute the states before a step from what was saved at the step before it."""
    if not plan.earlier:
        return []
    step = writer.step
    initial: list[str] = []
    writes: list[tuple[str, Expression]] = []
    for index in plan.earlier:
        following, memory = step.next_states[index], step.state_dtypes[index]
        name = writer.buffer(f"before{index}", _C[following.dtype])
        operand = writer.slot("initial", index, memory)
        initial.append(f"gather<{_MEMORY[memory]}, {_C[following.dtype]}>({name}, {operand}, a, 0, start, n);")
        writes.append((name, following))
        leaf = next(e for e in used if e.op == "state" and e.index == index)
        at_hand[leaf] = writer.read(leaf, name)
    body = _loop(writer, [e for _, e in writes], before, writes)
    return ["if (t > 0) {", *_indented([*loads, *body], 1), "} else {", *_indented(initial, 1), "}"]


def _loop(
    writer: _Writer,
    roots: Sequence[Expression],
    at_hand: dict[Expression, str],
    writes: Sequence[tuple[str, Expression]],
    adds: Sequence[tuple[str, Expression]] = (),
) -> list[str]:
    """The loop over the elements of a block."""
    lines, names = writer.body(roots, at_hand)

    def value(expression: Expression) -> str:
        return f"({names[expression]} ? 1.0f : 0.0f)" if expression.dtype == "bool" else names[expression]

    lines = [*lines, *(f"{name}[i] = {value(e)};" for name, e in writes)]
    lines += [f"{name}[i] += {value(e)};" for name, e in adds]
    return ["EACH", "for (i64 i = 0; i < n; i++) {", *_indented(lines, 1), "}"]


def _text(expression: Expression, operands: list[str]) -> str:
    """One operation in C++."""
    op, ctype = expression.op, _C[expression.dtype]
    if op in _INFIX:
        return f"{operands[0]} {_INFIX[op]} {operands[1]}"
    if op in _COMPARE:
        if expression.operands[0].dtype == "bool":
            return f"(({operands[0]}) {_COMPARE[op]} ({operands[1]}))"
        return f"({operands[0]} {_COMPARE[op]} {operands[1]})"
    if op in _LOGIC:
        return f"({operands[0]} {_LOGIC[op]} {operands[1]})"
    if op == "not":
        return f"(!{operands[0]})"
    if op == "isnan":
        return f"({operands[0]} != {operands[0]})"
    if op == "where":
        if expression.dtype == "bool":
            return f"(({operands[0]} & {operands[1]}) | (!{operands[0]} & {operands[2]}))"
        return f"{operands[0]} ? {operands[1]} : {operands[2]}"
    if op == "cast":
        if expression.operands[0].dtype == "bool":
            return f"{operands[0]} ? ({ctype})1 : ({ctype})0"
        return f"({ctype}){operands[0]}"
    if op == "neg":
        return f"-{operands[0]}"
    function = _ROUNDED.get(op, f"{op}_")
    template = (
        f"<{ctype}>"
        if op in ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "atan", "maximum", "minimum", "sign")
        else ""
    )
    return f"{function}{template}({', '.join(operands)})"


def _indented(lines: Iterable[str], depth: int) -> list[str]:
    return ["  " * depth + line for line in lines]
