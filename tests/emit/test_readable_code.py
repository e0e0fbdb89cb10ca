"""`net.code`: short, and it computes the net."""

from __future__ import annotations

import copy
import operator
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import snnfx
from support.nets import CSNN, UNet

T, N = 5, 3


def run_code(net: snnfx.Net, *inputs: torch.Tensor) -> Any:
    """Run the shown code with the functions that it names."""
    namespace: dict[str, Any] = {"torch": torch, "operator": operator}
    namespace.update({n.target.__name__: n.target for n in net.graph.nodes if n.op == "call_function"})
    exec(net.code, namespace)
    return namespace["forward"](net, *inputs)


class Indexed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(snnfx.neuron.LIFNode(), nn.Linear(4, 2))])

    def forward(self, regions: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](regions))  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (CSNN(), (1, 8, 8)),
        (UNet(), (1, 8, 8)),
        (Indexed(), (4,)),
        (nn.Sequential(nn.Linear(4, 3), snnfx.neuron.LIFNode()), (4,)),
    ],
    ids=["csnn", "unet", "indexed", "sequential"],
)
def test_code_computes_the_net(model: nn.Module, shape: tuple[int, ...], training: bool) -> None:
    net = snnfx.convert(copy.deepcopy(model).train(training))
    x_seq = torch.rand(T, N, *shape)
    torch.manual_seed(0)
    expected = net(x_seq)
    torch.manual_seed(0)
    torch.testing.assert_close(run_code(net, x_seq), expected)


def test_code_is_short() -> None:
    code = snnfx.convert(nn.Sequential(nn.Linear(4, 3), snnfx.neuron.LIFNode())).code
    assert code == (
        "def forward(self, input_1):\n"
        "    regions = self.snnfx_regions.both_modes\n"
        "    fold_0 = seq_to_ann_forward((input_1,), regions.fold_0, constants=(self.source[0],))[0]\n"
        "    loop_1 = multi_step_forward(\n"
        "        (fold_0,),\n"
        "        regions.loop_1,\n"
        "        state=None,\n"
        "        constants=(self.source[1],),\n"
        "    )[0][0]\n"
        "    return loop_1\n"
    )
    for net in (snnfx.convert(CSNN()), snnfx.convert(CSNN(), step_mode="s")):
        assert all(len(line) <= 100 for line in net.code.splitlines())
        assert "in_training_" not in net.code


def test_repr_names_the_regions_in_a_few_lines() -> None:
    net = snnfx.convert(CSNN())
    text = repr(net)
    assert text == str(net) and len(text.splitlines()) == 1 + len(net.regions)
    assert text.startswith("<snnfx net of CSNN: T time steps in 8 regions (4 fold, 4 loop), 465 parameters, training")
    assert "lif1 (LIFNode)" in text and "evaluation mode" in repr(net.eval())
    deep = snnfx.convert(nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), snnfx.neuron.LIFNode()) for _ in range(20))))
    assert len(repr(deep).splitlines()) == 13 and "... 29 more regions" in repr(deep)


def test_html_escapes_and_copies_keep_the_summary() -> None:
    net = snnfx.convert(nn.Sequential(nn.Linear(4, 3), snnfx.neuron.LIFNode()))
    assert "<table>" in net._repr_html_() and "<snnfx" not in net._repr_html_()
    assert repr(copy.deepcopy(net)) == repr(pickle.loads(pickle.dumps(net))) == repr(net)
