"""Write `.onnx` files, one `Scan` a loop."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from snnfx.deploy.interface import Interface
from snnfx.deploy.packages import missing_packages
from snnfx.deploy.refusals import first_line
from snnfx.errors import ExportError

__all__ = ["require_onnx", "write_onnx"]

EXTERNAL_DATA_FROM = 100 * 2**20
"""Bytes of weights from which they lie in a file beside the model: a protobuf file has 2 GiB at most."""


def require_onnx(check: bool) -> None:
    """Raise ExportError if a package is missing (SNNFX803) or broken (SNNFX828)."""
    needed = ("onnx", "onnxscript", *(("onnxruntime",) if check else ()))
    missing = missing_packages(needed)
    if missing:
        only_runtime = missing == ["onnxruntime"]
        raise ExportError(
            "SNNFX803",
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            why="the check runs the file with it." if only_runtime else "torch writes ONNX files with it.",
            hint="Run `pip install snnfx[onnx]`" + (", or pass check=False." if only_runtime else "."),
        )


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    interface: Interface,
    axes: dict[str, str],
    metadata: dict[str, Any],
) -> None:
    """Translate a program to ONNX and save it; large weights go into `<name>.onnx.data`.

    Args:
        program: the program.
        path: the file.
        interface: the names of inputs and outputs.
        axes: symbol of a dynamic size in the program -> name of its axis.
        metadata: entries of the metadata of the model.

    Raises:
        ExportError: SNNFX807, an operation has no ONNX form, or not in its dtype.
    """
    try:
        with _quiet():
            translated = torch.onnx.export(
                program,
                input_names=interface.input_names,
                output_names=interface.output_names,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            "SNNFX807",
            "the net has no ONNX form",
            why=first_line(error.__cause__ or error),
            hint="Replace this operation, or export a .pt2 file.",
        ) from error
    assert translated is not None
    model = translated.model
    for graph in (model.graph, *model.functions.values()):
        _rename_axes(graph, axes)
    _separate_names(model.graph)
    model.metadata_props.clear()
    model.metadata_props.update({"snnfx": json.dumps(metadata), "snnfx_version": str(metadata["snnfx_version"])})
    model.producer_name, model.doc_string = "pytorch", ""
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    translated.save(path, external_data=size > EXTERNAL_DATA_FROM)
    _check_model(path)


def _rename_axes(graph: Any, axes: dict[str, str]) -> None:
    """Name the symbols of sizes after their axes, and drop the stack traces of nodes."""
    values = [*graph.inputs, *graph.outputs]
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                values += [*attribute.value.inputs, *attribute.value.outputs]
    for value in values:
        value.metadata_props.clear()
        if value.shape is None:
            continue
        for index, size in enumerate(value.shape):
            text = getattr(size, "value", None)
            if isinstance(text, str):
                value.shape[index] = re.sub(r"\bs\d+\b", lambda m: axes.get(m.group(), m.group()), text)


def _separate_names(graph: Any) -> None:
    """Rename values that have the name of an input or output: a buffer and its slot have one name."""
    own = [*graph.inputs, *graph.outputs]
    taken, kept = {value.name for value in own}, {id(value) for value in own}
    values = list(graph.initializers.values())
    for node in graph.all_nodes():
        values += node.outputs
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                values += [*attribute.value.inputs, *attribute.value.initializers.values()]
    for value in values:
        if value.name in taken and id(value) not in kept:
            value.name = f"{value.name}.value"


def _check_model(path: Path) -> None:
    onnx = importlib.import_module("onnx")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            "SNNFX807",
            "the net has no ONNX form",
            why=f"onnx finds an illegal operation in it: {first_line(error)}",
            hint="Replace the operation or its dtype (net.float()), or export a .pt2 file.",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the exporter prints and logs; its errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
