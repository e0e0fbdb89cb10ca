"""The short descriptions of a net: its `repr`, and a table for notebooks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from torch import nn
from torch.fx import Node

from snnfx.ir.nodes import is_size, takes_from_tuple
from snnfx.ir.printing import describe_node
from snnfx.ir.program import Region, StepProgram
from snnfx.ops.step_functions import expect_size

__all__ = ["summary_as_html", "summary_as_text"]

_MOST_REGIONS = 12
_MOST_OPERATIONS = 4
_KINDS = ("once", "fold", "map", "loop")


def summary_as_text(model: nn.Module, program: StepProgram, step_mode: str) -> str:
    """One line about the net, and one for each region.

    Args:
        model: the single-step model.
        program: the program of the current mode.
        step_mode: "m" or "s".
    """
    shown, left = _shown(program.regions if step_mode == "m" else [])
    widest = max((len(region.name) for region in shown), default=0)
    lines = [f"  {region.name:{widest}}  {_contents(program, region)}" for region in shown]
    lines += [f"  ... {left} more regions"] if left else []
    return "\n".join([f"<snnfx net of {_headline(model, program, step_mode)}>", *lines])


def summary_as_html(model: nn.Module, program: StepProgram, step_mode: str) -> str:
    """The same as an HTML fragment."""
    shown, left = _shown(program.regions if step_mode == "m" else [])
    rows = "".join(
        f"<tr><td style='text-align:left'><code>{escape(region.name)}</code></td>"
        f"<td style='text-align:left'>{escape(_contents(program, region))}</td>"
        f"<td style='text-align:left'>{escape(', '.join(region.slots))}</td></tr>"
        for region in shown
    )
    rows += f"<tr><td colspan='3' style='text-align:left'>{left} more regions</td></tr>" if left else ""
    head = "<tr><th>region</th><th style='text-align:left'>operations</th><th style='text-align:left'>state</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else ""
    return f"<div><p>snnfx net of {escape(_headline(model, program, step_mode))}</p>{table}</div>"


def _headline(model: nn.Module, program: StepProgram, step_mode: str) -> str:
    kinds = Counter(region.kind for region in program.regions)
    parts = ", ".join(f"{kinds[kind]} {kind}" for kind in _KINDS if kinds[kind])
    count = len(program.regions)
    if count and step_mode == "m":
        what = f"T time steps in {count} region{'s' * (count != 1)} ({parts})"
    else:
        what = "one time step" if step_mode == "s" else "T time steps"
    parameters = sum(p.numel() for p in model.parameters())
    mode = "training" if model.training else "evaluation"
    return f"{type(model).__name__}: {what}, {parameters:,} parameters, {mode} mode"


def _shown(regions: Sequence[Region]) -> tuple[Sequence[Region], int]:
    """The regions to list, and the number of the others."""
    if len(regions) <= _MOST_REGIONS:
        return regions, 0
    return regions[: _MOST_REGIONS - 1], len(regions) - _MOST_REGIONS + 1


def _contents(program: StepProgram, region: Region) -> str:
    names = list(dict.fromkeys(_described(program, node) for node in region.nodes if _computes(node)))
    more = [f"{len(names) - _MOST_OPERATIONS} more"] if len(names) > _MOST_OPERATIONS else []
    return ", ".join([*names[:_MOST_OPERATIONS], *more])


def _computes(node: Node) -> bool:
    is_call = node.op.startswith("call") and node.target is not expect_size
    return is_call and not takes_from_tuple(node) and not is_size(node)


def _described(program: StepProgram, node: Node) -> str:
    module = program.module_of(node)
    return describe_node(node) if module is None else f"{describe_node(node)} ({type(module).__name__})"
