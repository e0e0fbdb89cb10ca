"""Command line `python -m snnfx` (see `snnfx.cli.commands`)."""

from __future__ import annotations

import sys

from snnfx.cli.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
