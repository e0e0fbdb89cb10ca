"""The state that a model keeps between calls, for functions that go on from it and leave it there.

Single-step models keep their state in their modules. What an edit adds (traces, masks) has no place there; it is kept
beside the model, as long as the model has not been reset in between.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from snnfx.runtime.net import Net
from snnfx.state.registry import adapter_of

__all__ = ["read_state", "write_state"]

_EXTRA = "_snnfx_online_state"
State = dict[str, Any]


def read_state(model: nn.Module, slots: list[str], names: list[str]) -> State | None:
    """The state before the first step.

    Args:
        model: a net or a single-step model.
        slots: the slots of the model itself.
        names: those of the edited net, added ones included.

    Returns:
        None when the model is in its reset state.
    """
    if isinstance(model, Net):
        own: State | None = model.carried_state if _carries(model) else None
    else:
        own = {slot: _read(model, slot) for slot in slots}
        if not any(isinstance(v, Tensor) and v.numel() for v in own.values()):
            own = None
    extra: State = model.__dict__.pop(_EXTRA, {})
    if own is None:
        return None
    added = [name for name in names if name not in slots]
    if any(name not in extra for name in added):
        # The state is older than the traces: they start now.
        return {**own, **{name: extra.get(name, 0.0) for name in added}}
    return {**own, **{name: extra[name] for name in added}}


def write_state(model: nn.Module, slots: list[str], state: State) -> None:
    """Leave the state after the last step in the model, as stepping it would have."""
    if isinstance(model, Net):
        if not _carries(model):
            return
        model.carried_state = {slot: state[slot] for slot in slots}
    else:
        for slot in slots:
            _write(model, slot, state[slot])
    extra = {name: value for name, value in state.items() if name not in slots}
    if extra:
        model.__dict__[_EXTRA] = extra


def _carries(net: Net) -> bool:
    return net.options.carry_state or net.options.step_mode == "s"


def _owner(model: nn.Module, slot: str) -> tuple[nn.Module, str]:
    path, _, name = slot.rpartition(".")
    return model.get_submodule(path), name


def _read(model: nn.Module, slot: str) -> Any:
    module, name = _owner(model, slot)
    adapter = adapter_of(module)
    if adapter is not None and name in adapter.names(module):
        return adapter.read(module)[adapter.names(module).index(name)]
    return getattr(module, name, None)


def _write(model: nn.Module, slot: str, value: Any) -> None:
    module, name = _owner(model, slot)
    adapter = adapter_of(module)
    if adapter is not None and name in adapter.names(module):
        names = adapter.names(module)
        adapter.write(module, [value if n == name else v for n, v in zip(names, adapter.read(module), strict=True)])
    else:
        setattr(module, name, value)
