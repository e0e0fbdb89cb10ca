"""Each kind of region and neuron in each form of a file: sequences, pieces, single steps, fixed and dynamic axes."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from support.export_models import OtherFirstStep, TwoStates
from support.nets import BatchCoupled, has
from support.stepping import fresh_copy, step_model

GIVEN = (4, 2)  # T and N of the export

pytestmark = pytest.mark.slow


class ScaledWeights(nn.Module):
    """The weight is divided by its norm in each step, equally for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(5, 4), neuron.LIFNode(v_threshold=0.2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight / self.fc.weight.norm(dim=1, keepdim=True)
        return self.lif(nn.functional.linear(x, weight, self.fc.bias))  # type: ignore[no-any-return]


class RecurrentConvolution(snnfx.MemoryModule):
    """The spikes of the last step come back through a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.back = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.lif = neuron.LIFNode(v_threshold=0.3)
        self.register_memory("spike", None)

    def forward(self, x: Tensor) -> Tensor:
        current = self.conv(x)
        if self.spike is None:
            self.spike = torch.zeros_like(current)
        self.spike = self.lif(current + self.back(self.spike))
        return self.spike


def parametric_lif() -> nn.Module:
    from spikingjelly.activation_based import neuron as sj

    neurons = (sj.ParametricLIFNode(v_threshold=0.3), sj.ParametricLIFNode(v_threshold=0.3, v_reset=None))
    return nn.Sequential(nn.Linear(5, 4), neurons[0], nn.Linear(4, 3), neurons[1])


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "map_region": (BatchCoupled, (5,)),
    "once_region": (ScaledWeights, (5,)),
    "other_first_step": (OtherFirstStep, (5,)),
    "recurrent_convolution": (RecurrentConvolution, (2, 5, 5)),
    "spikingjelly": (parametric_lif, (5,)),
    "two_states": (TwoStates, (5,)),
}


def dtype_of(suffix: str) -> torch.dtype:
    return torch.float32 if suffix == "onnx" else torch.float64  # onnxruntime convolves in float32 only


def net_and_model(name: str, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    if name == "spikingjelly" and not has("spikingjelly"):
        pytest.skip("spikingjelly is not installed")
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make().to(dtype).eval()
    example = torch.rand(2, *shape, dtype=dtype)
    return snnfx.convert(copy.deepcopy(model), example_inputs=example).eval(), model


def sequence(name: str, T: int, N: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(T, N, *NETS[name][1], dtype=dtype) * 2


class File:
    """An exported file: `(input[, state, start]) -> (output, next state)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix == ".onnx":
            import onnxruntime

            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            self.metadata = json.loads(self.session.get_modelmeta().custom_metadata_map["snnfx"])
        else:
            extra = {"metadata.json": ""}
            self.module: Any = torch.export.load(path, extra_files=extra).module()
            self.metadata = json.loads(extra["metadata.json"])

    def __call__(self, x: Tensor, state: dict[str, Tensor] | None = None, is_first: bool = False) -> Any:
        start = torch.tensor(is_first) if "start" in self.metadata else None
        if self.path.suffix == ".pt2":
            result = self.module(*(v for v in (x, state, start) if v is not None))
            return result if state is not None else (result, {})
        feeds = {self.metadata["inputs"][0]["name"]: x, **(state or {})}
        feeds |= {} if start is None else {"start": start}
        y, *after = map(torch.from_numpy, self.session.run(None, {k: v.numpy() for k, v in feeds.items()}))
        return y, dict(zip([s["slot"] for s in self.metadata["final_states"]], after, strict=True))

    def in_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        sizes = dict(zip(self.metadata["inputs"][0]["shape"], pieces[0].shape, strict=True))
        dtypes = {s["slot"]: getattr(torch, s["dtype"]) for s in self.metadata["states"]}
        state = {
            # Where `start` selects the reset state, the given numbers must not count.
            s["slot"]: torch.full([sizes.get(d, d) for d in s["shape"]], 7.0 if s["initial"] is None else s["initial"])
            for s in self.metadata["states"]
        }
        state = {name: value.to(dtypes[name]) for name, value in state.items()}
        outputs = []
        for i, piece in enumerate(pieces):
            y, state = self(piece, state, i == 0)
            outputs.append(y)
        return outputs


def run_whole(file: File, x_seq: Tensor) -> Tensor:
    return file(x_seq)[0]  # type: ignore[no-any-return]


def run_halves(file: File, x_seq: Tensor) -> Tensor:
    return torch.cat(file.in_pieces([*x_seq.tensor_split([len(x_seq) // 2])] if len(x_seq) > 1 else [x_seq]))


def run_steps(file: File, x_seq: Tensor) -> Tensor:
    return torch.stack(file.in_pieces(list(x_seq)))


FORMS: dict[str, tuple[dict[str, Any], Callable[[File, Tensor], Tensor], list[tuple[int, int]]]] = {
    "state": ({"state": True}, run_halves, [(1, 1), (1, 3), (7, 1), (5, 4)]),
    "step": ({"step": True}, run_steps, [(1, 1), (3, 1), (4, 3)]),
    "dynamic_steps": ({"dynamic": ("T",)}, run_whole, [(1, 2), (7, 2)]),
    "fixed": ({"dynamic": ()}, run_whole, [GIVEN]),
    "fixed_batch_with_state": ({"dynamic": ("T",), "state": True}, run_halves, [(1, 2), (7, 2)]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_file_equals_the_stepped_model(suffix: str, name: str, form: str, tmp_path: Path) -> None:
    if suffix == "onnx" and not all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime")):
        pytest.skip("onnx, onnxscript and onnxruntime are not installed")
    dtype = dtype_of(suffix)
    net, model = net_and_model(name, dtype)
    options, run, sizes = FORMS[form]
    x_seq = sequence(name, *GIVEN, dtype)
    given = x_seq[0] if form == "step" else x_seq
    file = File(snnfx.export(net, tmp_path / f"net.{suffix}", given, check=False, **options))
    for T, N in sizes:
        x_seq = sequence(name, T, N, dtype)
        with torch.no_grad():
            torch.testing.assert_close(run(file, x_seq), step_model(fresh_copy(model), x_seq))


@pytest.mark.parametrize(("name", "kind"), [("map_region", "map"), ("once_region", "once")])
def test_nets_have_the_regions_of_their_names(name: str, kind: str) -> None:
    assert kind in [region.kind for region in net_and_model(name, torch.float64)[0].regions]
