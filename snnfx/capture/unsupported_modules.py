"""Refuse modules that a net can neither trace nor step: scripted code, nets with state of their own, wrappers."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import torch
from torch import nn

from snnfx.errors import CaptureError
from snnfx.sandbox.user_code import format_location, location_of_forward

__all__ = ["is_converted_net", "refuse_scripted_code", "refuse_unsupported_modules"]


def refuse_unsupported_modules(model: nn.Module, entry: str) -> None:
    """Refuse a model if it contains a module that a net can neither trace nor step.

    Raises:
        CaptureError: SNNFX220, a scripted or traced module; SNNFX221, a converted net that carries its state;
            SNNFX222, a wrapper for several devices or processes.
    """
    if not isinstance(model, nn.Module):
        return  # capture names the type that it got
    for name, module in model.named_modules():
        label = f"`{name}`" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            refuse_scripted_code(label, _source_of(module) or location_of_forward(model, entry))
        if is_converted_net(module) and _keeps_state(module):
            raise CaptureError(
                "SNNFX221",
                f"{label} is a converted net that keeps its state from call to call",
                where=location_of_forward(model, entry),
                why="a net carries the states of its model only, and resets them for each sequence.",
                hint="Use the model that it was converted from in its place: the attribute `source` of the net.",
            )
        if _uses_several_devices(module):
            raise CaptureError(
                "SNNFX222",
                f"{label} is a {type(module).__name__}",
                where=location_of_forward(model, entry),
                why="it distributes its input over devices or processes, and a graph of one step runs on one.",
                hint="Convert the model inside it, its attribute `module`, then wrap the net.",
            )


def refuse_scripted_code(label: str, where: str) -> NoReturn:
    """Refuse TorchScript code without a Python original."""
    raise CaptureError(
        "SNNFX220",
        f"{label} is scripted or traced by torch.jit",
        where=where,
        why="TorchScript runs outside of Python, so its operations and its state cannot be recorded.",
        hint="Use the Python module or function that it was made from; a module takes the weights with "
        "module.load_state_dict(scripted.state_dict()).",
    )


def is_converted_net(module: nn.Module) -> bool:
    """Whether `snnfx.convert` made a module."""
    return callable(getattr(type(module), "reset_carried_state", None))


def _keeps_state(net: Any) -> bool:
    return bool(net.options.carry_state or net.options.step_mode == "s")


def _source_of(module: torch.jit.ScriptModule) -> str:
    """The user's file and line of scripted code, or "" if they are unknown."""
    for node in getattr(getattr(module, "graph", None), "nodes", list)():
        found = re.search(r'File "([^"]+)", line (\d+)', node.sourceRange())
        if found and not found[1].startswith((torch.__path__[0], "code/")):
            return format_location((found[1], int(found[2])))
    return ""


def _uses_several_devices(module: nn.Module) -> bool:
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if isinstance(module, (nn.parallel.DistributedDataParallel, sharded)):
        return True
    return isinstance(module, nn.DataParallel) and len(module.device_ids) > 1
