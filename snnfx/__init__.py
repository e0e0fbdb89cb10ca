"""Convert single-step spiking neural networks into multi-step ones by rewriting their torch.fx graph."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

# In a plain checkout the passes lie next to this package (../passes); installed, they are snnfx/passes.
if not (Path(__file__).parent / "passes").is_dir() and (Path(__file__).parents[1] / "passes").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from snnfx.state import MemoryModule

__all__ = ["MemoryModule", "__version__"]
__version__ = "0.1.0"

_FUNCTIONS = ("convert", "draw", "explain", "verify", "capture")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(f"snnfx.{name}"), name)
    elif name == "Net":
        value = importlib.import_module("snnfx.net").Net
    elif name in ("errors", "functional", "neuron", "passes", "surrogate"):
        value = importlib.import_module(f"snnfx.{name}")
    else:
        raise AttributeError(f"module 'snnfx' has no attribute {name!r}")
    globals()[name] = value
    return value
