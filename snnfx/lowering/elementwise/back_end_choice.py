"""Choose the back end of a device."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from snnfx.lowering.elementwise.back_end import BackEnd
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.lowering.elementwise.cpp.cpp_launch import CppBackEnd
from snnfx.lowering.elementwise.triton.triton_launch import TritonBackEnd

__all__ = ["DEVICES", "back_end_of", "device_kind_of", "reason_without_back_end"]

_cpp, _triton = CppBackEnd(), TritonBackEnd()

DEVICES = ("cpu", "cuda")
"""Device types that kernels run on; AMD's GPUs have type "cuda" in PyTorch, too."""


@functools.cache
def device_kind_of(device: torch.device) -> str:
    """Cached `device.type`."""
    return device.type


def back_end_of(device: torch.device) -> BackEnd:
    """C++ for the CPU, Triton for GPUs; with SNNFX_KERNELS=triton also for the CPU."""
    assert device.type in DEVICES
    return _triton if device.type == "cuda" or os.environ.get("SNNFX_KERNELS") == "triton" else _cpp


def reason_without_back_end(device: torch.device) -> str:
    """Why no kernel can be built for a device, as a clause; else ""."""
    if device.type not in DEVICES:
        return f"there are no kernels for {device.type} tensors"
    if os.environ.get("SNNFX_KERNELS") == "0":
        return "SNNFX_KERNELS=0 disables kernels"
    if back_end_of(device) is _triton:
        return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"
    return "" if find_compiler() is not None else "there is no C++ compiler"
