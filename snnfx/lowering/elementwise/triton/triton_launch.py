"""The back end of GPUs: generated Triton, which compiles a kernel for the device at its first launch and keeps it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import LoweringRefused
from snnfx.lowering.elementwise.back_end import BackEnd, WantedGradients
from snnfx.lowering.elementwise.cpp.build import usable_directory
from snnfx.lowering.elementwise.expressions import StepExpressions
from snnfx.lowering.elementwise.operand_layout import Layout
from snnfx.lowering.elementwise.saved_values import SavePlan
from snnfx.lowering.elementwise.triton.triton_kernel import write_backward, write_forward
from snnfx.lowering.elementwise.triton.triton_source import OperandForm, TritonSource

__all__ = ["TritonBackEnd", "arguments", "block_length", "form_of", "load"]

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""Of every launch: products and sums are rounded one by one, as in PyTorch."""

_FEW = 1 << 16
"""Elements up to which a program takes fewer of them, so that there are enough programs."""

_loaded: dict[str, Any] = {}
_lock = threading.Lock()


def is_interpreted() -> bool:
    """Whether Triton was told to interpret kernels, on the CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def block_length(elements: int) -> int:
    """Elements that a program takes."""
    return 128 if elements <= _FEW else 512


def load(text: str) -> Any:
    """The kernel of a text, from a file in the cache directory: Triton reads the source of its functions.

    Raises:
        LoweringRefused: Triton is not there.
    """
    kernel = _loaded.get(text)
    if kernel is not None:
        return kernel
    with _lock:
        if text not in _loaded:
            if importlib.util.find_spec("triton") is None:
                raise LoweringRefused("Triton is not installed")
            name = f"snnfx_{hashlib.sha256(text.encode()).hexdigest()[:32]}"
            spec = importlib.util.spec_from_file_location(name, _written(name, text))
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except ImportError as error:
                raise LoweringRefused(f"Triton cannot be imported: {error}") from error
            _loaded[text] = module.kernel
        return _loaded[text]


def _written(name: str, text: str) -> Path:
    """The file of a text: written beside its final place, then renamed, so that nobody sees a part of it."""
    path = usable_directory() / f"{name}.py"
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".write_", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    return path


def form_of(source: TritonSource, layout: Layout, operands: Sequence[Tensor | float]) -> OperandForm:
    """What of a layout the text depends on."""
    modes: list[str] = []
    for operand, strides, slot in zip(operands, layout.operands, source.slots, strict=True):
        if not isinstance(operand, Tensor):
            modes.append("number")
        # Sums have no gaps, or are one number a program; an operand without dimensions is one number.
        elif strides.dense or slot.kind == "sum" or (slot.kind == "operand" and operand.dim() == 0):
            modes.append("dense")
        else:
            modes.append("strided")
    is_strided = "strided" in modes
    furthest = [
        sum((n - 1) * s for n, s in zip(layout.sizes, strides.stride, strict=True)) for strides in layout.operands
    ]
    wide = max(layout.elements + 1024, *furthest) >= 1 << 31
    return OperandForm(tuple(modes), len(layout.sizes) if is_strided else 1, wide)


def arguments(
    source: TritonSource, form: OperandForm, layout: Layout, T: int, operands: Sequence[Tensor | float]
) -> list[Any]:
    """What a kernel is called with, in the order of `source.parameters(form)`, without BLOCK."""
    found: list[Any] = []
    for operand, strides, slot, mode in zip(operands, layout.operands, source.slots, form.modes, strict=True):
        found.append(operand)
        if mode != "number" and slot.has_time:
            # Not 0 for a single step, which Triton would compile another kernel for.
            found.append(strides.time if T > 1 else layout.elements)
        if mode == "strided":
            found += strides.stride
    found += layout.sizes[1:] if form.dims > 1 else ()
    found += source.literals
    return [*found, layout.elements, T]


def samples(source: TritonSource, form: OperandForm, elements: int) -> list[Any]:
    """Arguments of the types that a launch has, to compile a kernel with; dtypes stand for tensors."""
    found: list[Any] = []
    for slot, mode in zip(source.slots, form.modes, strict=True):
        found.append(0.0 if mode == "number" else getattr(torch, slot.dtype))
        if mode != "number" and slot.has_time:
            found.append(elements)
    return [*found, *source.literals, elements, 2]


class TritonBackEnd(BackEnd):
    """Generated Triton for tensors on a GPU; for tensors on the CPU in Triton's interpreter."""

    def write_forward(self, step: StepExpressions, plan: SavePlan | None = None) -> TritonSource:
        return write_forward(step, plan)

    def write_backward(self, step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> TritonSource:
        return write_backward(step, plan, wanted)

    def build(self, source: TritonSource, elements: int) -> None:
        if os.environ.get("SNNFX_KERNELS") == "0":
            raise LoweringRefused("SNNFX_KERNELS=0 forbids kernels")
        form = source.usual
        kernel = load(source.text(form))
        if is_interpreted():
            if source.uses:
                raise LoweringRefused(f"Triton's interpreter has no `{min(source.uses)}`")
            return
        if not torch.cuda.is_available():
            raise LoweringRefused("without a GPU, Triton needs its interpreter (TRITON_INTERPRET=1)")
        try:
            kernel.warmup(*samples(source, form, elements), BLOCK=block_length(elements), grid=(1,), **OPTIONS)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            raise LoweringRefused(f"Triton cannot compile the kernel ({reason})") from error

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    def parts(self, source: TritonSource, elements: int, T: int) -> int:
        return -(-elements // block_length(elements))

    def run(self, source: TritonSource, layout: Layout, T: int, operands: Sequence[Tensor | float]) -> None:
        if layout.elements == 0:
            return
        tensors = [o for o in operands if isinstance(o, Tensor)]
        device = next((t.device for t in tensors if t.dim() > 0), tensors[0].device)
        # A number that lives on the CPU is an argument.
        operands = [float(o) if isinstance(o, Tensor) and o.device != device else o for o in operands]
        form = form_of(source, layout, operands)
        kernel = load(source.text(form))
        block = block_length(layout.elements)
        grid = (-(-layout.elements // block),)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments(source, form, layout, T, operands), BLOCK=block, **OPTIONS)
