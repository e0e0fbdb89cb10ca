"""Reference implementation of a net: the user's model, run step by step without snnfx's graphs.

Three ways to run T time steps of a model that keeps its state between calls:

- `step_forward`: a Python loop over t. The definition for every model, except for BatchNorm statistics over T*N.
- `lockstep_forward`: T coroutines, one per time step, that synchronise at every BatchNorm (a barrier), which is called
  once with the inputs of all steps. Between two barriers the steps run in the order of t, and so do the calls of each
  neuron.
- `replay_forward`: sweeps over t until the inputs of all BatchNorms converge. In each sweep, a BatchNorm call returns
  its slice of the result that the inputs of the previous sweep gave for the whole sequence. Correct for every model for
  which statistics over T*N are defined, but takes as many sweeps as there are BatchNorms in sequence.

In lockstep, step t reaches a barrier before step t-1 leaves it. The result is wrong for a model that reads a state
before a barrier and writes it after the barrier, or that carries its state in arguments. `folded_forward` therefore
checks the result of the lockstep with one sweep of the replay, and falls back to the replay if they disagree.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx._progress import progress_over
from snnfx.errors import VerificationError
from snnfx.inspect.verify.coroutines import Coroutine, inherited_settings
from snnfx.inspect.verify.observed_contents import Observed, changed_names, is_same, observe
from snnfx.sandbox.snapshot import StateSnapshot, copy_containers
from snnfx.sandbox.torch_internals import CheckpointAsPlainCall, NormBase, pytree
from snnfx.state.carry import output_at, paths_of
from snnfx.state.registry import named_stateful

__all__ = ["folded_forward", "lockstep_forward", "replay_forward", "step_forward"]

IsBarrier = Callable[[str, nn.Module], bool]
"""`(qualified name, submodule) -> bool`: whether the submodule is called once for all time steps."""

Steps = Sequence[Sequence[Any]]
"""The positional arguments of each step."""


def step_forward(
    model: nn.Module,
    steps: Steps,
    entry: str = "forward",
    *,
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    carry: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Run a model step by step, from its current state.

    Args:
        model: a single-step model.
        steps: positional arguments of each of the T time steps.
        entry: name of the method that computes one step.
        kwargs: keyword arguments of each step.
        carry: for models with explicit state: the output of the previous step that each argument receives, an index or
            a path of indices and keys. At the first step the argument has its value in `kwargs`, else its default, else
            None.

    Returns:
        The model's return value at each step.

    Example:
        >>> import torch
        >>> [float(y) for y in step_forward(torch.nn.ReLU(), [(torch.tensor(-1.0),), (torch.tensor(2.0),)])]
        [0.0, 2.0]
    """
    if not torch.is_grad_enabled():
        return list(_stepping(model, steps, entry, kwargs, carry))
    # A later step updates running statistics in place, and batch_norm does not tell autograd: a step that multiplied by
    # them would get a wrong gradient. Each step therefore has its own running statistics.
    norms = [module for module in model.modules() if isinstance(module, NormBase)]
    current = _clone_buffers(norms)
    outputs = []
    try:
        for y in _stepping(model, steps, entry, kwargs, carry):
            outputs.append(y)
            clones = _clone_buffers(norms)
            current = {original: clones.get(buffer, buffer) for original, buffer in current.items()}
    finally:
        _keep_buffers(norms, current)
    return outputs


def _stepping(
    model: nn.Module,
    steps: Steps,
    entry: str,
    kwargs: Sequence[Mapping[str, Any]] | None,
    carry: Mapping[str, Any] | None,
) -> Iterator[Any]:
    # A call of the module, unlike one of its method, runs its hooks.
    call: Callable[..., Any] = model if entry == "forward" else getattr(model, entry)
    carried: dict[str, Any] = {}
    if carry:
        parameters = inspect.signature(getattr(model, entry)).parameters
        first_kwargs = kwargs[0] if kwargs else {}
        carried = {
            name: None
            for name in carry
            if name not in first_kwargs and parameters[name].default is inspect.Parameter.empty
        }
    for t, args in enumerate(progress_over(steps, "verify: step the model", unit="time steps")):
        with CheckpointAsPlainCall():  # a checkpoint inside a step would run its function with later state
            outputs = call(*args, **{**(kwargs[t] if kwargs else {}), **carried})
        if carry:
            carried = {name: output_at(outputs, path) for name, path in paths_of(carry).items()}
            # A copy, because a container may modify the list of states that is passed to it.
            yield copy_containers(outputs)
            continue
        yield outputs


@dataclass
class _FoldedCall:
    """One call of a barrier: the input of each time step, the slice of the result for each step, and its buffers."""

    inputs: list[Tensor] = field(default_factory=list)
    results: tuple[Tensor, ...] = ()
    buffers: list[Tensor] = field(default_factory=list)
    """The buffers of the barrier after the call."""

    def compute(self, function: Callable[[Tensor], Tensor], once: bool) -> None:
        """Call the barrier with the inputs of all steps; with `once` and equal inputs, with one of them."""
        if once and all(torch.equal(x, self.inputs[0]) for x in self.inputs):
            self.results = (function(self.inputs[0]),) * len(self.inputs)
        else:
            self.results = function(torch.cat(self.inputs)).split([x.shape[0] for x in self.inputs])

    def result_of(self, t: int) -> Tensor:
        """The slice for step t, as a copy because the next layer may work in place."""
        return self.results[t].clone()


Key = tuple[str, int]
"""Name of a barrier, and the number of the call within a step."""


@contextmanager
def _intercepted(
    model: nn.Module, is_barrier: IsBarrier, arrive: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """Replace the forward of each barrier of a model by `arrive(name, original forward, input)`."""

    def answer(name: str, original: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
            (x,) = (*args, *kwargs.values())
            return arrive(name, original, x)

        return forward

    barriers = [(name, module) for name, module in model.named_modules() if is_barrier(name, module)]
    own = [(module, module.__dict__.get("forward")) for _, module in barriers]
    try:
        for name, module in barriers:
            module.__dict__["forward"] = answer(name, module.forward)
        yield
    finally:
        for module, forward in own:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


def _undefined(why: str) -> VerificationError:
    return VerificationError(
        "SNNFX405",
        "BatchNorm statistics over all time steps are undefined for this model",
        why=why,
        hint='Convert it with batch_norm="per_step", or verify it in evaluation mode.',
    )


def lockstep_forward(
    model: nn.Module,
    steps: Steps,
    is_barrier: IsBarrier,
    entry: str = "forward",
    *,
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    is_once: IsBarrier | None = None,
) -> list[Any]:
    """Run T time steps of a model concurrently, and call its barriers once with the inputs of all steps.

    Each step is a coroutine. At a call of a barrier it waits for all other steps. Then the inputs are concatenated
    along dim 0 in the order of t, the layer is called once, and each step continues with its slice of the result.

    Args:
        model: a single-step model in the state before step 0; afterwards it is in the state after step T-1.
        steps: positional arguments of each of the T time steps.
        is_barrier: `(qualified name, module) -> bool`; a barrier maps one tensor `[N, *]` to one tensor `[N, *]`.
        entry: name of the method that computes one step.
        kwargs: keyword arguments of each step.
        is_once: barriers that are called with the input of a single step if all steps have the same input.

    Returns:
        The model's return value at each step.

    Raises:
        VerificationError: SNNFX405, the steps do not reach the same barriers in the same order.
        Exception: any exception of a step, after the other steps have been cancelled.

    Example:
        >>> import torch
        >>> bn = torch.nn.BatchNorm1d(1, affine=False)
        >>> steps = [(torch.tensor([[0.0], [0.0]]),), (torch.tensor([[2.0], [2.0]]),)]
        >>> y = lockstep_forward(bn, steps, lambda name, module: module is bn)
        >>> [[round(float(v)) for v in y_t] for y_t in y]
        [[-1, -1], [1, 1]]
    """
    return _lockstep(model, steps, is_barrier, entry, kwargs, is_once)[0]


def _lockstep(
    model: nn.Module,
    steps: Steps,
    is_barrier: IsBarrier,
    entry: str,
    kwargs: Sequence[Mapping[str, Any]] | None,
    is_once: IsBarrier | None,
) -> tuple[list[Any], dict[Key, _FoldedCall], bool]:
    """`lockstep_forward`, plus the barrier calls, and whether the steps called each stateful module in order of t."""
    calls: dict[Key, _FoldedCall] = {}
    counts = [Counter[str]() for _ in steps]
    once = {name for name, module in model.named_modules() if is_once is not None and is_once(name, module)}
    current = 0

    def arrive(name: str, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        t = current
        call = calls.setdefault((name, counts[t][name]), _FoldedCall())
        counts[t][name] += 1
        if len(call.inputs) != t:
            raise _undefined(f"step {t} calls `{name}`, step {len(call.inputs)} does not.")
        call.inputs.append(x)
        if t == len(steps) - 1:
            call.compute(original, name in once)
            call.buffers = [buffer.detach().clone() for buffer in model.get_submodule(name).buffers()]
        threads[t].pause()
        return call.result_of(t)

    latest: dict[nn.Module, int] = {}
    in_order = True

    def record_call(module: nn.Module, args: Any) -> None:
        nonlocal in_order
        in_order = in_order and latest.get(module, 0) <= current
        latest[module] = current

    settings = inherited_settings()

    def work(t: int) -> Callable[[], Any]:
        return lambda: step_forward(model, steps[t : t + 1], entry, kwargs=kwargs[t : t + 1] if kwargs else None)[0]

    hooks = [module.register_forward_pre_hook(record_call) for _, module, _ in named_stateful(model)]
    threads = [Coroutine(work(t), settings) for t in range(len(steps))]
    try:
        with _intercepted(model, is_barrier, arrive):
            while threads and not threads[-1].done:
                for current, thread in enumerate(threads):
                    if thread.done:
                        raise _undefined(f"step {len(steps) - 1} calls a BatchNorm that step {current} does not call.")
                    thread.resume()
            if not all(thread.done for thread in threads):
                raise _undefined("an earlier step calls a BatchNorm that the last step does not call.")
    finally:
        for thread in threads:
            thread.cancel()
        for hook in hooks:
            hook.remove()
    return [thread.result for thread in threads], calls, in_order


def replay_forward(
    model: nn.Module,
    steps: Steps,
    is_barrier: IsBarrier,
    entry: str = "forward",
    *,
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    carry: Mapping[str, Any] | None = None,
    is_once: IsBarrier | None = None,
) -> list[Any]:
    """Compute the result of `lockstep_forward` for any model, by sweeps over t.

    A sweep runs the steps in order from the initial state. A barrier returns the slice of this step from its call for
    all steps, computed with the inputs of the previous sweep. Values and gradients after k barriers in sequence are
    correct after k sweeps; all are correct when a sweep repeats the inputs of the previous one.

    Args:
        model, steps, is_barrier, entry, kwargs, is_once: see `lockstep_forward`.
        carry: see `step_forward`.

    Raises:
        VerificationError: SNNFX405, the inputs do not converge (a barrier on a cycle through time), or the steps do not
            all call the same barriers.

    Example:
        >>> import torch
        >>> bn = torch.nn.BatchNorm1d(1, affine=False)
        >>> steps = [(torch.tensor([[0.0], [0.0]]),), (torch.tensor([[2.0], [2.0]]),)]
        >>> [[round(float(v)) for v in y_t] for y_t in replay_forward(bn, steps, lambda name, module: True)]
        [[-1, -1], [1, 1]]
    """
    start = _Moment(model)
    originals = {name: module.forward for name, module in model.named_modules() if is_barrier(name, module)}
    once = {name for name, module in model.named_modules() if is_once is not None and is_once(name, module)}
    known: dict[Key, _FoldedCall] = {}
    sweeps = 0
    while True:
        start.restore()
        buffers = _clone_buffers(model.modules())
        outputs, calls = _sweep(model, steps, is_barrier, entry, kwargs, carry, known)
        sweeps += 1
        settled = _same_inputs(calls, known)
        # Equal spikes may have gradients of an earlier sweep, so with gradients the sweeps are not cut short.
        last = settled and (sweeps > len(calls) or not torch.is_grad_enabled())
        if sweeps > len(calls) and not settled:
            raise _undefined("the statistics of a BatchNorm depend on its own output at an earlier step.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not last):
            # The last sweep only updates the running statistics.
            for (name, _), call in calls.items():
                call.compute(originals[name], name in once)
                call.buffers = [buffer.detach().clone() for buffer in model.get_submodule(name).buffers()]
        if last:
            _keep_buffers(model.modules(), buffers)
            return outputs
        known = calls


def _sweep(
    model: nn.Module,
    steps: Steps,
    is_barrier: IsBarrier,
    entry: str,
    kwargs: Sequence[Mapping[str, Any]] | None,
    carry: Mapping[str, Any] | None,
    known: Mapping[Key, _FoldedCall],
) -> tuple[list[Any], dict[Key, _FoldedCall]]:
    """Run the steps in order with the known barrier results; a barrier without one runs on the current step only.

    In each step, the buffers of a barrier have their values before the sequence, and after the call of the barrier the
    values after the update for all steps.
    """
    calls: dict[Key, _FoldedCall] = {}
    counts = Counter[str]()
    outputs: list[Any] = []
    before = [
        (m._buffers, dict(m._buffers))
        for name, module in model.named_modules()
        if is_barrier(name, module)
        for m in module.modules()
    ]

    def restore_buffers(copy: bool) -> None:
        copies: dict[Tensor, Tensor] = {}  # layers may share a buffer
        for registry, buffers in before:
            for key, buffer in buffers.items():
                if copy and buffer is not None:
                    buffer = copies.setdefault(buffer, buffer.detach().clone())
                registry[key] = buffer

    def arrive(name: str, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        key = (name, counts[name])
        counts[name] += 1
        calls.setdefault(key, _FoldedCall()).inputs.append(x)
        if key not in known:
            return original(x)
        with torch.no_grad():
            for buffer, value in zip(model.get_submodule(name).buffers(), known[key].buffers, strict=False):
                buffer.copy_(value)
        return known[key].result_of(len(outputs))

    with _intercepted(model, is_barrier, arrive):
        restore_buffers(copy=True)
        for y in _stepping(model, steps, entry, kwargs, carry):
            outputs.append(y)
            counts.clear()
            restore_buffers(copy=True)
    restore_buffers(copy=False)
    for (name, _), call in calls.items():
        if len(call.inputs) != len(steps):
            raise _undefined(f"`{name}` is called at {len(call.inputs)} of {len(steps)} time steps only.")
    return outputs, calls


def folded_forward(
    model: nn.Module,
    steps: Steps,
    is_barrier: IsBarrier,
    entry: str = "forward",
    *,
    kwargs: Sequence[Mapping[str, Any]] | None = None,
    carry: Mapping[str, Any] | None = None,
    is_once: IsBarrier | None = None,
) -> list[Any]:
    """Run T time steps with barriers over all of them, in lockstep if that is correct, else by replay.

    Running statistics and state are updated once.

    Args:
        model, steps, is_barrier, entry, kwargs, is_once: see `lockstep_forward`.
        carry: see `step_forward`.

    Returns:
        The model's return value at each step.

    Raises:
        VerificationError: SNNFX405, see `replay_forward`.
    """
    options: dict[str, Any] = {"kwargs": kwargs, "carry": carry, "is_once": is_once}
    start = _Moment(model)
    try:
        if not carry:
            buffers = _clone_buffers(model.modules())
            outputs, calls, in_order = _lockstep(model, steps, is_barrier, entry, kwargs, is_once)
            states, contents, finished = _read_states(model), _outside_barriers(model, is_barrier), _Moment(model)
            start.restore()
            _clone_buffers(model.modules())
            with torch.no_grad():
                replayed_outputs, replayed_calls = _sweep(model, steps, is_barrier, entry, kwargs, None, calls)
            # If a stateful layer is called out of order, gradients may differ although the spikes are equal.
            same = in_order and _same_inputs(calls, replayed_calls) and _same(outputs, replayed_outputs)
            # A layer that is called several times in a step may have updated its buffers out of order.
            same = same and not changed_names(contents, _outside_barriers(model, is_barrier))
            if same and _same(states, _read_states(model)):
                finished.restore()
                _keep_buffers(model.modules(), buffers)
                return outputs
            start.restore()
        return replay_forward(model, steps, is_barrier, entry, **options)
    except BaseException:
        start.restore()
        raise


class _Moment:
    """The state of a model at one moment, with the values of its parameters, to return to."""

    def __init__(self, model: nn.Module) -> None:
        self.snapshot = StateSnapshot.of(model)
        self.parameters = [(p, p.detach().clone()) for p in model.parameters() if not p.is_meta]

    def restore(self) -> None:
        """Return to this moment."""
        self.snapshot.restore()
        with torch.no_grad():
            for parameter, value in self.parameters:
                if not is_same(parameter.detach(), value):
                    parameter.copy_(value)  # autograd notices a graph that saved the parameter


def _read_states(model: nn.Module) -> list[Any]:
    return [adapter.read(module) for _, module, adapter in named_stateful(model)]


def _outside_barriers(model: nn.Module, is_barrier: IsBarrier) -> dict[str, Observed]:
    """Everything that a model stores outside its barriers."""
    barriers = [module for name, module in model.named_modules() if is_barrier(name, module)]
    inside = {part for barrier in barriers for part in barrier.modules()}
    return {name: entry for name, entry in observe(model).items() if entry.owner not in inside}


def _same_inputs(calls: Mapping[Key, _FoldedCall], others: Mapping[Key, _FoldedCall]) -> bool:
    return calls.keys() == others.keys() and all(_same(calls[key].inputs, others[key].inputs) for key in calls)


def _same(values: Any, others: Any) -> bool:
    """Whether two pytrees of values are equal, with NaN equal to NaN."""
    leaves, spec = pytree.tree_flatten(values)
    other_leaves, other_spec = pytree.tree_flatten(others)
    return spec == other_spec and all(is_same(a, b) for a, b in zip(leaves, other_leaves, strict=True))


def _clone_buffers(modules: Iterable[nn.Module]) -> dict[Tensor, Tensor]:
    """Replace each buffer by a clone, so that an autograd graph that saved the buffer stays valid.

    A buffer that the model assigned in an earlier step, such as a state of snnTorch, keeps its gradient.
    """
    clones: dict[Tensor, Tensor] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if buffer not in clones:
                    clones[buffer] = buffer.clone()
                module._buffers[name] = clones[buffer]
    return clones


def _keep_buffers(modules: Iterable[nn.Module], clones: Mapping[Tensor, Tensor]) -> None:
    """Put the original buffers back, with the values of their clones."""
    originals = {clone: original for original, clone in clones.items()}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer in originals:
                module._buffers[name] = originals[buffer]
    for original, clone in clones.items():
        # `.data` bypasses the version counter: another autograd graph may have saved a buffer with an unchanged value.
        original.data.copy_(clone)
