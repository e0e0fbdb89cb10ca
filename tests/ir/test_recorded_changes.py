"""Changes that are not passes of one program are checked and recorded like passes: re-rolling and emission."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import snnfx
from snnfx.errors import PassError
from snnfx.ir.history import History
from snnfx.ir.pass_manager import run_emission, run_rewrite


class LoopedNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x_seq: torch.Tensor) -> torch.Tensor:
        v, spikes = torch.zeros(x_seq.shape[1], 4), []
        for x in x_seq:
            v = 0.5 * v + self.fc(x)
            spike = (v > 1).float()
            v = v - spike
            spikes.append(spike)
        return torch.stack(spikes)


def net() -> snnfx.Net:
    return snnfx.convert(nn.Sequential(nn.Linear(4, 4), snnfx.neuron.LIFNode()))


def names(history: History) -> list[str]:
    return [record.description.partition("{")[0] for record in history]


def test_the_history_of_a_looped_model_shows_each_change_of_the_call() -> None:
    looped = snnfx.convert(LoopedNet(), takes="sequence", example_inputs=(torch.rand(6, 2, 4),))
    shown = [name for name in names(looped.history) if name not in ("normalize", "remove_dead_code")]
    first, *_ = (i for i, name in enumerate(shown) if name == "partition")
    assert shown[:1] == ["capture"] and shown[first - 1] == "derive_step"
    changes = ("move_attributes_first", "reroll_loops", "join_elements", "make_length_variable")
    assert [name for name in shown if name in changes] == [*changes]
    rerolled = next(record for record in looped.history if record.description == "reroll_loops")
    assert "test_recorded_changes.py" in rerolled.note
    assert "+snnfx_loop_0 = " in rerolled.diff() and "-mul = " in rerolled.diff()


def test_the_history_shows_the_graph_of_a_recording() -> None:
    recorded = net()
    recorded.run(torch.rand(3, 2, 4), record=("1",))
    assert names(recorded.history)[-1] == "emit_recording"
    assert recorded.history[-1].note == "returns `1` as well"


def test_a_rewrite_that_breaks_the_graph_is_named() -> None:
    program = net().program.copy().unplanned()

    def move_the_output() -> str:
        first = next(iter(program.graph.nodes))
        first.prepend(program.graph.output_node())
        return ""

    with pytest.raises(PassError, match="SNNFX501.*`move_output`"):
        run_rewrite("move_output{to=0}", program, move_the_output, History())


@pytest.mark.parametrize("fault", ["unknown target", "node behind the output", "operand of another graph"])
def test_an_invalid_emitted_graph_is_refused_before_it_is_recorded(fault: str) -> None:
    converted, history = net(), History()

    def emit() -> tuple[None, fx.Graph, str]:
        graph = fx.Graph()
        x = graph.placeholder("x")
        if fault == "unknown target":
            x = graph.call_module("missing.layer", (x,))
        elif fault == "operand of another graph":
            x = graph.call_function(torch.relu, (fx.Graph().placeholder("y"),))
        graph.output(x)
        if fault == "node behind the output":
            graph.call_function(torch.relu, (x,))
        return None, graph, ""

    with pytest.raises(PassError, match="SNNFX501.*`emit`"):
        run_emission("emit{part='main'}", converted.program, converted, emit, history)
    assert not history


def test_emission_may_not_change_the_program_or_the_model() -> None:
    converted = net()
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))

    def emit_and_train() -> tuple[None, fx.Graph, str]:
        converted.source[0].weight.data.add_(1)
        return None, graph, ""

    def emit_and_drop_a_region() -> tuple[None, fx.Graph, str]:
        converted.program.regions.pop()
        return None, graph, ""

    with pytest.raises(PassError, match="SNNFX701.*the value of `0.weight`"):
        run_emission("emit", converted.program, converted, emit_and_train, History())
    with pytest.raises(PassError, match="SNNFX701.*the regions of the program"):
        run_emission("emit", converted.program, converted, emit_and_drop_a_region, History())
