"""reduce="mean" | "sum" | "last": the same as reducing the sequence afterwards, with the tail run once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from support.nets import ACCEPTANCE
from support.stepping import assert_close_leaves

REDUCTIONS = {"mean": lambda y: y.mean(0), "sum": lambda y: y.sum(0), "last": lambda y: y[-1]}
SMALL = [name for name, net in ACCEPTANCE.items() if net.package == "torch"]


def readout_net() -> nn.Module:
    """A neuron followed by an affine read-out of two layers."""
    return nn.Sequential(
        nn.Linear(4, 6), snnfx.neuron.LIFNode(), nn.Linear(6, 5), nn.Unflatten(1, (5, 1)), nn.Flatten(), nn.Linear(5, 3)
    )


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_reduced_net_equals_reducing_afterwards(name: str, reduce: str, training: bool) -> None:
    acceptance = ACCEPTANCE[name]
    model = without_dropout(acceptance.make().double().train(training))
    example = acceptance.example(torch.float64)
    sequences = [x.requires_grad_() for x in acceptance.sequences(5, torch.float64)]
    whole = snnfx.convert(model, example_inputs=example)
    reduced = snnfx.convert(model, example_inputs=example, reduce=reduce)
    expected = pytree.tree_map(REDUCTIONS[reduce], whole(*sequences))
    actual = reduced(*sequences)
    assert_close_leaves(actual, expected)

    def gradients(outputs: object) -> list[Tensor]:
        loss = sum(y.sin().sum() for y in pytree.tree_leaves(outputs))
        parameters = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [*sequences, *parameters], allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in found]

    assert_close_leaves(gradients(actual), gradients(expected))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_verify_reduces_the_model_s_outputs_too(reduce: str) -> None:
    model = readout_net().double()
    x_seq = torch.rand(5, 2, 4, dtype=torch.float64) * 3
    snnfx.verify(model, snnfx.convert(model, reduce=reduce), x_seq)
    with pytest.raises(snnfx.errors.VerificationError, match="SNNFX401"):
        wrong = snnfx.convert(model, reduce="sum" if reduce != "sum" else "mean")
        wrong.options = snnfx.convert(model, reduce=reduce).options
        snnfx.verify(model, wrong, x_seq)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_the_affine_tail_runs_once(reduce: str) -> None:
    net = snnfx.convert(readout_net(), reduce=reduce)
    assert [region.kind for region in net.regions] == ["fold", "loop", "once"]
    calls: list[torch.Size] = []
    net.source[5].register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    net(torch.rand(7, 2, 4))
    assert calls == [torch.Size([2, 5])]


def test_a_nonlinear_tail_is_not_sunk_under_a_mean_but_is_under_the_last_step() -> None:
    def model() -> nn.Module:
        return nn.Sequential(snnfx.neuron.LIFNode(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    mean, last = snnfx.convert(model(), reduce="mean"), snnfx.convert(model(), reduce="last")
    assert [region.kind for region in mean.regions] == ["loop", "fold", "once"]
    assert [region.kind for region in last.regions] == ["loop", "once"]


def test_a_value_that_a_state_needs_is_not_sunk() -> None:
    class Feedback(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_memory("last", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x + self.last)
            self.last = y
            return y

    model = Feedback().double()
    x_seq = torch.rand(4, 2, 3, dtype=torch.float64)
    assert_close_leaves(snnfx.convert(model, reduce="mean")(x_seq), snnfx.convert(model)(x_seq).mean(0))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_chunks_and_streams_combine(reduce: str, k: int) -> None:
    model = readout_net().double().eval()
    x_seq = torch.rand(7, 2, 4, dtype=torch.float64) * 3
    expected = REDUCTIONS[reduce](snnfx.convert(model)(x_seq))
    with torch.no_grad():
        assert_close_leaves(snnfx.convert(model, reduce=reduce, chunk=k)(x_seq), expected)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_first_step_of_its_own_is_counted(reduce: str) -> None:
    class FirstIsDifferent(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("h", None)

        def forward(self, x: Tensor) -> Tensor:
            self.h = x if self.h is None else torch.tanh(x + self.h)
            return self.h * 2

    model = FirstIsDifferent().double()
    for T in (1, 2, 5):
        x_seq = torch.rand(T, 2, 3, dtype=torch.float64)
        assert_close_leaves(snnfx.convert(model, reduce=reduce)(x_seq), REDUCTIONS[reduce](snnfx.convert(model)(x_seq)))


def test_time_last_outputs_lose_the_time_dimension() -> None:
    model = readout_net().double()
    x = torch.rand(2, 4, 6, dtype=torch.float64)
    assert_close_leaves(
        snnfx.convert(model, time_dim=-1, reduce="mean")(x), snnfx.convert(model, time_dim=-1)(x).mean(-1)
    )


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(snnfx.errors.InputError, match="(?s)SNNFX309.*'mean', 'sum', 'last'"):
        snnfx.convert(readout_net(), reduce="max")


def test_a_value_that_was_sunk_cannot_be_recorded() -> None:
    net = snnfx.convert(readout_net(), reduce="mean")
    with pytest.raises(snnfx.errors.InputError, match="SNNFX311"):
        net.run(torch.rand(3, 2, 4), record=("5",))
