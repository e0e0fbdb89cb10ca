"""The C++ source of the gradient of a weight, `x^T grad`, that visits only the elements of `x` that are not zero.

A tile of outputs of a block of rows stays in the first cache. The rows of the block in which an input is not zero form
the list of this input, so that its sum is in registers over the whole list.
"""

from __future__ import annotations

from snnfx.lowering.nonzero_lists import sources_of

__all__ = ["GRADIENTS"]

_TEXT = r"""
// Rows and inputs of a block: a tile of the rows has 32 KB.
constexpr i64 ROWS = 128, INPUTS = 2048;

struct Args {
  const real *x, *grad;          // [rows, inputs], [rows, outputs]
  real *out;                     // [inputs, outputs], zero
  i64 rows, inputs, outputs, x_step, grad_step, threads;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  i64 next, finite;              // the next part; whether all elements of `grad` are finite
};

struct Block { // the lists of the inputs, one behind the other
  i64 starts[INPUTS + 1];
  uint16_t found[ROWS * INPUTS + 64], rows[ROWS * INPUTS];
  real values[ROWS * INPUTS];
  bool ones;
};

static void list_block(const Args &a, i64 first_row, i64 rows, i64 first_input, i64 inputs, Block &b) {
  i64 ends[ROWS], count = 0;
  bool others = false;
  memset(b.starts, 0, sizeof b.starts);
  for (i64 r = 0; r < rows; r++) {
    const real *x = a.x + (first_row + r) * a.x_step + first_input;
    const i64 before = count;
    for (i64 k = 0; k < inputs; k += 64)
      count += append(b.found + count, bits_of(x + k, inputs - k < 64 ? inputs - k : 64, others), k);
    for (i64 j = before; j < count; j++) b.starts[b.found[j] + 1]++;
    ends[r] = count;
  }
  for (i64 k = 0; k < inputs; k++) b.starts[k + 1] += b.starts[k];
  b.ones = !others;
  for (i64 r = 0, j = 0; r < rows; r++) {
    const real *x = a.x + (first_row + r) * a.x_step + first_input;
    for (; j < ends[r]; j++) {
      const i64 k = b.found[j], place = b.starts[k]++;
      b.rows[place] = (uint16_t)r;
      if (others) b.values[place] = x[k];
    }
  }
  for (i64 k = inputs; k > 0; k--) b.starts[k] = b.starts[k - 1];
  b.starts[0] = 0;
}

template <int V, bool ONES>
static void add_lists(const Block &b, i64 inputs, const real *tile, real *out, i64 out_step) {
  for (i64 k = 0; k < inputs; k++) {
    const i64 end = b.starts[k + 1];
    i64 j = b.starts[k];
    if (j == end) continue;
    vec sum[V];
    for (int v = 0; v < V; v++) sum[v] = *(const vec *)(out + k * out_step + v * LANES);
    for (; j < end; j++) {
      const real *g = tile + b.rows[j] * FULL;
      for (int v = 0; v < V; v++) {
        if (ONES) sum[v] += *(const vec *)(g + v * LANES);
        else sum[v] += *(const vec *)(g + v * LANES) * b.values[j];
      }
    }
    for (int v = 0; v < V; v++) *(vec *)(out + k * out_step + v * LANES) = sum[v];
  }
}

template <int V>
static void add_tile(const Block &b, i64 inputs, const real *tile, real *out, i64 out_step) {
  if (b.ones) add_lists<V, true>(b, inputs, tile, out, out_step);
  else add_lists<V, false>(b, inputs, tile, out, out_step);
}

// NaN unless all elements are finite.
static real check(const real *x, i64 n, real sum) {
  vec zero = {};
  i64 k = 0;
  for (; k + LANES <= n; k += LANES) zero += *(const vec *)(x + k) * 0;
  for (int i = 0; i < LANES; i++) sum += zero[i];
  for (; k < n; k++) sum += x[k] * 0;
  return sum;
}

// A part computes a range of outputs.
static void part(Args &a, i64 number) {
  const i64 tiles = (a.outputs + FULL - 1) / FULL;
  const i64 first = tiles * number / a.threads * FULL, end = tiles * (number + 1) / a.threads * FULL;
  const i64 last = end < a.outputs ? end : a.outputs;
  if (first >= last) return;
  Block *b = (Block *)malloc(sizeof(Block));
  real *tile = (real *)aligned_alloc(64, (ROWS + INPUTS) * FULL * sizeof(real)), *padded = tile + ROWS * FULL;
  if (!b || !tile) abort();
  real zero = 0;
  for (i64 r = 0; r < a.rows; r += ROWS) {
    const i64 rows = a.rows - r < ROWS ? a.rows - r : ROWS;
    for (i64 j = r; j < r + rows; j++) zero = check(a.grad + j * a.grad_step + first, last - first, zero);
    for (i64 k = 0; k < a.inputs; k += INPUTS) {
      const i64 inputs = a.inputs - k < INPUTS ? a.inputs - k : INPUTS;
      list_block(a, r, rows, k, inputs, *b);
      for (i64 m = first; m < last; m += FULL) {
        const i64 wide = last - m < FULL ? last - m : FULL;
        const real *grad = a.grad + r * a.grad_step + m;
        real *out = a.out + k * a.outputs + m;
        i64 out_step = a.outputs;
        // Rows at a distance of a power of two would compete for a few lines of the cache.
        for (i64 j = 0; j < rows; j++) memcpy(tile + j * FULL, grad + j * a.grad_step, wide * sizeof(real));
        if (wide % LANES) { // results that are not whole vectors go through memory of their own
          for (i64 j = 0; j < inputs; j++) memcpy(padded + j * FULL, out + j * out_step, wide * sizeof(real));
          out = padded;
          out_step = FULL;
        }
        switch ((wide + LANES - 1) / LANES) {
          case 1: add_tile<1>(*b, inputs, tile, out, out_step); break;
          case 2: add_tile<2>(*b, inputs, tile, out, out_step); break;
          case 3: add_tile<3>(*b, inputs, tile, out, out_step); break;
          default: add_tile<4>(*b, inputs, tile, out, out_step);
        }
        if (wide % LANES)
          for (i64 j = 0; j < inputs; j++)
            memcpy(a.out + (k + j) * a.outputs + m, out + j * FULL, wide * sizeof(real));
      }
    }
  }
  if (zero != 0) __atomic_store_n(&a.finite, 0, __ATOMIC_RELAXED);
  free(tile);
  free(b);
}

static void work(void *p) {
  Args &a = *(Args *)p;
  for (i64 k; (k = __atomic_fetch_add(&a.next, 1, __ATOMIC_RELAXED)) < a.threads;) part(a, k);
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else work(a);
}
"""


GRADIENTS = sources_of(_TEXT)
"""By bytes of an element."""
