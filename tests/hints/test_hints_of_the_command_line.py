"""Hints of the command line and of the export's options: each leads to a command or call that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snnfx
from snnfx import neuron
from snnfx.cli.commands import _parser, main
from support.hints import refused

MODEL = """
from torch import nn
import snnfx

def build():
    return nn.Sequential(nn.Linear(3, 4), snnfx.neuron.LIFNode(), nn.Linear(4, 2))

class Carried(nn.Module):
    def forward(self, x, mem=None):
        mem = x if mem is None else 0.5 * mem + x
        return 2 * mem, mem

def broken():
    raise ValueError("the width must be positive")

number = 3
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)


def command(*words: str) -> Any:
    arguments = _parser().parse_args(words)
    return arguments.run(arguments)


def succeeds(*words: str) -> None:
    assert main(words) == 0


def test_explain_without_a_model() -> None:
    refused(
        "SNNFX309",
        "cli/commands.py:_explain",
        "Pass pkg.module:factory or --code SNNFX103.",
        lambda: command("explain"),
    )
    succeeds("explain", "zoo.py:build")
    succeeds("explain", "--code", "SNNFX103")


def test_a_plot_without_a_number_of_steps() -> None:
    words = ("explain", "zoo.py:build", "--input", "2,3", "--plot", "memory.svg")
    refused(
        "SNNFX309",
        "cli/commands.py:_explain",
        "Pass the number of time steps, e.g. --T 16.",
        lambda: command(*words),
    )
    succeeds(*words, "--T", "16")
    assert Path("memory.svg").read_text().startswith(("<?xml", "<svg"))


def test_verify_without_an_input() -> None:
    refused(
        "SNNFX309",
        "cli/commands.py:_require_sequence",
        "Pass the shape of one time step, e.g. --input 2,1,28,28.",
        lambda: command("verify", "zoo.py:build"),
    )
    refused(
        "SNNFX301",
        "cli/commands.py:_require_sequence",
        "Pass at least one time step.",
        lambda: command("verify", "zoo.py:build", "--input", "2,3", "--T", "0"),
    )
    succeeds("verify", "zoo.py:build", "--input", "2,3", "--T", "1")


def test_export_without_an_input() -> None:
    refused(
        "SNNFX309",
        "cli/commands.py:_require_sequence",
        "Pass the shape of one time step, e.g. --input 2,1,28,28.",
        lambda: command("export", "zoo.py:build", "--out", "net.pt2"),
    )
    refused(
        "SNNFX301",
        "cli/commands.py:_require_sequence",
        "Pass at least one time step.",
        lambda: command("export", "zoo.py:build", "--input", "2,3", "--T", "0", "--out", "net.pt2"),
    )
    succeeds("export", "zoo.py:build", "--input", "2,3", "--T", "1", "--out", "net.pt2", "--no-check")
    assert Path("net.pt2").is_file()


def test_profile_without_an_input_or_to_another_suffix() -> None:
    refused(
        "SNNFX309",
        "cli/commands.py:_require_sequence",
        "Pass the shape of one time step, e.g. --input 2,1,28,28.",
        lambda: command("profile", "zoo.py:build"),
    )
    words = ("profile", "zoo.py:build", "--input", "2,3", "--T", "2", "--repeats")
    refused(
        "SNNFX603",
        "inspect/profile/profile_report.py:check_report_file",
        "Use the suffix .html, .md or .json.",
        lambda: command(*words, "1", "--out", "profile.pdf"),
    )
    refused(
        "SNNFX309",
        "inspect/profile/profile.py:_checked",
        "Pass at least 1.",
        lambda: command(*words, "0"),
    )
    for suffix in ("html", "md", "json"):
        succeeds(*words, "1", "--out", f"profile.{suffix}")
        assert Path(f"profile.{suffix}").stat().st_size > 0


def test_a_profile_of_a_model() -> None:
    model = torch.nn.Linear(3, 2)
    refused(
        "SNNFX309",
        "inspect/profile/profile.py:_checked",
        "Convert the model first: snnfx.profile(snnfx.convert(model), x_seq).",
        lambda: snnfx.profile(model, torch.rand(4, 2, 3)),
    )
    assert snnfx.profile(snnfx.convert(model), torch.rand(4, 2, 3), repeats=1).dense_macs == 4 * 2 * 6


def test_an_option_that_is_no_number() -> None:
    words = ("explain", "zoo.py:build", "--chunk")
    refused("SNNFX309", "cli/commands.py:_number", "Pass an integer or none.", lambda: command(*words, "x"))
    succeeds(*words, "4")
    succeeds(*words, "none")


def test_a_carry_without_an_output() -> None:
    words = ("explain", "zoo.py:Carried", "--carry")
    refused(
        "SNNFX309",
        "cli/commands.py:_carry",
        "Pass an argument and an output, e.g. --carry mem=1.",
        lambda: command(*words, "mem"),
    )
    succeeds(*words, "mem=1")


@pytest.mark.parametrize("text", ["2x3", "2,3:int65"])
def test_an_input_that_is_no_shape(text: str) -> None:
    refused(
        "SNNFX309",
        "cli/commands.py:_random",
        "Pass sizes separated by commas, and optionally a dtype: 2,1,28,28 or 2,3:int64.",
        lambda: command("explain", "zoo.py:build", "--input", text),
    )
    succeeds("explain", "zoo.py:build", "--input", "2,3")
    succeeds("explain", "zoo.py:build", "--input", "2,3:float64", "--entry", "forward", "--json")


def test_a_path_that_names_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    def load(path: str) -> Any:
        return lambda: command("explain", path)

    error = refused(
        "SNNFX602",
        "cli/model_factory.py:load_model",
        "Pass pkg.module:factory or path/to/file.py:factory, a model or a callable that returns one without arguments.",
        load("zoo"),
    )
    refused(
        "SNNFX602",
        "cli/model_factory.py:_import",
        "Pass pkg.module:factory or path/to/file.py:factory, a model or a callable that returns one without arguments.",
        load("missing_module:build"),
    )
    refused(
        "SNNFX602",
        "cli/model_factory.py:_load_file",
        "Pass pkg.module:factory or path/to/file.py:factory, a model or a callable that returns one without arguments.",
        load("missing.py:build"),
    )
    refused(
        "SNNFX602",
        "cli/model_factory.py:_attribute",
        "Pass pkg.module:factory or path/to/file.py:factory, a model or a callable that returns one without arguments.",
        load("zoo.py:missing"),
        names="`build`",
    )
    assert refused("SNNFX602", "cli/model_factory.py:load_model", "", load("zoo.py:number")).hint == error.hint
    for path in ("zoo.py:build", "zoo:build"):
        succeeds("explain", path, "--json")
        assert json.loads(capsys.readouterr().out)["error"] is None


def test_a_factory_that_fails() -> None:
    refused(
        "SNNFX602",
        "cli/model_factory.py:_failed",
        "Correct the code there, or pass another factory.",
        lambda: command("explain", "zoo.py:broken"),
        names="the width must be positive",
    )
    succeeds("explain", "zoo.py:build")


# -- options of the export ---------------------------------------------------------------------------------------------


def net() -> Any:
    torch.manual_seed(0)
    return snnfx.convert(nn.Sequential(nn.Linear(3, 4), neuron.LIFNode())).eval()


X_SEQ = torch.rand(4, 2, 3)


def writes(path: str = "net.pt2", dynamic: tuple[str, ...] = (), **options: Any) -> None:
    snnfx.export(net(), path, X_SEQ, check=False, dynamic=dynamic, **options)
    assert Path(path).is_file()


def test_an_axis_that_cannot_be_dynamic() -> None:
    refused(
        "SNNFX801",
        "deploy/export.py:_axes",
        'Pass "T", "N", both, or none: dynamic=().',
        lambda: snnfx.export(net(), "net.pt2", X_SEQ, dynamic=("B",)),
    )
    for dynamic in (("T", "N"), ()):
        writes(dynamic=dynamic)


def test_a_model_in_place_of_a_net() -> None:
    refused(
        "SNNFX801",
        "deploy/export.py:_kind",
        "Pass a net: snnfx.convert(model).",
        lambda: snnfx.export(net().source, "net.pt2", X_SEQ),
    )
    writes()


def test_a_format_that_does_not_exist() -> None:
    refused(
        "SNNFX801",
        "deploy/export.py:_kind",
        'Pass package="aot" or None.',
        lambda: snnfx.export(net(), "net.pt2", X_SEQ, package="zip"),  # type: ignore[arg-type]
    )
    refused(
        "SNNFX801",
        "deploy/export.py:_kind",
        "Use .pt2 (torch.export, AOTInductor), .onnx or .nir.",
        lambda: snnfx.export(net(), "net.pth", X_SEQ),
    )
    refused(
        "SNNFX801",
        "deploy/export.py:_kind",
        "Use the suffix .pt2, or package=None.",
        lambda: snnfx.export(net(), "net.onnx", X_SEQ, package="aot"),
    )
    writes(package=None)


def test_a_net_of_single_steps() -> None:
    single = snnfx.convert(net().source, step_mode="s").eval()
    refused(
        "SNNFX801",
        "deploy/export.py:_plan",
        "Pass step=True.",
        lambda: snnfx.export(single, "net.pt2", X_SEQ[0]),
    )
    snnfx.export(single, "net.pt2", X_SEQ[0], step=True, check=False)
    assert Path("net.pt2").is_file()


def test_a_path_that_cannot_be_written() -> None:
    refused(
        "SNNFX802",
        "deploy/written_files.py:written_at_once",
        "Create it first.",
        lambda: snnfx.export(net(), "folder/net.pt2", X_SEQ, dynamic=()),
    )
    Path("folder").mkdir()
    writes("folder/net.pt2")
    Path("other.pt2").mkdir()
    refused(
        "SNNFX802",
        "deploy/written_files.py:written_at_once",
        "Pass the path of a file.",
        lambda: snnfx.export(net(), "other.pt2", X_SEQ, dynamic=()),
    )
    writes("other.pt2/net.pt2")
