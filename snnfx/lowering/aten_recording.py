"""Record one step of a loop and its backward pass as calls of ATen operators.

The step is run once, for real, on the first time step of the data, and every operator that PyTorch calls is written
down; `torch.autograd.grad` on its results, written down as well, gives the backward pass, so that autograd functions
(surrogate gradients) bring their own derivative. It is what `make_fx` does, without symbolic shapes and their imports:
a few milliseconds instead of about a hundred, and two seconds at the first use.

What is not an input of the step is a constant: parameters, buffers, tensors in plain attributes. They are recorded by
reference, their values are read at every call. What Python made of a constant's value (`.item()`) is remembered, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from snnfx.sandbox.torch_internals import BelowAutograd, TorchDispatchMode, pytree, saved_tensors_hooks

__all__ = [
    "AtenCall",
    "LoweringRefused",
    "RecordedValue",
    "Recording",
    "ValueReference",
    "call_as_recorded",
    "preserved_rng_state",
]
__all__ += ["record_step"]


class LoweringRefused(Exception):
    """A step cannot become a kernel; the text is a clause that says why."""


@dataclass(frozen=True)
class ValueReference:
    """Stands for a tensor among the arguments of a call."""

    number: int


@dataclass
class RecordedValue:
    """A tensor that was seen.

    Args:
        shape: when it was recorded.
        dtype: its dtype.
        origin: "sequence", "state", "grad_output", "grad_state", "constant" or "computed".
        index: number of the input, state or output that it is, or of the constant.
        call: that computes it.
        varying: depends on an input, a state or a gradient.
        tangential: depends on a gradient.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    index: int = -1
    call: AtenCall | None = None
    varying: bool = False
    tangential: bool = False


@dataclass
class AtenCall:
    """A call of an operator; tensors in `args` are `ValueReference`s.

    Args:
        target: the operator.
        args, kwargs: of the call.
        results: the numbers of the tensors that it returned.
        places: where each of them stands in what it returned, as a flat list: an operator may leave out some.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the operator, e.g. "add"."""
        return str(self.target._schema.name).partition("::")[2]

    def references(self) -> list[int]:
        """The numbers of the tensors that it reads."""
        return [a.number for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, ValueReference)]


@dataclass
class Recording:
    """A step and its backward pass.

    Args:
        values: all tensors seen, by number.
        constants: the tensors that are no inputs, in the order in which they were met.
        outputs: the values that a step returns.
        next_states: the states after the step.
        grad_sequences: the gradient of each input, None where there is none; like the following.
        grad_states: of each state.
        grad_constants: of each constant that requires a gradient, by its index.
        baked: constants whose value Python has read, with their version.
        reads_sizes: Python has looked at the size of a tensor.
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


_SIZES = {"size", "numel", "nelement", "__len__"}
_ESCAPES = {
    "numpy",
    "tolist",
    "data_ptr",
    "__array__",
    "__dlpack__",
    "untyped_storage",
    "storage",
    "__cuda_array_interface__",
}


class _PythonWatch(TorchFunctionMode):
    """Sees what Python does with tensors past the dispatcher: reading sizes, taking the data away."""

    def __init__(self) -> None:
        super().__init__()
        self.reads_sizes = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ESCAPES:
            raise LoweringRefused(f"the step takes data out of PyTorch with `{name}`")
        if name in _SIZES or (name == "__get__" and getattr(func.__self__, "__name__", "") == "shape"):
            self.reads_sizes = True
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.values: list[RecordedValue] = []
        self.constants: list[Tensor] = []
        self.baked: list[tuple[Tensor, int]] = []
        self.number_of: dict[int, int] = {}
        self.storages: dict[int, int] = {}
        self.kept: list[Any] = []  # an id is only unique among living objects
        self.decompose: Callable[[Any], Any] | None = None

    def add(self, tensor: Tensor, value: RecordedValue) -> int:
        if tensor.is_complex():
            raise LoweringRefused("it computes with complex numbers")
        self.number_of[id(tensor)] = len(self.values)
        self.kept.append(tensor)
        self.values.append(value)
        if tensor.numel() and value.varying:
            pointer = tensor.untyped_storage().data_ptr()
            self.storages[pointer] = self.storages.get(pointer, 0) + 1
        return len(self.values) - 1

    def add_input(self, tensor: Tensor, origin: str, index: int) -> int:
        tangential = origin.startswith("grad")
        return self.add(
            tensor, RecordedValue(tuple(tensor.shape), tensor.dtype, origin, index, varying=True, tangential=tangential)
        )

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor; one that was not seen before is a constant."""
        known = self.number_of.get(id(tensor))
        if known is not None:
            return known
        if tensor.numel() and self.storages.get(tensor.untyped_storage().data_ptr()):
            raise LoweringRefused("the step looks at the memory of a tensor in a way that is not recorded")
        if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
            raise LoweringRefused(f"the step uses a {type(tensor).__name__}")
        self.constants.append(tensor)
        return self.add(tensor, RecordedValue(tuple(tensor.shape), tensor.dtype, "constant", len(self.constants) - 1))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func._schema.name).partition("::")[2]
        if torch.Tag.nondeterministic_seeded in func.tags:
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
        written = _written(func, args, kwargs)
        numbered = pytree.tree_map(
            lambda a: ValueReference(self.number(a)) if isinstance(a, Tensor) else a, (args, kwargs)
        )
        for tensor in written:
            self._check_write(name, tensor)
        call = AtenCall(func, *numbered)
        results = func(*args, **kwargs)
        if not written and isinstance(results, Tensor) and any(results is tensor for tensor in tensors):
            return results  # what gives back what it was given, such as `to`, computes nothing
        sources = [self.values[n] for n in call.references()]
        for place, result in enumerate(pytree.tree_leaves(results)):
            if isinstance(result, Tensor):
                value = RecordedValue(tuple(result.shape), result.dtype, "computed", call=call)
                value.varying = any(s.varying for s in sources)
                value.tangential = any(s.tangential for s in sources)
                call.results.append(self.add(result, value))
                call.places.append(place)
        return results

    def _read_by_python(self, func: Any, name: str, tensors: list[Tensor], args: Any, kwargs: Any) -> Any:
        if any(self.values[self.number(t)].varying for t in tensors):
            raise LoweringRefused("Python decides or computes with a value of the data (`if`, `.item()`, `float(...)`)")
        for tensor in tensors:
            value = self.values[self.number(tensor)]
            if value.origin == "constant":
                self.baked.append((tensor, tensor._version))
            else:
                self.baked.extend((t, t._version) for t in self.constants)
        return func(*args, **kwargs)

    def _check_write(self, name: str, tensor: Tensor) -> None:
        value = self.values[self.number(tensor)]
        if value.origin == "constant":
            raise LoweringRefused(f"`{name}` changes a tensor that outlives the step")
        if value.varying and self.storages.get(tensor.untyped_storage().data_ptr(), 0) > 1:
            raise LoweringRefused(f"`{name}` writes into a tensor that others share")


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes in place."""
    if not func._schema.is_mutable:
        return []
    found: list[Tensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found.extend(t for t in pytree.tree_leaves(given) if isinstance(t, Tensor))
    return found


@contextlib.contextmanager
def preserved_rng_state(device: torch.device) -> Iterator[None]:
    """Random numbers that are drawn on a device, or on the CPU, do not count."""
    state = torch.get_rng_state()
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        if own is not None:
            torch.cuda.set_rng_state(own, device)


@contextlib.contextmanager
def _isolated(device: torch.device) -> Iterator[None]:
    """Autograd is on, in this thread; random numbers do not count, hooks of saved tensors are not called."""
    hooks: Any = contextlib.nullcontext()
    if saved_tensors_hooks(False) is not None:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    # Calls on a GPU would be recorded in the threads that autograd has for its devices.
    one_thread = torch.autograd.set_multithreading_enabled(False)
    with preserved_rng_state(device), torch.enable_grad(), one_thread, hooks:
        yield


def call_as_recorded(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call an operator in the modes in which a step is recorded: autograd is on, but its own kernels are not called.

    Without autograd, some operators leave out a result that only their backward pass reads: a recurrent layer of oneDNN
    its workspace.
    """
    with torch.enable_grad(), BelowAutograd():
        return target(*args, **kwargs)


def stand_ins(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with the same values, which can be differentiated."""
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def record_step(
    step: Callable[..., Any],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor] | None,
    differentiate: bool,
    decompose: Callable[[Any], Any] | None = None,
) -> Recording:
    """Run a step and write down what it computes.

    Args:
        step: `(*inputs, states) -> (outputs, next states)`, or `(*inputs) -> ...` with `states` None.
        inputs: of one step, `[N, *]`.
        states: before the step, of the shape and dtype that they have after a step.
        differentiate: record the backward pass as well.
        decompose: operator -> a function to record in its place, or None.

    Raises:
        LoweringRefused: the step does something that is not a computation on its inputs.
    """
    recorder, watch = _Recorder(), _PythonWatch()
    recorder.decompose = decompose
    inputs = stand_ins(inputs)
    given = stand_ins(states or ())
    for origin, tensors in (("sequence", inputs), ("state", given)):
        for index, tensor in enumerate(tensors):
            recorder.add_input(tensor, origin, index)
    with _isolated(inputs[0].device):
        with watch, recorder:
            outputs, following = step(*inputs, *([tuple(given)] if states is not None else []))
        for value in (*outputs, *following):
            if not isinstance(value, Tensor):
                raise LoweringRefused(f"a step returns a {type(value).__name__}, not a tensor")
        results = [*outputs, *following]
        grads: dict[int, int] = {}
        if differentiate:
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


def _record_backward(
    recorder: _Recorder, watch: _PythonWatch, results: list[Tensor], output_count: int, leaves: list[Tensor]
) -> dict[int, int]:
    """Differentiate the results: from the number of a leaf or constant to that of its gradient."""
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
            t._backward_hooks = None  # the user's hooks are not for a step_lowering
        with watch, recorder:
            found = torch.autograd.grad(roots, wanted, tangents, allow_unused=True)
    finally:
        for t, kept in hooks:
            t._backward_hooks = kept
    return {recorder.number(t): recorder.number(g) for t, g in zip(wanted, found, strict=True) if g is not None}
