"""Hints of `explain`, `draw`, `verify` and of calls in multi-step mode: each leads to a report or a picture."""

from __future__ import annotations

import builtins
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.inspect.memory_report import MemoryReport
from snnfx.inspect.picture.drawing import Drawing
from support.hints import refused

T, N = 4, 2
X_SEQ = 4 * torch.rand(T, N, 3, generator=torch.Generator().manual_seed(1))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), neuron.LIFNode(v_threshold=0.2))


# -- explain and memory ------------------------------------------------------------------------------------------------


class Constant(nn.Module):
    def __init__(self, is_constant: bool) -> None:
        super().__init__()
        from spikingjelly.activation_based import neuron as layers

        self.lif, self.is_constant = layers.LIFNode(step_mode="m"), is_constant

    def forward(self, x_seq: Tensor) -> Tensor:
        return x_seq + self.lif(torch.zeros(T, N, 3) if self.is_constant else x_seq)


def test_a_call_in_multi_step_mode_without_an_input() -> None:
    pytest.importorskip("spikingjelly.activation_based")
    refused(
        "SNNFX234",
        "capture/multi_step_calls.py:_refuse_call",
        "Pass tensors with time in dimension 0 as arguments.",
        lambda: snnfx.convert(Constant(True), takes="sequence", example_inputs=(X_SEQ,)),
        names="`lif`",
        at="torch.zeros(T, N, 3)",
    )
    model = Constant(False)
    net = snnfx.convert(model, takes="sequence", example_inputs=(X_SEQ,))
    torch.testing.assert_close(net(X_SEQ), model(X_SEQ))


@pytest.mark.parametrize("steps", [0, True, 2.0])
def test_a_number_of_steps_that_is_none(steps: Any) -> None:
    refused(
        "SNNFX301",
        "inspect/explain.py:explain",
        "Pass an int above 0.",
        lambda: snnfx.explain(small(), T=steps, example_inputs=X_SEQ[0]),
        names=f"T={steps!r}",
    )
    assert snnfx.explain(small(), T=1, example_inputs=X_SEQ[0]).memory is not None


def test_memory_without_example_inputs() -> None:
    refused(
        "SNNFX309",
        "inspect/explain.py:_memory",
        "Pass example_inputs: the inputs of ONE time step, with the batch dimension.",
        lambda: snnfx.explain(small(), T=T),
        names=f"T={T}",
    )
    memory = snnfx.explain(small(), T=T, example_inputs=X_SEQ[0]).memory
    assert memory is not None and memory.is_predicted


def memory_of(**options: Any) -> MemoryReport:
    x_seq = torch.rand(50, 64, 3)
    memory = snnfx.explain(small(), T=50, example_inputs=x_seq[0], **options).memory
    assert memory is not None
    return memory


def test_memory_that_is_not_predicted() -> None:
    memory = memory_of(memory_budget=1000)
    refused(
        "SNNFX319",
        "inspect/memory_report.py:MemoryReport.svg",
        "Print the report: its text says how the net was planned.",
        memory.svg,
        names="inference: ",
    )
    assert "1000 B" in str(memory) or "budget" in str(memory)


def test_a_picture_of_memory_in_another_format(tmp_path: Path) -> None:
    memory = memory_of()
    refused(
        "SNNFX603",
        "inspect/memory_report.py:MemoryReport.save",
        "Use the suffix .svg; a browser or rsvg-convert converts it to other formats.",
        lambda: memory.save(tmp_path / "memory.png"),
        names="memory.png",
    )
    assert memory.save(tmp_path / "memory.svg").read_text().startswith("<svg")


# -- draw --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_stage_that_does_not_exist(is_converted: bool) -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX706",
        "inspect/picture/draw.py:_record_of_stage",
        'Pass a net and one of these stages, e.g. snnfx.draw(net, stage="partitioned").',
        lambda: snnfx.draw(net, stage="folded") if is_converted else snnfx.draw(small(), stage="planned"),
        names="captured, normalized, partitioned, planned",
    )
    for stage in ("captured", "normalized", "partitioned", "planned"):
        assert "digraph" in str(snnfx.draw(net, stage=stage))


def test_a_record_without_a_step_program() -> None:
    net = snnfx.convert(small())
    record = next(record for record in net.history if record.program is None)
    refused(
        "SNNFX706",
        "inspect/picture/draw.py:_picture_of_record",
        "Pass a record of a pass, or a stage: snnfx.draw(net, stage='planned').",
        lambda: snnfx.draw(record),
        names=record.description,
    )
    for drawing in (snnfx.draw(net, stage="planned"), snnfx.draw(net.history[0])):
        assert "digraph" in str(drawing)


def test_a_picture_of_negative_depth() -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX901",
        "inspect/picture/draw.py:_look",
        "Pass 0 or more, or None for all levels: snnfx.draw(net, depth=1).",
        lambda: snnfx.draw(net, depth=-1),
        names="depth=-1",
    )
    for depth in (0, 1, None):
        assert "digraph" in str(snnfx.draw(net, depth=depth))


def test_a_picture_with_another_object_as_profile() -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX901",
        "inspect/picture/draw.py:_look",
        "Measure first: snnfx.draw(net, profile=snnfx.profile(net, x_seq)).",
        lambda: snnfx.draw(net, profile=snnfx.explain(net)),  # type: ignore[arg-type]
        names="profile=Report",
    )
    assert "spikes per neuron and step" in str(snnfx.draw(net, profile=snnfx.profile(net, X_SEQ, repeats=1)))


def test_a_picture_in_another_format(tmp_path: Path) -> None:
    refused(
        "SNNFX603",
        "inspect/picture/drawing.py:_unknown_format",
        "Use a supported suffix: ",
        lambda: snnfx.draw(small(), tmp_path / "net.jpg"),
        names="net.jpg",
    )
    snnfx.draw(small(), tmp_path / "net.dot")
    assert "digraph" in (tmp_path / "net.dot").read_text()


def needs_no_graphviz(folder: Path) -> None:
    snnfx.draw(small(), folder / "net.dot")
    assert "digraph" in (folder / "net.dot").read_text()


def test_the_program_dot_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    error = refused(
        "SNNFX601",
        "inspect/picture/drawing.py:_require_graphviz",
        "apt install graphviz, brew install graphviz, or https://graphviz.org/download",
        lambda: snnfx.draw(small(), tmp_path / "net.svg"),
    )
    assert "write a .dot file" in error.hint
    needs_no_graphviz(tmp_path)


def test_the_package_graphviz_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "graphviz":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dot")
    monkeypatch.setattr(builtins, "__import__", without)
    refused(
        "SNNFX601",
        "inspect/picture/drawing.py:_require_graphviz",
        "pip install graphviz",
        lambda: snnfx.draw(small(), tmp_path / "net.svg"),
    )
    needs_no_graphviz(tmp_path)


def test_a_format_that_dot_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphviz = pytest.importorskip("graphviz")

    class Failing:
        def __init__(self, source: str) -> None:
            self.source = source

        def pipe(self, format: str) -> bytes:
            raise graphviz.CalledProcessError(1, ["dot"])

    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/dot")
    monkeypatch.setattr(graphviz, "Source", Failing)
    refused(
        "SNNFX601",
        "inspect/picture/drawing.py:Drawing.pipe",
        "Install graphviz with support for that format, or write a .dot file and render it elsewhere.",
        lambda: Drawing("digraph {}").pipe("pdf"),
        names="pdf",
    )
    needs_no_graphviz(tmp_path)


# -- verify ------------------------------------------------------------------------------------------------------------


def verifies(model: nn.Module, net: Any, *inputs: Any, **options: Any) -> None:
    assert "OK: the net matches the reference" in str(snnfx.verify(model, net, *inputs, **options))


def test_verify_without_a_net() -> None:
    model = small()
    refused(
        "SNNFX304",
        "inspect/verify/verify.py:verify",
        "Call verify(model, net, x_seq).",
        lambda: snnfx.verify(model, X_SEQ),  # type: ignore[arg-type]
        names="Tensor",
    )
    verifies(model, snnfx.convert(model), X_SEQ)


def test_verify_with_the_net_of_another_model() -> None:
    net = snnfx.convert(small())
    refused(
        "SNNFX413",
        "inspect/verify/matching_modules.py:check_matching_modules",
        "Pass the model that was converted: verify(net.source, net, x_seq).",
        lambda: snnfx.verify(nn.Sequential(nn.Linear(3, 4)), net, X_SEQ),
        names="`1` (LIFNode)",
    )
    verifies(net.source, net, X_SEQ)


@pytest.mark.parametrize("part", ["parameter", "buffer", "input"])
def test_verify_on_the_meta_device(part: str) -> None:
    def norms() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), neuron.LIFNode(v_threshold=0.2))

    model, x_seq = norms(), X_SEQ
    if part == "parameter":
        model.to("meta")
    elif part == "buffer":
        model[1].running_mean = torch.zeros(4, device="meta")
    else:
        x_seq = X_SEQ.to("meta")
    error = refused(
        "SNNFX417",
        "inspect/verify/matching_modules.py:check_has_values",
        'memory with model.to_empty(device="cpu") and load its weights.',
        lambda: snnfx.verify(model, snnfx.convert(model), x_seq),
        names={"parameter": "`0.weight`", "buffer": "`1.running_mean`", "input": "an input"}[part],
    )
    assert error.why
    weights = norms()
    model.to_empty(device="cpu").load_state_dict(weights.state_dict())
    model[1].running_mean = torch.zeros(4)
    verifies(model, snnfx.convert(model), X_SEQ)


def test_verify_without_a_time_dimension() -> None:
    model = small()
    net = snnfx.convert(model)
    refused(
        "SNNFX306",
        "inspect/verify/sequence_inputs.py:SequenceInputs.of",
        "Pass a sequence, or convert the model with the time_dim of this input.",
        lambda: snnfx.verify(model, net, torch.tensor(1.0)),
        names="`input[0]`",
    )
    verifies(model, net, X_SEQ)
    last = snnfx.convert(model, time_dim=2)
    verifies(model, last, X_SEQ.permute(1, 2, 0))


def test_verify_without_a_number_of_steps() -> None:
    model = small()
    net = snnfx.convert(model, time_dim=None)
    refused(
        "SNNFX310",
        "inspect/verify/sequence_inputs.py:SequenceInputs.of",
        "Pass it: verify(..., T=8).",
        lambda: snnfx.verify(model, net, X_SEQ[0]),
    )
    verifies(model, net, X_SEQ[0], T=8)


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lif = neuron.LIFNode(v_threshold=0.2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.lif(x + y)


def test_verify_of_sequences_of_other_lengths() -> None:
    model = Sum()
    net = snnfx.convert(model)
    refused(
        "SNNFX303",
        "inspect/verify/sequence_inputs.py:SequenceInputs.of",
        "Pass sequences of the same length.",
        lambda: snnfx.verify(model, net, X_SEQ, X_SEQ[1:]),
        names=f"`input[1]` has {T - 1}",
    )
    verifies(model, net, X_SEQ, X_SEQ)


def test_verify_of_no_steps() -> None:
    model = small()
    net = snnfx.convert(model)
    refused(
        "SNNFX301",
        "inspect/verify/sequence_inputs.py:SequenceInputs.of",
        "Pass at least one time step.",
        lambda: snnfx.verify(model, net, X_SEQ[:0]),
    )
    verifies(model, net, X_SEQ[:1])


def test_verify_of_another_nesting() -> None:
    model = Sum()
    net = snnfx.convert(model, time_dim=(0, 0))
    refused(
        "SNNFX307",
        "inspect/verify/sequence_inputs.py:_dims_of_leaves",
        "Pass the arguments of the model's step method, with a time dimension.",
        lambda: snnfx.verify(model, net, X_SEQ),
        names="time_dim=(0, 0)",
    )
    verifies(model, net, X_SEQ, X_SEQ)


class NormOfTheFirstStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.v = nn.BatchNorm1d(3), None

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.bn(x) if self.v is None else 0.5 * self.v + x
        return self.v


def test_verify_of_statistics_that_are_undefined() -> None:
    model = NormOfTheFirstStep()
    refused(
        "SNNFX405",
        "inspect/verify/oracle.py:_undefined",
        'Convert it with batch_norm="per_step", or verify it in evaluation mode.',
        lambda: snnfx.verify(model, snnfx.convert(model, batch_norm="fold"), X_SEQ),
    )
    verifies(model, snnfx.convert(model, batch_norm="per_step"), X_SEQ)
    verifies(model.eval(), snnfx.convert(model, batch_norm="fold").eval(), X_SEQ)


class Float32Only(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 only")
        return 2 * x


class AnyDtype(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor(2.0).to(x.dtype)


def test_verify_of_code_for_float32() -> None:
    model = nn.Sequential(Float32Only())
    net = snnfx.convert(model)
    refused(
        "SNNFX412",
        "inspect/verify/verification.py:_not_in_float64",
        "Let this line use the dtype of its operands (x.to(v.dtype), torch.zeros_like(v)), or verify without "
        "double=True.",
        lambda: snnfx.verify(model, net, X_SEQ, double=True),
        names="test_hints_of_inspection.py:",
    )
    verifies(model, net, X_SEQ)
    verifies(model := nn.Sequential(AnyDtype()), snnfx.convert(model), X_SEQ, double=True)


def test_verify_of_numbers_that_cannot_be_shared() -> None:
    class Poisson(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.poisson(x) if self.training else x)

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            return self.fc(counts + 0 * x)

    model = Poisson()
    net = snnfx.convert(model)
    refused(
        "SNNFX411",
        "inspect/verify/shared_draws.py:_refusing",
        "Verify in evaluation mode, or draw the random numbers outside the model and pass them as input.",
        lambda: snnfx.verify(model, net, X_SEQ),
        names="torch.poisson",
    )
    verifies(model.eval(), net.eval(), X_SEQ)
    verifies(given := Given(), snnfx.convert(given), X_SEQ, torch.poisson(X_SEQ))


class Dropped(nn.Module):
    """Four places drop elements of one shape, and the net drops those in front of the neurons first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.first, self.second = neuron.LIFNode(v_threshold=0.2), neuron.LIFNode(v_threshold=0.2)
        self.layers = nn.ModuleList(nn.Dropout(0.3) for _ in range(layers))

    def drop(self, place: int, x: Tensor) -> Tensor:
        if self.layers:
            return self.layers[place](x)  # type: ignore[no-any-return]
        return nn.functional.dropout(x, 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        current = self.fc(x)
        both = self.drop(0, self.first(current)) + self.drop(1, x)
        return both + 3 * self.drop(2, self.second(both)) + self.drop(3, current)


def test_verify_of_many_places_that_draw_alike() -> None:
    model = Dropped(layers=0)
    net = snnfx.convert(model)
    refused(
        "SNNFX411",
        "inspect/verify/draw_assignment.py:check_with_shared_draws",
        "Verify in evaluation mode, or use a Dropout layer of its own for each place.",
        lambda: snnfx.verify(model, net, X_SEQ),
        names="4 places draw numbers of one shape",
    )
    verifies(model.eval(), net.eval(), X_SEQ)
    verifies(model := Dropped(layers=4), snnfx.convert(model), X_SEQ)


class Steps(nn.Module):
    """A model whose later steps may return something else than its first ones."""

    def __init__(self, later: Callable[[Tensor], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.later, self.t = nn.Linear(3, 4), later, 0

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        if self.later is None:
            return y
        self.t += 1
        return y if self.t < T else self.later(y)


def test_verify_of_outputs_that_change_their_nesting() -> None:
    net = snnfx.convert(model := Steps())
    refused(
        "SNNFX401",
        "inspect/verify/runs.py:Runs.outputs_of_model",
        "Return outputs with the same nesting at every step.",
        lambda: snnfx.verify(Steps(lambda y: (y, y)), net, X_SEQ),
    )
    verifies(model, net, X_SEQ)


@pytest.mark.parametrize("later", [lambda y: y[:, :2], lambda y: y.double()], ids=["shape", "dtype"])
def test_verify_of_outputs_that_change_their_shape_or_dtype(later: Callable[[Tensor], Any]) -> None:
    net = snnfx.convert(model := Steps())
    refused(
        "SNNFX401",
        "inspect/verify/runs.py:_over_time",
        "Return a tensor of the same shape and dtype at every step.",
        lambda: snnfx.verify(Steps(later), net, X_SEQ),
        names="`output`",
    )
    verifies(model, net, X_SEQ)


def test_verify_of_a_net_with_other_weights() -> None:
    model, other = small(), small()
    with torch.no_grad():
        other[0].weight.add_(1.0)
    net = snnfx.convert(other)
    refused(
        "SNNFX401",
        "inspect/verify/check.py:Check.error",
        "Print snnfx.explain(net) to see how the regions were formed.",
        lambda: snnfx.verify(model, net, X_SEQ),
    )
    assert "region" in str(snnfx.explain(net))
