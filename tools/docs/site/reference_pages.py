"""The pages of the reference: one for each public module, with all names of its `__all__`."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from itertools import pairwise
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
    "snnfx.errors": "The classes of errors and warnings. The [codes](../codes/index.md) have a page each.",
}
"""The public modules and their purpose."""


def write_reference(folder: Path) -> None:
    """Write a page for each module of `MODULES`, and the list of modules."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        (folder / f"{name}.md").write_text(page(sys.modules[name]), encoding="utf-8")
    rows = [f"[{name}]({name}.md)\n: {purpose}" for name, purpose in MODULES.items()]
    tree = "\n".join(MODULES)
    parts = ["# Reference", *rows, f"```{{toctree}}\n:hidden:\n\n{tree}\n```"]
    (folder / "index.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def page(module: ModuleType) -> str:
    """The page of a module: its docstring in Markdown, then the docstring of each public name."""
    title = module.__name__
    parts = [f"# {title}", introduction(module), f"```{{eval-rst}}\n.. currentmodule:: {title}\n```"]
    for name in module.__all__:
        if name != "__version__" and not inspect.ismodule(getattr(module, name)):
            parts += [f"## {name}", f"```{{eval-rst}}\n{entry(module, name)}\n```"]
    return "\n\n".join(parts) + "\n"


def introduction(module: ModuleType) -> str:
    """The docstring of a module. Its examples, and its indented lines, are code."""
    text = inspect.cleandoc(module.__doc__ or "")
    return re.sub(r"^Example:$", "**Example**\n", text, flags=re.MULTILINE)


def entry(module: ModuleType, name: str) -> str:
    """The directive that documents a name."""
    value, full_name = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.isclass(value):
        return f".. autoclass:: {full_name}\n    :members:\n    :show-inheritance:"
    if inspect.isroutine(value):
        return f".. autofunction:: {full_name}"
    text = textwrap.indent(comment_of(module, name), "    ")
    return f".. py:data:: {name}\n    :module: {module.__name__}\n    :type: {type(value).__name__}\n\n{text}"


def comment_of(module: ModuleType, name: str) -> str:
    """The string below the assignment of a module-level name, in the module that defines it."""
    defining = defining_module(module, name)
    body = ast.parse(inspect.getsource(defining)).body
    for statement, following in pairwise(body):
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
