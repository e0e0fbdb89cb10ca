"""The memory section of `explain`: peak and tensors of each region, as a table, as data and as a picture."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError, ToolError
from snnfx.inspect.memory_phases import PhaseMemory
from snnfx.inspect.memory_report import MemoryReport
from support.measured_memory import OPTIONS, measured, with_statistics, without_statistics

T, N = 8, 16
ONE_STEP = torch.rand(N, 2, 6, 6)


def memory_of(model: nn.Module, **options: Any) -> MemoryReport:
    report = snnfx.explain(model, T=T, **{"example_inputs": ONE_STEP, **options})
    assert report.memory is not None
    return report.memory


@pytest.mark.parametrize("checkpoint", [None, "regions"])
def test_holders_and_regions_add_up_to_the_peak(checkpoint: str | None) -> None:
    memory = memory_of(with_statistics(), checkpoint=checkpoint)
    for phase in (memory.inference, memory.training):
        assert sum(h.bytes for h in phase.holders) == pytest.approx(phase.peak, rel=1e-3)
        totals = [sum(held.values()) for _, _, held in phase.moments]
        assert max(totals) == pytest.approx(phase.peak, rel=1e-3)
        rows = {row.region: row for row in phase.regions}
        assert max(max(row.forward, row.backward) for row in rows.values()) == phase.peak
        assert phase.peak == (rows[phase.region].backward if phase.backward else rows[phase.region].forward)


def test_peak_is_what_a_run_holds() -> None:
    model = with_statistics().double()
    memory = memory_of(model, example_inputs=ONE_STEP.double(), **OPTIONS)
    net = snnfx.convert(model, example_inputs=ONE_STEP.double(), **OPTIONS)
    x_seq = torch.rand(T, *ONE_STEP.shape, dtype=torch.float64)
    assert memory.training.peak == pytest.approx(measured(net, x_seq, True), rel=0.15)
    assert memory.inference.peak == pytest.approx(measured(net.eval(), x_seq, False), rel=0.15)


def test_tensors_are_named_with_their_makers_and_shapes() -> None:
    holders = memory_of(with_statistics(), lower=None).training.holders
    first = next(h for h in holders if h.what == "0 (Conv2d)")
    assert (first.shape, first.dtype, first.bytes) == ((T * N, 8, 6, 6), "float32", T * N * 8 * 36 * 4)
    assert "int64" in {h.dtype for h in holders if h.what == "3 (MaxPool2d)"}  # its indices


def test_state_and_kernels_are_named() -> None:
    holders = memory_of(with_statistics()).training.holders
    assert any(h.what == "2 (LIFNode): saved by its kernel" and h.region == "loop_1" for h in holders)
    inference = memory_of(nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), snnfx.neuron.LIFNode())).inference.holders
    assert ("state 1.v", (N, 8, 6, 6)) in {(h.what, h.shape) for h in inference}


def test_kept_packed_spikes_are_told_apart() -> None:
    layers = [nn.Sequential(nn.Linear(n, m), snnfx.neuron.LIFNode()) for n, m in ((5, 40), (40, 400))]
    memory = memory_of(nn.Sequential(*layers), example_inputs=torch.rand(N, 5), checkpoint="regions")
    packed = [h for h in memory.training.holders if h.kind == "saved for backward, packed"]
    assert packed and all(h.bytes * 31 < torch.Size(h.shape).numel() * 4 for h in packed)


@pytest.mark.parametrize("training", [True, False])
def test_both_phases_are_told_whatever_the_mode(training: bool) -> None:
    model = with_statistics().train(training)
    model[1].eval()  # frozen
    flags = [m.training for m in model.modules()]
    net = snnfx.convert(model, example_inputs=ONE_STEP)
    memory = memory_of(net)
    assert memory.inference.peak > 0 < memory.training.peak
    assert [m.training for m in model.modules()] == flags and net.training == training
    other = memory_of(copy.deepcopy(model).train(not training))
    assert other.inference.peak == memory.inference.peak


def test_inputs_of_a_net_are_taken_from_the_example() -> None:
    net = snnfx.convert(with_statistics(), example_inputs=ONE_STEP)
    small, large = memory_of(net), memory_of(net, example_inputs=ONE_STEP.repeat(4, 1, 1, 1))
    assert large.inputs == ((T, 4 * N, 2, 6, 6),)
    assert large.inference.peak == pytest.approx(4 * small.inference.peak, rel=0.01)


def test_chunks_and_checkpoints_are_those_of_the_options() -> None:
    x = torch.rand(N, 5)
    memory = memory_of(without_statistics(), example_inputs=x, chunk=2, checkpoint=4)
    assert (memory.inference.steps, memory.training.steps) == (2, 4)
    assert any(h.kind == "state between chunks" for h in memory.training.holders)
    whole = memory_of(without_statistics(), example_inputs=x, chunk=None)
    assert memory.inference.peak < whole.inference.peak and memory.training.peak < whole.training.peak


def test_table_is_in_the_text_the_markdown_and_the_data() -> None:
    report = snnfx.explain(with_statistics(), T=T, example_inputs=ONE_STEP, memory_budget=2**30)
    text = " ".join(str(report).split())
    for part in (
        f"Memory at T={T}",
        "The budget is 1.0 GiB",
        "Inference: ",
        "Training: ",
        "Peak of each region",
    ):
        assert part in text
    assert "| region | inference | training: forward | saved for backward | backward |" in report.to_markdown()
    data = json.loads(json.dumps(report.to_dict()))
    assert data["memory"]["training"]["holders"][0]["bytes"] > 0


def test_memory_is_a_report_of_its_own() -> None:
    report = snnfx.explain(with_statistics(), T=T, example_inputs=ONE_STEP)
    memory = report.memory
    assert memory is not None
    assert json.loads(json.dumps(memory.to_dict())) == report.to_dict()["memory"]
    assert memory.to_markdown().startswith(f"## Memory at T={T}") and memory.to_markdown() in report.to_markdown()
    assert str(memory) in str(report)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [None, T])
def test_budget_that_is_too_small_is_told(training: bool, steps: int | None) -> None:
    model = with_statistics().train(training)
    report = snnfx.explain(model, T=steps, example_inputs=ONE_STEP, memory_budget="1kB")
    assert report.error is None and report.too_little.startswith("SNNFX318")
    assert report.options["memory_budget"] == 1000 and report.to_dict()["too_little"] == report.too_little
    assert "SNNFX318 memory_budget is 1000 bytes" in str(report)
    assert steps is None or (report.memory is not None and report.memory.training.reason.startswith("SNNFX318"))
    with pytest.raises(InputError, match="SNNFX318"):
        snnfx.convert(model, example_inputs=ONE_STEP, memory_budget="1kB")


def test_budget_that_is_enough_is_not_told() -> None:
    assert snnfx.explain(with_statistics(), example_inputs=ONE_STEP, memory_budget="1GB").too_little == ""


def test_no_memory_is_told_without_steps() -> None:
    report = snnfx.explain(with_statistics(), example_inputs=ONE_STEP)
    assert report.memory is None and "Memory at" not in str(report)


def test_what_is_not_predictable_is_told_and_not_drawn(tmp_path: Path) -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lif = snnfx.neuron.LIFNode()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(x[x.sum(1) > 0])

    report = snnfx.explain(snnfx.convert(Looking()), T=3, example_inputs=torch.rand(4, 5))
    assert report.memory is not None and report.memory.training.peak == 0
    assert "Training: no prediction" in str(report)
    with pytest.raises(InputError, match="SNNFX319 cannot draw the memory of this net: inference: .*; training: "):
        report.memory.save(tmp_path / "memory.svg")
    assert list(tmp_path.iterdir()) == [] and report.memory._repr_svg_() is None


@pytest.mark.parametrize("steps", [0, -1, True, 2.0])
def test_no_such_number_of_steps(steps: Any) -> None:
    with pytest.raises(InputError, match="SNNFX301"):
        snnfx.explain(with_statistics(), T=steps, example_inputs=ONE_STEP)


def test_steps_without_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="SNNFX309") as raised:
        snnfx.explain(without_statistics(), T=T)
    assert "example_inputs" in raised.value.hint


def test_picture_has_the_heights_of_the_data(tmp_path: Path) -> None:
    memory = memory_of(with_statistics(), memory_budget=2**20)
    file = memory.save(tmp_path / "memory.svg")
    root = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    space = {"svg": "http://www.w3.org/2000/svg"}
    columns: list[list[ElementTree.Element]] = []
    bars = [r for r in root.findall("svg:rect", space) if r.find("svg:title", space) is not None]
    for _, group in itertools.groupby(bars, key=lambda r: r.get("x")):
        columns.append(list(group))
    moments = [held for phase in (memory.inference, memory.training) for _, _, held in phase.moments]
    assert len(columns) == len(moments)
    first = len(memory.inference.moments)
    heights = [sum(float(r.get("height", 0)) for r in column) for column in columns[first:]]
    totals = [sum(held.values()) for held in moments[first:]]
    assert heights.index(max(heights)) == totals.index(max(totals))
    assert heights == pytest.approx([max(heights) * t / max(totals) for t in totals], abs=1.0)
    words = " ".join(t.text or "" for t in root.iter(f"{{{space['svg']}}}text"))
    assert "forward" in words and "backward" in words and words.count("peak ") >= 2


def bars_of(memory: MemoryReport) -> dict[str, set[str]]:
    """The colours of the bars of each region in a picture."""
    colors: dict[str, set[str]] = {}
    root = ElementTree.fromstring(memory.svg())
    for bar in root.iter("{http://www.w3.org/2000/svg}rect"):
        title = bar.find("{http://www.w3.org/2000/svg}title")
        if title is not None:
            colors.setdefault((title.text or "").partition(":")[0], set()).add(bar.get("fill", ""))
    return colors


def test_region_has_one_colour_in_both_panels() -> None:
    layers = [nn.Sequential(nn.Linear(5 + i, 6 + i), snnfx.neuron.LIFNode()) for i in range(8)]
    for model, x in ((with_statistics(), ONE_STEP), (nn.Sequential(*layers), torch.rand(N, 5))):
        colors = bars_of(memory_of(model, example_inputs=x))
        assert all(len(found) == 1 for found in colors.values())
        assert len({color for found in colors.values() for color in found}) == len(colors) > 5


def test_words_of_the_picture_are_within_it() -> None:
    memory = memory_of(with_statistics(), checkpoint="regions", memory_budget=2**22)
    root = ElementTree.fromstring(memory.svg())
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        x, y, length = float(text.get("x", 0)), float(text.get("y", 0)), 6 * len(text.text or "")
        if "rotate" in text.get("transform", ""):  # to the left and down
            assert x - 0.65 * 5 * len(text.text or "") > 0 and y + 0.77 * 5 * len(text.text or "") < height
        elif text.get("text-anchor") == "end":
            assert x - length > 0 and x <= width
        else:
            assert x + length < width


def test_phase_without_a_prediction_is_named_in_the_picture() -> None:
    memory = memory_of(without_statistics(), example_inputs=torch.rand(N, 5))
    unknown = dataclasses.replace(memory, training=PhaseMemory("training", T, "unknown"))
    assert "Training: no prediction" in unknown.svg() and "Inference, " in unknown.svg()


def test_picture_is_svg(tmp_path: Path) -> None:
    memory = memory_of(with_statistics())
    with pytest.raises(ToolError, match="SNNFX603"):
        memory.save(tmp_path / "memory.png")
    assert list(tmp_path.iterdir()) == [] and (memory._repr_svg_() or "").startswith("<svg")
