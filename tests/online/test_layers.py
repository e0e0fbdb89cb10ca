"""Gradients that are exact in each layer and spatial between layers, against forward mode layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx.errors import InputError
from snnfx.neuron import AdaptiveLIFNode, CUBALIFNode, LIFNode, ParametricLIFNode
from snnfx.online import BPTT, OSTL, OTTT_A, Rule
from support.online_models import Graph, N, close, dense_net, differ, sequences
from support.online_oracles import PlainLIF, PlainReadout, RecurrentLIF, TriangleSpike, bptt, mse, ostl
from support.online_training import Trained, batch_norm_net, same


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


class LearnedLeak(nn.Module):
    """A neuron with a leak that is learned and a reset that hands gradients on."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.4))
        self.v: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        u = torch.sigmoid(self.w) * self.v + x
        spike = TriangleSpike.apply(u - 0.8)
        self.v = u - 0.8 * spike
        return spike


class TwoLeaks(nn.Module):
    """A current and a potential, and a threshold that rises with every spike: three states."""

    def __init__(self) -> None:
        super().__init__()
        self.i: Tensor | float = 0.0
        self.v: Tensor | float = 0.0
        self.b: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.i = 0.5 * self.i + x
        u = 0.8 * self.v + self.i
        spike = TriangleSpike.apply(u - 0.8 - 0.3 * self.b)
        self.b = 0.9 * self.b + spike
        self.v = u * (1 - spike)
        return spike


def dense(neuron: Callable[[], nn.Module]) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), neuron(), nn.Linear(4, 3), neuron(), nn.Linear(3, 2))
    for layer in (0, 2):
        nn.init.normal_(model[layer].weight, 0.3, 0.5)
    return model


def recurrent() -> nn.Sequential:
    model = nn.Sequential(RecurrentLIF(3, 4, 0.8), nn.Linear(4, 3), PlainLIF(0.7), nn.Linear(3, 2), PlainReadout(0.9))
    nn.init.normal_(model[0].inp.weight, 0.4, 0.5)
    nn.init.normal_(model[1].weight, 0.4, 0.5)
    return model


class Skipping(nn.Module):
    """Spikes of the first layer also reach the current of the third one, and its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.n1, self.n2, self.n3 = TwoLeaks(), PlainLIF(0.6, 0.7, detach_reset=False), LearnedLeak()
        for layer in (self.a, self.b, self.c):
            nn.init.normal_(layer.weight, 0.3, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.n1(self.a(x))
        second = self.n2(self.b(first))
        return self.n3(self.c(second) + first) + first


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], int]] = {
    "learned leak": (lambda: dense(LearnedLeak), ("1", "3"), 2),
    "three states": (lambda: dense(TwoLeaks), ("1", "3"), 2),
    "reset not detached": (lambda: dense(lambda: PlainLIF(0.7, 0.6, detach_reset=False)), ("1", "3"), 2),
    "recurrent": (recurrent, ("0", "2", "4"), 2),
    "skipping": (Skipping, ("n1", "n2", "n3"), 4),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_exact_in_each_layer(case: str) -> None:
    make, neurons, out = CASES[case]
    model = make()
    x_seq, target = sequences(out, 3)
    x_seq, target = x_seq[:5], target[:5]
    expected = ostl(model, neurons, x_seq, target, mse, 1 / 5)
    through_time = bptt(model, x_seq, target, mse, 1 / 5).gradients
    first = next(iter(expected))
    assert differ(expected[first], through_time[first])
    for chunk in (None, 3):
        found = Trained(model, OSTL, x_seq, target, chunk=chunk)
        same(found.gradients, expected)


def test_a_graph_of_convolutions_and_pools() -> None:
    model = Graph()
    x_seq, target = sequences(4, 1, 8, 8)
    expected = Trained(model, OTTT_A(trace_inputs=True, trace_bias=True), x_seq, target).gradients
    for chunk in (None, 2):
        same(Trained(model, OSTL, x_seq, target, chunk=chunk).gradients, expected)


def test_with_one_leak_and_the_reset_detached_it_is_ottt_with_everything_traced() -> None:
    model = dense_net((0.5, 0.7, 0.6))
    x_seq, target = sequences(3, 5)
    traced = Trained(model, OTTT_A(trace_inputs=True, trace_bias=True), x_seq, target)
    found = Trained(model, OSTL, x_seq, target, chunk=2)
    same(found.gradients, traced.gradients)
    close(found.result.outputs, traced.result.outputs)
    close(found.result.loss, traced.result.loss)


@pytest.mark.parametrize(
    "neuron",
    [
        lambda: LIFNode(tau=2.0, v_threshold=0.4),
        lambda: ParametricLIFNode(init_tau=3.0, v_threshold=0.4),
        lambda: CUBALIFNode(c_decay=0.5, v_decay=0.75, v_threshold=0.4),
        lambda: AdaptiveLIFNode(tau=4.0, v_threshold=0.4),
    ],
    ids=["LIF", "parametric", "two leaks", "adaptive"],
)
def test_with_one_layer_it_is_bptt(neuron: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), neuron(), nn.Linear(5, 3))
    nn.init.normal_(model[0].weight, 0.4, 0.5)
    x_seq, target = sequences(3, 4)
    expected = Trained(model, BPTT, x_seq, target).gradients
    for chunk in (None, 2):
        same(Trained(model, OSTL, x_seq, target, chunk=chunk).gradients, expected)


def test_running_statistics_and_random_numbers_are_those_of_one_run() -> None:
    model = nn.Sequential(batch_norm_net(), nn.Dropout(0.5), nn.Linear(3, 2, bias=False))
    x_seq, target = sequences(2, 1, 8, 8)
    runs = []
    for rule, chunk in ((BPTT, None), (OSTL, None), (OSTL, 2)):
        torch.manual_seed(3)
        run = Trained(model, rule(loss_scale="sum"), x_seq, target, lambda y, target: y.sum(), chunk=chunk)
        close((run.gradients["2.weight"] * model[2].weight).sum().detach(), run.result.outputs.sum())
        runs.append(run)
    close(runs[0].result.outputs, runs[1].result.outputs)
    for run in runs[1:]:
        same(dict(run.model.named_buffers()), dict(runs[0].model.named_buffers()))


class Delayed(nn.Module):
    """What the first layer fires reaches the second one a step later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n1, self.n2 = nn.Linear(4, 5), nn.Linear(5, 3), PlainLIF(0.6), PlainLIF(0.7)
        nn.init.normal_(self.a.weight, 0.4, 0.5)
        nn.init.normal_(self.b.weight, 0.4, 0.5)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        spike = self.n1(self.a(x))
        before = torch.zeros_like(spike) if self.last is None else self.last
        self.last = spike
        return self.n2(self.b(before))


def test_no_error_goes_back_to_an_earlier_step_of_another_layer() -> None:
    model = Delayed()
    x_seq, target = sequences(3, 4)
    found = Trained(model, OSTL, x_seq, target).gradients
    assert not found["a.weight"].any()
    close(found["b.weight"], Trained(model, BPTT, x_seq, target).gradients["b.weight"])


def test_inputs_that_are_the_same_at_every_step_and_several_outputs() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.lif, self.fc = nn.Linear(5, 4), nn.Linear(2, 4), LearnedLeak(), nn.Linear(4, 3)

        def forward(self, x: Tensor, image: Tensor) -> dict[str, Tensor]:
            spike = self.lif(self.a(x) + self.b(image))
            return {"spike": spike, "y": self.fc(spike)}

    model = TwoInputs()
    x_seq, target = sequences(3, 5)
    net = snnfx.convert(model, time_dim=(-1, None))
    args = (x_seq.movedim(0, -1), torch.rand(N, 2))

    def loss(y: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(y["y"], target) + y["spike"].mean()

    runs = [Trained(net, rule, args, target, loss) for rule in (OSTL, BPTT)]  # type: ignore[arg-type]
    same(runs[0].gradients, runs[1].gradients)


def test_choices_that_contradict_it_are_refused() -> None:
    for fields in ({"cut": "spiking"}, {"operand": "trace"}, {"random_steps": 2}):
        with pytest.raises(InputError, match="SNNFX616"):
            Rule(temporal="layer", **fields)  # type: ignore[arg-type]
