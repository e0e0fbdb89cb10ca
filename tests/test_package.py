"""The package is the same from a wheel, from an editable install and from a plain checkout."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import snnfx

ROOT = Path(__file__).parents[1]
OPTIONAL = ("spikingjelly", "snntorch", "norse", "graphviz", "sklearn", "matplotlib")

REPORT = f"""
import importlib.resources, json, sys
import snnfx, snnfx.state.adapters, snnfx.errors, snnfx.passes
print(json.dumps({{
    "package": snnfx.__file__,
    "passes": snnfx.passes.__file__,
    "name of passes": snnfx.passes.__name__,
    "typed": importlib.resources.files("snnfx").joinpath("py.typed").is_file(),
    "version": snnfx.__version__,
    "optional packages imported": [name for name in {OPTIONAL} if name in sys.modules],
}}))
"""


def folder_sources(folder: Path, prefix: str) -> set[str]:
    return {prefix + path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def import_elsewhere(place: str, folder: Path, cwd: Path) -> dict[str, object]:
    """Import the package in `folder` in a new interpreter, started in `cwd`, and return its report.

    `place` is "site" (a site-packages folder, whose .pth files run: how editable installs work) or "path" (an entry of
    sys.path). `-S` hides an snnfx that is installed here; the dependencies come from the folders of this process that
    contain no snnfx.
    """
    dependencies = [p for p in sys.path if Path(p).is_dir() and not (Path(p) / "snnfx").exists()]
    enter = {"site": f"import site; site.addsitedir({str(folder)!r})", "path": f"sys.path.insert(0, {str(folder)!r})"}
    code = f"import sys\n{enter[place]}\nsys.path += {dependencies!r}\n{REPORT}"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build(hook: str, checkout: Path, into: Path, **settings: str) -> Path:
    """Call a build hook of setuptools in a checkout, without isolation or network, and return the wheel."""
    into.mkdir(parents=True)
    code = f"from setuptools import build_meta; build_meta.{hook}({str(into)!r}, {settings!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (artefact,) = into.iterdir()
    return artefact


def unpack(wheel: Path, into: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files of a clone, so that a build leaves nothing behind in this one."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("snnfx", "passes"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    return clone


def expect_complete(report: dict[str, object], package: Path, passes: Path) -> None:
    assert Path(str(report["package"])) == package / "__init__.py"
    assert Path(str(report["passes"])) == passes / "__init__.py"
    assert report["name of passes"] == "snnfx.passes"
    assert report["typed"] is True
    assert report["version"] == snnfx.__version__
    assert report["optional packages imported"] == []


def test_wheel_contains_every_module_and_imports(checkout: Path, tmp_path: Path) -> None:
    wheel = build("build_wheel", checkout, tmp_path / "dist")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = folder_sources(ROOT / "snnfx", "snnfx/") | folder_sources(ROOT / "passes", "snnfx/passes/")
    assert packed == sources | {"snnfx/py.typed"}

    target = unpack(wheel, tmp_path / "site-packages")
    report = import_elsewhere("site", target, tmp_path)
    expect_complete(report, target / "snnfx", target / "snnfx" / "passes")


def test_source_archive_builds_the_same_wheel(checkout: Path, tmp_path: Path) -> None:
    sdist = build("build_sdist", checkout, tmp_path / "dist")
    shutil.unpack_archive(sdist, tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    from_archive = build("build_wheel", source, tmp_path / "dist2")
    from_checkout = build("build_wheel", checkout, tmp_path / "dist3")
    with zipfile.ZipFile(from_archive) as a, zipfile.ZipFile(from_checkout) as b:
        assert sorted((i.filename, i.CRC) for i in a.infolist()) == sorted((i.filename, i.CRC) for i in b.infolist())


def test_strict_editable_install_links_the_sources(checkout: Path, tmp_path: Path) -> None:
    wheel = build("build_editable", checkout, tmp_path / "dist", editable_mode="strict")
    target = unpack(wheel, tmp_path / "site-packages")
    report = import_elsewhere("site", target, tmp_path)
    package = Path(str(report["package"])).parent
    expect_complete(report, package, package / "passes")
    for path in (package / "errors.py", package / "passes" / "__init__.py"):
        source = checkout / ("passes" if path.parent.name == "passes" else "snnfx") / path.name
        assert path.samefile(source)


def test_default_editable_install_reads_the_checkout(checkout: Path, tmp_path: Path) -> None:
    wheel = build("build_editable", checkout, tmp_path / "dist")
    target = unpack(wheel, tmp_path / "site-packages")
    report = import_elsewhere("site", target, tmp_path)
    expect_complete(report, checkout / "snnfx", checkout / "passes")


def test_plain_checkout_finds_the_passes_beside_the_package(checkout: Path, tmp_path: Path) -> None:
    report = import_elsewhere("path", checkout, tmp_path)
    expect_complete(report, checkout / "snnfx", checkout / "passes")


def test_importing_passes_directly_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise each pass would exist twice, as two classes that are not equal.
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"snnfx\.passes"):
        importlib.import_module("passes")
    assert "passes" not in sys.modules


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("convert", "snnfx.convert"),
        ("draw", "snnfx.inspect.picture.draw"),
        ("explain", "snnfx.inspect.explain"),
        ("profile", "snnfx.inspect.profile.profile"),
        ("verify", "snnfx.inspect.verify.verify"),
    ],
)
def test_public_function_is_not_shadowed_by_its_module(name: str, module: str) -> None:
    function = getattr(importlib.import_module(module), name)
    assert callable(function)
    assert getattr(snnfx, name) is function


def test_every_public_name_is_there() -> None:
    missing = [name for name in snnfx.__all__ if not hasattr(snnfx, name)]
    assert missing == []
    assert sorted(snnfx.__all__) == sorted(set(snnfx.__all__))


def test_version_equals_the_one_in_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert snnfx.__version__ == project["version"]
