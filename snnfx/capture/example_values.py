"""The values of one step on the example inputs: fake tensors, which tell the shape and dtype of every node."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from snnfx.capture.patches import plain_isinstance
from snnfx.capture.proxy import UNKNOWN
from snnfx.capture.recorder import Recorder
from snnfx.errors import CaptureError
from snnfx.ir.program import SELF_TARGET
from snnfx.sandbox.torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    NormBase,
    UnsupportedOperatorException,
)
from snnfx.sandbox.user_code import format_location

__all__ = ["NOT_EVALUATED", "ExampleValues"]

NOT_EVALUATED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
"""What fake tensors raise where shapes do not tell the result."""


class ExampleValues:
    """Evaluates the nodes of a step while it is recorded; the value of a node is its `meta["val"]`.

    Args:
        recorder: records the step.
        mode: the mode under which values are computed; None without example inputs: then no value is known.
    """

    def __init__(self, recorder: Recorder, mode: FakeTensorMode | None) -> None:
        self.recorder, self.mode = recorder, mode
        self._value_of_next: Any = UNKNOWN

    def evaluate(self, node: Node) -> None:
        """Compute the value of a new node from those of its arguments, where they are known."""
        if self.mode is None or node.op in ("placeholder", "output") or "val" in node.meta:
            return
        if node.op == "call_function" and self._value_of_next is not UNKNOWN:
            node.meta["val"], self._value_of_next = self._value_of_next, UNKNOWN
            return
        if node.op == "get_attr":
            self._record_value(node, lambda: self._fake(self._resolve(str(node.target))))
            return
        unknown = False

        def load(n: Node) -> Any:
            nonlocal unknown
            unknown = unknown or "val" not in n.meta
            return n.meta.get("val")

        args, kwargs = fx.map_arg((node.args, node.kwargs), load)
        if unknown:
            return
        whole, index = cast("tuple[Any, Any]", args) if node.target is operator.getitem else (None, 0)
        if isinstance(whole, tuple) and index in range(len(whole)):
            node.meta["val"] = whole[index]  # most often of what a stateful call returns
        elif node.op == "call_module":
            module = self._resolve(str(node.target))
            self._record_value(node, lambda: _call_for_shape(module, args, kwargs))
        elif node.op == "call_method":
            self._record_value(node, lambda: getattr(args[0], str(node.target))(*args[1:], **kwargs))
        else:
            self._record_value(node, lambda: node.target(*args, **kwargs))  # type: ignore[operator]

    @contextlib.contextmanager
    def already_evaluated(self, value: Any) -> Iterator[None]:
        """The value of the next node is known, if it is not UNKNOWN."""
        before, self._value_of_next = self._value_of_next, value
        try:
            yield
        finally:
            self._value_of_next = before

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run real Python on values: nothing is recorded, modules are called for what they are."""
        recorder = self.recorder
        before, recorder.is_evaluating = recorder.is_evaluating, True
        try:
            with plain_isinstance(), self.mode or contextlib.nullcontext(), torch.no_grad():
                yield
        finally:
            recorder.is_evaluating = before

    def _record_value(self, node: Node, compute: Callable[[], Any]) -> None:
        try:
            with self.evaluating():
                node.meta["val"] = compute()
        except NOT_EVALUATED:
            return
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CaptureError(
                "SNNFX201",
                f"one step fails on the example inputs at `{node.name}`",
                where=format_location(node.meta["where"]),
                why=f"{type(error).__name__}: {error}.",
                hint="example_inputs has to be what ONE call of the model takes, batch dimension included.",
            ) from error

    def _resolve(self, target: str) -> Any:
        if target in self.recorder.constants:
            return self.recorder.constants[target]
        if target == SELF_TARGET:
            return self.recorder.root
        found: Any = self.recorder.root
        with self.evaluating():
            for atom in target.split("."):
                found = getattr(found, atom)
        return found

    def _fake(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.mode is not None:
            return self.mode.from_tensor(value, static_shapes=True)
        return value


def _call_for_shape(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer returns, as far as its shape goes."""
    counts = isinstance(module, NormBase) and module.training and module.momentum is None
    if not counts:
        return module(*args, **kwargs)
    # Its momentum is one over the number of batches so far, a value that no shape tells.
    module.__dict__["training"] = False
    try:
        return module(*args, **kwargs)
    finally:
        module.__dict__["training"] = True
