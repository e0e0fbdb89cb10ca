"""The examples of each code do as they say: one leads to the code, the other one runs without it.

An example is an excerpt. A frame completes it: the statements of a step become the forward of a model, a forward
becomes a class, and all other examples run in a namespace with `model`, `net`, `x_seq` and so on, see `namespace`.
"""

from __future__ import annotations

import ast
import copy
import linecache
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import snnfx
from snnfx import functional, neuron, online
from snnfx.capture.capture import capture
from snnfx.cli.commands import _parser
from snnfx.errors import CODES, SnnfxError, SnnfxWarning
from snnfx.online.edited_nets import edited_nets_of
from snnfx.passes import Normalize, Partition, Pass, PassManager

T, N, FEATURES = 5, 4, 4
ATTRIBUTES = """
import torch, snnfx
from torch import nn
from torch.nn import functional as F
from snnfx import neuron

class Example(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.lif, self.v = nn.Linear(4, 4), neuron.LIFNode(tau=2.0), None
        self.register_buffer("gain", torch.ones(4))

"""
STEPS = ("SNNFX103", "SNNFX104", "SNNFX105", "SNNFX110", "SNNFX206", "SNNFX214", "SNNFX215", "SNNFX217")
"""Codes whose examples are statements of a step."""
FORWARDS = ("SNNFX108", "SNNFX201", "SNNFX209")
"""Codes whose examples are the forward of a model."""


def namespace() -> dict[str, Any]:
    """The names that examples may use."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), neuron.LIFNode(tau=2.0))
    x_seq = torch.rand(T, N, FEATURES)
    return {
        **{name: getattr(functional, name) for name in functional.__all__},
        **{name: getattr(online, name) for name in online.__all__},
        **{
            "__name__": __name__,
            "snnfx": snnfx,
            "torch": torch,
            "nn": nn,
            "neuron": neuron,
            "copy": copy,
            "Pass": Pass,
        },
        **{"PassManager": PassManager, "Normalize": Normalize, "Partition": Partition, "program": capture(model)},
        **{"T": T, "N": N, "features": FEATURES, "model": model, "x_seq": x_seq, "x": x_seq[0]},
        **{"net": snnfx.convert(model), "loss": nn.functional.mse_loss, "rule": online.BPTT, "target": x_seq},
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        **{"online": online, "edited_nets_of": edited_nets_of},
        "checkpoint": torch.utils.checkpoint.checkpoint,
        "head": nn.Linear(FEATURES, 2),
    }


def run_code(text: str, names: dict[str, Any], file: str = "<example>") -> None:
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), names)


def model_of(forward: str) -> nn.Module:
    names: dict[str, Any] = {"__name__": __name__}
    text = ATTRIBUTES + textwrap.indent(forward, "    ")
    run_code(text, names, f"/example_{abs(hash(text))}.py")
    torch.manual_seed(0)
    return names["Example"]()  # type: ignore[no-any-return]


def step_of(text: str) -> str:
    """A forward with the statements of a step, which returns the value that the last statement assigns."""
    *_, last = ast.parse(text).body
    if isinstance(last, ast.With):
        last = last.body[-1]
    result = (
        "x" if isinstance(last, ast.Expr) else ast.unparse(last.targets[-1]) if isinstance(last, ast.Assign) else ""
    )
    if "gain" in text or "v" in result:
        result = "x + self.gain.sum()" if "gain" in text else "x"
    body = "\n".join([*text.splitlines(), f"return {result}"])
    return "def forward(self, x):\n" + textwrap.indent(body, "    ")


def codes_of(run: Callable[[], Any]) -> tuple[set[str], SnnfxError | None]:
    """The codes of the error, of the warnings and of the report that running an example leads to."""
    error, found = None, set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            net = run()
            if isinstance(net, snnfx.Net):
                found |= {row.code for row in snnfx.explain(net).not_folded}
        except SnnfxError as raised:
            error = raised
            found |= {raised.code}
    return found | {str(w.message)[:8] for w in caught if issubclass(w.category, SnnfxWarning)}, error


def converted(model: nn.Module, x_seq: torch.Tensor, **options: Any) -> Any:
    net = snnfx.convert(model, example_inputs=x_seq[0], **options)
    net(x_seq)
    return net


def example(code: str, text: str) -> Callable[[], Any]:
    x_seq = torch.rand(T, 32 if "32" in text else N, FEATURES)
    if code in STEPS:
        model = model_of(step_of(text))
        return lambda: converted(model, x_seq)
    if code in FORWARDS:
        model = model_of(text if "return" in text else f"{text}\n    return x")
        if code == "SNNFX108":
            return lambda: converted(nn.Sequential(nn.Linear(FEATURES, FEATURES), model), x_seq)
        return lambda: snnfx.convert(model, entry="step") if code == "SNNFX201" else converted(model, x_seq)
    names = namespace()
    template = TEMPLATES.get(code, "EXAMPLE")
    indent = next(line for line in template.splitlines() if "EXAMPLE" in line).partition("EXAMPLE")[0]
    names["model_of"] = model_of

    def run() -> Any:
        if text.startswith("python -m snnfx"):
            Path("models").mkdir(exist_ok=True)
            Path("models/csnn.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(3, 2)\n")
            return run_command(text)
        excerpt = textwrap.indent(text, indent if not indent.strip() else "").removeprefix(indent)
        *before, last = ast.parse(template.replace("EXAMPLE", excerpt)).body
        if not isinstance(last, ast.Expr):
            run_code(ast.unparse(ast.Module([*before, last], [])), names)
            return names["net"]
        run_code(ast.unparse(ast.Module(before, [])), names)
        value = eval(ast.unparse(last), names)
        if isinstance(value, snnfx.Net) and code == "SNNFX106":
            value(names["x_seq"])
        return value if isinstance(value, snnfx.Net) else names["net"] if "net(" in ast.unparse(last) else None

    return run


def run_command(text: str) -> None:
    arguments = _parser().parse_args(text.partition("#")[0].split()[3:])
    arguments.run(arguments)


_THREE = "model = nn.Linear(3, 2); net = snnfx.convert(model); x_seq = torch.rand(5, 2, 3)\nEXAMPLE"
_NORM = "model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), neuron.LIFNode())\nEXAMPLE"
_LIBRARY = "from spikingjelly.activation_based import neuron\nmodel = nn.Sequential(EXAMPLE)\nsnnfx.convert(model)"
_NAMED = """
model = nn.Sequential()
for name, part in (("fc", nn.Linear(4, 4)), ("lif1", neuron.LIFNode()), ("lif", neuron.LIFNode())):
    model.add_module(name, part)
net, v = snnfx.convert(model), torch.zeros(N, 4)
EXAMPLE"""
_LARGE = "x_seq = torch.rand(50, 64, 4); x = x_seq[0]\nEXAMPLE"
_PASS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine(Pass):
    name = "mine"
    requires = "normalized"

    def apply(self, program):
        calls = [n for n in program.graph.nodes if n.op == "call_module"]
        node, new = calls[0], calls[0].args[0]
        EXAMPLE
        return "a note"

snnfx.convert(model, passes=[Mine()])"""
_PASS_BODY = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Base(Pass):
    name = "mine"
    requires = "normalized"

    def apply(self, program):
        if not getattr(program.source, "is_changed", False):
            program.source[0].weight.data.mul_(0.5)
        return "a note"

@dataclass(frozen=True)
class Mine(Base):
    EXAMPLE

snnfx.convert(model, passes=[Mine()])"""
_TRAINER = "trainer = Trainer(net, rule, optimizer, loss); labels = torch.rand(N, 4)\nEXAMPLE"
_SAVED = "torch.save(model.state_dict(), 'weights.pt'); snnfx.save(net, 'net.safetensors')\n"
_IMPORTED = "snnfx.export(net.eval(), 'net.nir', x_seq)\nEXAMPLE"
_MULTI_STEP = """
from spikingjelly.activation_based import layer, neuron
model = nn.Sequential(layer.Linear(4, 4, step_mode="m"), neuron.LIFNode(step_mode="m"))
EXAMPLE"""
_FUNCTION = """
EXAMPLE
Spike.forward = staticmethod(lambda ctx, x: torch.from_numpy((x.numpy() > 0.5).astype("float32")))
Spike.backward = staticmethod(lambda ctx, gradient: gradient)

class Model(nn.Module):
    def forward(self, x):
        return Spike.apply(x)

net = snnfx.convert(Model(), example_inputs=x)"""
_RECURRENT = """
class Model(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.gru, self.cell = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GRU(4, 4), nn.GRUCell(4, 4)
        self.register_memory("h", 0.0)

    def forward(self, x):
        h = torch.zeros_like(x) + self.h
        EXAMPLE
        self.h = 0.5 * self.h + (h[0] if isinstance(h, tuple) else h)
        return self.h

net = snnfx.convert(Model(), example_inputs=x, batch_norm="fold")"""
_STATE = """
class Holder:
    v = None

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.v_other, self.h, self.t, self.state = None, None, None, None, Holder()
        self.first, self.later = nn.Linear(4, 4), nn.Bilinear(4, 4, 4)
        self.lif, self.w = neuron.LIFNode(), nn.Linear(4, 4)

    def forward(self, x):
        y = x
        EXAMPLE
        return AFTER

net = snnfx.convert(Model(), example_inputs=x)"""
TEMPLATES: dict[str, str] = {
    "SNNFX101": _FUNCTION,
    "SNNFX109": _RECURRENT,
    "SNNFX218": _STATE.replace("AFTER", "(self.v if self.v is not None else self.state.v) * 2"),
    "SNNFX413": "other_model = nn.Sequential(nn.Linear(4, 4))\nEXAMPLE",
    "SNNFX813": "x_seq = torch.rand(2, 2, 1, 8, 8)\nEXAMPLE",
    "SNNFX815": """
class Neuron(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        EXAMPLE

    def forward(self, x):
        v = 0.5 * self.v + x
        y = (v > 1.0).to(x.dtype)
        self.v = v * (1 - y)
        return y

snnfx.export(snnfx.convert(Neuron()).eval(), "net.nir", x_seq)""",
    "SNNFX816": _IMPORTED,
    "SNNFX817": _IMPORTED,
    "SNNFX820": _SAVED + "EXAMPLE",
    "SNNFX821": """
class CSNN(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Linear(4, channels), neuron.LIFNode())

snnfx.save(snnfx.convert(CSNN(channels=64)), "net.safetensors")
EXAMPLE""",
    "SNNFX822": _SAVED + "model = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(tau=3.0))\nEXAMPLE",
    "SNNFX823": """
class MyPass(Pass):
    name, requires = "mine", "normalized"

    def apply(self, program):
        return "a note"

snnfx.save(snnfx.convert(model, passes=[MyPass()]), "net.safetensors")
EXAMPLE""",
    "SNNFX824": "edited_net = edited_nets_of(net, online.SLTT, 'per_step', None).sequence\nEXAMPLE",
    "SNNFX106": _NORM,
    "SNNFX202": "model = model_of('def forward(self, x):\\n    return 2 * x if x.shape[0] > 3 else x')\nEXAMPLE",
    "SNNFX204": _MULTI_STEP,
    "SNNFX205": _LIBRARY,
    "SNNFX208": """
def hook(module, inputs, result): ...

model = nn.Sequential()
model.add_module("conv1", nn.Linear(4, 4))
EXAMPLE
snnfx.convert(model)""",
    "SNNFX211": "x1 = x2 = x; model = model_of('def forward(self, *xs):\\n    return xs[0] + xs[1]')\nEXAMPLE",
    "SNNFX234": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        from spikingjelly.activation_based import neuron
        self.fc, self.lif = nn.Linear(4, 8), neuron.LIFNode(step_mode="m")

    def forward(self, x_seq):
        return x_seq.sum() + EXAMPLE

snnfx.convert(Model(), takes="sequence", example_inputs=(x_seq,))""",
    "SNNFX220": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        EXAMPLE

    def forward(self, x):
        return self.fc(x)

snnfx.convert(Model())""",
    "SNNFX301": _THREE,
    "SNNFX303": "model = model_of('def forward(self, a, b):\\n    return a + b'); net = snnfx.convert(model)\nEXAMPLE",
    "SNNFX304": _THREE,
    "SNNFX305": "model = nn.Identity(); net = snnfx.convert(model)\nEXAMPLE",
    "SNNFX306": "model = nn.Sequential(nn.Conv1d(1, 1, 1)); net = snnfx.convert(model)\nEXAMPLE",
    "SNNFX307": "model = model_of('def forward(self, x, flag):\\n    return x if flag else -x')\nEXAMPLE",
    "SNNFX308": _NAMED.replace(', ("lif1", neuron.LIFNode())', ""),
    "SNNFX310": "image = x; net = snnfx.convert(model, time_dim=None)\nEXAMPLE",
    "SNNFX311": _NAMED,
    "SNNFX314": "model = model_of('def forward(self, x, mem=None):\\n    mem = x if mem is None else mem + x\\n"
    "    return x, 2 * x, mem')\nEXAMPLE",
    "SNNFX316": "x = torch.rand(T, N, 4, requires_grad=True)\nEXAMPLE",
    "SNNFX317": _NORM,
    "SNNFX318": _LARGE,
    "SNNFX319": _LARGE,
    "SNNFX501": _PASS,
    "SNNFX701": _PASS_BODY,
    "SNNFX702": _PASS_BODY.replace('if not getattr(program.source, "is_changed", False):', "if False:"),
    "SNNFX703": _PASS,
    "SNNFX704": _PASS_BODY,
    "SNNFX610": _TRAINER,
    "SNNFX611": "EXAMPLE\nTrainer(net, rule, optimizer, loss).step(x_seq, target)",
    "SNNFX613": "EXAMPLE\nfptt_online_training(model, optimizer, x_seq.transpose(0, 1), target.transpose(0, 1), "
    "nn.functional.mse_loss, 0.5, w_ra)",
    "SNNFX617": "my_loss = nn.functional.mse_loss\nEXAMPLE\nTrainer(net, rule, optimizer, loss).step(x_seq, target)",
    "SNNFX622": "trainer = Trainer(net, FPTT(0.5), optimizer, loss)\n"
    "torch.save(trainer.state_dict(), 'trainer.pt')\nEXAMPLE",
}
"""Code -> the code around its examples; an example without an entry is complete."""
_NOT_EXECUTED = {
    "the excerpt has no template yet": (
        "SNNFX107 SNNFX111 SNNFX115 SNNFX112 SNNFX203 SNNFX210 SNNFX212 SNNFX213 "
        "SNNFX216 SNNFX230 SNNFX231 SNNFX232 SNNFX235 SNNFX250 SNNFX312 SNNFX315 SNNFX321 SNNFX504 "
        "SNNFX508 SNNFX615 SNNFX618 SNNFX619 SNNFX620 SNNFX705 "
    ),
    "it needs another machine, process or library": (
        "SNNFX222 SNNFX223 SNNFX326 SNNFX503 SNNFX505 SNNFX507 SNNFX509 SNNFX601 SNNFX803 "
    ),
    "it needs a net that differs from its model": (
        "SNNFX401 SNNFX402 SNNFX403 SNNFX404 SNNFX405 SNNFX410 SNNFX411 SNNFX412 "
    ),
    "it compiles or exports, which takes seconds; tests/deploy and tests/runtime do the same": (
        "SNNFX506 SNNFX320 SNNFX801 SNNFX802 SNNFX804 SNNFX805 SNNFX806 SNNFX807 SNNFX808 SNNFX809 "
        "SNNFX810 SNNFX811 SNNFX812 SNNFX818 SNNFX819 SNNFX825 "
    ),
}
LISTED = {code: reason for reason, codes in _NOT_EXECUTED.items() for code in codes.split()}
"""Codes whose examples do not run here, with the reason."""


def test_the_list_names_registered_codes_without_a_template() -> None:
    assert set(CODES) >= set(LISTED)
    assert not set(LISTED) & set(TEMPLATES)


@pytest.mark.parametrize("code", [code for code in CODES if code not in LISTED])
def test_the_example_that_fails(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snnfx.errors._warned.clear()
    found, _ = codes_of(lambda: example(code, CODES[code].fails)())
    assert code in found, found


@pytest.mark.parametrize("code", [code for code in CODES if code not in LISTED])
def test_the_example_that_works(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snnfx.errors._warned.clear()
    found, error = codes_of(lambda: example(code, CODES[code].works)())
    assert error is None and code not in found, found
