"""Why a net cannot be exported: the region, the user's line, and the reason."""

from __future__ import annotations

import re

from torch.fx import Node

from snnfx.errors import ExportError, InputError, SnnfxError
from snnfx.ir.printing import describe_node, location_of
from snnfx.ir.program import StepProgram

__all__ = ["ExportRefused", "changes_shape", "first_line", "fixed_batch_size", "refuse_opaque_parts", "refused_region"]


_DYNAMIC_SIZE = re.compile(r"\bs\d+\b")
"""The name of a dynamic size in errors of torch about sizes that do not match."""


class ExportRefused(ExportError):
    """A part of the net cannot be exported."""

    def in_region(self, region: str) -> ExportRefused:
        """The same refusal, with the name of the region."""
        if self.code != "SNNFX805" or "region `" in self.what:
            return self
        what = f"region `{region}` cannot be exported, because of {self.what.removesuffix(' cannot be exported')}"
        return ExportRefused(self.code, what, where=self.where, why=self.why, hint=self.hint)


def refuse_opaque_parts(program: StepProgram) -> None:
    """Raise ExportRefused (SNNFX804) if a part of the model was not traced."""
    for name, reason in program.opaque.items():
        regions = [r for r in program.regions if any(_calls(program, node, name) for node in r.nodes)]
        where = next((location_of(n) for r in regions for n in r.nodes if _calls(program, n, name)), "")
        raise ExportRefused(
            "SNNFX804",
            f"{f'`{name}`' if name else 'the model'}{f' in region `{regions[0].name}`' if regions else ''} cannot be "
            "exported",
            where=where,
            why=f"it runs as Python code, because it could not be traced: {reason}",
            hint="Rewrite it with operations on tensors; `snnfx.explain(model)` shows when it can be traced.",
        )


def _calls(program: StepProgram, node: Node, name: str) -> bool:
    return program.module_of(node) is (program.resolve(name) if name else program.source)


def refused_region(region: str, node: Node, error: Exception) -> ExportRefused:
    """The refusal of a region because a node of it failed in the trace."""
    if isinstance(error, InputError) and error.code == "SNNFX312":
        return ExportRefused(
            "SNNFX806",
            "the batch size cannot be dynamic",
            where=error.where or location_of(node),
            why="the Python code of the step uses a size as a number, so the captured step is valid for one size only.",
            hint='Export for this batch size: dynamic=("T",).',
        )
    place = f"region `{region}`" if region else describe_node(node)
    if isinstance(error, RuntimeError) and _DYNAMIC_SIZE.search(str(error)):
        return ExportRefused(
            "SNNFX806",
            f"the batch size cannot be dynamic in {place}",
            where=location_of(node),
            why=f"an operand has a fixed size: {first_line(error)}",
            hint='Export for this batch size: dynamic=("T",).',
        )
    return ExportRefused(
        "SNNFX805",
        f"{place} cannot be exported",
        where=location_of(node),
        why=f"torch cannot trace it: {first_line(error)}",
        hint="Replace this operation; one step may compute with tensors, but neither read their values in Python nor "
        "depend on them.",
    )


def fixed_batch_size(error: SnnfxError) -> ExportRefused:
    """The refusal of another batch size, for which the step fails."""
    return ExportRefused(
        "SNNFX806",
        "the batch size cannot be dynamic",
        where=error.where,
        why=f"the step fails for another one: {first_line(error.__cause__ or error)}",
        hint='Export for this batch size: dynamic=("T",).',
    )


def changes_shape(error: ExportRefused) -> bool:
    """Whether the cause is a state whose initial value has another shape, such as an empty tensor of snnTorch."""
    return isinstance(error.__cause__, InputError) and error.__cause__.code == "SNNFX313"


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, as a sentence."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(" .") + "."
