"""Calls of a net under torch.compile: as one operator where possible, see `snnfx.runtime.net_operator`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.emit.executable import Executable
from snnfx.regions.region_modules import LoopRegion
from snnfx.runtime.net_operator import NetOperator, define_operator
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import BatchNormBase, are_transforms_active, has_global_hooks

__all__ = ["reason_against_operator", "why_not_one_operator"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def reason_against_operator(executable: Executable) -> str:
    """Why a net does not run as one operator under torch.compile; "" if it does.

    The compiler then sees the operations of the net, with one operator for each loop.
    """
    program, source = executable.program, executable.source
    if executable.options.step_mode != "m":
        return "it runs single steps"
    if executable.graphs.is_replaced:
        return "its graph was replaced by hand"
    if program.opaque:
        return f"`{next(iter(program.opaque)) or type(source).__name__}` runs as Python code"
    if program.guards.modes:
        return "its code reads modes of torch"
    if any(slot.persistent == "assigned" for slot in program.slots) or program.changed_parameters:
        return "its steps replace tensors of the model"
    if executable.options.carry_state and program.persistent_slots:
        return "its steps change buffers, and it carries its state from call to call"
    tensors = [*source.parameters(), *source.buffers()]
    if any(type(t) not in _PLAIN or t.layout is not torch.strided for t in tensors):
        return "its parameters are not plain tensors"
    if any(not t.is_cpu for t in tensors):
        return "it is not on the CPU"
    if has_global_hooks() or any(map(_is_observed, source.modules())):
        return "its modules have hooks"
    if _has_trainable_tensors_besides(source, tensors):
        return "it trains tensors that are not parameters"
    if any(map(_unrolls, executable.region_modules().values())):
        return "a BatchNorm in training is part of a loop"
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def why_not_one_operator(handle: str, training: bool) -> str:
    """`reason_against_operator` of the net with this handle, at the time of compilation."""
    if are_transforms_active():
        return "a transform of torch.func is active"
    operator = NetOperator.of_handle(handle)
    for with_finals in (False, True):
        define_operator(operator.count_of_results(training, with_finals))
    return reason_against_operator(operator.executable)


def _is_observed(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


def _has_trainable_tensors_besides(source: nn.Module, tensors: list[Tensor]) -> bool:
    known = {id(t) for t in tensors}
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.requires_grad and id(tensor) not in known:
            found.append(tensor)
        return tensor

    StructuralCopy(tensor=note).of(source)
    return bool(found)


def _unrolls(region: nn.Module) -> bool:
    """Whether a loop is unrolled under torch.compile, see `SequenceRegion.runs_as_operator`."""
    if not isinstance(region, LoopRegion):
        return False
    modules = [region.resolve(t) for t in region.constant_targets if t is not None and region.resolve is not None]
    return any(isinstance(m, BatchNormBase) and m.training for c in modules if isinstance(c, nn.Module) for m in c.modules())
