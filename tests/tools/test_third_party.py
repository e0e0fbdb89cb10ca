"""`tools/bench/third_party.py` converts models of other libraries and prints one verified row per model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench" / "third_party.py"


@pytest.mark.parametrize(
    ("library", "only", "counts"),
    [("snntorch", "RLeaky", "4 | 2 | 2 | 0 | 0 | yes"), ("norse", "LSNN", "4 | 2 | 2 | 0 | 0 | yes")],
)
def test_a_line_tells_nodes_regions_and_that_it_is_verified(library: str, only: str, counts: str) -> None:
    pytest.importorskip(library)
    command = [sys.executable, str(TOOL), "--library", library, "--only", only, "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"| {counts} |" in done.stdout
    assert "1 of 1 verified" in done.stdout
