"""Models with a loop over time in their forward: `takes="sequence"`."""

from __future__ import annotations

import dis

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import snnfx
from support.looped_models import Cell, TwoLayers, assert_converts_sequence, spike


def sequence(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64)


class Looped(nn.Module):
    """A linear layer and a neuron; `kind` selects how the loop is written."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.fc, self.cell = kind, nn.Linear(6, 4), Cell()

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(x)

    def over_elements(self, x: Tensor) -> Tensor:
        v, out = None, []
        for x_t in x:
            s, v = self.cell(self.fc(x_t), v)
            out.append(s)
        return torch.stack(out)

    def over_unbind(self, x: Tensor) -> Tensor:
        v, out = None, []
        for x_t in x.unbind(0):
            s, v = self.cell(self.fc(x_t), v)
            out.append(s)
        return torch.stack(out).mean(0)

    def with_zeros(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = []
        for t in range(x.size(0)):
            v = 0.9 * v + self.fc(x[t])
            s = spike(v - 1)
            v = v * (1 - s)
            out.append(s)
        return torch.stack(out, dim=1)

    def from_number(self, x: Tensor) -> Tensor:
        v, total = 0.0, 0
        for t in range(len(x)):
            v = 0.9 * v + self.fc(x[t])
            s = spike(v - 1)
            v = v - s
            total = total + s
        return total / len(x)

    def last_value(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            _, v = self.cell(self.fc(x[t]), v)
        return v

    def last_spikes(self, x: Tensor) -> Tensor:
        v = None
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
        return s

    def most(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        most = torch.full((x.shape[1], 4), -1e9, dtype=x.dtype)
        for t in range(x.shape[0]):
            v = 0.9 * v + self.fc(x[t])
            most = torch.maximum(most, v)
        return F.log_softmax(most, 1)

    def summed_list(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
        return sum(out) / x.shape[0]

    def with_enumerate(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t, x_t in enumerate(x):
            s, v = self.cell(self.fc(x_t) * (t + 1), v)
            out.append(s)
        return torch.stack(out)

    def with_while(self, x: Tensor) -> Tensor:
        v, out, t = None, [], 0
        while t < x.shape[0]:
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
            t += 1
        return torch.stack(out)

    def with_zip(self, x: Tensor) -> Tensor:
        v, out = None, []
        for a, b in zip(x, x.flip(0), strict=True):
            s, v = self.cell(self.fc(a) + self.fc(b), v)
            out.append(s)
        return torch.stack(out)

    def reversed_time(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in reversed(range(x.shape[0])):
            s, v = self.cell(self.fc(x[t]), v)
            out.append(s)
        return torch.stack(out[::-1])

    def comprehension(self, x: Tensor) -> Tensor:
        v, out = None, []
        currents = [self.fc(x_t) for x_t in x]
        for current in currents:
            s, v = self.cell(current, v)
            out.append(s)
        return torch.stack(out)

    def preallocated(self, x: Tensor) -> Tensor:
        v, out = None, torch.zeros(x.shape[0], x.shape[1], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            out[t] = s
        return out

    def preallocated_dim_1(self, x: Tensor) -> Tensor:
        v, out = None, torch.zeros(x.shape[1], x.shape[0], 4, dtype=x.dtype)
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            out[:, t] = s
        return out

    def previous_element(self, x: Tensor) -> Tensor:
        v, out = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t] - x[t - 1]), v)
            out.append(s)
        return torch.stack(out)

    def two_loops(self, x: Tensor) -> Tensor:
        v, hidden = None, []
        for t in range(x.shape[0]):
            s, v = self.cell(self.fc(x[t]), v)
            hidden.append(s)
        y, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for s in hidden:
            y = 0.5 * y + s
            out.append(y)
        return torch.stack(out)

    def list_with_start(self, x: Tensor) -> Tensor:
        v = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        out = [v]
        for t in range(x.shape[0]):
            v = 0.9 * v + self.fc(x[t])
            out.append(v)
        return torch.stack(out, dim=1)

    def over_split(self, x: Tensor) -> Tensor:
        h, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for x_t in x.split(1):
            h = torch.tanh(self.fc(x_t.squeeze(0)) + h)
            out += [h]
        return torch.cat([h.unsqueeze(0) for h in out], 0).softmax(-1)

    def inner_loop_over_layers(self, x: Tensor) -> Tensor:
        states, out = [None, None], []
        for t in range(x.shape[0]):
            h = self.fc(x[t])
            for layer in range(2):
                h, states[layer] = self.cell(h, states[layer])
            out.append(h)
        return torch.stack(out)

    def from_the_second_step(self, x: Tensor) -> Tensor:
        v, out = self.fc(x[0]), []
        for t in range(1, x.shape[0]):
            s, v = self.cell(v + self.fc(x[t] - x[t - 1]), v)
            out.append(s)
        return torch.stack(out)

    def recurrent(self, x: Tensor) -> Tensor:
        v, s, out = torch.zeros(x.shape[1], 4, dtype=x.dtype), torch.zeros(x.shape[1], 4, dtype=x.dtype), []
        for t in range(x.shape[0]):
            v = 0.9 * v + self.fc(x[t]) + F.linear(s, self.fc.weight[:, :4])
            s = spike(v - 1)
            v = v - s
            out.append(s)
        return torch.stack(out)


KINDS = [name for name in vars(Looped) if not name.startswith("_") and name != "forward"]


@pytest.mark.parametrize("kind", KINDS)
def test_loop_is_found_and_rerolled(kind: str) -> None:
    others = [(sequence(9, 5, 6),), (sequence(3, 3, 6),)]
    net = assert_converts_sequence(Looped(kind), (sequence(7, 5, 6),), others)
    assert net.loops or net.options.step_mode == "m"


def test_two_layers_with_lists() -> None:
    net = assert_converts_sequence(TwoLayers(), (sequence(7, 5, 6),), [(sequence(3, 2, 6),), (sequence(30, 2, 6),)])
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold", "loop"]


def test_a_single_loop_over_the_inputs_gives_the_step_form() -> None:
    x = sequence(9, 5, 6)
    model = TwoLayers().double()
    net = snnfx.convert(model, takes="sequence", example_inputs=(x,))
    expected = model(x)
    first, state = net.run(x[:4])
    second, _, records = net.run(x[4:], state=state, record=("fc1", "lif1.state"))
    torch.testing.assert_close(torch.cat([first[0], second[0]]), expected[0])
    torch.testing.assert_close(torch.cat([first[1], second[1]]), expected[1])
    assert records["fc1"].shape == records["lif1.state"].shape == (5, 5, 8)
    streamed = list(net.stream(x.split(3)))
    torch.testing.assert_close(torch.cat([y for y, _ in streamed]), expected[0])
    step = snnfx.convert(net, step_mode="s")
    torch.testing.assert_close(torch.stack([step(x_t)[0] for x_t in x]), expected[0])


class LongBody(nn.Module):
    """A loop of more than 255 instructions: the bytecode of its jump has a prefix (EXTENDED_ARG)."""

    def forward(self, x: Tensor) -> Tensor:
        v, out = torch.zeros_like(x[0]), []
        for t in range(x.shape[0]):
            u = x[t] * 0.5 + x[t] * 0.25 + x[t] * 0.125 + x[t] * 0.25 + x[t] * 0.5 + x[t] * 0.125 + x[t] * 0.25
            w = x[t] * 0.5 - x[t] * 0.25 + x[t] * 0.125 - x[t] * 0.25 + x[t] * 0.5 - x[t] * 0.125 + x[t] * 0.25
            v = v * 0.5 + u * 0.25 + w * 0.125 - u * 0.25 + w * 0.5 - u * 0.125 + w * 0.25 + u * 0.5 + w * 0.25
            v = v * 0.9 + u * 0.25 + w * 0.125 - u * 0.25 + w * 0.5 - u * 0.125 + w * 0.25 + u * 0.5 + w * 0.25
            out.append(spike(v - 1))
        return torch.stack(out)


def test_a_long_loop_is_followed() -> None:
    jumps = [i for i in dis.get_instructions(LongBody.forward) if "JUMP_BACKWARD" in i.opname]
    assert any(i.arg > 255 for i in jumps)
    net = assert_converts_sequence(LongBody(), (sequence(6, 3, 4),), [(sequence(9, 2, 4),)])
    assert "loop" in [region.kind for region in net.regions] or snnfx.explain(net).loops


class ReadsFirst(nn.Module):
    """The first operation of an iteration reads a constant in front of the element: a neuron, or a weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.lif = kind, snnfx.neuron.LIFNode(v_threshold=0.4)
        self.weight = nn.Parameter(torch.linspace(0.1, 2.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        snnfx.functional.reset_net(self)
        if self.kind == "neuron":
            return torch.stack([self.lif(x_t) for x_t in x])
        if self.kind == "neuron after other code":
            return torch.stack([2 * self.lif(x_t) for x_t in x - x.mean(0)])
        return torch.stack([self.lif(torch.maximum(self.weight, x_t)) for x_t in x.flip(0)])


@pytest.mark.parametrize("kind", ["neuron", "neuron after other code", "weight"])
def test_an_iteration_may_start_with_a_constant_operand(kind: str) -> None:
    inputs = [(sequence(steps, 3, 6),) for steps in (5, 1, 8)]
    assert_converts_sequence(ReadsFirst(kind), inputs[0], inputs[1:])
