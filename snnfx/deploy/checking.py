"""Run a written file in a process that cannot import snnfx, and compare its results with those of the net."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snnfx.deploy.interface import Interface
from snnfx.deploy.plan import Example
from snnfx.errors import ExportError, warn_once
from snnfx.sandbox.torch_internals import pytree

__all__ = ["check_file", "compare_results"]

_RUNNER = Path(__file__).parent / "run_file.py"

_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

_MOST_DIFFERENT = 0.01
"""The fraction of elements that may differ: rounding flips a spike now and then, and its consequences follow."""

_FEW = 20
"""Of outputs with fewer elements, none may differ; of others at least one."""


def check_file(kind: str, path: Path, examples: Sequence[Example], interface: Interface, *, values: bool) -> None:
    """Compare the results of a file with those of the net.

    Args:
        kind: "pt2", "aot" or "onnx".
        path: the file.
        examples: the arguments and results to compare.
        interface: the names of the tensors.
        values: whether to compare values, or only shapes and dtypes.

    Raises:
        ExportError: SNNFX808, the file cannot be run, or its results differ; SNNFX827, onnxruntime has no kernel.
    """
    found = _run(kind, path, [e.arguments for e in examples], interface.input_names)
    for example, results in zip(examples, found, strict=True):
        wanted = [leaf for leaf in pytree.tree_leaves(example.expected) if isinstance(leaf, Tensor)]
        if isinstance(results, str):
            raise _not_run(path, results, example.sizes)
        compare_results(path, interface.output_names, results, wanted, values, example.sizes)


def compare_results(
    path: Path, names: list[str], results: list[Tensor], wanted: list[Tensor], values: bool = True, sizes: str = ""
) -> None:
    """Compare the tensors that a file computes with those of the net; raises ExportError (SNNFX808)."""
    if len(results) != len(wanted):
        raise _wrong(path, f"it returns {len(results)} tensors, the net {len(wanted)}.", sizes)
    for name, actual, tensor in zip(names, results, wanted, strict=True):
        _compare(path, name, actual, tensor.detach().cpu(), values, sizes)


def _run(kind: str, path: Path, examples: list[Any], input_names: list[str]) -> list[list[Tensor] | str]:
    """The tensors that a file returns for each example, or the message of its error."""
    with tempfile.TemporaryDirectory() as folder:
        given, results = Path(folder) / "example.pt", Path(folder) / "results.pt"
        torch.save({"examples": examples, "names": input_names}, given)
        files = [str(path.resolve()), str(given), str(results)]
        # Isolated from the environment and the current folder, but with the packages of this process.
        command = [sys.executable, "-I", str(_RUNNER), json.dumps([p for p in sys.path if p]), kind, *files]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise _not_run(path, lines[-1] if lines else str(done.returncode))
        return torch.load(results, weights_only=True)  # type: ignore[no-any-return]


def _compare(path: Path, name: str, actual: Tensor, expected: Tensor, values: bool, sizes: str) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        found = f"{list(actual.shape)} {actual.dtype}".replace("torch.", "")
        wanted = f"{list(expected.shape)} {expected.dtype}".replace("torch.", "")
        raise _wrong(path, f"`{name}` is {found}, the net returns {wanted}.", sizes)
    if not values or not expected.numel():
        return
    tolerance = _TOLERANCES.get(expected.dtype, 0.0)
    same = torch.isclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    different, count = int((~same).sum()), same.numel()
    if different > max(count >= _FEW, _MOST_DIFFERENT * count):
        largest = (actual.double() - expected.double()).abs().max().item()
        raise _wrong(path, f"{different} of {count} elements of `{name}` differ, by {largest:.3g} at most.", sizes)
    if different:
        warn_once(
            "SNNFX809",
            f"{different} of {count} elements of `{name}` in {path.name} differ from the net: other orders of "
            "summation round differently, which can flip a spike.",
        )


_NO_KERNEL = ("NOT_IMPLEMENTED", "ScalarType BFloat16")
"""Parts of the errors of onnxruntime and NumPy for operations and tensors of a dtype that they do not support."""


def _not_run(path: Path, error: str, sizes: str = "") -> ExportError:
    if path.suffix == ".onnx" and any(text in error for text in _NO_KERNEL):
        return ExportError(
            "SNNFX827",
            f"onnxruntime cannot run {path.name} on a CPU",
            why=f"it has no kernel for an operation in the dtype of the net: {error}.",
            hint="Export net.float() with inputs in float32, or pass check=False for another runtime.",
        )
    return _wrong(path, f"running it without snnfx fails: {error}.", sizes)


def _wrong(path: Path, why: str, sizes: str = "") -> ExportError:
    hint = "Pass check=False to keep the file, and report this with the model."
    if sizes:
        why = f"for {sizes}, {why}"
        hint = f"Export it for the sizes of the given inputs: dynamic=(). {hint}"
    return ExportError("SNNFX808", f"the exported file {path.name} does not reproduce the net", why=why, hint=hint)
