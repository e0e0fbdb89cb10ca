"""snnTorch's `DeltaLeaky`, whose state is a tuple of two potentials."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("snntorch")

import snntorch

import snnfx
from snnfx import surrogate
from snnfx.errors import CaptureError
from support.stepping import assert_converts, assert_same

if not hasattr(snntorch, "DeltaLeaky"):
    pytest.skip("this snnTorch has no DeltaLeaky", allow_module_level=True)

X_SEQ = torch.rand(6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def delta(**options: Any) -> nn.Module:
    return snntorch.DeltaLeaky(0.2, beta=0.9, spike_grad=surrogate.ATan(), **options)


@pytest.mark.parametrize("options", [{}, {"learn_beta": True}], ids=str)
def test_stored_states(options: dict[str, Any]) -> None:
    net = assert_converts(nn.Sequential(nn.Linear(4, 6), delta(init_hidden=True, **options)).double(), X_SEQ)
    assert [region.kind for region in net.regions] == ["fold", "loop"]


class Passing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(4, 6), delta(), nn.Linear(6, 2)

    def forward(self, x: Tensor, mem: Any = None) -> Any:
        if mem is None:
            mem = self.lif.reset_mem()
        spikes, mem = self.lif(self.fc(x), mem)
        return self.out(spikes), mem


@pytest.mark.parametrize("examples", [None, (X_SEQ[0], None)], ids=["without examples", "with examples"])
def test_passed_states(examples: Any) -> None:
    model = Passing().double()
    mem, outputs = None, []
    for x in X_SEQ:
        y, mem = model(x, mem)
        outputs.append(y)
    y_seq, final = snnfx.convert(model, example_inputs=examples)(X_SEQ)
    assert_same(y_seq, torch.stack(outputs))
    assert_same(final, mem)


def test_a_call_without_the_state_is_refused() -> None:
    with pytest.raises(CaptureError, match="SNNFX211 a DeltaLeaky") as refusal:
        snnfx.convert(nn.Sequential(nn.Linear(4, 6), delta()))
    assert "reset_mem" in refusal.value.hint


def test_carried_states_are_reset() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(4, 6), delta(init_hidden=True)).double(), carry_state=True)
    first = net(X_SEQ)
    assert not torch.equal(net(X_SEQ)[1][0], first[1][0])
    snnfx.functional.reset_net(net)
    assert_same(net(X_SEQ), first)
