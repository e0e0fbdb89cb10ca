"""snnTorch: its neurons as pure steps, whether they keep their state (`init_hidden=True`) or are passed it.

Written for snnTorch 1.0. Its neurons hold the state in buffers of their own and create it when the shape of the input
is another one, so a step swaps the buffers in and out around one call. A call `spk, mem = lif(x, mem)` becomes a node
that takes the state from its arguments; then the buffers are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import snntorch
import torch
from torch import nn

from snnfx.errors import CaptureError
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.registry import register_adapter
from snnfx.state.stateful import State, StatefulCall

__all__ = ["SnnTorchAdapter"]

_STATES: dict[str, tuple[str, ...]] = {
    "Leaky": ("mem",),
    "Lapicque": ("mem",),
    "Synaptic": ("syn", "mem"),
    "Alpha": ("syn_exc", "syn_inh", "mem"),
    "RLeaky": ("spk", "mem"),
    "RSynaptic": ("spk", "syn", "mem"),
    "SLSTM": ("syn", "mem"),
    "SConv2dLSTM": ("syn", "mem"),
}
"""The buffers that hold the state, in the order in which `forward` takes and returns them."""

_SHAPED_LIKE_INPUT = ("Leaky", "Lapicque", "Synaptic", "Alpha", "RLeaky", "RSynaptic")
_ELEMENTWISE = ("Leaky", "Lapicque", "Synaptic", "Alpha")
_WHOLE_SEQUENCES = ("StateLeaky", "LinearLeaky", "AssociativeLeaky", "LeakyParallel")


class SnnTorchAdapter:
    """The neurons that can be stepped: `Leaky`, `Synaptic`, `Alpha`, `Lapicque`, `RLeaky`, `RSynaptic`, `SLSTM`, ..."""

    def __init__(self, family: str) -> None:
        self.family = family

    def elementwise(self, module: nn.Module) -> bool:
        return self.family in _ELEMENTWISE and not module.inhibition and not module.state_quant

    def keeps_batch(self, module: nn.Module) -> bool:
        """Each sample of dim 0 is computed on its own, and everything has the rank of the input."""
        return True

    def is_leaf(self, module: nn.Module) -> bool:
        return True

    def refuse(self, module: nn.Module, where: str) -> None:
        return None

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return _STATES[self.family]

    def read(self, module: nn.Module) -> State:
        return tuple(module._buffers[name] for name in self.names(module))

    def write(self, module: nn.Module, state: Sequence[Any]) -> None:
        for name, value in zip(self.names(module), state, strict=True):
            module._buffers[name] = value

    def reset(self, module: nn.Module) -> None:
        module.reset_mem()  # type: ignore[operator]

    def initial(self, module: nn.Module, *inputs: Any, **kwargs: Any) -> State:
        (x,) = (*inputs, *kwargs.values())
        start = torch.zeros_like(x) if self.family in _SHAPED_LIKE_INPUT else x.new_zeros(0)
        return (start,) * len(self.names(module))

    def step(self, module: nn.Module, state: State, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        (x,) = (*inputs, *kwargs.values())
        attributes, buffers = dict(module.__dict__), dict(module._buffers)
        names = self.names(module)
        try:
            for name, value in zip(names, state, strict=True):
                # An empty state has the shape of no input: the neuron starts from zeros.
                module._buffers[name] = x.new_zeros(0) if value is None else value
            if "reset_mechanism_val" in module._buffers:
                # A number instead of a tensor: the neuron compares it in Python.
                module._buffers["reset_mechanism_val"] = _reset_number(module)  # type: ignore[assignment]
            outputs = module(x) if has_forward_hooks(module) else module.forward(x)
            following = tuple(module._buffers[name] for name in names)
        finally:
            _put_back(module.__dict__, attributes)
            _put_back(module._buffers, buffers)
        # What the call returns is put together again from the spikes and the states.
        return outputs[0] if isinstance(outputs, tuple) else outputs, following

    def read_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], starts_as_none: bool
    ) -> StatefulCall:
        """`lif(x)`, `lif(x, mem)`, `lif(x, mem=mem)`."""
        names = self.names(module)
        inputs = args[:1] or (kwargs["input_"],)
        given = {**dict(zip(names, args[1:], strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
        values = tuple(given.get(name) for name in names)
        passed = [value is not None for value in values]

        def returns(spikes: Any, following: tuple[Any, ...]) -> Any:
            if module.init_hidden and not module.output:
                return spikes
            # Recurrent neurons have their spikes among the states.
            return following if names[0] == "spk" else (spikes, *following)

        if any(passed) and (module.init_hidden or not all(passed)):
            why = "it has init_hidden=True." if module.init_hidden else f"of {', '.join(names)} only a part is passed."
            raise CaptureError(
                "SNNFX211",
                f"a {self.family} is called with states that it does not take like this",
                why=why,
                hint="Pass all states of the neuron or none.",
            )
        # None at the first step stands for zeros, where the caller hands the state on. Else the neuron takes its own.
        explicit = all(passed) or (starts_as_none and bool(given) and not module.init_hidden)
        return StatefulCall(values if explicit else None, inputs, {}, returns)


class _SnnTorchSequenceAdapter(SnnTorchAdapter):
    """Neurons that take all time steps at once."""

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return ()

    def elementwise(self, module: nn.Module) -> bool:
        return False

    def refuse(self, module: nn.Module, where: str) -> None:
        raise CaptureError(
            "SNNFX205",
            f"`{where}` ({type(module).__name__}) has no single-step form",
            why="it takes the whole sequence at once.",
            hint="Use snntorch.Leaky, which can be stepped, or convert the parts of the model around it.",
        )


def _reset_number(module: nn.Module) -> int:
    """The reset mechanism as the number that the neuron's buffer holds."""
    return int(module.reset_dict[module._reset_mechanism])  # type: ignore[index]


def _put_back(current: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in current if key not in before]:
        del current[key]
    for key, value in before.items():
        if current[key] is not value:
            current[key] = value


for _family in _STATES:
    if hasattr(snntorch, _family):
        register_adapter(getattr(snntorch, _family), SnnTorchAdapter(_family))
for _family in _WHOLE_SEQUENCES:
    if hasattr(snntorch, _family):
        register_adapter(getattr(snntorch, _family), _SnnTorchSequenceAdapter(_family))
