"""The five forward functions that SpikingJelly documents, made general, and `map_forward`, `reset_net`, `detach_net`.

They are the vocabulary of a converted net: every region of its graph is one call of one of them.

A sequence `x_seq` is a tensor `[T, N, *]` (`[N, *, T]` for the `t_last_` functions), or a nested tuple, list or dict
of such tensors that agree on T. A tuple or a list holds the positional arguments of one step, whatever is nested
deeper is one argument; a dict is a single argument. `modules` is a module or any callable, or a list, a tuple or an
`nn.ModuleList` of them that are applied in order, the later ones to the output of the one before as their single
argument, even if it is a tuple (`nn.Sequential` is one module). Outputs may be nested in the same ways; each tensor
in them becomes a sequence and None stays None. Everything that is wrong with the arguments is found before the first
call of a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from snnfx.errors import InputError
from snnfx.state import Stateful, adapter_of, detach_net, reset_net

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
BatchDim = int | Sequence[int]

_OWN_STATE: Any = object()
"""The default of `state`: modules keep their state themselves. Not None, which is a legal first state."""


def multi_step_forward(
    x_seq: Any, single_step_module: Modules, *, state: Any = _OWN_STATE, constants: Sequence[Any] = ()
) -> Any:
    """Step through a sequence: call `single_step_module` once for each of the T time steps.

    Without `state` the modules keep their state themselves, as a side effect. With `state` the run is pure:

    - a module with known state (a `snnfx.MemoryModule`, a class with an adapter, or a `snnfx.state.Stateful`) takes a
      tuple of its slot values or a dict of them by name, and None or "reset" for its initial state; its attributes
      are neither read nor changed;
    - any other callable is called as `module(*constants, *x_t, state)` and returns `(y_t, state)`; its state may be
      anything, also None ("reset" is passed as None);
    - a list of modules takes a list with one entry for each, of the two kinds above, where None for a callable
      without known state means that it has none and is called without; None or "reset" for the whole list stands
      for a list of initial states.

    A single module that has a method `multi_step(inputs, state, constants) -> (y_seq, state)` and is given a state
    runs the sequence itself, `inputs` being the tuple of positional arguments, each a sequence.

    Args:
        x_seq: `[T, *]`, or a nested tuple, list or dict of such tensors (see the module's documentation).
        single_step_module: one or several modules or callables for ONE time step.
        state: the state before the first step.
        constants: arguments passed unchanged in front of those of the step, to the first module.

    Returns:
        `y_seq`: the outputs of the steps, stacked along dim 0; with `state`: `(y_seq, state after the last step)`,
        the state in the form in which it was given (a tuple if it was None or "reset").

    Raises:
        InputError: T is 0 (SNNFX301) or not the same everywhere (SNNFX303); not modules (SNNFX304); not tensors
            (SNNFX305); a tensor without dimensions (SNNFX306); a state that does not fit (SNNFX308); steps whose
            outputs do not form a sequence (SNNFX313, after the call).

    Example:
        >>> import torch
        >>> def leaky(x, v):
        ...     v = x if v is None else 0.5 * v + x
        ...     return v, v
        >>> y_seq, v = multi_step_forward(torch.ones(3, 1), leaky, state=None)
        >>> y_seq.flatten().tolist(), v.item()
        ([1.0, 1.5, 1.75], 1.75)
        >>> y_seq, v = multi_step_forward(torch.ones(1, 1), leaky, state=v)  # goes on where it stopped
        >>> v.item()
        1.875

    Source: SpikingJelly's documented function of that name (Fang et al., Science Advances 2023); the explicit
        state is that of Norse's cells.
    """
    return _step_through(x_seq, single_step_module, state, constants, 0, "multi_step_forward")


def t_last_multi_step_forward(
    x_seq: Any, single_step_module: Modules, *, state: Any = _OWN_STATE, constants: Sequence[Any] = ()
) -> Any:
    """Step through a sequence whose time is the last dimension; otherwise `multi_step_forward`.

    Args:
        x_seq: `[N, *, T]`, or a nested tuple, list or dict of such tensors.
        single_step_module: one or several modules or callables for ONE time step; they get `[N, *]`.
        state: as for `multi_step_forward`; a method `multi_step` gets and returns sequences with time first.
        constants: arguments passed unchanged in front of those of the step, to the first module.

    Returns:
        `y_seq`: the outputs of the steps, stacked along the last dim; with `state`: `(y_seq, final state)`.

    Raises:
        InputError: as for `multi_step_forward`.

    Example:
        >>> import torch
        >>> t_last_multi_step_forward(torch.rand(2, 3, 5), torch.nn.Linear(3, 4)).shape
        torch.Size([2, 4, 5])

    Source: SpikingJelly's documented function of that name.
    """
    return _step_through(x_seq, single_step_module, state, constants, -1, "t_last_multi_step_forward")


def chunk_multi_step_forward(
    split_size: int, x_seq: Any, multi_step_module: Callable[..., Any], *, state: Any = _OWN_STATE
) -> Any:
    """Run a multi-step module over chunks of `split_size` time steps: memory for a chunk, not for the sequence.

    Args:
        split_size: time steps in a chunk, at least 1; the last chunk may be shorter.
        x_seq: `[T, *]`, or a nested tuple, list or dict of such tensors.
        multi_step_module: one module or callable that takes sequences. It keeps its state from chunk to chunk; or,
            with `state`, it is called as `multi_step_module(*chunk, state)` and returns `(y_seq, state)`.
        state: what the first chunk is given as state; anything, also None.

    Returns:
        `y_seq`: the outputs of the chunks, concatenated along dim 0; with `state`: `(y_seq, final state)`.

    Raises:
        InputError: `split_size` is not an int of at least 1 (SNNFX302); otherwise as for `multi_step_forward`.

    Example:
        >>> import torch
        >>> chunk_multi_step_forward(16, torch.rand(100, 2, 3), torch.nn.Linear(3, 4)).shape
        torch.Size([100, 2, 4])

    Source: SpikingJelly's documented function of that name; handing the state on makes it strip-mining of the time
        loop (Kennedy & Allen, Optimizing Compilers for Modern Architectures, 2001).
    """
    where = "chunk_multi_step_forward"
    if not isinstance(split_size, int) or split_size < 1:
        raise InputError("SNNFX302", f"cannot split into chunks of {split_size!r} time steps", where=where)
    if not callable(multi_step_module):
        raise _not_callable(multi_step_module, "multi_step_module", where)
    T = _check_sequences(x_seq, 0, where)
    y_chunks = []
    for start in range(0, T, split_size):
        length = min(split_size, T - start)
        chunk = _positional(pytree.tree_map(lambda x, s=start, n=length: x.narrow(0, s, n), x_seq))
        if state is _OWN_STATE:
            y = multi_step_module(*chunk)
        else:
            y, state = _output_and_state(multi_step_module(*chunk, state), where)
        y_chunks.append(y)
    y_seq = y_chunks[0] if len(y_chunks) == 1 else _join(y_chunks, torch.cat, where)
    return y_seq if state is _OWN_STATE else (y_seq, state)


def seq_to_ann_forward(
    x_seq: Any,
    stateless_module: Modules,
    *,
    constants: Sequence[Any] = (),
    batch_dim: BatchDim = 0,
    out_batch_dim: BatchDim = 0,
) -> Any:
    """Run stateless modules on all time steps at once, with T folded into the batch dimension.

    Right for batch-equivariant modules only, `f(cat_t x_t) == cat_t f(x_t)`; see `map_forward` for the others. The
    modules may change the size of the batch: what they return is unfolded into `(T, size // T)`.

    Args:
        x_seq: `[T, N, *]`, or a nested tuple, list or dict of such tensors that agree on T and N.
        stateless_module: one or several modules or callables; they get `[T * N, *]`.
        constants: arguments passed unchanged in front of the folded ones, to the first module.
        batch_dim: where the batch is in ONE step `x_t`: an int, or one for each tensor of `x_seq` in pytree order.
            With 1, `x_seq` is `[T, C, N, *]` and the module gets `[C, T * N, *]`.
        out_batch_dim: the same for what the last module returns, None outputs counted.

    Returns:
        `y_seq`: `[T, N, *]`, nested as what the last module returns; time is dim 0 whatever `out_batch_dim` is.

    Raises:
        InputError: N is not the same everywhere (SNNFX303); no room for T and N (SNNFX306); not such a `batch_dim`
            (SNNFX309); an output whose batch is no multiple of T (SNNFX313, after the call); otherwise as for
            `multi_step_forward`.

    Example:
        >>> import torch
        >>> conv = torch.nn.Conv2d(1, 4, kernel_size=3)
        >>> seq_to_ann_forward(torch.rand(8, 2, 1, 28, 28), conv).shape
        torch.Size([8, 2, 4, 26, 26])
        >>> pixel = torch.zeros(8, 3, 2)  # [T, C, N]
        >>> seq_to_ann_forward(pixel, lambda x: x.t(), batch_dim=1).shape
        torch.Size([8, 2, 3])

    Source: SpikingJelly's documented function of that name.
    """
    where = "seq_to_ann_forward"
    chain, constants = _chain_of(stateless_module, where), _check_constants(constants, where)
    T = _check_sequences(x_seq, 0, where)
    leaves, spec = pytree.tree_flatten(x_seq)
    batch_dims = _per_leaf(batch_dim, len(leaves), "batch_dim", where)
    if not isinstance(out_batch_dim, int):
        _per_leaf(out_batch_dim, len(out_batch_dim), "out_batch_dim", where)
    for x, b in zip(leaves, batch_dims, strict=True):
        if not 1 - x.dim() <= b < x.dim() - 1:
            why = f"there is no dimension {b} for the batch in one step of {_shapes(x_seq)}."
            raise InputError("SNNFX306", "too few dimensions to fold time into the batch", where=where, why=why)
    batch_dims = [b % (x.dim() - 1) for x, b in zip(leaves, batch_dims, strict=True)]
    N = leaves[0].shape[batch_dims[0] + 1]
    if any(x.shape[b + 1] != N for x, b in zip(leaves, batch_dims, strict=True)):
        why = f"they are {_shapes(x_seq)}, with the batch of one step in dimension {batch_dim}."
        raise InputError("SNNFX303", "the sequences differ in their batch size", where=where, why=why)

    folded = [x.movedim(0, b).flatten(b, b + 1) for x, b in zip(leaves, batch_dims, strict=True)]
    y = _apply(chain, (*constants, *_positional(pytree.tree_unflatten(folded, spec))))
    y_leaves, y_spec = pytree.tree_flatten(y)
    out_dims = _per_leaf(out_batch_dim, len(y_leaves), "out_batch_dim", where)
    return pytree.tree_unflatten([_unfold(y, T, b, where) for y, b in zip(y_leaves, out_dims, strict=True)], y_spec)


def t_last_seq_to_ann_forward(x_seq: Any, stateless_module: Modules) -> Any:
    """Run stateless modules on all time steps at once, with `torch.vmap` over time, which is the last dimension.

    Args:
        x_seq: `[N, *, T]`, or a nested tuple, list or dict of such tensors.
        stateless_module: one or several modules or callables; they get `[N, *]`. BatchNorm in training has no
            batching rule in torch. Random operations draw anew for each time step.

    Returns:
        `y_seq`: `[N, *, T]`, nested as what the last module returns.

    Raises:
        InputError: as for `multi_step_forward`.

    Example:
        >>> import torch
        >>> t_last_seq_to_ann_forward(torch.rand(2, 3, 5), torch.nn.Linear(3, 4)).shape
        torch.Size([2, 4, 5])

    Source: SpikingJelly's documented function of that name.
    """
    return _vectorise(x_seq, stateless_module, (), -1, "t_last_seq_to_ann_forward")


def map_forward(x_seq: Any, stateless_module: Modules, *, constants: Sequence[Any] = ()) -> Any:
    """Run stateless modules on all time steps at once, with `torch.vmap` over time, which is the first dimension.

    The meaning is that of stepping for any stateless module, batch-equivariant or not: within a step `x_t.mean(0)`
    is the mean over the batch of that step. A single module that has a method `map_steps(inputs, constants)` runs
    the sequence itself, `inputs` being the tuple of positional arguments, each a sequence.

    Args:
        x_seq: `[T, *]`, or a nested tuple, list or dict of such tensors.
        stateless_module: one or several modules or callables; they get one step. BatchNorm in training has no
            batching rule in torch. Random operations draw anew for each time step.
        constants: arguments passed unchanged in front of those of the step, to the first module; not mapped.

    Returns:
        `y_seq`: `[T, *]`, nested as what the last module returns.

    Raises:
        InputError: as for `multi_step_forward`.

    Example:
        >>> import torch
        >>> x_seq = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
        >>> map_forward(x_seq, lambda x: x - x.mean(0)).tolist()
        [[-1.0, 1.0], [-10.0, 10.0]]

    Source: vectorisation of a parallel loop, by JAX's `vmap` (Bradbury et al., 2018) as it is in torch.
    """
    return _vectorise(x_seq, stateless_module, constants, 0, "map_forward")


def _step_through(x_seq: Any, modules: Modules, state: Any, constants: Sequence[Any], time_dim: int, where: str) -> Any:
    chain, constants = _chain_of(modules, where), _check_constants(constants, where)
    T = _check_sequences(x_seq, time_dim, where)
    inputs = _positional(x_seq)
    if state is _OWN_STATE:
        steps = zip(*(_steps_of(x, T, time_dim) for x in inputs), strict=True)
        return _join([_apply(chain, (*constants, *x_t)) for x_t in steps], partial(torch.stack, dim=time_dim), where)
    if callable(run := getattr(modules, "multi_step", None)):
        if time_dim == 0:
            return run(inputs, state, constants)
        inputs = pytree.tree_map(lambda x: x.movedim(time_dim, 0), inputs)
        y_seq, state = run(inputs, state, constants)
        return pytree.tree_map_only(Tensor, lambda y: y.movedim(0, time_dim), y_seq), state

    several = chain is not modules and not (len(chain) == 1 and chain[0] is modules)
    cells, entries = _enter_state(chain, state, several, where)
    states = [cell.enter(entry) for cell, entry in zip(cells, entries, strict=True)]
    y_steps = []
    for x_t in zip(*(_steps_of(x, T, time_dim) for x in inputs), strict=True):
        values = (*constants, *x_t)
        for i, cell in enumerate(cells):
            if states[i] is _INITIAL:
                states[i] = cell.initial(*values)
            y, states[i] = cell.step(states[i], *values)
            values = (y,)
        y_steps.append(y)
    states = [cell.leave(state, entry) for cell, state, entry in zip(cells, states, entries, strict=True)]
    return _join(y_steps, partial(torch.stack, dim=time_dim), where), states if several else states[0]
