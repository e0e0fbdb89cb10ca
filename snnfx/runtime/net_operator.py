"""A net as one operator under torch.compile: how it runs, and where gradients flow in a call.

`snnfx.runtime.run_net` has the operators themselves.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from snnfx.emit.bounded_cache import BoundedCache
from snnfx.emit.executable import Executable
from snnfx.errors import PassError
from snnfx.ir.program import StepProgram
from snnfx.lowering.mixed.operator_shapes import size_hint
from snnfx.runtime.execution import Execution
from snnfx.sandbox.plain_dispatch import ordinary_dispatch
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import compile_state, disable_dispatch_modes, pytree

__all__ = ["CallForm", "Flow", "NetOperator", "Place", "cpu_autocast"]

_living: weakref.WeakValueDictionary[str, NetOperator] = weakref.WeakValueDictionary()
_counter = itertools.count()
_process = secrets.token_hex(8)

_MOST_FLOWS = 64
_PROBED_STEPS = 3
"""Gradients flow through a state from the second step on."""


@dataclass(frozen=True)
class CallForm:
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
class Flow:
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
        current: the executable that the net runs now; another one after the model was captured again.
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
        current: Callable[[], Executable],
        call: Callable[..., Any],
        execute: Callable[..., Any],
        check_guards: Callable[..., None],
    ) -> None:
        self.executable, self.current, self.call = executable, current, call
        self.execute, self.check_guards = execute, check_guards
        # Unique in all processes: the compiler's caches on disk compare graphs by their text.
        self.handle = f"{type(executable.source).__name__}#{_process}.{os.getpid()}.{next(_counter)}"
        self.source, self.carries_state = executable.source, executable.options.carry_state
        self.outputs = {mode: _outputs_of(program) for mode, program in executable.programs.items()}
        self._places: list[tuple[Place, ...]] = []
        self._flows: BoundedCache[Flow] = BoundedCache(_MOST_FLOWS)
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

    def run(self, form: CallForm, inputs: Sequence[Tensor], states: Sequence[Tensor], T: int | None) -> list[Tensor]:
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
        form: CallForm,
        inputs: Sequence[Tensor],
        states: Sequence[Tensor],
        tensors: Sequence[Tensor],
        T: int | None,
    ) -> list[Tensor]:
        """Run the net with other tensors in place of its parameters and buffers."""
        replacements = {id(own): t for own, t in zip(self.tensors(form.places), tensors, strict=True)}
        copies = StructuralCopy(tensor=lambda own: replacements.get(id(own), own), objects=False)
        execution = Execution(self.current().with_source(copies.of(self.source)))
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
        self, form: CallForm, inputs: Sequence[Tensor], states: Sequence[Tensor], T: Any, needs: Sequence[bool]
    ) -> Flow:
        """Where gradients flow in calls of this form, measured with a few steps of a copy of the model."""
        shapes = tuple([(tuple(map(size_hint, x.shape[1:])), x.dtype) for x in (*inputs, *states)])
        return self._flows.get_or_make(
            (form, shapes, tuple(needs)), partial(self._probe, form, inputs, states, T, needs)
        )

    def _probe(
        self, form: CallForm, inputs: Sequence[Tensor], states: Sequence[Tensor], T: Any, needs: Sequence[bool]
    ) -> Flow:
        arguments = self.executable.arguments
        steps = min([size_hint(n) for n in _lengths(inputs, arguments.tensor_dims)] or [size_hint(T)])
        steps = min(steps, _PROBED_STEPS)
        with (
            disable_dispatch_modes(),
            compile_state(False),
            ordinary_dispatch(grad=True),
            cpu_autocast(form.autocast),
            torch.random.fork_rng(devices=()),
        ):
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
            return Flow(
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


def cpu_autocast(dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast on the CPU to a dtype; None: without autocast."""
    if torch.is_autocast_enabled("cpu") == (dtype is not None) and dtype in (None, torch.get_autocast_dtype("cpu")):
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)
