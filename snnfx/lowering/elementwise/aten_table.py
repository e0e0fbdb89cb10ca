"""Translation rules of element-wise ATen operators.

A rule takes the `RuleContext` of a call and returns the expression of its result. An operator without a rule is not
known to be element-wise; `decomposition` finds operators that PyTorch decomposes into others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from snnfx.lowering.aten_recording import AtenCall, LoweringRefused, RecordedValue, ValueReference
from snnfx.lowering.elementwise.batch_norm import DECOMPOSITIONS
from snnfx.lowering.elementwise.expressions import INTEGERS, Builder, Expression
from snnfx.ops.operator_lookup import traits_of_function
from snnfx.ops.traits import OperatorTraits
from snnfx.sandbox.torch_internals import decompositions

__all__ = ["ELEMENTWISE", "RuleContext", "compute_dtype", "decomposition", "moves_values"]

_COMPUTE = {
    torch.float16: "float32",
    torch.bfloat16: "float32",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.bool: "bool",
}
_ON_INTEGERS = frozenset("add sub mul neg abs sign maximum minimum where cast fmod div".split())
"""Operations on integers whose result is an integer; division is by a positive number only."""
_LARGEST_NUMBER = 2**53
"""Kernels take numbers as float64, which represents integers up to this one exactly."""


def compute_dtype(dtype: torch.dtype) -> str:
    """The dtype in which kernels compute a value of a dtype."""
    if dtype not in _COMPUTE:
        raise LoweringRefused(f"it computes in {str(dtype).removeprefix('torch.')}")
    return _COMPUTE[dtype]


class RuleContext:
    """A call and its arguments, as expressions in a dtype, for its translation rule."""

    def __init__(
        self,
        call: AtenCall,
        result: RecordedValue,
        values: list[RecordedValue],
        builder: Builder,
        expression: Callable[[int], Expression],
    ) -> None:
        self.call, self.result, self.values, self.builder, self.expression = call, result, values, builder, expression
        self.names = [a.name for a in call.target._schema.arguments]

    @property
    def dtype(self) -> str:
        return compute_dtype(self.result.dtype)

    def raw(self, position: int | str, default: Any = None) -> Any:
        """An argument of the recorded call, by position or name."""
        if isinstance(position, str):
            if position in self.call.kwargs:
                return self.call.kwargs[position]
            position = self.names.index(position) if position in self.names else len(self.call.args)
        if position < len(self.call.args):
            return self.call.args[position]
        name = self.names[position] if position < len(self.names) else ""
        return self.call.kwargs.get(name, default)

    def operand(self, position: int | str, dtype: str | None = None) -> Expression:
        """An argument as an expression in a dtype (default: the dtype of the result)."""
        return self.of(self.raw(position), dtype or self.dtype)

    def of(self, argument: Any, dtype: str) -> Expression:
        if isinstance(argument, ValueReference):
            return self.builder.cast(self.expression(argument.number), dtype)
        if isinstance(argument, int) and abs(argument) > _LARGEST_NUMBER:
            raise LoweringRefused(f"`{self.call.name}` takes the integer {argument}, which float64 does not represent")
        if isinstance(argument, bool | int | float):
            return self.builder.constant(float(argument), dtype)
        raise LoweringRefused(f"`{self.call.name}` takes a {type(argument).__name__}")

    def number(self, value: float) -> Expression:
        return self.builder.constant(value, self.dtype)

    def make(self, op: str, *operands: Expression, dtype: str | None = None) -> Expression:
        dtype = dtype or self.dtype
        if dtype in INTEGERS:
            divides = op in ("fmod", "div")
            if op not in _ON_INTEGERS or (divides and not (operands[1].op == "constant" and operands[1].value > 0)):
                raise LoweringRefused(f"`{self.call.name}` computes with integers")
        return self.builder.make(op, operands, dtype)

    def common_dtype(self) -> str:
        """The dtype of a comparison: tensors with dimensions take precedence over 0-d tensors and numbers."""
        ranked: list[tuple[int, torch.dtype]] = []
        for argument in (self.raw(0), self.raw(1)):
            if isinstance(argument, ValueReference):
                value = self.values[argument.number]
                ranked.append((1 if value.shape else 0, value.dtype))
        best = max(rank for rank, _ in ranked)
        dtype = ranked[0][1] if len(ranked) == 1 else None
        for rank, candidate in ranked:
            if rank == best or not dtype:
                dtype = candidate if dtype is None else torch.promote_types(dtype, candidate)
        assert dtype is not None
        if not dtype.is_floating_point:
            if any(isinstance(self.raw(i), float) for i in (0, 1)):
                return compute_dtype(torch.get_default_dtype())
            if any(type(self.raw(i)) is int for i in (0, 1)) and dtype == torch.bool:
                return "int64"
            if dtype != torch.bool:
                return _COMPUTE.get(dtype, "float64")
        return "float32" if dtype == torch.bool else compute_dtype(dtype)


Rule = Callable[[RuleContext], Expression]


def _unary(op: str) -> Rule:
    return lambda s: s.make(op, s.operand(0))


def _binary(op: str) -> Rule:
    return lambda s: s.make(op, s.operand(0), s.operand(1))


def _compare(op: str) -> Rule:
    def rule(s: RuleContext) -> Expression:
        dtype = s.common_dtype()
        return s.make(op, s.operand(0, dtype), s.operand(1, dtype), dtype="bool")

    return rule


def _logical(op: str) -> Rule:
    return lambda s: s.make(op, *(s.operand(i, "bool") for i in range(1 if op == "not" else 2)), dtype="bool")


def _bitwise(op: str) -> Rule:
    def rule(s: RuleContext) -> Expression:
        if s.dtype != "bool":
            raise LoweringRefused("it computes with integers")
        return _logical(op)(s)

    return rule


def _scaled(s: RuleContext, position: int) -> Expression:
    alpha = s.raw("alpha", 1)
    operand = s.operand(position)
    return operand if alpha == 1 else s.make("mul", operand, s.number(alpha))


def _div(s: RuleContext) -> Expression:
    quotient = s.make("div", s.operand(0), s.operand(1))
    mode = s.raw("rounding_mode")
    if s.dtype in INTEGERS:
        return quotient if mode == "trunc" else _rounded_down(s, quotient)
    return quotient if mode is None else s.make(mode, quotient)


def _rounded_down(s: RuleContext, quotient: Expression) -> Expression:
    """The quotient of integers, rounded down instead of towards zero; the divisor is positive."""
    rest = s.make("fmod", s.operand(0), s.operand(1))
    is_negative = s.make("lt", rest, s.number(0.0), dtype="bool")
    return s.make("where", is_negative, s.make("sub", quotient, s.number(1.0)), quotient)


def _floor_divide(s: RuleContext) -> Expression:
    if s.dtype not in INTEGERS:
        raise LoweringRefused("`floor_divide` is not known to be element-wise")
    return _rounded_down(s, s.make("div", s.operand(0), s.operand(1)))


def _pow(s: RuleContext) -> Expression:
    base, exponent = s.operand(0), s.raw(1)
    if isinstance(exponent, int | float) and exponent in (1, 2, 3, 0.5, -1):
        if exponent == 0.5:
            return s.make("sqrt", base)
        if exponent == -1:
            return s.make("div", s.number(1.0), base)
        power = base
        for _ in range(int(exponent) - 1):
            power = s.make("mul", power, base)
        return power
    return s.make("pow", base, s.operand(1))


def _clamp(s: RuleContext) -> Expression:
    low, high = s.raw("min"), s.raw("max")
    value = s.operand(0)
    if low is not None:
        value = s.make("maximum", value, s.of(low, s.dtype))
    return value if high is None else s.make("minimum", value, s.of(high, s.dtype))


def _where(s: RuleContext) -> Expression:
    return s.make("where", s.operand(0, "bool"), s.operand(1), s.operand(2))


def _masked_fill(s: RuleContext) -> Expression:
    return s.make("where", s.operand(1, "bool"), s.operand(2), s.operand(0))


def _heaviside(s: RuleContext) -> Expression:
    x = s.operand(0)
    zero = s.number(0.0)
    step = s.make("cast", s.make("gt", x, zero, dtype="bool")) if s.dtype != "bool" else s.make("gt", x, zero)
    at_zero = s.make("where", s.make("eq", x, zero, dtype="bool"), s.operand(1), step)
    return s.make("where", s.make("isnan", x, dtype="bool"), x, at_zero)


def _fill(value: float | None, position: int = 1) -> Rule:
    def rule(s: RuleContext) -> Expression:
        return s.of(s.raw(position) if value is None else value, s.dtype)

    return rule


def _sigmoid_backward(s: RuleContext) -> Expression:
    grad, y = s.operand(0), s.operand(1)
    return s.make("mul", grad, s.make("mul", s.make("sub", s.number(1.0), y), y))


def _tanh_backward(s: RuleContext) -> Expression:
    grad, y = s.operand(0), s.operand(1)
    return s.make("mul", grad, s.make("sub", s.number(1.0), s.make("mul", y, y)))


def _threshold_backward(s: RuleContext) -> Expression:
    below = s.make("le", s.operand(1), s.operand(2), dtype="bool")
    return s.make("where", below, s.number(0.0), s.operand(0))


def _addcmul(op: str) -> Rule:
    def rule(s: RuleContext) -> Expression:
        product = s.make(op, s.operand(1), s.operand(2))
        value = s.raw("value", 1)
        return s.make("add", s.operand(0), product if value == 1 else s.make("mul", s.number(value), product))

    return rule


def _lerp(s: RuleContext) -> Expression:
    start, end, weight = s.operand(0), s.operand(1), s.operand(2)
    return s.make("add", start, s.make("mul", weight, s.make("sub", end, start)))


def _remainder(s: RuleContext) -> Expression:
    a, b = s.operand(0), s.operand(1)
    rest = s.make("fmod", a, b)
    zero = s.number(0.0)
    other_sign = s.make("ne", s.make("lt", rest, zero, dtype="bool"), s.make("lt", b, zero, dtype="bool"), dtype="bool")
    wrong = s.make("and", s.make("ne", rest, zero, dtype="bool"), other_sign, dtype="bool")
    return s.make("where", wrong, s.make("add", rest, b), rest)


def _reciprocal(s: RuleContext) -> Expression:
    return s.make("div", s.number(1.0), s.operand(0))


def _rsqrt(s: RuleContext) -> Expression:
    return s.make("div", s.number(1.0), s.make("sqrt", s.operand(0)))


def _square(s: RuleContext) -> Expression:
    return s.make("mul", s.operand(0), s.operand(0))


def moves_values(traits: OperatorTraits) -> bool:
    """Whether an operator only moves or copies values; `translate` checks that each value keeps its position."""
    return traits.in_order or bool(traits.view)


ELEMENTWISE: dict[str, Rule] = {
    "add": lambda s: s.make("add", s.operand(0), _scaled(s, 1)),
    "sub": lambda s: s.make("sub", s.operand(0), _scaled(s, 1)),
    "rsub": lambda s: s.make("sub", s.operand(1), _scaled(s, 0)),
    "mul": lambda s: s.make("and" if s.dtype == "bool" else "mul", s.operand(0), s.operand(1)),
    "div": _div,
    "pow": _pow,
    "square": _square,
    "reciprocal": _reciprocal,
    "rsqrt": _rsqrt,
    "clamp": _clamp,
    "clamp_min": lambda s: s.make("maximum", s.operand(0), s.operand(1)),
    "clamp_max": lambda s: s.make("minimum", s.operand(0), s.operand(1)),
    "relu": lambda s: s.make("maximum", s.operand(0), s.number(0.0)),
    "where": _where,
    "masked_fill": _masked_fill,
    "heaviside": _heaviside,
    "sigmoid_backward": _sigmoid_backward,
    "tanh_backward": _tanh_backward,
    "threshold_backward": _threshold_backward,
    "addcmul": _addcmul("mul"),
    "addcdiv": _addcmul("div"),
    "lerp": _lerp,
    "remainder": _remainder,
    "floor_divide": _floor_divide,
    "copy": lambda s: s.operand(1),
    "copy_": lambda s: s.operand(1),
    "zeros_like": _fill(0.0),
    "new_zeros": _fill(0.0),
    "zeros": _fill(0.0),
    "zero": _fill(0.0),
    "ones_like": _fill(1.0),
    "new_ones": _fill(1.0),
    "ones": _fill(1.0),
    "full_like": _fill(None),
    "full": _fill(None),
    "new_full": _fill(None, 2),
    "scalar_tensor": _fill(None, 0),
    "fill": _fill(None),
    "sgn": _unary("sign"),
    "rrelu_with_noise": lambda s: _refuse("it draws random numbers"),
    **{name: _unary(name) for name in "neg abs sign floor ceil trunc round sqrt exp expm1 exp2 log log1p log2".split()},
    **{name: _unary(name) for name in "log10 sigmoid tanh atan erf erfc sin cos tan asin acos sinh cosh".split()},
    **{name: _binary(name) for name in "maximum minimum fmod atan2".split()},
    **{name: _compare(name) for name in "eq ne lt le gt ge".split()},
    **{f"logical_{name}": _logical(name) for name in "and or xor not".split()},
    **{f"bitwise_{name}": _bitwise(name) for name in "and or xor not".split()},
    "isnan": lambda s: s.make("isnan", s.operand(0, compute_dtype(s.values[s.raw(0).number].dtype)), dtype="bool"),
    **{f"__{name}__": _bitwise(name) for name in "and or xor".split()},
}


def _refuse(why: str) -> Expression:
    raise LoweringRefused(why)


_KNOWN = ELEMENTWISE.keys() | {"sum", "mean", "item", "_local_scalar_dense", "empty_like", "empty"}


def decomposition(func: Any) -> Callable[..., Any] | None:
    """The decomposition of an element-wise operator without a rule (softplus, gelu, ...), or None."""
    traits = traits_of_function(func)
    if traits.decomposition is not None:
        return traits.decomposition
    name = str(func._schema.name).partition("::")[2]
    if name in DECOMPOSITIONS:
        return DECOMPOSITIONS[name]
    if name in _KNOWN or name.rstrip("_") in _KNOWN or moves_values(traits):
        return None
    # The backward passes of pointwise operators are not tagged.
    if not traits.elementwise and not name.endswith("_backward"):
        return None
    return decompositions().get(func)
