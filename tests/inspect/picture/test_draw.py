"""`snnfx.draw`: what a picture shows, what it says when graphviz is missing, and that it changes nothing.

Most tests read the DOT text, which needs no graphviz; those that render are skipped without the program `dot`.
"""

from __future__ import annotations

import html
import itertools
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snnfx import MemoryModule
from snnfx.convert import convert
from snnfx.errors import SnnfxWarning, ToolError
from snnfx.inspect.picture.dot import STYLES
from snnfx.inspect.picture.draw import draw
from snnfx.inspect.picture.layer_summary import summarize_module
from snnfx.neuron import CUBALIFNode, IFNode, LIFNode

needs_dot = pytest.mark.skipif(shutil.which("dot") is None, reason="the program `dot` is missing")


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.lif = LIFNode(tau=2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.norm(self.fc(x)))


class ConvolutionalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.lif = LIFNode(tau=2.5)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16, 3)
        self.current = CUBALIFNode()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.lif(self.norm(self.conv(x))))
        return self.current(self.fc(x.flatten(1)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.lif = IFNode()

    def forward(self, x: Tensor) -> Tensor:
        return self.lif(self.fc(x)) + x


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class Recurrent(MemoryModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_memory("h", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.h is None:
            self.h = torch.full((x.shape[0], 4), 0.3)
        self.h = torch.tanh(self.outer(x) + self.inner(self.h))
        return self.h


class EveryKind(nn.Module):
    """A loop with a recurrent layer, a map (a mean over the batch), a parameter used directly, and what runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = Recurrent()
        self.gain = nn.Parameter(torch.ones(4))
        self.lif = LIFNode()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.cell(x)
        y = y - y.mean(0)
        return {"spike": self.lif(y * self.gain.sigmoid()), "flat": y.view(y.shape[0], -1)}


class Delay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.previous: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        change = x - self.previous
        self.previous = x
        return change


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tiny": (Tiny, (5, 3)),
    "convolutional": (ConvolutionalNet, (5, 1, 8, 8)),
    "residual": (Residual, (5, 4)),
    "every kind": (EveryKind, (5, 4)),
    "delay": (Delay, (5, 4)),
}


def net_of(name: str, **options: Any) -> Any:
    make, shape = ZOO[name]
    return convert(make().eval(), example_inputs=torch.rand(shape), **options)


def model_and_example(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = ZOO[name]
    return make().eval(), torch.rand(shape)


def text_of(label: str) -> str:
    """A label without its markup."""
    cells = re.sub(r"</TD>\s*<TD[^>]*>|</TR>\s*(<HR/>)?\s*<TR>|<BR/>", " ", label)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", cells)).split())


def skeleton(dot: str) -> str:
    """The picture without its looks: clusters, nodes and their text, edges and their labels."""
    lines = []
    for line in dot.splitlines()[4:-1]:
        indent, line = line[: len(line) - len(line.lstrip())], line.strip()
        label = re.search(r"label=<(.*)>(, [a-z=\"#A-F0-9, ]*)?\];$", line)
        text = f" '{text_of(label[1])}'" if label else ""
        if line.startswith("subgraph"):
            lines.append(f"{indent}{line.split()[1]}")
        elif line.startswith("graph"):
            lines[-1] += text
        elif " -> " in line and "style=invis" not in line:
            look = " dashed" if "style=dashed" in line else ""
            back = " back" if "dir=back" in line else ""
            lines.append(f"{indent}{line.split(' [')[0].rstrip(';')}{look}{back}{text}")
        elif label:
            lines.append(f"{indent}{line.split()[0]}{text}")
    return "\n".join(line.removeprefix("  ") for line in lines)


def clusters(dot: str) -> list[str]:
    return re.findall(r"subgraph cluster_(\w+)", dot)


def render(dot: str) -> ElementTree.Element:
    done = subprocess.run(["dot", "-Tsvg"], input=dot.encode(), capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return ElementTree.fromstring(done.stdout)


def written_in(svg: ElementTree.Element) -> str:
    return " ".join("".join(node.itertext()) for node in svg.iter() if node.tag.endswith("text")).replace("\xa0", " ")


# -- the net ------------------------------------------------------------------------------------------------------


def test_golden_picture_of_a_tiny_net() -> None:
    drawn = skeleton(str(draw(net_of("tiny", chunk=4))))
    assert drawn == (
        "x0 'x [T, N, 3] float32'\n"
        "cluster_chunk 'chunk: 4 steps in inference'\n"
        "  cluster_fold_0 'fold_0'\n"
        "    b0 'Linear 3→2 fc'\n"
        "  cluster_loop_1 'loop_1 kernel, SNNFX107'\n"
        "    b1 'BatchNorm1d 2 norm'\n"
        "    cluster_row_b2\n"
        "      s0 'v'\n"
        "      b2 'LIFNode tau=2 lif'\n"
        "y0 'y [T, N, 2] float32'\n"
        "x0 -> b0\n"
        "b0 -> b1 '[T, N, 2] float32'\n"
        "s0 -> b2\n"
        "b1 -> b2\n"
        "b2 -> y0\n"
        "s0 -> b2 dashed back 't→t+1'"
    )


@pytest.mark.parametrize("name", ZOO)
def test_every_region_is_a_cluster_in_the_colour_of_its_kind(name: str) -> None:
    net = net_of(name)
    dot = str(draw(net))
    for region in net.regions:
        assert clusters(dot).count(region.name) == 1
        start = dot.index(f"subgraph cluster_{region.name} ")
        assert f'fillcolor="{STYLES[region.kind].fill}"' in dot[start:].splitlines()[1]


@pytest.mark.parametrize("name", ZOO)
def test_every_slot_has_one_dashed_edge_to_the_next_step(name: str) -> None:
    net = net_of(name)
    dashed = [line for line in str(draw(net)).splitlines() if "style=dashed" in line and " -> " in line]
    assert all("t→t+1" in line for line in dashed)
    ends = [end for line in dashed for end in line.split(" [")[0].split(" -> ") if end.strip().startswith("s")]
    assert sorted(end.strip() for end in ends) == [f"s{i}" for i in range(len(net.program.slots))]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("what", ["model", "net"])
def test_every_edge_joins_two_nodes_that_are_drawn(name: str, what: str) -> None:
    model, x = model_and_example(name)
    dot = str(draw(model, example_inputs=x) if what == "model" else draw(convert(model, example_inputs=x)))
    nodes = set(re.findall(r"^\s*(\w+) \[.*label=", dot, flags=re.MULTILINE)) - {"graph", "node", "edge"}
    edges = re.findall(r"^\s*(\w+)(?::r\d+)? -> (\w+)(?::r\d+)?", dot, flags=re.MULTILINE)
    assert edges
    assert {end for edge in edges for end in edge} == nodes


def test_regions_show_what_runs_in_them() -> None:
    net = net_of("convolutional", chunk=None)
    drawn = skeleton(str(draw(net)))
    assert (
        "  b0 'Conv2d 1→4 3x3 s2 pad 1 conv'\ncluster_loop_1 'loop_1 kernel, SNNFX107'\n  b1 'BatchNorm2d 4 norm'"
        in drawn
    )
    assert "b3 'MaxPool2d 2x2 pool [T·N, 4, 2, 2] flatten (1) [T·N, 16] Linear 16→3 fc'" in drawn
    assert "b0 -> b1 '[T, N, 4, 4, 4] float32'" in drawn
    in_training = skeleton(str(draw(net.train())))
    assert "b0 'Conv2d 1→4 3x3 s2 pad 1 conv [T·N, 4, 4, 4] BatchNorm2d 4 norm'" in in_training


def test_neuron_with_two_states_shows_both_beside_it() -> None:
    drawn = skeleton(str(draw(net_of("convolutional"))))
    assert "s1 'v'" in drawn and "s2 'c'" in drawn
    assert drawn.count("-> b4 dashed back 't→t+1'") == 2


def test_sizes_and_initial_values_are_not_drawn() -> None:
    dot = str(draw(net_of("every kind")))
    drawn = skeleton(dot)
    for hidden in ("getattr", "getitem", "full", "shape"):
        assert hidden not in drawn
    assert "view (…, -1)" in drawn
    # How the state starts is said where the mouse points.
    assert re.search(r'tooltip="state cell\.h \[N, 4\] float32&#10;initial value: full in cell', dot)


def test_parameter_used_directly_is_drawn_and_weights_are_not() -> None:
    drawn = skeleton(str(draw(net_of("every kind"))))
    assert "p0 'gain [4] float32'" in drawn
    assert "p1" not in drawn


def test_refused_operation_shows_its_code_and_where_and_why() -> None:
    net = net_of("every kind")
    dot = str(draw(net))
    (region,) = (region for region in net.regions if any(node.name == "mean" for node in region.nodes))
    assert region.kind == "map"
    (refusal,) = (refusal for node, refusal in region.refusals() if node.name == "mean")
    assert refusal.code in skeleton(dot)
    (line,) = (line for line in dot.splitlines() if "<B>mean" in line)
    tooltip = html.unescape(re.search(r'tooltip="([^"]*)"', line)[1])  # type: ignore[index]
    assert refusal.reason in tooltip
    assert re.search(r"test_draw\.py:\d+", tooltip)


def test_legend_names_the_kinds_that_are_there() -> None:
    def heading(name: str) -> str:
        return text_of(str(draw(net_of(name))).splitlines()[1])

    assert STYLES["map"].meaning in heading("every kind")
    assert STYLES["once"].meaning in heading("every kind")
    assert STYLES["map"].meaning not in heading("tiny")
    assert STYLES["loop"].meaning in heading("tiny")


def test_delayed_input_is_outside_of_all_regions() -> None:
    drawn = skeleton(str(draw(net_of("delay", chunk=None))))
    assert "\ns0 'previous'" in drawn
    assert "x0 -> s0 dashed 't→t+1'" in drawn


@pytest.mark.parametrize(
    ("options", "inside", "outside"),
    [
        ({"time_dim": -1}, "[T, N, 2] float32", "[N, 3, T] float32"),
        ({"time_dim": None}, "[T, N, 2] float32", "[N, 3] float32 at every step"),
        ({"reduce": "mean"}, "[T, N, 2] float32", "[N, 2] float32 mean over T"),
    ],
    ids=["time last", "the same at every step", "reduced"],
)
def test_inputs_and_outputs_are_shown_as_the_caller_sees_them(
    options: dict[str, Any], inside: str, outside: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), LIFNode(), nn.Tanh()).eval()
    drawn = skeleton(str(draw(convert(model, example_inputs=torch.rand(5, 3), **options))))
    assert inside in drawn
    assert outside in drawn


def test_chunk_frame_says_how_many_steps() -> None:
    assert "chunk: 4 steps" in str(draw(net_of("tiny", chunk=4)))
    assert "chunk: 1 step" in str(draw(net_of("tiny", chunk=1)))
    assert "cluster_chunk" not in str(draw(net_of("tiny", chunk=None)))
    planned = net_of("tiny")
    length = planned.chunk_plan(torch.rand(8, 5, 3)).length
    assert f"chunk: {length} steps" in str(draw(planned))
    assert "chunk: auto" in str(draw(convert(Tiny().eval())))


def test_shapes_can_be_given_when_drawing() -> None:
    net = convert(Tiny().eval())
    assert "float32" not in str(draw(net))
    assert "[T, N, 2] float32" in str(draw(net, example_inputs=torch.rand(7, 3)))


def test_single_step_form_is_drawn_as_one_step() -> None:
    dot = str(draw(net_of("tiny", step_mode="s")))
    assert "one time step" in dot
    assert "fold" not in dot
    assert "t→t+1" in dot


# -- the model ----------------------------------------------------------------------------------------------------


def test_golden_picture_of_a_residual_model() -> None:
    model, x = model_and_example("residual")
    assert skeleton(str(draw(model, example_inputs=x))) == (
        "x0 'x [N, 4] float32'\n"
        "b6 'Linear 4→2 head'\n"
        "cluster_c2 'layers Sequential'\n"
        "  cluster_c0 'layers.0 Block'\n"
        "    b0 'Linear 4→4 fc'\n"
        "    cluster_row_b1\n"
        "      s0 'v'\n"
        "      b1 'IFNode lif'\n"
        "    b2 'add'\n"
        "  cluster_c1 'layers.1 Block'\n"
        "    b3 'Linear 4→4 fc'\n"
        "    cluster_row_b4\n"
        "      s1 'v'\n"
        "      b4 'IFNode lif'\n"
        "    b5 'add'\n"
        "y0 'y [N, 2] float32'\n"
        "x0 -> b0\n"
        "s0 -> b1\n"
        "b0 -> b1\n"
        "b1 -> b2\n"
        "x0 -> b2\n"
        "b2 -> b3\n"
        "s1 -> b4\n"
        "b3 -> b4\n"
        "b4 -> b5\n"
        "b2 -> b5\n"
        "b5 -> b6\n"
        "b6 -> y0\n"
        "s0 -> b1 dashed back 't→t+1'\n"
        "s1 -> b4 dashed back 't→t+1'"
    )


def test_entry_names_the_method_that_is_drawn() -> None:
    class Stepped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def step(self, x: Tensor) -> Tensor:
            return self.fc(x).relu()

    assert "<B>relu</B>" in str(draw(Stepped(), entry="step"))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(1, 64, 3), "1→64 3x3"),
        (nn.Conv2d(4, 4, (3, 5), (1, 2), (1, 2), groups=4), "4→4 3x5 s1,2 pad 1,2 groups 4"),
        (nn.Conv1d(2, 3, 3, padding="same", dilation=2), "2→3 3 pad same dil 2"),
        (nn.ConvTranspose2d(8, 4, 2, 2), "8→4 2x2 s2"),
        (nn.MaxPool2d(2), "2x2"),
        (nn.MaxPool2d(3, 2, 1), "3x3 s2 pad 1"),
        (nn.AvgPool1d(4), "4"),
        (nn.AdaptiveAvgPool2d((1, 1)), "to 1"),
        (nn.Linear(128, 10), "128→10"),
        (nn.BatchNorm2d(64), "64"),
        (nn.GroupNorm(4, 8), "4 groups of 8"),
        (nn.LayerNorm((4, 8)), "4,8"),
        (nn.Dropout(0.25), "p=0.25"),
        (nn.Upsample(scale_factor=2), "x2 nearest"),
        (nn.Upsample(size=(4, 8)), "to 4,8 nearest"),
        (nn.GRUCell(4, 5), "4→5"),
        (nn.Embedding(100, 16), "100→16"),
        (nn.ReLU(), ""),
        (LIFNode(tau=2.5, v_threshold=0.5), "tau=2.5 threshold=0.5"),
        (IFNode(), ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layer_in_a_few_characters(layer: nn.Module, text: str) -> None:
    assert summarize_module(layer) == text


# -- text ---------------------------------------------------------------------------------------------------------


ODD_NAMES = ["a<b>&c", 'quo"te', "back\\Nslash", "&lt;", "名前", "new\nline", "{|}", "end\\", "--> x", "]];"]


def test_same_net_gives_the_same_text() -> None:
    net = net_of("every kind")
    assert draw(net).source == draw(net).source
    assert draw(net_of("every kind")).source == draw(net).source


@needs_dot
@pytest.mark.parametrize("name", ZOO)
def test_dot_takes_every_picture_without_a_warning(name: str) -> None:
    model, x = model_and_example(name)
    for drawing in (draw(model, example_inputs=x), draw(model), draw(convert(model, example_inputs=x))):
        assert type(model).__name__ in written_in(render(drawing.source))


@needs_dot
def test_odd_names_are_shown_as_they_are() -> None:
    model = nn.Sequential()
    for name in ODD_NAMES:
        model.add_module(name, nn.Identity())
    type_name = "Net<T>&\"quoted'"
    model.__class__ = type(type_name, (nn.Sequential,), {})
    shown = written_in(render(draw(model).source))
    assert type_name in shown
    for name in ODD_NAMES:
        # dot reads a backslash as the start of an escape: a look-alike stands in for it.
        assert name.replace("\\", "\N{SET MINUS}").replace("\n", " ") in shown


@needs_dot
def test_file_is_written_by_its_suffix(tmp_path: Path) -> None:
    net = net_of("tiny")
    starts = {".svg": b"<?xml", ".png": b"\x89PNG", ".pdf": b"%PDF", ".dot": b"digraph", ".SVG": b"<?xml"}
    pytest.importorskip("graphviz")
    for suffix, start in starts.items():
        file = tmp_path / f"net{suffix}"
        draw(net, file)
        assert file.read_bytes().startswith(start)
    draw(net, str(tmp_path / "again.dot"))
    assert (tmp_path / "again.dot").read_text(encoding="utf-8") == draw(net).source


@needs_dot
def test_drawing_shows_in_notebooks() -> None:
    pytest.importorskip("graphviz")
    svg = draw(net_of("tiny"))._repr_svg_()
    assert svg is not None and "</svg>" in svg


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["net.jpg", "net", "net.svg.txt"])
def test_unknown_suffix_is_refused_before_any_work(file: str, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="SNNFX603") as caught:
        # A model that cannot be captured: the suffix comes first.
        draw(nn.LazyLinear(3), tmp_path / file)
    assert ".svg, .png, .pdf, .dot" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@pytest.mark.usefixtures("no_dot")
def test_missing_dot_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="SNNFX601 the program `dot` is missing") as caught:
        draw(nn.LazyLinear(3), tmp_path / "net.svg")
    assert "apt install graphviz" in str(caught.value)
    assert not (tmp_path / "net.svg").exists()


@pytest.mark.usefixtures("no_dot")
def test_text_needs_no_dot(tmp_path: Path) -> None:
    drawing = draw(net_of("tiny"), tmp_path / "net.dot")
    assert (tmp_path / "net.dot").read_text(encoding="utf-8") == str(drawing) == drawing.source
    with pytest.warns(SnnfxWarning, match="SNNFX601"):
        assert drawing._repr_svg_() is None


def test_missing_python_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setitem(sys.modules, "graphviz", None)
    with pytest.raises(ToolError, match="SNNFX601 the Python package graphviz is missing") as caught:
        draw(net_of("tiny"), tmp_path / "net.png")
    assert "pip install graphviz" in str(caught.value)
    draw(net_of("tiny"), tmp_path / "net.dot")


def test_unknown_format_of_a_drawing_is_refused() -> None:
    with pytest.raises(ToolError, match="SNNFX603"):
        draw(net_of("tiny")).pipe("jpg")


# -- nothing changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_drawing_changes_nothing(training: bool) -> None:
    model = ConvolutionalNet().train(training)
    x = torch.rand(5, 1, 8, 8)
    model(x)
    model.lif.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    net = convert(model, example_inputs=x)

    def snapshot() -> list[Any]:
        state = [tensor.clone() for tensor in model.state_dict().values()]
        attributes = [(m.training, sorted(m.__dict__), len(m._forward_hooks)) for m in model.modules()]
        return [*state, model.lif.v.clone(), torch.get_rng_state(), attributes, str(net.graph), str(net.program)]

    before = snapshot()
    draw(model, example_inputs=x)
    draw(net, example_inputs=x)
    for old, new in zip(before, snapshot(), strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new


# -- colours ------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.1)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_kinds_differ_in_grayscale_and_carry_dark_text() -> None:
    fills = [luminance(STYLES[kind].fill) for kind in ("once", "fold", "map", "loop")]
    assert all(lighter - darker > 0.05 for lighter, darker in itertools.pairwise(fills))
    # The contrast that WCAG 2.1 asks for at level AAA, on the darkest fill.
    assert (min(fills) + 0.05) / (luminance("#1A1A1A") + 0.05) > 7
