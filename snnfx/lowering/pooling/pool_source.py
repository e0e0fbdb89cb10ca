"""C++ source of max pooling over windows that do not overlap.

The forward pass stores the position of the maximum in its window as one byte, the first one among equals, as torch
does. The backward pass writes every element of the gradient once: windows do not overlap, so nothing is added.
"""

from __future__ import annotations

from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource

__all__ = ["SOURCES"]

_TEXT = """
#include <atomic>
#include <cstdint>
typedef int64_t i64;
typedef REAL real;
typedef INTEGER integer;     // as wide as `real`, so that comparisons select without conversion

struct Args {
  i64 mode;                  // 0: forward, 1: backward
  real *x;                   // the images; in the backward pass their gradient, which is written
  real *y;                   // the maxima; in the backward pass their gradient
  uint8_t *position;         // of each maximum in its window; null: not stored
  i64 images, height, width, channels;  // channels: 1 for row-major images, which count each channel as an image
  i64 out_height, out_width, kernel[2], stride[2];
  i64 threads, parts;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  std::atomic<i64> next;     // the next part of the work
  i64 offset[256];           // of each element of a window of row-major images
};

static const i64 TILE = 256;

// The maxima of `n` windows; windows and their elements are `step` and `row`, `column` elements apart.
static void
forward(const Args &a, const real *x, i64 step, i64 row, i64 column, real *y, uint8_t *position, i64 n) {
  real best[TILE];
  integer found[TILE];
  for (i64 i = 0; i < n; i++) best[i] = x[i * step], found[i] = 0;
  for (i64 r = 0; r < a.kernel[0]; r++)
    for (i64 c = 0; c < a.kernel[1]; c++) {
      const real *tap = x + r * row + c * column;
      const integer number = (integer)(r * a.kernel[1] + c);
      if (!number) continue;
      if (step == 1)
        for (i64 i = 0; i < n; i++) {
          bool more = (tap[i] > best[i]) | (tap[i] != tap[i]);
          best[i] = more ? tap[i] : best[i];
          found[i] = more ? number : found[i];
        }
      else
        for (i64 i = 0; i < n; i++) {
          real v = tap[i * step];
          bool more = (v > best[i]) | (v != v);
          best[i] = more ? v : best[i];
          found[i] = more ? number : found[i];
        }
    }
  for (i64 i = 0; i < n; i++) y[i] = best[i];
  if (position)
    for (i64 i = 0; i < n; i++) position[i] = (uint8_t)found[i];
}

// The same for windows of 2x2 elements, in one pass.
template <bool STORES> static void
forward_2x2(const real *x, i64 step, i64 row, i64 column, real *__restrict__ y, uint8_t *__restrict__ position, i64 n) {
  for (i64 i = 0; i < n; i++) {
    const real *at = x + i * step;
    real best = at[0], v1 = at[column], v2 = at[row], v3 = at[row + column];
    integer found = 0;
    bool more = (v1 > best) | (v1 != v1);
    best = more ? v1 : best;
    found = more ? (integer)1 : found;
    more = (v2 > best) | (v2 != v2);
    best = more ? v2 : best;
    found = more ? (integer)2 : found;
    more = (v3 > best) | (v3 != v3);
    y[i] = more ? v3 : best;
    if (STORES) position[i] = (uint8_t)(more ? (integer)3 : found);
  }
}

static void
windows(const Args &a, const real *x, i64 step, i64 row, i64 column, real *y, uint8_t *position, i64 n) {
  if (a.kernel[0] == 2 && a.kernel[1] == 2) {
    if (step == 1) {
      if (position) forward_2x2<true>(x, 1, row, column, y, position, n);
      else forward_2x2<false>(x, 1, row, column, y, position, n);
    } else if (position) forward_2x2<true>(x, step, row, column, y, position, n);
    else forward_2x2<false>(x, step, row, column, y, position, n);
    return;
  }
  for (i64 i = 0; i < n; i += TILE)
    forward(a, x + i * step, step, row, column, y + i, position ? position + i : nullptr, n - i < TILE ? n - i : TILE);
}

static void forward_line(const Args &a, i64 line) {
  i64 image = line / a.out_height, top = line % a.out_height * a.stride[0], row = a.width * a.channels;
  const real *x = a.x + (image * a.height + top) * row;
  i64 at = line * a.out_width * a.channels;
  uint8_t *position = a.position ? a.position + at : nullptr;
  if (a.channels == 1) {
    windows(a, x, a.stride[1], row, 1, a.y + at, position, a.out_width);
    return;
  }
  for (i64 w = 0; w < a.out_width; w++) {
    i64 place = w * a.channels;
    windows(a, x + place * a.stride[1], 1, row, a.channels, a.y + at + place, position ? position + place : nullptr,
            a.channels);
  }
}

static void backward_line(const Args &a, i64 line) {
  i64 image = line / a.out_height, number = line % a.out_height, top = number * a.stride[0];
  i64 bottom = number + 1 < a.out_height ? top + a.stride[0] : a.height, row = a.width * a.channels;
  i64 at = line * a.out_width * a.channels, covered = a.out_width * a.stride[1];
  const uint8_t *position = a.position + at;
  const real *y = a.y + at;
  if (a.channels == 1) {
    real *x = a.x + (image * a.height + top) * row;
    for (i64 i = 0; i < (bottom - top) * row; i++) x[i] = 0;
    for (i64 w = 0; w < a.out_width; w++) x[w * a.stride[1] + a.offset[position[w]]] = y[w];
    return;
  }
  for (i64 h = top; h < bottom; h++) {
    real *x = a.x + (image * a.height + h) * row;
    bool inside = h - top < a.kernel[0];
    if (!inside) {
      for (i64 i = 0; i < row; i++) x[i] = 0;
      continue;
    }
    for (i64 c = 0; c < a.stride[1]; c++) {
      uint8_t tap = (uint8_t)((h - top) * a.kernel[1] + c);
      bool in_window = c < a.kernel[1];
      for (i64 w = 0; w < a.out_width && w * a.stride[1] + c < a.width; w++) {
        real *to = x + (w * a.stride[1] + c) * a.channels;
        const uint8_t *of_window = position + w * a.channels;
        const real *from = y + w * a.channels;
        if (in_window)
          for (i64 i = 0; i < a.channels; i++) to[i] = of_window[i] == tap ? from[i] : (real)0;
        else
          for (i64 i = 0; i < a.channels; i++) to[i] = 0;
      }
    }
    for (i64 i = covered * a.channels; i < row; i++) x[i] = 0;
  }
}

static void work(void *argument) {
  Args &a = *(Args *)argument;
  i64 lines = a.images * a.out_height;
  for (;;) {
    i64 part = a.next.fetch_add(1);
    if (part >= a.parts) return;
    for (i64 line = lines * part / a.parts; line < lines * (part + 1) / a.parts; line++)
      if (a.mode) backward_line(a, line);
      else forward_line(a, line);
  }
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->mode && a->channels == 1)
    for (i64 r = 0; r < a->kernel[0]; r++)
      for (i64 c = 0; c < a->kernel[1]; c++) a->offset[r * a->kernel[1] + c] = r * a->width + c;
  if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else work(a);
}
"""


def _source(ctype: str, integer: str) -> KernelSource:
    return KernelSource(_TEXT.replace("REAL", ctype).replace("INTEGER", integer), (), (), 0)


SOURCES = {4: _source("float", "int32_t"), 8: _source("double", "int64_t")}
"""Size of an element in bytes -> source."""
