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
