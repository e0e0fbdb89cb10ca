"""`snnfx.draw` of large nets: repeated blocks once, closed modules, how regions run, densities of a profile."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.inspect.picture.repeated_blocks import join_numbers
from snnfx.neuron import IFNode, LIFNode

SPIKES = torch.rand(4, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self, given: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1, self.sn1 = nn.Conv2d(given, channels, 3, stride, 1), nn.BatchNorm2d(channels), IFNode()
        self.conv2, self.bn2, self.sn2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels), IFNode()
        self.shortcut = nn.Conv2d(given, channels, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.sn2(self.bn2(self.conv2(self.sn1(self.bn1(self.conv1(x))))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class OtherNames(Residual):
    """The same structure under another class."""


def res_net(*blocks: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), IFNode(), *blocks]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)).eval()


def drawn_of(model: nn.Module, what: str, **options: object) -> str:
    with torch.no_grad():
        model(SPIKES[0])  # sets lazy layers
    snnfx.functional.reset_net(model)
    # Without kernels, no addition moves into a loop, so the first block runs like the others.
    shown = snnfx.convert(model, example_inputs=SPIKES[0], lower=None) if what == "net" else model
    drawing = snnfx.draw(shown, **({} if what == "net" else {"example_inputs": SPIKES[0]}), **options)  # type: ignore[arg-type]
    return str(drawing).replace("&#160;", " ")


def counts(dot: str) -> list[str]:
    """The counts of repeated blocks with their classes, as drawn in bold."""
    return [count.strip() for count in re.findall(r"<B>(\d+ ×[^<]*)</B>", dot)]


def text_of(dot: str) -> str:
    return re.sub(r"<[^>]*>", " ", dot)


both = pytest.mark.parametrize("what", ["model", "net"])


@both
def test_equal_blocks_are_drawn_once_with_their_count(what: str) -> None:
    dot = drawn_of(res_net(*(Residual(8, 8) for _ in range(4))), what)
    assert counts(dot) == ["4 × Residual"]
    assert "3 … 6" in text_of(dot)
    assert text_of(dot).count(" conv1 ") == 1


@both
def test_blocks_of_other_widths_show_both_ends_of_each_number(what: str) -> None:
    stages = [nn.Sequential(Residual(8 * 2**i, 16 * 2**i, 2), Residual(16 * 2**i, 16 * 2**i)) for i in range(3)]
    dot = drawn_of(res_net(*stages), what)
    assert counts(dot) == ["3 × Sequential"]
    assert "8…32→16…64 3x3 s2 pad 1" in text_of(dot)
    if what == "net":
        assert "[T, N, 16…64, 4…1, 4…1]" in dot


def test_names_and_classes_of_blocks_do_not_matter() -> None:
    model = res_net(Residual(8, 8), OtherNames(8, 8), Residual(8, 8))
    assert counts(drawn_of(model, "model"))[0] == "3 × Residual / OtherNames"


class Skips(nn.Module):
    """The second block is read by the last one as well."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        second = self.blocks[1](self.blocks[0](x))
        return self.blocks[3](self.blocks[2](second)) + second


def test_a_block_whose_output_is_read_later_ends_the_run() -> None:
    assert counts(drawn_of(res_net(Skips()), "model")) == ["2 × Residual"] * 2


class Crossed(Residual):
    """The operations of `Residual`, connected in another way."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.sn1(self.bn1(self.conv1(x)))
        return self.sn2(self.bn2(self.conv2(y))) + y


def test_blocks_that_are_connected_differently_are_not_joined() -> None:
    assert counts(drawn_of(res_net(Residual(8, 8), Crossed(8, 8), Residual(8, 8), Crossed(8, 8)), "model")) == []


def test_blocks_of_plain_layers_are_found() -> None:
    layers: list[nn.Module] = []
    for _ in range(9):
        layers += [nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), LIFNode()]
    dot = drawn_of(res_net(*layers), "model")
    assert counts(dot) == ["9 ×"] and "blocks of the same structure" in dot


def test_small_pictures_draw_each_block() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LIFNode(), nn.Sequential(nn.Linear(4, 4), LIFNode(), nn.Linear(4, 4)))
    assert counts(str(snnfx.draw(model))) == []


@both
def test_depth_opens_levels_of_modules(what: str) -> None:
    model = res_net(nn.Sequential(Residual(8, 8), Residual(8, 8)), Residual(8, 16, 2))
    closed = drawn_of(model, what, depth=0)
    assert "Sequential" in text_of(closed) and " conv1 " not in text_of(closed)
    assert counts(drawn_of(model, what, depth=1))[0].startswith("2 × Residual")
    opened = drawn_of(model, what, depth=9)
    assert counts(opened) == [] and opened.count("<B>BatchNorm2d") == 7


@both
@pytest.mark.parametrize("depth", [None, 0, 1, 9])
def test_every_edge_joins_nodes_that_are_drawn(what: str, depth: int | None) -> None:
    model = res_net(nn.Sequential(Residual(8, 8), Residual(8, 8)), *(Residual(8, 8) for _ in range(3)))
    dot = drawn_of(model, what, depth=depth)
    nodes = set(re.findall(r"^\s*(\w+) \[.*label=", dot, flags=re.MULTILINE)) - {"graph", "node", "edge"}
    edges = re.findall(r"^\s*(\w+)(?::r\d+)? -> (\w+)(?::r\d+)?", dot, flags=re.MULTILINE)
    assert {end for edge in edges for end in edge} == nodes
    names = re.findall(r"subgraph (\w+)", dot)
    assert len(names) == len(set(names))


def test_frames_say_how_loops_run() -> None:
    model = res_net(Residual(8, 8))
    with torch.no_grad():
        model(SPIKES[0])
    snnfx.functional.reset_net(model)
    assert "stepped" in text_of(str(snnfx.draw(snnfx.convert(model, example_inputs=SPIKES[0], lower=None))))


def test_a_profile_shows_rates_of_neurons_and_densities_of_inputs() -> None:
    model = res_net(*(Residual(8, 8) for _ in range(4)))
    with torch.no_grad():
        model(SPIKES[0])
    snnfx.functional.reset_net(model)
    net = snnfx.convert(model, example_inputs=SPIKES[0])
    report = snnfx.profile(net, SPIKES, repeats=1)
    dot = str(snnfx.draw(net, profile=report)).replace("&#160;", " ")
    first = next(row for row in report.rates if row.layer == "2")
    assert f"spikes per neuron and step: {100 * first.rate:.{1 if first.rate < 0.1 else 0}f} %" in dot
    assert "in 100 %" in dot
    rates = [100 * row.rate for row in report.rates if row.layer.endswith(".sn1")]
    assert all(f"{name}.sn1" in dot for name in range(3, 7)) and len(rates) == 4


def test_tooltips_name_the_source_line_of_each_operation() -> None:
    dot = drawn_of(res_net(*(Residual(8, 8) for _ in range(4))), "net")
    assert len(re.findall(r"tooltip=\"[^\"]*test_repeated_blocks\.py:\d+", dot)) >= 4
    assert "drawn once for 3.conv1, 4.conv1, 5.conv1, 6.conv1" in dot


def test_numbers_that_differ_show_the_first_and_the_last() -> None:
    assert join_numbers(["16→32 3x3", "32→64 3x3", "64→128 3x3"]) == "16…64→32…128 3x3"
    assert join_numbers(["tau=2", "tau=2"]) == "tau=2"
    assert join_numbers(["(1)", "flat"]) == "(1)"
