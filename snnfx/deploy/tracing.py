"""Trace a net to an exported program: ATen calls with `scan` loops and named dynamic axes.

First the net is recorded with its real parameters, whose values Python may read, on fake inputs with symbolic sizes.
Then `torch.export` turns the recording, which calls no code of snnfx or of the model, into a program.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.deploy.recurrent_cells import CellsAsLayers
from snnfx.deploy.refusals import ExportRefused, first_line
from snnfx.sandbox.torch_internals import (
    SymbolicTensors,
    allow_size_one,
    pytree,
    quiet_fake_tensors,
    record_aten,
    without_size_guards,
)

__all__ = ["Axes", "TracedArgument", "trace"]

Axes = Mapping[int, tuple[str, int]]
"""Dimension -> (name of the axis, factor): `{1: ("N", 4)}` has the size 4 N."""


@dataclass(frozen=True)
class TracedArgument:
    """An argument of the exported program: a tree of tensors.

    Args:
        name: the name of the argument.
        value: its example, nested.
        axes: the dynamic dimensions of each tensor in it.
    """

    name: str
    value: Any
    axes: tuple[Axes, ...]


def trace(
    function: Callable[..., tuple[Any, dict[str, Any]]],
    arguments: Sequence[TracedArgument],
    rebuild: Callable[[Any, dict[str, Any]], Any],
    model: nn.Module,
) -> torch.export.ExportedProgram:
    """Trace a function of tensors.

    Args:
        function: `(*tensors) -> (flat outputs, states)`.
        arguments: the arguments of the program; their tensors are those of the function. Sizes of different axes must
            differ.
        rebuild: the return value of the program from outputs and states.
        model: the parameters and buffers of the program have the names that they have in this model.
    """
    tensors = [t for a in arguments for t in pytree.tree_leaves(a.value) if isinstance(t, Tensor)]
    axes = [axes for a in arguments for axes in a.axes]
    symbolic = SymbolicTensors()
    fake = [symbolic.like(t, list(a)) for t, a in zip(tensors, axes, strict=True)]
    spec: Any = None

    def flat(*inputs: Tensor) -> list[Any]:
        nonlocal spec
        leaves, spec = pytree.tree_flatten(rebuild(*function(*inputs)))
        # An output that is an input would alias it.
        return [leaf.clone() if any(leaf is x for x in inputs) else leaf for leaf in leaves]

    with symbolic, without_size_guards(), _without_torch_warnings(), CellsAsLayers():
        recorded = record_aten(flat, fake)
        if any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in recorded.graph.nodes):
            # The guards of torch on the strides of a written view would fix sizes.
            recorded = record_aten(torch.func.functionalize(recorded, remove="mutations"), fake)
    _name_constants(recorded, model)
    recorded.graph.eliminate_dead_code()
    recorded.recompile()
    module = _Recording(recorded, [a.name for a in arguments], spec)
    # Dimensions from 2 on, because torch guards whether one has size 1; then its code is valid for size 1, too.
    used = {axis for a in axes for axis in a.values()}
    dims = {name: torch.export.Dim(_dim_name(name, used), min=2) for name, _ in used}
    shapes = {a.name: _dynamic_shapes(a, dims) for a in arguments}
    program: torch.export.ExportedProgram
    try:
        with without_size_guards(), quiet_fake_tensors(), _without_torch_warnings():
            values = tuple(a.value for a in arguments)
            program = torch.export.export(module, values, dynamic_shapes=shapes, strict=False)
            program = program.run_decompositions({})
    except Exception as error:
        raise _refusal(error, dims) from error
    allow_size_one(program)
    _allow_other_layouts(program)
    _forget_origins(program)
    return program


@contextlib.contextmanager
def _without_torch_warnings() -> Iterator[None]:
    """Ignore warnings of torch about its own code in a trace."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        warnings.filterwarnings("ignore", message=".*LeafSpec")
        yield


class _Recording(nn.Module):
    """A recording with the arguments and the return value of the program."""

    def __init__(self, recorded: fx.GraphModule, names: Sequence[str], spec: Any) -> None:
        super().__init__()
        self.__dict__.update(_parameters=recorded._parameters, _buffers=recorded._buffers, _modules=recorded._modules)
        run = recorded.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            tensors = [t for t in pytree.tree_leaves(tuple(bound.arguments.values())) if isinstance(t, Tensor)]
            return pytree.tree_unflatten(list(run(*tensors)), spec)

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        forward.__signature__ = signature  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward


def _name_constants(recorded: fx.GraphModule, model: nn.Module) -> None:
    """Give the tensors that a recording reads the names that they have in the model."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    count = 0
    targets: set[str] = set()
    for node in recorded.graph.nodes:
        if node.op != "get_attr":
            continue
        value = getattr(recorded, node.target)
        if not isinstance(value, Tensor):
            continue
        known = names.get(id(value))
        if known is None or known.startswith("snnfx"):
            count += 1
            known = names[id(value)] = f"constants.{count}"
        if known not in targets:
            _set_tensor(recorded, known, value)
            targets.add(known)
        node.target = known
    for old in {n for n in recorded.__dict__["_parameters"] | recorded.__dict__["_buffers"] if "." not in n}:
        if old not in {node.target for node in recorded.graph.nodes}:
            delattr(recorded, old)


def _set_tensor(root: nn.Module, name: str, value: Tensor) -> None:
    *path, last = name.split(".")
    for atom in path:
        if atom not in root._modules:
            root._modules[atom] = nn.Module()
        child = root._modules[atom]
        assert child is not None
        root = child
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, nn.Parameter(value.detach(), requires_grad=False))
    else:
        root.register_buffer(last, value.detach())


def _dim_name(name: str, used: Collection[tuple[str, int]]) -> str:
    """The name of an axis in torch; SymPy, which computes the names of multiples, reads N as a function."""
    has_multiples = any(axis == name and factor > 1 for axis, factor in used)
    return f"axis_{name}" if has_multiples else name


def _dynamic_shapes(argument: TracedArgument, dims: Mapping[str, Any]) -> Any:
    leaves, spec = pytree.tree_flatten(argument.value)
    remaining = iter(argument.axes)
    shapes = [
        {d: factor * dims[name] if factor > 1 else dims[name] for d, (name, factor) in next(remaining).items()}
        if isinstance(leaf, Tensor)
        else None
        for leaf in leaves
    ]
    return pytree.tree_unflatten(shapes, spec)


def _refusal(error: Exception, dims: Mapping[str, Any]) -> ExportRefused:
    message = str(error)
    fixed = [
        name
        for name, dim in dims.items()
        if re.search(rf"[(`]{dim.__name__}[)`]|\b{dim.__name__} =", message) is not None
    ]
    if "onstraint" in message or "pecializ" in message:
        names = ", ".join(fixed or dims)
        rest = tuple(name for name in ("T", "N") if name in dims and name not in fixed)
        return ExportRefused(
            "SNNFX806",
            f"the axis {names} cannot be dynamic",
            why=f"torch.export: {first_line(error)}",
            hint=f"Export it with the sizes of the given inputs: dynamic={rest if fixed else ()!r}.",
        )
    return ExportRefused(
        "SNNFX805",
        "torch.export refuses the net",
        why=first_line(error),
        hint="Export a part of the model, or replace the operation named here.",
    )


_FOR_ANY_LAYOUT = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten.detach_copy.default: torch.ops.aten.clone.default,
}
"""Calls that need contiguous tensors or have no ONNX form -> calls with equal results for all layouts."""


def _allow_other_layouts(program: torch.export.ExportedProgram) -> None:
    """Let the program take inputs of any memory layout, such as `x.movedim(1, 0)`."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.target = _FOR_ANY_LAYOUT.get(node.target, node.target)
            module.recompile()


def _forget_origins(program: torch.export.ExportedProgram) -> None:
    """Remove stack traces and names of classes: the file refers to no source code."""
    kept = ("val", "tensor_meta", "unbacked_bindings")
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                node.meta = {key: node.meta[key] for key in kept if key in node.meta}
