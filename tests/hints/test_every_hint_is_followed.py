"""Each hint and each warning of the source has a test that follows it."""

from __future__ import annotations

import pytest

from snnfx.errors import CODES
from support.hints import HintSite, followed_hints, hint_sites


def test_each_hint_of_the_source_is_followed_in_a_test() -> None:
    followed = followed_hints()
    uncovered = [site for site in hint_sites() if not any(hint.covers(site) for hint in followed)]
    assert not uncovered, f"{len(uncovered)} hints without a test:\n" + "\n".join(map(str, uncovered))


def test_each_followed_hint_is_a_hint_of_the_source() -> None:
    sites = hint_sites()
    stale = [hint for hint in followed_hints() if not any(hint.covers(site) for site in sites)]
    assert not stale, "\n".join(map(str, stale))


def test_each_followed_hint_has_a_registered_code() -> None:
    assert {hint.code for hint in followed_hints()} <= set(CODES)


def test_the_finder_reads_names_conditions_formats_and_parameters() -> None:
    texts = {(site.function, site.text) for site in hint_sites()}
    assert ("surrogate.py:checked_number", "Pass a float, e.g. value.item(); it cannot be learned.") in texts
    assert (
        "capture/step_changes.py:StepChanges._refuse_holder",
        "Change the tensor in the forward of this module.",
    ) in texts
    assert not any(function == "capture/step_changes.py:_refusal" for function, _ in texts)
    assert ("analysis/batch/shape_rules.py:squeeze", "Name the dimension, e.g. x.squeeze(-1).") in texts


@pytest.mark.parametrize("text", ["", "another text"])
def test_a_text_of_another_function_covers_no_site(text: str) -> None:
    from support.hints import FollowedHint

    site = HintSite("a.py:f", "Pass a number.", 1)
    assert not FollowedHint("SNNFX309", "a.py:g", text, "").covers(site)
    assert FollowedHint("SNNFX309", "a.py:f", "a number", "").covers(site)
