"""A file that snnfx.save did not write is refused with a code; nothing in it runs, and the model stays."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import snnfx
from snnfx.errors import SaveError
from support.export_models import mlp

EFFECTS: list[str] = []


class Bomb:
    def __reduce__(self) -> Any:
        return EFFECTS.append, ("unpickled",)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return snnfx.save(snnfx.convert(mlp()), tmp_path / "net.safetensors")


def assert_refused(path: Path) -> None:
    model = mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    EFFECTS.clear()
    with pytest.raises(SaveError, match="SNNFX82[013]"):
        snnfx.load(path, model)
    assert not EFFECTS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def rewritten(path: Path, change: Callable[[Any], None]) -> Path:
    """The file with another record."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()["snnfx"])
    change(record)
    save_file(tensors, path, {"snnfx": json.dumps(record)})
    return path


def nodes(record: Any) -> list[Any]:
    return record["plan"]["programs"][0]["nodes"]  # type: ignore[no-any-return]


def call_of(record: Any) -> Any:
    return next(node for node in nodes(record) if node[1] == "call_function")


def set_name(name: str) -> Callable[[Any], None]:
    def change(record: Any) -> None:
        for program in record["plan"]["programs"]:
            if program is not None:
                program["nodes"][0][0] = program["nodes"][0][2] = name

    return change


CHANGES: dict[str, Callable[[Any], None]] = {
    "a call of os.system": lambda r: call_of(r).__setitem__(2, "os.system"),
    "a call of exec": lambda r: call_of(r).__setitem__(2, "builtins.exec"),
    "a call of torch.load": lambda r: call_of(r).__setitem__(2, "torch.load"),
    "a method with effects": lambda r: call_of(r).__setitem__(slice(1, 3), ["call_method", "register_hook"]),
    "code as the name of a node": set_name("x, y=__import__('os').system('true')"),
    "code as a target": lambda r: call_of(r).__setitem__(slice(1, 3), ["get_attr", "a\"); __import__('os')"]),
    "a line break in a fact": lambda r: nodes(r)[0][5].append(["module", "a\n__import__('os')"]),
    "an attribute of Python": lambda r: call_of(r).__setitem__(
        slice(2, 4), ["builtins.getattr", {"tuple": [{"node": nodes(r)[0][0]}, "__class__"]}]
    ),
    "a node that does not exist": lambda r: call_of(r).__setitem__(3, {"tuple": [{"node": "nowhere"}]}),
    "an unknown kind of value": lambda r: call_of(r).__setitem__(3, {"pickle": "gASV"}),
    "an implausible shape": lambda r: nodes(r)[0][5].append(["val", {"meta": [[2**40, 2**40], [1, 1], "float32"]}]),
    "an integer of many digits": lambda r: nodes(r)[0][5].append(["input", 10**400]),
    "nested lists": lambda r: call_of(r).__setitem__(3, json.loads("[" * 900 + "]" * 900)),
    "no options": lambda r: r.pop("options"),
    "an option of another type": lambda r: r["options"].__setitem__("chunk", [1]),
    "an option with another value": lambda r: r["options"].__setitem__("step_mode", "x"),
    "an unknown kind": lambda r: r.__setitem__("kind", "__import__"),
    "another format": lambda r: r.__setitem__("format", 99),
    "a plan that is no dict": lambda r: r.__setitem__("plan", 3),
    "captures of another form": lambda r: r["plan"].__setitem__("captures", [[["forward"]]]),
    "modes of another form": lambda r: r.__setitem__("training", {"": 1}),
    "passes that were not given": lambda r: r["options"].__setitem__("passes", ["os.system"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_record_is_refused(name: str, file: Path) -> None:
    assert_refused(rewritten(file, CHANGES[name]))


def test_truncated_file_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert_refused(file)


def test_header_larger_than_the_file_is_refused(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert_refused(file)


def test_pickles_and_archives_are_not_opened(tmp_path: Path) -> None:
    pickled, archive = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    pickled.write_bytes(pickle.dumps(Bomb()))
    torch.save(Bomb(), archive)
    assert_refused(pickled)
    assert_refused(archive)
    with zipfile.ZipFile(archive, "w") as written:
        written.writestr("../../outside.txt", "x")
    assert_refused(archive)
    assert not (tmp_path.parent.parent / "outside.txt").exists()


def test_weights_without_a_net_are_refused(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "weights.safetensors")
    assert_refused(tmp_path / "weights.safetensors")
    assert_refused(tmp_path / "missing.safetensors")
