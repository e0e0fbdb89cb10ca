"""Fuzz `snnfx.verify`: nets of random models must pass, and nets that are broken on purpose must fail."""

from __future__ import annotations

import random
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fuzz_breaks import BREAKS, Break, BrokenNet, effect_of, named
from fuzz_checks import (
    Inapplicable,
    Mismatch,
    Refused,
    Setting,
    check_model,
    clone_of,
    gradients,
    stacked,
    step_plain,
)
from fuzz_models import Case, build, namespace_of
from torch import Tensor, nn

import snnfx

__all__ = ["Verdict", "verdicts"]

OBSERVABLE, UNOBSERVABLE = 20.0, 0.05
"""Effects, as multiples of the allowed difference, from which on `verify` must fail, and up to which it must not."""

CHUNK_INTERVAL = 5
"""One in this many models runs with planned chunks in inference."""

_REFUSALS = {"SNNFX405", "SNNFX411", "SNNFX412"}


@dataclass(frozen=True)
class Verdict:
    """The outcome of one call of `verify`: see `Outcome` in fuzz.py."""

    kind: str
    check: str
    detail: str = ""
    text: str = ""


def in_float32(case: Case) -> Case:
    """The case with float32 constants."""
    narrow = case.copy()
    for body in narrow.bodies:
        for lines in (body.init, body.statements):
            lines[:] = [line.replace(".double()", ".float()").replace("float64", "float32") for line in lines]
        body.result = body.result.replace(".double()", ".float()").replace("float64", "float32")
    return narrow


def model_of(case: Case, dtype: str) -> nn.Module:
    if dtype == "float64":
        return build(case, namespace_of(case, "verified"))
    narrow = in_float32(case)
    return build(narrow, namespace_of(narrow, "verified")).float()


def sequences_of(s: Setting, dtype: str) -> list[Tensor]:
    narrow = [x.float() for x in s.sequences()]
    return [x.double() for x in narrow] if dtype == "float64" else narrow


def verdicts(case: Case, s: Setting, breaks: int = 2) -> Iterator[Verdict]:
    """Verify the nets of a case in both dtypes and all modes, and as many broken nets in each dtype."""
    r = random.Random(case.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check_applicable(case, s)
        except Inapplicable as reason:
            yield Verdict("skipped", "verify", "inapplicable", str(reason))
            return
        for dtype in ("float32", "float64"):
            yield from _of_right_nets(case, s, dtype, r)
            kinds = r.sample(list(BREAKS), len(BREAKS))
            tried = 0
            for kind in kinds:
                found = _of_broken_net(case, s, dtype, kind, r)
                tried += found.kind != "skipped"
                yield found
                if tried == breaks:
                    break


def _check_applicable(case: Case, s: Setting) -> None:
    for training in (True, False):
        plain = clone_of(build(case, namespace_of(case, "verified")), training)
        given = [x.requires_grad_() for x in s.sequences()]
        outputs = stacked(step_plain(plain, s, given))
        try:
            gradients(plain, outputs, given)
        except RuntimeError as error:
            raise Inapplicable(str(error)) from error


def _net_of(model: nn.Module, s: Setting, dtype: str, batch_norm: str) -> Any:
    steps = [x if i else x[0] for x, i in zip(sequences_of(s, dtype), s.invariant, strict=True)]
    options: dict[str, Any] = {"batch_norm": batch_norm, "lower": "auto" if s.lower else None}
    if s.seed % CHUNK_INTERVAL:
        options["chunk"] = None  # to plan chunks takes as long as to verify
    if s.examples:
        options["example_inputs"] = tuple(steps)
    if any(s.invariant):
        options["time_dim"] = tuple(None if i else 0 for i in s.invariant)
    try:
        return snnfx.convert(model, **options)
    except snnfx.errors.CaptureError as error:
        raise Refused(error.code, str(error)) from error


def _of_right_nets(case: Case, s: Setting, dtype: str, r: random.Random) -> Iterator[Verdict]:
    made: dict[str, tuple[nn.Module, Any]] = {}
    for batch_norm, training in (("fold", False), ("fold", True), ("per_step", True)):
        mode = f"{batch_norm} {'train' if training else 'eval'}"
        for double in (False, True) if dtype == "float32" and r.random() < 0.4 else (False,):
            check = f"verify right {dtype}{' double' if double else ''} {mode}"
            try:
                if batch_norm not in made:
                    model = model_of(case, dtype)
                    made[batch_norm] = model, _net_of(model, s, dtype, batch_norm)
                model, net = made[batch_norm]
                net.train(training)
                torch.manual_seed(case.seed)
                report = snnfx.verify(model, net, *sequences_of(s, dtype), double=double, **s.extra)
            except Refused as refusal:
                yield Verdict("refused", check, refusal.code, str(refusal))
            except snnfx.errors.CaptureError as refusal:
                yield Verdict("refused", check, f"{refusal.code} at the call", str(refusal))
            except snnfx.errors.VerificationError as error:
                if error.code in _REFUSALS:
                    yield Verdict("refused", check, error.code, str(error))
                elif _net_is_wrong(case, s, training, batch_norm):
                    yield Verdict("skipped", check, "wrong net", str(error))
                else:
                    yield Verdict("mismatch", check, f"false alarm {error.code}", str(error))
            except Exception as error:
                if isinstance(error, snnfx.errors.InputError) and "changes its shape" in str(error):
                    yield Verdict("refused", check, f"{error.code} at the call", str(error))
                else:
                    yield Verdict("crash", check, type(error).__name__, traceback.format_exc())
            else:
                flips = " with flips" if report.flipped_spikes else ""
                rounded = " by float64" if "rounding:" in str(report) else ""
                weak = " weak" if str(report).startswith("warning") else ""
                yield Verdict("ok", check, f"passed{rounded}{flips}{weak}")


def _net_is_wrong(case: Case, s: Setting, training: bool, batch_norm: str) -> bool:
    """Whether the comparison of `fuzz_checks` finds a difference too; it has no reference for folded statistics."""
    if training and batch_norm == "fold":
        return False
    try:
        check_model(build(case, namespace_of(case, "verified")), s, "train" if training else "eval")
    except Mismatch:
        return True
    except Exception:
        return False
    return False


def _of_broken_net(case: Case, s: Setting, dtype: str, kind: str, r: random.Random) -> Verdict:
    training = r.random() < 0.6 and not s.random
    check = f"verify broken {kind} {dtype}"
    try:
        exact = model_of(case, "float64").train(training)
        fault: Break = BREAKS[kind](case, exact, s, r)
        try:
            wrong_exact, wrong = model_of(fault.case, "float64"), model_of(fault.case, dtype)
        except Exception as error:  # changed source may raise anything
            raise Inapplicable(str(error)) from error
        fault.change(wrong_exact)
        fault.change(wrong)
        net = _net_of(wrong, s, dtype, "per_step").train(training)
        slots = [slot.name for slot in net.program.slots]
        fault = named(fault, net, r)
        effect = effect_of(fault, exact, wrong_exact, s, training, slots)
    except Refused as refusal:
        return Verdict("skipped", check, refusal.code, str(refusal))
    except Inapplicable as reason:
        return Verdict("skipped", check, "inapplicable", str(reason))
    except Exception:
        return Verdict("skipped", check, "error", traceback.format_exc())
    if fault.dropped or fault.lost or fault.stale:
        net = BrokenNet(net, fault, s).train(training)
    ratio = effect.ratios[dtype]
    about = f"{fault.description}; `{effect.name}` differs by {ratio:.3g} times the allowed difference"
    about += f" ({'train' if training else 'eval'})"
    try:
        report = snnfx.verify(model_of(case, dtype), net, *sequences_of(s, dtype), **s.extra)
    except snnfx.errors.VerificationError as error:
        if error.code in _REFUSALS:
            return Verdict("refused", check, error.code, f"{about}: {error}")
        return Verdict("ok", check, "caught" if ratio > OBSERVABLE else "caught, little effect", f"{about}: {error}")
    except (snnfx.errors.CaptureError, snnfx.errors.InputError) as error:
        if error.code == "SNNFX413":
            return Verdict("ok", check, "caught", f"{about}: {error}")
        return Verdict("skipped", check, f"{error.code} at the call", str(error))
    except Exception as error:
        return Verdict("crash", check, type(error).__name__, f"{about}\n{traceback.format_exc()}")
    if ratio > OBSERVABLE:
        return Verdict("mismatch", check, "missed", f"{about}\n{report}")
    weak = ", weak" if str(report).startswith("warning") else ""
    return Verdict("ok", check, f"passed, no effect{weak}", f"{about}\n{report}")
