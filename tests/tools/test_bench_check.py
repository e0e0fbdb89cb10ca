"""`tools/bench --check` compares the ratios of a run with earlier figures."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

ROW: dict[str, Any] = {
    "malloc": "default",
    "case": {"network": "CSNN", "T": 4, "N": 32},
    "inference": {"stepped": 40.0, "snnfx": 10.0, "SpikingJelly": 60.0, "floor": 8.0},
    "training": {"stepped": 100.0, "snnfx": 50.0, "SpikingJelly": 120.0, "floor": 45.0},
}


@pytest.fixture(scope="module")
def comparison() -> Any:
    sys.path[:0] = [str(TOOLS / "bench")]
    try:
        return __import__("comparison")
    finally:
        del sys.path[:1]


def changed(**factors: float) -> dict[str, Any]:
    """The row with the inference times of some sides multiplied."""
    row = copy.deepcopy(ROW)
    for side, factor in factors.items():
        row["inference"][side] *= factor
    return row


def test_a_slower_machine_is_no_slower_row(comparison: Any) -> None:
    twice = changed(stepped=2, snnfx=2, SpikingJelly=2, floor=2)
    text, slower = comparison.report(comparison.changes([ROW], [twice]), 3)
    assert not slower and "0 of 2 rows" in text


def test_one_disturbed_reference_decides_nothing(comparison: Any) -> None:
    _, slower = comparison.report(comparison.changes([ROW], [changed(floor=0.5)]), 3)
    assert not slower


def test_a_slower_row_is_listed_with_its_ratios(comparison: Any) -> None:
    text, slower = comparison.report(comparison.changes([ROW], [changed(snnfx=1.1)]), 3)
    assert slower and "1 of 2 rows" in text
    assert (
        "+10.0 %" in text and "network=CSNN, T=4, N=32" in text and "inference" in text and "floor 1.25 -> 1.38" in text
    )
    assert not comparison.report(comparison.changes([ROW], [changed(snnfx=1.1)]), 11)[1]


def test_a_row_without_a_committed_figure_is_counted(comparison: Any) -> None:
    row = changed() | {"case": {"network": "CSNN", "T": 5, "N": 32}}
    text, slower = comparison.report(comparison.changes([ROW], [row]), 3)
    assert not slower and "2 rows have no committed figure" in text


def test_rows_of_other_malloc_settings_are_not_compared(comparison: Any) -> None:
    row = changed(snnfx=2) | {"malloc": "tuned"}
    assert all(change.change is None for change in comparison.changes([ROW], [row]))


@pytest.mark.parametrize("suite", ["layers", "networks"])
def test_the_committed_figures_equal_themselves(comparison: Any, suite: str) -> None:
    _, cases = comparison.committed(TOOLS / "results", suite)
    found = comparison.changes(cases, cases)
    assert len(found) == 2 * len(cases)
    assert all(change.change == 1 and len(change.ratios) >= 2 for change in found)


def test_a_suite_without_figures_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "bench"), "layers", "--check", "--figures", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "no figures of the suite layers" in done.stderr


@pytest.mark.slow
def test_a_run_is_compared_and_the_status_tells_a_slower_row(tmp_path: Path) -> None:
    for library in ("spikingjelly", "snntorch", "norse"):
        pytest.importorskip(library)
    case = {"neuron": "LIF", "T": 16, "elements": 262144, "compiled": False}
    impossible = {"snnfx": 1e-6, "SpikingJelly": 1.0, "one pass": 1.0, "three passes": 1.0}
    figures = {"machine": {"date": "2000-01-01"}, "cases": [{"malloc": "default", "case": case, "forward": impossible}]}
    (tmp_path / "layers_cpu.json").write_text(json.dumps(figures))
    options = ["--quick", "--seconds", "0.01", "--malloc", "default", "--check", "3", "--figures", str(tmp_path)]
    command = [sys.executable, str(TOOLS / "bench"), "layers", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "1 of 1 rows" in done.stdout and "another machine" in done.stdout
    assert "3 rows have no committed figure" in done.stdout
