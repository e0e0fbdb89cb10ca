"""Record one step of a loop and its backward pass as ATen calls.

The step runs once, eagerly, on the first time step of the data, and a dispatch mode records every operator that it
calls. `torch.autograd.grad` on the results, recorded as well, gives the backward pass, so autograd functions (surrogate
gradients) contribute their own derivative. `make_fx` does the same with symbolic shapes; without them and their imports
a recording takes a few milliseconds instead of about a hundred (and two seconds at the first use).

Every tensor that is not an input of the step is a constant: parameters, buffers, tensors in plain attributes. Constants
are recorded by reference and read at every call. If Python reads the value of a constant (`.item()`), the recording
notes the tensor and its version ("baked").
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from snnfx.ops.operator_lookup import traits_of_function
from snnfx.ops.shared_memory import are_disjoint
from snnfx.ops.traits import OperatorTraits
from snnfx.ops.written_arguments import written_tensors
from snnfx.sandbox.torch_internals import (
    AccumulateGrad,
    BelowAutograd,
    TorchDispatchMode,
    current_autograd_node,
    gradients_in_modes,
    pytree,
    saved_tensors_hooks,
    sequence_number,
)

__all__ = [
    "AtenCall",
    "LoweringRefused",
    "RecordedValue",
    "Recording",
    "ValueReference",
    "call_as_recorded",
    "record_step",
    "resolve_references",
]


class LoweringRefused(Exception):
    """A step cannot be lowered; the message is a clause that gives the reason."""


@dataclass(frozen=True)
class ValueReference:
    """Placeholder for a tensor among the arguments of a recorded call; `number` is the number of its value."""

    number: int


@dataclass
class RecordedValue:
    """A tensor of a recording.

    Args:
        shape: its shape during recording.
        dtype: its dtype.
        origin: "sequence" (an input), "state", "grad_output", "grad_state", "constant" or "computed".
        index: the number of the input, state, output or constant.
        call: the call that computes it.
        varying: whether it depends on an input, a state or a gradient.
        depends_on_grad: whether it depends on a gradient.
        has_selected_size: whether its size depends on values, as that of `x[mask]`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    index: int = -1
    call: AtenCall | None = None
    varying: bool = False
    depends_on_grad: bool = False
    has_selected_size: bool = False


@dataclass
class AtenCall:
    """A recorded call of an operator; tensors in `args` and `kwargs` are `ValueReference`s.

    Args:
        target: the operator.
        args, kwargs: its arguments.
        results: the value numbers of the returned tensors.
        positions: the position of each result in the flattened return value, which may also contain None.
        in_custom_backward: whether the backward of an `autograd.Function` makes the call.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    in_custom_backward: bool = False

    @functools.cached_property
    def name(self) -> str:
        """The name of the operator, e.g. "add"."""
        return str(self.target._schema.name).partition("::")[2]

    @property
    def traits(self) -> OperatorTraits:
        """The traits of the operator."""
        return traits_of_function(self.target)

    def references(self) -> tuple[int, ...]:
        """The numbers of the values that the call reads."""
        return self._references

    @functools.cached_property
    def _references(self) -> tuple[int, ...]:
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return tuple([a.number for a in leaves if isinstance(a, ValueReference)])


@dataclass
class Recording:
    """A step and its backward pass.

    Args:
        values: all recorded tensors; their position is their number.
        constants: the tensors that are not inputs, in the order of their first use.
        outputs: the values that the step returns.
        next_states: the states after the step.
        grad_sequences: the gradient of each input, None where there is none.
        grad_states: the gradient of each state, None where there is none.
        grad_constants: the gradient of each constant that requires one, by the index of the constant.
        baked: constants whose values Python read, with their versions.
        reads_sizes: whether Python read the size of a tensor.

    Attributes:
        prepared_calls: what repeated runs of a call need, by the call and its results; the calls live as long.
    """

    values: list[RecordedValue]
    constants: list[Tensor]
    outputs: list[int]
    next_states: list[int]
    grad_sequences: list[int | None]
    grad_states: list[int | None]
    grad_constants: dict[int, int]
    baked: list[tuple[Tensor, int]]
    reads_sizes: bool
    prepared_calls: dict[tuple[int, ...], Any] = field(default_factory=dict, compare=False, repr=False)


_SIZE_ACCESS = {"size", "numel", "nelement", "__len__"}
_DATA_ACCESS = {
    "numpy",
    "tolist",
    "data_ptr",
    "__array__",
    "__dlpack__",
    "untyped_storage",
    "storage",
    "__cuda_array_interface__",
}


class _PythonAccessWatch(TorchFunctionMode):
    """Detect accesses to tensors that bypass the dispatcher: reading sizes, taking out data."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.reads_sizes = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.recorder.is_recording:
            return func(*args, **(kwargs or {}))
        if name in _DATA_ACCESS:
            raise LoweringRefused(f"the step takes data out of PyTorch with `{name}`")
        if name in _SIZE_ACCESS or (name == "__get__" and getattr(func.__self__, "__name__", "") == "shape"):
            self.reads_sizes = True
            if self.recorder.has_selected_size(args[0]):
                raise LoweringRefused("Python reads the size of `x[mask]`, which depends on the data")
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Dispatch mode that records ATen calls."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[RecordedValue] = []
        self.constants: list[Tensor] = []
        self.baked: list[tuple[Tensor, int]] = []
        self.number_of: dict[int, int] = {}
        self.storages: dict[int, list[Tensor]] = {}
        self.overwritten: set[int] = set()
        self.keep_alive: list[Any] = []  # an id is only unique among living objects
        self.decompose: Callable[[Any], Any] | None = None
        self.is_recording = False
        """Whether code of this class runs, which may read the memory of tensors."""

    def add(self, tensor: Tensor, value: RecordedValue) -> int:
        if tensor.is_complex():
            raise LoweringRefused("it computes with complex numbers")
        self.number_of[id(tensor)] = len(self.values)
        self.keep_alive.append(tensor)
        self.values.append(value)
        if tensor.numel():
            self.storages.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        return len(self.values) - 1

    def add_input(self, tensor: Tensor, origin: str, index: int) -> int:

        value = RecordedValue(tuple(tensor.shape), tensor.dtype, origin, index, varying=True)
        value.depends_on_grad = origin.startswith("grad")
        return self.add(tensor, value)

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; a tensor without a number becomes a constant."""
        known = self.number_of.get(id(tensor))
        if known is not None:
            if id(tensor) in self.overwritten:
                raise LoweringRefused("the step reads a view of a tensor after it wrote into that tensor")
            return known
        if any(self.values[self.number_of[id(t)]].varying for t in self._sharing(tensor)):
            raise LoweringRefused("the step reads the memory of a tensor in a way that cannot be recorded")
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise LoweringRefused(f"the step uses a {type(tensor).__name__}")
        self.constants.append(tensor)
        return self.add(tensor, RecordedValue(tuple(tensor.shape), tensor.dtype, "constant", len(self.constants) - 1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.is_recording = self.is_recording, True
        try:
            return self._record(func, args, kwargs or {})
        finally:
            self.is_recording = before

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        name = str(func._schema.name).partition("::")[2]
        if torch.Tag.nondeterministic_seeded in func.tags or traits_of_function(func).random == "always":
            raise LoweringRefused(f"`{name}` draws random numbers")
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        for tensor in tensors:
            self.number(tensor)
        if name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero"):
            return self._read_by_python(func, name, tensors, args, kwargs)
        replacement = self.decompose(func) if self.decompose is not None else None
        if replacement is not None:
            with self:
                return replacement(*args, **kwargs)
        written = written_tensors(func, args, kwargs)
        new_args, new_kwargs = pytree.tree_map(
            lambda a: ValueReference(self.number(a)) if isinstance(a, Tensor) else a, (args, kwargs)
        )
        aliases = [alias for tensor in written for alias in self._aliases_of_written(name, tensor)]
        call = AtenCall(
            func, new_args, new_kwargs, in_custom_backward=isinstance(current_autograd_node(), BackwardCFunction)
        )
        results = func(*args, **kwargs)
        if not written and isinstance(results, Tensor) and any(results is tensor for tensor in tensors):
            return results  # an operator that returns its operand, such as `to`, computes nothing
        sources = [self.values[n] for n in call.references()]
        for place, result in enumerate(pytree.tree_leaves(results)):
            if isinstance(result, Tensor):
                value = RecordedValue(tuple(result.shape), result.dtype, "computed", call=call)
                value.varying = any(s.varying for s in sources)
                value.depends_on_grad = any(s.depends_on_grad for s in sources)
                value.has_selected_size = not written and _has_selected_size(call, result, sources)
                call.results.append(self.add(result, value))
                call.positions.append(place)
        for tensor, alias in aliases:
            self.number_of[id(alias)] = self.number_of[id(tensor)]
        return results

    def _read_by_python(self, func: Any, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        if any(self.values[self.number(t)].varying for t in tensors):
            raise LoweringRefused("Python decides or computes with a value of the data (`if`, `.item()`, `float(...)`)")
        for tensor in tensors:
            self.baked.extend((t, t._version) for t in self._constants_behind(self.number(tensor)))
        return func(*args, **kwargs)

    def _constants_behind(self, number: int) -> list[Tensor]:
        """The constants that a value is computed from."""
        found: dict[int, Tensor] = {}
        pending, seen = [number], set()
        while pending:
            number = pending.pop()
            if number in seen:
                continue
            seen.add(number)
            value = self.values[number]
            if value.origin == "constant":
                found[number] = self.constants[value.index]
            elif value.call is not None:
                pending.extend(value.call.references())
        return list(found.values())

    def has_selected_size(self, tensor: Any) -> bool:
        """Whether the size of a tensor depends on values."""
        number = self.number_of.get(id(tensor))
        return number is not None and self.values[number].has_selected_size

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        """The recorded tensors that share their memory with a tensor, without itself."""
        if not tensor.numel():
            return []
        sharing = self.storages.get(tensor.untyped_storage().data_ptr(), ())
        return list({id(t): t for t in sharing if t is not tensor}.values())

    def _aliases_of_written(self, name: str, tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The written tensor with each tensor of the same memory; other views of its elements may not be read again."""
        aliases: list[tuple[Tensor, Tensor]] = []
        sharing = self._sharing(tensor)
        if any(self.values[self.number_of[id(t)]].origin == "constant" for t in (tensor, *sharing)):
            raise LoweringRefused(f"`{name}` changes a tensor that outlives the step")
        for other in sharing:
            if _geometry(other) == _geometry(tensor):
                aliases.append((tensor, other))
            elif not are_disjoint(other, tensor):
                self.overwritten.add(id(other))
        return aliases


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    """The place of a tensor in its memory."""
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()


def _has_selected_size(call: AtenCall, result: Tensor, sources: Sequence[RecordedValue]) -> bool:
    """Whether the size of a result depends on values: it is `x[mask]`, or has the size of such an operand."""
    if call.traits.selection == "reads" and any(s.dtype == torch.bool for s in sources[1:]):
        return True
    return result.dim() == 1 and any(s.has_selected_size and s.shape == result.shape for s in sources)


@contextlib.contextmanager
def _recording_environment() -> Iterator[None]:
    """Enable autograd in this thread, disable saved-tensor hooks."""
    hooks: Any = contextlib.nullcontext()
    if saved_tensors_hooks(False) is not None:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    # The dispatch mode is local to this thread; autograd would run the backward pass of a GPU in another one.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with torch.enable_grad(), one_thread, hooks:
        yield


def call_as_recorded(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an operator as during recording: grad mode is on, but dispatch starts below autograd.

    With grad mode off, some operators omit a result that only their backward pass reads, e.g. a recurrent layer of
    oneDNN its workspace.
    """
    with torch.enable_grad(), BelowAutograd():
        return target(*args, **kwargs)


def resolve_references(argument: Any, known: Mapping[int, Any]) -> Any:
    """Replace the value references in an argument by values."""
    if isinstance(argument, ValueReference):
        return known[argument.number]
    if isinstance(argument, list | tuple):
        return [resolve_references(a, known) for a in argument]
    if isinstance(argument, dict):
        return {key: resolve_references(a, known) for key, a in argument.items()}
    return argument


def _differentiable_copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaf tensors with the same values that require gradients."""
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def record_step(
    step: Callable[..., Any],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    differentiate: bool,
    decompose: Callable[[Any], Any] | None = None,
) -> Recording:
    """Run a step and record its ATen calls.

    Args:
        step: `(*inputs, states) -> (outputs, next states)`, or `(*inputs) -> ...` with `states` None.
        inputs: the inputs of one step, `[N, *]`.
        states: the states before the step, with the shape and dtype that they have after a step.
        differentiate: whether to record the backward pass as well.
        decompose: returns the function to record instead of an operator, or None.

    Raises:
        LoweringRefused: the step has effects or reads data in a way that a recording cannot represent.
    """
    recorder = _Recorder()
    watch = _PythonAccessWatch(recorder)
    recorder.decompose = decompose
    inputs = _differentiable_copies(inputs)
    given = _differentiable_copies(states or ())
    for origin, tensors in (("sequence", inputs), ("state", given)):
        for index, tensor in enumerate(tensors):
            recorder.add_input(tensor, origin, index)
    with _recording_environment():
        start = _number_of_next_node()
        with watch, recorder:
            outputs, following = step(*inputs, *([tuple(given)] if states is not None else []))
        for value in (*outputs, *following):
            if not isinstance(value, Tensor):
                raise LoweringRefused(f"a step returns a {type(value).__name__}, not a tensor")
        results = [*outputs, *following]
        grads: dict[int, int] = {}
        if differentiate:
            for tensor in _leaves_behind(results, recorder.constants, start):
                recorder.number(tensor)
            grads = _record_backward(recorder, watch, results, len(outputs), [*inputs, *given])
    leaves = [recorder.number_of[id(t)] for t in (*inputs, *given)]
    constants = {v.index: n for n, v in enumerate(recorder.values) if v.origin == "constant"}
    by_leaf = [grads.get(leaf) for leaf in leaves]
    return Recording(
        recorder.values,
        recorder.constants,
        [recorder.number(t) for t in outputs],
        [recorder.number(t) for t in following],
        by_leaf[: len(inputs)],
        by_leaf[len(inputs) :],
        {index: grads[n] for index, n in constants.items() if n in grads},
        recorder.baked,
        watch.reads_sizes,
    )


def _number_of_next_node() -> int:
    """The number of the next node that this thread adds to an autograd graph; inference mode adds none."""
    if torch.is_inference_mode_enabled():
        return 0
    node = torch.zeros((), requires_grad=True).view(()).grad_fn
    assert node is not None
    return sequence_number(node) + 1


def _leaves_behind(results: Sequence[Tensor], constants: Sequence[Tensor], start: int) -> list[Tensor]:
    """The leaf tensors in the autograd graph of a step.

    Among them are the tensors that no call of the forward pass reads, but the backward of an `autograd.Function`.

    Args:
        results: the results of the step.
        constants: the tensors that the forward pass reads; the search does not go behind them.
        start: the number of the first node of the step.

    Raises:
        LoweringRefused: only the backward pass reads a tensor, and this tensor has an autograd graph of its own.
    """
    borders = {(t.grad_fn, t.output_nr) for t in constants if t.grad_fn is not None}
    stack = [(t.grad_fn, t.output_nr) for t in results if t.grad_fn is not None]
    seen = set(borders)
    leaves: list[Tensor] = []
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        node: Any = edge[0]
        if isinstance(node, AccumulateGrad):
            leaves.append(node.variable)
            continue
        if sequence_number(node) < start:
            raise LoweringRefused("only its backward pass reads a tensor that has an autograd graph of its own")
        stack.extend((following, index) for following, index in node.next_functions if following is not None)
    return leaves


def _record_backward(
    recorder: _Recorder, watch: _PythonAccessWatch, results: list[Tensor], output_count: int, leaves: list[Tensor]
) -> dict[int, int]:
    """Record the gradients of the results: `{number of a leaf or constant: number of its gradient}`."""
    roots: list[Tensor] = []
    tangents: list[Tensor] = []
    for index, result in enumerate(results):
        recorder.number(result)
        if result.requires_grad:
            is_output = index < output_count
            tangent = torch.ones_like(result, requires_grad=False)
            recorder.add_input(
                tangent, "grad_output" if is_output else "grad_state", index if is_output else index - output_count
            )
            roots.append(result)
            tangents.append(tangent)
    wanted = [t for t in (*leaves, *recorder.constants) if t.requires_grad]
    if not roots or not wanted:
        return {}
    hooks = [(t, t._backward_hooks) for t in recorder.constants if t._backward_hooks]
    try:
        for t, _ in hooks:
            t._backward_hooks = None  # the user's hooks must not run for a recording
        with watch, recorder:
            found = gradients_in_modes(roots, wanted, tangents)
    finally:
        for t, removed in hooks:
            t._backward_hooks = removed
    return {recorder.number(t): recorder.number(g) for t, g in zip(wanted, found, strict=True) if g is not None}
