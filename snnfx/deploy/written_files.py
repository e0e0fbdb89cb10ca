"""Write the files of one result completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from snnfx.errors import ExportError

__all__ = ["written_at_once"]


@contextlib.contextmanager
def written_at_once(path: Path) -> Iterator[Path]:
    """A folder whose files move to the folder of `path` at the end, if nothing fails."""
    parent = path.parent
    if not parent.is_dir():
        raise _not_writable(path, f"the folder {parent} does not exist.", "Create it first.")
    if path.is_dir():
        raise _not_writable(path, "it is a folder.", "Pass the path of a file.")
    try:
        if not os.access(parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise PermissionError(f"no permission to write {path}")
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        raise _not_writable(path, f"{error}.", "Choose a folder in which you may create files.") from error
    try:
        yield folder
        # The model last: it refers to the file with its weights.
        for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
            os.replace(file, parent / file.name)
    except OSError as error:
        raise _not_writable(path, f"{error}.", "Free disk space, or choose another folder.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _not_writable(path: Path, why: str, hint: str) -> ExportError:
    return ExportError("SNNFX802", f"`{path}` cannot be written", why=why, hint=hint)
