"""The C++ source of products of matrices whose first operand has many zeros, as in spiking attention.

A product of two matrices of ones and zeros counts the common bits of a row and a column. Otherwise each element of a
row that is not zero adds a row of the second matrix.
"""

from __future__ import annotations

from snnfx.lowering.nonzero_lists import sources_of

__all__ = ["MATRIX_PRODUCTS"]

_TEXT = r"""
#include <atomic>

struct Args {
  const real *a, *b;
  real *y;                                      // [batch, M, N], row-major
  i64 batch[3], a_batch[3], b_batch[3];         // sizes of the batch and the strides of its dimensions
  i64 M, K, N, a_row, a_column, b_row, b_column; // sizes, and the strides of rows and columns
  i64 counts;                                   // whether b may have only ones and zeros
  i64 rows;                                     // rows of a unit of work
  i64 threads;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  std::atomic<i64> next, refusal;               // the next unit of work; 1: b has an element that is not finite
};

static thread_local Scratch<u64> row_bits, column_bits;
static thread_local Scratch<real> left_rows, right_rows;

static void copy(const real *from, i64 rows, i64 columns, i64 row, i64 column, real *to, i64 step) {
  if (row < column)
    for (i64 k = 0; k < columns; k++)
      for (i64 i = 0; i < rows; i++) to[i * step + k] = from[i * row + k * column];
  else
    for (i64 i = 0; i < rows; i++)
      for (i64 k = 0; k < columns; k++) to[i * step + k] = from[i * row + k * column];
}

// The bits of rows of `n` elements; returns whether some of these are neither 0 nor 1.
static bool bits_of_rows(const real *x, i64 rows, i64 n, i64 step, u64 *to) {
  bool others = false;
  for (i64 i = 0; i < rows; i++)
    for (i64 k = 0; k < n; k += 64) *to++ = bits_of(x + i * step + k, n - k < 64 ? n - k : 64, others);
  return others;
}

static bool is_finite(const real *x, i64 rows, i64 columns, i64 step) {
  real zero = 0;
  for (i64 i = 0; i < rows; i++) {
    real sum = 0;
    for (i64 k = 0; k < columns; k++) {
      const real product = x[i * step + k] * 0;
      sum = product == 0 ? sum : 1;
    }
    zero += sum;
  }
  return zero == 0;
}

static void count(const u64 *rows, const u64 *columns, i64 M, i64 N, i64 words, real *y) {
  for (i64 i = 0; i < M; i++, rows += words, y += N) {
    if (words == 1) {
      const u64 row = rows[0];
      for (i64 j = 0; j < N; j++) y[j] = (real)(i64)__builtin_popcountll(row & columns[j]);
    } else {
      for (i64 j = 0; j < N; j++) {
        i64 n = 0;
        for (i64 k = 0; k < words; k++) n += __builtin_popcountll(rows[k] & columns[j * words + k]);
        y[j] = (real)n;
      }
    }
  }
}

template <int V>
INLINE void add_rows(const u64 *bits, i64 K, const real *values, const real *right, i64 step, real *y, i64 width) {
  vec sum[V] = {};
  for (i64 k = 0; k < K; k += 64)
    for (u64 m = *bits++; m; m &= m - 1) {
      const i64 at = k + __builtin_ctzll(m);
      const real *row = right + at * step;
      if (values)
        for (int v = 0; v < V; v++) sum[v] += *(const vec *)(row + v * LANES) * values[at];
      else
        for (int v = 0; v < V; v++) sum[v] += *(const vec *)(row + v * LANES);
    }
  if (width == V * LANES)
    for (int v = 0; v < V; v++) *(vec *)(y + v * LANES) = sum[v];
  else memcpy(y, sum, width * sizeof(real));
}

static void unit(Args &a, i64 number) {
  const i64 parts = (a.M + a.rows - 1) / a.rows, first = number % parts * a.rows;
  const i64 M = a.M - first < a.rows ? a.M - first : a.rows, K = a.K, N = a.N, words = (K + 63) / 64;
  i64 image = number / parts;
  const real *left = a.a + first * a.a_row, *right = a.b;
  real *y = a.y + (image * a.M + first) * N;
  for (int d = 2; d >= 0; d--) {
    const i64 index = image % a.batch[d];
    image /= a.batch[d];
    left += index * a.a_batch[d];
    right += index * a.b_batch[d];
  }
  i64 step = a.a_row;
  if (a.a_column != 1) {
    real *copied = left_rows.of(M * K);
    copy(left, M, K, a.a_row, a.a_column, copied, K);
    left = copied, step = K;
  }
  u64 *rows = row_bits.of(M * words);
  const bool others = bits_of_rows(left, M, K, step, rows);
  if (a.counts && !others && a.b_row == 1) {
    u64 *columns = column_bits.of(N * words);
    if (!bits_of_rows(right, N, K, a.b_column, columns)) return count(rows, columns, M, N, words, y);
  }
  i64 right_step = a.b_row;
  if (a.b_column != 1 || N % LANES) {
    right_step = (N + LANES - 1) / LANES * LANES;
    real *copied = right_rows.of(K * right_step);
    if (N % LANES) memset(copied, 0, K * right_step * sizeof(real));
    copy(right, K, N, a.b_row, a.b_column, copied, right_step);
    right = copied;
  }
  if (!is_finite(right, K, N, right_step)) {
    a.refusal.store(1, std::memory_order_relaxed);
    return;
  }
  for (i64 i = 0; i < M; i++)
    for (i64 n = 0; n < N; n += FULL) {
      const i64 width = N - n < FULL ? N - n : FULL;
      const real *values = others ? left + i * step : nullptr;
      real *to = y + i * N + n;
      switch ((width + LANES - 1) / LANES) {
        case 1: add_rows<1>(rows + i * words, K, values, right + n, right_step, to, width); break;
        case 2: add_rows<2>(rows + i * words, K, values, right + n, right_step, to, width); break;
        case 3: add_rows<3>(rows + i * words, K, values, right + n, right_step, to, width); break;
        default: add_rows<4>(rows + i * words, K, values, right + n, right_step, to, width);
      }
    }
}

static void work(void *p) {
  Args &a = *(Args *)p;
  const i64 units = a.batch[0] * a.batch[1] * a.batch[2] * ((a.M + a.rows - 1) / a.rows);
  for (i64 k; (k = a.next.fetch_add(1, std::memory_order_relaxed)) < units;) unit(a, k);
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else work(a);
}
"""


MATRIX_PRODUCTS = sources_of(_TEXT)
"""By bytes of an element."""
