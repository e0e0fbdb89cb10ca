"""`python tools/fuzz`: compare converted random models with stepping them, see `fuzz.py`."""

from __future__ import annotations

import sys

from fuzz import main

if __name__ == "__main__":
    sys.exit(main())
