"""`snnfx.export`: write a net to a file that runs without snnfx."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from snnfx._progress import progress
from snnfx._version import __version__
from snnfx.deploy.checking import check_file
from snnfx.deploy.interface import Interface, symbolic_shape
from snnfx.deploy.nir_export import DEFAULT_TIME_STEP, check_nir_options, write_nir
from snnfx.deploy.nir_file import require_nir
from snnfx.deploy.onnx_file import require_onnx, write_onnx
from snnfx.deploy.plan import ExportPlan, Request, plan_export
from snnfx.deploy.pt2_file import write_package, write_program
from snnfx.deploy.tracing import trace
from snnfx.deploy.written_files import written_at_once
from snnfx.errors import ExportError, warn_once
from snnfx.ir.facts import VALUE
from snnfx.ops.run_loop import LoopHandle
from snnfx.runtime.net import Net
from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Exported", "export", "export_request", "write_export"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A written export.

    Args:
        path: the file.
        files: all written files.
        interface: its inputs, states and outputs.
        axes: its dynamic axes.
        checked: the results that it was compared with; empty without a check.
    """

    path: Path
    files: tuple[Path, ...]
    interface: Interface
    axes: tuple[str, ...]
    checked: str

    def rows(self) -> list[tuple[str, str, str, str]]:
        """A table: the files, the dynamic axes, the check, and the tensors with name, shape and dtype."""
        files = [("file", str(f), f"{f.stat().st_size / 1024:.0f} KiB", "") for f in self.files]
        about = [
            ("axes", ", ".join(self.axes) or "none", "any size" if self.axes else "sizes of the inputs", ""),
            ("check", self.checked or "none", "", ""),
        ]
        return [*files, *about, *self.interface.rows()]


def export(
    net: Net,
    path: str | os.PathLike[str],
    *inputs: Any,
    state: bool = False,
    step: bool = False,
    dynamic: Sequence[str] = ("T", "N"),
    package: str | None = None,
    check: bool = True,
    T: int | None = None,
    dt: float | None = None,
) -> Path:
    """Write a net to a file that runs where snnfx is not installed.

    The file computes the net in evaluation mode. Before it is moved to `path`, it runs once in a process without snnfx
    on the given inputs, and its results are compared with those of the net. The net does not change.

    Args:
        net: a net of `snnfx.convert`.
        path: the file: `.pt2` for a program of torch.export or an AOTInductor package, `.onnx` for an ONNX model,
            `.nir` for a NIR graph (neuroir.org).
        *inputs: the arguments of a call of the net, `[T, N, *]`; with `step=True` of one time step, `[N, *]`.
        state: whether the file takes the states before the first step and returns those after the last, by slot name,
            so that a long stream can be run in pieces: as `net.run(x_seq, state=state)`.
        step: whether the file computes one time step, with its states.
        dynamic: the axes whose size is not fixed to that of `inputs`: "T" (time) and "N" (batch).
        package: "aot": compile a `.pt2` package with AOTInductor, for C++; it has at most one dynamic axis.
        check: whether to run the file and compare.
        T: the number of time steps, if no input has a time dimension; the file then has this number only.
        dt: for `.nir`, the time step in seconds that the time constants in the file refer to. Default: None, 1e-4.

    Returns:
        `path`. ONNX models with more than 100 MiB of weights have a second file beside them, `<name>.onnx.data`.

    Raises:
        ExportError: SNNFX801, an option or the suffix is illegal; SNNFX802, the file cannot be written; SNNFX803, a
            package is missing; SNNFX804 to 807, the net cannot be exported; SNNFX808, the file is wrong;
            SNNFX813 and 814, a layer or a neuron has no form in NIR; SNNFX827, onnxruntime has no kernel for the dtype;
            SNNFX828, a package is broken; SNNFX829, a state gets another dtype after the first step.
        InputError: the inputs are invalid, as for a call of the net; SNNFX327, the model fails for their sizes.

    Example:
        >>> import tempfile, torch, snnfx
        >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode())).eval()
        >>> x_seq = torch.rand(6, 4, 3)
        >>> path = snnfx.export(net, tempfile.mkdtemp() + "/net.pt2", x_seq)
        >>> torch.equal(torch.export.load(path).module()(x_seq[:, :1]), net(x_seq[:, :1]))
        True
    """
    request = export_request(state=state, step=step, dynamic=dynamic, package=package, T=T)
    with progress(f"export {Path(path).name}", unit="stages", delay=0.0) as bar:
        return write_export(net, path, inputs, request, package=package, check=check, dt=dt, announce=bar.start).path


def export_request(*, state: bool, step: bool, dynamic: Sequence[str], package: str | None, T: int | None) -> Request:
    """The checked options of `export`."""
    axes = _axes(dynamic)
    return Request(state, step, axes, T, package == "aot" and "N" in axes)


def write_export(
    net: Net,
    path: str | os.PathLike[str],
    inputs: tuple[Any, ...],
    request: Request,
    *,
    package: str | None = None,
    check: bool = True,
    dt: float | None = None,
    announce: Progress = lambda text: None,
) -> Exported:
    """Write a net to a file; `announce` is called before each stage. See `export`."""
    path = Path(path)
    kind = _kind(net, path, package, request)
    if kind == "nir":
        return _write_nir(net, path, inputs, request, DEFAULT_TIME_STEP if dt is None else dt, check, announce)
    if dt is not None:
        raise ExportError("SNNFX801", f"dt={dt!r} is an option of .nir files", hint="Leave dt out.")
    if kind == "onnx":
        require_onnx(check)
    with written_at_once(path) as folder, _untouched(net):
        announce("copy and plan the net")
        plan = _plan(net, inputs, request)
        announce("trace the net")
        with torch.no_grad():
            rebuild = _tensors_only(plan.rebuild) if kind == "onnx" else plan.rebuild
            program = trace(plan.function, plan.arguments, rebuild, plan.model)
        plan = _with_traced_outputs(plan, program)
        file = folder / path.name
        metadata = _metadata(plan, request)
        announce(f"write {path.name}")
        if kind == "onnx":
            write_onnx(program, file, plan.interface, _symbols(program, plan), metadata)
        elif kind == "aot":
            write_package(program, file, metadata)
        else:
            write_program(program, file, metadata)
        if check:
            announce("run the file without snnfx and compare")
            is_random = _draws_random_numbers(program)
            if is_random:
                warn_once("SNNFX810", f"{path.name} draws random numbers: only shapes and dtypes were compared.")
            check_file(kind, file, plan.examples, plan.interface, values=not is_random)
        files = tuple(sorted(path.parent / f.name for f in folder.iterdir()))
    tried = ["the given inputs", *[e.sizes for e in plan.examples[1:]]]
    checked = f"the net, for {' and for '.join(tried)}" if check else ""
    return Exported(path, files, plan.interface, _dynamic_axes(plan.interface), checked)


def _write_nir(
    net: Net, path: Path, inputs: tuple[Any, ...], request: Request, dt: float, check: bool, announce: Progress
) -> Exported:
    check_nir_options(state=request.state, step=request.step, dynamic=set(request.dynamic) != {"T", "N"})
    require_nir()
    with written_at_once(path) as folder, _untouched(net):
        announce("fit the neurons and write the graph")
        interface = write_nir(_in_evaluation(net), folder / path.name, inputs, dt, request.T, check)
    return Exported(path, (path,), interface, ("T", "N"), "the net, for the given inputs" if check else "")


def _axes(dynamic: Sequence[str]) -> tuple[str, ...]:
    axes = (dynamic,) if isinstance(dynamic, str) else tuple(dynamic)
    if not set(axes) <= {"T", "N"}:
        raise ExportError(
            "SNNFX801", f"dynamic={dynamic!r} names an unknown axis", hint='Pass "T", "N", both, or none: dynamic=().'
        )
    return axes


def _kind(net: Net, path: Path, package: str | None, request: Request) -> str:
    """The kind of the file: "pt2", "aot", "onnx" or "nir"."""
    if not isinstance(net, Net):
        raise ExportError(
            "SNNFX801", f"a {type(net).__name__} cannot be exported", hint="Pass a net: snnfx.convert(model)."
        )
    if package not in (None, "aot"):
        raise ExportError("SNNFX801", f"package={package!r} is unknown", hint='Pass package="aot" or None.')
    if path.suffix not in (".pt2", ".onnx", ".nir"):
        raise ExportError(
            "SNNFX801",
            f"`{path}` has the suffix `{path.suffix}`",
            why="the suffix selects the format.",
            hint="Use .pt2 (torch.export, AOTInductor), .onnx or .nir.",
        )
    if package == "aot" and path.suffix != ".pt2":
        raise ExportError("SNNFX801", f"`{path}` is not a .pt2 file", hint="Use the suffix .pt2, or package=None.")
    if net._executable.graphs.is_replaced:
        raise ExportError(
            "SNNFX801",
            "the graph of the net was replaced by hand",
            why="the export starts from the step program, which does not contain the change.",
            hint="Write the change as a pass, or into the model.",
        )
    if package == "aot" and {"T", "N"} <= set(request.dynamic) and not request.step:
        raise ExportError(
            "SNNFX807",
            "an AOTInductor package cannot have T and N dynamic",
            why="torch's AOTInductor fails on a scan whose body has a symbolic size (KeyError: 's27' in torch 2.13).",
            hint='Pass dynamic=("T",), for the batch size of the inputs, or dynamic=("N",), for their T.',
        )
    return "aot" if package == "aot" else path.suffix[1:]


def _plan(net: Net, inputs: tuple[Any, ...], request: Request) -> ExportPlan:
    if net.loops:
        handles = [value for value in net.program.constants.values() if isinstance(value, LoopHandle)]
        raise ExportError(
            "SNNFX819",
            f"the net with the loops at {', '.join(handle.location for handle in handles)} cannot be exported",
            why="code outside of its loops mixes time steps, so the net has no step that a file could repeat.",
            hint="Move this code out of the model and export the rest.",
        )
    if net.options.step_mode == "s" and not request.step:
        raise ExportError("SNNFX801", 'a net with step_mode="s" computes single steps', hint="Pass step=True.")
    if not request.takes_state:
        _announce_memory_options(net)
    net = _in_evaluation(net)
    plan = plan_export(net, inputs, request)
    persistent = [slot.name for slot in plan.function.executable.program.persistent_slots]
    if persistent and not request.takes_state:
        warn_once(
            "SNNFX812",
            f"each call of the file starts from the current value of {', '.join(persistent)}, which a call of the net "
            "changes; state=True makes it a state.",
        )
    return plan


def _announce_memory_options(net: Net) -> None:
    given = {"chunk": net.options.chunk, "memory_budget": net.options.memory_budget}
    kept = [f"{name}={value!r}" for name, value in given.items() if value not in (None, "auto")]
    if kept:
        warn_once(
            "SNNFX825",
            f"{' and '.join(kept)} of the net {'is' if len(kept) == 1 else 'are'} not exported: a call of the file "
            "computes all time steps at once. Export it with state=True and call it on pieces of the sequence.",
        )


def _in_evaluation(net: Net) -> Net:
    """A copy of the net in evaluation mode and in the reset state."""
    if net.training:
        warn_once("SNNFX811", "the net is in training mode; the file computes it in evaluation mode, as net.eval().")
    net = copy.deepcopy(net)
    net.eval()
    net.reset()
    return net


@contextlib.contextmanager
def _untouched(net: Net) -> Iterator[None]:
    """Restore the model and the RNG: hooks of a copy may refer to the original."""
    with isolated(net.source):
        yield


def _metadata(plan: ExportPlan, request: Request) -> dict[str, Any]:
    options = plan.function.executable.options
    return {
        "snnfx_version": __version__,
        "torch_version": str(torch.__version__),
        **plan.interface.to_dict(),
        "dynamic": list(_dynamic_axes(plan.interface)),
        "step": request.step,
        "reduce": options.reduce,
    }


def _dynamic_axes(interface: Interface) -> tuple[str, ...]:
    found = {axis for t in (*interface.inputs, *interface.states) for axis in ("T", "N") if axis in t.shape}
    return tuple(sorted(found, reverse=True))


def _symbols(program: torch.export.ExportedProgram, plan: ExportPlan) -> dict[str, str]:
    """Symbol of a dynamic size in the program -> name of its axis."""
    names = program.graph_signature.user_inputs
    by_name = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    nodes = [by_name[n] for n in names if isinstance(n, str) and n in by_name]
    tensors = [*plan.interface.inputs, *plan.interface.states]
    symbols: dict[str, str] = {}
    for node, tensor in zip([n for n in nodes if isinstance(VALUE.of(n), torch.Tensor)], tensors, strict=False):
        for size, axis in zip(VALUE.of(node).shape, tensor.shape, strict=True):
            if axis in ("T", "N"):
                symbols[str(size)] = str(axis)
    return symbols


def _with_traced_outputs(plan: ExportPlan, program: torch.export.ExportedProgram) -> ExportPlan:
    """The plan with the dynamic axes and dtypes of outputs and final states, which the trace found."""
    axes = _symbols(program, plan)
    found = [VALUE.of(n) for n in program.graph.output_node().args[0] if isinstance(n, fx.Node)]
    values = [v for v in found if isinstance(v, torch.Tensor)]
    interface, count = plan.interface, len(plan.interface.outputs)
    named = [*interface.outputs, *interface.final_states]
    described = [
        replace(t, shape=symbolic_shape(v.shape, axes), dtype=str(v.dtype).removeprefix("torch."))
        for t, v in zip(named, values, strict=True)
    ]
    interface = replace(interface, outputs=tuple(described[:count]), final_states=tuple(described[count:]))
    examples = plan.examples
    if plan.function.executable.program.first_step is not None:
        # The file stacks first and later steps, so its dtype holds both; one call of the net may have fewer steps.
        dtypes = [v.dtype for v in values]
        examples = tuple(replace(e, expected=_promoted(e.expected, dtypes)) for e in examples)
    return replace(plan, interface=interface, examples=examples)


def _promoted(expected: Any, dtypes: Sequence[torch.dtype]) -> Any:
    """The results with the dtypes of the file, where these have all of their values."""
    remaining = iter(dtypes)

    def promote(y: torch.Tensor) -> torch.Tensor:
        dtype = next(remaining)
        return y.to(dtype) if torch.promote_types(y.dtype, dtype) == dtype else y

    return pytree.tree_map_only(torch.Tensor, promote, expected)


def _tensors_only(rebuild: Callable[[Any, dict[str, Any]], Any]) -> Callable[[Any, dict[str, Any]], Any]:
    """The tensors of the return value: ONNX has no other outputs."""
    return lambda *results: [v for v in pytree.tree_leaves(rebuild(*results)) if isinstance(v, torch.Tensor)]


def _draws_random_numbers(program: torch.export.ExportedProgram) -> bool:
    nodes = [n for m in program.graph_module.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
    return any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in nodes)
