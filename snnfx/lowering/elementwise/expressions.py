"""Expressions of one element: the intermediate representation between front end and back ends.

The front end (`aten_recording`, `translation`) translates a recorded step to a `StepExpressions`; a back end (`cpp`,
`triton`) turns it into a kernel for whole sequences. Expressions are independent of tensors, modules and devices.

An expression is a node of a directed acyclic graph. A `Builder` makes the nodes and returns the same object for the
same expression (hash consing). All elements of a step `[N, *]` are computed by the same expressions from the leaves at
their position:

| leaf          | value                                                                                      |
|---------------|--------------------------------------------------------------------------------------------|
| `sequence`    | input number `index` at this time step, `[T, N, *]` or broadcastable to it                 |
| `invariant`   | operand number `index`, the same at every step, `[N, *]` or broadcastable to it            |
| `scalar`      | operand number `index`, one number for all steps and elements                              |
| `state`       | state number `index` before this step                                                      |
| `grad_output` | derivative of the loss with respect to output number `index` at this step                  |
| `grad_state`  | derivative of the loss with respect to state number `index` after this step                |
| `constant`    | the number `value`                                                                         |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = [
    "GRADIENT_LEAVES",
    "INTEGERS",
    "LEAVES",
    "Builder",
    "Expression",
    "StepExpressions",
    "is_leaf",
    "topological",
]

LEAVES = ("sequence", "invariant", "scalar", "state", "grad_output", "grad_state", "constant")
GRADIENT_LEAVES = ("grad_output", "grad_state")
INTEGERS = ("int32", "int64")
"""Integer dtypes, computed exactly and modulo their size, as in PyTorch."""


@dataclass(frozen=True, eq=False)
class Expression:
    """One node of the expression graph.

    Args:
        op: one of `LEAVES` or `OPERATIONS`.
        operands: its operands.
        dtype: "float32", "float64", "int32", "int64" or "bool"; half precision is computed in float32.
        index: for a leaf, the number of the input, operand, state or output.
        value: for a constant, its value.
        number: its position in the order of creation; operands have smaller numbers.
    """

    op: str
    operands: tuple[Expression, ...]
    dtype: str
    index: int = -1
    value: float = 0.0
    number: int = 0

    def __repr__(self) -> str:
        if self.op == "constant":
            return repr(self.value)
        if self.op in LEAVES:
            return f"{self.op}{self.index}"
        return f"{self.op}({', '.join(map(repr, self.operands))})"


OPERATIONS: dict[str, int] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "maximum", "minimum", "fmod", "atan2"), 2),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor"), 2),
    **dict.fromkeys(("neg", "abs", "sign", "not", "cast", "isnan", "floor", "ceil", "trunc", "round"), 1),
    **dict.fromkeys(("sqrt", "exp", "expm1", "log", "log1p", "sigmoid", "tanh", "atan", "erf"), 1),
    **dict.fromkeys(("sin", "cos", "tan", "asin", "acos", "sinh", "cosh", "log2", "log10", "exp2", "erfc"), 1),
    "where": 3,
}
"""Operations and the number of their operands. All but comparisons propagate NaN, as in PyTorch."""

_FOLDED: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "abs": abs,
}


class Builder:
    """Makes expressions; equal expressions are the same object.

    Args:
        simplify: whether to remove operations without effect, such as `x * 1`.
    """

    def __init__(self, simplify: bool = True) -> None:
        self.simplify = simplify
        self._made: dict[tuple[object, ...], Expression] = {}

    def _intern(
        self, op: str, operands: tuple[Expression, ...], dtype: str, index: int = -1, value: float = 0.0
    ) -> Expression:
        # `repr` distinguishes 0.0 from -0.0, and makes NaN equal to itself.
        key = (op, tuple(map(id, operands)), dtype, index, repr(value))
        if key not in self._made:
            self._made[key] = Expression(op, operands, dtype, index, value, len(self._made))
        return self._made[key]

    def leaf(self, op: str, index: int, dtype: str) -> Expression:
        """A leaf that reads a value of this element."""
        return self._intern(op, (), dtype, index)

    def constant(self, value: float, dtype: str) -> Expression:
        """A number."""
        return self._intern("constant", (), dtype, value=float(value))

    def cast(self, operand: Expression, dtype: str) -> Expression:
        """An expression converted to another dtype."""
        if operand.dtype == dtype:
            return operand
        if operand.op == "constant":
            value = operand.value if dtype != "bool" else float(operand.value != 0)
            return self.constant(value, dtype)
        if dtype == "bool":
            return self.make("ne", (operand, self.constant(0.0, operand.dtype)), "bool")
        return self._intern("cast", (operand,), dtype)

    def make(self, op: str, operands: Sequence[Expression], dtype: str) -> Expression:
        """An operation, simplified if the value stays bitwise the same."""
        operands = tuple(operands)
        assert len(operands) == OPERATIONS[op], (op, operands)
        same = self._identity(op, operands) if self.simplify else None
        if same is not None:
            return same
        if self.simplify and op in _FOLDED and dtype == "float64" and all(o.op == "constant" for o in operands):
            return self.constant(_FOLDED[op](*(o.value for o in operands)), dtype)
        return self._intern(op, operands, dtype)

    def _identity(self, op: str, operands: tuple[Expression, ...]) -> Expression | None:
        if op == "neg" and operands[0].op == "neg":
            return operands[0].operands[0]
        if op == "where" and operands[1] is operands[2]:
            return operands[1]
        if len(operands) != 2:
            return None
        a, b = operands
        if op in ("mul", "div") and _is(b, 1.0):
            return a
        if op == "mul" and _is(a, 1.0):
            return b
        if op == "sub" and _is(b, 0.0):
            return a
        return None


def _is(expression: Expression, value: float) -> bool:
    if expression.op != "constant" or expression.value != value:
        return False
    return math.copysign(1.0, expression.value) == math.copysign(1.0, value)


def is_leaf(expression: Expression) -> bool:
    """Whether an expression is a leaf."""
    return expression.op in LEAVES


def topological(roots: Iterable[Expression], stop: Iterable[Expression] = ()) -> list[Expression]:
    """The roots and all expressions that they are computed from, in topological order.

    Args:
        roots: the expressions to compute.
        stop: expressions that are known; they are included if needed, but their operands are not.
    """
    known = set(stop)
    visited: set[Expression] = set()
    stack = list(roots)
    while stack:
        expression = stack.pop()
        if expression not in visited:
            visited.add(expression)
            if expression not in known:
                stack.extend(expression.operands)
    return sorted(visited, key=lambda e: e.number)


@dataclass(frozen=True)
class StepExpressions:
    """One time step, forward and backward.

    Args:
        sequences: dtype in memory of each input, e.g. "bfloat16"; "unused": read for its size only.
        operands: dtype in memory of each operand that does not change with time.
        scalars: which of the operands are one number.
        state_dtypes: dtype in memory of each state.
        output_dtypes: dtype in memory of each output.
        outputs: the outputs of the step.
        next_states: the states after the step.
        grad_sequences: the gradient of each input, or None.
        grad_states: the gradient of each state before the step, or None.
        sums: expressions to sum over all steps, from which the gradients of constants are computed.
        total: for each of `sums`, whether to sum over all elements as well.
    """

    sequences: tuple[str, ...]
    operands: tuple[str, ...]
    scalars: tuple[bool, ...]
    state_dtypes: tuple[str, ...]
    output_dtypes: tuple[str, ...]
    outputs: tuple[Expression, ...]
    next_states: tuple[Expression, ...]
    grad_sequences: tuple[Expression | None, ...] = ()
    grad_states: tuple[Expression | None, ...] = ()
    sums: tuple[Expression, ...] = ()
    total: tuple[bool, ...] = field(default=())

    def memory_of(self, leaf: Expression) -> str:
        """The dtype in memory of an input, or of the gradient of an output."""
        return (self.sequences if leaf.op == "sequence" else self.output_dtypes)[leaf.index]

    def __str__(self) -> str:
        names: dict[Expression, str] = {}
        lines: list[str] = []
        gradients = [g for g in (*self.grad_sequences, *self.grad_states, *self.sums) if g is not None]
        for expression in topological([*self.outputs, *self.next_states, *gradients]):
            if is_leaf(expression):
                names[expression] = repr(expression)
                continue
            names[expression] = f"e{len(lines)}"
            operands = ", ".join(names[o] for o in expression.operands)
            lines.append(f"{names[expression]}: {expression.dtype} = {expression.op}({operands})")

        def listed(values: Iterable[Expression | None]) -> str:
            return ", ".join("none" if v is None else names[v] for v in values)

        lines.append(f"outputs {listed(self.outputs)}")
        lines.append(f"next states {listed(self.next_states)}")
        lines.append(f"gradients of inputs {listed(self.grad_sequences)}")
        lines.append(f"gradients of states {listed(self.grad_states)}")
        lines.append(f"sums {listed(self.sums)} {self.total}")
        return "\n".join(lines)
