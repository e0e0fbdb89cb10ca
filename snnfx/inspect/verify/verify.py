"""`snnfx.verify`: compare a net with its model run step by step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.convert import convert_without_budget
from snnfx.emit.emitted_graphs import CONSTANTS
from snnfx.errors import InputError, SnnfxError, VerificationError
from snnfx.inspect.verify.check import Check, Flips
from snnfx.inspect.verify.comparison import Comparison, Tolerance
from snnfx.inspect.verify.float64_copies import CastsToFloat64, copies_in_float64, in_float64, to_float64
from snnfx.inspect.verify.observed_contents import is_same
from snnfx.inspect.verify.rounding import NearThresholds
from snnfx.inspect.verify.runs import Runs, undisturbed
from snnfx.inspect.verify.sequence_inputs import SequenceInputs
from snnfx.inspect.verify.shared_draws import SharedDraws
from snnfx.inspect.verify.verification_report import VerificationReport
from snnfx.inspect.verify.whole_call import verify_whole_call
from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.torch_internals import pytree
from snnfx.sandbox.user_code import format_location, location_of_error

__all__ = ["VerificationReport", "verify"]


def verify(
    model: nn.Module,
    net: Any,
    *x_seq: Any,
    T: int | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    double: bool = False,
    gradients: bool = True,
    **kwargs: Any,
) -> VerificationReport:
    """Compare a net with its model: outputs, gradients, and everything that steps change.

    The reference is a Python loop that calls the model once per time step. Every value that the loop changes is
    compared: states, buffers, parameters, and attributes of any kind, nested ones included. In training with
    `batch_norm="fold"`, each BatchNorm in a folded region takes its statistics over all time steps
    (`snnfx.inspect.verify.oracle`), and the net is also compared with one plain call of the model, at T = 1. For a net
    converted with `takes="sequence"`, the reference is the model's own call.

    Net and reference run in the net's mode, from the reset state. Where the steps draw random numbers, both sides draw
    the same ones, step by step. If they differ in float32, copies are compared in float64 as well: a difference passes
    if it vanishes there and if rounding explains it. Everything is restored afterwards: state, buffers, parameters,
    gradients, flags and random number generators.

    Args:
        model: the single-step model that was passed to `snnfx.convert`.
        net: the net that `snnfx.convert` returned.
        *x_seq: positional arguments of the net, e.g. one tensor `[T, N, *]`.
        T: number of time steps; required if none of the inputs has a time dimension. Default: None.
        atol: largest allowed absolute difference. Default by dtype: 1e-9 for float64, 1e-5 for float32.
        rtol: largest allowed difference relative to the largest magnitude in the tensor. Default by dtype: 1e-9 for
            float64, 1e-4 for float32.
        double: True to compare copies in float64 only. Code that casts to float32 (`.float()`) casts to float64 then.
            Default: False.
        gradients: True to compare the gradients of a random linear functional of the outputs, with respect to each
            floating-point input and each parameter that requires a gradient. Default: True.
        **kwargs: keyword arguments of the net.

    Returns:
        A `VerificationReport` with the largest differences; `str(report)` is a summary. Warnings come first, for
        example about neurons that never spike.

    Raises:
        VerificationError: outputs (SNNFX401), states (SNNFX402), gradients (SNNFX403), buffers (SNNFX404), parameters
            or attributes (SNNFX410) differ. The message names the first difference, its time step and region, and the
            first neuron that differs. SNNFX405: `batch_norm="fold"` is undefined for this model. SNNFX411: net and
            model cannot draw the same random numbers. SNNFX412: the model cannot run in float64.
        InputError: SNNFX301, 303, 304, 306, 307, 310: the arguments do not match the net or each other. SNNFX413: the
            net was converted from a model with other modules.

    Example:
        >>> import torch, snnfx
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), snnfx.neuron.LIFNode(v_threshold=0.2))
        >>> report = snnfx.verify(model, snnfx.convert(model), 4 * torch.rand(8, 2, 3))
        >>> print(str(report).splitlines()[0])
        OK: the net matches the reference over T = 8 steps (the model run step by step; training, float32)
    """
    if not isinstance(model, nn.Module) or not (isinstance(net, nn.Module) and hasattr(net, "run")):
        raise InputError(
            "SNNFX304",
            "verify needs a model and its converted net",
            why=f"it was called with a {type(model).__name__} and a {type(net).__name__}.",
            hint="Call verify(model, net, x_seq).",
        )
    _check_same_structure(model, net)
    options: Any = net.options
    if getattr(options, "takes", "step") == "sequence":
        with isolated(model, net), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            if double:
                model, net = copies_in_float64(model, net)
                x_seq, kwargs = pytree.tree_map_only(Tensor, to_float64, (x_seq, kwargs))
            return verify_whole_call(model, net, x_seq, kwargs, Tolerance(atol, rtol), gradients)
    first: dict[str, Any] = {}
    if getattr(getattr(net, "program", None), "carried", None):
        x_seq, kwargs, first = net.split_carried(x_seq, kwargs)  # type: ignore[operator]
    inputs = SequenceInputs.of(x_seq, kwargs, options.time_dim, T)
    with undisturbed(model, net), torch.inference_mode(False), torch.set_grad_enabled(gradients):
        return _Verification(model, net, inputs, Tolerance(atol, rtol), gradients, first).report(double)


@dataclass
class _Outcome:
    """The checks of a net in one dtype: of the whole sequence, and of one step if BatchNorm is folded."""

    checks: list[Check]
    notes: list[str]
    dtype: str
    casts: CastsToFloat64 | None = None
    captured_anew: str = ""
    """Why the net was captured anew; "" if it is a copy of the net itself."""

    @property
    def failing(self) -> Check | None:
        return next((check for check in self.checks if check.failed), None)


class _Verification:
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

    def report(self, double: bool) -> VerificationReport:
        """Compare and return the report, or raise."""
        if double:
            outcome = self._in_float64()
            if not outcome.captured_anew or outcome.failing:
                return self._result(outcome, "Print snnfx.explain(net) to see how the regions were formed.")
        narrow = self._compared(self.model, self.net, self.inputs, self.first)
        failing = narrow.failing
        if failing is None:
            if not double:
                return self._result(narrow, "")
            outcome.notes.insert(0, f"the net itself was compared in {narrow.dtype}: no difference")
            return self._result(outcome, "")
        hint = "Print snnfx.explain(net) to see how the regions were formed."
        if narrow.dtype == "float64" or any(_is_structural(c) for c in failing.failed):
            raise failing.error(hint)
        try:
            wide = outcome if double else self._in_float64()
        except VerificationError as error:
            if error.code != "SNNFX412":
                raise
            raise failing.error(
                hint, f"Rounding was not ruled out, because the model cannot run in float64: {error.what}."
            ) from error
        if wide.failing is not None:
            raise wide.failing.error(hint, f"Compared in float64 and in {narrow.dtype}.")
        return self._rounded(narrow, wide, hint)

    def _rounded(self, narrow: _Outcome, wide: _Outcome, hint: str) -> VerificationReport:
        """The report on a net that agrees in float64, if rounding explains the difference in the narrower dtype."""
        failing = narrow.failing
        assert failing is not None
        flips = failing.flips()
        if not _is_rounding(failing, flips, wide):
            raise failing.error(hint, "The net agrees in float64, but rounding does not explain the difference.")
        note = f"{narrow.dtype} rounding: {_describe_rounding(failing, flips)}; net and reference agree in float64"
        wide.notes.insert(0, note)
        return replace(self._result(wide, hint), flipped_spikes=flips.count)

    # -- comparisons --------------------------------------------------------------------------------------------------

    def _compared(self, model: nn.Module, net: Any, inputs: SequenceInputs, first: dict[str, Any]) -> _Outcome:
        """Compare the net over all steps, and over one step where BatchNorm is folded."""
        notes: list[str] = []

        def check(of: SequenceInputs, one_call: bool) -> Check:
            def runs(draws: SharedDraws | None) -> Runs:
                return Runs(model, net, of, first, self.gradients, one_call, draws)

            result = Check(runs(None), self.tolerance).run()
            if result.drew_random_numbers:
                result = _with_shared_draws(model, of.steps, runs, self.tolerance)
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
        """Compare copies of model and net in float64; if the copy of the net cannot run, capture the copy anew."""
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
                raise _not_in_float64(error) from error
            anew = ""
            refined = self._refine_constants(model, net, inputs)
            try:
                outcome = self._compared(model, net, inputs, first)
            except (VerificationError, InputError):
                raise
            except Exception as error:
                anew = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
                net = self._captured(model, inputs)
                outcome = self._compared(model, net, inputs, first)
            outcome.casts, outcome.captured_anew = casts, anew
            if outcome.failing is not None:
                outcome.failing.flips()  # runs the copies, which need the settings of this context
        if casts.lines:
            lines = ", ".join(list(casts.lines)[:3])
            outcome.notes.append(f"casts to float32 were casts to float64 on both sides ({lines})")
        if refined:
            outcome.notes.append(f"constants of the net were computed anew in float64: {refined}")
        if anew:
            outcome.notes.append(f"compared a net captured anew in float64; a copy of the net cannot run ({anew})")
        return outcome

    def _refine_constants(self, model: nn.Module, net: Any, inputs: SequenceInputs) -> int:
        """Compute in float64 the constants that capture computed in float32; return their number.

        The reference computes `torch.linspace(0, 1, 6)` in float64, and a copy of the net has the rounded values.
        """
        holder, constants = getattr(net, CONSTANTS, None), getattr(getattr(net, "program", None), "constants", None)
        if holder is None or not constants:
            return 0
        if not any(isinstance(c, Tensor) and c.is_floating_point() for c in constants.values()):
            return 0
        try:
            exact = self._captured(model, inputs).program.constants
        except SnnfxError:  # the constants stay rounded, and the comparison tells whether it matters
            return 0
        refined = 0
        for name, value in exact.items():
            own = holder._buffers.get(name)
            if _is_rounded(own, value):
                refined += not is_same(own, value)
                constants[name] = holder._buffers[name] = value.detach().clone()
        return refined

    def _captured(self, model: nn.Module, inputs: SequenceInputs) -> Any:
        options = self.net.options
        args, kwargs = inputs.of_step(0)
        example: Any = None
        if getattr(self.net.program, "input_ranks", None):
            example = kwargs if kwargs and not args else args
        return convert_without_budget(model, options, example, options.carry)

    # -- the report ---------------------------------------------------------------------------------------------------

    def _result(self, outcome: _Outcome, hint: str) -> VerificationReport:
        if outcome.failing is not None:
            raise outcome.failing.error(hint)
        whole = outcome.checks[0]
        return VerificationReport(
            T=self.inputs.steps,
            training=self.net.training,
            dtype=outcome.dtype,
            semantics=whole.semantics,
            comparisons=tuple(whole.comparisons),
            notes=(*_weaknesses(whole), *whole.notes, *outcome.notes),
        )


_MOST_PERMUTED = 3
"""Up to this number of places that draw alike, every order of their draws is tried."""


def _with_shared_draws(
    model: nn.Module, steps: int, runs: Callable[[SharedDraws], Runs], tolerance: Tolerance
) -> Check:
    """Compare with the same random numbers on both sides.

    Raises:
        VerificationError: SNNFX411, the draws of the net do not correspond to those of the model.
    """
    results: list[Check] = []
    errors: list[VerificationError] = []
    attempts: list[tuple[bool, tuple[int, ...]]] = [(True, ()), (False, ())]
    is_ambiguous = False
    for number, (finish_sites, order) in enumerate(attempts):
        draws = SharedDraws(model, steps, finish_sites, order)
        of_these = runs(draws)
        of_these.run_model()  # finds the places that draw
        if not number:
            orders = list(itertools.permutations(range(min(draws.most_alike, _MOST_PERMUTED))))[1:]
            attempts += [(finish, order) for order in orders for finish in (True, False)]
        if number and not finish_sites and not is_ambiguous:
            continue
        try:
            results.append(Check(of_these, tolerance).run())
        except VerificationError as error:
            errors.append(error)
            is_ambiguous = True
            continue
        is_ambiguous = draws.is_ambiguous
        if not results[-1].failed:
            break
    if not results:
        raise errors[0]
    if results[-1].failed and draws.most_alike > _MOST_PERMUTED:
        raise VerificationError(
            "SNNFX411",
            "net and model cannot draw the same random numbers",
            why=f"{draws.most_alike} places draw numbers of one shape, and the net may draw them in another order. "
            f"With the orders that verify tried, {results[0].failed[0].name} differs.",
            hint="Verify in evaluation mode, or use a Dropout layer of its own for each place.",
        )
    return next((check for check in results if not check.failed), results[0])


def _check_same_structure(model: nn.Module, net: Any) -> None:
    """Raise if the net refers to modules that the model does not have, so that no comparison is possible."""
    source = getattr(net, "source", None)
    if not isinstance(source, nn.Module) or source is model:
        return
    own, others = dict(model.named_modules()), dict(source.named_modules())
    lacking = [name for name in others if name not in own]
    added = [name for name in own if name not in others]
    if lacking or added:
        name = (lacking or added)[0]
        has, has_not = ("net", "model") if lacking else ("model", "net")
        raise InputError(
            "SNNFX413",
            "the net is not a net of this model",
            why=f"the {has} has a module `{name}` ({type((others if lacking else own)[name]).__name__}), the {has_not} "
            f"does not. The net was converted from a {type(source).__name__}; the model is a {type(model).__name__}.",
            hint="Pass the model that was converted: verify(net.source, net, x_seq).",
        )


def _is_rounded(value: Tensor | None, exact: Any) -> bool:
    """Whether a tensor is another one but for rounding to float32."""
    if value is None or not isinstance(exact, Tensor) or exact.dtype != torch.float64 or value.shape != exact.shape:
        return False
    difference, scale = (value.double() - exact).abs(), exact.abs()
    return (
        bool((difference[exact.isfinite()] <= 1e-6 * scale[exact.isfinite()].max()).all()) if value.numel() else False
    )


def _is_structural(comparison: Comparison) -> bool:
    """Whether a difference is one of shape, type or presence, which rounding does not cause."""
    return comparison.difference == float("inf") or not comparison.allowed


def _is_rounding(failing: Check, flips: Flips, wide: _Outcome) -> bool:
    """Whether rounding explains the differences of a net that agrees with its reference in float64.

    It does if the model compares numbers that are as close as rounding errors, or if its results in the narrower
    dtype are as far from those in float64 as the results of the net are.
    """
    near = NearThresholds(failing.tolerance)
    with near:
        failing.runs.run_model()
    if near.count:
        return True
    expected, exact = (
        failing.expected,
        next(c for c in wide.checks if c.runs.one_call == failing.runs.one_call).expected,
    )
    assert expected is not None and exact is not None
    for kind, narrow, exact_values in (
        ("output", expected.outputs, exact.outputs),
        ("gradient", expected.gradients, exact.gradients),
    ):
        errors = [
            float((value.double() - exact_value.double()).abs().max())
            for value, exact_value in ((value, exact_values.get(name)) for name, value in narrow.items())
            if isinstance(value, Tensor) and isinstance(exact_value, Tensor) and value.numel()
        ]
        differences = [c.difference for c in failing.failed if c.kind == kind]
        if differences and max(differences) > 30 * max(errors, default=0.0):
            return False
    return all(c.kind in ("output", "gradient") for c in failing.failed)


def _describe_rounding(failing: Check, flips: Flips) -> str:
    if flips.count and flips.first is not None:
        return f"{flips.count} of {flips.total} spikes flip, first in {flips.first.in_words}"
    worst = max(failing.failed, key=lambda c: c.relative)
    return f"{worst.name} differs by {worst.difference:.2g} (relative {worst.relative:.2g})"


def _not_in_float64(error: Exception) -> VerificationError:
    where = format_location(location_of_error(error))
    return VerificationError(
        "SNNFX412",
        f"the model cannot run in float64{f' ({where})' if where else ''}",
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
