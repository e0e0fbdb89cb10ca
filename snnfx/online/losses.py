"""Evaluate the loss of every time step of a chunk, in one `torch.vmap` call where possible.

A loss is a function of one step, `loss(y_t, target_t)`. Calling it T times costs more than a small net. The losses of
`torch.nn` and `torch.nn.functional` are known to work under `torch.vmap`. Any other loss is checked once: its values
and gradients under vmap must equal the step-by-step ones, otherwise it is evaluated step by step from then on.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snnfx.errors import InputError, warn_once
from snnfx.sandbox.torch_internals import pytree

__all__ = ["Loss", "as_scalar", "step_losses"]

Loss = Callable[[Any, Any], Tensor]
"""The loss of one step: `loss(y_t, target_t)` is a scalar tensor."""

_works_under_vmap: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""The result of the check for each user-defined loss."""


def step_losses(loss: Loss, y_seq: Any, target: Any, has_time: bool, steps: int) -> Tensor:
    """The losses of all time steps of a chunk, `[T]`.

    Args:
        loss: the loss of one step.
        y_seq: outputs, `[T, N, *]` or a pytree of them.
        target: `[T, N, *]` or a pytree; without T if it is the same at every step.
        has_time: whether the target has T in dim 0.
        steps: T.

    Raises:
        InputError: SNNFX611 if a loss is not a scalar.
    """
    may_vmap = _may_use_vmap(loss)
    if steps == 1 or may_vmap is False:
        return _stepwise(loss, y_seq, target, has_time, steps)
    if may_vmap:
        return _vmapped(loss, y_seq, target, has_time)
    losses = _stepwise(loss, y_seq, target, has_time, steps)
    with torch.random.fork_rng(devices=[], enabled=True):
        is_same = _agrees_under_vmap(loss, y_seq, target, has_time, losses)
    if (key := _key(loss)) is not None:
        _works_under_vmap[key] = is_same
    return losses


def as_scalar(value: Any) -> Tensor:
    """Reshape a loss with one element to a tensor of dimension 0.

    Raises:
        InputError: SNNFX611 if it is not a tensor with one element.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        what = f"the loss function returned {got}, not a scalar"
        raise InputError("SNNFX611", what, hint="Return one number per time step, e.g. with .mean().")
    return value.reshape(())


def _stepwise(loss: Loss, y_seq: Any, target: Any, has_time: bool, steps: int) -> Tensor:
    outputs = _unbind_time(y_seq, steps)
    targets = _unbind_time(target, steps) if has_time else [target] * steps
    return torch.stack([as_scalar(loss(y, t)) for y, t in zip(outputs, targets, strict=True)])


def _unbind_time(tree: Any, steps: int) -> Sequence[Any]:
    if isinstance(tree, Tensor):
        return tree.unbind(0)
    leaves, spec = pytree.tree_flatten(tree)
    columns = [leaf.unbind(0) if isinstance(leaf, Tensor) else [leaf] * steps for leaf in leaves]
    return [pytree.tree_unflatten(list(row), spec) for row in zip(*columns, strict=True)]


def _vmapped(loss: Loss, y_seq: Any, target: Any, has_time: bool) -> Tensor:
    dims = pytree.tree_map(lambda value: 0 if has_time and isinstance(value, Tensor) else None, target)
    losses = torch.vmap(loss, in_dims=(0, dims), randomness="different")(y_seq, target)
    if not isinstance(losses, Tensor) or losses.numel() != losses.shape[0]:
        as_scalar(losses[0])
    return losses.reshape(-1)


def _agrees_under_vmap(loss: Loss, y_seq: Any, target: Any, has_time: bool, expected: Tensor) -> bool:
    """Whether vmap gives the values and gradients of the step-by-step evaluation."""
    leaves, spec = pytree.tree_flatten(y_seq)
    detached = [y.detach().requires_grad_(y.is_floating_point()) if isinstance(y, Tensor) else y for y in leaves]
    inputs = [y for y in detached if isinstance(y, Tensor) and y.requires_grad]
    outputs = pytree.tree_unflatten(detached, spec)
    try:
        with torch.enable_grad():
            vmapped = _vmapped(loss, outputs, target, has_time)
            stepwise = _stepwise(loss, outputs, target, has_time, expected.shape[0])
            compares_gradients = bool(inputs) and vmapped.requires_grad and stepwise.requires_grad
            grads = [
                torch.autograd.grad(losses.sum(), inputs, allow_unused=True) if compares_gradients else ()
                for losses in (vmapped, stepwise)
            ]
    except Exception as error:  # a user's function may fail under vmap in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        message = (
            f"the loss is evaluated step by step, because it fails under torch.vmap ({reason}). "
            "The result is the same, only slower; torch.where can replace a branch on a value."
        )
        warn_once("SNNFX617", message, key=_key(loss) or type(loss))
        return False
    if vmapped.requires_grad != stepwise.requires_grad:
        return False
    return _is_close(vmapped, expected) and _is_close(stepwise, expected) and all(map(_is_close, *grads))


def _is_close(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and a.dtype == b.dtype and torch.allclose(a, b))


def _may_use_vmap(loss: Loss) -> bool | None:
    """Whether a loss works under vmap; None if it has not been checked yet."""
    if isinstance(loss, functools.partial):
        return _may_use_vmap(loss.func)
    if isinstance(loss, nn.Module):
        if type(loss).__module__.startswith("torch.nn.modules.loss"):
            return True
    elif getattr(F, getattr(loss, "__name__", ""), None) is loss:
        return True
    return _works_under_vmap.get(_key(loss)) if _key(loss) is not None else False


def _key(loss: Loss) -> Any:
    """Cache key of a loss: the code of a plain function, so that a lambda in a loop is checked once; else the loss."""
    if isinstance(loss, types.FunctionType) and loss.__closure__ is None:
        return loss.__code__
    try:
        weakref.ref(loss)
        hash(loss)
    except TypeError:
        return None
    return loss
