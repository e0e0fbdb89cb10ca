"""The C++ source that finds the elements of a row that are not zero, for products that visit only these."""

from __future__ import annotations

from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource

__all__ = ["NONZERO_LISTS", "TILE_BYTES", "VECTOR_BYTES", "sources_of"]

TILE_BYTES = 256
"""Bytes of one row of a full tile: four vectors of 64 bytes."""

VECTOR_BYTES = 64
"""The last tile has as many vectors as its outputs need."""

NONZERO_LISTS = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
typedef int64_t i64;
typedef uint64_t u64;
#define INLINE static inline __attribute__((always_inline))
constexpr int LANES = 64 / sizeof(real), FULL = 4 * LANES;
typedef real vec __attribute__((vector_size(64), aligned(sizeof(real)), may_alias));

// Grows and is kept by its thread: a fresh large block of memory costs page faults at each call.
template <class T> struct Scratch {
  T *data = nullptr;
  i64 size = 0;
  T *of(i64 n) {
    if (n > size) {
      free(data);
      data = (T *)aligned_alloc(64, (n * sizeof(T) + 63) / 64 * 64);
      size = data ? n : 0;
      if (!data) abort();
    }
    return data;
  }
  ~Scratch() { free(data); }
};

// The bits of up to 64 elements that are not zero; sets `others` if one of them is not 1.
INLINE u64 bits_of(const real *x, i64 n, bool &others) {
  u64 active = 0, ones = 0;
#if defined(__AVX512F__)
  if (n == 64) {
    for (int k = 0; k < 64; k += LANES) {
#if WIDE
      __m512d v = _mm512_loadu_pd(x + k);
      active |= (u64)_mm512_cmp_pd_mask(v, _mm512_setzero_pd(), _CMP_NEQ_UQ) << k;
      ones |= (u64)_mm512_cmp_pd_mask(v, _mm512_set1_pd(1), _CMP_EQ_OQ) << k;
#else
      __m512 v = _mm512_loadu_ps(x + k);
      active |= (u64)_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ) << k;
      ones |= (u64)_mm512_cmp_ps_mask(v, _mm512_set1_ps(1), _CMP_EQ_OQ) << k;
#endif
    }
    others |= active != ones;
    return active;
  }
#elif defined(__AVX2__)
  if (n == 64) {
    for (int k = 0; k < 64; k += LANES / 2) {
#if WIDE
      __m256d v = _mm256_loadu_pd(x + k);
      active |= (u64)(unsigned)_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_setzero_pd(), _CMP_NEQ_UQ)) << k;
      ones |= (u64)(unsigned)_mm256_movemask_pd(_mm256_cmp_pd(v, _mm256_set1_pd(1), _CMP_EQ_OQ)) << k;
#else
      __m256 v = _mm256_loadu_ps(x + k);
      active |= (u64)(unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)) << k;
      ones |= (u64)(unsigned)_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(1), _CMP_EQ_OQ)) << k;
#endif
    }
    others |= active != ones;
    return active;
  }
#endif
  for (i64 k = 0; k < n; k++) {
    active |= (u64)(x[k] != 0) << k;
    ones |= (u64)(x[k] == 1) << k;
  }
  others |= active != ones;
  return active;
}

// The fraction of bits that are set, in at most 256 words at scattered places, the same ones at each call.
INLINE double density_of(const u64 *bits, i64 words) {
  const i64 sampled = words < 256 ? words : 256;
  i64 active = 0;
  u64 state = 0x9e3779b97f4a7c15ull;
  for (i64 k = 0; k < sampled; k++) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const i64 first = words * k / sampled, last = words * (k + 1) / sampled;
    active += __builtin_popcountll(bits[first + (i64)((state >> 33) % (u64)(last - first))]);
  }
  return sampled ? (double)active / (64.0 * sampled) : 0.0;
}

// Append the numbers of the bits of a word, plus `base`, to a list; writes up to 64 entries behind its end.
INLINE i64 append(uint16_t *rows, u64 m, i64 base) {
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
  alignas(64) static const uint8_t numbers[64] = {
      0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const __m512i packed = _mm512_maskz_compress_epi8(m, _mm512_load_si512(numbers));
  const __m512i from = _mm512_set1_epi16((short)base);
  const i64 n = __builtin_popcountll(m);
  _mm512_storeu_si512(rows, _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed)), from));
  if (__builtin_expect(n > 32, 0)) {
    const __m512i high = _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(packed, 1));
    _mm512_storeu_si512(rows + 32, _mm512_add_epi16(high, from));
  }
  return n;
#else
  i64 n = 0;
  for (; m; m &= m - 1) rows[n++] = (uint16_t)(base + __builtin_ctzll(m));
  return n;
#endif
}
"""


def sources_of(text: str, **numbers: int) -> dict[int, KernelSource]:
    """The sources of a kernel on floats and on doubles, by bytes of an element.

    Args:
        text: the source behind `NONZERO_LISTS`.
        numbers: macros.
    """

    def source(ctype: str) -> KernelSource:
        macros = {**numbers, "WIDE": int(ctype == "double")}
        head = "".join(f"#define {name} {number}\n" for name, number in macros.items())
        return KernelSource(f"{head}typedef {ctype} real;\n{NONZERO_LISTS}{text}", (), (), 0)

    return {4: source("float"), 8: source("double")}
