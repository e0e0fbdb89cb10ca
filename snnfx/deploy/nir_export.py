"""The `.nir` form of `snnfx.export`."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnfx.deploy.checking import compare_results
from snnfx.deploy.from_nir import from_nir
from snnfx.deploy.given_inputs import run_first_step, takes_one_sample
from snnfx.deploy.interface import FileTensor, Interface
from snnfx.deploy.nir_file import nir_graph, require_nir
from snnfx.deploy.nir_step import record_step, two_samples
from snnfx.deploy.refusals import first_line, refuse_opaque_parts
from snnfx.errors import ExportError, SnnfxError
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import flatten_state, outputs_without

__all__ = ["DEFAULT_TIME_STEP", "check_nir_options", "write_nir"]

DEFAULT_TIME_STEP = 1e-4
"""Seconds; the value that most tools for NIR use."""


def check_nir_options(**given: Any) -> None:
    """Refuse options that a NIR file cannot have; raises ExportError (SNNFX801)."""
    for name, is_given in given.items():
        if is_given:
            raise ExportError(
                "SNNFX801",
                f"a .nir file takes no option `{name}`",
                why="a NIR graph has no time axis, batch or states.",
                hint="Leave it out, or export a .pt2 file.",
            )


def write_nir(net: Net, path: Path, inputs: tuple[Any, ...], dt: float, T: int | None, check: bool) -> Interface:
    """Write a net in evaluation mode as a NIR graph, and compare the file with the net.

    Args:
        net: a copy of the net, which may change.
        path: the file.
        inputs: the arguments of a call.
        dt: the time step in seconds.
        T: the number of time steps, if no input has a time dimension.
        check: whether to compare.
    """
    if not (isinstance(dt, int | float) and math.isfinite(dt) and dt > 0):
        raise ExportError("SNNFX801", f"dt={dt!r} is illegal", hint="Pass a positive number of seconds, e.g. dt=1e-4.")
    planned = net.planned_for(*inputs, T=T)
    program = planned.program
    if net.options.reduce is not None:
        raise ExportError(
            "SNNFX813",
            f"reduce={net.options.reduce!r} has no form in NIR",
            why="a NIR graph returns its outputs at every step.",
            hint="Convert the model without reduce, and reduce the outputs where the file runs.",
        )
    refuse_opaque_parts(program)
    if program.first_step is not None:
        raise ExportError(
            "SNNFX813",
            "the first step of the net has no form in NIR",
            why="it differs from the later ones in more than the values of its states.",
            hint="Create the states before the first step, with register_memory.",
        )
    arguments = net._executable.arguments
    args, kwargs, carried = arguments.split_carried(inputs, {})
    leaves = arguments.bind(args, kwargs)
    dims = arguments.tensor_dims
    steps = [x if d is None else x.select(d, 0) for x, d in zip(leaves, dims, strict=True)]
    passed = {k: v for c in program.carried if c.name in carried for k, v in flatten_state(c, carried[c.name]).items()}
    _check_steps(planned, steps, passed)
    step = record_step(program, [x.cpu() if isinstance(x, Tensor) else x for x in steps], passed)
    graph = nir_graph(step, dt)
    require_nir().write(path, graph)
    if check:
        _check(net, path, inputs, leaves, T)
    return _interface(graph)


def _check_steps(net: Net, steps: list[Tensor], passed: dict[str, Any]) -> None:
    """Run the first step for the given inputs and for two samples; raises InputError and ExportError."""
    step_net = copy.deepcopy(net).convert_to("s")
    run_first_step(step_net, steps, passed)
    try:
        samples = {name: two_samples(torch.as_tensor(value)) for name, value in passed.items()}
        run_first_step(step_net, [two_samples(x) for x in steps], samples)
    except SnnfxError as error:
        raise ExportError(
            "SNNFX813",
            "the step has no form in NIR",
            why=takes_one_sample(net.program) or f"it fails for two samples: {first_line(error.__cause__ or error)}",
            hint="Write the step for any batch size, and pass inputs with a batch: [T, N, *].",
        ) from error


def _check(net: Net, path: Path, inputs: tuple[Any, ...], leaves: list[Tensor], T: int | None) -> None:
    model = from_nir(path)
    with torch.no_grad():
        expected = net(*inputs, T=T)
        expected = outputs_without(expected, [c.path for c in net.program.carried]) if net.program.carried else expected
        wanted = [y for y in pytree.tree_leaves(expected) if isinstance(y, Tensor)]
        dims = net._executable.arguments.tensor_dims
        lengths = [x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None]
        found = []
        for t in range(lengths[0] if lengths else T or 1):
            step = [x if d is None else x.select(d, t) for x, d in zip(leaves, dims, strict=True)]
            found.append(pytree.tree_leaves(model(*[x.to(_dtype(model)) for x in step])))
    results = [torch.stack(ys) for ys in zip(*found, strict=True)]
    arguments = net._executable.arguments
    results = [arguments.time_back(y) for y in results]
    compare_results(path, model.outputs, [y.to(w.dtype) for y, w in zip(results, wanted, strict=True)], wanted)


def _dtype(model: torch.nn.Module) -> torch.dtype:
    tensors = [t for t in model.state_dict().values() if t.is_floating_point()]
    return tensors[0].dtype if tensors else torch.float32


def _interface(graph: Any) -> Interface:
    def described(names: dict[str, Any]) -> tuple[FileTensor, ...]:
        shapes = {n: tuple(int(s) for s in node.input_type["input"]) for n, node in names.items()}
        return tuple(FileTensor(name, ("T", "N", *shape), "float") for name, shape in shapes.items())

    return Interface(described(graph.inputs), (), described(graph.outputs), ())
