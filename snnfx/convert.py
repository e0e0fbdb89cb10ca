"""`snnfx.convert`: capture a single-step model and run the pass pipeline, which turns it into a multi-step net."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from snnfx._progress import Progress, progress
from snnfx.analysis.batch_norm_folding import unfolded_batch_norms
from snnfx.capture.capture import capture_both_modes
from snnfx.capture.carry_inference import infer_carry
from snnfx.errors import InputError, warn_once
from snnfx.ir.facts import BATCH_DIM, SUNK, VALUE
from snnfx.ir.graph_pass import MODEL_CHANGES, Pass, check_passes, stages_of
from snnfx.ir.history import History, PassRecord
from snnfx.ir.model_snapshot import ModelSnapshot
from snnfx.ir.options import ConvertOptions
from snnfx.ir.pass_manager import PassManager, print_record
from snnfx.ir.printing import describe_node
from snnfx.ir.program import STAGES, StepProgram
from snnfx.ir.program_equality import has_same_nodes
from snnfx.ir.program_snapshot import ProgramSnapshot
from snnfx.ir.verifier import verify_program
from snnfx.memory.budget import read_memory_budget
from snnfx.memory.checkpoint_option import (
    check_checkpoint_option,
    refuse_changed_parameters,
    refuse_statistics_over_time,
)
from snnfx.memory.chunk_plan import check_chunk_option
from snnfx.memory.planning import refuse_impossible_budget
from snnfx.passes.normalize import Normalize
from snnfx.passes.remove_dead_code import RemoveDeadCode
from snnfx.passes.sink_reductions import REDUCTIONS
from snnfx.passes.standard_pipeline import pipeline, planning, replanning
from snnfx.runtime.net import Net
from snnfx.runtime.whole_sequences import refuse_without_step
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import step_signature
from snnfx.sequence.call_capture import CapturedCall, capture_calls, roll_fixed_loops
from snnfx.sequence.derived_step import DerivedStep, derive_step
from snnfx.sequence.pointwise_time import MixesTime
from snnfx.state.carry import paths_of

__all__ = [
    "REPLANS",
    "apply_edits",
    "convert",
    "convert_again",
    "convert_without_budget",
    "pipeline",
    "prepare_programs",
]


def convert(
    model: nn.Module,
    step_mode: str = "m",
    *,
    example_inputs: Any = None,
    time_dim: Any = 0,
    entry: str = "forward",
    batch_norm: str | None = None,
    takes: str = "step",
    chunk: int | str | None = "auto",
    carry_state: bool = False,
    reduce: str | None = None,
    carry: Mapping[str, Any] | None = None,
    memory_format: str | None = "auto",
    lower: str | None = "auto",
    checkpoint: int | str | None = "auto",
    memory_budget: int | float | str | None = None,
    passes: Sequence[Pass] = (),
) -> Net:
    """Convert a single-step model into a net that runs whole sequences.

    The net computes the same as calling the model once per time step, except that BatchNorm layers take their training
    statistics over all time steps by default (see `batch_norm`). The model is not changed: parameters, state, hooks,
    flags and random number generators stay the same. The net shares the model's modules, parameters and buffers, so
    training one trains the other.

    Args:
        model: a module that computes ONE time step, `y_t = model(x_t)` with `x_t: [N, *]`, and keeps its state
            (membrane potentials) between calls; with `takes="sequence"`, a module that runs over time itself. For a
            converted net, all options except `step_mode` are ignored.
        step_mode: "m" (default): the net takes sequences `x_seq: [T, N, *]`. "s": the net takes one time step and
            carries its state across calls, like the model, until `snnfx.functional.reset_net(net)`.
        example_inputs: inputs of ONE time step, with the batch dimension: a tensor `[N, *]`, a tuple of positional
            arguments or a dict of keyword arguments. Required if the model's code reads shapes; otherwise it makes
            reports and plans exact. Calls then need inputs with these numbers of dimensions. Default: None, the net is
            planned once for each number of dimensions.
        time_dim: time dimension of the inputs: an int for all, or a tuple with one entry for each argument (nested like
            `in_dims` of `torch.vmap`); None for an input that is the same at every step. With an int, the outputs have
            the same time dimension. Default: 0.
        entry: name of the method that computes one step. Default: "forward".
        takes: the input of one call of the model. "step" (default): one time step. "sequence": the model runs over time
            itself, in loops of its code; `example_inputs` are then the inputs of one whole call, and the net takes and
            returns the same as the model. Each call starts from the reset state. If the model takes the number of time
            steps from a size of its inputs, the net runs sequences of any length.
        batch_norm: BatchNorm statistics in training. None (default): "fold" for steps; for sequences those of the
            model, which a layer inside a loop takes in each iteration. "fold": over all T*N samples, as is usual for
            multi-step SNNs; "per_step": of each time step, as in the stepped model. Evaluation mode is the same for
            both. With "fold", the running statistics take one update for the whole sequence. If the model reads them
            (`self.bn.running_mean`), a read in front of the call gets the value before this update and a read behind
            the call the value after it, the same at every step; with T = 1 this equals one call of the model. With
            "per_step", each step reads the value that the stepped model reads. A BatchNorm that cannot fold (on a cycle
            through time, or inside a module that cannot be traced) uses the statistics of each time step; `convert`
            warns (SNNFX112) and `explain` gives the reason. If the first step differs from the later steps
            outside the loops, it takes statistics of its own, with a warning (SNNFX224).
        chunk: number of time steps in a chunk in inference (evaluation mode without gradients). An int; None: all;
            "auto" (default): as many as fit `memory_budget`, and no more than run fast.
        carry_state: True to carry the state across calls, detached, until `reset_net(net)`. Default: False, every call
            starts from the reset state.
        reduce: "mean", "sum" or "last" to reduce the outputs over time. Linear layers at the end run once, on the
            reduced value. Default: None, the outputs are sequences.
        carry: for models that take and return their state: maps each state argument to the output that it receives at
            the next step, an index into the return value or a tuple of indices and keys, e.g. `{"mem1": 1, "mem2": 2}`
            for `forward(x, mem1, mem2) -> (spk, mem1, mem2)`. At the first step the argument is None, or the caller
            passes it: `net(x_seq, mem1, mem2)`. The caller must pass it if it has no default and `example_inputs` has a
            value for it. The net returns the carried outputs as after the last step: `y_seq, state = net(x_seq)`.
            Their slots are named after the argument, e.g. "mem1" or "state.v". `{}`: no argument is carried. None
            (default): inferred, see `net.program.inferred_carry`: k trailing arguments that are named like a state,
            default to None and are not in `example_inputs` receive the last k of k + 1 outputs.
        memory_format: "auto" (default): on a CPU, images between 2-d convolutions are in channels-last format, which is
            faster; for a small convolution, the first call measures which format is. None: tensors keep the format of
            the model. `torch.use_deterministic_algorithms(True)` and the environment variable SNNFX_MEASURE=0 pin this
            and all other measured choices (`snnfx.explain` shows them).
        lower: "auto" (default): on a CPU with a C++ compiler, a loop with element-wise steps (neurons) runs as one
            generated kernel for all time steps, forward and backward; `explain` lists these loops. A loop of at most
            8 small steps with products runs step by step if that is measured to be faster. A linear layer or
            convolution that reads spikes visits only the inputs that are not zero, if they are few enough to be
            faster; its sums have another order, so results differ from the dense layer by rounding. "dense": kernels
            for loops, but all layers dense. None: PyTorch runs every step of every loop.
        checkpoint: recomputation in the backward pass, to save memory in training. An int k: save only the state every
            k time steps, recompute the rest; "selective": recompute everything except products (convolutions, linear
            layers, attention); "regions": recompute everything from the inputs of each region, with spikes saved as
            bits; "auto" (default): as little as `memory_budget` allows, nothing without a budget; None: nothing.
            Gradients are the same; random numbers are drawn and running statistics updated only once.
        memory_budget: memory that one call may allocate besides parameters and inputs (in training: until the end of
            the backward pass, gradients of parameters included). An int: bytes; text: "512MiB", "2G" (2 * 2**30 bytes),
            "2GB" (2 * 10**9 bytes); a float: a fraction of the memory that is free at the first call. None (default):
            half of the free memory in inference, no limit in training.
        passes: your own passes (`snnfx.passes.Pass`). Each runs at the end of the stage that it requires, on the steps
            of both modes and again whenever the net is planned again; for a model that runs over time itself, also on
            the code around its loops. `net.history` shows what it changed.

    Returns:
        A `snnfx.Net` (a torch.fx.GraphModule).

    Raises:
        CaptureError: the model cannot be captured (codes 2xx).
        InputError: SNNFX309, an option has an illegal value; SNNFX307, `example_inputs` do not match the model;
            SNNFX314, it is ambiguous which outputs are the state; SNNFX317, `checkpoint` would change BatchNorm
            statistics; SNNFX318, `memory_budget` is too small for one time step of `example_inputs`.
        PassError: a pass is not well defined (SNNFX702), fails (703, 704), breaks the graph (501) or changes a part
            that it does not declare (701).

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
        if passes:
            raise InputError(
                "SNNFX309",
                "passes= is not supported for a converted net",
                hint="Convert the model with passes=, snnfx.convert(net.source, passes=...).",
            )
        return model.convert_to(step_mode)
    options = ConvertOptions(
        step_mode,
        time_dim,
        entry,
        batch_norm,  # type: ignore[arg-type]
        chunk,
        carry_state,
        reduce,
        None,
        memory_format,
        lower,
        checkpoint,
        read_memory_budget(memory_budget),
        passes,
        takes,
    )
    net = convert_without_budget(model, options, example_inputs, carry)
    if memory_budget is not None:
        refuse_impossible_budget(net._executable)
    return net


def convert_without_budget(
    model: nn.Module, options: ConvertOptions, example_inputs: Any = None, carry: Mapping[str, Any] | None = None
) -> Net:
    """Convert a model like `convert`, without refusing a memory budget that is too small.

    Args:
        model, example_inputs, carry: see `convert`.
        options: all other options; its field `carry` is ignored.
    """
    options = replace(options, passes=check_passes(options.passes, in_convert=True))
    _check_choice("step_mode", options.step_mode, ("m", "s"))
    _check_choice("takes", options.takes, ("step", "sequence"))
    if options.batch_norm is None:
        options = replace(options, batch_norm="fold" if options.takes == "step" else "per_step")
    _check_choice("batch_norm", options.batch_norm, ("fold", "per_step"))
    if options.reduce is not None:
        _check_choice("reduce", options.reduce, REDUCTIONS)
    if options.memory_format is not None:
        _check_choice("memory_format", options.memory_format, ("auto",))
    if options.lower is not None:
        _check_choice("lower", options.lower, ("auto", "dense"))
    check_chunk_option(options.chunk)
    check_checkpoint_option(options.checkpoint)
    with _restoring_on_failure(model, options.passes):
        if options.takes == "sequence":
            return convert_sequence_model(model, options, example_inputs)
        return _convert_step_model(model, options, example_inputs, carry)


@contextmanager
def _restoring_on_failure(model: nn.Module, passes: Sequence[Pass]) -> Iterator[None]:
    """Put the model back if the conversion fails after passes changed parts of it that they declare."""
    changes_model = any(change in MODEL_CHANGES for item in passes for change in item.may_change)
    snapshot = ModelSnapshot(model) if changes_model else None
    try:
        yield
    except BaseException:
        if snapshot is not None:
            snapshot.restore()
        raise


def _convert_step_model(
    model: nn.Module, options: ConvertOptions, example_inputs: Any, carry: Mapping[str, Any] | None
) -> Net:
    """Convert a model whose call is one time step."""
    paths = paths_of(carry) if carry is not None else infer_carry(model, options.entry, example_inputs)
    options = replace(options, carry=paths or None)
    programs, history = prepare_programs(model, options, example_inputs, inferred_carry=carry is None)
    if isinstance(options.checkpoint, int):
        # For a model in evaluation mode, the error is raised when it is trained.
        what = f"checkpoint={options.checkpoint}"
        refuse_statistics_over_time(programs[model.training], model.training, what)
        refuse_changed_parameters(programs[model.training], what)
    if options.batch_norm == "fold" and options.step_mode == "m" and model.training:
        _warn_of_unfolded_batch_norms(programs[True])
    return Net(model, programs, options, history, _convert_for_shapes)


def convert_sequence_model(model: nn.Module, options: ConvertOptions, example_inputs: Any) -> Net:
    """Convert a model that runs over time itself: each of its loops becomes a net, called from the rest of the call."""
    if example_inputs is None:
        raise InputError(
            "SNNFX233",
            'takes="sequence" needs example_inputs',
            why="the loops of the model are found by capturing a call on short sequences.",
            hint="Pass example_inputs=(x_seq,) with the inputs of one whole call.",
        )
    history = History()
    calls = capture_calls(model, example_inputs, options.entry, history)
    try:
        return _convert_derived(model, calls, options, history)
    except MixesTime as mixing:
        reason = mixing
    _refuse_options_of_steps(options, reason)
    roll_fixed_loops(calls, history)
    for call in calls:
        call.program.whole_sequences = (reason.why, reason.location)
    training = _with_loop_nets(model, calls[0], options, history)
    evaluation = training.copy() if calls[1] is calls[0] else _with_loop_nets(model, calls[1], options, history)
    if options.passes:
        evaluation.training = False
        _run_around_loops(training, options, history)
        _run_around_loops(evaluation, options, History())
    if calls[1] is calls[0] and has_same_nodes(training, evaluation):
        evaluation = training
    options = replace(options, step_mode="s")
    programs = _separate_from_passes({True: training, False: evaluation}, options)
    return Net(model, programs, options, history, _convert_sequence_again)


def _convert_derived(model: nn.Module, calls: Sequence[CapturedCall], options: ConvertOptions, history: History) -> Net:
    """A multi-step net for a model whose call is pointwise in time but for its loops.

    Raises:
        MixesTime: it is not.
    """
    start = time.perf_counter()
    steps = [derive_step(call) for call in calls]
    first = steps[0]
    if any((step.time_dim, step.reduce) != (first.time_dim, first.reduce) for step in steps):
        raise MixesTime("the call returns other time dimensions in training than in evaluation")
    if first.reduce is not None and options.reduce not in (None, first.reduce):
        raise MixesTime(f"the call reduces over time, and reduce={options.reduce!r} is given")
    norms = "fold" if first.norms == "fold" else options.batch_norm
    step_mode = options.step_mode
    options = replace(
        options, step_mode="m", time_dim=first.time_dim, reduce=first.reduce or options.reduce, batch_norm=norms
    )
    programs: dict[bool, StepProgram] = {}
    derived = (time.perf_counter() - start) * 1e3
    history = History(history)
    for mode, step in zip((True, False), steps, strict=True):
        program = programs[mode] = step.program
        program.training = mode
        verify_program(program, after="derive_step")
        if mode:
            note = f"{len(program.graph.nodes)} nodes, {len(program.slots)} slots"
            ir, snapshot = str(program), ProgramSnapshot(program)
            history.append(PassRecord("derive_step", derived, note, ir, history[-1].ir, "captured", True, snapshot))
            print_record(history[-1])
        if step.reduce == "mean" and any("graph" in item.may_change for item in options.passes):
            step.mark_reduction()
        PassManager(pipeline(program, options)).run(program, history if mode else None)
        _check_reduction(program, step)
    if _same_plan(*programs.values()) and _same_steps(*programs.values()):
        programs[False] = programs[True]
    programs = _separate_from_passes(programs, options)
    return Net(model, programs, options, history, _convert_derived_again).convert_to(step_mode)


def _check_reduction(program: StepProgram, step: DerivedStep) -> None:
    """Check that the operations behind a mean over time may run on each step: they are affine."""
    if step.reduce != "mean":
        return
    for node in step.nodes_behind():
        if not SUNK.of(node):
            raise MixesTime(f"{describe_node(node)} reads the mean over time and is not affine", node)


def _refuse_options_of_steps(options: ConvertOptions, reason: MixesTime) -> None:
    """Refuse the options that only nets with a step form have."""
    given = {
        "chunk": isinstance(options.chunk, int),
        "memory_budget": options.memory_budget is not None,
        "reduce": options.reduce is not None,
        "step_mode": options.step_mode == "s",
    }
    for name, is_given in given.items():
        if is_given:
            refuse_without_step(f"{name}={getattr(options, name)!r}", reason.why, reason.location)


def _convert_derived_again(net: Net, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Net:
    """Capture a model whose call is one loop again, for the inputs of one step."""
    args, kwargs = _repeated_steps(net.options.time_dim, args, kwargs)
    return _convert_sequence_again(net, args, kwargs)


def _repeated_steps(dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of two time steps, from those of one step."""

    def repeated(x: Any) -> Any:
        return torch.stack([x] * 2, dim) if isinstance(x, torch.Tensor) else x

    return pytree.tree_map(repeated, (args, kwargs))  # type: ignore[no-any-return]


def _with_loop_nets(model: nn.Module, call: CapturedCall, options: ConvertOptions, history: History) -> StepProgram:
    """The program of a call with a net for each of its loops."""
    program = call.program
    for loop in call.loops:
        dims = tuple(0 if varies else None for varies in loop.varying)
        of_loop = replace(options, step_mode="m", time_dim=dims, carry_state=False, takes="step")
        training, evaluation = loop.program, loop.program.copy()
        evaluation.training = False
        history += PassManager(pipeline(training, of_loop)).run(training)
        PassManager(pipeline(evaluation, of_loop)).run(evaluation)
        programs = {True: training, False: training if _same_plan(training, evaluation) else evaluation}
        handle = program.constants[loop.target]
        handle.net = Net(model, _separate_from_passes(programs, options), of_loop, history[-1:], _plan_loop_again)
    return program


def _run_around_loops(program: StepProgram, options: ConvertOptions, history: History) -> None:
    """Run the user's passes on the code around the loops of a call, which is normalized and has no regions."""
    for item in sorted(options.passes, key=lambda item: STAGES.index(stages_of(item)[0])):
        program.stage = stages_of(item)[0]
        PassManager([item, *([Normalize()] if program.stage == "captured" else [])]).run(program, history)
        program.stage = "normalized"
    PassManager([RemoveDeadCode()]).run(program, history)


def _plan_loop_again(net: Net, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Net:
    """Plan the step of a loop again, for inputs of which other dimensions are the batch."""
    programs: dict[bool, StepProgram] = {}
    for mode in (True, False):
        program = programs[mode] = net.programs[mode].copy().unplanned()
        program.training = mode
        for node, x in zip(program.input_nodes(), args, strict=True):
            VALUE.set(node, torch.empty_like(x, device="meta"))
        PassManager(planning(program, net.options)).run(program)
    return Net(net.source, programs, net.options, net.history, _plan_loop_again, net.first_attributes)


def _convert_sequence_again(net: Net, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Net:
    """Capture a model that runs over time itself again, for the inputs of a call."""
    example = _example_inputs(net.source, net.options.entry, args, kwargs)
    is_whole = net.program.whole_sequences is not None  # then its step mode is not the user's
    options = replace(net.options, step_mode="m") if is_whole else net.options
    return convert_sequence_model(net.source, options, example)


def _warn_of_unfolded_batch_norms(program: StepProgram) -> None:
    unfolded = unfolded_batch_norms(program)
    if unfolded:
        reasons = "; ".join(f"`{name}`: {reason}" for name, reason in unfolded.items())
        warn_once(
            "SNNFX112",
            f'with batch_norm="fold", these BatchNorms use the statistics of each time step in training ({reasons}). '
            'Convert with batch_norm="per_step" so that all of them do, or move them off the cycle.',
        )


def apply_edits(net: Net, edits: Sequence[Pass], **changes: Any) -> Net:
    """Apply edits to the normalised step of a net, plan its regions again, and return a new net.

    Args:
        net: the net, which is not changed; the new one shares its modules, parameters and buffers.
        edits: passes that take and leave a program at stage "normalized"; they run for both modes.
        **changes: new values of fields of the net's `ConvertOptions`.
    """
    options = replace(net.options, **changes)
    programs: dict[bool, StepProgram] = {}
    history = History(net.history)
    for mode in (True, False):
        program = net.programs[mode].copy().unplanned()
        program.training = mode
        done = PassManager([*edits, *replanning(program, options)]).run(program)
        history += done if mode else []
        programs[mode] = program
    if _same_plan(*programs.values()) and _same_steps(*programs.values()):
        programs[False] = programs[True]
    replan = partial(_edited_for_shapes, tuple(edits), net._replan)
    return Net(net.source, programs, options, history, replan, net.first_attributes)


def _edited_for_shapes(
    edits: tuple[Pass, ...], replan: Callable[..., Net] | None, net: Net, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Net:
    """Plan an edited net again, for inputs that its plan does not cover."""
    return apply_edits((replan or _convert_for_shapes)(net, args, kwargs), edits)


def prepare_programs(
    model: nn.Module, options: ConvertOptions, example_inputs: Any, inferred_carry: bool = False
) -> tuple[dict[bool, StepProgram], History]:
    """Capture a model in both modes and run the pipeline: `({training: program}, history)`."""
    with progress(f"convert {type(model).__name__}", unit="passes") as bar:
        bar.start("capture")
        return _prepared(model, options, example_inputs, inferred_carry, bar)


def _prepared(
    model: nn.Module, options: ConvertOptions, example_inputs: Any, inferred_carry: bool, bar: Progress
) -> tuple[dict[bool, StepProgram], History]:
    start = time.perf_counter()
    training, evaluation = capture_both_modes(model, example_inputs, options.entry, options.carry)
    for program in (training, evaluation):
        program.inferred_carry = inferred_carry and bool(options.carry)
    captured = (time.perf_counter() - start) * 1e3
    same_graph = training is evaluation
    note = f"{len(training.graph.nodes)} nodes, {len(training.slots)} slots"
    verify_program(training)
    mode = None if same_graph else True
    history = History(
        [PassRecord("capture", captured, note, str(training), "", "captured", mode, ProgramSnapshot(training))]
    )
    print_record(history[0])
    if same_graph:
        # Both modes may share one graph, but BatchNorm is planned for each mode.
        evaluation = training.copy()
        evaluation.training = False
    PassManager(pipeline(training, options)).run(training, history, bar)
    evaluation_history = PassManager(pipeline(evaluation, options)).run(evaluation, bar=bar)
    if same_graph and _same_plan(training, evaluation) and (not options.passes or has_same_nodes(training, evaluation)):
        evaluation = training
    else:
        history += evaluation_history
    return _separate_from_passes({True: training, False: evaluation}, options), history


def _separate_from_passes(programs: dict[bool, StepProgram], options: ConvertOptions) -> dict[bool, StepProgram]:
    """Copies of the programs if a user's pass may have kept them and change them later."""
    if not options.passes:
        return programs
    training = programs[True].copy()
    return {True: training, False: training if programs[False] is programs[True] else programs[False].copy()}


def _same_steps(a: StepProgram, b: StepProgram) -> bool:
    """Whether two programs have the same step and constants, so that one of them serves both modes."""
    return str(a) == str(b) and a.constants.keys() == b.constants.keys()


def _same_plan(a: StepProgram, b: StepProgram) -> bool:
    def plan(program: StepProgram) -> list[Any]:
        return [(r.kind, [n.name for n in r.nodes], r.slots) for r in program.regions]

    dims_a = [BATCH_DIM.of(n) for n in a.graph.nodes]
    return (
        plan(a) == plan(b)
        and a.setting_reads == b.setting_reads
        and a.guards.have_same_reads(b.guards)
        and dims_a == [BATCH_DIM.of(n) for n in b.graph.nodes]
    )


def _convert_for_shapes(net: Net, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Net:
    """Capture the model again for inputs that the plan of `net` does not cover (no inputs: without shapes)."""
    example = _example_inputs(net.source, net.options.entry, args, kwargs)
    programs, history = prepare_programs(net.source, net.options, example, net.program.inferred_carry)
    return Net(net.source, programs, net.options, history, _convert_for_shapes, net.first_attributes)


def _example_inputs(model: nn.Module, entry: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call as the option `example_inputs`; None without arguments."""
    if args and kwargs:
        parameters = step_signature(model, entry).parameters
        return {**dict(zip(parameters, args, strict=False)), **kwargs}
    return (kwargs or args) or None


REPLANS: dict[str, Callable[..., Net]] = {
    "steps": _convert_for_shapes,
    "sequence": _convert_sequence_again,
    "derived": _convert_derived_again,
    "loop": _plan_loop_again,
}
"""The functions that plan a net again, by name; a saved net has the name of its own."""


def convert_again(
    kind: str,
    model: nn.Module,
    options: ConvertOptions,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    inferred_carry: bool,
) -> Net:
    """Convert a model with the options of an earlier conversion.

    Args:
        kind: a key of `REPLANS`.
        model: the model.
        options: the options of the net.
        example: `(args, kwargs)` of one step; for a model that runs over time itself and mixes time, of one call.
        inferred_carry: whether `options.carry` was inferred.
    """
    args, kwargs = example or ((), {})
    if kind == "steps":
        inputs = _example_inputs(model, options.entry, args, kwargs)
        programs, history = prepare_programs(model, options, inputs, inferred_carry)
        return Net(model, programs, options, history, _convert_for_shapes)
    if kind == "derived":
        args, kwargs = _repeated_steps(options.time_dim, args, kwargs)
    inputs = _example_inputs(model, options.entry, args, kwargs)
    net = convert_sequence_model(model, replace(options, takes="sequence", step_mode="m"), inputs)
    return net if options.takes == "sequence" else net.convert_to(options.step_mode)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(
            "SNNFX309", f"{name}={value!r} is not supported", hint=f"Choose one of {', '.join(map(repr, choices))}."
        )
