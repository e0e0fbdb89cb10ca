"""The file of a saved net: a safetensors file whose metadata has one JSON text.

A safetensors file is a table of tensors and nothing else: no archive with paths, no compression, no code. Its reader
checks that the table covers the bytes of the file exactly. Other programs can read the weights by the model's names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snnfx.deploy.written_files import written_at_once
from snnfx.errors import SaveError
from snnfx.saving.plain_values import MalformedFile, entry

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["PREFIX", "malformed", "read_file", "require_safetensors", "write_file"]

PREFIX = "snnfx:"
"""Tensors that are not in the model's state_dict have names with this prefix."""
_KEY = "snnfx"
FORMAT = 1
_MOST_HEADER_BYTES = 100_000_000
"""The limit of safetensors."""


def require_safetensors() -> tuple[ModuleType, ModuleType]:
    """The modules `(safetensors, safetensors.torch)`.

    Raises:
        SaveError: SNNFX803, the package is missing.
    """
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise SaveError(
            "SNNFX803",
            "the package safetensors is missing",
            why="saved nets are safetensors files.",
            hint="Install it: pip install snnfx[save].",
        ) from error
    return safetensors, safetensors.torch


def write_file(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and a record of plain values to a file."""
    _, writer = require_safetensors()
    metadata = {_KEY: json.dumps({"format": FORMAT, **record}, separators=(",", ":"), allow_nan=False), "format": "pt"}
    if sum(map(len, metadata.values())) > _MOST_HEADER_BYTES // 2:
        raise SaveError("SNNFX824", "the net cannot be saved", why="its plan does not fit the header of the file.")
    with written_at_once(path) as folder:
        writer.save_file(dict(tensors), folder / path.name, metadata)


def read_file(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Read a file: `(tensors, record)`.

    Raises:
        SaveError: SNNFX820, the file does not exist, or `snnfx.save` did not write it.
    """
    safetensors, _ = require_safetensors()
    if not path.is_file():
        raise SaveError(
            "SNNFX820", f"`{path}` cannot be loaded", why="the file does not exist.", hint="Pass a file of snnfx.save."
        )
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > min(size, _MOST_HEADER_BYTES):
            raise MalformedFile("its header is larger than the file")
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise MalformedFile("it is a safetensors file without a net")
            record = json.loads(metadata[_KEY], parse_constant=_no_constant)
            if entry(record, "format") != FORMAT:
                raise MalformedFile("another version of snnfx wrote it")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RecursionError, RuntimeError, safetensors.SafetensorError) as error:
        raise malformed(path, error) from error
    return tensors, record


def malformed(path: Path, error: Exception) -> SaveError:
    """The error for a file that `snnfx.save` did not write."""
    text = str(error).partition("\n")[0][:200] if str(error) else type(error).__name__
    return SaveError(
        "SNNFX820",
        f"`{path}` cannot be loaded",
        why=f"it is truncated, changed, or not a file of snnfx.save: {text.rstrip('.')}.",
        hint="Save the net again, or load it from a complete copy of the file.",
    )


def _no_constant(name: str) -> Callable[..., Any]:
    raise MalformedFile(f"the number {name} is not JSON")


def stored(tensor: Tensor) -> Tensor:
    """A tensor as it is written: dense, on the CPU, with memory of its own."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def is_storable(tensor: Any) -> bool:
    """Whether a file can contain a tensor."""
    is_dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    return is_dense and not tensor.is_nested and not tensor.is_quantized and tensor.dtype is not torch.complex128
