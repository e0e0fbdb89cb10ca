"""Passes of the user's own in `convert`: where they run, what they survive, and what they may not change."""

from __future__ import annotations

import copy
import operator
import pickle
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, InputError, PassError, SnnfxWarning
from snnfx.passes import Pass, PassManager, StepProgram, pipeline

STAGES = ("captured", "normalized", "partitioned", "planned")
UPPER = 0.3


def replace_relu(program: StepProgram) -> str:
    """Replace every ReLU by a clamp to [0, UPPER]."""
    replaced = 0
    for node in list(program.graph.nodes):
        is_module = isinstance(program.module_of(node), nn.ReLU)
        if is_module or node.target in ("relu", torch.relu, nn.functional.relu):
            with program.graph.inserting_before(node):
                new = program.graph.call_function(torch.clamp, (node.args[0], 0.0, UPPER))
            node.replace_all_uses_with(new)
            program.graph.erase_node(node)
            replaced += 1
    return f"replaced {replaced} ReLUs"


@dataclass(frozen=True)
class Captured(Pass):
    name = "relu_to_clamp"
    requires = "captured"

    def apply(self, program: StepProgram) -> str:
        return replace_relu(program)


@dataclass(frozen=True)
class Normalized(Captured):
    requires = "normalized"


@dataclass(frozen=True)
class Partitioned(Captured):
    requires = "partitioned"


@dataclass(frozen=True)
class Planned(Captured):
    requires = "planned"


CLAMPS: dict[str, Pass] = {
    "captured": Captured(),
    "normalized": Normalized(),
    "partitioned": Partitioned(),
    "planned": Planned(),
}


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, 0.0, UPPER)


class Net(nn.Module):
    """ReLUs before and after a neuron, one of them as a method."""

    def __init__(self, activation: nn.Module | None = None, norm: bool = True) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(3, 6), activation or nn.ReLU(), nn.Linear(6, 4)
        self.norm, self.lif, self.out = (
            nn.BatchNorm1d(6) if norm else nn.Identity(),
            neuron.LIFNode(),
            activation or nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc2(self.lif(4 * self.act(self.norm(self.fc1(x))))))


class Relu(nn.Module):
    """A first step that differs from the others."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x).relu()
        if self.last is not None:
            y = (y + 0.5 * self.last).relu()
        self.last = y
        return y


def stepped(model: nn.Module, x_seq: Tensor) -> Tensor:
    snnfx.functional.reset_net(model)
    y_seq = torch.stack([model(x) for x in x_seq])
    snnfx.functional.reset_net(model)
    return y_seq


def pair(norm: bool = True) -> tuple[Net, Net]:
    """A model, and the same model with the clamp in place of ReLU."""
    model = Net(norm=norm).double()
    other = Net(Clamp(), norm).double()
    other.load_state_dict(model.state_dict())
    return model, other


@pytest.mark.parametrize("with_examples", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_runs_at_every_stage_in_training_and_evaluation(stage: str, with_examples: bool) -> None:
    model, oracle = pair()
    x_seq = torch.randn(5, 4, 3, dtype=torch.float64)
    net = snnfx.convert(
        model, batch_norm="per_step", example_inputs=x_seq[0] if with_examples else None, passes=[CLAMPS[stage]]
    )
    for training in (True, False):
        net.train(training), oracle.train(training)
        expected = stepped(oracle, x_seq)
        y_seq = net(x_seq)
        torch.testing.assert_close(y_seq, expected)
        if training:
            y_seq.sum().backward(), expected.sum().backward()
            for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
    assert not [n for n in net.program.graph.nodes if isinstance(net.program.module_of(n), nn.ReLU)]
    assert next(r.stage for r in net.history if r.description == "relu_to_clamp") in (stage, "normalized")
    report = snnfx.explain(net)
    assert any(row.description == "relu_to_clamp" for row in report.passes)
    assert report.options["passes"] == ("relu_to_clamp",)


@pytest.mark.parametrize("stage", STAGES)
def test_the_pass_survives_copies_and_pickles(stage: str) -> None:
    model, oracle = pair(norm=False)
    x_seq = torch.randn(3, 4, 3, dtype=torch.float64)
    net = snnfx.convert(model.eval(), passes=[CLAMPS[stage]])
    expected = stepped(oracle.eval(), x_seq)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(other(x_seq), expected)
        assert other.options.passes == (CLAMPS[stage],)
        with pytest.warns(SnnfxWarning, match="SNNFX102"):
            torch.testing.assert_close(other(x_seq[:, 0]), stepped(oracle, x_seq[:, :1])[:, 0])
        assert "clamp" in str(other.history)


@pytest.mark.parametrize("stage", STAGES)
def test_the_pass_runs_again_at_a_replan_and_after_a_setting_changed(stage: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.lif = 1.0, neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif((x * self.scale).relu() * 10)

    class Oracle(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            return self.lif(torch.clamp(x * self.scale, 0, UPPER) * 10)

    net, oracle = snnfx.convert(Scaled(), passes=[CLAMPS[stage]]), Oracle()
    x_seq = torch.rand(4, 2, 3)
    torch.testing.assert_close(net(x_seq), stepped(oracle, x_seq))
    net.source.scale = oracle.scale = 0.2
    with pytest.warns(SnnfxWarning, match="SNNFX315"):
        torch.testing.assert_close(net(x_seq), stepped(oracle, x_seq))
    assert "relu_to_clamp" in [r.description for r in net.history]


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_pass_runs_on_a_first_step_that_differs(stage: str, step_mode: str) -> None:
    model = Relu()
    net = snnfx.convert(model, step_mode, passes=[CLAMPS[stage]])
    assert net.program.first_step is not None
    x_seq = 3 * torch.randn(4, 2, 3)
    last, expected = None, []
    for x in x_seq:
        y = torch.clamp(model.fc(x), 0, UPPER)
        last = y if last is None else torch.clamp(y + 0.5 * last, 0, UPPER)
        expected.append(last)
    outputs = net(x_seq) if step_mode == "m" else torch.stack([net(x) for x in x_seq])
    torch.testing.assert_close(outputs, torch.stack(expected))


@pytest.mark.parametrize("stage", STAGES)
def test_a_pass_works_with_other_options(stage: str) -> None:
    model, oracle = pair()
    model.eval(), oracle.eval()
    x_seq = torch.randn(6, 4, 3, dtype=torch.float64)
    expected = stepped(oracle, x_seq)
    for options in (
        {"chunk": 2}, {"memory_budget": "1MiB"}, {"lower": None}, {"carry_state": True}, {"checkpoint": "regions"},
        {"checkpoint": 2}, {"memory_format": None},
    ):  # fmt: skip
        net = snnfx.convert(model, example_inputs=x_seq[0], passes=[CLAMPS[stage]], **options)
        torch.testing.assert_close(net(x_seq), expected)
        with torch.no_grad():
            snnfx.functional.reset_net(net)
            torch.testing.assert_close(net(x_seq), expected)
    for reduce in ("mean", "last"):
        net = snnfx.convert(model, example_inputs=x_seq[0], passes=[CLAMPS[stage]], reduce=reduce)
        torch.testing.assert_close(net(x_seq), expected.mean(0) if reduce == "mean" else expected[-1])


def test_an_online_rule_trains_the_changed_step() -> None:
    from snnfx.online import SLTT, Trainer

    losses = []
    for stage in STAGES:
        torch.manual_seed(0)
        model, oracle = pair()
        nets = (snnfx.convert(model.eval(), passes=[CLAMPS[stage]]), snnfx.convert(oracle.eval()))
        x_seq, target = torch.randn(4, 4, 3, dtype=torch.float64), torch.zeros(4, 4, 4, dtype=torch.float64)
        for net in nets:
            trainer = Trainer(net, SLTT, torch.optim.SGD(net.parameters(), 0.1), nn.functional.mse_loss)
            trainer.step(x_seq, target)
        for a, b in zip(model.parameters(), oracle.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        losses.append(stage)
    assert losses == [*STAGES]


@pytest.mark.slow
def test_a_compiled_net_runs_the_pass() -> None:
    model, oracle = pair()
    x_seq = torch.randn(3, 4, 3, dtype=torch.float64)
    net = torch.compile(
        snnfx.convert(model.eval(), passes=[CLAMPS["partitioned"]]), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(net(x_seq), stepped(oracle.eval(), x_seq))


def test_a_pass_may_depend_on_the_mode() -> None:
    """The nodes of both programs have equal names."""

    @dataclass(frozen=True)
    class InEvaluation(Pass):
        name = "in_evaluation"
        requires = "normalized"

        def apply(self, program: StepProgram) -> str:
            if program.training:
                return "nothing"
            for node in program.graph.nodes:
                if node.target == "relu":
                    node.target = "neg"
            return "relu becomes neg"

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    net, x_seq = snnfx.convert(Model(), passes=[InEvaluation()]), torch.randn(3, 2, 4)
    assert torch.equal(net(x_seq), x_seq.relu())
    assert torch.equal(net.eval()(x_seq), -x_seq)


def test_an_operation_that_mixes_samples_is_mapped() -> None:
    for stage in STAGES:

        @dataclass(frozen=True)
        class Centre(Pass):
            name = "centre"
            requires = stage

            def apply(self, program: StepProgram) -> str:
                for node in list(program.graph.nodes):
                    if node.op == "call_module" and "centred" not in node.meta:
                        with program.graph.inserting_after(node):
                            mean = program.graph.call_method("mean", (node,), {"dim": 0, "keepdim": True})
                        with program.graph.inserting_after(mean):
                            new = program.graph.call_function(torch.sub, (node, mean))
                        node.replace_all_uses_with(new, delete_user_cb=lambda user, own=(mean, new): user not in own)
                        node.meta["centred"] = True
                return "centred"

        model, x_seq = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 5, 3)
        y_seq = snnfx.convert(model, passes=[Centre()])(x_seq)
        expected = model(x_seq)
        torch.testing.assert_close(y_seq, expected - expected.mean(1, keepdim=True))


def test_a_net_refuses_passes_at_a_second_conversion() -> None:
    net = snnfx.convert(nn.Linear(3, 2))
    with pytest.raises(InputError, match=r"SNNFX309(.|\n)*net\.source"):
        snnfx.convert(net, passes=[Captured()])


def test_a_user_may_run_a_pipeline_of_their_own() -> None:
    from snnfx.capture.capture import capture

    program = capture(Net())
    history = PassManager([Captured(), *pipeline(program)]).run(program)
    assert program.stage == "planned" and history[0].note == "replaced 2 ReLUs"


# -- what a pass may not do --------------------------------------------------------------------------------------------


def applying(
    function: Callable[[StepProgram], Any], stage: str = "normalized", changes: tuple[str, ...] = ("graph",)
) -> Pass:
    @dataclass(frozen=True)
    class Stranger(Pass):
        name = "stranger"
        requires = stage
        may_change = changes

        def apply(self, program: StepProgram) -> str:
            note = function(program)
            return "done" if note is None else note

    return Stranger()


def halve_a_weight(program: StepProgram) -> None:
    program.source.fc1.weight.data.mul_(0.5)


def freeze_a_weight(program: StepProgram) -> None:
    program.source.fc1.weight.requires_grad_(False)


def change_statistics(program: StepProgram) -> None:
    program.source.norm.running_mean += 1


def flip_training(program: StepProgram) -> None:
    program.source.train(not program.source.training)


def set_an_attribute(program: StepProgram) -> None:
    program.source.lif.tau = 99.0


def add_an_attribute(program: StepProgram) -> None:
    program.source.remark = "seen"


def add_a_hook(program: StepProgram) -> None:
    program.source.fc1.register_forward_hook(lambda *_: None)


def replace_a_module(program: StepProgram) -> None:
    program.source.fc2 = nn.Linear(6, 4)


def add_a_module(program: StepProgram) -> None:
    program.source.extra = nn.Linear(6, 4)


MODEL_CHANGES: dict[Callable[[StepProgram], None], str] = {
    halve_a_weight: "the value of `fc1.weight`",
    freeze_a_weight: "`fc1.weight.requires_grad`",
    change_statistics: "the value of `norm.running_mean`",
    flip_training: "`training`",
    set_an_attribute: "`lif.tau`",
    add_an_attribute: "`remark`",
    add_a_hook: "`fc1._forward_hooks`",
    replace_a_module: "the replaced submodule `fc2`",
    add_a_module: "the added submodule `extra`",
}


@pytest.mark.parametrize("change", MODEL_CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("stage", ["captured", "planned"])
def test_a_change_of_the_model_is_put_back_and_the_pass_named(
    change: Callable[[StepProgram], None], stage: str
) -> None:
    model = Net()
    values = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(PassError, match="SNNFX701 the pass `stranger` changed") as caught:
        snnfx.convert(model, passes=[applying(change, stage)])
    assert MODEL_CHANGES[change] in str(caught.value) and "test_user_passes.py" in caught.value.where
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == values.keys()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(p.requires_grad for p in model.parameters()) and not model.fc1._forward_hooks
    snnfx.verify(model, snnfx.convert(model), torch.randn(3, 4, 3))


def test_a_declared_change_of_a_weight_stays() -> None:
    def zero(program: StepProgram) -> None:
        program.source.fc2.weight.data.zero_()

    model = Net()
    net = snnfx.convert(model, passes=[applying(zero, changes=("parameters",))])
    assert not model.fc2.weight.any() and torch.equal(net(torch.rand(2, 2, 3))[0, 0], model.fc2.bias.relu())


def test_a_pass_does_not_change_the_generators() -> None:
    def draw(program: StepProgram) -> None:
        torch.rand(3)

    model, state = Net(), torch.get_rng_state()
    snnfx.convert(model, passes=[applying(draw)])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pass_may_attach_its_own_parameter() -> None:
    def scale(program: StepProgram) -> str:
        program.attach("gain", nn.Parameter(torch.full((4,), 2.0)))
        program.attach("tail", nn.Linear(4, 2))
        if not any(node.target == "gain" for node in program.graph.nodes):
            [last] = program.outputs
            with program.graph.inserting_before(program.output):
                gain = program.graph.get_attr("gain")
                product = program.graph.call_function(torch.mul, (last, gain))
                tail = program.graph.call_module("tail", (product,))
            program.set_output([tail], program.next_states, program.initial_values)
        return "scaled"

    for stage in STAGES:
        model, x_seq = Net(norm=False), torch.rand(3, 2, 3)
        net = snnfx.convert(model, passes=[applying(scale, stage, ("graph", "modules"))])
        assert {"gain", "tail.weight"} <= {name for name, _ in net.named_parameters()} and "gain" in net.state_dict()
        with torch.no_grad():
            model.gain.mul_(3)
        for other in (net, copy.deepcopy(net)):
            torch.testing.assert_close(other.eval()(x_seq), model.tail(stepped(model.eval(), x_seq) * 6))
        net(x_seq).sum().backward()
        assert model.gain.grad is not None and model.tail.weight.grad is not None
        with pytest.warns(SnnfxWarning, match="SNNFX102"):
            y_seq = net(x_seq[:, 0])
        torch.testing.assert_close(y_seq, net(x_seq[:, :1])[:, 0])


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@dataclass(frozen=True)
class Scale(Pass):
    """Attach a module with the option of the pass, and scale the output by it."""

    name = "scale"
    requires = "normalized"
    may_change = ("graph", "modules")
    factor: float = 2.0

    def apply(self, program: StepProgram) -> str:
        program.attach("scaled", Scaled(self.factor))
        with program.graph.inserting_before(program.output):
            new = program.graph.call_module("scaled", (program.outputs[0],))
        program.set_output([new], program.next_states, program.initial_values)
        return "scaled"


def test_an_attached_module_is_shared_by_conversions_with_equal_options_only() -> None:
    model, x_seq = nn.Linear(3, 2), torch.rand(3, 2, 3)
    net = snnfx.convert(model, passes=[Scale(2.0)])
    again = snnfx.convert(model, passes=[Scale(2.0)])
    torch.testing.assert_close(again(x_seq), 2 * model(x_seq))
    with pytest.raises(
        PassError, match=r"SNNFX703(.|\n)*has `scaled` already, and its factor is 2.0, not 3.0"
    ) as caught:
        snnfx.convert(model, passes=[Scale(3.0)])
    assert "test_user_passes.py:" in caught.value.where
    torch.testing.assert_close(net.double()(x_seq.double()), 2 * model(x_seq.double()))
    other = nn.Linear(3, 2)
    torch.testing.assert_close(snnfx.convert(other, passes=[Scale(3.0)])(x_seq), 3 * other(x_seq))


@pytest.mark.parametrize("stage", STAGES)
def test_a_module_attached_to_a_container_is_not_a_layer_of_it(stage: str) -> None:
    @dataclass(frozen=True)
    class Replace(Pass):
        name = "replace"
        requires = stage
        may_change = ("graph", "modules")

        def apply(self, program: StepProgram) -> str:
            for node in program.graph.nodes:
                if isinstance(program.module_of(node), nn.ReLU):
                    program.attach(f"{node.target}_clamp", Clamp())
                    node.target = f"{node.target}_clamp"
                    assert isinstance(program.module_of(node), Clamp)
            return "replaced"

    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), neuron.LIFNode(v_threshold=0.2)), nn.ReLU())
    plain = copy.deepcopy(model)
    oracle = nn.Sequential(plain[0], nn.Sequential(Clamp(), plain[1][1]), Clamp())
    net, x_seq = snnfx.convert(model, passes=[Replace()]), torch.randn(4, 2, 3)
    for other in (net, copy.deepcopy(net), copy.deepcopy(net).eval()):
        torch.testing.assert_close(other(x_seq), stepped(oracle, x_seq))
    with pytest.warns(SnnfxWarning, match="SNNFX102"):
        torch.testing.assert_close(net(x_seq[:, 0]), stepped(oracle, x_seq[:, :1])[:, 0])
    torch.testing.assert_close(stepped(model, x_seq), stepped(plain, x_seq))


@pytest.mark.parametrize("value", [nn.ReLU(), nn.Linear(3, 7), nn.Parameter(torch.ones(2))], ids=str)
def test_a_name_that_the_model_uses_is_refused(value: Any) -> None:
    model = Net()
    layer = model.fc1
    item = applying(lambda program: program.attach("fc1", value) and None, changes=("graph", "modules"))
    with pytest.raises(PassError, match="SNNFX703 the pass `stranger` failed(.|\n)*the model has `fc1` already"):
        snnfx.convert(model, passes=[item])
    assert model.fc1 is layer


def test_constants_of_both_modes_stay_apart() -> None:
    def offset(program: StepProgram) -> str:
        [last] = program.outputs
        with program.graph.inserting_before(program.output):
            constant = program.add_constant("offset", torch.full((4,), 1.0 if program.training else 2.0))
            new = program.graph.call_function(torch.add, (last, constant))
        program.set_output([new], program.next_states, program.initial_values)
        return "offset"

    model = nn.Linear(3, 4)
    net, x_seq = snnfx.convert(model, passes=[applying(offset)]), torch.rand(2, 2, 3)
    torch.testing.assert_close(net(x_seq), model(x_seq) + 1)
    torch.testing.assert_close(net.eval()(x_seq), model(x_seq) + 2)
    torch.testing.assert_close(pickle.loads(pickle.dumps(snnfx.convert(model)))(x_seq), model(x_seq))


def erase_a_used_node(program: StepProgram) -> None:
    program.graph.erase_node(next(n for n in program.graph.nodes if n.op == "call_module"))


def raise_an_error(program: StepProgram) -> None:
    raise KeyError("nothing here")


@pytest.mark.parametrize("fail", [erase_a_used_node, raise_an_error])
def test_a_pass_that_raises_is_named_with_the_place(fail: Callable[[StepProgram], None]) -> None:
    with pytest.raises(PassError, match="SNNFX703 the pass `stranger` failed") as caught:
        snnfx.convert(Net(), passes=[applying(fail)])
    assert caught.value.__cause__ is not None and ".py:" in caught.value.where


def test_an_error_with_a_code_stays() -> None:
    def refuse(program: StepProgram) -> None:
        raise CaptureError("SNNFX201", "not today")

    with pytest.raises(CaptureError, match="not today"):
        snnfx.convert(Net(), passes=[applying(refuse)])


@pytest.mark.parametrize("result", [None, 3, ["done"]])
def test_a_pass_without_a_note_is_refused(result: Any) -> None:
    @dataclass(frozen=True)
    class Silent(Pass):
        name = "silent"

        def apply(self, program: StepProgram) -> Any:
            return result

    with pytest.raises(PassError, match="SNNFX704 the pass `silent` returned no note"):
        snnfx.convert(Net(), passes=[Silent()])


def test_dead_nodes_are_removed() -> None:
    def leave(program: StepProgram) -> None:
        with program.graph.inserting_before(program.output):
            program.graph.call_function(torch.exp, (program.input_nodes()[0],))

    for stage in STAGES:
        net, x_seq = snnfx.convert(Net(), passes=[applying(leave, stage)]), torch.rand(2, 2, 3)
        snnfx.verify(net.source, net, x_seq)
        if stage in ("captured", "normalized"):
            assert not [n for n in net.program.graph.nodes if n.target is torch.exp]


def call_a_missing_module(program: StepProgram) -> None:
    [last] = program.outputs
    with program.graph.inserting_before(program.output):
        new = program.graph.call_module("nowhere", (last,))
    program.set_output([new], program.next_states, program.initial_values)


def change_in_place(program: StepProgram) -> None:
    [last] = program.outputs
    with program.graph.inserting_before(program.output):
        new = program.graph.call_method("add_", (last, 1.0))
    program.set_output([new], program.next_states, program.initial_values)


def record_a_wrong_shape(program: StepProgram) -> None:
    [last] = program.outputs
    with program.graph.inserting_before(program.output):
        new = program.graph.call_function(torch.neg, (last,))
    new.meta["val"] = torch.empty(7, 7, device="meta")
    program.set_output([new], program.next_states, program.initial_values)


def add_behind_the_output(program: StepProgram) -> None:
    with program.graph.inserting_after(program.output):
        program.graph.call_function(torch.neg, (program.input_nodes()[0],))


def return_another_number_of_outputs(program: StepProgram) -> None:
    program.set_output([*program.outputs, program.outputs[0]], program.next_states, program.initial_values)


def set_a_fact_of_another_type(program: StepProgram) -> None:
    program.outputs[0].meta["module"] = 3


def read_a_missing_parameter(program: StepProgram) -> None:
    with program.graph.inserting_before(program.output):
        gain = program.graph.get_attr("gain")
        new = program.graph.call_function(torch.mul, (program.outputs[0], gain))
    program.set_output([new], program.next_states, program.initial_values)


def _insert(program: StepProgram, function: Any, *args: Any, **kwargs: Any) -> None:
    """Put a call behind the first layer; None stands for its result."""
    node = next(n for n in program.graph.nodes if n.target == "fc1")
    with program.graph.inserting_after(node):
        new = program.graph.call_function(
            function,
            tuple(node if a is None else a for a in args),
            {k: node if v is None else v for k, v in kwargs.items()},
        )
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def write_into_an_operand(program: StepProgram) -> None:
    _insert(program, torch.clamp, None, 0.0, out=None)


def contain_a_tensor(program: StepProgram) -> None:
    _insert(program, torch.add, None, torch.ones(6))


def reshape_to_a_size_that_does_not_fit(program: StepProgram) -> None:
    _insert(program, torch.reshape, None, (5, 5))


def change_a_part_in_place(program: StepProgram) -> None:
    node = next(n for n in program.graph.nodes if n.target == "fc1")
    with program.graph.inserting_after(node):
        program.graph.call_function(operator.setitem, (node, 0, 0.0))


def work_in_place_on_a_shared_operand(program: StepProgram) -> None:
    program.attach("unsafe", nn.ReLU(inplace=True))
    node = next(n for n in program.graph.nodes if n.target == "fc1")
    with program.graph.inserting_after(node):
        relu = program.graph.call_module("unsafe", (node,))
    with program.graph.inserting_after(relu):
        new = program.graph.call_function(torch.add, (relu, node))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user not in (relu, new))


def record_a_wrong_shape_of_an_old_node(program: StepProgram) -> None:
    next(n for n in program.graph.nodes if n.target == "fc1").meta["val"] = torch.empty(7, 7, device="meta")


def read_a_node_of_another_graph(program: StepProgram) -> None:
    next(n for n in program.graph.nodes if n.target == "fc1").args = (torch.fx.Graph().placeholder("x"),)


def add_a_placeholder(program: StepProgram) -> None:
    with program.graph.inserting_before(next(n for n in program.graph.nodes if n.op != "placeholder")):
        extra = program.graph.placeholder("extra")
    next(n for n in program.graph.nodes if n.target == "fc1").args = (extra,)


BREAKS: dict[Callable[[StepProgram], None], str] = {
    call_a_missing_module: "does not reference an nn.Module|has no `nowhere`",
    change_in_place: "in-place operation, and the program is normalized",
    record_a_wrong_shape: r"recorded as \[7, 7\] float32, but it is \[2, 4\] float32",
    add_behind_the_output: "behind the output",
    return_another_number_of_outputs: "2 outputs, but the model returns 1",
    set_a_fact_of_another_type: "its fact 'module' is a int",
    read_a_missing_parameter: "the model has no `gain`",
    change_a_part_in_place: "in-place operation, and the program is normalized",
    work_in_place_on_a_shared_operand: "its module has inplace=True, and add reads its operand too",
    record_a_wrong_shape_of_an_old_node: r"recorded as \[7, 7\] float32, but it is \[2, 6\] float32",
    read_a_node_of_another_graph: "its operand x belongs to another graph",
    add_a_placeholder: "placeholder of no slot and no input",
    write_into_an_operand: "in-place operation, and the program is normalized",
    contain_a_tensor: "an argument is a tensor; use program.add_constant",
    reshape_to_a_size_that_does_not_fit: r"it fails with RuntimeError: shape '\[5, 5\]' is invalid",
}


@pytest.mark.parametrize("change", BREAKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("stage", ["normalized", "planned"])
def test_a_pass_that_breaks_the_graph_is_refused(change: Callable[[StepProgram], None], stage: str) -> None:
    model, item = Net(), applying(change, stage, ("graph", "modules"))
    pattern = f"SNNFX501 the pass `stranger` broke the graph(.|\n)*({BREAKS[change]})"
    with pytest.raises(PassError, match=pattern) as caught:
        snnfx.convert(model, example_inputs=torch.rand(2, 3), passes=[item])
    assert "test_user_passes.py:" in caught.value.where and caught.value.hint
    assert model.state_dict().keys() == Net().state_dict().keys() and not hasattr(model, "unsafe")


@pytest.mark.parametrize("kind", ["parameters", "modules"])
def test_a_declared_change_is_put_back_if_the_conversion_fails(kind: str) -> None:
    """By the pass itself, or by a pass after it."""

    def change(program: StepProgram) -> None:
        if kind == "parameters":
            program.source.fc1.weight.data.zero_()
        else:
            program.attach("extra", nn.Linear(2, 2))

    def change_and_break(program: StepProgram) -> None:
        change(program)
        call_a_missing_module(program)

    for passes in ([applying(change_and_break, changes=("graph", kind))],
                   [applying(change, changes=("graph", kind)), applying(raise_an_error)]):  # fmt: skip
        model = Net()
        values = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(PassError):
            snnfx.convert(model, passes=passes)
        assert values.keys() == model.state_dict().keys()
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def replace_the_mode(program: StepProgram) -> None:
    program.training = not program.training


def replace_the_stage(program: StepProgram) -> None:
    program.stage = "planned"


def replace_the_model(program: StepProgram) -> None:
    program.source = nn.Linear(3, 3)


def forget_what_the_graph_depends_on(program: StepProgram) -> None:
    program.setting_reads = []


def change_a_constant(program: StepProgram) -> None:
    for value in program.constants.values():
        value.zero_()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (replace_the_mode, "training"), (replace_the_stage, "stage"), (replace_the_model, "source"),
        (forget_what_the_graph_depends_on, "setting_reads"), (change_a_constant, "constants"),
    ],
)  # fmt: skip
def test_fields_that_no_pass_changes_are_put_back(change: Callable[[StepProgram], None], field: str) -> None:
    offset = torch.ones(4)

    class Offset(Net):
        gain = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain + offset

    model = Offset()
    with pytest.raises(PassError, match=f"SNNFX701 the pass `stranger` changed `program.{field}"):
        snnfx.convert(model, passes=[applying(change)])
    assert offset.all()
    snnfx.verify(model, snnfx.convert(model), torch.randn(3, 4, 3))


def test_a_change_of_the_first_step_alone_is_found() -> None:
    def change(program: StepProgram) -> None:
        if program.first_step is not None:
            return
        program.set_output([program.input_nodes()[0]], program.next_states, program.initial_values)

    with pytest.raises(PassError, match="SNNFX701 the pass `stranger` changed the graph"):
        snnfx.convert(Relu(), passes=[applying(change, changes=())])


def test_a_program_that_a_pass_keeps_is_not_that_of_the_net() -> None:
    kept: list[StepProgram] = []

    def keep(program: StepProgram) -> None:
        kept.append(program)

    net, x_seq = (
        snnfx.convert(Net(norm=False), passes=[applying(keep, stage, ()) for stage in STAGES]),
        torch.rand(3, 2, 3),
    )
    expected = net(x_seq)
    for program in kept:
        replace_relu(program)
    for other in (net, copy.deepcopy(net), copy.deepcopy(net).eval()):
        torch.testing.assert_close(other(x_seq), expected)
    assert "relu_to_clamp" not in str(net.history) and "clamp(" not in str(net.program)


def test_a_seed_of_a_pass_is_undone() -> None:
    def seed(program: StepProgram) -> None:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)

    model = Net()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    snnfx.convert(model, passes=[applying(seed)])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # type: ignore[index]


def test_an_operation_in_place_is_legal_before_normalisation() -> None:
    net, x_seq = snnfx.convert(Net(), passes=[applying(change_in_place, "captured")]), torch.rand(2, 2, 3)
    torch.testing.assert_close(net.eval()(x_seq), stepped(net.source, x_seq) + 1)


def test_a_failed_pass_puts_the_program_back() -> None:
    from snnfx.capture.capture import capture

    program = capture(Net())
    before = str(program)
    for function in (call_a_missing_module, halve_a_weight, raise_an_error):
        with pytest.raises(PassError):
            PassManager([applying(function, "captured")]).run(program)
        assert str(program) == before


def test_an_undeclared_part_of_the_program_is_put_back() -> None:
    def drop(program: StepProgram) -> None:
        program.regions = program.regions[:-1]

    with pytest.raises(PassError, match="SNNFX701 the pass `stranger` changed the regions of the program"):
        snnfx.convert(Net(), passes=[applying(drop, "partitioned")])
    with pytest.raises(PassError, match="SNNFX701 the pass `stranger` changed the graph of the program"):
        snnfx.convert(Net(), passes=[applying(lambda p: replace_relu(p), "normalized", ())])


# -- definitions -------------------------------------------------------------------------------------------------------


class WithoutDataclass(Pass):
    name = "plain"
    gain: float

    def apply(self, program: StepProgram) -> str:
        return ""


class SetsAttributes(Pass):
    name = "sets"

    def __init__(self, gain: float) -> None:
        object.__setattr__(self, "gain", gain)

    def apply(self, program: StepProgram) -> str:
        return ""


class NoApply(Pass):
    name = "empty"


class NoName(Pass):
    def apply(self, program: StepProgram) -> str:
        return ""


@dataclass(frozen=True)
class Jumps(Pass):
    name = "jumps"
    ensures = "planned"

    def apply(self, program: StepProgram) -> str:
        return ""


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ([applying(replace_relu, "optimised")], "no stage 'optimised'"),
        ([applying(replace_relu, changes=("weights",))], "contains 'weights'"),
        ([Captured], r"is a class, not an instance.\nWrite Captured\(\)"),
        ([replace_relu], "not an instance of snnfx.passes.Pass"),
        (Captured(), "not a sequence"),
        ([WithoutDataclass()], "`gain` is not a field.\nDecorate the class"),
        ([SetsAttributes(2.0)], "`gain` is not a field"),
        ([NoApply()], "does not implement `apply`"),
        ([NoName()], "has no name"),
        ([Jumps()], "from stage 'captured' to stage 'planned'"),
    ],
)
def test_a_pass_that_is_not_well_defined_is_refused_before_capture(passes: Any, reason: str) -> None:
    class Untouched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(PassError, match=f"SNNFX702(.|\n)*{reason}"):
        snnfx.convert(Untouched(), passes=passes)


@dataclass(frozen=True)
class Holds(Pass):
    name = "holds"
    function: Any = None

    def apply(self, program: StepProgram) -> str:
        return "nothing"


def test_a_lambda_is_named_when_the_net_is_pickled() -> None:
    net, x_seq = snnfx.convert(Net(), passes=[Holds(lambda x: x)]), torch.rand(2, 2, 3)
    assert torch.equal(copy.deepcopy(net.eval())(x_seq), net(x_seq))
    with pytest.raises(PassError, match="SNNFX705.*`holds`(.|\n)*`function` is not picklable"):
        pickle.dumps(net)
    with pytest.raises(PassError, match="SNNFX705.*`stranger`(.|\n)*its class is not picklable"):
        pickle.dumps(snnfx.convert(Net(), passes=[applying(lambda p: None)]))
