"""`python tools/gallery`: convert and time models in the style of published code, see `gallery.py`."""

from __future__ import annotations

import sys

from gallery import main

if __name__ == "__main__":
    sys.exit(main())
