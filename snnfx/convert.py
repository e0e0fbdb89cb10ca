"""`snnfx.convert`: from a single-step model to the net that runs whole sequences. The pipeline, as a list of passes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from snnfx.capture.capture import capture_both_modes
from snnfx.capture.carry_inference import infer_carry
from snnfx.errors import InputError
from snnfx.ir.graph_pass import Pass
from snnfx.ir.options import ConvertOptions, time_dims_of_leaves
from snnfx.ir.pass_manager import PassManager, PassRecord
from snnfx.ir.program import StepProgram
from snnfx.ir.verifier import verify_program
from snnfx.memory.budget import read_memory_budget
from snnfx.memory.checkpoint_option import check_checkpoint_option, refuse_statistics_over_time
from snnfx.memory.chunk_plan import check_chunk_option
from snnfx.memory.planning import refuse_impossible_budget
from snnfx.passes.absorb import Absorb
from snnfx.passes.choose_memory_format import ChooseMemoryFormat
from snnfx.passes.fold_batch_norm import FoldBatchNorm
from snnfx.passes.lower import Lower
from snnfx.passes.normalize import Normalize
from snnfx.passes.partition import Partition
from snnfx.passes.remove_dead_code import RemoveDeadCode
from snnfx.passes.sink_reductions import REDUCTIONS, SinkReductions
from snnfx.runtime.net import Net
from snnfx.state.carry import paths_of

__all__ = ["apply_edits", "convert", "convert_without_budget", "pipeline", "planning", "prepare_programs"]


def convert(
    model: nn.Module,
    step_mode: str = "m",
    *,
    example_inputs: Any = None,
    time_dim: Any = 0,
    entry: str = "forward",
    batch_norm: str = "fold",
    chunk: int | str | None = "auto",
    carry_state: bool = False,
    reduce: str | None = None,
    carry: Mapping[str, Any] | None = None,
    memory_format: str | None = "auto",
    lower: str | None = "auto",
    checkpoint: int | str | None = "auto",
    memory_budget: int | float | str | None = None,
) -> Net:
    """Convert a model of one time step into a net that runs sequences, with the same result.

    The model is not changed: not its parameters, state, hooks or flags, nor the random number generators. The net
    shares its modules, parameters and buffers, so training one trains the other.

    Args:
        model: computes ONE time step, `y_t = model(x_t)`, and keeps its state (membrane potentials) between calls.
            A converted net is taken as well: then only `step_mode` matters.
        step_mode: "m": the net takes sequences `x_seq: [T, N, *]`. "s": the single-step form of the same graph, which
            carries its state from call to call like the model does, until `snnfx.functional.reset_net(net)`.
        example_inputs: what ONE call of the model takes, batch dimension included: a tensor, a tuple of positional or
            a dict of keyword arguments. Needed when the model's code looks at shapes; otherwise it makes plans exact.
        time_dim: where T is in each input: an int, or a tuple with one entry for each argument (nested like vmap's
            `in_dims`); None for an input that is the same at every step. With an int the outputs have T there, too.
        entry: the name of the method that is one step.
        batch_norm: in training, "fold": statistics over T*N, as multi-step SNNs are trained; "per_step": statistics of
            each time step, exactly the stepped model. In evaluation mode there is no difference.
        chunk: in inference (evaluation mode without gradients), run this many time steps at once; None: all; "auto":
            as many as fit `memory_budget` and are not slower for it.
        reduce: "mean", "sum" or "last": return that over the time steps instead of sequences. It is moved as far up as
            it goes: linear layers at the end run once, on the reduced value.
        carry_state: keep the state from call to call, detached, until `reset_net(net)`.
        carry: for models that take and return their state: which argument is carried from which output, an index into
            what a step returns or a tuple of indices and keys, e.g. `{"mem1": 1, "mem2": 2}` for
            `forward(x, mem1, mem2) -> (spk, mem1, mem2)`. At the first step the argument is None, or what the caller
            gives: `net(x_seq, mem1, mem2)`. Where `example_inputs` has a value for an argument without a default, the
            caller has to give one. The net returns what the model returns, with the carried outputs as they are after
            the last step: `y_seq, state = net(x_seq)`. Their slots are named after the argument, e.g. "mem1" or
            "state.v". None: inferred (`net.program.inferred_carry` tells): trailing arguments named like a state, with
            the default None and left out of `example_inputs`, k of them, are carried from the last k of k + 1
            outputs. `{}`: nothing is carried.
        memory_format: "auto": images between 2-d convolutions have their channels innermost in memory on a CPU, which
            is faster; None: tensors keep the format in which the model makes them.
        lower: "auto": a loop whose steps compute every element on its own (neurons) runs as one generated kernel for
            all time steps, forward and backward, on CPUs with a C++ compiler; `explain` tells which. None: PyTorch runs
            every step of every loop.
        checkpoint: what training keeps less of and computes again in the backward pass. An int: the state every so many
            time steps, and nothing in between; "selective": everything but products (convolutions, linear layers,
            attention) is computed again; "regions": everything is, from the inputs of each region, spikes in bits;
            "auto": as little as `memory_budget` allows, nothing without a budget; None: nothing is computed again.
            Gradients are the same; random numbers and running statistics are those of one run.
        memory_budget: bytes that one call may allocate besides parameters and inputs (in training, until the backward
            pass is through, gradients of the parameters included), an int, or text: "512MiB", "2G" (2 * 2**30), "2GB"
            (2 * 10**9); a float is a part of the memory that is free at the first call; None: half of it for
            inference, no limit for training.

    Returns:
        A `snnfx.Net` (a torch.fx.GraphModule).

    Raises:
        CaptureError: the model cannot be captured (codes 2xx).
        InputError: an option or `example_inputs` does not fit; SNNFX314: which outputs are the state is not clear;
            SNNFX317: `checkpoint` would change the statistics of a BatchNorm; SNNFX318: not even with `example_inputs`
            and one time step is `memory_budget` enough.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfx.neuron.LIFNode(tau=2.0), torch.nn.Linear(4, 2))
        >>> net = snnfx.convert(model, step_mode="m")
        >>> net(torch.rand(8, 16, 3)).shape
        torch.Size([8, 16, 2])
        >>> [region.kind for region in net.regions]
        ['fold', 'loop', 'fold']
    """
    if isinstance(model, Net):
        _check_choice("step_mode", step_mode, ("m", "s"))
        return model.convert_to(step_mode)
    options = ConvertOptions(
        step_mode,
        time_dim,
        entry,
        batch_norm,
        chunk,
        carry_state,
        reduce,
        None,
        memory_format,
        lower,
        checkpoint,
        read_memory_budget(memory_budget),
    )
    net = convert_without_budget(model, options, example_inputs, carry)
    if memory_budget is not None:
        refuse_impossible_budget(net._executable)
    return net


def convert_without_budget(
    model: nn.Module, options: ConvertOptions, example_inputs: Any = None, carry: Mapping[str, Any] | None = None
) -> Net:
    """What `convert` does, but for the refusal of a budget that is too small.

    Args:
        model, example_inputs, carry: as for `convert`.
        options: the others; its `carry` is not looked at.
    """
    _check_choice("step_mode", options.step_mode, ("m", "s"))
    _check_choice("batch_norm", options.batch_norm, ("fold", "per_step"))
    if options.reduce is not None:
        _check_choice("reduce", options.reduce, REDUCTIONS)
    if options.memory_format is not None:
        _check_choice("memory_format", options.memory_format, ("auto",))
    if options.lower is not None:
        _check_choice("lower", options.lower, ("auto",))
    check_chunk_option(options.chunk)
    check_checkpoint_option(options.checkpoint)
    paths = paths_of(carry) if carry is not None else infer_carry(model, options.entry, example_inputs)
    options = replace(options, carry=paths or None)
    programs, history = prepare_programs(model, options, example_inputs, inferred_carry=carry is None)
    if isinstance(options.checkpoint, int):
        # A model in evaluation mode is told when it is trained.
        what = f"checkpoint={options.checkpoint}"
        refuse_statistics_over_time(programs[model.training], model.training, what)
    return Net(model, programs, options, history, _convert_for_shapes)


def pipeline(program: StepProgram, options: ConvertOptions) -> list[Pass]:
    """The passes that lead from a captured step to its regions."""
    invariant = _invariant_inputs(program, options)
    sinking = [SinkReductions(reduce=options.reduce, invariant_inputs=invariant)] if options.reduce is not None else []
    return [Normalize(), RemoveDeadCode(), *sinking, *planning(program, options)]


def planning(program: StepProgram, options: ConvertOptions) -> list[Pass]:
    """The last part of the pipeline, after which nothing of the step changes: regions, layouts, kernels."""
    layout = [ChooseMemoryFormat()] if options.memory_format is not None else []
    partition = Partition(batch_norm=options.batch_norm, invariant_inputs=_invariant_inputs(program, options))
    return [partition, *layout, *([Lower(), Absorb()] if options.lower is not None else []), FoldBatchNorm()]


def apply_edits(net: Net, edits: Sequence[Pass], **changes: Any) -> Net:
    """A net with edits made to its step, between the passes that simplify the step and those that plan its regions.

    Args:
        net: stays as it is; modules, parameters and buffers are shared.
        edits: passes that take and leave a program at stage "normalized", for both modes.
        **changes: fields of the net's `ConvertOptions` that are to be others.
    """
    options = replace(net.options, **changes)
    programs: dict[bool, StepProgram] = {}
    history: list[PassRecord] = list(net.history)
    for mode in (True, False):
        program = net.programs[mode].copy().unplanned()
        program.training = mode
        done = PassManager([*edits, *planning(program, options)]).run(program)
        history += done if mode else []
        programs[mode] = program
    if _same_plan(*programs.values()) and _same_steps(*programs.values()):
        programs[False] = programs[True]
    return Net(net.source, programs, options, history, partial(_edited_for_shapes, tuple(edits), net._replan))


def _edited_for_shapes(
    edits: tuple[Pass, ...], replan: Callable[..., Net] | None, net: Net, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Net:
    """The edited net for inputs that its plan does not cover."""
    return apply_edits((replan or _convert_for_shapes)(net, args, kwargs), edits)


def _invariant_inputs(program: StepProgram, options: ConvertOptions) -> tuple[str, ...]:
    dims = time_dims_of_leaves(options.time_dim, program)
    leaves = zip(program.input_leaves, dims, strict=True)
    return tuple(leaf.placeholder for leaf, dim in leaves if leaf.placeholder and dim is None)


def prepare_programs(
    model: nn.Module, options: ConvertOptions, example_inputs: Any, inferred_carry: bool = False
) -> tuple[dict[bool, StepProgram], list[PassRecord]]:
    """Capture a model in both modes and run the pipeline: `({training: program}, history)`."""
    start = time.perf_counter()
    training, evaluation = capture_both_modes(model, example_inputs, options.entry, options.carry)
    for program in (training, evaluation):
        program.inferred_carry = inferred_carry and bool(options.carry)
    captured = (time.perf_counter() - start) * 1e3
    same_graph = training is evaluation
    note = f"{len(training.graph.nodes)} nodes, {len(training.slots)} slots"
    history = [PassRecord("capture", captured, note, str(training))]
    verify_program(training)
    if same_graph:
        # BatchNorm is planned by mode even where the graph is one.
        evaluation = training.copy()
        evaluation.training = False
    PassManager(pipeline(training, options)).run(training, history)
    evaluation_history = PassManager(pipeline(evaluation, options)).run(evaluation)
    if same_graph and _same_plan(training, evaluation):
        evaluation = training
    else:
        history += evaluation_history
    return {True: training, False: evaluation}, history


def _same_steps(a: StepProgram, b: StepProgram) -> bool:
    """Whether two programs compute the same with the same: then one of them does for both modes."""
    return str(a) == str(b) and a.constants.keys() == b.constants.keys()


def _same_plan(a: StepProgram, b: StepProgram) -> bool:
    def plan(program: StepProgram) -> list[Any]:
        return [(r.kind, [n.name for n in r.nodes], r.slots) for r in program.regions]

    dims_a = [n.meta.get("batch_dim") for n in a.graph.nodes]
    return (
        plan(a) == plan(b)
        and a.setting_reads == b.setting_reads
        and dims_a == [n.meta.get("batch_dim") for n in b.graph.nodes]
    )


def _convert_for_shapes(net: Net, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Net:
    """The net for inputs that the plan of `net` does not cover: captured again with their shapes (none: without)."""
    example: Any = (kwargs if kwargs and not args else args) or None
    if args and kwargs:
        method = getattr(type(net.source), net.options.entry)
        example = {**dict(zip(list(inspect.signature(method).parameters)[1:], args, strict=False)), **kwargs}
    programs, history = prepare_programs(net.source, net.options, example, net.program.inferred_carry)
    return Net(net.source, programs, net.options, history, _convert_for_shapes)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError("SNNFX309", f"{name}={value!r}", hint=f"Choose one of {', '.join(map(repr, choices))}.")
