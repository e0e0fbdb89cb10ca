"""Sequences that come bit by bit: the outputs, state and reductions of the whole sequence, one chunk held at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import InputError
from support.nets import ACCEPTANCE


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
    with pytest.raises(InputError, match="SNNFX317") as raised:
        next(net.stream([torch.rand(4, 2, 3)]))
    assert "eval()" in raised.value.hint and "per_step" in raised.value.hint and "regions" not in raised.value.hint
    net.eval()
    next(net.stream([torch.rand(4, 2, 3)]))


def test_nothing_to_stream_is_no_chunk() -> None:
    assert list(snnfx.convert(small()).stream([], of="steps")) == []
    assert list(snnfx.convert(small()).stream([])) == []


CHUNK = torch.rand(4, 2, 3, dtype=torch.float64)


@pytest.mark.parametrize("of", ["chunks", "steps"])
@pytest.mark.parametrize(
    ("item", "code", "told", "advice"),
    [
        (None, "SNNFX305", "item 1 of the stream is `None`", "Yield a tensor"),
        (3, "SNNFX305", "`int`", "Yield a tensor"),
        (CHUNK.numpy(), "SNNFX305", "`ndarray [4, 2, 3]`", "torch.from_numpy"),
        ((CHUNK, 7), "SNNFX307", "`tuple (Tensor [4, 2, 3], int)`", "net.stream(x for x, label in loader)"),
        ([CHUNK, CHUNK], "SNNFX307", "`list (Tensor", "net.stream(x for x, label in loader)"),
        ({"y": CHUNK}, "SNNFX307", "`dict (y: Tensor [4, 2, 3])`", "Yield a tensor"),
    ],
)
def test_item_that_is_no_input_is_told(of: str, item: Any, code: str, told: str, advice: str) -> None:
    stream = snnfx.convert(small().eval(), chunk=1).stream([CHUNK if of == "chunks" else CHUNK[0], item], of=of)
    next(stream)
    with pytest.raises(InputError, match=code) as raised:
        next(stream)
    assert told in str(raised.value) and "the net takes (input)" in raised.value.why and advice in raised.value.hint


@pytest.mark.parametrize("inputs", [None, 3, snnfx])
def test_what_cannot_be_gone_through_is_told(inputs: Any) -> None:
    with pytest.raises(InputError, match="SNNFX305"):
        snnfx.convert(small().eval()).stream(inputs)


def test_tensor_is_not_taken_for_chunks() -> None:
    net = snnfx.convert(small().eval())
    with pytest.raises(InputError, match="SNNFX309") as raised:
        net.stream(CHUNK)
    assert "split" in raised.value.hint
    assert torch.equal(torch.cat(list(net.stream(CHUNK, of="steps"))), net(CHUNK))


def test_chunk_without_steps_is_told() -> None:
    for dim, empty in ((0, CHUNK[:0]), (-1, CHUNK[..., :0])):
        stream = snnfx.convert(small().eval(), time_dim=dim).stream([empty])
        with pytest.raises(InputError, match="SNNFX301 item 0 of the stream"):
            next(stream)


def test_input_without_time_is_streamed_by_steps() -> None:
    net = snnfx.convert(small().eval(), time_dim=None, chunk=4)
    x = CHUNK[0]
    y_seq = torch.cat(list(net.stream(itertools.repeat(x, 10), of="steps")))
    assert torch.equal(y_seq, net(x, T=10))
    with pytest.raises(InputError, match="SNNFX310") as raised:
        next(net.stream([x]))
    assert 'of="steps"' in raised.value.hint and "T=8" not in raised.value.hint


def test_steps_of_different_shapes_are_told() -> None:
    with pytest.raises(InputError, match=r"SNNFX303 .* \[2, 3\] and \[1, 3\]"):
        next(snnfx.convert(small().eval()).stream([CHUNK[0], CHUNK[1, :1]], of="steps"))


def test_carried_state_is_gone_on_from_and_left() -> None:
    net = snnfx.convert(small().eval(), carry_state=True)
    x_seq = torch.rand(9, 2, 3, dtype=torch.float64)
    expected = snnfx.convert(net.source)(x_seq)
    y_seq = torch.cat([net(x_seq[:2]), *net.stream(x_seq[2:7].split(2)), net(x_seq[7:])])
    assert torch.equal(y_seq, expected)
    snnfx.functional.reset_net(net)
    stream = net.stream(x_seq.split(4))
    assert torch.equal(torch.cat(list(stream)), expected)
    assert stream.state is net.carried_state and not any(v.requires_grad for v in stream.state.values())


def test_given_state_goes_before_the_carried_one() -> None:
    net = snnfx.convert(small().eval(), carry_state=True)
    x_seq = torch.rand(6, 2, 3, dtype=torch.float64)
    _, state = net.run(x_seq[:2])
    net(torch.rand(3, 2, 3, dtype=torch.float64))
    y_seq = torch.cat(list(net.stream(x_seq[2:].split(2), state=state)))
    assert torch.equal(y_seq, snnfx.convert(net.source)(x_seq)[2:])


def test_stream_says_what_it_takes() -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.convert(small()).stream([], of="batches")
    with pytest.raises(InputError, match="SNNFX309"):
        snnfx.convert(small(), step_mode="s").stream([])
