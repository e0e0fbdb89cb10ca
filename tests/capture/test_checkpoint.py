"""`torch.utils.checkpoint` inside a step: a call of its function, since the net has its own recomputation."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import snnfx
from snnfx.neuron import LIFNode
from support.stepping import assert_same_run, run_net, run_stepped

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])


def make_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), LIFNode(tau=2.0, v_threshold=0.4), nn.Linear(8, 8)).double()


def sequence() -> Tensor:
    return torch.rand(6, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Checkpointed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layers, self.options = make_layers(), options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, **self.options)


class Branching(Checkpointed):
    """A model that cannot be traced, so it is stepped as an opaque module."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        return super().forward(x)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = make_layers()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@REENTRANT
@pytest.mark.parametrize("options", [{}, {"example_inputs": sequence()[0]}, {"lower": None}, {"checkpoint": "regions"}])
def test_checkpoint_inside_a_step_is_a_call(use_reentrant: bool, options: dict[str, Any]) -> None:
    net = snnfx.convert(Checkpointed(use_reentrant=use_reentrant), **options)
    assert_same_run(run_net(net, sequence()), run_stepped(Plain(), sequence()))
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold"]


@REENTRANT
def test_checkpoint_inside_an_opaque_module_is_a_call(use_reentrant: bool) -> None:
    net = snnfx.convert(Branching(use_reentrant=use_reentrant))
    assert "could not be traced" in str(snnfx.explain(net))
    assert_same_run(run_net(net, sequence()), run_stepped(Plain(), sequence()))


@REENTRANT
def test_verify_accepts_a_step_with_a_checkpoint(use_reentrant: bool) -> None:
    model = Checkpointed(use_reentrant=use_reentrant)
    snnfx.verify(model, snnfx.convert(model), sequence())


def test_checkpoint_with_keyword_arguments_and_contexts_is_a_call() -> None:
    class Model(Plain):
        def forward(self, x: Tensor) -> Tensor:
            def run(x: Tensor, *, scale: float) -> Tensor:
                return self.layers(x * scale)

            return checkpoint(run, x, use_reentrant=False, scale=1.0, preserve_rng_state=False, debug=False)

    assert_same_run(run_net(snnfx.convert(Model()), sequence()), run_stepped(Plain(), sequence()))


@REENTRANT
def test_checkpoint_sequential_is_a_call(use_reentrant: bool) -> None:
    class Model(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=use_reentrant)

    assert_same_run(run_net(snnfx.convert(Model()), sequence()), run_stepped(Plain(), sequence()))


@REENTRANT
def test_checkpoint_recomputes_in_other_threads_during_capture(use_reentrant: bool) -> None:
    calls = []
    captured, checkpointed = threading.Event(), threading.Event()

    def work() -> None:
        def f(x: Tensor) -> Tensor:
            calls.append(x.shape)
            return x.sin()

        captured.wait(10)
        x = torch.ones(2, requires_grad=True)
        checkpoint(f, x, use_reentrant=use_reentrant).sum().backward()
        torch.testing.assert_close(x.grad, x.detach().cos())
        checkpointed.set()

    class Model(Plain):
        def forward(self, x: Tensor) -> Tensor:
            captured.set()
            checkpointed.wait(10)
            return super().forward(x)

    thread = threading.Thread(target=work)
    thread.start()
    snnfx.convert(Model())
    thread.join()
    assert len(calls) == 2


@REENTRANT
def test_checkpoint_recomputes_after_capture(use_reentrant: bool) -> None:
    snnfx.convert(Checkpointed(use_reentrant=use_reentrant))
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return x.sin()

    checkpoint(f, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == 2


@REENTRANT
def test_error_inside_a_checkpoint_names_its_cause(use_reentrant: bool) -> None:
    class Model(Plain):
        def forward(self, x: Tensor) -> Tensor:
            def fail(x: Tensor) -> Tensor:
                raise ValueError("this function fails")

            return checkpoint(fail, x, use_reentrant=use_reentrant)

    with warnings.catch_warnings(), pytest.raises(Exception, match="this function fails"):
        warnings.simplefilter("ignore")
        snnfx.convert(Model(), example_inputs=sequence()[0])(sequence())
