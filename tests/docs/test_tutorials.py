"""The cells of each executed page of the site run in order. `bash tools/docs.sh` runs them in Jupyter."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

DOCS = Path(__file__).parents[2] / "tools" / "docs"
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n((?::[^\n]*\n)*)(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
PAGES = sorted(path for path in DOCS.rglob("*.md") if CELL.search(path.read_text(encoding="utf-8")))
OPTIONAL = ("IPython", "matplotlib", "nir", "norse", "onnx", "onnxruntime", "sklearn", "snntorch", "spikingjelly")


def cells(page: Path) -> list[str]:
    """The cells of a page, each padded so that a traceback shows the line numbers of the page."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, match.start(2)) + match[2] for match in CELL.finditer(text)]


def packages_of(page: Path) -> set[str]:
    """The packages besides torch and snnfx that a page imports, or that its exports need."""
    code = "\n".join(cells(page))
    needed = {name for name in OPTIONAL if re.search(rf"\b(import|from) {name}\b", code)}
    return needed | ({"onnx"} if ".onnx" in code else set()) | ({"nir"} if ".nir" in code else set())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_cells_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in packages_of(page):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(page)):
        # As in Jupyter, each cell is a source file of its own.
        file = tmp_path / f"{page.stem}_{number}.py"
        file.write_text(cell, encoding="utf-8")
        exec(compile(cell, str(file), "exec"), namespace)
    if importlib.util.find_spec("matplotlib"):
        import matplotlib.pyplot as plt

        plt.close("all")
