"""`snnfx.verify` on models that draw random numbers: net and model draw the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfx
from snnfx.errors import VerificationError
from support.spikes import Spike

torch.set_num_threads(1)

DROPOUTS: list[Callable[[Tensor], Tensor]] = [
    nn.Dropout(0.5),
    lambda x: F.dropout(x, 0.5),
    lambda x: F.dropout(x),
    lambda x: F.dropout(x.clone(), 0.5, True, True),
    lambda x: F.dropout1d(x, 0.5),
    lambda x: F.dropout2d(x.unsqueeze(-1), p=0.5).squeeze(-1),
    lambda x: F.dropout3d(x[..., None, None]).squeeze(-1).squeeze(-1),
    lambda x: F.alpha_dropout(x, 0.5, True),
    lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    lambda x: torch.dropout(x, 0.5, True),
    lambda x: torch.dropout(x, p=0.5, train=True),
    lambda x: torch.feature_dropout(x, 0.5, True),
    lambda x: torch.native_dropout(x, 0.5, True)[0],
    lambda x: torch.ops.aten.dropout.default(x, 0.5, True),
]


class Dropping(nn.Module):
    """A random function between layers, its input not in place."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.bn, self.function, self.lif = (
            nn.Linear(5, 6),
            nn.BatchNorm1d(6),
            function,
            snnfx.neuron.LIFNode(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.function(3 * self.bn(self.fc1(x))) * 2)


@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
@pytest.mark.parametrize("index", range(len(DROPOUTS)))
def test_every_kind_of_dropout_drops_the_same_elements(index: int, batch_norm: str) -> None:
    torch.manual_seed(0)
    model = Dropping(DROPOUTS[index])
    net = snnfx.convert(model, batch_norm=batch_norm, example_inputs=torch.rand(4, 5))
    report = snnfx.verify(model, net, torch.rand(6, 4, 5))
    assert any("drew the same random numbers" in note for note in report.notes)


class NoisyNeuron(snnfx.MemoryModule):
    """Noise on the input and a random spike."""

    def __init__(self) -> None:
        super().__init__()
        self.register_memory("v", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v * 0.5 + x + 0.1 * torch.randn_like(x)
        spike = Spike.apply(torch.sigmoid(v - 1) - torch.rand_like(v))
        self.v = v - spike
        return spike


class Encoder(nn.Module):
    """Bernoulli spikes from an intensity, or a comparison with uniform noise."""

    def __init__(self, compares: bool) -> None:
        super().__init__()
        self.compares = compares

    def forward(self, x: Tensor) -> Tensor:
        x = x.clamp(0, 1)
        return (torch.rand_like(x) < x).to(x) if self.compares else torch.bernoulli(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(5, 5), NoisyNeuron(), nn.Linear(5, 5), NoisyNeuron()),
        lambda: nn.Sequential(Encoder(True), nn.Linear(5, 5), snnfx.neuron.LIFNode(), nn.Dropout(0.3), nn.Linear(5, 3)),
        lambda: nn.Sequential(Encoder(False), nn.Dropout(0.2), nn.Linear(5, 5), NoisyNeuron()),
    ],
)
@pytest.mark.parametrize("double", [False, True])
def test_stochastic_neurons_and_encoders_can_be_verified(make: Any, double: bool) -> None:
    torch.manual_seed(0)
    model, x_seq = make(), torch.rand(6, 4, 5)
    before = torch.get_rng_state()
    report = snnfx.verify(model, snnfx.convert(model), x_seq, double=double)
    assert any("drew the same random numbers" in note for note in report.notes)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_distribution_that_cannot_be_shared_is_refused() -> None:
    class Poisson(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.poisson(x)

    model = nn.Sequential(Poisson(), nn.Linear(5, 3))
    with pytest.raises(VerificationError, match=r"SNNFX411.*torch\.poisson"):
        snnfx.verify(model, snnfx.convert(model), torch.rand(6, 4, 5))


@pytest.mark.parametrize("double", [False, True])
def test_attention_without_dropout_draws_no_numbers(double: bool) -> None:
    attention = nn.TransformerEncoderLayer(4, 1, dim_feedforward=4, dropout=0.0, batch_first=True)
    model = nn.Sequential(attention, nn.Dropout(0.3))
    torch.manual_seed(0)
    report = snnfx.verify(model, snnfx.convert(model), torch.rand(3, 2, 3, 4), double=double)
    assert any("drew the same random numbers" in note for note in report.notes)


class Unused(nn.Module):
    """A dropout whose result nothing uses, or one that the output depends on."""

    def __init__(self, is_used: bool, drops: bool = True) -> None:
        super().__init__()
        self.fc, self.dropout, self.is_used, self.drops = nn.Linear(5, 5), nn.Dropout(0.5), is_used, drops

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x) if self.drops else x
        return self.fc(dropped if self.is_used else x)


def test_draws_without_an_effect_may_be_left_out() -> None:
    model = Unused(is_used=False)
    report = snnfx.verify(model, snnfx.convert(model), torch.rand(6, 4, 5))
    assert any("the net leaves out the draws of `dropout`" in note for note in report.notes)


def test_draws_with_an_effect_may_not_be_left_out() -> None:
    model, wrong = Unused(is_used=True), Unused(is_used=True, drops=False)
    wrong.load_state_dict(model.state_dict())
    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(model, snnfx.convert(wrong), torch.rand(6, 4, 5))


class TwoDraws(nn.Module):
    """Two places that draw numbers of the same distribution and shape, in either order."""

    def __init__(self, is_swapped: bool = False) -> None:
        super().__init__()
        self.is_swapped = is_swapped

    def forward(self, x: Tensor) -> Tensor:
        first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
        return second + 10 * first if self.is_swapped else first + 10 * second


def test_one_assignment_of_draws_holds_for_all_passes() -> None:
    x_seq, model = torch.rand(4, 2, 6), TwoDraws()
    swapped = snnfx.convert(TwoDraws(is_swapped=True))
    snnfx.verify(model, swapped, x_seq)  # the places are interchangeable

    class Inconsistent(nn.Module):
        """Swaps the places in a call without a record of its state only."""

        def __init__(self) -> None:
            super().__init__()
            self.net, self.source, self.options = snnfx.convert(model), model, swapped.options
            self.program, self.regions = self.net.program, self.net.regions

        def run(self, *args: Any, **kwargs: Any) -> Any:
            return self.net.run(*args, **kwargs)

        def forward(self, *args: Any) -> Any:
            return swapped(*args)

        def __deepcopy__(self, memo: dict[int, Any]) -> Inconsistent:
            return self

    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(model, Inconsistent(), x_seq.double())
