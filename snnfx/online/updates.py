"""Accumulate, average, clip and unscale gradients, then run the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError

__all__ = ["Updates"]


class Updates:
    """Backward passes and optimizer steps, with accumulation, clipping, mixed precision and several processes.

    Args:
        optimizer: over the parameters to train.
        accumulate: number of calls per update; their gradients are averaged.
        clip_grad_norm: largest total norm of the gradients; None: no clipping.
        amp_dtype: dtype for autocast; None: no autocast. float16 uses a gradient scaler.
        process_group: average gradients over its processes; "world": over all processes; None: do not average.

    Raises:
        InputError: SNNFX309 if an argument is out of range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        amp_dtype: torch.dtype | None = None,
        process_group: Any = None,
    ) -> None:
        if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
            why = "expected a number of calls (an int of at least 1)."
            raise InputError("SNNFX309", f"invalid accumulate={accumulate!r}", why=why)
        is_number = isinstance(clip_grad_norm, int | float) and not isinstance(clip_grad_norm, bool)
        if clip_grad_norm is not None and not (is_number and clip_grad_norm > 0):
            why = "expected a norm above 0, or None."
            raise InputError("SNNFX309", f"invalid clip_grad_norm={clip_grad_norm!r}", why=why)
        if amp_dtype not in (None, torch.bfloat16, torch.float16):
            hint = "Choose torch.bfloat16, torch.float16 or None."
            raise InputError("SNNFX309", f"invalid amp_dtype={amp_dtype!r}", hint=hint)
        self.optimizer, self.accumulate, self.clip = optimizer, accumulate, clip_grad_norm
        self.amp_dtype, self.process_group = amp_dtype, process_group
        self.scaler: torch.amp.GradScaler | None = None
        self.grad_norm: Tensor | None = None
        self.calls = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the optimizer, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def reset(self) -> None:
        """Start a new accumulation: its gradients are cleared before the next backward pass."""
        self.calls = 0

    def state_dict(self) -> dict[str, Any]:
        """The calls since the last update with their gradients, and the state of the gradient scaler."""
        calls = self.calls % self.accumulate
        gradients = [None if p.grad is None else p.grad.detach().clone() for p in self.parameters] if calls else []
        return {"calls": calls, "gradients": gradients, "scaler": self.scaler and self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.calls = state["calls"]
        for parameter, gradient in zip(self.parameters, state["gradients"], strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter, copy=True)
        self.scaler = None
        if state["scaler"] is not None and self.amp_dtype is torch.float16:
            self._scaler_on(self.parameters[0].device).load_state_dict(state["scaler"])

    def _scaler_on(self, device: torch.device) -> torch.amp.GradScaler:
        if self.scaler is None:
            self.scaler = torch.amp.GradScaler(device.type)
        return self.scaler

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """The autocast context for the forward pass."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        if self.amp_dtype is torch.float16:
            self._scaler_on(device)
        return torch.autocast(device.type, dtype=self.amp_dtype)

    def begin_call(self) -> None:
        """Clear the gradients of the last update, unless this call accumulates into them."""
        if self.calls % self.accumulate == 0:
            self.clear_gradients()

    def clear_gradients(self) -> None:
        """Set all gradients to None."""
        for parameter in self.parameters:  # a tenth of the time of optimizer.zero_grad()
            parameter.grad = None

    def scaled(self, loss: Tensor) -> Tensor:
        """Scale a loss for accumulation over calls and for float16 gradients."""
        if self.accumulate != 1:
            loss = loss / self.accumulate
        return loss if self.scaler is None else self.scaler.scale(loss)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss."""
        self.scaled(loss).backward()

    def end_call(self) -> int:
        """Update if enough calls have accumulated; return the number of updates."""
        self.calls += 1
        if self.calls % self.accumulate:
            return 0
        self.optimizer_step()
        return 1

    def optimizer_step(self) -> None:
        """Average, unscale and clip the accumulated gradients, then run the optimizer."""
        self.average_over_processes([p.grad for p in self.parameters if p.grad is not None])
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()

    def average_over_processes(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their mean over the processes of the group, in place."""
        if self.process_group is None or not gradients:
            return
        group = None if self.process_group == "world" else self.process_group
        world_size = torch.distributed.get_world_size(group)
        by_dtype: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            by_dtype.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for of_dtype in by_dtype.values():
            flat = torch.cat([g.reshape(-1) for g in of_dtype])
            torch.distributed.all_reduce(flat, group=group)
            flat /= world_size
            for gradient, part in zip(of_dtype, flat.split([g.numel() for g in of_dtype]), strict=True):
                gradient.copy_(part.view_as(gradient))
