"""Decide by stepping whether the steps of a model depend on a value that its net does not write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from snnfx.inspect.verify.comparison import Tolerance, compare, named_leaves
from snnfx.inspect.verify.observed_contents import is_same, observe
from snnfx.inspect.verify.runs import Runs
from snnfx.sandbox.structural_copy import StructuralCopy

__all__ = ["is_continued_without", "is_state"]


def is_state(runs: Runs, owner: nn.Module, attribute: str) -> bool:
    """Whether the steps depend on an attribute: from its final value, they give something else, or they fail.

    A tensor or a container that grows at every step is a log; it is a state only if other values depend on it.
    """
    if attribute in owner._parameters:
        return True
    place: Any = owner._buffers if attribute in owner._buffers else owner.__dict__
    with runs.isolated(), torch.no_grad():
        runs.reset_model()
        runs.step_model(runs.inputs.fresh())
        final = StructuralCopy(tensor=lambda x: x.detach().clone()).of(place.get(attribute))
    results = []
    for starts_with_final in (False, True):
        with runs.isolated(), torch.no_grad():
            runs.reset_model()
            if starts_with_final:
                place[attribute] = final
            try:
                steps = runs.step_model(runs.inputs.fresh())
            except Exception:
                if not starts_with_final:
                    raise
                return True  # a flag says that another state exists, which it does not
            contents = {name: entry.value for name, entry in observe(runs.model).items()}
            results.append(named_leaves(steps, "output") | contents)
    a, b = results
    own = [n for n, e in observe(runs.model).items() if e.owner is owner and e.attribute == attribute]
    prefixes = tuple(f"{n.removesuffix('.#')}." for n in own)
    if isinstance(final, Tensor):
        grown = {n for n in own if isinstance(b.get(n), Tensor) and b[n].shape != final.shape}
        a, b = ({n: v for n, v in values.items() if n not in grown} for values in (a, b))
    elif any(n.endswith(".#") and n in a and n in b and b[n] > a[n] for n in own):
        a, b = ({n: v for n, v in values.items() if not f"{n}.".startswith(prefixes)} for values in (a, b))
    return a.keys() != b.keys() or not all(is_same(a[name], b[name]) for name in a)


def is_continued_without(runs: Runs, name: str, tolerance: Tolerance) -> bool:
    """Whether a net that does not write an attribute, continued from its final state, still matches the model.

    This is so for a flag such as `self.is_first_step`: a net that is given a state does not run the first step. The
    attribute must not change any more when the model continues.

    Args:
        runs: the runs of net and model.
        name: the name of the attribute among the observed contents.
        tolerance: largest allowed difference.
    """
    with runs.isolated(), torch.no_grad():
        runs.reset_model()
        runs.step_model(runs.inputs.fresh())
        after = observe(runs.model)
        steps = runs.step_model(runs.inputs.fresh())
        still = observe(runs.model)
    if name not in after or name not in still or not is_same(after[name].value, still[name].value):
        return False
    actual = runs.continued_net()
    expected = runs.outputs_of_model(steps, actual.keys())
    return actual.keys() == expected.keys() and not any(
        compare("output", key, actual[key], expected[key], tolerance).failed for key in actual
    )
