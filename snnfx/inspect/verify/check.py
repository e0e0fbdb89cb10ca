"""One comparison of a net with its reference: outputs, states, contents of the modules, gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError, VerificationError
from snnfx.inspect.verify.comparison import Comparison, Tolerance, compare, named_leaves
from snnfx.inspect.verify.divergence import Divergence, NeuronTrace, first_divergence, recorded_neurons
from snnfx.inspect.verify.observed_contents import Observed, changed_names, is_same
from snnfx.inspect.verify.program_lookup import region_of_module, region_of_output
from snnfx.inspect.verify.rounding import flipped_spikes
from snnfx.inspect.verify.runs import Run, Runs
from snnfx.inspect.verify.state_dependence import is_continued_without, is_state

__all__ = ["Check", "Flips"]

_CODES = {
    "output": "SNNFX401",
    "state": "SNNFX402",
    "gradient": "SNNFX403",
    "buffer": "SNNFX404",
    "parameter": "SNNFX410",
    "attribute": "SNNFX410",
}
_NO_GRADIENTS = " of a call without gradients"


@dataclass
class Flips:
    """Spikes that differ between net and model, of all recorded spikes, and the first neuron that differs."""

    count: int
    total: int
    first: Divergence | None


@dataclass
class Check:
    """Compares the runs of a net and of its reference.

    Args:
        runs: the runs.
        tolerance: largest allowed difference.

    Attributes:
        comparisons: one for each value, after `run`.
        notes: values that were not compared.
        expected: the run of the reference.
        drew_random_numbers: whether one of them drew random numbers.
    """

    runs: Runs
    tolerance: Tolerance
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    expected: Run | None = None
    drew_random_numbers: bool = False
    _known: dict[tuple[nn.Module, str], bool] = field(default_factory=dict)
    _flips: Flips | None = None

    @property
    def failed(self) -> list[Comparison]:
        """The comparisons that failed, outputs first, then states, and so on."""
        return [c for c in self.comparisons if c.failed]

    @property
    def semantics(self) -> str:
        return "BatchNorm statistics over T*N" if self.runs.folded else "the model run step by step"

    def run(self) -> Check:
        """Run both sides and compare them; without shared draws, values that depend on random numbers are not."""
        actual = self.runs.run_net()
        self.expected = expected = self.runs.run_model(actual.outputs.keys(), actual.states.keys())
        self.drew_random_numbers = actual.drew_random_numbers or expected.drew_random_numbers
        if self.drew_random_numbers and self.runs.draws is None:
            return self
        called = self.runs.call_net()
        self.comparisons = [
            *self._compare_outputs(actual.outputs, expected.outputs),
            *self._compare_call(called.outputs, expected.outputs),
            *self._compare_states(actual, expected),
            *self._compare_contents(actual, expected),
            *self._compare_contents(called, expected, actual.states, _NO_GRADIENTS),
            *self._compare_gradients(actual.gradients, expected.gradients),
        ]
        return self

    # -- comparisons --------------------------------------------------------------------------------------------------

    def _compare_outputs(self, actual: dict[str, Any], expected: dict[str, Any], how: str = "") -> list[Comparison]:
        if actual.keys() != expected.keys():
            names, reference_names = ", ".join(actual) or "none", ", ".join(expected) or "none"
            why = f"the net returns {names}{how}, the reference {reference_names}."
            raise VerificationError("SNNFX401", "the outputs of net and reference are nested differently", why=why)
        for name, b in expected.items():
            value = actual[name]
            if isinstance(value, Tensor) and value.ndim == 1 and isinstance(b, bool | int | float):
                expected = {**expected, name: torch.full_like(value, b)}  # a number that all steps have
        return [
            compare("output", f"`{name}`{how}", actual[name], b, self.tolerance, timed=isinstance(actual[name], Tensor))
            for name, b in expected.items()
        ]

    def _compare_call(self, actual: dict[str, Any], expected: dict[str, Any]) -> list[Comparison]:
        results = self._compare_outputs(actual, expected, _NO_GRADIENTS)
        if any(c.failed for c in results):
            # A model may compute something else without gradients (`if torch.is_grad_enabled()`).
            with torch.no_grad():
                expected = self.runs.run_model(actual.keys()).outputs
            results = self._compare_outputs(actual, expected, _NO_GRADIENTS)
        return results

    def _compare_states(self, actual: Run, expected: Run) -> list[Comparison]:
        comparisons = []
        values, start = expected.states, expected.states_before
        # A neuron may store the state that it was passed, which the net returns under the name of the argument.
        returned = {identity for name, identity in expected.stored_states.items() if name in actual.states}
        for name, value in values.items():
            if name in actual.states:
                leaves, reference_leaves = named_leaves(actual.states[name]), named_leaves(value)
                for path in leaves | reference_leaves:
                    pair = leaves.get(path), reference_leaves.get(path)
                    comparisons.append(compare("state", f"state `{name}{path}`", *pair, self.tolerance))
            elif expected.stored_states.get(name) in returned:
                continue
            elif name in start and not is_same(value, start[name]) and self._is_state(name, expected):
                missing = "the net does not return this state"
                comparisons.append(Comparison("state", f"state `{name}`", failed=True, detail=missing))
        unknown = [f"`{name}`" for name in actual.states if name not in values]
        if unknown:
            self.notes.append(f"state not compared, because the model has no such attribute: {', '.join(unknown)}")
        return comparisons

    def _is_state(self, name: str, expected: Run) -> bool:
        """Whether a step depends on a registered state, so that the net must return it."""
        owner, _, attribute = name.rpartition(".")
        module = self.runs.model.get_submodule(owner)
        entry = expected.after.get(name)
        stored = {key for m, key in self.runs.registered_storage() if m is module} or {attribute}
        if entry is not None:
            stored = {entry.attribute}
        return any(is_state(self.runs, module, key) for key in stored)

    def _compare_contents(
        self, actual: Run, expected: Run, states: Mapping[str, Any] | None = None, how: str = ""
    ) -> list[Comparison]:
        """Compare parameters, buffers and attributes that the steps change, or that the net changes."""
        states = actual.states if states is None else states
        covered = self._covered_by_states(states, expected)
        changed = dict.fromkeys(
            (*changed_names(expected.before, expected.after), *changed_names(actual.before, actual.after))
        )
        # An unused module may have buffers that the net lacks.
        names = [
            n for n, entry in expected.after.items() if n in changed or (entry.kind == "buffer" and n in actual.after)
        ]
        comparisons, lost, implied = [], [], []
        for name in (*names, *(n for n in changed if n not in expected.after)):
            entry = expected.after.get(name) or expected.before.get(name)
            if entry is None or name in covered:
                continue  # attributes of the net itself, or compared as a state
            wanted, value = expected.after.get(name), actual.after.get(name)
            label = f"{entry.kind} `{name}`{how}"
            if wanted is not None and value is not None:
                result = compare(entry.kind, label, value.value, wanted.value, self.tolerance)
            else:
                result = Comparison(entry.kind, label, failed=wanted is not value, detail=_missing(wanted, value))
            was_left = _is_unchanged(name, actual)
            if result.failed and entry.kind == "attribute" and was_left:
                if not self._matters(entry):
                    lost.append(name)
                    continue
                if is_continued_without(self.runs, name, self.tolerance):
                    implied.append(name)
                    continue
            if result.failed and was_left:
                result = replace(result, detail=f"the steps change it, the net does not; {result.detail}")
            comparisons.append(result)
        if lost and not how:
            self.notes.append(f"the net does not write {_listed(lost)}, which no step reads before writing it")
        if implied and not how:
            reason = "but continues from its final state like the model"
            self.notes.append(f"the net does not write {_listed(implied)}, {reason}")
        return comparisons if not how else [c for c in comparisons if c.failed]

    def _matters(self, entry: Observed) -> bool:
        key = (entry.owner, entry.attribute)
        if key not in self._known:
            self._known[key] = is_state(self.runs, *key)
        return self._known[key]

    def _covered_by_states(self, states: Mapping[str, Any], expected: Run) -> set[str]:
        """The names of observed values that are compared as states.

        These are the states of registered modules, and values stored under another name than the slot, such as
        `lif._memories.v`.
        """
        storage, covered = self.runs.registered_storage(), set()
        kinds = {name: entry.kind for name, entry in expected.after.items()}
        # Buffers and parameters live on in the model, where the net writes them, unless they are states of neurons.
        slots = {
            name
            for name in states.keys() | expected.states.keys()
            if name in expected.states_before or name not in kinds or kinds[name] == "attribute"
        }
        for name, entry in {**expected.before, **expected.after}.items():
            parts = name.split(".")
            prefixes = {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
            owner = ".".join(parts[: parts.index(entry.attribute)]) if entry.attribute in parts else ""
            alias = f"{owner}.{parts[-1]}" if owner else parts[-1]
            is_stored = (entry.owner, entry.attribute) in storage
            if prefixes & slots or alias in slots or is_stored:
                covered.add(name)
        return covered

    def _compare_gradients(
        self, actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]
    ) -> list[Comparison]:
        sizes = [float(g.abs().max()) for g in expected.values() if g is not None and g.numel()]
        # A gradient that is zero up to rounding (a bias before a BatchNorm) needs a scale from the other gradients.
        floor = 1e-2 * max(sizes, default=0.0)
        inputs = self.runs.inputs
        dims = {f"`{name}`": dim for name, dim in zip(inputs.names, inputs.dims, strict=True)}
        comparisons = []
        for name, reference in expected.items():
            value, dim = actual.get(name), dims.get(name)
            present = [g for g in (value, reference) if g is not None]
            if not present:
                continue
            zero = torch.zeros_like(present[0])
            a, b = (zero if value is None else value), (zero if reference is None else reference)
            if dim is not None:
                a, b = a.movedim(dim, 0), b.movedim(dim, 0)
            timed = dim is not None
            result = compare("gradient", f"gradient of {name}", a, b, self.tolerance, timed=timed, floor=floor)
            if result.failed and value is None:
                detail = f"the net gives no gradient, the reference one of magnitude {float(b.abs().max()):.3g}"
                result = replace(result, detail=detail)
            comparisons.append(result)
        return comparisons

    # -- neurons ------------------------------------------------------------------------------------------------------

    def silent_neurons(self) -> list[str]:
        """The neurons of the model that emit no spike at any step."""
        return [name for name, spikes in self.expected.spiking.items() if not spikes] if self.expected else []

    def flips(self) -> Flips:
        """The spikes that differ, and the first neuron that differs."""
        if self._flips is None:
            traces, record = self._recorded()
            first = first_divergence(traces, record, self.tolerance, by_time=not self.runs.folded) if traces else None
            self._flips = Flips(*flipped_spikes(traces, record), first)
        return self._flips

    def _recorded(self) -> tuple[dict[str, NeuronTrace], dict[str, Any]]:
        with recorded_neurons(self.runs.model) as traces:
            self.runs.trace_model()
        # Only neurons called once per step; the reference for folded BatchNorm runs the model twice.
        times = 2 if self.runs.folded and not self.runs.carry else 1
        T = self.runs.inputs.steps
        traces = {name: trace for name, trace in traces.items() if len(trace.outputs) == times * T}
        for trace in traces.values():
            trace.outputs, trace.potentials = trace.outputs[-T:], trace.potentials[-T:]
        names = [*traces, *(f"{name}.{trace.slot}" for name, trace in traces.items() if trace.slot)]
        try:
            return traces, self.runs.record_net(names) if traces else {}
        except InputError:
            return {}, {}

    # -- the error ----------------------------------------------------------------------------------------------------

    def error(self, also: str = "") -> VerificationError:
        """The error for the first comparison that failed.

        Args:
            also: more about the cause.
        """
        kind = self.failed[0].kind
        comparison = min((c for c in self.failed if c.kind == kind), key=lambda c: c.step or 0)
        why = comparison.detail + "."
        divergence = self.flips().first if comparison.kind in ("output", "state") else None
        if divergence is not None:
            why += f" The first neuron that differs is {divergence.in_words}."
        if also:
            why += f" {also}"
        plan, quoted = self.runs.plan, comparison.name.split("`")[1]
        if divergence is not None:
            where = region_of_module(plan, divergence.name)
        elif comparison.kind == "output":
            where = region_of_output(plan, list(self.expected.outputs).index(quoted)) if self.expected else ""
        else:
            where = region_of_module(plan, quoted.rpartition(".")[0])
        what = f"{comparison.name} differs from the reference, {self.semantics}"
        if self.runs.folded:
            what = f"{comparison.name} differs from the reference with {self.semantics}"
        if self.runs.one_call:
            what = f"with T = 1, {comparison.name} differs from one plain call of the model"
        hint = "Print snnfx.explain(net) to see how the regions were formed."
        return VerificationError(_CODES[comparison.kind], what, where=where, why=why, hint=hint)


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (" ..." if len(names) > 5 else "")


def _missing(wanted: Observed | None, value: Observed | None) -> str:
    if wanted is None:
        return "the reference removes it, the net keeps it"
    return "the net does not have it" if value is None else ""


def _is_unchanged(name: str, run: Run) -> bool:
    before, after = run.before.get(name), run.after.get(name)
    if before is None or after is None:
        return before is after
    return is_same(before.value, after.value)
