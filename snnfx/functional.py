"""Run modules over sequences: step by step, folded into the batch, mapped with vmap, or in chunks.

Generalisations of SpikingJelly's documented forward functions, plus `map_forward`, `reset_net` and `detach_net`. Each
region in the graph of a converted net is one call of one of these functions. Conventions:

- Sequences: `x_seq` is a tensor `[T, N, *]` (`[N, *, T]` for the `t_last_` functions), or a nested tuple, list or dict
  of tensors with the same T. The entries of a top-level tuple or list are the positional arguments of a step; a dict or
  a deeper nested value is a single argument.
- Modules: one `nn.Module` or callable, or a list, tuple or `nn.ModuleList` of them, applied in order. The first one
  takes the arguments `x_t`; each later one takes the output of the previous one as a single argument, even if it is a
  tuple. An `nn.Sequential` is a single module.
- Outputs may be nested like inputs: each tensor becomes a sequence, None stays None.
- `constants` is a tuple of arbitrary values (modules, parameters) that the first module takes before `x_t`.
- Arguments are checked before any module is called.
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
from snnfx.ops.time_folding import fold_time, unfold_time
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
"""Default of `state`: modules keep their own state. Not None, which is a legal initial state."""


def multi_step_forward(
    x_seq: Any, single_step_module: Modules, *, state: Any = _OWN_STATE, constants: Sequence[Any] = ()
) -> Any:
    """Call a module once per time step and stack the outputs.

    Without `state`, the modules keep their state themselves, by side effect. With `state`, the function is pure: it
    takes the initial state and returns the final state. The form of `state` depends on the module:

    - A module with known state (a `snnfx.MemoryModule`, a class with an adapter, a `snnfx.state.stateful.Stateful`):
      the tuple of its slot values, a dict of them by name, or None or "reset" for its initial state. The attributes
      of the module are neither read nor changed.
    - Any other callable: an arbitrary value, including None. It is called as `module(*constants, *x_t, state)` and must
      return `(y_t, state)`. "reset" is passed as None.
    - A list of modules: a list with such an entry for each module; an entry None for a callable without known state
      means that it has no state. None or "reset" stands for a list of None.

    A single module with a method `multi_step(inputs, state, constants) -> (y_seq, state)` runs the whole sequence
    itself if `state` is passed; `inputs` is the tuple of its positional arguments, with time first.

    Args:
        x_seq: `[T, *]`, or nested (see `snnfx.functional`).
        single_step_module: one or several modules or callables for ONE time step, `[*]`.
        state: the state before the first step.
        constants: arguments of the first module before `x_t`. Default: ().

    Returns:
        `y_seq`: the outputs `[T, *]`, stacked along dim 0. With `state`: `(y_seq, final state)`; the final state has
        the form of `state` (after None or "reset": a tuple of slot values, for a list of modules a list).

    Raises:
        InputError: SNNFX301, T is 0; SNNFX303, T differs between tensors; SNNFX304, not a module; SNNFX305, not a
            tensor; SNNFX306, a tensor without dimensions; SNNFX308, the state does not match; SNNFX309, `constants` is
            not a tuple; SNNFX313, the outputs do not form a sequence (raised after the calls).

    Example:
        >>> import torch
        >>> def leaky(x, v):
        ...     v = x if v is None else 0.5 * v + x
        ...     return v, v
        >>> y_seq, v = multi_step_forward(torch.ones(3, 1), leaky, state=None)
        >>> y_seq.flatten().tolist(), v.item()
        ([1.0, 1.5, 1.75], 1.75)

    Source: SpikingJelly's documented function of the same name (Fang et al., Science Advances 2023); explicit state is
        the convention of Norse.
    """
    return _step_through(x_seq, single_step_module, state, constants, time_dim=0)


def t_last_multi_step_forward(
    x_seq: Any, single_step_module: Modules, *, state: Any = _OWN_STATE, constants: Sequence[Any] = ()
) -> Any:
    """Call a module once per time step, with time in the last dimension.

    Equals `multi_step_forward` for `[N, *, T]`.

    Args:
        x_seq: `[N, *, T]`, or nested.
        single_step_module: one or several modules or callables for ONE time step, `[N, *]`.
        state: the state before the first step, see `multi_step_forward`.
        constants: arguments of the first module before `x_t`. Default: ().

    Returns:
        `y_seq`: the outputs `[N, *, T]`, stacked along the last dim. With `state`: `(y_seq, final state)`.

    Raises:
        InputError: see `multi_step_forward`.

    Example:
        >>> import torch
        >>> t_last_multi_step_forward(torch.rand(2, 3, 5), torch.nn.Linear(3, 4)).shape
        torch.Size([2, 4, 5])

    Source: SpikingJelly's documented function of the same name.
    """
    return _step_through(x_seq, single_step_module, state, constants, time_dim=-1)


def chunk_multi_step_forward(
    split_size: int, x_seq: Any, multi_step_module: Callable[..., Any], *, state: Any = _OWN_STATE
) -> Any:
    """Run a multi-step module on chunks of a sequence, carrying the state across them.

    Needs the memory of one chunk instead of the whole sequence.

    Args:
        split_size: number of time steps in a chunk, at least 1; the last chunk may be shorter.
        x_seq: `[T, *]`, or nested.
        multi_step_module: ONE module or callable for sequences. It carries its state across chunks itself. With
            `state`, it is called as `multi_step_module(*chunk, state)` and must return `(y_chunk, state)`.
        state: the state before the first chunk, an arbitrary value including None.

    Returns:
        `y_seq`: the outputs `[T, *]`, concatenated along dim 0. With `state`: `(y_seq, final state)`.

    Raises:
        InputError: SNNFX302, `split_size` is not an int above 0; otherwise see `multi_step_forward`.

    Example:
        >>> import torch
        >>> chunk_multi_step_forward(16, torch.rand(100, 2, 3), torch.nn.Linear(3, 4)).shape
        torch.Size([100, 2, 4])

    Source: SpikingJelly's documented function of the same name; strip mining (Kennedy & Allen, 2001) with the state
        carried across strips.
    """
    if not isinstance(split_size, int) or split_size < 1:
        raise InputError("SNNFX302", f"cannot make chunks of {split_size!r} time steps", hint="Pass an int above 0.")
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
    """Run stateless modules on all time steps, with T folded into the batch dimension.

    Correct for batch-equivariant modules only, `f(cat_t x_t) == cat_t f(x_t)`; for other modules use `map_forward`. The
    modules may change the batch size.

    Args:
        x_seq: `[T, N, *]`, or nested with the same T and N for all tensors.
        stateless_module: one or several modules or callables that take `[T * N, *]`.
        constants: arguments of the first module before the folded tensors. Default: ().
        batch_dim: batch dimension of ONE time step, an int or one for each tensor in `x_seq`. With 1, `x_seq` is
            `[T, C, N, *]` and the module takes `[C, T * N, *]`. Default: 0.
        out_batch_dim: batch dimension of the outputs, an int or one for each output (None included). Default: 0.

    Returns:
        `y_seq`: `[T, N, *]`, or nested; with `out_batch_dim=1`, `[T, C, N, *]`.

    Raises:
        InputError: SNNFX303, N differs between tensors; SNNFX306, a tensor lacks the dimensions T and N; SNNFX309,
            `batch_dim` does not exist; SNNFX313, the batch size of an output is not a multiple of T (raised after the
            call); otherwise see `multi_step_forward`.

    Example:
        >>> import torch
        >>> seq_to_ann_forward(torch.rand(8, 2, 1, 28, 28), torch.nn.Conv2d(1, 4, kernel_size=3)).shape
        torch.Size([8, 2, 4, 26, 26])
        >>> seq_to_ann_forward(torch.rand(8, 3, 2), torch.t, batch_dim=1).shape  # [T, C, N] -> [T, N, C]
        torch.Size([8, 2, 3])

    Source: SpikingJelly's documented function of the same name.
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

    folded = [fold_time(x, b) for x, b in zip(x_leaves, batch_dims, strict=True)]
    y = _apply(chain, (*constants, *positional_arguments(rebuild(folded))))
    y_leaves, rebuild = flatten_nest(y)
    out_dims = _dim_of_each(out_batch_dim, len(y_leaves), "out_batch_dim")
    return rebuild([_unfold(y, T, b) for y, b in zip(y_leaves, out_dims, strict=True)])


def t_last_seq_to_ann_forward(x_seq: Any, stateless_module: Modules) -> Any:
    """Run stateless modules on all time steps with `torch.vmap`, with time in the last dimension.

    Equals `map_forward` for `[N, *, T]`.

    Args:
        x_seq: `[N, *, T]`, or nested.
        stateless_module: one or several modules or callables for ONE time step, `[N, *]`.

    Returns:
        `y_seq`: `[N, *, T]`, or nested.

    Raises:
        InputError: see `multi_step_forward`.

    Example:
        >>> import torch
        >>> t_last_seq_to_ann_forward(torch.rand(2, 3, 5), torch.nn.Linear(3, 4)).shape
        torch.Size([2, 4, 5])

    Source: SpikingJelly's documented function of the same name.
    """
    return _map_over_time(x_seq, stateless_module, (), time_dim=-1)


def map_forward(x_seq: Any, stateless_module: Modules, *, constants: Sequence[Any] = ()) -> Any:
    """Run stateless modules on all time steps, vectorised over time with `torch.vmap`.

    Correct for every stateless module that vmap supports, batch-equivariant or not (vmap does not support BatchNorm in
    training). Each time step draws its own random numbers. A single module with a method
    `map_steps(inputs, constants) -> y_seq` runs the whole sequence itself; `inputs` is the tuple of its arguments.

    Args:
        x_seq: `[T, *]`, or nested.
        stateless_module: one or several modules or callables for ONE time step, `[*]`.
        constants: arguments of the first module before `x_t`, the same at every step. Default: ().

    Returns:
        `y_seq`: `[T, *]`, or nested.

    Raises:
        InputError: see `multi_step_forward`.

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
"""A state that the inputs of the first step will determine."""


def _entry_of_each(chain: Chain, state: Any) -> Sequence[Any]:
    """The state of each module of a list of modules."""
    if state is None or _is_reset(state):
        return [None] * len(chain)
    if isinstance(state, (list, tuple)) and len(state) == len(chain):
        return state
    why = f"it must be a list with one entry for each of the {len(chain)} modules."
    raise InputError("SNNFX308", "the state does not match the modules", why=why, hint='Pass a list, or "reset".')


def _pure_step(module: Any, entry: Any, several: bool) -> tuple[Callable[..., Any], Any, Callable[[Any], Any]]:
    """`step(state, *x_t) -> (y_t, state)` of a module, its initial state, and a function that restores its form."""
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
        form = f"has the keys {list(entry)}" if by_name else f"is a {type(entry).__name__}"
        why = f"it {form}, and the slots of the module are {list(names)}."
        hint = 'Pass a tuple or a dict with a value for each slot, or "reset".'
        raise InputError("SNNFX308", "the state does not match the module", why=why, hint=hint)

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
    """Replaces None in the outputs of a mapped step: vmap refuses None but accepts a pytree node without leaves."""


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
    raise no_sequence(f"a module with explicit state must return (output, state), not a {type(returned).__name__}.")


def _unfold(y: Any, T: int, batch_dim: int) -> Any:
    """Unfold T from the batch dimension of an output; the remaining batch size may differ from N."""
    if y is None:
        return None
    if not isinstance(y, Tensor) or not -y.dim() <= batch_dim < y.dim() or y.shape[batch_dim] % T != 0:
        got = f"shape {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        why = f"the module is not batch-equivariant: it returned {got}, and dim {batch_dim} is not a multiple of {T}."
        raise no_sequence(why, hint="Use map_forward.")
    return unfold_time(y, T, batch_dim % y.dim())


def _check_modules(modules: Any, constants: Any = ()) -> Chain:
    """Check the modules, and return them in order."""
    chain = tuple(modules) if isinstance(modules, _SEVERAL) else (modules,)
    if not chain:
        raise InputError("SNNFX304", "no module to apply", why="the list of modules is empty.", hint="Pass a module.")
    for module in chain:
        if not callable(module) or isinstance(module, nn.ModuleList):
            raise InputError("SNNFX304", f"a {type(module).__name__} is neither a module nor a callable")
    if not isinstance(constants, (tuple, list)):
        raise InputError("SNNFX309", f"`constants` is a {type(constants).__name__}", hint="Pass a tuple of arguments.")
    return chain


def _dim_of_each(dims: Any, count: int | None, name: str) -> Sequence[int]:
    """The dimension for each of `count` tensors (None: number of tensors still unknown)."""
    if isinstance(dims, int):
        return [dims] * (count or 0)
    if not isinstance(dims, (list, tuple)) or not all(isinstance(dim, int) for dim in dims):
        raise InputError("SNNFX309", f"`{name}` cannot be {dims!r}", hint="Pass an int, or a tuple of ints.")
    if count is not None and len(dims) != count:
        raise InputError("SNNFX309", f"`{name}` has {len(dims)} entries for {count} tensors")
    return dims
