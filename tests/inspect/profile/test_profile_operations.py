"""MACs and ACs of `snnfx.profile`: against numbers counted by hand, and against SpikingJelly's counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.inspect.profile_data import LayerOperations
from support.nets import Recurrent, Residual, TokensFirstAttention

T, N = 5, 3


def operations(model: nn.Module, x_seq: Tensor, **options: Any) -> dict[str, LayerOperations]:
    report = snnfx.profile(snnfx.convert(model, **options), x_seq, repeats=1)
    assert not report.uncounted
    return {row.layer: row for row in report.operations}


def spikes(*shape: int, rate: float = 0.3) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < rate).float()


def test_a_linear_layer_costs_one_mac_for_each_input_and_output() -> None:
    (row,) = operations(nn.Linear(4, 7), torch.rand(T, N, 4)).values()
    assert (row.dense_macs, row.macs, row.acs, row.density) == (T * N * 4 * 7, T * N * 4 * 7, 0, 1.0)


def test_spikes_cost_one_accumulate_for_each_output() -> None:
    x_seq = spikes(T, N, 4)
    row = operations(nn.Sequential(nn.Linear(4, 7)), x_seq)["0"]
    assert (row.dense_macs, row.macs, row.acs) == (T * N * 4 * 7, 0, int(x_seq.sum()) * 7)
    assert row.density == pytest.approx(float(x_seq.mean()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
        (nn.Conv2d(2, 6, 3, padding=1, dilation=2), (2, 6, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (4, 5, 5)),
        (nn.Conv3d(2, 3, 2, padding=1), (2, 3, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 4, 4)),
    ],
    ids=["conv1d", "dilated", "depthwise", "conv3d", "transposed"],
)
def test_a_spike_of_a_convolution_costs_the_weights_that_it_meets(layer: Any, shape: tuple[int, ...]) -> None:
    x_seq = spikes(2, N, *shape)
    row = operations(nn.Sequential(layer), x_seq)["0"]
    x = x_seq.flatten(0, 1)[:, :, *(slice(None),) * (len(shape) - 1)].double()
    ones = {name: torch.ones_like(p).double() * (name == "weight") for name, p in layer.named_parameters()}
    met = torch.func.functional_call(layer.double(), ones, (x,)).sum().detach()
    assert row.acs == round(float(met))
    layer.float()
    outputs = layer(x_seq[0])
    positions = x_seq[0] if isinstance(layer, nn.ConvTranspose2d) else outputs
    assert row.dense_macs == 2 * N * positions[0, 0].numel() * layer.weight.numel()
    assert row.macs == 0


def test_products_of_functions_and_operators_are_counted() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            return torch.einsum("ni,ij->nj", F.linear(y, self.weight), self.weight)

    rows = operations(Products(), torch.rand(T, N, 4))
    assert [row.macs for row in rows.values()] == [T * N * 20] * 3


def test_a_product_on_a_cycle_reads_the_spikes_of_the_step_before() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    x_seq = torch.rand(T, N, 6) * 6
    rows = operations(model, x_seq)
    _, _, record = snnfx.convert(model).run(x_seq, record=("layer.lif",))
    fired = record["layer.lif"]
    assert 0 < fired.mean() < 1
    assert rows["layer.recurrent"].acs == int(fired[:-1].sum()) * 8
    assert rows["readout"].acs == int(fired.sum()) * 3


def test_a_state_of_the_caller_counts_at_the_first_step() -> None:
    class Carried(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(x + self.fc(h))
            return h, h

    net = snnfx.convert(Carried(), carry={"h": 1}, example_inputs=(torch.rand(N, 3), torch.rand(N, 3)))
    report = snnfx.profile(net, torch.rand(T, N, 3), h=torch.ones(N, 3), repeats=1)
    (row,) = report.operations
    assert (row.acs, row.macs) == (N * 9, (T - 1) * N * 9)


def test_weights_inside_a_recurrent_cell_are_counted() -> None:
    norse = pytest.importorskip("norse.torch")

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = norse.LIFRecurrentCell(4, 5)

        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            y, state = self.cell(x, state)
            return y, state

    net = snnfx.convert(Cell(), carry={"state": 1})
    x_seq = torch.rand(T, N, 4) * 40
    report = snnfx.profile(net, x_seq, repeats=1)
    fired = net.run(x_seq)[0]
    assert report.dense_macs == T * N * (4 * 5 + 5 * 5)
    assert report.macs == T * N * 4 * 5 and report.acs == int(fired[:-1].sum()) * 5 > 0


def test_a_layer_that_runs_once_is_counted_once() -> None:
    model = nn.Sequential(nn.Linear(4, 7), snnfx.neuron.LIFNode(), nn.Linear(7, 2))
    report = snnfx.profile(snnfx.convert(model, time_dim=None), torch.rand(N, 4), T=T, repeats=1)
    assert [row.dense_macs for row in report.operations] == [N * 28, T * N * 14]


def test_chunks_do_not_change_the_counts() -> None:
    torch.manual_seed(0)
    model, x_seq = Recurrent().eval(), torch.rand(T, N, 6) * 6
    whole = snnfx.profile(snnfx.convert(model, chunk=None), x_seq, repeats=1)
    chunked = snnfx.profile(snnfx.convert(model, chunk=2), x_seq, repeats=1)
    assert chunked.operations == whole.operations
    assert [row.over_time for row in chunked.rates] == [row.over_time for row in whole.rates]


def test_attention_is_counted_with_its_projections() -> None:
    row = operations(TokensFirstAttention(), torch.rand(T, N, 4, 8))["attention"]
    projections, products = 4 * 8 * 8 * N * 4, 2 * N * 4 * 4 * 8
    assert row.dense_macs == T * (projections + products)


def test_a_layer_behind_a_reduction_over_time_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 7), snnfx.neuron.LIFNode(), nn.Linear(7, 2))
    report = snnfx.profile(snnfx.convert(model, reduce="mean"), torch.rand(T, N, 4), repeats=1)
    counted = {row.layer for row in report.operations}
    assert counted | set(report.uncounted) == {"0", "2"}


def test_energy_is_the_sum_of_its_operations() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(4, 7)))
    report = snnfx.profile(net, torch.rand(T, N, 4), repeats=1, mac_pj=2.0)
    assert report.energy_model.source == "energies given by the caller"
    assert report.energy == pytest.approx(T * N * 28 * 2e-12)
    default = snnfx.profile(net, spikes(T, N, 4), repeats=1)
    assert default.energy == pytest.approx(default.acs * 0.9e-12)
    assert default.dense_energy == pytest.approx(T * N * 28 * 4.6e-12)


def conv_net() -> nn.Module:
    from spikingjelly.activation_based import neuron

    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), neuron.IFNode(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), neuron.LIFNode(v_threshold=0.2),
        nn.AvgPool2d(2), nn.Conv2d(8, 4, 1), neuron.IFNode(v_threshold=0.1),
        nn.Flatten(), nn.Linear(16, 10), neuron.IFNode(),
    )  # fmt: skip


@pytest.mark.parametrize("make", [conv_net, Residual], ids=["conv", "residual"])
def test_counts_equal_those_of_spikingjelly_stepping_the_model(make: Any) -> None:
    counters = pytest.importorskip("spikingjelly.activation_based.op_counter")
    from spikingjelly.activation_based import functional

    torch.manual_seed(0)
    model = make().eval()
    x_seq = torch.rand(T, N, 2, 8, 8) * 6
    report = snnfx.profile(snnfx.convert(model), x_seq, repeats=1)
    macs, acs = counters.MACCounter(), counters.SynOpCounter()
    del macs.rules[torch.ops.aten.native_batch_norm.default]
    stepped = snnfx.convert(model, step_mode="s")
    state = None
    with counters.DispatchCounterMode([macs, acs]), torch.no_grad():
        for x in x_seq:
            _, state = stepped.run(x, state=state)
    functional.reset_net(model)
    assert report.acs > 0
    assert (report.macs, report.acs) == (macs.get_total(), acs.get_total())
