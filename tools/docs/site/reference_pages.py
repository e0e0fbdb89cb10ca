"""The pages of the reference: one for each public module, with all names of its `__all__`."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import snnfx

__all__ = ["MODULES", "write_reference"]

MODULES = {
    "snnfx": "The functions and classes that most programs need.",
    "snnfx.neuron": "Neurons for single-step models, and base classes for your own.",
    "snnfx.surrogate": "Surrogate gradients: the derivative that a spike has in the backward pass.",
    "snnfx.functional": "Functions that run modules over sequences, and that reset and detach their state.",
    "snnfx.online": "Online learning rules and their trainer.",
    "snnfx.passes": "The passes of the conversion, and base classes for your own.",
    "snnfx.errors": "The classes of errors and warnings. The :doc:`codes </codes/index>` have a page each.",
}
"""The public modules and their purpose."""


def write_reference(folder: Path) -> None:
    """Write a page for each module of `MODULES`, and the list of modules."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, purpose in MODULES.items():
        (folder / f"{name}.rst").write_text(page(sys.modules[name], purpose), encoding="utf-8")
    rows = [f":doc:`{name}`\n    {purpose}\n" for name, purpose in MODULES.items()]
    tree = "\n".join(f"    {name}" for name in MODULES)
    text = "Reference\n=========\n\n" + "\n".join(rows) + f"\n.. toctree::\n    :hidden:\n\n{tree}\n"
    (folder / "index.rst").write_text(text, encoding="utf-8")


def page(module: ModuleType, purpose: str) -> str:
    """The page of a module: a table of its names, then the docstring of each."""
    names = [name for name in module.__all__ if name != "__version__"]
    documented = [name for name in names if not inspect.ismodule(getattr(module, name))]
    title = module.__name__
    parts = [f"{title}\n{'=' * len(title)}", purpose]
    # `functional.reset_net` has the full name `snnfx.functional.reset_net`.
    parts.append(f".. currentmodule:: {title}")
    parts += [entry(module, name) for name in documented]
    return "\n\n".join(parts) + "\n"


def entry(module: ModuleType, name: str) -> str:
    """The directive that documents a name."""
    value, full_name = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.isclass(value):
        return f".. autoclass:: {full_name}\n    :members:\n    :show-inheritance:"
    if inspect.isroutine(value):
        return f".. autofunction:: {full_name}"
    text = textwrap.indent(comment_of(module, name), "    ")
    return f".. py:data:: {full_name}\n    :type: {type(value).__name__}\n\n{text}"


def comment_of(module: ModuleType, name: str) -> str:
    """The string below the assignment of a module-level name, in the module that defines it."""
    defining = defining_module(module, name)
    body = ast.parse(inspect.getsource(defining)).body
    for statement, following in zip(body, body[1:], strict=False):
        if assigns(statement, name) and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            return inspect.cleandoc(str(following.value.value))
    raise LookupError(f"{defining.__name__}.{name} has no string below its assignment that documents it")


def assigns(statement: ast.stmt, name: str) -> bool:
    targets: list[Any] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def defining_module(module: ModuleType, name: str) -> ModuleType:
    """The module whose source assigns a name that `module` exports."""
    for other in [module, *(m for key, m in sorted(sys.modules.items()) if key.startswith(f"{snnfx.__name__}."))]:
        if getattr(other, name, None) is getattr(module, name) and any(
            assigns(statement, name) for statement in ast.parse(inspect.getsource(other)).body
        ):
            return other
    raise LookupError(f"no module assigns {name}")
