"""The pass manager and its verifier, normalisation, dead code."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.capture.capture import capture
from snnfx.errors import PassError
from snnfx.ir.graph_pass import Pass
from snnfx.ir.pass_manager import PassManager, PassRecord
from snnfx.ir.program import Region, StepProgram
from snnfx.ir.verifier import verify_program
from snnfx.passes.normalize import Normalize
from snnfx.passes.partition import Partition
from snnfx.passes.remove_dead_code import RemoveDeadCode


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 2)
        self.lif = neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        self.fc2(x)
        return self.fc2(self.lif(self.fc1(x))).relu()


def program_of(model: nn.Module | None = None, *passes: Pass) -> StepProgram:
    program = capture(model or Model())
    PassManager(passes).run(program)
    return program


def node_named(program: StepProgram, name: str) -> Any:
    return program.nodes_by_name[name]


# -- broken passes -----------------------------------------------------------------------------------------------------


def drop_a_slot(program: StepProgram) -> None:
    program.slots = []


def misname_a_slot(program: StepProgram) -> None:
    program.slots = [replace(program.slots[0], name="other.v")]


def lose_the_placeholder(program: StepProgram) -> None:
    program.slots = [replace(program.slots[0], placeholder="nowhere")]


def forget_the_parts_of_the_output(program: StepProgram) -> None:
    program.output.args = (program.outputs,)


def call_a_missing_module(program: StepProgram) -> None:
    node_named(program, "fc1").target = "fc9"


def use_before_definition(program: StepProgram) -> None:
    node_named(program, "fc1").append(node_named(program, "x"))


def take_a_node_of_another_graph(program: StepProgram) -> None:
    node_named(program, "relu").args = (node_named(capture(Model()), "x"),)


BROKEN: dict[str, tuple[Callable[[StepProgram], None], str]] = {
    "drop a slot": (drop_a_slot, "0 slots, but 1 next and 1 initial values"),
    "misname a slot": (misname_a_slot, "not the placeholder of slot other.v"),
    "lose the placeholder": (lose_the_placeholder, "has no placeholder 'nowhere'"),
    "forget the parts of the output": (forget_the_parts_of_the_output, "the output is not"),
    "call a missing module": (call_a_missing_module, "the model has no `fc9`"),
    "use before definition": (use_before_definition, "does not come before it"),
    "take a node of another graph": (take_a_node_of_another_graph, "belongs to another graph"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_pass_that_breaks_the_graph_is_named_with_the_ir_around_it(name: str) -> None:
    break_it, reason = BROKEN[name]

    @dataclass(frozen=True)
    class Broken(Pass):
        name = "broken-on-purpose"
        requires = "normalized"
        may_change = ("graph", "slots", "regions")

        def apply(self, program: StepProgram) -> str:
            break_it(program)
            return ""

    with pytest.raises(PassError, match="SNNFX501") as caught:
        PassManager([Normalize(), Broken()]).run(capture(Model()))
    message = str(caught.value)
    assert "the pass `broken-on-purpose` broke the graph" in message
    assert reason in message
    assert any(line in message for line in ("relu = relu(fc2_1)", "relu = relu(x)", "fc1 = self.fc"))


def test_the_excerpt_marks_the_node_and_shows_at_most_ten_lines_around_it() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    program = capture(model)
    [node] = [n for n in program.graph.nodes if n.target == "10"]
    node.target = "99"
    with pytest.raises(PassError) as caught:
        verify_program(program, after="some pass")
    lines = [line for line in str(caught.value).splitlines() if " = self." in line]
    assert len(lines) == 11
    assert [line.startswith("-->") for line in lines] == [False] * 5 + [True] + [False] * 5


def test_without_verification_a_broken_pass_goes_on() -> None:
    @dataclass(frozen=True)
    class Broken(Pass):
        name = "broken"
        may_change = ("slots",)

        def apply(self, program: StepProgram) -> str:
            drop_a_slot(program)
            return "done"

    records = PassManager([Broken()], verify=False).run(capture(Model()))
    assert [record.note for record in records] == ["done"]


def partitioned() -> StepProgram:
    return program_of(Model(), Normalize(), RemoveDeadCode(), Partition())


def node_in_two_regions(program: StepProgram) -> None:
    program.regions[1].nodes.append(program.regions[0].nodes[0])


def regions_in_reverse(program: StepProgram) -> None:
    program.regions.reverse()


def state_outside_of_a_loop(program: StepProgram) -> None:
    program.regions[0].slots = ["lif.v"]


def node_of_another_graph(program: StepProgram) -> None:
    program.regions.append(Region("fold_9", "fold", [node_named(capture(Model()), "fc1")]))


def erased_node_in_a_region(program: StepProgram) -> None:
    node = node_named(program, "relu")
    node.replace_all_uses_with(node.args[0])
    program.graph.erase_node(node)


def facts_of_another_region(program: StepProgram) -> None:
    node_named(program, "relu").meta["region"] = "fold_7"


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (erased_node_in_a_region, "contains the erased node relu"),
        (facts_of_another_region, "its facts name region 'fold_7'"),
        (node_in_two_regions, "in two regions"),
        (regions_in_reverse, "not convex"),
        (state_outside_of_a_loop, "contains the state slots"),
        (node_of_another_graph, "another graph"),
    ],
)
def test_regions_are_verified_once_there_are_some(break_it: Callable[[StepProgram], None], reason: str) -> None:
    program = partitioned()
    verify_program(program)
    break_it(program)
    with pytest.raises(PassError, match=f"SNNFX501(.|\n)*{reason}"):
        verify_program(program, after="partition")


def test_a_fact_of_a_later_stage_is_refused() -> None:
    program = program_of(Model(), Normalize())
    node_named(program, "relu").meta["batch_dim"] = 0
    with pytest.raises(PassError, match=r"SNNFX501(.|\n)*the fact 'batch_dim' of stage 'partitioned'"):
        verify_program(program)


# -- the manager -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [[Partition()], [RemoveDeadCode()], [RemoveDeadCode(), Partition()]])
def test_passes_in_an_illegal_order_are_refused_before_anything_is_changed(passes: list[Pass]) -> None:
    program = capture(Model())
    before = str(program)
    with pytest.raises(PassError, match="SNNFX502.*stage 'normalized'"):
        PassManager(passes).run(program)
    assert str(program) == before


def test_the_history_keeps_the_ir_after_each_pass() -> None:
    records = PassManager([Normalize(), RemoveDeadCode(), Partition()]).run(capture(Model()))
    assert [r.description.partition("{")[0] for r in records] == ["normalize", "remove_dead_code", "partition"]
    assert records[0].ir.count("self.fc2") == 2 and records[1].ir.count("self.fc2") == 1
    assert "fold" in records[2].ir
    assert (
        str(PassRecord("remove_dead_code", 1.26, "removed 1 nodes", ""))
        == "# remove_dead_code (1.3 ms): removed 1 nodes"
    )
    assert snnfx.convert(Model()).history[0].description == "capture"


def test_debugging_prints_the_ir_after_each_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SNNFX_DEBUG", "1")
    snnfx.convert(Model())
    printed = capsys.readouterr().err
    assert "# normalize" in printed and "fc1 = self.fc1(x)" in printed
    assert "partition{batch_norm='fold', invariant_inputs=()}" in printed
    assert "\n-fc1 = self.fc1(x)" in printed and "\n+fc1 = self.fc1(x)    # fold" in printed
    assert "\033[" not in printed


def test_options_of_a_pass_show_in_its_description() -> None:
    assert str(Partition(batch_norm="per_step")) == "partition{batch_norm='per_step', invariant_inputs=()}"
    assert str(RemoveDeadCode()) == "remove_dead_code"


# -- normalisation and dead code ---------------------------------------------------------------------------------------


def test_operations_in_place_turn_into_values_for_all_later_readers() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            before = y.exp()
            y.add_(1)
            torch.relu_(y)
            y /= 3
            return before + y

    program = program_of(InPlace(), Normalize())
    assert program.stage == "normalized"
    [y] = [n for n in program.graph.nodes if n.op == "call_function" and n.target is operator.mul]
    assert {user.name for user in y.users} == {"exp", "add_"}
    targets = [n.target for n in program.graph.nodes if n.op.startswith("call")]
    assert targets == [operator.mul, "exp", "add", "relu", operator.truediv, operator.add]


def test_one_attribute_node_for_each_target() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain + self.gain

    program = program_of(Twice(), Normalize())
    assert len([n for n in program.graph.nodes if n.op == "get_attr"]) == 1


def test_dead_code_is_removed_and_state_is_not() -> None:
    class Dead(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.lif(x)
            return self.fc2(x)

    program = program_of(Dead(), Normalize(), RemoveDeadCode())
    assert [n.target for n in program.graph.nodes if n.op == "call_module"] == ["fc2"]
    assert [slot.name for slot in program.slots] == ["lif.v"]


def test_a_discovered_slot_that_nothing_reads_is_dropped_with_what_computes_it() -> None:
    class Monitor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last: Any = None
            self.total: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.last is None:
                self.last, self.total = torch.zeros_like(x), torch.zeros_like(x)
            self.last = x.abs()
            self.total = self.total + x
            return x * 2

    program = capture(Monitor())
    [record] = PassManager([Normalize(), RemoveDeadCode()]).run(program)[1:]
    assert [slot.name for slot in program.slots] == ["total"]  # it feeds itself, so it is state
    assert "last" in record.note
    assert not [n for n in program.graph.nodes if n.target == "abs"]


def test_a_check_of_a_size_is_not_dead() -> None:
    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[1] == 4 else x

    program = capture(Checks(), torch.rand(2, 4))
    PassManager([Normalize(), RemoveDeadCode()]).run(program)
    assert any(getattr(n.target, "__name__", "") == "expect_size" for n in program.graph.nodes)


def test_a_copy_of_a_program_is_independent() -> None:
    program = partitioned()
    copy = program.copy()
    text = str(program)
    assert str(copy) == text
    assert [r.name for r in copy.regions] == [r.name for r in program.regions]
    for node in reversed(list(copy.graph.nodes)):
        if node.op == "output":
            node.args = (((), (), ()),)
        else:
            copy.graph.erase_node(node)
    assert str(program) == text
    verify_program(program)
