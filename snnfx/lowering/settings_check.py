"""Check the settings of modules in generated code, for nets that bind their launches.

`SettingsOfRegion` compares a module with a snapshot at each call of each region. A bound call compares the modules of
all regions at once, and only what may change: the attributes that are settings, hooks, and the registered tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from snnfx.lowering.live_settings import HOOKS, NOT_HYPERPARAMETERS, Snapshot, modules_of

__all__ = ["conditions_of_settings"]

_MOST_ELEMENTS = 16


def conditions_of_settings(
    modules: Iterable[nn.Module], constant: Callable[[Any], str], hooks: list[Any]
) -> list[str] | None:
    """Python expressions that are true as long as no setting of these modules and their submodules changes.

    Args:
        modules: the modules.
        constant: returns a name for a value in the generated code.
        hooks: gets the dicts with the hooks of the modules, which have to stay empty.

    Returns:
        The expressions; None if a module has hooks, which kernels do not run.
    """
    conditions: list[str] = []
    found = {id(m): m for module in modules for m in modules_of(module)}
    for module in found.values():
        attributes = vars(module)
        if any(attributes[name] for name in HOOKS):
            return None
        m, d = constant(module), constant(attributes)
        conditions.append(f"{m}.__class__ is {constant(type(module))} and {m}.__dict__ is {d}")
        conditions.append(f"len({d}) == {len(attributes)}")
        hooks += [attributes[name] for name in HOOKS]
        for registry in ("_parameters", "_buffers", "_modules"):
            conditions += _of_registry(f"{d}[{registry!r}]", attributes[registry], constant)
        is_nested = False
        for name, value in attributes.items():
            if name not in NOT_HYPERPARAMETERS:
                conditions.append(f"{d}[{name!r}] is {constant(value)}")
                inside = _of_contents(value, constant)
                conditions += inside or []
                is_nested = is_nested or inside is None
        if is_nested:
            conditions.append(f"{constant(Snapshot(module).is_current)}()")
    return conditions


def _of_contents(value: Any, constant: Callable[[Any], str]) -> list[str] | None:
    """Conditions that the elements of a list or dict stay; None for nested or long ones."""
    if not isinstance(value, list | dict | tuple):
        return []
    elements = [*value.values()] if isinstance(value, dict) else [*value]
    keys = [*value] if isinstance(value, dict) else []
    if any(isinstance(e, list | dict | tuple) for e in [*elements, *keys]) or len(elements) > _MOST_ELEMENTS:
        return None
    if isinstance(value, tuple):
        return []
    if not isinstance(value, dict):
        items = [f"{constant(value)}[{i}] is {constant(e)}" for i, e in enumerate(elements)]
    else:
        items = [f"{constant(value)}.get({constant(k)}, {constant(value)}) is {constant(e)}" for k, e in value.items()]
    return [f"len({constant(value)}) == {len(value)}", *items]


def _of_registry(registry: str, values: dict[str, Any], constant: Callable[[Any], str]) -> list[str]:
    if not values:
        return [f"not {registry}"]
    conditions = [f"len({registry}) == {len(values)}"]
    for name, value in values.items():
        read = f"{registry}.get({name!r})"
        if isinstance(value, nn.Module) or value is None:
            conditions.append(f"{read} is {constant(value)}")
            continue
        conditions.append(f"(t := {read}) is {constant(value)} and t.shape == {constant(value.shape)}")
        conditions.append(f"t.dtype is {constant(value.dtype)} and t.requires_grad is {value.requires_grad}")
    return conditions
