"""`snnfx.explain` reports what is folded, mapped or looped, why, and notes about state, modes and kernels."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import snnfx
from snnfx.convert import convert
from snnfx.errors import CODES, InputError, describe_code
from snnfx.inspect.document import Bullets, Paragraph, Table, Title, as_markdown, as_text
from snnfx.inspect.explain import Report, explain
from snnfx.neuron import LIFNode

ROOT = Path(__file__).parents[2]


class ConvNet(nn.Module):
    """A spiking CNN with a residual block, BatchNorm and Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.lif = LIFNode(tau=2.0)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(4 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lif(self.bn(self.conv(x)))
        return self.fc(self.drop((y + x).flatten(1)))


class BatchMean(nn.Module):
    """Subtracts the mean over the batch: cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)
        self.lif = LIFNode()

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return self.lif(y - y.mean(0))


class Gate(nn.Module):
    """Control flow that depends on values: opaque as a submodule, not convertible as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return x


class Leaky(nn.Module):
    """A membrane potential kept as a plain attribute, with a learned leak."""

    def __init__(self) -> None:
        super().__init__()
        self.v = 0.0
        self.leak = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.v = self.v * self.leak.sigmoid() + x
        return self.v


class Recurrent(snnfx.MemoryModule):
    """A cell that makes its first state itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(3, 5)
        self.rec = nn.Linear(5, 5)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.full((x.shape[0], 5), 0.3)
        self.h = torch.tanh(self.inp(x) + self.rec(self.h))
        return self.h


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), LIFNode(tau=2.0), nn.Linear(4, 2))


def without_times(text: str) -> str:
    """The text with its measured times and line numbers taken out."""
    return re.sub(r"[\d.]+ ms", "0 ms", re.sub(r"\S*test_explain\.py:\d+", "test_explain.py:0", text))


def notes(report: Report) -> str:
    """The text of a report with the line breaks taken out."""
    return " ".join(str(report).split())


TINY = """\
Sequential, training mode
=========================

2 of 3 nodes folded into 2 regions; 1 loop.

Inputs
  input  one step  dtype    time
  -----  --------  -------  ---------------------
  input  [N, 3]    float32  dim 0 of the sequence

Regions, in execution order
  region  contains     output     state
  ------  -----------  ---------  -----
  fold_0  0 (Linear)   [T, N, 4]
  loop_1  1 (LIFNode)  [T, N, 4]  1.v
  fold_2  2 (Linear)   [T, N, 2]

  - fold: one call for all time steps, with T folded into the batch dimension
  - loop: one time step after another

Not folded
SNNFX107 sequential: on a cycle through time
  - loop_1: 1 (LIFNode), state v

Kernels
  - One kernel for all time steps: loop_1, compiled at the first call.

State
  slot  initial value  one step
  ----  -------------  --------
  1.v   0.0            [N, 4]

Chunks (inference)
  chunk = 16 steps (set by the option chunk).

torch.compile
  The compiled net is one operator, which runs the net's own kernels.

Pipeline
  PASSES; 0 ms in total.

To look up a code: python -m snnfx explain --code SNNFX107"""


def test_text_of_a_tiny_net() -> None:
    text = without_times(str(explain(tiny(), example_inputs=torch.rand(2, 3), chunk=16)))
    # Which passes there are is no business of this test.
    text = re.sub(r"(?<=Pipeline\n).*?;\s+[\d.]+\s+ms\s+in\s+total", "  PASSES; 0 ms in total", text, flags=re.DOTALL)
    assert text == TINY


def test_report_says_how_a_compiled_net_runs() -> None:
    assert explain(tiny()).compiled == "The compiled net is one operator, which runs the net's own kernels"
    model = tiny()
    model[0].register_forward_hook(lambda module, given, result: None)
    assert explain(model).compiled.endswith("one operator for each loop, because its modules have hooks")
    assert "it runs single steps" in explain(snnfx.convert(tiny(), step_mode="s")).compiled


def test_markdown_of_a_tiny_net_has_the_same_tables() -> None:
    text = explain(tiny(), example_inputs=torch.rand(2, 3)).to_markdown()
    assert text.startswith("# Sequential, training mode\n\n2 of 3 nodes folded into 2 regions; 1 loop.\n")
    assert "| `fold_0` | 0 (Linear) | `[T, N, 4]` |  |\n| `loop_1` | 1 (LIFNode) | `[T, N, 4]` | `1.v` |" in text
    assert "### SNNFX107 sequential: on a cycle through time\n\n- loop_1: 1 (LIFNode), state v\n" in text


@pytest.mark.parametrize("model", [ConvNet(), BatchMean(), nn.Sequential(Gate(), LIFNode()), Recurrent()])
def test_no_line_is_longer_than_a_terminal_is_wide(model: nn.Module) -> None:
    shape = (2, 1, 6, 6) if isinstance(model, ConvNet) else (2, 3)
    text = str(explain(model, example_inputs=torch.rand(shape)))
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii() and not any(line.endswith(" ") for line in text.splitlines())


def test_regions_come_with_what_they_contain_and_the_shape_over_time() -> None:
    report = explain(ConvNet(), example_inputs=torch.rand(2, 1, 6, 6))
    assert [(r.name, r.kind, [str(c) for c in r.contains], r.outputs, r.slots) for r in report.regions] == [
        ("fold_0", "fold", ["conv (Conv2d)", "bn (BatchNorm2d)"], ("[T, N, 4, 6, 6]",), ()),
        ("loop_1", "loop", ["lif (LIFNode)"], ("[T, N, 4, 6, 6]",), ("lif.v",)),
        ("fold_2", "fold", ["add", "flatten", "drop (Dropout)", "fc (Linear)"], ("[T, N, 10]",), ()),
    ]
    assert report.counts == {"nodes": 7, "fold": 6, "map": 0, "loop": 1, "once": 0}
    assert report.coverage == "6 of 7 nodes folded into 2 regions; 1 loop"


def test_shapes_are_left_out_without_example_inputs() -> None:
    report = explain(ConvNet())
    assert all(region.outputs == () for region in report.regions)
    assert [(x.name, x.shape, x.least_rank) for x in report.inputs] == [("x", "", 4)]
    assert "x at least 4 dimensions" in notes(report)
    assert "planned at the first call" in notes(report)


def test_sizes_elements_and_checks_are_no_nodes_that_count() -> None:
    class Sizes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            values, _ = torch.sort(x.reshape(x.shape[0], -1), 1)
            return values.view(x.shape[0], x.shape[1])

    report = explain(Sizes(), example_inputs=torch.rand(2, 3))
    assert [[str(c) for c in region.contains] for region in report.regions] == [["reshape", "sort", "view"]]
    assert report.coverage == "3 of 3 nodes folded into 1 region"


def test_operations_are_counted_by_the_module_that_they_are_in() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.relu(x) + 1)

    report = explain(nn.Sequential(Twice(), nn.ReLU()))
    assert [str(item) for item in report.regions[0].contains] == ["2 x relu in 0", "add in 0", "1 (ReLU)"]


def test_mapped_node_comes_with_code_reason_line_and_hint() -> None:
    report = explain(BatchMean(), example_inputs=torch.rand(2, 3))
    row = next(row for row in report.not_folded if row.code == "SNNFX103")
    assert (row.what, row.kind, row.reason) == ("mean", "map", "`fc.mean(0)` operates along dim 0, the batch dimension")
    line = Path(__file__).read_text(encoding="utf-8").splitlines()[int(row.where.rpartition(":")[2]) - 1]
    assert row.where.endswith(f"{Path(__file__).name}:{row.where.rpartition(':')[2]}")
    assert "y.mean(0)" in line
    assert row.hint in notes(report)
    assert report.coverage == (
        "1 of 4 nodes folded into 1 region; 1 loop; 2 mapped because `fc.mean(0)` operates along dim 0, "
        "the batch dimension"
    )


def test_nodes_of_a_loop_are_one_line() -> None:
    text = str(explain(Recurrent(), example_inputs=torch.rand(2, 3)))
    (line,) = [line for line in text.splitlines() if line.startswith("  - loop_")]
    assert "rec (Linear), add, tanh, state h (" in line


def test_what_is_fed_by_parameters_alone_is_computed_once() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain.exp()

    report = explain(Scaled(), example_inputs=torch.rand(2, 3))
    assert report.coverage == "1 of 2 nodes folded into 1 region; 1 computed once"
    assert [(r.kind, r.outputs) for r in report.regions] == [("once", ("[3]",)), ("fold", ("[T, N, 3]",))]


def test_input_without_time_is_reported() -> None:
    report = explain(tiny(), example_inputs=torch.rand(2, 3), time_dim=None)
    assert "input [N, 3] float32 the same at every step" in notes(report)
    assert report.regions[0].kind == "once"


def test_unbatched_input_keeps_its_size() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return F.linear(x, w)

    report = explain(Two(), example_inputs=(torch.rand(2, 3), torch.rand(5, 3)), time_dim=(0, None))
    assert [(x.name, x.shape, x.time_dim) for x in report.inputs] == [("x", "[N, 3]", 0), ("w", "[5, 3]", None)]


# -- state --------------------------------------------------------------------------------------------------------


def test_slots_come_with_what_they_start_at() -> None:
    model = nn.Sequential(Recurrent(), nn.Linear(5, 4), LIFNode(v_reset=-0.5), Leaky())
    report = explain(model, example_inputs=torch.rand(2, 3))
    assert {slot.name: (slot.initial, slot.discovered) for slot in report.slots} == {
        "0.h": ("full((input.shape[0], 5), 0.3)", False),
        "2.v": ("-0.5", False),
        "3.v": ("0.0", True),
    }
    assert [slot.shape for slot in report.slots[:2]] == ["[N, 5]", "[N, 4]"]
    assert re.search(r"3\.v 0\.0 \[., 4\] undeclared, inferred from attribute changes", notes(report))


def test_value_that_is_only_handed_on_is_no_loop() -> None:
    class Delay(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("before", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            y = x - self.before
            self.before = x
            return y

    report = explain(Delay(), example_inputs=torch.rand(2, 3))
    assert [(slot.name, slot.region) for slot in report.slots] == [("before", "")]
    assert "before 0.0 [N, 3] delayed by one step, not in a loop" in notes(report)
    assert report.coverage == "1 of 1 node folded into 1 region"


def test_argument_carried_from_step_to_step_is_reported() -> None:
    class Explicit(nn.Module):
        def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
            if mem is None:
                mem = torch.zeros_like(x)
            mem = torch.tanh(mem + x)
            return mem * 2, mem

    class Given(nn.Module):
        def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
            return x * mem, torch.tanh(mem + x)

    x = torch.rand(2, 3)
    inferred = explain(Explicit(), example_inputs=x)
    assert inferred.carried == ("Argument `mem` is output[1] of the previous step (inferred from the signature).",)
    assert [(slot.name, slot.initial) for slot in inferred.slots] == [("mem", "zeros_like(x)")]
    assert inferred.carried[0] in notes(inferred)
    given = explain(Given(), example_inputs=(x, x), carry={"mem": 1})
    assert given.carried == (
        "Argument `mem` is output[1] of the previous step (carry=). The caller must pass its initial value.",
    )
    assert [(slot.name, slot.initial) for slot in given.slots] == [("mem", "passed by the caller")]
    assert list(given.options["carry"]) == ["mem"]


def test_first_step_of_its_own_is_reported_with_what_differs() -> None:
    class Peeled(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_memory("h", None)
            self.begin = nn.Linear(3, 3)
            self.go_on = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.h is None:
                self.h = self.begin(x)
                return self.h * 2
            self.h = torch.tanh(self.go_on(x) + self.h)
            return self.h

    report = explain(Peeled(), example_inputs=torch.rand(2, 3))
    assert "runs in a separate graph (SNNFX212)" in report.first_step
    assert re.search(r"Only in the first step: begin \(\S+\) and mul", report.first_step)
    assert re.search(r"Only in later steps: go_on \(\S+\), add \(\S+\) and tanh", report.first_step)
    assert report.first_step in notes(report)
    assert [slot.initial for slot in report.slots] == ["computed at the first step"]
    assert explain(Recurrent(), example_inputs=torch.rand(2, 3)).first_step == ""


# -- what cannot be traced or converted ---------------------------------------------------------------------------


def test_opaque_module_is_named_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Gate(), nn.Linear(3, 3))
    report = explain(model, example_inputs=torch.rand(2, 3))
    assert list(report.opaque) == ["1"]
    (row,) = [row for row in report.not_folded if row.code == "SNNFX108"]
    assert (row.what, row.kind) == ("1", "loop")
    assert "`1` could not be traced" in row.reason and "used as a Python bool" in row.reason
    assert "SNNFX108 opaque: could not be traced" in str(report)


def test_opaque_module_with_state_is_named_as_well() -> None:
    class StatefulGate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(x if x.sum() > 0 else -x)

    report = explain(nn.Sequential(nn.Linear(3, 3), StatefulGate()), example_inputs=torch.rand(2, 3))
    assert list(report.opaque) == ["1"]
    assert notes(report).count("`1` could not be traced") == 1
    assert [(slot.name, slot.initial) for slot in report.slots] == [("1.lif.v", "set by StatefulGate")]


class FormatsValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(f"{x:.2f}")


@pytest.mark.parametrize("form", [str, Report.to_markdown])
def test_model_that_cannot_be_captured_gives_a_report(form: Any) -> None:
    report = explain(FormatsValues())
    assert report.error is not None and report.error.code == "SNNFX201"
    assert report.error.hint in report.error.text and report.error.where in report.error.text
    text = " ".join(form(report).split())
    assert "FormatsValues cannot be converted" in text
    assert CODES["SNNFX201"].meaning in text
    assert "python -m snnfx explain --code SNNFX201" in text


class AsksForLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + len(x)


@pytest.mark.parametrize(("code", "model"), [("SNNFX202", AsksForLength()), ("SNNFX207", nn.LazyLinear(3))])
def test_reason_for_not_converting_is_that_of_convert(code: str, model: nn.Module) -> None:
    with pytest.raises(snnfx.errors.CaptureError, match=code) as raised:
        convert(model)
    report = explain(model)
    assert report.error is not None
    assert report.error.text == str(raised.value)
    assert report.regions == () and report.coverage == ""


def test_bad_arguments_raise() -> None:
    with pytest.raises(InputError, match="SNNFX309"):
        explain(tiny(), batch_norm="sometimes")
    with pytest.raises(InputError, match="SNNFX307"):
        explain(tiny(), example_inputs=(torch.rand(2, 3), torch.rand(2, 3)))
    with pytest.raises(InputError, match="SNNFX304"):
        explain(3)  # type: ignore[arg-type]


def test_autograd_function_on_a_cycle_is_named_as_the_cause_of_what_follows() -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            return (v > v.new_zeros(3)).to(v.dtype)  # for three features only: what it does to shapes is not known

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Cell(Leaky):
        def forward(self, x: Tensor) -> Tensor:
            spike = Spike.apply(super().forward(x) - 1)
            self.v = self.v - spike
            return spike

    report = explain(nn.Sequential(nn.Linear(3, 3), Cell(), nn.Linear(3, 3)))
    (cause,) = [row for row in report.not_folded if row.code == "SNNFX101"]
    assert (cause.what, cause.kind) == ("Spike in 1", "loop")
    assert "snnfx_elementwise" in cause.hint
    assert "1 mapped because the autograd.Function Spike is not known to be element-wise" in report.coverage
    assert "Spike in 1" in {str(item) for region in report.regions for item in region.contains}


def test_what_follows_a_shape_preserving_autograd_function_is_folded() -> None:
    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor) -> Tensor:
            return (v > 0).to(v.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    class Cell(Leaky):
        def forward(self, x: Tensor) -> Tensor:
            spike = Spike.apply(super().forward(x) - 1)
            self.v = self.v - spike
            return spike

    report = explain(nn.Sequential(nn.Linear(3, 3), Cell(), nn.Linear(3, 3)))
    assert [region.kind for region in report.regions] == ["fold", "once", "loop", "fold"]


# -- notes --------------------------------------------------------------------------------------------------------


def test_batch_norm_in_force_is_reported() -> None:
    folded = explain(ConvNet())
    assert "BatchNorm in `bn`: training uses statistics over all T*N samples" in notes(folded)
    assert folded.mode_differences == ()
    per_step = explain(ConvNet(), batch_norm="per_step")
    assert "BatchNorm in `bn`: training uses the statistics of each time step" in notes(per_step)
    assert "bn: mapped in training, folded in evaluation mode." in per_step.mode_differences
    assert explain(tiny()).batch_norm == ()


def test_report_is_about_the_mode_of_the_model() -> None:
    model = ConvNet()
    in_training = explain(model, batch_norm="per_step")
    in_evaluation = explain(model.eval(), batch_norm="per_step")
    assert in_training.training and not in_evaluation.training
    assert [region.kind for region in in_training.regions] == ["fold", "map", "loop", "fold"]
    assert [region.kind for region in in_evaluation.regions] == ["fold", "loop", "fold"]
    assert in_training.mode_differences == in_evaluation.mode_differences


def test_different_steps_in_training_and_evaluation_are_reported() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x + torch.rand_like(x)
            return F.dropout(x, 0.5, self.training)

    report = explain(Noisy(), example_inputs=torch.rand(2, 3))
    assert re.search(r"Only in training mode: rand_like \(\S+\) and add", notes(report))
    assert re.search(r"Arguments differ between training and evaluation mode: dropout \(", notes(report))


def test_random_numbers_are_fresh_at_each_step() -> None:
    assert "Dropout in drop: training draws a new mask at each time step" in notes(explain(ConvNet()))

    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand_like(x)

    assert re.search(r"New random numbers at each time step: rand_like \(", notes(explain(Noise())))
    assert explain(tiny()).random == ()


def test_what_runs_on_the_reduced_value_is_reported() -> None:
    report = explain(tiny(), example_inputs=torch.rand(2, 3), reduce="mean")
    assert report.reduced == (
        'The net returns the mean over time of each output (reduce="mean"); 2 runs once, on the reduced value.',
    )
    assert [(r.kind, r.outputs) for r in report.regions][-1] == ("once", ("[N, 2]",))
    assert report.reduced[0] in notes(report)
    assert explain(tiny()).reduced == ()


def test_size_used_as_a_number_is_reported() -> None:
    class Columns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x[:, 0]
            for i in range(1, x.shape[1]):
                y = y + x[:, i]
            return y

    report = explain(Columns(), example_inputs=torch.rand(2, 3))
    assert len(report.fixed) == 1
    assert report.fixed[0].startswith("`x.shape[1]` must be 3 in every call")
    assert report.coverage == "5 of 5 nodes folded into 1 region"


def test_fallback_from_vmap_is_reported_once_it_has_happened() -> None:
    class Places(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nonzero(x)

    net = convert(Places())
    assert explain(net).fallbacks == ()
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX504"):
        net(torch.ones(4, 2, 3))
    (note,) = explain(net).fallbacks
    assert note.startswith("torch.vmap refused ") and note.endswith("run one by one (SNNFX504).")
    assert note in notes(explain(net))


def test_chunk_plan_is_that_of_the_net() -> None:
    x = torch.rand(2, 1, 6, 6)
    net = convert(ConvNet(), example_inputs=x)
    plan = net.chunk_plan(x.unsqueeze(0))
    chunk = explain(net).chunk
    assert chunk is not None
    assert (chunk.length, chunk.bytes_per_step) == (plan.length, plan.bytes_per_step)
    assert "per time step" in chunk.reason
    assert explain(ConvNet(), chunk=None).chunk == dataclasses.replace(
        chunk, length=None, bytes_per_step=0, reason="chunk = all time steps (set by the option chunk)"
    )


def test_pipeline_is_that_of_the_history() -> None:
    net = convert(tiny())
    report = explain(net)
    assert [(p.description, p.milliseconds, p.note) for p in report.passes] == [
        (r.description, r.milliseconds, r.note) for r in net.history
    ]
    assert report.passes[0].description == "capture"


# -- models and nets ----------------------------------------------------------------------------------------------


def test_report_on_a_net_is_the_report_on_its_model() -> None:
    model, x = ConvNet(), torch.rand(2, 1, 6, 6)
    of_model = explain(model, example_inputs=x, batch_norm="per_step", chunk=4)
    of_net = explain(convert(model, example_inputs=x, batch_norm="per_step", chunk=4))
    # Words, not lines: where they break depends on how long the times are.
    assert without_times(" ".join(str(of_model).split())) == without_times(" ".join(str(of_net).split()))
    assert of_model.options == of_net.options


def test_net_of_single_steps_is_reported_apart() -> None:
    net = convert(tiny(), step_mode="s")
    assert "This net runs one step at a time" in notes(explain(net))
    assert explain(net).chunk is None
    assert "one step at a time" not in notes(explain(net.convert_to("m")))


@pytest.mark.parametrize(("neuron", "chunk"), [(LIFNode(), "auto"), (Leaky(), None)])
def test_model_and_random_numbers_are_untouched(neuron: nn.Module, chunk: str | None) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), neuron, nn.Flatten(), nn.Dropout())
    model(torch.rand(2, 1, 6, 6)).sum().backward()
    hook = model[0].register_forward_hook(lambda *args: pytest.fail("the model was run"))
    before = copy.deepcopy(model.state_dict())
    state = neuron.v
    attributes = [set(vars(module)) for module in model.modules()]
    gradients = [p.grad for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    explain(model, example_inputs=torch.ones(2, 1, 6, 6), chunk=chunk)
    assert torch.equal(torch.get_rng_state(), generator)
    assert neuron.v is state
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert [module.training for module in model.modules()] == flags
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert list(model[0]._forward_hooks) == [hook.id]


@pytest.mark.parametrize("model", [ConvNet(), BatchMean(), Gate(), nn.Sequential(Gate(), Leaky())])
def test_dict_goes_through_json_unchanged(model: nn.Module) -> None:
    shape = (2, 1, 6, 6) if isinstance(model, ConvNet) else (2, 3)
    report = explain(model, example_inputs=torch.rand(shape))
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert set(data) == {field.name for field in dataclasses.fields(Report)}
    assert data["coverage"] == report.coverage
    assert len(data["regions"]) == len(report.regions)


def test_dict_holds_options_of_any_shape() -> None:
    report = explain(tiny(), example_inputs={"input": torch.rand(2, 3)}, time_dim={"input": 0})
    assert report.to_dict()["options"]["time_dim"] == {"input": 0}


def test_report_shows_itself_in_a_prompt_and_in_a_notebook() -> None:
    report = explain(tiny())
    assert repr(report) == str(report)
    assert report._repr_markdown_() == report.to_markdown()


# -- layout -------------------------------------------------------------------------------------------------------


def test_table_drops_empty_columns_and_wraps_the_widest() -> None:
    table = Table(["name", "none", "text"], [["a", "", "word " * 12], ["b", "", "x"]])
    lines = as_text([table], width=40).splitlines()
    assert "none" not in lines[0]
    assert lines[0].split() == ["name", "text"]
    assert max(map(len, lines)) <= 40 and len(lines) > 4
    assert " ".join("".join(lines[2:]).split()).count("word") == 12


def test_table_with_one_long_word_still_fits() -> None:
    table = Table(["name", "text"], [["a" * 60, "b" * 60]])
    assert max(map(len, as_text([table], width=50).splitlines())) <= 50


def test_pipes_do_not_break_a_markdown_table() -> None:
    text = as_markdown([Table(["a", "b"], [["x|y", "z"]], frozenset({0}))])
    assert text == "| a | b |\n| --- | --- |\n| `x\\|y` | z |\n"


def test_paragraph_under_a_title_is_set_in() -> None:
    document = [Title("Head", 1), Paragraph("One."), Title("Part"), Paragraph("Two."), Bullets([["Three.", "Four."]])]
    assert as_text(document) == "Head\n====\n\nOne.\n\nPart\n  Two.\n\n  - Three.\n    Four."


# -- codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(CODES))
def test_code_has_a_title_a_meaning_and_both_examples(code: str) -> None:
    entry = CODES[code]
    assert re.fullmatch(r"SNNFX[1-9]\d\d", code)
    assert entry.title and not entry.title.endswith(".")
    assert entry.meaning.endswith(".") and len(entry.meaning) > 20
    assert entry.fails and entry.works and entry.fails != entry.works
    text = describe_code(code)
    assert text.startswith(f"{code}: {entry.title}") and entry.meaning in text


def test_codes_used_in_the_sources_are_registered() -> None:
    used: dict[str, list[str]] = {}
    for folder in ("snnfx", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            for code in re.findall(r"SNNFX\d+", path.read_text(encoding="utf-8")):
                used.setdefault(code, []).append(path.name)
    assert {code: files for code, files in used.items() if code not in CODES} == {}
    assert len(used) > 30


def test_registered_codes_are_used() -> None:
    sources = [p for folder in ("snnfx", "passes") for p in (ROOT / folder).rglob("*.py") if p.name != "_codes.py"]
    used = {code for path in sources for code in re.findall(r"SNNFX\d+", path.read_text(encoding="utf-8"))}
    assert set(CODES) - used == set()


@pytest.mark.parametrize("code", sorted(CODES))
def test_the_command_line_explains_every_code(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    from snnfx.__main__ import main

    assert main(["explain", "--code", code]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{code}: ") and "\nFails:\n" in text and "\nWorks:\n" in text


def test_unknown_code_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"SNNFX309 unknown code `SNNFX999`\.\nUse one of SNNFX101"):
        describe_code("SNNFX999")
