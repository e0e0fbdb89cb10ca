"""Generate Triton kernels with the time loop inside.

Each program runs a block of elements through all time steps, with the states in registers. A source is one function for
any T, N and stride: the forward pass, which may save values for backward, or the backward pass, which runs through time
in reverse. The access to an operand depends on its layout, so the text is written for an `OperandForm`. T and most
numbers are arguments: another T or tau builds nothing.

The arithmetic equals the C++ back end's: half precision is computed in float32, products and sums are not contracted,
division and square root are correctly rounded, functions come from `triton_prelude`. Each program writes its sum over
all elements as one number; these are then added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from snnfx.lowering.elementwise.back_end import KernelOperand, WantedGradients
from snnfx.lowering.elementwise.expressions import INTEGERS, Expression, StepExpressions, topological
from snnfx.lowering.elementwise.saved_values import SavePlan
from snnfx.lowering.elementwise.triton.triton_source import OperandForm, TritonSource

__all__ = ["write_backward", "write_forward"]

_DTYPE = {
    "float16": "tl.float16",
    "bfloat16": "tl.bfloat16",
    "float32": "tl.float32",
    "float64": "tl.float64",
    "int32": "tl.int32",
    "int64": "tl.int64",
    "bool": "tl.int1",
}
_INLINE_NUMBERS = (0.0, 1.0, -1.0, 2.0, 0.5)
"""Numbers that are literals in the source; all others are arguments, so that changing them builds nothing."""

_INFIX = {"add": "+", "sub": "-", "mul": "*"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_LANGUAGE = ("abs", "floor", "ceil", "erf", "sin", "cos")
"""Functions of `triton.language`."""
_ON_INTEGERS = {
    "neg": "{0} * -1",
    "fmod": "{0} % {1}",
    "div": "({0} - {0} % {1}) // {1}",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "sign": "({0} > 0).to({dtype}) - ({0} < 0).to({dtype})",
}
"""Operations on integers whose text differs from that of floating-point numbers; `%` is the remainder of C."""
_PRELUDE = {
    **{name: f"{name}_" for name in "exp expm1 sigmoid tanh log log1p atan maximum minimum sign trunc round".split()},
    "div": "divided",
    "sqrt": "rooted",
}
"""Functions of `triton_prelude`. All others come from the device library, which the interpreter does not have."""


def write_forward(step: StepExpressions, plan: SavePlan | None = None) -> TritonSource:
    """Write the kernel of the forward pass; with a plan, it saves values for backward."""
    return _source(lambda form: _forward(step, plan, form))


def write_backward(step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> TritonSource:
    """Write the kernel of the backward pass over a sequence, in reverse.

    Args:
        step: forward and backward pass of one step.
        plan: the values saved by the forward pass.
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
    """Collects the parts of a kernel's source."""

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
        """Add an operand; return its number."""
        self.slots.append(KernelOperand(kind, index, dtype))
        return len(self.slots) - 1

    def _constant(self, expression: Expression) -> None:
        name = f"c{expression.number}"
        # A literal zero loses its sign.
        if expression.dtype in INTEGERS:  # arguments are floating-point numbers
            self._define(name, repr(int(expression.value)), expression.dtype)
            self.names[expression] = name
            return
        is_negative_zero = expression.value == 0 and repr(expression.value) == "-0.0"
        if expression.value in _INLINE_NUMBERS and not is_negative_zero:
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
        """The text that loads an operand, at time step `t` if it changes with time."""
        slot = self.slots[operand]
        if self.mode(operand) == "number":
            block = f"tl.full((BLOCK,), f{operand}, {_DTYPE['float32' if dtype == 'bool' else dtype]})"
            return f"({block} != 0.0)" if dtype == "bool" else block
        return cast(f"tl.load({self.place(operand, t)}, mask={mask}, other=0)", slot.dtype, dtype)

    def place(self, operand: int, t: str = "") -> str:
        """The text of the pointers to an operand's values."""
        time = f" + {t} * d{operand}" if self.slots[operand].has_time else ""
        return f"p{operand}{time} + {f'o{operand}' if self.mode(operand) == 'strided' else 'element'}"

    def store(self, operand: int, value: str, dtype: str, t: str = "") -> str:
        """The line that stores the values of a block."""
        return f"tl.store({self.place(operand, t)}, {cast(value, dtype, self.slots[operand].dtype)}, mask=inside)"

    def compute(
        self, roots: Sequence[Expression], texts: dict[Expression, str], prefix: str = "e"
    ) -> dict[Expression, str]:
        """Add lines to the loop that compute expressions; return the name of each expression.

        Args:
            roots: the expressions to compute.
            texts: the text of each expression that is read, not computed.
            prefix: the prefix of the names.
        """
        names = dict(self.names)
        for expression in topological(roots, {**names, **texts}):
            if expression in names:
                continue
            name = f"{prefix}{expression.number}"
            value = texts.get(expression)
            if value is None:
                value = self._text(expression, [names[o] for o in expression.operands])
            self.in_loop.append(f"{name} = {value}")
            names[expression] = name
        return names

    def _text(self, expression: Expression, operands: list[str]) -> str:
        """The text of one operation."""
        op = expression.op
        if expression.dtype in INTEGERS and op in _ON_INTEGERS:
            return _ON_INTEGERS[op].format(*operands, dtype=_DTYPE[expression.dtype])
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
        """The text of an expression, broadcast to the block, in a dtype."""
        text = cast(names[expression], expression.dtype, dtype)
        if any(leaf.op not in ("constant", "scalar") for leaf in topological([expression]) if not leaf.operands):
            return text
        return f"tl.broadcast_to({text}, (BLOCK,))"

    def text(self, source: TritonSource, form: OperandForm) -> str:
        """The complete source text."""
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
    """The text of a cast; float64 is cast to half precision via float32, as in PyTorch."""
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
    texts: dict[Expression, str] = {}
    used = topological(roots)
    states = {e.index: e for e in used if e.op == "state"}
    for leaf in used:
        if leaf.op == "invariant":
            operand = writer.slot("operand", leaf.index, step.operands[leaf.index])
            writer.before_loop.append(f"operand{leaf.index} = {writer.read(operand, leaf.dtype)}")
            texts[leaf] = f"operand{leaf.index}"
        elif leaf.op == "sequence":
            operand = writer.slot("sequence", leaf.index, step.sequences[leaf.index])
            texts[leaf] = writer.read(operand, leaf.dtype, "t")
    for index, (following, memory) in enumerate(zip(step.next_states, step.state_dtypes, strict=True)):
        if index in states:
            value = writer.read(writer.slot("initial", index, memory), following.dtype)
            texts[states[index]] = f"v{index}"
        else:
            value = f"tl.zeros((BLOCK,), {_DTYPE[following.dtype]})"
        writer.before_loop.append(f"v{index} = {value}")
        final = writer.slot("final", index, memory)
        writer.after_loop.append(writer.store(final, f"v{index}", following.dtype))
    names = writer.compute(roots, texts)
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
    texts: dict[Expression, str] = {}
    before: dict[Expression, str] = {}
    used = topological([*roots, *earlier], plan.saved)
    # `earlier` masks the previous step, which the first step does not have.
    at_t, at_t_before = ("t", "inside"), ("(t - 1)", "earlier")
    for leaf in used:
        if leaf.op == "invariant":
            operand = writer.slot("operand", leaf.index, step.operands[leaf.index])
            writer.before_loop.append(f"operand{leaf.index} = {writer.read(operand, leaf.dtype)}")
            texts[leaf] = before[leaf] = f"operand{leaf.index}"
        elif leaf.op in ("sequence", "grad_output"):
            memory = (step.sequences if leaf.op == "sequence" else step.output_dtypes)[leaf.index]
            operand = writer.slot(leaf.op, leaf.index, memory)
            texts[leaf] = writer.read(operand, leaf.dtype, *at_t)
            before[leaf] = writer.read(operand, leaf.dtype, *at_t_before)
    for index, expression in enumerate(plan.saved):
        operand = writer.slot("saved", index, expression.dtype)
        texts[expression] = writer.read(operand, expression.dtype, *at_t)
        before[expression] = writer.read(operand, expression.dtype, *at_t_before)
    _add_recomputed_states(writer, plan, before, texts, used)
    carried: list[tuple[int, str]] = []
    for index in wanted.states(step):
        gradient = step.grad_states[index]
        above = next((e for e in used if e.op == "grad_state" and e.index == index), None)
        dtype = (above or gradient or step.next_states[index]).dtype
        final = writer.slot("grad_final", index, step.state_dtypes[index])
        writer.before_loop.append(f"g{index} = {writer.read(final, dtype)}")
        if above is not None:
            texts[above] = f"g{index}"
        carried.append((index, dtype))
        if index in wanted.initials:
            operand = writer.slot("grad_initial", index, step.state_dtypes[index])
            writer.after_loop.append(writer.store(operand, f"g{index}", dtype))
    names = writer.compute(roots, texts)
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


def _add_recomputed_states(
    writer: _TritonWriter,
    plan: SavePlan,
    before: dict[Expression, str],
    texts: dict[Expression, str],
    used: list[Expression],
) -> None:
    """Recompute the states before a step from values saved at the previous step; the first step has initial states."""
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
        texts[leaf] = f"tl.where(has_earlier, {names[following]}, initial{index})"


def _indented(lines: Iterable[str]) -> list[str]:
    return ["    " + line for line in lines]
