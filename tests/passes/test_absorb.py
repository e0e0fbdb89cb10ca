"""Elementwise neighbours of neurons in evaluation: computed by the neuron's kernel, with the numbers of stepping."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.stepping import assert_converts, assert_same, fresh_copy, step_model


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(tau=2.0, surrogate_function=snnfx.surrogate.Sigmoid())


def norm(channels: int, dims: int = 2) -> nn.Module:
    """A BatchNorm that has seen data."""
    made = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](channels)
    with torch.no_grad():
        made.running_mean.normal_(0.2, 0.3)
        made.running_var.uniform_(0.2, 2.0)
        made.weight.uniform_(1.0, 3.0)
        made.bias.normal_(0.5, 0.3)
    return made


class Block(nn.Module):
    """Residual connections before and after the neurons, a scaled input."""

    def __init__(self, after: bool) -> None:
        super().__init__()
        self.after = after
        self.conv1, self.bn1, self.lif1 = nn.Conv2d(2, 4, 3, padding=1), norm(4), lif()
        self.conv2, self.bn2, self.lif2 = nn.Conv2d(4, 4, 3, padding=1), norm(4), lif()
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]).view(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.lif1(self.bn1(self.conv1(x)) * self.gain)
        second = self.bn2(self.conv2(first))
        return self.lif2(second) + first if self.after else self.lif2(second + first)


def absorbed(net: snnfx.Net) -> list[str]:
    return [name for region in net.programs[False].regions for name in region.absorbed]


def warmed(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return model.double().eval()


@pytest.mark.parametrize("after", [False, True])
def test_norms_scales_and_residuals_move_into_the_kernels(after: bool) -> None:
    model = warmed(Block(after))
    net = assert_converts(model, 4 * torch.rand(5, 3, 2, 6, 6, dtype=torch.float64))
    assert sorted(absorbed(net)) == ["add", "bn1", "bn2", "mul"]
    assert [region.kind for region in net.programs[False].regions] == ["fold", "loop", "fold", "loop"]
    assert not any(region.absorbed for region in net.programs[True].regions)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_norms_of_all_ranks(dims: int, affine: bool) -> None:
    bn = norm(3, dims) if affine else (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](3, affine=False)
    model = warmed(nn.Sequential(bn, lif()))
    shape = {1: (4, 2, 3), 2: (4, 2, 3, 4, 5), 3: (4, 2, 3, 4, 5, 2)}[dims]
    net = assert_converts(model, 3 * torch.rand(shape, dtype=torch.float64))
    assert len(absorbed(net)) == 1


@pytest.mark.parametrize("channels", [48, 64, 100])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_many_blocks_of_channels(channels: int, memory_format: torch.memory_format) -> None:
    """More elements than a block has; its length is a multiple of 64 channels, but not of 48 or 100."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(channels), lif()).eval()
    x = 3 * torch.rand(3 * 2, channels, 20, 30)
    x_seq = x.to(memory_format=memory_format).unflatten(0, (3, 2))
    with torch.no_grad():
        y_seq = snnfx.convert(model)(x_seq)
        expected = step_model(fresh_copy(model), x_seq)
    assert y_seq.unique().tolist() == [0, 1]
    # A spike may fall to the other side where the potential is within rounding of the threshold.
    assert (y_seq != expected).double().mean() < 1e-5


def test_kernels_read_the_statistics_of_now() -> None:
    model = warmed(nn.Sequential(norm(3), lif()))
    net = snnfx.convert(model)
    x_seq = torch.rand(4, 2, 3, 5, 5, dtype=torch.float64)
    before = net(x_seq)
    with torch.no_grad():
        model[0].running_mean.data.fill_(-1.0)  # `.data`: no version counter tells
        model[0].weight.data.fill_(2.0)
    after = net(x_seq)
    assert not torch.equal(before, after)
    assert_same(after, step_model(fresh_copy(model), x_seq))


def test_training_is_left_as_it_is() -> None:
    model = Block(after=False)
    net = snnfx.convert(model)
    net.train()
    assert_converts(model.double().train(), torch.rand(4, 3, 2, 6, 6, dtype=torch.float64))
    x_seq = torch.rand(4, 3, 2, 6, 6, dtype=torch.float64)
    net(x_seq).sum().backward()
    net.eval()
    assert_same(net(x_seq), step_model(fresh_copy(model), x_seq))


def test_without_kernels_nothing_moves() -> None:
    assert absorbed(snnfx.convert(Block(after=True).eval(), lower=None)) == []


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.lif = norm(3, 1), lif()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        current = self.bn(x)
        return self.lif(current), current


def test_what_others_read_stays_in_its_fold() -> None:
    model = warmed(ReadTwice())
    net = assert_converts(model, torch.rand(4, 2, 3, dtype=torch.float64))
    assert absorbed(net) == []


class LateOperand(nn.Module):
    """The second operand of the sum is computed from the first neuron's spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.lif1, self.linear, self.lif2 = lif(), nn.Linear(3, 3), lif()

    def forward(self, x: Tensor) -> Tensor:
        spikes = self.lif1(x)
        return spikes.relu() + self.lif2(self.linear(spikes))


def test_what_is_computed_beside_the_loop_is_not_waited_for() -> None:
    model = warmed(LateOperand())
    net = assert_converts(model, 3 * torch.rand(4, 2, 3, dtype=torch.float64))
    assert absorbed(net) == []


def test_a_norm_that_is_put_into_training_is_noticed() -> None:
    model = warmed(nn.Sequential(nn.Linear(3, 3), norm(3, 1), lif()))
    net = snnfx.convert(model)
    x_seq = torch.rand(4, 8, 3, dtype=torch.float64)
    net(x_seq)
    model[1].train()
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX315"):
        y_seq = net(x_seq)
    fresh = snnfx.convert(fresh_copy(model))
    assert absorbed(net) == absorbed(fresh) == []
    assert_same(y_seq, fresh(x_seq))


def test_recorded_values_are_at_hand() -> None:
    model = warmed(nn.Sequential(nn.Linear(3, 4), norm(4, 1), lif()))
    net = snnfx.convert(model)
    x_seq = torch.rand(4, 8, 3, dtype=torch.float64)
    _, _, record = net.run(x_seq, record=("1", "2.v"))
    with torch.no_grad():
        assert_same(record["1"].detach(), torch.stack([model[1](model[0](x)) for x in x_seq]))


def test_hooks_of_an_absorbed_norm_are_called() -> None:
    model = warmed(nn.Sequential(norm(3, 1), lif()))
    seen: list[int] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(1))
    net = snnfx.convert(model)
    x_seq = torch.rand(4, 8, 3, dtype=torch.float64)
    y_seq = net(x_seq)
    assert seen
    assert_same(y_seq, step_model(fresh_copy(model), x_seq))


@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_copies_pickles_and_single_steps(step_mode: str) -> None:
    model = warmed(Block(after=False))
    net = snnfx.convert(model, step_mode=step_mode)
    x_seq = torch.rand(4, 3, 2, 6, 6, dtype=torch.float64)
    expected = step_model(fresh_copy(model), x_seq)
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert absorbed(copied) == absorbed(net)
        actual = torch.stack([copied(x) for x in x_seq]) if step_mode == "s" else copied(x_seq)
        assert_same(actual, expected)


def test_half_precision_statistics_in_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(4, 1), snnfx.neuron.LeakyIntegrator(tau=2.0)).eval()
    x_seq = torch.rand(4, 8, 4).bfloat16()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = snnfx.convert(model)(x_seq)
        expected = step_model(fresh_copy(model), x_seq)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.02)


def test_explain_says_what_moved() -> None:
    model = Block(after=False)
    report = snnfx.explain(model.eval())
    assert any("bn1" in note and "Absorbed into kernels" in note for note in report.kernels)
    assert any(
        note.startswith("Absorbed into kernels in evaluation mode") for note in snnfx.explain(model.train()).kernels
    )


def test_compiled_nets_are_the_same() -> None:
    model = warmed(Block(after=True))
    x_seq = torch.rand(4, 3, 2, 6, 6, dtype=torch.float64)
    compiled = torch.compile(snnfx.convert(model), fullgraph=True, backend="aot_eager")
    assert_same(compiled(x_seq).detach(), step_model(fresh_copy(model), x_seq).detach())
