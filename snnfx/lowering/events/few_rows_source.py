"""The C++ source of products of few rows with a weight that is read where it lies.

A large weight is read from memory once for all rows. A block of its columns is transposed into the cache, so that an
active input adds one contiguous row of a tile of outputs. Nothing is packed before, so no copy has to be compared with
the weight, and a weight may change at each call.
"""

from __future__ import annotations

from snnfx.lowering.nonzero_lists import sources_of

__all__ = ["BLOCK", "FEW_ROWS"]

BLOCK = 128
"""Columns of the weight at a time."""

_TEXT = r"""
#include <atomic>
constexpr int BLOCK = COLUMNS; // columns of the weight at a time: with a full tile, 32 KB of floats

struct Args {
  const real *x;                 // [rows, K], or null
  const u64 *bits;               // the rows as bits; K is then a multiple of 64
  const real *weight, *bias;     // [M, K] and [M]; bias may be null
  real *y;                       // [parts, rows, M]: the parts of the columns have sums of their own
  i64 rows, K, M, parts, threads;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  std::atomic<i64> next;         // the next unit of work
  double limit, density;         // the density of the bits has to be lower than the limit; else nothing is computed
  std::atomic<i64> refusal;      // 1: it is not, 2: the weight has an element that is not finite
};

#if WIDE
typedef u64 word;
constexpr word MAGNITUDE = 0x7fffffffffffffffull, INFINITE = 0x7ff0000000000000ull;
#else
typedef uint32_t word;
constexpr word MAGNITUDE = 0x7fffffffu, INFINITE = 0x7f800000u;
#endif

// Write `columns` columns of up to LANES rows of the weight as rows of a tile; the missing rows are zeros. Returns
// whether all elements are finite.
#if defined(__AVX512F__) && !WIDE
INLINE bool transpose(const float *w, i64 stride, i64 columns, i64 outputs, float *to, i64 step) {
  const __mmask16 read = columns < 16 ? (__mmask16)((1u << columns) - 1) : (__mmask16)0xffff;
  __m512 r[16], t[16];
  __m512i highest = _mm512_setzero_si512();
  for (int i = 0; i < 16; i++) {
    r[i] = i < outputs ? _mm512_maskz_loadu_ps(read, w + i * stride) : _mm512_setzero_ps();
    highest = _mm512_max_epu32(highest, _mm512_and_si512(_mm512_castps_si512(r[i]), _mm512_set1_epi32(MAGNITUDE)));
  }
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; k++) {
      const __m512d low = _mm512_castps_pd(t[i + k]), high = _mm512_castps_pd(t[i + k + 2]);
      r[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  // r[4 i + c] has, in its lane b of four, column 4 b + c of the rows 4 i to 4 i + 3.
  for (int c = 0; c < 4; c++) {
    const __m512 a0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), a1 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 b0 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 b1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_f32x4(a0, b0, 0x88);
    t[8 + c] = _mm512_shuffle_f32x4(a0, b0, 0xdd);
    t[4 + c] = _mm512_shuffle_f32x4(a1, b1, 0x88);
    t[12 + c] = _mm512_shuffle_f32x4(a1, b1, 0xdd);
  }
  if (columns == 16) {
    for (int i = 0; i < 16; i++) _mm512_storeu_ps(to + i * step, t[i]);
  } else {
    for (i64 i = 0; i < columns; i++) _mm512_storeu_ps(to + i * step, t[i]);
  }
  return _mm512_reduce_max_epu32(highest) < INFINITE;
}
#else
INLINE bool transpose(const real *w, i64 stride, i64 columns, i64 outputs, real *to, i64 step) {
  word highest = 0;
  for (i64 i = 0; i < outputs; i++)
    for (i64 k = 0; k < columns; k++) {
      word bits;
      memcpy(&bits, w + i * stride + k, sizeof bits);
      bits &= MAGNITUDE;
      highest = bits > highest ? bits : highest;
      to[k * step + i] = w[i * stride + k];
    }
  for (i64 i = outputs; i < LANES; i++)
    for (i64 k = 0; k < columns; k++) to[k * step + i] = 0;
  return highest < INFINITE;
}
#endif

// Add the active columns of a block to all rows of one tile.
template <int N>
static void add_block(
    const Args &a, const real *block, i64 k0, i64 n, real *y, const real *bias, i64 width, bool first) {
  real part[FULL];
  const bool is_whole = width == N * LANES;
  for (i64 row = 0; row < a.rows; row++, y += a.M) {
    u64 active[BLOCK / 64], any = 0;
    bool others = false;
    for (i64 k = 0, at = 0; k < n; k += 64, at++) {
      const i64 length = n - k < 64 ? n - k : 64;
      active[at] = a.bits ? a.bits[(row * a.K + k0 + k) / 64] : bits_of(a.x + row * a.K + k0 + k, length, others);
      any |= active[at];
    }
    if (!any && !first) continue;
    real *target = y;
    if (!is_whole) {
      memset(part, 0, sizeof part);
      if (!first) memcpy(part, y, width * sizeof(real));
      else if (bias) memcpy(part, bias, width * sizeof(real));
      target = part;
    }
    const real *start = !first || !is_whole ? target : bias;
    vec sum[N];
    for (int v = 0; v < N; v++) sum[v] = start ? *(const vec *)(start + v * LANES) : (vec){};
    for (i64 k = 0, at = 0; k < n; k += 64, at++)
      for (u64 m = active[at]; m; m &= m - 1) {
        const i64 column = k + __builtin_ctzll(m);
        const real *w = block + column * (N * LANES);
        if (others) {
          const real value = a.x[row * a.K + k0 + column];
          for (int v = 0; v < N; v++) sum[v] += *(const vec *)(w + v * LANES) * value;
        } else {
          for (int v = 0; v < N; v++) sum[v] += *(const vec *)(w + v * LANES);
        }
      }
    for (int v = 0; v < N; v++) *(vec *)(target + v * LANES) = sum[v];
    if (!is_whole) memcpy(y, part, width * sizeof(real));
  }
}

template <int N> static bool tile(const Args &a, i64 m, i64 width, i64 part) {
  alignas(64) real block[BLOCK * N * LANES];
  const i64 blocks = (a.K + BLOCK - 1) / BLOCK, begin = blocks * part / a.parts, end = blocks * (part + 1) / a.parts;
  const real *bias = a.bias && part == 0 ? a.bias + m : nullptr;
  bool is_finite = true;
  for (i64 b = begin; b < end; b++) {
    const i64 k0 = b * BLOCK, n = a.K - k0 < BLOCK ? a.K - k0 : BLOCK;
    for (i64 v = 0; v < N; v++) {
      const real *w = a.weight + (m + v * LANES) * a.K + k0;
      const i64 outputs = width - v * LANES < LANES ? width - v * LANES : LANES;
      for (i64 k = 0; k < n; k += LANES) {
        for (i64 i = 0; i < outputs; i++) __builtin_prefetch(w + i * a.K + k + BLOCK);
        const i64 columns = n - k < LANES ? n - k : LANES;
        is_finite &= transpose(w + k, a.K, columns, outputs, block + k * (N * LANES) + v * LANES, N * LANES);
      }
    }
    add_block<N>(a, block, k0, n, a.y + part * a.rows * a.M + m, bias, width, b == begin);
  }
  return is_finite;
}

static void work(void *p) {
  Args &a = *(Args *)p;
  const i64 tiles = (a.M + FULL - 1) / FULL;
  for (i64 k; (k = a.next.fetch_add(1, std::memory_order_relaxed)) < tiles * a.parts;) {
    const i64 m = k / a.parts * FULL, part = k % a.parts, width = a.M - m < FULL ? a.M - m : FULL;
    bool is_finite;
    switch ((width + LANES - 1) / LANES) {
      case 1: is_finite = tile<1>(a, m, width, part); break;
      case 2: is_finite = tile<2>(a, m, width, part); break;
      case 3: is_finite = tile<3>(a, m, width, part); break;
      default: is_finite = tile<4>(a, m, width, part);
    }
    if (!is_finite) a.refusal.store(2, std::memory_order_relaxed);
  }
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->bits) {
    a->density = density_of(a->bits, a->rows * a->K / 64);
    if (!(a->density < a->limit)) {
      a->refusal = 1;
      return;
    }
  }
  if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else work(a);
}
"""


FEW_ROWS = sources_of(_TEXT, COLUMNS=BLOCK)
"""By bytes of an element."""
