"""Every test starts with one thread, one seed, no earlier warnings and no compiled code."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from snnfx.sandbox import internal_faults

settings.register_profile("snnfx", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("snnfx")

torch.set_num_threads(1)

# A fault of snnfx itself fails the test instead of turning into a fallback.
internal_faults.STRICT = True

# Terminals show no progress bars of tests.
os.environ["SNNFX_PROGRESS"] = "0"

# All test processes share one cache of kernels, which is not the user's.
os.environ.setdefault("SNNFX_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"snnfx_tests_{os.getuid()}"))

# Every run tests the same kernels; tests of measured choices remove the variable.
os.environ.setdefault("SNNFX_MEASURE", "0")


def _let_torchvision_import() -> None:
    """Declare the operators that a CUDA build of torchvision needs when torch is a CPU build.

    PyPI has no CPU build of torchvision for Linux. The models of the CUDA build, which SpikingJelly's model zoo uses,
    also run on a CPU build of torch; only the detection operators are missing.
    """
    if sys.platform != "linux" or torch.version.cuda or importlib.util.find_spec("torchvision") is None:
        return
    if "+cpu" not in importlib.metadata.version("torchvision"):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")


_let_torchvision_import()


@pytest.fixture(autouse=True)
def _fresh_start() -> Iterator[None]:
    torch.manual_seed(0)
    from snnfx import errors

    errors._warned.clear()
    default_dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(default_dtype)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
