"""Hints of `snnfx.export` to .pt2 and .onnx files: each leads to a file that computes the same as the net."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import tempfile
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.deploy import checking, pt2_file
from snnfx.passes import Pass
from support.hints import refused, silent, warned

T, N = 3, 2
X_SEQ = torch.rand(T, N, 4, generator=torch.Generator().manual_seed(1))


class Step(nn.Module):
    """A step whose code is a function of the module and the input."""

    def __init__(self, code: Callable[[Any, Tensor], Any], **buffers: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.lif, self.v, self.code = nn.Linear(4, 4), neuron.LIFNode(v_threshold=0.2), None, code
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def spikes(self: Any, x: Tensor) -> Any:
    return self.lif(self.fc(x))


def net_of(code: Callable[[Any, Tensor], Any] = spikes, *, known: bool = False, **buffers: Tensor) -> Any:
    return snnfx.convert(Step(code, **buffers), example_inputs=X_SEQ[0] if known else None).eval()


def same_in_file(net: Any, path: Path, **options: Any) -> None:
    """Export without another message of snnfx, and run the file on the inputs."""
    with silent():
        snnfx.export(net, path, X_SEQ, check=False, **options)
    torch.testing.assert_close(torch.export.load(path).module()(X_SEQ), net(X_SEQ))


@functools.cache
def plain_net_is_same_in_file(**options: Any) -> None:
    """Export the model without the code that a test is about: several hints lead there."""
    with tempfile.TemporaryDirectory() as folder:
        same_in_file(net_of(), Path(folder) / "net.pt2", **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.pt2"


# -- options -----------------------------------------------------------------------------------------------------------


def test_a_time_step_for_a_program(path: Path) -> None:
    net = net_of()
    refused(
        "SNNFX801",
        "deploy/export.py:write_export",
        "Leave dt out.",
        lambda: snnfx.export(net, path, X_SEQ, dt=1e-4),
        names="dt=0.0001",
    )
    plain_net_is_same_in_file()


@dataclass(frozen=True)
class Noting(Pass):
    name = "noting"
    requires = "normalized"

    def apply(self, program: Any) -> str:
        return "a note"


def test_a_graph_replaced_by_hand(path: Path) -> None:
    net = net_of()
    net.graph = net.graph
    refused(
        "SNNFX801",
        "deploy/export.py:_kind",
        "Write the change as a pass, or into the model.",
        lambda: snnfx.export(net, path, X_SEQ),
    )
    same_in_file(snnfx.convert(Step(spikes), passes=[Noting()]).eval(), path)


def test_a_package_with_two_dynamic_axes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of()
    refused(
        "SNNFX807",
        "deploy/export.py:_kind",
        'Pass dynamic=("T",), for the batch size of the inputs, or dynamic=("N",), for their T.',
        lambda: snnfx.export(net, path, X_SEQ, package="aot"),
    )
    # tests/deploy compiles packages.
    programs: list[torch.export.ExportedProgram] = []

    def compiled(program: torch.export.ExportedProgram, file: str, configs: Any) -> None:
        programs.append(program)
        Path(file).write_bytes(b"package")

    monkeypatch.setattr(pt2_file, "compile_package", compiled)
    for axis in ("T", "N"):
        snnfx.export(net, path, X_SEQ, package="aot", dynamic=(axis,), check=False)
    for program, longer in zip(programs, (torch.rand(T + 2, N, 4), torch.rand(T, N + 2, 4)), strict=True):
        torch.testing.assert_close(program.module()(longer), net(longer))


def test_a_package_that_cannot_be_compiled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(pt2_file, "compile_package", fail)
    net = net_of()
    refused(
        "SNNFX807",
        "deploy/pt2_file.py:write_package",
        "Export a program instead (package=None), or another choice of dynamic axes.",
        lambda: snnfx.export(net, path, X_SEQ, package="aot", dynamic=("T",)),
        names="no compiler",
    )
    plain_net_is_same_in_file(package=None)


class Centred(nn.Module):
    """A loop over time, and code in front of it that needs the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.lif = nn.Linear(4, 4), neuron.LIFNode(v_threshold=0.2)

    def forward(self, x_seq: Tensor) -> Tensor:
        return torch.stack([self.lif(self.fc(x)) for x in x_seq - x_seq.mean(0)])


def test_code_around_a_loop(path: Path) -> None:
    net = snnfx.convert(Centred(), takes="sequence", example_inputs=X_SEQ).eval()
    refused(
        "SNNFX819",
        "deploy/export.py:_plan",
        "Move this code out of the model and export the rest.",
        lambda: snnfx.export(net, path, X_SEQ),
        names="test_hints_of_export.py",
    )
    plain_net_is_same_in_file()


def test_one_step_of_a_net_on_whole_sequences() -> None:
    net = snnfx.convert(Centred(), takes="sequence", example_inputs=X_SEQ).eval()
    refused(
        "SNNFX235",
        "runtime/whole_sequences.py:refuse_without_step",
        "Call the net on whole sequences, net(x_seq), or move this operation to a model of its own.",
        lambda: net.run(X_SEQ[:1], state={}),
        names="sub combines a value of each time step with a reduced one",
    )
    torch.testing.assert_close(net(X_SEQ), Centred.forward(copy.deepcopy(net.source), X_SEQ))
    rest = net_of(lambda self, x: spikes(self, x))
    first, state = rest.run(X_SEQ[:1])
    torch.testing.assert_close(torch.cat((first, rest.run(X_SEQ[1:], state=state)[0])), rest(X_SEQ))


# -- mode, random numbers, states --------------------------------------------------------------------------------------


def test_a_net_in_training_mode(path: Path) -> None:
    net = net_of().train()
    warned(
        "SNNFX811",
        "deploy/export.py:_in_evaluation",
        "the net is in training mode; the file computes it in evaluation mode, as net.eval().",
        lambda: snnfx.export(net, path, X_SEQ, check=False),
    )
    same_in_file(net.eval(), path)


def count(self: Any, x: Tensor) -> Tensor:
    self.count = self.count + 1
    return x * self.count


def test_a_buffer_that_calls_change(path: Path) -> None:
    net = net_of(count, count=torch.tensor(0.0))
    warned(
        "SNNFX812",
        "deploy/export.py:_plan",
        "which a call of the net changes; state=True makes it a state.",
        lambda: snnfx.export(net, path, X_SEQ, check=False),
        names="count",
    )
    with silent():
        snnfx.export(net, path, X_SEQ, state=True, check=False)
    program, state = torch.export.load(path).module(), {"count": torch.tensor(0.0)}
    for start in (True, False):
        y_seq, state = program(X_SEQ, state, torch.tensor(start))
        torch.testing.assert_close(y_seq, net(X_SEQ))


def run_here(kind: str, path: Path, examples: list[Any], names: list[str]) -> list[list[Tensor]]:
    """Run a file in this process: tests/deploy runs it in its own."""
    program = torch.export.load(path).module()
    return [list(torch.utils._pytree.tree_leaves(program(*example))) for example in examples]


def test_random_numbers_in_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_run", run_here)
    net = net_of(lambda self, x: spikes(self, (torch.rand_like(x) < x).to(x.dtype)))
    warned(
        "SNNFX810",
        "deploy/export.py:write_export",
        " draws random numbers: only shapes and dtypes were compared.",
        lambda: snnfx.export(net, path, X_SEQ, dynamic=()),
        names="net.pt2",
    )
    with silent():  # the encoder outside of the net, as the example of the code says
        snnfx.export(net_of(), path, (torch.rand_like(X_SEQ) < X_SEQ).float(), dynamic=())


def test_wrong_results_of_a_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = net_of()
    monkeypatch.setattr(checking, "_run", lambda *given: [[y + 7 for y in results] for results in run_here(*given)])
    refused(
        "SNNFX808",
        "deploy/checking.py:_wrong",
        "Pass check=False to keep the file, and report this with the model.",
        lambda: snnfx.export(net, path, X_SEQ, dynamic=()),
        names="net.pt2",
    )
    assert not path.exists()
    plain_net_is_same_in_file()


def test_wrong_results_for_the_smallest_sizes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_for_one_sample(*given: Any) -> list[list[Tensor]]:
        return [[y if y.shape[1] == N else y + 7 for y in results] for results in run_here(*given)]

    monkeypatch.setattr(checking, "_run", wrong_for_one_sample)
    net = net_of()
    refused(
        "SNNFX808",
        "deploy/checking.py:_wrong",
        "Export it for the sizes of the given inputs: dynamic=(). ",
        lambda: snnfx.export(net, path, X_SEQ),
        names="for T = 1, N = 1",
    )
    with silent():
        snnfx.export(net, path, X_SEQ, dynamic=())  # checked, for the given sizes
    torch.testing.assert_close(torch.export.load(path).module()(X_SEQ), net(X_SEQ))


def test_a_net_that_fails_for_one_sample(path: Path) -> None:
    def without_dim(self: Any, x: Tensor, dim: int | None) -> Tensor:
        sums = self.fc(x).sum(1, keepdim=True)
        return (sums.squeeze() if dim is None else sums.squeeze(dim))[:, None] * x

    warned(
        "SNNFX818",
        "deploy/plan.py:_smallest_example",
        ", because the net fails there: ",
        lambda: snnfx.export(net_of(lambda self, x: without_dim(self, x, None)), path, X_SEQ, check=False),
        names="the file is not checked for T = 1, N = 1",
    )
    same_in_file(net_of(lambda self, x: without_dim(self, x, 1)), path)


@pytest.mark.parametrize("options", [{"chunk": 2}, {"chunk": 2, "memory_budget": 2**30}])
def test_memory_options_of_a_file(options: dict[str, Any], path: Path) -> None:
    net = snnfx.convert(Step(spikes), **options).eval()
    warned(
        "SNNFX825",
        "deploy/export.py:_announce_memory_options",
        "a call of the file computes all time steps at once. Export it with state=True and call it on pieces of the "
        "sequence.",
        lambda: snnfx.export(net, path, X_SEQ, check=False),
        names=" and ".join(f"{name}={value}" for name, value in options.items()),
    )
    with silent():
        snnfx.export(net, path, X_SEQ, state=True, check=False)
    program, state, pieces = torch.export.load(path).module(), {"lif.v": torch.zeros(N, 4)}, []
    for piece in (X_SEQ[:1], X_SEQ[1:]):
        y_seq, state = program(piece, state)
        pieces.append(y_seq)
    torch.testing.assert_close(torch.cat(pieces), net(X_SEQ))


def test_one_flipped_spike(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flipped(*given: Any) -> list[list[Tensor]]:
        found = run_here(*given)
        for (y,) in found:
            if y.dtype == torch.float32:  # as rounding does
                y.view(-1)[0] = 1 - y.view(-1)[0]
        return found

    monkeypatch.setattr(checking, "_run", flipped)
    net = net_of()
    warned(
        "SNNFX809",
        "deploy/checking.py:_compare",
        "differ from the net: other orders of summation round differently, which can flip a spike.",
        lambda: snnfx.export(net, path, X_SEQ, dynamic=()),
        names="1 of 24 elements",
    )
    with silent():  # float64, as the example of the code says
        snnfx.export(net.double(), path, X_SEQ.double(), dynamic=())


# -- parts that cannot be traced ---------------------------------------------------------------------------------------


def test_a_part_that_runs_as_python_code(path: Path) -> None:
    for branch in (lambda self, x: x if x.sum() > 0 else -x, lambda self, x: x * float(x.mean())):
        for model in (Step(branch), nn.Sequential(nn.Linear(4, 4), Step(branch))):
            net = snnfx.convert(model, example_inputs=X_SEQ[0]).eval()
            refused(
                "SNNFX804",
                "deploy/refusals.py:refuse_opaque_parts",
                "Rewrite it with operations on tensors; `snnfx.explain(model)` shows when it can be traced.",
                lambda net=net: snnfx.export(net, path, X_SEQ),
                names="`1`" if isinstance(model, nn.Sequential) else "the model in region",
            )
    for traced in (lambda self, x: torch.where(x.sum() > 0, x, -x), lambda self, x: x * x.mean()):
        assert "could not be traced" not in str(snnfx.explain(Step(traced)))
        same_in_file(net_of(traced), path)


def loop_over_samples(self: Any, x: Tensor) -> Tensor:
    for _ in range(x.shape[0]):
        x = x + 1
    return x


@pytest.mark.parametrize(
    ("code", "weight"),
    [
        (loop_over_samples, None),
        (lambda self, x: self.fc(x) * self.weight, torch.rand(N, 1)),
        (lambda self, x: torch.cat([x, self.weight], 1), torch.rand(N, 2)),
        (lambda self, x: self.fc(x).view(2, 4), None),
    ],
)
def test_a_step_for_one_batch_size(code: Callable[[Any, Tensor], Any], weight: Tensor | None, path: Path) -> None:
    net = net_of(code, known=True, **({} if weight is None else {"weight": weight}))
    refused(
        "SNNFX806",
        "deploy/refusals.py:refused_region",
        'Export for this batch size: dynamic=("T",).',
        lambda: snnfx.export(net, path, X_SEQ),
        names="the batch size cannot be dynamic",
        at="x",
    )
    same_in_file(net, path, dynamic=("T",))


def test_an_operation_without_an_aten_form(path: Path) -> None:
    net = net_of(lambda self, x: spikes(self, torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()))
    refused(
        "SNNFX805",
        "deploy/refusals.py:refused_region",
        "Replace this operation; one step may compute with tensors, but neither read their values in Python",
        lambda: snnfx.export(net, path, X_SEQ),
        at="quantize_per_tensor",
    )
    same_in_file(net_of(lambda self, x: spikes(self, (x / 0.1).round() * 0.1)), path)


def test_a_state_that_is_no_multiple_of_the_batch(path: Path) -> None:
    def padded(self: Any, x: Tensor) -> Tensor:
        if self.v is None:
            self.v = x.new_zeros(x.shape[0] + 1, 4)
        self.v = self.v * 0.5 + x.sum(0)
        return self.v[:-1] + x

    net = net_of(padded)
    refused(
        "SNNFX806",
        "deploy/plan.py:_axes_of_state",
        'Export for this batch size: dynamic=("T",).',
        lambda: snnfx.export(net, path, X_SEQ, state=True),
        names="`v`",
    )
    snnfx.export(net, path, X_SEQ, state=True, dynamic=("T",), check=False)
    result = torch.export.load(path).module()(X_SEQ, {"v": torch.zeros(N + 1, 4)})
    torch.testing.assert_close(result[0], net(X_SEQ))


def test_an_axis_that_torch_specializes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, original = net_of(), torch.export.export

    def specialized(*args: Any, dynamic_shapes: Any, **kwargs: Any) -> Any:
        if 1 in dynamic_shapes["x"]:
            raise ValueError("Constraints violated (N)! N = 2 was specialized.")
        return original(*args, dynamic_shapes=dynamic_shapes, **kwargs)

    monkeypatch.setattr(torch.export, "export", specialized)
    error = refused(
        "SNNFX806",
        "deploy/tracing.py:_refusal",
        "Export it with the sizes of the given inputs: dynamic=",
        lambda: snnfx.export(net, path, X_SEQ),
        names="the axis N",
    )
    same_in_file(net, path, dynamic=eval(error.hint.partition("dynamic=")[2].rstrip(".")))


def test_a_program_that_torch_refuses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, original = net_of(lambda self, x: spikes(self, x).atan()), torch.export.export

    def refusing(module: Any, *args: Any, **kwargs: Any) -> Any:
        program = original(module, *args, **kwargs)
        if any("atan" in str(node.target) for node in program.graph.nodes):
            raise NotImplementedError("atan has no rule")
        return program

    monkeypatch.setattr(torch.export, "export", refusing)
    refused(
        "SNNFX805",
        "deploy/tracing.py:_refusal",
        "Export a part of the model, or replace the operation named here.",
        lambda: snnfx.export(net, path, X_SEQ),
        names="atan has no rule",
    )
    plain_net_is_same_in_file()


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("missing", "hint"),
    [
        ("onnxscript", "Run `pip install snnfx[onnx]`."),
        ("onnxruntime", "Run `pip install snnfx[onnx]`, or pass check=False."),
    ],
)
def test_a_missing_package_of_onnx(missing: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(name: str) -> Any:
        return None if name == missing else types.SimpleNamespace()

    net, path = net_of(), tmp_path / "net.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", found)
        error = refused(
            "SNNFX803",
            "deploy/onnx_file.py:require_onnx",
            "Run `pip install snnfx[onnx]`",
            lambda: snnfx.export(net, path, X_SEQ),
            names=missing,
        )
        assert error.hint == hint
        if missing == "onnxruntime":
            patch.setattr("snnfx.deploy.export.write_onnx", lambda program, file, *_: file.write_bytes(b"model"))
            snnfx.export(net, path, X_SEQ, check=False)
            assert path.exists()


def test_an_operation_without_an_onnx_form(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = net_of(lambda self, x: torch.special.bessel_j0(self.fc(x)))
    refused(
        "SNNFX807",
        "deploy/onnx_file.py:write_onnx",
        "Replace this operation, or export a .pt2 file.",
        lambda: snnfx.export(net, tmp_path / "net.onnx", X_SEQ, check=False),
        names="bessel_j0",
    )
    same_in_file(net, tmp_path / "net.pt2")


# -- sizes, packages and dtypes ----------------------------------------------------------------------------------------


def test_inputs_of_another_size(path: Path) -> None:
    net = net_of()
    refused(
        "SNNFX327",
        "deploy/given_inputs.py:_do_not_fit",
        "Pass inputs of the sizes for which the model is written.",
        lambda: snnfx.export(net, path, X_SEQ[..., :3]),
        names="expects 4 features, and the step has 3",
        at="self.fc(x)",
    )
    same_in_file(net, path)


def test_inputs_without_a_batch(path: Path) -> None:
    net = snnfx.convert(Step(spikes), example_inputs=X_SEQ[0, 0]).eval()
    warned(
        "SNNFX826",
        "deploy/plan.py:plan_export",
        "The file computes one sample. Pass dynamic=",
        lambda: snnfx.export(net, path, X_SEQ[:, 0], check=False),
        names="`fc(x)`",
    )
    with silent():
        snnfx.export(net, path, X_SEQ[:, 0], check=False, dynamic=("T",))
    torch.testing.assert_close(torch.export.load(path).module()(X_SEQ[:, 0]), net(X_SEQ[:, 0]))
    same_in_file(net_of(known=True), path)


def test_states_for_one_batch_size(path: Path) -> None:
    net = net_of(lambda self, x: spikes(self, x + torch.ones(N, 4)), known=True)
    refused(
        "SNNFX806",
        "deploy/refusals.py:fixed_batch_size",
        'Export for this batch size: dynamic=("T",).',
        lambda: snnfx.export(net, path, X_SEQ, state=True),
        names="the step fails for another one",
        at="x + torch.ones",
    )
    snnfx.export(net, path, X_SEQ, state=True, dynamic=("T",), check=False)
    found = torch.export.load(path).module()(X_SEQ, {"lif.v": torch.zeros(N, 4)})
    torch.testing.assert_close(found[0], net(X_SEQ))


def test_a_broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    net, original = net_of(), importlib.import_module

    def broken(name: str, package: str | None = None) -> types.ModuleType:
        if name == "onnx":
            raise ImportError("libprotobuf.so: undefined symbol")
        return original(name, package)

    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", broken)
        refused(
            "SNNFX828",
            "deploy/packages.py:missing_packages",
            "Install it again: `pip install --force-reinstall ",
            lambda: snnfx.export(net, tmp_path / "net.onnx", X_SEQ, check=False),
            names="undefined symbol",
        )
    snnfx.export(net, tmp_path / "net.onnx", X_SEQ, check=False)


def test_a_dtype_without_kernels(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    net, x_seq = net_of().bfloat16(), X_SEQ.bfloat16()
    refused(
        "SNNFX827",
        "deploy/checking.py:_not_run",
        "Export net.float() with inputs in float32, or pass check=False for another runtime.",
        lambda: snnfx.export(net, tmp_path / "net.onnx", x_seq),
        names="NOT_IMPLEMENTED",
    )
    with silent():
        snnfx.export(net, tmp_path / "net.onnx", x_seq, check=False)
        snnfx.export(net.float(), tmp_path / "net.onnx", x_seq.float())


def test_a_dtype_without_an_onnx_form(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    layers = [nn.Conv1d(1, 2, 3), neuron.LIFNode(v_threshold=0.2)]
    net, x_seq = snnfx.convert(nn.Sequential(*layers)).eval().bfloat16(), X_SEQ.unsqueeze(2).bfloat16()
    refused(
        "SNNFX807",
        "deploy/onnx_file.py:_check_model",
        "Replace the operation or its dtype (net.float()), or export a .pt2 file.",
        lambda: snnfx.export(net, tmp_path / "net.onnx", x_seq, check=False),
        names="bfloat16",
    )
    with silent():
        snnfx.export(net, tmp_path / "net.pt2", x_seq, check=False)
        snnfx.export(net.float(), tmp_path / "net.onnx", x_seq.float(), check=False)


def test_a_state_whose_later_dtype_loses_values_of_the_first_step(path: Path) -> None:
    def masks(self: Any, x: Tensor) -> Any:
        self.v = x if self.v is None else self.v + x > 1.0
        return self.v + x

    def floats(self: Any, x: Tensor) -> Any:
        self.v = x if self.v is None else (self.v + x > 1.0).to(torch.float32)
        return self.v + x

    net = net_of(masks)
    refused(
        "SNNFX829",
        "deploy/plan.py:_refuse_lossy_first_states",
        "Give it one dtype: write the state of each step with .to(",
        lambda: snnfx.export(net, path, X_SEQ),
        names="`v`",
    )
    same_in_file(net_of(floats), path)
