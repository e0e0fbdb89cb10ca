"""Refuse what needs one step of a model that only runs on whole sequences."""

from __future__ import annotations

from typing import NoReturn

from snnfx.errors import InputError
from snnfx.ir.program import StepProgram

__all__ = ["refuse_whole_sequences", "refuse_without_step"]


def refuse_whole_sequences(program: StepProgram, what: str) -> None:
    """Refuse `what` if the program runs on whole sequences only."""
    if program.whole_sequences is not None:
        refuse_without_step(what, *program.whole_sequences)


def refuse_without_step(what: str, why: str, where: str) -> NoReturn:
    """Refuse `what`, which needs one step of the model.

    Args:
        what: the request.
        why: why the model has no step form, as a clause.
        where: the user's file and line.
    """
    raise InputError(
        "SNNFX235",
        f"{what} needs one step of the model, which runs on whole sequences only",
        where=where,
        why=f"{why}.",
        hint="Call the net on whole sequences, net(x_seq), or move this operation to a model of its own.",
    )
