"""Write the C++ text of operands, arrays of a block, and expressions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from snnfx.lowering.elementwise.back_end import KernelOperand
from snnfx.lowering.elementwise.cpp.cpp_prelude import BITS, PRELUDE
from snnfx.lowering.elementwise.expressions import INTEGERS, Expression, StepExpressions, topological
from snnfx.lowering.elementwise.operand_layout import MAX_DIMS

__all__ = ["C_TYPES", "MEMORY_TYPES", "CppWriter", "KernelSource", "indented"]

C_TYPES = {"float32": "float", "float64": "double", "int32": "int32_t", "int64": "i64", "bool": "float"}
MEMORY_TYPES = {
    "float16": "f16",
    "bfloat16": "bf16",
    "float32": "float",
    "float64": "double",
    "int32": "int32_t",
    "int64": "i64",
    "bool": "uint8_t",
}
_INLINE_NUMBERS = (0.0, 1.0, -1.0, 2.0, 0.5)
"""Numbers that are literals in the source; all others are arguments, so that changing them builds nothing."""

_UNSIGNED = {"int32": "uint32_t", "int64": "uint64_t"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {"and": "&", "or": "|", "xor": "^"}
_ROUNDED = {"sqrt": "rooted", "abs": "absolute"}
_BLOCK_BYTES = 65536
"""Bytes of one array of a block, at most; `launch` uses shorter blocks if they are faster."""

_STACK_BYTES = 8 * _BLOCK_BYTES
"""Bytes of all arrays of a block, at most: threads have small stacks."""


@dataclass(frozen=True)
class KernelSource:
    """A generated kernel.

    Args:
        text: C++, with the entry points `run(const Args *)` and `run_part(const Args *, part, parts)`.
        slots: its operands, in order.
        literals: the numbers that are passed as arguments.
        block: maximum number of elements of a block, a power of two.
    """

    text: str
    slots: tuple[KernelOperand, ...]
    literals: tuple[float, ...]
    block: int


class CppWriter:
    """Collects the parts of a kernel's source."""

    def __init__(self, step: StepExpressions, roots: Iterable[Expression]) -> None:
        self.step = step
        self.slots: list[KernelOperand] = []
        self.literals: dict[float, int] = {}
        self.buffers: list[str] = []
        self.hoisted: list[str] = []
        self.names: dict[Expression, str] = {}
        used = topological(roots)
        self.wide = any(e.dtype in ("float64", "int64") for e in used)
        for expression in used:
            if expression.op == "constant":
                self._constant(expression)
            elif expression.op == "scalar":
                self._scalar(expression)

    def slot(self, kind: str, index: int, dtype: str) -> str:
        """Add an operand; return its C++ text."""
        self.slots.append(KernelOperand(kind, index, dtype))
        return f"a.operand[{len(self.slots) - 1}]"

    def buffer(self, name: str, ctype: str) -> str:
        """Declare an array of the block; return its name."""
        declaration = f"alignas(64) {ctype} {name}[BLOCK];"
        if declaration not in self.buffers:
            self.buffers.append(declaration)
        return name

    def _constant(self, expression: Expression) -> None:
        ctype = C_TYPES[expression.dtype]
        if expression.value in _INLINE_NUMBERS:
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
        """Load one step of an operand: `(declaration of a pointer to its values, name of the pointer)`.

        Args:
            expression: the leaf that reads the operand.
            operand: the C++ text of the operand.
            memory: its dtype in memory.
            t: the C++ text of the time step.
            name: the name of the pointer.
        """
        ctype = C_TYPES[expression.dtype]
        buffer = self.buffer(f"{name}_block", ctype)
        line = (
            f"const {ctype} *RESTRICT {name} = "
            f"Loader<{MEMORY_TYPES[memory]}, {ctype}>::at({buffer}, {operand}, a, {t}, start, n);"
        )
        return line, name

    def load_invariant(self, expression: Expression) -> tuple[str, str]:
        """Like `load`, for an operand that does not change with time; one that repeats is copied only once."""
        memory, ctype = self.step.operands[expression.index], C_TYPES[expression.dtype]
        operand, name = self.slot("operand", expression.index, memory), f"operand{expression.index}"
        buffer = self.buffer(f"{name}_block", ctype)
        loader = f"Loader<{MEMORY_TYPES[memory]}, {ctype}>::at({buffer}, {operand}, a, 0, start, n)"
        self.hoisted.append(f"const bool {name}_repeats = repeats({operand}, a);")
        line = f"const {ctype} *RESTRICT {name} = k > first && {name}_repeats ? {buffer} : {loader};"
        return line, name

    def hoist(
        self, roots: Sequence[Expression], texts: dict[Expression, str], saved: Iterable[Expression] = ()
    ) -> list[str]:
        """Hoist expressions that do not change with time: lines that compute them once per block.

        Args:
            roots: the expressions that each step computes.
            texts: the C++ text of the invariant leaves; the hoisted expressions are added.
            saved: values of each step that are read from memory.
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
            body, names = self.body([expression], texts)
            repeats = " && ".join(f"{leaf}_repeats" for leaf in sorted(leaves[expression]))
            lines.append(f"if (k == first || !({repeats})) for (i64 i = 0; i < n; i++) {{")
            lines += indented([*body, f"{name}[i] = {names[expression]};"], 1)
            lines.append("}")
            texts[expression] = f"{name}[i]"
        return lines

    def read(self, expression: Expression, pointer: str) -> str:
        return f"({pointer}[i] != 0)" if expression.dtype == "bool" else f"{pointer}[i]"

    def body(
        self, roots: Sequence[Expression], texts: dict[Expression, str]
    ) -> tuple[list[str], dict[Expression, str]]:
        """The lines that compute expressions of one element, and the C++ name of each."""
        names = {**self.names, **texts}
        lines: list[str] = []
        for expression in topological(roots, names):
            if expression in names and expression not in texts:
                continue
            if expression in texts:
                if expression.dtype != "bool":
                    name = f"e{expression.number}"
                    lines.append(f"const {C_TYPES[expression.dtype]} {name} = {texts[expression]};")
                    names[expression] = name
                continue
            text = _text(expression, [names[o] for o in expression.operands])
            if expression.dtype == "bool":
                names[expression] = text  # inlined: a variable of type bool keeps g++ from vectorising
            else:
                names[expression] = f"e{expression.number}"
                lines.append(f"const {C_TYPES[expression.dtype]} {names[expression]} = {text};")
        return lines, names

    def target(self, operand: str, memory: str, dtype: str, t: str, name: str) -> tuple[str, str]:
        """The pointer `name` to which a step writes an operand: `(declaration, line after the loop)`."""
        ctype = C_TYPES[dtype]
        if memory == "bits":
            self.buffer(name, ctype)
            return "", f"store_bits<{ctype}>({operand}, a, {t}, start, n, {name});"
        if MEMORY_TYPES[memory] == ctype and dtype != "bool":
            return f"{ctype} *RESTRICT {name} = ({ctype} *){operand}.data + {t} * {operand}.time + start;", ""
        self.buffer(name, ctype)
        return "", f"store<{MEMORY_TYPES[memory]}, {ctype}>({operand}, {t}, start, n, {name});"

    def source(self, per_block: list[str]) -> KernelSource:
        """The complete source, given the lines that run for each block."""
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
            *([BITS] if any(slot.dtype == "bits" for slot in self.slots) else []),
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
    """The C++ text of one operation."""
    op, ctype = expression.op, C_TYPES[expression.dtype]
    if expression.dtype in INTEGERS and op in ("add", "sub", "mul", "neg"):
        # Unsigned, because an overflow of signed integers is undefined in C++.
        parts = [f"({_UNSIGNED[expression.dtype]}){o}" for o in operands]
        return f"({ctype})(-{parts[0]})" if op == "neg" else f"({ctype})({parts[0]} {_INFIX[op]} {parts[1]})"
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
    """Lines of C++, indented."""
    return ["  " * depth + line for line in lines]
