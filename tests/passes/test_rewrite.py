"""`Rewrite`: patterns, checks with reasons, nearest misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import PassError
from snnfx.ir.call_arguments import operation_key
from snnfx.passes import Match, Rewrite, call


@dataclass(frozen=True)
class Clamp(Rewrite):
    name = "clamp"

    def pattern(self, x: Any) -> Any:
        return torch.relu(x)

    def rewrite(self, match: Match) -> Any:
        return match.graph.call_function(torch.clamp, (match["x"], 0.0, 0.1))


@dataclass(frozen=True)
class ScaledAdd(Rewrite):
    name = "scaled_add"

    def pattern(self, x: Any, y: Any, scale: Any) -> Any:
        return x + y * scale

    def check(self, match: Match) -> str:
        return "" if isinstance(match["scale"], float) else "the scale is not a number"

    def rewrite(self, match: Match) -> Any:
        return match.graph.call_function(torch.add, (match["x"], match["y"]), {"alpha": match["scale"]})


class Applies(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc, self.relu, self.function = nn.Linear(3, 3), nn.ReLU(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def note_of(net: snnfx.Net, name: str) -> str:
    return next(r.note for r in net.history if r.description.startswith(name))


@pytest.mark.parametrize(
    "relu",
    [lambda m, x: x.relu(), lambda m, x: torch.relu(x), lambda m, x: nn.functional.relu(x), lambda m, x: m.relu(x),
     lambda m, x: nn.functional.relu(x, inplace=False)],
)  # fmt: skip
def test_a_function_a_method_and_a_module_are_one_operation(relu: Any) -> None:
    net, x_seq = snnfx.convert(Applies(relu), passes=[Clamp()]), torch.randn(3, 2, 3)
    assert note_of(net, "clamp") == "replaced 1 of 1 matches"
    assert torch.equal(net(x_seq), x_seq.clamp(0.0, 0.1))


@pytest.mark.parametrize("function", [lambda m, x: x + m.fc(x) * 0.5, lambda m, x: 0.5 * m.fc(x) + x])
def test_the_operands_of_a_sum_match_in_both_orders(function: Any) -> None:
    model = Applies(function)
    net, x_seq = snnfx.convert(model, passes=[ScaledAdd()]), torch.randn(3, 2, 3)
    assert note_of(net, "scaled_add") == "replaced 1 of 1 matches"
    torch.testing.assert_close(net(x_seq), model(x_seq))
    assert [n.kwargs for n in net.program.graph.nodes if n.target is torch.add] == [{"alpha": 0.5}]


def test_a_refused_match_gives_the_reason_and_the_place() -> None:
    net = snnfx.convert(Applies(lambda m, x: x + x * m.fc(x)), passes=[ScaledAdd()])
    note = note_of(net, "scaled_add")
    assert note.startswith("replaced 0 of 1 matches; refused `add`") and "test_rewrite.py:" in note
    assert note.endswith("the scale is not a number")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x + m.fc(x) / 2.0, "is truediv, but the pattern has mul"),
        (lambda m, x: (x + (y := m.fc(x) * 0.5)) * y.exp(), "`exp` reads `mul` too"),
    ],
)
def test_the_nearest_miss_is_reported(function: Any, reason: str) -> None:
    model, x_seq = Applies(function), torch.randn(3, 2, 3)
    net = snnfx.convert(model, passes=[ScaledAdd()])
    note = note_of(net, "scaled_add")
    assert note.startswith("replaced 0 of 0 matches; nearest miss: `add`") and reason in note
    torch.testing.assert_close(net(x_seq), model(x_seq))


def test_a_pattern_names_classes_of_modules() -> None:
    @dataclass(frozen=True)
    class DropBias(Rewrite):
        name = "drop_bias"

        def pattern(self, x: Any) -> Any:
            return torch.relu(call(nn.Linear, x))

        def rewrite(self, match: Match) -> Any:
            [_, linear] = match.modules
            weight = match.graph.get_attr("fc.weight")
            assert linear.bias is not None
            return match.graph.call_function(nn.functional.linear, (match["x"], weight))

    model, x_seq = Applies(lambda m, x: m.relu(m.fc(x))), torch.randn(3, 2, 3)
    net = snnfx.convert(model, passes=[DropBias()])
    torch.testing.assert_close(net(x_seq), x_seq @ model.fc.weight.T)


def test_a_replacement_may_contain_the_result_of_the_match() -> None:
    @dataclass(frozen=True)
    class Double(Rewrite):
        name = "double"

        def pattern(self, x: Any) -> Any:
            return torch.tanh(x)

        def rewrite(self, match: Match) -> Any:
            again = match.graph.call_function(torch.tanh, (match["x"],))
            return match.graph.call_function(torch.mul, (again, 2.0))

    net, x_seq = snnfx.convert(Applies(lambda m, x: x.tanh()), passes=[Double()]), torch.randn(3, 2, 3)
    torch.testing.assert_close(net(x_seq), 2 * x_seq.tanh())


def test_a_rewrite_that_returns_no_node_and_an_empty_pattern_are_refused() -> None:
    @dataclass(frozen=True)
    class Empty(Clamp):
        def pattern(self, x: Any) -> Any:
            return x

    @dataclass(frozen=True)
    class Nothing(Clamp):
        def rewrite(self, match: Match) -> Any:
            return None

    for item, code in ((Empty(), "SNNFX702"), (Nothing(), "SNNFX704")):
        with pytest.raises(PassError, match=f"{code}.*`clamp`"):
            snnfx.convert(Applies(lambda m, x: x.relu()), passes=[item])


@pytest.mark.parametrize(
    ("activation", "matches"),
    [
        (nn.GELU(), True), (nn.GELU("tanh"), False), (lambda x: nn.functional.gelu(x, approximate="none"), True),
        (lambda x: nn.functional.gelu(x, approximate="tanh"), False),
    ],
)  # fmt: skip
def test_the_arguments_of_a_module_are_those_of_its_function(activation: Any, matches: bool) -> None:
    @dataclass(frozen=True)
    class NoGelu(Clamp):
        name = "no_gelu"

        def pattern(self, x: Any) -> Any:
            return nn.functional.gelu(x)

    model, x_seq = Applies(lambda m, x: activation(x)), torch.randn(3, 2, 3)
    net = snnfx.convert(model, passes=[NoGelu()])
    torch.testing.assert_close(net(x_seq), x_seq.clamp(0, 0.1) if matches else activation(x_seq))
    if not matches:
        assert "approximate=tanh, but the pattern has none" in note_of(net, "no_gelu")


@pytest.mark.parametrize(
    "softmax",
    [lambda x: torch.softmax(x, -1), lambda x: torch.softmax(x, dim=-1), lambda x: x.softmax(-1), nn.Softmax(dim=-1),
     lambda x: nn.functional.softmax(x, dim=-1), lambda x: nn.functional.softmax(x, -1, dtype=None)],
)  # fmt: skip
def test_arguments_are_compared_by_name(softmax: Any) -> None:
    @dataclass(frozen=True)
    class Log(Clamp):
        name = "log"

        def pattern(self, x: Any, dim: Any) -> Any:
            return torch.softmax(x, dim=dim)

        def rewrite(self, match: Match) -> Any:
            return match.graph.call_function(torch.log_softmax, (match["x"], match["dim"]))

    net, x_seq = snnfx.convert(Applies(lambda m, x: softmax(x)), passes=[Log()]), torch.randn(3, 2, 3)
    torch.testing.assert_close(net(x_seq), x_seq.log_softmax(-1))


def test_a_scaled_sum_does_not_match_in_the_other_order() -> None:
    @dataclass(frozen=True)
    class First(Clamp):
        name = "first"

        def pattern(self, x: Any, y: Any) -> Any:
            return torch.add(torch.exp(x), y, alpha=2)

    net = snnfx.convert(Applies(lambda m, x: torch.add(x, torch.exp(x), alpha=2)), passes=[First()])
    assert note_of(net, "first").startswith("replaced 0 of 0 matches; nearest miss")


def test_a_function_of_another_library_with_the_same_name_does_not_match() -> None:
    def relu(x: Any) -> Any:
        return x

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    own, of_torch = graph.call_function(relu, (x,)), graph.call_function(torch.relu, (x,))
    assert operation_key(own) is relu and operation_key(of_torch) == operation_key(graph.call_method("relu", (x,)))


def test_the_note_names_the_operation_that_the_step_lacks() -> None:
    net = snnfx.convert(Applies(lambda m, x: x.tanh()), passes=[Clamp()])
    assert note_of(net, "clamp") == "replaced 0 of 0 matches; the step has no relu"


def test_the_place_of_a_rewrite_is_in_the_file_of_the_user() -> None:
    @dataclass(frozen=True)
    class Empty(Clamp):
        def pattern(self, x: Any) -> Any:
            return x

    with pytest.raises(PassError, match=r"\(\S*test_rewrite.py:\d+\)"):
        snnfx.convert(Applies(lambda m, x: x.relu()), passes=[Empty()])
