"""The README and the documents: their Python blocks run, their links and paths exist, their numbers are measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = sorted((ROOT / "tools" / "docs").glob("*.md"))
PEERS = ("spikingjelly", "snntorch", "norse", "onnxruntime", "nir")


def python_blocks(document: Path) -> list[str]:
    """The Python blocks of a document, each padded so that a traceback shows the line numbers of the document."""
    text = document.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match[1]
        for match in re.finditer(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    ]


def run_blocks(document: Path) -> int:
    """Run the blocks of a document as pasted, one after the other in one namespace; returns how many ran."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    ran = 0
    for number, block in enumerate(python_blocks(document)):
        if all(importlib.util.find_spec(peer) for peer in PEERS if re.search(rf"\b(import|from) {peer}\b", block)):
            # A source file for each block, as a cell of a notebook has: capture reads the code of loops.
            file = Path(f"{document.stem}_{number}.py").resolve()
            file.write_text(block, encoding="utf-8")
            exec(compile(block, str(file), "exec"), namespace)
            ran += 1
    return ran


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_readme_runs_for_every_seed(seed: int) -> None:
    torch.manual_seed(seed)
    assert run_blocks(README) > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.stem)
def test_document_runs(document: Path) -> None:
    assert run_blocks(document) == len(python_blocks(document)) or not all(map(importlib.util.find_spec, PEERS))


@pytest.mark.parametrize("seed", range(1, 4))
def test_online_training_runs_for_every_seed(seed: int) -> None:
    torch.manual_seed(seed)
    assert run_blocks(ROOT / "tools" / "docs" / "online_training.md") > 0


@pytest.mark.parametrize("document", [README, *DOCUMENTS], ids=lambda path: path.stem)
def test_links_lead_somewhere(document: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", [README, *DOCUMENTS], ids=lambda path: path.stem)
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w./-])((?:snnfx|passes|tests|tools)/[\w./*]*)", text))
    missing = {path for path in named if not any(name.isupper() for name in re.split(r"[/_.]", path) if name)}
    assert {path for path in missing if not list(ROOT.glob(path.rstrip("/.")))} - MOVED == set()


MOVED = {"tools/bench_*.py"}
"""Paths of earlier releases, in the release notes."""


def test_every_folder_of_the_package_is_described() -> None:
    folders = {f"snnfx/{path.parent.name}/" for path in (ROOT / "snnfx").glob("*/__init__.py")}
    assert {folder for folder in folders if folder not in README.read_text(encoding="utf-8")} == set()


def test_speed_table_is_the_measured_one() -> None:
    cases = json.loads((ROOT / "tools" / "results" / "networks_cpu.json").read_text(encoding="utf-8"))["cases"]
    rows = [speed_row(case) for case in cases if case["malloc"] == "default"]
    text = README.read_text(encoding="utf-8")
    assert rows
    assert [row for row in rows if row not in text] == []


def speed_row(case: dict[str, Any]) -> str:
    cells = ["{network}, T={T} N={N}".format(**case["case"])]
    for mode in ("inference", "training"):
        times = case[mode]
        peer = f"{times['SpikingJelly'] / times['snnfx']:.1f}" if "SpikingJelly" in times else "–"  # noqa: RUF001
        cells += [f"{times['stepped'] / times['snnfx']:.1f}", peer, f"{times['snnfx'] / times['floor']:.2f}"]
    return f"| {' | '.join(cells)} |"
