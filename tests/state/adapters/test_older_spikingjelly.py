"""A SpikingJelly without `activation_based`: its modules are traced like code of the user."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

NEURON = """
    import torch
    from torch import nn


    class MemoryModule(nn.Module):
        def __init__(self):
            super().__init__()
            self._memories, self._memories_rv = {}, {}

        def register_memory(self, name, value):
            self._memories[name] = self._memories_rv[name] = value

        def reset(self):
            self._memories.update(self._memories_rv)

        def __getattr__(self, name):
            if "_memories" in self.__dict__ and name in self.__dict__["_memories"]:
                return self.__dict__["_memories"][name]
            return super().__getattr__(name)

        def __setattr__(self, name, value):
            if name in self.__dict__.get("_memories", {}):
                self._memories[name] = value
            else:
                super().__setattr__(name, value)


    class LIFNode(MemoryModule):
        def __init__(self, tau=2.0, v_threshold=1.0):
            super().__init__()
            self.tau, self.v_threshold = tau, v_threshold
            self.register_memory("v", 0.0)

        def forward(self, x):
            self.v = self.v + (x - self.v) / self.tau
            spike = (self.v >= self.v_threshold).to(x)
            self.v = self.v - spike * self.v
            return spike


    class OldNode(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = 0.0

        def forward(self, x):
            self.v = self.v * 0.5 + x
            spike = (self.v >= 1.0).to(x)
            self.v = (1 - spike) * self.v
            return spike
"""

STEP = """
    import warnings
    import torch, snnfx
    from spikingjelly.clock_driven import neuron
    from torch import nn

    torch.manual_seed(0)
    x_seq = torch.rand(6, 3, 4, dtype=torch.float64) * 30
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for make in (neuron.LIFNode, neuron.OldNode):
            for example in (None, x_seq[0]):
                model = nn.Sequential(nn.Linear(4, 4), make()).double()
                net = snnfx.convert(model, example_inputs=example)
                y_seq = net(x_seq)
                assert torch.equal(y_seq, torch.stack([model(x) for x in x_seq]))
                assert 0 < y_seq.mean() < 1
                assert [r.kind for r in net.regions] == ["fold", "loop"]
    assert sum("SNNFX223" in str(w.message) for w in caught) == 1
"""


def test_modules_of_clock_driven_are_traced(tmp_path: Path) -> None:
    package = tmp_path / "spikingjelly" / "clock_driven"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "neuron.py").write_text(textwrap.dedent(NEURON))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", textwrap.dedent(STEP)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
