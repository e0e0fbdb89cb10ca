"""Run a written file in a process that cannot import snnfx, and compare its results with those of the net."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnfx.errors import ExportError, warn_once
from snnfx.sandbox.torch_internals import pytree

__all__ = ["check_file", "compare_results"]

_RUNNER = Path(__file__).parent / "run_file.py"

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_MOST_DIFFERENT = 0.01
"""The fraction of elements that may differ: rounding flips a spike now and then, and its consequences follow."""


def check_file(
    kind: str, path: Path, example: Any, expected: Any, names: list[str], input_names: list[str], values: bool
) -> None:
    """Compare the results of a file with the expected ones.

    Args:
        kind: "pt2", "aot" or "onnx".
        path: the file.
        example: the arguments of the program.
        expected: its results.
        names: a name for each tensor of the results.
        input_names: a name for each tensor of the arguments.
        values: whether to compare values, or only shapes and dtypes.

    Raises:
        ExportError: SNNFX808, the file cannot be run, or its results differ.
    """
    results = _run(kind, path, example, input_names)
    wanted = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
    compare_results(path, names, results, wanted, values)


def compare_results(
    path: Path, names: list[str], results: list[Tensor], wanted: list[Tensor], values: bool = True
) -> None:
    """Compare the tensors that a file computes with those of the net; raises ExportError (SNNFX808)."""
    if len(results) != len(wanted):
        raise _wrong(path, f"it returns {len(results)} tensors, the net {len(wanted)}.")
    for name, actual, tensor in zip(names, results, wanted, strict=True):
        _compare(path, name, actual, tensor.detach().cpu(), values)


def _run(kind: str, path: Path, example: Any, input_names: list[str]) -> list[Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "example.pt", Path(folder) / "results.pt"
        torch.save({"example": example, "names": input_names}, given)
        command = [sys.executable, "-I", str(_RUNNER), kind, str(path.resolve()), str(given), str(results)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise _wrong(path, f"running it without snnfx fails: {lines[-1] if lines else done.returncode}.")
        return torch.load(results, weights_only=True)  # type: ignore[no-any-return]


def _compare(path: Path, name: str, actual: Tensor, expected: Tensor, values: bool) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        found = f"{list(actual.shape)} {actual.dtype}".replace("torch.", "")
        wanted = f"{list(expected.shape)} {expected.dtype}".replace("torch.", "")
        raise _wrong(path, f"`{name}` is {found}, the net returns {wanted}.")
    if not values or not expected.numel():
        return
    tolerance = _TOLERANCES.get(expected.dtype, 0.0)
    same = torch.isclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    different = int((~same).sum())
    if different > max(1, _MOST_DIFFERENT * same.numel()):
        largest = (actual.double() - expected.double()).abs().max().item()
        raise _wrong(path, f"{different} of {same.numel()} elements of `{name}` differ, by {largest:.3g} at most.")
    if different:
        warn_once(
            "SNNFX809",
            f"{different} of {same.numel()} elements of `{name}` in {path.name} differ from the net: other orders of "
            "summation round differently, which can flip a spike.",
        )


def _wrong(path: Path, why: str) -> ExportError:
    return ExportError(
        "SNNFX808",
        f"the exported file {path.name} does not reproduce the net",
        why=why,
        hint="Pass check=False to keep the file, and report this with the model.",
    )
