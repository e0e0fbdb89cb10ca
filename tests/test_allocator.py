"""What snnfx does to the C library's allocator: nothing but what is asked for, and one freed block."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

import snnfx

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")

FAULTS = """
import resource, torch
import snnfx
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def call():
    kept = [torch.zeros({size}, dtype=torch.uint8) for _ in range({count})]
    del kept
for _ in range(3):
    call()
start = faults()
for _ in range(10):
    call()
print((faults() - start) / 10)
"""


def faults_of_calls(before: str, megabytes: int, count: int) -> float:
    """Page faults of a function that makes and frees tensors, in a process of its own with its own malloc."""
    code = FAULTS.format(before=before, size=megabytes * 2**20, count=count)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


def pages(megabytes: float) -> float:
    return megabytes * 2**20 / resource.getpagesize()


@linux
def test_blocks_of_a_tuned_allocator_stay() -> None:
    assert faults_of_calls("", 40, 2) > pages(60)
    assert faults_of_calls("assert snnfx.tune_allocator()", 40, 2) < pages(1)


@linux
def test_net_lets_blocks_of_a_chunk_stay() -> None:
    convert = "snnfx.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), snnfx.neuron.LIFNode()))"
    assert faults_of_calls(convert, 16, 3) < pages(1)
    assert faults_of_calls(convert, 40, 2) > pages(60), "only `tune_allocator` keeps everything"


@pytest.mark.parametrize("largest", [0, -1, 2**31])
def test_size_that_malloc_cannot_keep_is_refused(largest: int) -> None:
    with pytest.raises(ValueError, match="largest"):
        snnfx.tune_allocator(largest)
