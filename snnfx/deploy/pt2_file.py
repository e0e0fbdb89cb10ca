"""Write `.pt2` files: programs of torch.export, and AOTInductor packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from snnfx.deploy.refusals import first_line
from snnfx.errors import ExportError
from snnfx.sandbox.torch_internals import compile_package, quiet_serializer

__all__ = ["METADATA_FILE", "write_package", "write_program"]

METADATA_FILE = "metadata.json"
"""The extra file of a `.pt2` file with the names, axes and initial states."""


def write_program(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Save a program with its metadata."""
    with quiet_serializer():
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def write_package(program: torch.export.ExportedProgram, path: Path, metadata: dict[str, Any]) -> None:
    """Compile a program with AOTInductor.

    Raises:
        ExportError: SNNFX807, the compilation fails.
    """
    configs = {"aot_inductor.metadata": {"snnfx": json.dumps(metadata)}}
    try:
        compile_package(program, str(path), configs)
    except Exception as error:
        raise ExportError(
            "SNNFX807",
            "AOTInductor cannot compile the net",
            why=first_line(error),
            hint="Export a program instead (package=None), or another choice of dynamic axes.",
        ) from error
