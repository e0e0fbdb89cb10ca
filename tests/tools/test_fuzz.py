"""A few seeds of `tools/fuzz`: converted random models match stepping them; and tests of the fuzzer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools" / "fuzz"))

import fuzz  # noqa: E402
import fuzz_checks  # noqa: E402
from fuzz_models import Body, Case, build, random_case  # noqa: E402

from snnfx.regions import normed_loop  # noqa: E402

SEEDS = range(16)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_model(seed: int) -> None:
    result = fuzz.fuzz_one(seed, extra_checks=1, shrink_seconds=0)
    assert not [outcome for outcome in result.outcomes if outcome.failed], result.outcomes[-1].text


def test_a_seed_always_gives_the_same_model() -> None:
    first, second = random_case(3), random_case(3)
    assert first is not None and first == second


def test_random_models_run_on_their_own() -> None:
    for seed in SEEDS:
        case = random_case(seed)
        if case is not None:
            build(case)(*(torch.rand(shape, dtype=torch.float64) for shape in case.shapes))


def broken_case() -> Case:
    """A model whose net differs from stepping it, because it counts its calls in a default argument."""
    body = Body("Model", "nn.Module", ["x"], ["self.calls = lambda seen=[0]: seen.append(0) or len(seen)"])
    body.statements = ["v1 = x.abs()", "v2 = v1 * self.calls()", "v3 = v2 + 1"]
    body.result = "v3, v1"
    return Case(7, [body], [(2, 3)], [False], 3)


def test_difference_is_found_shrunk_and_written_as_a_script(tmp_path: Path) -> None:
    case = broken_case()
    outcome = fuzz.run_check(case, "train", examples=True)
    assert outcome.kind == "mismatch"
    small = fuzz.shrink(case, outcome, True, seconds=5)
    assert len(small.root.statements) <= 2 and small.T < 3
    script = tmp_path / "repro.py"
    script.write_text(fuzz.reproducer(small, outcome, True))
    done = subprocess.run([sys.executable, str(script)], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "Mismatch: outputs" in done.stderr


def test_comparison_sees_values_shapes_and_nesting() -> None:
    x = torch.ones(2, 3)
    fuzz_checks.same("it", {"a": x}, {"a": x.clone()})
    for other in ({"b": x}, {"a": x + 1e-6}, {"a": x[:1]}, {"a": x.double()}):
        with pytest.raises(fuzz_checks.Mismatch, match="it"):
            fuzz_checks.same("it", {"a": x}, other)


def test_snapshot_sees_what_a_call_leaves_behind() -> None:
    model = nn.BatchNorm1d(3)
    before = fuzz_checks.snapshot(model)
    fuzz_checks.unchanged("nothing", before, fuzz_checks.snapshot(model))
    model(torch.rand(2, 3))
    with pytest.raises(fuzz_checks.Mismatch):
        fuzz_checks.unchanged("a call", before, fuzz_checks.snapshot(model))


def test_command_line_prints_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--n", "3", "--seed", "40", "--extra", "0"]) in (0, 1)
    printed = capsys.readouterr().out
    assert "3 models" in printed and "regions: " in printed


def test_right_nets_pass_verify_and_broken_ones_fail() -> None:
    found = fuzz.fuzz_one(2, only="verify").outcomes
    assert not [outcome for outcome in found if outcome.failed]
    assert {"verify right float32 fold eval", "verify right float64 per_step train"} <= {
        outcome.check.partition(" (")[0] for outcome in found
    }
    assert any("broken" in outcome.check and "caught" in outcome.check for outcome in found)


def test_calls_between_changes_find_a_wrong_bound_call(monkeypatch: pytest.MonkeyPatch) -> None:
    body = Body("Model", "nn.Module", ["x"], ["self.norm = nn.BatchNorm2d(2)", "self.lif = snnfx.neuron.LIFNode()"])
    body.statements, body.result = ["y = self.lif(self.norm(x))"], "y"
    case = Case(3, [body], [(3, 2, 4, 4)], [False], 3)
    assert fuzz.run_check(case, "calls", examples=True).kind == "ok"
    factors = normed_loop.channel_factors

    def with_another_bias(*arguments: Any) -> tuple[Tensor, ...]:
        y, mean, scale, bias = factors(*arguments)
        return y, mean, scale, bias + 0.5

    monkeypatch.setattr(normed_loop, "channel_factors", with_another_bias)
    assert fuzz.run_check(case, "calls", examples=True).kind == "mismatch"
