"""torch.compile and torch.export: one graph, right results, and no dependence on T."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

import snnfx
from support.nets import ACCEPTANCE, AcceptanceNet, has
from support.stepping import assert_close_leaves

LENGTHS = (4, 5, 8, 16, 33)


@pytest.fixture(params=ACCEPTANCE)
def acceptance(request: pytest.FixtureRequest) -> AcceptanceNet:
    net = ACCEPTANCE[request.param]
    if not has(net.package) or (net.package == "spikingjelly" and not has("torchvision")):
        pytest.skip(f"{net.package} is not installed")
    return net


def results(net: Any, parameters: list[nn.Parameter], sequences: tuple[Tensor, ...]) -> tuple[Any, Any]:
    """Outputs, and gradients of inputs and parameters."""
    inputs = [x.clone().requires_grad_() for x in sequences]
    outputs = net(*inputs)
    loss = sum(y.sin().sum() for y in pytree.tree_leaves(outputs))
    gradients = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
    return pytree.tree_map(lambda y: y.detach(), outputs), [g for g in gradients if g is not None]


def test_compiled_net_is_one_graph_for_all_T_and_trains(acceptance: AcceptanceNet) -> None:
    model = acceptance.make().double()
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            module.p = 0.0
    net = snnfx.convert(model, example_inputs=acceptance.example(torch.float64))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    parameters = list(model.parameters())
    lengths = LENGTHS if acceptance.package == "torch" else LENGTHS[:3]
    for T in lengths:
        sequences = acceptance.sequences(T, torch.float64)
        statistics = {k: v.clone() for k, v in model.state_dict().items()}
        expected = results(net, parameters, sequences)
        model.load_state_dict(statistics)
        assert_close_leaves(results(compiled, parameters, sequences), expected)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", ["csnn", "recurrent", "batch_coupled"])
def test_inductor_gives_the_eager_results(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    model = acceptance.make().double().eval()
    net = snnfx.convert(model, example_inputs=acceptance.example(torch.float64))
    compiled = torch.compile(net, fullgraph=True)
    parameters = list(model.parameters())
    for T in (4, 7):
        sequences = acceptance.sequences(T, torch.float64)
        assert_close_leaves(results(compiled, parameters, sequences), results(net, parameters, sequences))


@pytest.mark.parametrize("name", [n for n, a in ACCEPTANCE.items() if a.package == "torch"])
def test_exported_net_takes_any_T_and_batch_size(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    net = snnfx.convert(acceptance.make().double().eval(), example_inputs=acceptance.example(torch.float64))
    dynamic = {0: torch.export.Dim("T", min=2, max=64), 1: torch.export.Dim("N", min=2, max=64)}
    sequences = tuple(x.repeat(1, 3, *(1,) * (x.dim() - 2)) for x in acceptance.sequences(5, torch.float64))
    program = torch.export.export(net, sequences, dynamic_shapes=tuple(dynamic for _ in sequences))
    other = tuple(x[:, :4] for x in acceptance.sequences(9, torch.float64))
    # The exported module returns torch.fx's own kind of dict.
    assert_close_leaves(pytree.tree_leaves(program.module()(*other)), pytree.tree_leaves(net(*other)))


def test_compiled_evaluation_ignores_chunks_and_stays_one_graph() -> None:
    acceptance = ACCEPTANCE["csnn"]
    net = snnfx.convert(acceptance.make().eval(), chunk=2)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    sequences = acceptance.sequences(6)
    with torch.no_grad():
        assert_close_leaves(compiled(*sequences), net(*sequences), 1e-5)
    assert counter.frame_count == 1


def test_state_goes_through_a_compiled_run() -> None:
    acceptance = ACCEPTANCE["recurrent"]
    net = snnfx.convert(acceptance.make().double())
    compiled = torch.compile(net.run, fullgraph=True, backend="aot_eager")
    (x_seq,) = acceptance.sequences(6, torch.float64)
    first, state = compiled(x_seq[:3])
    second, state = compiled(x_seq[3:], state=state)
    whole, final = net.run(x_seq)
    assert_close_leaves(torch.cat([first, second]), whole)
    assert_close_leaves(state, final)


def test_a_mapped_region_may_hand_on_its_argument_and_its_gradient() -> None:
    class AddsGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 4), snnfx.neuron.LIFNode(tau=2.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            rows = torch.stack(torch.meshgrid(torch.arange(y.shape[1]), torch.arange(1), indexing="ij"), 0)
            return self.lif(y + rows.view(2, 1, 4)[0].to(y))

    x_seq = torch.rand(5, 2, 4)
    net = snnfx.convert(AddsGrid(), example_inputs=x_seq[0])
    assert "map" in [region.kind for region in net.regions]
    expected = torch.autograd.grad(net(x_seq).sum(), list(net.parameters()))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    for a, e in zip(torch.autograd.grad(compiled(x_seq).sum(), list(net.parameters())), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.skipif(not has("norse"), reason="norse is not installed")
@pytest.mark.parametrize("cell", ["LIFCell", "LIFRecurrentCell", "LILinearCell", "LSNNRecurrentCell"])
def test_cells_with_tensors_of_their_own_compile(cell: str) -> None:
    import norse.torch

    made = norse.torch.LIFCell() if cell == "LIFCell" else getattr(norse.torch, cell)(4, 4)
    model = norse.torch.SequentialState(nn.Linear(4, 4), made).double()
    x_seq = 30 * torch.rand(5, 2, 4, dtype=torch.float64)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)

    def found_by(run: Any) -> list[Tensor]:
        y_seq, _ = run(x_seq)
        return [y_seq.detach(), *torch.autograd.grad(y_seq.square().sum(), list(model.parameters()))]

    for a, e in zip(found_by(compiled), found_by(net), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


class Permuted(nn.Module):
    """The loop reads a sequence whose memory is in another order, as behind a Conv1d over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.permute(1, 2, 0)).permute(2, 0, 1)
        u, outputs = torch.zeros_like(h[0]), []
        for t in range(h.shape[0]):
            u = 0.6 * u + torch.tanh(h[t])
            outputs.append(u)
        return torch.stack(outputs).cumsum(0)


def test_gradients_of_a_permuted_sequence() -> None:
    torch.manual_seed(0)
    model, x = Permuted(), torch.rand(8, 3, 5, requires_grad=True)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    compiled = torch.compile(net, fullgraph=True)
    wanted = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    found = torch.autograd.grad(compiled(x).sum(), [x, *model.parameters()])
    torch.testing.assert_close(found, wanted)
