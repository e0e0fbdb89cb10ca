"""`net.history`: the records of passes, emission and recomputation; pictures of stages."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError
from snnfx.ir.program import STAGES


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), neuron.LIFNode(), nn.Linear(4, 2))


def test_emitted_graphs_show_in_the_history() -> None:
    net = snnfx.convert(model())
    emitted = [r.description for r in net.history if r.stage == "emitted"]
    assert emitted[:2] == ["emit{part='main', training=True}", "emit{part='plain', training=True}"]
    assert any("seq_to_ann_forward" in line for line in net.history[-1].diff().splitlines() if line[0] == "+")


def test_recomputation_shows_in_the_history() -> None:
    net = snnfx.convert(model(), checkpoint="regions")
    net(torch.rand(4, 2, 3)).sum().backward()
    names = [r.description.partition("{")[0] for r in net.history]
    assert "group_tiles" in names and "recompute" in names


def test_copies_have_one_record_for_each_emitted_graph() -> None:
    net = snnfx.convert(model())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.convert_to("s").convert_to("m")):
        assert [r.description for r in other.history] == [r.description for r in net.history]


def test_a_diff_has_the_changed_lines_in_colour() -> None:
    record = next(r for r in snnfx.convert(model()).history if r.description.startswith("partition"))
    added = [line for line in record.diff(colour=True).splitlines() if line.startswith("\033[32m+")]
    assert added and all(line.endswith("\033[0m") for line in added)
    assert str(record).startswith("# partition{batch_norm='fold', invariant_inputs=()} (")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_be_drawn(stage: str) -> None:
    net = snnfx.convert(model(), example_inputs=torch.rand(2, 3))
    for other in (net, copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.eval()):
        text = str(snnfx.draw(other, stage=stage))
        assert f"stage {stage}" in text
        assert ("fold_0" in text) == (stage in ("partitioned", "planned"))
    record = next(r for r in net.history if r.description.startswith("normalize"))
    assert "after normalize, stage normalized" in str(snnfx.draw(record))


def test_an_unknown_stage_is_refused() -> None:
    net = snnfx.convert(model())
    with pytest.raises(InputError, match="SNNFX706 no program of stage 'folded'"):
        snnfx.draw(net, stage="folded")
    with pytest.raises(InputError, match="SNNFX706.*the model is not converted"):
        snnfx.draw(model(), stage="planned")
    with pytest.raises(InputError, match="SNNFX706.*emitted graph"):
        snnfx.draw(net.history[-1])
