"""Calls of a net under torch.compile: as one operator where possible, see `snnfx.runtime.run_net`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.emit.executable import Executable
from snnfx.regions.region_modules import LoopRegion
from snnfx.runtime.net_operator import NetOperator
from snnfx.runtime.run_net import define_operator
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import BatchNormBase, are_transforms_active, has_global_hooks, pytree
from snnfx.state.carry import with_final_state

__all__ = ["call_as_operator", "reason_against_operator"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)


def reason_against_operator(executable: Executable) -> str:
    """Why a net does not run as one operator under torch.compile; "" if it does.

    The compiler then sees the operations of the net, with one operator for each loop.
    """
    program, source = executable.program, executable.source
    if executable.options.step_mode != "m":
        return "it runs single steps"
    if executable.graphs.is_replaced:
        return "its graph was replaced by hand"
    if program.opaque:
        return f"`{next(iter(program.opaque)) or type(source).__name__}` runs as Python code"
    if program.guards.modes:
        return "its code reads modes of torch"
    if any(slot.persistent == "assigned" for slot in program.slots) or program.changed_parameters:
        return "its steps replace tensors of the model"
    if executable.options.carry_state and program.persistent_slots:
        return "its steps change buffers, and it carries its state from call to call"
    tensors = [*source.parameters(), *source.buffers()]
    if any(type(t) not in _PLAIN or t.layout is not torch.strided for t in tensors):
        return "its parameters are not plain tensors"
    if any(not t.is_cpu for t in tensors):
        return "it is not on the CPU"
    if has_global_hooks() or any(map(_is_observed, source.modules())):
        return "its modules have hooks"
    if _has_trainable_tensors_besides(source, tensors):
        return "it trains tensors that are not parameters"
    if any(map(_unrolls, executable.region_modules().values())):
        return "a BatchNorm in training is part of a loop"
    return ""


def call_as_operator(
    operator: NetOperator,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    T: int | None,
    carried: dict[str, Any] | None,
) -> tuple[Any, dict[str, Tensor]] | None:
    """Call a net as one operator, while torch.compile traces the call; None if that is impossible.

    Each attribute that is read here becomes a guard of the compiled code, which each call checks. So `_plan_of` reads
    all that the handle and the mode determine, outside the trace.

    Args:
        operator: the net.
        args, kwargs, T: the arguments of the call.
        carried: the state carried from the call before.

    Returns:
        `(outputs, final states)`; without final states if the net neither returns nor carries them.
    """
    plan = None if torch.compiler.is_exporting() else _plan_of(operator.handle, operator.source.training)
    if plan is None:
        return None
    name, number, places, count, ranks, is_quick, is_single, with_finals = plan
    state: dict[str, Any] = carried or {}
    steps: int | None = None
    if is_quick and T is None and not kwargs and len(args) == len(ranks):
        inputs: list[Any] = list(args)
        ordered = inputs
    else:
        arguments = operator.executable.arguments
        args, kwargs, given = arguments.split_carried(args, kwargs)
        inputs = arguments.bind(args, kwargs)
        ordered, T = arguments.time_first(inputs, T)
        steps = None if any(arguments.varying) else T
        state = arguments.first_state(carried, given) or {}
    states = list(state.values())
    if not _are_plain([*inputs, *states]) or not _covers(ranks, ordered):
        return None
    tensors = [_tensor_in(operator.source, place) for place in places]
    enabled = torch.is_grad_enabled()
    needs = [enabled and t.requires_grad for t in (*inputs, *states, *tensors[:count])]
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    results = getattr(torch.ops.snnfx, name)(
        operator.handle, list(state), with_finals, operator.source.training, autocast, number,
        inputs, states, tensors[:count], tensors[count:], steps, needs,
    )  # fmt: skip
    if is_single:
        return results[0], {}
    program = operator.executable.program
    remaining = iter(results)
    outputs = [next(remaining) if is_made else value for is_made, value in operator.outputs[program.training]]
    finals = {slot.name: next(remaining) for slot in program.slots} if with_finals else {}
    return with_final_state(pytree.tree_unflatten(outputs, program.output_spec), program.carried, finals), finals


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _plan_of(handle: str, training: bool) -> tuple[Any, ...] | None:
    """What the calls of a net in a mode have in common, at the time of compilation; None: no operator runs them.

    Returns:
        The name of the operator, the number of the list of places, the places of parameters and buffers, the number of
        parameters, the ranks of the inputs, whether positional arguments are the inputs with time first, whether the
        only result is the output, whether final states are results.
    """
    operator = NetOperator.of_handle(handle)
    executable = operator.executable
    if are_transforms_active() or reason_against_operator(executable):
        return None
    program, arguments = executable.program, executable.arguments
    with_finals = executable.options.carry_state or bool(program.carried)
    results = operator.count_of_results(training, with_finals)
    number, places = operator.places_now()
    is_quick = arguments.is_plain and not program.carried and 0 in arguments.tensor_dims
    return (
        define_operator(results),
        number,
        tuple([(place.path, place.registry, place.name) for place in places]),
        sum([place.registry == "_parameters" for place in places]),
        tuple([(planned.least_rank, planned.rank, planned.batch_dim) for planned in arguments.planned]),
        is_quick and all(dim in (0, None) for dim in arguments.tensor_dims),
        not with_finals and results == 1 and program.output_spec.is_leaf(),
        with_finals,
    )


def _are_plain(tensors: list[Any]) -> bool:
    for x in tensors:
        if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu" or x.layout is not torch.strided:
            return False
    return True


def _covers(ranks: tuple[tuple[int, int | None, int | None], ...], inputs: list[Tensor]) -> bool:
    """As `Arguments.covered`."""
    batch_size: Any = None
    for (least_rank, rank, batch_dim), x in zip(ranks, inputs, strict=True):
        if x.dim() < least_rank or (rank is not None and x.dim() != rank):
            return False
        if batch_dim is not None:
            if batch_size is not None and x.shape[batch_dim] != batch_size:
                return False
            batch_size = x.shape[batch_dim]
    return True


def _tensor_in(source: nn.Module, place: tuple[tuple[str, ...], str, str]) -> Any:
    path, registry, name = place
    module: Any = source
    for child in path:
        module = module._modules[child]
    return module._parameters[name] if registry == "_parameters" else module._buffers[name]


def _is_observed(module: nn.Module) -> bool:
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)


def _has_trainable_tensors_besides(source: nn.Module, tensors: list[Tensor]) -> bool:
    known = {id(t) for t in tensors}
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.requires_grad and id(tensor) not in known:
            found.append(tensor)
        return tensor

    StructuralCopy(tensor=note).of(source)
    return bool(found)


def _unrolls(region: nn.Module) -> bool:
    """Whether a loop is unrolled under torch.compile, see `SequenceRegion.runs_as_operator`."""
    if not isinstance(region, LoopRegion):
        return False
    modules = [region.resolve(t) for t in region.constant_targets if t is not None and region.resolve is not None]
    return any(
        isinstance(m, BatchNormBase) and m.training for c in modules if isinstance(c, nn.Module) for m in c.modules()
    )
