"""Adapter for Norse cells, which take and return their state: `z, s = cell(x, s)`.

Written for Norse 1.1. A cell becomes one node with the tensors of its state as operands; the named tuple is rebuilt
from the results. Modules with their own time loop (`LIF`, `LIFRecurrent`, `Lift`, ...) have no single-step form.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from norse.torch.functional.izhikevich import izhikevich_recurrent_step
from norse.torch.functional.lif import lif_step
from norse.torch.functional.lif_adex import lif_adex_step
from norse.torch.functional.lif_adex_refrac import lif_adex_refrac_step
from norse.torch.functional.lif_ex import lif_ex_step
from norse.torch.functional.lif_refrac import lif_refrac_step
from norse.torch.functional.lsnn import lsnn_step
from norse.torch.module import coba_lif, conv, encode, leaky_integrator, lift, snn
from torch import Tensor, nn

from snnfx.errors import CaptureError
from snnfx.sandbox.torch_internals import FakeTensor, disable_dispatch_modes, pytree
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.registry import register_adapter
from snnfx.state.stateful import State, StatefulCall, StatelessAdapter

__all__ = ["NorseAdapter"]


class NorseAdapter(StatelessAdapter):
    """Steps the cells, whose state the caller passes: `LIFCell`, `LIFRecurrentCell`, `LICell`, `LIFAdExCell`, ..."""

    def elementwise(self, module: nn.Module) -> bool:
        return isinstance(module, snn.SNNCell)

    def keeps_batch(self, module: nn.Module) -> bool:
        """Each sample along dim 0 is independent, and outputs and states have the rank of the input."""
        return True

    def is_leaf(self, module: nn.Module) -> bool:
        return True

    def refuse(self, module: nn.Module, where: str) -> None:
        return None

    def projected(self, module: nn.Module) -> Tensor | None:
        """The input weights of a recurrent cell, if the input can be multiplied by them before the call.

        This product does not depend on the state, so it leaves the loop: one matrix product for all steps. A cell with
        hooks computes it itself, because a hook receives the arguments of the call.
        """
        is_linear = (
            getattr(module, "activation", None) in _STEPS_WITH_LINEAR_INPUT
            or module.__class__ is leaky_integrator.LILinearCell
        )
        return module._parameters.get("input_weights") if is_linear and not has_forward_hooks(module) else None

    def step(
        self, module: nn.Module, state: State, *inputs: Any, projected: bool = False, **kwargs: Any
    ) -> tuple[Any, State]:
        nested_state = pytree.tree_unflatten(list(state), _structure(module)) if state[0] is not None else None
        if nested_state is None and isinstance(inputs[0], FakeTensor) and hasattr(module, "state_fallback"):
            # Recurrent cells store sizes and potentials in tensors, and fake tensors have no values.
            # All samples start alike: a batch of one stands for a symbolic batch size.
            shape = [size if isinstance(size, int) else 1 for size in inputs[0].shape]
            with disable_dispatch_modes():
                nested_state = module.state_fallback(torch.zeros(shape, dtype=inputs[0].dtype))  # type: ignore[operator]
        cell = _without_projection(module) if projected else module
        call = cell if has_forward_hooks(cell) else cell.forward
        outputs, following = call(*inputs, nested_state, **kwargs)
        return outputs, tuple(pytree.tree_leaves(following))

    def read_call(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], starts_as_none: bool
    ) -> StatefulCall:
        """`cell(x)`, `cell(x, state)`, `cell(x, state=state)`."""
        structure = _structure(module)
        inputs = args[:1] or (next(value for name, value in kwargs.items() if name != "state"),)
        state = args[1] if len(args) > 1 else kwargs.get("state")
        values: list[Any] = [None] * structure.num_leaves
        if state is not None:
            values, passed_structure = pytree.tree_flatten(state)
            if passed_structure != structure:
                raise CaptureError(
                    "SNNFX211",
                    f"a {type(module).__name__} is called with a state of another structure than it returns",
                    why=f"it is {passed_structure}, but the cell returns {structure}.",
                    hint="Pass the state that the cell returned.",
                )

        def returns(output: Any, following: tuple[Any, ...]) -> Any:
            return output, pytree.tree_unflatten(list(following), structure)

        return StatefulCall(tuple(values), inputs, {}, returns)


class _AppliedWeights:
    """Replaces the input weights of a cell whose input is already multiplied by them."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.nn.functional.linear or kwargs or len(args) != 2:
            raise NotImplementedError(f"{function} of weights that have been applied already")
        return args[0]


def _without_projection(module: nn.Module) -> nn.Module:
    """A copy of the cell that treats its input as the product with its input weights."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_parameters"] = {k: p for k, p in module._parameters.items() if k != "input_weights"}
    copied.__dict__["input_weights"] = _AppliedWeights()
    return copied


_STEPS_WITH_LINEAR_INPUT = (
    lif_step,
    lif_adex_step,
    lif_adex_refrac_step,
    lif_ex_step,
    lif_refrac_step,
    lsnn_step,
    izhikevich_recurrent_step,
)
"""Steps whose only use of the input weights is `linear(input, input_weights)`."""


class _NorseSequenceAdapter(NorseAdapter):
    """Refuses modules with their own loop over time in a step; whole calls are traced through the loop."""

    read_call = None  # type: ignore[assignment]

    def multi_step_form(self, module: nn.Module) -> str | None:
        return "trace"

    def elementwise(self, module: nn.Module) -> bool:
        return False

    def refuse(self, module: nn.Module, where: str) -> None:
        name = type(module).__name__
        cell = f"Use norse.torch.{name}Cell."
        hint = cell if isinstance(module, _SEQUENCE_MODULES) else "Use the module inside it, which computes one step."
        raise CaptureError(
            "SNNFX205",
            f"`{where}` ({name}) has no single-step form",
            why="its forward loops over time.",
            hint=hint,
        )


_structures: weakref.WeakKeyDictionary[nn.Module, pytree.TreeSpec] = weakref.WeakKeyDictionary()


def _structure(module: nn.Module) -> pytree.TreeSpec:
    """The nested structure of a cell's state, determined by one step on zeros."""
    if module not in _structures:
        like = next((p for p in module.parameters()), torch.zeros(()))
        with disable_dispatch_modes(), torch.no_grad():
            features = int(getattr(module, "input_size", 1))
            _, state = module.forward(torch.zeros(1, features, dtype=like.dtype, device=like.device))
        _structures[module] = pytree.tree_structure(state)
    return _structures[module]


_SEQUENCE_MODULES = (snn.SNN, snn.SNNRecurrent)
for _cell in (snn.SNNCell, snn.SNNRecurrentCell, leaky_integrator.LILinearCell, coba_lif.CobaLIFCell):
    register_adapter(_cell, NorseAdapter())
for _module in (
    *_SEQUENCE_MODULES,
    lift.Lift,
    conv.LConv2d,
    encode.ConstantCurrentLIFEncoder,
    encode.PoissonEncoder,
    encode.SignedPoissonEncoder,
    encode.SpikeLatencyEncoder,
    encode.SpikeLatencyLIFEncoder,
):
    register_adapter(_module, _NorseSequenceAdapter())
