"""Five nets run from their files in a process that cannot import snnfx: any T and N from 1 on, in pieces, in steps."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import neuron
from support.stepping import fresh_copy, step_model

SIZES = ((1, 1), (1, 3), (6, 1), (5, 4))
FORMATS = ("pt2", "onnx")

pytestmark = pytest.mark.slow


class SpikingBlock(nn.Module):
    """A convolution, BatchNorm and a neuron on the residual branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.lif = neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lif(self.norm(self.conv(x)))


class ResidualCSNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, 4, 3, padding=1), neuron.IFNode()
        self.blocks = nn.Sequential(SpikingBlock(4), nn.MaxPool2d(2))
        self.head, self.out = nn.Linear(4, 3), neuron.LeakyIntegrator()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first(self.stem(x)))
        return self.out(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class RecurrentNet(snnfx.MemoryModule):
    """The hidden layer gets its own spikes of the last step through a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.back, self.lif = nn.Linear(5, 8), nn.Linear(8, 8), neuron.LIFNode()
        self.register_memory("spike", None)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        current = self.fc(x)
        if self.spike is None:
            self.spike = torch.zeros_like(current)
        self.spike = self.lif(current + self.back(self.spike))
        return self.head(self.spike)


class AdaptiveNeuron(nn.Module):
    """A potential and a threshold that rises with each spike, without any base class."""

    def __init__(self) -> None:
        super().__init__()
        self.rise = nn.Parameter(torch.tensor(0.25))
        self.v: Any = None
        self.threshold: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v, self.threshold = torch.zeros_like(x), torch.full_like(x, 0.5)
        self.v = self.v * 0.75 + x
        spike = torch.zeros_like(x)
        spike[self.v > self.threshold] = 1.0
        self.v = torch.where(spike > 0, self.v - self.threshold, self.v)
        self.threshold = self.threshold * 0.875 + self.rise * spike
        return spike


def mlp() -> nn.Module:
    neurons = neuron.LIFNode(v_threshold=0.5), neuron.ParametricLIFNode(v_threshold=0.5)
    return nn.Sequential(nn.Linear(5, 8), neurons[0], nn.Linear(8, 3), neurons[1])


def snntorch_leaky() -> nn.Module:
    snn = pytest.importorskip("snntorch")
    layers = [snn.Leaky(beta=0.75, init_hidden=True), snn.Leaky(beta=0.5, init_hidden=True, output=False)]
    return nn.Sequential(nn.Linear(5, 8), layers[0], nn.Linear(8, 3), layers[1])


def own_neuron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), AdaptiveNeuron(), nn.Linear(8, 3), AdaptiveNeuron())


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5,)),
    "residual_csnn": (ResidualCSNN, (1, 6, 6)),
    "recurrent": (RecurrentNet, (5,)),
    "snntorch_leaky": (snntorch_leaky, (5,)),
    "own_neuron": (own_neuron, (5,)),
}


def model_of(name: str) -> nn.Module:
    """A model whose weights are multiples of 1/16, so that every order of summation gives the same spikes."""
    torch.manual_seed(3)
    model = NETS[name][0]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.tensor([0.5, -0.25, 0.0, 0.125]))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 80).round() / 16)
    return model.eval()


def sequence(name: str, T: int, N: int) -> Tensor:
    return (torch.rand(T, N, *NETS[name][1]) * 32).round() / 16


ELSEWHERE = """
    import json, sys
    sys.path[:] = [*sys.path, *json.loads(sys.argv[1])]

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("snnfx", "passes"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocked())
    try:
        import snnfx
    except ImportError:
        pass
    else:
        raise SystemExit("snnfx can be imported")
    import numpy, torch

    class Program:
        def __init__(self, path):
            extra = {"metadata.json": ""}
            self.module = torch.export.load(path, extra_files=extra).module()
            self.metadata = json.loads(extra["metadata.json"])

        def __call__(self, x, state=None, start=None):
            result = self.module(*(v for v in (x, state, start) if v is not None))
            return (result, None) if state is None else result

    class Model:
        def __init__(self, path):
            import onnxruntime
            self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            self.metadata = json.loads(self.session.get_modelmeta().custom_metadata_map["snnfx"])

        def __call__(self, x, state=None, start=None):
            feeds = {self.metadata["inputs"][0]["name"]: x, **(state or {})}
            feeds |= {} if start is None else {"start": start}
            results = self.session.run(None, {k: v.numpy() for k, v in feeds.items()})
            y, *after = map(torch.from_numpy, results)
            return y, dict(zip([s["slot"] for s in self.metadata["final_states"]], after, strict=True))

    def reset_state(file, x):
        sizes = dict(zip(file.metadata["inputs"][0]["shape"], x.shape, strict=True))
        shapes = {s["slot"]: [sizes.get(d, d) for d in s["shape"]] for s in file.metadata["states"]}
        fill = {s["slot"]: s["initial"] or 0 for s in file.metadata["states"]}
        return {name: torch.full(shape, float(fill[name])) for name, shape in shapes.items()}

    def in_pieces(file, pieces):
        state, outputs = reset_state(file, pieces[0]), []
        for i, piece in enumerate(pieces):
            start = torch.tensor(i == 0) if "start" in file.metadata else None
            y, state = file(piece, state, start)
            outputs.append(y)
        return outputs

    torch.set_num_threads(1)
    jobs = torch.load(sys.argv[2])
    results = []
    with torch.no_grad():
        for path, mode, sequences in jobs:
            file = (Model if path.endswith("onnx") else Program)(path)
            for x_seq in sequences:
                if mode == "whole":
                    results.append(file(x_seq)[0])
                elif mode == "halves":
                    half = len(x_seq) // 2
                    results.append(torch.cat(in_pieces(file, [x_seq[:half], x_seq[half:]])))
                else:
                    results.append(torch.stack(in_pieces(file, list(x_seq))))
    assert "snnfx" not in sys.modules
    torch.save(results, sys.argv[3])
"""


@pytest.fixture(scope="module", params=NETS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The results of all files of a net from one other process: `{(format, mode): [(actual, expected), ...]}`."""
    name, folder = request.param, tmp_path_factory.mktemp("exported")
    model = model_of(name)
    net = snnfx.convert(copy.deepcopy(model), example_inputs=sequence(name, 1, 2)[0]).eval()
    torch.manual_seed(5)
    sequences = [sequence(name, T, N) for T, N in SIZES]
    given = {
        "whole": ({}, sequences, sequence(name, 4, 2)),
        "halves": ({"state": True}, [x for x in sequences if len(x) > 1], sequence(name, 4, 2)),
        "steps": ({"step": True}, sequences, sequence(name, 1, 2)[0]),
    }
    formats = [f for f in FORMATS if f == "pt2" or _has_onnx()]
    jobs, keys = list[Any](), list[Any]()
    for suffix in formats:
        for mode, (options, xs, example) in given.items():
            path = snnfx.export(net, folder / f"{mode}.{suffix}", example, check=False, **options)
            jobs.append((str(path), mode, xs))
            keys += [(suffix, mode, x) for x in xs]
    (folder / "elsewhere.py").write_text(textwrap.dedent(ELSEWHERE))
    torch.save(jobs, folder / "jobs.pt")
    packages = json.dumps([p for p in sys.path if p.endswith("-packages")])
    command = [sys.executable, "-I", folder / "elsewhere.py", packages, folder / "jobs.pt", folder / "results.pt"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for (suffix, mode, x_seq), actual in zip(keys, torch.load(folder / "results.pt"), strict=True):
        with torch.no_grad():
            expected = step_model(fresh_copy(model), x_seq)
        found.setdefault((suffix, mode), []).append((actual, expected))
    yield found


def _has_onnx() -> bool:
    import importlib.util

    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


@pytest.mark.parametrize("mode", ["whole", "halves", "steps"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_file_equals_the_stepped_model(results: Any, suffix: str, mode: str) -> None:
    if (suffix, mode) not in results:
        pytest.skip("onnx, onnxscript and onnxruntime are not installed")
    pairs = results[suffix, mode]
    assert all(expected.unique(dim=0).shape[0] > 1 for _, expected in pairs if expected.shape[0] > 1)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
