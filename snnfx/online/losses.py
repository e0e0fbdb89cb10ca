"""The loss of every step of a chunk, evaluated at once where that is the same.

A loss is a function of one step, `loss(y_t, target_t)`. Called T times, it costs more than a small net. `torch.vmap`
evaluates it for all steps in one call. torch's own losses are known to allow that; of any other function it is checked
the first time: values and gradients have to be those of the single calls, otherwise it is called once a step for good.
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

__all__ = ["Loss", "losses_of_steps", "scalar"]

Loss = Callable[[Any, Any], Tensor]
"""The loss of one step: `loss(y_t, target_t)` is a scalar tensor."""

_at_once: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""What was found of functions that are not torch's: whether they may be evaluated for all steps at once."""


def losses_of_steps(loss: Loss, y_seq: Any, target: Any, has_time: bool, steps: int) -> Tensor:
    """The losses of all steps of a chunk, `[T]`.

    Args:
        loss: the loss of one step.
        y_seq: outputs, `[T, N, *]` or nested.
        target: `[T, N, *]` or nested, or without T.
        has_time: whether the target has T in front.
        steps: T.

    Raises:
        InputError: SNNFX611, a loss is not a scalar.
    """
    if steps == 1 or _is_known(loss) is False:
        return _one_by_one(loss, y_seq, target, has_time, steps)
    if _is_known(loss):
        return _vmapped(loss, y_seq, target, has_time)
    found = _one_by_one(loss, y_seq, target, has_time, steps)
    with torch.random.fork_rng(devices=[], enabled=True):
        same = _is_same(loss, y_seq, target, has_time, found)
    _remember(loss, same)
    return found


def scalar(value: Any) -> Tensor:
    """A loss as a tensor without dimensions.

    Raises:
        InputError: SNNFX611, it is something else.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            "SNNFX611",
            f"the loss of a step is {got}, not a scalar",
            hint="Reduce it, e.g. with .mean().",
        )
    return value.reshape(())


def _one_by_one(loss: Loss, y_seq: Any, target: Any, has_time: bool, steps: int) -> Tensor:
    y_steps = _steps(y_seq, steps)
    targets = _steps(target, steps) if has_time else [target] * steps
    return torch.stack([scalar(loss(y, t)) for y, t in zip(y_steps, targets, strict=True)])


def _steps(tree: Any, steps: int) -> Sequence[Any]:
    if isinstance(tree, Tensor):
        return tree.unbind(0)
    leaves, spec = pytree.tree_flatten(tree)
    columns = [leaf.unbind(0) if isinstance(leaf, Tensor) else [leaf] * steps for leaf in leaves]
    return [pytree.tree_unflatten(list(row), spec) for row in zip(*columns, strict=True)]


def _vmapped(loss: Loss, y_seq: Any, target: Any, has_time: bool) -> Tensor:
    dims = pytree.tree_map(lambda value: 0 if has_time and isinstance(value, Tensor) else None, target)
    losses = torch.vmap(loss, in_dims=(0, dims), randomness="different")(y_seq, target)
    if not isinstance(losses, Tensor) or losses.numel() != losses.shape[0]:
        scalar(losses[0])
    return losses.reshape(-1)


def _is_same(loss: Loss, y_seq: Any, target: Any, has_time: bool, expected: Tensor) -> bool:
    """Whether all steps at once have the values and gradients that the single calls have."""
    leaves, spec = pytree.tree_flatten(y_seq)
    tensors = [y.detach().requires_grad_(y.is_floating_point()) if isinstance(y, Tensor) else y for y in leaves]
    wanted = [y for y in tensors if isinstance(y, Tensor) and y.requires_grad]
    try:
        with torch.enable_grad():
            again = pytree.tree_unflatten(tensors, spec)
            at_once = _vmapped(loss, again, target, has_time)
            singly = _one_by_one(loss, again, target, has_time, expected.shape[0])
            if not (torch.allclose(at_once, expected) and torch.allclose(singly, expected)):
                return False
            if not wanted or not at_once.requires_grad:
                return bool(at_once.requires_grad == singly.requires_grad)
            a = torch.autograd.grad(at_once.sum(), wanted, allow_unused=True)
            b = torch.autograd.grad(singly.sum(), wanted, allow_unused=True)
            return all(
                x is y or (x is not None and y is not None and torch.allclose(x, y)) for x, y in zip(a, b, strict=True)
            )
    except Exception as error:  # a user's function may refuse vmap in any way
        warn_once(
            "SNNFX617",
            f"the loss is evaluated step by step: torch.vmap refused it ({str(error).splitlines()[0]}).",
            key=_key(loss) or id(loss),
        )
        return False


def _is_known(loss: Loss) -> bool | None:
    """Whether a loss may be evaluated for all steps at once; None: not found out yet."""
    if isinstance(loss, functools.partial):
        return _is_known(loss.func)
    if isinstance(loss, nn.Module):
        if type(loss).__module__.startswith("torch.nn.modules.loss"):
            return True
    elif getattr(F, getattr(loss, "__name__", ""), None) is loss:
        return True
    return _at_once.get(_key(loss)) if _key(loss) is not None else False


def _remember(loss: Loss, same: bool) -> None:
    if (key := _key(loss)) is not None:
        _at_once[key] = same


def _key(loss: Loss) -> Any:
    """What a loss is known by: the code of a function, so that a lambda in a loop is looked at once; else itself."""
    if isinstance(loss, types.FunctionType) and loss.__closure__ is None:
        return loss.__code__
    try:
        weakref.ref(loss)
        hash(loss)
    except TypeError:
        return None
    return loss
