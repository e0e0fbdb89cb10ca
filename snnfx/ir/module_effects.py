"""Side effects of module calls: running statistics, estimated weights, in-place operands."""

from __future__ import annotations

from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils.spectral_norm import SpectralNorm

from snnfx.ir.program import StepProgram
from snnfx.sandbox.torch_internals import NormBase, SpectralNormParametrization
from snnfx.state.step_calls import call_opaque, call_stateful

__all__ = ["estimates_weights", "has_in_place_flag", "keeps_statistics", "updated_buffers", "updates_buffers"]


def updates_buffers(program: StepProgram, node: Node) -> bool:
    """Whether the call updates buffers in the mode of the program, so that it is needed without readers."""
    return program.training and keeps_statistics(program, node)


def updated_buffers(program: StepProgram, node: Node) -> list[Tensor]:
    """The buffers that the call may update in place in the mode of the program."""
    if not updates_buffers(program, node):
        return []
    module = program.module_of(node)
    assert module is not None
    return list(module.buffers())


def keeps_statistics(program: StepProgram, node: Node) -> bool:
    """Whether the node calls a layer that updates its buffers in training."""
    if node.op != "call_module" and node.target not in (call_opaque, call_stateful):
        return False
    module = program.module_of(node)
    assert module is not None
    return estimates_weights(module) or any(
        isinstance(part, NormBase) and part.track_running_stats for part in module.modules()
    )


def estimates_weights(module: nn.Module) -> bool:
    """Whether each call does one step of power iteration on the weight (spectral normalisation)."""
    if any(isinstance(part, SpectralNormParametrization) for part in module.modules()):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def has_in_place_flag(program: StepProgram, node: Node) -> bool:
    """Whether the node calls a module like `nn.ReLU(inplace=True)`."""
    return node.op == "call_module" and bool(getattr(program.resolve(str(node.target)), "inplace", False))
