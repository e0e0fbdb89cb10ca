"""The text of a kernel in C++: operands, arrays of a block, expressions of one element."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snnfx.lowering.elementwise.back_end import KernelOperand
from snnfx.lowering.elementwise.cpp.cpp_prelude import PRELUDE
from snnfx.lowering.elementwise.expressions import Expression, StepExpressions, topological
from snnfx.lowering.elementwise.operand_layout import MAX_DIMS

__all__ = ["C_TYPES", "MEMORY_TYPES", "CppWriter", "KernelSource", "indented"]

C_TYPES = {"float32": "float", "float64": "double", "bool": "float"}
MEMORY_TYPES = {
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
    slots: tuple[KernelOperand, ...]
    literals: tuple[float, ...]
    block: int


class CppWriter:
    """Collects the parts of a kernel."""

    def __init__(self, step: StepExpressions, roots: Iterable[Expression]) -> None:
        self.step = step
        self.slots: list[KernelOperand] = []
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
        self.slots.append(KernelOperand(kind, index, dtype))
        return f"a.operand[{len(self.slots) - 1}]"

    def buffer(self, name: str, ctype: str) -> str:
        declaration = f"alignas(64) {ctype} {name}[BLOCK];"
        if declaration not in self.buffers:
            self.buffers.append(declaration)
        return name

    def _constant(self, expression: Expression) -> None:
        ctype = C_TYPES[expression.dtype]
        if expression.value in _WRITTEN:
            self.names[expression] = f"({ctype}){expression.value!r}"
            return
        index = self.literals.setdefault(expression.value, len(self.literals))
        self.names[expression] = f"k{expression.number}"
        self.hoisted.append(f"const {ctype} k{expression.number} = ({ctype})a.literal[{index}];")

    def _scalar(self, expression: Expression) -> None:
        ctype, memory = C_TYPES[expression.dtype], MEMORY_TYPES[self.step.operands[expression.index]]
        operand = self.slot("operand", expression.index, self.step.operands[expression.index])
        name = f"s{expression.index}"
        self.hoisted.append(f"const {ctype} {name} = widened<{ctype}, {memory}>(*(const {memory} *){operand}.data);")
        self.names[expression] = name

    def load(self, expression: Expression, operand: str, memory: str, t: str, name: str) -> tuple[str, str]:
        """A step of a sequence: `(declaration of its pointer, name of the pointer)`.

        Args:
            expression: stands for it.
            operand: text of the operand.
            memory: its dtype in memory.
            t: text of the time step.
            name: of the pointer.
        """
        ctype = C_TYPES[expression.dtype]
        buffer = self.buffer(f"{name}_block", ctype)
        line = (
            f"const {ctype} *RESTRICT {name} = "
            f"Loader<{MEMORY_TYPES[memory]}, {ctype}>::at({buffer}, {operand}, a, {t}, start, n);"
        )
        return line, name

    def load_invariant(self, expression: Expression) -> tuple[str, str]:
        """As `load` for an operand that does not change with time; one that repeats is copied for the first block."""
        memory, ctype = self.step.operands[expression.index], C_TYPES[expression.dtype]
        operand, name = self.slot("operand", expression.index, memory), f"operand{expression.index}"
        buffer = self.buffer(f"{name}_block", ctype)
        loader = f"Loader<{MEMORY_TYPES[memory]}, {ctype}>::at({buffer}, {operand}, a, 0, start, n)"
        self.hoisted.append(f"const bool {name}_repeats = repeats({operand}, a);")
        line = f"const {ctype} *RESTRICT {name} = k > first && {name}_repeats ? {buffer} : {loader};"
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
            name = self.buffer(f"once{expression.number}", C_TYPES[expression.dtype])
            body, names = self.body([expression], at_hand)
            again = " && ".join(f"{leaf}_repeats" for leaf in sorted(leaves[expression]))
            lines.append(f"if (k == first || !({again})) for (i64 i = 0; i < n; i++) {{")
            lines += indented([*body, f"{name}[i] = {names[expression]};"], 1)
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
                    lines.append(f"const {C_TYPES[expression.dtype]} {name} = {at_hand[expression]};")
                    names[expression] = name
                continue
            text = _text(expression, [names[o] for o in expression.operands])
            if expression.dtype == "bool":
                names[expression] = text  # in place: a variable of type bool keeps g++ from vectorising
            else:
                names[expression] = f"e{expression.number}"
                lines.append(f"const {C_TYPES[expression.dtype]} {names[expression]} = {text};")
        return lines, names

    def target(self, operand: str, memory: str, dtype: str, t: str, name: str) -> tuple[str, str]:
        """Where the values of a step are written, the pointer `name`: `(declaration, what follows the loop)`."""
        ctype = C_TYPES[dtype]
        if MEMORY_TYPES[memory] == ctype and dtype != "bool":
            return f"{ctype} *RESTRICT {name} = ({ctype} *){operand}.data + {t} * {operand}.time + start;", ""
        self.buffer(name, ctype)
        return "", f"store<{MEMORY_TYPES[memory]}, {ctype}>({operand}, {t}, start, n, {name});"

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
            *indented(self.buffers, 1),
            *indented(self.hoisted, 1),
            "  const i64 first = blocks * number / parts;",
            "  for (i64 k = first; k < blocks * (number + 1) / parts; k++) {",
            "    const i64 start = k * a.block, n = a.E - start < a.block ? a.E - start : a.block;",
            *indented(per_block, 2),
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


def _text(expression: Expression, operands: list[str]) -> str:
    """One operation in C++."""
    op, ctype = expression.op, C_TYPES[expression.dtype]
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


def indented(lines: Iterable[str], depth: int) -> list[str]:
    return ["  " * depth + line for line in lines]
