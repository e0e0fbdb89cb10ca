"""Compare the net of a model that runs over time itself with the model's own call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import InputError, VerificationError
from snnfx.inspect.verify.comparison import Comparison, Tolerance, compare, named_leaves
from snnfx.inspect.verify.verification_report import VerificationReport
from snnfx.sandbox.isolation import isolated, rng_state
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import reset_net

__all__ = ["verify_whole_call"]

_CODES = {"output": "SNNFX401", "gradient": "SNNFX403", "buffer": "SNNFX404"}


def verify_whole_call(
    model: nn.Module, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: Tolerance, gradients: bool
) -> VerificationReport:
    """Compare outputs, buffers and gradients of one call from the reset state.

    Args:
        model: the model that was converted with `takes="sequence"`.
        net: the net.
        args, kwargs: the arguments of the call.
        tolerance: largest allowed difference.
        gradients: whether to compare the gradients of a random linear functional of the outputs.

    Raises:
        InputError: SNNFX411, the call draws random numbers.
        VerificationError: SNNFX401, 403 or 404, a value differs.
    """
    actual, expected = (_run(module, model, net, args, kwargs, gradients) for module in (net, model))
    comparisons: list[Comparison] = []
    for kind, code in _CODES.items():
        for name, value in expected[kind].items():
            found = actual[kind].get(name)
            if kind == "gradient":
                found, value = (torch.zeros(()) if g is None else g for g in (found, value))
                found, value = torch.broadcast_tensors(found, value)
            comparison = compare(kind, name, found, value, tolerance)
            if comparison.failed:
                what = f"the {kind} `{name}` differs from the model's own call"
                raise VerificationError(code, what, why=f"{comparison.detail}.")
            comparisons.append(comparison)
    first = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    steps = first.shape[net.options.time_dim if net.options.step_mode == "m" else 0]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return VerificationReport(
        steps, net.training, ", ".join(sorted(dtypes)), "the model's own call", tuple(comparisons)
    )


def _run(
    module: nn.Module, model: nn.Module, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: bool
) -> dict[str, dict[str, Any]]:
    """Outputs, gradients and buffers of one call, by kind and name."""

    def fresh(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(gradients and x.is_floating_point())

    with isolated(model, net):
        before = rng_state()
        args, kwargs = pytree.tree_map_only(Tensor, fresh, (args, kwargs))
        reset_net(module)
        outputs = named_leaves(module(*args, **kwargs), "output")
        if rng_state() != before:
            raise InputError(
                "SNNFX411",
                "a call of the model draws random numbers",
                why="the net draws them in another order than the model, so their outputs differ.",
                hint="Verify in evaluation mode, or draw the random numbers outside the model and pass them as input.",
            )
        inputs = {n: x for n, x in named_leaves((args, kwargs), "input").items() if isinstance(x, Tensor)}
        wanted = {n: p for n, p in (*inputs.items(), *model.named_parameters()) if p.requires_grad}
        differentiable = [y for y in outputs.values() if isinstance(y, Tensor) and y.requires_grad]
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if gradients and differentiable and wanted:
            generator = torch.Generator().manual_seed(0)
            weights = [torch.rand(y.shape, generator=generator).to(y) for y in differentiable]
            total = torch.stack([(w * y).sum() for w, y in zip(weights, differentiable, strict=True)]).sum()
            found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        buffers = {n: b.clone() for n, b in model.named_buffers() if _is_statistic(n)}
        outputs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), outputs)
        return {"output": outputs, "gradient": dict(zip(wanted, found, strict=True)), "buffer": buffers}


def _is_statistic(name: str) -> bool:
    """Whether a buffer is a running statistic; states of neurons are not written by a net."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
