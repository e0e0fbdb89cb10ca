"""The default call of `snnfx.verify` passes right nets, whatever the seed; their neurons fire."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import snnfx
from snnfx.errors import VerificationError
from snnfx.inspect.verify.verification_report import VerificationReport
from support.firing_nets import NETS, firing_net

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::snnfx.errors.SnnfxWarning")


def silent_layers(report: VerificationReport) -> list[str]:
    return [note for note in report.notes if note.startswith("warning")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", range(2))
def test_right_nets_pass(name: str, training: bool, seed: int) -> None:
    model, x_seq = firing_net(name, seed)
    net = snnfx.convert(model, example_inputs=x_seq[0]).train(training)
    assert not silent_layers(snnfx.verify(model, net, x_seq))


@pytest.mark.parametrize("name", NETS)
def test_nets_with_one_changed_weight_fail(name: str) -> None:
    model, x_seq = firing_net(name, 0)
    wrong, _ = firing_net(name, 0)
    with torch.no_grad():
        next(m for m in wrong.modules() if isinstance(m, nn.Conv2d | nn.Linear)).weight[0] *= 1.01
    net = snnfx.convert(wrong, example_inputs=x_seq[0])
    with pytest.raises(VerificationError):
        snnfx.verify(model, net, x_seq)


@pytest.mark.parametrize("checkpoint", ["regions", "selective"])
def test_verify_before_the_first_call_of_a_net_that_recomputes(checkpoint: str) -> None:
    """The forms that recompute are made during the check and stay usable behind it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), snnfx.neuron.LIFNode()).double()
    net = snnfx.convert(model, checkpoint=checkpoint)
    x_seq = torch.rand(4, 3, 4, dtype=torch.float64) * 3
    snnfx.verify(model, net, x_seq)
    x_seq.requires_grad_()
    net(x_seq).sum().backward()
    assert x_seq.grad is not None
    snnfx.verify(model, net, x_seq.detach())
