"""Loops inside a forward: loops over time are refused, loops that belong to a step convert."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, SnnfxWarning
from support.stepping import fresh_copy, step_model

T, N, C = 6, 3, 4


class Model(nn.Module):
    """A model of one function; it has a few layers and a neuron."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.fc, self.fc2, self.rec = nn.Linear(C, C), nn.Linear(C, C), nn.Linear(C, C)
        self.layers = nn.ModuleList(nn.Linear(C, C) for _ in range(T))
        self.lif = neuron.LIFNode(tau=2.0, v_threshold=0.4)
        self.lif2 = neuron.LIFNode(tau=2.0, v_threshold=0.4)
        self.lifs = nn.ModuleList(neuron.LIFNode(tau=2.0, v_threshold=0.4) for _ in range(T))
        self.cell, self.lstm = nn.GRUCell(C, C), nn.LSTMCell(C, C)
        self.block = nn.Sequential(nn.Linear(C, C), neuron.LIFNode(tau=2.0, v_threshold=0.4))
        self.mem: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def first_time(m: Any, x: Tensor) -> Tensor:
    v, out = torch.zeros(x.shape[1], C, dtype=x.dtype), []
    for t in range(len(x)):
        v = 0.9 * v + m.fc(x[t])
        out.append((v > 1).to(x.dtype))
    return torch.stack(out)


def second_time(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.lif(m.fc(x[:, t])) for t in range(x.size(1))], 1)


def over_the_tensor(m: Any, x: Tensor) -> Tensor:
    v, out = 0.0, []
    for x_t in x:
        v = 0.9 * v + m.fc(x_t)
        out.append(v)
    return torch.stack(out)


def unbound(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.lif(m.fc(x_t)) for x_t in x.unbind(1)], 1)


def split(m: Any, x: Tensor) -> Tensor:
    v, out = torch.zeros(1, x.shape[1], C, dtype=x.dtype), []
    for x_t in x.split(1):
        v = torch.relu(v - 0.1) + m.fc(x_t)
        out.append(v)
    return torch.cat(out)


def chunked(m: Any, x: Tensor) -> Tensor:
    v, out = torch.zeros(x.shape[0], 1, C, dtype=x.dtype), []
    for x_t in torch.chunk(x, x.shape[1], dim=1):
        v = torch.relu(v - 0.1) + m.fc(x_t)
        out.append(v)
    return torch.cat(out, 1)


def selected(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.lif(m.fc(torch.select(x, 0, t))) for t in range(x.shape[0])])


def narrowed(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.lif(m.fc(x.narrow(0, t, 1))) for t in range(x.shape[0])])


def sliced(m: Any, x: Tensor) -> Tensor:
    return torch.cat([m.lif(m.fc(x[:, t : t + 1])) for t in range(x.shape[1])], 1)


def integrate_and_fire(m: Any, x: Tensor) -> Tensor:
    v, out = torch.zeros(x.shape[1], C, dtype=x.dtype), []
    for t in range(x.shape[0]):
        v = v + x[t]
        s = (v > 1).to(x.dtype)
        v = v - s
        out.append(s)
    return torch.stack(out)


def hard_reset_counted(m: Any, x: Tensor) -> Tensor:
    v, count = torch.zeros(x.shape[1], C, dtype=x.dtype), torch.zeros(x.shape[1], C, dtype=x.dtype)
    for t in range(x.shape[0]):
        v = 0.9 * v + m.fc(x[t])
        s = (v > 1).to(x.dtype)
        v = v * (1 - s)
        count += s
    return count / x.shape[0]


def in_place(m: Any, x: Tensor) -> Tensor:
    v, out = torch.zeros(x.shape[1], C, dtype=x.dtype), []
    for t in range(x.shape[0]):
        v.mul_(0.9).add_(m.fc(x[t]))
        out.append((v > 1).to(x.dtype))
    return torch.stack(out)


def preallocated(m: Any, x: Tensor) -> Tensor:
    v, out = torch.zeros(x.shape[1], C, dtype=x.dtype), torch.zeros_like(x)
    for t in range(x.shape[0]):
        v = 0.9 * v + m.fc(x[t])
        out[t] = v
    return out


def read_back(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[0]):
        out[t] = m.fc(x[t]) if t == 0 else 0.9 * out[t - 1] + m.fc(x[t])
    return out


def starts_as_none(m: Any, x: Tensor) -> Tensor:
    v, out = None, []
    for t in range(x.shape[0]):
        v = m.fc(x[t]) if v is None else 0.9 * v + m.fc(x[t])
        out.append(v)
    return torch.stack(out)


def recurrent_cell(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[1], C, dtype=x.dtype)
    for t in range(x.shape[0]):
        h = m.cell(x[t], h)
    return h


def backwards(m: Any, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[1], C, dtype=x.dtype)
    for t in reversed(range(x.shape[0])):
        h = torch.tanh(m.fc(x[t]) + m.rec(h))
    return h


def lstm_cell(m: Any, x: Tensor) -> Tensor:
    h = c = torch.zeros(x.shape[1], C, dtype=x.dtype)
    for t in range(x.shape[0]):
        h, c = m.lstm(x[t], (h, c))
    return h


def recurrent_neuron(m: Any, x: Tensor) -> Tensor:
    y, out = torch.zeros(x.shape[1], C, dtype=x.dtype), []
    for t in range(x.shape[0]):
        y = m.lif(m.rec(y) + m.fc(x[t]))
        out.append(y)
    return torch.stack(out)


def two_layers(m: Any, x: Tensor) -> Tensor:
    out = []
    for t in range(x.shape[0]):
        out.append(m.lif2(m.fc2(m.lif(m.fc(x[t])))))
    return torch.stack(out).mean(0)


def in_an_attribute(m: Any, x: Tensor) -> Tensor:
    out = []
    for t in range(x.shape[0]):
        m.mem = m.fc(x[t]) if m.mem is None else 0.9 * m.mem + m.fc(x[t])
        out.append((m.mem > 1).to(x.dtype))
    return torch.stack(out)


def permuted(m: Any, x: Tensor) -> Tensor:
    x, v, out = x.permute(1, 0, 2).float().to(x.dtype), torch.zeros(x.shape[0], C, dtype=x.dtype), []
    for t in range(x.shape[0]):
        v = 0.9 * v + m.fc(x[t])
        out.append(v)
    return torch.stack(out)


def in_two_phases(m: Any, x: Tensor) -> Tensor:
    currents = [m.fc(x[t]) for t in range(x.shape[0])]
    v, out = torch.zeros(x.shape[1], C, dtype=x.dtype), []
    for current in currents:
        v = 0.9 * v + current
        out.append(v)
    return torch.stack(out)


def after_a_layer(m: Any, x: Tensor) -> Tensor:
    current = m.fc(x)
    return torch.stack([m.lif(current[t]) for t in range(x.shape[0])])


def static_input(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.lif(m.fc(x)) for _ in range(T)])


def random_code(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.lif(m.fc((x > torch.rand_like(x)).to(x.dtype))) for _ in range(T)])


def static_container(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for _ in range(T):
        total = total + m.block(x)
    return total


OVER_TIME = [
    first_time, second_time, over_the_tensor, unbound, split, chunked, selected, narrowed, sliced, integrate_and_fire,
    hard_reset_counted, in_place, preallocated, read_back, starts_as_none, recurrent_cell, backwards, lstm_cell,
    recurrent_neuron, two_layers, in_an_attribute, permuted, in_two_phases, after_a_layer,
    static_input, random_code, static_container,
]  # fmt: skip


@pytest.mark.parametrize("function", OVER_TIME)
@pytest.mark.parametrize("shape", [(T, N, C), (4, 4, 4), (3, 3, 4)], ids=str)
def test_a_loop_over_time_is_refused(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    model = Model(function).double()
    with pytest.raises(CaptureError, match=r'(?s)test_time_loops\.py:\d+.*ONE time step.*entry="step"') as raised:
        snnfx.convert(model, example_inputs=torch.rand(shape).double())
    assert raised.value.code == "SNNFX203"


@pytest.mark.parametrize("function", [first_time, second_time, over_the_tensor, preallocated, two_layers, unbound])
def test_a_loop_over_two_time_steps_is_refused(function: Callable[..., Any]) -> None:
    shape = (N, 2, C) if function in (second_time, unbound) else (2, N, C)
    with pytest.raises(CaptureError, match="SNNFX203"):
        snnfx.convert(Model(function).double(), example_inputs=torch.rand(shape).double())


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize("examples", [True, False])
def test_a_loop_over_a_constant_number_of_steps_is_refused(steps: int, examples: bool) -> None:
    model = Model(lambda m, x: [m.lif(m.fc(x[:, t])) for t in range(steps)])
    with pytest.raises(CaptureError, match="SNNFX203"):
        snnfx.convert(model, example_inputs=torch.rand(N, steps, C) if examples else None)


def test_the_loops_of_snntorch_tutorials_are_refused() -> None:
    snntorch = pytest.importorskip("snntorch")

    class Tutorial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(C, C), nn.Linear(C, C)
            self.lif1, self.lif2 = snntorch.Leaky(beta=0.9), snntorch.Leaky(beta=0.9)

        def forward(self, x: Tensor) -> Tensor:
            mem1, mem2 = self.lif1.init_leaky(), self.lif2.init_leaky()
            spikes = []
            for step in range(x.size(0)):
                spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
                spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
                spikes.append(spk2)
            return torch.stack(spikes)

    with pytest.raises(CaptureError, match="SNNFX203"):
        snnfx.convert(Tutorial(), example_inputs=torch.rand(T, N, C))


def test_a_loop_over_time_is_the_error_even_if_the_model_cannot_be_traced() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = second_time(m, x)
        return y if float(y.sum()) > 0 else -y

    with pytest.raises(CaptureError, match="SNNFX203"):
        snnfx.convert(Model(function), example_inputs=torch.rand(N, T, C))


def test_the_hint_works() -> None:
    class Fixed(Model):
        def step(self, x: Tensor) -> Tensor:
            return self.lif(self.fc(x))

    x = torch.rand(T, N, C).double()
    model = Fixed(second_time).double()
    net = snnfx.convert(model, entry="step", example_inputs=x[0])
    torch.testing.assert_close(net(x), step_model(fresh_copy(model), x, entry="step"))


# -- loops that may be over time ---------------------------------------------------------------------------------------


def layers_of_each_step(m: Any, x: Tensor) -> Tensor:
    """As in BNTT: one normalisation for each time step."""
    return torch.stack([m.lif(m.layers[t](x[:, t])) for t in range(x.shape[1])])


def time_is_last(m: Any, x: Tensor) -> Tensor:
    v, out = torch.zeros(x.shape[:2], dtype=x.dtype), []
    for t in range(x.shape[-1]):
        v = 0.9 * v + x[..., t]
        out.append(v)
    return torch.stack(out, -1)


def prefix_sums(m: Any, x: Tensor) -> Tensor:
    total, out = torch.zeros(x.shape[0], C, dtype=x.dtype), []
    for t in range(x.shape[1]):
        total = total + x[:, t]
        out.append(total)
    return torch.stack(out, 1)


def membrane_after_a_layer(m: Any, x: Tensor) -> Tensor:
    current, v, out = m.fc(x), torch.zeros(x.shape[0], C, dtype=x.dtype), []
    for t in range(x.shape[1]):
        v = 0.9 * v + current[:, t]
        out.append(v)
    return torch.stack(out, 1)


def neuron_in_a_fixed_point(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    for _ in range(5):
        y = m.lif(m.rec(y) + m.fc(x))
    return y


MAYBE = [layers_of_each_step, time_is_last, prefix_sums, membrane_after_a_layer, neuron_in_a_fixed_point]


@pytest.mark.parametrize("function", MAYBE)
def test_a_loop_that_may_be_over_time_converts_with_a_warning(function: Callable[..., Any]) -> None:
    model, x = Model(function).double(), torch.rand(5, N, T, C).double()
    for _ in range(2):  # each conversion warns
        with pytest.warns(SnnfxWarning, match=r'SNNFX115.*test_time_loops\.py:\d+.*entry="step".*ONE step') as caught:
            net = snnfx.convert(model, example_inputs=x[0])
        assert len(caught) == 1
    torch.testing.assert_close(net(x), step_model(fresh_copy(model), x))


# -- loops that belong to a step ---------------------------------------------------------------------------------------


def over_layers(m: Any, x: Tensor) -> Tensor:
    for layer in m.layers:
        x = torch.relu(layer(x))
    return m.lif(x)


def over_layers_with_neurons(m: Any, x: Tensor) -> Tensor:
    for layer, lif in zip(m.layers, m.lifs, strict=True):
        x = lif(layer(x)) + x
    return x


def over_groups_of_channels(m: Any, x: Tensor) -> Tensor:
    """As in Res2Net: each group has a convolution of its own and adds the result of the previous group."""
    previous, out = 0.0, []
    for i, part in enumerate(torch.chunk(x, 3, 1)):
        previous = m.layers[i](part + previous)
        out.append(previous)
    return m.lif(torch.cat(out, 1))


def over_single_channels_with_layers(m: Any, x: Tensor) -> Tensor:
    previous, out = 0.0, []
    for i, part in enumerate(torch.chunk(x, T, 1)):
        previous = m.layers[i](part + previous)
        out.append(previous)
    return m.lif(torch.cat(out, 1))


def over_channels(m: Any, x: Tensor) -> Tensor:
    return m.lif(torch.stack([m.fc(x[:, i]) for i in range(x.shape[1])], 1))


def over_channels_with_neurons(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.lifs[i](m.fc(x[:, i])) for i in range(x.shape[1])], 1)


def sum_over_channels(m: Any, x: Tensor) -> Tensor:
    total = 0.0
    for i in range(x.shape[1]):
        total = total + m.fc(x[:, i])
    return m.lif(total)


def sum_in_place(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros(x.shape[0], C, dtype=x.dtype)
    for x_i in x.unbind(1):
        total += m.fc(x_i)
    return m.lif(total)


def product_and_maximum(m: Any, x: Tensor) -> Tensor:
    product, most = m.fc(x[:, 0]), m.fc2(x[:, 0])
    for i in range(1, x.shape[1]):
        product = product * m.fc(x[:, i])
        most = torch.maximum(most, m.fc2(x[:, i]))
    return m.lif(product + most)


def concatenation(m: Any, x: Tensor) -> Tensor:
    out = m.fc(x[:, :1])
    for i in range(1, x.shape[1]):
        out = torch.cat([out, m.fc(x[:, i : i + 1])], 1)
    return m.lif(out)


def assigned_channels(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for i in range(x.shape[1]):
        out[:, i] = m.fc(x[:, i])
    return m.lif(out)


def two_polarities(m: Any, x: Tensor) -> Tensor:
    on, off = m.fc(x[:, 0]), m.fc(x[:, 1])
    return m.lif(on - 0.5 * off)


def differences_of_channels(m: Any, x: Tensor) -> Tensor:
    return m.lif(torch.stack([x[:, i + 1] - x[:, i] for i in range(x.shape[1] - 1)], 1))


def over_heads(m: Any, x: Tensor) -> Tensor:
    heads = m.fc(x).reshape(*x.shape[:2], 2, C // 2)
    out = []
    for h in range(heads.shape[2]):
        q = heads[:, :, h]
        out.append((q @ q.transpose(1, 2)).softmax(-1) @ q)
    return m.lif(torch.cat(out, -1))


def over_chunked_heads(m: Any, x: Tensor) -> Tensor:
    return m.lif(torch.cat([h * h.sum(-1, keepdim=True) for h in m.fc(x).chunk(2, -1)], -1))


def gated_heads(m: Any, x: Tensor) -> Tensor:
    """Each head reads the previous one, as in cascaded group attention."""
    heads, previous, out = m.fc(x).chunk(2, -1), 0.0, []
    for head in heads:
        previous = torch.tanh(head + previous)
        out.append(previous)
    return m.lif(torch.cat(out, -1))


def fixed_point(m: Any, x: Tensor) -> Tensor:
    z = torch.zeros_like(x)
    for _ in range(5):
        z = torch.tanh(m.fc(z) + x)
    return m.lif(z)


def shared_layer(m: Any, x: Tensor) -> Tensor:
    for _ in range(5):
        x = torch.relu(m.fc(x)) + x
    return m.lif(x)


def shared_block_with_neuron(m: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = m.lif(m.fc(x))
    return x


def neuron_for_each_polarity(m: Any, x: Tensor) -> Tensor:
    return m.lif(m.fc(x[:, 0])) + m.lif(m.fc2(x[:, 1]))


def neuron_called_by_hand(m: Any, x: Tensor) -> Tensor:
    return m.lif(m.fc(x)) + m.lif(m.fc(x)) + m.lif(m.fc2(x))


OF_A_STEP = [
    over_layers, over_layers_with_neurons, over_groups_of_channels, over_single_channels_with_layers, over_channels,
    over_channels_with_neurons, sum_over_channels, sum_in_place, product_and_maximum, concatenation, assigned_channels,
    two_polarities, differences_of_channels, over_heads, over_chunked_heads, gated_heads, fixed_point, shared_layer,
    shared_block_with_neuron, neuron_for_each_polarity, neuron_called_by_hand,
]  # fmt: skip


@pytest.mark.parametrize("function", OF_A_STEP)
def test_a_loop_that_belongs_to_a_step_converts(function: Callable[..., Any]) -> None:
    channels = {two_polarities: 2, neuron_for_each_polarity: 2}.get(function, T)
    model, x = Model(function).double(), torch.rand(5, N, channels, C).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = snnfx.convert(model, example_inputs=x[0])
        torch.testing.assert_close(net(x), step_model(fresh_copy(model), x))


@pytest.mark.parametrize("function", [over_layers, fixed_point, shared_layer, shared_block_with_neuron, two_polarities])
def test_a_loop_that_belongs_to_a_step_converts_without_examples(function: Callable[..., Any]) -> None:
    model, x = Model(function).double(), torch.rand(5, N, 2, C).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = snnfx.convert(copy.deepcopy(model))
        torch.testing.assert_close(net(x), step_model(fresh_copy(model), x))
