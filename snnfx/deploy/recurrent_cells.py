"""The recurrent cells of torch as linear layers and element-wise calls.

torch decomposes them in C++, where their check of the batch sizes would fix the batch size of the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["CellsAsLayers"]


def _lstm(x: Tensor, state: Sequence[Tensor], w_x: Tensor, w_h: Tensor, b_x: Any = None, b_h: Any = None) -> Any:
    h, c = state
    i, f, g, o = (F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Any = None, b_h: Any = None) -> Tensor:
    x_r, x_z, x_n = F.linear(x, w_x, b_x).chunk(3, 1)
    h_r, h_z, h_n = F.linear(h, w_h, b_h).chunk(3, 1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return n + torch.sigmoid(x_z + h_z) * (h - n)


def _elman(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(x: Tensor, h: Tensor, w_x: Tensor, w_h: Tensor, b_x: Any = None, b_h: Any = None) -> Tensor:
        return activation(F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h))

    return cell


_CELLS: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: _lstm,
    torch.gru_cell: _gru,
    torch.rnn_tanh_cell: _elman(torch.tanh),
    torch.rnn_relu_cell: _elman(torch.relu),
}


class CellsAsLayers(TorchFunctionMode):
    """A context in which the functions of torch's recurrent cells compute with linear layers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _CELLS.get(function, function)(*args, **(kwargs or {}))
