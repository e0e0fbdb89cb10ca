"""The check in float64: models that cast to float32, and constants that capture rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.emit.emitted_graphs import CONSTANTS
from snnfx.errors import CaptureError, VerificationError
from snnfx.inspect.verify.verification import Verification

torch.set_num_threads(1)


class CastingSpike(torch.autograd.Function):
    """A surrogate whose both passes cast to float32."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0.3).float()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        return gradient.float() / (1 + (3 * v.float()) ** 2)


SPIKES = {
    "function": CastingSpike.apply,
    "to": lambda v: torch.sigmoid(3 * v.to(torch.float32)),
    "type": lambda v: torch.sigmoid(3 * v.type("torch.FloatTensor")),
    "dtype": lambda v: torch.softmax(v, -1, dtype=torch.float32),
}


class Casting(nn.Module):
    def __init__(self, spike: str, is_recurrent: bool) -> None:
        super().__init__()
        self.encode, self.back, self.spike, self.is_recurrent = nn.Linear(3, 4), nn.Linear(4, 4), spike, is_recurrent
        self.v = self.z = None

    def forward(self, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = self.z = torch.zeros(x.shape[0], 4)
        current = self.encode(x)
        if self.is_recurrent:
            current = current + self.back(self.z)
        v = 0.9 * self.v.float() + current.float()
        self.z = SPIKES[self.spike](v)
        self.v = v - self.z
        return self.z * 1.0


@pytest.mark.parametrize("lower", ["auto", None])
@pytest.mark.parametrize("is_recurrent", [False, True])
@pytest.mark.parametrize("spike", SPIKES)
def test_casts_to_float32_are_casts_to_float64_in_both_passes(
    spike: str, is_recurrent: bool, lower: str | None
) -> None:
    torch.manual_seed(0)
    model = Casting(spike, is_recurrent)
    net, x_seq = snnfx.convert(model, lower=lower), 2 * torch.rand(6, 2, 3)
    report = snnfx.verify(model, net, x_seq, double=True)
    assert report.dtype == "float64" and report.largest("gradient") < 1e-12
    assert any(note.startswith("casts to float32 were casts to float64 on both sides") for note in report.notes)
    snnfx.verify(model, net, x_seq)


class Levels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0, 1, 6)


def test_constants_of_a_float32_net_are_computed_anew() -> None:
    report = snnfx.verify(Levels(), snnfx.convert(Levels()), torch.rand(4, 2, 6), double=True)
    assert "constants of the net were computed anew in float64: 1" in report.notes


def test_a_capture_that_fails_in_float64_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise CaptureError("SNNFX201", "the model cannot be traced")

    class Exact(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linspace(0, 1, 5)  # multiples of 1/4 are exact in float32

    net = snnfx.convert(Exact())
    monkeypatch.setattr(Verification, "_captured", fail)
    report = snnfx.verify(Exact(), net, torch.rand(4, 2, 5), double=True)
    reason = "because the model cannot be captured in float64 (the model cannot be traced)"
    assert f"constants of the net keep their rounding, {reason}" in report.notes


@pytest.mark.parametrize("double", [False, True])
def test_a_rounded_constant_of_a_float64_net_is_a_fault(double: bool) -> None:
    class Exact(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.linspace(0, 1, 6, dtype=torch.float64)

    net, x_seq = snnfx.convert(Exact()), torch.rand(4, 2, 6, dtype=torch.float64)
    snnfx.verify(Exact(), net, x_seq, double=double)
    (name,) = net.program.constants
    rounded = net.program.constants[name].float().double()
    for program in net.programs.values():
        program.constants[name] = rounded
    getattr(net, CONSTANTS)._buffers[name] = rounded
    with pytest.raises(VerificationError, match="SNNFX401"):
        snnfx.verify(Exact(), net, x_seq, double=double)


class Wide(nn.Module):
    """Many inputs for each neuron: the error of one weight is small beside the potential."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.neuron = nn.Linear(1000, 8, bias=False), snnfx.neuron.IFNode(v_threshold=1.3, v_reset=None)
        with torch.no_grad():
            self.fc.weight.copy_(multiples(8, 1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.fc(x))


def multiples(*shape: int) -> Tensor:
    return torch.randint(-9, 10, shape) * 0.1


@pytest.mark.parametrize("seed", range(3))
def test_one_slightly_wrong_weight_among_many_is_a_fault(seed: int) -> None:
    torch.manual_seed(seed)
    model, x_seq = Wide(), multiples(6, 4, 1000)
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.fc.weight[seed, 2] += 1e-3
    x_seq[:, :, 2] = 0.9
    snnfx.verify(model, snnfx.convert(model), x_seq)
    net = snnfx.convert(wrong)
    with pytest.raises(VerificationError, match="`neuron.v` differs.*float64|`output` differs"):
        snnfx.verify(model, net, x_seq)
    snnfx.verify(model, net, x_seq, atol=100.0)  # a tolerance of the user's own decides alone


@pytest.mark.parametrize("seed", range(3))
def test_spikes_at_a_threshold_flip_by_rounding_without_a_fault(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        snnfx.neuron.IFNode(v_threshold=0.5, v_reset=None),
    ).eval()
    with torch.no_grad():
        model[0].weight.copy_(multiples(8, 3, 3, 3))
        model[1].running_mean.copy_(multiples(8))
        model[1].running_var.copy_(torch.rand(8) + 0.1)
    x_seq = multiples(6, 2, 3, 6, 6)
    potentials = model[1](model[0](x_seq[0])).detach().flatten()
    model[2].v_threshold = float(potentials[potentials > 0].median())  # a sum that occurs
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = snnfx.verify(model, snnfx.convert(model), x_seq)
    assert (report.flipped_spikes > 0) == ("spikes flip" in str(report))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
