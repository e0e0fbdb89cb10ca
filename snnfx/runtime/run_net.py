"""`snnfx::run_net`: a call of a whole net as one operator under torch.compile.

The operator runs the net's own launches, so a compiled net costs what the net costs. Parameters and inputs are
arguments, and the buffers are declared as changed; so AOTAutograd sees all that a call reads and writes. With gradients
the operator records the net's own autograd graph. A token, its last result, owns this graph: whoever saves the token
for backward keeps the graph, and `snnfx::run_net_backward` runs it.

Compilers may write into an argument or a result after its last use. So each argument that the graph saved is an
argument of the backward operator too, and no result shares memory with the graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from snnfx.errors import InputError, PassError
from snnfx.lowering.mixed.operator_shapes import unaliased
from snnfx.ops.shared_memory import addresses_of
from snnfx.regions.operator import real_tensors_allowed
from snnfx.runtime.backward_pass import is_in_backward_pass, refuse_to_carry_state_in_backward
from snnfx.runtime.net_operator import CallForm, NetOperator, cpu_autocast
from snnfx.sandbox.plain_dispatch import ordinary_dispatch
from snnfx.sandbox.torch_internals import (
    BelowAutograd,
    compile_state,
    dispatch_mode_count,
    is_backward_graph_kept,
    without_size_guards,
)

__all__ = ["define_operator"]

_LIBRARY = torch.library.Library("snnfx", "FRAGMENT")
_FORM = "str net, str[] slots, bool with_finals, bool training, ScalarType? autocast, int places"
_TENSORS = "Tensor[] inputs, Tensor[] states, Tensor[] parameters, Tensor(a!)[] buffers"
_LIBRARY.define(
    "run_net_backward(Tensor token, Tensor[] grads, bool[] given, int[] wanted, Tensor[] like, Tensor[] kept)"
    " -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@dataclass
class _Recording:
    """The autograd graph of a call, which its token owns.

    Args:
        edges: for each result, the edge into the graph; None: it needs no gradient.
        leaves: the arguments that may need a gradient.
        hooked: the parameters among them.
    """

    edges: list[GradientEdge | None] | None
    leaves: list[Tensor]
    own: list[nn.Parameter]


def _run_net(
    net: str,
    slots: list[str],
    with_finals: bool,
    training: bool,
    autocast: torch.dtype | None,
    places: int,
    inputs: list[Tensor],
    states: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    T: int | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Run a net.

    Args:
        net: the handle of the net.
        slots, with_finals, training, autocast, places: see `CallForm`.
        inputs: the tensors among the arguments of the call.
        states: the values of `slots` before the first step.
        parameters, buffers: the tensors of the model; the call changes the buffers.
        T: the number of time steps, if no input has a time dimension.
        needs: for each of `inputs`, `states` and `parameters`, whether it needs a gradient.

    Returns:
        The outputs; with finals, the final states; then the token.
    """
    operator = NetOperator.of_handle(net)
    form = CallForm(tuple(slots), with_finals, training, autocast, places)
    if operator.carries_state and is_in_backward_pass():
        refuse_to_carry_state_in_backward({slot.name for slot in operator.executable.program.slots})
    own_tensors = operator.tensors(places)
    records = any(needs)
    count = len(inputs), len(inputs) + len(states)
    with ordinary_dispatch(grad=records), cpu_autocast(autocast):
        given = [
            x.detach().requires_grad_(n) if n else x.detach() for x, n in zip([*inputs, *states], needs, strict=False)
        ]
        is_own = [_is_same(t, own) for t, own in zip([*parameters, *buffers], own_tensors, strict=True)]
        used = own_tensors[: len(parameters)]
        # The gradient of a parameter with hooks would pass them here and once more outside.
        if all(is_own) and not (records and any(p._backward_hooks for p in used)):
            results = operator.run(form, given[: count[0]], given[count[0] :], T)
        else:
            used = [p.detach() if own else p.detach().clone() for p, own in zip(parameters, is_own, strict=False)]
            used = [p.requires_grad_(n) for p, n in zip(used, needs[count[1] :], strict=True)]
            changed = [b if own else b.clone() for b, own in zip(buffers, is_own[len(parameters) :], strict=True)]
            operator.check_guards(operator.executable.arguments.time_first(inputs, T)[0], {})
            results = operator.run_with(form, given[: count[0]], given[count[0] :], [*used, *changed], T)
            with torch.no_grad():
                for buffer, own, value in zip(buffers, is_own[len(parameters) :], changed, strict=True):
                    if not own:
                        buffer.copy_(value)
        token = torch.zeros(1, dtype=torch.uint8)
        if not records:
            results = [y.detach() for y in results]
            return *unaliased(results, [*inputs, *states, *parameters, *buffers]), token
        edges = [get_gradient_edge(y) if y.requires_grad else None for y in results]
        token.snnfx_recording = _Recording(  # type: ignore[attr-defined]
            edges, [*given, *used], [p for p in used if isinstance(p, nn.Parameter)]
        )
        return *(_contiguous_copy(y) for y in results), token


def _is_same(given: Tensor, own: Tensor) -> bool:
    return given is own or (
        given.data_ptr() == own.data_ptr() and given.shape == own.shape and given.stride() == own.stride()
    )


def _is_real(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing traces a call with these tensors, so that the dispatcher need not see it once more."""
    return not dispatch_mode_count() and all(type(t) is Tensor or type(t) is nn.Parameter for t in tensors)


def _contiguous_copy(y: Tensor) -> Tensor:
    return y.detach().clone(memory_format=torch.contiguous_format)


def _fake_run_net(
    net: str,
    slots: list[str],
    with_finals: bool,
    training: bool,
    autocast: torch.dtype | None,
    places: int,
    inputs: list[Tensor],
    states: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    T: Any,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    operator = NetOperator.of_handle(net)
    form = CallForm(tuple(slots), with_finals, training, autocast, places)
    like = inputs[0]
    with (
        real_tensors_allowed(like),
        compile_state(True),
        torch.no_grad(),
        cpu_autocast(autocast),
        without_size_guards(),
    ):
        tensors = [*parameters, *(torch.empty_like(b) for b in buffers)]
        results = operator.run_with(form, inputs, states, tensors, T)
        made = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in results]
        return *made, torch.empty(1, dtype=torch.uint8, device=like.device)


def _run_net_backward(
    token: Tensor,
    grads: list[Tensor],
    given: list[bool],
    wanted: list[int],
    like: list[Tensor],
    kept: list[Tensor],
) -> list[Tensor]:
    """Gradients of arguments of `run_net`.

    Args:
        token: the last result of `run_net`.
        grads: the gradients of some results.
        given: for each result, whether `grads` has its gradient.
        wanted: the positions of the arguments among inputs, states and parameters.
        like: these arguments.
        kept: further arguments that the graph saved.
    """
    recording: _Recording | None = getattr(token, "snnfx_recording", None)
    if recording is None:
        raise PassError(
            "SNNFX511",
            "the autograd graph of a compiled net was lost between forward and backward",
            why="something replaced a tensor that the compiled program saved, such as a hook for saved tensors.",
            hint="Run the compiled net outside of the hooks; checkpoint= of snnfx.convert saves memory in a compiled "
            "net too.",
        )
    edges = recording.edges
    if edges is None:
        raise RuntimeError("Trying to backward through a compiled net a second time: pass retain_graph=True first")
    keeps = is_backward_graph_kept()
    with ordinary_dispatch(grad=False), _without_hooks(recording.own):
        pairs = zip((e for e, g in zip(edges, given, strict=True) if g), grads, strict=True)
        outputs = [(edge, grad) for edge, grad in pairs if edge is not None]
        gradients = torch.autograd.grad(
            [edge for edge, _ in outputs],
            [recording.leaves[i] for i in wanted],
            [grad for _, grad in outputs],
            retain_graph=keeps,
            allow_unused=True,
        )
        if not keeps:
            recording.edges = None
        taken = addresses_of([*grads, *like, *kept])
        return [_gradient_like(g, t, taken) for g, t in zip(gradients, like, strict=True)]


@contextlib.contextmanager
def _without_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Without hooks that were registered since the forward pass: the gradient passes them outside the operator."""
    hooked = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in hooked:
            hooks.update(before)


def _gradient_like(gradient: Tensor | None, like: Tensor, taken: set[int]) -> Tensor:
    """A gradient with the strides that the compiler expects, in memory of its own."""
    if gradient is None:
        return torch.zeros_like(like)
    pointer = gradient.untyped_storage().data_ptr()
    is_dense = like.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(like)
    has_strides = is_dense and gradient.stride() == like.stride()
    if not has_strides or gradient.dtype != like.dtype or pointer in taken:
        gradient = torch.empty_like(like).copy_(gradient)
        pointer = gradient.untyped_storage().data_ptr()
    taken.add(pointer)
    return gradient


def _fake_run_net_backward(
    token: Tensor,
    grads: list[Tensor],
    given: list[bool],
    wanted: list[int],
    like: list[Tensor],
    kept: list[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(t) for t in like]


class _RunNet(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Any, form: tuple[Any, ...], more: tuple[Any, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        counts, buffers, T, needs, flow = more
        inputs, states, parameters = _split(tensors, counts)
        with BelowAutograd():
            results = run(*form, inputs, states, parameters, buffers, T, needs)
        ctx.flow, ctx.needs, ctx.count = flow, needs, counts[0] + counts[1]
        ctx.set_materialize_grads(False)
        # The parameters too: a compiler may have computed them.
        ctx.save_for_backward(results[-1], *tensors)
        fixed = [y for y, d in zip(results, flow.differentiable, strict=False) if not d]
        ctx.mark_non_differentiable(*fixed, results[-1])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        token, *tensors = ctx.saved_tensors
        given = [g is not None and d for g, d in zip(grads, ctx.flow.differentiable, strict=False)]
        reached = frozenset().union(*(r for r, g in zip(ctx.flow.reached, given, strict=True) if g))
        wanted = sorted(reached)
        if not wanted:
            return (None, None, None, *(None for _ in tensors))
        gradients = torch.ops.snnfx.run_net_backward(
            token,
            [g for g, is_given in zip(grads, given, strict=False) if is_given],
            given,
            wanted,
            [tensors[i] for i in wanted],
            [t for i, t in enumerate(tensors) if i not in reached],
        )
        by_index = dict(zip(wanted, gradients, strict=True))
        return None, None, None, *(by_index.get(i) for i in range(len(tensors)))


class _RunNetBackward(torch.autograd.Function):
    """The backward operator, which has no derivative."""

    @staticmethod
    def forward(ctx: Any, arguments: tuple[Any, ...], *grads: Tensor) -> tuple[Tensor, ...]:
        token, *rest = arguments
        with BelowAutograd():
            return tuple(torch.ops.snnfx.run_net_backward(token, list(grads), *rest))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        raise InputError(
            "SNNFX316",
            "a compiled net has no second derivative",
            why="create_graph=True requests it, but only first derivatives are generated.",
            hint="Differentiate the net itself, without torch.compile.",
        )


def _run_net_backward_with_autograd(
    token: Tensor,
    grads: list[Tensor],
    given: list[bool],
    wanted: list[int],
    like: list[Tensor],
    kept: list[Tensor],
) -> list[Tensor]:
    if not torch.is_grad_enabled():
        if _is_real([token]):
            return _run_net_backward(token, grads, given, wanted, like, kept)
        with BelowAutograd():
            return torch.ops.snnfx.run_net_backward(token, grads, given, wanted, like, kept)  # type: ignore[no-any-return]
    return list(_RunNetBackward.apply((token, given, wanted, like, kept), *grads))


def _split(tensors: Sequence[Tensor], counts: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    first, second = counts[0], counts[0] + counts[1]
    return list(tensors[:first]), list(tensors[first:second]), list(tensors[second:])


def _run_net_with_autograd(
    name: str,
    net: str,
    slots: list[str],
    with_finals: bool,
    training: bool,
    autocast: torch.dtype | None,
    places: int,
    inputs: list[Tensor],
    states: list[Tensor],
    parameters: list[Tensor],
    buffers: list[Tensor],
    T: Any,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    form = (net, slots, with_finals, training, autocast, places)
    records = torch.is_grad_enabled() and any(needs)
    if not records and _is_real(inputs):
        return _run_net(*form, inputs, states, parameters, buffers, T, needs)
    run = getattr(torch.ops.snnfx, name)
    if not records:
        with BelowAutograd():
            return run(*form, inputs, states, parameters, buffers, T, needs)  # type: ignore[no-any-return]
    flow = NetOperator.of_handle(net).flow(
        CallForm(tuple(slots), with_finals, training, autocast, places), inputs, states, T, needs
    )
    more = ((len(inputs), len(states)), buffers, T, needs, flow)
    return _RunNet.apply(run, form, more, *inputs, *states, *parameters)  # type: ignore[no-any-return]


_LIBRARY.impl("run_net_backward", _run_net_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("run_net_backward", _run_net_backward_with_autograd, "Autograd")
torch.library.register_fake("snnfx::run_net_backward", _fake_run_net_backward, lib=_LIBRARY)

_defined: set[str] = set()
_defining = threading.Lock()


def define_operator(results: int) -> str:
    """Define the operator with this number of results, if it is not defined: its name.

    Auto-functionalization does not support an operator that changes arguments and returns a list.
    """
    name = f"run_net_{results}"
    with _defining:
        if name not in _defined:
            _LIBRARY.define(
                f"{name}({_FORM}, {_TENSORS}, SymInt? T, bool[] needs) -> ({', '.join(['Tensor'] * (results + 1))})",
                # Random numbers of a step, and changed buffers: two equal calls are not one call.
                tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
            )
            _LIBRARY.impl(name, _run_net, "CompositeExplicitAutograd")
            _LIBRARY.impl(name, partial(_run_net_with_autograd, name), "Autograd")
            torch.library.register_fake(f"snnfx::{name}", _fake_run_net, lib=_LIBRARY)
            _defined.add(name)
    return name
