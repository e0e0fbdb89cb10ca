"""Adapter for SpikingJelly: stateful modules as pure steps, `layer.*` wrappers as torch.nn layers.

Written for SpikingJelly 2.0, whose modules have `materialize_states` and `single_step_functional_forward`. Classes
without them (and SpikingJelly 0.0.0.0.14) are stepped by swapping their memories in and out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from spikingjelly.activation_based import base, layer, neuron
from torch import Tensor, nn

from snnfx.errors import CaptureError, InputError
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.leaf_modules import declare_leaf
from snnfx.state.memory_adapter import step_by_swapping
from snnfx.state.registry import register_adapter
from snnfx.state.stateful import State, StatelessAdapter
from snnfx.state.step_locks import stepped_by_one_thread

__all__ = ["SpikingJellyAdapter"]


class StepModeAdapter(StatelessAdapter):
    """Steps a stateless module with a step mode, and refuses multi-step modules."""

    def elementwise(self, module: nn.Module) -> bool:
        return False

    def is_leaf(self, module: nn.Module) -> bool:
        return False

    def multi_step_form(self, module: nn.Module) -> str | None:
        return "trace" if _takes_sequences(module) else None

    def refuse(self, module: nn.Module, where: str) -> None:
        supported = module.supported_step_mode()  # type: ignore[operator]
        name = f"`{where}` ({type(module).__name__})"
        if "s" not in supported or isinstance(module, _SEQUENCE_NEURONS):
            raise CaptureError(
                "SNNFX205",
                f"{name} has no single-step form",
                why="it is defined on whole sequences only.",
                hint="Use a neuron with a single step, or convert the other parts of the model.",
            )
        if getattr(module, "step_mode", "s") != "s":
            raise CaptureError(
                "SNNFX204",
                f"{name} is in multi-step mode",
                why="without takes=, snnfx converts models that compute ONE time step.",
                hint='Convert the whole call with takes="sequence" and example_inputs=(x_seq,).',
            )

    def step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        return module(*inputs, **kwargs), ()


class SpikingJellyAdapter(StepModeAdapter):
    """Steps a `base.MemoryModule`: neurons, synapse filters, recurrent containers, dropout with a fixed mask."""

    storage: tuple[str, ...] = ("_memories", "_memories_rv")

    def elementwise(self, module: nn.Module) -> bool:
        return isinstance(module, _ELEMENTWISE) and not isinstance(module, _NORMALIZING)

    def keeps_batch(self, module: nn.Module) -> bool:
        """Outputs and states have the rank of the input, with the batch in dim 0."""
        return isinstance(module, _ELEMENTWISE)

    def is_leaf(self, module: nn.Module) -> bool:
        # OTTTLIFNode returns a list in training (spike and trace), and the next layer depends on that.
        return not isinstance(module, _LIST_RETURNING)

    def multi_step_form(self, module: nn.Module) -> str | None:
        if not _takes_sequences(module):
            return None
        is_loop = (
            "s" in module.supported_step_mode()  # type: ignore[operator]
            and not isinstance(module, _SEQUENCE_NEURONS + _LIST_RETURNING)
            and not getattr(module, "store_v_seq", False)
            and not has_forward_hooks(module)
            and all(_is_of_library(module, name) for name in ("forward", *_MULTI_STEP_METHODS))
            and _loops_over_own_step(type(module))
            and type(module).forward in _FORWARDS
        )
        return "steps" if is_loop else "trace"

    def names(self, module: nn.Module) -> tuple[str, ...]:
        if isinstance(module, layer.Dropout) and not module.training:
            return ()  # dropout is the identity in evaluation mode and stores no mask
        return tuple(module._memories)  # type: ignore[arg-type]

    def read(self, module: nn.Module) -> State:
        return tuple(module._memories[name] for name in self.names(module))  # type: ignore[index]

    def write(self, module: nn.Module, state: Sequence[Any]) -> None:
        for name, value in zip(self.names(module), state, strict=True):
            module._memories[name] = value  # type: ignore[index, operator]

    def reset(self, module: nn.Module) -> None:
        module.reset()  # type: ignore[operator]

    def is_reset_value(self, module: nn.Module, name: str, value: Any) -> bool:
        """Whether a reset sets the state to another value than a tensor; the next call computes an initial value."""
        reset_value = module._memories_rv[name]  # type: ignore[index]
        return type(value) is type(reset_value) and isinstance(value, type(None) | list) and value == reset_value

    def initial(self, module: nn.Module, /, *inputs: Any, **kwargs: Any) -> State:
        reset_values = tuple(_copy(module._memories_rv[name]) for name in self.names(module))  # type: ignore[index]
        if _is_functional(module):
            return tuple(module.materialize_states(inputs, reset_values, "s"))  # type: ignore[operator]
        return reset_values

    def step(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        if self.elementwise(module):
            self._refuse_other_shape(module, state, inputs)
        if not _is_functional(module) or has_forward_hooks(module) or getattr(module, "store_v_seq", False):
            return self._step_by_swapping(module, state, *inputs, **kwargs)
        outputs, following = module.single_step_functional_forward(inputs, state, **kwargs)  # type: ignore[operator]
        return outputs[0] if len(outputs) == 1 else outputs, tuple(following)

    def step_call(self, module: nn.Module) -> Callable[..., Any]:
        """The function that computes one step, also in step mode "m"."""
        return module.single_step_forward if module.step_mode == "m" else module  # type: ignore[return-value]

    def _refuse_other_shape(self, module: nn.Module, state: State, inputs: tuple[Any, ...]) -> None:
        """Refuse an input whose shape differs from the state; SpikingJelly would create a new state."""
        shape = inputs[0].shape if inputs and isinstance(inputs[0], Tensor) else None
        for name, value in zip(self.names(module), state, strict=True):
            if shape is not None and isinstance(value, Tensor) and value.dim() > 0 and value.shape != shape:
                raise InputError(
                    "SNNFX308",
                    f"state `{name}` of {type(module).__name__} has shape {list(value.shape)}, its input {list(shape)}",
                    why="a neuron has one state for each element of its input.",
                    hint="Use one neuron per input shape, and pass a state with the shape of the input.",
                )

    def _step_by_swapping(self, module: nn.Module, state: State, /, *inputs: Any, **kwargs: Any) -> tuple[Any, State]:
        with stepped_by_one_thread(module):
            v_seq = module.__dict__.get("v_seq")
            try:
                return step_by_swapping(self, module, state, *inputs, call=self.step_call(module), **kwargs)
            finally:
                if "v_seq" in module.__dict__:
                    module.__dict__["v_seq"] = v_seq


_ELEMENTWISE: tuple[type, ...] = tuple(
    cls
    for cls in (
        getattr(neuron, "BaseNode", None),
        getattr(neuron, "SimpleBaseNode", None),
        getattr(neuron, "GatedLIFNode", None),
        layer.Dropout,
        layer.SynapseFilter,
    )
    if isinstance(cls, type)
)


_NORMALIZING: tuple[type, ...] = tuple(filter(None, (getattr(neuron, "MPBNBaseNode", None),)))
"""Neurons that normalise their potential over the batch; their functional form does not update the statistics."""


_LIST_RETURNING: tuple[type, ...] = tuple(filter(None, (getattr(neuron, "OTTTLIFNode", None),)))

_SEQUENCE_NEURONS: tuple[type, ...] = tuple(filter(None, (getattr(neuron, "GatedLIFNode", None),)))
"""Classes that list step mode "s" but have no single step: the parameters of GatedLIFNode depend on the time step."""


def _takes_sequences(module: nn.Module) -> bool:
    return getattr(module, "step_mode", "s") == "m" or "s" not in module.supported_step_mode()  # type: ignore[operator]


_MULTI_STEP_METHODS = ("multi_step_forward", "multi_step_functional_forward")


def _is_of_library(module: nn.Module, method: str) -> bool:
    """Whether a method is that of SpikingJelly, whose multi-step forward loops over the single step, or absent."""
    found = getattr(type(module), method, None)
    return found is None or (found.__module__.startswith("spikingjelly.") and "psn" not in found.__module__)


_GENERIC: tuple[type, ...] = (base.MemoryModule, neuron.BaseNode)
"""Classes whose multi-step forward calls the single step of the module."""

_FORWARDS = tuple(cls.forward for cls in (*_GENERIC, neuron.SimpleBaseNode) if hasattr(cls, "forward"))
"""Forwards that only choose between the single step and the multi-step forward."""

_STEP_METHODS = frozenset(
    ("single_step_forward", "single_step_functional_forward", "neuronal_charge", "neuronal_fire", "neuronal_reset")
)


def _loops_over_own_step(cls: type) -> bool:
    """Whether no class changes the single step of a class whose multi-step forward has equations of its own.

    The multi-step forward of `LIFNode` computes those of `LIFNode`, also in a subclass with another single step.
    """
    is_changed = False
    for base_class in cls.__mro__:
        if base_class not in _GENERIC and not vars(base_class).keys().isdisjoint(_MULTI_STEP_METHODS):
            return not is_changed
        is_changed = is_changed or not vars(base_class).keys().isdisjoint(_STEP_METHODS)
    return True


_WITH_OPERANDS: tuple[type, ...] = tuple(filter(None, (getattr(neuron, "FlexSN", None),)))
"""Neurons whose functional form takes more operands than inputs and states; a call of the module supplies them."""


def _is_functional(module: nn.Module) -> bool:
    """Whether the class has a functional form that no subclass overrides by its own step."""
    if isinstance(module, _NORMALIZING + _WITH_OPERANDS):
        return False
    for cls in type(module).__mro__:
        if "single_step_functional_forward" in vars(cls):
            return cls not in (base.MemoryModule, neuron.BaseNode)
        if "single_step_forward" in vars(cls) or "forward" in vars(cls):
            return False
    return False


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


register_adapter(base.StepModule, StepModeAdapter())
register_adapter(base.MemoryModule, SpikingJellyAdapter())

_LAYERS = (
    "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Upsample GroupNorm MaxPool1d MaxPool2d "
    "MaxPool3d AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d Linear Flatten "
    "BatchNorm1d BatchNorm2d BatchNorm3d WSConv2d WSLinear MaxUnpool1d MaxUnpool2d MaxUnpool3d"
).split()
for _name in _LAYERS:
    if hasattr(layer, _name):
        declare_leaf(getattr(layer, _name), takes_sequence=lambda module: module.step_mode == "m")
