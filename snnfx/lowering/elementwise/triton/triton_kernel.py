"""Generated Triton: a program of the GPU takes a block of elements through all time steps, their states in registers.

A source is one function, for any T, N and stride: `forward`, which may save values for the backward pass, or
`backward`, which goes through time in reverse. What it does with an operand depends on where the elements are (its
`OperandForm`), so the text is written for a form. T and all numbers but a few are arguments: another T or tau builds
nothing.

The numbers are those of the C++ back end: what is half as wide is computed in float32, products and sums are not
contracted, division and square root are rounded correctly, functions come from `triton_prelude`. Sums over all elements
leave a program as one number, and are added up afterwards in the same order every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from snnfx.lowering.elementwise.back_end import KernelOperand, WantedGradients
from snnfx.lowering.elementwise.expressions import Expression, StepExpressions, topological
from snnfx.lowering.elementwise.saved_values import SavePlan
from snnfx.lowering.elementwise.triton.triton_source import OperandForm, TritonSource

__all__ = ["write_backward", "write_forward"]

_DTYPE = {
    "float16": "tl.float16",
    "bfloat16": "tl.bfloat16",
    "float32": "tl.float32",
    "float64": "tl.float64",
    "bool": "tl.int1",
}
_WRITTEN = (0.0, 1.0, -1.0, 2.0, 0.5)
"""Numbers that are written into the source; all others are arguments, so that changing one builds nothing."""

_INFIX = {"add": "+", "sub": "-", "mul": "*"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_LANGUAGE = ("abs", "floor", "ceil", "erf", "sin", "cos")
"""Functions of Triton itself."""
_PRELUDE = {
    **{name: f"{name}_" for name in "exp expm1 sigmoid tanh log log1p atan maximum minimum sign trunc round".split()},
    "div": "divided",
    "sqrt": "rooted",
}
"""Functions of `triton_prelude`. All others come from the library of the device, which the interpreter has not."""


def write_forward(step: StepExpressions, plan: SavePlan | None = None) -> TritonSource:
    """The forward pass over a whole sequence; with a plan, it saves what the backward pass needs."""
    return _source(lambda form: _forward(step, plan, form))


def write_backward(step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> TritonSource:
    """The backward pass over a whole sequence, in reverse.

    Args:
        step: forward and backward of one step.
        plan: what the forward pass has saved.
        wanted: the gradients to compute.
    """
    return _source(lambda form: _backward(step, plan, wanted, form))


def _source(writer_of: Callable[[OperandForm | None], _TritonWriter]) -> TritonSource:
    first = writer_of(None)

    def write(form: OperandForm) -> str:
        return writer_of(form).text(source, form)

    source = TritonSource(tuple(first.slots), tuple(first.literals), write, frozenset(first.uses))
    return source


class _TritonWriter:
    """Collects the parts of a kernel; values of a block of elements have a name each."""

    def __init__(self, step: StepExpressions, roots: Iterable[Expression], form: OperandForm | None) -> None:
        self.step, self.form = step, form
        self.slots: list[KernelOperand] = []
        self.literals: dict[float, int] = {}
        self.uses: set[str] = set()
        self.before_loop: list[str] = []
        self.in_loop: list[str] = []
        self.after_loop: list[str] = []
        self.names: dict[Expression, str] = {}
        self.is_reverse = False
        for expression in topological(roots):
            if expression.op == "constant":
                self._constant(expression)
            elif expression.op == "scalar":
                self._scalar(expression)

    def mode(self, operand: int) -> str:
        return self.form.modes[operand] if self.form is not None else "dense"

    def slot(self, kind: str, index: int, dtype: str) -> int:
        """The number of a new operand."""
        self.slots.append(KernelOperand(kind, index, dtype))
        return len(self.slots) - 1

    def _constant(self, expression: Expression) -> None:
        name = f"c{expression.number}"
        # A zero that is written loses its sign.
        is_negative_zero = expression.value == 0 and repr(expression.value) == "-0.0"
        if expression.value in _WRITTEN and not is_negative_zero:
            value = repr(expression.value)
        else:
            value = f"k{self._literal(expression.value)}"
        self._define(name, value, expression.dtype)
        self.names[expression] = name

    def _literal(self, value: float) -> int:
        for index, known in enumerate(self.literals):
            if repr(known) == repr(value):
                return index
        self.literals[value] = len(self.literals)
        return len(self.literals) - 1

    def _define(self, name: str, value: str, dtype: str) -> None:
        if dtype == "bool":
            self.before_loop.append(f"{name} = tl.full((), {value}, tl.float32) != 0.0")
        else:
            self.before_loop.append(f"{name} = tl.full((), {value}, {_DTYPE[dtype]})")

    def _scalar(self, expression: Expression) -> None:
        memory = self.step.operands[expression.index]
        operand = self.slot("operand", expression.index, memory)
        name = f"scalar{expression.index}"
        if self.mode(operand) == "number":
            self._define(name, f"f{operand}", expression.dtype)
        else:
            self.before_loop.append(f"{name} = {cast(f'tl.load(p{operand})', memory, expression.dtype)}")
        self.names[expression] = name

    def read(self, operand: int, dtype: str, t: str = "", mask: str = "inside") -> str:
        """The values of an operand, at a time step if it has time."""
        slot = self.slots[operand]
        if self.mode(operand) == "number":
            block = f"tl.full((BLOCK,), f{operand}, {_DTYPE['float32' if dtype == 'bool' else dtype]})"
            return f"({block} != 0.0)" if dtype == "bool" else block
        return cast(f"tl.load({self.place(operand, t)}, mask={mask}, other=0)", slot.dtype, dtype)

    def place(self, operand: int, t: str = "") -> str:
        """Pointers to the values of an operand."""
        time = f" + {t} * d{operand}" if self.slots[operand].has_time else ""
        return f"p{operand}{time} + {f'o{operand}' if self.mode(operand) == 'strided' else 'element'}"

    def store(self, operand: int, value: str, dtype: str, t: str = "") -> str:
        """The line that writes values of a block."""
        return f"tl.store({self.place(operand, t)}, {cast(value, dtype, self.slots[operand].dtype)}, mask=inside)"

    def compute(
        self, roots: Sequence[Expression], at_hand: dict[Expression, str], prefix: str = "e"
    ) -> dict[Expression, str]:
        """Add the lines that compute expressions to the loop; the name of each expression.

        Args:
            roots: what is wanted.
            at_hand: how the values that are read are written.
            prefix: of the names.
        """
        names = dict(self.names)
        for expression in topological(roots, {**names, **at_hand}):
            if expression in names:
                continue
            name = f"{prefix}{expression.number}"
            value = at_hand.get(expression)
            if value is None:
                value = self._text(expression, [names[o] for o in expression.operands])
            self.in_loop.append(f"{name} = {value}")
            names[expression] = name
        return names

    def _text(self, expression: Expression, operands: list[str]) -> str:
        """One operation."""
        op = expression.op
        of_bool = bool(expression.operands) and expression.operands[0].dtype == "bool"
        if op in _INFIX:
            return f"{operands[0]} {_INFIX[op]} {operands[1]}"
        if op in _COMPARE:
            left, right = (f"{o}.to(tl.int32)" for o in operands) if of_bool else operands
            return f"{left} {_COMPARE[op]} {right}"
        if op in _LOGIC:
            return f"{operands[0]} {_LOGIC[op]} {operands[1]}"
        if op == "not":
            return f"{operands[0]} == 0"
        if op == "isnan":
            return f"{operands[0]} != {operands[0]}"
        if op == "where":
            return f"tl.where({', '.join(operands)})"
        if op == "cast":
            return cast(operands[0], expression.operands[0].dtype, expression.dtype)
        if op == "neg":
            return f"{operands[0]} * -1.0"  # 0 - x has another sign at zero
        if op in _LANGUAGE:
            return f"tl.{op}({operands[0]})"
        if op in _PRELUDE:
            return f"prelude.{_PRELUDE[op]}({', '.join(operands)})"
        self.uses.add(op)
        return f"libdevice.{op}({', '.join(operands)})"

    def block_of(self, expression: Expression, names: dict[Expression, str], dtype: str) -> str:
        """An expression as one value for each element of a block, in a dtype."""
        text = cast(names[expression], expression.dtype, dtype)
        if any(leaf.op not in ("constant", "scalar") for leaf in topological([expression]) if not leaf.operands):
            return text
        return f"tl.broadcast_to({text}, (BLOCK,))"

    def text(self, source: TritonSource, form: OperandForm) -> str:
        """The whole text."""
        lines = [f"element = tl.program_id(0){'.to(tl.int64)' if form.wide else ''} * BLOCK + tl.arange(0, BLOCK)"]
        lines.append("inside = element < elements")
        strided = [n for n, mode in enumerate(form.modes) if mode == "strided"]
        if strided:
            lines.append("rest = element")
            for d in range(form.dims - 1, 0, -1):
                lines += [f"place{d} = rest % n{d}", f"rest = rest // n{d}"]
            lines.append("place0 = rest")
        for n in strided:
            lines.append(f"o{n} = " + " + ".join(f"place{d} * s{n}_{d}" for d in range(form.dims)))
        loop = ["t = T - 1 - step"] if self.is_reverse else ["t = step"]
        lines += [*self.before_loop, "for step in range(T):", *_indented([*loop, *self.in_loop])]
        lines += self.after_loop
        imports = ["import triton", "import triton.language as tl"]
        imports += ["from triton.language.extra import libdevice"] if self.uses else []
        imports += ["from snnfx.lowering.elementwise.triton import triton_prelude as prelude"]
        head = ['@triton.jit(do_not_specialize=["T"])', f"def kernel({', '.join(source.parameters(form))}):"]
        return "\n".join([*imports, "", "", *head, *_indented(lines)]) + "\n"


def cast(value: str, dtype: str, to: str) -> str:
    """A value in another dtype; float64 becomes half by way of float32, as in PyTorch."""
    if dtype == to:
        return value
    if to == "bool":
        return f"({value} != 0)"
    if dtype == "float64" and to in ("float16", "bfloat16"):
        return f"({value}).to(tl.float32).to({_DTYPE[to]})"
    return f"({value}).to({_DTYPE[to]})"


def _forward(step: StepExpressions, plan: SavePlan | None, form: OperandForm | None) -> _TritonWriter:
    saved = plan.saved if plan is not None else ()
    roots = [*step.outputs, *step.next_states, *saved]
    writer = _TritonWriter(step, roots, form)
    at_hand: dict[Expression, str] = {}
    used = topological(roots)
    states = {e.index: e for e in used if e.op == "state"}
    for leaf in used:
        if leaf.op == "invariant":
            operand = writer.slot("operand", leaf.index, step.operands[leaf.index])
            writer.before_loop.append(f"operand{leaf.index} = {writer.read(operand, leaf.dtype)}")
            at_hand[leaf] = f"operand{leaf.index}"
        elif leaf.op == "sequence":
            operand = writer.slot("sequence", leaf.index, step.sequences[leaf.index])
            at_hand[leaf] = writer.read(operand, leaf.dtype, "t")
    for index, (following, memory) in enumerate(zip(step.next_states, step.state_dtypes, strict=True)):
        if index in states:
            value = writer.read(writer.slot("initial", index, memory), following.dtype)
            at_hand[states[index]] = f"v{index}"
        else:
            value = f"tl.zeros((BLOCK,), {_DTYPE[following.dtype]})"
        writer.before_loop.append(f"v{index} = {value}")
        final = writer.slot("final", index, memory)
        writer.after_loop.append(writer.store(final, f"v{index}", following.dtype))
    names = writer.compute(roots, at_hand)
    targets = [("output", i, m, e) for i, (m, e) in enumerate(zip(step.output_dtypes, step.outputs, strict=True))]
    targets += [("saved", i, e.dtype, e) for i, e in enumerate(saved)]
    for kind, index, memory, expression in targets:
        operand = writer.slot(kind, index, memory)
        writer.in_loop.append(writer.store(operand, names[expression], expression.dtype, "t"))
    for index, following in enumerate(step.next_states):
        writer.in_loop.append(f"v{index} = {writer.block_of(following, names, following.dtype)}")
    return writer


def _backward(
    step: StepExpressions, plan: SavePlan, wanted: WantedGradients, form: OperandForm | None
) -> _TritonWriter:
    roots = wanted.expressions(step)
    earlier = [step.next_states[k] for k in plan.earlier]
    writer = _TritonWriter(step, [*roots, *earlier], form)
    writer.is_reverse = True
    at_hand: dict[Expression, str] = {}
    before: dict[Expression, str] = {}
    used = topological([*roots, *earlier], plan.saved)
    # The step before this one, where there is one.
    at_t, at_t_before = ("t", "inside"), ("(t - 1)", "earlier")
    for leaf in used:
        if leaf.op == "invariant":
            operand = writer.slot("operand", leaf.index, step.operands[leaf.index])
            writer.before_loop.append(f"operand{leaf.index} = {writer.read(operand, leaf.dtype)}")
            at_hand[leaf] = before[leaf] = f"operand{leaf.index}"
        elif leaf.op in ("sequence", "grad_output"):
            memory = (step.sequences if leaf.op == "sequence" else step.output_dtypes)[leaf.index]
            operand = writer.slot(leaf.op, leaf.index, memory)
            at_hand[leaf] = writer.read(operand, leaf.dtype, *at_t)
            before[leaf] = writer.read(operand, leaf.dtype, *at_t_before)
    for index, expression in enumerate(plan.saved):
        operand = writer.slot("saved", index, expression.dtype)
        at_hand[expression] = writer.read(operand, expression.dtype, *at_t)
        before[expression] = writer.read(operand, expression.dtype, *at_t_before)
    _add_states_from_before(writer, plan, before, at_hand, used)
    carried: list[tuple[int, str]] = []
    for index in wanted.states(step):
        gradient = step.grad_states[index]
        above = next((e for e in used if e.op == "grad_state" and e.index == index), None)
        dtype = (above or gradient or step.next_states[index]).dtype
        final = writer.slot("grad_final", index, step.state_dtypes[index])
        writer.before_loop.append(f"g{index} = {writer.read(final, dtype)}")
        if above is not None:
            at_hand[above] = f"g{index}"
        carried.append((index, dtype))
        if index in wanted.initials:
            operand = writer.slot("grad_initial", index, step.state_dtypes[index])
            writer.after_loop.append(writer.store(operand, f"g{index}", dtype))
    names = writer.compute(roots, at_hand)
    for index in wanted.sequences:
        found = step.grad_sequences[index]
        if found is not None:
            operand = writer.slot("grad_sequence", index, step.sequences[index])
            writer.in_loop.append(writer.store(operand, names[found], found.dtype, "t"))
    for index, dtype in carried:
        gradient = step.grad_states[index]
        zero = f"tl.zeros((BLOCK,), {_DTYPE[dtype]})"
        value = zero if gradient is None else writer.block_of(gradient, names, dtype)
        writer.in_loop.append(f"g{index} = {value}")
    for index in wanted.sums:
        expression, name = step.sums[index], f"sum{index}"
        writer.before_loop.append(f"{name} = tl.zeros((BLOCK,), {_DTYPE[expression.dtype]})")
        writer.in_loop.append(f"{name} += {names[expression]}")
        if step.total[index]:
            operand = writer.slot("sum", index, "float64")
            total = f"tl.sum(tl.where(inside, {name}, 0.0).to(tl.float64), axis=0)"
            writer.after_loop.append(f"tl.store(p{operand} + tl.program_id(0), {total})")
        else:
            operand = writer.slot("sum", index, expression.dtype)
            writer.after_loop.append(writer.store(operand, name, expression.dtype))
    return writer


def _add_states_from_before(
    writer: _TritonWriter,
    plan: SavePlan,
    before: dict[Expression, str],
    at_hand: dict[Expression, str],
    used: list[Expression],
) -> None:
    """Compute the states before a step from what was saved at the step before it; the first step has initial ones."""
    if not plan.earlier:
        return
    step = writer.step
    writer.in_loop.append("has_earlier = tl.full((BLOCK,), t, tl.int32) > 0")
    writer.in_loop.append("earlier = inside & has_earlier")
    names = writer.compute([step.next_states[k] for k in plan.earlier], before, "b")
    for index in plan.earlier:
        following = step.next_states[index]
        initial = writer.slot("initial", index, step.state_dtypes[index])
        writer.before_loop.append(f"initial{index} = {writer.read(initial, following.dtype)}")
        leaf = next(e for e in used if e.op == "state" and e.index == index)
        at_hand[leaf] = f"tl.where(has_earlier, {names[following]}, initial{index})"


def _indented(lines: Iterable[str]) -> list[str]:
    return ["    " + line for line in lines]
