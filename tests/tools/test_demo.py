"""`bash tools/demo.sh --quick` runs to the end and writes the files that it lists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

# All tests share one process, because the fixture runs the whole demo.
pytestmark = pytest.mark.xdist_group("demo")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--quick", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=300), out


def test_quick_demo_goes_through_every_section(quick_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = quick_run
    assert done.returncode == 0, done.stdout + done.stderr
    sections = ["Data", "Model", "Convert", "Verify", "Train", "Time", "Profile", "Export", "Open these three files"]
    assert re.findall(rf"^({'|'.join(sections)})  ", done.stdout, flags=re.MULTILINE) == sections


def test_files_named_at_the_end_exist(quick_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = quick_run
    closing = done.stdout.partition("Open these three files")[2]
    named = [Path(match) for match in re.findall(rf"{re.escape(str(out))}\S+", closing)]
    assert [path.name.partition(".")[0] for path in named] == ["profile", "net", "digits"]
    assert all(path.stat().st_size > 0 for path in named)


def test_single_step_model_and_net_predict_the_same(
    quick_run: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, _ = quick_run
    match = re.search(r"agree on (\d+) of (\d+) test digits", done.stdout)
    assert match is not None, done.stdout + done.stderr
    same, total = map(int, match.groups())
    # Rounding can flip a spike whose potential is at the threshold.
    assert same >= 0.99 * total


def test_output_to_a_file_has_no_control_characters(quick_run: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, _ = quick_run
    assert not set(done.stdout) & {"\x1b", "\r"}


def test_wrong_option_is_refused_before_any_work() -> None:
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--epochs", "0"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "at least 1" in done.stderr
