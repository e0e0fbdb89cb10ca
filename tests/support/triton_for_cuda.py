"""Compile generated Triton kernels for an H100 without a GPU; print facts about the machine code as JSON.

`test_triton` runs this script in a separate process. It gives Triton a driver for an H100 and compiles kernels instead
of launching them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import snnfx
from snnfx import neuron, surrogate
from snnfx.lowering.elementwise.expressions import OPERATIONS, Builder, StepExpressions
from snnfx.lowering.elementwise.operand_layout import Layout
from snnfx.lowering.elementwise.triton import triton_launch
from snnfx.lowering.elementwise.triton.triton_kernel import write_forward
from snnfx.lowering.elementwise.triton.triton_launch import (
    OPTIONS,
    TritonBackEnd,
    arguments,
    block_length,
    form_of,
    load,
    sample_arguments,
)
from snnfx.lowering.elementwise.triton.triton_source import TritonSource


class CompileOnlyDriver:
    """A driver for a device that does not exist."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


compiled: list[tuple[TritonSource, Any]] = []


class CompileOnlyBackEnd(TritonBackEnd):
    """Compiles kernels instead of launching them."""

    def build(self, source: TritonSource, elements: int) -> None:
        form = source.default_form
        sample = sample_arguments(source, form, elements)
        load(source.text(form)).warmup(*sample, BLOCK=block_length(elements), grid=(1,), **OPTIONS)

    def run(self, source: TritonSource, layout: Layout, T: int, operands: Sequence[Tensor | float]) -> None:
        form = form_of(source, layout, operands)
        sample = arguments(source, form, layout, T, operands)
        kernel = load(source.text(form))
        result = kernel.warmup(*sample, BLOCK=block_length(layout.elements), grid=(1,), **OPTIONS)
        compiled.append((source, result))


class PerChannel(snnfx.MemoryModule):
    """A threshold and a leak for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.rand(3, 1))
        self.register_memory("v", 0.0)
        self.spike = surrogate.ATan()

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.7 * self.v + x
        return self.spike(self.v - self.threshold)


class Curves(snnfx.MemoryModule):
    """A neuron with transcendental functions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self.register_memory("w", 1.0)

    def forward(self, x: Tensor) -> Tensor:
        self.v = torch.exp(x - self.v) / (1.0 + torch.sqrt(x * x + self.w)) + torch.log1p(x.abs())
        self.w = torch.tanh(self.w * 0.3 + self.v)
        return self.v.atan() * torch.sigmoid(self.w)


def facts_about(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Facts about the kernels of both passes, for several T and an odd number of elements."""
    triton_launch._loaded.clear()
    compiled.clear()
    net = snnfx.convert(nn.Sequential(model).to(dtype))
    for T in (1, 5, 33):
        x_seq = torch.randn(T, 5, 3, 7, dtype=dtype, requires_grad=True)
        net(x_seq).square().sum().backward()
    ptx = [result.asm["ptx"] for _, result in compiled]
    instructions = r"\b((?:fma|mad|div|sqrt|ex2|lg2|tanh|mul|add|sub)\.[.\w]*f(?:32|64))\b"
    return {
        "directions": sorted({"backward" if "T - 1 - step" in text else "forward" for text in triton_launch._loaded}),
        "machine code": all(len(result.asm["cubin"]) > 0 for _, result in compiled),
        "compilations of each kernel": sorted(
            {len(kernel.device_caches[0][0]) for kernel in triton_launch._loaded.values()}
        ),
        "arithmetic": sorted({found for text in ptx for found in re.findall(instructions, text)}),
        "conversions": sorted({found for text in ptx for found in re.findall(r"\b(cvt\.[.\w]*)", text)}),
    }


def facts_about_operations() -> dict[str, Any]:
    """Compile each operation of an expression separately, in each dtype."""
    failed: dict[str, str] = {}
    count = 0
    for op, arity in OPERATIONS.items():
        compare = ("eq", "ne", "lt", "le", "gt", "ge")
        on_integers = op in ("add", "sub", "mul", "neg", "abs", "sign", "maximum", "minimum", "where", "fmod", "div")
        integers = ("int32", "int64") if on_integers or op in compare else ()
        for dtype in ("float32", "float64", *integers):
            builder = Builder()
            leaves = [builder.leaf("sequence", k, dtype) for k in range(arity)]
            result_is_bool = op in ("eq", "ne", "lt", "le", "gt", "ge", "isnan", "and", "or", "xor", "not")
            operands = leaves
            if op in ("and", "or", "xor", "not"):
                operands = [builder.cast(leaf, "bool") for leaf in leaves]
            elif op == "where":
                operands = [builder.cast(leaves[0], "bool"), *leaves[1:]]
            elif op == "cast":
                operands = [builder.cast(leaves[0], "bool")]
            value = builder.make(op, operands, "bool" if result_is_bool else dtype)
            memory = "bool" if result_is_bool else dtype
            step = StepExpressions((dtype,) * arity, (), (), (), (memory,), (value,), ())
            source = write_forward(step)
            form = source.default_form
            try:
                sample = sample_arguments(source, form, 512)
                result = load(source.text(form)).warmup(*sample, BLOCK=block_length(512), grid=(1,), **OPTIONS)
                assert result.asm["cubin"]
            except Exception as error:
                failed[f"{op} of {dtype}"] = f"{type(error).__name__}: {error}"[:500]
            count += 1
    return {"failed": failed, "count": count}


def facts_about_a_wide_step() -> dict[str, Any]:
    """Compile a step whose offsets need 64 bits."""
    builder = Builder()
    value = builder.make(
        "add", [builder.leaf("sequence", 0, "float32"), builder.leaf("state", 0, "float32")], "float32"
    )
    step = StepExpressions(("float32",), (), (), ("float32",), ("float32",), (value,), (value,))
    source = write_forward(step)
    form = dataclasses.replace(source.default_form, wide=True)
    kernel = load(source.text(form))
    result = kernel.warmup(*sample_arguments(source, form, (1 << 31) + 5), BLOCK=512, grid=(1,), **OPTIONS)
    return {"elements": result.src.signature["elements"], "machine code": len(result.asm["cubin"]) > 0}


def main() -> None:
    assert not triton.knobs.runtime.interpret
    driver.set_active(CompileOnlyDriver())
    for name in ("build", "run"):
        setattr(TritonBackEnd, name, getattr(CompileOnlyBackEnd, name))
    atan = surrogate.ATan()
    print(
        json.dumps(
            {
                "LIF": facts_about(neuron.LIFNode(surrogate_function=atan), torch.float32),
                "LIF in float16": facts_about(neuron.LIFNode(surrogate_function=atan), torch.float16),
                "LIF in bfloat16": facts_about(neuron.LIFNode(surrogate_function=atan), torch.bfloat16),
                "PLIF in float64": facts_about(neuron.ParametricLIFNode(), torch.float64),
                "adaptive": facts_about(neuron.AdaptiveLIFNode(), torch.float32),
                "per channel": facts_about(PerChannel(), torch.float32),
                "curves": facts_about(Curves(), torch.float32),
                "operations": facts_about_operations(),
                "wide": facts_about_a_wide_step(),
            }
        )
    )


if __name__ == "__main__":
    main()
