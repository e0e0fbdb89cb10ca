"""Gradients of a linear layer with few rows, which pass once over the weight and its gradient.

Both have many more elements than the rows, so that a pass over memory takes most of the time. Libraries of linear
algebra rearrange the weight first, as they do for many rows.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from snnfx.lowering.choices.fastest import Fastest
from snnfx.lowering.choices.linear_layers import gradients_by_one_dnn, gradients_of_linear
from snnfx.lowering.elementwise.cpp.build import kernel_threads, load, parallel_fields
from snnfx.lowering.nonzero_lists import sources_of
from snnfx.ops.buffer_pool import pool

__all__ = ["GRADIENTS", "build_gradients", "choose_gradients", "gradient_of_input", "gradient_of_weight"]

GRADIENTS = Fastest("few_row_gradients", ("torch", "in place"))

_TEXT = r"""
#include <atomic>
constexpr i64 VECTORS = 4, COLUMNS = VECTORS * LANES, OUTPUTS = 4;

struct Args {
  i64 mode;             // 0: the gradient of the weight, 1: the gradient of the input
  const real *grad;     // [rows, M]
  const real *read;     // the input [rows, K], or the weight [M, K]
  real *y;              // [M, K] or [rows, K]
  i64 rows, M, K, threads;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  std::atomic<i64> next; // the next unit of work
};

// The sums over `n` of factor[n] times row n of `rows`, for OUTPUTS rows of factors with a stride of their own.
template <int M>
INLINE void add_products(vec (&sum)[M][VECTORS], const real *rows, i64 step, const real *factors, i64 of_output,
                         i64 of_row, i64 n) {
  for (i64 r = 0; r < n; r++) {
    vec row[VECTORS];
    for (int v = 0; v < VECTORS; v++) row[v] = *(const vec *)(rows + r * step + v * LANES);
    for (int m = 0; m < M; m++) {
      const real factor = factors[m * of_output + r * of_row];
      for (int v = 0; v < VECTORS; v++) sum[m][v] += row[v] * factor;
    }
  }
}

template <int M>
static void weight_tile(const real *grad, i64 outputs, const real *x, i64 step, i64 rows, real *y, i64 K, i64 width) {
  vec sum[M][VECTORS] = {};
  add_products<M>(sum, x, step, grad, 1, outputs, rows);
  for (int m = 0; m < M; m++) {
    if (width == COLUMNS)
      for (int v = 0; v < VECTORS; v++) *(vec *)(y + m * K + v * LANES) = sum[m][v];
    else memcpy(y + m * K, sum[m], width * sizeof(real));
  }
}

// The gradient of `width` columns of the weight.
static void weight_columns(const Args &a, i64 k, i64 width, real *copied) {
  const real *x = a.read + k;
  i64 step = a.K;
  if (width < COLUMNS) {
    memset(copied, 0, a.rows * COLUMNS * sizeof(real));
    for (i64 r = 0; r < a.rows; r++) memcpy(copied + r * COLUMNS, x + r * a.K, width * sizeof(real));
    x = copied, step = COLUMNS;
  }
  i64 m = 0;
  for (; m + OUTPUTS <= a.M; m += OUTPUTS)
    weight_tile<OUTPUTS>(a.grad + m, a.M, x, step, a.rows, a.y + m * a.K + k, a.K, width);
  for (; m < a.M; m++) weight_tile<1>(a.grad + m, a.M, x, step, a.rows, a.y + m * a.K + k, a.K, width);
}

// The gradient of `width` columns of the input, in `total`: [rows, COLUMNS].
static void input_columns(const Args &a, i64 k, i64 width, real *total) {
  real copied[OUTPUTS * COLUMNS];
  memset(total, 0, a.rows * COLUMNS * sizeof(real));
  for (i64 m = 0; m < a.M; m += OUTPUTS) {
    const i64 n = a.M - m < OUTPUTS ? a.M - m : OUTPUTS;
    const real *w = a.read + m * a.K + k;
    i64 step = a.K;
    if (width < COLUMNS) {
      memset(copied, 0, sizeof copied);
      for (i64 i = 0; i < n; i++) memcpy(copied + i * COLUMNS, w + i * a.K, width * sizeof(real));
      w = copied, step = COLUMNS;
    } else if (m + 3 * OUTPUTS <= a.M) {
      for (i64 i = 2 * OUTPUTS; i < 3 * OUTPUTS; i++)
        for (i64 at = 0; at < COLUMNS; at += 64 / sizeof(real)) __builtin_prefetch(w + i * a.K + at);
    }
    vec row[OUTPUTS][VECTORS] = {};
    for (i64 i = 0; i < n; i++)
      for (int v = 0; v < VECTORS; v++) row[i][v] = *(const vec *)(w + i * step + v * LANES);
    for (i64 r = 0; r < a.rows; r++) {
      real *to = total + r * COLUMNS;
      const real *grad = a.grad + r * a.M + m;
      vec sum[VECTORS];
      for (int v = 0; v < VECTORS; v++) sum[v] = *(const vec *)(to + v * LANES);
      if (n == OUTPUTS)
        for (int i = 0; i < OUTPUTS; i++)
          for (int v = 0; v < VECTORS; v++) sum[v] += row[i][v] * grad[i];
      else
        for (i64 i = 0; i < n; i++)
          for (int v = 0; v < VECTORS; v++) sum[v] += row[i][v] * grad[i];
      for (int v = 0; v < VECTORS; v++) *(vec *)(to + v * LANES) = sum[v];
    }
  }
  for (i64 r = 0; r < a.rows; r++) memcpy(a.y + r * a.K + k, total + r * COLUMNS, width * sizeof(real));
}

static void work(void *p) {
  Args &a = *(Args *)p;
  real *own = (real *)aligned_alloc(64, a.rows * COLUMNS * sizeof(real));
  if (!own) abort();
  const i64 blocks = (a.K + COLUMNS - 1) / COLUMNS;
  for (i64 b; (b = a.next.fetch_add(1, std::memory_order_relaxed)) < blocks;) {
    const i64 k = b * COLUMNS, width = a.K - k < COLUMNS ? a.K - k : COLUMNS;
    if (a.mode == 0) weight_columns(a, k, width, own);
    else input_columns(a, k, width, own);
  }
  free(own);
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else work(a);
}
"""


_SOURCES = sources_of(_TEXT)
"""By bytes of an element."""


class _Arguments(ctypes.Structure):
    """The struct `Args` of the kernel."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("mode", "grad", "read", "y", "rows", "M", "K", "threads", "parallel", "next")
    )


def build_gradients(itemsize: int) -> None:
    """Compile the kernel.

    Raises:
        LoweringRefused: it cannot be compiled.
    """
    load(_SOURCES[itemsize])


def gradient_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """`grad.T @ x` for row-major tensors `[rows, M]` and `[rows, K]` with few rows."""
    y = pool.empty((grad.shape[1], x.shape[1]), (x.shape[1], 1), x.dtype)
    _run(0, grad, x, y)
    return y


def gradient_of_input(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad @ weight` for row-major tensors `[rows, M]` and `[M, K]` with few rows."""
    y = pool.empty((grad.shape[0], weight.shape[1]), (weight.shape[1], 1), weight.dtype)
    _run(1, grad, weight, y)
    return y


def choose_gradients(x: Tensor, weight: Tensor) -> bool:
    """Whether both functions of this module are faster than libraries, measured once for each shape.

    Args:
        x: the input of the layer, `[*, K]`.
        weight: `[M, K]`.
    """
    rows = x.numel() // x.shape[-1]
    outputs, inputs = weight.shape
    by_one_dnn = gradients_by_one_dnn(x, weight)

    def calls() -> dict[str, object]:
        grad = torch.ones(rows, outputs, dtype=weight.dtype, device="cpu")
        x = torch.ones(rows, inputs, dtype=weight.dtype, device="cpu")
        w = weight.detach()
        return {
            "torch": lambda: gradients_of_linear(grad, x, w, by_one_dnn, (True, True, False)),
            "in place": lambda: (gradient_of_input(grad, w), gradient_of_weight(grad, x)),
        }

    key = (rows.bit_length(), outputs, inputs, str(weight.dtype), by_one_dnn)
    return GRADIENTS.choose(key, "torch", calls).name == "in place"  # type: ignore[arg-type]


def _run(mode: int, grad: Tensor, read: Tensor, y: Tensor) -> None:
    arguments = _Arguments(
        mode=mode,
        grad=grad.data_ptr(),
        read=read.data_ptr(),
        y=y.data_ptr(),
        rows=len(grad),
        M=grad.shape[1],
        K=read.shape[1],
        **parallel_fields(kernel_threads()),
    )
    load(_SOURCES[y.element_size()]).run(ctypes.byref(arguments))
