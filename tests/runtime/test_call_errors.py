"""Errors of calls name the object, the cause and a way out that works."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError

X_SEQ = torch.rand(5, 2, 3)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), neuron.LIFNode(tau=2.0), nn.Linear(4, 2)).eval()


def test_hint_lists_the_names_that_can_be_recorded() -> None:
    net = snnfx.convert(small_model())
    with pytest.raises(InputError, match="SNNFX311 cannot record `9`: the step has no module or slot") as raised:
        net.run(X_SEQ, record="9")
    names = raised.value.hint.removeprefix("Record any of ").rstrip(".").split(", ")
    assert "1" in names and "1.v" in names
    assert list(net.run(X_SEQ, record=names)[2]) == names


def test_single_step_net_refuses_record_and_stream() -> None:
    single = snnfx.convert(small_model(), step_mode="s")
    with pytest.raises(InputError, match='SNNFX311 record= is not available with step_mode="s"'):
        single.run(X_SEQ[0], record="1.v")
    with pytest.raises(InputError, match='SNNFX309 a net with step_mode="s" cannot stream') as raised:
        single.stream([X_SEQ])
    assert 'step_mode="m"' in raised.value.hint
    assert len(list(single.convert_to("m").stream([X_SEQ]))) == 1


def test_recording_a_node_after_the_reduction_names_it() -> None:
    net = snnfx.convert(small_model(), reduce="mean")
    with pytest.raises(InputError, match="SNNFX311 `2` has no value per time step to record") as raised:
        net.run(X_SEQ, record=("1", "2"))
    assert "reduce='mean'" in raised.value.why
    assert net.run(X_SEQ, record="1")[2]["1"].shape == (5, 2, 4)


def test_incomplete_state_names_the_missing_slots() -> None:
    model = nn.Sequential(neuron.LIFNode(), neuron.LIFNode()).eval()
    single = snnfx.convert(model, step_mode="s")
    _, state = single.run(X_SEQ[0])
    with pytest.raises(InputError, match=r"SNNFX308 .*missing \['1.v'\]"):
        single.run(X_SEQ[0], state={"0.v": state["0.v"]})
    single.run(X_SEQ[0], state=state)


def test_missing_number_of_time_steps_has_a_hint_that_works() -> None:
    net = snnfx.convert(small_model(), time_dim=None)
    with pytest.raises(InputError, match="SNNFX310 no input has a time dimension") as raised:
        net(X_SEQ[0])
    assert raised.value.hint == "Pass the number of time steps: net(x, T=8)."
    assert net(X_SEQ[0], T=8).shape == (8, 2, 2)


def test_record_says_that_it_ignores_the_checkpoint_option() -> None:
    net = snnfx.convert(small_model(), checkpoint=2)
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX508 checkpoint= and memory_budget= are ignored"):
        net.run(X_SEQ.clone().requires_grad_(), record="1.v")


@pytest.mark.parametrize("checkpoint", [None, 2])
def test_plan_names_the_option_that_made_it(checkpoint: int | None) -> None:
    net = snnfx.convert(small_model(), checkpoint=checkpoint)
    assert f"(checkpoint={checkpoint})" in net._execution.plans._make_recompute_plan(5, [X_SEQ], None).reason
