"""The version of snnfx."""

__all__ = ["__version__"]

__version__ = "0.2.0"
