"""Snapshot of a tensor with its gradient."""

from __future__ import annotations

from torch import Tensor

from snnfx.sandbox.tensor_values import restore_value

__all__ = ["TensorSnapshot", "gradient_of"]


def gradient_of(tensor: Tensor) -> Tensor | None:
    """The gradient of a tensor; None for the result of an operation, whose `grad` warns when it is read."""
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


class TensorSnapshot:
    """The value, the gradient and `requires_grad` of a tensor at the time of construction.

    Args:
        tensor: a parameter or a buffer. A tensor on the meta device has no value.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.value = None if tensor.is_meta else tensor.detach().clone()
        self.requires_grad, self.grad = tensor.requires_grad, gradient_of(tensor)

    def restore(self) -> None:
        """Restore the value, the gradient and `requires_grad`; the tensor stays the same object."""
        tensor, value = self.tensor, self.value
        if value is not None:
            if tensor.shape != value.shape or tensor.dtype != value.dtype or tensor.device != value.device:
                tensor.data = value.clone()
            else:
                restore_value(tensor, value)
        if tensor.is_leaf:
            tensor.requires_grad_(self.requires_grad)
        if gradient_of(tensor) is not self.grad:
            tensor.grad = self.grad
