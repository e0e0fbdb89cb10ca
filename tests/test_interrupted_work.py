"""Ctrl-C in the middle of long work leaves the model, the caches and the files as they were."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.deploy import export as export_module
from snnfx.lowering.elementwise.cpp import build
from snnfx.lowering.elementwise.cpp.build import find_compiler
from snnfx.neuron import LIFNode
from snnfx.sandbox.torch_internals import pytree

X_SEQ = 3 * torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.lif = nn.Linear(3, 4), nn.BatchNorm1d(4), LIFNode(tau=3.1)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lif(self.norm(self.fc(x))))


def contents(model: nn.Module) -> list[Any]:
    """Everything that the work could change."""
    values: list[Any] = [torch.get_rng_state().clone(), torch.is_grad_enabled(), torch.get_num_threads()]
    for name, module in model.named_modules():
        values += [name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks)]
        values += [(key, str(value)) for key, value in sorted(vars(module).items()) if not key.startswith("_")]
        values.append("forward" in vars(module))
    for name, tensor in model.state_dict().items():
        values += [name, tensor.clone()]
    values += [parameter.grad for parameter in model.parameters()]
    values += [torch.relu, torch.Tensor.__add__, nn.Module.__call__, nn.functional.linear]
    return values


def is_same(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else bool(x == y)

    return len(a) == len(b) and all(map(same, a, b))


def interrupt_in_call(number: int, patch: pytest.MonkeyPatch) -> None:
    """Let a call of the model raise KeyboardInterrupt after its neurons have run."""
    forward, calls = Net.forward, itertools.count(1)

    def interrupted(self: Net, x: Tensor) -> Tensor:
        y = forward(self, x)
        if next(calls) == number:
            raise KeyboardInterrupt
        return y

    patch.setattr(Net, "forward", interrupted)


def works(model: nn.Module) -> None:
    """The work that was interrupted succeeds afterwards."""
    net = snnfx.convert(model, example_inputs=X_SEQ[0])
    assert snnfx.verify(model, net, X_SEQ, double=True).T == 5


def test_convert_in_the_middle_of_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = contents(model)
    with monkeypatch.context() as patch:
        interrupt_in_call(1, patch)
        with pytest.raises(KeyboardInterrupt):
            snnfx.convert(model, example_inputs=X_SEQ[0])
    assert is_same(before, contents(model))
    works(model)


PASSES = ["normalize.Normalize", "absorb.Absorb", "partition.Partition", "lower.Lower"]


@pytest.mark.parametrize("name", PASSES)
def test_convert_in_the_middle_of_a_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    before = contents(model)

    def interrupt(self: Any, program: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"snnfx.passes.{name}.apply", interrupt)
        with pytest.raises(KeyboardInterrupt):
            snnfx.convert(model, example_inputs=X_SEQ[0])
    assert is_same(before, contents(model))
    works(model)


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("training", [False, True])
def test_a_kernel_build(training: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SNNFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(build, "_loaded", {})
    model = nn.Sequential(nn.Linear(3, 4), LIFNode(tau=3.1732 + training)).train(training)  # a kernel of this test
    net = snnfx.convert(model, example_inputs=X_SEQ[0])
    before, run = contents(model), subprocess.run

    def interrupted(command: Any, *args: Any, **kwargs: Any) -> Any:
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_bytes(b"half a library")
            raise KeyboardInterrupt
        return run(command, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            net(X_SEQ)
    assert is_same(before, contents(model))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() or path.name.startswith(".build_")]
    assert torch.equal(net(X_SEQ), snnfx.convert(model, example_inputs=X_SEQ[0])(X_SEQ))
    assert list(tmp_path.rglob("*.so"))
    assert "One kernel for all time steps" in str(snnfx.explain(net))


@pytest.mark.parametrize("call", [1, 3, 7, 12])
@pytest.mark.filterwarnings("ignore::snnfx.errors.SnnfxWarning")  # the class has another forward
def test_verify_in_the_middle_of_a_run(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    net = snnfx.convert(model, example_inputs=X_SEQ[0])
    before = contents(model)
    with monkeypatch.context() as patch:
        interrupt_in_call(call, patch)
        with pytest.raises(KeyboardInterrupt):
            snnfx.verify(model, net, X_SEQ, double=call > 6)
    assert is_same(before, contents(model))
    works(model)


STAGES = ["plan_export", "write_program", "check_file"]


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("exists", [False, True])
def test_export_at_each_stage(name: str, exists: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Net().eval()
    net = snnfx.convert(model, example_inputs=X_SEQ[0])
    path = tmp_path / "net.pt2"
    if exists:
        path.write_bytes(b"an earlier file")
    before, files = contents(model), sorted(tmp_path.iterdir())
    real = getattr(export_module, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if name == "write_program":
            real(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            snnfx.export(net, path, X_SEQ)
    assert is_same(before, contents(model))
    assert sorted(tmp_path.iterdir()) == files
    assert not exists or path.read_bytes() == b"an earlier file"
    y = pytree.tree_leaves(net(X_SEQ))
    assert all(torch.isfinite(leaf).all() for leaf in y)
