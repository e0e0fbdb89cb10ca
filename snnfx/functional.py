"""The forward functions that SpikingJelly documents, made general, and `map_forward`, `reset_net`, `detach_net`.

They are the vocabulary of a converted net: every region of its graph is one call of one of them.

A sequence `x_seq` is a tensor `[T, N, *]` (`[N, *, T]` for the `t_last_` functions), or a nested tuple, list or dict
of tensors with the same T. A tuple or list holds the positional arguments of a step; what is nested deeper, and a
dict, is one argument. Modules are one `nn.Module` or callable, or a list, tuple or `nn.ModuleList` of them applied in
order: `x_t` is spread over the arguments of the first, the others get the output of the one before as one argument,
even if it is a tuple. `nn.Sequential` is one module. Outputs may be nested in the same ways: each tensor in them
becomes a sequence, None stays None. `constants` is a tuple of anything (modules, parameters) that the first module
takes before `x_t`. What is wrong with the arguments is found before any module is called.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.ops.nested_sequences import (
    check_sequences,
    cut_into_calls,
    flatten_nest,
    join_over_time,
    no_sequence,
    positional_arguments,
    shapes_of,
)
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import adapter_of, detach_net, reset_net
from snnfx.state.stateful import Stateful

__all__ = [
    "chunk_multi_step_forward",
    "detach_net",
    "map_forward",
    "multi_step_forward",
    "reset_net",
    "seq_to_ann_forward",
    "t_last_multi_step_forward",
    "t_last_seq_to_ann_forward",
]

Modules = Callable[..., Any] | Sequence[Callable[..., Any]] | nn.ModuleList
Chain = tuple[Callable[..., Any], ...]

_OWN_STATE: Any = object()
"""The default of `state`: the modules keep their own. Not None, which is a legal first state."""


def multi_step_forward(
    x_seq: Any, single_step_module: Modules, *, state: Any = _OWN_STATE, constants: Sequence[Any] = ()
) -> Any:
    """Step through a sequence: call `single_step_module` once for each of the T time steps.

    Without `state`, modules keep their state themselves, by side effect. With it the run is pure, and `state` is

    - for a module with known state (a `snnfx.MemoryModule`, a class with an adapter, a
      `snnfx.state.stateful.Stateful`): the tuple of its slot values, or a dict of them by name, or None or "reset":
      its initial state. Its attributes are neither used nor changed;
    - for any other callable, which is called as `module(*constants, *x_t, state)` and returns `(y_t, state)`: anything,
      also None; "reset" is passed as None;
    - for a list of modules: a list with such an entry for each, where None for a callable without known state says
      that it has none; or None or "reset": as if every entry was None.

    A single module with a method `multi_step(inputs, state, constants) -> (y_seq, state)` runs the whole sequence
    itself when it is given a state; `inputs` is the tuple of its positional arguments, with time first.

    Args:
        x_seq: `[T, *]`, or nested (see the documentation of `snnfx.functional`).
        single_step_module: one or several modules or callables for ONE time step, `[*]`.
        state: the state before the first step.
        constants: passed in front of `x_t` at each call of the first module.

    Returns:
        `y_seq`: the outputs, stacked along dim 0. With `state`: `(y_seq, final state)`, the state as it was given (a
        tuple of slot values after None or "reset", a list for a list of modules).

    Raises:
        InputError: T is 0 (SNNFX301) or not the same everywhere (SNNFX303); no module (SNNFX304); no tensor (SNNFX305);
            a tensor without dimensions (SNNFX306); a state that does not fit (SNNFX308); `constants` is not a tuple
            (SNNFX309); the outputs of the steps do not form a sequence (SNNFX313, after the calls).

    Example:
        >>> import torch
        >>> def leaky(x, v):
        ...     v = x if v is None else 0.5 * v + x
        ...     return v, v
        >>> y_seq, v = multi_step_forward(torch.ones(3, 1), leaky, state=None)
        >>> y_seq.flatten().tolist(), v.item()
        ([1.0, 1.5, 1.75], 1.75)

    Source: SpikingJelly's documented function of that name (Fang et al., Science Advances 2023); passing the state is
        the convention of Norse.
    """
    return _step_through(x_seq, single_step_module, state, constants, time_dim=0)


def t_last_multi_step_forward(
    x_seq: Any, single_step_module: Modules, *, state: Any = _OWN_STATE, constants: Sequence[Any] = ()
) -> Any:
    """Step through a sequence whose last dimension is time: `multi_step_forward` for `[N, *, T]`.

    Args:
        x_seq: `[N, *, T]`, or nested.
        single_step_module: one or several modules or callables for ONE time step, `[N, *]`.
        state: the state before the first step, see `multi_step_forward`.
        constants: passed in front of `x_t` at each call of the first module.

    Returns:
        `y_seq`: the outputs, stacked along the last dim. With `state`: `(y_seq, final state)`.

    Raises:
        InputError: as `multi_step_forward`.

    Example:
        >>> import torch
        >>> t_last_multi_step_forward(torch.rand(2, 3, 5), torch.nn.Linear(3, 4)).shape
        torch.Size([2, 4, 5])

    Source: SpikingJelly's documented function of that name.
    """
    return _step_through(x_seq, single_step_module, state, constants, time_dim=-1)


def chunk_multi_step_forward(
    split_size: int, x_seq: Any, multi_step_module: Callable[..., Any], *, state: Any = _OWN_STATE
) -> Any:
    """Run a multi-step module on `split_size` time steps at a time: the memory of a chunk, not of the sequence.

    Args:
        split_size: time steps in a chunk, at least 1; the last chunk may be shorter.
        x_seq: `[T, *]`, or nested.
        multi_step_module: ONE module or callable on sequences. It keeps its state from chunk to chunk itself; or, with
            `state`, it is called as `multi_step_module(*chunk, state)` and returns `(y_chunk, state)`.
        state: the state before the first chunk: anything, also None.

    Returns:
        `y_seq`: the outputs, concatenated along dim 0. With `state`: `(y_seq, final state)`.

    Raises:
        InputError: `split_size` is not an int above 0 (SNNFX302); otherwise as `multi_step_forward`.

    Example:
        >>> import torch
        >>> chunk_multi_step_forward(16, torch.rand(100, 2, 3), torch.nn.Linear(3, 4)).shape
        torch.Size([100, 2, 4])

    Source: SpikingJelly's documented function of that name; strip mining (Kennedy & Allen, 2001) with the state
        handed from strip to strip.
    """
    if not isinstance(split_size, int) or split_size < 1:
        raise InputError("SNNFX302", f"cannot make chunks of {split_size!r} time steps", hint="Use an int above 0.")
    _check_modules((multi_step_module,))
    T = check_sequences(x_seq, time_dim=0)
    y_chunks = []
    for chunk in cut_into_calls(x_seq, lambda x: x.split(split_size), -(-T // split_size)):
        if state is _OWN_STATE:
            y_chunks.append(multi_step_module(*chunk))
        else:
            y, state = _output_and_state(multi_step_module(*chunk, state))
            y_chunks.append(y)
    y_seq = join_over_time(y_chunks, torch.cat if len(y_chunks) > 1 else operator.itemgetter(0))
    return y_seq if state is _OWN_STATE else (y_seq, state)


def seq_to_ann_forward(
    x_seq: Any,
    stateless_module: Modules,
    *,
    constants: Sequence[Any] = (),
    batch_dim: int | Sequence[int] = 0,
    out_batch_dim: int | Sequence[int] = 0,
) -> Any:
    """Run stateless modules on all time steps at once, with T folded into the batch dimension.

    Right for batch-equivariant modules only, `f(cat_t x_t) == cat_t f(x_t)`; `map_forward` is right for all. The
    modules may change the batch size.

    Args:
        x_seq: `[T, N, *]` with the same T and N everywhere, or nested.
        stateless_module: one or several modules or callables; they get `[T * N, *]`, step after step.
        constants: passed in front of the folded tensors to the first module.
        batch_dim: where the batch is in ONE step, an int or one for each tensor in `x_seq`: with 1, `x_seq` is
            `[T, C, N, *]` and the module gets `[C, T * N, *]`.
        out_batch_dim: the same for the output of the last module, where None outputs count as well.

    Returns:
        `y_seq`: `[T, N, *]`, or nested; with `out_batch_dim=1`, `[T, C, N, *]`.

    Raises:
        InputError: N is not the same everywhere (SNNFX303); no room for T and N (SNNFX306); no such `batch_dim`
            (SNNFX309); an output has no batch of a multiple of T (SNNFX313, after the call); otherwise as
            `multi_step_forward`.

    Example:
        >>> import torch
        >>> seq_to_ann_forward(torch.rand(8, 2, 1, 28, 28), torch.nn.Conv2d(1, 4, kernel_size=3)).shape
        torch.Size([8, 2, 4, 26, 26])
        >>> seq_to_ann_forward(torch.rand(8, 3, 2), torch.t, batch_dim=1).shape  # [T, C, N] -> [T, N, C]
        torch.Size([8, 2, 3])

    Source: SpikingJelly's documented function of that name.
    """
    chain = _check_modules(stateless_module, constants)
    T = check_sequences(x_seq, time_dim=0)
    x_leaves, rebuild = flatten_nest(x_seq)
    batch_dims = _dim_of_each(batch_dim, len(x_leaves), "batch_dim")
    _dim_of_each(out_batch_dim, None, "out_batch_dim")
    if any(not 1 - x.dim() <= b < x.dim() - 1 for x, b in zip(x_leaves, batch_dims, strict=True)):
        why = f"{shapes_of(x_seq)}, and dimension {batch_dim} of one step should be the batch."
        raise InputError("SNNFX306", "too few dimensions to fold time into the batch", why=why)
    batch_dims = [b % (x.dim() - 1) for x, b in zip(x_leaves, batch_dims, strict=True)]
    sizes = [x.shape[b + 1] for x, b in zip(x_leaves, batch_dims, strict=True)]
    if any(size != sizes[0] for size in sizes):
        why = f"{shapes_of(x_seq)}, and dimension {batch_dim} of one step should be the batch."
        raise InputError("SNNFX303", "the sequences differ in their batch size", why=why)

    folded = [_fold(x, b) for x, b in zip(x_leaves, batch_dims, strict=True)]
    y = _apply(chain, (*constants, *positional_arguments(rebuild(folded))))
    y_leaves, rebuild = flatten_nest(y)
    out_dims = _dim_of_each(out_batch_dim, len(y_leaves), "out_batch_dim")
    return rebuild([_unfold(y, T, b) for y, b in zip(y_leaves, out_dims, strict=True)])


def _fold(x: Tensor, batch_dim: int) -> Tensor:
    y = (x.movedim(0, batch_dim) if batch_dim else x).flatten(batch_dim, batch_dim + 1)
    # What may be viewed in one step, may be viewed in all.
    return y if y.is_contiguous() or not x[0].is_contiguous() else y.contiguous()


def t_last_seq_to_ann_forward(x_seq: Any, stateless_module: Modules) -> Any:
    """Run stateless modules on all time steps at once, with `torch.vmap` over time: `map_forward` for `[N, *, T]`.

    Args:
        x_seq: `[N, *, T]`, or nested.
        stateless_module: one or several modules or callables for ONE time step, `[N, *]`.

    Returns:
        `y_seq`: `[N, *, T]`, or nested.

    Raises:
        InputError: as `multi_step_forward`.

    Example:
        >>> import torch
        >>> t_last_seq_to_ann_forward(torch.rand(2, 3, 5), torch.nn.Linear(3, 4)).shape
        torch.Size([2, 4, 5])

    Source: SpikingJelly's documented function of that name.
    """
    return _map_over_time(x_seq, stateless_module, (), time_dim=-1)


def map_forward(x_seq: Any, stateless_module: Modules, *, constants: Sequence[Any] = ()) -> Any:
    """Run stateless modules on all time steps at once, with `torch.vmap` over time.

    Right for all stateless modules, batch-equivariant or not, that vmap has rules for (BatchNorm in training is not one
    of them); random numbers are drawn anew for each step. A single module with a method
    `map_steps(inputs, constants) -> y_seq` runs the whole sequence itself; `inputs` is the tuple of its arguments.

    Args:
        x_seq: `[T, *]`, or nested.
        stateless_module: one or several modules or callables for ONE time step, `[*]`.
        constants: passed in front of `x_t` to the first module; not mapped over.

    Returns:
        `y_seq`: `[T, *]`, or nested.

    Raises:
        InputError: as `multi_step_forward`.

    Example:
        >>> import torch
        >>> map_forward(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), lambda x: x - x.mean(0)).tolist()
        [[-1.0, 1.0], [-10.0, 10.0]]

    Source: vectorisation of a loop by batching rules, JAX's `vmap` (Bradbury et al., 2018).
    """
    return _map_over_time(x_seq, stateless_module, constants, time_dim=0)


def _step_through(x_seq: Any, modules: Modules, state: Any, constants: Sequence[Any], time_dim: int) -> Any:
    chain = _check_modules(modules, constants)
    T = check_sequences(x_seq, time_dim)
    if state is _OWN_STATE:
        steps = cut_into_calls(x_seq, lambda x: x.unbind(time_dim), T)
        return join_over_time([_apply(chain, (*constants, *x_t)) for x_t in steps], partial(torch.stack, dim=time_dim))
    if callable(run := getattr(modules, "multi_step", None)):
        inputs = positional_arguments(x_seq)
        if time_dim != 0:
            inputs = pytree.tree_map(lambda x: x.movedim(time_dim, 0), inputs)
        y_seq, state = run(inputs, state, tuple(constants))
        if time_dim != 0:
            y_seq = pytree.tree_map_only(Tensor, lambda y: y.movedim(0, time_dim), y_seq)
        return y_seq, state

    several = isinstance(modules, _SEVERAL)
    entries = _entry_of_each(chain, state) if several else [state]
    pure = [_pure_step(module, entry, several) for module, entry in zip(chain, entries, strict=True)]
    states = [first for _, first, _ in pure]
    y_steps = []
    for x_t in cut_into_calls(x_seq, lambda x: x.unbind(time_dim), T):
        values = (*constants, *x_t)
        for i, (step, _, _) in enumerate(pure):
            y, states[i] = step(states[i], *values)
            values = (y,)
        y_steps.append(y)
    states = [leave(last) for (_, _, leave), last in zip(pure, states, strict=True)]
    y_seq = join_over_time(y_steps, partial(torch.stack, dim=time_dim))
    return y_seq, states if several else states[0]


_SEVERAL = (list, tuple, nn.ModuleList)
_INITIAL: Any = object()
"""A state that is yet to be made from the inputs of the first step."""


def _entry_of_each(chain: Chain, state: Any) -> Sequence[Any]:
    """The state of each module of a list of modules."""
    if state is None or _is_reset(state):
        return [None] * len(chain)
    if isinstance(state, (list, tuple)) and len(state) == len(chain):
        return state
    why = f"it has to be a list with one entry for each of the {len(chain)} modules."
    raise InputError("SNNFX308", "the state does not fit the modules", why=why)


def _pure_step(module: Any, entry: Any, several: bool) -> tuple[Callable[..., Any], Any, Callable[[Any], Any]]:
    """`step(state, *x_t) -> (y_t, state)` of a module, its first state, and what gives a state its form back."""
    adapter = adapter_of(module) if isinstance(module, nn.Module) else None
    if adapter is None and not isinstance(module, Stateful):
        if several and entry is None:
            return lambda state, *x_t: (module(*x_t), None), None, lambda state: state
        first = None if _is_reset(entry) else entry
        return lambda state, *x_t: _output_and_state(module(*x_t, state)), first, lambda state: state
    if adapter is None:
        names, initial, step = module.state_names(), module.initial_state, module.step
    else:
        adapter.refuse(module, type(module).__name__)
        names, initial, step = adapter.names(module), partial(adapter.initial, module), partial(adapter.step, module)
    by_name = isinstance(entry, Mapping)
    if entry is None or _is_reset(entry):
        first = _INITIAL
    elif by_name and entry.keys() == set(names):
        first = tuple(entry[name] for name in names)
    elif isinstance(entry, (tuple, list)) and len(entry) == len(names):
        first = tuple(entry)
    else:
        why = f"it is {list(entry) if by_name else type(entry).__name__}, and the slots are {list(names)}."
        raise InputError("SNNFX308", "the state does not fit the module", why=why, hint='Pass a tuple, or "reset".')

    def first_or_next(state: Any, *x_t: Any) -> Any:
        return step(initial(*x_t) if state is _INITIAL else state, *x_t)

    return first_or_next, first, lambda state: dict(zip(names, state, strict=True)) if by_name else state


def _is_reset(state: Any) -> bool:
    return isinstance(state, str) and state == "reset"


def _map_over_time(x_seq: Any, modules: Modules, constants: Sequence[Any], time_dim: int) -> Any:
    chain = _check_modules(modules, constants)
    check_sequences(x_seq, time_dim)
    inputs = positional_arguments(x_seq)
    if time_dim == 0 and callable(run := getattr(modules, "map_steps", None)):
        return run(inputs, tuple(constants))

    def step(*x_t: Any) -> Any:
        y = _apply(chain, (*constants, *x_t))
        return y if isinstance(y, Tensor) else pytree.tree_map(_hide_none, y)

    # Not out_dims=-1: vmap (torch 2.13) fails on an output that does not depend on x_t with any out_dims but 0.
    y_seq = torch.vmap(step, in_dims=time_dim, out_dims=0, randomness="different")(*inputs)
    if isinstance(y_seq, Tensor):
        return y_seq.movedim(0, time_dim)
    return pytree.tree_map(
        lambda y: None if isinstance(y, _HiddenNone) else y.movedim(0, time_dim),
        y_seq,
        is_leaf=lambda y: isinstance(y, _HiddenNone),
    )


class _HiddenNone(NamedTuple):
    """Stands for None in what a mapped step returns: vmap takes no None, but a pytree node without leaves."""


def _hide_none(y: Any) -> Any:
    if y is not None and not isinstance(y, Tensor):
        raise no_sequence(f"a step returned a {type(y).__name__}, not a tensor.")
    return _HiddenNone() if y is None else y


def _apply(chain: Chain, arguments: Sequence[Any]) -> Any:
    y = chain[0](*arguments)
    for module in chain[1:]:
        y = module(y)
    return y


def _output_and_state(returned: Any) -> tuple[Any, Any]:
    if isinstance(returned, (tuple, list)) and len(returned) == 2:
        return returned[0], returned[1]
    raise no_sequence(f"a module given its state has to return (output, state), not a {type(returned).__name__}.")


def _unfold(y: Any, T: int, batch_dim: int) -> Any:
    """Take T out of the batch of an output again; the size of the rest is whatever the module made of N."""
    if y is None:
        return None
    if not isinstance(y, Tensor) or not -y.dim() <= batch_dim < y.dim() or y.shape[batch_dim] % T != 0:
        got = list(y.shape) if isinstance(y, Tensor) else f"a {type(y).__name__}"
        why = f"the module is not batch-equivariant: it returned {got}, T is {T}, the batch is dimension {batch_dim}."
        raise no_sequence(why, hint="Use map_forward.")
    b = batch_dim % y.dim()
    y = y.unflatten(b, (T, -1))
    return y.movedim(b, 0) if b else y


def _check_modules(modules: Any, constants: Any = ()) -> Chain:
    """The modules in order."""
    chain = tuple(modules) if isinstance(modules, _SEVERAL) else (modules,)
    if not chain:
        raise InputError("SNNFX304", "there is no module to apply", why="the list of modules is empty.")
    for module in chain:
        if not callable(module) or isinstance(module, nn.ModuleList):
            raise InputError("SNNFX304", f"a {type(module).__name__} is neither a module nor a callable")
    if not isinstance(constants, (tuple, list)):
        raise InputError("SNNFX309", f"`constants` is a {type(constants).__name__}", hint="Pass a tuple of arguments.")
    return chain


def _dim_of_each(dims: Any, count: int | None, name: str) -> Sequence[int]:
    """The dimension for each of `count` tensors (None: not known yet)."""
    if isinstance(dims, int):
        return [dims] * (count or 0)
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        raise InputError("SNNFX309", f"`{name}` cannot be {dims!r}", hint="Pass an int, or a tuple of ints.")
    if count is not None and len(dims) != count:
        raise InputError("SNNFX309", f"`{name}` has {len(dims)} entries for {count} tensors")
    return dims
