"""Neurons and surrogates as authors of published models write them convert and become one kernel.

The oracle is the neuron itself, stepped in a plain loop in float64, in training and in evaluation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import CaptureError
from support.author_neurons import NEURONS
from support.author_surrogates import SURROGATES
from support.stepping import assert_same_run, fresh_copy, run_net, run_stepped

T, N, C = 6, 3, 5


def x_seq() -> Tensor:
    return torch.rand(T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2


class Fires(nn.Module):
    """A leaky neuron with one surrogate."""

    def __init__(self, spike: Any) -> None:
        super().__init__()
        self.spike, self.v = spike, None

    def forward(self, x: Tensor) -> Tensor:
        v = x if self.v is None else 0.7 * self.v + x
        y = self.spike(v - 1.0)
        self.v = v * (1.0 - y)
        return y


def assert_one_kernel(model: nn.Module, with_examples: bool) -> None:
    """The loop of the net is one kernel, as `explain` said before the first call; numbers are those of stepping."""
    x = x_seq()
    model = nn.Sequential(model).double()
    options = {"example_inputs": x[0]} if with_examples else {}
    for training in (True, False):
        model.train(training)
        expected = run_stepped(model, x)
        assert expected.outputs.any() and (not training or expected.input_grads[0].any())
        net = snnfx.convert(fresh_copy(model), **options)
        promised = snnfx.explain(net).kernels
        assert_same_run(run_net(net, x), expected, 1e-9)
        kernels = snnfx.explain(net).kernels
        for said in (kernels, promised) if with_examples else (kernels,):
            assert any(line.startswith("One kernel for all time steps") for line in said), said
            assert all(line.startswith(("One kernel", "Absorbed", "Counted by Python")) for line in said), said


READS_SHAPES = ("NumpyNumbers",)
"""Neurons whose Python code computes with a shape of the input."""


COMPLEX = ("ResonateAndFire", "ResonateInPolarForm")
"""Neurons with a complex state, which are stepped."""


@pytest.mark.parametrize("name", COMPLEX)
def test_a_complex_state_equals_stepping_and_is_said_to_be_stepped(name: str) -> None:
    model, x = nn.Sequential(NEURONS[name]()).double(), x_seq()
    expected = run_stepped(model, x)
    net = snnfx.convert(fresh_copy(model), example_inputs=x[0])
    (promised,) = snnfx.explain(net).kernels
    assert_same_run(run_net(net, x), expected, 1e-9)
    assert promised.startswith("Stepped by PyTorch") and "complex" in promised
    assert snnfx.explain(net).kernels == (promised,)


@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "plain"])
@pytest.mark.parametrize("name", [name for name in NEURONS if name not in COMPLEX])
def test_a_neuron_is_one_kernel(name: str, with_examples: bool) -> None:
    torch.manual_seed(0)
    if name in READS_SHAPES and not with_examples:
        with pytest.raises(CaptureError, match="example_inputs"):
            snnfx.convert(nn.Sequential(NEURONS[name]()).double())(x_seq())
        return
    assert_one_kernel(NEURONS[name](), with_examples)


@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "plain"])
@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_is_part_of_the_kernel(name: str, with_examples: bool) -> None:
    assert_one_kernel(Fires(SURROGATES[name]()), with_examples)
