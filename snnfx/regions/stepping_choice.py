"""Whether a short sequence runs faster step by step than in a mixed loop.

A mixed loop prepares its run once for each call, which pays off after a few steps. For few steps of few values both
ways are timed once, on the values of the call; neither changes them. The kernel of an element-wise loop is faster for
any number of steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.lowering.choices.fastest import Choice, Fastest
from snnfx.lowering.mixed.loop_source import LOOP_SOURCE
from snnfx.regions.sequence_region import tensors_of

__all__ = ["LOOPS", "RunLoop", "SteppingChoice"]

RunLoop = Callable[[Sequence[Tensor], "Sequence[Any] | None", Sequence[Any]], Any]
"""`(inputs [T, *], state, constants) -> (outputs [T, *], final state)`, or None."""

LOOPS = Fastest("loops", ("kernels", "steps"), margin=1.0)
"""Without a margin: later calls run the steps as flat functions, which take less time than measured."""

_MOST_STEPS = 16
_MOST_ELEMENTS = 1 << 16
"""Elements of all tensors of a call, parameters included, up to which it is measured."""

_MOST_DECIDED = 64


class SteppingChoice:
    """The choices of one region.

    Args:
        step: the graph of a step.

    Attributes:
        reason: why the latest call ran step by step, as a clause; "" if it did not.
    """

    def __init__(self, step: fx.GraphModule) -> None:
        self.reason = ""
        self._step = step
        self._digest = ""
        self._decided: dict[tuple[object, ...], Choice] = {}
        self._stepped = False

    def is_stepped(self, x_seq: Sequence[Tensor], state: Sequence[Any] | None) -> bool:
        """Whether an earlier call with these shapes was measured to be faster step by step."""
        self.reason = ""
        if not self._stepped or x_seq[0].shape[0] > _MOST_STEPS:
            return False
        choice = self._decided.get(_key(x_seq, state))
        return choice is not None and self._takes_steps(choice, x_seq)

    def prefers_steps(
        self,
        x_seq: Sequence[Tensor],
        state: Sequence[Any] | None,
        constants: Sequence[Any],
        kernels: RunLoop,
        steps: RunLoop,
    ) -> bool:
        """Whether a call of a mixed loop runs step by step; measured if it is unknown.

        Args:
            x_seq, state, constants: the arguments of the call.
            kernels, steps: both ways to run it.
        """
        self.reason = ""
        if x_seq[0].shape[0] > _MOST_STEPS or not x_seq[0].is_cpu:
            return False
        key = _key(x_seq, state)
        choice = self._decided.get(key)
        if choice is None:
            choice = self._decide(key, x_seq, state, constants, {"kernels": kernels, "steps": steps})
            if choice.is_final:
                if len(self._decided) >= _MOST_DECIDED:
                    self._decided.clear()
                self._decided[key] = choice
        return self._takes_steps(choice, x_seq)

    def _takes_steps(self, choice: Choice, x_seq: Sequence[Tensor]) -> bool:
        if choice.name != "steps":
            return False
        self._stepped, T = True, x_seq[0].shape[0]
        self.reason = f"this was measured to be faster for {T} step{'s' if T > 1 else ''}"
        return True

    def _decide(
        self,
        key: tuple[object, ...],
        x_seq: Sequence[Tensor],
        state: Sequence[Any] | None,
        constants: Sequence[Any],
        ways: dict[str, RunLoop],
    ) -> Choice:
        parameters = tensors_of(constants)
        tensors = [*x_seq, *(s for s in state or () if isinstance(s, Tensor)), *parameters]
        if sum(t.numel() for t in tensors) > _MOST_ELEMENTS:
            return Choice("kernels", "fixed for its size")
        if any(t._backward_hooks for t in parameters):  # a measurement would call them
            return Choice("kernels", "fixed", is_final=False)
        if not self._digest:
            # Another version of the loop is measured anew.
            self._digest = hashlib.sha256((self._step.code + LOOP_SOURCE).encode()).hexdigest()[:16]
        calls = {name: _timed(run, x_seq, state, constants) for name, run in ways.items()}
        return LOOPS.choose((self._digest, *key[:4]), "kernels", lambda: calls)


def _key(x_seq: Sequence[Tensor], state: Sequence[Any] | None) -> tuple[object, ...]:
    return (
        tuple([tuple(x.shape) for x in x_seq]),
        x_seq[0].dtype,
        None if state is None else tuple([tuple(s.shape) if isinstance(s, Tensor) else None for s in state]),
        torch.is_grad_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _timed(
    run: RunLoop, x_seq: Sequence[Tensor], state: Sequence[Any] | None, constants: Sequence[Any]
) -> Callable[[], object]:
    """A call on leaves that share the memory of the arguments, with its gradients if they are enabled."""
    differentiates = torch.is_grad_enabled()

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return value
        return value.detach().requires_grad_(differentiates and value.requires_grad)

    def call() -> object:
        inputs = [copied(x) for x in x_seq]
        before = None if state is None else [copied(s) for s in state]
        given = [copied(c) for c in constants]
        results = run(tuple(inputs), None if before is None else tuple(before), given)
        if results is None or not differentiates:
            return results
        outputs = [y for y in results[0] if isinstance(y, Tensor) and y.requires_grad]
        leaves = (*inputs, *(before or ()), *tensors_of(given))
        wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
        if not outputs or not wanted:
            return results
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)

    return call
