"""What a converted net has to do, computed without it: the user's own model, run step by step.

Three ways to run T steps of a model that keeps its state itself:

- `step_forward`: a Python loop over t. The meaning of every model, but for BatchNorm over T*N.
- `lockstep_forward`: T coroutines, one for each step, that meet at every BatchNorm; the layer sees the inputs of all
  steps at once. Between two such barriers the steps run in the order of t, so a neuron sees its calls in order.
- `replay_forward`: sweeps over t that hand each BatchNorm call its part of what the whole sequence gave in the sweep
  before, until nothing changes any more. Right for every model that has the meaning at all, but with as many sweeps
  as there are BatchNorms in a row.

In lockstep, step t reaches a barrier before step t-1 has left it. A model that reads a state ahead of a barrier and
writes it behind, or that carries its state in arguments, is not run rightly so. `folded_forward` therefore checks the
result of the lockstep by one sweep of the replay, and takes the replay where they disagree.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import VerificationError
from snnfx.inspect.verify.coroutines import Coroutine, inherited_settings
from snnfx.sandbox.snapshot import StateSnapshot, copy_containers
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.carry import output_at, paths_of
from snnfx.state.registry import named_stateful

__all__ = ["folded_forward", "lockstep_forward", "replay_forward", "step_forward"]

IsBarrier = Callable[[str, nn.Module], bool]
"""Says of a submodule, by qualified name, whether one call of it takes all time steps at once."""

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
    """Run a model step by step, from the state that it is in.

    Args:
        model: a single-step model.
        steps: the positional arguments of each of the T steps.
        entry: the method that is one step.
        kwargs: the keyword arguments of each step.
        carry: for models with explicit state: which argument gets which output of the step before, an index or a path
            of indices and keys. At the first step the argument is what `kwargs` has for it, else it is left to its
            default, or is None where it has none.

    Returns:
        What the model returned at each step.

    Example:
        >>> import torch
        >>> [float(y) for y in step_forward(torch.nn.ReLU(), [(torch.tensor(-1.0),), (torch.tensor(2.0),)])]
        [0.0, 2.0]
    """
    return list(_stepping(model, steps, entry, kwargs, carry))


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
        given = kwargs[0] if kwargs else {}
        carried = {
            name: None for name in carry if name not in given and parameters[name].default is inspect.Parameter.empty
        }
    for t, args in enumerate(steps):
        outputs = call(*args, **{**(kwargs[t] if kwargs else {}), **carried})
        if carry:
            carried = {name: output_at(outputs, path) for name, path in paths_of(carry).items()}
            # As a copy: a container may change the list of states that it is given.
            yield copy_containers(outputs)
            continue
        yield outputs


@dataclass
class _FoldedCall:
    """One call of a barrier: what each step brings, and what the one call for all of them gives."""

    inputs: list[Tensor] = field(default_factory=list)
    results: tuple[Tensor, ...] = ()

    def compute(self, function: Callable[[Tensor], Tensor], once: bool) -> None:
        """Call the barrier with all inputs; `once` allows one of them to stand for all if they are equal."""
        if once and all(torch.equal(x, self.inputs[0]) for x in self.inputs):
            self.results = (function(self.inputs[0]),) * len(self.inputs)
        else:
            self.results = function(torch.cat(self.inputs)).split([x.shape[0] for x in self.inputs])

    def result_of(self, t: int) -> Tensor:
        """The part of step t, as a copy: the layer behind the barrier may work in place."""
        return self.results[t].clone()


Key = tuple[str, int]
"""A barrier by name, and which of its calls within a step."""


@contextmanager
def _intercepted(
    model: nn.Module, is_barrier: IsBarrier, arrive: Callable[[str, Callable[[Tensor], Tensor], Tensor], Tensor]
) -> Iterator[None]:
    """Let `arrive(name, original forward, input)` answer the calls of the barriers of a model."""

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
        "BatchNorm over all time steps is not defined for this model",
        why=why,
        hint='Convert it with batch_norm="per_step", or verify it in eval mode.',
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
    """Run T steps of a model side by side; its barriers are called once, with the inputs of all steps.

    Each step is a coroutine. At a call of a barrier it waits until all the others are there; then the inputs are
    concatenated over dim 0 in the order of t, the layer is called once, and each step goes on with its part.

    Args:
        model: a single-step model; its state is that before step 0, and afterwards that after step T-1.
        steps: the positional arguments of each of the T steps.
        is_barrier: `(qualified name, module) -> bool`; barriers take one tensor `[N, *]` and give one `[N, *]`.
        entry: the method that is one step.
        kwargs: the keyword arguments of each step.
        is_once: barriers that are called with the input of one step where all steps bring the same.

    Returns:
        What the model returned at each step.

    Raises:
        VerificationError: SNNFX405, the steps do not come to the same barriers in the same order.
        Exception: what a step raised; the other steps are ended first.

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
    """Also the calls of the barriers, and whether each module with state was called by the steps in their order."""
    calls: dict[Key, _FoldedCall] = {}
    counts = [Counter[str]() for _ in steps]
    once = {name for name, module in model.named_modules() if is_once is not None and is_once(name, module)}
    current = 0

    def arrive(name: str, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        t = current
        call = calls.setdefault((name, counts[t][name]), _FoldedCall())
        counts[t][name] += 1
        if len(call.inputs) != t:
            raise _undefined(f"step {t} calls `{name}` where step {len(call.inputs)} does not.")
        call.inputs.append(x)
        if t == len(steps) - 1:
            call.compute(original, name in once)
        threads[t].pause()
        return call.result_of(t)

    latest: dict[nn.Module, int] = {}
    in_order = True

    def see_call(module: nn.Module, args: Any) -> None:
        nonlocal in_order
        in_order = in_order and latest.get(module, 0) <= current
        latest[module] = current

    settings = inherited_settings()

    def work(t: int) -> Callable[[], Any]:
        return lambda: step_forward(model, steps[t : t + 1], entry, kwargs=kwargs[t : t + 1] if kwargs else None)[0]

    hooks = [module.register_forward_pre_hook(see_call) for _, module, _ in named_stateful(model)]
    threads = [Coroutine(work(t), settings) for t in range(len(steps))]
    try:
        with _intercepted(model, is_barrier, arrive):
            while threads and not threads[-1].done:
                for current, thread in enumerate(threads):
                    if thread.done:
                        raise _undefined(f"step {current} is at its end where step {len(steps) - 1} is not.")
                    thread.resume()
            if not all(thread.done for thread in threads):
                raise _undefined("the last step is at its end where an earlier one is not.")
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
    """The same meaning as `lockstep_forward` for any model, found by sweeps over t; arguments as there.

    A sweep runs the steps one after the other from the first state. A barrier is answered with the part of this step
    in the call for all steps, which the inputs of the sweep before gave. What depends on k barriers in a row is right
    after k sweeps, values and gradients; when a sweep repeats the inputs of the one before, all of it is.

    Raises:
        VerificationError: SNNFX405, the inputs do not settle (a barrier on a cycle through time), or the steps do not
            all call the same barriers.

    Example:
        >>> import torch
        >>> bn = torch.nn.BatchNorm1d(1, affine=False)
        >>> steps = [(torch.tensor([[0.0], [0.0]]),), (torch.tensor([[2.0], [2.0]]),)]
        >>> [[round(float(v)) for v in y_t] for y_t in replay_forward(bn, steps, lambda name, module: True)]
        [[-1, -1], [1, 1]]
    """
    start = StateSnapshot.of(model)
    originals = {name: module.forward for name, module in model.named_modules() if is_barrier(name, module)}
    once = {name for name, module in model.named_modules() if is_once is not None and is_once(name, module)}
    known: dict[Key, _FoldedCall] = {}
    sweeps = 0
    while True:
        start.restore()
        buffers = _clone_buffers(model)
        outputs, calls = _sweep(model, steps, is_barrier, entry, kwargs, carry, known)
        sweeps += 1
        settled = _same_inputs(calls, known)
        # Equal spikes can hide that their gradients still come from an earlier sweep: with gradients, no short cut.
        last = settled and (sweeps > len(calls) or not torch.is_grad_enabled())
        if sweeps > len(calls) and not settled:
            raise _undefined("the statistics of a BatchNorm depend on its own output at an earlier step.")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not last):
            # In the last sweep nothing but the running statistics is left to be computed.
            for (name, _), call in calls.items():
                call.compute(originals[name], name in once)
        if last:
            _keep_buffers(model, buffers)
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
    """Run the steps in order with the answers that are known; a barrier that has none yet runs on its own step."""
    calls: dict[Key, _FoldedCall] = {}
    counts = Counter[str]()
    outputs: list[Any] = []

    def arrive(name: str, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        key = (name, counts[name])
        counts[name] += 1
        calls.setdefault(key, _FoldedCall()).inputs.append(x)
        return known[key].result_of(len(outputs)) if key in known else original(x)

    with _intercepted(model, is_barrier, arrive):
        for y in _stepping(model, steps, entry, kwargs, carry):
            outputs.append(y)
            counts.clear()
    for (name, _), call in calls.items():
        if len(call.inputs) != len(steps):
            raise _undefined(f"`{name}` is called at {len(call.inputs)} of {len(steps)} steps.")
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
    """Run T steps with barriers over all of them: in lockstep where that is right, else by replay.

    Arguments, result and errors as of `lockstep_forward`; `carry` as of `step_forward`. Running statistics and state
    are updated once, as by the result.
    """
    options: dict[str, Any] = {"kwargs": kwargs, "carry": carry, "is_once": is_once}
    start = StateSnapshot.of(model)
    try:
        if not carry:
            buffers = _clone_buffers(model)
            outputs, calls, in_order = _lockstep(model, steps, is_barrier, entry, kwargs, is_once)
            states, finished = _read_states(model), StateSnapshot.of(model)
            start.restore()
            _clone_buffers(model)
            with torch.no_grad():
                outputs_again, calls_again = _sweep(model, steps, is_barrier, entry, kwargs, None, calls)
            # Where a layer with state is called in another order, equal spikes can hide that gradients are not.
            same = in_order and _same_inputs(calls, calls_again) and _same(outputs, outputs_again)
            if same and _same(states, _read_states(model)):
                finished.restore()
                _keep_buffers(model, buffers)
                return outputs
            start.restore()
        return replay_forward(model, steps, is_barrier, entry, **options)
    except BaseException:
        start.restore()
        raise


def _read_states(model: nn.Module) -> list[Any]:
    return [adapter.read(module) for _, module, adapter in named_stateful(model)]


def _same_inputs(calls: Mapping[Key, _FoldedCall], others: Mapping[Key, _FoldedCall]) -> bool:
    return calls.keys() == others.keys() and all(_same(calls[key].inputs, others[key].inputs) for key in calls)


def _same(values: Any, others: Any) -> bool:
    """Are two nests of values equal, bit by bit but for NaN?"""
    leaves, spec = pytree.tree_flatten(values)
    other_leaves, other_spec = pytree.tree_flatten(others)
    return spec == other_spec and all(_same_leaf(a, b) for a, b in zip(leaves, other_leaves, strict=True))


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.detach(), b.detach()
        return torch.equal(a, b) or (a.shape == b.shape and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))
    return type(a) is type(b) and bool(a == b)


def _clone_buffers(model: nn.Module) -> dict[Tensor, Tensor]:
    """Put a clone in the place of each buffer, so that a graph that has saved the buffer stays valid."""
    clones: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if buffer not in clones:
                    clones[buffer] = buffer.detach().clone()
                module._buffers[name] = clones[buffer]
    return clones


def _keep_buffers(model: nn.Module, clones: Mapping[Tensor, Tensor]) -> None:
    """Put the buffers that were cloned back in place, with the values of their clones."""
    originals = {clone: original for original, clone in clones.items()}
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer in originals:
                module._buffers[name] = originals[buffer]
    for original, clone in clones.items():
        # Past the version counter: somebody else's graph may have saved a buffer whose value does not change.
        original.data.copy_(clone)
