"""OTTT with a leak for each neuron, in a plain loop: one trace for each output channel of a weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from support.online_oracles import (
    Loss,
    MakeOptimizer,
    OperandTraces,
    Outcome,
    _copy,
    _gradients,
    _trainable,
    detach_state,
)

LeaksOf = Callable[[nn.Module], Tensor]
"""The current leaks of the output channels of a weight, given the model."""


class ChannelTraces(OperandTraces):
    """The trace of channel k decays with leak k, and only the gradient of channel k uses it."""

    def __init__(self, model: nn.Module, leaks: dict[str, LeaksOf]) -> None:
        super().__init__(model, dict.fromkeys(leaks, 0.0))
        self.model, self.leaks_of = model, leaks

    def advance(self) -> None:
        for name, operand, _ in self.calls:
            leaks = self.leaks_of[name](self.model).detach()
            for k, leak in enumerate(leaks):
                before = self.traces.get((name, k))
                self.traces[name, k] = operand if before is None else float(leak) * before + operand

    def replace_gradients(self) -> None:
        for name, _, output in self.calls:
            module = self.modules[name]
            channel = -1 if isinstance(module, nn.Linear) else 1
            total = torch.zeros_like(module.weight)
            for k in range(output.shape[channel]):
                one = torch.zeros_like(output)
                one.select(channel, k).copy_(output.grad.select(channel, k))
                with torch.enable_grad():
                    y = type(module).forward(module, self.traces[name, k])
                    total += torch.autograd.grad(y, module.weight, one)[0]
            module.weight.grad = total


def ottt_per_neuron(
    model: nn.Module,
    x_seq: Tensor,
    target: Tensor,
    loss: Loss,
    leaks: dict[str, LeaksOf],
    scale: float = 1.0,
    make_optimizer: MakeOptimizer | None = None,
) -> Outcome:
    """Spatial gradients, with a trace for each output channel of the modules named in `leaks`; see `ottt`."""
    model = _copy(model)
    optimizer = make_optimizer(_trainable(model)) if make_optimizer else None
    traces = ChannelTraces(model, leaks)
    total = _gradients(model)
    losses, outputs = [], []
    for x, wanted in zip(x_seq, target, strict=True):
        model.zero_grad()
        y = model(x)
        value = loss(y, wanted)
        traces.advance()
        (scale * value).backward()
        traces.replace_gradients()
        traces.calls.clear()
        for name, gradient in _gradients(model).items():
            total[name] += gradient
        if optimizer is not None:
            optimizer.step()
        detach_state(model)
        losses.append(value.detach())
        outputs.append(y.detach())
    return Outcome(total, torch.stack(losses), torch.stack(outputs), model)
