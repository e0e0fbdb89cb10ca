"""Partitioning: maximal, convex, connected regions in an order that can be executed."""

from __future__ import annotations

import itertools
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

import snnfx
from snnfx import neuron
from snnfx.analysis.dependence import analyse_dependence
from snnfx.capture.capture import capture
from snnfx.ir.nodes import is_size
from snnfx.ir.pass_manager import PassManager
from snnfx.ir.program import Region, StepProgram
from snnfx.passes.normalize import Normalize
from snnfx.passes.partition import Partition
from snnfx.passes.remove_dead_code import RemoveDeadCode
from support.stepping import assert_converts, assert_same, run_stepped

FOLDED, MAPPED, LOOPED = "fold", "map", "loop"


class RandomNet(nn.Module):
    """A DAG of additions, subtractions of the batch mean, and neurons.

    Args:
        nodes: `(kind, operands)`; operand 0 is the input, operand i + 1 the result of node i.
    """

    def __init__(self, nodes: list[tuple[str, tuple[int, ...]]]) -> None:
        super().__init__()
        self.nodes = nodes
        self.neurons = nn.ModuleList(neuron.LeakyIntegrator() for kind, _ in nodes if kind == LOOPED)

    def forward(self, x: Tensor) -> Any:
        values, neurons = [x], iter(self.neurons)
        for kind, operands in self.nodes:
            y = values[operands[0]]
            for other in operands[1:]:
                y = y + values[other]
            y = next(neurons)(y) if kind == LOOPED else (y - y.mean(0) if kind == MAPPED else y.tanh())
            values.append(y)
        return tuple(values[1:])


@st.composite
def random_nets(draw: st.DrawFn) -> RandomNet:
    nodes = []
    for i in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from([FOLDED, FOLDED, MAPPED, LOOPED]))
        operands = draw(st.lists(st.integers(0, i), min_size=1, max_size=2, unique=True))
        nodes.append((kind, tuple(operands)))
    return RandomNet(nodes)


def partition(model: nn.Module, example: Any = None, **options: Any) -> StepProgram:
    program = capture(model, example)
    PassManager([Normalize(), RemoveDeadCode(), Partition(**options)]).run(program)
    return program


def operands_of(node: Node) -> set[Node]:
    """Operands, where a size counts as the tensor whose size it is."""
    return {v for o in node.all_input_nodes for v in (operands_of(o) if is_size(o) else {o})}


def graph_of_regions(program: StepProgram, groups: list[set[Node]]) -> nx.DiGraph:
    where = {node: i for i, group in enumerate(groups) for node in group}
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(groups)))
    for node, index in where.items():
        graph.add_edges_from((where[o], index) for o in operands_of(node) if o in where and where[o] != index)
    return graph


def mergeable(program: StepProgram) -> list[tuple[Region, Region]]:
    """The oracle: pairs of adjacent regions of one kind whose union would leave the graph of regions acyclic."""
    groups = [set(region.nodes) for region in program.regions]
    graph = graph_of_regions(program, groups)
    found = []
    for i, j in itertools.combinations(range(len(groups)), 2):
        a, b = program.regions[i], program.regions[j]
        if a.kind != b.kind or a.kind == LOOPED or not (graph.has_edge(i, j) or graph.has_edge(j, i)):
            continue
        merged = nx.contracted_nodes(graph, i, j, self_loops=False)
        if nx.is_directed_acyclic_graph(merged):
            found.append((a, b))
    return found


@settings(max_examples=60)
@given(random_nets())
def test_regions_are_convex_connected_maximal_and_in_order(model: RandomNet) -> None:
    program = partition(model)
    groups = [set(region.nodes) for region in program.regions]
    graph = graph_of_regions(program, groups)
    assert nx.is_directed_acyclic_graph(graph)
    assert all(before < after for before, after in graph.edges)
    computing = {n for n in program.graph.nodes if n.op.startswith("call") and not is_size(n)}
    initial_only = analyse_dependence(program).initial_only
    assert computing - initial_only == {n for g in groups for n in g if n.op != "placeholder"}
    for region, group in zip(program.regions, groups, strict=True):
        inside = nx.Graph()
        inside.add_nodes_from(group)
        inside.add_edges_from((o, n) for n in group for o in operands_of(n) if o in group)
        if region.kind == LOOPED:
            # On a cycle through time: a slot and what computes its next value.
            assert region.slots
        else:
            assert nx.is_connected(inside), region
    assert mergeable(program) == []


@settings(max_examples=25)
@given(random_nets())
def test_a_net_of_any_regions_does_what_the_model_does(model: RandomNet) -> None:
    x_seq = torch.randn(3, 2, 3, dtype=torch.float64)
    net = snnfx.convert(model.double())
    with torch.no_grad():
        assert_same(net(x_seq), run_stepped(model, x_seq).outputs)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)
        self.lif1, self.lif2 = neuron.LIFNode(), neuron.LIFNode()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.lif1(self.left(x)), self.lif2(self.right(y))


def test_branches_that_are_not_connected_are_not_merged() -> None:
    program = partition(TwoBranches())
    assert [region.kind for region in program.regions] == ["fold", "loop", "fold", "loop"]


def test_two_folds_around_a_loop_are_not_merged_across_it() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(3, 3), neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            return y + self.lif(y)

    program = partition(Around())
    assert [region.kind for region in program.regions] == ["fold", "loop", "fold"]


def test_an_opaque_module_is_a_loop_of_its_own_with_the_reason() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    program = partition(nn.Sequential(nn.Linear(3, 3), Opaque(), nn.Linear(3, 3)))
    assert program.regions[1].kind == "loop" and program.regions[1].slots == []
    [(_, refusal)] = program.regions[1].refusals()
    assert refusal.code == "SNNFX108" and "`1` could not be traced" in refusal.reason


def test_what_does_not_vary_in_time_is_run_once() -> None:
    class Invariant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Linear(3, 3), nn.Parameter(torch.rand(3))
            self.lif = neuron.LIFNode()

        def forward(self, image: Tensor, x: Tensor) -> Tensor:
            return self.lif(self.conv(image) * self.scale.exp() + x)

    program = partition(Invariant(), invariant_inputs=("image",))
    assert {n.name for r in program.regions if r.kind == "once" for n in r.nodes} == {"conv", "exp", "mul"}
    program = partition(Invariant())
    assert [n.name for r in program.regions if r.kind == "once" for n in r.nodes] == ["exp"]


def test_random_operations_vary_in_time() -> None:
    class Noise(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return image.exp() + torch.rand_like(image)

    program = partition(Noise(), invariant_inputs=("image",))
    kinds = {n.name: r.kind for r in program.regions for n in r.nodes}
    assert kinds["exp"] == "once" and kinds["rand_like"] != "once"


@pytest.mark.parametrize(("mode", "kind"), [("fold", "fold"), ("per_step", "map")])
def test_batch_norm_in_training_is_folded_or_stands_alone(mode: str, kind: str) -> None:
    program = partition(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()), batch_norm=mode)
    [region] = [r for r in program.regions for n in r.nodes if n.target == "1"]
    assert region.kind == kind
    assert len(region.nodes) == (1 if mode == "per_step" else 3)


def test_cycles_go_through_state_only() -> None:
    class Recurrent(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.back = nn.Linear(3, 3), nn.Linear(3, 3)
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x)
            self.v = (y + self.back(self.v)).tanh()
            return self.v * y

    dependence = analyse_dependence(capture(Recurrent()))
    [cycle] = dependence.cycles
    assert {n.name for n in cycle} == {"v", "back", "add", "tanh"}
    assert dependence.sequential == set(cycle)
    assert {n.name for n in dependence.varying} >= {"x", "fc", "mul"}


def test_an_initial_value_may_be_computed_from_another_neuron_of_the_step() -> None:
    class FromAnother(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a: Any = None
            self.lif = neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            y = self.lif(x)
            if self.a is None:
                self.a = y.exp()
            self.a = 0.5 * self.a + y
            return self.a

    net = snnfx.convert(FromAnother().double())
    x_seq = torch.randn(4, 2, 3, dtype=torch.float64) * 2
    assert_same(net(x_seq).detach(), run_stepped(net.source, x_seq).outputs)


class DropsOutInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x)
        return nn.functional.scaled_dot_product_attention(y, y, y, None, 0.5)


def test_dropout_inside_attention_is_drawn_at_each_step_even_if_the_input_never_changes() -> None:
    net = snnfx.convert(DropsOutInside(), time_dim=None)
    assert "once" not in {region.kind for region in net.regions}
    y_seq = net(torch.rand(2, 3, 4), T=3)
    assert not torch.equal(y_seq[0], y_seq[1])


BACK: dict[str, Any] = {
    "view_as": lambda h, x: h.view_as(x),
    "reshape_as": lambda h, x: h.reshape_as(x) + x,
    "view of a shape": lambda h, x: h.view(x.shape),
    "view": lambda h, x: h.view(x.shape[0], 4, 5),
    "unflatten": lambda h, x: h.unflatten(0, (x.shape[0], 4)),
}


class MergedBatch(nn.Module):
    """A batch that is merged with another dimension, and split again by the shape of what it came from."""

    def __init__(self, inner: nn.Module, back: Any) -> None:
        super().__init__()
        self.inner, self.back = inner, back

    def forward(self, x: Tensor) -> Any:
        return self.back(self.inner(x.flatten(0, 1)), x)


@pytest.mark.parametrize("back", BACK)
def test_inputs_of_a_fold_have_one_batch_size(back: str) -> None:
    """SNNFX303 at the call: spikes of a merged batch and `x` were inputs of one fold."""
    net = assert_converts(MergedBatch(neuron.LIFNode(v_threshold=0.1), BACK[back]), torch.randn(3, 2, 4, 5).double())
    (mapped,) = [region for region in net.program.regions if region.kind == MAPPED]
    assert [refusal.code for _, refusal in mapped.refusals()] == ["SNNFX105"]


@pytest.mark.parametrize("back", BACK)
def test_a_batch_may_change_its_size_inside_a_fold(back: str) -> None:
    net = assert_converts(MergedBatch(nn.Tanh(), BACK[back]), torch.randn(3, 2, 4, 5).double())
    assert [region.kind for region in net.program.regions] == [FOLDED]


class ShapeOfAnother(snnfx.MemoryModule):
    """The shape of one input for the values of another one, which starts a state, too."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change
        self.register_memory("h", None)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        changed = self.change(x, y)
        if self.h is None:
            self.h = x.detach() * 0.5
        self.h = x + self.h
        return changed.tanh(), self.h


SHAPED: dict[str, Any] = {
    "view_as": lambda x, y: x.view_as(y),
    "reshape_as": lambda x, y: x.reshape_as(y),
    "view": lambda x, y: x.view(y.shape),
    "size": lambda x, y: x.reshape(y.shape[0], -1),
}


@pytest.mark.parametrize("change", SHAPED)
@pytest.mark.parametrize("shape", [(5, 4), (2, 2, 5), (4, 5), (4, 5, 1)])
def test_the_shape_of_an_input_with_another_batch_is_not_taken_in_a_fold(change: str, shape: tuple[int, ...]) -> None:
    """Fuzz seed 5241: SNNFX303 at the call."""
    x, y = torch.randn(3, 4, 5).double(), torch.randn(3, *shape).double()
    net = assert_converts(ShapeOfAnother(SHAPED[change]), x, y)
    if shape[0] == 4:
        assert all(region.kind != MAPPED for region in net.program.regions)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (4, 4, 5)])
def test_expand_as_to_an_input_with_another_batch(shape: tuple[int, ...]) -> None:
    x, y = torch.randn(3, 1, 5).double(), torch.randn(3, *shape).double()
    assert_converts(ShapeOfAnother(lambda x, y: x.expand_as(y)), x, y)
