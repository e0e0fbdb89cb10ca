"""Whether a call may be interrupted by a measurement.

Set the environment variable SNNFX_MEASURE to 0 to pin all choices to their fixed values: then every process runs the
same kernels. `torch.use_deterministic_algorithms(True)` does so too.
"""

from __future__ import annotations

import os

import torch

from snnfx.sandbox.torch_internals import (
    are_transforms_active,
    current_backward_pass,
    dispatch_mode_count,
    forward_mode_level,
    function_mode_stack,
    is_profiling,
    saved_tensors_hooks,
    tracing_state,
)

__all__ = ["may_measure_now", "pinned_by"]


def pinned_by() -> str:
    """The setting that pins all choices to their fixed values; "" if choices may be measured."""
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms(True)"
    return "SNNFX_MEASURE=0" if os.environ.get("SNNFX_MEASURE") == "0" else ""


def may_measure_now() -> bool:
    """Whether no mode, profiler, hook, transform or backward pass would see the calls of a measurement."""
    return not (
        torch.compiler.is_compiling()
        or dispatch_mode_count()
        or function_mode_stack()
        or is_profiling()
        or are_transforms_active()
        or forward_mode_level() >= 0
        or tracing_state() is not None
        or saved_tensors_hooks(False) is not None
        or current_backward_pass() != -1
        or torch.is_anomaly_enabled()
    )
