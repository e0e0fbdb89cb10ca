"""Record calls of stateful modules: nodes that take the state and return the next state.

The first call of a module in a step reads its slots, each later call reads the result of the previous call, and the
last call returns the state of the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from snnfx.capture.example_values import NOT_EVALUATED, ExampleValues
from snnfx.capture.leaf_module_states import LeafModuleStates
from snnfx.capture.proxy import UNKNOWN, StepProxy, value_of
from snnfx.capture.recorder import Recorder
from snnfx.capture.unsupported_modules import is_converted_net
from snnfx.ir.facts import MODULE, STRUCTURAL, VALUE
from snnfx.ir.program import SELF_TARGET
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import user_calls
from snnfx.state.hooks import without_hooks
from snnfx.state.step_calls import call_stateful, initial_value, opaque_initial_value

__all__ = ["StatefulCalls", "element_of", "mark_returned"]


class StatefulCalls:
    """Records the calls of stateful modules in one trace.

    Attributes:
        is_recording: whether the nodes of such a call are being recorded.
        sites: the place in the user's code that made each call; see `user_calls`.
        latest: the latest call.
    """

    def __init__(self, recorder: Recorder, values: ExampleValues, leaf_states: LeafModuleStates) -> None:
        self.recorder, self.values, self.leaf_states = recorder, values, leaf_states
        self.is_recording = False
        self.sites: dict[Node, Hashable] = {}
        self.latest: Node | None = None

    def call(
        self,
        m: nn.Module,
        name: str,
        call: Callable[..., Any],
        adapter: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        like: Node | None = None,
    ) -> Any:
        """Record one pure step of a module, update its slots, and return the output of the module.

        Args:
            m, name, adapter: the module.
            call: the function that the graph calls.
            args, kwargs: its arguments.
            like: an earlier call of the module whose outputs and states have the same shapes.
        """
        recorder = self.recorder
        self.is_recording = True
        try:
            # Hooks of the user must not run on fake tensors.
            with without_hooks(m), self.values.draws.allowed_in(*(part.__class__.__module__ for part in m.modules())):
                output = self._record_call(m, name, call, adapter, args, kwargs, like)
        finally:
            self.is_recording = False
        if recorder.is_without_gradient():
            for slot in _slot_names(adapter, m, name):
                recorder.slot_values[slot] = recorder.without_gradient(recorder.slot_values[slot])
            output = recorder.without_gradient(output)
        self.leaf_states.write_attributes(name, m, adapter)
        return output

    def call_that_takes_state(
        self, m: nn.Module, name: str, adapter: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a call that may pass the state as arguments; such a call writes the slots but does not read them."""
        recorder = self.recorder
        with self.values.evaluating():
            starts_as_none = any(value is None for value in recorder.carried_arguments.values())
            call = adapter.read_call(m, args, kwargs, starts_as_none)
            weights = adapter.projected(m) if hasattr(adapter, "projected") else None
        if weights is not None:
            product = recorder.record_at(name, "call_function", nn.functional.linear, (call.inputs[0], weights), {})
            call = replace(call, inputs=(product,), kwargs={**call.kwargs, "projected": True})
        slots = _slot_names(adapter, m, name)
        if call.state is None:
            output = self.call(m, name, call_stateful, adapter, call.inputs, call.kwargs)
            return call.returns(mark_returned(output, name), tuple(recorder.slot_values[slot] for slot in slots))
        self.is_recording = True
        try:
            module = recorder.record_at(name, "get_attr", name or SELF_TARGET, (), {})
            with without_hooks(m):
                arguments = (module, call.state, *call.inputs)
                outputs_and_state = recorder.record_at(name, "call_function", call_stateful, arguments, call.kwargs)
            self.sites[outputs_and_state.node] = user_calls()
            output, following = element_of(outputs_and_state, 0, name), element_of(outputs_and_state, 1, name)
            values = [element_of(following, index, name) for index in range(len(call.state))]
        finally:
            self.is_recording = False
        if recorder.is_without_gradient():
            output, values = recorder.without_gradient(output), [recorder.without_gradient(v) for v in values]
        recorder.slot_values.update(zip(slots, values, strict=False))
        recorder.overwritten_slots.update(slots)
        self.leaf_states.mark_called(name, m, adapter)
        self.leaf_states.write_attributes(name, m, adapter)
        return call.returns(mark_returned(output, name), tuple(values))

    def _record_call(
        self,
        m: nn.Module,
        name: str,
        call: Callable[..., Any],
        adapter: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        like: Node | None,
    ) -> Any:
        recorder, slots = self.recorder, _slot_names(adapter, m, name)
        module = recorder.record_at(name, "get_attr", name or SELF_TARGET, (), {})
        first_initial = initial_value if call is call_stateful else opaque_initial_value
        initial, result = self._evaluate_slots(adapter, m, slots, args, kwargs)
        if like is not None and result is UNKNOWN:
            result = like.meta.get("val", UNKNOWN)
        self.leaf_states.read_attributes(name, m, adapter)
        for index, slot in enumerate(slots):
            if self.leaf_states.needs_initial(slot):
                with self.values.already_evaluated(initial[index] if initial is not None else UNKNOWN):
                    arguments = (module, index, *args)
                    first = recorder.record_at(name, "call_function", first_initial, arguments, kwargs)
                self.leaf_states.set_initial(slot, first)
        self.leaf_states.before_call(name, m, adapter)
        states = tuple(recorder.slot_values[slot] for slot in slots)
        with self.values.already_evaluated(result):
            outputs_and_state = recorder.record_at(name, "call_function", call, (module, states, *args), kwargs)
        self.sites[outputs_and_state.node] = user_calls()
        self.latest = outputs_and_state.node
        output = element_of(outputs_and_state, 0, name)
        next_states = element_of(outputs_and_state, 1, name) if slots else None
        for index, slot in enumerate(slots):
            recorder.slot_values[slot] = element_of(next_states, index, name)
        return output

    def _evaluate_slots(
        self, adapter: Any, m: nn.Module, slots: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any]:
        """Compute the shapes of slots by one step, because an initial value may be a Python number.

        Returns:
            The initial values, or None if they are unknown; and the result of the step, or UNKNOWN if it must be
            evaluated again.
        """
        values = self.values
        if values.mode is None or is_converted_net(m):
            return None, UNKNOWN
        placeholders = [self.recorder.slot_placeholders[s] for s in slots if s in self.recorder.slot_placeholders]
        if all(VALUE.is_known(node) for node in placeholders):
            return None, UNKNOWN
        leaves = pytree.tree_leaves((args, kwargs))
        if any(type(leaf) is StepProxy and value_of(leaf) is UNKNOWN for leaf in leaves):
            return None, UNKNOWN
        real_args, real_kwargs = pytree.tree_map(lambda a: value_of(a) if type(a) is StepProxy else a, (args, kwargs))
        try:
            with values.evaluating():
                initial = adapter.initial(m, *real_args, **real_kwargs)
                result = adapter.step(m, initial, *real_args, **real_kwargs)
        except NOT_EVALUATED:
            return None, UNKNOWN
        first_call = all(not VALUE.is_known(node) for node in placeholders)
        for slot, value in zip(slots, result[1], strict=True):
            if slot in self.recorder.slot_placeholders:
                self.recorder.slot_placeholders[slot].meta.setdefault("val", value)
        is_final = first_call and adapter.elementwise(m) and _all_like(real_args[0], result[1])
        return initial, result if is_final else UNKNOWN

    def keeps_shapes(self, adapter: Any, m: nn.Module, args: tuple[Any, ...]) -> bool:
        """Whether the states after the latest call have the shape of its input, so that later calls return alike."""
        result = VALUE.of(self.latest) if self.latest is not None else None
        if not adapter.elementwise(m) or not isinstance(result, tuple) or type(args[0]) is not StepProxy:
            return False
        return _all_like(value_of(args[0]), result[1])


def _slot_names(adapter: Any, m: nn.Module, name: str) -> list[str]:
    """The qualified names of the slots of a module."""
    return [f"{name}.{slot}" if name else slot for slot in adapter.names(m)]


def element_of(proxy: Any, index: int, name: str) -> StepProxy:
    """Select one of the values that the call of module `name` returns."""
    element = proxy[index]
    STRUCTURAL.set(element.node, True)
    MODULE.set(element.node, name)
    return element  # type: ignore[no-any-return]


def mark_returned(result: Any, name: str) -> Any:
    """Mark a value as the return value of a module, so that `net.run(record=...)` finds it."""
    if type(result) is StepProxy:
        result.node.meta.setdefault("returned_by", []).append(name)
    return result


def _all_like(x: Any, values: tuple[Any, ...]) -> bool:
    """Whether all values are tensors with the shape and dtype of `x`."""
    return isinstance(x, Tensor) and all(
        isinstance(v, Tensor) and v.shape == x.shape and v.dtype == x.dtype for v in values
    )
