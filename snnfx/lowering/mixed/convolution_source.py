"""The C++ source of a convolution of one sample, for compiled time loops.

The terms of a result are added in the order of channels and elements of the kernel, whatever the size of the image.
"""

from __future__ import annotations

__all__ = ["CONVOLUTION"]

CONVOLUTION = r"""
// Channels of the result that are computed together, and vectors of each.
#if defined(__AVX512F__)
constexpr int CHANNELS = 8, VECTORS = 3;
#else
constexpr int CHANNELS = 4, VECTORS = 1;
#endif

struct Convolution {
  i64 groups, in_channels, out_channels;     // channels of a group
  i64 channel_step, column_step;             // strides of the input
  i64 plane;                                 // elements of a channel of the extended image
  const i64 *offsets, *taps;
  i64 tap_count, row_count;
  const i64 *row_from, *row_to;
  i64 column_count;
  const i64 *columns;                        // null if they are consecutive
  i64 vector_count;
  const i64 *vector_from, *vector_to;
  i64 result_row_count, result_width, result_plane;
  const i64 *result_rows;
  i64 weight_group, weight_out, weight_in;   // strides of the weight
  char *extended;                            // for each part: extended image, then the buffer of results
  i64 extended_bytes, buffer_start, buffer_step;
};

static i64 channels_together(i64 left) {
  i64 count = CHANNELS;
  while (count > left) count /= 2;
  return count;
}

static void pack_kernel(const Convolution &c, const real *weight, real *to) {
  for (i64 g = 0; g < c.groups; g++)
    for (i64 m = 0, count; m < c.out_channels; m += count) {
      count = channels_together(c.out_channels - m);
      const real *from = weight + g * c.weight_group + m * c.weight_out;
      for (i64 k = 0; k < c.in_channels; k++)
        for (i64 tap = 0; tap < c.tap_count; tap++)
          for (i64 r = 0; r < count; r++) *to++ = from[r * c.weight_out + k * c.weight_in + c.taps[tap]];
    }
}

static void extend(const Convolution &c, const real *x, real *to) {
  for (i64 k = 0; k < c.groups * c.in_channels; k++, x += c.channel_step, to += c.plane)
    for (i64 r = 0; r < c.row_count; r++) {
      const real *from = x + c.row_from[r];
      real *row = to + c.row_to[r];
      if (!c.columns) memcpy(row, from, c.column_count * sizeof(real));
      else
        for (i64 w = 0; w < c.column_count; w++) row[c.columns[w]] = from[w * c.column_step];
    }
}

template <int R, int V>
FUSED static void convolve_vectors(const real *x, const i64 *from, i64 terms, const i64 *offsets, const real *w,
                                   const real *bias, real *y, i64 y_step, const i64 *to) {
  CONTRACT
  vec sum[R][V];
  const real *start[V];
  for (int v = 0; v < V; v++) start[v] = x + from[v];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = (vec){} + (bias ? bias[r] : 0);
  for (i64 k = 0; k < terms; k++) {
    vec row[V];
    for (int v = 0; v < V; v++) row[v] = *(const vec *)(start[v] + offsets[k]);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] += row[v] * w[k * R + r];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) *(vec *)(y + r * y_step + to[v]) = sum[r][v];
}

template <int R>
static void convolve_channels(const Convolution &c, const real *x, const real *w, const real *bias, real *y,
                              i64 y_step) {
  const i64 terms = c.in_channels * c.tap_count;
  i64 v = 0;
  for (; v + VECTORS <= c.vector_count; v += VECTORS)
    convolve_vectors<R, VECTORS>(x, c.vector_from + v, terms, c.offsets, w, bias, y, y_step, c.vector_to + v);
  for (; v < c.vector_count; v++)
    convolve_vectors<R, 1>(x, c.vector_from + v, terms, c.offsets, w, bias, y, y_step, c.vector_to + v);
}

static void convolve(const Convolution &c, const real *x, const real *w, const real *bias, real *y, i64 part) {
  real *image = (real *)(c.extended + part * c.extended_bytes), *buffer = image + c.buffer_start;
  extend(c, x, image);
  real *to = c.result_row_count ? buffer : y;
  const i64 step = c.result_row_count ? c.buffer_step : c.result_plane;
  for (i64 g = 0; g < c.groups; g++, image += c.in_channels * c.plane)
    for (i64 m = 0, count; m < c.out_channels; m += count) {
      count = channels_together(c.out_channels - m);
      if (!c.result_row_count) to = y;
      switch (count) {
        case 1: convolve_channels<1>(c, image, w, bias, to, step); break;
        case 2: convolve_channels<2>(c, image, w, bias, to, step); break;
        case 4: convolve_channels<4>(c, image, w, bias, to, step); break;
        default: convolve_channels<CHANNELS>(c, image, w, bias, to, step);
      }
      for (i64 r = 0; r < count && c.result_row_count; r++)
        for (i64 j = 0; j < c.result_row_count; j++)
          memcpy(y + r * c.result_plane + j * c.result_width, buffer + r * step + c.result_rows[j],
                 c.result_width * sizeof(real));
      y += count * c.result_plane;
      w += count * c.in_channels * c.tap_count;
      if (bias) bias += count;
    }
}
"""
