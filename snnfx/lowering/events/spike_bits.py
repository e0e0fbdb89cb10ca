"""`SpikeBits`: a sequence of spikes with one bit for each neuron and step, which a neuron's kernel writes.

Bits take 1/32 of the memory of floats, and the lists of active inputs are made from them without a comparison. The
max-pooling of spikes is the OR of their bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import kernel_threads, load, parallel_fields
from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource
from snnfx.ops.buffer_pool import pool

__all__ = ["Flattening", "MaxPooling", "Operation", "SpikeBits"]

Pair = tuple[int, ...]


@dataclass(frozen=True)
class SpikeBits:
    """Spikes `[T, N, *]` as bits, in the order of their memory.

    Args:
        words: 64 bits each.
        shape: the shape of the sequence.
        order: the dimensions of a step in the order of memory, slowest first.
        dtype: the dtype of the spikes as numbers.
    """

    words: Tensor
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype

    @property
    def is_row_major(self) -> bool:
        """Whether the last dimension is the fastest."""
        return self.order == tuple(range(len(self.order)))

    @property
    def is_channels_last(self) -> bool:
        """Whether the channels of `[T, N, C, *]` are the fastest dimension."""
        rank = len(self.order)
        return rank > 2 and self.order == (0, *range(2, rank), 1)

    def numbers(self) -> Tensor:
        """The spikes as numbers, `[T, N, *]`."""
        sizes = [self.shape[1:][d] for d in self.order]
        shape = (self.shape[0], *sizes)
        strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        y = pool.empty(shape, strides, self.dtype)
        arguments = _arguments(1, (self.words.numel(),), _threads(y.numel()))
        arguments.words, arguments.y = self.words.data_ptr(), y.data_ptr()
        load(_SOURCES[y.element_size()]).run(ctypes.byref(arguments))
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return y.permute(0, *[place + 1 for place in places])


class Operation:
    """A map from spikes of one shape to spikes of another.

    Args:
        spikes: an example.
        shape: of the result, whose dimensions lie in the order `order`.
        mode, counts: the work of the kernel.
    """

    def __init__(
        self, spikes: SpikeBits, shape: tuple[int, ...], order: tuple[int, ...], mode: int, counts: Sequence[int]
    ) -> None:
        self.shape, self.order, self.words = shape, order, math.prod(shape) // 64
        self._arguments = _arguments(mode, counts, _threads(spikes.words.numel() * 8))
        self._run = load(_SOURCES[8]).run

    def of_words(self, words: Tensor) -> Tensor:
        """The words of the result."""
        y = torch.empty(self.words, dtype=torch.int64, device="cpu")
        arguments = _Arguments.from_buffer_copy(self._arguments)
        arguments.words, arguments.y = words.data_ptr(), y.data_ptr()
        self._run(ctypes.byref(arguments))
        return y

    def __call__(self, spikes: SpikeBits) -> SpikeBits:
        return replace(spikes, words=self.of_words(spikes.words), shape=self.shape, order=self.order)


class MaxPooling(Operation):
    """The maximum of each window of channels-last images `[T, N, C, H, W]`, with a multiple of 64 channels.

    Args:
        spikes: an example.
        kernel, stride, padding: for height and width.
    """

    def __init__(self, spikes: SpikeBits, kernel: Pair, stride: Pair, padding: Pair) -> None:
        T, N, C, H, W = spikes.shape
        out = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip((H, W), kernel, stride, padding, strict=True)]
        counts = (T * N, H, W, C // 64, *out, *kernel, *stride, *padding)
        super().__init__(spikes, (T, N, C, *out), spikes.order, 2, counts)


class Flattening(Operation):
    """Flattens a step of row-major images, or of channels-last ones with a multiple of 64 channels.

    Args:
        spikes: an example.
    """

    def __init__(self, spikes: SpikeBits) -> None:
        T, N, *sizes = spikes.shape
        self.is_row_major = spikes.is_row_major
        counts = (T * N, math.prod(sizes[1:]), -(-sizes[0] // 64))
        super().__init__(spikes, (T, N, math.prod(sizes)), (0, 1), 0, counts)

    def of_words(self, words: Tensor) -> Tensor:
        return words if self.is_row_major else super().of_words(words)


_PARALLEL_ELEMENTS = 1 << 16
_COUNTS = 12

_TEXT = r"""
#include <stdint.h>
#include <string.h>
#include <atomic>
typedef int64_t i64;
typedef uint64_t u64;

struct Args {
  i64 mode;          // 0: channels-last images as row-major ones, 1: the spikes as numbers, 2: max-pooling
  const u64 *words;
  void *y;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  i64 count[COUNTS]; // see the operations
  i64 threads;
  std::atomic<i64> next;
};

// Bit c of row r becomes bit r of row c.
static void transpose(u64 *rows) {
  u64 mask = 0xffffffffull;
  for (int j = 32; j; j >>= 1, mask ^= mask << j)
    for (int k = 0; k < 64; k = ((k | j) + 1) & ~j) {
      const u64 swapped = ((rows[k] >> j) ^ rows[k | j]) & mask;
      rows[k] ^= swapped << j;
      rows[k | j] ^= swapped;
    }
}

static void to_row_major(Args &a) {
  const i64 images = a.count[0], pixels = a.count[1], words = a.count[2], of_image = pixels * words;
  for (i64 n; (n = a.next.fetch_add(1, std::memory_order_relaxed)) < images;) {
    const u64 *image = a.words + n * of_image;
    u64 *to = (u64 *)a.y + n * of_image;
    memset(to, 0, of_image * sizeof(u64));
    for (i64 p = 0; p < pixels; p += 64)
      for (i64 w = 0; w < words; w++) {
        u64 block[64];
        for (i64 k = 0; k < 64; k++) block[k] = p + k < pixels ? image[(p + k) * words + w] : 0;
        transpose(block);
        for (i64 c = 0; c < 64; c++) {
          const i64 bit = (w * 64 + c) * pixels + p, shift = bit % 64;
          to[bit / 64] |= block[c] << shift;
          if (shift && block[c] >> (64 - shift)) to[bit / 64 + 1] |= block[c] >> (64 - shift);
        }
      }
  }
}

static void expand(Args &a) {
  const i64 words = a.count[0], unit = 1024;
  for (i64 u; (u = a.next.fetch_add(1, std::memory_order_relaxed)) * unit < words;) {
    const i64 last = (u + 1) * unit < words ? (u + 1) * unit : words;
    for (i64 k = u * unit; k < last; k++) {
      real *to = (real *)a.y + k * 64;
      const u64 word = a.words[k];
      for (int i = 0; i < 64; i++) to[i] = (real)(word >> i & 1);
    }
  }
}

static void max_pool(Args &a) {
  const i64 *c = a.count, images = c[0], H = c[1], W = c[2], words = c[3], out_h = c[4], out_w = c[5];
  for (i64 line; (line = a.next.fetch_add(1, std::memory_order_relaxed)) < images * out_h;) {
    const u64 *image = a.words + line / out_h * H * W * words;
    u64 *to = (u64 *)a.y + line * out_w * words;
    const i64 h = line % out_h * c[8] - c[10], h0 = h > 0 ? h : 0, h1 = h + c[6] < H ? h + c[6] : H;
    for (i64 ow = 0; ow < out_w; ow++, to += words) {
      const i64 w = ow * c[9] - c[11], w0 = w > 0 ? w : 0, w1 = w + c[7] < W ? w + c[7] : W;
      for (i64 k = 0; k < words; k++) {
        u64 any = 0;
        for (i64 y = h0; y < h1; y++)
          for (i64 x = w0; x < w1; x++) any |= image[(y * W + x) * words + k];
        to[k] = any;
      }
    }
  }
}

static void work(void *p) {
  Args &a = *(Args *)p;
  if (a.mode == 0) to_row_major(a);
  else if (a.mode == 1) expand(a);
  else max_pool(a);
}
extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else work(a);
}
"""


def _source(ctype: str) -> KernelSource:
    return KernelSource(f"#define COUNTS {_COUNTS}\ntypedef {ctype} real;\n{_TEXT}", (), (), 0)


_SOURCES = {4: _source("float"), 8: _source("double")}
"""By bytes of a number."""


class _Arguments(ctypes.Structure):
    """The struct `Args` of the kernel."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("mode", "words", "y", "parallel")),
        ("count", ctypes.c_int64 * _COUNTS),
        ("threads", ctypes.c_int64),
        ("next", ctypes.c_int64),
    )


def _arguments(mode: int, counts: Sequence[int], threads: int) -> _Arguments:
    arguments = _Arguments(mode=mode, **parallel_fields(threads))
    arguments.count[: len(counts)] = counts
    return arguments


def _threads(elements: int) -> int:
    return kernel_threads() if elements >= _PARALLEL_ELEMENTS else 1
