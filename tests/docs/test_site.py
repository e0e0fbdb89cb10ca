"""The documentation site: it builds without a warning, and documents each public name and each code.

The examples do not run here: `test_tutorials.py` and `test_readme.py` run them without Jupyter, which is faster.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import snnfx
from snnfx.errors import CODES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "tools" / "docs"
MODULES = [
    "snnfx",
    "snnfx.errors",
    "snnfx.functional",
    "snnfx.neuron",
    "snnfx.online",
    "snnfx.passes",
    "snnfx.surrogate",
]
NEEDED = ("sphinx", "myst_nb", "furo")

pytestmark = [
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, NEEDED)), reason='the site needs `pip install "snnfx[docs]"`'
    ),
    pytest.mark.xdist_group("docs_site"),
]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without running its examples."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(DOCS / "site" / "build.py"), "--no-execute", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=out)
    assert built.returncode == 0, built.stdout + built.stderr
    return out / "html"


def documented_names(html: Path) -> set[str]:
    """The names of the inventory of Sphinx, which other sites use for links."""
    data = (html / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(data).decode().splitlines()}


def test_each_public_name_is_in_the_reference(html: Path) -> None:
    modules = [sys.modules[name] for name in MODULES]
    assert {
        m for m in vars(snnfx).values() if inspect.ismodule(m) and m.__name__.rpartition(".")[2] in snnfx.__all__
    } < {*modules}
    public = {
        f"{module.__name__}.{name}"
        for module in modules
        for name in module.__all__
        if name != "__version__" and not inspect.ismodule(getattr(module, name))
    }
    assert len(public) > 80
    assert public - documented_names(html) == set()


def test_each_code_has_a_page_with_its_examples(html: Path) -> None:
    without = []
    for code, entry in CODES.items():
        text = re.sub(r"<[^>]*>", "", (html / "codes" / f"{code}.html").read_text(encoding="utf-8"))
        wanted = ["Fails"] * bool(entry.fails) + ["Works"] * bool(entry.works)
        if not all(title in text for title in wanted):
            without.append(code)
    assert without == []


def test_each_page_is_in_a_table_of_contents(html: Path) -> None:
    pages = {path.relative_to(DOCS).with_suffix(".html").as_posix() for path in DOCS.rglob("*.md")}
    text = (html / "index.html").read_text(encoding="utf-8")
    assert {page for page in pages - {"index.html"} if f'href="{page}"' not in text} == set()
