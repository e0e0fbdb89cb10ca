"""Functions of torch that a capture replaces: nothing keeps the replacements."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref

import torch
from torch import Tensor, nn

import snnfx


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.neuron = nn.Linear(3, 3), snnfx.neuron.LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.neuron(self.linear(step)) for step in x])


def first_capture_of_a_process() -> None:
    model = Looped()
    known = weakref.ref(model)
    snnfx.convert(model, takes="sequence", example_inputs=torch.rand(5, 2, 3))
    del model
    gc.collect()
    assert known() is None
    assert torch.zeros in torch.overrides.get_ignored_functions()
    assert torch.zeros_like in torch.overrides.get_overridable_functions()[torch]


def test_the_first_capture_of_a_process_leaves_the_tables_of_torch_and_frees_the_model() -> None:
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=paths, check=False)
    assert run.returncode == 0, run.stderr


if __name__ == "__main__":
    first_capture_of_a_process()
