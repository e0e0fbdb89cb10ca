"""Convert single-step spiking neural networks into multi-step ones by rewriting their torch.fx graph."""

from __future__ import annotations

from pathlib import Path

# In a plain checkout the passes lie next to this package (../passes); installed, they are snnfx/passes.
if not (Path(__file__).parent / "passes").is_dir() and (Path(__file__).parents[1] / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from snnfx.state import MemoryModule

__all__ = ["MemoryModule", "__version__"]
__version__ = "0.1.0"
