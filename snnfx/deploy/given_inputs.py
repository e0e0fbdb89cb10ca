"""Check the inputs of an export by their first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from snnfx.deploy.exported_module import run_step
from snnfx.deploy.refusals import ExportRefused, first_line
from snnfx.errors import InputError
from snnfx.ir.facts import VALUE
from snnfx.ir.program import StepProgram
from snnfx.runtime.net import Net

__all__ = ["run_first_step", "takes_one_sample"]


def run_first_step(step_net: Net, steps: Sequence[Tensor], state: Mapping[str, Any]) -> dict[str, Any]:
    """The state after one step.

    Args:
        step_net: a net in step mode "s".
        steps: the inputs of one step.
        state: the slots that the caller passes.

    Raises:
        InputError: SNNFX327, the model fails for these inputs.
    """
    given = dict(state) or None
    with torch.no_grad():
        try:
            # Node by node, because a graph that fails as a whole prints its code.
            run_step(step_net._executable, list(steps), given)
        except ExportRefused as refusal:
            raise _do_not_fit(step_net.program, steps, refusal) from refusal.__cause__
        return step_net.run_bound(list(steps), {}, given, None)[1]


def takes_one_sample(program: StepProgram) -> str:
    """The reason why dim 0 of the inputs is not the batch: a call takes them as one sample; "" without such a call.

    Args:
        program: a planned program whose step fails for another size of dim 0.
    """
    reasons = [r.reason for region in program.regions for _, r in region.refusals() if r.code == "SNNFX102"]
    return reasons[0] if reasons else ""


def _do_not_fit(program: StepProgram, steps: Sequence[Tensor], refusal: ExportRefused) -> InputError:
    named = list(zip(program.input_nodes(), steps, strict=True))
    shapes = ", ".join(f"`{node.name}` of shape {list(x.shape)}" for node, x in named)
    expected = [text for node, x in named for text in _expectations(program, node, x)]
    return InputError(
        "SNNFX327",
        f"the model fails for one step with {shapes}",
        where=refusal.where,
        why="; ".join([*expected, first_line(refusal.__cause__ or refusal)]),
        hint="Pass inputs of the sizes for which the model is written.",
    )


def _expectations(program: StepProgram, node: Node, x: Tensor) -> list[str]:
    """The sizes of an input that its first layers and `example_inputs` have, where they differ."""
    found = []
    for user in node.users:
        layer = program.resolve(str(user.target)) if user.op == "call_module" else None
        sizes = _sizes_of_layer(layer)
        if sizes is not None and x.dim() >= -sizes[0] and x.shape[sizes[0]] != sizes[1]:
            dim, size, unit = sizes
            found.append(f"`{user.target}` expects {size} {unit}, and the step has {x.shape[dim]}")
    example = VALUE.of(node)
    if isinstance(example, Tensor) and example.shape[1:] != x.shape[1:]:
        found.append(f"one step of `{node.name}` in example_inputs had the shape {list(example.shape)}")
    return found


def _sizes_of_layer(layer: object) -> tuple[int, int, str] | None:
    """The dimension that a layer fixes, its size, and the name of its elements."""
    if isinstance(layer, nn.Linear):
        return -1, layer.in_features, "features"
    for rank, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
        if isinstance(layer, kind):
            return -1 - rank, layer.in_channels, "channels"
    return None
