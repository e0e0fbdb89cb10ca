"""`SpikeBits`: a sequence of spikes with one bit for each neuron and step, which a neuron's kernel writes.

Bits take 1/32 of the memory of floats, and the lists of active inputs are made from them without a comparison. The
max-pooling of spikes is the OR of their bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from snnfx.lowering.elementwise.cpp.build import load, openmp
from snnfx.lowering.elementwise.cpp.cpp_kernel import KernelSource
from snnfx.ops.buffer_pool import pool

__all__ = ["SpikeBits"]

Pair = tuple[int, int]


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

    @cached_property
    def density(self) -> float:
        """The fraction of spikes, from a sample."""
        lines = self.words.numel()
        words = _run(0, self.words, 8, counts=(lines, min(lines, _WORDS_SAMPLED)), threads=1)
        return words[_RESULT] / (64 * min(lines, _WORDS_SAMPLED))

    def numbers(self) -> Tensor:
        """The spikes as numbers, `[T, N, *]`."""
        sizes = [self.shape[1:][d] for d in self.order]
        shape = (self.shape[0], *sizes)
        strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
        y = pool.empty(shape, strides, self.dtype)
        _run(1, self.words, y.element_size(), y=y, counts=(self.words.numel(),), threads=_threads(y.numel()))
        places = sorted(range(len(self.order)), key=self.order.__getitem__)
        return y.permute(0, *[place + 1 for place in places])

    def max_pool(self, kernel: Pair, stride: Pair, padding: Pair) -> SpikeBits:
        """The maximum of each window of channels-last images `[T, N, C, H, W]`, with a multiple of 64 channels."""
        T, N, C, H, W = self.shape
        out = [(n + 2 * p - k) // s + 1 for n, k, s, p in zip((H, W), kernel, stride, padding, strict=True)]
        words = C // 64
        y = torch.empty(T * N * out[0] * out[1] * words, dtype=torch.int64, device="cpu")
        counts = (T * N, H, W, words, *out, *kernel, *stride, *padding)
        _run(2, self.words, 8, y=y, counts=counts, threads=_threads(self.words.numel() * 8))
        return replace(self, words=y, shape=(T, N, C, *out))


_WORDS_SAMPLED = 256
_PARALLEL_ELEMENTS = 1 << 16
_COUNTS = 12
_RESULT = 4 + _COUNTS

_TEXT = r"""
#include <stdint.h>
#include <atomic>
typedef int64_t i64;
typedef uint64_t u64;

struct Args {
  i64 mode;          // 0: count the spikes of a sample, 1: the spikes as numbers, 2: max-pooling
  const u64 *words;
  void *y;
  void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
  i64 count[COUNTS]; // see SpikeBits
  i64 result;
  i64 threads;
  std::atomic<i64> next;
};

static void sample(Args &a) {
  const i64 words = a.count[0], sampled = a.count[1];
  u64 state = 0x9e3779b97f4a7c15ull;
  for (i64 k = 0; k < sampled; k++) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const i64 first = words * k / sampled, last = words * (k + 1) / sampled;
    a.result += __builtin_popcountll(a.words[first + (i64)((state >> 33) % (u64)(last - first))]);
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
  if (a.mode == 1) expand(a);
  else max_pool(a);
}
extern "C" void run_part(Args *a, i64, i64) { work(a); }
extern "C" void run(Args *a) {
  if (a->mode == 0) sample(*a);
  else if (a->threads > 1) a->parallel(work, a, (unsigned)a->threads, 0);
  else work(a);
}
"""


def _source(ctype: str) -> KernelSource:
    return KernelSource(f"#define COUNTS {_COUNTS}\ntypedef {ctype} real;\n{_TEXT}", (), (), 0)


_SOURCES = {4: _source("float"), 8: _source("double")}
"""By bytes of a number."""


def _run(
    mode: int, words: Tensor, itemsize: int, *, y: Tensor | None = None, counts: Sequence[int], threads: int
) -> ctypes.Array[ctypes.c_int64]:
    runtime = openmp() if threads > 1 else None
    filled = [*counts, *[0] * (_COUNTS - len(counts))]
    address = 0 if y is None else y.data_ptr()
    given = (mode, words.data_ptr(), address, runtime[0] if runtime else 0, *filled, 0, threads, 0)
    arguments = (ctypes.c_int64 * len(given))(*given)
    load(_SOURCES[itemsize]).run(arguments)
    return arguments


def _threads(elements: int) -> int:
    return torch.get_num_threads() if elements >= _PARALLEL_ELEMENTS and openmp() is not None else 1
