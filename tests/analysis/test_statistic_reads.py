"""Reads of running statistics in a step: ordered with the calls that update them, under both meanings of BatchNorm."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, SnnfxWarning

T, C = 4, 3
X_SEQ = torch.rand(T, 2, C, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

Step = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """A model with the given step, and the layers that the steps use."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step
        self.bn, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
        self.norm = nn.InstanceNorm2d(C, track_running_stats=True)
        self.sn = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
        self.conv, self.out = nn.Conv2d(C, C, 1, bias=False), nn.Conv2d(C, C, 3, bias=False)
        self.lif = neuron.LIFNode(v_threshold=0.4)
        self.h: Tensor | None = None
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("var", torch.ones(C))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def image(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)


def behind(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    return y + image(2 * m.bn.running_mean)


def in_front(m: Any, x: Tensor) -> Tensor:
    read = image(2 * m.bn.running_mean)
    return m.bn(x) + read


def on_both_sides(m: Any, x: Tensor) -> Tensor:
    before = m.bn.running_var.sum()
    y = m.bn(x)
    return m.lif(y * before - m.bn.running_var.sum())


def between_two_calls(m: Any, x: Tensor) -> Tensor:
    y = m.bn(x)
    return m.bn(y + image(m.bn.running_var.sqrt())) - image(m.bn.running_mean.exp())


def in_the_input_of_the_call(m: Any, x: Tensor) -> Tensor:
    return m.bn(x - image(m.bn.running_mean))


def through_a_view_from_before(m: Any, x: Tensor) -> Tensor:
    view = image(m.bn.running_mean.to(x.dtype))
    return m.bn(x) + view


def from_a_copy_of_before(m: Any, x: Tensor) -> Tensor:
    copied = m.bn.running_mean.clone()
    return m.bn(x) + image(copied)


def the_number_of_batches(m: Any, x: Tensor) -> Tensor:
    return m.bn(x) + m.bn.num_batches_tracked


def padding_of_a_block(m: Any, x: Tensor) -> Tensor:
    y, bn = m.bn(m.conv(x)), m.bn
    pad = bn.bias.detach() - bn.running_mean * bn.weight.detach() / torch.sqrt(bn.running_var + bn.eps)
    y, border = F.pad(y, [1] * 4), image(pad)
    y[:, :, 0:1, :] = border
    y[:, :, -1:, :] = border
    y[:, :, :, 0:1] = border
    y[:, :, :, -1:] = border
    return m.lif(m.out(y))


def of_two_layers(m: Any, x: Tensor) -> Tensor:
    y = m.bn2(m.bn(x) + image(m.bn.running_var))
    return m.lif(y + image(m.bn2.running_mean + m.bn.running_mean))


def on_a_cycle(m: Any, x: Tensor) -> Tensor:
    m.h = torch.zeros_like(x) if m.h is None else m.h
    before = image(m.bn.running_var.sqrt())
    m.h = m.bn(x + 0.5 * m.h)
    return m.h + before + image(m.bn.running_mean)


def as_state_of_the_next_step(m: Any, x: Tensor) -> Tensor:
    m.h = m.bn.running_mean.clone() if m.h is None else m.h
    y = m.bn(x) - image(m.h)
    m.h = m.bn.running_mean.clone()
    return y


def of_instance_norm(m: Any, x: Tensor) -> Tensor:
    before = image(m.norm.running_var.clone())
    return m.norm(x) + before - image(m.norm.running_mean)


def of_spectral_norm(m: Any, x: Tensor) -> Tensor:
    estimate = m.sn.parametrizations.weight[0]
    before = estimate._u * 1.0
    return m.sn(x) + before - 2 * estimate._u


def of_a_function(m: Any, x: Tensor) -> Tensor:
    before = image(m.mean.clone())
    y = F.batch_norm(x, m.mean, m.var, training=m.training)
    return y + before - 2 * image(m.mean)


STEPS: dict[str, Step] = {
    step.__name__: step
    for step in (
        behind,
        in_front,
        on_both_sides,
        between_two_calls,
        in_the_input_of_the_call,
        through_a_view_from_before,
        from_a_copy_of_before,
        the_number_of_batches,
        padding_of_a_block,
        of_two_layers,
        on_a_cycle,
        as_state_of_the_next_step,
        of_instance_norm,
        of_spectral_norm,
        of_a_function,
    )
}


def model_of(step: Step) -> Model:
    torch.manual_seed(0)
    return Model(step)


def results(model: nn.Module, run: Callable[[Tensor], Tensor], x_seq: Tensor) -> list[Any]:
    """Outputs, gradients and buffers of one call for a sequence."""
    x_seq = x_seq.clone().requires_grad_()
    y_seq = run(x_seq)
    y_seq.sum().backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [y_seq.detach(), x_seq.grad, gradients, dict(model.named_buffers())]


def assert_runs_as_stepped(model: Model, x_seq: Tensor, **options: Any) -> None:
    stepped, model = copy.deepcopy(model), copy.deepcopy(model)
    net = snnfx.convert(model, example_inputs=x_seq[0], **options)
    expected = results(stepped, lambda xs: torch.stack([stepped(x) for x in xs]), x_seq)
    torch.testing.assert_close(results(model, net, x_seq), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"checkpoint": "regions"}, {"checkpoint": 2}, {"lower": None}], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_a_read_per_step_is_the_stepped_models(name: str, options: dict[str, Any]) -> None:
    assert_runs_as_stepped(model_of(STEPS[name]), X_SEQ, batch_norm="per_step", **options)


@pytest.mark.parametrize("options", [{}, {"checkpoint": "regions"}, {"checkpoint": "selective"}], ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.filterwarnings("ignore:SNNFX112")
def test_a_fold_of_one_step_is_one_call_of_the_model(name: str, options: dict[str, Any]) -> None:
    assert_runs_as_stepped(model_of(STEPS[name]), X_SEQ[:1], **options)


@pytest.mark.parametrize("name", STEPS)
def test_evaluation_is_the_stepped_model(name: str) -> None:
    assert_runs_as_stepped(model_of(STEPS[name]).eval(), X_SEQ)


@pytest.mark.parametrize("name", ["on_both_sides", "padding_of_a_block", "of_two_layers", "between_two_calls"])
def test_verify_reads_the_same_values_in_a_fold(name: str) -> None:
    model = model_of(STEPS[name])
    snnfx.verify(model, snnfx.convert(model, example_inputs=X_SEQ[0]), X_SEQ)


@pytest.mark.parametrize(
    "name", ["on_both_sides", "in_front", "behind", "of_instance_norm", "as_state_of_the_next_step"]
)
def test_a_single_step_net_reads_in_order(name: str) -> None:
    model = model_of(STEPS[name])
    stepped = copy.deepcopy(model)
    net = snnfx.convert(model, step_mode="s", example_inputs=X_SEQ[0])
    with torch.no_grad():
        torch.testing.assert_close([net(x) for x in X_SEQ], [stepped(x) for x in X_SEQ])


def test_a_fold_reads_the_value_before_and_after_its_one_update_at_every_step() -> None:
    model = model_of(
        lambda m, x: torch.stack((x * 0 + image(m.bn.running_mean), m.bn(x) * 0 + image(m.bn.running_mean)))
    )
    before = model.bn.running_mean.clone()
    y_seq = snnfx.convert(model, example_inputs=X_SEQ[0])(X_SEQ)
    for read, value in ((y_seq[:, 0], before), (y_seq[:, 1], model.bn.running_mean)):
        torch.testing.assert_close(read, image(value).expand_as(read))


@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
@pytest.mark.parametrize("reduce", ["mean", "sum", "last"])
def test_a_reduction_over_time_does_not_sink_below_a_read(reduce: str, batch_norm: str) -> None:
    model = model_of(lambda m, x: m.out(behind(m, x) * 2) * image(m.bn.running_var) + image(m.bn.running_mean))
    options: dict[str, Any] = {"batch_norm": batch_norm, "example_inputs": X_SEQ[0]}
    whole = snnfx.convert(copy.deepcopy(model), **options)(X_SEQ)
    expected = whole[-1] if reduce == "last" else getattr(whole, reduce)(0)
    torch.testing.assert_close(snnfx.convert(model, reduce=reduce, **options)(X_SEQ), expected)


def test_a_state_that_shares_the_memory_of_a_statistic_is_refused() -> None:
    def keep(m: Any, x: Tensor) -> Tensor:
        y = m.bn(x) if m.h is None else m.bn(x) - image(m.h)
        m.h = m.bn.running_mean
        return y

    with pytest.raises(CaptureError, match="SNNFX214 a state shares the memory of `bn.running_mean`"):
        snnfx.convert(model_of(keep), example_inputs=X_SEQ[0])


def test_explain_names_each_read_and_its_value() -> None:
    notes = snnfx.explain(model_of(on_both_sides), example_inputs=X_SEQ[0]).batch_norm
    assert any("`bn.running_var`, read in front of" in n and "before its one update" in n for n in notes)
    assert any("`bn.running_var`, read behind `bn`" in n and "after its one update" in n for n in notes)


# -- one meaning of BatchNorm in a net ---------------------------------------------------------------------------------


class TokensFirst(nn.Module):
    """BatchNorm over `[L * N, C]` from `[N, L, C]`: the batch is not dim 0 of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.transpose(0, 1)
        return self.bn(tokens.reshape(-1, 6)).reshape(tokens.shape).transpose(0, 1)

    def folded(self, x_seq: Tensor) -> Tensor:
        return self.bn(x_seq.transpose(1, 2).reshape(-1, 6)).reshape(x_seq.transpose(1, 2).shape).transpose(1, 2)


class LiteralBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.reshape(15, 6)).reshape(5, 3, 6)

    def folded(self, x_seq: Tensor) -> Tensor:
        return self.bn(x_seq.reshape(-1, 6)).reshape(x_seq.shape)


class BatchLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.permute(1, 2, 0)).permute(2, 0, 1)

    def folded(self, x_seq: Tensor) -> Tensor:
        y_seq = x_seq.permute(0, 2, 3, 1)
        return self.bn(y_seq.flatten(0, 1)).view_as(y_seq).permute(0, 3, 1, 2)


@pytest.mark.parametrize("checkpoint", [None, "regions", "selective"])
@pytest.mark.parametrize("cls", [TokensFirst, LiteralBatch, BatchLast])
def test_a_batch_norm_folds_wherever_the_batch_of_the_step_is(cls: Any, checkpoint: str | None) -> None:
    model, x_seq = cls(), torch.rand(4, 5, 3, 6, dtype=torch.float64)
    reference = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SnnfxWarning)
        net = snnfx.convert(model, example_inputs=x_seq[0], checkpoint=checkpoint)
    expected = results(reference, reference.folded, x_seq)
    torch.testing.assert_close(results(model, net, x_seq), expected, atol=1e-9, rtol=1e-9)


def test_a_batch_norm_that_cannot_fold_is_named_once_at_conversion() -> None:
    snnfx.errors._warned.clear()
    with pytest.warns(SnnfxWarning, match=r"SNNFX112 .*`bn`: its value depends on the previous step through h"):
        snnfx.convert(model_of(on_a_cycle), example_inputs=X_SEQ[0])
    notes = snnfx.explain(model_of(on_a_cycle), example_inputs=X_SEQ[0]).batch_norm
    assert any("BatchNorm in `bn`" in note and "SNNFX112" in note for note in notes)
