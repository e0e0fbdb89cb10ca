"""Passes of the user's own on models that run over time themselves: with a step form, and without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.passes import Pass, StepProgram

UPPER = 0.3


@dataclass(frozen=True)
class Clamp(Pass):
    name = "relu_to_clamp"
    requires = "normalized"

    def apply(self, program: StepProgram) -> str:
        relus = [n for n in program.graph.nodes if n.target in (torch.relu, "relu")]
        for node in relus:
            with program.graph.inserting_before(node):
                new = program.graph.call_function(torch.clamp, (node.args[0], 0.0, UPPER))
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
        return f"{len(relus)}"


@dataclass(frozen=True)
class CapturedClamp(Clamp):
    requires = "captured"


@dataclass(frozen=True)
class PlannedClamp(Clamp):
    requires = "planned"


@dataclass(frozen=True)
class InsertRelu(Pass):
    """Put a ReLU behind a layer."""

    name = "insert_relu"
    requires = "normalized"
    layer: str = "head"

    def apply(self, program: StepProgram) -> str:
        for node in list(program.graph.nodes):
            if node.target == self.layer:
                with program.graph.inserting_after(node):
                    new = program.graph.call_function(torch.relu, (node,))
                node.replace_all_uses_with(new, delete_user_cb=lambda user, own=new: user is not own)
        return "done"


class Classifier(nn.Module):
    """Calls a spiking layer in a loop and classifies the mean over time."""

    def __init__(self, before: bool, after: bool) -> None:
        super().__init__()
        self.fc, self.lif, self.out = nn.Linear(3, 6), neuron.LIFNode(v_threshold=0.2), nn.Linear(6, 4)
        self.head, self.before, self.after = nn.Linear(4, 3), before, after

    def forward(self, x_seq: Tensor) -> Tensor:
        snnfx.functional.reset_net(self)
        outputs = []
        for t in range(x_seq.shape[0]):
            y = self.out(self.lif(4 * torch.relu(self.fc(x_seq[t]))))
            outputs.append(torch.relu(y) if self.before else y)
        y = self.head(torch.stack(outputs).mean(0))
        return torch.relu(y) if self.after else y


def clamped(function: Callable[[], Tensor]) -> Tensor:
    """The result of a function with a clamp in place of every ReLU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "relu", lambda x: torch.clamp(x, 0.0, UPPER))
        return function()


@pytest.mark.parametrize("item", [CapturedClamp(), Clamp(), PlannedClamp()], ids=lambda item: str(item.requires))
@pytest.mark.parametrize(("before", "after"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_pass_changes_the_loops_and_the_code_around_them(item: Pass, before: bool, after: bool) -> None:
    model, x_seq = Classifier(before, after).double(), torch.randn(5, 4, 3, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=x_seq, passes=[item])
    for training in (True, False):
        net.train(training)
        expected = clamped(lambda: model(x_seq))
        y = net(x_seq)
        torch.testing.assert_close(y, expected)
        grads = torch.autograd.grad(y.sum(), [*model.parameters()])
        torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), [*model.parameters()]))
    torch.testing.assert_close(net(x_seq[:3, :2]), clamped(lambda: model(x_seq[:3, :2])))
    # Behind the mean, a clamp cannot run on each step.
    assert (net.program.whole_sequences is None) == (not after)


@pytest.mark.parametrize("layer", ["out", "head"])
def test_a_node_of_a_pass_stays_on_its_side_of_the_mean(layer: str) -> None:
    model, x_seq = Classifier(False, False).double(), torch.randn(5, 4, 3, dtype=torch.float64)
    net = snnfx.convert(model, takes="sequence", example_inputs=x_seq, passes=[InsertRelu(layer)])
    oracle = Classifier(before=layer == "out", after=layer == "head").double()
    oracle.load_state_dict(model.state_dict())
    torch.testing.assert_close(net(x_seq), oracle(x_seq))
    assert (net.program.whole_sequences is None) == (layer == "out")


def test_without_passes_no_node_marks_the_mean() -> None:
    model, x_seq = Classifier(False, False), torch.randn(5, 4, 3)
    net = snnfx.convert(model, takes="sequence", example_inputs=x_seq)
    assert "reduced_over_time" not in str(net.program)
