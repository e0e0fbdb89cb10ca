"""The oracle of the tests: a plain Python loop over a copy of the user's model, and what is compared with it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx.functional import reset_net


@dataclass
class Run:
    """What a run of T steps leaves: stacked outputs, gradients of inputs and parameters, buffers."""

    outputs: Any
    input_grads: list[Tensor | None]
    parameter_grads: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def step_model(model: nn.Module, *sequences: Tensor, entry: str = "forward") -> Any:
    """Outputs of stepping the model itself from the state it is in, stacked leaf by leaf."""
    T = sequences[0].shape[0]
    steps = [getattr(model, entry)(*(x[t] for x in sequences)) for t in range(T)]
    return stack_steps(steps)


def stack_steps(steps: Sequence[Any]) -> Any:
    """Stack what T steps returned; leaves that are no tensors have to be the same at every step."""
    flat = [pytree.tree_flatten(y) for y in steps]
    leaves = zip(*(values for values, _ in flat), strict=True)
    return pytree.tree_unflatten([torch.stack(y) if isinstance(y[0], Tensor) else y[0] for y in leaves], flat[0][1])


def fresh_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in its reset state."""
    clone = copy.deepcopy(model)
    reset_net(clone)
    return clone


def run_stepped(model: nn.Module, *sequences: Tensor, entry: str = "forward") -> Run:
    """Step a copy of the model and differentiate a fixed random function of its outputs."""
    clone = fresh_copy(model)
    clone.zero_grad()
    given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in sequences]
    outputs = step_model(clone, *given, entry=entry)
    return finish_run(clone, given, outputs)


def run_net(net: Any, *sequences: Tensor) -> Run:
    """The same for a converted net, whose parameters and buffers end up changed as by a training step."""
    net.zero_grad()
    given = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in sequences]
    return finish_run(net, given, net(*given))


def finish_run(module: nn.Module, given: Sequence[Tensor], outputs: Any) -> Run:
    differentiable = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(7)
        weights = [torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in differentiable]
        sum((w * y).sum() for w, y in zip(weights, differentiable, strict=True)).backward()
    return Run(
        pytree.tree_map_only(Tensor, Tensor.detach, outputs),
        [x.grad for x in given],
        {name: p.grad for name, p in module.named_parameters()},
        {name: b.clone() for name, b in module.named_buffers() if not name.startswith("snnfx")},
    )


def assert_same(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Two nests of values are equal, leaf by leaf; None stands for a gradient of zeros."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual, is_leaf=lambda v: v is None)
    expected_leaves, expected_spec = pytree.tree_flatten(expected, is_leaf=lambda v: v is None)
    assert actual_spec == expected_spec
    for a, b in zip(actual_leaves, expected_leaves, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
        else:
            assert type(a) is type(b) and a == b, f"{a!r} is not {b!r}"


def assert_same_run(actual: Run, expected: Run, tolerance: float = 1e-10) -> None:
    assert_same(actual.outputs, expected.outputs, tolerance)
    assert_same([_zeros(g) for g in actual.input_grads], [_zeros(g) for g in expected.input_grads], tolerance)
    assert actual.parameter_grads.keys() == expected.parameter_grads.keys()
    for name, gradient in expected.parameter_grads.items():
        assert_same(_zeros(actual.parameter_grads[name]), _zeros(gradient), tolerance)
    assert_same(actual.buffers, expected.buffers, tolerance)


def _zeros(gradient: Tensor | None) -> Any:
    return None if gradient is None or not gradient.any() else gradient


def assert_converts(model: nn.Module, *sequences: Tensor, examples: Any = "both", **options: Any) -> Any:
    """Convert the model with and without example inputs; outputs, gradients and buffers are those of stepping it."""
    options.setdefault("batch_norm", "per_step")
    expected = run_stepped(model, *sequences, entry=options.get("entry", "forward"))
    net = None
    for with_examples in (True, False) if examples == "both" else (examples,):
        clone = fresh_copy(model)
        example = tuple(x[0] for x in sequences) if with_examples else None
        net = snnfx.convert(clone, example_inputs=example, **options)
        slots = {slot.name for slot in net.program.slots if not slot.persistent}
        expected.buffers = {name: b for name, b in expected.buffers.items() if name not in slots}
        actual = run_net(net, *sequences)
        actual.buffers = {name: b for name, b in actual.buffers.items() if name not in slots}
        assert_same_run(actual, expected)
    return net


def assert_close_leaves(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    flat_a, spec_a = pytree.tree_flatten(a)
    flat_b, spec_b = pytree.tree_flatten(b)
    assert spec_a == spec_b
    for x, y in zip(flat_a, flat_b, strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)
