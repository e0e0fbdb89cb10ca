"""`tools/gallery` converts models in the style of published code and compares them with the author's call."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

for library in ("spikingjelly", "snntorch", "norse"):
    pytest.importorskip(library)


def _tool(name: str) -> Any:
    sys.path[:0] = [str(TOOLS / "gallery"), str(TOOLS / "bench")]
    try:
        return __import__(name)
    finally:
        del sys.path[:2]


@pytest.fixture(scope="module")
def entries() -> dict[str, Any]:
    listed = list(_tool("gallery").entries())
    assert len({entry.name for entry in listed}) == len(listed)
    return {entry.name: entry for entry in listed}


def test_there_are_thirty_models_of_which_ten_run_over_time_themselves(entries: dict[str, Any]) -> None:
    assert len(entries) >= 30
    assert sum(entry.takes == "sequence" for entry in entries.values()) >= 10


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("einsum, explicit membranes", 4), ("two compartments, last step", 2), ("adaptive recurrent, leaky readout", 2)],
)
def test_a_model_is_verified_and_its_loops_are_kernels(entries: dict[str, Any], name: str, kernels: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = _tool("gallery_measuring").measure(entries[name], seconds=0)
    assert (row.verified, row.kernels) == ("yes", kernels)


def test_a_net_that_differs_from_the_call_of_the_author_is_not_verified(entries: dict[str, Any]) -> None:
    folded = dataclasses.replace(entries["CSNN, stepped"], options={"batch_norm": "fold"})
    with pytest.raises(AssertionError, match=r"differs by .* training mode"):
        _tool("gallery_measuring").verify(folded)


def test_the_committed_results_are_those_of_the_models(entries: dict[str, Any]) -> None:
    results = json.loads((TOOLS / "results" / "gallery.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in results["models"]] == list(entries)
    assert {"date", "cpu", "torch"} <= results["machine"].keys()


def test_the_readme_shows_the_committed_results() -> None:
    rows = json.loads((TOOLS / "results" / "gallery.json").read_text(encoding="utf-8"))["models"]
    assert _tool("gallery_table").compact_table(rows) in (TOOLS.parent / "README.md").read_text(encoding="utf-8")
