"""Convert single-step spiking neural networks into multi-step ones by rewriting their torch.fx graph.

Example:
    >>> import torch, snnfx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), snnfx.neuron.LIFNode())     # one time step
    >>> net = snnfx.convert(model)                                                     # all of them
    >>> net(torch.rand(8, 2, 4)).shape                                                 # [T, N, features]
    torch.Size([8, 2, 3])
"""

from __future__ import annotations

from pathlib import Path

# In a plain checkout the passes lie next to this package (../passes); installed, they are snnfx/passes.
if not (Path(__file__).parent / "passes").is_dir() and (Path(__file__).parents[1] / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from snnfx import errors, functional, kernels, neuron, online, passes, surrogate

# Four functions are named like the modules they live in. Each is bound here, after its module, and the name stays the
# function's: a later `import snnfx.explain` finds the module loaded and does not bind it again. Therefore these
# imports are eager; a lazy `__getattr__` would lose against whichever submodule is imported first.
from snnfx.allocator import tune_allocator
from snnfx.convert import convert
from snnfx.draw import draw
from snnfx.explain import explain
from snnfx.memory_module import MemoryModule
from snnfx.net import Net
from snnfx.verify import verify

__version__ = "0.1.0"
__all__ = [
    "MemoryModule",
    "Net",
    "__version__",
    "convert",
    "draw",
    "errors",
    "explain",
    "functional",
    "kernels",
    "neuron",
    "online",
    "passes",
    "surrogate",
    "tune_allocator",
    "verify",
]
