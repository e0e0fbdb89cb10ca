"""Faults of snnfx's own code surface; errors of torch and of the user's model do not count as such."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from snnfx import MemoryModule, neuron
from snnfx.errors import InputError, SnnfxWarning, describe_code
from snnfx.ops.memory_format import stack_in_layout
from snnfx.sandbox import internal_faults
from snnfx.sandbox.internal_faults import is_internal_fault, surface


def raised(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("no error was raised")


def test_an_error_of_a_snnfx_function_is_an_internal_fault() -> None:
    assert is_internal_fault(raised(lambda: stack_in_layout(None)))  # type: ignore[arg-type]


def test_an_error_with_a_code_is_not_an_internal_fault() -> None:
    error = raised(lambda: describe_code("SNNFX999"))
    assert isinstance(error, InputError) and not is_internal_fault(error)


def test_an_error_of_the_users_code_is_not_an_internal_fault() -> None:
    def model() -> None:
        raise KeyError("meta")

    assert not is_internal_fault(raised(model))
    assert not is_internal_fault(KeyError("never raised"))


def test_an_error_of_a_torch_operator_that_snnfx_calls_is_not_an_internal_fault() -> None:
    shapes = [torch.zeros(2), torch.zeros(3)]
    assert not is_internal_fault(raised(lambda: stack_in_layout(shapes)))


def test_an_error_of_a_torch_function_in_python_is_not_an_internal_fault() -> None:
    norm = nn.BatchNorm1d(3)
    error = raised(lambda: norm(torch.zeros(1, 3)))
    assert isinstance(error, ValueError) and not is_internal_fault(error)


def test_an_error_of_a_neuron_or_a_base_class_of_the_model_is_not_an_internal_fault() -> None:
    class Cell(MemoryModule):
        def forward(self, x: torch.Tensor) -> Any:
            return self.missing

    assert not is_internal_fault(raised(lambda: Cell()(torch.zeros(1))))
    assert not is_internal_fault(raised(lambda: neuron.LIFNode()(None)))


def test_a_fault_is_raised_under_tests_and_names_the_fallback() -> None:
    error = raised(lambda: stack_in_layout(None))  # type: ignore[arg-type]
    with pytest.raises(type(error)) as caught:
        surface(error, "the loop runs step by step")
    assert caught.value is error
    assert "the loop runs step by step" in "".join(traceback.format_exception_only(error))
    assert is_internal_fault(error)  # an outer handler raises it as well


def test_a_user_gets_one_warning_with_the_fault_and_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internal_faults, "STRICT", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            surface(raised(lambda: stack_in_layout(None)), "the loop runs step by step")  # type: ignore[arg-type]
    assert [w.category for w in caught] == [SnnfxWarning]
    message = str(caught[0].message)
    assert message.startswith("SNNFX509 the loop runs step by step: ")
    assert "TypeError" in message and "memory_format.py:" in message and message.endswith("Please report this message.")
