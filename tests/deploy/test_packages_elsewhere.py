"""AOTInductor packages run for other T in a process that cannot import snnfx."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from support.stepping import fresh_copy, step_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="AOTInductor needs a C++ compiler"
    ),
]

ELSEWHERE = """
    import json, sys
    sys.path[:] = [*sys.path, *json.loads(sys.argv[1])]
    sys.modules["snnfx"] = None  # import snnfx raises
    import torch
    from torch._inductor import aoti_load_package

    torch.set_num_threads(1)
    package = aoti_load_package(sys.argv[2])
    metadata = json.loads(package.get_metadata()["snnfx"])
    given = torch.load(sys.argv[3])
    with torch.no_grad():
        results = [package(*arguments) for arguments in given]
    torch.save([metadata, results], sys.argv[4])
"""


def run_elsewhere(path: Path, given: list[tuple[Any, ...]]) -> tuple[dict[str, Any], list[Any]]:
    """The metadata of a package and its results for each tuple of arguments, from another process."""
    folder = path.parent
    (folder / "elsewhere.py").write_text(textwrap.dedent(ELSEWHERE))
    torch.save(given, folder / "given.pt")
    packages = json.dumps([p for p in sys.path if p.endswith("-packages")])
    files = [path, folder / "given.pt", folder / "results.pt"]
    command = [sys.executable, "-I", folder / "elsewhere.py", packages, *files]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metadata, results = torch.load(folder / "results.pt")
    return metadata, results


def mlp() -> nn.Module:
    torch.manual_seed(0)
    neurons = neuron.LIFNode(v_threshold=0.1), neuron.ParametricLIFNode(v_threshold=0.1)
    return nn.Sequential(nn.Linear(5, 8), neurons[0], nn.Linear(8, 3), neurons[1])


def sequence(T: int, N: int) -> Tensor:
    return torch.rand(T, N, 5) * 3


def test_package_with_dynamic_steps_equals_the_stepped_model(tmp_path: Path) -> None:
    model = mlp().eval()
    net = snnfx.convert(copy.deepcopy(model)).eval()
    path = snnfx.export(net, tmp_path / "net.pt2", sequence(4, 2), package="aot", dynamic=("T",))
    sequences = [sequence(T, 2) for T in (1, 3, 9)]
    metadata, results = run_elsewhere(path, [(x_seq,) for x_seq in sequences])
    assert metadata["dynamic"] == ["T"]
    with torch.no_grad():
        expected = [step_model(fresh_copy(model), x_seq) for x_seq in sequences]
    assert 0 < expected[-1].mean() < 1
    for y_seq, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(y_seq, wanted)


def test_package_with_state_goes_on_in_pieces(tmp_path: Path) -> None:
    net = snnfx.convert(mlp().eval()).eval()
    path = snnfx.export(
        net, tmp_path / "net.pt2", sequence(4, 2), package="aot", dynamic=("T",), state=True, check=False
    )
    x_seq = sequence(5, 2)
    with torch.no_grad():
        first, middle = net.run(x_seq[:1])
        second, final = net.run(x_seq[1:], state=middle)
    zeros = {name: torch.zeros_like(value) for name, value in middle.items()}
    _, results = run_elsewhere(path, [(x_seq[:1], zeros), (x_seq[1:], dict(middle))])
    for (y_seq, state), expected, after in zip(results, (first, second), (middle, final), strict=True):
        torch.testing.assert_close(y_seq, expected)
        torch.testing.assert_close(state, dict(after))
