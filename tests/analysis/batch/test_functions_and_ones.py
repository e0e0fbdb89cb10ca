"""Custom autograd functions and dimensions of size 1: which of them fold; the oracle is the stepped model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from support.author_surrogates import SURROGATES
from support.stepping import assert_converts

T, N, C = 4, 3, 5


def x_seq() -> Tensor:
    return torch.randn(T, N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class After(nn.Module):
    """A function behind a linear layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.fc, self.function = nn.Linear(C, C), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc(x))


def kinds(function: Any) -> list[str]:
    net = assert_converts(After(function).double(), x_seq())
    return [region.kind for region in net.regions if region.kind != "once"]


@pytest.mark.parametrize("name", SURROGATES)
def test_a_surrogate_outside_a_loop_folds(name: str) -> None:
    assert kinds(SURROGATES[name]()) == ["fold"]


def function(backward: Callable[[Any, Tensor], Any], forward: Callable[[Tensor], Tensor] = torch.sign) -> Any:
    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            ctx.save_for_backward(v)
            return forward(v)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return backward(ctx, grad)

    return Custom.apply


def test_a_clipped_gradient_is_element_wise() -> None:
    assert kinds(function(lambda ctx, grad: grad.clamp(-0.1, 0.1))) == ["fold"]


@pytest.mark.filterwarnings("ignore:SNNFX504")
@pytest.mark.parametrize(
    "mixing",
    [
        function(lambda ctx, grad: grad - grad.mean(0)),
        function(lambda ctx, grad: grad / grad.shape[0]),
        function(lambda ctx, grad: grad / grad.norm()),
        function(lambda ctx, grad: grad, lambda v: v - v.mean(0)),
        function(lambda ctx, grad: grad, lambda v: v.flip(0)),
        function(lambda ctx, grad: grad if float(ctx.saved_tensors[0].sum()) > 0 else 2 * grad),
    ],
)
def test_a_function_that_mixes_samples_is_mapped(mixing: Any) -> None:
    assert kinds(mixing) == ["fold", "map"]


@pytest.mark.filterwarnings("ignore:SNNFX504")
def test_a_gradient_of_a_parameter_that_is_no_sum_is_mapped() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(v, w)
            return v * w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            v, w = ctx.saved_tensors
            return grad * w, (grad * v).sum().clamp(-0.1, 0.1)

    class Scaled(After):
        def __init__(self) -> None:
            super().__init__(None)
            self.w = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return Scale.apply(self.fc(x), self.w)

    net = assert_converts(Scaled().double(), x_seq())
    assert [region.kind for region in net.regions] == ["fold", "map"]


ONES: dict[str, Callable[[Tensor], Tensor]] = {
    "unsqueeze and flatten": lambda x: x.unsqueeze(0).flatten(0, 1),
    "element-wise between": lambda x: (torch.tanh(x[None]) * 2).flatten(0, 1),
    "two dimensions": lambda x: x[None, None].flatten(0, 2),
    "squeeze": lambda x: x[None, None].squeeze(0).squeeze(0),
    "reshape": lambda x: x.reshape(1, x.shape[0], -1).reshape(x.shape[0], -1),
    "inferred": lambda x: x.view(1, -1, C).view(-1, C),
    "mean": lambda x: x.unsqueeze(0).mean(0),
    "sum": lambda x: x[None].sum(dim=0),
    "index": lambda x: x[None][0],
    "sizes of a sequence": lambda x: (lambda y: y.flatten(0, 1).tanh().view(y.shape[0], y.shape[1], -1))(x[None])[0],
}


@pytest.mark.parametrize("name", ONES)
def test_a_dimension_of_the_literal_size_1_mixes_nothing(name: str) -> None:
    assert kinds(ONES[name]) == ["fold"]


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "joined": lambda x: torch.cat([x[None], 2 * x[None]], 0).flatten(0, 1).view(2, -1, C)[0],
    "broadcast": lambda x: (x[None] * torch.tensor([[[1.0]], [[2.0]]]).to(x)).flatten(0, 1)[::2],
    "repeated": lambda x: x[None].repeat(2, 1, 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("name", MIXING)
def test_a_dimension_that_grows_is_not_merged(name: str) -> None:
    assert "map" in kinds(MIXING[name])


class LowRank(nn.Module):
    """A wrapper in the manner of peft's LoRA layers: dicts of adapters, casts by dtype, a base layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.active = base, {"default": 0.5}, ["default"]
        self.lora_A = nn.ModuleDict({"default": nn.Linear(C, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, C, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.disable_adapters = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        dtype = result.dtype
        for name in self.active:
            if name in self.lora_A:
                low = self.lora_A[name]
                x = x if x.dtype == low.weight.dtype else x.to(low.weight.dtype)
                result = result + self.lora_B[name](low(self.lora_dropout[name](x))) * self.scaling[name]
        return result.to(dtype)


def test_a_wrapper_of_a_layer_folds_like_the_layer() -> None:
    model = nn.Sequential(LowRank(nn.Linear(C, C)), snnfx.neuron.LIFNode(), LowRank(nn.Linear(C, C))).double()
    net = assert_converts(model, x_seq(), examples=True)
    computing = [r for r in net.regions if not all(n.name.startswith(("eq", "expect_size")) for n in r.nodes)]
    assert [region.kind for region in computing] == ["fold", "loop", "fold"]
