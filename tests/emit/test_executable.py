"""An executable runs emitted graphs without a `Net`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import snnfx
from snnfx import neuron
from snnfx.convert import prepare_programs
from snnfx.emit.executable import Executable
from snnfx.ir.options import ConvertOptions
from snnfx.memory.memory_model import model_memory
from snnfx.runtime.source_module import SourceModule

X_SEQ = torch.rand(5, 2, 3)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), neuron.LIFNode(tau=2.0), nn.Linear(4, 2))


def executable_of(model: nn.Module) -> Executable:
    options = ConvertOptions()
    programs, _ = prepare_programs(model, options, X_SEQ[0])
    executable = Executable(SourceModule(model), model, programs, options)
    executable.graphs.emit()
    return executable


@pytest.mark.parametrize("training", [True, False])
def test_plain_graph_runs_on_any_root_module(training: bool) -> None:
    model = small_model().train(training)
    executable = executable_of(model)
    run = executable.graph_runner("plain")
    assert run is not None
    assert torch.equal(run(executable.root, X_SEQ), snnfx.convert(model)(X_SEQ))


def test_the_mode_of_the_model_selects_the_program() -> None:
    model = small_model()
    executable = executable_of(model)
    for training in (True, False, True):
        model.train(training)
        assert executable.training is training
        assert executable.program is executable.programs[training]
        assert executable.region_modules().keys() == {region.name for region in executable.regions}


def test_a_part_that_a_mode_does_not_have_has_no_runner() -> None:
    assert executable_of(small_model()).graph_runner("first") is None


def test_memory_is_predicted_without_a_net() -> None:
    model = small_model()
    net = snnfx.convert(model, example_inputs=X_SEQ[0])
    predicted = model_memory(executable_of(model), [X_SEQ], None, training=False)
    assert predicted.costs(5) == model_memory(net._executable, [X_SEQ], None, training=False).costs(5)
