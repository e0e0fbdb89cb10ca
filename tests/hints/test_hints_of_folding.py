"""Hints of nodes that are not folded (1xx, shown by `explain`): the changed node is folded, with the stepped result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from snnfx import neuron
from support.hints import is_folded, not_folded, silent, warned
from support.stepping import assert_converts, assert_same

T, N, C, L = 5, 2, 4, 6


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def sequence(*shape: int) -> Tensor:
    return torch.rand(shape or (T, N, C), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Step(nn.Module):
    def __init__(self, step: Callable[[Any, Tensor], Any], **attributes: Any) -> None:
        super().__init__()
        self.user_step = step
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.user_step(self, x)


def folds(model: nn.Module, x_seq: Tensor | None = None, **options: Any) -> None:
    """The model folds with example inputs, and the net is the stepped model with and without them."""
    x_seq = sequence() if x_seq is None else x_seq
    is_folded(model, x_seq[0], **options)
    assert_converts(model, x_seq, **options)


IMAGES = sequence(T, N, C, L)


def test_an_unbatched_step() -> None:
    model = nn.Sequential(nn.Linear(C, C), neuron.LIFNode())
    not_folded(
        "SNNFX102",
        "analysis/batch/call_site.py:CallSite.require",
        " dimensions, the first of them the batch.",
        model,
        sequence()[0, 0],
    )
    folds(model)


def test_an_unknown_rank() -> None:
    model = Step(lambda m, x: x.flatten(1).sum(1, keepdim=True) + x)
    not_folded(
        "SNNFX111", "analysis/batch/call_site.py:CallSite.refuse_rank", "Pass example_inputs.", model, at="x.flatten(1)"
    )
    folds(model)


def test_the_batch_size_as_a_number() -> None:
    not_folded(
        "SNNFX110",
        "analysis/batch/call_site.py:broadcast",
        "Use the size of a feature dimension, or take a mean over a feature dimension.",
        Step(lambda m, x: x / x.shape[0]),
        sequence()[0],
        at="x / x.shape[0]",
    )
    folds(Step(lambda m, x: x / x.shape[1]))
    folds(Step(lambda m, x: x - x.mean(1, keepdim=True)))


def test_an_operand_without_a_batch() -> None:
    mixed = Step(lambda m, x: x * x.mean(0))
    not_folded(
        "SNNFX105",
        "analysis/batch/call_site.py:_merge_constant",
        "Compute that operand for each sample, or keep it: the result is the same, only slower.",
        mixed,
        sequence()[0],
        at="x * x.mean(0)",
    )
    folds(Step(lambda m, x: x * x.mean(1, keepdim=True)))
    assert_converts(mixed, sequence())


def test_arithmetic_with_the_batch_size() -> None:
    not_folded(
        "SNNFX110",
        "analysis/batch/elementwise_rules.py:_arithmetic",
        "Compute sizes from the feature dimensions.",
        Step(lambda m, x: x * (x.shape[0] + 1)),
        sequence()[0],
        at="x * (x.shape[0] + 1)",
    )
    folds(Step(lambda m, x: x * (x.shape[1] + 1)))


def test_a_layer_that_gets_the_batch_elsewhere() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/elementwise_rules.py:BatchFirst.__call__",
        "Move the batch to dim 0.",
        Step(lambda m, x: m.conv(x.transpose(0, 1)), conv=nn.Conv1d(N, 3, 1)),
        IMAGES[0],
        at="m.conv(x.transpose(0, 1))",
    )
    folds(Step(lambda m, x: m.conv(x), conv=nn.Conv1d(C, 3, 1)), IMAGES)


def test_a_reduction_of_all_dimensions() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/elementwise_rules.py:Along._whole",
        "Name the feature dimensions in `dim`.",
        Step(lambda m, x: x - x.mean()),
        sequence()[0],
        at="x - x.mean()",
    )
    folds(Step(lambda m, x: x - x.mean(dim=1, keepdim=True)))


def test_a_reduction_of_the_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/elementwise_rules.py:Along._result",
        "Use a feature dimension, e.g. dim=1, if that was not intended.",
        Step(lambda m, x: x.cumsum(0)),
        sequence()[0],
        at="x.cumsum(0)",
    )
    folds(Step(lambda m, x: x.cumsum(dim=1)))


def test_one_hot_without_a_number_of_classes() -> None:
    x_seq = torch.tensor([[0, 1], [1, 0], [1, 1]])
    not_folded(
        "SNNFX103",
        "analysis/batch/elementwise_rules.py:one_hot",
        "Pass num_classes.",
        Step(lambda m, x: F.one_hot(x) * 2.0),
        None,
        at="F.one_hot(x)",
    )
    folds(Step(lambda m, x: F.one_hot(x, num_classes=2) * 2.0), x_seq)


def test_random_numbers_without_a_batch() -> None:
    not_folded(
        "SNNFX105",
        "analysis/batch/equivariance.py:_BatchPropagation._judge_without_batch",
        "Draw them in the shape of a batched value, e.g. torch.rand_like(x).",
        Step(lambda m, x: x + torch.rand(C)),
        sequence()[0],
        at="torch.rand(C)",
    )
    followed = Step(lambda m, x: x + torch.rand_like(x))
    is_folded(followed, sequence()[0])
    y_seq = snnfx.convert(followed)(torch.zeros(T, N, C))
    assert (y_seq[0] != y_seq[1]).any() and y_seq.min() >= 0 and y_seq.max() < 1


def test_an_argument_with_the_batch_size() -> None:
    not_folded(
        "SNNFX110",
        "analysis/batch/equivariance.py:_check_invariant",
        "Use sizes of feature dimensions.",
        Step(lambda m, x: torch.topk(x, x.shape[0]).values),
        sequence()[0],
        at="torch.topk",
    )
    folds(Step(lambda m, x: torch.topk(x, x.shape[1]).values))


def test_a_concatenation_along_the_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/indexing_rules.py:cat",
        "Concatenate along a feature dimension, e.g. dim=1.",
        Step(lambda m, x: torch.cat([x, 2 * x])),
        sequence()[0],
        at="torch.cat([x, 2 * x])",
    )
    folds(Step(lambda m, x: torch.cat([x, 2 * x], dim=1)))


def test_a_split_of_the_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/indexing_rules.py:split",
        "Split a feature dimension, e.g. dim=1.",
        Step(lambda m, x: x.chunk(2)[0]),
        sequence()[0],
        at="x.chunk(2)",
    )
    folds(Step(lambda m, x: x.chunk(2, dim=1)[0]))


def test_a_selection_of_a_sample() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/indexing_rules.py:select",
        "Index a feature dimension.",
        Step(lambda m, x: x.select(0, 1)),
        sequence()[0],
        at="x.select(0, 1)",
    )
    folds(Step(lambda m, x: x.select(1, 1)))


def test_an_index_that_is_a_tensor() -> None:
    index = torch.tensor([0, 2])
    not_folded(
        "SNNFX101",
        "analysis/batch/indexing_rules.py:_sliced",
        "Use torch.gather or torch.index_select.",
        Step(lambda m, x: x[:, m.index], index=index),
        sequence()[0],
        at="x[:, m.index]",
    )
    folds(Step(lambda m, x: torch.index_select(x, 1, m.index), index=index))
    folds(Step(lambda m, x: torch.gather(x, 1, x.argsort(1))))


def test_an_index_of_a_sample() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/indexing_rules.py:_IndexBinding.take",
        "Index a feature dimension, e.g. x[:, 0].",
        Step(lambda m, x: x[0]),
        sequence()[0],
        at="x[0]",
    )
    folds(Step(lambda m, x: x[:, 0]))


def test_a_slice_of_the_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/indexing_rules.py:_IndexBinding.take",
        "Slice a feature dimension, e.g. x[:, :4].",
        Step(lambda m, x: x[1:]),
        sequence()[0],
        at="x[1:]",
    )
    folds(Step(lambda m, x: x[:, :3]))


class Attends(nn.Module):
    def __init__(self, batch_first: bool, transposes: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(C, 2, batch_first=batch_first)
        self.transposes = transposes

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.transposes else x
        y = self.attention(x, x, x, need_weights=False)[0]
        return y.transpose(0, 1) if self.transposes else y


def test_attention_with_the_batch_in_another_dimension() -> None:
    x_seq = sequence(T, N, L, C)
    row = not_folded(
        "SNNFX103",
        "analysis/batch/module_rules.py:_sequence",
        "Transpose its input, or build it with batch_first=",
        Attends(batch_first=False, transposes=False),
        x_seq[0],
        at="self.attention(x, x, x",
    )
    assert row.hint.endswith("batch_first=True.")
    folds(Attends(batch_first=True, transposes=False), x_seq)
    folds(Attends(batch_first=False, transposes=True), x_seq)


def test_batch_norm_without_running_statistics() -> None:
    not_folded(
        "SNNFX106",
        "analysis/batch/module_rules.py:batch_norm",
        "Use track_running_stats=True.",
        nn.Sequential(nn.BatchNorm1d(C, track_running_stats=False)).eval(),
        sequence()[0],
    )
    folds(nn.Sequential(nn.BatchNorm1d(C, track_running_stats=True)).eval())


def test_batch_norm_per_step() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C))
    not_folded(
        "SNNFX106",
        "analysis/batch/module_rules.py:batch_norm",
        'Use batch_norm="fold" to take the statistics over all steps.',
        model,
        sequence()[0],
        batch_norm="per_step",
    )
    is_folded(model, sequence()[0], batch_norm="fold")
    y_seq = snnfx.convert(model, batch_norm="fold")(sequence())
    expected = nn.BatchNorm1d(C)(sequence().flatten(0, 1)).unflatten(0, (T, N))
    assert_same(y_seq.detach(), expected.detach())


def test_a_recurrent_layer_over_the_steps() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRUCell(C, C)
            self.h: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.h = self.cell(x, torch.zeros_like(x) if self.h is None else self.h)
            return self.h

    x_seq = sequence(T, N, L, C)
    not_folded(
        "SNNFX109",
        "analysis/batch/module_rules.py:recurrent",
        "If that sequence is time, use the cell (e.g. nn.GRUCell) and pass its state.",
        Step(lambda m, x: m.gru(x)[0], gru=nn.GRU(C, C, batch_first=True)),
        x_seq[0],
        at="m.gru(x)",
    )
    folds(Cell())
    torch.manual_seed(0)
    gru, cell = nn.GRU(C, C), Cell()
    for name, parameter in cell.cell.named_parameters():
        parameter.data.copy_(getattr(gru, f"{name}_l0"))
    assert_same(snnfx.convert(cell)(sequence()).detach(), gru(sequence())[0].detach())


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0.5).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        # A recording cannot follow NumPy, so nothing proves that this is element-wise.
        return g / (1 + torch.from_numpy(ctx.saved_tensors[0].numpy() ** 2))


class DeclaredSpike(Spike):
    snnfx_elementwise = True


def test_an_autograd_function() -> None:
    not_folded(
        "SNNFX101",
        "analysis/batch/module_rules.py:autograd_function",
        "If it is, set `snnfx_elementwise = True` in the class.",
        Step(lambda m, x: Spike.apply(x)),
        sequence()[0],
        at="Spike.apply(x)",
    )
    folds(Step(lambda m, x: DeclaredSpike.apply(x)))


def test_matrices_that_include_the_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/product_rules.py:_has_matrices",
        "Move the batch to dim 0, as for torch.bmm.",
        Step(lambda m, x: x.permute(1, 0, 2) @ x.permute(1, 2, 0)),
        IMAGES[0],
        at="x.permute(1, 0, 2)",
    )
    folds(Step(lambda m, x: x @ x.transpose(1, 2)), IMAGES)


def test_a_squeeze_without_a_dimension() -> None:
    x_seq = sequence(T, N, C, 1)
    not_folded(
        "SNNFX110",
        "analysis/batch/shape_rules.py:squeeze",
        "Name the dimension, e.g. x.squeeze(-1).",
        Step(lambda m, x: x.squeeze()),
        x_seq[0],
        at="x.squeeze()",
    )
    folds(Step(lambda m, x: x.squeeze(-1)), x_seq)


def test_a_flatten_that_merges_features_into_the_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/shape_rules.py:flatten",
        "Move the batch to dim 0 first.",
        Step(lambda m, x: x.transpose(0, 1).flatten(0, 1)),
        IMAGES[0],
        at="x.transpose(0, 1).flatten(0, 1)",
    )
    folds(Step(lambda m, x: x.flatten(0, 1)), IMAGES)


def test_a_literal_batch_size() -> None:
    not_folded(
        "SNNFX104",
        "analysis/batch/shape_rules.py:_symbol_in_place",
        "Use x.shape[0] or -1 instead, or x.flatten(1).",
        Step(lambda m, x: x.view(N, C * L)),
        IMAGES[0],
        at="x.view(N, C * L)",
    )
    folds(Step(lambda m, x: x.view(x.shape[0], C * L)), IMAGES)
    folds(Step(lambda m, x: x.view(-1, C * L)), IMAGES)
    folds(Step(lambda m, x: x.flatten(1)), IMAGES)


def test_a_view_that_moves_elements_across_the_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/shape_rules.py:view",
        "Move the batch to dim 0 first.",
        Step(lambda m, x: x.transpose(0, 1).reshape(x.shape[0], -1)),
        IMAGES[0],
        at="x.transpose(0, 1).reshape",
    )
    folds(Step(lambda m, x: x.reshape(x.shape[0], -1)), IMAGES)


def test_a_repeated_batch() -> None:
    not_folded(
        "SNNFX103",
        "analysis/batch/shape_rules.py:repeat",
        "Use repeat_interleave for the batch.",
        Step(lambda m, x: x.repeat(2, 1)),
        sequence()[0],
        at="x.repeat(2, 1)",
    )
    folds(Step(lambda m, x: x.repeat_interleave(2, 0)))


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 3 else x


def test_a_module_that_cannot_be_traced() -> None:
    model = nn.Sequential(nn.Linear(C, C), Branches())
    row = not_folded(
        "SNNFX108", "passes/partition.py:_opaque", "It runs step by step, unchanged.", model, sequence()[0]
    )
    assert row.kind == "loop"
    assert_converts(model, sequence())
    folds(nn.Sequential(nn.Linear(C, C), Step(lambda m, x: torch.where(x.sum(1, keepdim=True) > 3, 2 * x, x))))


def test_inputs_that_the_plan_does_not_cover() -> None:
    model = nn.Sequential(nn.Linear(C, C), neuron.LIFNode())
    net, x_seq = snnfx.convert(model), sequence()[:, 0]
    warned(
        "SNNFX102",
        "runtime/replanning.py:_planned_again",
        "the net is planned again for them and may map regions instead of folding them. Pass example_inputs to ",
        lambda: net(x_seq),
        names="rank (2,)",
    )
    with silent():
        net = snnfx.convert(model, example_inputs=x_seq[0])
        y_seq = net(x_seq)
    snnfx.functional.reset_net(model)
    assert_same(y_seq, torch.stack([model(x) for x in x_seq]))


class NormOnCycle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(C, C), nn.BatchNorm1d(C)
        self.h: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.bn(self.fc(x) + (torch.zeros_like(x) if self.h is None else self.h))
        return self.h


class NormBeforeCycle(NormOnCycle):
    def forward(self, x: Tensor) -> Tensor:
        self.h = self.bn(self.fc(x)) + (torch.zeros_like(x) if self.h is None else self.h)
        return self.h


def test_a_batch_norm_on_a_cycle() -> None:
    net = warned(
        "SNNFX112",
        "convert.py:_warn_of_unfolded_batch_norms",
        "). Convert with batch_norm=",
        lambda: snnfx.convert(NormOnCycle()),
        names="`bn`",
    )
    assert [region.kind for region in net.regions][-1] == "loop"
    with silent():
        assert_converts(NormOnCycle(), sequence(), batch_norm="per_step")
        model = NormBeforeCycle()
        y_seq = snnfx.convert(model)(sequence())
    normal = nn.BatchNorm1d(C)(model.fc(sequence()).flatten(0, 1)).unflatten(0, (T, N))
    assert_same(y_seq.detach(), normal.cumsum(0).detach())


class NormOfMaximum(nn.Module):
    """The first step differs in a value without a cycle through time."""

    def __init__(self, initial: bool = False) -> None:
        super().__init__()
        self.bn, self.initial = nn.BatchNorm1d(C), initial
        self.before: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.initial and self.before is None:
            self.before = torch.zeros_like(x)
        y = x if self.before is None else torch.maximum(x, self.before)
        self.before = x
        return self.bn(y)


def test_batch_statistics_of_a_first_step() -> None:
    net = snnfx.convert(NormOfMaximum(), example_inputs=sequence()[0])
    warned(
        "SNNFX224",
        "runtime/execution.py:Execution._run_first_separately",
        ". Convert with batch_norm=",
        lambda: net(sequence()),
        names="`bn`",
    )
    with silent():
        assert_converts(NormOfMaximum(), sequence(), batch_norm="per_step")
        y_seq = snnfx.convert(NormOfMaximum(initial=True), example_inputs=sequence()[0])(sequence())
    before = torch.cat((torch.zeros(1, N, C), sequence()[:-1]))
    normal = nn.BatchNorm1d(C)(torch.maximum(sequence(), before).flatten(0, 1)).unflatten(0, (T, N))
    assert_same(y_seq.detach(), normal.detach())
