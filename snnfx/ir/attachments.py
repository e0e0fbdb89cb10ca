"""Register modules, parameters and buffers of passes on the caller's model, once for each name.

A container calls all its children, so a module attached to it would become a layer of the model. It goes into a child
of the container instead, which returns its operand.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from snnfx.ir.guards import is_same_value

__all__ = ["Attachments", "attach", "located"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CHILD = "snnfx_attached"


class Attachments(nn.Module):
    """The modules attached to a container; as a layer, it returns its operand."""

    def forward(self, x: Any) -> Any:
        return x


def located(model: nn.Module, target: str) -> str:
    """The target with the children that hold attached modules, e.g. "snnfx_attached.scale"; else the same."""
    found: Any = model
    atoms: list[str] = []
    for atom in target.split("."):
        if not hasattr(found, atom) and isinstance(getattr(found, _CHILD, None), Attachments):
            atoms.append(_CHILD)
            found = getattr(found, _CHILD)
        if not hasattr(found, atom):
            return target
        atoms.append(atom)
        found = getattr(found, atom)
    return ".".join(atoms)


def attach(model: nn.Module, name: str, value: nn.Module | nn.Parameter | Tensor) -> Any:
    """Register an object on a model, or return the equal one that an earlier run of the pass has registered.

    Args:
        model: the model.
        name: a qualified name whose parent exists.
        value: the object.

    Raises:
        ValueError: the model has an object of this name with another class, other shapes or other options.
    """
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(value, nn.Module) and isinstance(module, _CONTAINERS) and attribute not in module._modules:
        if _CHILD not in module._modules:
            module.add_module(_CHILD, Attachments().train(model.training))
        module = module.get_submodule(_CHILD)
    for kind in ("_modules", "_parameters", "_buffers"):
        if attribute in vars(module)[kind]:
            present = vars(module)[kind][attribute]
            difference = _difference(present, value)
            if difference:
                raise ValueError(
                    f"the model has `{name}` already, and {difference}; attach under another name, or convert a copy "
                    "of the model"
                )
            return present
    if isinstance(value, nn.Module):
        module.add_module(attribute, value.train(model.training))
    elif isinstance(value, nn.Parameter):
        module.register_parameter(attribute, value)
    else:
        module.register_buffer(attribute, value)
    return getattr(module, attribute)


def _difference(present: Any, value: Any) -> str:
    """The first difference besides the values of tensors, which training changes; "" if there is none."""
    if type(present) is not type(value):
        return f"it is a {type(present).__name__}, not a {type(value).__name__}"
    if isinstance(present, Tensor):
        shapes = list(present.shape), list(value.shape)
        return "" if shapes[0] == shapes[1] else f"its shape is {shapes[0]}, not {shapes[1]}"
    if not isinstance(present, nn.Module):
        return ""
    for name, mine in present.named_modules():
        other = dict(value.named_modules()).get(name)
        if type(other) is not type(mine):
            return f"its part `{name}` is a {type(mine).__name__}, not a {type(other).__name__}"
        for key, option in _options(mine).items():
            if key in _options(other) and not is_same_value(_options(other)[key], option):
                return f"its {name + '.' if name else ''}{key} is {option!r}, not {_options(other)[key]!r}"
    tensors = {**dict(value.named_parameters()), **dict(value.named_buffers())}
    for name, tensor in [*present.named_parameters(), *present.named_buffers()]:
        if name in tensors and tensors[name].shape != tensor.shape:
            return f"the shape of its {name} is {list(tensor.shape)}, not {list(tensors[name].shape)}"
    return ""


def _options(module: nn.Module | None) -> dict[str, Any]:
    """The attributes that are numbers or texts, which a constructor sets."""
    return {
        name: option
        for name, option in vars(module).items()
        if isinstance(option, int | float | str) and name != "training" and not name.startswith("_")
    }
