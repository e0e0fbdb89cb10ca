"""Plan an export: the arguments of the program, the states that it takes, and the sizes of the trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.deploy.exported_module import ExportedNet, StateForm
from snnfx.deploy.given_inputs import run_first_step, takes_one_sample
from snnfx.deploy.initial_values import filled_initial_values
from snnfx.deploy.interface import START, FileTensor, Interface, named_leaves, plain_containers, unique_names
from snnfx.deploy.refusals import first_line, fixed_batch_size, refuse_opaque_parts
from snnfx.deploy.tracing import Axes, TracedArgument
from snnfx.emit.arguments import signature_of
from snnfx.errors import ExportError, InputError, SnnfxError, warn_once
from snnfx.ir.printing import location_of
from snnfx.ir.program import StepProgram
from snnfx.runtime.net import Net
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import flatten_state, outputs_without, rebuild_state, with_final_state

__all__ = ["Example", "ExportPlan", "Request", "plan_export"]


@dataclass(frozen=True)
class Request:
    """The options of `snnfx.export`.

    Args:
        state: whether the file takes and returns the states.
        step: whether it computes one time step.
        dynamic: the axes that are dynamic.
        T: the number of time steps, if no input has a time dimension.
        unroll: whether to unroll the loops, to the T of the given inputs.
    """

    state: bool
    step: bool
    dynamic: tuple[str, ...]
    T: int | None
    unroll: bool

    @property
    def takes_state(self) -> bool:
        """Whether the file takes and returns all states."""
        return self.state or self.step


@dataclass(frozen=True)
class Example:
    """Arguments of the program with values, and the results of the net for them.

    Args:
        arguments: the arguments of the program.
        expected: what the program returns.
        sizes: the sizes of the dynamic axes, as text, if they are not those that the caller passed.
    """

    arguments: tuple[Any, ...]
    expected: Any
    sizes: str = ""


@dataclass(frozen=True)
class ExportPlan:
    """All that a trace and a check need.

    Args:
        function: the function to trace.
        model: the module whose parameters it reads.
        arguments: its arguments, with the sizes of the trace.
        examples: the arguments with the values that the caller passed, and with size 1 of the dynamic axes.
        rebuild: the return value of the program, from the outputs and states of `function`.
        interface: names and shapes.
    """

    function: ExportedNet
    model: nn.Module
    arguments: list[TracedArgument]
    examples: tuple[Example, ...]
    rebuild: Callable[[Any, dict[str, Any]], Any]
    interface: Interface


def plan_export(net: Net, inputs: tuple[Any, ...], request: Request) -> ExportPlan:
    """Plan the export of a net in evaluation mode; calls may change the net.

    Args:
        net: the net.
        inputs: the arguments of a call, or with `step` of one step.
        request: the options.
    """
    if request.step:
        net = net.convert_to("s")
        inputs = _one_step(net, inputs)
    planned = copy.deepcopy(net.planned_for(*inputs, T=request.T))
    program, arguments = planned.program, planned._executable.arguments
    refuse_opaque_parts(program)
    slots = [slot.name for slot in program.slots]
    args, kwargs, carried = arguments.split_carried(inputs, {})
    leaves = arguments.bind(args, kwargs)
    passed = {k: v for c in program.carried if c.name in carried for k, v in flatten_state(c, carried[c.name]).items()}
    given = slots if request.takes_state else list(passed)
    time_dims = [None if request.step else dim for dim in arguments.tensor_dims]
    step_net = copy.deepcopy(planned.convert_to("s"))
    steps = [_first_step(x, dim) for x, dim in zip(leaves, time_dims, strict=True)]
    _refuse_lossy_first_states(step_net, steps, passed)
    after = _states_after_step(step_net, steps, passed, request)
    axes = _axes_of_inputs(program, leaves, time_dims, request)
    sizes = _sizes_of_trace(leaves, axes)
    resized = [_resized(x, a, sizes) for x, a in zip(leaves, axes, strict=True)]
    later: dict[str, Tensor] = {}
    if "N" in sizes:
        resized_steps = [_first_step(x, dim) for x, dim in zip(resized, time_dims, strict=True)]
        try:
            later = _states_after_step(step_net, resized_steps, _resized_states(passed, sizes), request)
        except SnnfxError as error:
            sample = takes_one_sample(program)
            if sample:
                warn_once(
                    "SNNFX826",
                    f"the inputs have no batch dimension: {sample}. The file computes one sample. Pass "
                    'dynamic=("T",) for it, or inputs with a batch.',
                )
                return plan_export(net, inputs, replace(request, dynamic=tuple({*request.dynamic} - {"N"})))
            if given:
                raise fixed_batch_size(error) from error
    filled = filled_initial_values(step_net._executable, steps)
    has_start = request.takes_state and any(filled[name] is None for name in slots)
    form = StateForm(
        given=tuple(given),
        returned=tuple(slots if request.takes_state else [n for c in program.carried for n in c.slot_names()]),
        has_start=has_start and not any(c.required for c in program.carried),
    )
    state_axes: list[Axes] = [{}] * len(given)
    if later and given:
        state_axes = [_axes_of_state(name, after[name].shape, later[name].shape, sizes["N"]) for name in given]

    unrolled = arguments.time_first(leaves, request.T)[1] if request.unroll and not request.step else None
    stepwise = step_net._executable if program.first_step is not None and not request.step else None
    function = ExportedNet(planned._executable, stepwise, form, unrolled, request.T)
    states = _example_states(planned, inputs, after, passed, request)
    example_state = {name: states[name] for name in given}
    trace_state = {name: _resized(x, a, sizes) for (name, x), a in zip(example_state.items(), state_axes, strict=True)}
    start = [torch.zeros((), dtype=torch.bool, device=leaves[0].device)] if form.has_start else []
    traced = [
        *_traced_inputs(program, arguments.arguments_of(resized), axes),
        *_traced_states(program, carried, trace_state, dict(zip(given, state_axes, strict=True)), request),
        *(TracedArgument(START, s, ({},)) for s in start),
    ]
    rebuild = _rebuild(program, request.takes_state)

    def example(leaves: Sequence[Tensor], states: Mapping[str, Any], sizes: str = "") -> Example:
        args, kwargs = arguments.arguments_of(leaves)
        nested = _traced_states(program, carried, dict(states), {name: {} for name in given}, request)
        values = (*args, *kwargs.values(), *(a.value for a in nested), *start)
        if not request.takes_state:
            kwargs = {**kwargs, **{a.name: a.value for a in nested}}
        return Example(values, _expected(planned, args, kwargs, states, request), sizes)

    examples = [example(leaves, example_state)]
    smallest = _smallest_example(example, leaves, axes, example_state, state_axes)
    examples += [] if smallest is None else [smallest]
    interface = _interface(program, traced, form, filled, examples[0].expected, request)
    return ExportPlan(function, planned.source, traced, tuple(examples), rebuild, interface)


# -- inputs -----------------------------------------------------------------------------------------------------------


def _one_step(net: Net, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs of one step; of sequences (recognised by the ranks of `example_inputs`) the first step."""
    arguments = net._executable.arguments
    args, kwargs, _ = arguments.split_carried(inputs, {})
    leaves = arguments.bind(args, kwargs)
    try:
        arguments.check_ranks(leaves, time_first=False)
    except InputError:
        steps = [_first_step(x, dim) for x, dim in zip(leaves, arguments.tensor_dims, strict=True)]
        arguments.check_ranks(steps, time_first=False)
        args, kwargs = arguments.arguments_of(steps)
        return (*args, *kwargs.values(), *inputs[len(args) + len(kwargs) :])
    return inputs


def _first_step(x: Tensor, time_dim: int | None) -> Tensor:
    return x if time_dim is None else x.select(time_dim, 0)


def _axes_of_inputs(
    program: StepProgram, leaves: Sequence[Tensor], time_dims: Sequence[int | None], request: Request
) -> list[Axes]:
    """The dynamic dimensions of each input."""
    result: list[Axes] = []
    for node, x, dim in zip(program.input_nodes(), leaves, time_dims, strict=True):
        axes: dict[int, tuple[str, int]] = {}
        time = None if dim is None else dim % x.dim()
        if time is not None and "T" in request.dynamic:
            axes[time] = ("T", 1)
        if "N" in request.dynamic and node.name in program.batched_inputs:
            axes[1 if time == 0 else 0] = ("N", 1)
        result.append(axes)
    return result


_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)


def _sizes_of_trace(leaves: Sequence[Tensor], axes: Sequence[Axes]) -> dict[str, int]:
    """Sizes of the dynamic axes that no dimension of an input has: equal sizes would become one symbol."""
    taken = {size for x in leaves for size in x.shape}
    free = iter([p for p in _PRIMES if p not in taken])
    return {name: next(free) for name in sorted({name for a in axes for name, _ in a.values()})}


def _resized(x: Tensor, axes: Axes, sizes: Mapping[str, int]) -> Tensor:
    """A tensor of zeros with the sizes of the trace."""
    shape = [axes[d][1] * sizes[axes[d][0]] if d in axes else size for d, size in enumerate(x.shape)]
    return x if not axes else x.new_zeros(shape)


def _traced_inputs(
    program: StepProgram, arguments: tuple[tuple[Any, ...], dict[str, Any]], axes: Sequence[Axes]
) -> list[TracedArgument]:
    args, kwargs = arguments
    names = [n for n in signature_of(program).parameters if n not in ("self", "T", "args", "kwargs")]
    names = unique_names([*(names[: len(args)] or [f"input_{i}" for i in range(len(args))]), *kwargs], [START, "state"])
    remaining = iter(axes)
    result = []
    for name, value in zip(names, (*args, *kwargs.values()), strict=True):
        count = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
        result.append(TracedArgument(name, value, tuple(next(remaining) for _ in range(count))))
    return result


def _traced_states(
    program: StepProgram, carried: Mapping[str, Any], states: dict[str, Any], axes: Mapping[str, Axes], request: Request
) -> list[TracedArgument]:
    """The states as arguments: a dict by slot, or the carried arguments that the caller passed."""
    if request.takes_state:
        return [TracedArgument("state", states, tuple(axes.values()))] if states else []
    passed = [c for c in program.carried if c.name in carried]
    return [
        TracedArgument(c.name, plain_containers(rebuild_state(c, states)), tuple(axes[n] for n in c.slot_names()))
        for c in passed
    ]


# -- states -----------------------------------------------------------------------------------------------------------


def _states_after_step(
    step_net: Net, steps: Sequence[Tensor], passed: Mapping[str, Any], request: Request
) -> dict[str, Tensor]:
    """The state after the first steps: its shapes and dtypes are those of all later states."""
    state, forms = dict(passed), None
    # Initial values with a batch of 1 or of integers get their later shape and dtype one after the other.
    for _ in range(1 + len(step_net.program.slots)):
        state = run_first_step(step_net, steps, state)
        before, forms = forms, [_shape_and_dtype(value) for value in state.values()]
        if forms == before or not request.takes_state:
            break
    like = steps[0] if steps else torch.empty(())
    return {name: torch.as_tensor(value, device=like.device) for name, value in state.items()}


def _shape_and_dtype(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else ((), type(value))


def _refuse_lossy_first_states(step_net: Net, steps: Sequence[Tensor], passed: Mapping[str, Any]) -> None:
    """Raise ExportError if a state of later steps cannot have the values that the first step gives it (SNNFX829)."""
    program = step_net.program
    if program.first_step is None:
        return
    first = run_first_step(step_net, steps, passed)
    later = run_first_step(step_net, steps, first)
    for (name, value), written in zip(first.items(), program.next_states, strict=True):
        before, after = torch.as_tensor(value).dtype, torch.as_tensor(later[name]).dtype
        if not torch.can_cast(before, after):
            raise ExportError(
                "SNNFX829",
                f"the state `{name}` cannot be exported",
                where=location_of(written) if isinstance(written, Node) else "",
                why=f"it is {_text(before)} after the first step and {_text(after)} after later steps, and a file has "
                "one dtype for it.",
                hint=f"Give it one dtype: write the state of each step with .to({before}).",
            )


def _resized_states(passed: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Passed states for the batch size of the trace; they have the batch in dimension 0."""
    return {
        k: v.new_zeros(sizes["N"], *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v for k, v in passed.items()
    }


def _axes_of_state(name: str, shape: Sequence[int], later: Sequence[int], batch: int) -> Axes:
    """The dimensions of a state that change with the batch size, from its shapes for two batch sizes."""
    axes: dict[int, tuple[str, int]] = {}
    for dim, (a, b) in enumerate(zip(shape, later, strict=True)):
        if a == b:
            continue
        if b % batch:
            raise ExportError(
                "SNNFX806",
                "the batch size cannot be dynamic",
                why=f"dimension {dim} of the state `{name}` is {b} for a batch of {batch}, and not a multiple of it.",
                hint='Export for this batch size: dynamic=("T",).',
            )
        axes[dim] = ("N", b // batch)
    return axes


def _example_states(
    net: Net, inputs: tuple[Any, ...], after: dict[str, Tensor], passed: Mapping[str, Any], request: Request
) -> dict[str, Any]:
    """States that a stream has at some time, to trace and check with."""
    if not request.takes_state:
        return {k: torch.as_tensor(v) for k, v in passed.items()}
    if request.step:
        return after
    with torch.no_grad():
        _, state = copy.deepcopy(net).run(*inputs, T=request.T)
    return {name: torch.as_tensor(value).to(after[name]) for name, value in state.items()}


# -- outputs ----------------------------------------------------------------------------------------------------------


def _rebuild(program: StepProgram, takes_state: bool) -> Callable[[Any, dict[str, Any]], Any]:
    """The function that makes the return value of the program."""

    def rebuild(outputs: Any, states: dict[str, Any]) -> Any:
        nested = pytree.tree_unflatten(list(outputs), program.output_spec)
        if takes_state:
            return plain_containers(outputs_without(nested, [c.path for c in program.carried])), states
        return plain_containers(with_final_state(nested, program.carried, states))

    return rebuild


def _expected(
    net: Net, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: Mapping[str, Any], request: Request
) -> Any:
    """What the program returns for the given inputs: the net's own results."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        if not request.takes_state:
            return plain_containers(net(*args, T=request.T, **kwargs))
        steps: dict[str, Any] = {} if request.step else {"T": request.T}
        outputs, final = net.run(*args, state=dict(state) or None, **steps, **kwargs)
    return plain_containers(outputs), {name: torch.as_tensor(value) for name, value in final.items()}


def _smallest_example(
    example: Callable[[Sequence[Tensor], Mapping[str, Any], str], Example],
    leaves: Sequence[Tensor],
    axes: Sequence[Axes],
    states: Mapping[str, Tensor],
    state_axes: Sequence[Axes],
) -> Example | None:
    """The example with size 1 of each dynamic axis, if the given one is larger."""
    names = sorted({name for a in axes for name, _ in a.values()}, reverse=True)
    small = [_narrowed(x, a) for x, a in zip(leaves, axes, strict=True)]
    if all(a.shape == b.shape for a, b in zip(small, leaves, strict=True)):
        return None
    before = {name: _narrowed(x, a) for (name, x), a in zip(states.items(), state_axes, strict=True)}
    sizes = ", ".join(f"{name} = 1" for name in names)
    try:
        return example(small, before, sizes)
    except Exception as error:
        warn_once("SNNFX818", f"the file is not checked for {sizes}, because the net fails there: {first_line(error)}")
        return None


def _narrowed(x: Tensor, axes: Axes) -> Tensor:
    """The first elements of a tensor along its dynamic axes: size 1 of each axis."""
    for dim, (_, factor) in axes.items():
        x = x.narrow(dim, 0, factor)
    return x.contiguous() if axes else x


def _interface(
    program: StepProgram,
    traced: Sequence[TracedArgument],
    form: StateForm,
    filled: Mapping[str, Any],
    expected: Any,
    request: Request,
) -> Interface:
    leaf_names = [leaf.name for leaf in program.input_leaves if leaf.placeholder is not None]
    tensors = [
        (leaf, axes)
        for a in traced
        if a.name != START
        for leaf, axes in zip([v for v in pytree.tree_leaves(a.value) if isinstance(v, Tensor)], a.axes, strict=True)
    ]
    count = len(leaf_names)
    names = unique_names([*leaf_names, *form.given], [START] if form.has_start else [])
    inputs = [_described(n, *pair) for n, pair in zip(names[:count], tensors[:count], strict=True)]
    rows = zip(names[count:], form.given, tensors[count:], strict=True)
    states = [_described(n, *pair, slot) for n, slot, pair in rows]
    outputs, final = expected if request.takes_state else (expected, {})
    taken = [*names, START]
    leaves = named_leaves(outputs)
    output_names = unique_names([name for name, _ in leaves], taken)
    described = [_described(n, x, {}) for n, (_, x) in zip(output_names, leaves, strict=True)]
    final_names = unique_names([f"{slot}.next" for slot in final], [*taken, *output_names])
    after = [_described(n, x, {}, slot) for n, (slot, x) in zip(final_names, final.items(), strict=True)]
    return Interface(tuple(inputs), tuple(states), tuple(described), tuple(after), form.has_start, dict(filled))


def _described(name: str, x: Tensor, axes: Axes, slot: str = "") -> FileTensor:
    shape: list[int | str] = list(x.shape)
    for dim, (axis, factor) in axes.items():
        shape[dim] = axis if factor == 1 else f"{factor}*{axis}"
    return FileTensor(name, tuple(shape), _text(x.dtype), slot)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
