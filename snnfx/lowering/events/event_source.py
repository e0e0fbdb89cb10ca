"""The C++ source of products that visit only the inputs that are not zero.

A product is a convolution over up to three spatial dimensions; a linear layer is one with a kernel of one pixel, whose
pixels are the rows. Images are channels-last. A list names the active channels of all input columns that a line of
output pixels reads, with those of all lines of the kernel together. Neighbouring output pixels share it: each reads a
contiguous part, relative to its first column. Accumulators of one tile of outputs stay in registers meanwhile.

Long lists are cut into blocks, so that the rows of one block and tile stay close to the processor for all pixels of a
chunk.
"""

from __future__ import annotations

from snnfx.lowering.nonzero_lists import sources_of

__all__ = ["BLOCK_ROWS", "CHECKSUM_PARTS", "LONGEST", "SOURCES"]

BLOCK_ROWS = 384
"""Rows of the weight in a block, at most, if a word of channels has no more: larger ones are slower at 20 % density."""

LONGEST = 1 << 16
"""Numbers of rows in a list are smaller than this."""

CHECKSUM_PARTS = 16
"""Parts of a weight that are hashed apart from each other, so that threads share them."""

_TEXT = r"""
#include <atomic>
constexpr i64 CHUNK = 128; // output pixels at a time

struct Args {
  i64 mode;                      // 0: the product, 1: estimate the density, 2: the checksum of `hashed`,
                                 // 3: the gradient of the weight, from the gradient of the output in `weight` to `y`,
                                 // 4: the product of bits, unless `refusal` says why not
  const real *x, *weight, *bias; // bias may be null
  real *y;
  i64 images, size[3], channels, groups, out[3], kernel[3], stride[3], padding[3], dilation[3], outputs;
  i64 band, splits;              // lines of a unit of work, and parts of the tiles
  i64 threads;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  std::atomic<i64> next;         // the next unit of work
  i64 elements, sampled, active; // of the estimate; mode 3: the elements of `weight`
  i64 parts;                     // of the gradient
  const u64 *bits;               // the input as bits, instead of x: a multiple of 64 channels in each group
  const char *hashed;            // the weight as it lies
  i64 bytes;                     // of `hashed`
  double limit, density;         // mode 4: the density of the bits has to be lower than the limit
  i64 refusal;                   // 1: it is not, 2: the checksum has changed, so that `weight` is packed from another,
                                 // 3: the gradient of the output is not finite, which zeros of `x` would hide
  i64 checksum[CHECKSUM_PARTS], expected[CHECKSUM_PARTS];
};

static thread_local Scratch<u64> bit_words;
static thread_local Scratch<i64> line_owner;
static thread_local Scratch<i64> column_starts;
static thread_local Scratch<uint16_t> list_rows;
static thread_local Scratch<real> list_values;

// A word of channels in one line of input pixels, and the row of its first channel in a column.
struct Part {
  const u64 *bits;
  const real *x;
  i64 row;
};
static thread_local Scratch<Part> parts_inside;

// Add the rows of a list to one tile of one output pixel.
template <int N, bool ONES>
INLINE void add_rows(const uint16_t *rows, const real *values, i64 n, const real *weight, const real *start, real *y) {
  vec sum[N];
  for (int v = 0; v < N; v++) sum[v] = start ? *(const vec *)(start + v * LANES) : (vec){};
  for (i64 i = 0; i < n; i++) {
    const real *w = weight + (u64)rows[i] * (N * LANES);
    for (int v = 0; v < N; v++) {
      vec row = *(const vec *)(w + v * LANES);
      sum[v] += ONES ? row : row * values[i];
    }
  }
  for (int v = 0; v < N; v++) *(vec *)(y + v * LANES) = sum[v];
}

// The columns of one line of input pixels, each with its active rows of all lines of the kernel, form one list: an
// output pixel reads the part of its columns. Columns are numbered from the first one that the segment reads.
struct Chunk {
  i64 count, first[CHUNK], last[CHUNK]; // the part of the list of each output pixel
  i64 shift[CHUNK], pixels[CHUNK];      // rows of earlier columns, and its number among the output pixels
  const uint16_t *rows;
  const real *values;
};

template <int N, bool ONES>
static void add_tile(const Chunk &c, const real *weight, const real *bias, real *y, i64 step, i64 width, bool first) {
  real part[FULL];
  for (i64 p = 0; p < c.count; p++) {
    const uint16_t *rows = c.rows + c.first[p];
    const real *values = ONES ? nullptr : c.values + c.first[p], *w = weight - c.shift[p] * (N * LANES);
    const i64 n = c.last[p] - c.first[p];
    real *target = y + c.pixels[p] * step;
    if (width == N * LANES) {
      add_rows<N, ONES>(rows, values, n, w, first ? bias : target, target);
    } else {
      memset(part, 0, sizeof part);
      if (!first || bias) memcpy(part, first ? bias : target, width * sizeof(real));
      add_rows<N, ONES>(rows, values, n, w, part, part);
      memcpy(target, part, width * sizeof(real));
    }
  }
}

template <bool ONES>
static void add_any_tile(const Chunk &c, const real *w, const real *bias, real *y, i64 step, i64 width, bool first) {
  switch ((width + LANES - 1) / LANES) {
    case 1: return add_tile<1, ONES>(c, w, bias, y, step, width, first);
    case 2: return add_tile<2, ONES>(c, w, bias, y, step, width, first);
    case 3: return add_tile<3, ONES>(c, w, bias, y, step, width, first);
    default: return add_tile<4, ONES>(c, w, bias, y, step, width, first);
  }
}

// Add one tile of the gradient of each output pixel to the rows of its list.
template <int N, bool ONES>
static void scatter_tile(const Chunk &c, const real *gradient, real *rows_out, i64 step, i64 width) {
  real part[FULL];
  for (i64 p = 0; p < c.count; p++) {
    const real *from = gradient + c.pixels[p] * step;
    if (width < N * LANES) {
      memset(part, 0, sizeof part);
      memcpy(part, from, width * sizeof(real));
      from = part;
    }
    vec g[N];
    for (int v = 0; v < N; v++) g[v] = *(const vec *)(from + v * LANES);
    real *origin = rows_out - c.shift[p] * (N * LANES);
    for (i64 i = c.first[p]; i < c.last[p]; i++) {
      real *to = origin + (u64)c.rows[i] * (N * LANES);
      for (int v = 0; v < N; v++) *(vec *)(to + v * LANES) += ONES ? g[v] : g[v] * c.values[i];
    }
  }
}

template <bool ONES> static void scatter_any_tile(const Chunk &c, const real *g, real *to, i64 step, i64 width) {
  switch ((width + LANES - 1) / LANES) {
    case 1: return scatter_tile<1, ONES>(c, g, to, step, width);
    case 2: return scatter_tile<2, ONES>(c, g, to, step, width);
    case 3: return scatter_tile<3, ONES>(c, g, to, step, width);
    default: return scatter_tile<4, ONES>(c, g, to, step, width);
  }
}

// Input columns that `n` output pixels of a line read, those of one residue modulo the dilation behind each other.
static i64 columns_of(const Args &a, i64 n) {
  if (n == 1) return a.kernel[2];
  const i64 span = (n - 1) * a.stride[2] + (a.kernel[2] - 1) * a.dilation[2] + 1;
  return (span + a.dilation[2] - 1) / a.dilation[2] * a.dilation[2];
}

static void unit(Args &a, i64 number, real *gradient) {
  const i64 lines = a.out[0] * a.out[1], bands = (lines + a.band - 1) / a.band;
  const i64 split = number % a.splits, band = number / a.splits % bands, image = number / a.splits / bands;
  const i64 words = (a.channels + 63) / 64, W = a.size[2], H = a.size[1], width = a.groups * a.channels;
  const i64 first_line = band * a.band, last_line = first_line + a.band < lines ? first_line + a.band : lines;
  const i64 taps = a.kernel[0] * a.kernel[1], KW = a.kernel[2], K = taps * KW * a.channels, M = a.outputs;
  const i64 tiles = (M + FULL - 1) / FULL, padded = (M + LANES - 1) / LANES * LANES;
  const i64 first_tile = tiles * split / a.splits, last_tile = tiles * (split + 1) / a.splits;
  // A part is a word of channels of one line of the kernel; a block is a range of parts, of all columns of the kernel.
  const i64 of_part = a.channels < 64 ? a.channels : 64, fitting = BLOCK_ROWS / (KW * of_part);
  const i64 parts = taps * words, of_block = fitting < 1 ? 1 : fitting < parts ? fitting : parts;
  const i64 dilation = a.dilation[2], capacity = LONGEST / (of_block * of_part);
  i64 longest = CHUNK < a.out[2] ? CHUNK : a.out[2];
  while (longest > 1 && columns_of(a, longest) > capacity) longest /= 2;
  const i64 most_columns = columns_of(a, longest), most_segments = CHUNK / longest + 2;
  const i64 image_start = image * lines * a.out[2] * a.groups * M, of_pixel = a.groups * words;
  const real *x = a.x + image * a.size[0] * H * W * width;
  const bool is_row = taps * KW == 1 && a.stride[1] == 1 && a.stride[0] == 1 && a.stride[2] == 1;
  // A convolution keeps the bits of a whole image, a linear layer those of its band.
  const i64 base = !a.bits && is_row && a.padding[0] == 0 && a.padding[1] == 0 ? first_line : 0;
  const i64 kept = base || (is_row && !a.padding[0] && !a.padding[1]) ? last_line - first_line : a.size[0] * H;
  const u64 *bits = a.bits + image * a.size[0] * H * W * of_pixel;
  uint16_t *rows = list_rows.of(most_segments * most_columns * of_block * of_part + 64);
  i64 *column = column_starts.of(most_columns + 1);
  bool others = false;
  Chunk c;
  const i64 pixels = (last_line - first_line) * a.out[2];
  if (!a.bits) { // the bits of all lines that this band reads
    u64 *found = bit_words.of(kept * W * of_pixel);
    i64 *owner = line_owner.of(kept);
    memset(owner, 0, kept * sizeof(i64));
    bits = found;
    for (i64 line = first_line; line < last_line; line++) {
      const i64 od = line / a.out[1], oh = line % a.out[1];
      for (i64 kd = 0; kd < a.kernel[0]; kd++) {
        const i64 d = od * a.stride[0] - a.padding[0] + kd * a.dilation[0];
        if (d < 0 || d >= a.size[0]) continue;
        for (i64 kh = 0; kh < a.kernel[1]; kh++) {
          const i64 h = oh * a.stride[1] - a.padding[1] + kh * a.dilation[1];
          if (h < 0 || h >= H) continue;
          const i64 at = d * H + h - base;
          if (owner[at]) continue;
          owner[at] = 1;
          const real *from = x + (at + base) * W * width;
          u64 *to = found + at * W * of_pixel;
          for (i64 w = 0; w < W * a.groups; w++, from += a.channels)
            for (i64 k = 0; k < words; k++)
              *to++ = bits_of(from + k * 64, a.channels - k * 64 < 64 ? a.channels - k * 64 : 64, others);
        }
      }
    }
  }
  real *values = others ? list_values.of(most_segments * most_columns * of_block * of_part + 64) : nullptr;
  Part *inside = parts_inside.of(of_block);
  c.rows = rows;
  c.values = values;
  for (i64 group = 0; group < a.groups; group++) {
    const i64 of_group = group * K * padded;
    for (i64 begin = 0; begin < pixels; begin += CHUNK) {
      c.count = pixels - begin < CHUNK ? pixels - begin : CHUNK;
      for (i64 part0 = 0; part0 < parts; part0 += of_block) {
        const i64 part1 = part0 + of_block < parts ? part0 + of_block : parts;
        const i64 row0 = part0 / words * a.channels + part0 % words * 64;
        const i64 R = (part1 == parts ? taps * a.channels : part1 / words * a.channels + part1 % words * 64) - row0;
        i64 n = 0;
        for (i64 p = 0, line = first_line + begin / a.out[2], ow = begin % a.out[2]; p < c.count;) {
          i64 length = a.out[2] - ow < longest ? a.out[2] - ow : longest;
          if (c.count - p < length) length = c.count - p;
          const i64 d0 = line / a.out[1] * a.stride[0] - a.padding[0];
          const i64 h0 = line % a.out[1] * a.stride[1] - a.padding[1], w0 = ow * a.stride[2] - a.padding[2];
          i64 count = 0;
          for (i64 k = part0; k < part1; k++) {
            const i64 tap = k / words, word = k % words, kd = tap / a.kernel[1], kh = tap % a.kernel[1];
            const i64 d = d0 + kd * a.dilation[0], h = h0 + kh * a.dilation[1];
            if ((u64)d >= (u64)a.size[0] || (u64)h >= (u64)H) continue;
            const i64 at = d * H + h;
            inside[count++] = {bits + (at - base) * W * of_pixel + group * words + word,
                               x + at * W * width + group * a.channels + word * 64,
                               tap * a.channels + word * 64 - row0};
          }
          const i64 columns = columns_of(a, length), residues = length == 1 ? 1 : dilation;
          const i64 of_residue = columns / residues;
          for (i64 residue = 0, q = 0; residue < residues; residue++) {
            for (i64 w = w0 + residue; q < (residue + 1) * of_residue; q++, w += dilation) {
              column[q] = n;
              if ((u64)w >= (u64)W) continue;
              for (i64 k = 0; k < count; k++) {
                const i64 row = q * R + inside[k].row, before = n;
                n += append(rows + n, inside[k].bits[w * of_pixel], row);
                if (others)
                  for (i64 i = before; i < n; i++) values[i] = inside[k].x[w * width + rows[i] - row];
              }
            }
          }
          column[columns] = n;
          for (i64 i = 0, at = 0; i < length; i++, p++, at += a.stride[2]) {
            const i64 q = at % dilation * of_residue + at / dilation;
            c.first[p] = column[q];
            c.last[p] = column[q + KW];
            c.shift[p] = q * R;
            c.pixels[p] = line * a.out[2] + ow + i;
          }
          ow += length;
          if (ow == a.out[2]) ow = 0, line++;
        }
        for (i64 tile = first_tile; tile < last_tile; tile++) {
          const i64 m = tile * FULL, wide = M - m < FULL ? M - m : FULL;
          const i64 at = of_group + m * K + KW * row0 * (wide == FULL ? FULL : (wide + LANES - 1) / LANES * LANES);
          const real *w = a.weight + at, *bias = a.bias ? a.bias + group * M + m : nullptr;
          const i64 first_output = image_start + group * M + m;
          if (gradient) {
            const real *g = a.weight + first_output;
            if (others) scatter_any_tile<false>(c, g, gradient + at, a.groups * M, wide);
            else scatter_any_tile<true>(c, g, gradient + at, a.groups * M, wide);
            continue;
          }
          real *to = a.y + first_output;
          const bool first = part0 == 0;
          if (others) add_any_tile<false>(c, w, bias, to, a.groups * M, wide, first);
          else add_any_tile<true>(c, w, bias, to, a.groups * M, wide, first);
        }
      }
    }
  }
}

static void work(void *p) {
  Args &a = *(Args *)p;
  const i64 lines = a.out[0] * a.out[1], units = a.images * ((lines + a.band - 1) / a.band) * a.splits;
  for (i64 k; (k = a.next.fetch_add(1, std::memory_order_relaxed)) < units;) unit(a, k, nullptr);
}

static bool are_finite(const real *x, i64 n) {
  vec zero = {};
  real sum = 0;
  i64 k = 0;
  for (; k + LANES <= n; k += LANES) zero += *(const vec *)(x + k) * 0;
  for (int i = 0; i < LANES; i++) sum += zero[i];
  for (; k < n; k++) sum += x[k] * 0;
  return sum == 0;
}

// Each part has its own units, so that the order of the sums does not depend on the schedule: the tiles of one split,
// or a range of units and a gradient of its own.
static void differentiate(void *p) {
  Args &a = *(Args *)p;
  const i64 lines = a.out[0] * a.out[1], units = a.images * ((lines + a.band - 1) / a.band) * a.splits;
  const i64 K = a.kernel[0] * a.kernel[1] * a.kernel[2] * a.channels;
  const i64 size = a.groups * K * ((a.outputs + LANES - 1) / LANES * LANES);
  for (i64 k; (k = a.next.fetch_add(1, std::memory_order_relaxed)) < a.parts;) {
    const i64 first = a.elements * k / a.parts, last = a.elements * (k + 1) / a.parts;
    if (!are_finite(a.weight + first, last - first)) __atomic_store_n(&a.refusal, 3, __ATOMIC_RELAXED);
    if (a.splits > 1)
      for (i64 u = k; u < units; u += a.splits) unit(a, u, a.y);
    else
      for (i64 u = units * k / a.parts; u < units * (k + 1) / a.parts; u++) unit(a, u, a.y + k * size);
  }
}

// Lines of 64 elements at scattered places, the same ones at each call.
static void estimate(Args &a) {
  i64 lines = a.elements / 64, active = 0, seen = 0;
  bool others = false;
  if (lines <= a.sampled) {
    for (i64 at = 0; at < a.elements; at += 64) {
      const i64 n = a.elements - at < 64 ? a.elements - at : 64;
      active += __builtin_popcountll(bits_of(a.x + at, n, others));
      seen += n;
    }
  } else {
    u64 state = 0x9e3779b97f4a7c15ull;
    for (i64 k = 0; k < a.sampled; k++) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      const i64 first = lines * k / a.sampled, last = lines * (k + 1) / a.sampled;
      const i64 line = first + (i64)((state >> 33) % (u64)(last - first));
      active += __builtin_popcountll(bits_of(a.x + line * 64, 64, others));
      seen += 64;
    }
  }
  a.active = active;
  a.sampled = seen;
}

// A hash of 64 lanes for each part of the weight. A step is a bijection of a lane, so that one changed element always
// changes it; the rotation moves changes of the sign into lower bits.
typedef uint32_t hashes __attribute__((vector_size(64), aligned(4), may_alias));
static u64 checksum(const char *data, i64 bytes) {
  hashes lanes[4];
  for (int v = 0; v < 4; v++)
    for (int k = 0; k < 16; k++) lanes[v][k] = 0x9e3779b9u * (v * 16 + k + 1);
  i64 at = 0;
  for (; at + 256 <= bytes; at += 256)
    for (int v = 0; v < 4; v++) {
      hashes h = lanes[v] ^ *(const hashes *)(data + at + v * 64);
      lanes[v] = ((h << 13) | (h >> 19)) * 0x85ebca6bu;
    }
  u64 sum = (u64)bytes;
  for (; at < bytes; at++) sum = (sum ^ (uint8_t)data[at]) * 0x100000001b3ull;
  for (int v = 0; v < 4; v++)
    for (int k = 0; k < 16; k++) {
      sum = (sum ^ lanes[v][k]) * 0xff51afd7ed558ccdull;
      sum ^= sum >> 32;
    }
  return sum;
}

static void check_part(Args &a, i64 k) {
  const i64 first = a.bytes / 256 * k / CHECKSUM_PARTS * 256;
  const i64 last = k + 1 == CHECKSUM_PARTS ? a.bytes : a.bytes / 256 * (k + 1) / CHECKSUM_PARTS * 256;
  a.checksum[k] = (i64)checksum(a.hashed + first, last - first);
}

static void check(void *p) {
  Args &a = *(Args *)p;
  for (i64 k; (k = a.next.fetch_add(1, std::memory_order_relaxed)) < CHECKSUM_PARTS;) check_part(a, k);
}

// Threads check the weight and compute the product at the same time: the product is valid if the weight is.
static void check_and_work(void *p) {
  Args &a = *(Args *)p;
  const i64 lines = a.out[0] * a.out[1], units = a.images * ((lines + a.band - 1) / a.band) * a.splits;
  for (i64 k; (k = a.next.fetch_add(1, std::memory_order_relaxed)) < CHECKSUM_PARTS + units;)
    if (k < CHECKSUM_PARTS) check_part(a, k);
    else unit(a, k - CHECKSUM_PARTS, nullptr);
}

extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->mode == 1) return estimate(*a);
  if (a->mode == 4) {
    a->density = density_of(a->bits, a->elements);
    if (!(a->density < a->limit)) {
      a->refusal = 1;
      return;
    }
  }
  void (*functions[])(void *) = {work, nullptr, check, differentiate, check_and_work};
  void (*function)(void *) = functions[a->mode];
  if (a->threads > 1) a->parallel(function, a, (unsigned)a->threads, 0);
  else function(a);
  if (a->mode == 4 && memcmp(a->checksum, a->expected, sizeof a->checksum)) a->refusal = 2;
}
"""


SOURCES = sources_of(_TEXT, CHECKSUM_PARTS=CHECKSUM_PARTS, BLOCK_ROWS=BLOCK_ROWS, LONGEST=LONGEST)
"""By bytes of an element."""
