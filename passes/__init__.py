"""The pass pipeline that turns a step graph into a multi-step one."""

from __future__ import annotations

if __name__ != "snnfx.passes":
    raise ImportError("this folder is the package snnfx.passes: write `import snnfx.passes`, not `import passes`")
