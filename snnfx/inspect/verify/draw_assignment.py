"""Find how the draws of a net correspond to the places of its model that draw random numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from snnfx.errors import VerificationError
from snnfx.inspect.verify.check import Check
from snnfx.inspect.verify.comparison import Tolerance
from snnfx.inspect.verify.runs import Runs
from snnfx.inspect.verify.shared_draws import SharedDraws

__all__ = ["DrawAssignment", "check_with_shared_draws"]

_MOST_PERMUTED = 3
"""Up to this number of places that draw alike, every order of their draws is tried."""


@dataclass(frozen=True)
class DrawAssignment:
    """How the draws of a net are assigned to places that draw numbers of the same distribution and shape.

    Args:
        finish_sites: True: all steps of one place first; False: all places of one step first.
        order: the order in which the net takes the draws of such places, the same at every step.
    """

    finish_sites: bool = True
    order: tuple[int, ...] = ()


def check_with_shared_draws(
    model: nn.Module,
    steps: int,
    runs: Callable[[SharedDraws], Runs],
    tolerance: Tolerance,
    known: DrawAssignment | None = None,
) -> tuple[Check, DrawAssignment]:
    """Compare with the same random numbers on both sides.

    The numbers of places that are alike are interchangeable, and a net may compute the calls of a step in another
    order. The assignments are therefore tried in turn. One assignment is valid for everything that is compared:
    outputs, states, contents, gradients, all steps, and the later checks of the same net. A net that uses the numbers
    of one place at another place in some steps or in one pass only matches none of them.

    Args:
        model: the model.
        steps: the number of time steps.
        runs: makes the runs with these draws.
        tolerance: largest allowed difference.
        known: the assignment of an earlier check of the net; no other one is tried.

    Returns:
        The first check without a difference, or the first check, and its assignment.

    Raises:
        VerificationError: SNNFX411, the draws of the net do not correspond to those of the model.
    """
    results: list[tuple[Check, DrawAssignment]] = []
    errors: list[VerificationError] = []
    attempts = [DrawAssignment(True), DrawAssignment(False)] if known is None else [known]
    is_ambiguous, most_alike = False, 0
    for number, assignment in enumerate(attempts):
        draws = SharedDraws(model, steps, assignment.finish_sites, assignment.order)
        of_these = runs(draws)
        of_these.run_model()  # finds the places that draw
        if not number and known is None:
            most_alike = draws.most_alike
            orders = list(itertools.permutations(range(min(most_alike, _MOST_PERMUTED))))[1:]
            attempts += [DrawAssignment(finish, order) for order in orders for finish in (True, False)]
        if number and not assignment.finish_sites and not is_ambiguous:
            continue
        try:
            results.append((Check(of_these, tolerance).run(), assignment))
        except VerificationError as error:
            errors.append(error)
            is_ambiguous = True
            continue
        is_ambiguous = draws.is_ambiguous
        if not results[-1][0].failed:
            return results[-1]
    if not results:
        raise errors[0]
    if most_alike > _MOST_PERMUTED:
        raise VerificationError(
            "SNNFX411",
            "net and model cannot draw the same random numbers",
            why=f"{most_alike} places draw numbers of one shape, and the net may draw them in another order. "
            f"With the orders that verify tried, {results[0][0].failed[0].name} differs.",
            hint="Verify in evaluation mode, or use a Dropout layer of its own for each place.",
        )
    return results[0]
