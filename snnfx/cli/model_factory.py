"""Load the model named on the command line: `pkg.module:factory` or `path/to/file.py:factory`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from snnfx.errors import ToolError

__all__ = ["load_model"]

_HINT = "Pass pkg.module:factory or path/to/file.py:factory, a model or a callable that returns one without arguments."


def load_model(path: str) -> nn.Module:
    """Load a model from a module or a file.

    Args:
        path: `pkg.module:factory` with a module that can be imported from the current directory, or
            `path/to/file.py:factory`. The factory is a model, or a class or function that returns one when called
            without arguments.

    Returns:
        The model.

    Raises:
        ToolError: SNNFX602, the module, file or attribute does not exist, or the factory fails or returns something
            other than a model.
    """
    module_path, colon, name = path.rpartition(":")
    if not colon or not module_path or not name:
        raise ToolError("SNNFX602", f"`{path}` does not name a model", hint=_HINT)
    with _current_directory_importable():
        module = _load_file(module_path) if module_path.endswith(".py") else _import(module_path)
        factory = _attribute(module, name, path)
        model = factory if isinstance(factory, nn.Module) else _make(factory, path)
    if not isinstance(model, nn.Module):
        what = f"`{path}` is of type" if model is factory else f"`{path}` returned a value of type"
        raise ToolError("SNNFX602", f"{what} {type(model).__name__}, not an nn.Module", hint=_HINT)
    return model


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # If the module exists but one of its own imports does not, importing it has failed.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ToolError(
                "SNNFX602",
                f"the module `{name}` was not found",
                why=f"{error} in {os.getcwd()} and the installed packages.",
                hint=_HINT,
            ) from error
        raise _failed(f"importing `{name}`", error) from error
    except Exception as error:  # a user's module may fail in any way
        raise _failed(f"importing `{name}`", error) from error


def _load_file(name: str) -> ModuleType:
    file = Path(name)
    if not file.is_file():
        raise ToolError(
            "SNNFX602", f"the file `{name}` was not found", why=f"the current directory is {os.getcwd()}.", hint=_HINT
        )
    # As for a script, the file can import modules in its own folder.
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(f"snnfx_loaded_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may fail in any way
        del sys.modules[spec.name]
        raise _failed(f"running `{name}`", error) from error
    return module


def _attribute(module: ModuleType, name: str, path: str) -> Any:
    value: Any = module
    for atom in name.split("."):
        if not hasattr(value, atom):
            own = [key for key, item in vars(module).items() if callable(item) and _is_defined_in(item, module)]
            raise ToolError(
                "SNNFX602",
                f"`{path}` does not exist",
                why=f"`{module.__name__.removeprefix('snnfx_loaded_')}` defines {_list(own)}.",
                hint=_HINT,
            )
        value = getattr(value, atom)
    return value


def _is_defined_in(value: Any, module: ModuleType) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def _list(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) if names else "neither functions nor classes"


def _make(factory: Any, path: str) -> Any:
    if not callable(factory):
        return factory
    try:
        return factory()
    except Exception as error:  # a user's factory may fail in any way
        raise _failed(f"calling `{path}`", error) from error


def _failed(what: str, error: Exception) -> ToolError:
    # The last line of the user's own code in the traceback.
    not_users = (__file__, "<", os.path.dirname(importlib.__file__), os.path.dirname(torch.__file__))
    users = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(not_users)]
    where = f"{os.path.relpath(users[-1].filename)}:{users[-1].lineno}" if users else ""
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{os.path.relpath(error.filename)}:{error.lineno}"
    why = f"{type(error).__name__}: {error}".rstrip(".") + "."
    return ToolError(
        "SNNFX602", f"{what} failed", where=where, why=why, hint="Correct the code there, or pass another factory."
    )
