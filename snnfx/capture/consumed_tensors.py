"""Detect tensors outside the graph whose values a trace uses, such as `float(self.scale)`.

The graph refers to a tensor that is an operand of a recorded operation, so later changes of its values have an effect.
The result of any other operation is a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from snnfx.capture.proxy import StepProxy
from snnfx.capture.recorder import Recorder
from snnfx.sandbox.torch_internals import DataDependentOutputException, FakeTensor, pytree

__all__ = ["ConsumedTensors"]

_METADATA = frozenset(
    "shape dtype device layout ndim requires_grad is_leaf grad_fn names itemsize nbytes is_cuda is_cpu is_meta "
    "is_sparse is_quantized is_complex is_floating_point is_contiguous is_signed size dim numel stride ndimension "
    "element_size get_device __len__ __hash__ _version".split()
)
"""Operations that do not read values."""

_READS_OF_MEMORY = frozenset(("numpy", "__array__", "__format__"))
"""Operations that read values without an operator of torch, for which a fake tensor raises errors of other kinds."""


class ConsumedTensors(TorchFunctionMode):
    """While active, collects the tensors that operations outside the graph take.

    Attributes:
        tensors: the tensors by id.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.tensors: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        reads_memory = self.recorder.is_evaluating and _name_of(func) in _READS_OF_MEMORY
        if reads_memory and any(isinstance(leaf, FakeTensor) for leaf in args):
            raise DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)
        if not self.recorder.is_evaluating and _name_of(func) not in _METADATA:
            leaves = pytree.tree_leaves((args, kwargs))
            if not any(type(leaf) is StepProxy for leaf in leaves):
                self.tensors.update((id(leaf), leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return func(*args, **kwargs)


def _name_of(func: Any) -> str:
    """The name of a method, or of the attribute that a getter reads."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
