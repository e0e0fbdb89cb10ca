"""Nets go to NIR and come back with the same spikes; neurons are recognised by what they do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import ExportError, InputError, SnnfxWarning
from support.stepping import step_model

nir = pytest.importorskip("nir")
np = pytest.importorskip("numpy")


class OwnNeuron(nn.Module):
    """A leak for each element, a factor outside of the update, and a reset to another value than the rest."""

    def __init__(self, reset: float = 0.0) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 4)
        self.beta = nn.Parameter(torch.rand(4))
        self.reset_value = reset
        self.v: Any = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.fc(x) * 1.5
        if self.v is None:
            self.v = torch.zeros_like(current)
        self.v = torch.sigmoid(self.beta) * self.v + current
        spike = (self.v > 0.4).to(x.dtype)
        self.v = torch.where(spike > 0, torch.full_like(self.v, self.reset_value), self.v)
        return spike


class ResetNextStep(snnfx.MemoryModule):
    """The reset happens at the start of the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)
        self.register_memory("spike", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.v = 0.8 * self.v * (1 - self.spike) + x
        self.spike = (self.v >= 1.0).to(x.dtype)
        return self.spike


class Recurrent(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc, self.rec, self.lif = nn.Linear(5, 4), nn.Linear(4, 4, bias=bias), neuron.LIFNode(decay_input=False)
        self.z: Any = None

    def forward(self, x: Tensor) -> Tensor:
        current = self.fc(x)
        if self.z is None:
            self.z = torch.zeros_like(current)
        self.z = self.lif(current + self.rec(self.z))
        return self.z


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.n, self.m = neuron.LIFNode(), neuron.IFNode()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s = self.n(self.a(x))
        return self.m(self.b(s) + 0.5 * s), s


def csnn() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean, norm.running_var = torch.rand(4), torch.rand(4) + 0.5
    layers = [nn.Conv2d(2, 4, 3, padding=1, groups=2), norm, neuron.LIFNode(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(36, 6), neuron.CUBALIFNode(), nn.Linear(6, 3), neuron.LeakyIntegrator(3.0))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "csnn": (csnn, (2, 6, 6)),
    "if": (lambda: nn.Sequential(nn.Linear(5, 4), neuron.IFNode(v_reset=-0.25)), (5,)),
    "plif": (
        lambda: nn.Sequential(nn.Linear(5, 4), neuron.ParametricLIFNode(3.0, decay_input=False, v_reset=-0.2)),
        (5,),
    ),
    "own": (OwnNeuron, (5,)),
    "reset_next_step": (lambda: nn.Sequential(nn.Linear(5, 4), ResetNextStep()), (5,)),
    "recurrent": (Recurrent, (5,)),
    "recurrent_without_bias": (lambda: Recurrent(bias=False), (5,)),
    "residual": (Residual, (5,)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), neuron.LIFNode(), nn.Flatten()), (2, 9)),
    "tall_kernel": (lambda: nn.Sequential(nn.Conv2d(1, 2, (3, 1)), neuron.LIFNode()), (1, 6, 6)),
    "sum_pool": (lambda: nn.Sequential(nn.AvgPool2d(2, divisor_override=1), neuron.IFNode()), (1, 6, 6)),
}


def exported(model: nn.Module, x_seq: Tensor, path: Path, **options: Any) -> tuple[Path, Any]:
    net = snnfx.convert(model, example_inputs=x_seq[0]).eval()
    return snnfx.export(net, path / "net.nir", x_seq, **options), net


def sequence(*shape: int) -> Tensor:
    return torch.rand(30, 3, *shape, dtype=torch.float64) * 6 - 2


@pytest.mark.parametrize("name", NETS)
def test_round_trip_has_equal_spikes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    make, shape = NETS[name]
    model = make().double().eval()
    path, net = exported(model, sequence(*shape)[:4], tmp_path)
    x_seq = sequence(*shape)
    expected = net(x_seq)
    imported = snnfx.from_nir(path)
    with torch.no_grad():
        stepped = step_model(imported, x_seq)
        snnfx.functional.reset_net(imported)
        again = snnfx.convert(imported, example_inputs=x_seq[0])(x_seq)
    for a in (stepped, again):
        torch.testing.assert_close(a, expected)
    spikes = expected[0] if isinstance(expected, tuple) else expected
    assert spikes.any()


@pytest.mark.parametrize("dt", [1e-3, 0.5])
def test_time_constants_are_in_seconds(dt: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 4), neuron.LIFNode(tau=4.0)).double()
    path, _ = exported(model, sequence(5), tmp_path, dt=dt)
    assert np.allclose(nir.read(path).nodes["1"].tau, 4 * dt)
    assert snnfx.from_nir(path).get_submodule("1").tau == 4.0


def test_parameters_of_a_neuron_of_ones_own(tmp_path: Path) -> None:
    model = OwnNeuron().double()
    path, _ = exported(model, sequence(5), tmp_path, dt=1e-3)
    (lif,) = [n for n in nir.read(path).nodes.values() if isinstance(n, nir.LIF)]
    leak = torch.sigmoid(model.beta).detach().numpy()
    assert np.allclose(1 - 1e-3 / lif.tau, leak)
    assert np.allclose(lif.r * 1e-3 / lif.tau, 1.5)
    assert np.allclose(lif.v_threshold, 0.4) and np.allclose(lif.v_reset, 0)


def test_batch_norm_is_folded_into_the_layer(tmp_path: Path) -> None:
    path, _ = exported(csnn().double().eval(), sequence(2, 6, 6)[:3], tmp_path)
    kinds = [type(n).__name__ for n in nir.read(path).nodes.values()]
    assert "Scale" not in kinds and kinds.count("Conv2d") == 1 and "CubaLIF" in kinds and "LI" in kinds


@pytest.mark.parametrize("first", [1.0, 0.999])
def test_threshold_is_met_as_in_the_net(first: float, tmp_path: Path) -> None:
    x_seq = torch.full((3, 2, 1), first)
    path, net = exported(nn.Sequential(neuron.IFNode()), x_seq, tmp_path)
    assert torch.equal(step_model(snnfx.from_nir(path), x_seq), net(x_seq))
    assert net(x_seq)[0].all() == (first == 1.0)


def test_other_initial_potential_warns_and_comes_back(tmp_path: Path) -> None:
    x_seq = sequence(5)
    with pytest.warns(SnnfxWarning, match="SNNFX815"):
        path, net = exported(OwnNeuron(reset=-0.5).double(), x_seq, tmp_path)
    with torch.no_grad():
        assert torch.equal(step_model(snnfx.from_nir(path), x_seq), net(x_seq))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (neuron.LIFNode(v_reset=None), "soft reset"),
        (neuron.AdaptiveLIFNode(v_reset=0.0), "depend on each other"),
        (nn.Tanh(), "not a linear function"),
    ],
)
def test_neurons_without_a_form_are_refused(layer: nn.Module, why: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=f"(?s)SNNFX814 `1` .*{why}"):
        exported(nn.Sequential(nn.Linear(5, 4), layer).double(), sequence(5), tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_without_a_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="SNNFX813 `1` has no form in NIR: .*max_pool2d"):
        exported(nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)).double(), sequence(1, 6, 6), tmp_path)


@pytest.mark.parametrize("options", [{"state": True}, {"step": True}, {"dynamic": ("T",)}, {"dt": 0.0}])
def test_options_without_a_meaning_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="SNNFX801"):
        exported(nn.Sequential(nn.Linear(5, 4)).double(), sequence(5), tmp_path, **options)


def test_reduced_outputs_are_refused(tmp_path: Path) -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(5, 4), neuron.LIFNode()), reduce="mean").eval()
    with pytest.raises(ExportError, match=r"(?s)SNNFX813 reduce='mean' .*without reduce"):
        snnfx.export(net, tmp_path / "net.nir", torch.rand(4, 2, 5))
    assert not list(tmp_path.iterdir())


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"(?s)SNNFX803 nir is not installed.*pip install snnfx\[nir\]"):
        snnfx.from_nir(tmp_path / "net.nir")


def test_missing_and_other_files(tmp_path: Path) -> None:
    other = tmp_path / "other.nir"
    other.write_text("text")
    for path in (tmp_path / "missing.nir", other):
        with pytest.raises(InputError, match="SNNFX817"):
            snnfx.from_nir(path)


def lif(size: int, **changes: float) -> Any:
    numbers = {"tau": 2e-4, "r": 1.0, "v_leak": 0.0, "v_threshold": 1.0, **changes}
    return nir.LIF(**{k: np.full(size, v) for k, v in numbers.items()})


def test_nested_graphs_and_delays_are_imported() -> None:
    inner = nir.NIRGraph(
        {"input": nir.Input({"input": np.array([2])}), "lif": lif(2), "output": nir.Output({"output": np.array([2])})},
        [("input", "lif"), ("lif", "output")],
    )
    nodes = {
        "input": nir.Input({"input": np.array([2])}),
        "part": inner,
        "late": nir.Delay(np.full(2, 2e-4)),
        "output": nir.Output({"output": np.array([2])}),
    }
    graph = nir.NIRGraph(nodes, [("input", "part"), ("part", "late"), ("late", "output")])
    x_seq = sequence(2)
    expected = step_model(neuron.LIFNode(v_threshold=1.0), x_seq)
    actual = step_model(snnfx.from_nir(graph, dt=1e-4), x_seq)
    assert torch.equal(actual[2:], expected[:-2]) and not actual[:2].any()


def test_cycles_carry_the_previous_spike_through_the_layer() -> None:
    weight = np.array([[0.0, 2.0], [-1.0, 0.5]])
    nodes = {
        "input": nir.Input({"input": np.array([2])}),
        "lif": lif(2, v_leak=0.1),
        "w": nir.Affine(weight, np.array([0.3, -0.2])),
        "output": nir.Output({"output": np.array([2])}),
    }
    graph = nir.NIRGraph(nodes, [("input", "lif"), ("lif", "w"), ("w", "lif"), ("lif", "output")])
    x_seq = sequence(2)
    v, spike, expected = torch.zeros(3, 2).double(), torch.zeros(3, 2).double(), []
    for x in x_seq:
        u = x + spike @ torch.tensor(weight).T + torch.tensor([0.3, -0.2])
        v = v + 0.5 * (0.1 - v + u)
        spike = (v > 1.0).double()
        v = v * (1 - spike)
        expected.append(spike)
    with torch.no_grad():
        assert torch.equal(step_model(snnfx.from_nir(graph, dt=1e-4), x_seq), torch.stack(expected))


def test_time_step_that_is_too_long_is_refused() -> None:
    with pytest.raises(InputError, match="SNNFX816 the node `lif` cannot be imported: its tau is 0.0002 s"):
        snnfx.from_nir(nir.NIRGraph.from_list(lif(2)), dt=1.0)


def test_model_is_made_on_a_device() -> None:
    graph = nir.NIRGraph.from_list(nir.Affine(np.eye(2), np.zeros(2)), lif(2, v_leak=0.1), lif(2))
    model = snnfx.from_nir(graph, dt=1e-4, device="meta")
    tensors = [*model.parameters(), *model.buffers()]
    assert tensors and all(x.is_meta for x in tensors)
    assert model(torch.empty(3, 2, dtype=torch.float64, device="meta")).is_meta


def test_neuron_without_a_reset_is_refused(tmp_path: Path) -> None:
    class Threshold(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            self.v = 0.8 * self.v + x
            return (self.v > 0.5).to(x.dtype)

    with pytest.raises(ExportError, match="(?s)SNNFX814 `1` .*a spike does not reset its potential"):
        exported(nn.Sequential(nn.Linear(5, 4), Threshold()).double(), sequence(5), tmp_path)
