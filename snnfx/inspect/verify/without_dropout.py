"""Disable dropout from outside a model, to compare two runs in training mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

__all__ = ["without_dropout"]

_DROPOUT_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.dropout_, torch.alpha_dropout, torch.alpha_dropout_, torch.native_dropout),
        *(torch.feature_dropout, torch.feature_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_),
        *(torch.ops.aten.dropout, torch.ops.aten.dropout.default),
        *(torch.ops.aten.native_dropout, torch.ops.aten.native_dropout.default),
    }
)
_DROPOUT_ATTRIBUTES = ("p", "drop_prob", "dropout")


class _DropoutOff(TorchFunctionMode):
    """Calls dropout functions with p = 0 and training=False: the identity, without drawing random numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        args, kwargs = list(args), dict(kwargs or {})
        makes_new = False
        if func in _DROPOUT_FUNCTIONS:
            # All of them begin with (input, p, training); ATen names the last one `train`.
            training = "training" if getattr(func, "__module__", None) == F.__name__ else "train"
            in_place = func.__name__.endswith("_") or (args[3] if len(args) > 3 else kwargs.get("inplace", False))
            makes_new = bool(args[2] if len(args) > 2 else kwargs.get(training, True)) and not in_place
            for position, name, value in ((1, "p", 0.0), (2, training, False)):
                if position < len(args):
                    args[position] = value
                else:
                    kwargs[name] = value
        elif func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args[4] = 0.0
            else:
                kwargs["dropout_p"] = 0.0
        result = func(*args, **kwargs)
        # With p = 0 the result is the input itself; a copy, because the model may change the result in place.
        return result.clone() if makes_new and isinstance(result, torch.Tensor) else result


@contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """Disable dropout (p = 0) in models, in either mode.

    Disables PyTorch's dropout functions, also under `torch.vmap`, and layers with a dropout probability: layers with
    "drop" or "stochastic" in their class name (SpikingJelly's layers store a mask), recurrent layers and attention.
    Other random functions cannot be disabled.

    Example:
        >>> import torch
        >>> layer = torch.nn.Dropout(0.5)
        >>> with without_dropout(layer):
        ...     float(layer(torch.ones(1000)).sum())
        1000.0
    """
    changed: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in {id(module): module for model in models for module in model.modules()}.values():
            name = type(module).__name__.lower()
            if "drop" in name or "stochastic" in name or isinstance(module, nn.RNNBase | nn.MultiheadAttention):
                for attribute in _DROPOUT_ATTRIBUTES:
                    if isinstance(module.__dict__.get(attribute), float):
                        changed.append((module, attribute, module.__dict__[attribute]))
                        module.__dict__[attribute] = 0.0
        with _DropoutOff():
            yield
    finally:
        for module, attribute, value in changed:
            module.__dict__[attribute] = value
