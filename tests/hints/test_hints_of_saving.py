"""Hints of `snnfx.save` and `snnfx.load`: each leads to a file that loads, or to a net that computes the same."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron, online
from snnfx.online.edited_nets import edited_nets_of
from snnfx.passes import Pass
from support.hints import refused, silent, warned

X_SEQ = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(1))


def small(hidden: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, hidden), neuron.LIFNode(v_threshold=0.2))


def comes_back(net: Any, path: Path, model: nn.Module, **options: Any) -> None:
    """Save a net and load it on a new model without another message."""
    with silent():
        loaded = snnfx.load(snnfx.save(net, path), model, **options)
    assert torch.equal(loaded(X_SEQ), net(X_SEQ))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


def test_a_file_that_does_not_exist(path: Path) -> None:
    refused(
        "SNNFX820",
        "saving/saved_file.py:read_file",
        "Pass a file of snnfx.save.",
        lambda: snnfx.load(path, small()),
        names="net.safetensors",
    )
    comes_back(snnfx.convert(small()), path, small())


def test_a_truncated_file(path: Path) -> None:
    net = snnfx.convert(small())
    complete = snnfx.save(net, path).read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    refused(
        "SNNFX820",
        "saving/saved_file.py:malformed",
        "Save the net again, or load it from a complete copy of the file.",
        lambda: snnfx.load(path, small()),
        names="net.safetensors",
    )
    path.write_bytes(complete)
    assert torch.equal(snnfx.load(path, small())(X_SEQ), net(X_SEQ))
    comes_back(net, path, small())


def test_a_model_of_another_architecture(path: Path) -> None:
    net = snnfx.convert(small(6))
    snnfx.save(net, path)
    refused(
        "SNNFX821",
        "saving/load.py:_other_model",
        "Construct the model as it was when the net was saved.",
        lambda: snnfx.load(path, small(4)),
        names="`0.bias`",
    )
    comes_back(net, path, small(6))


def test_a_model_whose_code_changed(path: Path) -> None:
    gain = [1.0]

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif, self.gain = nn.Linear(3, 4), neuron.LIFNode(v_threshold=0.2), gain[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.fc(x) * self.gain)

    snnfx.save(snnfx.convert(Scaled()), path)
    gain[0] = 2.0
    loaded = warned(
        "SNNFX822",
        "saving/load.py:load",
        "is not used, and the model is converted again: ",
        lambda: snnfx.load(path, Scaled()),
    )
    assert torch.equal(loaded(X_SEQ), snnfx.convert(loaded.source)(X_SEQ))
    comes_back(loaded, path, Scaled())  # "save the net again", the remedy of the code


@dataclass(frozen=True)
class Noting(Pass):
    name = "noting"
    requires = "normalized"

    def apply(self, program: Any) -> str:
        return "a note"


def test_passes_of_the_conversion_are_missing(path: Path) -> None:
    net = snnfx.convert(small(), passes=[Noting()])
    snnfx.save(net, path)
    refused(
        "SNNFX823",
        "saving/load.py:_checked_passes",
        "Pass the same passes, in this order.",
        lambda: snnfx.load(path, small()),
        names="noting",
    )
    loaded = warned(
        "SNNFX822",
        "saving/load.py:load",
        "the model is converted again",
        lambda: snnfx.load(path, small(), passes=[Noting()]),
        names="passes",
    )
    assert torch.equal(loaded(X_SEQ), net(X_SEQ))


def test_passes_that_the_conversion_did_not_have(path: Path) -> None:
    net = snnfx.convert(small())
    snnfx.save(net, path)
    refused(
        "SNNFX823",
        "saving/load.py:_checked_passes",
        "Load without passes=.",
        lambda: snnfx.load(path, small(), passes=[Noting()]),
    )
    comes_back(net, path, small())


def test_a_model_instead_of_a_net(path: Path) -> None:
    model = small()
    refused(
        "SNNFX824",
        "saving/save.py:_kind",
        "Pass a net of snnfx.convert(model).",
        lambda: snnfx.save(model, path),  # type: ignore[arg-type]
        names="Sequential",
    )
    comes_back(snnfx.convert(model), path, small())


def test_a_graph_replaced_by_hand(path: Path) -> None:
    net = snnfx.convert(small())
    net.graph = net.graph
    refused(
        "SNNFX824",
        "saving/save.py:_kind",
        "Write the change as a pass, or into the model.",
        lambda: snnfx.save(net, path),
    )
    changed = snnfx.convert(net.source, passes=[Noting()])
    snnfx.save(changed, path)
    loaded = warned(
        "SNNFX822",
        "saving/load.py:load",
        "the model is converted again",
        lambda: snnfx.load(path, small(), passes=[Noting()]),
    )
    assert torch.equal(loaded(X_SEQ), changed(X_SEQ))


def test_a_net_that_a_rule_edited(path: Path) -> None:
    net = snnfx.convert(small())
    edited = edited_nets_of(net, online.SLTT, "per_step", None).sequence
    refused(
        "SNNFX824",
        "saving/save.py:_kind",
        "Save the net that the rule was applied to.",
        lambda: snnfx.save(edited, path),
    )
    comes_back(net, path, small())


def forget(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        del state[name]

    return hook


class WithExtraState(nn.Module):
    def __init__(self, hooked: bool) -> None:
        super().__init__()
        self.fc, self.lif, self.note = nn.Linear(3, 4), neuron.LIFNode(v_threshold=0.2), "a"
        if hooked:
            self.register_state_dict_post_hook(forget("_extra_state"))

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x))  # type: ignore[no-any-return]

    def get_extra_state(self) -> str:
        return self.note

    def set_extra_state(self, state: str) -> None:
        self.note = state


def test_an_extra_state(path: Path) -> None:
    refused(
        "SNNFX824",
        "saving/save.py:_tensors_of_model",
        "Save it on its own, and remove it from the state_dict with a hook.",
        lambda: snnfx.save(snnfx.convert(WithExtraState(False)), path),
        names="`_extra_state`",
    )
    comes_back(snnfx.convert(WithExtraState(True)), path, WithExtraState(True))


class Masked(nn.Module):
    """A mask that is registered sparse, or made sparse in the forward."""

    def __init__(self, is_dense: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc, self.lif, self.is_dense = nn.Linear(3, 4, dtype=dtype), neuron.LIFNode(v_threshold=0.2), is_dense
        mask = torch.eye(4, dtype=dtype)
        self.register_buffer("mask", mask if is_dense else mask.to_sparse(), persistent=is_dense)

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask.to_sparse() if self.is_dense else self.mask
        return self.lif((mask @ self.fc(x).t()).t())  # type: ignore[no-any-return]


def test_a_sparse_buffer(path: Path) -> None:
    refused(
        "SNNFX824",
        "saving/save.py:_tensors_of_model",
        "Register it as a dense real tensor, and make its other form in the forward, e.g. by mask.to_sparse().",
        lambda: snnfx.save(snnfx.convert(Masked(False)), path),
        names="`mask`",
    )
    comes_back(snnfx.convert(Masked(True)), path, Masked(True))


def test_a_model_without_values(path: Path) -> None:
    with torch.device("meta"):
        model = small()
    net = snnfx.convert(model)
    refused(
        "SNNFX824",
        "saving/save.py:_tensors_of_model",
        "Give it values first, e.g. by model.to_empty(device='cpu') and model.load_state_dict(values).",
        lambda: snnfx.save(net, path),
        names="`0.weight`",
    )
    net.to_empty(device="cpu").load_state_dict(small().state_dict())
    comes_back(net, path, small())


def test_a_missing_package(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    net = snnfx.convert(small())
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", without)
        refused(
            "SNNFX803",
            "saving/saved_file.py:require_safetensors",
            "Install it: pip install snnfx[save].",
            lambda: snnfx.save(net, path),
            names="safetensors",
        )
    comes_back(net, path, small())


# -- places of files ---------------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    net, path = snnfx.convert(small()), tmp_path / "missing" / "net.safetensors"
    refused(
        "SNNFX802",
        "deploy/written_files.py:written_at_once",
        "Create it first.",
        lambda: snnfx.save(net, path),
        names=str(path.parent),
    )
    path.parent.mkdir()
    comes_back(net, path, small())


def test_a_path_that_is_a_folder(path: Path, tmp_path: Path) -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX802",
        "deploy/written_files.py:written_at_once",
        "Pass the path of a file.",
        lambda: snnfx.save(net, tmp_path),
        names=str(tmp_path),
    )
    comes_back(net, path, small())


def test_a_folder_without_permission(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, locked = snnfx.convert(small()), tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != locked)
    refused(
        "SNNFX802",
        "deploy/written_files.py:written_at_once",
        "Choose a folder in which you may create files.",
        lambda: snnfx.save(net, locked / "net.safetensors"),
        names=str(locked),
    )
    comes_back(net, path, small())


def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = snnfx.convert(small())

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        refused(
            "SNNFX802",
            "deploy/written_files.py:written_at_once",
            "Free disk space, or choose another folder.",
            lambda: snnfx.save(net, path),
            names="No space left",
        )
    assert not list(path.parent.iterdir())
    comes_back(net, path, small())
