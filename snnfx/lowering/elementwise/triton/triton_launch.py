"""The GPU back end: compile and launch generated Triton kernels."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnfx.lowering.aten_recording import LoweringRefused
from snnfx.lowering.elementwise.back_end import BackEnd, WantedGradients
from snnfx.lowering.elementwise.expressions import StepExpressions
from snnfx.lowering.elementwise.kernel_cache import places, write_atomically
from snnfx.lowering.elementwise.operand_layout import Layout
from snnfx.lowering.elementwise.saved_values import SavePlan
from snnfx.lowering.elementwise.triton.triton_kernel import write_backward, write_forward
from snnfx.lowering.elementwise.triton.triton_source import OperandForm, TritonSource
from snnfx.sandbox.internal_faults import surface

__all__ = ["TritonBackEnd", "arguments", "block_length", "form_of", "load"]

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""Options of every launch: products and sums are rounded separately, as in PyTorch."""

_SMALL_STEP = 1 << 16
"""Elements of a step up to which blocks are shorter, so that there are enough programs."""

_loaded: dict[str, Any] = {}
_lock = threading.Lock()


def is_interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def block_length(elements: int) -> int:
    """The number of elements per program."""
    return 128 if elements <= _SMALL_STEP else 512


def load(text: str) -> Any:
    """Import the kernel of a source text from a file in the cache folder; Triton reads the file's source.

    Raises:
        LoweringRefused: Triton is not installed or cannot be imported.
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
    """The file with a text in the cache, written unless it is there and complete."""
    content = text.encode()
    paths = places(f"{name}.py")
    return next((p for p in paths if p.is_file() and p.read_bytes() == content), None) or write_atomically(
        content, paths[0]
    )


def form_of(source: TritonSource, layout: Layout, operands: Sequence[Tensor | float]) -> OperandForm:
    """The `OperandForm` of a call."""
    modes: list[str] = []
    for operand, strides, slot in zip(operands, layout.operands, source.slots, strict=True):
        if not isinstance(operand, Tensor):
            modes.append("number")
        # Sums are dense or one number per program; a 0-d operand is one number.
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
    """The arguments of a launch, in the order of `source.parameters(form)`, without BLOCK."""
    values: list[Any] = []
    for operand, strides, slot, mode in zip(operands, layout.operands, source.slots, form.modes, strict=True):
        values.append(operand)
        if mode != "number" and slot.has_time:
            # Triton would compile another kernel for the stride 0 of a single step.
            values.append(strides.time if T > 1 else layout.elements)
        if mode == "strided":
            values += strides.stride
    values += layout.sizes[1:] if form.dims > 1 else ()
    values += source.literals
    return [*values, layout.elements, T]


def sample_arguments(source: TritonSource, form: OperandForm, elements: int) -> list[Any]:
    """Arguments to compile a kernel with, of the types of a launch; dtypes represent tensors."""
    values: list[Any] = []
    for slot, mode in zip(source.slots, form.modes, strict=True):
        values.append(0.0 if mode == "number" else getattr(torch, slot.dtype))
        if mode != "number" and slot.has_time:
            values.append(elements)
    return [*values, *source.literals, elements, 2]


def _compile_errors() -> tuple[type[Exception], ...]:
    """Errors by which Triton, or a tool that it runs, fails to compile a kernel."""
    from triton.errors import TritonError

    return TritonError, RuntimeError, OSError, ImportError, subprocess.SubprocessError


class TritonBackEnd(BackEnd):
    """Generated Triton for GPU tensors; for CPU tensors in Triton's interpreter."""

    def write_forward(self, step: StepExpressions, plan: SavePlan | None = None) -> TritonSource:
        return write_forward(step, plan)

    def write_backward(self, step: StepExpressions, plan: SavePlan, wanted: WantedGradients) -> TritonSource:
        return write_backward(step, plan, wanted)

    def build(self, source: TritonSource, elements: int) -> None:
        if os.environ.get("SNNFX_KERNELS") == "0":
            raise LoweringRefused("SNNFX_KERNELS=0 disables kernels")
        form = source.default_form
        kernel = load(source.text(form))
        if is_interpreted():
            if source.uses:
                raise LoweringRefused(f"Triton's interpreter has no `{min(source.uses)}`")
            return
        if not torch.cuda.is_available():
            raise LoweringRefused("without a GPU, Triton needs its interpreter (TRITON_INTERPRET=1)")
        try:
            kernel.warmup(*sample_arguments(source, form, elements), BLOCK=block_length(elements), grid=(1,), **OPTIONS)
        except Exception as error:
            if not isinstance(error, _compile_errors()):
                surface(error, "a loop runs step by step in PyTorch")
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
        # A 0-d CPU tensor is passed as a number.
        operands = [float(o) if isinstance(o, Tensor) and o.device != device else o for o in operands]
        form = form_of(source, layout, operands)
        kernel = load(source.text(form))
        block = block_length(layout.elements)
        grid = (-(-layout.elements // block),)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments(source, form, layout, T, operands), BLOCK=block, **OPTIONS)
