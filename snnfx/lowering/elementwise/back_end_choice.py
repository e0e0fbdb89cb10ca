"""Which back end a device has."""

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
"""Types of devices that kernels run on; PyTorch calls AMD's GPUs "cuda", too."""


@functools.cache
def device_kind_of(device: torch.device) -> str:
    """`device.type`, which takes longer than a look-up."""
    return device.type


def back_end_of(device: torch.device) -> BackEnd:
    """C++ for the CPU, Triton for a GPU; with SNNFX_KERNELS=triton for the CPU as well."""
    assert device.type in DEVICES
    return _triton if device.type == "cuda" or os.environ.get("SNNFX_KERNELS") == "triton" else _cpp


def reason_without_back_end(device: torch.device) -> str:
    """Why no kernel can be built for a device, as a clause; "" where one can."""
    if device.type not in DEVICES:
        return f"there are no kernels for {device.type} tensors"
    if os.environ.get("SNNFX_KERNELS") == "0":
        return "SNNFX_KERNELS=0 forbids kernels"
    if back_end_of(device) is _triton:
        return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed"
    return "" if find_compiler() is not None else "there is no C++ compiler"
