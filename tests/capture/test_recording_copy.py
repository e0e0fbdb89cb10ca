"""Capture traces a copy: its code sees the classes of the user, and a net refers to the user's objects."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.capture.recording_copy import is_recording_module


class ComparesClasses(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc = how, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.fc
        is_linear = {
            "is": lambda: type(layer) is nn.Linear,
            "==": lambda: type(layer) == nn.Linear,  # noqa: E721
            "in": lambda: type(layer) in (nn.Conv2d, nn.Linear),
            "key": lambda: {nn.Linear: True}.get(type(layer), False),
            "type of a class": lambda: type(nn.Linear) is type and isinstance(nn.Linear, type),
            "new class": lambda: type("Made", (), {"a": 1}).a == 1,
        }
        return layer(x) if is_linear[self.how]() else x


@pytest.mark.parametrize("how", ["is", "==", "in", "key", "type of a class", "new class"])
def test_class_of_a_module_is_the_class_of_the_user(how: str) -> None:
    model, x_seq = ComparesClasses(how), torch.rand(3, 2, 4)
    torch.testing.assert_close(snnfx.convert(model, example_inputs=(x_seq[0],))(x_seq), model.fc(x_seq))
    assert "type" not in globals()


class ReadsObjects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.lif = snnfx.neuron.LIFNode()
        self.layers = [self.fc]
        self.apply_layers = lambda x: self.layers[0](x) * self.scales[0]
        self.scales = [torch.tensor(2.0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.apply_layers(x))


def test_guards_of_a_net_hold_for_the_model_of_the_user() -> None:
    model, x_seq = ReadsObjects(), torch.rand(3, 2, 4)
    net = snnfx.convert(model, example_inputs=(x_seq[0],))
    assert net.program.source is model
    assert all(guard.holds(model) for guard in net.program.guards.reads)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x_seq)


def living_modules() -> list[nn.Module]:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `isinstance` imports deprecated names of torch
        return [o for o in gc.get_objects() if isinstance(o, nn.Module)]


def test_a_net_refers_to_no_module_of_the_copy() -> None:
    before = living_modules()  # errors of other tests may keep copies alive
    net = snnfx.convert(ReadsObjects(), example_inputs=(torch.rand(2, 4),))
    known = set(map(id, before))
    modules = [module for module in living_modules() if id(module) not in known]
    assert any(module is net for module in modules)
    assert not any(map(is_recording_module, modules))
