"""Build the documentation site: gather its sources, generate the reference, run Sphinx.

Run it with `bash tools/docs.sh`, which also sets up the environment; `--help` lists the options.

The sources are tools/docs/, README.md and tools/pictures/. They are copied into one folder, next to the pages that are
generated from the docstrings and from the registry of codes, so a build writes nothing into the checkout but build/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import time
from pathlib import Path, PurePosixPath

from code_pages import write_code_pages
from reference_pages import write_reference
from sphinx.cmd.build import build_main

ROOT = Path(__file__).resolve().parents[3]
SITE_FOLDERS = {"tools/docs": "", "tools/pictures": "pictures"}
"""Folders of the repository that the site contains, and their place in it."""
REPOSITORY_LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[)#])")
"""The target of a Markdown link to a file, without the anchor."""


def gather(source: Path) -> None:
    """Copy the documents, with their links rewritten, and the pictures."""
    for document in [ROOT / "README.md", *(ROOT / "tools" / "docs").rglob("*.md")]:
        target = source / site_path(document)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(rewrite_links(document), encoding="utf-8")
    shutil.copytree(ROOT / "tools" / "pictures", source / "pictures")


def site_path(file: Path) -> PurePosixPath:
    """The place in the site of a file of the repository."""
    path = file.relative_to(ROOT).as_posix()
    if path == "README.md":
        return PurePosixPath("readme.md")
    for folder, place in SITE_FOLDERS.items():
        if path.startswith(f"{folder}/"):
            return PurePosixPath(place, path.removeprefix(f"{folder}/"))
    raise ValueError(f"{path} is not part of the site; link to a file of {', '.join(SITE_FOLDERS)}")


def rewrite_links(document: Path) -> str:
    """The text of a document, its links pointing to the places in the site."""
    start = site_path(document).parent

    def rewrite(match: re.Match[str]) -> str:
        file = Path(os.path.normpath(document.parent / match[2]))
        # Generated pages exist in the site only.
        place = site_path(file) if file.exists() else PurePosixPath(start, match[2])
        return match[1] + os.path.relpath(place, start)

    return REPOSITORY_LINK.sub(rewrite, document.read_text(encoding="utf-8"))


def build(out: Path, *, execute: bool, jobs: str = "auto") -> int:
    """Build the site into `out`/html; returns the exit status of Sphinx."""
    source = out / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    gather(source)
    write_reference(source / "reference")
    write_code_pages(source / "codes")
    # The kernels that run the examples read the settings of plots from here.
    os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent)
    mode = "force" if execute else "off"
    arguments = ["-b", "html", "-c", str(Path(__file__).parent), "-d", str(out / f"doctrees-{mode}"), "-j", jobs]
    arguments += ["-W", "--keep-going", "-q", "-D", f"nb_execution_mode={mode}"]
    status: int = build_main([*arguments, str(source), str(out / "html")])
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/docs.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="output folder (default: build/docs)")
    parser.add_argument("--no-execute", action="store_true", help="do not run the examples")
    options = parser.parse_args()
    start = time.perf_counter()
    status = build(options.out, execute=not options.no_execute)
    if status == 0:
        print(f"{options.out / 'html' / 'index.html'} ({time.perf_counter() - start:.0f} s)")
    return status


if __name__ == "__main__":
    sys.exit(main())
