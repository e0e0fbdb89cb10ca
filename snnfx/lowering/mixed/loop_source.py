"""The C++ source of a compiled time loop: products, convolutions, fused kernels, copies, for all steps in one call.

The source is the same for all loops. Its argument is a list of operations; a fused kernel is called by its address.
Each part of the samples runs all time steps without waiting for another part.

A product packs its matrix once for each call, in tiles of outputs. For rows with few elements that are not zero it adds
only the rows of the matrix that these elements select. Both forms add the terms of an output in the same order and fuse
each multiplication with its addition, so for a finite matrix they give the same bits.
"""

from __future__ import annotations

from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource
from snnfx.lowering.mixed.convolution_source import CONVOLUTION
from snnfx.lowering.nonzero_lists import NONZERO_LISTS

__all__ = ["LOOPS", "LOOP_SOURCE"]

_FUSED = r"""
#include <atomic>
// Multiplications and additions of a product are fused; the library of a kernel is compiled without.
#if defined(__clang__)
#define FUSED
#define CONTRACT _Pragma("clang fp contract(fast)")
#else
#define FUSED __attribute__((optimize("fp-contract=fast")))
#define CONTRACT
#endif
"""

_TEXT = r"""
#if defined(__AVX512F__)
// Eight rows of two vectors take half of the registers, and two vectors of 256 inputs fit into the first cache.
constexpr int ROWS = 8, VECTORS_OF_SEVERAL = 2;
#else
constexpr int ROWS = 4, VECTORS_OF_SEVERAL = 1; // sixteen registers of 32 bytes hold four rows of one vector of 64
#endif

// Rows of a product whose lists are built together, the longest list.
constexpr i64 CHUNK = 32, LONGEST = 1 << 15;

// Elements that are not zero, of one row or of each of several rows, up to which lists are faster; in percent.
constexpr i64 LIMIT_OF_ONE = 80, LIMIT_OF_SEVERAL = 40;

struct Ring { // the memory of a value, and the row that each iteration uses
  char *data;
  i64 bytes;
  const i64 *rows;
  char *at(i64 i) const { return data + rows[i] * bytes; }
};
struct Address {
  i64 word; // of the struct of arguments of a fused kernel
  Ring ring;
};
enum Kind { PRODUCT, KERNEL, COPY, SUM, CONVOLUTION };
struct Operation {
  i64 kind, count;                  // count: samples
  Ring out, in, other;
  i64 out_step, in_step;            // from one sample to the next: elements; bytes of a copy
  i64 width;                        // elements of a sample of the result; bytes of a row of a copy
  i64 inputs;                       // of a product
  const real *bias;                 // of a convolution: one element for each channel
  i64 bias_step;
  const real *matrix;
  i64 matrix_row, matrix_column;    // strides
  real *packed;
  i64 by_events;                    // whether a product may visit only elements that are not zero
  void (*run_part)(const void *, i64, i64);
  i64 *words;                       // of a fused kernel: the struct of arguments, once for each part
  i64 word_count;
  const Address *addresses;
  i64 address_count;
  const Convolution *convolution;
  i64 row_count;                    // rows of each sample of a copy
  const i64 *row_from, *row_to;
};
struct Args {
  i64 T;
  Operation *operations;
  i64 operation_count, samples, samples_of_block, parts, longest;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  std::atomic<i64> next; // the next part
  i64 *active;           // for each part and operation: elements of products that were not zero
};

static bool pack(const Operation &o) {
  const i64 padded = (o.width + LANES - 1) / LANES * LANES;
  real *to = o.packed;
  for (i64 m = 0; m < padded; m += FULL) {
    const i64 wide = padded - m < FULL ? padded - m : FULL, filled = o.width - m < wide ? o.width - m : wide;
    const real *from = o.matrix + m * o.matrix_column;
    if (o.matrix_column == 1) {
      for (i64 k = 0; k < o.inputs; k++) memcpy(to + k * wide, from + k * o.matrix_row, filled * sizeof(real));
    } else {
      for (i64 k = 0; k < o.inputs; k += 16) {
        const i64 last = k + 16 < o.inputs ? k + 16 : o.inputs;
        for (i64 j = 0; j < filled; j++)
          for (i64 i = k; i < last; i++) to[i * wide + j] = from[i * o.matrix_row + j * o.matrix_column];
      }
    }
    if (filled < wide)
      for (i64 k = 0; k < o.inputs; k++) memset(to + k * wide + filled, 0, (wide - filled) * sizeof(real));
    to += o.inputs * wide;
  }
  vec zero = {};
  for (const real *p = o.packed; p < to; p += LANES) zero += *(const vec *)p * 0; // NaN if not finite
  bool finite = true;
  for (int i = 0; i < LANES; i++) finite &= zero[i] == 0;
  return finite;
}

// One tile of R rows: all inputs.
template <int R, int V>
FUSED static void dense_tile(const real *x, i64 x_step, i64 K, const real *w, i64 w_step, const real *bias,
                             i64 bias_step, real *y, i64 y_step) {
  CONTRACT
  vec sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = bias ? *(const vec *)(bias + r * bias_step + v * LANES) : (vec){};
  for (i64 k = 0; k < K; k++) {
    vec row[V];
    for (int v = 0; v < V; v++) row[v] = *(const vec *)(w + k * w_step + v * LANES);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] += row[v] * x[r * x_step + k];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) *(vec *)(y + r * y_step + v * LANES) = sum[r][v];
}

// One tile of one row: the inputs of a list.
template <int V, bool ONES>
FUSED static void listed_tile(const uint16_t *rows, const real *x, i64 n, const real *w, const real *bias, real *y) {
  CONTRACT
  vec sum[V];
  for (int v = 0; v < V; v++) sum[v] = bias ? *(const vec *)(bias + v * LANES) : (vec){};
  for (i64 i = 0; i < n; i++) {
    const real *row = w + (u64)rows[i] * (V * LANES);
    for (int v = 0; v < V; v++) {
      if (ONES) sum[v] += *(const vec *)(row + v * LANES);
      else sum[v] += *(const vec *)(row + v * LANES) * x[rows[i]];
    }
  }
  for (int v = 0; v < V; v++) *(vec *)(y + v * LANES) = sum[v];
}

// A tile of V vectors; the vectors of a block of rows are computed one block of vectors after another, so that the
// inputs of the matrix that several blocks of rows read stay in the first cache.
template <int R, int V>
static void dense_rows(i64 rows, const real *x, i64 x_step, i64 K, const real *w, i64 w_step, const real *bias,
                       i64 bias_step, real *y, i64 y_step) {
  for (; rows >= R; rows -= R, x += R * x_step, y += R * y_step) {
    dense_tile<R, V>(x, x_step, K, w, w_step, bias, bias_step, y, y_step);
    if (bias) bias += R * bias_step;
  }
  if constexpr (R > 1)
    if (rows) dense_rows<R / 2, V>(rows, x, x_step, K, w, w_step, bias, bias_step, y, y_step);
}

template <int V>
static void dense_block(i64 rows, const real *x, i64 x_step, i64 K, const real *w, const real *bias, i64 bias_step,
                        real *y, i64 y_step) {
  if (rows == 1) return dense_tile<1, V>(x, x_step, K, w, V * LANES, bias, bias_step, y, y_step);
  constexpr int S = VECTORS_OF_SEVERAL < V ? VECTORS_OF_SEVERAL : V;
  int v = 0;
  for (; v + S <= V; v += S)
    dense_rows<ROWS, S>(rows, x, x_step, K, w + v * LANES, V * LANES, bias ? bias + v * LANES : nullptr, bias_step,
                        y + v * LANES, y_step);
  if constexpr (V % S)
    dense_rows<ROWS, V % S>(rows, x, x_step, K, w + v * LANES, V * LANES, bias ? bias + v * LANES : nullptr, bias_step,
                            y + v * LANES, y_step);
}

struct Lists { // of the rows of a chunk
  uint16_t *rows;
  i64 capacity, counts[CHUNK];
  bool ones[CHUNK], used[CHUNK];
};

template <int V>
static void tile_of_chunk(const Operation &o, const Lists &l, i64 rows, const real *x, const real *w, const real *bias,
                          real *y) {
  for (i64 r = 0; r < rows;) {
    const real *b = bias ? bias + r * o.bias_step : nullptr;
    real *to = y + r * o.out_step;
    if (!l.used[r]) {
      i64 end = r + 1;
      while (end < rows && !l.used[end]) end++;
      dense_block<V>(end - r, x + r * o.in_step, o.in_step, o.inputs, w, b, o.bias_step, to, o.out_step);
      r = end;
      continue;
    }
    const uint16_t *list = l.rows + r * l.capacity;
    if (l.ones[r]) listed_tile<V, true>(list, nullptr, l.counts[r], w, b, to);
    else listed_tile<V, false>(list, x + r * o.in_step, l.counts[r], w, b, to);
    r++;
  }
}

// Results and biases of the last tile that are not whole vectors go through memory of their own.
static void tile(Operation o, const Lists &l, i64 rows, const real *x, const real *w, const real *bias, real *y,
                 i64 wide, real *scratch) {
  const i64 vectors = (wide + LANES - 1) / LANES;
  real *target = y;
  const i64 out_step = o.out_step;
  if (wide % LANES) {
    real *padded = scratch + CHUNK * FULL;
    if (bias) {
      const i64 count = o.bias_step ? rows : 1;
      memset(padded, 0, count * FULL * sizeof(real));
      for (i64 r = 0; r < count; r++) memcpy(padded + r * FULL, bias + r * o.bias_step, wide * sizeof(real));
      o.bias_step = o.bias_step ? FULL : 0;
      bias = padded;
    }
    target = scratch;
    o.out_step = FULL;
  }
  switch (vectors) {
    case 1: tile_of_chunk<1>(o, l, rows, x, w, bias, target); break;
    case 2: tile_of_chunk<2>(o, l, rows, x, w, bias, target); break;
    case 3: tile_of_chunk<3>(o, l, rows, x, w, bias, target); break;
    default: tile_of_chunk<4>(o, l, rows, x, w, bias, target);
  }
  if (target != y)
    for (i64 r = 0; r < rows; r++) memcpy(y + r * out_step, target + r * FULL, wide * sizeof(real));
}

static i64 product(const Operation &o, i64 i, i64 first, i64 last, Lists &l, real *scratch) {
  i64 seen = 0;
  for (i64 begin = first; begin < last; begin += CHUNK) {
    const i64 rows = last - begin < CHUNK ? last - begin : CHUNK;
    const real *x = (const real *)o.in.at(i) + begin * o.in_step;
    for (i64 r = 0; r < rows; r += ROWS) {
      const i64 n = rows - r < ROWS ? rows - r : ROWS;
      for (i64 j = r; j < r + n; j++) l.used[j] = false;
      if (!o.by_events) continue;
      i64 active = 0;
      for (i64 j = r; j < r + n; j++) {
        uint16_t *list = l.rows + j * l.capacity;
        const real *row = x + j * o.in_step;
        bool others = false;
        i64 count = 0;
        for (i64 k = 0; k < o.inputs; k += 64)
          count += append(list + count, bits_of(row + k, o.inputs - k < 64 ? o.inputs - k : 64, others), k);
        l.counts[j] = count;
        l.ones[j] = !others;
        active += count;
      }
      seen += active;
      const bool use = active * 100 <= n * o.inputs * (n == 1 ? LIMIT_OF_ONE : LIMIT_OF_SEVERAL);
      for (i64 j = r; j < r + n; j++) l.used[j] = use;
    }
    const real *w = o.packed;
    for (i64 m = 0; m < o.width; m += FULL) {
      const i64 wide = o.width - m < FULL ? o.width - m : FULL;
      const real *bias = o.bias ? o.bias + begin * o.bias_step + m : nullptr;
      tile(o, l, rows, x, w, bias, (real *)o.out.at(i) + begin * o.out_step + m, wide, scratch);
      w += o.inputs * ((wide + LANES - 1) / LANES * LANES);
    }
  }
  return seen;
}

static void part(Args &a, i64 number) {
  const i64 blocks = (a.samples + a.samples_of_block - 1) / a.samples_of_block;
  const i64 first = blocks * number / a.parts * a.samples_of_block;
  i64 last = blocks * (number + 1) / a.parts * a.samples_of_block;
  if (last > a.samples) last = a.samples;
  Lists l;
  l.capacity = (a.longest + 64 + 31) / 32 * 32;
  l.rows = (uint16_t *)aligned_alloc(64, CHUNK * l.capacity * sizeof(uint16_t));
  real *scratch = (real *)aligned_alloc(64, 2 * CHUNK * FULL * sizeof(real));
  if (!l.rows || !scratch) abort();
  for (i64 i = 0; i < a.T; i++)
    for (i64 k = 0; k < a.operation_count; k++) {
      const Operation &o = a.operations[k];
      const i64 begin = a.parts == 1 ? 0 : first, end = a.parts == 1 ? o.count : last;
      switch (o.kind) {
        case PRODUCT:
          a.active[number * a.operation_count + k] += product(o, i, begin, end, l, scratch);
          break;
        case CONVOLUTION:
          for (i64 n = begin; n < end; n++)
            convolve(*o.convolution, (const real *)o.in.at(i) + n * o.in_step, o.packed, o.bias,
                     (real *)o.out.at(i) + n * o.out_step, number);
          break;
        case KERNEL: {
          i64 *words = o.words + number * o.word_count;
          for (i64 j = 0; j < o.address_count; j++) words[o.addresses[j].word] = (i64)o.addresses[j].ring.at(i);
          o.run_part(words, number, a.parts);
          break;
        }
        case COPY: {
          char *to = o.out.at(i);
          const char *from = o.in.at(i);
          for (i64 n = begin; n < end; n++)
            for (i64 r = 0; r < o.row_count; r++)
              memcpy(to + n * o.out_step + o.row_to[r], from + n * o.in_step + o.row_from[r], o.width);
          break;
        }
        case SUM: {
          real *to = (real *)o.out.at(i);
          const real *x = (const real *)o.in.at(i), *y = (const real *)o.other.at(i);
          for (i64 j = begin * o.width; j < end * o.width; j++) to[j] = x[j] + y[j];
          break;
        }
      }
    }
  free(l.rows);
  free(scratch);
}

static void work(void *p) {
  Args &a = *(Args *)p;
  for (i64 k; (k = a.next.fetch_add(1, std::memory_order_relaxed)) < a.parts;) part(a, k);
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  for (i64 k = 0; k < a->operation_count; k++) {
    Operation &o = a->operations[k];
    if (o.kind == PRODUCT) o.by_events &= pack(o) & (o.inputs <= LONGEST);
    if (o.kind == CONVOLUTION) pack_kernel(*o.convolution, o.matrix, o.packed);
  }
  if (a->parts > 1) a->parallel(work, a, (unsigned)a->parts, 0);
  else work(a);
}
"""


LOOP_SOURCE = NONZERO_LISTS + _FUSED + CONVOLUTION + _TEXT
"""The text for any type `real`."""


def _source(ctype: str) -> KernelSource:
    head = f"#define WIDE {int(ctype == 'double')}\ntypedef {ctype} real;\n"
    return KernelSource(head + LOOP_SOURCE, (), (), 0)


LOOPS = {4: _source("float"), 8: _source("double")}
"""By bytes of an element of a product."""
