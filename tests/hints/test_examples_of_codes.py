"""The examples of each code do as they say: one leads to the code, the other one runs without any code of snnfx."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import snnfx
from snnfx.deploy import checking
from snnfx.errors import CODES
from support.code_examples import COMPLETED, codes_of, example

_NOT_EXECUTED = {
    "it needs another machine, process or library": (
        "SNNFX222 SNNFX223 SNNFX326 SNNFX503 SNNFX505 SNNFX507 SNNFX509 SNNFX510 SNNFX601 SNNFX803 SNNFX828 "
    ),
    "it compiles or writes ONNX, which takes seconds; tests/deploy and tests/runtime do the same": (
        "SNNFX506 SNNFX511 SNNFX807 SNNFX808 SNNFX809 SNNFX827 "
    ),
}
LISTED = {code: reason for reason, codes in _NOT_EXECUTED.items() for code in codes.split()}
"""Codes whose examples do not run here, with the reason."""
ALSO = {
    "SNNFX206": {"SNNFX102", "SNNFX105"},  # a buffer that the steps change has no batch dimension
    "SNNFX213": {"SNNFX108"},  # the state of a module that cannot be traced
    "SNNFX321": {"SNNFX105"},  # see SNNFX206
    "SNNFX823": {"SNNFX822"},  # passes are code, so the model is converted again
}
"""Codes that a working example has by its nature."""
EXECUTED = [code for code in CODES if code not in LISTED]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snnfx.errors._warned.clear()

    def run_here(kind: str, path: Path, examples: list[Any], names: list[str]) -> list[list[Tensor]]:
        program = torch.export.load(path).module()
        return [list(torch.utils._pytree.tree_leaves(program(*arguments))) for arguments in examples]

    # tests/deploy runs files in a process of their own, which takes seconds.
    monkeypatch.setattr(checking, "_run", run_here)


def test_the_list_names_registered_codes_without_a_frame() -> None:
    assert set(CODES) >= set(LISTED) | COMPLETED
    assert not set(LISTED) & COMPLETED


@pytest.mark.parametrize("code", EXECUTED)
def test_the_example_that_fails(code: str) -> None:
    found, error = codes_of(lambda: example(code, CODES[code].fails)())
    assert code in found, found
    assert error is None or error.code == code, error


@pytest.mark.parametrize("code", EXECUTED)
def test_the_example_that_works(code: str) -> None:
    found, error = codes_of(lambda: example(code, CODES[code].works)())
    assert error is None, error
    assert found <= ALSO.get(code, set()), found
