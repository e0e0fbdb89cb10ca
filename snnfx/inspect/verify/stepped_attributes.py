"""Find the attributes that earlier steps of a model have changed, to start a reference from its first state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from snnfx.inspect.verify.observed_contents import changed_names, observe
from snnfx.sandbox.attribute_values import AttributeValues
from snnfx.state.registry import registered_attributes

__all__ = ["stepped_attributes"]


def stepped_attributes(
    model: nn.Module, first: AttributeValues, is_source: bool, step: Callable[[], Any]
) -> list[tuple[str, str]]:
    """The attributes of a model that earlier steps have changed and `reset_net` does not know.

    The model is stepped from the first values of its attributes. Attributes that the steps do not change are settings,
    which the user may have changed since. A model that is not the source of the net keeps its own values, except
    attributes that only a step creates; it is stepped from its own values.

    Args:
        model: the model after `reset_net`; the caller restores it afterwards.
        first: the attributes of the source of the net at conversion.
        is_source: whether the model is the source of the net.
        step: runs the steps of the model.

    Returns:
        Pairs of module name and attribute.
    """
    registered = registered_attributes(model)
    modules = dict(model.named_modules())
    differing = [(n, a) for n, a in first.changed_in(model) if (modules[n], a) not in registered]
    if not is_source:
        differing = [key for key in differing if key not in first.names]
    if not differing:
        return []
    for name, attribute in differing if is_source else ():
        first.restore(model, name, attribute)
    before = observe(model)
    step()
    after = observe(model)
    entries = [after.get(name) or before[name] for name in changed_names(before, after)]
    changed = {(id(entry.owner), entry.attribute) for entry in entries}
    return [(name, attribute) for name, attribute in differing if (id(modules[name]), attribute) in changed]
