"""Run an exported file in a process without snnfx: `python -I run_file.py KIND FILE EXAMPLE RESULTS`."""

import sys
from typing import Any

sys.modules["snnfx"] = None  # type: ignore[assignment]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402


def leaves(value: Any) -> list[Any]:
    """The leaves of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for v in value for leaf in leaves(v)] if isinstance(value, list | tuple) else [value]


def main(kind: str, path: str, given: str, results: str) -> None:
    """Run the file on an example and save the tensors that it returns."""
    saved = torch.load(given, weights_only=False)
    example = saved["example"]
    tensors = [t for t in leaves(example) if isinstance(t, Tensor)]
    outputs: Any
    with torch.no_grad():
        if kind == "onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            feeds = {n: t.detach().cpu().numpy() for n, t in zip(saved["names"], tensors, strict=True)}
            wanted = {value.name for value in session.get_inputs()}
            arrays = session.run(None, {n: a for n, a in feeds.items() if n in wanted})
            outputs = [torch.from_numpy(a.copy()) for a in arrays]
        elif kind == "aot":
            outputs = torch._inductor.aoti_load_package(path)(*example)
        else:
            outputs = torch.export.load(path).module()(*example)
    torch.save([y.detach().cpu() for y in leaves(outputs) if isinstance(y, Tensor)], results)


main(*sys.argv[1:])
