"""Convert single-step spiking neural networks into multi-step ones by rewriting their torch.fx graph."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# In a plain checkout the passes lie next to this package (../passes); installed, they are snnfx/passes.
if not (Path(__file__).parent / "passes").is_dir() and (Path(__file__).parents[1] / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from snnfx.convert import convert
from snnfx.net import Net
from snnfx.state import MemoryModule
from snnfx.verify import verify

__all__ = ["MemoryModule", "Net", "__version__", "convert", "verify"]
__version__ = "0.1.0"

_FUNCTIONS = ("draw", "explain")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(f"snnfx.{name}"), name)
    elif name in ("errors", "functional", "neuron", "passes", "surrogate"):
        value = importlib.import_module(f"snnfx.{name}")
    else:
        raise AttributeError(f"module 'snnfx' has no attribute {name!r}")
    globals()[name] = value
    return value
