"""Norse: its cells, which take and return their state, `z, s = cell(x, s)`, as pure steps.

Written for Norse 1.1. A cell is one node with the tensors of its state as operands; the named tuple around them is put
together again from the results. The modules that run over time themselves (`LIF`, `LIFRecurrent`, `Lift`, ...) have no
single-step form.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
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
from snnfx.sandbox.torch_internals import FakeTensor, pytree, unset_fake_temporarily
from snnfx.state.hooks import has_forward_hooks
from snnfx.state.registry import register_adapter
from snnfx.state.stateful import State, StatefulCall, StatelessAdapter

__all__ = ["NorseAdapter"]


class NorseAdapter(StatelessAdapter):
    """Cells: `LIFCell`, `LIFRecurrentCell`, `LICell`, `LIFAdExCell`, `IAFCell`, ... The caller has their state."""

    def elementwise(self, module: nn.Module) -> bool:
        return isinstance(module, snn.SNNCell)

    def keeps_batch(self, module: nn.Module) -> bool:
        """Each sample of dim 0 is computed on its own, and everything has the rank of the input."""
        return True

    def is_leaf(self, module: nn.Module) -> bool:
        return True

    def refuse(self, module: nn.Module, where: str) -> None:
        return None

    def projected(self, module: nn.Module) -> Tensor | None:
        """The weights that a recurrent cell multiplies its input by, if that can be done before the call.

        The product with the input of each step needs no state, so it leaves the loop: one matrix product for all
        steps. A hook sees what the call is given, so a cell with hooks keeps it.
        """
        by_linear = getattr(module, "activation", None) in _BY_LINEAR or type(module) is leaky_integrator.LILinearCell
        return module._parameters.get("input_weights") if by_linear and not has_forward_hooks(module) else None

    def step(
        self, module: nn.Module, state: State, *inputs: Any, projected: bool = False, **kwargs: Any
    ) -> tuple[Any, State]:
        given = pytree.tree_unflatten(list(state), _structure(module)) if state[0] is not None else None
        if given is None and isinstance(inputs[0], FakeTensor) and hasattr(module, "state_fallback"):
            # Recurrent cells have sizes and potentials in tensors, whose values a fake tensor does not tell.
            with unset_fake_temporarily():
                given = module.state_fallback(torch.zeros(inputs[0].shape, dtype=inputs[0].dtype))  # type: ignore[operator]
        call = module if has_forward_hooks(module) else module.forward
        with _without_projection(module) if projected else contextlib.nullcontext():
            outputs, following = call(*inputs, given, **kwargs)
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
            values, given = pytree.tree_flatten(state)
            if given != structure:
                raise CaptureError(
                    "SNNFX211",
                    f"a {type(module).__name__} is called with a state that it does not return",
                    why=f"it is {given}, and the cell returns {structure}.",
                    hint="Pass on the state that the cell returned.",
                )

        def returns(output: Any, following: tuple[Any, ...]) -> Any:
            return output, pytree.tree_unflatten(list(following), structure)

        return StatefulCall(tuple(values), inputs, {}, returns)


class _Projected:
    """Stands for the input weights of a cell whose input has been multiplied by them already."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.nn.functional.linear or kwargs or len(args) != 2:
            raise NotImplementedError(f"{function} of weights that have been applied already")
        return args[0]


@contextlib.contextmanager
def _without_projection(module: nn.Module) -> Iterator[None]:
    """Let the cell take its input for the product with its weights."""
    weights = module._parameters.pop("input_weights")
    module.__dict__["input_weights"] = _Projected()
    try:
        yield
    finally:
        del module.__dict__["input_weights"]
        # The order of the parameters is that of the optimizer and of the state_dict.
        others = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update({"input_weights": weights, **others})


_BY_LINEAR = (
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
    """Modules with their own loop over time."""

    read_call = None  # type: ignore[assignment]

    def elementwise(self, module: nn.Module) -> bool:
        return False

    def refuse(self, module: nn.Module, where: str) -> None:
        name = type(module).__name__
        cell = f"Use norse.torch.{name}Cell."
        hint = cell if isinstance(module, _OVER_TIME) else "Use what is inside it for one step."
        raise CaptureError(
            "SNNFX205",
            f"`{where}` ({name}) has no single-step form",
            why="it runs over the time steps itself.",
            hint=hint,
        )


_structures: weakref.WeakKeyDictionary[nn.Module, pytree.TreeSpec] = weakref.WeakKeyDictionary()


def _structure(module: nn.Module) -> pytree.TreeSpec:
    """How the state of a cell is nested, found by one step on zeros."""
    if module not in _structures:
        like = next((p for p in module.parameters()), torch.zeros(()))
        with unset_fake_temporarily(), torch.no_grad():
            features = int(getattr(module, "input_size", 1))
            _, state = module.forward(torch.zeros(1, features, dtype=like.dtype, device=like.device))
        _structures[module] = pytree.tree_structure(state)
    return _structures[module]


_OVER_TIME = (snn.SNN, snn.SNNRecurrent)
for _cell in (snn.SNNCell, snn.SNNRecurrentCell, leaky_integrator.LILinearCell, coba_lif.CobaLIFCell):
    register_adapter(_cell, NorseAdapter())
for _module in (
    *_OVER_TIME,
    lift.Lift,
    conv.LConv2d,
    encode.ConstantCurrentLIFEncoder,
    encode.PoissonEncoder,
    encode.SignedPoissonEncoder,
    encode.SpikeLatencyEncoder,
    encode.SpikeLatencyLIFEncoder,
):
    register_adapter(_module, _NorseSequenceAdapter())
