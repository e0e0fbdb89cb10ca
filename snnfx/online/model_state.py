"""Read the state that a model keeps between calls, and write it back after training.

A single-step model keeps its state in its modules. Slots that a rule adds (traces, masks) have no module; they are
stored on the model, and dropped when the model is reset.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from snnfx.runtime.net import Net
from snnfx.state.registry import adapter_of

__all__ = ["read_model_state", "write_model_state"]

_ADDED_STATE = "_snnfx_online_state"
State = dict[str, Any]


def read_model_state(model: nn.Module, slots: list[str], edited_slots: list[str]) -> State | None:
    """Read the state before the first time step.

    Args:
        model: a net or a single-step model.
        slots: the slots of the model itself.
        edited_slots: the slots of the edited net, including those that the rule adds.

    Returns:
        The state by slot, or None if the model is in its reset state.
    """
    if isinstance(model, Net):
        own: State | None = model.carried_state if _carries_state(model) else None
    else:
        own = {slot: _read(model, slot) for slot in slots}
        if not any(isinstance(v, Tensor) and v.numel() for v in own.values()):
            own = None
    stored: State = model.__dict__.pop(_ADDED_STATE, {})
    if own is None:
        return None
    # A model that was stepped before the rule added its traces has none yet: they start at zero.
    return {**own, **{name: stored.get(name, 0.0) for name in edited_slots if name not in slots}}


def write_model_state(model: nn.Module, slots: list[str], state: State) -> None:
    """Leave the final state in the model, as stepping the model would."""
    if isinstance(model, Net):
        if not _carries_state(model):
            return
        model.carried_state = {slot: state[slot] for slot in slots}
    else:
        for slot in slots:
            _write(model, slot, state[slot])
    added = {name: value for name, value in state.items() if name not in slots}
    if added:
        model.__dict__[_ADDED_STATE] = added


def _carries_state(net: Net) -> bool:
    return net.options.carry_state or net.options.step_mode == "s"


def _module_and_attribute(model: nn.Module, slot: str) -> tuple[nn.Module, str]:
    path, _, attribute = slot.rpartition(".")
    return model.get_submodule(path), attribute


def _read(model: nn.Module, slot: str) -> Any:
    module, name = _module_and_attribute(model, slot)
    adapter = adapter_of(module)
    if adapter is not None and name in adapter.names(module):
        return adapter.read(module)[adapter.names(module).index(name)]
    return getattr(module, name, None)


def _write(model: nn.Module, slot: str, value: Any) -> None:
    module, name = _module_and_attribute(model, slot)
    adapter = adapter_of(module)
    if adapter is not None and name in adapter.names(module):
        names = adapter.names(module)
        adapter.write(module, [value if n == name else v for n, v in zip(names, adapter.read(module), strict=True)])
    else:
        setattr(module, name, value)
