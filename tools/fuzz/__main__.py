"""`python tools/fuzz`: convert random models and compare them with a plain loop, see `fuzz.py`."""

from __future__ import annotations

import sys

from fuzz import main

if __name__ == "__main__":
    sys.exit(main())
