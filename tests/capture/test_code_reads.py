"""The names that code reads: constant names in `hasattr` and `getattr` are known, computed names are not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.capture.code_reads import reads_of

CONSTANT: dict[str, Callable[..., Any]] = {
    "k": lambda x: hasattr(x, "k"),
    "gain": lambda x: getattr(x, "gain", x.default + 3),
    "b": lambda x: getattr(x.parts[0], "b", None) is not None and getattr(x, "b", 1) > 0,
}
COMPUTED: list[Callable[..., Any]] = [
    lambda x, n: getattr(x, n),
    lambda x, n: getattr(x, n, "k"),
    lambda x, n: hasattr(x, "k" + n),
    lambda x, n: hasattr(x, f"k{n}"),
    lambda x, n: hasattr(x, "k".upper()),
    lambda x, n: hasattr(x, "k" if n else "j"),
    lambda x, n: map(getattr, x, "k"),
    lambda x, n: getattr(x, "k", *n),
    lambda x, n: hasattr(x, "k") and vars(x)[n],
]


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_name_is_an_attribute_that_the_code_reads(name: str) -> None:
    reads = reads_of(CONSTANT[name].__code__)
    assert name in reads.tested and name in reads.attributes and not reads.reads_by_name


@pytest.mark.parametrize("function", COMPUTED)
def test_code_with_a_computed_name_may_read_any_attribute(function: Callable[..., Any]) -> None:
    assert reads_of(function.__code__).reads_by_name


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = {"settings": SimpleNamespace(), "gain": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        settings: Any = self.config["settings"]
        return x * getattr(settings, "gain", 1.0) if hasattr(settings, "gain") else x


def test_an_attribute_that_appears_after_capture_is_seen() -> None:
    model, x_seq = Asks(), torch.ones(3, 2, 4)
    net = snnfx.convert(model)
    assert torch.equal(net(x_seq), x_seq)
    model.config["settings"].gain = 3.0  # type: ignore[attr-defined]
    with pytest.warns(snnfx.errors.SnnfxWarning, match=r"SNNFX315 `config\['settings'\].*gain"):
        assert torch.equal(net(x_seq), 3 * x_seq)
    model.config["settings"].gain = 4.0  # type: ignore[attr-defined]
    assert torch.equal(net(x_seq), 4 * x_seq)
