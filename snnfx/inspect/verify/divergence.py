"""Find the first neuron at which a net differs from the model, and its distance to the threshold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.inspect.verify.comparison import Tolerance, are_spikes, compare
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import adapter_of, named_stateful
from snnfx.state.stateful import Adapter

__all__ = ["Divergence", "NeuronTrace", "first_divergence", "neurons_watched", "recorded_neurons"]

_POTENTIALS = ("v", "mem")
_THRESHOLDS = ("v_threshold", "threshold", "v_th")


@dataclass
class NeuronTrace:
    """Outputs and potentials of one stateful module at each call, in order.

    Args:
        module: the module.
        slot: name of the slot with the membrane potential, or "".
        outputs: the first output tensor of each call.
        potentials: the membrane potential after each call.
    """

    module: nn.Module
    slot: str
    outputs: list[Tensor] = field(default_factory=list)
    potentials: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Divergence:
    """The first neuron that differs: its qualified name, and a description."""

    name: str
    in_words: str


@contextmanager
def recorded_neurons(model: nn.Module) -> Iterator[dict[str, NeuronTrace]]:
    """Record the stateful modules of a model by qualified name, in the order of their first call."""
    traces: dict[str, NeuronTrace] = {}
    handles = []

    def watch(name: str, module: nn.Module, adapter: Adapter) -> None:
        slot = next((s for s in _POTENTIALS if s in adapter.names(module)), "")

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors:
                trace = traces.setdefault(name, NeuronTrace(module, slot))
                trace.outputs.append(tensors[0].detach().clone())
                # Some states exist only after the first call.
                state = dict(zip(adapter.names(module), adapter.read(module), strict=True))
                trace.potentials.append(state.get(slot))

        handles.append(module.register_forward_hook(hook))

    try:
        for name, module, adapter in named_stateful(model):
            watch(name, module, adapter)
        yield traces
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def neurons_watched(model: nn.Module) -> Iterator[dict[str, bool]]:
    """For each neuron of a known library that is called, whether its output is ever different from zero."""
    spiking: dict[str, bool] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
            if tensors:
                spiking[name] = spiking.get(name, False) or tensors[0].is_meta or bool(tensors[0].any())

        return hook

    neurons = [(name, module) for name, module in model.named_modules() if name and _is_neuron(module)]
    handles = [module.register_forward_hook(watch(name)) for name, module in neurons]
    try:
        yield spiking
    finally:
        for handle in handles:
            handle.remove()


def _is_neuron(module: nn.Module) -> bool:
    return adapter_of(module) is not None and any(hasattr(module, key) for key in (*_THRESHOLDS, "p", "params"))


def first_divergence(
    traces: Mapping[str, NeuronTrace], record: Mapping[str, Any], tolerance: Tolerance, *, by_time: bool
) -> Divergence | None:
    """Find the neuron that differs first: at the earliest time step, and among several the one called first.

    Args:
        traces: the model's neurons, with T calls each.
        record: the recording of `net.run`: outputs `[T, *]` by name, potentials by "name.slot".
        tolerance: largest allowed difference of outputs.
        by_time: False to take the neuron called first, at whichever step it differs. A BatchNorm over T*N spreads a
            difference at one step to all steps, so the time step is not informative then.
    """
    divergences = []
    for name, trace in traces.items():
        if isinstance(record.get(name), Tensor):
            expected = torch.stack(trace.outputs)
            comparison = compare("output", name, record[name], expected, tolerance, timed=True)
            if comparison.step is not None:
                divergences.append((comparison.step, name))
    if not divergences:
        return None
    step, name = min(divergences, key=lambda entry: entry[0]) if by_time else divergences[0]
    trace = traces[name]
    actual, expected = record[name][step], trace.outputs[step]
    if not (are_spikes(actual) and are_spikes(expected)):
        return Divergence(name, f"`{name}` at t = {step}, by {float((actual - expected).abs().max()):.3g}")
    differ = actual != expected
    words = f"`{name}` at t = {step}: {int(differ.sum())} of {differ.numel()} spikes"
    threshold = next((getattr(trace.module, key) for key in _THRESHOLDS if hasattr(trace.module, key)), None)
    v_actual, v_expected = record.get(f"{name}.{trace.slot}"), trace.potentials[step]
    if threshold is None or not (isinstance(v_actual, Tensor) and isinstance(v_expected, Tensor)):
        return Divergence(name, words)
    v_actual = v_actual[step]
    if not v_actual.shape == v_expected.shape == differ.shape:
        return Divergence(name, words)
    # The side that spikes has been reset; the other one still has the potential that was compared to the threshold.
    margin = (torch.where(actual == 0, v_actual, v_expected) - threshold).abs()[differ].max()
    return Divergence(name, f"{words}, with |v - threshold| up to {float(margin):.2g}")
