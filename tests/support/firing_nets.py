"""Deep spiking networks whose neurons fire in every layer, written for snnfx, snnTorch, SpikingJelly and Norse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import snnfx

__all__ = ["NETS", "firing_net"]


def _layers(depth: int, neuron: Callable[[], nn.Module], norm: bool = False) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for k in range(depth):
        layers.append(nn.Conv2d(2 if k == 0 else 4, 4, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(4)] if norm else []
        layers.append(neuron())
    return [*layers, nn.Flatten(), nn.Linear(4 * 6 * 6, 3)]


def _lif() -> nn.Module:
    return snnfx.neuron.LIFNode(tau=2.0, v_threshold=0.3)


def conv6() -> nn.Module:
    return nn.Sequential(*_layers(6, _lif))


def conv10_batch_norm() -> nn.Module:
    return nn.Sequential(*_layers(10, _lif, norm=True))


class Residual(nn.Module):
    """Four residual blocks with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(2, 4, 3, padding=1), _lif()
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), _lif()]) for _ in range(4)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        for conv, norm, neuron in self.blocks:
            x = x + neuron(norm(conv(x)))
        return self.head(x.mean((2, 3)))


class Recurrent(snnfx.MemoryModule):
    """Spikes of the previous step feed back into the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.first = nn.Linear(72, 12), _lif()
        self.back, self.second, self.head = nn.Linear(12, 12), _lif(), nn.Linear(12, 3)
        self.register_memory("spikes", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        current = self.encode(x.flatten(1))
        if isinstance(self.spikes, Tensor):
            current = current + self.back(self.spikes)
        else:
            current = current + self.back(torch.zeros_like(current))
        self.spikes = self.first(current)
        return self.head(self.second(self.spikes * 1.5))


def snntorch_net() -> nn.Module:
    import snntorch

    return nn.Sequential(*_layers(4, lambda: snntorch.Leaky(beta=0.8, threshold=0.3, init_hidden=True), norm=True))


def spikingjelly_net() -> nn.Module:
    from spikingjelly.activation_based import neuron

    return nn.Sequential(*_layers(4, lambda: neuron.LIFNode(tau=2.0, v_threshold=0.3), norm=True))


class NorseNet(nn.Module):
    """State in arguments."""

    def __init__(self) -> None:
        super().__init__()
        import norse.torch as norse

        parameters = norse.LIFParameters(v_th=torch.tensor(0.05))
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.lif1, self.lif2 = norse.LIFCell(parameters), norse.LIFCell(parameters)
        self.head = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        first, second = (None, None) if state is None else state
        x, first = self.lif1(self.conv1(x), first)
        x, second = self.lif2(self.conv2(x), second)
        return self.head(x.flatten(1)), (first, second)


NETS: dict[str, Callable[[], nn.Module]] = {
    "conv6": conv6,
    "conv10 BatchNorm": conv10_batch_norm,
    "residual": Residual,
    "recurrent": Recurrent,
    "snnTorch": snntorch_net,
    "SpikingJelly": spikingjelly_net,
    "Norse": NorseNet,
}


def _amplify(model: nn.Module) -> None:
    """Scale the weights so that the spikes of a layer make the next layer spike."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(2.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.bias.fill_(0.4)  # in evaluation, the running statistics do not scale the currents up


def firing_net(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A net with random weights, and an input `[T, N, 2, 6, 6]` that makes every layer fire."""
    torch.manual_seed(seed)
    model = NETS[name]()
    _amplify(model)
    return model, 2 * torch.rand(6, 2, 2, 6, 6)
