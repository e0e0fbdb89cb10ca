"""Convert single-step spiking neural networks into multi-step ones with torch.fx.

Example:
    >>> import torch, snnfx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), snnfx.neuron.LIFNode())     # one time step
    >>> net = snnfx.convert(model)                                                     # whole sequences
    >>> net(torch.rand(8, 2, 4)).shape                                                 # [T, N, features]
    torch.Size([8, 2, 3])
"""

from __future__ import annotations

from pathlib import Path

# In a source checkout the passes are in ../passes; in an installed package they are in snnfx/passes.
if not (Path(__file__).parent / "passes").is_dir() and (Path(__file__).parents[1] / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from snnfx import errors, functional, neuron, online, passes, surrogate
from snnfx._version import __version__
from snnfx.allocator import tune_allocator
from snnfx.convert import convert
from snnfx.deploy.export import export
from snnfx.deploy.from_nir import from_nir
from snnfx.inspect.explain import explain
from snnfx.inspect.picture.draw import draw
from snnfx.inspect.profile.profile import profile
from snnfx.inspect.verify.verify import verify
from snnfx.memory_module import MemoryModule
from snnfx.ops.buffer_pool import release_buffers
from snnfx.runtime.net import Net
from snnfx.saving.load import load
from snnfx.saving.save import save

__all__ = [
    "MemoryModule",
    "Net",
    "__version__",
    "convert",
    "draw",
    "errors",
    "explain",
    "export",
    "from_nir",
    "functional",
    "load",
    "neuron",
    "online",
    "passes",
    "profile",
    "release_buffers",
    "save",
    "surrogate",
    "tune_allocator",
    "verify",
]
