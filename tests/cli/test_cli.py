"""`python -m snnfx explain|draw|verify`: what it prints, and the exit codes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import snnfx
from snnfx.__main__ import main
from snnfx.cli.model_factory import load_model
from snnfx.errors import ToolError
from snnfx.ir.options import ConvertKeywords, ConvertOptions

ROOT = Path(__file__).parents[2]

MODELS = """
import torch
from torch import nn
from beside import WIDTH
from snnfx.neuron import LIFNode

def build():
    return nn.Sequential(nn.Linear(3, WIDTH), LIFNode(), nn.Linear(WIDTH, 2))

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc, self.bn, self.lif = nn.Linear(3, width), nn.BatchNorm1d(width), LIFNode()
    def forward(self, x):
        return self.lif(self.bn(self.fc(x)))

class Step(Net):
    def forward(self, x):
        raise RuntimeError("not this one")
    def step(self, x):
        return self.lif(self.fc(x))

class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(2, 4)
    def forward(self, tokens, x):
        return self.embedding(tokens) + x

class Branch(nn.Module):
    last = None
    def forward(self, x):
        self.last = x if self.last is None else self.last + x
        return x if x.sum() > 0 else -x

class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
    def forward(self, x, mem, bias):
        mem = 0.5 * mem + self.fc(x) + bias
        return mem * 2, {"mem": mem}

class Zoo:
    @staticmethod
    def small():
        return build()

ready = build()
number = 3

def needs(width):
    return Net(width)

def broken():
    return nn.Linear(3, "four")

def no_module():
    return [1, 2]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with modules of a user in it."""
    (tmp_path / "zoo_of_tests").mkdir()
    (tmp_path / "zoo_of_tests" / "models.py").write_text(
        MODELS.replace("from beside", "from .beside"), encoding="utf-8"
    )
    (tmp_path / "zoo_of_tests" / "beside.py").write_text("WIDTH = 4\n", encoding="utf-8")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "models.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / "files" / "beside.py").write_text("WIDTH = 4\n", encoding="utf-8")
    (tmp_path / "misspelt_of_tests.py").write_text("def build(:\n", encoding="utf-8")
    (tmp_path / "needy_of_tests.py").write_text("import a_package_that_is_not_there\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("zoo_of_tests", "beside", "snnfx_loaded_"))]:
        del sys.modules[name]


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line as a user starts it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "snnfx", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# -- as a process -------------------------------------------------------------------------------------------------


def test_explain_a_module_of_the_current_directory(folder: Path) -> None:
    done = run("explain", "zoo_of_tests.models:build", "--input", "2,3", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 3 nodes folded into 2 regions; 1 loop." in done.stdout


def test_an_error_is_its_message_without_a_traceback(folder: Path) -> None:
    done = run("explain", "zoo_of_tests.models:missing", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("SNNFX602 `zoo_of_tests.models:missing` does not exist: ")
    assert "Traceback" not in done.stderr


# -- explain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["--markdown", "--json", None])
def test_explain_in_each_form(form: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--input", "2,3", *([form] if form else [])]
    assert main(["explain", "files/models.py:Net", *options]) == 0
    text = capsys.readouterr().out
    if form == "--json":
        assert json.loads(text)["coverage"] == "2 of 3 nodes folded into 1 region; 1 loop"
    else:
        assert text.startswith("# Net, training mode" if form else "Net, training mode\n===")


def test_explain_without_inputs() -> None:
    assert main(["explain", "files/models.py:build"]) == 0


def test_explain_with_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:Net", "--batch-norm", "per_step", "--mode", "training"]) == 0
    assert "SNNFX106" in capsys.readouterr().out
    assert main(["explain", "files/models.py:Net", "--batch-norm", "per_step", "--mode", "evaluation"]) == 0
    assert "SNNFX106" not in capsys.readouterr().out
    assert main(["explain", "files/models.py:Step", "--entry", "step"]) == 0
    assert "loop_1: lif (LIFNode)" in capsys.readouterr().out


def test_options_are_those_of_convert(capsys: pytest.CaptureFixture[str]) -> None:
    # The inputs are in the order of the arguments; what is carried has no time dimension to name.
    stateful = ["files/models.py:Stateful", *("--input=2,3",) * 3, "--carry", "mem=1.mem"]
    options = ["--time-dim=-1,none", "--chunk", "3", "--reduce", "mean"]
    assert main(["explain", *stateful, *options, "--json"]) == 0
    options_used = json.loads(capsys.readouterr().out)["options"]
    assert options_used["carry"] == {"mem": [1, "mem"]}
    assert options_used["time_dim"] == [-1, None]
    assert (options_used["chunk"], options_used["reduce"]) == (3, "mean")
    assert main(["explain", "files/models.py:Net", "--chunk", "none", "--carry", "none", "--json"]) == 0
    options_used = json.loads(capsys.readouterr().out)["options"]
    assert options_used["chunk"] is None and options_used["carry"] is None


def test_memory_is_told_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ["explain", "files/models.py:build", "--input", "4,3", "--T", "8"]
    options = ["--checkpoint", "2", "--memory-budget", "1.5MiB"]
    assert main([*model, *options, "--plot", str(tmp_path / "memory.svg"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["options"]["checkpoint"], told["options"]["memory_budget"]) == (2, 3 * 2**19)
    assert told["memory"]["T"] == 8 and told["memory"]["training"]["steps"] == 2
    assert (tmp_path / "memory.svg").read_text(encoding="utf-8").startswith("<svg")
    for text, budget in (("0.5", 0.5), ("2000000", 2_000_000), ("none", None)):
        assert main([*model[:2], "--memory-budget", text, "--checkpoint", "none", "--json"]) == 0
        used = json.loads(capsys.readouterr().out)["options"]
        assert (used["memory_budget"], used["checkpoint"]) == (budget, None)
    assert main([*model[:2], "--plot", "memory.svg"]) == 2 and "--T" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoint", ["selective", "regions", "auto"])
def test_checkpoint_takes_what_convert_takes(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:build", "--checkpoint", checkpoint, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["checkpoint"] == checkpoint
    assert main(["explain", "files/models.py:build", "--checkpoint", "everything"]) == 2
    assert checkpoint in capsys.readouterr().err


@pytest.mark.parametrize("text", ["2G", "2gb", "2GiB", "512M", "512mb", "0.5"])
def test_memory_budget_is_what_it_is_in_python(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:build", "--memory-budget", text, "--json"]) == 0
    net = snnfx.convert(load_model("files/models.py:build"), memory_budget=text)
    assert json.loads(capsys.readouterr().out)["options"]["memory_budget"] == net.options.memory_budget


def test_budget_that_is_too_small_is_explained(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = ["explain", "files/models.py:build", "--input", "4,3", "--T", "8", "--memory-budget", "100"]
    assert main([*model, "--mode", "training"]) == 0
    captured = capsys.readouterr()
    assert "SNNFX318" in captured.out and captured.err == ""
    assert main([*model, "--plot", str(tmp_path / "memory.svg")]) == 2
    captured = capsys.readouterr()
    assert "SNNFX318" in captured.out and captured.err.startswith("SNNFX319")
    assert not (tmp_path / "memory.svg").exists()


@pytest.mark.parametrize(
    "option",
    [("--chunk", "many"), ("--memory-budget", "much"), ("--checkpoint", "all"), ("--T", "0")]
    + [("--time-dim", "first"), ("--carry", "mem"), ("--reduce", "max"), ("--chunk", "0")],
)
def test_option_values_that_do_not_fit(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:Net", *option]) == 2
    assert capsys.readouterr().err.startswith("SNNFX30")


def test_the_keywords_of_convert_are_listed_once() -> None:
    keywords = set(ConvertKeywords.__annotations__)
    assert keywords == set(inspect.signature(snnfx.convert).parameters) - {"model", "step_mode"}
    assert keywords == {f.name for f in dataclasses.fields(ConvertOptions)} - {"step_mode"} | {"example_inputs"}


def test_inputs_of_several_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:Embedded", "--input", "2,7:int64", "--input", "2,7,4:float64"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "tokens [N, 7] int64" in text and "x [N, 7, 4] float64" in text


def test_model_that_cannot_be_converted_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:Branch", "--input", "2,3"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("Branch cannot be converted") and "SNNFX213" in captured.out
    assert captured.err == ""


def test_explain_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--code", "snnfx103"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("SNNFX103: the operation mixes samples of the batch\n")
    assert "Fails:\n    x = x - x.mean(0)\n" in text
    assert max(map(len, text.splitlines())) <= 100
    assert main(["explain", "--code", "SNNFX999"]) == 2
    assert "SNNFX309" in capsys.readouterr().err


def test_explain_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 2
    assert "SNNFX309 explain needs a model or a code" in capsys.readouterr().err


# -- verify -------------------------------------------------------------------------------------------------------


def test_verify_looks_at_both_modes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "files/models.py:Net", "--input", "4,3", "--T", "5", "--double"]) == 0
    text = capsys.readouterr().out
    assert "T = 5" in text and "; training, float64)" in text and "; eval, float64)" in text
    assert main(["verify", "files/models.py:Net", "--input", "4,3", "--mode", "evaluation"]) == 0
    text = capsys.readouterr().out
    assert "T = 8" in text and "training" not in text


def test_verify_puts_time_where_it_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    two = ["files/models.py:Embedded", "--input", "2,7:int64", "--input", "2,7,4"]
    assert main(["verify", *two, "--time-dim", "none,-1", "--T", "5", "--reduce", "sum", "--chunk", "2"]) == 0
    assert "T = 5" in capsys.readouterr().out
    assert main(["verify", "files/models.py:Net", "--input", "4,3", "--time-dim", "none", "--T", "6"]) == 0
    assert "T = 6" in capsys.readouterr().out
    assert main(["verify", "files/models.py:Net", "--input", "4,3", "--time-dim", "0,0"]) == 2
    assert "SNNFX309" in capsys.readouterr().err


def test_difference_found_by_verify_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert_wrongly(model: nn.Module, **options: object) -> snnfx.Net:
        # The net of another model, with weights of its own.
        return snnfx.convert(load_model("files/models.py:Net"), **options)  # type: ignore[arg-type]

    monkeypatch.setattr("snnfx.cli.commands.convert", convert_wrongly)
    assert main(["verify", "files/models.py:Net", "--input", "4,3"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("SNNFX40") and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("options", "code"), [((), "SNNFX309 verify needs --input"), (("--input", "4,3", "--T", "0"), "SNNFX301")]
)
def test_verify_refuses_what_it_cannot_run(
    options: tuple[str, ...], code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", "files/models.py:Net", *options]) == 2
    assert code in capsys.readouterr().err


# -- draw ---------------------------------------------------------------------------------------------------------


def test_draw_writes_the_file_and_says_where(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "files/models.py:build", "--input", "2,3", "--out", "picture.dot"]) == 0
    assert capsys.readouterr().out == "picture.dot\n"
    assert "digraph" in (folder / "picture.dot").read_text(encoding="utf-8")


def test_draw_refuses_an_unknown_type(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["draw", "files/models.py:build", "--out", "picture.docx"]) == 2
    assert "SNNFX603" in capsys.readouterr().err
    assert not (folder / "picture.docx").exists()


# -- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "2,x", "2,-3", "2,3:int63", "2,3:nn", "2 3"])
def test_input_that_is_no_shape(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:Net", f"--input={text}"]) == 2
    assert f"SNNFX309 --input {text}" in capsys.readouterr().err


def test_option_that_convert_does_not_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "files/models.py:Net", "--batch-norm", "sometimes"]) == 2
    assert "SNNFX309 batch_norm='sometimes'" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"snnfx {snnfx.__version__} (torch {torch.__version__})\n"


@pytest.mark.parametrize("arguments", [[], ["dance"], ["draw"], ["explain", "a:b", "--json", "--markdown"]])
def test_wrong_usage_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m snnfx")


# -- loading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["zoo_of_tests.models:build", "files/models.py:build", "files/models.py:Zoo.small", "files/models.py:ready"]
)
def test_ways_to_name_a_model(path: str) -> None:
    model = load_model(path)
    assert [type(m).__name__ for m in model.children()] == ["Linear", "LIFNode", "Linear"]


def test_loading_leaves_the_search_path_alone() -> None:
    before = list(sys.path)
    load_model("files/models.py:build")
    with pytest.raises(ToolError):
        load_model("files/models.py:broken")
    assert sys.path == before


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("zoo_of_tests.models", "does not name a model"),
        (":build", "does not name a model"),
        ("zoo_of_tests.absent:build", "the module `zoo_of_tests.absent` was not found"),
        ("absent_of_tests.models:build", "the module `absent_of_tests.models` was not found"),
        ("files/absent.py:build", "the file `files/absent.py` was not found"),
        ("files/models.py:bild", "defines `build`, `Net`, `Step`"),
        ("files/models.py:number", "is of type int, not an nn.Module"),
        ("files/models.py:no_module", "returned a value of type list, not an nn.Module"),
        ("misspelt_of_tests:build", r"\(misspelt_of_tests.py:1\): SyntaxError"),
        ("needy_of_tests:build", r"\(needy_of_tests.py:1\): ModuleNotFoundError: No module named 'a_package"),
        ("files/models.py:needs", "TypeError: needs\\(\\) missing 1 required positional argument: 'width'"),
        ("files/models.py:broken", r"\(files/models.py:\d+\): TypeError"),
    ],
)
def test_path_that_leads_nowhere(path: str, message: str) -> None:
    with pytest.raises(ToolError, match=message) as raised:
        load_model(path)
    assert raised.value.code == "SNNFX602"
    assert raised.value.hint


def test_error_of_a_factory_is_the_cause() -> None:
    with pytest.raises(ToolError) as raised:
        load_model("files/models.py:needs")
    assert isinstance(raised.value.__cause__, TypeError)


def test_export_writes_a_file_and_prints_its_tensors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small.py").write_text(
        "import torch, snnfx\ndef build(): return torch.nn.Sequential(torch.nn.Linear(5, 4), snnfx.neuron.LIFNode())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert (
        main(["export", "small.py:build", "--input", "2,5", "--T", "3", "--state", "--no-check", "--out", "n.pt2"]) == 0
    )
    printed = capsys.readouterr()
    assert [line.split()[-2:] for line in printed.out.splitlines() if line.startswith("output")] == [["4]", "float32"]]
    assert "[T, N, 4]" in printed.out and "1.v.next" in printed.out
    assert "trace the net" in printed.err
    assert (tmp_path / "n.pt2").is_file()


def test_export_of_a_nir_file_takes_a_time_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nir = pytest.importorskip("nir")
    (tmp_path / "fires.py").write_text(
        "import torch, snnfx\ndef build(): return torch.nn.Sequential(torch.nn.Linear(5, 4), snnfx.neuron.LIFNode())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["export", "fires.py:build", "--input", "2,5", "--dt", "0.001", "--out", "n.nir"]) == 0
    assert nir.read("n.nir").nodes["1"].tau[0] == pytest.approx(2e-3)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "n.nir" in rows["file"] and "KiB" in rows["file"]
    assert "T, N" in rows["axes"] and "the net, for the given inputs" in rows["check"]


def test_errors_of_an_export_exit_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.py").write_text("import torch\ndef build(): return torch.nn.Linear(5, 4)\n")
    monkeypatch.chdir(tmp_path)
    for options in (["--out", "n.pth"], ["--out", "n.pt2", "--dt", "0.1"], ["--out", "missing/n.onnx"]):
        assert main(["export", "wrong.py:build", "--input", "2,5", *options]) == 2
    assert not [f.name for f in tmp_path.glob("n.*")]
