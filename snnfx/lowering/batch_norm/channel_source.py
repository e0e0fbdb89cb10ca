"""C++ source of passes over the channels of a batch.

A batch is row-major, `[outer, channels, inner]`, or has its channels last: `inner` is then 1. Mean and sum of squared
deviations are computed for blocks that fit the L1 cache and merged in float64, so one pass over the memory suffices and
nothing cancels: a second sum over the block corrects the rounding of its mean.

Source: Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource

__all__ = ["SOURCES"]

_TEXT = """
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
typedef int64_t i64;
typedef REAL real;

struct Args {
  i64 mode;                  // 0: the statistics, 1: add the gradient through them
  const real *x;
  real *grad;                // of the batch, changed in place
  i64 outer, channels, inner;
  real *mean, *scale, *shift, *inverse;  // [channels]: results of the statistics
  const real *weight, *bias; // null: ones, zeros
  real *running_mean, *running_var;  // null: not updated
  double factor, eps;
  const real *of_scale, *of_bias;  // [channels]: gradients of scale and shift; null: zeros
  real *of_weight;           // [channels]: the gradient of the weight; null: not wanted
  double *partial;           // [parts][channels][2]
  i64 parts, threads;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  std::atomic<i64> next;     // the next part of the work
};

static const i64 LANES = 64 / sizeof(real), BLOCK = 1024, ROWS = 64, TILE = 256;

struct Moments {
  double mean, squares, count;
  void merge(double other, double other_squares, double n) {
    double total = count + n, difference = other - mean;
    mean += difference * (n / total);
    squares += other_squares + difference * difference * (count * n / total);
    count = total;
  }
};

static void moments_of_block(const real *x, i64 n, Moments &m) {
  real sums[LANES] = {0}, squares[LANES] = {0};
  i64 whole = n - n % LANES;
  for (i64 i = 0; i < whole; i += LANES)
    for (i64 j = 0; j < LANES; j++) sums[j] += x[i + j];
  for (i64 i = whole; i < n; i++) sums[i - whole] += x[i];
  double sum = 0;
  for (i64 j = 0; j < LANES; j++) sum += sums[j];
  real mean = (real)(sum / n);
  for (i64 j = 0; j < LANES; j++) sums[j] = 0;
  for (i64 i = 0; i < whole; i += LANES)
    for (i64 j = 0; j < LANES; j++) {
      real d = x[i + j] - mean;
      sums[j] += d;
      squares[j] += d * d;
    }
  for (i64 i = whole; i < n; i++) {
    real d = x[i] - mean;
    sums[i - whole] += d;
    squares[i - whole] += d * d;
  }
  double rest = 0, total = 0;  // `rest` is the rounding of the mean
  for (i64 j = 0; j < LANES; j++) rest += sums[j], total += squares[j];
  rest /= n;
  m.merge((double)mean + rest, total - n * rest * rest, (double)n);
}

static void statistics_of_rows(Args &a, i64 first, i64 last, double *partial) {
  for (i64 c0 = 0; c0 < a.channels; c0 += TILE) {
    i64 width = a.channels - c0 < TILE ? a.channels - c0 : TILE;
    double mean[TILE], squares[TILE];
    real sums[TILE], means[TILE], rests[TILE], of_block[TILE];
    for (i64 c = 0; c < width; c++) mean[c] = squares[c] = 0;
    double count = 0;
    for (i64 r0 = first; r0 < last; r0 += ROWS) {
      i64 rows = last - r0 < ROWS ? last - r0 : ROWS;
      const real *block = a.x + r0 * a.channels + c0;
      for (i64 c = 0; c < width; c++) sums[c] = rests[c] = of_block[c] = 0;
      for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < width; c++) sums[c] += block[r * a.channels + c];
      for (i64 c = 0; c < width; c++) means[c] = sums[c] / (real)rows;
      for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < width; c++) {
          real d = block[r * a.channels + c] - means[c];
          rests[c] += d;
          of_block[c] += d * d;
        }
      double total = count + rows, share = rows / total, both = count * rows / total;
      for (i64 c = 0; c < width; c++) {
        double rest = (double)rests[c] / rows, difference = (double)means[c] + rest - mean[c];
        mean[c] += difference * share;
        squares[c] += (double)of_block[c] - rows * rest * rest + difference * difference * both;
      }
      count = total;
    }
    for (i64 c = 0; c < width; c++) {
      partial[2 * (c0 + c)] = mean[c];
      partial[2 * (c0 + c) + 1] = squares[c];
    }
  }
}

static void statistics_of_channels(Args &a, i64 first, i64 last) {
  for (i64 c = first; c < last; c++) {
    Moments m = {0, 0, 0};
    for (i64 o = 0; o < a.outer; o++) {
      const real *row = a.x + (o * a.channels + c) * a.inner;
      for (i64 i = 0; i < a.inner; i += BLOCK) moments_of_block(row + i, a.inner - i < BLOCK ? a.inner - i : BLOCK, m);
    }
    a.partial[2 * c] = m.mean;
    a.partial[2 * c + 1] = m.squares;
  }
}

// The gradient through mean and variance is `offset + slope * (x - mean)` for each x of a channel.
static real offset_of(const Args &a, i64 c) {
  return a.of_bias ? (real)(-(double)a.scale[c] * a.of_bias[c] / ((double)a.outer * a.inner)) : 0;
}
static real slope_of(const Args &a, i64 c) {
  double inverse = a.inverse[c], n = (double)a.outer * a.inner;
  return a.of_scale ? (real)(-inverse * inverse * a.scale[c] * a.of_scale[c] / n) : 0;
}

static void add_to_rows(Args &a, i64 first, i64 last) {
  if (a.inner == 1) {
    for (i64 c0 = 0; c0 < a.channels; c0 += TILE) {
      i64 width = a.channels - c0 < TILE ? a.channels - c0 : TILE;
      const real *mean = a.mean + c0;
      real offset[TILE], slope[TILE];
      for (i64 c = 0; c < width; c++) offset[c] = offset_of(a, c0 + c), slope[c] = slope_of(a, c0 + c);
      for (i64 r = first; r < last; r++) {
        real *g = a.grad + r * a.channels + c0;
        const real *x = a.x + r * a.channels + c0;
        for (i64 c = 0; c < width; c++) g[c] += offset[c] + slope[c] * (x[c] - mean[c]);
      }
    }
    return;
  }
  for (i64 r = first; r < last; r++) {
    i64 c = r % a.channels;
    real offset = offset_of(a, c), slope = slope_of(a, c), mean = a.mean[c];
    real *g = a.grad + r * a.inner;
    const real *x = a.x + r * a.inner;
    for (i64 i = 0; i < a.inner; i++) g[i] += offset + slope * (x[i] - mean);
  }
}

static void work(void *argument) {
  Args &a = *(Args *)argument;
  for (;;) {
    i64 part = a.next.fetch_add(1);
    if (part >= a.parts) return;
    i64 lines = a.mode == 1 ? (a.inner == 1 ? a.outer : a.outer * a.channels) : a.inner == 1 ? a.outer : a.channels;
    i64 first = lines * part / a.parts, last = lines * (part + 1) / a.parts;
    if (a.mode == 1) add_to_rows(a, first, last);
    else if (a.inner == 1) statistics_of_rows(a, first, last, a.partial + 2 * part * a.channels);
    else statistics_of_channels(a, first, last);
  }
}

static void finish(Args &a) {
  double n = (double)a.outer * a.inner;
  for (i64 c = 0; c < a.channels; c++) {
    Moments m = {0, 0, 0};
    if (a.inner == 1)
      for (i64 p = 0; p < a.parts; p++) {
        i64 rows = a.outer * (p + 1) / a.parts - a.outer * p / a.parts;
        double *of_part = a.partial + 2 * (p * a.channels + c);
        if (rows) m.merge(of_part[0], of_part[1], (double)rows);
      }
    else m = {a.partial[2 * c], a.partial[2 * c + 1], n};
    double variance = m.squares / n;
    if (variance < 0) variance = 0;
    double inverse = 1 / std::sqrt(variance + a.eps);
    a.mean[c] = (real)m.mean;
    a.inverse[c] = (real)inverse;
    a.scale[c] = (real)(inverse * (a.weight ? (double)a.weight[c] : 1.0));
    a.shift[c] = a.bias ? a.bias[c] : 0;
    if (a.running_mean) {
      a.running_mean[c] = (real)((1 - a.factor) * a.running_mean[c] + a.factor * m.mean);
      a.running_var[c] = (real)((1 - a.factor) * a.running_var[c] + a.factor * m.squares / (n - 1));
    }
  }
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else if (a->parts) work(a);
  if (a->mode == 0) finish(*a);
  else if (a->of_weight)
    for (i64 c = 0; c < a->channels; c++) a->of_weight[c] = a->of_scale[c] * a->inverse[c];
}
"""


def _source(ctype: str) -> KernelSource:
    return KernelSource(_TEXT.replace("REAL", ctype), (), (), 0)


SOURCES = {4: _source("float"), 8: _source("double")}
"""Size of an element in bytes -> source."""
