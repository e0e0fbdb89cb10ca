"""Bind a kernel to the layout of one kind of call: a generated function that allocates, packs and launches.

The packed struct of arguments is made once. A call copies it, writes the addresses of its tensors into the copy, and
passes that to the kernel. Threads and nested calls thus never share a struct.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource
from snnfx.lowering.elementwise.cpp.cpp_launch import address_words, pack_arguments, threads_for
from snnfx.lowering.elementwise.operand_layout import plan_layout
from snnfx.ops.buffer_pool import MIN_POOLED_BYTES, pool
from snnfx.sandbox.torch_internals import function_from_source

__all__ = ["BoundLaunch", "Form", "bind_launch"]


@dataclass(frozen=True)
class Form:
    """The memory of a tensor.

    Args:
        shape, stride, dtype: of the tensor.
        in_step: whether its elements are those of a step; partial sums are not.
        by_part: whether it has a float64 number for each part of the work and element of a broadcast operand, to which
            the kernel adds.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    in_step: bool = True
    by_part: bool = False

    @staticmethod
    def of(tensor: Tensor) -> Form:
        """The form of a tensor."""
        return Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def described(self, has_time: bool) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """As `operand_layout.describe_operand`."""
        has_time = has_time or self.by_part
        return ((min(self.shape[0], 2), *self.shape[1:]) if has_time else self.shape), self.stride, has_time


class BoundLaunch(NamedTuple):
    """The functions of a bound kernel.

    Attributes:
        fits: whether the tensors that are given, except operands, have the layout of the kernel, and torch the number
            of threads.
        fits_operands: whether the operands, which do not change with time, have the layout of the kernel.
        launch: takes all tensors that are given, operands last: allocate the results, run the kernel, return them.
    """

    fits: Callable[..., bool]
    fits_operands: Callable[..., bool]
    launch: Callable[..., tuple[Tensor, ...]]


def bind_launch(
    source: KernelSource,
    step: tuple[tuple[int, ...], tuple[int, ...], int],
    given: Mapping[tuple[str, int], Form],
    made: Mapping[tuple[str, int], Form],
    unread: Mapping[tuple[str, int], Form],
    numbers: Mapping[tuple[str, int], float],
    dtypes: Mapping[str, torch.dtype],
) -> BoundLaunch | None:
    """Bind a kernel to the forms of its operands; None if it cannot be bound to them.

    Args:
        source: the kernel, built.
        step: shape of a step, its dimensions in memory order, and the number of time steps.
        given: the forms of the arguments, by kind and index of the operand, in order.
        made: the forms of the results that the kernel writes, in order.
        unread: the forms of results that nothing reads; all calls share their memory.
        numbers: the operands that are numbers; operands that are nowhere else are 0.
        dtypes: torch's dtypes by their names in `KernelOperand`.
    """
    shape, order, T = step
    forms = {**given, **made, **unread}
    slots = [(slot, forms.get((slot.kind, slot.index))) for slot in source.slots]
    if any(form is not None and not form.by_part and form.dtype != dtypes[slot.dtype] for slot, form in slots):
        return None
    described = [form.described(s.has_time) if form is not None and form.in_step else None for s, form in slots]
    layout = plan_layout(shape, order, tuple(described))
    threads = threads_for(layout.elements, T)
    if layout.elements == 0 or (threads > 1 and openmp() is None):
        return None
    scratch = {slot: torch.empty_strided(f.shape, f.stride, dtype=f.dtype, device="cpu") for slot, f in unread.items()}
    fills = [(0, numbers.get((s.kind, s.index), 0.0) if form is None else 0.0) for s, form in slots]
    for number, (slot, _) in enumerate(slots):
        if (slot.kind, slot.index) in scratch:
            fills[number] = (scratch[slot.kind, slot.index].data_ptr(), 0.0)
    packed = pack_arguments(source, layout, T, fills, threads)
    arguments = ctypes.c_int64 * len(packed)
    words = zip(address_words(source), source.slots, strict=True)
    addresses = {(s.kind, s.index): word for word, s in words if (s.kind, s.index) in {**given, **made}}
    own = torch.get_num_threads() if threads > 1 else None
    return _functions(load(source).run, arguments(*packed), addresses, given, made, own, scratch)


def _functions(
    run: Callable[[Any], None],
    packed: ctypes.Array[ctypes.c_int64],
    addresses: Mapping[tuple[str, int], int],
    given: Mapping[tuple[str, int], Form],
    made: Mapping[tuple[str, int], Form],
    threads: int | None,
    keep_alive: Any,
) -> BoundLaunch:
    """Write and compile the functions of a bound kernel.

    Args:
        run: the kernel.
        packed: its arguments; the addresses are written into copies.
        addresses: the words of the addresses.
        given, made: as for `bind_launch`.
        threads: the number of threads of torch for which the arguments were packed; None: any.
        keep_alive: what else the arguments refer to.
    """
    constants: dict[str, Any] = {
        "plain": (Tensor, nn.Parameter, nn.Buffer),
        "run": run,
        "copy_of": type(packed).from_buffer_copy,
        "packed": packed,
        "keep_alive": keep_alive,
        "empty_strided": torch.empty_strided,
        "zeros": torch.zeros,
        "pooled": pool.empty,
        "cpu": torch.device("cpu"),
        "get_num_threads": torch.get_num_threads,
    }

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    names = {slot: f"x{i}" for i, slot in enumerate(given)} | {slot: f"y{i}" for i, slot in enumerate(made)}
    conditions: dict[bool, list[str]] = {True: [], False: []}
    if threads is not None:
        conditions[False].append(f"get_num_threads() == {threads}")
    for slot, form in given.items():
        x, holds = names[slot], conditions[slot[0] == "operand"]
        holds.append(f"type({x}) in plain and {x}.shape == {constant(torch.Size(form.shape))}")
        holds.append(f"{x}.stride() == {constant(form.stride)} and {x}.dtype is {constant(form.dtype)}")
        holds.append(f"{x}.is_cpu and not {x}.is_neg()")
    lines: list[str] = []
    for slot, form in made.items():
        arguments = ", ".join([constant(form.shape), constant(form.stride), f"dtype={constant(form.dtype)}"])
        is_small = math.prod(form.shape) * form.dtype.itemsize < MIN_POOLED_BYTES
        # With a device, because `torch.set_default_device` may name another one.
        make = f"empty_strided({arguments}, device=cpu)" if is_small else f"pooled({arguments})"
        if form.by_part:
            make = f"zeros({constant(form.shape)}, dtype={constant(form.dtype)}, device=cpu)"
        lines.append(f"    {names[slot]} = {make}")
    lines.append("    words = copy_of(packed)")
    lines += [f"    words[{word}] = {names[slot]}.data_ptr()" for slot, word in addresses.items()]
    lines += ["    run(words)", f"    return ({''.join(f'{names[slot]}, ' for slot in made)})"]
    parameters = ", ".join(names[slot] for slot in given)
    launch = "\n".join([f"def forward({parameters}):", *lines, ""])
    checks = []
    for is_operand, holds in conditions.items():
        own = ", ".join(names[slot] for slot in given if (slot[0] == "operand") == is_operand)
        checks.append(f"def forward({own}):\n    return {' and '.join(holds) or 'True'}\n")
    fits_operands, fits = (function_from_source(check, constants) for check in checks)
    return BoundLaunch(fits, fits_operands, function_from_source(launch, constants))
