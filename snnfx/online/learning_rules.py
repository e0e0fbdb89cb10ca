"""Learning rules: which gradient is computed, and when the weights are updated.

A rule is a combination of independent choices, the fields of `Rule`. The idea of a few axes instead of one driver per
paper comes from BrainTrace (chaobrain, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from snnfx.errors import InputError

__all__ = ["BPTT", "FPTT", "OSTL", "OTTT_A", "OTTT_O", "SLTT", "SLTT_K", "TBPTT", "EProp", "FPTTTerm", "Rule"]


@dataclass(frozen=True)
class FPTTTerm:
    """FPTT's regulariser: it pulls the weights towards their running average, corrected by the last gradient.

    Args:
        alpha: strength of the regulariser, above 0.
        variant: "reference" follows SpikingJelly 2.0.0: the regulariser is a mean over the elements of each parameter;
            the gradient for the running average comes from a second forward pass with the updated weights, which starts
            from the state after the step; the last step of a sequence does not update the running average. "paper"
            follows the publication: the regulariser is a sum, the second forward pass starts from the state before the
            step, and every step updates the running average. "authors" follows the authors' code, which has no second
            forward pass and a multiplier for each parameter.
        keep_multipliers: for the variant "authors": whether a sequence starts with the multipliers of the previous one,
            as in the authors' code. False: with multipliers 0. The other variants have no multipliers.

    Raises:
        InputError: SNNFX309 if a value is out of range.
    """

    alpha: float
    variant: Literal["reference", "paper", "authors"] = "reference"
    keep_multipliers: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise InputError("SNNFX309", f"invalid alpha={self.alpha!r}", why="expected a number above 0.")
        if self.variant not in ("reference", "paper", "authors"):
            hint = "Choose one of 'reference', 'paper', 'authors'."
            raise InputError("SNNFX309", f"invalid variant={self.variant!r}", hint=hint)
        if not isinstance(self.keep_multipliers, bool):
            what = f"invalid keep_multipliers={self.keep_multipliers!r}"
            raise InputError("SNNFX309", what, hint="Choose True or False.")


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

    Call a rule to change some of its fields: `OTTT_A(trace_leak="pre")`.

    Args:
        name: shown in messages and tables.
        temporal: temporal credit: which gradients flow through the state from step to step. "keep": all (BPTT). "cut":
            none. "layer": those within a layer, which is a neuron with everything that feeds back into it and the
            weights in front of it; between layers, gradients flow within one time step only. An int K: within windows
            of K steps, counted from the start of the sequence (truncated BPTT).
        cut: the slots that `temporal` applies to. "all"; "spiking": all except those of neurons that never fire, so a
            leaky readout keeps its gradients through time; or a tuple of slot names.
        operand: the operand that forms the gradient of a weight. "raw": the operand of the weight op itself. "trace":
            its eligibility trace `a[t] = leak * a[t-1] + operand[t]`.
        trace_leak: "post": the leak of the neuron that the weight feeds, as in OTTT's publication; a weight that feeds
            no neuron, such as a readout, has no trace. "pre": the leak of the neuron that emits the operand, which
            gives the numbers of OTTT's authors' code; a readout then has a trace. Or a number. `print(trainer)`
            lists the weights without a trace. If each neuron has a leak of its own (a vector, or one for
            each channel of a convolution; learned or fixed), "post" keeps a trace for each output channel of the
            weight, which takes the memory of the trace times the number of output channels; see `Trainer.chunk`.
        trace_inputs: whether weights on the network's input have a trace as well.
        trace_bias: whether biases have a trace (the operand of a bias is 1 at every step).
        signal: spatial credit: how the learning signal reaches a neuron. "spatial": by backpropagation through the
            layers of the same step. "readout": only through the non-spiking layers between the neuron and the output.
        update: update schedule. "end": one update after the sequence; an int K: after every K steps and at the end;
            "step": the same as K = 1. No gradient flows through time past an update.
        random_steps: None, or the number of randomly sampled time steps per sequence at which gradients are computed.
            The other steps run without gradients, unless a step draws random numbers (dropout): then all of them are
            differentiated.
        extra: None, or FPTT's regulariser.
        dropout: "step": `nn.Dropout` draws a mask at every step; "sequence": one mask for the whole sequence.
        loss_scale: "mean": divide the loss of each step by T; "sum": do not scale it; a number: multiply by it.
        citation: the publication.

    Raises:
        InputError: SNNFX309 or SNNFX614 if a field has an invalid value; SNNFX616 if fields contradict each other.
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
        """Return a copy of the rule with some fields changed."""
        return replace(self, **changes)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = f"Choose one of {', '.join(map(repr, choices))}."
                raise InputError("SNNFX309", f"invalid {name}={value!r}", hint=hint)
        for name, words in _NUMBERS_OR.items():
            value = getattr(self, name)
            if value not in words and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                known = ", ".join(map(repr, words))
                why = f"expected {known} or a number of time steps (an int of at least 1)."
                raise InputError("SNNFX614", f"invalid {name}={value!r}", why=why)
        if self.cut not in ("all", "spiking") and not isinstance(self.cut, tuple):
            hint = "Choose 'all', 'spiking' or a tuple of slot names."
            raise InputError("SNNFX309", f"invalid cut={self.cut!r}", hint=hint)
        leak = self.trace_leak
        if leak not in ("post", "pre") and (isinstance(leak, bool) or not isinstance(leak, int | float)):
            raise InputError("SNNFX309", f"invalid trace_leak={leak!r}", hint="Choose 'post', 'pre' or a number.")
        if self.extra is not None and not isinstance(self.extra, FPTTTerm):
            raise InputError("SNNFX309", f"invalid extra={self.extra!r}", hint="Use an FPTTTerm or None.")
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        def contradiction(what: str, why: str, hint: str) -> InputError:
            return InputError("SNNFX616", f"the rule {self.name} contradicts itself: {what}", why=why, hint=hint)

        if self.operand == "trace" and self.temporal != "cut":
            why = "the eligibility trace replaces the gradients through time; with both, they would count twice."
            hint = 'Use temporal="cut" with traces, or operand="raw".'
            raise contradiction(f'operand="trace" with temporal={self.temporal!r}', why, hint)
        if self.temporal == "layer" and self.cut != "all":
            why = "the states of a layer are found in the graph."
            raise contradiction(f'temporal="layer" with cut={self.cut!r}', why, 'Use cut="all".')
        if self.random_steps is not None and (self.temporal != "cut" or self.exempts_slots):
            why = "gradients at single time steps need all states cut."
            raise contradiction("random_steps with gradients through time", why, 'Use temporal="cut" and cut="all".')
        if self.random_steps is not None and self.update != "end":
            why = "the gradients of the sampled steps are computed together."
            raise contradiction("random_steps with updates within the sequence", why, 'Use update="end".')
        if self.extra is not None and (self.update not in ("step", 1) or self.random_steps is not None):
            why = "FPTT updates the weights after every time step."
            raise contradiction('FPTT without update="step"', why, 'Use update="step" and random_steps=None.')

    @property
    def exempts_slots(self) -> bool:
        """Whether some slots keep their gradients through time while others are cut."""
        return self.temporal == "cut" and self.cut != "all"

    @property
    def has_temporal_credit(self) -> bool:
        """Whether gradients flow from step to step, within windows of K steps or over the whole sequence."""
        return self.temporal != "cut" or self.exempts_slots

    @property
    def updates_within_sequence(self) -> bool:
        """Whether the weights change before the sequence ends."""
        return self.update != "end"


BPTT = Rule(name="BPTT", temporal="keep", citation="Werbos 1990, Backpropagation through time, Proc. IEEE 78(10)")
"""Backpropagation through time: the exact gradient. Memory grows with T, unless `Trainer` is given a `chunk`."""


def TBPTT(K: int) -> Rule:
    """Truncated BPTT: gradients flow within windows of K steps; one update after the sequence."""
    return Rule(name=f"TBPTT-{K}", temporal=K, citation="Williams & Peng 1990, Neural Computation 2(4)")


OTTT_A = Rule(
    name="OTTT-A",
    temporal="cut",
    operand="trace",
    dropout="sequence",
    citation="Xiao et al. 2022, Online Training Through Time for Spiking Neural Networks, arXiv:2210.04195",
)
"""Online training through time with gradients accumulated over the sequence: one update.

The traces follow the publication. `OTTT_A(trace_leak="pre")` gives the numbers of the authors' code, which traces the
spikes with the leak of the neuron that emits them, also for a readout that feeds no neuron.
"""

OTTT_O = OTTT_A(name="OTTT-O", update="step")
"""Online training through time with an update at every step."""

SLTT = Rule(
    name="SLTT",
    temporal="cut",
    citation="Meng et al. 2023, Towards Memory- and Time-Efficient Backpropagation for Training SNNs, arXiv:2302.14311",
)
"""Spatial learning through time: no gradients through time."""


def SLTT_K(K: int) -> Rule:
    """SLTT with gradients at K randomly sampled steps per sequence; each loss is still divided by T."""
    return SLTT(name=f"SLTT-{K}", random_steps=K)


def FPTT(
    alpha: float, variant: Literal["reference", "paper", "authors"] = "reference", keep_multipliers: bool = True
) -> Rule:
    """Forward propagation through time: updates at every step, regularised by a running average of the weights.

    The arguments are those of `FPTTTerm`. The running averages and the multipliers belong to the `Trainer`:
    `Trainer.state_dict` saves them.
    """
    return Rule(
        name="FPTT",
        temporal="cut",
        update="step",
        extra=FPTTTerm(alpha, variant, keep_multipliers),
        loss_scale="sum",
        citation="Kag & Saligrama 2021, ICML (PMLR 139); Yin et al. 2021, arXiv:2112.11231",
    )


OSTL = Rule(
    name="OSTL",
    temporal="layer",
    citation="Bohnstingl et al. 2022, Online Spatio-Temporal Learning in Deep Neural Networks, IEEE TNNLS, "
    "arXiv:2007.12723",
)
"""Online spatio-temporal learning: exact temporal credit within each layer, spatial credit between layers.

It works for any neuron and any recurrence. The publication carries an eligibility for each weight forward in time. Here
the same gradients come from BPTT within each layer, which costs the memory of one chunk instead of a tensor of the
weight's size per sample.
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
"""Eligibility propagation with the readout's own weights as feedback weights (symmetric e-prop), for leaky neurons.

A readout that leaks but never fires keeps its gradients through time, which is equivalent to filtering the eligibility
traces with its leak. They are backpropagated chunk by chunk (see `Trainer`), so memory grows by one state per chunk.
The state of an adaptive threshold has no eligibility of its own. A weight whose neuron reaches the output only through
other spiking neurons gets no learning signal; such models are refused.
"""
