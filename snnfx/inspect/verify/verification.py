"""The verification of one net: in the dtype of the model and, if they differ there, in float64."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from snnfx.convert import convert_without_budget
from snnfx.errors import SnnfxError, VerificationError
from snnfx.inspect.verify.check import Check
from snnfx.inspect.verify.comparison import Tolerance
from snnfx.inspect.verify.draw_assignment import DrawAssignment, check_with_shared_draws
from snnfx.inspect.verify.float64_constants import refine_constants
from snnfx.inspect.verify.float64_copies import copies_in_float64, in_float64, to_float64
from snnfx.inspect.verify.rounding_explanation import describe_rounding, is_rounding, is_structural
from snnfx.inspect.verify.runs import Runs, undisturbed
from snnfx.inspect.verify.sequence_inputs import SequenceInputs
from snnfx.inspect.verify.shared_draws import SharedDraws
from snnfx.inspect.verify.verification_report import VerificationReport
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import format_location, location_of_error

__all__ = ["Verification"]


_USUAL_ROUNDING = 0.1
"""The part of the tolerance that rounding errors rarely exceed."""
_CLEAR = 1e-6
"""The relative difference in float64 above which a net is wrong although it passes in float32."""


@dataclass
class _Outcome:
    """The checks of a net in one dtype: of the whole sequence, and of one step if BatchNorm is folded."""

    checks: list[Check]
    notes: list[str]
    dtype: str

    @property
    def failing(self) -> Check | None:
        return next((check for check in self.checks if check.failed), None)


class Verification:
    """The verification of one net: in the dtype of the model and, where that is inconclusive, in float64."""

    def __init__(
        self,
        model: nn.Module,
        net: Any,
        inputs: SequenceInputs,
        tolerance: Tolerance,
        gradients: bool,
        first: dict[str, Any],
    ) -> None:
        self.model, self.net, self.inputs, self.tolerance, self.gradients = model, net, inputs, tolerance, gradients
        self.first = first
        self.draws: DrawAssignment | None = None
        """The assignment of random numbers in the first comparison without a difference, valid for all others."""

    def report(self, double: bool) -> VerificationReport:
        """Compare and return the report, or raise."""
        if double:
            return self._result(self._in_float64())
        narrow = self._compared(self.model, self.net, self.inputs, self.first)
        failing = narrow.failing
        if failing is None and self._is_inconclusive(narrow):
            return self._decided_in_float64(narrow)
        if failing is None or narrow.dtype == "float64" or any(is_structural(c) for c in failing.failed):
            return self._result(narrow)
        try:
            wide = self._in_float64()
        except VerificationError as error:
            if error.code != "SNNFX412":
                raise
            raise failing.error(
                f"Rounding was not ruled out, because the model cannot run in float64: {error.what}."
            ) from error
        if wide.failing is not None:
            raise wide.failing.error(f"Compared in float64 and in {narrow.dtype}.")
        return self._rounded(narrow, wide)

    def _is_inconclusive(self, narrow: _Outcome) -> bool:
        """Whether a tolerated difference is larger than usual rounding errors: a wrong weight among many causes one."""
        if narrow.dtype != "float32" or self.tolerance != Tolerance():
            return False
        return any(c.difference > _USUAL_ROUNDING * c.allowed for check in narrow.checks for c in check.comparisons)

    def _decided_in_float64(self, narrow: _Outcome) -> VerificationReport:
        """The report on a net with tolerated differences that may not be rounding errors."""
        try:
            wide = self._in_float64()
        except VerificationError as error:
            if error.code != "SNNFX412":
                raise
            return self._result(narrow)
        failing = wide.failing
        if failing is not None and max(c.relative for c in failing.failed) > _CLEAR:
            raise failing.error("Compared in float64; in float32, the difference is within the tolerance.")
        return self._result(narrow)

    def _rounded(self, narrow: _Outcome, wide: _Outcome) -> VerificationReport:
        """The report on a net that agrees in float64, if rounding explains the difference in the narrower dtype."""
        failing = narrow.failing
        assert failing is not None
        if not is_rounding(failing, wide.checks):
            raise failing.error("The net agrees in float64, but rounding does not explain the difference.")
        note = f"{narrow.dtype} rounding: {describe_rounding(failing)}; net and reference agree in float64"
        wide.notes.insert(0, note)
        return replace(self._result(wide), flipped_spikes=failing.flips().count)

    # -- comparisons --------------------------------------------------------------------------------------------------

    def _compared(self, model: nn.Module, net: Any, inputs: SequenceInputs, first: dict[str, Any]) -> _Outcome:
        """Compare the net over all steps, and over one step where BatchNorm is folded."""
        notes: list[str] = []

        def check(of: SequenceInputs, one_call: bool) -> Check:
            def runs(draws: SharedDraws | None) -> Runs:
                return Runs(model, net, of, first, self.gradients, one_call, draws)

            result = Check(runs(None), self.tolerance).run()
            if result.drew_random_numbers:
                result, assignment = check_with_shared_draws(model, of.steps, runs, self.tolerance, self.draws)
                if not result.failed:
                    self.draws = assignment
                if not one_call and result.runs.draws is not None:
                    notes.append(f"net and reference drew the same random numbers: {result.runs.draws.description()}")
            return result

        checks = [check(inputs, False)]
        if checks[0].runs.folded and inputs.steps > 1 and not checks[0].failed:
            try:
                checks.append(check(inputs.first_step(), True))
            except ValueError as error:  # one value per channel: BatchNorm has no statistics
                notes.append(f"T = 1 was not compared: {str(error).splitlines()[0]}")
            else:
                notes.append("with T = 1, the net also matches one plain call of the model")
        return _Outcome(checks, notes, _dtype_of(model, inputs))

    def _in_float64(self) -> _Outcome:
        """Compare copies of model and net in float64."""
        inputs = self.inputs.with_leaves(to_float64)
        first = pytree.tree_map_only(Tensor, to_float64, self.first)
        with ExitStack() as stack:
            model, net = copies_in_float64(self.model, self.net)
            casts = stack.enter_context(in_float64())
            stack.enter_context(undisturbed(model))
            try:
                with undisturbed(model, net):
                    runs = Runs(model, net, inputs, first, self.gradients)
                    runs.run_model()
            except Exception as error:
                raise _not_in_float64(error, "the model") from error
            note = refine_constants(self.net, net, lambda: self._captured(model, inputs))
            try:
                outcome = self._compared(model, net, inputs, first)
            except SnnfxError:
                raise
            except Exception as error:
                raise _not_in_float64(error, "the net") from error
            if outcome.failing is not None:
                outcome.failing.flips()  # runs the copies, which need the settings of this context
        if casts.lines:
            lines = ", ".join(list(casts.lines)[:3])
            outcome.notes.append(f"casts to float32 were casts to float64 on both sides ({lines})")
        outcome.notes += [note] if note else []
        return outcome

    def _captured(self, model: nn.Module, inputs: SequenceInputs) -> Any:
        options = self.net.options
        args, kwargs = inputs.of_step(0)
        example: Any = None
        if getattr(self.net.program, "input_ranks", None):
            example = kwargs if kwargs and not args else args
        return convert_without_budget(model, options, example, options.carry)

    # -- the report ---------------------------------------------------------------------------------------------------

    def _result(self, outcome: _Outcome) -> VerificationReport:
        if outcome.failing is not None:
            raise outcome.failing.error()
        whole = outcome.checks[0]
        return VerificationReport(
            T=self.inputs.steps,
            training=self.net.training,
            dtype=outcome.dtype,
            semantics=whole.semantics,
            comparisons=tuple(whole.comparisons),
            notes=(*_weaknesses(whole), *whole.notes, *outcome.notes),
        )


def _not_in_float64(error: Exception, what: str) -> VerificationError:
    where = format_location(location_of_error(error))
    return VerificationError(
        "SNNFX412",
        f"{what} cannot run in float64{f' ({where})' if where else ''}",
        why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}.",
        hint="Let this line use the dtype of its operands (x.to(v.dtype), torch.zeros_like(v)), or verify without "
        "double=True.",
    )


def _weaknesses(check: Check) -> list[str]:
    """Warnings about a comparison that says little."""
    silent = check.silent_neurons()
    if silent:
        names = ", ".join(f"`{name}`" for name in silent[:4]) + (f" and {len(silent) - 4} more" if silent[4:] else "")
        verb = "never spikes" if len(silent) == 1 else "never spike"
        return [f"warning: {names} {verb}, so this check is weak; use an input that makes neurons spike"]
    assert check.expected is not None
    outputs = check.expected.outputs
    return [
        f"warning: `{name}` is zero at every step, so this check is weak; use an input that makes neurons spike"
        for name, y in outputs.items()
        if isinstance(y, Tensor) and not y.is_meta and not y.any()
    ]


def _dtype_of(model: nn.Module, inputs: SequenceInputs) -> str:
    tensors = [*model.parameters(), *model.buffers()] or [x for x in inputs.leaves if isinstance(x, Tensor)]
    dtypes = {str(x.dtype).removeprefix("torch.") for x in tensors if x.is_floating_point()}
    return ", ".join(sorted(dtypes))
