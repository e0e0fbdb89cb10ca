"""Models with a time axis that have a step form: state, streams, records, chunks, single steps, online rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.cli.commands import main
from support.looped_models import assert_converts_sequence
from support.published_styles import (
    ChunkAttention,
    Containers,
    Detector,
    LoopNeuron,
    MultiScale,
    ReducedHead,
    TokenAttention,
)
from support.stepping import assert_same


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


IMAGES = (6, 3, 2, 8, 8)
MODELS = {
    "tokens": (lambda: TokenAttention(), (6, 3, 6, 5)),
    "scales": (lambda: MultiScale(), (6, 3, 4, 4, 4)),
    "containers": (lambda: Containers(0), (6, 3, 2, 4, 4)),
    "detector": (lambda: Detector(), IMAGES),
    "neurons": (lambda: nn.Sequential(nn.Linear(6, 8), LoopNeuron(), nn.Linear(8, 3), LoopNeuron()), (6, 3, 6)),
    "neurons_dim1": (lambda: nn.Sequential(nn.Linear(6, 8), LoopNeuron(1), nn.Linear(8, 3)), (3, 6, 6)),
}


@pytest.mark.parametrize("name", MODELS)
def test_pieces_streams_chunks_and_steps_give_prefixes_of_the_own_call(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), sequence(*shape)
    dim = 1 if name == "neurons_dim1" else 0
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,), chunk=2)
    assert net.program.whole_sequences is None

    def cut(value: object, start: int, stop: int) -> object:
        return torch.utils._pytree.tree_map(lambda v: v.narrow(dim, start, stop - start), value)

    expected = model(x)
    with torch.no_grad():
        assert_same(net(x), expected)
    first, state = net.run(cut(x, 0, 4))
    assert_same(first, model(cut(x, 0, 4)))
    second, _ = net.run(cut(x, 4, 6), state=state)
    assert_same(second, cut(expected, 4, 6))
    parts = list(net.stream([cut(x, 0, 1), cut(x, 1, 6)]))
    assert_same(parts[0], cut(expected, 0, 1))
    assert_same(parts[1], cut(expected, 1, 6))
    step = snnfx.convert(net, step_mode="s")
    for t in range(3):
        y = step(x.select(dim, t))
        assert_same(y, torch.utils._pytree.tree_map(lambda v, t=t: v.select(dim, t), expected))


@pytest.mark.parametrize("how", ["front", "mean", "sum", "last"])
def test_reductions_over_time_at_the_end(how: str) -> None:
    model, x = ReducedHead(how).double(), sequence(6, 3, 6)
    net = assert_converts_sequence(model, (x,), [(sequence(3, 4, 6),)])
    assert net.options.reduce == ("mean" if how == "front" else how)
    last = list(net.eval().stream(x.split(2)))[-1]
    assert_same(last, copy.deepcopy(model).eval()(x))


def test_training_in_two_pieces_gives_the_gradients_of_one_call() -> None:
    model = nn.Sequential(nn.Linear(6, 8), LoopNeuron(), nn.Linear(8, 3), LoopNeuron()).double()
    x = sequence(6, 3, 6)
    net = snnfx.convert(copy.deepcopy(model), takes="sequence", example_inputs=(3 * x,))
    first, state = net.run(3 * x[:4])
    second, _ = net.run(3 * x[4:], state=state)
    (torch.cat([first, second]) ** 2).sum().backward()
    (model(3 * x) ** 2).sum().backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in model.parameters()])


def test_records_are_named_after_the_modules_of_the_model() -> None:
    model, x = Containers(0).double().eval(), sequence(6, 3, 2, 4, 4)
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    potentials = [slot.name for slot in net.program.slots]
    assert potentials == ["sn1.mem", "sn2.mem"]
    _, _, records = net.run(x, record=tuple(potentials))
    assert records["sn1.mem"].shape == (6, 3, 4, 4, 4)


def test_a_norm_outside_the_loops_takes_statistics_of_the_whole_call() -> None:
    net = assert_converts_sequence(Containers(0), (sequence(6, 3, 2, 4, 4),), [(sequence(3, 2, 2, 4, 4),)])
    assert net.options.batch_norm == "fold"
    assert {region.kind for region in net.regions} == {"fold", "loop"}


def test_pictures_of_whole_sequences_show_the_loops() -> None:
    x = sequence(6, 3, 5, 4)
    net = snnfx.convert(ChunkAttention().double(), takes="sequence", example_inputs=(x,))
    dot = str(snnfx.draw(net))
    assert dot.count("loop over time") >= 2 and "T iterations, state sn.mem" in dot and "whole sequences" in dot


def test_explain_gives_the_reason_and_line_of_a_missing_step_form() -> None:
    x = sequence(6, 3, 5, 4)
    net = snnfx.convert(ChunkAttention().double(), takes="sequence", example_inputs=(x,))
    text = " ".join(str(snnfx.explain(net)).split())
    assert "no step form" in text and "published_styles.py" in text


@pytest.mark.parametrize("command", ["explain", "verify"])
def test_commands_take_whole_sequences(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--takes", "sequence", "--input", "6,3,6,5"]
    assert main([command, "support.published_styles:TokenAttention", *options]) == 0
    assert ("own call" if command == "verify" else "q_sn.mem") in capsys.readouterr().out


def test_online_rules_train_a_model_with_a_time_axis() -> None:
    model = nn.Sequential(Folded6(), LoopNeuron(), nn.Linear(8, 3)).double()
    x, target = 3 * sequence(6, 3, 6), torch.tensor([0, 1, 2])
    net = snnfx.convert(copy.deepcopy(model), takes="sequence", example_inputs=(x,))
    loss, rate = nn.functional.cross_entropy, 0.1
    trainer = snnfx.online.Trainer(
        net, snnfx.online.BPTT, torch.optim.SGD(net.parameters(), rate), loss, target_dim=None
    )
    trainer.step(x, target)
    own = torch.stack([loss(y, target) for y in model(x)]).mean()
    own.backward()
    expected = [p.detach() - rate * p.grad for p in model.parameters()]
    assert_same([p.detach() for p in net.parameters()], expected)


class Folded6(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(0, 1)).reshape(x.shape[0], x.shape[1], 8)


class WithConstants(nn.Module):
    """Returns values that are no tensors beside its sequence, as models with an optional dictionary of hooks do."""

    def __init__(self, reduces: bool) -> None:
        super().__init__()
        self.fc, self.reduces = nn.Linear(6, 4), reduces

    def forward(self, x: Tensor, hooks: dict[str, Tensor] | None = None) -> tuple[Tensor, Any, int]:
        u, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            u = 0.5 * u + self.fc(x[t])
            out.append(u)
        y = torch.stack(out)
        return (y.mean(0) if self.reduces else y), hooks, 3


@pytest.mark.parametrize("reduces", [False, True])
def test_outputs_without_tensors_leave_the_step_form(reduces: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(6, 3, 6, dtype=torch.float64)
    net = assert_converts_sequence(WithConstants(reduces), (x,), [(x[:3],)])
    assert net.program.whole_sequences is None
    outputs, state = net.run(x)
    assert outputs[1:] == (None, 3) and len(state) == 1
