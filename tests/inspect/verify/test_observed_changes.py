"""`snnfx.verify` compares everything that the stepped model changes, and changes nothing itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import VerificationError
from snnfx.inspect.verify.observed_contents import changed_names, observe

torch.set_num_threads(1)


class Changing(nn.Module):
    """Changes a buffer by assignment, one in place, statistics, a parameter, and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.lif = snnfx.neuron.LIFNode(v_threshold=0.3)
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("rate", torch.zeros(4))
        self.register_buffer("steps", torch.tensor(0))
        self.trace = torch.zeros(4)
        self.sums = {"x": torch.zeros(4)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif(self.bn(self.fc(x)) * self.gain)
        self.rate = self.rate * 0.9 + y.detach().mean(0) * 0.1
        self.steps += 1
        self.trace = self.trace + y.mean(0)
        self.sums["x"] = self.sums["x"] + x.mean(0)
        with torch.no_grad():
            self.gain.mul_(0.99)
        return y + self.trace


class Broken(nn.Module):
    """A net whose results are changed on purpose: `change(source, outputs, states)` after each run."""

    def __init__(self, net: snnfx.Net, change: Any) -> None:
        super().__init__()
        self.net, self.change, self.options = net, change, net.options

    @property
    def source(self) -> nn.Module:
        return self.net.source

    @property
    def regions(self) -> Any:
        return self.net.regions

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)[0]

    def run(self, *args: Any, **kwargs: Any) -> Any:
        before = {name: x.detach().clone() for name, x in self.source.state_dict().items()}
        y_seq, states, *record = self.net.run(*args, **kwargs)
        states = dict(states)
        self.change(self.source, before, states)
        return (y_seq, states, *record)


@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
def test_a_model_that_changes_much_is_verified(batch_norm: str) -> None:
    torch.manual_seed(0)
    model = Changing()
    net = snnfx.convert(model, batch_norm=batch_norm)
    kept = observe(model)
    x_seq, generators = 3 * torch.rand(5, 3, 4), torch.get_rng_state()
    report = snnfx.verify(model, net, x_seq)
    names = " ".join(c.name for c in report.comparisons)
    for name in ("lif.v", "rate", "steps", "bn.running_mean", "bn.num_batches_tracked", "gain", "trace", "sums.x"):
        assert f"`{name}`" in names
    assert changed_names(kept, observe(model)) == []
    assert torch.equal(torch.get_rng_state(), generators)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "name", ["rate", "steps", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "gain"]
)
def test_a_lost_update_is_named(name: str) -> None:
    def lose(source: nn.Module, before: dict[str, Tensor], states: dict[str, Any]) -> None:
        source.state_dict()[name].data.copy_(before[name])

    torch.manual_seed(0)
    model = Changing()
    with pytest.raises(VerificationError, match=f"`{name}`.*the steps change it, the net does not"):
        snnfx.verify(model, Broken(snnfx.convert(model), lose), 3 * torch.rand(5, 3, 4))


@pytest.mark.parametrize("name", ["trace", "sums.x", "lif.v"])
def test_a_state_of_another_step_is_named(name: str) -> None:
    def shift(source: nn.Module, before: dict[str, Tensor], states: dict[str, Any]) -> None:
        states[name] = states[name] + 0.25

    torch.manual_seed(0)
    model = Changing()
    with pytest.raises(VerificationError, match=f"SNNFX402 state `{name}`"):
        snnfx.verify(model, Broken(snnfx.convert(model), shift), 3 * torch.rand(5, 3, 4))


def test_an_attribute_that_no_step_reads_is_noted() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 4), snnfx.neuron.LIFNode(v_threshold=0.2)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.lif(self.fc(x))
            return self.last

    model = Logging()
    report = snnfx.verify(model, snnfx.convert(model), 3 * torch.rand(5, 3, 4))
    assert "the net does not write `last`, which no step reads before writing it" in report.notes


def test_values_in_containers_and_objects_are_observed() -> None:
    class Plain:
        __slots__ = ("value",)

    model = nn.Linear(1, 1)
    model.plain, model.log, model.layers = Plain(), {"a": [1, (2.0,)]}, [nn.BatchNorm1d(2)]
    model.plain.value = torch.zeros(2)
    before = observe(model)
    model.plain.value = torch.ones(2)
    model.log["a"].append(3)
    model.layers[0].running_mean.add_(1)
    assert changed_names(before, observe(model)) == ["plain.value", "log.a.#", "layers.0.running_mean", "log.a.2"]


def test_code_that_casts_to_float32_is_verified_in_float64() -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.save_for_backward(v)
            return v.gt(0).float()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (v,) = ctx.saved_tensors
            return grad * (v.abs() < 0.5).to(torch.float32)

    class Neuron(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = None

        def forward(self, x: Tensor) -> Tensor:
            v = x if self.v is None else 0.9 * self.v + x
            spike = Spike.apply(v - 1)
            self.v = v * (1 - spike)
            return spike

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Neuron(), nn.Linear(5, 2))
    report = snnfx.verify(model, snnfx.convert(model), 3 * torch.rand(5, 3, 4), double=True)
    assert report.dtype == "float64" and report.largest("gradient") < 1e-12
    assert "casts to float32 were casts to float64 on both sides (" in str(report)


def test_code_that_insists_on_float32_is_named() -> None:
    class Insisting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return 2 * x

    model = nn.Sequential(Insisting())
    with pytest.raises(VerificationError, match=r"SNNFX412 .*test_observed_changes.py:\d+.*float32 only"):
        snnfx.verify(model, snnfx.convert(model), torch.rand(5, 3, 4), double=True)
