"""Prelude of every generated C++ kernel: operands, loading of blocks, and mathematical functions that vectorise.

libm's `exp` and similar functions take one number per call; here they are branch-free polynomials, which compilers
vectorise. Errors are a few units in the last place; infinities, NaN, underflow and overflow behave as in libm.

Range reduction by Cody & Waite (1980), "Software Manual for the Elementary Functions"; for the shift constant that
rounds to an integer in the low bits of the significand see Muller (2016), "Elementary Functions", section 11.2.
"""

from __future__ import annotations

__all__ = ["BITS", "PRELUDE"]

PRELUDE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
typedef int64_t i64;
#define RESTRICT __restrict__
#if defined(__clang__)
#define EACH _Pragma("clang loop vectorize(enable)")
#else
#define EACH _Pragma("GCC ivdep")
#endif
#define INLINE static inline __attribute__((always_inline))

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
template <class To, class From> INLINE To bits_of(From x) { return __builtin_bit_cast(To, x); }

template <class C, class M> INLINE C widened(M x) { return (C)x; }
template <> inline float widened<float, bf16>(bf16 x) { return bits_of<float>((uint32_t)x.bits << 16); }
template <> inline double widened<double, bf16>(bf16 x) { return widened<float, bf16>(x); }
template <> inline float widened<float, f16>(f16 x) {
  uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  float subnormal = bits_of<float>(sign | 0x3f800000u) * ((float)rest * 0x1p-24f);
  float normal = bits_of<float>(sign | ((rest << 13) + 0x38000000u));
  float special = bits_of<float>(sign | (rest << 13) | 0x7f800000u);
  return rest < 0x400u ? subnormal : (rest >= 0x7c00u ? special : normal);
}
template <> inline double widened<double, f16>(f16 x) { return widened<float, f16>(x); }

template <class M, class C> struct Narrow { static inline M of(C x) { return (M)x; } };
template <class C> struct Narrow<uint8_t, C> { static inline uint8_t of(C x) { return x != 0; } };
template <class C> struct Narrow<bf16, C> {
  static inline bf16 of(C y) {
    float x = (float)y;
    uint32_t u = bits_of<uint32_t>(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return bf16{(uint16_t)(x == x ? rounded : 0x7fc0u)};
  }
};
template <class C> struct Narrow<f16, C> {
  static inline f16 of(C y) {
    float x = (float)y;
    uint32_t u = bits_of<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return f16{(uint16_t)(sign | 0x7e00u)};
    if (a >= 0x477ff000u) return f16{(uint16_t)(sign | 0x7c00u)};
    if (a < 0x38800000u) {
      // Adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded to even.
      uint32_t low = bits_of<uint32_t>(bits_of<float>(a) + 0.5f) - 0x3f000000u;
      return f16{(uint16_t)(sign | low)};
    }
    uint32_t odd = (a >> 13) & 1u;
    return f16{(uint16_t)(sign | ((a - 0x38000000u + 0xfffu + odd) >> 13))};
  }
};

struct Operand {
  char *data;        // null: a constant operand, `fill`
  i64 time;          // elements from one time step to the next
  i64 dense;         // the elements of a step are consecutive
  double fill;
  i64 stride[MAX_DIMS];
};
struct Args {
  i64 T, E, block, threads, dims;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  int (*thread)();
  int (*team)();
  i64 size[MAX_DIMS];
  double literal[LITERALS];
  Operand operand[OPERANDS];
};

// Calls `run_of(i, offset, length, stride)` for the runs of elements [start, start + n) of a step along its last
// dimension: element i of the block is at `offset` in the operand.
template <class F> INLINE void each_run(const Operand &o, const Args &a, i64 start, i64 n, F run_of) {
  i64 place[MAX_DIMS], rest = start, offset = 0, last = a.dims - 1;
  for (i64 d = last; d >= 0; d--) {
    place[d] = rest % a.size[d];
    rest /= a.size[d];
    offset += place[d] * o.stride[d];
  }
  for (i64 i = 0; i < n;) {
    i64 length = a.size[last] - place[last];
    if (length > n - i) length = n - i;
    const i64 stride = o.stride[last];
    run_of(i, offset, length, stride);
    i += length;
    place[last] += length;
    offset += length * stride;
    for (i64 d = last; d > 0 && place[d] == a.size[d]; d--) {
      offset += o.stride[d - 1] - place[d] * o.stride[d];
      place[d] = 0;
      place[d - 1]++;
    }
  }
}
// Elements [start, start + n) of one step of an operand, through its strides.
template <class M, class C>
static __attribute__((noinline)) void gather(C *RESTRICT to, const Operand &o, const Args &a, i64 t, i64 start, i64 n) {
  if (!o.data) {
    for (i64 i = 0; i < n; i++) to[i] = (C)o.fill;
    return;
  }
  const M *RESTRICT from = (const M *)o.data + t * o.time;
  if (o.dense) {
    for (i64 i = 0; i < n; i++) to[i] = widened<C, M>(from[start + i]);
    return;
  }
  each_run(o, a, start, n, [=](i64 i, i64 offset, i64 length, i64 stride) {
    if (stride == 0) {
      const C value = widened<C, M>(from[offset]);
      for (i64 j = 0; j < length; j++) to[i + j] = value;
    } else if (stride == 1) {
      for (i64 j = 0; j < length; j++) to[i + j] = widened<C, M>(from[offset + j]);
    } else {
      for (i64 j = 0; j < length; j++) to[i + j] = widened<C, M>(from[offset + j * stride]);
    }
  });
}
template <class M, class C> struct Loader {
  static inline const C *at(C *buffer, const Operand &o, const Args &a, i64 t, i64 start, i64 n) {
    gather<M, C>(buffer, o, a, t, start, n);
    return buffer;
  }
};
template <class C> struct Loader<C, C> {
  static inline const C *at(C *buffer, const Operand &o, const Args &a, i64 t, i64 start, i64 n) {
    if (o.data && o.dense) return (const C *)o.data + t * o.time + start;
    gather<C, C>(buffer, o, a, t, start, n);
    return buffer;
  }
};
// Whether all blocks of a step read the same values of an operand: one number, or one for each index of the last
// dimension (a channel) whose size divides the block length. A dense operand is read in place, never copied.
static inline bool repeats(const Operand &o, const Args &a) {
  if (!o.data) return true;
  if (o.dense) return false;
  const i64 last = a.dims - 1;
  for (i64 d = 0; d < last; d++)
    if (o.stride[d]) return false;
  return !o.stride[last] || a.block % a.size[last] == 0;
}
template <class M, class C> static void store(const Operand &o, i64 t, i64 start, i64 n, const C *RESTRICT from) {
  M *RESTRICT to = (M *)o.data + t * o.time + start;
  for (i64 i = 0; i < n; i++) to[i] = Narrow<M, C>::of(from[i]);
}
template <class C> static double total(const C *RESTRICT x, i64 n) {
  double part[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  i64 i = 0;
  for (; i + 8 <= n; i += 8)
    for (i64 j = 0; j < 8; j++) part[j] += (double)x[i + j];
  double sum = 0;
  for (; i < n; i++) sum += (double)x[i];
  for (i64 j = 0; j < 8; j++) sum += part[j];
  return sum;
}
static const i64 SUM_BLOCKS = 64;
// A sum over time of each element or, if the operand broadcasts, its sum over the elements that share a value, added to
// the float64 numbers of one part of the work.
template <class C> static void keep_sum(const Operand &o, const Args &a, i64 number, i64 start, i64 n, const C *x) {
  if (o.dense) {
    store<C, C>(o, 0, start, n, x);
    return;
  }
  double *to = (double *)o.data + number * o.time;
  each_run(o, a, start, n, [=](i64 i, i64 offset, i64 length, i64 stride) {
    if (stride == 0) {
      to[offset] += total<C>(x + i, length);
    } else if (stride == 1) {
      for (i64 j = 0; j < length; j++) to[offset + j] += (double)x[i + j];
    } else {
      for (i64 j = 0; j < length; j++) to[offset + j * stride] += (double)x[i + j];
    }
  });
}

template <class C> struct Number;
template <> struct Number<float> {
  typedef int32_t Int;
  static constexpr float shift = 12582912.0f, log2e = 1.44269504088896341f, ln2_high = 0.693359375f,
                         ln2_low = -2.12194440054690583e-4f, least = -104.0f, most = 89.0f;
  static constexpr int digits = 23, bias = 127;
  static constexpr float limit = 87.0f, smallest = 1.17549435e-38f, up = 0x1p24f, steps = 24.0f;
};
template <> struct Number<double> {
  typedef int64_t Int;
  static constexpr double shift = 6755399441055744.0, log2e = 1.4426950408889634074, ln2_high = 6.93145751953125e-1,
                          ln2_low = 1.42860682030941723212e-6, least = -746.0, most = 710.0;
  static constexpr int digits = 52, bias = 1023;
  static constexpr double limit = 708.0, smallest = 2.2250738585072014e-308, up = 0x1p54, steps = 54.0;
};
template <class C> INLINE C power_of_two(C n) {
  typedef typename Number<C>::Int Int;
  return bits_of<C>((Int)((bits_of<Int>(n + Number<C>::shift) + (Int)Number<C>::bias) << Number<C>::digits));
}
// Used only by the functions below; the arithmetic of a step is never contracted.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE double fma_(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
INLINE float fma_(float a, float b, float c) { return a * b + c; }
INLINE double fma_(double a, double b, double c) { return a * b + c; }
#endif
// exp(r) - 1 for |r| <= ln(2) / 2, by its Taylor series.
INLINE float small_expm1(float r) {
  float p = 1.9841270e-4f;
  p = fma_(p, r, 1.3888889e-3f); p = fma_(p, r, 8.3333333e-3f); p = fma_(p, r, 4.1666667e-2f);
  p = fma_(p, r, 1.6666667e-1f); p = fma_(p, r, 0.5f);
  return fma_(p * r, r, r);
}
INLINE double small_expm1(double r) {
  double p = 1.0 / 6227020800.0;
  p = fma_(p, r, 1.0 / 479001600.0); p = fma_(p, r, 1.0 / 39916800.0); p = fma_(p, r, 1.0 / 3628800.0);
  p = fma_(p, r, 1.0 / 362880.0); p = fma_(p, r, 1.0 / 40320.0); p = fma_(p, r, 1.0 / 5040.0);
  p = fma_(p, r, 1.0 / 720.0); p = fma_(p, r, 1.0 / 120.0); p = fma_(p, r, 1.0 / 24.0);
  p = fma_(p, r, 1.0 / 6.0); p = fma_(p, r, 0.5);
  return fma_(p * r, r, r);
}
// x = n ln(2) + r with |r| <= ln(2) / 2.
template <class C> INLINE C nearest_power(C x) {
  return fma_(x, Number<C>::log2e, Number<C>::shift) - Number<C>::shift;
}
template <class C> INLINE C rest_of(C x, C n) {
  return fma_(-n, Number<C>::ln2_low, fma_(-n, Number<C>::ln2_high, x));
}
template <class C> INLINE C between(C x, C low, C high) {
  x = x < low ? low : x;  // NaN stays
  return x > high ? high : x;
}
template <class C> INLINE C exp_(C x) {
  typedef Number<C> N;
  x = between(x, N::least, N::most);
  C n = nearest_power(x), r = rest_of(x, n);
  C half = (n * (C)0.5 + N::shift) - N::shift;
  return ((small_expm1(r) + (C)1) * power_of_two<C>(half)) * power_of_two<C>(n - half);
}
template <class C> INLINE C expm1_(C x) {
  typedef Number<C> N;
  x = between(x, N::least, N::most);
  C n = nearest_power(x), r = rest_of(x, n);
  C half = (n * (C)0.5 + N::shift) - N::shift;
  C a = power_of_two<C>(half), b = power_of_two<C>(n - half), p = small_expm1(r);
  // 2^n (expm1(r) + 1 - 2^-n), with 2^n as a product of two finite factors.
  C small = a * (p * b) + (a * b - (C)1);
  return n > (C)(N::bias - 1) ? ((p + (C)1) * a) * b : small;
}
template <class C> INLINE C sigmoid_(C x) {
  // exp(-x) between the limits, where one power of two is enough; below them the result underflows.
  typedef Number<C> N;
  C y = between<C>(-x, -N::limit, N::limit);
  C n = nearest_power(y), e = power_of_two<C>(n);
  C s = (C)1 / ((C)1 + fma_(small_expm1(rest_of(y, n)), e, e));
  return x < -N::limit ? (C)0 : s;
}
template <class C> INLINE C tanh_(C x) {
  C y = x > (C)22 ? (C)22 : x;
  y = y < (C)-22 ? (C)-22 : y;
  C e = expm1_<C>(y + y);
  return e / (e + (C)2);
}
// atanh(s) / s - 1.
INLINE float atanh_series(float s) {
  float z = s * s, p = 1.0f / 11;
  p = p * z + 1.0f / 9; p = p * z + 1.0f / 7; p = p * z + 1.0f / 5; p = p * z + 1.0f / 3;
  return p * z;
}
INLINE double atanh_series(double s) {
  double z = s * s, p = 1.0 / 23;
  p = p * z + 1.0 / 21; p = p * z + 1.0 / 19; p = p * z + 1.0 / 17; p = p * z + 1.0 / 15; p = p * z + 1.0 / 13;
  p = p * z + 1.0 / 11; p = p * z + 1.0 / 9; p = p * z + 1.0 / 7; p = p * z + 1.0 / 5; p = p * z + 1.0 / 3;
  return p * z;
}
template <class C> INLINE C log_(C x) {
  typedef Number<C> N;
  typedef typename N::Int Int;
  C y = x < N::smallest ? x * N::up : x, less = x < N::smallest ? N::steps : (C)0;
  Int b = bits_of<Int>(y), one = (Int)N::bias << N::digits;
  C f = bits_of<C>((Int)((b & (((Int)1 << N::digits) - 1)) | one));
  // The exponent, by the shift constant: there is no vector conversion of 64-bit integers.
  Int e = (b >> N::digits) & (((Int)1 << (sizeof(C) * 8 - 1 - N::digits)) - 1);
  C n = (bits_of<C>((Int)(e + bits_of<Int>(N::shift))) - N::shift) - (C)N::bias - less;
  C upper = f > (C)1.41421356237309505 ? (C)1 : (C)0;
  f = f * ((C)1 - (C)0.5 * upper);
  n = n + upper;
  C g = f - (C)1, s = g / (f + (C)1);
  // log f = 2 atanh(s) = g - (g^2/2 - s (g^2/2 + R)), which keeps the digits of g.
  C h = (C)0.5 * g * g, R = (C)2 * atanh_series(s);
  C y1 = n * N::ln2_high + (g - (h - (s * (h + R) + n * N::ln2_low)));
  y1 = x == (C)0 ? -(C)INFINITY : y1;
  y1 = x < (C)0 ? (C)NAN : y1;
  y1 = x == (C)INFINITY ? x : y1;
  return x != x ? x : y1;
}
template <class C> INLINE C log1p_(C x) {
  C u = (C)1 + x, d = u - (C)1;
  C y = log_<C>(u) * (x / (d == (C)0 ? (C)1 : d));
  y = d == (C)0 ? x : y;
  return (u == (C)INFINITY) | (u == (C)0) ? log_<C>(u) : y;
}
INLINE float atan_series(float z) {
  float p = -1.0f / 19;
  p = p * z + 1.0f / 17; p = p * z - 1.0f / 15; p = p * z + 1.0f / 13; p = p * z - 1.0f / 11; p = p * z + 1.0f / 9;
  p = p * z - 1.0f / 7; p = p * z + 1.0f / 5; p = p * z - 1.0f / 3;
  return p;
}
INLINE double atan_series(double z) {
  double p = 1.0 / 41;
  p = p * z - 1.0 / 39; p = p * z + 1.0 / 37; p = p * z - 1.0 / 35; p = p * z + 1.0 / 33; p = p * z - 1.0 / 31;
  p = p * z + 1.0 / 29; p = p * z - 1.0 / 27; p = p * z + 1.0 / 25; p = p * z - 1.0 / 23; p = p * z + 1.0 / 21;
  p = p * z - 1.0 / 19; p = p * z + 1.0 / 17; p = p * z - 1.0 / 15; p = p * z + 1.0 / 13; p = p * z - 1.0 / 11;
  p = p * z + 1.0 / 9; p = p * z - 1.0 / 7; p = p * z + 1.0 / 5; p = p * z - 1.0 / 3;
  return p;
}
template <class C> INLINE C atan_(C x) {
  C a = x < (C)0 ? -x : x;
  C high = a > (C)2.41421356237309505 ? (C)1 : (C)0;
  C middle = (a > (C)0.41421356237309505) & (a <= (C)2.41421356237309505) ? (C)1 : (C)0;
  C top = high != (C)0 ? (C)-1 : (middle != (C)0 ? a - (C)1 : a);
  C bottom = high != (C)0 ? a : (middle != (C)0 ? a + (C)1 : (C)1);
  C r = top / bottom, base = high * (C)1.57079632679489662 + middle * (C)0.785398163397448310;
  C z = r * r;
  C y = base + (r + r * z * atan_series(z));
  return x < (C)0 ? -y : (x == (C)0 ? x : y);
}
template <class C> INLINE C maximum_(C a, C b) { return (a > b) | (a != a) ? a : b; }
template <class C> INLINE C minimum_(C a, C b) { return (a < b) | (a != a) ? a : b; }
template <class C> INLINE C sign_(C a) { return (a > (C)0 ? (C)1 : (C)0) - (a < (C)0 ? (C)1 : (C)0); }
INLINE float rooted(float a) { return __builtin_sqrtf(a); }
INLINE double rooted(double a) { return __builtin_sqrt(a); }
INLINE float absolute(float a) { return __builtin_fabsf(a); }
INLINE double absolute(double a) { return __builtin_fabs(a); }
INLINE int32_t absolute(int32_t a) { return (int32_t)(a < 0 ? -(uint32_t)a : (uint32_t)a); }
INLINE i64 absolute(i64 a) { return (i64)(a < 0 ? -(uint64_t)a : (uint64_t)a); }
#define BOTH(name, f, d) INLINE float name(float a) { return f(a); } INLINE double name(double a) { return d(a); }
BOTH(floor_, __builtin_floorf, __builtin_floor) BOTH(ceil_, __builtin_ceilf, __builtin_ceil)
BOTH(trunc_, __builtin_truncf, __builtin_trunc) BOTH(round_, __builtin_nearbyintf, __builtin_nearbyint)
BOTH(erf_, erff, erf) BOTH(erfc_, erfcf, erfc) BOTH(sin_, sinf, sin) BOTH(cos_, cosf, cos) BOTH(tan_, tanf, tan)
BOTH(asin_, asinf, asin) BOTH(acos_, acosf, acos) BOTH(sinh_, sinhf, sinh) BOTH(cosh_, coshf, cosh)
BOTH(log2_, log2f, log2) BOTH(log10_, log10f, log10) BOTH(exp2_, exp2f, exp2)
INLINE float pow_(float a, float b) { return powf(a, b); }
INLINE double pow_(double a, double b) { return pow(a, b); }
INLINE float fmod_(float a, float b) { return fmodf(a, b); }
INLINE double fmod_(double a, double b) { return fmod(a, b); }
INLINE int32_t fmod_(int32_t a, int32_t b) { return a % b; }
INLINE i64 fmod_(i64 a, i64 b) { return a % b; }
INLINE float atan2_(float a, float b) { return atan2f(a, b); }
INLINE double atan2_(double a, double b) { return atan2(a, b); }
"""

BITS = r"""
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

// Write which of the elements [start, start + n) of one step are not zero, one bit each; `start` is a multiple of 64.
template <class C>
static void store_bits(const Operand &o, const Args &a, i64 t, i64 start, i64 n, const C *RESTRICT from) {
  uint64_t *to = (uint64_t *)o.data + (t * a.E + start) / 64;
  for (i64 i = 0; i < n; i += 64, from += 64) {
    uint64_t word = 0;
    if constexpr (sizeof(C) == 4) {
#if defined(__AVX512F__)
      for (int k = 0; k < 64; k += 16) {
        const __m512 x = _mm512_loadu_ps((const float *)from + k);
        word |= (uint64_t)_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ) << k;
      }
      *to++ = word;
      continue;
#elif defined(__AVX2__)
      for (int k = 0; k < 64; k += 8) {
        const __m256 x = _mm256_loadu_ps((const float *)from + k);
        word |= (uint64_t)(unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ)) << k;
      }
      *to++ = word;
      continue;
#endif
    }
    for (int k = 0; k < 64; k++) word |= (uint64_t)(from[k] != 0) << k;
    *to++ = word;
  }
}
"""
"""What a kernel needs in addition if it writes its output as bits; the elements of a step are a multiple of 64."""
