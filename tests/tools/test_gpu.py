"""`tools/gpu.sh`: the logic of the run on a card, in Triton's interpreter, and its refusals."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "bench" / "gpu.py"


def run_tool(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "SNNFX_KERNELS")}
    command = [sys.executable, str(TOOL), *options]
    given = {**environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=300, check=False)


def load(name: str) -> Any:
    sys.path[:0] = [str(TOOL.parent)]
    try:
        return __import__(name)
    finally:
        del sys.path[:1]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The written results of a run in the interpreter."""
    for package in ("triton", "numpy", "spikingjelly"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("gpu")
    done = run_tool("--interpret", "--json", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    found = json.loads(path.read_text())
    assert path.name == f"gpu_{found['machine']['date']}_interpreter.json"
    # The table has a line for each row and kind.
    assert done.stdout.count("forward") == len(found["layers"])
    assert done.stdout.count("inference") == len(found["networks"])
    return found  # type: ignore[no-any-return]


# The tests of the report run in one process, because the fixture takes most of the time.
@pytest.mark.xdist_group("gpu")
def test_kernels_are_tested(report: dict[str, Any]) -> None:
    assert report["tests"]["passed"] >= 3 and report["tests"]["failed"] == []


@pytest.mark.xdist_group("gpu")
def test_layers_have_both_directions_the_peer_and_a_copy(report: dict[str, Any]) -> None:
    assert {row["case"]["dtype"] for row in report["layers"]} == {"float16", "float32"}
    for row in report["layers"]:
        assert row["failed"] == {}
        for kind in ("forward", "training"):
            assert row[kind]["call"].keys() == {"snnfx", "SpikingJelly (torch)", "copies"}
            assert all(t > 0 for t in row[kind]["call"].values())
        # Rounding can flip a spike whose potential is at the threshold.
        assert row["other spikes"]["SpikingJelly (torch)"] < 0.02


@pytest.mark.xdist_group("gpu")
def test_networks_run_eager_compiled_and_channels_last(report: dict[str, Any]) -> None:
    (row,) = report["networks"]
    assert row["failed"] == {}
    for kind in ("inference", "training"):
        assert row[kind].keys() >= {"stepped", "snnfx", "snnfx, compiled", "snnfx, channels-last", "floor"}
    assert row["mean difference"].keys() == {"stepped", "snnfx, compiled", "snnfx, channels-last"}
    assert max(row["mean difference"].values()) < 1e-4


@pytest.mark.xdist_group("gpu")
def test_the_report_names_date_card_and_versions(report: dict[str, Any]) -> None:
    assert report["machine"].keys() >= {"date", "card", "torch", "triton", "spikingjelly"}
    assert report["left"] == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_without_a_card_one_line_says_so_and_the_status_is_2() -> None:
    done = run_tool()
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "--interpret" in line


@pytest.mark.parametrize("package", ["triton", "pytest", "numpy"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, find_spec = load("gpu"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    message = gpu.what_is_missing(True)
    assert message.startswith(f"{package} is not installed") and "\n" not in message and "pip install" in message


def test_a_run_without_time_left_names_the_rows_that_are_not_measured(tmp_path: Path) -> None:
    for package in ("triton", "numpy"):
        pytest.importorskip(package)
    done = run_tool("--interpret", "--minutes", "0.0001", "--json", str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not measured" in done.stdout
    (path,) = tmp_path.iterdir()
    assert "stopped" in json.loads(path.read_text())


def test_failed_tests_are_named_and_a_run_without_tests_has_failed() -> None:
    counts = load("gpu_cases").counts
    text = '<s><testcase name="a"/><testcase name="b"><failure message="no&#10;more"/></testcase></s>'
    assert counts(ElementTree.fromstring(text)) == {"passed": 1, "skipped": 0, "failed": ["b: no"]}
    skipped = ElementTree.fromstring('<s><testcase name="a"><skipped/></testcase></s>')
    assert counts(skipped) == {"passed": 0, "skipped": 1, "failed": ["no test ran"]}


def test_a_side_that_raises_is_recorded_and_the_others_are_kept() -> None:
    failed: dict[str, str] = {}

    def broken() -> None:
        raise ValueError("too\nlong")

    kept = load("gpu_cases").working({"good": list, "bad": broken}, failed, "forward")
    assert list(kept) == ["good"] and failed == {"bad, forward": "ValueError: too"}


def test_a_loop_without_a_triton_kernel_is_a_failure() -> None:
    import snnfx

    net = snnfx.convert(snnfx.neuron.LIFNode(), example_inputs=torch.rand(2, 3))
    net(torch.rand(4, 2, 3))
    (reason,) = load("gpu_cases").not_kernels(net).values()
    assert "not Triton" in reason or "no kernel" in reason


class RecordedGraph:
    """Stands for a CUDA graph; a replay only counts."""

    def __init__(self) -> None:
        self.calls = 0

    def replay(self) -> None:
        self.calls += 1


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code for a card run on the CPU: streams and graphs do nothing."""

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cases = load("gpu_cases")
    monkeypatch.setattr(cases.Target, "device", torch.device("cpu"))
    monkeypatch.setattr(cases.Target, "compiled", lambda self, net: net)
    monkeypatch.setattr(cases, "peers", lambda target: {})


def test_a_layer_on_a_card_has_the_times_of_calls_and_of_graphs(without_cuda: None) -> None:
    cases = load("gpu_cases")
    target = cases.Target(interpreted=False, seconds=0.0)
    row = cases.measure_layer(cases.LayerOnCard(3, 2, 50, "float32"), target)
    for kind in ("forward", "training"):
        assert row[kind]["call"].keys() == row[kind]["device"].keys() == {"snnfx", "copies"}
    # On the CPU the kernel is C++, and the row says so.
    assert all("not Triton" in reason for reason in row["failed"].values()) and row["failed"]


@pytest.mark.parametrize(("N", "graph"), [(1, True), (2, False)])
def test_a_network_on_a_card_is_replayed_from_a_graph_for_a_small_batch(
    N: int, graph: bool, without_cuda: None
) -> None:
    cases, networks = load("gpu_cases"), load("networks")
    ((_, network),) = cases.card_networks(interpreted=True)
    row = cases.measure_network(networks.NetworkCase("Spikformer-like", 2, N), network, cases.Target(False, 0.0))
    for kind in ("inference", "training"):
        assert ("snnfx, CUDA graph" in row[kind]) is graph


def test_a_call_that_cannot_be_captured_is_recorded(without_cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = load("gpu_cases")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: 1 / 0)
    failed: dict[str, str] = {}
    assert cases.captured({"snnfx": list}, failed, "training", 2) == {}
    assert (
        list(failed) == ["snnfx, training, CUDA graph"] and "ZeroDivisionError" in failed["snnfx, training, CUDA graph"]
    )


def test_sizes_on_a_card_are_those_of_the_benchmark() -> None:
    pytest.importorskip("spikingjelly")
    cases = load("gpu_cases")
    layers = cases.card_layers(interpreted=False)
    assert {(c.N, c.C) for c in layers} == {(64, 65536)} and {c.dtype for c in layers} == {"float16", "float32"}
    assert {c.T for c in layers} >= {4, 32}
    nets = {(case.network, case.N) for case, _ in cases.card_networks(interpreted=False)}
    assert {name for name, _ in nets} == {"SEW-ResNet-18", "Spikformer-like"} and {1} < {n for _, n in nets}
