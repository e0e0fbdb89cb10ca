"""Run the examples of messages: a frame completes each excerpt, and the codes that it leads to are collected.

The statements of a step become the forward of a model, a forward becomes a class, and all other examples run in a
namespace with `model`, `net`, `x_seq` and so on, see `namespace`.
"""

from __future__ import annotations

import ast
import copy
import re
import sys
import textwrap
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import snnfx
from snnfx import functional, neuron, online
from snnfx.capture.capture import capture
from snnfx.cli.commands import _parser
from snnfx.errors import CODES, SnnfxError, SnnfxWarning
from snnfx.online.edited_nets import edited_nets_of
from snnfx.passes import Normalize, Partition, Pass, PassManager
from support.example_frames import FRAMES
from support.example_models import METHODS, PARTS, with_method

__all__ = ["COMPLETED", "codes_of", "example"]

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
FORWARDS = ("SNNFX108", "SNNFX201", "SNNFX209", "SNNFX226")
"""Codes whose examples are the forward of a model."""
COMPLETED = {*STEPS, *FORWARDS, *FRAMES, *PARTS, *METHODS}
"""Codes whose examples are excerpts that need more code around them."""


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


def run_code(text: str, names: dict[str, Any]) -> None:
    """Run code in a source file, which capture reads, and in a module, in which pickle finds its classes."""
    file = Path(f"example_{len(list(Path.cwd().glob('example_*.py')))}.py").resolve()
    file.write_text(text, encoding="utf-8")
    module = types.ModuleType(file.stem)
    names["__name__"] = module.__name__
    sys.modules[module.__name__] = module
    module.__dict__.update(names)
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
    finally:
        names.update(module.__dict__)
        del sys.modules[module.__name__]


def model_of(forward: str) -> nn.Module:
    names: dict[str, Any] = {}
    run_code(ATTRIBUTES + textwrap.indent(forward, "    "), names)
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


_NAMED_CODE = re.compile(r"SNNFX\d{3}")


def codes_of(run: Callable[[], Any]) -> tuple[set[str], SnnfxError | None]:
    """The codes of the error, of the warnings and of the report that running an example leads to."""
    error, found = None, set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            net = run()
            if isinstance(net, snnfx.Net):
                report = snnfx.explain(net)
                # The state of a neuron is sequential; a layer in front of it is not.
                found |= {row.code for row in report.not_folded if row.code != "SNNFX107" or row.what in ("fc", "fc_x")}
                found |= set(_NAMED_CODE.findall(str(report))) - {row.code for row in report.not_folded}
        except SnnfxError as raised:
            error = raised
            found |= {raised.code}
    return found | {str(w.message)[:8] for w in caught if issubclass(w.category, SnnfxWarning)}, error


def converted(model: nn.Module, x_seq: torch.Tensor, **options: Any) -> Any:
    net = snnfx.convert(model, example_inputs=x_seq[0], **options)
    net(x_seq)
    return net


def example(code: str, text: str) -> Callable[[], Any]:
    """A function that runs an example of a code, and returns the net that it makes."""
    x_seq = torch.rand(T, 32 if "32" in text else N, FEATURES)
    if code in STEPS:
        model = model_of(step_of(text))
        return lambda: converted(model, x_seq)
    if code in FORWARDS:
        model = model_of(text if "return" in text else f"{text}\n    return x")
        if code == "SNNFX108":
            return lambda: converted(nn.Sequential(nn.Linear(FEATURES, FEATURES), model), x_seq)
        return lambda: snnfx.convert(model, entry="step") if code == "SNNFX201" else converted(model, x_seq)
    if text.startswith("python -m snnfx"):
        return lambda: run_command(text)
    if code in METHODS:
        return lambda: run_completed(code, with_method(code, CODES[code].fails, text))
    frame = {**FRAMES, **PARTS}.get(code, "EXAMPLE")
    indent = next(line for line in frame.splitlines() if "EXAMPLE" in line).partition("EXAMPLE")[0]
    excerpt = textwrap.indent(text, indent if not indent.strip() else "").removeprefix(indent)
    return lambda: run_completed(code, frame.replace("EXAMPLE", excerpt))


def run_completed(code: str, text: str) -> Any:
    names = {**namespace(), "model_of": model_of}
    *before, last = ast.parse(text).body
    if not isinstance(last, ast.Expr):
        run_code(text, names)
        return names["net"]
    assigned = ast.Assign([ast.Name("value", ast.Store())], last.value)
    run_code(ast.unparse(ast.fix_missing_locations(ast.Module([*before, assigned], []))), names)
    value = names["value"]
    if isinstance(value, snnfx.Net) and code == "SNNFX106":
        value(names["x_seq"])
    return value if isinstance(value, snnfx.Net) else names["net"] if "net(" in ast.unparse(last) else None


def run_command(text: str) -> None:
    Path("models").mkdir(exist_ok=True)
    Path("models/csnn.py").write_text("from torch import nn\n\ndef build():\n    return nn.Linear(3, 2)\n")
    arguments = _parser().parse_args(text.partition("#")[0].split()[3:])
    arguments.run(arguments)
