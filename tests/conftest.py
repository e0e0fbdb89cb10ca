"""Every test starts from the same place: one thread, one seed, no warning given yet, nothing compiled."""

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

# Kernels built for the tests stay out of the user's cache; all test processes share them.
os.environ.setdefault("SNNFX_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"snnfx_tests_{os.getuid()}"))


def _let_torchvision_import() -> None:
    """Declare the operators that torchvision asks for when it is imported next to a CPU build of torch.

    PyPI has no CPU build of torchvision for Linux. The models of the CUDA build, which SpikingJelly's model zoo needs,
    run all the same; only its detection operators do not exist.
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
