"""`snnfx::run_net`: a call of a whole net as one operator under torch.compile.

The operator runs the net's own launches, so a compiled net costs what the net costs. Parameters and inputs are
arguments, and the buffers are declared as changed; so AOTAutograd sees all that a call reads and writes. With gradients
the operator records the net's own autograd graph. A token, its last result, owns this graph: whoever saves the token for
backward keeps the graph, and `snnfx::run_net_backward` runs it.

Compilers may write into an argument or a result after its last use. So each argument that the graph saved is an argument
of the backward operator too, and no result shares memory with the graph.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from snnfx.emit.bounded_cache import BoundedCache
from snnfx.emit.executable import Executable
from snnfx.errors import InputError, PassError
from snnfx.ir.program import StepProgram
from snnfx.lowering.mixed.operator_shapes import size_hint
from snnfx.runtime.execution import Execution
from snnfx.sandbox.plain_dispatch import ordinary_dispatch
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import (
    BelowAutograd,
    compile_state,
    disable_dispatch_modes,
    dispatch_mode_count,
    is_backward_graph_kept,
    pytree,
    without_size_guards,
)

__all__ = ["NetOperator", "Place", "define_operator"]

_living: weakref.WeakValueDictionary[str, NetOperator] = weakref.WeakValueDictionary()
_counter = itertools.count()
_process = secrets.token_hex(8)

_MOST_FLOWS = 64
_PROBED_STEPS = 3
"""Gradients flow through a state from the second step on."""


@dataclass(frozen=True)
class _Form:
    """The form of a call.

    Args:
        slots: the slots of the state that the caller passes.
        with_finals: whether the final states are results.
        training: the mode of the net.
        autocast: the dtype of autocast on the CPU; None: no autocast.
        places: the number of the list of places of parameters and buffers.
    """

    slots: tuple[str, ...]
    with_finals: bool
    training: bool
    autocast: torch.dtype | None
    places: int


@dataclass(frozen=True)
class _Flow:
    """Where gradients flow in a call.

    Args:
        differentiable: for each result, whether a gradient can flow into it.
        reached: for each result, the arguments that its gradient reaches.
    """

    differentiable: tuple[bool, ...]
    reached: tuple[frozenset[int], ...]


@dataclass(frozen=True)
class Place:
    """Where a model has a parameter or a buffer.

    Args:
        path: the names of the modules on the way to its owner.
        registry: "_parameters" or "_buffers".
        name: its name there.
    """

    path: tuple[str, ...]
    registry: str
    name: str

    def read(self, source: nn.Module) -> Tensor:
        """The tensor in this place."""
        module: Any = source
        for name in self.path:
            module = module._modules[name]
        return module.__dict__[self.registry][self.name]  # type: ignore[no-any-return]


class NetOperator:
    """A net that runs as an operator, registered under a handle.

    Args:
        executable: the executable of the net.
        call: calls the net.
        execute: runs bound inputs with explicit state: `(inputs, given, state, record, T)`.
        check_guards: captures the model again if something has changed that the step depends on.

    Attributes:
        source: the model.
        carries_state: whether calls carry the state of the net.
        outputs: of each mode the outputs of a step: `(whether the step computes it, otherwise its value)`.
    """

    def __init__(
        self,
        executable: Executable,
        call: Callable[..., Any],
        execute: Callable[..., Any],
        check_guards: Callable[..., None],
    ) -> None:
        self.executable, self.call, self.execute, self.check_guards = executable, call, execute, check_guards
        # Unique in all processes: the compiler's caches on disk compare graphs by their text.
        self.handle = f"{type(executable.source).__name__}#{_process}.{os.getpid()}.{next(_counter)}"
        self.source, self.carries_state = executable.source, executable.options.carry_state
        self.outputs = {mode: _outputs_of(program) for mode, program in executable.programs.items()}
        self._places: list[tuple[Place, ...]] = []
        self._flows: BoundedCache[_Flow] = BoundedCache(_MOST_FLOWS)
        _living[self.handle] = self

    @staticmethod
    def of_handle(handle: str) -> NetOperator:
        """The living net that is registered under a handle.

        Raises:
            PassError: SNNFX503, the net was deleted.
        """
        operator = _living.get(handle)
        if operator is None:
            raise PassError(
                "SNNFX503",
                f"the net `{handle.partition('#')[0]}` no longer exists",
                why="a compiled program refers to living nets of the same process.",
                hint="Keep the net alive, or convert and compile again.",
            )
        return operator

    def count_of_results(self, training: bool, with_finals: bool) -> int:
        """The number of outputs and, with finals, of final states."""
        slots = len(self.executable.programs[training].slots) if with_finals else 0
        return sum([1 for is_made, _ in self.outputs[training] if is_made]) + slots

    def places_now(self) -> tuple[int, tuple[Place, ...]]:
        """Where the model has its parameters and buffers now: `(number of this list, places)`."""
        places = tuple(_places_in(self.executable.source))
        if places not in self._places:
            self._places.append(places)
        return self._places.index(places), places

    def tensors(self, number: int) -> list[Tensor]:
        """The parameters and buffers of the model in the places of a list of `places_now`."""
        source = self.executable.source
        return [place.read(source) for place in self._places[number]]

    def run(self, form: _Form, inputs: Sequence[Tensor], states: Sequence[Tensor], T: int | None) -> list[Tensor]:
        """Run the net with its own tensors."""
        arguments = self.executable.arguments
        if not form.slots and not form.with_finals:
            args, kwargs = (tuple(inputs), {}) if arguments.is_plain else arguments.arguments_of(inputs)
            return self._results(self.call(*args, T=T, **kwargs), None)
        ordered, steps = arguments.time_first(inputs, T)
        self.check_guards(ordered, {})
        state = dict(zip(form.slots, states, strict=True)) or None
        outputs, finals, _ = self.execute(ordered, {}, state, (), steps)
        return self._results(outputs, finals if form.with_finals else None)

    def run_with(
        self,
        form: _Form,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        tensors: Sequence[Tensor],
        T: int | None,
    ) -> list[Tensor]:
        """Run the net with other tensors in place of its parameters and buffers."""
        replacements = {id(own): t for own, t in zip(self.tensors(form.places), tensors, strict=True)}
        copies = StructuralCopy(tensor=lambda own: replacements.get(id(own), own), objects=False)
        execution = Execution(self.executable.with_source(copies.of(self.executable.source)))
        ordered, steps = self.executable.arguments.time_first(inputs, T)
        state = dict(zip(form.slots, states, strict=True)) or None
        outputs, finals, _ = execution.run_sequence(ordered, {}, state, (), steps)
        return self._results(outputs, finals if form.with_finals else None)

    def _results(self, outputs: Any, finals: dict[str, Any] | None) -> list[Tensor]:
        """The outputs that the step computes, then the final states."""
        program = self.executable.program
        leaves = pytree.tree_leaves(outputs)
        results = [y for y, (is_made, _) in zip(leaves, self.outputs[program.training], strict=True) if is_made]
        return results if finals is None else [*results, *(finals[slot.name] for slot in program.slots)]

    def flow(
        self, form: _Form, inputs: Sequence[Tensor], states: Sequence[Tensor], T: Any, needs: Sequence[bool]
    ) -> _Flow:
        """Where gradients flow in calls of this form, measured with a few steps of a copy of the model."""
        shapes = tuple([(tuple(map(size_hint, x.shape[1:])), x.dtype) for x in (*inputs, *states)])
        return self._flows.get_or_make((form, shapes, tuple(needs)), partial(self._probe, form, inputs, states, T, needs))

    def _probe(
        self, form: _Form, inputs: Sequence[Tensor], states: Sequence[Tensor], T: Any, needs: Sequence[bool]
    ) -> _Flow:
        arguments = self.executable.arguments
        steps = min([size_hint(n) for n in _lengths(inputs, arguments.tensor_dims)] or [size_hint(T)])
        steps = min(steps, _PROBED_STEPS)
        with disable_dispatch_modes(), compile_state(False), ordinary_dispatch(grad=True), _autocast(form.autocast):
            with torch.random.fork_rng(devices=()):
                given = [_zeros(x, d, steps) for x, d in zip(inputs, arguments.tensor_dims, strict=True)]
                given += [_zeros(s, None, steps) for s in states]
                count = len(inputs), len(given)
                own = self.tensors(form.places)
                given += [p.detach() for p in own[: len(needs) - count[1]]]
                leaves = [t.requires_grad_(n) for t, n in zip(given, needs, strict=True)]
                buffers = own[len(needs) - count[1] :]
                tensors = [*leaves[count[1] :], *(b.detach().clone() for b in buffers)]
                T_probed = None if T is None else steps
                results = self.run_with(form, leaves[: count[0]], leaves[count[0] : count[1]], tensors, T_probed)
                wanted = [i for i, n in enumerate(needs) if n]
                return _Flow(
                    tuple([y.requires_grad for y in results]),
                    tuple([_reached(y, [leaves[i] for i in wanted], wanted) for y in results]),
                )


def _places_in(source: nn.Module) -> Iterator[Place]:
    """The places of the parameters, then of the buffers; of a tensor with several places the first one."""
    for registry in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for path, module in source.named_modules():
            for name, tensor in getattr(module, registry).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield Place(tuple(path.split(".")) if path else (), registry, name)


def _outputs_of(program: StepProgram) -> list[tuple[bool, Any]]:
    return [(True, None) if isinstance(made, fx.Node) else (False, made) for made in program.outputs]


def _lengths(inputs: Sequence[Tensor], time_dims: Sequence[int | None]) -> list[Any]:
    return [x.shape[d] for x, d in zip(inputs, time_dims, strict=True) if d is not None]


def _zeros(x: Tensor, time_dim: int | None, steps: int) -> Tensor:
    shape = [size_hint(n) for n in x.shape]
    if time_dim is not None:
        shape[time_dim] = steps
    return torch.zeros(shape, dtype=x.dtype)


def _reached(y: Tensor, leaves: list[Tensor], indices: list[int]) -> frozenset[int]:
    if not y.requires_grad:
        return frozenset()
    gradients = torch.autograd.grad(y, leaves, torch.zeros_like(y), retain_graph=True, allow_unused=True)
    return frozenset(i for i, g in zip(indices, gradients, strict=True) if g is not None)


def _autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    if torch.is_autocast_enabled("cpu") == (dtype is not None) and dtype in (None, torch.get_autocast_dtype("cpu")):
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)


# -- the operators ----------------------------------------------------------------------------------------------------

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
        slots, with_finals, training, autocast, places: see `_Form`.
        inputs: the tensors among the arguments of the call.
        states: the values of `slots` before the first step.
        parameters, buffers: the tensors of the model; the call changes the buffers.
        T: the number of time steps, if no input has a time dimension.
        needs: for each of `inputs`, `states` and `parameters`, whether it needs a gradient.

    Returns:
        The outputs; with finals, the final states; then the token.
    """
    operator = NetOperator.of_handle(net)
    form = _Form(tuple(slots), with_finals, training, autocast, places)
    own_tensors = operator.tensors(places)
    records = any(needs)
    count = len(inputs), len(inputs) + len(states)
    with ordinary_dispatch(grad=records), _autocast(autocast):
        given = [x.detach().requires_grad_(n) if n else x.detach() for x, n in zip([*inputs, *states], needs, strict=False)]
        is_own = [_is_same(t, own) for t, own in zip([*parameters, *buffers], own_tensors, strict=True)]
        used = own_tensors[: len(parameters)]
        # The gradient of a parameter with hooks would pass them here and once more outside.
        if all(is_own) and not (records and any(p._backward_hooks for p in used)):
            results = operator.run(form, given[: count[0]], given[count[0] :], T)
        else:
            used = [
                p.detach() if own else p.detach().clone()
                for p, own in zip(parameters, is_own, strict=False)
            ]
            used = [p.requires_grad_(n) for p, n in zip(used, needs[count[1] :], strict=True)]
            changed = [b if own else b.clone() for b, own in zip(buffers, is_own[len(parameters) :], strict=True)]
            results = operator.run_with(form, given[: count[0]], given[count[0] :], [*used, *changed], T)
            with torch.no_grad():
                for buffer, own, value in zip(buffers, is_own[len(parameters) :], changed, strict=True):
                    if not own:
                        buffer.copy_(value)
        token = torch.zeros(1, dtype=torch.uint8)
        if not records:
            return *_fresh(results, [*inputs, *states, *parameters, *buffers]), token
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


def _fresh(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous results that share no memory with each other or with the arguments."""
    taken = {t.untyped_storage().data_ptr() for t in given}
    fresh = []
    for y in results:
        own = _contiguous_copy(y) if y.untyped_storage().data_ptr() in taken else y.detach().contiguous()
        fresh.append(own)
        taken.add(own.untyped_storage().data_ptr())
    return fresh


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
    form = _Form(tuple(slots), with_finals, training, autocast, places)
    like = inputs[0]
    with _fake_tensors(like), compile_state(True), torch.no_grad(), _autocast(autocast), without_size_guards():
        tensors = [*parameters, *(torch.empty_like(b) for b in buffers)]
        results = operator.run_with(form, inputs, states, tensors, T)
        made = [torch.empty(y.shape, dtype=y.dtype, device=y.device) for y in results]
        return *made, torch.empty(1, dtype=torch.uint8, device=like.device)


@contextlib.contextmanager
def _fake_tensors(x: Tensor) -> Iterator[None]:
    """Allow real tensors under fake mode: a model may have tensors that are neither parameters nor buffers."""
    mode = getattr(x, "fake_mode", None)
    if mode is None:
        yield
        return
    before, mode.allow_non_fake_inputs = mode.allow_non_fake_inputs, True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = before


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
            hint="Compile the net without saved-tensor hooks; checkpoint= of snnfx.convert saves memory in a compiled net.",
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
        taken = {t.untyped_storage().data_ptr() for t in (*grads, *like, *kept)}
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
    has_strides = gradient.stride() == like.stride() and torch.ops.aten.is_non_overlapping_and_dense(like)
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
    def forward(ctx: Any, run: Any, form: tuple[Any, ...], more: tuple[Any, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
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
    return list(_RunNetBackward.apply((token, given, wanted, like, kept), *grads))  # type: ignore[no-untyped-call]


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
        _Form(tuple(slots), with_finals, training, autocast, places), inputs, states, T, needs
    )
    more = ((len(inputs), len(states)), buffers, T, needs, flow)
    return _RunNet.apply(run, form, more, *inputs, *states, *parameters)  # type: ignore[no-any-return,no-untyped-call]


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
