"""Sequences that come bit by bit: the outputs, state and reductions of the whole sequence, one chunk held at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nets import ACCEPTANCE
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), neuron.LIFNode(), nn.Linear(6, 2), neuron.IFNode()).double()


@pytest.mark.parametrize("sizes", [(7,), (1, 1, 5), (3, 4), (2, 2, 2, 1)])
def test_chunks_of_any_length_give_the_whole_sequence(sizes: tuple[int, ...]) -> None:
    net = snnfx.convert(small().eval(), chunk=None)
    x_seq = torch.rand(7, 4, 3, dtype=torch.float64)
    expected, state = net.run(x_seq)
    stream = net.stream(x_seq.split(sizes))
    assert torch.equal(torch.cat(list(stream)), expected)
    assert stream.steps == 7 and stream.state is not None
    assert all(torch.equal(stream.state[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", ACCEPTANCE)
def test_steps_one_by_one_give_the_whole_sequence(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    if acceptance.package != "torch":
        pytest.importorskip(acceptance.package)
    net = snnfx.convert(acceptance.make().double().eval(), example_inputs=acceptance.example(torch.float64))
    sequences = acceptance.sequences(5, torch.float64)
    with torch.no_grad():
        expected = net(*sequences)
        steps = (tuple(x[t] for x in sequences) for t in range(5))
        found = list(net.stream(steps, of="steps"))
    leaves = zip(*(torch.utils._pytree.tree_leaves(y) for y in found), strict=True)
    for parts, whole in zip(leaves, torch.utils._pytree.tree_leaves(expected), strict=True):
        if isinstance(whole, Tensor) and whole.dim() and whole.shape[0] == 5:
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_stream_goes_on_from_a_given_state() -> None:
    net = snnfx.convert(small().eval())
    x_seq = torch.rand(6, 2, 3, dtype=torch.float64)
    _, state = net.run(x_seq[:2])
    assert torch.equal(torch.cat(list(net.stream(x_seq[2:].split(3), state=state))), net(x_seq)[2:])


@pytest.mark.parametrize("reduce", ["mean", "sum", "last"])
def test_reduction_is_that_of_all_steps_so_far(reduce: str) -> None:
    net = snnfx.convert(small().eval(), reduce=reduce)
    x_seq = torch.rand(7, 2, 3, dtype=torch.float64)
    for stop, found in zip((3, 6, 7), net.stream(x_seq.split(3)), strict=True):
        torch.testing.assert_close(found, net(x_seq[:stop]), rtol=1e-12, atol=1e-12)


def test_inputs_are_asked_for_one_at_a_time() -> None:
    asked = []

    def inputs() -> Iterator[Tensor]:
        for t in range(4):
            asked.append(t)
            yield torch.rand(2, 1, 3, dtype=torch.float64)

    stream = snnfx.convert(small().eval()).stream(inputs())
    next(stream)
    assert asked == [0]


def test_infinite_input_can_be_streamed() -> None:
    def inputs() -> Iterator[Tensor]:
        while True:
            yield torch.rand(1, 3, dtype=torch.float64)

    stream = snnfx.convert(small().eval(), chunk=4).stream(inputs(), of="steps")
    assert [next(stream).shape[0] for _ in range(3)] == [4, 4, 4]


def test_time_last_steps_are_joined_where_time_is() -> None:
    net = snnfx.convert(small().eval(), time_dim=-1, chunk=2)
    x_seq = torch.rand(4, 3, 6, dtype=torch.float64)
    assert torch.equal(torch.cat(list(net.stream(x_seq.unbind(-1), of="steps")), -1), net(x_seq))


def test_named_arguments_are_streamed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = neuron.LIFNode()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.lif(a + 2 * b)

    net = snnfx.convert(Two())
    a, b = torch.rand(6, 2, 3), torch.rand(6, 2, 3)
    items = [{"b": q, "a": p} for p, q in zip(a.split(2), b.split(2), strict=True)]
    assert torch.equal(torch.cat(list(net.stream(items))), net(a, b))


def test_statistics_over_time_are_not_streamed() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), neuron.LIFNode()))
    with pytest.raises(InputError, match="SNNFX317"):
        next(net.stream([torch.rand(4, 2, 3)]))
    net.eval()
    next(net.stream([torch.rand(4, 2, 3)]))


def test_nothing_to_stream_is_no_chunk() -> None:
    assert list(snnfx.convert(small()).stream([], of="steps")) == []
    assert list(snnfx.convert(small()).stream([])) == []


def test_stream_says_what_it_takes() -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.convert(small()).stream([], of="batches")
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.convert(small(), step_mode="s").stream([])
