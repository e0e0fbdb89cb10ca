"""Side effects of module calls: running statistics, estimated weights, in-place operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional
from torch.nn.utils.spectral_norm import SpectralNorm

from snnfx.ir.program import SELF_TARGET, StepProgram
from snnfx.ir.setting_read import SettingRead
from snnfx.sandbox.torch_internals import NormBase, SpectralNormParametrization
from snnfx.state.step_calls import call_opaque, call_stateful

__all__ = [
    "estimates_weights",
    "flags_of_updates",
    "has_effects",
    "has_in_place_flag",
    "keeps_statistics",
    "statistics_of_function",
    "updated_buffers",
    "updates_buffers",
    "updating_parts",
]


def updates_buffers(program: StepProgram, node: Node) -> bool:
    """Whether the call updates buffers in the mode of the program, so that it is needed without readers."""
    if keeps_statistics(program, node):
        return program.training or any(program.trains(part) for _, part in updating_parts(program, node))
    return bool(statistics_of_function(node))


def has_effects(program: StepProgram, node: Node) -> bool:
    """Whether a step needs the call even if nothing reads its result.

    Only the user's code knows the effects of a module that is stepped without capture.
    """
    return node.target is call_opaque or updates_buffers(program, node)


def updated_buffers(program: StepProgram, node: Node) -> list[Tensor]:
    """The buffers that the call may update in the mode of the program."""
    if not has_effects(program, node):
        return []
    module = program.module_of(node)
    if module is None:
        return [program.resolve(str(n.target)) for n in statistics_of_function(node)]
    return list(module.buffers())


def statistics_of_function(node: Node) -> list[Node]:
    """The running statistics that a call of `batch_norm` or `instance_norm` updates, if they are buffers."""
    arguments = _NORM_FUNCTIONS.get(node.target) if node.op == "call_function" else None
    if arguments is None:
        return []
    mean, var, flag, default = arguments
    values = [node.kwargs.get(name, node.args[i] if i < len(node.args) else None) for i, name in (mean, var)]
    index, name = flag
    uses_batch = node.kwargs.get(name, node.args[index] if index < len(node.args) else default)
    return [v for v in values if isinstance(v, Node) and v.op == "get_attr"] if uses_batch is not False else []


_NORM_FUNCTIONS: dict[Any, tuple[tuple[int, str], tuple[int, str], tuple[int, str], bool]] = {
    functional.batch_norm: ((1, "running_mean"), (2, "running_var"), (5, "training"), False),
    functional.instance_norm: ((1, "running_mean"), (2, "running_var"), (5, "use_input_stats"), True),
    torch.batch_norm: ((3, "running_mean"), (4, "running_var"), (5, "training"), False),
    torch.instance_norm: ((3, "running_mean"), (4, "running_var"), (5, "use_input_stats"), True),
}
"""Function -> position and name of the running mean, the running variance and the flag, and the default of the flag."""


def keeps_statistics(program: StepProgram, node: Node) -> bool:
    """Whether the node calls a layer that updates its buffers in training."""
    if node.op != "call_module" and node.target not in (call_opaque, call_stateful):
        return False
    module = program.module_of(node)
    assert module is not None
    return estimates_weights(module) or any(
        isinstance(part, NormBase) and part.track_running_stats for part in module.modules()
    )


def updating_parts(program: StepProgram, node: Node) -> list[tuple[str, nn.Module]]:
    """The modules in the called one that update their buffers if they are in training mode, by qualified name."""
    module = program.module_of(node)
    if module is None:
        return []
    called = node.target if node.op == "call_module" else node.args[0].target  # type: ignore[union-attr]
    owner = "" if called == SELF_TARGET else str(called)
    return [(f"{owner}.{name}".strip("."), part) for name, part in module.named_modules() if _updates_itself(part)]


def flags_of_updates(program: StepProgram, node: Node) -> list[SettingRead]:
    """Setting reads of the `training` flags that decide whether a call updates buffers."""
    parts = updating_parts(program, node) if str(node.target) not in program.constants else []
    flags = [(name, program.mode_of(part)) for name, part in parts]
    return [SettingRead(name, "training", flag, str(flag)) for name, flag in flags]


def _updates_itself(part: nn.Module) -> bool:
    if isinstance(part, NormBase):
        return part.running_mean is not None
    return isinstance(part, SpectralNormParametrization) or _has_hook_of_spectral_norm(part)


def _has_hook_of_spectral_norm(module: nn.Module) -> bool:
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())


def estimates_weights(module: nn.Module) -> bool:
    """Whether each call does one step of power iteration on the weight (spectral normalisation)."""
    if any(isinstance(part, SpectralNormParametrization) for part in module.modules()):
        return True
    return _has_hook_of_spectral_norm(module)


def has_in_place_flag(program: StepProgram, node: Node) -> bool:
    """Whether the node calls a module like `nn.ReLU(inplace=True)`."""
    return node.op == "call_module" and bool(getattr(program.resolve(str(node.target)), "inplace", False))
