"""Example values of nodes: fake tensors with the shape and dtype of each value of one step."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.capture.input_output_checks import refusal_of_nested_tensor
from snnfx.capture.patches import plain_isinstance
from snnfx.capture.proxy import UNKNOWN
from snnfx.capture.recorder import Recorder
from snnfx.capture.unrecorded_draws import UnrecordedDraws
from snnfx.capture.unsupported_modules import is_converted_net
from snnfx.errors import CaptureError
from snnfx.ir.facts import VALUE, WHERE
from snnfx.ir.printing import operation_name
from snnfx.ir.program import SELF_TARGET, START_PREFIX
from snnfx.sandbox.torch_internals import (
    BatchNormBase,
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    NormBase,
    UnsupportedOperatorException,
    disable_dispatch_modes,
)
from snnfx.sandbox.user_code import format_location
from snnfx.state.leaf_modules import call_leaf, has_torch_forward
from snnfx.state.step_calls import call_opaque

__all__ = ["NOT_EVALUATED", "ExampleValues"]

NOT_EVALUATED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""Raised by fake tensors for results that depend on values."""


class ExampleValues:
    """Evaluates each node when it is recorded; its example value is `node.meta["val"]`.

    Args:
        recorder: records the step.
        mode: the fake tensor mode of the example values; None without example inputs, so that no value is known.
        draws: detects random numbers that the step draws.
    """

    def __init__(self, recorder: Recorder, mode: FakeTensorMode | None, draws: UnrecordedDraws) -> None:
        self.recorder, self.mode, self.draws = recorder, mode, draws
        self._value_of_next: Any = UNKNOWN

    def evaluate(self, node: Node) -> None:
        """Compute the value of a new node if the values of its arguments are known."""
        if self.mode is None or node.op in ("placeholder", "output") or VALUE.is_known(node):
            return
        if node.target is call_opaque and is_converted_net(self._resolve(str(node.args[0].target))):  # type: ignore[union-attr]
            return  # it would be captured anew for the fake tensors
        if node.op in ("call_function", "call_method") and self._value_of_next is not UNKNOWN:
            node.meta["val"], self._value_of_next = self._value_of_next, UNKNOWN
            return
        if node.op == "get_attr":
            value = self._resolve(str(node.target))
            if isinstance(value, Tensor) and value.is_nested:
                raise refusal_of_nested_tensor(str(node.target), format_location(WHERE.of(node)))
            self._record_value(node, lambda: self._fake(value))
            return
        unknown = False

        def load(n: Node) -> Any:
            nonlocal unknown
            unknown = unknown or not VALUE.is_known(n)
            return VALUE.of(n)

        args, kwargs = fx.map_arg((node.args, node.kwargs), load)
        if unknown:
            return
        whole, index = cast("tuple[Any, Any]", args) if node.target is operator.getitem else (None, 0)
        if isinstance(whole, tuple) and index in range(len(whole)):
            VALUE.set(node, whole[index])  # usually the result of a stateful call
        elif node.op == "call_module":
            module = self._resolve(str(node.target))
            self._record_value(node, lambda: _call_for_shape(module, args, kwargs))
        elif node.op == "call_method":
            self._record_value(node, lambda *args: getattr(args[0], str(node.target))(*args[1:], **kwargs), args)
        else:
            if node.target is _FULL:
                args, kwargs = _with_any_number(args, kwargs)
            with self.draws.allowed_in(getattr(node.target, "__module__", None) or "builtins"):
                self._record_value(node, lambda *args: node.target(*args, **kwargs), args)  # type: ignore[operator]

    @contextlib.contextmanager
    def already_evaluated(self, value: Any) -> Iterator[None]:
        """Use `value` for the next node recorded, unless it is UNKNOWN."""
        before, self._value_of_next = self._value_of_next, value
        try:
            yield
        finally:
            self._value_of_next = before

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run Python on example values: nothing is recorded, and modules are called directly."""
        recorder = self.recorder
        before, recorder.is_evaluating = recorder.is_evaluating, True
        try:
            mode = contextlib.nullcontext() if self.mode is None else _only(self.mode)
            with self.draws.unobserved(), plain_isinstance(), mode, torch.no_grad():
                yield
        finally:
            recorder.is_evaluating = before

    def _record_value(self, node: Node, compute: Callable[..., Any], operands: tuple[Any, ...] = ()) -> None:
        try:
            with self.evaluating():
                VALUE.set(node, compute(*operands))
        except NOT_EVALUATED:
            return
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if self._takes_contiguous_operands(compute, operands):
                self._refuse_memory_format(node, error)
            raise CaptureError(
                "SNNFX201",
                f"one step on the example inputs fails at `{node.name}`",
                where=format_location(WHERE.of(node)),
                why=f"{type(error).__name__}: {error}.",
                hint="Pass example_inputs with the inputs of ONE call of the model, including the batch dimension.",
            ) from error

    def _takes_contiguous_operands(self, compute: Callable[..., Any], operands: tuple[Any, ...]) -> bool:
        """Whether a computation that failed succeeds on contiguous copies of its operands."""
        if not any(isinstance(x, Tensor) and x.layout is torch.strided and not x.is_contiguous() for x in operands):
            return False
        try:
            with self.evaluating():
                compute(*(x.contiguous() if isinstance(x, Tensor) else x for x in operands))
        except (RuntimeError, ValueError, TypeError, IndexError, *NOT_EVALUATED):
            return False
        return True

    def _refuse_memory_format(self, node: Node, error: Exception) -> NoReturn:
        operand = node.args[0]
        x = VALUE.of(operand) if isinstance(operand, Node) else None
        layout = f" of shape {list(x.shape)} and strides {x.stride()}" if isinstance(x, Tensor) else ""
        name = node.target if isinstance(node.target, str) else operation_name(node)
        raise CaptureError(
            "SNNFX225",
            f"`{name}` fails on the memory format of its operand",
            where=format_location(WHERE.of(node)),
            why=f"the tensor{layout} is not contiguous, e.g. in channels-last format or permuted.",
            hint="Use `reshape`, which copies if necessary, instead of `view`, or call it on `x.contiguous()`.",
        ) from error

    def _resolve(self, target: str) -> Any:
        if target in self.recorder.constants:
            return self.recorder.constants[target]
        if target == SELF_TARGET:
            return self.recorder.root
        value: Any = self.recorder.root
        with self.evaluating():
            for atom in target.removeprefix(START_PREFIX).split("."):
                value = getattr(value, atom)
        return value

    def _fake(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.mode is not None:
            return self.mode.from_tensor(value, static_shapes=True)
        return value


_FULL = torch.full  # capture replaces the attribute of torch


def _with_any_number(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `torch.full` with some number in place of a tensor, which has no value in a capture."""

    def zero(value: Any) -> Any:
        if not isinstance(value, FakeTensor):
            return value
        with disable_dispatch_modes():
            return torch.zeros((), dtype=value.dtype).item()

    return (*args[:1], *map(zero, args[1:])), {k: zero(v) if k == "fill_value" else v for k, v in kwargs.items()}


@contextlib.contextmanager
def _only(mode: FakeTensorMode) -> Iterator[None]:
    """Enter a fake tensor mode alone: operators would pass through all modes below it, which takes long."""
    with disable_dispatch_modes(), mode:
        yield


def _call_for_shape(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a layer on fake tensors to get the shape of its output."""
    if isinstance(module, BatchNormBase) and has_torch_forward(module) and len(args) == 1 and not kwargs:
        module._check_input_dim(args[0])
        return torch.empty_like(args[0])
    if len(args) == 1 and not kwargs and _is_plain_linear(module, args[0]):
        return args[0].new_empty((*args[0].shape[:-1], len(module.weight)))  # type: ignore[arg-type]
    # `vars`, because a read of the attribute would count as one of the model's code.
    uses_cumulative_average = isinstance(module, NormBase) and vars(module)["training"] and module.momentum is None
    if not uses_cumulative_average:
        return call_leaf(module, *args, **kwargs)
    # The momentum would be 1 / num_batches_tracked, and a fake tensor has no value.
    module.__dict__["training"] = False
    try:
        return call_leaf(module, *args, **kwargs)
    finally:
        module.__dict__["training"] = True


def _is_plain_linear(module: nn.Module, x: Any) -> bool:
    """Whether a module is a linear layer that takes `x` and returns a contiguous tensor of the same dtype."""
    if type(module).forward is not nn.Linear.forward or not isinstance(x, Tensor) or x.dim() == 0:
        return False
    weight, bias = module.weight, module.bias
    if type(weight) is not nn.Parameter or (bias is not None and type(bias) is not nn.Parameter):
        return False
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    kinds = {(t.dtype, t.device, t.layout) for t in (x, weight, bias) if t is not None}
    return kinds == {(x.dtype, x.device, torch.strided)} and not torch.is_autocast_enabled(x.device.type)
