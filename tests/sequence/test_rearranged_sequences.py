"""Models that fold time into the batch by helpers: einops, sizes divided by sizes, functions found by type."""

from __future__ import annotations

from collections.abc import Callable

import einops
import pytest
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn

import snnfx
from snnfx.errors import SnnfxWarning
from support.looped_models import assert_converts_sequence
from support.published_styles import LoopNeuron


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.neuron = nn.Linear(5, 6), nn.BatchNorm1d(6), LoopNeuron(0)


class Rearranged(Body):
    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[0]
        y = self.norm(self.linear(einops.rearrange(x, "t b c -> (t b) c")))
        return self.neuron(einops.rearrange(y, "(t b) c -> t b c", t=T))


class BatchFirst(Body):
    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(einops.rearrange(x, "b t c -> (t b) c"))
        y = self.neuron(einops.rearrange(y, "(t b) c -> t b c", b=x.size(0)))
        return einops.rearrange(y, "t b c -> b t c")


class Layers(Body):
    def __init__(self) -> None:
        super().__init__()
        self.fold = nn.Sequential(Rearrange("t b c -> (t b) c"), self.linear, self.norm)

    def forward(self, x: Tensor) -> Tensor:
        y = einops.rearrange(self.fold(x), "(t b) (h c) -> t b h c", t=len(x), h=2)
        return einops.reduce(self.neuron(y), "t b h c -> t b c", "mean")


class Repeated(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.linear(einops.repeat(x, "b c -> t b c", t=4))).mean(0)


class Divided(Body):
    def forward(self, x: Tensor) -> Tensor:
        T, folded = x.shape[0], x.flatten(0, 1)
        y = self.linear(folded)
        return self.neuron(y.view(T, y.shape[0] // T, 6))


class Multiplied(Body):
    def forward(self, x: Tensor) -> Tensor:
        T, B, C = x.shape
        rows = T * B
        y = self.linear(x.reshape(rows, C))
        return self.neuron(y.reshape(rows // B, rows // T, -1))


WITH_STEP: dict[str, Callable[[], nn.Module]] = {
    "rearrange": Rearranged,
    "layers": Layers,
    "a size divided by T": Divided,
    "a size divided by N": Multiplied,
}


@pytest.mark.parametrize("name", WITH_STEP)
def test_folded_sequences_have_a_step_form(name: str) -> None:
    torch.manual_seed(0)
    shapes = [(4, 3, 5), (7, 3, 5), (3, 2, 5)]
    first, *others = [(sequence(*shape),) for shape in shapes]
    net = assert_converts_sequence(WITH_STEP[name](), first, others)
    assert net.program.whole_sequences is None


def test_time_behind_the_batch() -> None:
    torch.manual_seed(0)
    assert_converts_sequence(BatchFirst(), (sequence(3, 4, 5),), [(sequence(3, 7, 5),), (sequence(2, 4, 5),)])


def test_a_repeated_static_input() -> None:
    torch.manual_seed(0)
    assert_converts_sequence(Repeated(), (sequence(3, 5),), [(sequence(2, 5),)])


def test_a_size_that_divides_without_being_a_multiple_has_no_step_form() -> None:
    class Halved(Body):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.shape[0] * x.shape[1]
            return self.neuron(self.linear(x) * (rows // (2 * x.shape[0])))

    torch.manual_seed(0)
    net = assert_converts_sequence(Halved(), (sequence(4, 3, 5),), [(sequence(6, 5, 5),)])
    assert net.program.whole_sequences is not None


FUNCTIONS: dict[type, Callable[[Tensor], Tensor]] = {}


def by_type(x: Tensor) -> Tensor:
    """A function that is registered for the type of its argument at the first call, as libraries do."""
    if type(x) not in FUNCTIONS and isinstance(x, Tensor):
        FUNCTIONS[type(x)] = lambda x: 2 * x
    return FUNCTIONS[type(x)](x)


class ByType(Body):
    def forward(self, x: Tensor) -> Tensor:
        return by_type(self.neuron(self.linear(x)))


@pytest.mark.filterwarnings("error::snnfx.errors.SnnfxWarning")
def test_functions_registered_by_type_are_found_for_tensors() -> None:
    FUNCTIONS.clear()
    model = ByType()
    net = snnfx.convert(model, takes="sequence", example_inputs=(sequence(4, 3, 5).float(),))
    assert list(FUNCTIONS) == [Tensor]
    x = sequence(6, 3, 5).float()
    torch.testing.assert_close(net(x), model(x))
    torch.testing.assert_close(net(x), model(x))


class Scaled(Body):
    """A model without a step form, with a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.options = 0.5, {"bias": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.scale * self.linear(x)).cumsum(0) + self.options["bias"]


def change_scale(model: Scaled) -> None:
    model.scale = 2.0


def change_options(model: Scaled) -> None:
    model.options["bias"] = 3.0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [change_scale, change_options])
def test_whole_sequence_nets_follow_changed_settings(change: Callable[[Scaled], None], training: bool) -> None:
    torch.manual_seed(0)
    model = Scaled().double().train(training)
    net = snnfx.convert(model, takes="sequence", example_inputs=(sequence(4, 3, 5),))
    assert net.program.whole_sequences is not None
    change(model)
    with pytest.warns(SnnfxWarning, match="SNNFX315"):
        net(sequence(4, 3, 5))
    for shape in ((4, 3, 5), (6, 2, 5)):
        torch.testing.assert_close(net(sequence(*shape)), model(sequence(*shape)))
