"""Updates: what happens between the gradients of a rule and the optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError

__all__ = ["Updates"]


class Updates:
    """Backward passes and updates with gradient accumulation, clipping, mixed precision and several processes.

    Args:
        optimizer: over the parameters to train.
        accumulate: an update every so many calls; their gradients are averaged.
        clip_grad_norm: the largest norm of all gradients together; None: no clipping.
        amp_dtype: the type of autocast; None: none. float16 has its gradients scaled.
        process_group: average gradients over its processes; "world": over all; None: alone.
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
            raise InputError("SNNFX309", f"accumulate={accumulate!r}", why="it is a number of calls above 0.")
        is_number = isinstance(clip_grad_norm, int | float) and not isinstance(clip_grad_norm, bool)
        if clip_grad_norm is not None and not (is_number and clip_grad_norm > 0):
            raise InputError("SNNFX309", f"clip_grad_norm={clip_grad_norm!r}", why="it is a norm above 0.")
        if amp_dtype not in (None, torch.bfloat16, torch.float16):
            raise InputError("SNNFX309", f"amp_dtype={amp_dtype!r}", hint="Choose torch.bfloat16 or torch.float16.")
        self.optimizer, self.accumulate, self.clip = optimizer, accumulate, clip_grad_norm
        self.amp_dtype, self.process_group = amp_dtype, process_group
        self.scaler: torch.amp.GradScaler | None = None
        self.grad_norm: Tensor | None = None
        self.calls = 0

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the optimizer, in its order."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def snapshot(self) -> list[Tensor]:
        """A copy of every parameter."""
        return [p.detach().clone() for p in self.parameters]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """The precision of the forward pass."""
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        if self.amp_dtype is torch.float16 and self.scaler is None:
            self.scaler = torch.amp.GradScaler(device.type)
        return torch.autocast(device.type, dtype=self.amp_dtype)

    def begin_call(self) -> None:
        """Forget the gradients of the last update, unless this call adds to them."""
        if self.calls % self.accumulate == 0:
            self.zero()

    def zero(self) -> None:
        """Gradients belong to no update yet."""
        for parameter in self.parameters:  # as optimizer.zero_grad(), in a tenth of the time
            parameter.grad = None

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss whose gradients can be added to those that are there: averaged over calls, scaled for float16."""
        if self.accumulate != 1:
            loss = loss / self.accumulate
        return loss if self.scaler is None else self.scaler.scale(loss)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.scaled(loss).backward()

    def end_call(self) -> int:
        """Update after as many calls as were asked for; the number of updates."""
        self.calls += 1
        if self.calls % self.accumulate:
            return 0
        self.apply()
        return 1

    def apply(self) -> None:
        """One update with the gradients that are there."""
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
        """The mean of gradients over the processes of the group, in place."""
        if self.process_group is None or not gradients:
            return
        group = None if self.process_group == "world" else self.process_group
        world = torch.distributed.get_world_size(group)
        by_type: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            by_type.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for same in by_type.values():
            flat = torch.cat([g.reshape(-1) for g in same])
            torch.distributed.all_reduce(flat, group=group)
            flat /= world
            for gradient, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
                gradient.copy_(part.view_as(gradient))
