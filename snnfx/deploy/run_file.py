"""Run an exported file in a process without snnfx: `python -I run_file.py PATHS KIND FILE EXAMPLES RESULTS`."""

import json
import sys
from collections.abc import Callable
from typing import Any

sys.path[:] = json.loads(sys.argv[1])
sys.modules["snnfx"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

Run = Callable[[Any], Any]


def leaves(value: Any) -> list[Any]:
    """The leaves of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for v in value for leaf in leaves(v)] if isinstance(value, list | tuple) else [value]


def onnx_file(path: str, names: list[str]) -> Run:
    """The function of an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}

    def run(example: Any) -> list[Tensor]:
        tensors = [t for t in leaves(example) if isinstance(t, Tensor)]
        feeds = {n: t.detach().cpu().numpy() for n, t in zip(names, tensors, strict=True)}
        arrays = session.run(None, {n: a for n, a in feeds.items() if n in wanted})
        return [torch.from_numpy(a.copy()) for a in arrays]

    return run


def program_file(kind: str, path: str) -> Run:
    """The function of a `.pt2` file."""
    module = torch._inductor.aoti_load_package(path) if kind == "aot" else torch.export.load(path).module()
    return lambda example: module(*example)


def main(kind: str, path: str, given: str, results: str) -> None:
    """Run the file on examples and save the tensors that it returns, or the message of its error."""
    saved = torch.load(given, weights_only=False)
    run = onnx_file(path, saved["names"]) if kind == "onnx" else program_file(kind, path)
    found: list[Any] = []
    with torch.no_grad():
        for example in saved["examples"]:
            try:
                outputs = run(example)
                found.append([y.detach().cpu() for y in leaves(outputs) if isinstance(y, Tensor)])
            except Exception as error:
                lines = str(error).strip().splitlines()
                found.append(f"{type(error).__name__}: {lines[0] if lines else ''}")
    torch.save(found, results)


main(*sys.argv[2:])
