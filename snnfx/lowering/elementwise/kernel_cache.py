"""The disk cache of generated code: files that are complete, and not more of them than a limit allows.

Two environment variables configure it:

- SNNFX_CACHE_DIR: the folder; by default `snnfx` in the user's cache folder.
- SNNFX_CACHE_LIMIT: the size in MiB above which the least recently used files are removed; by default 256, and 0 for
  no limit.

Several processes may use one folder: a file appears under its name by a rename, and removing a file that another
process has loaded does not affect that process.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from snnfx.errors import InputError

__all__ = ["cache_directory", "is_complete", "store", "usable_directory", "write_atomically"]

_DEFAULT_LIMIT = 256
_SUFFIXES = (".so", ".py")
_ABANDONED_AFTER = 3600.0
"""Age in seconds of a temporary entry that a killed process left."""
_TEMPORARY = (".build_", ".write_")
_DIGEST_LENGTH = 32


def cache_directory() -> Path:
    """The folder of compiled kernels: SNNFX_CACHE_DIR, or `snnfx` in the user's cache folder."""
    configured = os.environ.get("SNNFX_CACHE_DIR")
    if configured:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "snnfx"


def usable_directory() -> Path:
    """The cache folder, or a temporary folder of this process if the cache is not writable."""
    directory = cache_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if os.access(directory, os.W_OK):
            return directory
    except OSError:
        pass
    return Path(_directory_of_this_process())


def store(content: bytes, path: Path) -> None:
    """Write a library with a digest behind its content, then remove files beyond the limit.

    A loader ignores bytes behind the sections of a library.
    """
    write_atomically(content + hashlib.sha256(content).digest(), path)


def is_complete(path: Path) -> bool:
    """Whether a library exists as `store` wrote it; loading a truncated one may kill the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if hashlib.sha256(content[:-_DIGEST_LENGTH]).digest() != content[-_DIGEST_LENGTH:]:
        return False
    with contextlib.suppress(OSError):  # another process may have removed it, or own it
        os.utime(path)  # its last use
    return True


def write_atomically(content: bytes, path: Path) -> None:
    """Write a file under another name, then rename it, so that other processes never see a part of it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".write_", delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
    _remove_least_recently_used(path)


def _limit() -> int:
    """The limit in bytes, 0 for none."""
    configured = os.environ.get("SNNFX_CACHE_LIMIT", str(_DEFAULT_LIMIT))
    try:
        limit = int(configured)
    except ValueError:
        limit = -1
    if limit < 0:
        raise InputError(
            "SNNFX326",
            f"the environment variable SNNFX_CACHE_LIMIT is {configured!r}",
            why="it is no size in MiB.",
            hint="Set it to a number, such as 256, or to 0 for no limit.",
        )
    return limit << 20


def _remove_least_recently_used(newest: Path) -> None:
    """Remove the files that were not used for the longest time until the rest fits, but never `newest`."""
    limit, total, now = _limit(), 0, time.time()
    files: list[tuple[float, int, Path]] = []
    for path in newest.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            status = path.stat()
            if path.name.startswith(_TEMPORARY) and now - status.st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            elif path.suffix in _SUFFIXES and not path.name.startswith("."):
                files.append((status.st_mtime, status.st_size, path))
                total += status.st_size
    for _, size, path in sorted(files) if limit else ():
        if total <= limit:
            return
        if path != newest:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            total -= size


@functools.cache
def _directory_of_this_process() -> str:
    folder = tempfile.TemporaryDirectory(prefix="snnfx_")
    _temporary_folders.append(folder)
    return folder.name


_temporary_folders: list[Any] = []
"""Kept alive until the process ends."""
