"""`snnfx.verify`: compare a net with its model run step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError
from snnfx.inspect.verify.comparison import Tolerance
from snnfx.inspect.verify.float64_copies import copies_in_float64, to_float64
from snnfx.inspect.verify.matching_modules import check_has_values, check_matching_modules
from snnfx.inspect.verify.runs import undisturbed
from snnfx.inspect.verify.sequence_inputs import SequenceInputs
from snnfx.inspect.verify.verification import Verification
from snnfx.inspect.verify.verification_report import VerificationReport
from snnfx.inspect.verify.whole_call import verify_whole_call
from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.torch_internals import pytree

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
    if it vanishes there and if rounding explains it. A difference within the default tolerance that is larger than
    usual rounding errors fails if it remains in float64. Everything is restored afterwards: state, buffers,
    parameters, gradients, flags and random number generators.

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
            steps use parameters, buffers or states of modules that only the net or only the model has. SNNFX417: a
            tensor is on the meta device.

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
    check_has_values(model, (x_seq, kwargs))
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
        check_matching_modules(model, net, inputs, first)
        return Verification(model, net, inputs, Tolerance(atol, rtol), gradients, first).report(double)
