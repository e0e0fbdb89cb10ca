"""Learning rules: what gradient is taken, and when the weights are updated.

Every rule is a combination of choices that do not depend on each other; see the fields of `Rule`. The idea of a few
axes instead of one driver for each paper is BrainTrace's (chaobrain, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from snnfx.errors import InputError

__all__ = ["BPTT", "FPTT", "OSTL", "OTTT_A", "OTTT_O", "SLTT", "SLTT_K", "TBPTT", "EProp", "FPTTTerm", "Rule"]


@dataclass(frozen=True)
class FPTTTerm:
    """The extra terms of FPTT: a pull towards a running average of the weights, corrected by the last gradient.

    Args:
        alpha: strength of the regulariser, above 0.
        variant: "reference": SpikingJelly 2.0.0's function: the regulariser is a mean over the elements of each
            parameter, the gradient for the running average comes from a second forward pass with the new weights that
            starts from the state after the step, and the last step of a sequence leaves the running average alone.
            "paper": the published rule: a sum, the second forward pass starts from the state before the step, and every
            step updates the running average. "authors": the form of the authors' code, without a second forward pass.
    """

    alpha: float
    variant: Literal["reference", "paper", "authors"] = "reference"

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise InputError("SNNFX309", f"alpha={self.alpha!r}", why="it is a number above 0.")
        if self.variant not in ("reference", "paper", "authors"):
            hint = "Choose one of 'reference', 'paper', 'authors'."
            raise InputError("SNNFX309", f"variant={self.variant!r}", hint=hint)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "operand": ("raw", "trace"),
    "signal": ("spatial", "readout"),
    "dropout": ("step", "sequence"),
    "trace_inputs": (False, True),
    "trace_bias": (False, True),
}
_NUMBERS_OR: dict[str, tuple[Any, ...]] = {
    "temporal": ("keep", "cut", "layer"),
    "update": ("end", "step"),
    "random_steps": (None,),
}


@dataclass(frozen=True)
class Rule:
    """A learning rule for sequences with a loss at every time step.

    A rule is called to change some of its choices: `OTTT_A(trace_leak="pre")`.

    Args:
        name: for messages and tables.
        temporal: which gradients go through the state from step to step. "keep": all (back-propagation through time).
            "cut": none. "layer": those inside of a layer, a neuron with all that feeds back into it and the weights in
            front of it; from layer to layer they go inside of one step. An int K: within stretches of K steps, counted
            from the start of the sequence.
        cut: which slots `temporal` is about: "all"; "spiking": all but those of neurons that never fire (a leaky
            readout keeps its gradients through time); or a tuple of slot names.
        operand: what the gradient of a weight is taken with. "raw": the operand of the weight op itself. "trace": its
            eligibility trace `a[t] = leak * a[t-1] + operand[t]`.
        trace_leak: "post": the leak of the neuron that the weight feeds; "pre": of the neuron that emits the operand;
            or a number.
        trace_inputs: whether weights on the network's input have a trace as well.
        trace_bias: whether biases have one (the operand of a bias is 1 at every step).
        signal: how the error reaches a neuron. "spatial": by back-propagation through the layers of the same step.
            "readout": only through the layers between it and the output in which nothing spikes.
        update: "end": one update after the sequence; an int K: after every K steps (and at the end), "step": K = 1. An
            update ends what goes through time.
        random_steps: None, or the number of steps, drawn at random for each sequence, at which a gradient is taken. The
            others are run without, unless the step draws numbers (dropout): then all are differentiated.
        extra: None, or the extra terms of FPTT.
        dropout: "step": `nn.Dropout` draws a mask at every step; "sequence": one mask for the whole sequence.
        loss_scale: "mean": the loss of each step is divided by T; "sum": it is not; a number: it is multiplied by it.
        citation: where the rule was published.

    Raises:
        InputError: SNNFX309, a field has no such value; SNNFX616, fields contradict each other.
    """

    name: str = "custom"
    temporal: Literal["keep", "cut", "layer"] | int = "keep"
    cut: Literal["all", "spiking"] | tuple[str, ...] = "all"
    operand: Literal["raw", "trace"] = "raw"
    trace_leak: Literal["post", "pre"] | float = "post"
    trace_inputs: bool = False
    trace_bias: bool = False
    signal: Literal["spatial", "readout"] = "spatial"
    update: Literal["end", "step"] | int = "end"
    random_steps: int | None = None
    extra: FPTTTerm | None = None
    dropout: Literal["step", "sequence"] = "step"
    loss_scale: Literal["mean", "sum"] | float = "mean"
    citation: str = ""

    def __call__(self, **changes: Any) -> Rule:
        """The same rule with some fields changed."""
        return replace(self, **changes)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = f"Choose one of {', '.join(map(repr, choices))}."
                raise InputError("SNNFX309", f"{name}={value!r}", hint=hint)
        for name, words in _NUMBERS_OR.items():
            value = getattr(self, name)
            if value not in words and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                known = ", ".join(map(repr, words))
                raise InputError("SNNFX614", f"{name}={value!r}", why=f"it is {known} or a number of steps above 0.")
        if self.cut not in ("all", "spiking") and not isinstance(self.cut, tuple):
            raise InputError("SNNFX309", f"cut={self.cut!r}", hint="Choose 'all', 'spiking' or a tuple of slot names.")
        leak = self.trace_leak
        if leak not in ("post", "pre") and (isinstance(leak, bool) or not isinstance(leak, int | float)):
            raise InputError("SNNFX309", f"trace_leak={leak!r}", hint="Choose 'post', 'pre' or a number.")
        if self.extra is not None and not isinstance(self.extra, FPTTTerm):
            raise InputError("SNNFX309", f"extra={self.extra!r}", hint="Use an FPTTTerm, or None.")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        def contradiction(what: str, why: str) -> InputError:
            return InputError("SNNFX616", f"the rule {self.name} contradicts itself: {what}", why=why)

        if self.operand == "trace" and self.temporal != "cut":
            why = "a trace stands for the gradients through time of what is cut; not cut, they would count twice."
            raise contradiction('operand="trace" without temporal="cut"', why)
        if self.temporal == "layer" and self.cut != "all":
            raise contradiction('temporal="layer" with cut=', "which states belong to a layer is found in the graph.")
        if self.random_steps is not None and (self.temporal != "cut" or self.keeps_some):
            why = "a gradient at one step alone needs the state cut."
            raise contradiction('random_steps without temporal="cut" and cut="all"', why)
        if self.random_steps is not None and self.update != "end":
            raise contradiction("random_steps with updates within the sequence", "they are taken together.")
        if self.extra is not None and (self.update not in ("step", 1) or self.random_steps is not None):
            raise contradiction('the terms of FPTT without update="step"', "they are made for an update at each step.")

    @property
    def keeps_some(self) -> bool:
        """Whether gradients may go through some states over the whole sequence, while others are cut."""
        return self.temporal == "cut" and self.cut != "all"

    @property
    def goes_through_time(self) -> bool:
        """Whether gradients go from step to step, as far as a stretch of K steps or the sequence."""
        return self.temporal != "cut" or self.keeps_some

    @property
    def updates_within_sequence(self) -> bool:
        """Whether the weights change before the sequence ends."""
        return self.update != "end"


BPTT = Rule(name="BPTT", temporal="keep", citation="Werbos 1990, Backpropagation through time, Proc. IEEE 78(10)")
"""Back-propagation through time: the exact gradient, memory grows with T."""


def TBPTT(K: int) -> Rule:
    """Truncated BPTT: gradients go back within stretches of K steps, one update after the sequence."""
    return Rule(name=f"TBPTT-{K}", temporal=K, citation="Williams & Peng 1990, Neural Computation 2(4)")


OTTT_A = Rule(
    name="OTTT-A",
    temporal="cut",
    operand="trace",
    dropout="sequence",
    citation="Xiao et al. 2022, Online Training Through Time for Spiking Neural Networks, arXiv:2210.04195",
)
"""Online training through time, gradients accumulated over the sequence: one update."""

OTTT_O = OTTT_A(name="OTTT-O", update="step")
"""Online training through time with an update at every step."""

SLTT = Rule(
    name="SLTT",
    temporal="cut",
    citation="Meng et al. 2023, Towards Memory- and Time-Efficient Backpropagation for Training SNNs, arXiv:2302.14311",
)
"""Spatial learning through time: only gradients of the same step."""


def SLTT_K(K: int) -> Rule:
    """SLTT with gradients at K random steps of each sequence; the loss is still divided by T."""
    return SLTT(name=f"SLTT-{K}", random_steps=K)


def FPTT(alpha: float, variant: Literal["reference", "paper", "authors"] = "reference") -> Rule:
    """Forward propagation through time: an update at every step, towards a running average of the weights."""
    return Rule(
        name="FPTT",
        temporal="cut",
        update="step",
        extra=FPTTTerm(alpha, variant),
        loss_scale="sum",
        citation="Kag & Saligrama 2021, ICML (PMLR 139); Yin et al. 2021, arXiv:2112.11231",
    )


OSTL = Rule(
    name="OSTL",
    temporal="layer",
    citation="Bohnstingl et al. 2022, Online Spatio-Temporal Learning in Deep Neural Networks, IEEE TNNLS, "
    "arXiv:2007.12723",
)
"""Online spatio-temporal learning: exact in each layer, whatever neuron and recurrence it has; spatial between layers.

Published with eligibilities for each weight that are carried forward. The same gradients are taken here by going back
through time in each layer, which costs a chunk of memory instead of one tensor of the weight's size for each sample.
"""

EProp = Rule(
    name="e-prop",
    temporal="cut",
    cut="spiking",
    operand="trace",
    trace_inputs=True,
    signal="readout",
    citation="Bellec et al. 2020, A solution to the learning dilemma for recurrent networks of spiking neurons, "
    "Nature Communications 11",
)
"""Eligibility propagation with the readout's own weights as the learning signal (symmetric e-prop), for leaky neurons.

A readout that leaks but never fires keeps its gradients through time, which is the same as filtering the eligibility
traces with its leak. They are taken backwards, chunk by chunk (see `Trainer`), so memory grows by one state for each
chunk. The state of adaptive thresholds has no eligibility of its own; weights in front of a neuron that reaches the
output only through other neurons that fire get no signal and are refused.
"""
