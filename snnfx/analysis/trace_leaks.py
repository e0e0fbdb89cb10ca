"""The leak of the eligibility trace of each weight op, or the reason why it has no trace.

With one leak for all neurons, a trace has the shape of the operand. With a leak for each neuron, the trace of a weight
that feeds them has a copy of the operand for each output channel: neuron k sees the trace with its own leak. This is
legal if output channel k of the weight feeds neurons with one leak only, so the operations between the weight and its
neurons must not mix channels, and the leak must not differ within a channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from snnfx.analysis.batch.rule_lookup import find_rule
from snnfx.analysis.dependence import analyse_dependence, ancestors
from snnfx.analysis.leak import Leak, LeakProbe, fed_slots, is_one_number, several_leaks_error
from snnfx.analysis.step_on_numbers import StepOnNumbers, is_elementwise
from snnfx.analysis.weight_ops import WeightOp
from snnfx.errors import InputError
from snnfx.ir.facts import ADDED_BY_RULE, SLOT, VALUE
from snnfx.ir.nodes import descendants, is_module_call
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import StepProgram
from snnfx.ops.online_functions import cut_history

__all__ = ["TraceLeak", "TraceLeaks", "is_added_by_rule"]


@dataclass(frozen=True)
class TraceLeak:
    """The leak of one trace.

    Args:
        source: a number, or the measured leak of a slot.
        channel: the dimension of the output channels of the weight op, counted from the end, if there is a trace for
            each of them; None: the trace has the shape of the operand.
    """

    source: float | LeakProbe
    channel: int | None = None

    def __str__(self) -> str:
        if not isinstance(self.source, LeakProbe):
            return f"leak {self.source:g}"
        return f"the leak of {self.source.slot}" + ("" if self.channel is None else ", one for each output channel")


class TraceLeaks:
    """The leaks of the neurons of a program, measured once for each slot.

    Args:
        program: at stage "normalized".
        leak: "post", "pre" or a number, see `snnfx.online.Rule.trace_leak`.
        ops: the weight ops.
    """

    def __init__(self, program: StepProgram, leak: Literal["post", "pre"] | float, ops: Sequence[WeightOp]) -> None:
        self.program, self.leak = program, leak
        self.weights = [(op.node, op.operand) for op in ops]
        self.step = StepOnNumbers(program) if isinstance(leak, str) else None
        self.probes: dict[str, LeakProbe] = {}
        self.measured: dict[str, Tensor] = {}
        self.cycles = {n: cycle for cycle in analyse_dependence(program).cycles for n in cycle}

    def of(self, op: WeightOp) -> TraceLeak | str:
        """The leak for the trace of an operand, or the reason why the weight has no trace."""
        if not isinstance(self.leak, str):
            return TraceLeak(float(self.leak))
        if self.leak == "post":
            assert self.step is not None
            slots = fed_slots(self.step, self.program, op.node, self.weights)
            if not slots:
                return 'it feeds no neuron; trace_leak="pre" or a number gives it a trace'
        else:
            slots = self._emitting(op.operand)
            if not slots:
                raise InputError(
                    "SNNFX615",
                    f"no neuron emits the operand of `{describe_node(op.node)}`",
                    where=location_of(op.node),
                    why='trace_leak="pre" uses the leak of the neuron that emits the operand.',
                    hint="Do not trace inputs, or pass the leak as a number.",
                )
        leaking = [slot for slot in slots if bool((self._now(slot).abs() > 1e-12).any())]
        if not leaking:
            return f"the leak of {', '.join(slots)} is 0"
        if self.leak == "post":
            cut = [slot for slot in leaking if self._is_cut(slot)]
            if not cut:
                return f"its gradients flow through time in {', '.join(leaking)}"
            if len(cut) < len(leaking):
                why = "only some of the neurons that it feeds have gradients through time"
                raise several_leaks_error(describe_node(op.node), why)
        self._require_one_leak(op, leaking)
        probe = self.probes[leaking[0]]
        if not self._differs_between_neurons(probe):
            return TraceLeak(probe)
        probe.per_neuron = True
        if self.leak == "post":
            return TraceLeak(probe, self._channel_of(op, probe))
        self._check_emitter(op, probe)
        return TraceLeak(probe)

    def _require_one_leak(self, op: WeightOp, slots: Sequence[str]) -> None:
        """Refuse a weight op whose neurons have different leaks, or leaks that are learned separately."""
        if len(slots) == 1:
            return
        first, *others = (self._now(slot) for slot in slots)
        if any(not _agree(first, other) for other in others):
            shown = ", ".join(f"{slot} {_shown(self._now(slot))}" for slot in slots)
            raise several_leaks_error(describe_node(op.node), f"the neurons that it feeds have several leaks: {shown}")
        if any(self.probes[slot].learnable for slot in slots):
            why = "it feeds several neurons whose leaks are learned separately"
            raise several_leaks_error(describe_node(op.node), why)

    def _now(self, slot: str) -> Tensor:
        if slot not in self.measured:
            probe = self.probes[slot] = LeakProbe(self.program, slot)
            self.measured[slot] = probe.measure([self.program.resolve(target) for target in probe.targets])
        return self.measured[slot]

    def number(self, probe: LeakProbe) -> float:
        """The current leak of a slot, a number."""
        leak: Leak = probe(*(self.program.resolve(target) for target in probe.targets))
        return float(leak)

    def _differs_between_neurons(self, probe: LeakProbe) -> bool:
        """Whether each neuron has a leak of its own, now or after learning."""
        leak = self.measured[probe.slot]
        return leak.numel() > 1 and (probe.learnable or not is_one_number(leak))

    # A leak for each neuron.

    def _channel_of(self, op: WeightOp, probe: LeakProbe) -> int:
        """The dimension of the output channels of a weight op, from the end, if the leak differs along it only.

        Raises:
            InputError: SNNFX620 if a channel feeds neurons with several leaks.
        """
        channel = _output_channel(op, self.program)
        if channel is None:
            raise self._refused(op, probe, "only linear layers and convolutions support a trace for each neuron")
        self._require_separate_channels(op, probe, op.node, {channel})
        leak = self.measured[probe.slot]
        if _varying_dims(leak) - {channel}:
            why = f"it differs within an output channel: the leaks have shape {list(leak.shape)}"
            raise self._refused(op, probe, why)
        channels = self._channels_of(op.node, channel)
        if channels is not None and channels != leak.numel():
            why = f"the weight has {channels} output channels for {leak.numel()} leaks"
            raise self._refused(op, probe, why)
        return channel

    def _check_emitter(self, op: WeightOp, probe: LeakProbe) -> None:
        """Check that the leaks of the emitting neurons broadcast with the operand.

        Raises:
            InputError: SNNFX620 if the operand has other neurons in the dimensions of the leaks.
        """
        dims = _varying_dims(self.measured[probe.slot])
        known = VALUE.of(op.operand)
        if isinstance(known, Tensor) and -known.dim() in dims:
            raise self._refused(op, probe, "it differs between the samples of the batch")
        slot = next(n for n in self.program.slot_nodes() if SLOT.of(n) == probe.slot)
        self._require_separate_channels(op, probe, slot, dims, op.operand)

    def _require_separate_channels(
        self, op: WeightOp, probe: LeakProbe, source: Node, dims: set[int], target: Node | None = None
    ) -> None:
        """Check that the operations from `source` to `target` (default: the state) neither move nor mix some dims."""
        if target is None:
            index = [slot.name for slot in self.program.slots].index(probe.slot)
            following = self.program.next_states[index]
            assert isinstance(following, Node)
            target = following
        for node in (ancestors([target]) & descendants([source])) - {source}:
            if node is not source and not self._separates(node, dims):
                raise self._refused(op, probe, f"`{describe_node(node)}` mixes or moves the channels")

    def _separates(self, node: Node, dims: set[int]) -> bool:
        """Whether each index of some dims of the result depends on the same index of the operands only."""
        if not node.op.startswith("call") or is_elementwise(self.program, node):
            return True
        found = find_rule(node, self.program.resolve)
        name = found.name if found is not None else ""
        if name.startswith("dropout") or name == "draw_dropout_mask":
            return True
        if name == "batch_norm":
            value = VALUE.of(node)
            return isinstance(value, Tensor) and dims == {1 - value.dim()}
        if "_pool" in name:
            window = next(int(c) for c in name if c.isdigit())
            return all(-dim > window for dim in dims)
        return False

    def _channels_of(self, node: Node, channel: int) -> int | None:
        value = VALUE.of(node)
        return value.shape[channel] if isinstance(value, Tensor) else None

    def _refused(self, op: WeightOp, probe: LeakProbe, why: str) -> InputError:
        return InputError(
            "SNNFX620",
            f"`{describe_node(op.node)}` cannot have a trace for each neuron of `{probe.slot}`",
            where=location_of(op.node),
            why=f"{why}.",
            hint="Pass the leak of the traces as a number, e.g. trace_leak=0.9.",
        )

    # The graph.

    def _is_cut(self, slot: str) -> bool:
        placeholder = next(n for n in self.program.slot_nodes() if SLOT.of(n) == slot)
        return all(user.target is cut_history for user in placeholder.users if user.op != "output")

    def _emitting(self, operand: Node) -> list[str]:
        """The slots of the nearest neurons that emit a value."""
        slots: dict[str, None] = {}
        seen: set[Node] = set()
        stack = [operand]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.cycles:
                own = [n for n in self.cycles[node] if is_module_call(n)] if is_module_call(node) else None
                members = self.cycles[node] if own is None or len(own) == 1 else [node, *node.all_input_nodes]
                slots.update((SLOT.of(n), None) for n in members if SLOT.is_known(n) and not is_added_by_rule(n))
            else:
                stack.extend(node.all_input_nodes)
        return list(slots)


def is_added_by_rule(node: Node) -> bool:
    """Whether a slot was added by a learning rule."""
    return ADDED_BY_RULE.of(node)


def _output_channel(op: WeightOp, program: StepProgram) -> int | None:
    """The dimension of the output channels of a linear layer or a convolution, counted from the end."""
    found = find_rule(op.node, program.resolve)
    name = found.name if found is not None else ""
    if name == "linear":
        return -1
    return -1 - int(name[-2]) if name.startswith("conv") else None


def _varying_dims(leak: Tensor) -> set[int]:
    """The dimensions of more than one element, counted from the end."""
    return {dim - leak.dim() for dim, size in enumerate(leak.shape) if size > 1}


def _agree(a: Tensor, b: Tensor) -> bool:
    try:
        a, b = torch.broadcast_tensors(a, b)
    except RuntimeError:
        return False
    return torch.allclose(a, b, rtol=0, atol=1e-9)


def _shown(leak: Tensor) -> str:
    return f"{float(leak.flatten()[0]):g}" if is_one_number(leak) else f"{float(leak.min()):g} to {float(leak.max()):g}"
