"""Adapter for snnTorch neurons, with stored (`init_hidden=True`) or passed state.

Written for snnTorch 1.0. Its neurons store the state in buffers and create it anew when the shape of the input
changes, so a step swaps the buffers in and out around one call. A call `spk, mem = lif(x, mem)` becomes a node that
takes the state from its arguments and does not use the buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import snntorch
import torch
from torch import Tensor, nn

from snnfx.errors import CaptureError
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.registry import register_adapter
from snnfx.state.stateful import State, StatefulCall
from snnfx.state.step_locks import stepped_by_one_thread

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
    "DeltaLeaky": ("mem", "mem_prev"),
}
"""The state buffers, in the order in which `forward` takes and returns them."""

_SHAPED_LIKE_INPUT = ("Leaky", "Lapicque", "Synaptic", "Alpha", "RLeaky", "RSynaptic", "DeltaLeaky")
_ELEMENTWISE = ("Leaky", "Lapicque", "Synaptic", "Alpha", "DeltaLeaky")
_SEQUENCE_NEURONS = ("StateLeaky", "LinearLeaky", "AssociativeLeaky", "LeakyParallel")


class SnnTorchAdapter:
    """Steps the single-step neurons: `Leaky`, `Synaptic`, `Alpha`, `Lapicque`, `RLeaky`, `RSynaptic`, `SLSTM`, ..."""

    is_reset_by_assignment = True
    """`snntorch.utils.reset` assigns new tensors to the state buffers of all neurons; see `ResetDetection`."""

    def __init__(self, family: str) -> None:
        self.family = family

    def elementwise(self, module: nn.Module) -> bool:
        return self.family in _ELEMENTWISE and not module.inhibition and not module.state_quant

    def keeps_batch(self, module: nn.Module) -> bool:
        """Each sample along dim 0 is independent, and outputs and states have the rank of the input."""
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

    def initial(self, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> State:
        (x,) = (*inputs, *kwargs.values())
        start = torch.zeros_like(x) if self.family in _SHAPED_LIKE_INPUT else x.new_zeros(0)
        return (start,) * len(self.names(module))

    def step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        with stepped_by_one_thread(module):
            return self._step(module, state, *inputs, **kwargs)

    def _step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        (x,) = (*inputs, *kwargs.values())
        attributes, buffers = dict(module.__dict__), dict(module._buffers)
        names = self.names(module)
        try:
            for name, value in zip(names, state, strict=True):
                # An empty state matches the shape of no input, so the neuron starts from zeros.
                value = x.new_zeros(0) if value is None or (isinstance(value, float) and value == 0.0) else value
                module._buffers[name] = value if isinstance(value, Tensor) else torch.full_like(x, value)
            if "reset_mechanism_val" in module._buffers:
                # A number instead of a tensor, because the neuron compares it in Python.
                module._buffers["reset_mechanism_val"] = _reset_number(module)  # type: ignore[assignment]
            outputs = module(x) if has_forward_hooks(module) else module.forward(x)
            following = tuple(module._buffers[name] for name in names)
        finally:
            _restore_entries(module.__dict__, attributes)
            _restore_entries(module._buffers, buffers)
        # `read_call` rebuilds the return value of the call from the spikes and the states.
        return outputs[0] if isinstance(outputs, tuple) else outputs, following

    def read_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], starts_as_none: bool
    ) -> StatefulCall:
        """`lif(x)`, `lif(x, mem)`, `lif(x, mem=mem)`."""
        names = self.names(module)
        inputs = args[:1] or (kwargs["input_"],)
        passed_states = {**dict(zip(names, args[1:], strict=False)), **{k: v for k, v in kwargs.items() if k in names}}
        values = tuple(passed_states.get(name) for name in names)
        is_passed = [value is not None for value in values]

        def returns(spikes: Any, following: tuple[Any, ...]) -> Any:
            if module.init_hidden and not module.output:
                return spikes
            # The states of recurrent neurons include their spikes.
            return following if names[0] == "spk" else (spikes, *following)

        if any(is_passed) and (module.init_hidden or not all(is_passed)):
            why = (
                "it has init_hidden=True."
                if module.init_hidden
                else f"the call passes only some of {', '.join(names)}."
            )
            raise CaptureError(
                "SNNFX211",
                f"a {self.family} does not accept the states that it is called with",
                why=why,
                hint="Pass all states of the neuron, or none; with init_hidden=True pass none.",
            )
        # If the caller carries the state, None in the first step stands for zeros; else the neuron uses its buffers.
        explicit = all(is_passed) or (starts_as_none and bool(passed_states) and not module.init_hidden)
        return StatefulCall(values if explicit else None, inputs, {}, returns)


class _DeltaLeakyAdapter(SnnTorchAdapter):
    """Steps `DeltaLeaky`, whose state is one argument and one result: a tuple of two potentials."""

    is_reset_by_assignment = False
    """Its states are None after a reset and before it."""

    def read(self, module: nn.Module) -> State:
        return tuple(getattr(module, name) for name in self.names(module))

    def write(self, module: nn.Module, state: Sequence[Any]) -> None:
        module._buffers["mem"], module.__dict__["mem_prev"] = state

    def _step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        (x,) = (*inputs, *kwargs.values())
        state = tuple(torch.zeros_like(x) if value is None else value for value in state)
        before = self.read(module)
        try:
            self.write(module, state)
            arguments = (x,) if module.init_hidden else (x, state)
            return module(*arguments) if has_forward_hooks(module) else module.forward(*arguments)  # type: ignore[no-any-return]
        finally:
            self.write(module, before)

    def read_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], starts_as_none: bool
    ) -> StatefulCall:
        """`lif(x)` with `init_hidden=True`, else `lif(x, (mem, mem_prev))`."""
        passed = dict(zip(("input_", "mem"), args, strict=False), **kwargs)
        state = None if module.init_hidden else passed.get("mem")
        if state is None and not module.init_hidden:
            raise CaptureError(
                "SNNFX211",
                "a DeltaLeaky with init_hidden=False is called without its state",
                why="it keeps no state itself.",
                hint="Pass the state, spk, mem = lif(x, mem), which starts as mem = lif.reset_mem(); or use "
                "init_hidden=True.",
            )
        return StatefulCall(
            None if state is None else tuple(state),
            (passed["input_"],),
            {},
            lambda spikes, following: (spikes, following),
        )


class _SnnTorchSequenceAdapter(SnnTorchAdapter):
    """Refuses neurons that take all time steps at once."""

    def names(self, module: nn.Module) -> tuple[str, ...]:
        return ()

    def elementwise(self, module: nn.Module) -> bool:
        return False

    def refuse(self, module: nn.Module, where: str) -> None:
        raise CaptureError(
            "SNNFX205",
            f"`{where}` ({type(module).__name__}) has no single-step form",
            why="it takes the whole sequence at once.",
            hint="Use snntorch.Leaky, which has a single step, or convert the other parts of the model.",
        )


def _reset_number(module: nn.Module) -> int:
    """The reset mechanism as the number in the neuron's buffer."""
    return int(module.reset_dict[module._reset_mechanism])  # type: ignore[index]


def _restore_entries(current: dict[str, Any], before: dict[str, Any]) -> None:
    for key in [key for key in current if key not in before]:
        del current[key]
    for key, value in before.items():
        if current[key] is not value:
            current[key] = value


for _family in _STATES:
    if hasattr(snntorch, _family):
        _adapter = _DeltaLeakyAdapter if _family == "DeltaLeaky" else SnnTorchAdapter
        register_adapter(getattr(snntorch, _family), _adapter(_family))
for _family in _SEQUENCE_NEURONS:
    if hasattr(snntorch, _family):
        register_adapter(getattr(snntorch, _family), _SnnTorchSequenceAdapter(_family))
