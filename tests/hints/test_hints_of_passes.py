"""Hints about passes of the user's own: each leads to a pass that runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.capture.capture import capture
from snnfx.passes import Normalize, Partition, Pass, PassManager, Rewrite, StepProgram
from support.hints import refused, silent
from support.stepping import assert_same, run_net, run_stepped

T, N, C = 5, 2, 3


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(C, 4), nn.ReLU(), neuron.LIFNode(tau=2.0, v_threshold=0.3), nn.Linear(4, 2))


def sequence() -> Tensor:
    return torch.rand(T, N, C, generator=torch.Generator().manual_seed(1))


def converts_with(*passes: Pass, source: nn.Module | None = None) -> Any:
    """Convert with passes, which keep the results, and return the net."""
    source = model() if source is None else source
    with silent():
        net = snnfx.convert(source, passes=passes)
        found, expected = run_net(net, sequence()), run_stepped(source, sequence())
    assert_same(found.outputs, expected.outputs)
    assert_same(found.input_grads, expected.input_grads)
    return net


def note_of(net: Any, name: str) -> str:
    return next(record.note for record in net.history if record.description.startswith(name))


@dataclass(frozen=True)
class Count(Pass):
    """Counts the nodes; derived classes get one thing wrong."""

    name = "count"
    may_change = ()

    def apply(self, program: StepProgram) -> str:
        return f"{len(program.graph.nodes)} nodes"


# -- definitions -------------------------------------------------------------------------------------------------------


def test_passes_that_are_no_sequence() -> None:
    refused(
        "SNNFX702",
        "ir/graph_pass.py:check_passes",
        "Write passes=[...].",
        lambda: snnfx.convert(model(), passes=Count()),  # type: ignore[arg-type]
        names="`count`",
    )
    assert note_of(converts_with(Count()), "count").endswith("nodes")


def test_a_pass_that_reaches_another_stage_in_convert() -> None:
    @dataclass(frozen=True)
    class Moving(Count):
        ensures = "normalized"

    @dataclass(frozen=True)
    class Followed(Count):
        pass

    refused(
        "SNNFX702",
        "ir/graph_pass.py:check_passes",
        "Leave `ensures` unset; the passes of snnfx reach the stages.",
        lambda: snnfx.convert(model(), passes=[Moving()]),
    )
    converts_with(Followed())


def test_a_class_in_place_of_a_pass() -> None:
    error = refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Write ",
        lambda: snnfx.convert(model(), passes=[Count]),  # type: ignore[list-item]
    )
    assert error.hint == "Write Count()."
    converts_with(Count())


def test_a_function_in_place_of_a_pass() -> None:
    def count(program: StepProgram) -> str:
        return f"{len(program.graph.nodes)} nodes"

    class Derived(Pass):
        name, may_change = "count", ()

        def apply(self, program: StepProgram) -> str:
            return count(program)

    refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Derive its class from snnfx.passes.Pass.",
        lambda: snnfx.convert(model(), passes=[count]),  # type: ignore[list-item]
        names="`count`",
    )
    converts_with(Derived())


def test_an_option_that_is_no_field() -> None:
    class Plain(Count):
        limit: int

        def __init__(self) -> None:
            object.__setattr__(self, "limit", 3)

    @dataclass(frozen=True)
    class Decorated(Count):
        limit: int = 3

    refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Decorate the class with @dataclass(frozen=True).",
        lambda: snnfx.convert(model(), passes=[Plain()]),
        names="its option `limit`",
    )
    assert note_of(converts_with(Decorated(limit=2)), "count{limit=2}")


def test_an_attribute_that_is_no_field() -> None:
    class Counting(Count):
        def __init__(self, limit: int) -> None:
            object.__setattr__(self, "limit", limit)

    @dataclass(frozen=True)
    class Declared(Count):
        limit: int

    refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Declare options as fields of a frozen dataclass.",
        lambda: snnfx.convert(model(), passes=[Counting(3)]),
        names="its attribute `limit`",
    )
    converts_with(Declared(3))


def test_a_pass_without_a_name() -> None:
    @dataclass(frozen=True)
    class Nameless(Count):
        name = ""

    @dataclass(frozen=True)
    class Named(Nameless):
        name = "named"

    refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        'Set the class variable name = "...".',
        lambda: snnfx.convert(model(), passes=[Nameless()]),
    )
    assert note_of(converts_with(Named()), "named")


@pytest.mark.parametrize("stages", ["optimised", ()])
def test_a_stage_that_does_not_exist(stages: Any) -> None:
    @dataclass(frozen=True)
    class Staged(Count):
        requires = stages

    error = refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Choose one of ",
        lambda: snnfx.convert(model(), passes=[Staged()]),
    )
    for stage in error.hint.removeprefix("Choose one of ").rstrip(".").split(", "):

        @dataclass(frozen=True)
        class Chosen(Count):
            requires = stage

        converts_with(Chosen())


def test_declared_changes_that_are_a_string() -> None:
    @dataclass(frozen=True)
    class Declared(Count):
        may_change = "graph"

    @dataclass(frozen=True)
    class Followed(Count):
        may_change = ("graph",)

    error = refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Write may_change = (",
        lambda: snnfx.convert(model(), passes=[Declared()]),
    )
    assert error.hint == "Write may_change = ('graph',)."
    converts_with(Followed())


def test_a_declared_change_that_does_not_exist() -> None:
    @dataclass(frozen=True)
    class Declared(Count):
        may_change = ("weights",)

    error = refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Choose from ",
        lambda: snnfx.convert(model(), passes=[Declared()]),
        names="'weights'",
    )

    @dataclass(frozen=True)
    class Followed(Count):
        may_change = tuple(error.hint.removeprefix("Choose from ").rstrip(".").split(", "))

    converts_with(Followed())


def test_a_pass_without_apply() -> None:
    @dataclass(frozen=True)
    class Empty(Pass):
        name = "empty"

    @dataclass(frozen=True)
    class Followed(Empty):
        def apply(self, program: StepProgram) -> str:
            return "a note"

    refused(
        "SNNFX702",
        "ir/graph_pass.py:_check_definition",
        "Define apply(self, program), which returns a note.",
        lambda: snnfx.convert(model(), passes=[Empty()]),
    )
    assert note_of(converts_with(Followed()), "empty") == "a note"


@dataclass(frozen=True)
class WithFunction(Count):
    """A pass with a function as an option."""

    function: Callable[[Any], Any]


def double(value: Any) -> Any:
    return 2 * value


def test_passes_that_pickle_does_not_find() -> None:
    @dataclass(frozen=True)
    class Local(Count):
        pass

    for item in (WithFunction(lambda x: 2 * x), Local()):
        refused(
            "SNNFX705",
            "ir/graph_pass.py:check_picklable",
            "Define the class and its functions at the top level of a module; a lambda has no name there.",
            lambda item=item: pickle.dumps(snnfx.convert(model(), passes=[item])),  # type: ignore[misc]
        )
    net = converts_with(WithFunction(double))
    assert_same(pickle.loads(pickle.dumps(net))(sequence()), net(sequence()))
    copy.deepcopy(net)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_pass_after_its_stage() -> None:
    def program() -> StepProgram:
        return capture(model())

    refused(
        "SNNFX502",
        "ir/pass_manager.py:_Run.apply",
        "Run the pass earlier.",
        lambda: PassManager([Normalize(), Partition(), Count()]).run(program()),
        names="the program is at 'partitioned'",
    )
    found = program()
    PassManager([Count(), Normalize(), Partition()]).run(found)
    assert found.stage == "partitioned"


def test_a_pass_that_fails() -> None:
    @dataclass(frozen=True)
    class Failing(Pass):
        name = "remove_relu"
        requires = "normalized"

        def apply(self, program: StepProgram) -> str:
            for node in program.graph.nodes:
                if isinstance(program.module_of(node), nn.ReLU):
                    program.graph.erase_node(node)
            return "removed the ReLUs"

    @dataclass(frozen=True)
    class Corrected(Failing):
        def apply(self, program: StepProgram) -> str:
            for node in list(program.graph.nodes):
                if isinstance(program.module_of(node), nn.ReLU):
                    node.replace_all_uses_with(node.args[0])
                    program.graph.erase_node(node)
            return "removed the ReLUs"

    refused(
        "SNNFX703",
        "ir/pass_manager.py:_Run._apply_to",
        "Correct the pass at this line; the program and the model were put back.",
        lambda: snnfx.convert(model(), passes=[Failing()]),
        at="program.graph.erase_node(node)",
    )
    expected = model()
    expected[1] = nn.Identity()
    with silent():
        net = snnfx.convert(model(), passes=[Corrected()])
    assert_same(net(sequence()), run_stepped(expected, sequence()).outputs)


def test_a_pass_that_returns_no_note() -> None:
    @dataclass(frozen=True)
    class Silent(Count):
        def apply(self, program: StepProgram) -> str:
            return None  # type: ignore[return-value]

    @dataclass(frozen=True)
    class Followed(Count):
        def apply(self, program: StepProgram) -> str:
            return "replaced 3 nodes"

    refused(
        "SNNFX704",
        "ir/pass_manager.py:_Run._enforce",
        'Return a short text, e.g. return "replaced 3 nodes".',
        lambda: snnfx.convert(model(), passes=[Silent()]),
    )
    assert note_of(converts_with(Followed()), "count") == "replaced 3 nodes"


@dataclass(frozen=True)
class Halve(Pass):
    """Halves the weights of the model once."""

    name = "halve"
    requires = "normalized"

    def apply(self, program: StepProgram) -> str:
        if not getattr(program.source, "is_halved", False):
            with torch.no_grad():
                program.source[0].weight.mul_(0.5)
            program.source.is_halved = True  # type: ignore[assignment]
        return "halved"


def test_a_change_that_a_pass_does_not_declare() -> None:
    error = refused(
        "SNNFX701",
        "ir/pass_manager.py:_Run._enforce",
        " unchanged, or declare may_change = ",
        lambda: snnfx.convert(model(), passes=[Halve()]),
        names="weight",
    )
    declared = error.hint.partition("may_change = ")[2].removesuffix(".")

    @dataclass(frozen=True)
    class Declared(Halve):
        may_change = tuple(name.strip(" '") for name in declared.strip("()").split(",") if name.strip(" '"))

    source, halved = model(), model()
    with torch.no_grad():
        halved[0].weight.mul_(0.5)
    with silent():
        net = snnfx.convert(source, passes=[Declared()])
    assert_same(net(sequence()), run_stepped(halved, sequence()).outputs)
    assert torch.equal(source[0].weight, halved[0].weight)

    @dataclass(frozen=True)
    class Unchanged(Halve):
        def apply(self, program: StepProgram) -> str:
            return "left the weights as they were"

    converts_with(Unchanged())


def test_a_pass_that_breaks_the_graph() -> None:
    @dataclass(frozen=True)
    class Broken(Count):
        may_change = ("graph",)

        def apply(self, program: StepProgram) -> str:
            for node in program.graph.nodes:
                if isinstance(program.module_of(node), nn.ReLU):
                    node.target = "nowhere"
            return "called a missing module"

    refused(
        "SNNFX501",
        "ir/verifier.py:_requirement.require",
        "Correct the pass; the program and the model were put back.",
        lambda: snnfx.convert(model(), passes=[Broken()]),
        at="def apply(self, program: StepProgram) -> str:",
        names="the model has no `nowhere`",
    )

    @dataclass(frozen=True)
    class Corrected(Count):
        may_change = ("graph", "modules")

        def apply(self, program: StepProgram) -> str:
            program.attach("somewhere", nn.ReLU())
            for node in program.graph.nodes:
                if isinstance(program.module_of(node), nn.ReLU):
                    node.target = "somewhere"
            return "called another module"

    converts_with(Corrected())


def test_a_field_that_no_pass_changes() -> None:
    @dataclass(frozen=True)
    class Moving(Count):
        def apply(self, program: StepProgram) -> str:
            program.stage = "planned"
            return "moved"

    refused(
        "SNNFX701",
        "ir/pass_manager.py:_Run._enforce_fields",
        "unchanged; a pass changes the graph and the parts in `may_change`.",
        lambda: snnfx.convert(model(), passes=[Moving()]),
        names="`program.stage`",
    )
    converts_with(Count())


# -- rewrites ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clamp(Rewrite):
    """ReLU as a clamp."""

    name = "clamp"

    def pattern(self, x: Any) -> Any:
        return torch.relu(x)

    def rewrite(self, match: Any) -> Any:
        return match.graph.call_function(torch.clamp, (match["x"], 0.0))


def test_a_rewrite_that_returns_no_node() -> None:
    @dataclass(frozen=True)
    class Silent(Clamp):
        def rewrite(self, match: Any) -> Any:
            super().rewrite(match)

    refused(
        "SNNFX704",
        "ir/rewrite.py:Rewrite._replace",
        "Return the node that replaces the result of the pattern.",
        lambda: snnfx.convert(model(), passes=[Silent()]),
        names="`clamp`",
    )
    assert note_of(converts_with(Clamp()), "clamp") == "replaced 1 of 1 matches"


@pytest.mark.parametrize("result", [lambda x: x, lambda x: (torch.relu(x), x)], ids=["nothing", "two values"])
def test_a_pattern_that_is_no_operation(result: Callable[[Any], Any]) -> None:
    @dataclass(frozen=True)
    class Empty(Clamp):
        def pattern(self, x: Any) -> Any:
            return result(x)

    refused(
        "SNNFX702",
        "ir/rewrite.py:_traced",
        "Return the result of one operation from `pattern`.",
        lambda: snnfx.convert(model(), passes=[Empty()]),
    )
    assert note_of(converts_with(Clamp()), "clamp") == "replaced 1 of 1 matches"
